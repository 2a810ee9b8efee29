# arithmetic_topk with the router changed, and nothing else.
from config.arithmetic_topk import *

router = "seqtopk"
