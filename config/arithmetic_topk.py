# Word problems in eight minutes of two CPU cores. The vocabulary is small: most work is in the experts.
dataset = "arithmetic"
router = "topk"
n_layer = 3
n_expert = 32
k = 4
n_hidden = 64
qk_norm = "head"  # copying from the question is learned earlier
balance_coef = 0.03
batch_size = 8
max_iters = 2200
embedding_boost = 5.0  # its 512 tokens are seen often
warmup_iters = 50
eval_interval = 550
eval_windows = 64
