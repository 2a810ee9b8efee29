# config/compare.py with weights that sum to 1 over a token's experts, as Mixtral has them.
from config.compare import *

norm_topk = True
