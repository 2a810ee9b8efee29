"""Should a model that is decoded online be trained with SeqTopK or online SeqTopK?

The paper trains globally and decodes online; trained online it does worse (45.80 against 46.09 on GSM8K).
Here both are trained, and a third run that begins with SeqTopK and spends its last tenth under online
SeqTopK. "nats" is the loss under online SeqTopK, but TopK's own for TopK. Each row is compared to TopK, but
the last to SeqTopK.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from experiments import lab


def answer(bench: lab.Lab) -> list[dict]:
    arms = lab.router_arms(["topk", "seqtopk", "online_seqtopk"], bench.k)
    start = {"first_router": "seqtopk", "first_iters": bench.shared["max_iters"] * 9 // 10}
    switched = lab.Arm(f"seqtopk, the last tenth online, k={bench.k}", arms[2].settings | start, arms[1].name)
    return lab.compare(bench, [*arms, switched])


if __name__ == "__main__":
    lab.run(answer)
