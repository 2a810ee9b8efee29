# small_topk with the router changed, and nothing else.
from config.small_topk import *

router = "seqtopk"
