"""Routers: which experts process which tokens.

A router is a pure function `select(scores, k, ...) -> mask`: from the scores of a batch to the (token,
expert) pairs that will be computed. It has no parameters. Decoding one token at a time also needs the scores
of the past: `ExpertCache` keeps them. The few routers that learn or adapt say so in their row of ROUTERS.

    B  sequences in the batch         k   experts per token on average: the budget (K in the paper)
    T  tokens in a sequence           m0  min_experts: every token gets its m0 best experts
    E  experts                        u   max_experts: no token gets more (None: k + 2, at most E)

    scores (B, T, E) float32          mask (B, T, E) bool

The experts of rank m0+1 .. u of a token are its c = u - m0 *candidates*, best first. They compete for the
*extra budget*: T*(k - m0) pairs in a sequence of T tokens.

One total order breaks all ties, so that a mask never depends on how a kernel sorts: within a token the lower
expert index comes first; among the candidates of a sequence the earlier token comes first.

Source: "Route Experts by Sequence, not by Token", arXiv 2511.06494, unless another is named.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from config import require

State = dict[str, Tensor]  # what a router has learned in one layer, by name


class Routing(NamedTuple):
    """What the gate of one layer said of each token, and what the router made of it.

    (B, T, E) each, or (B, T, E + n_null).
    """

    logits: Tensor  # float32
    scores: Tensor  # float32
    mask: Tensor  # bool


# -------------------- the idea: from TopK to online SeqTopK -----------------------------------------------


def topk(scores: Tensor, k: int) -> Tensor:
    """Every token takes its k best experts (arXiv 1701.06538).

    scores (B, T, E) -> mask (B, T, E). Raises ValueError unless 1 <= k <= E.
    """
    check_bounds(scores.shape[-1], k)
    _, expert_ids = rank_experts(scores, k)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, expert_ids, True)


def seqtopk(scores: Tensor, k: int, min_experts: int = 1, max_experts: int | None = None) -> Tensor:
    """Every sequence spends exactly T*k pairs where its scores are highest (SeqTopK).

    Each token takes its min_experts best experts; the extra budget goes to the highest of all candidates of
    the sequence. Sees tokens that come later.

    scores (B, T, E) -> mask (B, T, E). Raises ValueError for impossible bounds (check_bounds).
    """
    B, T, E = scores.shape
    u = check_bounds(E, k, min_experts, max_experts)
    values, expert_ids = rank_experts(scores, u)
    candidates = values[..., min_experts:].reshape(B, -1)  # (B, T*c)
    best = candidates.argsort(dim=-1, descending=True, stable=True)[:, : T * (k - min_experts)]
    taken = torch.zeros_like(candidates, dtype=torch.bool).scatter_(-1, best, True)
    n_taken = taken.view(B, T, -1).sum(-1)  # the count says which: candidates are ranked
    return take_best(scores, expert_ids, min_experts + n_taken)


def online_seqtopk(
    scores: Tensor, k: int, min_experts: int = 1, max_experts: int | None = None, strict: bool = True
) -> Tensor:
    """The causal form of SeqTopK: token m competes with tokens 1 .. m of its sequence only.

    Token m takes its min_experts best experts, and those of its candidates that are among the m*(k - m0) best
    candidates of tokens 1 .. m. So its row is the last row of `seqtopk(scores[:, :m])`, and without `strict`
    this equals the plain loop

        for m in range(1, T + 1):
            mask[:, m - 1] = seqtopk(scores[:, :m], k)[:, -1]

    That rule alone overspends where scores grow along the sequence. `strict` caps the pairs that tokens
    1 .. m spend at m*k, for every m: a token for which too little is left takes only the best of these
    candidates. Measured (experiments/bounds.py, K = 2): decoding without it spends 3% more experts, which is
    1% above k, and lowers the loss by 0.006 nats. With it 2% of the budget are left (experiments/gap.py).

    scores (B, T, E) -> mask (B, T, E). Raises ValueError for impossible bounds (check_bounds).
    """
    B, T, E = scores.shape
    u = check_bounds(E, k, min_experts, max_experts)
    values, expert_ids = rank_experts(scores, u)
    candidates = values[..., min_experts:]  # (B, T, c)
    extra_budget = torch.arange(1, T + 1, device=scores.device).expand(B, T) * (k - min_experts)
    n_taken = count_above_threshold(candidates, candidates.new_empty(B, 0), extra_budget)
    if strict:
        n_taken = cap_spending(n_taken, extra_budget, torch.zeros_like(extra_budget[:, :1]))
    return take_best(scores, expert_ids, min_experts + n_taken)


def rank_experts(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n best experts of each token, best first: their scores and their indices, (B, T, n) each."""
    ranked = scores.sort(dim=-1, descending=True, stable=True)
    return ranked.values[..., :n], ranked.indices[..., :n]


