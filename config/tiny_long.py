# tiny_topk for three times as long, in seven minutes of two cores: experts then pay (experiments/minutes.py).
from config.tiny_topk import *

max_iters = 3000
eval_interval = 500
eval_windows = 512
