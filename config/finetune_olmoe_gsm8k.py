# SeqTopK by fine-tuning: OLMoE-1B-7B learns GSM8K under it, on one GPU of 80 GB. Needs requirements-hf.txt.
#
#   python train.py config/finetune_olmoe_gsm8k.py
#   python train.py config/finetune_olmoe_gsm8k.py --train_only=router --learning_rate=1e-4   (the cheap way)
#   python experiments/gsm8k.py --init_from=out/finetune_olmoe_gsm8k
#
# Memory, worked out for its 6.92e9 parameters, not yet measured on such a GPU:
#                                    all     router only (2.1e6 learn)
#   weights, bfloat16               13.8 GB      13.8 GB
#   gradients, bfloat16             13.8 GB       0.0 GB
#   AdamW's two moments, bfloat16   27.7 GB       0.0 GB
#   inputs of 16 blocks (S, 2048)    0.3 GB       0.3 GB     S = batch_size * block_size = 4096 tokens
#   one block, computed again        2.3 GB       1.5 GB     8 pairs a token: (8 S, 2048) many times over
#   logits, their softmax, gradient  3.3 GB       3.3 GB     (S, 50304), in float32 thrice
#   one piece of AdamW               0.6 GB       0.0 GB
#   in all, at most                 62 GB        19 GB
# With weights in float32 the first three lines would be 110.7 GB. last.pt and best.pt take 41.5 GB of disk
# each. To resume, the machine itself needs 70 GB of memory.
#
# Several GPUs share float32 states, each with the micro-batches above (worked out as well):
#   torchrun --standalone --nproc_per_node=4 train.py config/finetune_olmoe_gsm8k.py --shard=true \
#       --weights_dtype=float32
#                                    1 GPU      2 GPUs     4 GPUs     8 GPUs, --batch_size=4
#   weights, gradients, moments    110.7 GB    55.4 GB    27.7 GB    13.8 GB  --gradient_accumulation_steps=8
#   blocks in whole, gradients          -      11 GB      11 GB      11 GB    1.7 GB each: 3 and 3 at most
#   embedding and head in whole         -       2 GB       2 GB       2 GB    with their gradients
#   inputs, one block, logits          6 GB     6 GB       6 GB       3 GB    one block also in bfloat16: 1 GB
#   in all, at most                  118 GB    75 GB      48 GB      31 GB
# While it starts, each process has all weights in the machine's memory: 27.7 GB. last.pt takes 83 GB.
init_from = "allenai/OLMoE-1B-7B-0924"
dataset = "gsm8k"
router = "seqtopk"
# A step of 1e-5 is below half the spacing of bfloat16 at a weight of 0.02, which is 6e-5, and would be lost
# when rounded to nearest. Rounded at random it arrives on average; 100 of them add a noise of about 1%.
weights_dtype = "bfloat16"
checkpoint_activations = True  # without: 16 blocks of 1 GB
compile = "false"  # a hundred iterations do not repay it
block_size = 512  # holds all problems but a few
batch_size = 8
gradient_accumulation_steps = 4  # 32 windows of about 3 problems: 100 iterations are about an epoch
max_iters = 100  # the paper sees fine-tuning converge in about as many
learning_rate = 1e-5  # low: the weights are to move little, the routing to find its new budget
warmup_iters = 10
optimizer = "adamw"  # as it was pretrained
embedding_boost = 1.0
eval_interval = 50
eval_windows = 64
log_interval = 1