def take_best(scores: Tensor, expert_ids: Tensor, n_taken: Tensor) -> Tensor:
    """Mask (B, T, E): each token takes the first n_taken (B, T) of its ranked expert_ids."""
    taken = torch.arange(expert_ids.shape[-1], device=scores.device) < n_taken.unsqueeze(-1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, expert_ids, taken)


def count_above_threshold(candidates: Tensor, past: Tensor, extra_budget: Tensor) -> Tensor:
    """How many candidates of each token are among the extra_budget best, up to and including that token.

    candidates (B, t, c); past (B, p), the scores of earlier tokens' candidates in any order; extra_budget
    (B, t), of all tokens up to each one -> (B, t). For token m alone it would be

        threshold = all_candidates_up_to_m.sort(descending).values[extra_budget[m] - 1]
        (candidates[m] >= threshold).sum()

    but for ties. So ranks are compared in place of scores: 0 is the best candidate of the whole sequence,
    no two are equal, and the threshold of a token is the extra_budget-th lowest rank up to there.
    """
    B, t, c = candidates.shape
    p = past.shape[1]
    order = torch.cat([past, candidates.flatten(1)], dim=1).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(p + t * c, device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)  # (B, p + t*c)
    length = p + c * torch.arange(1, t + 1, device=order.device).expand(B, t)
    threshold = prefix_order_statistic(rank, length, extra_budget - 1)  # (B, t)
    above = rank[:, p:].view(B, t, c) <= threshold.unsqueeze(-1)
    return (above & (extra_budget > 0).unsqueeze(-1)).sum(-1)


def prefix_order_statistic(rank: Tensor, length: Tensor, nth: Tensor) -> Tensor:
    """The nth smallest (from 0) of the first `length` ranks, for many pairs (length, nth) at once.

    rank (B, n): in each row a permutation of 0 .. n-1; length, nth (B, Q) -> (B, Q). It equals the loop

        for b, q in all rows and queries:
            answer[b, q] = rank[b, : length[b, q]].sort().values[nth[b, q]]

    in about log2(n) rounds of cumsum, gather and scatter, whatever Q is (a wavelet tree). Measured (bench.py
    router, two CPU cores): at B=8, T=1024, E=64, K=8 online SeqTopK takes 19 ms, 2.2 times seqtopk's.

    A round fixes one bit of every answer, from the highest down. It counts how many ranks of a query's prefix
    have a 0 there. If these are more than nth, the answer has a 0 too, and the search goes on among them;
    else it has a 1, the search goes on among the others, and nth drops by the number of those with a 0.
    Then `regroup` makes the ranks that a query still searches the first `length` ones of a group.

    The third smallest (nth = 2) of the first five of these eight ranks, 5 2 7 0 3:

        5 2 7 0 3 6 1 4   bit 4 is 0 in 2 0 3, three ranks > nth:  0; go on in the first three of 2 0 3 1
        2 0 3 1           bit 2 is 0 in 0, one rank <= nth:        1; nth = 1, go on in the first two of 2 3
        2 3               bit 1 is 0 in 2, one rank <= nth:        1; the answer is 011 = 3
    """
    answer = torch.zeros_like(nth)  # the bits found so far; also where the query's group begins
    for bit in reversed(range((rank.shape[1] - 1).bit_length())):
        half = 1 << bit
        is_zero = rank & half == 0
        zeros = F.pad(is_zero.cumsum(-1), (1, 0))  # (B, n+1): how many of the first i have a 0
        zeros_before_group = answer // 2  # every group before the query's is full: half of its ranks
        zeros_in_prefix = zeros.gather(-1, answer + length) - zeros_before_group
        is_one = nth >= zeros_in_prefix
        nth = torch.where(is_one, nth - zeros_in_prefix, nth)
        length = torch.where(is_one, length - zeros_in_prefix, zeros_in_prefix)
        answer = answer + half * is_one
        rank = regroup(rank, is_zero, zeros, half)
    return answer


