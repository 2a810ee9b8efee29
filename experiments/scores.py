"""Which scores compare tokens best?

A softmax is normalised within a token, and SeqTopK compares its probabilities between tokens. Here it selects
by something else, while the weights stay:
- the weight, which is the probability over the sum of the token's best;
- the rise of a root: an expert counts by how much it raises the square root of the sum of its token's
  probabilities, or weights, best first. So the next expert is worth less to a token that has much already;
- logits, and logits less the token's mean (sigmoids select as logits do, because only their order counts);
- probability times the entropy of the token's probabilities, or times the norm of what its experts read.
Rows are compared to TopK, without tuning and tuned.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from experiments.lab import Lab, compare, router_arms, run_question, untuned

from model import Context, MoE, MoEGPT
from router import ExpertCache, Routing, rise_of_root

# logits, scores and weights (B, T, E) each, x (B, T, C) -> what selects, (B, T, E)
Ranking = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def entropy(share: Tensor) -> Tensor:
    """(..., E) -> (..., 1), in nats."""
    return torch.special.entr(share).sum(-1, keepdim=True)


RANKINGS: dict[str, Ranking] = {
    "weight": lambda logits, scores, weight, x: weight,
    "root of probabilities": lambda logits, scores, weight, x: rise_of_root(scores),
    "root of weights": lambda logits, scores, weight, x: rise_of_root(weight),
    "logits": lambda logits, scores, weight, x: logits,
    "centred logits": lambda logits, scores, weight, x: logits - logits.mean(-1, keepdim=True),
    "probability * entropy": lambda logits, scores, weight, x: scores * entropy(scores),
    "probability * norm": lambda logits, scores, weight, x: scores * x.float().norm(dim=-1, keepdim=True),
}


def answer(lab: Lab) -> list[dict]:
    _, seqtopk = arms = router_arms(lab, ["topk", "seqtopk"], lab.config.k)
    for name, ranking in RANKINGS.items():
        arms.append(replace(seqtopk, name=f"{seqtopk.name}, by {name}", rewire=select_by(ranking)))
    return compare(lab, untuned(arms) + arms)


def select_by(ranking: Ranking) -> Callable[[MoEGPT], None]:
    """An Arm's rewire: all layers select by the ranking, and weigh by their scores as before."""

    def rewire(model: MoEGPT) -> None:
        for layer in model.expert_layers():
            layer.forward = partial(forward, layer, ranking)

    return rewire


def forward(
    layer: MoE, ranking: Ranking, x: Tensor, context: Context, cache: ExpertCache | None
) -> tuple[Tensor, Routing]:
    """As MoE.forward, but it selects by the ranking."""
    logits, scores = layer.score(x)
    weight = layer.weigh(scores, torch.ones_like(scores, dtype=torch.bool))
    mask = layer.select(ranking(logits, scores, weight, x).detach(), context, cache)
    y = layer.dispatch(x, mask, layer.weigh(scores, mask), context)
    y = y if layer.shared is None else y + layer.run_shared(x)
    return y, Routing(logits, scores, mask)


if __name__ == "__main__":
    run_question(answer)
