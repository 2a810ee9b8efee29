# tiny_topk with the router changed, and nothing else.
from config.tiny_topk import *

router = "seqtopk"