def regroup(rank: Tensor, is_zero: Tensor, zeros: Tensor, half: int) -> Tensor:
    """Split each group into the ranks that have a 0 at the bit `half` and, after them, those that have a 1.

    A group: all ranks that agree in the bits above, side by side in their old order. Because ranks are a
    permutation, it holds 2*half consecutive numbers and begins at the place that is its smallest one.

    rank, is_zero (B, n); zeros (B, n+1), how many of the first i have a 0 -> (B, n).
    """
    place = torch.arange(rank.shape[1], device=rank.device)
    group_start = place & -(2 * half)
    zeros_before = zeros[:, :-1] - group_start // 2  # in the group, before the place
    new_place = torch.where(is_zero, group_start + zeros_before, place + half - zeros_before)
    return torch.empty_like(rank).scatter_(-1, new_place, rank)


def cap_spending(n_taken: Tensor, extra_budget: Tensor, spent: Tensor) -> Tensor:
    """Cut n_taken, so that all tokens up to each one together spend no more than the extra budget there.

    n_taken (B, t), candidates that each token would take; extra_budget (B, t), of all tokens up to each one,
    so it never falls; spent (B, 1), by the tokens before these -> the candidates that each takes, (B, t), the
    steps of the total in this loop, which starts at `spent`:

        for m in range(t):
            total = min(total + n_taken[m], extra_budget[m])

    In parallel: where A is the running sum without a cap, total is A + min(0, the lowest extra_budget - A up
    to there).
    """
    if n_taken.shape[1] == 1:
        return torch.minimum(n_taken, extra_budget - spent)
    uncapped = spent + n_taken.cumsum(-1)
    total = uncapped + (extra_budget - uncapped).clamp(max=0).cummin(-1).values
    return total.diff(dim=-1, prepend=spent)


