# config/quality.py where a token may get no expert at all under SeqTopK.
from config.quality import *

min_experts = 0
