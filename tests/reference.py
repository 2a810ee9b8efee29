"""Slow, obvious references, written from the definitions; every fast path in the repository is held to them.

Every choice here is made by Python's sorted() on (-score, position), so ties follow one total order:
within a token the lower expert index wins, between tokens the earlier one (and the earlier sequence first).

B sequences, T tokens in each, E experts, k experts per token on average.
S tokens in the batch, C model width, H hidden width of an expert, D width of an attention head, V vocabulary.
"""

from collections.abc import Callable, Iterable
from functools import wraps

import torch
from torch import Tensor

Sequence = list[list[float]]  # scores of one sequence: T tokens, E experts


def of_each_sequence(pairs: Callable[..., Iterable[tuple[int, int]]]) -> Callable[..., Tensor]:
    """From the (token, expert) pairs of one sequence to a router: scores (B, T, E) -> mask (B, T, E)."""

    @wraps(pairs)
    def route(scores: Tensor, *args, **how) -> Tensor:
        taken = [(b, t, e) for b, seq in enumerate(scores.tolist()) for t, e in pairs(seq, *args, **how)]
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask[torch.tensor(taken, dtype=torch.int64).view(-1, 3).unbind(-1)] = True
        return mask

    return route


def best_experts(token: list[float]) -> list[int]:
    """The experts of one token, best first."""
    return sorted(range(len(token)), key=lambda e: (-token[e], e))


def candidates(t: int, token: list[float], low: int, high: int) -> list[tuple[float, int, int, int]]:
    """(-score, token, rank, expert) of the experts that token t has on ranks low+1..high, best first."""
    return [(-token[e], t, rank, e) for rank, e in enumerate(best_experts(token)) if low <= rank < high]


def bound(max_experts: int | None, k: int, sequence: Sequence) -> int:
    return min(k + 2, len(sequence[0])) if max_experts is None else max_experts


@of_each_sequence
def ref_topk(sequence: Sequence, k: int):
    for t, token in enumerate(sequence):
        yield from ((t, e) for e in best_experts(token)[:k])


@of_each_sequence
def ref_seqtopk(sequence: Sequence, k: int, min_experts: int = 1, max_experts: int | None = None):
    high, pool = bound(max_experts, k, sequence), []
    for t, token in enumerate(sequence):
        yield from ((t, e) for e in best_experts(token)[:min_experts])
        pool += candidates(t, token, min_experts, high)
    yield from ((t, e) for _, t, _, e in sorted(pool)[: len(sequence) * (k - min_experts)])


def ref_batchtopk(scores: Tensor, k: int, min_experts: int = 1, max_experts: int | None = None) -> Tensor:
    """One budget over the batch: SeqTopK of the sequences laid end to end."""
    end_to_end = scores.reshape(1, -1, scores.shape[-1])
    return ref_seqtopk(end_to_end, k, min_experts, max_experts).view(scores.shape)


@of_each_sequence
def ref_online_seqtopk(
    sequence: Sequence,
    k: int,
    min_experts: int = 1,
    max_experts: int | None = None,
    strict: bool = True,
    prior: tuple[int, Tensor] = (0, torch.empty(0)),
):
    """prior: tokens that came before the first one, and the scores of their candidates in any order."""
    high = bound(max_experts, k, sequence)
    past = [(-score, -1, 0, -1) for score in prior[1].tolist()]  # "token -1": earlier than all others
    spent = 0  # candidates taken so far, the always-taken experts not counted
    for t, token in enumerate(sequence):
        budget = (t + 1) * (k - min_experts)
        past = sorted(past + candidates(t, token, min_experts, high))
        best = past[: budget + prior[0] * (k - min_experts)]
        taken = [e for _, token_of, _, e in best if token_of == t]  # at or above the threshold: the last best
        if strict:
            taken = taken[: budget - spent]
        spent += len(taken)
        yield from ((t, e) for e in best_experts(token)[:min_experts] + taken)


