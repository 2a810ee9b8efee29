# Python source on two CPU cores: data, training and a sample in about five minutes.
router = "topk"
n_expert = 32
k = 4
n_hidden = 64
qk_norm = "head"
batch_size = 8  # many small steps learn more in these minutes than few large ones
max_iters = 700
warmup_iters = 50
eval_windows = 64
