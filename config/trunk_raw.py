# The trunk with raw softmax weights, as OLMoE has them.
from config.trunk import *

norm_best = 0
