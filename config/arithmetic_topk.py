# Word problems on two CPU cores in under ten minutes. The vocabulary is small, so that the experts are most of the work.
dataset = "arithmetic"
router = "topk"
block_size = 256
batch_size = 16
