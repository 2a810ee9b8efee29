# The trunk on word problems, of which it solves most at K = 8: exact match shows what a lower K costs.
from config.arithmetic_topk import *

k = 8
eval_interval = 500
