"""How do all routers fare under the same conditions, and a dense model of equal active compute?

All have the same config, data order, initial weights and budget k; the losses of a router are its paper's.
Each row is compared to the first router with the same k. "loss_free" is TopK with that bias; "dense" has no
experts, and other initial weights.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from dataclasses import dataclass

from config import require
from experiments import lab
from router import ROUTERS

BOUNDED = [name for name, row in ROUTERS.items() if row.exact or row.max_pairs]  # they keep to the budget


@dataclass(frozen=True)
class RouterOptions(lab.Options):
    """What to compare."""

    routers: str = ",".join(BOUNDED)  # names, or loss_free or dense; the first is what others are compared to
    ks: str | None = None  # experts per token, each compared for itself (none: as in --config)


def answer(bench: lab.Lab) -> list[dict]:
    ks = [k.strip() for k in (bench.config.ks or str(bench.shared["k"])).split(",")]
    for k in ks:
        require(k.isdecimal(), "ks", repr(k), "whole numbers with commas between, such as 8,4,2")
    routers = [name.strip() for name in bench.config.routers.split(",")]
    known = [*ROUTERS, "loss_free", "dense"]
    for name in routers:
        require(name in known, "routers", repr(name), f"of {', '.join(known)}, with commas between")
    pairs = [(router, int(k)) for k in ks for router in routers]
    return lab.compare(
        bench,
        [lab.Arm(f"{name}, k={k}", recipe(bench, name, k), f"{routers[0]}, k={k}") for name, k in pairs],
    )


def recipe(bench: lab.Lab, router: str, k: int) -> dict[str, object]:
    """Settings of train.py under which a router is what it should be.

    No z-loss where scores are no softmax: it would move them, not just their logits.
    """
    shared, alone = bench.shared, {"balance_coef": 0.0, "z_coef": 0.0}
    warm_up = {"first_router": "expert_choice", "first_iters": max(1, shared["max_iters"] // 10)}
    sigmoid = {"score_fn": "sigmoid", "norm_topk": True}
    more = {
        "loss_free": {"router": "topk", **sigmoid, "bias_rate": 0.001, **alone},
        "dense": {"router": "topk", "n_expert": 1, "k": 1, "dense_hidden": k * shared["n_hidden"]},
        "expert_threshold": {**alone, **warm_up},
        "remoe": alone,
        "null_experts": {"n_null": shared["n_expert"], "balance_coef": 0.02},  # as in arXiv 2601.15370
        # about k experts, where scores are as even as those of config/compare.py
        "top_p": {"mass": min(1.0, 1.6 * k / shared["n_expert"]), "entropy_coef": 1e-4},
    }
    needs = ROUTERS[router].needs if router in ROUTERS else {}
    return {"router": router, "k": k, **needs, **more.get(router, {})}


if __name__ == "__main__":
    lab.run(answer, RouterOptions)
