# Word problems on two CPU cores in under ten minutes. The vocabulary is small: most work is in the experts.
dataset = "arithmetic"
router = "topk"
batch_size = 8
max_iters = 2200
learning_rate = 3e-3
eval_interval = 200
eval_windows = 64
