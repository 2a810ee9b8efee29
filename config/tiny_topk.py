# Python source on two CPU cores: data, training and a sample in under six minutes.
router = "topk"
batch_size = 8  # many small steps learn more in these minutes than few large ones
max_iters = 700
learning_rate = 3e-3
warmup_iters = 50
eval_windows = 64
