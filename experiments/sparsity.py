"""Does SeqTopK gain more over TopK the sparser the model is?

The paper says yes: OLMoE's mean over five tasks goes from 29.74 to 31.49 at K = 8 and from 14.49 to 22.04 at
K = 2, after fine-tuning. Here both are trained from scratch with K = 8, 4 and 2 of the same experts. A row of
SeqTopK is compared to TopK with the same K.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from experiments import lab


def answer(bench: lab.Lab) -> list[dict]:
    return lab.compare(bench, [arm for k in (8, 4, 2) for arm in lab.router_arms(["topk", "seqtopk"], k)])


if __name__ == "__main__":
    lab.run(answer, lab.Options)
