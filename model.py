"""A decoder-only Mixture-of-Experts language model of the OLMoE shape.

Pre-norm RMSNorm, RoPE, SwiGLU experts, untied head. Pretrained OLMoE, Qwen and Mixtral models open as well.

    B  sequences in the batch     C  model width (n_embd)              E  experts (n_expert)
    T  tokens in a sequence       H  hidden width of one expert        k  experts per token on average
    S  B*T tokens in the batch    D  width of one attention head       N  (token, expert) pairs computed
    V  vocabulary                 L  layers that have experts

The path of a token through one layer: gate -> scores -> router (router.py) -> mask -> the pairs sorted by
expert -> two grouped matrix products, times the scores in between -> back to the tokens. Nothing on it waits
for the host: a router with a known budget gives every tensor a shape that does not depend on the data.
"""

import importlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from router import ROUTERS, ExpertCache, Router, check_bounds, check_slots, load_balance_loss, z_loss


@dataclass(frozen=True)
class MoEConfig:
    """The architecture and its routing. Raises ValueError for values that do not fit together."""

    vocab_size: int = 0  # tokens in the vocabulary (0: as many as the data has)
    block_size: int = 256  # longest sequence, in tokens
    n_layer: int = 4  # transformer blocks
    n_head: int = 4  # attention heads
    n_kv_head: int | None = None  # key and value heads, for grouped-query attention (none: n_head)
    head_width: int | None = None  # width D of one attention head (none: n_embd / n_head)
    n_embd: int = 128  # model width C
    n_expert: int = 16  # experts E per layer (1: a dense model)
    k: int = 2  # experts per token on average: the budget
    n_hidden: int = 128  # hidden width H of one expert
    shared_hidden: int = 0  # hidden width of a shared expert that every token gets (0: none)
    shared_gate: bool = False  # the shared expert's output is scaled by a sigmoid gate of its own
    n_dense_layer: int = 0  # the first layers that have one dense MLP in place of experts
    dense_hidden: int | None = None  # hidden width of a dense MLP (none: k * n_hidden)
    router: str = "seqtopk"  # which experts process which tokens: the name of a row of router.ROUTERS
    min_experts: int = 1  # no token gets fewer experts, under routers that take this
    max_experts: int | None = None  # no token gets more (none: k + 2, at most n_expert)
    strict: bool = True  # online_seqtopk never spends more than k experts per token of the past
    mass: float = 0.4  # top_p: the share of a token's scores that its experts have together
    n_null: int = 0  # null_experts: experts that do nothing, beside the n_expert
    score_fn: str = "softmax"  # scores from the gate's logits: softmax, sigmoid or relu
    norm_topk: bool = False  # weights of a token's chosen experts sum to 1, whatever norm_best says
    norm_best: int | None = None  # weights sum to 1 over so many of a token's best scores (none: k; 0: raw)
    qkv_bias: bool = False  # a bias is added to queries, keys and values
    qk_norm: str = "none"  # RMSNorm on queries and keys: none, head (each by itself) or full (all at once)
    tie_embeddings: bool = False  # the output head shares the token embedding's weights
    rope_theta: float = 10000.0  # base of the rotary position embedding
    norm_eps: float = 1e-5  # epsilon of RMSNorm

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_embd", "n_expert", "n_hidden"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.block_size >= 2, "block_size", self.block_size, "at least 2")
        for name in ("rope_theta", "norm_eps"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("vocab_size", "shared_hidden", "n_dense_layer", "n_null"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        choices = {"router": ROUTERS, "score_fn": SCORES, "qk_norm": ("none", "head", "full")}
        for name, allowed in choices.items():
            require(getattr(self, name) in allowed, name, getattr(self, name), "one of " + ", ".join(allowed))
        for name in ("n_kv_head", "head_width", "dense_hidden"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1, or none")
        whole = self.head_width or self.n_embd % self.n_head == 0
        require(whole, "n_embd", self.n_embd, f"a multiple of n_head = {self.n_head}")
        width = "head_width" if self.head_width else "n_embd / n_head"
        require(self.head_dim % 2 == 0, width, self.head_dim, "even, for RoPE")
        divides = self.n_head % self.kv_heads == 0
        require(divides, "n_kv_head", self.kv_heads, f"a divisor of n_head = {self.n_head}")
        for name in ("n_embd", "n_hidden"):  # rows of 16 bytes in bfloat16, as grouped_mm asks
            require(getattr(self, name) % 8 == 0, name, getattr(self, name), "a multiple of 8")
        check_bounds(self.n_expert, self.k, self.min_experts, self.max_experts)
        require(0 < self.mass <= 1, "mass", self.mass, "above 0 and at most 1")
        check_router(self, self.router)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head if self.head_width is None else self.head_width

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def best(self) -> int:
        return self.k if self.norm_best is None else self.norm_best

    @property
    def dense_width(self) -> int:
        return self.k * self.n_hidden if self.dense_hidden is None else self.dense_hidden

    def has_experts(self, layer: int) -> bool:
        return self.n_expert > 1 and layer >= self.n_dense_layer


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise ValueError, naming the setting, its value and what is allowed, unless it is ok."""
    if not ok:
        raise ValueError(f"{name} is {value}, but must be {allowed}")


def check_router(config: MoEConfig, name: str) -> None:
    """Raise ValueError, naming the remedy, unless the router of that name can route under these settings."""
    router = ROUTERS[name]
    for key, value in router.needs:
        found, remedy = getattr(config, key, value), f"{key}={str(value).lower()}"
        if found != value:
            raise ValueError(f"router {name} needs {remedy}, but {key} is {found}: give --{remedy}")
    if "n_null" in router.options:
        require(config.n_null >= 1, "n_null", config.n_null, f"at least 1 under router {name}")
        check_slots(config.n_expert, config.k, config.n_null)
    else:
        require(config.n_null == 0, "n_null", config.n_null, f"0 under router {name}")


SCORES = {"softmax": lambda logits: logits.softmax(-1), "sigmoid": torch.sigmoid, "relu": torch.relu}


class Routing(NamedTuple):
    """What the gate of one layer said of each token, and what the router made of it: (B, T, E) each, or
    (B, T, E + n_null)."""

    logits: Tensor  # float32
    scores: Tensor  # float32
    mask: Tensor  # bool


class Stats(NamedTuple):
    """What the routing of one forward did. L is 0 in a dense model."""

    balance_loss: Tensor  # scalar, mean over layers; 1 is uniform
    z_loss: Tensor  # scalar, mean over layers
    load: Tensor  # (L, E) pairs that each expert got
    experts: Tensor  # (L, B, T) experts that each token got
    routing: list[Routing]  # of each layer


# -------------------- caches ------------------------------------------------------------------------------


class KVCache:
    """Keys and values of one layer's past, (B, n_kv_head, max_tokens, D) each."""

    def __init__(self, config: MoEConfig, batch_size: int, max_tokens: int, device, dtype):
        shape = (batch_size, config.kv_heads, max_tokens, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    def append(self, k: Tensor, v: Tensor, pos: int) -> tuple[Tensor, Tensor]:
        """Write (B, n_kv_head, T, D) at `pos` and return everything up to there."""
        end = pos + k.shape[2]
        self.k[:, :, pos:end] = k
        self.v[:, :, pos:end] = v
        return self.k[:, :, :end], self.v[:, :, :end]


class Cache:
    """All that decoding remembers: per layer a KVCache and, where the router needs one, an ExpertCache.

    The layers read `pos`, the number of tokens seen; the model alone advances it, once per forward.
    """

    def __init__(
        self,
        config: MoEConfig,
        batch_size: int,
        max_tokens: int,
        router: str,
        device,
        dtype,
        priors: list[Tensor | None] | None = None,  # of all layers
    ):
        self.max_tokens, self.router = max_tokens, router
        self.kv = [KVCache(config, batch_size, max_tokens, device, dtype) for _ in range(config.n_layer)]
        row, size = ROUTERS[router], (batch_size, max_tokens, config.k, config.n_expert)
        self.experts: list[ExpertCache | None] = [
            row.cache(*size, device=device, **routing_options(config, row, prior))
            if row.cache and config.has_experts(layer)
            else None
            for layer, prior in enumerate(priors or [None] * config.n_layer)
        ]
        self.active = torch.zeros(batch_size, max_tokens, dtype=torch.bool, device=device)  # is a token real?
        self.reset()

    def reset(self) -> None:
        """Forget everything, so that the next forward starts new sequences."""
        self.pos = 0
        self.padded = False  # some token may not be active
        self.active.fill_(False)
        for experts in filter(None, self.experts):
            experts.reset()

    def mark(self, T: int, active: Tensor | None) -> None:
        """Note which of the next T tokens are real (None: all)."""
        self.active[:, self.pos : self.pos + T] = True if active is None else active
        self.padded = self.padded or active is not None

    def visible(self, T: int) -> Tensor | None:
        """Which tokens the next T may attend to, for Context.visible."""
        end, device = self.pos + T, self.active.device
        if not self.padded and (T == 1 or self.pos == 0):
            return None
        query, key = torch.arange(self.pos, end, device=device).unsqueeze(1), torch.arange(end, device=device)
        if not self.padded:
            return (key <= query)[None, None]  # (1, 1, T, pos + T)
        visible = (key <= query) & self.active[:, None, :end]
        visible = visible | (key == query)  # padding sees itself: a softmax over nothing is NaN
        return visible.unsqueeze(1)  # (B, 1, T, pos + T)

    def advance(self, T: int) -> None:
        self.pos += T

    @property
    def kv_nbytes(self) -> int:
        return sum(kv.k.nbytes + kv.v.nbytes for kv in self.kv)

    @property
    def expert_nbytes(self) -> int:
        return sum(experts.nbytes for experts in filter(None, self.experts))


def routing_options(config: MoEConfig, router: Router, prior: Tensor | None) -> dict:
    """What this router takes besides k: settings of `config`, and its layer's prior."""
    return {name: prior if name == "prior" else getattr(config, name) for name in router.options}


# -------------------- layers ------------------------------------------------------------------------------


def rope_angles(position: Tensor, config: MoEConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, (B or 1, 1, T, D) each, of the angles at position (B or 1, T) (arXiv 2104.09864).

    Both halves of D have the same angles; the sines of the first half are negative.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=position.device) / config.head_dim
    angle = position[:, None, :, None] * config.rope_theta**-exponent  # (B or 1, 1, T, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of each head. x (B, heads, T, D) -> the same in float32."""
    cos, sin = angles
    x = x.float()
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class Context(NamedTuple):
    """What all layers of one forward share."""

    router: Router
    angles: tuple[Tensor, Tensor]  # of rope_angles
    visible: Tensor | None  # (B or 1, 1, T, pos + T) bool, which keys a query sees; None: all up to itself
    active: Tensor | None  # (B, T) bool, False at padding and in rows that have finished; None: all active
    pos: int  # tokens in the caches before this forward


class Attention(nn.Module):
    def __init__(self, config: MoEConfig):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.kv_heads, config.head_dim
        self.widths = [heads * self.head_dim for heads in (self.n_head, self.n_kv_head, self.n_kv_head)]
        self.qkv = nn.Linear(config.n_embd, sum(self.widths), bias=config.qkv_bias)
        self.out = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=False)
        self.qk_norm = config.qk_norm
        if self.qk_norm != "none":
            q_heads, k_heads = (1, 1) if self.qk_norm == "head" else (self.n_head, self.n_kv_head)
            self.q_norm = nn.RMSNorm(q_heads * self.head_dim, config.norm_eps)
            self.k_norm = nn.RMSNorm(k_heads * self.head_dim, config.norm_eps)

    def forward(self, x: Tensor, context: Context, kv: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(x).split(self.widths, dim=-1)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, n_head, T, D)
        k = k.view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, n_kv_head, T, D)
        v = v.view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, context.angles).to(v.dtype), rotate(k, context.angles).to(v.dtype)
        if kv is not None:
            k, v = kv.append(k, v, context.pos)  # (B, n_kv_head, pos + T, D)
        causal = context.visible is None and T > 1
        gqa = self.n_kv_head != self.n_head
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=context.visible, is_causal=causal, enable_gqa=gqa
        )
        return self.out(y.transpose(1, 2).flatten(2))


