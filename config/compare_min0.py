# config/compare.py where a token may get no expert at all under SeqTopK.
from config.compare import *

min_experts = 0