@of_each_sequence
def ref_expert_choice(sequence: Sequence, k: int):
    T, E = len(sequence), len(sequence[0])
    share, spare = divmod(T * k, E)
    next_best = []  # (-score, expert, token): what each expert would take with one pair more
    for e in range(E):
        tokens = sorted(range(T), key=lambda t: (-sequence[t][e], t))
        yield from ((t, e) for t in tokens[:share])
        next_best += [(-sequence[t][e], e, t) for t in tokens[share : share + 1]]
    yield from ((t, e) for _, e, t in sorted(next_best)[:spare])


@of_each_sequence
def ref_top_p(sequence: Sequence, k: int, mass: float):
    for t, token in enumerate(sequence):
        best, held = best_experts(token), 0.0
        total = sum(token[e] for e in best)
        for n, e in enumerate(best):
            if n == 0 or held < mass * total:
                yield t, e
            held += token[e]


def ref_null_experts(scores: Tensor, k: int, n_null: int) -> Tensor:
    n_expert = scores.shape[-1] - n_null
    return ref_topk(scores, round(k * (1 + n_null / n_expert)))


@of_each_sequence
def ref_expert_threshold(sequence: Sequence, cutoff: Tensor):
    """cutoff (E,): of each expert."""
    for t, token in enumerate(sequence):
        yield from ((t, e) for e, score in enumerate(token) if score > cutoff[e].item())


@of_each_sequence
def ref_remoe(sequence: Sequence, k: int):
    for t, token in enumerate(sequence):
        yield from ((t, e) for e, score in enumerate(token) if score > 0)


# What must be said for some routers, and what makes the experts of tiny models' tokens vary.
SETTINGS = {
    "top_p": {"mass": 0.7},
    "expert_threshold": {"score_fn": "sigmoid", "norm_best": 0},
    "remoe": {"score_fn": "relu", "norm_best": 0},
    "null_experts": {"norm_topk": True, "n_null": 4},
}


# ---------------------------------------------------------------------------------------------------
# The MoE layer


def ref_swiglu(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """x (C,), w_in (C, 2H) whose first H columns are the gate's, w_out (H, C) -> (C,)."""
    gate, up = x @ w_in[:, : len(w_out)], x @ w_in[:, len(w_out) :]
    return (gate / (1 + torch.exp(-gate)) * up) @ w_out


def ref_run_experts(x: Tensor, mask: Tensor, weight: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """x (S, C); mask, weight (S, E); w_in (E, C, 2H); w_out (E, H, C) -> (S, C)."""
    y = []
    for s in range(len(x)):
        parts = [0 * x[s]]
        for e in range(len(w_in)):
            if mask[s, e]:
                parts.append(weight[s, e] * ref_swiglu(x[s], w_in[e], w_out[e]))
        y.append(torch.stack(parts).sum(0))
    return torch.stack(y)


def ref_scores(logits: Tensor, score_fn: str) -> Tensor:
    if score_fn == "sigmoid":
        return 1 / (1 + torch.exp(-logits))
    if score_fn == "relu":
        return (logits + logits.abs()) / 2
    odds = torch.exp(logits - logits.amax(-1, keepdim=True))
    return odds / odds.sum(-1, keepdim=True)


def ref_weight(scores: Tensor, mask: Tensor, config) -> Tensor:
    """What multiplies the experts' outputs (S, E): scores, or parts of what the token's chosen ones, or its
    best ones, add up to."""
    n_best = config.k if config.norm_best is None else config.norm_best
    weight = []
    for token, chosen in zip(scores, mask):
        best = best_experts(token.tolist())[:n_best]
        total = sum(token[e] for e in range(len(token)) if (chosen[e] if config.norm_topk else e in best))
        weight.append(torch.where(chosen, token, 0) / (total if total > 0 else 1))
    return torch.stack(weight)


def ref_moe(x: Tensor, w: dict[str, Tensor], config, select: Callable) -> tuple[Tensor, Tensor, Tensor]:
    """The layer with parameters w on one sequence x (T, C); `select` is a router, its settings filled in.

    Returns y (T, C), scores (T, E), mask (T, E); E and null experts in the last two.
    """
    scores = ref_scores(x @ w["gate.weight"].T, config.score_fn)
    mask = select((scores.detach() + w["bias"]).unsqueeze(0)).squeeze(0)
    n_expert = len(w["w_in"])
    weight = ref_weight(scores[:, :n_expert], mask[:, :n_expert], config)
    y = ref_run_experts(x, mask[:, :n_expert], weight, w["w_in"], w["w_out"])
    if config.shared_hidden:
        gate = ref_scores(x @ w["shared_gate.weight"].T, "sigmoid") if config.shared_gate else 1
        y = y + gate * ref_mlp(x, w, "shared.")
    return y, scores, mask


def ref_mlp(x: Tensor, w: dict[str, Tensor], prefix: str = "") -> Tensor:
    w_in, w_out = w[prefix + "w_in.weight"], w[prefix + "w_out.weight"]
    return torch.stack([ref_swiglu(token, w_in.T, w_out.T) for token in x])


# ---------------------------------------------------------------------------------------------------
# The model


def ref_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return gain * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def ref_rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """x (D,): the pair (x[i], x[i + D/2]) is a complex number, turned by position * theta^(-2i / D)."""
    half = len(x) // 2
    angle = torch.tensor([position * theta ** (-i / half) for i in range(half)])
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half), angle)
    return torch.cat([turned.real, turned.imag])