def swiglu(x: Tensor) -> Tensor:
    """(..., 2H) -> (..., H) (arXiv 2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class MLP(nn.Module):
    """A dense SwiGLU layer: the dense twin's, a first dense layer's, or a shared expert."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w_in = nn.Linear(width, 2 * hidden, bias=False)
        self.w_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_out(swiglu(self.w_in(x)))


def sort_pairs(mask: Tensor, size: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of mask (S, E), sorted by expert.

    `size`: a number N that the pairs cannot exceed, or None to count them, which waits for the device.
    -> flat index e*S + s of each pair (N,), its token s (N,), where each expert ends (E,) int32.
    Spare pairs come last and have the flat index -1 and some valid token; if they are counted, there is one,
    as grouped_mm has no gradient for no pairs at all.
    """
    flat = mask.T.reshape(-1)  # (E*S,)
    if size is None:
        pair = F.pad(flat.nonzero().squeeze(1), (0, 1), value=-1)  # (N,)
    else:
        pair = torch.nonzero_static(flat, size=size, fill_value=-1).squeeze(1)  # (N,)
    return pair, pair % mask.shape[0], mask.sum(0).cumsum(0).int()


def run_experts(
    x: Tensor, mask: Tensor, weight: Tensor, w_in: Tensor, w_out: Tensor, size: int | None
) -> Tensor:
    """y[s] = sum over the experts e of mask[s] of weight[s, e] * expert_e(x[s]).

    x (S, C); mask, weight (S, E), weight float32; w_in (E, C, 2H), w_out (E, H, C) in x's dtype; `size` as in
    sort_pairs -> (S, C) float32. An expert without tokens costs nothing and gets a zero gradient.
    """
    pair, token, ends = sort_pairs(mask, size)
    spare = pair < 0
    if torch.is_grad_enabled():  # grouped_mm leaves rows behind the last end, and their gradients, undefined:
        ends = torch.where(ends == ends[-1], len(pair), ends).int()  # the last expert in use has them, too
    pair_weight = torch.where(spare, 0, weight.T.reshape(-1).index_select(0, pair.clamp(min=0)))  # (N,)
    h = swiglu(F.grouped_mm(x.index_select(0, token), w_in, offs=ends))  # (N, H)
    h = (h * pair_weight.unsqueeze(-1)).to(x.dtype)  # here, as rows are narrower than behind w_out
    y = F.grouped_mm(h, w_out, offs=ends).float()  # (N, C)
    if not torch.is_grad_enabled():
        y = y.masked_fill_(spare.unsqueeze(-1), 0)
    return torch.zeros_like(x, dtype=torch.float32).index_add(0, token, y)


def run_few_pairs(
    x: Tensor, mask: Tensor, weight: Tensor, w_in: Tensor, w_out: Tensor, size: int | None
) -> Tensor:
    """`run_experts` for so few pairs on a CPU that reading weights is all the work: a step of decoding.

    One row times a matrix is a weighted sum of the matrix's rows, and embedding_bag adds up rows where they
    lie. A pair is P bags, which hold a P-th of the rows each. Where the pairs are fewer than N, empty
    bags lie among the full ones, since threads get equal numbers of bags, whatever is in them.
    """
    (S, E), P = mask.shape, 4
    pair = mask.nonzero() if size is None else torch.nonzero_static(mask, size=size, fill_value=E)
    token, expert = pair[:, 0].clamp(max=S - 1), pair[:, 1].clamp(max=E - 1)  # (N,), spare ones at the end
    N, n_pairs = len(pair), mask.sum()
    count = torch.arange(N * P + 1, device=x.device)
    before = count * n_pairs // max(N, 1)  # (N*P + 1,) full bags before each bag
    full = (count[1:] * N - 1) // n_pairs.clamp(min=1)  # (N*P,) the full bags, in order

    def add_up(matrices: Tensor, rows: Tensor) -> Tensor:
        """rows (N, R) of the pairs times their experts' of matrices (E, R, M) -> (N*P, M) in bags."""
        R = rows.shape[1]
        row = (expert.unsqueeze(1) * R + torch.arange(R, device=x.device)).flatten()
        table, starts, amount = matrices.flatten(0, 1), before * (R // P), rows.flatten()
        return F.embedding_bag(
            row, table, starts, mode="sum", per_sample_weights=amount, include_last_offset=True
        )

    h = add_up(w_in, x.index_select(0, token)).index_select(0, full.clamp(max=N * P - 1))  # (N*P, 2H)
    h = swiglu(h.unflatten(0, (N, P)).sum(1))  # (N, H) of the pairs
    pair_weight = weight.flatten().index_select(0, token * E + expert)  # (N,)
    y = add_up(w_out, (h * pair_weight.unsqueeze(-1)).to(x.dtype))  # (N*P, C)
    token = token.index_select(0, (before[:-1] // P).clamp(max=N - 1))
    return torch.zeros_like(x, dtype=torch.float32).index_add(0, token, y.float())


class MoE(nn.Module):
    """E experts, a gate, and possibly a shared expert."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.n_embd, config.n_expert, bias=False)
        if config.n_null:  # set later, so that the random numbers of all other weights are as without
            self.gate.weight = nn.Parameter(torch.empty(config.n_expert + config.n_null, config.n_embd))
        self.w_in = nn.Parameter(torch.empty(config.n_expert, config.n_embd, 2 * config.n_hidden))
        self.w_out = nn.Parameter(torch.empty(config.n_expert, config.n_hidden, config.n_embd))
        self.shared = MLP(config.n_embd, config.shared_hidden) if config.shared_hidden else None
        self.shared_gate = nn.Linear(config.n_embd, 1, bias=False) if config.shared_gate else None
        self.prior: Tensor | None = None  # for online_seqtopk: router.pseudo_candidates
        # for selection: router.loss_free_update, cutoff_update
        self.register_buffer("bias", torch.zeros(config.n_expert + config.n_null))

    def forward(self, x: Tensor, context: Context, cache: ExpertCache | None) -> tuple[Tensor, Routing]:
        """x (B, T, C) -> the same shape, and how it was routed."""
        B, T, C = x.shape
        with torch.autocast(x.device.type, enabled=False):  # routing is float32 throughout
            logits = F.linear(x.float(), self.gate.weight.float())  # (B, T, E)
            scores = SCORES[self.config.score_fn](logits)
        bias = self.bias if context.router.biased else 0  # a run under another router may have left one
        mask = self.select(scores.detach() + bias, context, cache)  # (B, T, E)
        routing = Routing(logits, scores, mask)
        mask, weight = mask[..., : self.config.n_expert], scores[..., : self.config.n_expert]  # real experts
        if self.config.norm_topk:
            weight = weight / (weight * mask).sum(-1, keepdim=True).clamp(min=1e-9)
        elif best := self.config.best:  # whatever the router chose, and without the bias, which never weighs
            weight = weight / scores.topk(best, dim=-1).values.sum(-1, keepdim=True).clamp(min=1e-9)
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        w_in, w_out = self.w_in.to(dtype), self.w_out.to(dtype)  # grouped_mm knows nothing of autocast
        size = self.max_pairs(B * T, context)
        tokens, mask_s, weight_s = x.reshape(-1, C).to(dtype), mask.flatten(0, 1), weight.flatten(0, 1)
        # at most as many pairs as experts: hardly any weight is read twice
        few = x.is_cpu and not torch.is_grad_enabled() and B * T * self.config.k <= self.config.n_expert
        run = run_few_pairs if few else run_experts
        y = run(tokens, mask_s, weight_s, w_in, w_out, size).to(x.dtype).view(B, T, C)
        if self.shared is not None:
            shared = self.shared(x)
            if self.shared_gate is not None:
                shared = shared * self.shared_gate(x).sigmoid()
            y = y + shared
        return y, routing

    @torch.no_grad()
    def select(self, scores: Tensor, context: Context, cache: ExpertCache | None) -> Tensor:
        if cache is not None:
            return cache.select(scores, context.active)
        options = routing_options(self.config, context.router, self.prior)
        mask = context.router.select(scores, self.config.k, **options)
        return mask if context.active is None else mask & context.active.unsqueeze(-1)

    def max_pairs(self, tokens: int, context: Context) -> int | None:
        """A number of pairs that `tokens` tokens cannot exceed, or None if there is none worth padding to.

        A strict budget binds sequences from their start; later on, a token may spend what earlier ones have
        saved.
        """
        router, config, fresh = context.router, self.config, context.pos == 0
        if router.exact or (fresh and "strict" in router.options and config.strict):
            return tokens * config.k
        if fresh or "max_experts" not in router.options:
            return None
        return tokens * check_bounds(config.n_expert, config.k, config.min_experts, config.max_experts)


class Block(nn.Module):
    def __init__(self, config: MoEConfig, layer: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MoE(config) if config.has_experts(layer) else MLP(config.n_embd, config.dense_width)

    def forward(
        self, x: Tensor, context: Context, kv: KVCache | None, experts: ExpertCache | None
    ) -> tuple[Tensor, Routing | None]:
        x = x + self.attention(self.attention_norm(x), context, kv)
        h = self.mlp_norm(x)
        if isinstance(self.mlp, MLP):
            return x + self.mlp(h), None
        y, routing = self.mlp(h, context, experts)
        return x + y, routing


# -------------------- the model ---------------------------------------------------------------------------


TEMPERATURE, TOP_P = 0.8, 0.95  # how text is drawn unless somebody says otherwise


class Chunk(NamedTuple):
    """Tokens that `generate` fed to the model, and what the model gave them."""

    tokens: Tensor  # (B, t) int64
    mask: Tensor  # (B, t, L, E) bool, which experts each token got in each layer that has experts
    active: Tensor  # (B, t) bool, False for padding and in rows that have stopped
    last_hidden: Tensor  # (B, t, C) after the last norm: the head makes the logits of the next tokens of it

    @property
    def experts(self) -> Tensor:
        """(B, t, L) how many experts each token got."""
        return self.mask.sum(-1)


class MoEGPT(nn.Module):
    def __init__(self, config: MoEConfig):
        """Random weights: normal, deviation 0.02, less where a matrix adds to the residual stream (GPT-2)."""
        super().__init__()
        require(config.vocab_size >= 1, "vocab_size", config.vocab_size, "at least 1")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self._tie()
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                to_residual = name.endswith(("attention.out.weight", "w_out", "w_out.weight"))
                std = 0.02 / (2 * config.n_layer) ** 0.5 if to_residual else 0.02
                nn.init.normal_(parameter.data[: config.n_expert] if ".gate." in name else parameter, std=std)
        for layer in self.expert_layers():  # last, so that the other weights are as without null experts
            nn.init.normal_(layer.gate.weight.data[config.n_expert :], std=0.02)

    def _tie(self) -> None:
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: Cache | None = None,
        router: str | None = None,
        active: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Stats]:
        """Logits of the next token or, given targets, the mean cross-entropy in nats; and routing statistics.

        idx, targets (B, T) int64, targets of -1 do not count. With a cache, idx continues the sequences in
        it, and its router routes; otherwise `router` does (None: the config's). active (B, T) bool marks,
        with a cache, the real tokens: the others are not attended to and get no expert. -> logits (B, T, V)
        float32, loss, Stats. Raises ValueError for a sequence longer than block_size, or than the cache has
        room for.
        """
        x, routings = self._trunk(idx, cache, router, active)
        stats = self._collect(routings, idx)
        if targets is None:
            return self.head(x).float(), None, stats
        return None, self._cross_entropy(x.flatten(0, 1), targets.flatten()), stats

    def _cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        """x (S, C), targets (S,) -> mean in nats over the targets that count."""
        rows = 256 if x.is_cpu else len(x)  # the logits of so many tokens fit into a CPU's cache
        total = sum(
            F.cross_entropy(self.head(piece).float(), target, ignore_index=-1, reduction="sum")
            for piece, target in zip(x.split(rows), targets.split(rows), strict=True)
        )
        return total / (targets >= 0).sum()

    def _trunk(
        self, idx: Tensor, cache: Cache | None, router: str | None, active: Tensor | None
    ) -> tuple[Tensor, list[Routing]]:
        """Everything before the head: (B, T, C), and how the L layers with experts routed."""
        context = self._context(idx, cache, router, active)
        x = self.embedding(idx)  # (B, T, C)
        routings = []
        for layer, block in enumerate(self.blocks):
            kv, experts = (cache.kv[layer], cache.experts[layer]) if cache else (None, None)
            x, routing = block(x, context, kv, experts)
            if routing is not None:
                routings.append(routing)
        if cache:
            cache.advance(idx.shape[1])
        return self.norm(x), routings

    def _context(
        self, idx: Tensor, cache: Cache | None, router: str | None, active: Tensor | None
    ) -> Context:
        T = idx.shape[1]
        pos, room = (cache.pos, cache.max_tokens) if cache else (0, self.config.block_size)
        if pos + T > room:
            limit = "the cache" if cache else "block_size"
            raise ValueError(f"{pos + T} tokens are more than the {room} that {limit} allows")
        position = pos + torch.arange(T, device=idx.device).unsqueeze(0)  # (1, T)
        visible = None
        if cache:
            cache.mark(T, active)
            router = cache.router
            if cache.padded:
                position = (cache.active.cumsum(-1) - 1)[:, pos : pos + T].clamp(min=0)  # (B, T)
            visible = cache.visible(T)
        elif active is not None:
            raise ValueError("active needs a cache: without one, padding would compete for experts")
        angles = rope_angles(position, self.config)
        return Context(ROUTERS[router or self.config.router], angles, visible, active, pos)

    def _collect(self, routings: list[Routing], idx: Tensor) -> Stats:
        """Put the layers' statistics together."""
        if not routings:
            zero = torch.zeros((), device=idx.device)
            load = idx.new_zeros(0, self.config.n_expert)
            return Stats(zero, zero, load, idx.new_zeros(0, *idx.shape), [])
        balance = torch.stack([load_balance_loss(layer.scores, layer.mask) for layer in routings])
        z = torch.stack([z_loss(layer.logits) for layer in routings])
        real = torch.stack([layer.mask[..., : self.config.n_expert] for layer in routings])  # (L, B, T, E)
        return Stats(balance.mean(), z.mean(), real.sum((1, 2)), real.sum(-1), routings)

    def new_cache(self, batch_size: int, max_tokens: int | None = None, router: str | None = None) -> Cache:
        """An empty cache for batch_size sequences of up to max_tokens (None: block_size) tokens.

        router: a causal one (None: the `decode` stand-in of the config's), expert_threshold only if it is the
        config's. Raises ValueError for any other.
        """
        router = router or ROUTERS[self.config.router].decode
        causal = [name for name, row in ROUTERS.items() if row.causal]
        require(router in causal, "router", router, f"causal to decode: {', '.join(causal)}")
        check_router(self.config, router)
        own = not ROUTERS[router].cutoffs or ROUTERS[self.config.router].cutoffs
        require(own, "router", router, "that of the training, for only that has found its cutoffs")
        weight = self.head.weight
        max_tokens = self.config.block_size if max_tokens is None else max_tokens
        require(max_tokens >= 2, "max_tokens", max_tokens, "at least 2")
        priors = [getattr(block.mlp, "prior", None) for block in self.blocks]
        return Cache(self.config, batch_size, max_tokens, router, weight.device, weight.dtype, priors)

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        cache: Cache | None = None,
        temperature: float = TEMPERATURE,
        top_k: int | None = None,
        top_p: float | None = TOP_P,
        stop: int | None = None,
        generator: torch.Generator | None = None,
        active: Tensor | None = None,
    ) -> Iterator[Chunk]:
        """Continue idx (B, P); yields the prompt, then each of up to max_new_tokens tokens, as it is fed.

        A row ends before the token `stop`, and generation when all rows have ended. active (B, P) bool marks
        the real tokens of prompts padded on the left to one length. temperature 0 takes the likeliest token;
        top_k and top_p as in sample_token, which says what ValueErrors it raises.

        The cache (None: a new one of what is needed, up to block_size) is the window that the model sees.
        When it is full, it is emptied and the newest half of the text is fed again, so that their routing
        begins anew; a prompt that does not fit is cut to its newest max_tokens // 2 tokens.
        """
        require(idx.shape[1] >= 1, "tokens in the prompt", idx.shape[1], "at least 1")
        needed = max(2, idx.shape[1] + max_new_tokens)
        cache = cache or self.new_cache(len(idx), min(needed, self.config.block_size))
        text, real = idx, torch.ones_like(idx, dtype=torch.bool) if active is None else active
        if idx.shape[1] > cache.max_tokens:
            half = cache.max_tokens // 2
            text, real = text[:, -half:], real[:, -half:]
        draw = partial(sample_token, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        yield from self._write(text, real, cache, active is not None, draw, max_new_tokens, stop)

    def _write(
        self,
        text: Tensor,
        real: Tensor,
        cache: Cache,
        padded: bool,
        draw: Callable[[Tensor], Tensor],
        max_new_tokens: int,
        stop: int | None,
    ) -> Iterator[Chunk]:
        """`generate` from a prompt text (B, P) that fits. Not all of real (B, P) is True if `padded`."""
        logits, chunk = self._feed(text, real, cache, padded)
        yield chunk
        half, alive = cache.max_tokens // 2, torch.ones_like(real[:, :1])
        for _ in range(max_new_tokens):
            token = draw(logits)  # (B, 1)
            if stop is not None:
                alive = alive & (token != stop)
                n_alive = int(alive.sum())
                if n_alive == 0:
                    return
                padded = padded or n_alive < len(alive)
            if cache.pos == cache.max_tokens:
                cache.reset()
                self._feed(text[:, -half:], real[:, -half:], cache, padded)
            logits, chunk = self._feed(token, alive, cache, padded)
            text, real = torch.cat([text, token], dim=1), torch.cat([real, alive], dim=1)
            yield chunk

    def _feed(self, idx: Tensor, active: Tensor, cache: Cache, padded: bool) -> tuple[Tensor, Chunk]:
        """Logits (B, V) after the last token of idx (B, t), and what the model gave each of them.

        active (B, t) counts only where some token may not be active, which `padded` says.
        """
        x, routings = self._trunk(idx, cache, None, active if padded else None)
        masks = [routing.mask[..., : self.config.n_expert] for routing in routings]
        mask = torch.stack(masks, dim=2) if masks else active.new_zeros(*idx.shape, 0, self.config.n_expert)
        return self.head(x[:, -1]).float(), Chunk(idx, mask, active, x)

    def expert_layers(self) -> list[MoE]:
        """The L layers that have experts, in the order of Stats."""
        return [block.mlp for block in self.blocks if isinstance(block.mlp, MoE)]

    def n_params(self) -> tuple[int, int]:
        """Parameters in all, and those that an average token uses: k of E experts."""
        total = sum(parameter.numel() for parameter in self.parameters())
        experts = sum(layer.w_in.numel() + layer.w_out.numel() for layer in self.expert_layers())
        return total, total - experts * (self.config.n_expert - self.config.k) // self.config.n_expert

    def flops_per_token(self, tokens: int) -> int:
        """Floating-point operations of one training step, per token of a sequence of `tokens`.

        Three times the forward's (arXiv 2204.02311, appendix B): 2 for each weight of a matrix product that
        the token uses, and 4*D per head for each token that it could attend to, causality not discounted.
        MFU is quoted in these.
        """
        _, active = self.n_params()
        unmultiplied = sum(parameter.numel() for parameter in self.parameters() if parameter.dim() < 2)
        if not self.config.tie_embeddings:
            unmultiplied += self.embedding.weight.numel()
        attention = 4 * self.config.n_layer * self.config.n_head * self.config.head_dim * tokens
        return 3 * (2 * (active - unmultiplied) + attention)

    def cast(self, dtype: torch.dtype) -> "MoEGPT":
        """Keep the weights in dtype, for inference; the gates stay float32, as routing does."""
        for name, parameter in self.named_parameters():
            if ".gate." not in name:
                parameter.data = parameter.data.to(dtype)
        return self

    @classmethod
    def from_checkpoint(cls, checkpoint: dict, **changes) -> "MoEGPT":
        """The model of a loaded checkpoint, some fields of its config changed (router="topk", say).

        Raises ValueError when its weights do not fit the changed config.
        """
        old = MoEConfig(**checkpoint["config"])
        model = cls(replace(old, **changes))
        tied = model.config.tie_embeddings  # alone has no say in the shapes
        require(
            tied == old.tie_embeddings, "tie_embeddings", tied, f"{old.tie_embeddings} as in the checkpoint"
        )
        check_shapes(model.state_dict(), checkpoint["model"], "the checkpoint")
        model.load_state_dict(checkpoint["model"])
        return model

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, device: str | torch.device = "cpu", **changes
    ) -> "MoEGPT":
        """The model of a Hugging Face folder, or of that name on the Hub, some fields of its config changed.

        Its weights keep the dtype of the file's token embedding, but for the gates, which are float32; beyond
        them, little memory is used. Raises ValueError for an architecture that model.py does not have, and
        for files that are missing, damaged or do not fit.
        """
        config, family = read_config(hf_folder(name_or_path, "config.json"))
        with torch.device("meta"):
            model = cls(replace(config, **changes))
        folder = hf_folder(name_or_path, "model*.safetensors*")  # gigabytes: only of what can be opened
        paths, outlines = file_tensors(folder)
        check_shapes(file_views(model, family), outlines, folder)
        model.cast(outlines[family.names["embedding.weight"]].dtype).to_empty(device=device)
        model._tie()
        for layer in model.expert_layers():
            layer.bias.zero_()
        copy_tensors(paths, file_views(model, family))
        return model

    def save_pretrained(
        self, path: str | Path, tokenizer: dict | None = None, shard_bytes: int = 2 * 2**30
    ) -> None:
        """Write a new folder that transformers opens, whole or not at all; its logits are those under topk.

        tokenizer: its meta, for eos_token_id and, if it came from such a folder, tokenizer.json. Raises
        ValueError if the folder exists, and for an architecture that none of FAMILIES has.
        """
        path, tokenizer = Path(path), tokenizer or {}
        temporary, kind = path.with_name(path.name + ".tmp"), family_of(self.config)
        require(not path.exists(), "path", path, "the name of a new folder")
        biased = any(layer.bias.any() for layer in self.expert_layers())
        require(not biased, "the bias for selection (bias_rate)", "in use", "0 to be saved for transformers")
        said = config_json(self.config, kind, self.head.weight.dtype, tokenizer.get("eot"))
        temporary.mkdir(parents=True)
        try:
            (temporary / "config.json").write_text(json.dumps(said, indent=2))
            if tokenizer.get("kind") == "hf":
                (temporary / "tokenizer.json").write_text(tokenizer["json"], encoding="utf-8")
            write_tensors(temporary, file_views(self, FAMILIES[kind]), shard_bytes)
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def sample_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the next token: logits (B, V) -> (B, 1).

    temperature 0 takes the likeliest. top_k keeps the k likeliest tokens; top_p then keeps the fewest
    likeliest ones that hold a share p of the probability (arXiv 1904.09751). Raises ValueError for
    temperature < 0, top_k < 1, top_p outside (0, 1].
    """
    require(temperature >= 0, "temperature", temperature, "at least 0")
    require(top_k is None or top_k >= 1, "top_k", top_k, "at least 1")
    require(top_p is None or 0 < top_p <= 1, "top_p", top_p, "above 0 and at most 1")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # of any size, without overflow
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None:
        probability, token = logits.softmax(-1).sort(dim=-1, descending=True)
        beyond = probability.cumsum(-1) - probability >= top_p  # the likelier ones hold p already
        logits = logits.masked_fill(beyond.scatter(-1, token, beyond), -torch.inf)
    # the first to ring of clocks with these rates; torch.multinomial would wait for the device
    clocks = torch.empty_like(logits).exponential_(generator=generator).clamp(min=1e-20)
    return (logits.softmax(-1) / clocks).argmax(-1, keepdim=True)


# -------------------- evaluation --------------------------------------------------------------------------


@torch.no_grad()
def evaluate_text(
    model: MoEGPT, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: np.ndarray, router: str
) -> dict:
    """Loss and routing on batches of inputs and targets, (B, T) each, under one router.

    token_bytes: the length of each token of the vocabulary. Targets of -1 are not learned, and do not count.
    loss: mean cross-entropy in nats per token. bpb: the same in bits per byte of the text. experts: mean, min
    and max experts per token. Of the share of the pairs that each expert gets, means over layers: entropy, 1
    when uniform, and variance of share * E, 0 when uniform. dead: experts that got no token, of all layers.
    A dense model has the first two only.
    """
    device, n_bytes = model.head.weight.device, torch.from_numpy(token_bytes)
    nats = tokens = text_bytes = load = 0
    experts = []
    for x, y in batches:
        _, loss, stats = model(x.to(device), y.to(device), router=router)
        learned = y[y >= 0]
        nats, tokens = nats + loss.double() * learned.numel(), tokens + learned.numel()
        text_bytes += n_bytes[learned].sum().item()
        load = load + stats.load
        experts.append(stats.experts.flatten())
    result = {"loss": (nats / tokens).item(), "bpb": (nats / text_bytes / math.log(2)).item()}
    return result | routing_summary(load, torch.cat(experts))


def routing_summary(load: Tensor, experts: Tensor) -> dict:
    """load (L, E) pairs per expert, experts (n,) experts per token -> the routing part of evaluate_text, {}
    if L is 0."""
    if not len(load):
        return {}
    share = load / load.sum(-1, keepdim=True).clamp(min=1)
    entropy = torch.special.entr(share).sum(-1).mean() / math.log(load.shape[-1])
    mean, low, high = experts.float().mean(), experts.min(), experts.max()
    return {
        "experts": [mean.item(), low.item(), high.item()],
        "entropy": entropy.item(),
        "variance": (share * load.shape[-1]).var(-1, correction=0).mean().item(),
        "dead": (load == 0).sum().item(),
    }


# -------------------- checkpoints -------------------------------------------------------------------------


def check_shapes(here: dict[str, Tensor], there: dict[str, Tensor], where: str | Path) -> None:
    """Raise ValueError unless the tensors at `there` are those that a model has here, in names and shapes."""
    for name in [*here, *there]:
        asked = tuple(here[name].shape) if name in here else "absent"
        found = tuple(there[name].shape) if name in there else "missing"
        require(asked == found, f"{name} in {where}", found, f"{asked} in this architecture")


FORMAT = "seqtopk checkpoint 1"


def save_checkpoint(path: str | Path, model: MoEGPT, **extra) -> None:
    """Write the config and weights of the uncompiled model, and `extra`, whole or not at all."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    checkpoint = {"format": FORMAT, "config": asdict(model.config), "model": model.state_dict(), **extra}
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict:
    """Read what save_checkpoint wrote: its `extra`, and "config" and "model" for MoEGPT.from_checkpoint.

    Raises ValueError when there is no such file, when it is damaged, or when something else wrote it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}: train a model first, or correct the path")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises whatever the bytes lead its unpickler to
        raise ValueError(
            f"{path} is damaged or not a checkpoint of this project: use another, such as best.pt"
        ) from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise ValueError(
            f"{path} was not written by this project (or by another version): expected {FORMAT!r}"
        )
    unknown = set(checkpoint["config"]) - {field.name for field in fields(MoEConfig)}
    if unknown:
        raise ValueError(f"{path} has settings that this version does not know: {', '.join(sorted(unknown))}")
    return checkpoint


# -------------------- Hugging Face checkpoints ------------------------------------------------------------

# Keys of config.json and the fields of MoEConfig that they set, as far as families agree.
KEYS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "block_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "hidden_size": "n_embd",
    "num_experts_per_tok": "k",
    "tie_word_embeddings": "tie_embeddings",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "norm_eps",
}
MOE_KEYS = KEYS | {"num_experts": "n_expert", "norm_topk_prob": "norm_topk"}
QWEN_KEYS = MOE_KEYS | {
    "moe_intermediate_size": "n_hidden",
    "intermediate_size": "dense_hidden",
    "n_dense_layer": "n_dense_layer",
}
IMPLIED = {"n_kv_head": None, "tie_embeddings": False, "rope_theta": 1e4, "norm_topk": False, "norm_best": 0}
# What a config.json must say, unless it says nothing, of what MoEConfig has no field for.
USUAL = {
    "hidden_act": "silu",
    "rope_type": "default",
    "attention_bias": False,
    "clip_qkv": None,
    "sliding_window": None,
    "decoder_sparse_step": 1,
    "quant_method": None,
}
# Parameters here, and the tensors of a file that lie in them, one below the other.
NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "attention.qkv.weight": "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight",
    "attention.qkv.bias": "self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate.weight",
    "mlp.w_in": "mlp.experts.{}.gate_proj.weight mlp.experts.{}.up_proj.weight",
    "mlp.w_out": "mlp.experts.{}.down_proj.weight",
    "mlp.shared.w_in.weight": "mlp.shared_expert.gate_proj.weight mlp.shared_expert.up_proj.weight",
    "mlp.shared.w_out.weight": "mlp.shared_expert.down_proj.weight",
    "mlp.shared_gate.weight": "mlp.shared_expert_gate.weight",
    "mlp.w_in.weight": "mlp.gate_proj.weight mlp.up_proj.weight",
    "mlp.w_out.weight": "mlp.down_proj.weight",
}
MIXTRAL_NAMES = NAMES | {
    "mlp.gate.weight": "block_sparse_moe.gate.weight",
    "mlp.w_in": "block_sparse_moe.experts.{}.w1.weight block_sparse_moe.experts.{}.w3.weight",
    "mlp.w_out": "block_sparse_moe.experts.{}.w2.weight",
}


class Family(NamedTuple):
    """How one architecture of transformers says what MoEConfig and MoEGPT say."""

    keys: dict[str, str]
    implied: dict[str, object]  # fields that config.json may leave out or has no key for
    names: dict[str, str] = NAMES


FAMILIES = {
    "olmoe": Family(
        MOE_KEYS | {"intermediate_size": "n_hidden"}, IMPLIED | {"qk_norm": "full", "norm_eps": 1e-5}
    ),
    "qwen2_moe": Family(
        QWEN_KEYS | {"shared_expert_intermediate_size": "shared_hidden", "qkv_bias": "qkv_bias"},
        IMPLIED | {"shared_gate": True, "qkv_bias": True, "norm_eps": 1e-6},
    ),
    "qwen3_moe": Family(
        QWEN_KEYS | {"head_dim": "head_width"},
        IMPLIED | {"qk_norm": "head", "head_width": None, "norm_eps": 1e-6},
    ),
    "mixtral": Family(
        KEYS | {"num_local_experts": "n_expert", "intermediate_size": "n_hidden", "head_dim": "head_width"},
        IMPLIED | {"norm_topk": True, "head_width": None, "rope_theta": 1e6, "norm_eps": 1e-5},
        MIXTRAL_NAMES,
    ),
}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # that a file may have
ROUTING = ("router", "min_experts", "max_experts", "strict", "mass")  # chosen anew whenever weights are used


def pretrained_config(name_or_path: str | Path) -> MoEConfig:
    """The architecture of a Hugging Face checkpoint, under topk. Errors as in MoEGPT.from_pretrained."""
    return read_config(hf_folder(name_or_path, "config.json"))[0]


def optional(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError:
        remedy = "pip install -r requirements-hf.txt"
        raise ValueError(f"a Hugging Face checkpoint needs {package}: {remedy}") from None


def hf_folder(name_or_path: str | Path, files: str) -> Path:
    """The folder of that name, or else one with these files of the model of that name on the Hub."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    hub = optional("huggingface_hub")
    try:
        return Path(hub.snapshot_download(str(name_or_path), allow_patterns=files))
    except Exception as error:  # the library's errors are many, and long
        raise ValueError(
            f"{name_or_path} is no folder here, and could not be fetched from the Hugging Face Hub "
            f"({type(error).__name__}): check the name and the network, or give the folder of a copy"
        ) from error


def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: this is not a Hugging Face checkpoint") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from error


def read_config(folder: Path) -> tuple[MoEConfig, Family]:
    """What the config.json of a folder says. Raises ValueError for what model.py cannot express."""
    said, where = plain_config(read_json(folder / "config.json")), "in config.json"
    kind = said.get("model_type")
    require(kind in FAMILIES, f"model_type {where}", kind, "one of " + ", ".join(FAMILIES))
    for key, usual in USUAL.items():
        require(said.get(key, usual) == usual, f"{key} {where}", said.get(key), f"{usual}")
    family = FAMILIES[kind]
    values = family.implied | {field: said[key] for key, field in family.keys.items() if key in said}
    for key, field in family.keys.items():
        require(field in values, f"{key} {where}", "missing", "given")
    require(values["n_expert"] >= 2, f"num_experts {where}", values["n_expert"], "at least 2")
    return MoEConfig(router="topk", **values), family


def plain_config(said: dict) -> dict:
    """A config.json, without its nulls, in the words of KEYS and USUAL, whichever release wrote it."""
    rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
    dense = said.get("mlp_only_layers") or []
    first = sorted(dense) == list(range(len(dense)))
    require(first, "mlp_only_layers in config.json", dense, "the first layers")
    plain = said | (said.get("quantization_config") or {}) | rope
    plain["rope_type"] = rope.get("rope_type", rope.get("type"))
    plain["num_experts"] = plain["num_local_experts"] = said.get("num_experts", said.get("num_local_experts"))
    plain["n_dense_layer"] = len(dense)
    if not said.get("use_sliding_window", True):
        plain["sliding_window"] = None
    return {key: value for key, value in plain.items() if value is not None}


def file_views(model: MoEGPT, family: Family) -> dict[str, Tensor]:
    """Every tensor of a checkpoint's files: its name there, and the view of the weights here that it is."""
    views = {}
    for name, parameter in model.named_parameters():
        block = re.match(r"blocks\.(\d+)\.", name)
        prefix = f"model.layers.{block[1]}." if block else ""
        theirs = family.names[name.removeprefix(block[0]) if block else name].split()
        weight = parameter.detach()
        for expert, matrix in enumerate(weight.mT if weight.dim() == 3 else [weight]):
            heights = model.blocks[0].attention.widths if len(theirs) == 3 else len(matrix) // len(theirs)
            for their, rows in zip(theirs, matrix.split(heights), strict=True):
                views[prefix + their.format(expert)] = rows
    return views


def file_tensors(folder: Path) -> tuple[dict[str, Path], dict[str, Tensor]]:
    """Every tensor of a checkpoint that has elements: the file that it is in, and itself on the meta device.

    Raises ValueError for a file that is missing or damaged, and for a dtype that is not one of DTYPES.
    """
    safetensors, paths, outlines = optional("safetensors"), {}, {}
    index = folder / "model.safetensors.index.json"
    shards = read_json(index).get("weight_map", {}).values() if index.exists() else ["model.safetensors"]
    for path in sorted({folder / shard for shard in shards}):
        if not path.is_file():
            remedy = "fetch it, or, if the folder has .bin files, save it anew with transformers"
            raise ValueError(f"{path.name} is missing in {folder}: {remedy}")
        try:
            with safetensors.safe_open(path, "pt") as file:
                found = {name: outline(file, name) for name in file.offset_keys()}
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): fetch it again") from error
        found = {name: tensor for name, tensor in found.items() if tensor.numel()}
        outlines, paths = outlines | found, paths | dict.fromkeys(found, path)
    return paths, outlines


def outline(file, name: str) -> Tensor:
    """A tensor of an open safetensors file on the meta device."""
    stored = file.get_slice(name)
    dtype = stored.get_dtype()
    require(dtype in DTYPES, f"the dtype of {name}", dtype, "one of " + ", ".join(DTYPES))
    return torch.empty(stored.get_shape(), dtype=DTYPES[dtype], device="meta")


def copy_tensors(paths: dict[str, Path], views: dict[str, Tensor]) -> None:
    """Read the tensors of file_tensors into the views of file_views.

    A file stays open for 16 tensors: until it is closed, the pages that were read count as memory.
    """
    opened = None
    bar = tqdm(paths.items(), desc="weights", unit="tensor", delay=2, leave=False, disable=None)
    for number, (name, path) in enumerate(bar):
        if number % 16 == 0 or path != opened:
            file, opened = optional("safetensors").safe_open(path, "pt"), path
        views[name].copy_(file.get_tensor(name))


def family_of(config: MoEConfig) -> str:
    """The first of FAMILIES that can express a config. Raises ValueError naming a field that none can."""
    require(config.n_expert >= 2, "n_expert", config.n_expert, "at least 2 to be saved for transformers")
    unlike = {name: unlike_fields(config, family) for name, family in FAMILIES.items()}
    name = min(unlike, key=lambda name: len(unlike[name]))
    for field, value in unlike[name].items():
        here = getattr(config, field)
        require(here == value, field, here, f"{value} to be saved as {name}, the nearest family")
    return name


def unlike_fields(config: MoEConfig, family: Family) -> dict[str, object]:
    """The fields whose value a family has no key for, each with the value that it always has there."""
    said = {*family.keys.values(), *ROUTING}
    always = {field: v for field, v in (asdict(MoEConfig()) | family.implied).items() if field not in said}
    return {field: value for field, value in always.items() if getattr(config, field) != value}


def config_json(config: MoEConfig, kind: str, dtype: torch.dtype, eot: int | None) -> dict:
    """What config.json says of a config, in words that old and new releases of transformers read."""
    widths = {"head_width": config.head_dim, "dense_hidden": config.dense_width}
    values = asdict(config) | widths | {"n_kv_head": config.kv_heads}
    said = {key: values[field] for key, field in FAMILIES[kind].keys.items()}
    return said | {
        "model_type": kind,
        "architectures": ["".join(word.capitalize() for word in kind.split("_")) + "ForCausalLM"],
        "mlp_only_layers": list(range(said.pop("n_dense_layer", 0))),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": eot,
        "pad_token_id": None,
    }


def write_tensors(folder: Path, views: dict[str, Tensor], shard_bytes: int) -> None:
    """Write tensors into files of about shard_bytes each, and an index if they are several."""
    save_file, contiguous = optional("safetensors.torch").save_file, torch.contiguous_format
    shards, total = {}, 0
    for name, tensor in views.items():
        shards.setdefault(total // shard_bytes, []).append(name)
        total += tensor.nbytes
    places = {}
    for number, names in enumerate(shards.values(), start=1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"model{part}.safetensors"
        copies = (views[name].cpu().clone(memory_format=contiguous) for name in names)
        save_file(dict(zip(names, copies, strict=True)), folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
