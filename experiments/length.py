"""How does the gap between global and online routing change with length and position?

Online SeqTopK knows the scores of the past only, so the two should agree more the more there is of it.
Trained with SeqTopK on sequences of 256, 1024 and 2048 tokens, the same number of tokens in all. "gap": the
loss under online SeqTopK less that under SeqTopK, of the same weights and tokens; then by position in the
sequence.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from experiments import lab

LENGTHS = (256, 1024, 2048)
PLACES = (16, 64, 256, 1024, 2048)  # ends of ranges of positions


def answer(bench: lab.Lab) -> list[dict]:
    recipe = {"router": "seqtopk", "k": bench.k}
    arms = [lab.Arm(f"T={T}", recipe | longer(bench.shared, T), "") for T in LENGTHS]

    def judge(arm: lab.Arm, folder: Path) -> Iterator[lab.Judged]:
        opened = lab.open_run(
            bench, folder, tokens=sys.maxsize
        )  # all of the text, for each T to have the same
        online, globally = (lab.by_token(opened, router)[0] for router in ("online_seqtopk", "seqtopk"))
        gap = online - globally  # (windows, T)
        T = gap.shape[1]
        places = [0, *(place for place in PLACES if place <= T)]
        for start, end in [(0, T), *pairwise(places)]:
            name = arm.name if end - start == T else f"{arm.name}, tokens {start + 1} to {end}"
            figures = {"nats": online[:, start:end].mean().item(), "gap": gap[:, start:end].mean().item()}
            yield name, "", figures | ({"curve": by_position(gap.mean(0))} if name == arm.name else {})

    return lab.judged(bench, arms, judge)


def longer(shared: dict, T: int) -> dict[str, int]:
    """Settings for sequences of T tokens in place of those that are shared, and as many tokens in all."""
    if shared["block_size"] == T:
        return {}
    per_step = shared["batch_size"] * shared["block_size"]
    batch_size = max(1, per_step // T)
    max_iters = shared["max_iters"] * per_step // (batch_size * T)
    size = {"block_size": T, "batch_size": batch_size, "max_iters": max_iters}
    return size | {"eval_interval": max_iters}  # the validation windows are longer as well


def by_position(values: Tensor) -> dict[str, list[float]]:
    """Means of values (T,) over the first 4 positions, those up to 8, up to 16 ...; none beyond the last."""
    cuts = [0, *(2**i for i in range(2, 20) if 2**i <= len(values))]
    parts = [values[start:end].mean().item() for start, end in pairwise(cuts)]
    return {"position": cuts[1:], "gap": parts}


if __name__ == "__main__":
    lab.run(answer)