def ref_heads(x: Tensor, w: dict[str, Tensor], config) -> tuple[list, list, list]:
    """Queries, keys and values of one token x (C,): lists of heads (D,), not yet rotated."""
    D, n_q, n_kv = config.head_dim, config.n_head, config.kv_heads
    q, k, v = (w["qkv.weight"] @ x + w.get("qkv.bias", 0)).split([n_q * D, n_kv * D, n_kv * D])
    if config.qk_norm == "full":
        q, k = (ref_norm(a, w[f"{name}_norm.weight"], config.norm_eps) for a, name in ((q, "q"), (k, "k")))
    q, k, v = list(q.split(D)), list(k.split(D)), list(v.split(D))
    if config.qk_norm == "head":
        q = [ref_norm(head, w["q_norm.weight"], config.norm_eps) for head in q]
        k = [ref_norm(head, w["k_norm.weight"], config.norm_eps) for head in k]
    return q, k, v


def ref_attention(x: Tensor, w: dict[str, Tensor], config) -> Tensor:
    """One sequence x (T, C) -> (T, C)."""
    q, k, v = zip(*(ref_heads(token, w, config) for token in x))
    group = config.n_head // config.kv_heads  # neighbouring query heads that share a key head
    y = []
    for t in range(len(x)):
        heads = []
        for h in range(config.n_head):
            query = ref_rotate(q[t][h], t, config.rope_theta)
            keys = [ref_rotate(k[s][h // group], s, config.rope_theta) for s in range(t + 1)]
            logits = torch.stack([query @ key for key in keys]) / config.head_dim**0.5
            share = ref_scores(logits, "softmax")
            heads.append(sum(share[s] * v[s][h // group] for s in range(t + 1)))
        y.append(w["out.weight"] @ torch.cat(heads))
    return torch.stack(y)


def ref_model(model, idx: Tensor, select: Callable) -> Tensor:
    """Logits (T, V) of one sequence idx (T,) under the router `select`."""
    config, weights = model.config, model.state_dict()

    def under(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: w for name, w in weights.items() if name.startswith(prefix)}

    x = weights["embedding.weight"][idx]
    for layer in range(config.n_layer):
        w = under(f"blocks.{layer}.")
        x = x + ref_attention(
            ref_norm(x, w["attention_norm.weight"], config.norm_eps),
            under(f"blocks.{layer}.attention."),
            config,
        )
        h, mlp = ref_norm(x, w["mlp_norm.weight"], config.norm_eps), under(f"blocks.{layer}.mlp.")
        dense = layer < config.n_dense_layer or config.n_expert == 1
        x = x + (ref_mlp(h, mlp) if dense else ref_moe(h, mlp, config, select)[0])
    head = weights["embedding.weight" if config.tie_embeddings else "head.weight"]
    return ref_norm(x, weights["norm.weight"], config.norm_eps) @ head.T
