"""One budget for each layer, or one for all layers of a sequence?

SeqTopK gives each layer of a sequence of T tokens T*K pairs. Here L layers share T*K*L: the model reads the
text first under TopK, all layers' candidates compete by the scores that they have there, and each token takes
as many experts in each layer as it has won. The same with a budget for each layer tells what reading twice
does. Both see tokens that come later. Rows are compared to TopK, without tuning and tuned.
"""

from dataclasses import replace

import torch
from torch import Tensor

from experiments.lab import Lab, compare, router_arms, run_question, untuned
from experiments.oracle import read_twice

from model import Stats
from router import seqtopk


def answer(lab: Lab) -> list[dict]:
    k = lab.config.k

    def each_layer(x: Tensor, targets: Tensor, logits: Tensor, stats: Stats) -> list[Tensor]:
        return [seqtopk(routing.scores, k).sum(-1) for routing in stats.routing]

    def all_layers(x: Tensor, targets: Tensor, logits: Tensor, stats: Stats) -> list[Tensor]:
        scores = torch.cat([routing.scores for routing in stats.routing], dim=1)  # (B, L*T, E)
        return list(seqtopk(scores, k).sum(-1).split(x.shape[1], dim=1))

    *arms, twice = router_arms(lab, ["topk", "seqtopk", "allotted"], k)
    for name, allot in (("a budget for each layer", each_layer), ("one for all layers", all_layers)):
        arms.append(replace(twice, name=f"{name}, k={k}", rewire=read_twice(allot)))
    return compare(lab, untuned(arms) + arms)


if __name__ == "__main__":
    run_question(answer)
