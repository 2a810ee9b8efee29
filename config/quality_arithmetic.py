# config/quality.py on word problems, where it is known which tokens are hard.
from config.arithmetic_topk import *

n_expert = 32
n_hidden = 64
max_iters = 800
eval_interval = 160
