"""Slow, obvious references, written from the definitions; every fast path in the repository is held to them.

Every choice here is made by Python's sorted() on (-score, position), so ties follow one total order:
within a token the lower expert index wins, between tokens the earlier one (and the earlier sequence first).

B sequences, T tokens in each, E experts, k experts per token on average.
"""

import torch
from torch import Tensor


def best_experts(token: list[float]) -> list[int]:
    """The experts of one token, best first."""
    return sorted(range(len(token)), key=lambda e: (-token[e], e))


def candidates(t: int, token: list[float], low: int, high: int) -> list[tuple[float, int, int, int]]:
    """(-score, token, rank, expert) of the experts that token t has on ranks low+1..high, best first."""
    return [(-token[e], t, rank, e) for rank, e in enumerate(best_experts(token)) if low <= rank < high]


def empty_mask(scores: Tensor) -> list[list[list[bool]]]:
    B, T, E = scores.shape
    return [[[False] * E for _ in range(T)] for _ in range(B)]


def ref_topk(scores: Tensor, k: int) -> Tensor:
    mask = empty_mask(scores)
    for b, sequence in enumerate(scores.tolist()):
        for t, token in enumerate(sequence):
            for e in best_experts(token)[:k]:
                mask[b][t][e] = True
    return torch.tensor(mask)


def ref_seqtopk(scores: Tensor, k: int, min_experts: int = 1, max_experts: int | None = None) -> Tensor:
    _, T, E = scores.shape
    high = min(k + 2, E) if max_experts is None else max_experts
    mask = empty_mask(scores)
    for b, sequence in enumerate(scores.tolist()):
        pool = []
        for t, token in enumerate(sequence):
            for e in best_experts(token)[:min_experts]:
                mask[b][t][e] = True
            pool += candidates(t, token, min_experts, high)
        for _, t, _, e in sorted(pool)[: T * (k - min_experts)]:
            mask[b][t][e] = True
    return torch.tensor(mask)


def ref_batchtopk(scores: Tensor, k: int, min_experts: int = 1, max_experts: int | None = None) -> Tensor:
    """One budget over the batch: SeqTopK of the sequences laid end to end."""
    end_to_end = scores.reshape(1, -1, scores.shape[-1])
    return ref_seqtopk(end_to_end, k, min_experts, max_experts).view(scores.shape)


def ref_online_seqtopk(
    scores: Tensor, k: int, min_experts: int = 1, max_experts: int | None = None, strict: bool = True
) -> Tensor:
    high = min(k + 2, scores.shape[-1]) if max_experts is None else max_experts
    mask = empty_mask(scores)
    for b, sequence in enumerate(scores.tolist()):
        past, spent = [], 0  # spent: candidates taken so far, the always-taken experts not counted
        for t, token in enumerate(sequence):
            budget = (t + 1) * (k - min_experts)
            own = candidates(t, token, min_experts, high)
            past = sorted(past + own)
            taken = [c for c in past[:budget] if c[1] == t]  # at or above the budget-th largest of the past
            if strict:
                taken = taken[: budget - spent]
            spent += len(taken)
            for e in best_experts(token)[:min_experts] + [c[3] for c in taken]:
                mask[b][t][e] = True
    return torch.tensor(mask)


def ref_expert_choice(scores: Tensor, k: int) -> Tensor:
    _, T, E = scores.shape
    share, spare = divmod(T * k, E)
    mask = empty_mask(scores)
    for b, sequence in enumerate(scores.tolist()):
        next_best = []  # (-score, expert, token): what each expert would take with one pair more
        for e in range(E):
            tokens = sorted(range(T), key=lambda t: (-sequence[t][e], t))
            for t in tokens[:share]:
                mask[b][t][e] = True
            next_best += [(-sequence[t][e], e, t) for t in tokens[share : share + 1]]
        for _, e, t in sorted(next_best)[:spare]:
            mask[b][t][e] = True
    return torch.tensor(mask)
