# The trunk of experiments/: a TopK model that runs branch off from, once for a seed.
from config.tiny_topk import *

k = 8  # as the paper's OLMoE: lower K are then cuts
batch_size = 16
max_iters = 2500  # 10 million tokens
eval_interval = 500