class ExpertCache:
    """What online SeqTopK remembers of one layer's past: the candidates' scores and the extra budget.

    Feeding a sequence in any chunks gives the mask of `online_seqtopk` on the whole of it. A step with one
    token never scans the past. It looks its c candidates up in the buffer `sorted`, and compares them with
    each of the buffer `recent`: the candidates of up to `RECENT` newest tokens, which are merged into
    `sorted` when there is no room for more. The cache holds B * (max_tokens + RECENT) * c float32 scores; all
    scores, as the paper keeps, would be B * max_tokens * E.

    `make_room` counts tokens on the host, and so does `route` for more than `RECENT` of them. With one token
    `route` has static shapes and writes in place, so that one graph serves all steps.

    Measured (bench.py cache, two CPU cores): with 1,024 past tokens a step is 21 (batch 1) to 84 times
    (batch 16) cheaper than ranking them anew; with 4,096 it costs 1.00 to 1.26 times as much as with 128.
    """

    RECENT = 64  # 16 and 32 are no faster at batch 1, and slower at batch 16

    def __init__(
        self,
        batch_size: int,
        max_tokens: int,
        k: int,
        n_expert: int,
        min_experts: int = 1,
        max_experts: int | None = None,
        strict: bool = True,
        device: torch.device | str | None = None,
    ):
        """Raises ValueError for impossible bounds (check_bounds) and for batch_size or max_tokens below 1."""
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        require(max_tokens >= 1, "max_tokens", max_tokens, "at least 1")
        self.max_tokens, self.min_experts, self.strict = max_tokens, min_experts, strict
        self.max_experts = check_bounds(n_expert, k, min_experts, max_experts)
        self.extra_per_token = k - min_experts
        c = self.max_experts - min_experts
        self.sorted = torch.empty(batch_size, max_tokens * c, device=device)  # ascending, -inf where empty
        self.room = min(self.RECENT, max_tokens)  # tokens whose candidates fit into `recent`
        self.recent = torch.empty(batch_size, self.room * c, device=device)  # the newest last, -inf in front
        self.extra_budget = torch.empty(batch_size, 1, dtype=torch.int64, device=device)  # of all tokens fed
        self.spent = torch.empty_like(self.extra_budget)  # of it, by all tokens fed
        self.better_own = torch.arange(c, device=device)  # the better candidates of a candidate's own token
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.sorted.fill_(-torch.inf)
        self.recent.fill_(-torch.inf)
        self.extra_budget.zero_()
        self.spent.zero_()
        self.n_sorted = self.n_recent = 0  # tokens in each buffer

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))

    def select(self, scores: Tensor, active: Tensor | None = None) -> Tensor:
        """Route the next t tokens of every sequence: `make_room`, then `route`, which say more."""
        self.make_room(scores.shape[1])
        return self.route(scores, active)

    def make_room(self, t: int) -> None:
        """Get ready for t more tokens. Raises ValueError when these make more than max_tokens in all."""
        seen = self.n_sorted + self.n_recent
        if seen + t > self.max_tokens:
            raise ValueError(
                f"Expert Cache is full: {seen} tokens seen and {t} new, but max_tokens is {self.max_tokens}"
            )
        if self.n_recent + t > self.room:
            self._merge(self.recent)
            self.recent.fill_(-torch.inf)
            self.n_sorted, self.n_recent = seen, 0
        if t <= self.room:
            self.n_recent += t

    def route(self, scores: Tensor, active: Tensor | None = None) -> Tensor:
        """Route the t tokens for which there is room now.

        scores (B, t, E); active (B, t) bool: False marks padding and finished rows, which get no expert, do
        not compete and do not spend -> mask (B, t, E).
        """
        values, expert_ids = rank_experts(scores.detach(), self.max_experts)
        candidates = values[..., self.min_experts :]  # (B, t, c)
        if active is not None:
            candidates = candidates.masked_fill(~active.unsqueeze(-1), -torch.inf)
        n_taken = self._spend(candidates, active) + self.min_experts
        self._remember(candidates)
        return take_best(scores, expert_ids, n_taken if active is None else n_taken * active)

    def _spend(self, candidates: Tensor, active: Tensor | None) -> Tensor:
        """How many of its candidates (B, t, c) each token takes, (B, t), counted against the extra budget."""
        t = candidates.shape[1]
        new_tokens = torch.arange(1, t + 1, device=candidates.device) if active is None else active.cumsum(-1)
        extra_budget = self.extra_budget + self.extra_per_token * new_tokens  # (B, t)
        n_taken = (self._count_one if t == 1 else self._count_many)(candidates, extra_budget)
        if self.strict:
            n_taken = cap_spending(n_taken, extra_budget, self.spent)
        self.extra_budget.copy_(extra_budget[:, -1:])
        self.spent += n_taken if t == 1 else n_taken.sum(-1, keepdim=True)
        return n_taken

    def _count_one(self, candidates: Tensor, extra_budget: Tensor) -> Tensor:
        """`count_above_threshold` for one token: candidates (B, 1, c), extra_budget (B, 1) -> (B, 1).

        A candidate is taken if fewer are better than the extra budget has pairs. Among equals the older one
        is better.
        """
        below = torch.searchsorted(self.sorted, candidates.squeeze(1).contiguous())  # (B, c)
        better_in_sorted = self.sorted.shape[1] - below
        better_recent = (self.recent.unsqueeze(1) >= candidates.mT).sum(-1)  # (B, c)
        better = better_in_sorted + better_recent + self.better_own
        return (better < extra_budget).sum(-1, keepdim=True)

    def _count_many(self, candidates: Tensor, extra_budget: Tensor) -> Tensor:
        empty = self.sorted.shape[1] - self.n_sorted * candidates.shape[-1]
        past = torch.cat([self.sorted[:, empty:], self.recent], dim=1)
        return count_above_threshold(candidates, past, extra_budget)

    def _remember(self, candidates: Tensor) -> None:
        _, t, c = candidates.shape
        new = candidates.flatten(1)
        if t <= self.room:
            self.recent.copy_(torch.cat([self.recent, new], dim=1)[:, t * c :])
        else:  # `make_room` has emptied the recent ones
            self._merge(new)
            self.n_sorted += t

    def _merge(self, candidates: Tensor) -> None:
        """Merge candidates (B, n) into the sorted ones, in place of the n lowest, which are empty."""
        new = candidates.sort(dim=-1).values
        place = torch.searchsorted(self.sorted, new) + torch.arange(new.shape[1], device=new.device)
        merged = new.new_empty(new.shape[0], self.sorted.shape[1] + new.shape[1])
        is_new = torch.zeros_like(merged, dtype=torch.bool).scatter_(1, place, True)
        merged = merged.masked_scatter_(~is_new, self.sorted).scatter_(1, place, new)
        self.sorted.copy_(merged[:, new.shape[1] :])


# -------------------- the table ---------------------------------------------------------------------------


