# config/compare.py on word problems, where it is known which tokens are hard.
from config.arithmetic_topk import *

n_expert = 32
n_hidden = 64
batch_size = 4
max_iters = 800  # too few to solve many problems, enough to see which tokens are hard
eval_interval = 160
warmup_iters = 100  # the default, said here for --quick to shorten it
