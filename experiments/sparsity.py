"""Does SeqTopK gain more over TopK the sparser the model is?

The paper says yes, of one pretrained model, OLMoE with K = 8, tuned for about 100 iterations at each K: its
mean over five tasks goes from 29.74 under TopK to 31.49 under SeqTopK at K = 8, and from 14.49 to 22.04 at
K = 2. Here a TopK trunk with K = 8 is cut to K = 8, 4, 2 and 1, without tuning, and tuned under each router.
The weights' divisor stays that of the trunk. A row is compared to TopK with the same K and, because causal
routers do not spend all, to TopK at equal spending. At K = 1 SeqTopK is TopK. Untuned, online SeqTopK has the
"nats" of SeqTopK. seqtopk_root is SeqTopK by the ranking that scores.py has found, and softmax_threshold is
expert_threshold with the trunk's softmax scores. Two rows are the noise of the design: TopK again, its rate
changed by a millionth, and with other data.

--config=config/trunk_raw.py has raw softmax weights, as OLMoE has; config/trunk_64.py twice as many experts;
config/trunk_arithmetic.py answers that are right or wrong, as in the paper's tasks.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from experiments import lab as labs
from experiments.lab import EQUAL, UNTUNED, Arm, BranchOptions, Compared, Judged, Lab, OpenRun

from router import ROUTERS, Routing

KS = (8, 4, 2, 1)
NOISY_K = 2  # where the noise is measured
THRESHOLD = "softmax_threshold"
ROUTERS[THRESHOLD] = ROUTERS["expert_threshold"]._replace(decode=THRESHOLD, needs={})


def answer(lab: Lab) -> list[dict]:
    by_k = {k: arms_of(lab, k) for k in (KS[::2] if lab.config.quick else KS)}
    arms = [arm for arms in by_k.values() for arm in arms]
    switched = [arm for arm in labs.untuned(arms) if arm.settings["router"] != "online_seqtopk"]

    def judge(arm: Arm, run: OpenRun) -> Iterator[Judged]:
        if not arm.tuned and arm.settings["router"] == THRESHOLD:
            set_cutoffs(run, lab.config.seed)
        yield from labs.all_figures(arm, run)

    found = labs.gather(lab, [*switched, *arms, *noise(by_k[NOISY_K][0])], judge)
    add_equal_spending(found)
    return labs.rows_of(found)


def arms_of(lab: Lab, k: int) -> list[Arm]:
    """All routers with k experts per token. Cutoffs are learned under TopK for the first tenth."""
    more = ["seqtopk", "online_seqtopk", "seqtopk_root", "batchtopk"] if k > 1 else []
    *others, threshold = labs.router_arms(lab, ["topk", *more, THRESHOLD], k)
    first = {"first_router": "topk", "first_iters": max(1, lab.shared["max_iters"] // 10)}
    return [*others, replace(threshold, settings=threshold.settings | first)]


def noise(topk: Arm) -> list[Arm]:
    """Arms that differ from TopK in nothing that should matter; from scratch there are none."""
    if not topk.after:
        return []
    rate = labs.TUNING["learning_rate"] * (1 + 1e-6)
    again = replace(topk.vary(learning_rate=rate), name=f"{topk.name}, again")
    return [again, replace(topk, name=f"{topk.name}, other data", other_data=100)]


@torch.no_grad()
def set_cutoffs(run: OpenRun, seed: int) -> None:
    """The cutoffs under which usual text gets K experts per token, if it is routed as under TopK."""
    layers, update = run.model.expert_layers(), ROUTERS[THRESHOLD].update
    for layer, usual in zip(layers, run.usual_routing("topk", seed), strict=True):
        state = {name: tensor.unsqueeze(0) for name, tensor in layer.router_state().items()}
        new = update(state, Routing(*(tensor.unsqueeze(0) for tensor in usual)), run.model.config)
        layer.state.cutoff.copy_(new["cutoff"][0])


def add_equal_spending(found: dict[str, Compared]) -> None:
    """The column EQUAL of all rows but TopK's: the difference to TopK's curve of losses over K."""
    curves: dict[str, dict[int, Compared]] = {"": {}, UNTUNED: {}}
    for name, compared in found.items():
        if match := re.fullmatch(rf"topk, k=(\d+)({UNTUNED})?", name):
            curves[match[2] or ""][int(match[1])] = compared
    for name, compared in found.items():
        curve = curves[UNTUNED if name.endswith(UNTUNED) else ""]
        for start, figures in compared.runs.items() if not name.startswith("topk") else ():
            losses = {k: topk.runs[start]["nats"] for k, topk in curve.items() if start in topk.runs}
            if len(losses) > 1:
                figures[EQUAL] = figures["nats"] - interpolated(losses, figures["experts per token"])


def interpolated(losses: dict[int, float], k: float) -> float:
    """The loss at k, by the polynomial in log k through all `losses`: lines would lie above the curve."""
    curve = np.polynomial.Polynomial.fit(np.log(list(losses)), list(losses.values()), len(losses) - 1)
    return float(curve(math.log(k)))


if __name__ == "__main__":
    labs.run_question(answer, BranchOptions)
