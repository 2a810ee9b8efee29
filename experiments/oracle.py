"""Does it help at all to give some tokens more experts than others?

An oracle hands them out. It reads the text first under TopK, puts a sequence's tokens in order, and gives the
last third of them K + 1 experts, the middle K and the first K - 1. The orders: by the loss of the next token,
which no router can know, upwards and downwards; by the entropy of the prediction; and at random. Rows are
compared to TopK, which gives K to all, without tuning and tuned. The "nats" of an oracle is its own loss, and
no likelihood of the text.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from experiments.lab import Lab, all_learned, compare, loss_and_entropy, router_arms, run_question, untuned

import data
from config import require
from model import MoEGPT, Stats
from router import ROUTERS, Router, State, rank_experts, take_best, topk

# (tokens, targets, logits and statistics under TopK) -> experts of each token in each layer, (B, T) each
Allot = Callable[[Tensor, Tensor, Tensor, Stats], list[Tensor]]


def at_random(x: Tensor) -> Tensor:
    """The same numbers for the same tokens: (B, T) -> (B, T)."""
    draw = torch.Generator().manual_seed(int(x.sum()))
    return torch.rand(x.shape, generator=draw).to(x.device)


ORDERS = {  # tokens, loss and entropy (B, T) -> (B, T), higher for who gets more
    "high loss": lambda x, loss, entropy: loss,
    "low loss": lambda x, loss, entropy: -loss,
    "high entropy": lambda x, loss, entropy: entropy,
    "random": lambda x, loss, entropy: at_random(x),
}


def answer(lab: Lab) -> list[dict]:
    k = lab.config.k
    require(k > 1, "k", k, "at least 2, for a third of the tokens to get one less")
    all_learned(data.load(lab.shared["dataset"]))
    *arms, oracle = router_arms(lab, ["topk", "seqtopk", "online_seqtopk", "allotted"], k)
    for name, order in ORDERS.items():
        arms.append(replace(oracle, name=f"{name}, k={k}", rewire=read_twice(by_thirds(order))))
    return compare(lab, untuned(arms) + arms)


def by_thirds(order: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Allot:
    """One less than under TopK, as many, or one more."""

    def allot(x: Tensor, targets: Tensor, logits: Tensor, stats: Stats) -> list[Tensor]:
        place = order(x, *loss_and_entropy(logits, targets)).argsort(-1).argsort(-1)  # (B, T)
        return [n_taken - 1 + place * 3 // x.shape[1] for n_taken in stats.n_taken]

    return allot


def read_twice(allot: Allot) -> Callable[[MoEGPT], None]:
    """An Arm's rewire: where `allotted` routes, the model reads first under TopK, and then as allot says."""

    def rewire(model: MoEGPT) -> None:
        read, layers = model.forward, model.expert_layers()

        def forward(idx: Tensor, targets: Tensor, router: str | None = None) -> tuple:
            if (router or model.config.router) != "allotted":
                return read(idx, targets, router=router)
            with torch.no_grad():
                logits, _, stats = read(idx, router="topk")
                for layer, n_taken in zip(layers, allot(idx, targets, logits, stats), strict=True):
                    layer.state.n_taken = n_taken
            result = read(idx, targets, router=router)
            for layer in layers:
                layer.state.n_taken = n_taken[:0, :0]  # as in the checkpoint of any other model
            return result

        model.forward = forward

    return rewire


def allotted(scores: Tensor, k: int, state: State) -> Tensor:
    """Every token takes as many of its best experts as n_taken (B, T) of the state says (empty: k).

    scores (B, T, E) -> mask (B, T, E).
    """
    _, expert_ids = rank_experts(scores, scores.shape[-1])
    return take_best(scores, expert_ids, state["n_taken"]) if state["n_taken"].numel() else topk(scores, k)


ROUTERS["allotted"] = Router(
    allotted,
    causal=True,  # for a given state
    exact=False,
    decode="allotted",
    options=("state",),
    state=lambda config: {"n_taken": torch.empty(0, 0, dtype=torch.int64)},
)

if __name__ == "__main__":
    run_question(answer)
