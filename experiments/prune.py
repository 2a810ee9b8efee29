"""Can the least used experts be dropped, and is that easier under SeqTopK?

The paper leaves it open. After training, the quarter of each layer's experts that fewest tokens of the
training text go to, under the rule that decodes, is never chosen again. "nats" is compared to the whole
model's.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import copy
from collections.abc import Iterator

import torch

from config import require
from experiments import lab
from model import MoEGPT


def answer(bench: lab.Lab) -> list[dict]:
    def judge(arm: lab.Arm, folder: Path) -> Iterator[lab.Judged]:
        opened = lab.open_run(bench, folder)
        yield arm.name, arm.name, lab.loss_figures(opened, opened.decode)
        pruned = opened._replace(model=without_least_used(bench, opened))
        yield f"{arm.name}, a quarter dropped", arm.name, lab.loss_figures(pruned, opened.decode)

    kept_experts(bench.shared["n_expert"], 8)  # now, and not when the minutes are spent
    return lab.judged(bench, [arm for k in (8, 2) for arm in lab.router_arms(["topk", "seqtopk"], k)], judge)


def kept_experts(n_expert: int, k: int) -> int:
    """How many experts are left when a quarter is dropped. Raises ValueError if these are fewer than k."""
    kept = n_expert * 3 // 4
    require(k <= kept, "k", k, f"at most {kept}, the experts that are kept of {n_expert}")
    return kept


@torch.no_grad()
def without_least_used(bench: lab.Lab, opened: lab.Opened) -> MoEGPT:
    """The model with the three quarters of each layer's experts that most tokens go to.

    A score stays the share that it was among all experts: without the dropped ones in it, every weight would
    grow. Raises ValueError if fewer than k experts are kept.
    """
    model = copy.deepcopy(opened.model)
    kept = kept_experts(model.config.n_expert, model.config.k)
    load = sum(model(x, router=opened.decode)[2].load for x in lab.usual_text(bench, opened))  # (L, E)
    for layer, pairs in zip(model.expert_layers(), load, strict=True):
        layer.bias[pairs.argsort(descending=True, stable=True)[kept:]] = -torch.inf  # never chosen
    return model


if __name__ == "__main__":
    lab.run(answer, lab.Options)
