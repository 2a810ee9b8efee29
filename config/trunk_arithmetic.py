# The trunk on word problems, of which it solves most at K = 8. Raw gate weights, as OLMoE has, and narrow
# experts: with wide ones two of eight solve as many.
from config.arithmetic_topk import *

k = 8
n_hidden = 16
norm_best = 0
eval_interval = 500
