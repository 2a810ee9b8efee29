"""A decoder-only Mixture-of-Experts language model of the OLMoE shape.

Pre-norm RMSNorm, RoPE, SwiGLU experts, untied head. Pretrained OLMoE, Qwen and Mixtral models open as well.

    B  sequences in the batch     C  model width (n_embd)              E  experts (n_expert)
    T  tokens in a sequence       H  hidden width of one expert        k  experts per token on average
    S  B*T tokens in the batch    D  width of one attention head       N  (token, expert) pairs computed
    V  vocabulary                 L  layers that have experts

The path of a token through one layer: gate -> scores -> router (router.py) -> mask -> the pairs sorted by
expert -> two grouped matrix products, times the scores in between -> back to the tokens. Under a router with
a known budget no shape depends on the data, so the host never waits for the device; under the others it waits
once a layer, to count the pairs. That is so in bfloat16 on GPUs of compute capability 9 and 10 (torch 2.10 to
2.13): elsewhere grouped_mm itself is a loop on the host, which waits six times in a layer's training step.
"""

import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from config import require
from config.check import COUNT, check, door
from config.device import as_graph, check_memory, grouped_mm_is_a_kernel
from config.files import whole
from data import hugging_face
from router import (
    ROUTERS,
    ExpertCache,
    Router,
    Routing,
    State,
    check_bounds,
    check_promises,
    check_row,
    check_slots,
    load_balance_loss,
    z_loss,
)


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
        check(vars(self), {field.name: field.type for field in fields(self)})
        for name in ("n_layer", "n_head", "n_embd", "n_expert", "n_hidden"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.block_size >= 2, "block_size", self.block_size, "at least 2")
        for name in ("rope_theta", "norm_eps"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("vocab_size", "shared_hidden", "n_dense_layer", "n_null"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require(self.router in ROUTERS, "router", self.router, known_routers())
        check_row(self.router, vars(self))
        choices = {"score_fn": SCORES, "qk_norm": ("none", "head", "full")}
        for name, allowed in choices.items():
            require(getattr(self, name) in allowed, name, getattr(self, name), "one of " + ", ".join(allowed))
        for name in ("n_kv_head", "head_width", "dense_hidden"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1, or none")
        divides = self.head_width or self.n_embd % self.n_head == 0
        require(divides, "n_embd", self.n_embd, f"a multiple of n_head = {self.n_head}")
        width = "head_width" if self.head_width else "n_embd / n_head"
        require(self.head_dim % 2 == 0, width, self.head_dim, "even, for RoPE")
        divides = self.n_head % self.kv_heads == 0
        require(divides, "n_kv_head", self.kv_heads, f"a divisor of n_head = {self.n_head}")
        for name in ("n_embd", "n_hidden"):  # rows of 16 bytes in bfloat16, as grouped_mm asks
            require(getattr(self, name) % 8 == 0, name, getattr(self, name), "a multiple of 8")
        routed = self.n_expert == 1 or self.n_dense_layer < self.n_layer
        below = f"below n_layer = {self.n_layer} (n_expert=1 makes all layers dense)"
        require(routed, "n_dense_layer", self.n_dense_layer, below)
        check_bounds(self.n_expert, self.k, self.min_experts, self.max_experts)
        require(0 < self.mass <= 1, "mass", self.mass, "above 0 and at most 1")
        best = f"from 0 to n_expert = {self.n_expert}, or none"
        require(0 <= self.n_best <= self.n_expert, "norm_best", self.norm_best, best)
        for name in (self.router, ROUTERS[self.router].decode):
            check_router(self, name)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head if self.head_width is None else self.head_width

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def n_best(self) -> int:
        """Over how many of a token's best scores its weights sum to 1."""
        return self.k if self.norm_best is None else self.norm_best

    @property
    def dense_width(self) -> int:
        return self.k * self.n_hidden if self.dense_hidden is None else self.dense_hidden

    def has_experts(self, layer: int) -> bool:
        return self.n_expert > 1 and layer >= self.n_dense_layer

    @property
    def n_matrix_weights(self) -> int:
        """Weights in matrices, which are nearly all, counted without making a model."""
        sparse = self.n_layer - self.n_dense_layer if self.n_expert > 1 else 0
        hidden = self.n_expert * self.n_hidden + self.shared_hidden
        experts = sparse * (self.n_expert + self.n_null + self.shared_gate + 3 * hidden)
        dense = (self.n_layer - sparse) * 3 * self.dense_width
        attention = self.n_layer * 2 * self.head_dim * (self.n_head + self.kv_heads)
        embeddings = self.vocab_size * (1 if self.tie_embeddings else 2)
        return self.n_embd * (embeddings + attention + experts + dense)

    def options_of(self, row: Router) -> dict[str, object]:
        """The settings that the router of that row takes besides k."""
        return {name: getattr(self, name) for name in row.options if name != "state"}


def known_routers() -> str:
    """What a message says of the routers that there are."""
    return f"one of {', '.join(ROUTERS)}, or defined in a file that is given too: python SCRIPT.py FILE.py"


def check_router(config: MoEConfig, name: str) -> None:
    """Raise ValueError, naming the remedy, unless the router of that name can route under these settings."""
    row = ROUTERS[name]
    for key, value in (row.needs | ({} if row.takes_bias else {"bias_rate": 0})).items():
        found, remedy = getattr(config, key, value), f"{key}={str(value).lower()}"
        if found != value:
            raise ValueError(f"router {name} needs {remedy}, but {key} is {found}: train with --{remedy}")
    if "n_null" in row.options:
        require(config.n_null >= 1, "n_null", config.n_null, f"at least 1 under router {name}")
        check_slots(config.n_expert, config.k, config.n_null)
    else:
        require(config.n_null == 0, "n_null", config.n_null, f"0 under router {name}")
    check_state(config, name)


def check_state(config: MoEConfig, name: str) -> None:
    """Raise ValueError if the router needs a state that a model of this config has not learned."""
    row = ROUTERS[name]
    learned = "state" not in row.options or row.state is ROUTERS[config.router].state
    require(learned, "router", name, f"{config.router}, the model's own: no other has learned a state here")


def initial_state(config: MoEConfig) -> State:
    row = ROUTERS[config.router]
    return row.state(config) if row.state else {}


def routing_settings() -> set[str]:
    """What may change whenever weights are used again: the router, and what only routers read."""
    others = {"n_null", "state"}  # the gate has weights for each null expert; the state is no setting
    return {"router"}.union(*(row.options for row in ROUTERS.values())) - others


SCORES = {"softmax": lambda logits: logits.softmax(-1), "sigmoid": torch.sigmoid, "relu": torch.relu}


class Stats(NamedTuple):
    """What the routing of one forward did. L is 0 in a dense model."""

    balance_loss: Tensor  # scalar, mean over layers; 1 is uniform
    z_loss: Tensor  # scalar, mean over layers
    load: Tensor  # (L, E) pairs that each expert got
    n_taken: Tensor  # (L, B, T) experts that each token got
    routing: list[Routing]  # of each layer


# -------------------- caches ------------------------------------------------------------------------------


MIN_BUCKET = 64  # tokens


class KVCache:
    """Keys and values of one layer's past, (B, n_kv_head, max_tokens, D) each."""

    def __init__(self, config: MoEConfig, batch_size: int, max_tokens: int, device, dtype):
        shape = (batch_size, config.kv_heads, max_tokens, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    def write(self, k: Tensor, v: Tensor, place: Tensor) -> None:
        """Put k, v (B, n_kv_head, T, D) at place (T,)."""
        self.k.index_copy_(2, place, k)
        self.v.index_copy_(2, place, v)


class Cache:
    """All that decoding remembers: per layer a KVCache and, where the router needs one, an ExpertCache.

    The host counts in `make_room`, before each forward. The forward itself counts in tensors and writes in
    place, so that one graph serves all steps of a bucket: as long as `bucket` stays the same.
    """

    def __init__(self, config: MoEConfig, batch_size: int, max_tokens: int, router: str, device, dtype):
        self.max_tokens, self.router = max_tokens, router
        self.kv = [KVCache(config, batch_size, max_tokens, device, dtype) for _ in range(config.n_layer)]
        row, size = ROUTERS[router], (batch_size, max_tokens, config.k, config.n_expert)
        self.expert_caches: list[ExpertCache | None] = [
            row.cache(*size, device=device, **config.options_of(row))
            if row.cache and config.has_experts(layer)
            else None
            for layer in range(config.n_layer)
        ]
        self.active = torch.empty(batch_size, max_tokens, dtype=torch.bool, device=device)  # is a token real?
        self.n_fed = torch.empty(1, dtype=torch.int64, device=device)  # tokens, as `pos` on the host
        self.n_active = torch.empty(batch_size, 1, dtype=torch.int64, device=device)  # of them, no padding
        self.reset()

    def reset(self) -> None:
        """Forget everything, so that the next forward starts new sequences."""
        self.pos = 0
        self.padded = False  # some token may not be active
        self.active.fill_(True)
        self.n_fed.zero_()
        self.n_active.zero_()
        for cache in filter(None, self.expert_caches):
            cache.reset()

    def make_room(self, T: int, padded: bool) -> None:
        """Get ready for T more tokens, not all active if `padded`. Raises ValueError if they do not fit."""
        end = self.pos + T
        if end > self.max_tokens:
            raise ValueError(f"{end} tokens are more than the {self.max_tokens} that the cache allows")
        for cache in filter(None, self.expert_caches):
            cache.make_room(T)
        self.fresh, self.pos, self.padded = self.pos == 0, end, self.padded or padded
        # keys that attention looks at: few sizes, for which few graphs are compiled
        self.bucket = min(self.max_tokens, max(MIN_BUCKET, 1 << (end - 1).bit_length()))

    def locate(self, T: int, active: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Count the next T tokens, of which `active` (B, T) are real (None: all).

        -> Context.place, their positions in the text (B, T), Context.visible.
        """
        place = self.n_fed + torch.arange(T, device=self.n_fed.device)
        active = torch.ones_like(self.active[:, :1]).expand(-1, T) if active is None else active
        position = (self.n_active + active.cumsum(-1) - 1).clamp(min=0)
        self.n_fed += T
        self.n_active += active.sum(-1, keepdim=True)
        if self.padded:
            self.active.index_copy_(1, place, active)
        elif self.fresh:
            return place, position, None
        query, key = place.unsqueeze(1), torch.arange(self.bucket, device=place.device)
        visible = (key <= query).unsqueeze(0)  # (1, T, bucket)
        if self.padded:
            visible = visible & self.active[:, None, : self.bucket]
            visible = visible | (key == query)  # padding sees itself: a softmax over nothing is NaN
        visible = torch.where(visible, 0.0, -torch.inf).to(self.kv[0].k.dtype)  # once, and not in each layer
        return place, position, visible.unsqueeze(1)

    def fix_addresses(self) -> None:
        """Promise torch.compile that the tensors stay where they are: a CUDA graph may then write there."""
        for part in (self, *self.kv, *filter(None, self.expert_caches)):
            for tensor in filter(torch.is_tensor, vars(part).values()):
                torch._dynamo.mark_static_address(tensor, guard=False)

    @property
    def kv_nbytes(self) -> int:
        return sum(kv.k.nbytes + kv.v.nbytes for kv in self.kv)

    @property
    def expert_nbytes(self) -> int:
        return sum(cache.nbytes for cache in filter(None, self.expert_caches))


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

    row: Router  # of ROUTERS
    angles: tuple[Tensor, Tensor]  # of rope_angles
    # (B or 1, 1, T, bucket), 0 where a query sees a key and -inf elsewhere; None: it sees all up to itself
    visible: Tensor | None = None
    active: Tensor | None = None  # (B, T) bool, False at padding and in finished rows; None: all active
    place: Tensor | None = None  # (T,) where the tokens go in the KV caches
    fresh: bool = True  # the tokens begin their sequences


def without_cudnn():
    """Attention by any backend but cuDNN's, which plans anew for every length, for longer than a step takes.

    torch prefers it since 2.11 on GPUs of compute capability 9 and 10.
    """
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


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
            kv.write(k, v, context.place)
        visible = context.visible
        causal = visible is None
        if not causal:
            k, v = (part[:, :, : visible.shape[-1]] for part in (kv.k, kv.v))  # (B, n_kv_head, bucket, D)
        grouped = self.n_kv_head != self.n_head
        if grouped and not causal:  # on a GPU no fast kernel takes both: groups become rows
            q = q.reshape(B, self.n_kv_head, -1, self.head_dim)  # (B, n_kv_head, group * T, D)
            visible, grouped = visible.repeat(1, 1, self.n_head // self.n_kv_head, 1), False
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=grouped)
        return self.out(y.reshape(B, self.n_head, T, self.head_dim).transpose(1, 2).flatten(2))


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


def sort_pairs(mask: Tensor, max_pairs: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of mask (S, E), sorted by expert.

    max_pairs: a number N that the pairs cannot exceed, or None to count them, which waits for the device.
    -> flat index e*S + s of each pair (N,), its token s (N,), where each expert ends (E,) int32.
    Spare pairs come last and have the flat index -1 and some valid token. Where the pairs are counted, one
    spare pair is added, because grouped_mm has no gradient for no pairs at all.
    """
    flat = mask.T.reshape(-1)  # (E*S,)
    if max_pairs is None:
        pair = F.pad(flat.nonzero().squeeze(1), (0, 1), value=-1)  # (N,)
    else:
        pair = torch.nonzero_static(flat, size=max_pairs, fill_value=-1).squeeze(1)  # (N,)
    return pair, pair % mask.shape[0], mask.sum(0).cumsum(0).int()


@torch.compiler.assume_constant_result  # torch.compile cannot look into it
def leaves_garbage(device: torch.device) -> bool:
    """Whether grouped_mm leaves the weight gradient of an expert without tokens undefined: on GPUs of compute
    capability 10 (pytorch issue 172439, cutlass issue 2674)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10


def run_experts(
    x: Tensor, mask: Tensor, weight: Tensor, w_in: Tensor, w_out: Tensor, max_pairs: int | None
) -> Tensor:
    """y[s] = sum over the experts e of mask[s] of weight[s, e] * expert_e(x[s]).

    x (S, C); mask, weight (S, E), weight float32; w_in (E, C, 2H), w_out (E, H, C) in x's dtype; max_pairs as
    in sort_pairs -> (S, C) float32. An expert without tokens costs nothing and gets a zero gradient.
    """
    pair, token, ends = sort_pairs(mask, max_pairs)
    spare = pair < 0
    if torch.is_grad_enabled():  # grouped_mm leaves rows behind the last end, and their gradients, undefined:
        ends = torch.where(ends == ends[-1], len(pair), ends).int()  # so the last expert in use gets them
        x = x.float()  # to gather its rows adds up the gradients of a token's pairs: not in bfloat16
        if leaves_garbage(x.device):
            used = mask.any(0).view(-1, 1, 1)
            w_in, w_out = (torch.where(used, w, 0) for w in (w_in, w_out))
    pair_weight = torch.where(spare, 0, weight.T.reshape(-1).index_select(0, pair.clamp(min=0)))  # (N,)
    rows = x.index_select(0, token).to(w_in.dtype)  # (N, C)
    h = swiglu(F.grouped_mm(rows, w_in, offs=ends))  # (N, H)
    # the weight multiplies here, where rows are narrower than behind w_out: 3% of a layer's time
    h = (h * pair_weight.unsqueeze(-1)).to(w_in.dtype)
    y = F.grouped_mm(h, w_out, offs=ends).float()  # (N, C)
    if not torch.is_grad_enabled():
        y = y.masked_fill_(spare.unsqueeze(-1), 0)
    return torch.zeros_like(x, dtype=torch.float32).index_add(0, token, y)


def run_on_cpu(x: Tensor, mask: Tensor, weight: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """`run_experts` without gradients on a CPU, where the pairs can be counted without waiting.

    Where they are no more than the experts, as in a step of decoding, reading the weights is all the work: a
    loop over the pairs reads just theirs, and does without sorting. torch.compile takes it as it is, as one
    operation: so a compiled step has static shapes and still computes no pair too many.
    """
    pairs = mask.nonzero()
    if len(pairs) > mask.shape[1]:
        return run_experts(x, mask, weight, w_in, w_out, None)
    y = torch.zeros_like(x, dtype=torch.float32)
    for (s, e), factor in zip(pairs.tolist(), weight[mask].tolist(), strict=True):
        h = swiglu(x[s : s + 1] @ w_in[e]) * factor  # (1, H)
        y[s : s + 1] += h @ w_out[e]
    return y


OP = "nano_seqtopk::run_on_cpu"
torch.library.define(OP, "(Tensor x, Tensor mask, Tensor weight, Tensor w_in, Tensor w_out) -> Tensor")
torch.library.impl(OP, "cpu", run_on_cpu)
torch.library.register_fake(OP, lambda x, *others: torch.empty_like(x, dtype=torch.float32))


def product_dtype(x: Tensor) -> torch.dtype:
    """Of matrix products with x: autocast's, of which grouped_mm and caches know nothing, or x's dtype."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


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
        self.register_buffer("bias", torch.zeros(config.n_expert + config.n_null))  # router.loss_free_update
        self.state = nn.Module()  # buffers: what the router learns or adapts
        for name, tensor in initial_state(config).items():
            self.state.register_buffer(name, tensor)

    def forward(self, x: Tensor, context: Context, cache: ExpertCache | None) -> tuple[Tensor, Routing]:
        """x (B, T, C) -> the same shape, and how it was routed."""
        logits, scores = self.score(x)  # (B, T, E) each
        mask = self.select(scores.detach(), context, cache)  # (B, T, E)
        weight = self.weigh(scores, mask)  # (B, T, E)
        y = self.dispatch(x, mask, weight, context)  # (B, T, C)
        if self.shared is not None:
            y = y + self.run_shared(x)
        return y, Routing(logits, scores, mask)

    def score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and scores, float32 whatever x is, because close bfloat16 scores would tie."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.gate.weight.float())
            return logits, SCORES[self.config.score_fn](logits)

    @torch.no_grad()
    def select(self, scores: Tensor, context: Context, cache: ExpertCache | None) -> Tensor:
        row = context.row
        if row.takes_bias:
            scores = scores + self.bias
        if cache is not None:
            return cache.route(scores, context.active)
        mask = row.select(scores, self.config.k, **self.options_of(row))
        return mask if context.active is None else mask & context.active.unsqueeze(-1)

    def options_of(self, row: Router) -> dict[str, object]:
        """What the router of that row takes besides k: settings, and the state if it asks for it."""
        state = {"state": self.router_state()} if "state" in row.options else {}
        return self.config.options_of(row) | state

    def weigh(self, scores: Tensor, mask: Tensor) -> Tensor:
        """What multiplies each expert's output: the score, without the bias, which selects and never weighs,
        divided by the sum of the token's best scores. Null experts are left out from here on.

        The divisor does not depend on what was chosen: if it did, a token's only expert would get all of the
        weight and a fourth one would dilute the others, so that SeqTopK would move compute without moving the
        output. Measured at K = 2 of a trained model: 0.05 nats worse than TopK. Over one score alone (K = 1)
        the weight is always 1, and the text's loss has no say in the gate.
        """
        weight = scores[..., : self.config.n_expert]  # (B, T, E)
        if self.config.norm_topk:
            divisor = (weight * mask[..., : self.config.n_expert]).sum(-1, keepdim=True)
        elif self.config.n_best:
            divisor = weight.topk(self.config.n_best, dim=-1).values.sum(-1, keepdim=True)
        else:
            return weight
        return weight / divisor.clamp(min=1e-9)

    def dispatch(self, x: Tensor, mask: Tensor, weight: Tensor, context: Context) -> Tensor:
        """Each token's experts, times their weights, added up: (B, T, C)."""
        B, T, C = x.shape
        dtype = product_dtype(x)
        mask, w_in, w_out = mask[..., : self.config.n_expert], self.w_in.to(dtype), self.w_out.to(dtype)
        inputs = x.reshape(-1, C).to(dtype), mask.flatten(0, 1), weight.flatten(0, 1), w_in, w_out
        if x.is_cpu and not torch.is_grad_enabled():
            y = torch.ops.nano_seqtopk.run_on_cpu(*inputs)
        else:
            y = run_experts(*inputs, self.max_pairs(B, T, context))
        return y.to(x.dtype).view(B, T, C)

    def run_shared(self, x: Tensor) -> Tensor:
        """The shared expert's output."""
        shared = self.shared(x)
        return shared if self.shared_gate is None else shared * self.shared_gate(x).sigmoid()

    def max_pairs(self, B: int, T: int, context: Context) -> int | None:
        """A number of pairs that B*T tokens cannot exceed, or None if there is none worth padding to."""
        row, config = context.row, self.config
        if row.exact:
            return B * T * config.k
        bound = row.max_pairs(config, B * T, context.fresh) if row.max_pairs else None
        return B * config.n_expert if bound is None and T == 1 else bound

    def check_promises(self, name: str) -> None:
        """Raise ValueError unless that router does with random scores what its row of ROUTERS promises."""
        config, row = self.config, ROUTERS[name]
        draw = torch.Generator().manual_seed(0)
        tokens = min(config.block_size, 4096)  # a pretrained model may allow a hundred times as many
        logits = torch.randn(2, tokens, len(self.bias), generator=draw).to(self.bias.device)
        mask = check_promises(name, SCORES[config.score_fn](logits), config.k, **self.options_of(row))
        chosen = mask[..., : config.n_expert].sum(-1)  # (B, T)
        spent = {(chosen.numel(), True): int(chosen.sum())}
        if row.causal:  # a step of decoding
            spent[1, False] = int(chosen.max())
        for (n, fresh), pairs in spent.items():
            most = row.max_pairs(config, n, fresh) if row.max_pairs else None
            enough = most is None or pairs <= most
            require(enough, f"max_pairs of router {name}", most, f"at least {pairs}, as many as it chose")

    def router_state(self) -> State:
        return dict(self.state.named_buffers())

    @torch.no_grad()
    def reset_state(self) -> None:
        """Forget what steers the routing beside the weights."""
        self.bias.zero_()
        for name, tensor in initial_state(self.config).items():
            self.state.get_buffer(name).copy_(tensor)


class Block(nn.Module):
    def __init__(self, config: MoEConfig, layer: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MoE(config) if config.has_experts(layer) else MLP(config.n_embd, config.dense_width)

    def forward(
        self, x: Tensor, context: Context, kv: KVCache | None, expert_cache: ExpertCache | None
    ) -> tuple[Tensor, Routing | None]:
        x = x + self.attention(self.attention_norm(x), context, kv)
        h = self.mlp_norm(x)
        if isinstance(self.mlp, MLP):
            return x + self.mlp(h), None
        y, routing = self.mlp(h, context, expert_cache)
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
    def n_taken(self) -> Tensor:
        """(B, t, L) how many experts each token got."""
        return self.mask.sum(-1)


class CrossEntropy(torch.autograd.Function):
    """The head and the sum of cross-entropies in nats. Gradients are made on the way forward, so that the
    logits of a few tokens at a time are made, used and dropped while they lie in the cache.

    Measured on one core, 2,048 tokens, C=128, V=4096: 66 ms instead of 85, a tenth of a step of two layers.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, learns: bool) -> Tensor:
        """x (S, C), weight (V, C), targets (S,), of which -1 does not count -> scalar float32."""
        rows = 128 if x.is_cpu else len(x)
        total = torch.zeros((), device=x.device)
        dx, dweight, ctx.dtype = torch.empty_like(x), None, weight.dtype
        if learns and ctx.needs_input_grad[1]:
            dweight = torch.zeros_like(weight, dtype=torch.float32)
        for piece, target, dpiece in zip(x.split(rows), targets.split(rows), dx.split(rows), strict=True):
            counts, target = target.unsqueeze(1) >= 0, target.unsqueeze(1).clamp(min=0)  # (rows, 1)
            log_share = F.linear(piece, weight).float().log_softmax(-1)  # (rows, V)
            # not in place: compiled by torch 2.11, all gradients would be 0
            total = total - log_share.gather(1, target).where(counts, 0).sum()
            if learns:
                share = log_share.exp_().scatter_add_(1, target, -counts.float())
                dlogits = share.mul_(counts).to(x.dtype)  # (rows, V)
                dpiece.copy_(dlogits @ weight)
                if dweight is not None:
                    dweight += dlogits.T @ piece
        ctx.save_for_backward(dx, dweight)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        dweight = None if dweight is None else (dweight * grad).to(ctx.dtype)
        return dx * grad.to(dx.dtype), dweight, None, None


class MoEGPT(nn.Module):
    def __init__(self, config: MoEConfig):
        """Random weights: normal, deviation 0.02, less where a matrix adds to the residual stream (GPT-2)."""
        super().__init__()
        require(config.vocab_size >= 1, "vocab_size", config.vocab_size, "at least 1")
        check_memory(4 * config.n_matrix_weights, "a model of these sizes", torch.get_default_device())
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
        room for, and for another router than the cache's.
        """
        room = self.config.block_size
        if cache:
            own = f"{cache.router}, the cache's, or none"
            require(router in (None, cache.router), "router", router, own)
            cache.make_room(idx.shape[1], active is not None)
        elif idx.shape[1] > room:
            raise ValueError(f"{idx.shape[1]} tokens are more than the {room} that block_size allows")
        elif active is not None:
            raise ValueError("active needs a cache: without one, padding would compete for experts")
        x, routings = self._trunk(idx, cache, router, active)
        stats = self._collect(routings, idx)
        if targets is None:
            return self.head(x).float(), None, stats
        return None, self._loss(x, targets), stats

    def compile(self) -> None:
        """Let torch.compile make graphs of each block, the loss and the statistics, to be used where
        gradients are wanted. Blocks that are alike share one graph: one of the whole model, as nn.Module's
        own method makes, would take three times as long to compile.
        """
        self.uncompile()
        for module, name in self._parts():
            plain = getattr(module, name)
            setattr(module, name, partial(compiled_to_learn, plain, as_graph(plain)))

    def uncompile(self) -> None:
        """Undo `compile`, and whatever else was put in a block's forward: then the model can be freed."""
        for module, name in self._parts():
            vars(module).pop(name, None)

    def _parts(self) -> list[tuple[nn.Module, str]]:
        return [*((block, "forward") for block in self.blocks), (self, "_loss"), (self, "_collect")]

    def _trunk(
        self, idx: Tensor, cache: Cache | None, router: str | None, active: Tensor | None
    ) -> tuple[Tensor, list[Routing]]:
        """Everything before the head: (B, T, C), and how the L layers with experts routed."""
        context = self._context(idx, cache, router, active)
        x = self.embedding(idx)  # (B, T, C)
        routings = []
        with without_cudnn() if cache and idx.is_cuda else nullcontext():
            for layer, block in enumerate(self.blocks):
                caches = (cache.kv[layer], cache.expert_caches[layer]) if cache else (None, None)
                x, routing = block(x, context, *caches)
                if routing is not None:
                    routings.append(routing)
        return self.norm(x), routings

    def _context(
        self, idx: Tensor, cache: Cache | None, router: str | None, active: Tensor | None
    ) -> Context:
        T = idx.shape[1]
        if cache:
            place, position, visible = cache.locate(T, active)
            angles = rope_angles(position, self.config)
            return Context(ROUTERS[cache.router], angles, visible, active, place, cache.fresh)
        router = router or self.config.router
        check_state(self.config, router)
        position = torch.arange(T, device=idx.device).unsqueeze(0)  # (1, T)
        return Context(ROUTERS[router], rope_angles(position, self.config))

    def _loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of the targets (B, T) that count, from the trunk's x (B, T, C)."""
        learns = torch.is_grad_enabled()  # within the function it never is
        total = CrossEntropy.apply(x.flatten(0, 1), self.head.weight, targets.flatten(), learns)
        return total / (targets >= 0).sum()

    def _collect(self, routings: list[Routing], idx: Tensor) -> Stats:
        """Put the layers' statistics together."""
        if not routings:
            zero = torch.zeros((), device=idx.device)
            load = idx.new_zeros(0, self.config.n_expert)
            return Stats(zero, zero, load, idx.new_zeros(0, *idx.shape), [])
        balance = torch.stack([load_balance_loss(routing.scores, routing.mask) for routing in routings])
        z = torch.stack([z_loss(routing.logits) for routing in routings])
        mask = torch.stack([routing.mask for routing in routings])  # (L, B, T, E + n_null)
        real = mask[..., : self.config.n_expert]  # (L, B, T, E)
        return Stats(balance.mean(), z.mean(), real.sum((1, 2)), real.sum(-1), routings)

    def rerouted(self, **settings) -> "MoEGPT":
        """The model itself, whose routing has these settings from now on."""
        config = replace(self.config, **settings)
        for module in (self, *self.expert_layers()):
            module.config = config
        return self

    def check_promises(self, *routers: str) -> None:
        """Raise ValueError unless these routers do in a layer here what their rows of ROUTERS promise."""
        for layer in self.expert_layers()[:1]:  # a dense model has none
            for name in dict.fromkeys(routers):
                layer.check_promises(name)

    def new_cache(self, batch_size: int, max_tokens: int | None = None, router: str | None = None) -> Cache:
        """An empty cache for batch_size sequences of up to max_tokens (None: block_size) tokens.

        router: a causal one (None: the `decode` stand-in of the config's); one with a state only if the model
        was trained under it. Raises ValueError for any other.
        """
        router = router or ROUTERS[self.config.router].decode
        require(router in ROUTERS, "router", router, known_routers())
        causal = [name for name, row in ROUTERS.items() if row.causal]
        require(router in causal, "router", router, f"causal to decode: {', '.join(causal)}")
        check_router(self.config, router)
        weight = self.head.weight
        max_tokens = self.config.block_size if max_tokens is None else max_tokens
        require(max_tokens >= 2, "max_tokens", max_tokens, "at least 2")
        return Cache(self.config, batch_size, max_tokens, router, weight.device, product_dtype(weight))

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        cache: Cache | None = None,
        temperature: float = TEMPERATURE,
        top_k: int | None = None,
        top_p: float | None = TOP_P,
        stop: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        active: Tensor | None = None,
        compile: bool = False,
    ) -> Iterator[Chunk]:
        """Continue idx (B, P); yields the prompt, then each of up to max_new_tokens tokens, as it is fed.

        A row ends before the token `stop`, or one of them, and generation when all rows have ended. active
        (B, P) bool marks the real tokens of prompts padded on the left to one length. temperature 0 takes the
        likeliest token; top_k and top_p as in sample_token, which says what ValueErrors it raises.

        The cache (None: a new one of what is needed, up to block_size) is the window that the model sees.
        When it is full, it is emptied and the newest half of the text is fed again, so that their routing
        begins anew; a prompt that does not fit is cut to its newest max_tokens // 2 tokens.

        compile: a new token's step is one graph of torch.compile, compiled once for each Cache.bucket, which
        pick_compiled_decoding says when to do.
        """
        require(idx.shape[1] >= 1, "tokens in the prompt", idx.shape[1], "at least 1")
        needed = max(2, idx.shape[1] + max_new_tokens)
        cache = cache or self.new_cache(len(idx), min(needed, self.config.block_size))
        text, real = idx, torch.ones_like(idx, dtype=torch.bool) if active is None else active
        if idx.shape[1] > cache.max_tokens:
            half = cache.max_tokens // 2
            text, real = text[:, -half:], real[:, -half:]
        draw = partial(sample_token, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        step = MoEGPT._step
        if compile:
            step = compiled_step(idx.device)
            cache.fix_addresses()
        logits, chunk = self._feed(text, real, cache, active is not None)
        yield chunk
        padded = active is not None or (stop is not None and len(idx) > 1)  # a row may end before another
        yield from self._write(logits, chunk, cache, padded, draw, max_new_tokens, stop, step)

    def _write(
        self,
        logits: Tensor,
        chunk: Chunk,
        cache: Cache,
        padded: bool,
        draw: Callable[[Tensor], Tensor],
        max_new_tokens: int,
        stop: int | Sequence[int] | None,
        step: Callable,
    ) -> Iterator[Chunk]:
        """`generate` after its prompt, of which the model made `logits` and `chunk`."""
        fed, half = [chunk], cache.max_tokens // 2
        ends = None if stop is None else torch.tensor(stop, device=logits.device)
        alive = torch.ones_like(chunk.active[:, :1])
        for _ in range(max_new_tokens):
            token = draw(logits)  # (B, 1)
            if ends is not None:
                alive = alive & (token != ends).all(-1, keepdim=True)
                if not alive.any():
                    return
            if cache.pos == cache.max_tokens:
                cache.reset()
                parts = ([c.tokens for c in fed], [c.active for c in fed])
                text, real = (torch.cat(part, dim=1)[:, -half:] for part in parts)
                fed = [self._feed(text, real, cache, padded)[1]]
            logits, chunk = self._feed(token, alive, cache, padded, step)
            fed.append(chunk)
            yield chunk

    def _step(self, idx: Tensor, cache: Cache, active: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, V) after the last token of idx (B, t), Chunk.mask and Chunk.last_hidden."""
        x, routings = self._trunk(idx, cache, None, active)
        masks = [routing.mask[..., : self.config.n_expert] for routing in routings]
        none = torch.empty(*idx.shape, 0, self.config.n_expert, dtype=torch.bool, device=idx.device)
        return self.head(x[:, -1]).float(), torch.stack(masks, dim=2) if masks else none, x

    def _feed(
        self, idx: Tensor, active: Tensor, cache: Cache, padded: bool, step: Callable = _step
    ) -> tuple[Tensor, Chunk]:
        """Logits (B, V) after the last token of idx (B, t), and what the model gave each of them.

        padded: some token may not be active; otherwise active (B, t) is not looked at.
        """
        cache.make_room(idx.shape[1], padded)
        logits, mask, x = step(self, idx, cache, active if padded else None)
        return logits, Chunk(idx, mask, active, x)

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
        tied = model.config.tie_embeddings  # which check_shapes cannot tell
        require(
            tied == old.tie_embeddings, "tie_embeddings", tied, f"{old.tie_embeddings} as in the checkpoint"
        )
        with door(checkpoint["path"]):
            weights = fit_state(checkpoint, model.config, model.state_dict())
            check_shapes(model.state_dict(), weights, checkpoint["path"])
            model.load_state_dict(weights)
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
        settings, model_type = hugging_face.read_settings(name_or_path)
        with door(Path(name_or_path) / "config.json"):
            config = MoEConfig(**settings)
            check_memory(2 * config.n_matrix_weights, "a model of these sizes", torch.device(device))
        with torch.device("meta"):
            model = cls(replace(config, **changes))
        # its config can be opened: only now fetch gigabytes
        folder = hugging_face.hf_folder(name_or_path, "model*.safetensors*")
        paths, outlines = hugging_face.file_tensors(folder)
        twice = model.config.tie_embeddings and hugging_face.NAMES["head.weight"] in outlines
        if twice:  # read it too, to compare it below
            model.head.weight = nn.Parameter(torch.empty_like(model.embedding.weight))
        weights = dict(model.named_parameters())
        check_shapes(hugging_face.file_views(weights, model_type, outlines), outlines, folder)
        model.cast(outlines[hugging_face.NAMES["embedding.weight"]].dtype).to_empty(device=device)
        for layer in model.expert_layers():
            layer.reset_state()
        weights = dict(model.named_parameters())
        hugging_face.copy_tensors(paths, hugging_face.file_views(weights, model_type, outlines))
        same = not twice or torch.equal(model.head.weight, model.embedding.weight)
        require(same, f"lm_head.weight in {folder}", "another than the embedding", "it, or not tied")
        model._tie()
        return model

    def save_pretrained(
        self, path: str | Path, tokenizer: dict | None = None, shard_bytes: int = 2 * 2**30
    ) -> None:
        """Write a new folder that transformers opens, whole or not at all; its logits are those under topk.

        tokenizer: its meta, for eos_token_id and, if it came from such a folder, tokenizer.json. Raises
        ValueError if the folder exists, and for an architecture that none of hugging_face.FAMILIES has.
        """
        config, weights = self.config, dict(self.named_parameters())
        if config.norm_topk or config.n_best == config.k:  # under topk the same
            config = replace(config, norm_topk=True, norm_best=0)
        model_type = hugging_face.family_of(asdict(config), asdict(MoEConfig()), routing_settings())
        biased = any(layer.bias.any() for layer in self.expert_layers())
        require(not biased, "the bias for selection (bias_rate)", "in use", "0 to be saved for transformers")
        settings = asdict(config) | {"head_width": config.head_dim, "dense_hidden": config.dense_width}
        settings["n_kv_head"] = config.kv_heads
        hugging_face.write_checkpoint(Path(path), model_type, settings, weights, tokenizer or {}, shard_bytes)


def compiled_to_learn(plain: Callable, compiled: Callable, *args):
    """compiled(*args) where gradients are wanted. Elsewhere, in evaluation and writing, lengths vary, and to
    compile for each would not be repaid: plain(*args)."""
    return (compiled if torch.is_grad_enabled() else plain)(*args)


@lru_cache
def compiled_step(device: torch.device) -> Callable:
    """MoEGPT._step by torch.compile: one graph for each size of its inputs and bucket of its cache, on a GPU
    captured as a CUDA graph where grouped_mm allows it. What it returns is the caller's to keep."""
    overhead = {"options": {"cpp_wrapper": True}}  # a tenth of a step on a CPU
    if device.type == "cuda":
        overhead = {"mode": "reduce-overhead"} if grouped_mm_is_a_kernel(device) else {}
    step = as_graph(MoEGPT._step, fullgraph=True, dynamic=False, **overhead)

    def run(model: MoEGPT, idx: Tensor, cache: Cache, active: Tensor | None) -> list[Tensor]:
        torch.compiler.cudagraph_mark_step_begin()  # the next step overwrites what this one returns: so clone
        return [part.clone() for part in step(model, idx, cache, active)]

    return run


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


# -------------------- checkpoints -------------------------------------------------------------------------


def check_shapes(here: dict[str, Tensor], there: dict[str, Tensor], where: str | Path) -> None:
    """Raise ValueError unless the tensors at `there` are those that a model has here, in names and shapes."""
    for name in [*here, *there]:
        asked = tuple(here[name].shape) if name in here else "absent"
        found = tuple(there[name].shape) if name in there else "missing"
        require(asked == found, f"{name} in {where}", found, f"{asked} in this architecture")
        alike = here[name].is_floating_point() == there[name].is_floating_point()
        require(alike, f"the dtype of {name} in {where}", there[name].dtype, f"like {here[name].dtype}")


def fit_state(checkpoint: dict, config: MoEConfig, here: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's weights, with its router's state or, under a router that has another, the one `here`."""
    weights, router = checkpoint["model"], checkpoint["config"]["router"]
    if router in ROUTERS and ROUTERS[router].state is ROUTERS[config.router].state:
        return weights
    kept = {name: tensor for name, tensor in weights.items() if ".state." not in name}
    return kept | {name: tensor for name, tensor in here.items() if ".state." in name}


FORMAT = "seqtopk checkpoint 1"
CHECKPOINT = {"config": {"norm_best": int | None}, "model": {str: Tensor}, "step?": COUNT}
CHECKPOINT |= {"tokenizer?": dict, "train_config?": dict}


def save_checkpoint(path: str | Path, model: MoEGPT, weights: dict | None = None, **extra) -> None:
    """Write the config and weights of the model, and `extra`, whole or not at all.

    weights: its state_dict without shards (None: it has none). Raises OSError, on a full disk for instance.
    """
    checkpoint = {"format": FORMAT, "config": asdict(model.config), **extra}
    checkpoint["model"] = model.state_dict() if weights is None else weights
    with whole(Path(path)) as new, open(new, "wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch says at which position a write failed, its context why
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_checkpoint(path: str | Path) -> dict:
    """Read what save_checkpoint wrote, with its "path": `extra`, and what MoEGPT.from_checkpoint takes.

    A folder stands for the best.pt of the run in it, or the last.pt where no best is. Raises ValueError when
    there is no such file, when it is damaged, or when something else wrote it.
    """
    path = Path(path)
    if path.is_dir():
        path = path / ("best.pt" if (path / "best.pt").is_file() else "last.pt")
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}: train a model first, or correct the path")
    with door(path, "use another, such as best.pt"):
        with zipfile.ZipFile(path) as archive:  # torch writes checksums and does not read them
            flipped = archive.testzip()
        require(flipped is None, f"the checksum of {flipped}", "wrong", "right")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        ours = isinstance(checkpoint, dict) and checkpoint.get("format") == FORMAT
        require(ours, "its format", "not that of this project (or of another version)", repr(FORMAT))
        check(checkpoint, CHECKPOINT)
        MoEConfig(**checkpoint["config"])
        for name, tensor in checkpoint["model"].items():
            require(not tensor.isnan().any(), name, "NaN", "numbers")
    return checkpoint | {"path": str(path)}


def pretrained_config(name_or_path: str | Path) -> MoEConfig:
    """The architecture of a Hugging Face checkpoint, under topk. Errors as in MoEGPT.from_pretrained."""
    with door(Path(name_or_path) / "config.json"):
        return MoEConfig(**hugging_face.read_settings(name_or_path)[0])
