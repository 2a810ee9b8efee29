# Python source on two CPU cores: data, training and a sample in under six minutes.
dataset = "pysource"
block_size = 256
batch_size = 16
router = "topk"
