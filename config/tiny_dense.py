from config.tiny_topk import *

n_hidden = 256
n_expert = 1
k = 1