class Router(NamedTuple):
    """A row of ROUTERS: the function, and what the model and a reader of its losses must know about it.

    A router that learns or adapts has a `state`: buffers of each layer, saved and resumed with the weights.
    Its select gets them if "state" is among its options; `loss` and `update` are optional:

        state(config) -> dict of tensors
        loss(routing, state, config) -> scalar, added to the training loss as the mean over layers
        update(state, routing, config) -> the next state, after each iteration's step of the optimiser

    `loss` sees one layer and one micro-batch; gradients flow through the routing's logits and scores.
    `update` sees all layers at once: its tensors, the state's too, have a leading dimension L, and the
    routing is that of all sequences of the iteration, (L, B, T, E) each.
    """

    select: Callable[..., Tensor]  # (scores, k, **options) -> mask
    causal: bool  # a token's row depends on its own past and present only
    exact: bool  # spends exactly B*T*k pairs, so every tensor behind it has a static shape
    decode: str  # the causal router that stands in when text is generated or a likelihood is reported
    options: tuple[str, ...] = ()  # settings that it takes besides k, and nobody else reads; or "state"
    cache: type[ExpertCache] | None = None  # what decoding must remember; takes the same options
    needs: dict[str, object] = {}  # settings that must have these values for it to work  # noqa: RUF012
    takes_bias: bool = True  # it selects by scores to which the loss-free bias is added
    # (config, tokens, fresh) -> the most pairs that so many tokens can spend, or None where no bound is worth
    # padding to; `fresh`: the tokens begin their sequences. An exact router needs no max_pairs.
    max_pairs: Callable[..., int | None] | None = None
    state: Callable[..., State] | None = None
    loss: Callable[..., Tensor] | None = None
    update: Callable[..., State] | None = None

    @property
    def bounded(self) -> bool:
        """Whether it keeps to a number of pairs that is known without looking at the data."""
        return self.exact or self.max_pairs is not None


def online_max_pairs(config, tokens: int, fresh: bool) -> int | None:
    """A strict budget binds from the start of a sequence; later a token may spend what earlier ones saved."""
    if fresh:
        return tokens * config.k if config.strict else None
    return tokens * check_bounds(config.n_expert, config.k, config.min_experts, config.max_experts)


BOUNDS = ("min_experts", "max_experts")

ROUTERS = {
    "topk": Router(topk, causal=True, exact=True, decode="topk"),
    "seqtopk": Router(seqtopk, causal=False, exact=True, decode="online_seqtopk", options=BOUNDS),
    "online_seqtopk": Router(
        online_seqtopk,
        causal=True,
        exact=False,
        decode="online_seqtopk",
        options=(*BOUNDS, "strict"),
        cache=ExpertCache,
        max_pairs=online_max_pairs,
    ),
}


# -------------------- SeqTopK with returns that diminish --------------------------------------------------


def rise_of_root(scores: Tensor) -> Tensor:
    """How much each expert adds to the square root of the sum of its token's scores, best first.

    What a further expert is worth falls with what its token has already. A budget spent on the largest rises
    makes the sum of all tokens' roots as large as it can be. From no paper: experiments/scores.py.

    scores (..., E), none below 0 -> (..., E), in the order of the scores.
    """
    ranked, expert_ids = scores.float().sort(dim=-1, descending=True, stable=True)
    root = ranked.double().cumsum(-1).sqrt()  # in float32 the order of the sums, a device's own, shows
    rise = ranked / (root + F.pad(root[..., :-1], (1, 0))).clamp(min=1e-20)  # root.diff() rounds more
    return torch.empty_like(ranked).scatter_(-1, expert_ids, rise.float())


def seqtopk_root(scores: Tensor, k: int, **options) -> Tensor:
    """seqtopk, and its options, by the rise of the root: scores none below 0. Shapes and errors as there."""
    return seqtopk(rise_of_root(scores), k, **options)


def online_seqtopk_root(scores: Tensor, k: int, **options) -> Tensor:
    """online_seqtopk, and its options, by the rise of the root: the causal form of seqtopk_root."""
    return online_seqtopk(rise_of_root(scores), k, **options)


class RootCache(ExpertCache):
    """What online_seqtopk_root remembers."""

    def route(self, scores: Tensor, active: Tensor | None = None) -> Tensor:
        return super().route(rise_of_root(scores), active)


ROUTERS["seqtopk_root"] = ROUTERS["seqtopk"]._replace(
    select=seqtopk_root, decode="online_seqtopk_root", takes_bias=False
)
ROUTERS["online_seqtopk_root"] = ROUTERS["online_seqtopk"]._replace(
    select=online_seqtopk_root, decode="online_seqtopk_root", cache=RootCache, takes_bias=False
)


# -------------------- other published routers -------------------------------------------------------------


def batchtopk(scores: Tensor, k: int, min_experts: int = 1, max_experts: int | None = None) -> Tensor:
    """SeqTopK with one budget of B*T*k pairs for the whole batch. Sees later tokens and other sequences.

    scores (B, T, E) -> mask (B, T, E). Raises ValueError for impossible bounds (check_bounds).
    """
    B, T, E = scores.shape
    return seqtopk(scores.reshape(1, B * T, E), k, min_experts, max_experts).view(B, T, E)


