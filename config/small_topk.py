# Python source on one GPU, in minutes: 63M parameters, 14M of them active. The learning rates are those found
# for tiny_topk; others were not tried at this shape.
dataset = "pysource"
router = "topk"
n_layer = 6
n_head = 6
n_embd = 384
n_expert = 32
k = 4
n_hidden = 256
block_size = 512
batch_size = 64
max_iters = 1800  # 2.8 epochs: as a fourth began, the loss rose by 0.05 (experiments/README.md)
eval_interval = 200
