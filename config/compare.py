# What experiments compare routers by: a minute on two CPU cores, so that a table has many settings and seeds.
from config.tiny_topk import *

n_expert = 32  # k = 8, 4 and 2 are a quarter, an eighth and a sixteenth of them
n_hidden = 64
batch_size = 4  # more steps of fewer tokens: less of the loss is the luck of the seed
max_iters = 600
learning_rate = 2e-3
eval_interval = 120
