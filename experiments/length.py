"""How does the gap between global and online routing change with length and position?

The paper trains globally and decodes online, where a router knows only the scores of the past. The longer the
past, the better the two should agree. Here models are trained with SeqTopK on sequences of 256, 1024 and 2048
tokens, and on the same number of tokens in all. "gap": the loss under online SeqTopK less that under SeqTopK,
of the same weights and tokens, first over all positions and then by position in the sequence.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from torch import Tensor

from experiments.lab import Arm, Judged, Lab, OpenRun, judged, router_arms, run_question

LENGTHS = (256, 1024, 2048)
PLACES = (16, 64, 256, 1024, 2048)  # ends of ranges of positions


def answer(lab: Lab) -> list[dict]:
    (arm,) = router_arms(lab, ["seqtopk"], lab.config.k)
    sizes = {T: longer(lab.shared, T) for T in LENGTHS}
    arms = [replace(arm, name=f"T={T}", settings=arm.settings | size) for T, size in sizes.items()]
    return judged(lab, arms, judge, tokens=sys.maxsize)  # all of the text, for each T to have the same


def judge(arm: Arm, run: OpenRun) -> Iterator[Judged]:
    online, globally = (run.by_token(router)[0] for router in ("online_seqtopk", "seqtopk"))
    gap = online - globally  # (windows, T)
    T = gap.shape[1]
    for start, end in [(0, T), *pairwise([0, *(place for place in PLACES if place <= T)])]:
        name = arm.name if end - start == T else f"{arm.name}, tokens {start + 1} to {end}"
        figures = {"nats": online[:, start:end].mean().item(), "gap": gap[:, start:end].mean().item()}
        yield name, "", figures | ({"curve": by_position(gap.mean(0))} if name == arm.name else {})


def longer(shared: dict, T: int) -> dict[str, int]:
    """Settings for sequences of T tokens instead of the shared block_size, and as many tokens in all."""
    if shared["block_size"] == T:
        return {}
    per_step = shared["batch_size"] * shared["block_size"]
    batch_size = max(1, per_step // T)
    max_iters = shared["max_iters"] * per_step // (batch_size * T)
    size = {"block_size": T, "batch_size": batch_size, "max_iters": max_iters}
    return size | {"eval_interval": max_iters}  # once: the validation windows are longer as well


def by_position(values: Tensor) -> dict[str, list[float]]:
    """Means of values (T,) over the first 4 positions, those up to 8, up to 16 ...; none beyond the last."""
    cuts = [0, *(2**i for i in range(2, 20) if 2**i <= len(values))]
    return {"position": cuts[1:], "gap": [values[start:end].mean().item() for start, end in pairwise(cuts)]}


if __name__ == "__main__":
    run_question(answer)
