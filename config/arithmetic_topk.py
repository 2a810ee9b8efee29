# Word problems in ten minutes of one CPU core. The vocabulary is small: most work is in the experts.
dataset = "arithmetic"
router = "topk"
n_expert = 32
k = 4
n_hidden = 64
qk_norm = "head"  # copying from the question is learned earlier
batch_size = 8
max_iters = 2000
embedding_boost = 5.0  # its 512 tokens are seen often
warmup_iters = 50
eval_interval = 200
eval_windows = 64
