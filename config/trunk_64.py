# The trunk with 64 experts, as many as OLMoE has, at the same K.
from config.trunk import *

n_expert = 64
