"""Can the gap between global training and online decoding be closed?

The paper leaves it open. "gap" is the loss less that under SeqTopK of the same weights. With a prior of n0
tokens a text begins as if after n0 usual ones: quantiles of the scores that the trained model gives to
training text. Rows are compared to n0=0, which is online SeqTopK; the largest n0 is nearly a fixed threshold.

A strict budget leaves some of itself unspent. With an overcommit of x, tokens 1 to m compete for 1 + x times
their extra budget, while what they spend stays within it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from experiments.lab import Arm, Judged, Lab, OpenRun, judged, router_arms, run_question

from router import ROUTERS, State, cap_spending, check_bounds, count_above_threshold, rank_experts, take_best

PRIORS = (0, 1, 4, 16, 64, 256, 4096)  # tokens
OVERCOMMITS = (0.03, 0.06, 0.12, 0.25, 0.5)


def answer(lab: Lab) -> list[dict]:
    def judge(arm: Arm, run: OpenRun) -> Iterator[Judged]:
        globally = run.losses("seqtopk")["nats"]
        layers, usual = run.model.expert_layers(), run.usual_routing("seqtopk", lab.config.seed)
        scores = [routing.scores + layer.bias for routing, layer in zip(usual, layers, strict=True)]
        k, *bounds = (getattr(run.model.config, name) for name in ("k", "min_experts", "max_experts"))
        for n, more in [*((n, 0) for n in PRIORS), *((0, more) for more in OVERCOMMITS)]:
            for layer, found in zip(layers, scores, strict=True):
                layer.state.prior = prior(found, k, n, *bounds)
                layer.state.overcommit = torch.tensor(more)
            figures, what = run.losses(), f"overcommit={more}" if more else f"n0={n}"
            yield f"{arm.name}, {what}", f"{arm.name}, n0=0", figures | {"gap": figures["nats"] - globally}

    arms = router_arms(lab, ["seqtopk"], lab.config.k)
    return judged(lab, arms, judge, router="online_seqtopk_prior")


def prior(scores: Tensor, k: int, n: int, min_experts: int = 1, max_experts: int | None = None) -> Tensor:
    """Evenly spaced quantiles of the candidates of many tokens, as many as n tokens have.

    scores (B, T, E) -> (n*c,). Raises ValueError for impossible bounds (check_bounds).
    """
    u = check_bounds(scores.shape[-1], k, min_experts, max_experts)
    ranked = rank_experts(scores, u)[0][..., min_experts:].flatten().sort().values
    size = n * (u - min_experts)
    middle = 2 * torch.arange(size, device=scores.device) + 1  # over 2 * size: integers, floats would round
    return ranked[middle * len(ranked) // max(1, 2 * size)]


def online_seqtopk_prior(
    scores: Tensor,
    k: int,
    min_experts: int = 1,
    max_experts: int | None = None,
    strict: bool = True,
    *,
    state: State,
) -> Tensor:
    """online_seqtopk after the n0 tokens of `prior`, which compete but spend nothing of the strict budget.

    All of them compete for 1 + `overcommit` times their extra budget.

    scores (B, T, E) -> mask (B, T, E). Raises ValueError for impossible bounds (check_bounds).
    """
    B, T, E = scores.shape
    u = check_bounds(E, k, min_experts, max_experts)
    values, expert_ids = rank_experts(scores, u)
    tokens = torch.arange(1, T + 1, device=scores.device).expand(B, T)  # up to each one
    extra_budget = tokens * (k - min_experts)
    past = state["prior"].expand(B, -1)  # (B, n0*c)
    rivals = tokens + past.shape[1] // max(1, u - min_experts)  # with the n0 of the prior
    contested = (rivals * (k - min_experts) * (1 + state["overcommit"])).long()
    contested = torch.minimum(contested, rivals * (u - min_experts))  # no more than there are
    n_taken = count_above_threshold(values[..., min_experts:], past, contested)
    if strict:
        n_taken = cap_spending(n_taken, extra_budget, torch.zeros_like(extra_budget[:, :1]))
    return take_best(scores, expert_ids, min_experts + n_taken)


ROUTERS["online_seqtopk_prior"] = ROUTERS["online_seqtopk"]._replace(
    select=online_seqtopk_prior,
    decode="online_seqtopk_prior",
    options=(*ROUTERS["online_seqtopk"].options, "state"),
    cache=None,
    state=lambda config: {"prior": torch.empty(0), "overcommit": torch.tensor(0.0)},
)

if __name__ == "__main__":
    run_question(answer)
