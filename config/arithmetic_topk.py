# Word problems on two CPU cores in under ten minutes. The vocabulary is small: most work is in the experts.
dataset = "arithmetic"
router = "topk"
block_size = 256
batch_size = 16
