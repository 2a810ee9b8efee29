"""How do all routers fare under the same conditions, and a dense model of equal active compute?

All have the same config, data order, initial weights and budget k, and each the auxiliary losses of its own
paper. Each row is compared to the first router with the same k. "loss_free" is TopK with the loss-free bias;
"dense" has no experts, and other initial weights. In SeqTopK's paper a model of 182M parameters, trained from
scratch, has a mean over four tasks of 40.25 under SeqTopK and 38.51 under TopK.
"""

from dataclasses import dataclass

from experiments.lab import Arm, Lab, Options, compare, run_question

from config import require
from router import BOUNDED, ROUTERS


@dataclass(frozen=True)
class RouterOptions(Options):
    """What to compare."""

    config: str = "config/tiny_topk.py"  # settings of train.py that all runs share
    routers: str = ",".join(BOUNDED)  # names, or loss_free or dense; the others are compared to the first
    ks: str | None = None  # experts per token, each compared by itself (none: as in --config)


def answer(lab: Lab) -> list[dict]:
    ks = [k.strip() for k in (lab.config.ks or str(lab.shared["k"])).split(",")]
    for k in ks:
        require(k.isdecimal(), "ks", repr(k), "whole numbers with commas between, such as 8,4,2")
    routers = [name.strip() for name in lab.config.routers.split(",")]
    known = [*ROUTERS, "loss_free", "dense"]
    for name in routers:
        require(name in known, "routers", repr(name), f"of {', '.join(known)}, with commas between")
    arms = []
    for k in map(int, ks):
        base = f"{routers[0]}, k={k}"
        arms += [Arm(f"{name}, k={k}", recipe(lab.shared, name, k), base) for name in routers]
    return compare(lab, arms)


def recipe(shared: dict[str, object], router: str, k: int) -> dict[str, object]:
    """Settings of train.py, beyond those that all share, under which a router is what its paper says.

    No z-loss where scores are no softmax: it would move them, not just their logits.
    """
    sigmoid, alone = {"score_fn": "sigmoid", "norm_topk": True}, {"balance_coef": 0.0, "z_coef": 0.0}
    warm_up = {"first_router": "expert_choice", "first_iters": max(1, shared["max_iters"] // 10)}
    more = {
        "loss_free": {"router": "topk", **sigmoid, "bias_rate": 0.001, **alone},
        "dense": {"router": "topk", "n_expert": 1, "k": 1, "dense_hidden": k * shared["n_hidden"]},
        "expert_threshold": {**alone, **warm_up},
        "remoe": alone,
        "null_experts": {"n_null": shared["n_expert"], "balance_coef": 0.02},  # as in arXiv 2601.15370
        # about k experts, where scores are even
        "top_p": {"mass": min(1.0, 1.6 * k / shared["n_expert"]), "entropy_coef": 1e-4},
    }
    needs = ROUTERS[router].needs if router in ROUTERS else {}
    return {"router": router, "k": k, **needs, **more.get(router, {})}


if __name__ == "__main__":
    run_question(answer, RouterOptions)
