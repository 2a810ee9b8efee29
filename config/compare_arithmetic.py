# config/compare.py on word problems, where it is known which tokens are hard.
from config.compare import *

dataset = "arithmetic"
qk_norm = "head"
max_iters = 800  # too few to solve many problems, enough to see which tokens are hard
learning_rate = 6e-3
warmup_iters = 100
eval_interval = 160
