"""Can the least used experts be dropped, and is that easier under SeqTopK?

The paper leaves open how SeqTopK goes with pruning. Here, after training, the quarter of each layer's experts
that get the fewest tokens is never chosen again; they are counted on the training text, under the router that
decodes. Each row is compared to the whole model.
"""

import copy
from collections.abc import Iterator

import torch

from experiments.lab import Arm, BranchOptions, Judged, Lab, OpenRun, judged, router_arms, run_question

from config import require
from model import MoEGPT


def answer(lab: Lab) -> list[dict]:
    def judge(arm: Arm, run: OpenRun) -> Iterator[Judged]:
        yield arm.name, arm.name, run.losses()
        pruned = run._replace(model=without_least_used(run, lab.config.seed))
        yield f"{arm.name}, a quarter dropped", arm.name, pruned.losses()

    kept_experts(lab.shared["n_expert"], 8)  # raises now, and not when the minutes are spent
    return judged(lab, [arm for k in (8, 2) for arm in router_arms(lab, ["topk", "seqtopk"], k)], judge)


def kept_experts(n_expert: int, k: int) -> int:
    """How many experts are left when a quarter is dropped. Raises ValueError if these are fewer than k."""
    kept = n_expert * 3 // 4
    require(k <= kept, "k", k, f"at most {kept}, the experts that are kept of {n_expert}")
    return kept


@torch.no_grad()
def without_least_used(run: OpenRun, seed: int) -> MoEGPT:
    """The model with the three quarters of each layer's experts that most tokens go to.

    A score stays the share that it was among all experts: without the dropped ones in it, every weight would
    grow. Raises ValueError if fewer than k experts are kept.
    """
    model = copy.deepcopy(run.model)
    kept = kept_experts(model.config.n_expert, model.config.k)
    for layer, routing in zip(model.expert_layers(), run.usual_routing(run.decode, seed), strict=True):
        load = routing.mask.sum((0, 1))  # (E,)
        layer.bias[load.argsort(descending=True, stable=True)[kept:]] = -torch.inf  # never chosen
    return model


if __name__ == "__main__":
    run_question(answer, BranchOptions)