ROUTERS["batchtopk"] = Router(batchtopk, causal=False, exact=True, decode="online_seqtopk", options=BOUNDS)


def expert_choice(scores: Tensor, k: int) -> Tensor:
    """Every expert takes its T*k/E best tokens of each sequence (arXiv 2202.09368). Sees later tokens.

    In the paper a whole batch is one pool of tokens; here each sequence is, so that none sees another. Where
    E does not divide T*k, the remaining pairs go to the experts whose next token scores highest, so that a
    sequence always spends exactly T*k.

    scores (B, T, E) -> mask (B, T, E). Raises ValueError unless 1 <= k <= E.
    """
    B, T, E = scores.shape
    check_bounds(E, k)
    share, remainder = divmod(T * k, E)
    tokens = scores.argsort(dim=1, descending=True, stable=True)  # (B, T, E), best of each expert first
    capacity = torch.full((B, 1, E), share, device=scores.device)
    if remainder:
        next_score = scores.gather(1, tokens[:, share : share + 1])  # (B, 1, E)
        capacity += topk(next_score, remainder)
    taken = torch.arange(T, device=scores.device).view(1, T, 1) < capacity
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, tokens, taken)


ROUTERS["expert_choice"] = Router(expert_choice, causal=False, exact=True, decode="topk")


def top_p(scores: Tensor, k: int, mass: float = 0.4) -> Tensor:
    """Every token takes the fewest experts that have `mass` of its scores, at least one (arXiv 2403.07652).

    A token spends what its scores ask for; k has no say.

    scores (B, T, E), not negative -> mask (B, T, E). Raises ValueError unless 0 < mass <= 1.
    """
    require(0 < mass <= 1, "mass", mass, "above 0 and at most 1")
    values, expert_ids = rank_experts(scores, scores.shape[-1])
    total = values.double().cumsum(-1)  # in float32 the sums of equal scores would differ between devices
    before = F.pad(total, (1, 0))[..., :-1]  # the sum of all better experts
    n_taken = (before < mass * total[..., -1:]).sum(-1).clamp(min=1)
    return take_best(scores, expert_ids, n_taken)


ROUTERS["top_p"] = Router(
    top_p, causal=True, exact=False, decode="top_p", options=("mass",), takes_bias=False
)


def null_experts(scores: Tensor, k: int, n_null: int = 0) -> Tensor:
    """topk over E experts and n_null that do nothing and cost nothing (arXiv 2406.13233, 2601.15370).

    Every token takes its k * (E + n_null) / E best, of which k are real ones on average if the load is even.
    Each null expert has scores of its own, as in the first paper; in the second they are copies of one. The
    load-balance loss counts each as an expert, as in the second; the first gives all of them their mean load.

    scores (B, T, E + n_null), the null experts last -> mask of the same shape. Raises ValueError for an
    impossible k or n_null (check_bounds, check_slots).
    """
    n_expert = scores.shape[-1] - n_null
    check_bounds(n_expert, k)
    return topk(scores, check_slots(n_expert, k, n_null))


ROUTERS["null_experts"] = Router(
    null_experts,
    causal=True,
    exact=False,
    decode="null_experts",
    options=("n_null",),
    needs={"norm_topk": True},
)


def expert_threshold(scores: Tensor, k: int, state: State) -> Tensor:
    """Every expert takes the tokens that score above its cutoff (arXiv 2603.11535).

    `update_cutoff` keeps the cutoff where an expert takes a share k / E of all tokens. Before the first
    update it is 1, above all sigmoids, so that no token gets an expert. The paper also limits, in training,
    how many tokens an expert takes; nothing does here.

    scores (B, T, E) sigmoids -> mask (B, T, E).
    """
    return scores > state["cutoff"]


def cutoff_state(config) -> State:
    zero = torch.zeros((), dtype=torch.int64)
    return {"cutoff": torch.ones(config.n_expert), "k": zero, "updates": zero.clone()}


