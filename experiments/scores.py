"""Which scores compare tokens best?

A softmax is normalised within a token, and SeqTopK compares its probabilities between tokens. Here it selects
by something else, while the weights stay: by logits, by logits less the token's mean, and by probability
times the entropy of the token's probabilities or times the norm of what its experts read. (Sigmoids select as
logits do, because only their order counts.) Rows are compared to TopK, without tuning and tuned.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from experiments.lab import Lab, compare, router_arms, run_question, untuned

from model import Context, MoE, MoEGPT
from router import ExpertCache, Routing

Ranking = Callable[[Tensor, Tensor], Tensor]  # logits (B, T, E), x (B, T, C) -> what selects, (B, T, E)


def by_entropy(logits: Tensor, x: Tensor) -> Tensor:
    share = logits.softmax(-1)
    return share * torch.special.entr(share).sum(-1, keepdim=True)


RANKINGS: dict[str, Ranking] = {
    "logits": lambda logits, x: logits,
    "centred logits": lambda logits, x: logits - logits.mean(-1, keepdim=True),
    "probability * entropy": by_entropy,
    "probability * norm": lambda logits, x: logits.softmax(-1) * x.norm(dim=-1, keepdim=True),
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
    """As MoE.forward, for layers without a shared expert."""
    logits, scores = layer.score(x)
    mask = layer.select(ranking(logits.detach(), x.detach().float()), context, cache)
    return layer.dispatch(x, mask, layer.weigh(scores, mask), context), Routing(logits, scores, mask)


if __name__ == "__main__":
    run_question(answer)
