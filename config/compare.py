# What experiments/ compares routers by: a minute on two CPU cores, for tables of many settings and seeds.
# The recipe is the one under which today's tables were made, before Muon and normalised weights.
router = "topk"
n_expert = 32  # k = 8, 4 and 2 are a quarter, an eighth and a sixteenth of them
n_hidden = 64
norm_best = 0
batch_size = 4  # more steps of fewer tokens: less of the loss is the luck of the seed
max_iters = 600
optimizer = "adamw"
learning_rate = 2e-3
embedding_boost = 1.0
weight_decay = 0.1
warmup_iters = 50
eval_interval = 120
eval_windows = 64