def update_cutoff(state: State, routing: Routing, config) -> State:
    """A moving average of the k-th largest score of each expert (arXiv 2603.11535, algorithm 1, of logits).

    The k-th largest is the lowest score that an expert takes when it takes its S*k/E best of S = B*T tokens.
    The newest iteration weighs 1/1000 as in the paper, but 10/(n + 10) after n < 10,000 updates, because
    scores change fast at first: the first update leaves nothing old.
    """
    scores = routing.scores.flatten(1, 2).mT.contiguous()  # (L, E, S): a GPU is slow along another dimension
    _, E, S = scores.shape
    newest = scores.kthvalue(S + 1 - max(1, S * config.k // E)).values  # (L, E)
    updates = torch.where(state["k"] == config.k, state["updates"], 0)  # another k begins a new average
    weight = (10 / (updates + 10)).clamp(min=0.001).unsqueeze(-1)  # (L, 1)
    k = torch.full_like(state["k"], config.k)
    return {"cutoff": state["cutoff"].lerp(newest, weight), "k": k, "updates": updates + 1}


ROUTERS["expert_threshold"] = Router(
    expert_threshold,
    causal=True,
    exact=False,
    decode="expert_threshold",
    options=("state",),
    needs={"score_fn": "sigmoid", "norm_best": 0},
    takes_bias=False,
    state=cutoff_state,
    update=update_cutoff,
)


def remoe(scores: Tensor, k: int) -> Tensor:
    """Every token takes the experts whose ReLU is not 0 (ReMoE, arXiv 2412.14711).

    `l1_loss`, its weight moved by `update_l1_coef`, keeps them at k on average.

    scores (B, T, E) -> mask (B, T, E).
    """
    return scores > 0


L1_COEF = 1e-8  # the first and the lowest weight of l1_loss


def l1_state(config) -> State:
    return {"l1_coef": torch.tensor(L1_COEF)}


def l1_loss(routing: Routing, state: State, config) -> Tensor:
    """The mean over tokens of the sum of scores, each times its expert's load, weighed by l1_coef.

    A load of S*k/E of the S = B*T tokens counts as 1 (ReMoE, arXiv 2412.14711, eq. 10 and 11). Its gradient
    flows through the scores only.
    """
    load = routing.mask.float().mean((0, 1)) * (config.n_expert / config.k)  # (E,)
    return state["l1_coef"] * (load * routing.scores.mean((0, 1))).sum()


def update_l1_coef(state: State, routing: Routing, config) -> State:
    """1.2 times the weight if all layers together spent more than k experts per token, a 1.2th of it if fewer
    (arXiv 2412.14711, eq. 7 and 8), but never below L1_COEF, from where it would not come back."""
    budget = routing.mask[..., 0].numel() * config.k
    coef = state["l1_coef"] * 1.2 ** torch.sign(routing.mask.sum() - budget)
    return {"l1_coef": coef.clamp(min=L1_COEF)}


ROUTERS["remoe"] = Router(
    remoe,
    causal=True,
    exact=False,
    decode="remoe",
    needs={"score_fn": "relu", "norm_best": 0},
    takes_bias=False,
    state=l1_state,
    loss=l1_loss,
    update=update_l1_coef,
)

BOUNDED = [name for name, row in ROUTERS.items() if row.bounded]  # names; a user's own is not among them


# -------------------- losses and a bias that balance the load ---------------------------------------------


def load_balance_loss(scores: Tensor, mask: Tensor) -> Tensor:
    """E * sum_e f_e P_e: 1 when the load is uniform (Switch Transformer, arXiv 2101.03961, equations 4 to 6).

    f_e is the share of the routed pairs that went to expert e, P_e the mean share of e in a token's scores.
    scores (..., E), mask (..., E) -> scalar; its gradient flows through P only.
    """
    share = mask.flatten(0, -2).sum(0) / mask.sum().clamp(min=1)
    probability = shares(scores).flatten(0, -2).mean(0)
    return scores.shape[-1] * (share * probability).sum()


def entropy_loss(scores: Tensor) -> Tensor:
    """Mean entropy, in nats, of a token's scores: lower is fewer experts under top_p (arXiv 2403.07652).

    scores (..., E) -> scalar.
    """
    share = shares(scores)
    return -(share * share.clamp(min=1e-9).log()).sum(-1).mean()


def shares(scores: Tensor) -> Tensor:
    """The share of each expert in its token's scores: scores of any kind (..., E) -> (..., E)."""
    return scores / scores.sum(-1, keepdim=True).clamp(min=1e-9)  # sigmoids may all be 0


def z_loss(logits: Tensor) -> Tensor:
    """Mean of logsumexp(logits)^2, which keeps logits small (ST-MoE, arXiv 2202.08906, equation 5).

    logits (..., E) -> scalar.
    """
    return logits.logsumexp(-1).square().mean()


def loss_free_update(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """The next selection bias: up by `rate` for experts with less than the mean load, down for more.

    bias, load (..., E) -> (..., E). The bias is added to the scores for selection only, never to the weights
    (arXiv 2408.15664, algorithm 1).
    """
    return bias + rate * torch.sign(load.float().mean(-1, keepdim=True) - load)


# -------------------- checks ------------------------------------------------------------------------------


def check_row(name: str, settings: Iterable[str]) -> None:
    """Raise ValueError for a row of ROUTERS that cannot be right. settings: the names that a config has."""
    row, who = ROUTERS[name], f"router {name}"
    require(isinstance(row, Router), f"the row of {who}", type(row).__name__, "a router.Router")
    stand_in = ROUTERS.get(row.decode)
    require(
        stand_in is not None and stand_in.causal, f"decode of {who}", row.decode, "a causal router's name"
    )
    learned = "state" not in stand_in.options or stand_in.state is row.state
    require(learned, f"decode of {who}", row.decode, f"a router without a state, or with that of {name}")
    for option in row.options:
        require(
            option in (*settings, "state"), f"an option of {who}", option, "a field of MoEConfig, or state"
        )


DECODED = ExpertCache.RECENT + 16  # tokens that check_promises routes one by one: `recent` fills, and merges


def check_promises(name: str, scores: Tensor, k: int, **options) -> Tensor:
    """Raise ValueError unless the router of that name does with scores (B, T, E) what its row promises.

    -> its mask (B, T, E).
    """
    row, who = ROUTERS[name], f"router {name}"
    mask, shape = row.select(scores, k, **options), tuple(scores.shape)
    is_tensor = isinstance(mask, Tensor)
    right = is_tensor and mask.dtype == torch.bool and mask.shape == scores.shape
    found = f"{mask.dtype} {tuple(mask.shape)}" if is_tensor else type(mask).__name__
    require(right, f"what {who} returns", found, f"torch.bool {shape}, as the scores")
    same = torch.equal(mask, row.select(scores, k, **options))
    require(same, f"what {who} chooses", "another at a second call", "a function of the scores")
    B, T, _ = shape
    pairs = int(mask.sum())
    require(not row.exact or pairs == B * T * k, f"{who} is exact, its pairs", pairs, f"B*T*k = {B * T * k}")
    if row.causal:
        past = row.select(scores[:1, : T // 2], k, **options)
        blind = torch.equal(past, mask[:1, : T // 2])
        seen = "False: it sees tokens that come later, or other sequences"
        require(blind, f"causal of {who}", True, seen)
        some = scores[:, :DECODED]
        same = torch.equal(decoded(row, some, k, **options), mask[:, :DECODED])
        needed = "one with which decoding, token by token, chooses what `select` does"
        require(same, f"cache of {who}", row.cache and row.cache.__name__, needed)
    return mask


def decoded(row: Router, scores: Tensor, k: int, **options) -> Tensor:
    """As decoding routes, which sees a token at a time: scores (B, T, E) -> mask (B, T, E)."""
    B, T, E = scores.shape
    if row.cache is None:
        return row.select(scores.reshape(B * T, 1, E), k, **options).view(B, T, E)
    own = {name: value for name, value in options.items() if name != "state"}
    n_expert = E - options.get("n_null", 0)
    cache = row.cache(B, T, k, n_expert, device=scores.device, **own)
    return torch.cat([cache.select(token) for token in scores.split(1, dim=1)], dim=1)


def check_bounds(n_expert: int, k: int, min_experts: int = 0, max_experts: int | None = None) -> int:
    """Return max_experts, its default filled in.

    Raises ValueError unless 1 <= k <= n_expert and 0 <= min_experts <= k <= max_experts <= n_expert.
    """
    require(1 <= k <= n_expert, "k", k, f"from 1 to n_expert = {n_expert}")
    require(0 <= min_experts <= k, "min_experts", min_experts, f"from 0 to k = {k}")
    if max_experts is None:
        return min(k + 2, n_expert)
    allowed = f"from k = {k} to n_expert = {n_expert}, or None"
    require(k <= max_experts <= n_expert, "max_experts", max_experts, allowed)
    return max_experts


def check_slots(n_expert: int, k: int, n_null: int) -> int:
    """How many of n_expert + n_null experts a token takes, so that k of them are real if the load is even.

    Raises ValueError unless that is a whole number.
    """
    slots, remainder = divmod(k * (n_expert + n_null), n_expert)
    reason = "k * (n_expert + n_null) / n_expert, a token's slots, is a whole number"
    allowed = f"a multiple of {n_expert // math.gcd(n_expert, k)}, so that {reason}"
    require(not remainder, "n_null", n_null, allowed)
    return slots
