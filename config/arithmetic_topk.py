# Word problems on two CPU cores in under nine minutes. The vocabulary is small: most work is in the experts.
dataset = "arithmetic"
router = "topk"
qk_norm = "head"  # copying from the question is learned earlier, and bears the higher learning rate
batch_size = 8
max_iters = 2600
learning_rate = 6e-3
eval_interval = 200
eval_windows = 64
