# The dense twin of tiny_topk: one MLP, as wide as the four experts that an average token gets there.
from config.tiny_topk import *

n_hidden = k * n_hidden
n_expert = 1
k = 1
