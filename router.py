"""Routers: which experts process which tokens.

A router is a pure function `select(scores, k, ...) -> mask`: from the scores of a batch to the (token,
expert) pairs that will be computed. It has no parameters and no state. Decoding one token at a time needs the
scores of the past as well: `ExpertCache` keeps them.

    B  sequences in the batch         k   experts per token on average: the budget (K in the paper)
    T  tokens in a sequence           m0  min_experts: every token gets its m0 best experts
    E  experts                        u   max_experts: no token gets more (None: k + 2, at most E)

    scores (B, T, E) float32          mask (B, T, E) bool

Some routers spend k on average only if training steers them: by the bias that the model adds to the scores
(expert_threshold) or by a loss (remoe, null_experts).

The experts of rank m0+1 .. u of a token are its c = u - m0 *candidates*, best first.

One total order breaks all ties, so that a mask never depends on how a kernel sorts: within a token the lower
expert index comes first; among the candidates of a sequence the earlier token comes first.

Source: "Route Experts by Sequence, not by Token", arXiv 2511.06494, unless another is named.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def check_bounds(n_expert: int, k: int, min_experts: int = 0, max_experts: int | None = None) -> int:
    """Return max_experts, its default filled in.

    Raises ValueError unless 1 <= k <= n_expert and 0 <= min_experts <= k <= max_experts <= n_expert.
    """
    if not 1 <= k <= n_expert:
        raise ValueError(f"k is {k}, but must be from 1 to n_expert = {n_expert}")
    if not 0 <= min_experts <= k:
        raise ValueError(f"min_experts is {min_experts}, but must be from 0 to k = {k}")
    if max_experts is None:
        return min(k + 2, n_expert)
    if not k <= max_experts <= n_expert:
        allowed = f"from k = {k} to n_expert = {n_expert}, or None"
        raise ValueError(f"max_experts is {max_experts}, but must be {allowed}")
    return max_experts


def _rank_experts(scores: Tensor, u: int) -> tuple[Tensor, Tensor]:
    """The u best experts of each token, best first: their scores and their indices, (B, T, u) each."""
    ranked = scores.sort(dim=-1, descending=True, stable=True)
    return ranked.values[..., :u], ranked.indices[..., :u]


def _take_best(scores: Tensor, experts: Tensor, count: int | Tensor) -> Tensor:
    """Mask (B, T, E): each token takes the first `count`, an int or (B, T), of its ranked experts."""
    if isinstance(count, Tensor):
        count = count.unsqueeze(-1)
    taken = (torch.arange(experts.shape[-1], device=scores.device) < count).expand_as(experts)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, experts, taken)


def topk(scores: Tensor, k: int) -> Tensor:
    """Every token takes its k best experts (arXiv 1701.06538).

    scores (B, T, E) -> mask (B, T, E). Raises ValueError unless 1 <= k <= E.
    """
    check_bounds(scores.shape[-1], k)
    _, experts = _rank_experts(scores, k)
    return _take_best(scores, experts, k)


def seqtopk(scores: Tensor, k: int, min_experts: int = 1, max_experts: int | None = None) -> Tensor:
    """Every sequence spends exactly T*k pairs where its scores are highest (SeqTopK).

    Each token takes its min_experts best experts; the rest of the budget, T * (k - min_experts), goes to the
    highest of all candidates of the sequence. Sees the future.

    scores (B, T, E) -> mask (B, T, E). Raises ValueError for impossible bounds (check_bounds).
    """
    B, T, E = scores.shape
    u = check_bounds(E, k, min_experts, max_experts)
    values, experts = _rank_experts(scores, u)
    candidates = values[..., min_experts:].reshape(B, -1)  # (B, T*c)
    best = candidates.argsort(dim=-1, descending=True, stable=True)[:, : T * (k - min_experts)]
    taken = torch.zeros_like(candidates, dtype=torch.bool).scatter_(-1, best, True)
    # a token's candidates are ranked, so the ones it takes are its best ones: their number says which
    return _take_best(scores, experts, min_experts + taken.view(B, T, -1).sum(-1))


def batchtopk(scores: Tensor, k: int, min_experts: int = 1, max_experts: int | None = None) -> Tensor:
    """SeqTopK with one budget of B*T*k pairs for the whole batch. Sees the future and the other sequences.

    scores (B, T, E) -> mask (B, T, E). Raises ValueError for impossible bounds (check_bounds).
    """
    B, T, E = scores.shape
    return seqtopk(scores.reshape(1, B * T, E), k, min_experts, max_experts).view(B, T, E)


def expert_choice(scores: Tensor, k: int) -> Tensor:
    """Every expert takes its T*k/E best tokens of each sequence (arXiv 2202.09368). Sees the future.

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


def top_p(scores: Tensor, k: int, mass: float = 0.4) -> Tensor:
    """Every token takes the fewest experts that have `mass` of its scores, at least one (arXiv 2403.07652).

    A token spends what its scores ask for; k has no say.

    scores (B, T, E), not negative -> mask (B, T, E). Raises ValueError unless 0 < mass <= 1.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass is {mass}, but must be above 0 and at most 1")
    values, experts = _rank_experts(scores, scores.shape[-1])
    total = values.double().cumsum(-1)  # in float32 the sums of equal scores would differ between devices
    before = F.pad(total, (1, 0))[..., :-1]  # the sum of all better experts
    count = (before < mass * total[..., -1:]).sum(-1).clamp(min=1)
    return _take_best(scores, experts, count)


def check_slots(n_expert: int, k: int, n_null: int) -> int:
    """The slots of a token of which k get one of n_expert real experts, if all slots' experts get the same.

    Raises ValueError unless that is a whole number.
    """
    slots, remainder = divmod(k * (n_expert + n_null), n_expert)
    if remainder:
        step = n_expert // math.gcd(n_expert, k)
        reason = "k * (n_expert + n_null) / n_expert, a token's slots, is a whole number"
        raise ValueError(f"n_null is {n_null}, but must be a multiple of {step}, so that {reason}")
    return slots


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


def expert_threshold(scores: Tensor, k: int) -> Tensor:
    """Every expert takes the tokens that score above its cutoff (arXiv 2603.11535).

    A router gets scores with the bias added, and here the bias is 1 - cutoff: `cutoff_update` keeps it where
    an expert takes a share k / E of all tokens. Before the first update it is 0 and no sigmoid is above 1, so
    that no token gets an expert; in a run that goes on under another router it stays that router's bias.
    Sigmoids are told apart while logits are well within -15 and 15. The paper also limits, in training, how
    many tokens an expert takes; nothing does here.

    scores (B, T, E), lifted by the bias -> mask (B, T, E).
    """
    return scores > 1


def remoe(scores: Tensor, k: int) -> Tensor:
    """Every token takes the experts whose ReLU is not 0 (ReMoE, arXiv 2412.14711).

    `l1_loss`, its weight moved by `l1_coef_update`, keeps them at k on average.

    scores (B, T, E) -> mask (B, T, E).
    """
    return scores > 0


def online_seqtopk(
    scores: Tensor,
    k: int,
    min_experts: int = 1,
    max_experts: int | None = None,
    strict: bool = True,
    prior: Tensor | None = None,
) -> Tensor:
    """The causal form of SeqTopK: token m competes with the tokens 1 .. m of its sequence only.

    Token m takes its min_experts best experts, and those of its candidates that are among the m * (k -
    min_experts) best of the first m tokens. So its row is the last row of `seqtopk(scores[:, :m])`.

    That rule alone overspends when scores grow along the sequence. `strict` caps the pairs spent by the
    tokens 1 .. m at m*k, for every m: a token for which too little is left keeps the best of its candidates.

    `prior` stands for n0 tokens before the first one, which compete but spend nothing of the strict budget:
    what scores are usual, until the sequence itself tells (see pseudo_candidates).

    scores (B, T, E); prior (n0*c,) -> mask (B, T, E). Raises ValueError for impossible bounds (check_bounds).
    """
    B, T, E = scores.shape
    u = check_bounds(E, k, min_experts, max_experts)
    values, experts = _rank_experts(scores, u)
    candidates = values[..., min_experts:]  # (B, T, c)
    past = candidates.new_empty(B, 0) if prior is None else prior.expand(B, -1)
    budget = torch.arange(1, T + 1, device=scores.device).expand(B, T) * (k - min_experts)
    prior_budget = past.shape[1] // max(1, u - min_experts) * (k - min_experts)
    count = _count_above_threshold(candidates, past, budget + prior_budget)
    if strict:
        count = _cap_spending(count, budget, torch.zeros_like(budget[:, :1]))
    return _take_best(scores, experts, min_experts + count)


def pseudo_candidates(
    scores: Tensor, k: int, n: int, min_experts: int = 1, max_experts: int | None = None
) -> Tensor:
    """Evenly spaced quantiles of the candidates of many tokens: a `prior` for online_seqtopk of n tokens.

    scores (B, T, E) -> (n*c,). Raises ValueError for impossible bounds (check_bounds).
    """
    u = check_bounds(scores.shape[-1], k, min_experts, max_experts)
    ranked = _rank_experts(scores, u)[0][..., min_experts:].flatten().sort().values
    size = n * (u - min_experts)
    middle = 2 * torch.arange(size, device=scores.device) + 1  # over 2 * size: integers, floats would round
    return ranked[middle * len(ranked) // max(1, 2 * size)]


def _count_above_threshold(candidates: Tensor, past: Tensor, budget: Tensor) -> Tensor:
    """How many candidates of each token are among the `budget` best up to and including that token.

    candidates (B, t, c); past (B, p), candidates of earlier tokens in any order; budget (B, t) -> (B, t).
    """
    B, t, c = candidates.shape
    p = past.shape[1]
    order = torch.cat([past, candidates.flatten(1)], dim=1).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(p + t * c, device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)  # (B, p + t*c), 0 is the best
    length = p + c * torch.arange(1, t + 1, device=order.device).expand(B, t)
    threshold = _prefix_order_statistic(rank, length, budget - 1)  # (B, t)
    above = rank[:, p:].view(B, t, c) <= threshold.unsqueeze(-1)
    return (above & (budget > 0).unsqueeze(-1)).sum(-1)


def _prefix_order_statistic(rank: Tensor, length: Tensor, nth: Tensor) -> Tensor:
    """The nth smallest (from 0) of rank[b, :length], for many prefixes at once, from a wavelet tree.

    rank (B, n): in each row a permutation of 0 .. n-1; length, nth (B, Q) -> (B, Q). About log2(n) rounds of
    cumsum, gather and scatter, whatever Q is.

    A node of the tree holds the ranks that agree in their high bits, in their old order. Nodes lie side by
    side, so a node starts at the smallest rank that it can hold, and each one before it is full. Every round
    splits all nodes by the next bit, and every query follows the half that its answer lies in.
    """
    rank = rank.clone()
    place = torch.arange(rank.shape[1], device=rank.device)
    start = torch.zeros_like(nth)  # of the query's node; the bits of the answer found so far
    for bit in reversed(range((rank.shape[1] - 1).bit_length())):
        half = 1 << bit
        goes_left = rank & half == 0
        lefts = F.pad(goes_left.cumsum(-1), (1, 0))  # (B, n+1): how many of the first i go left
        in_left = lefts.gather(-1, start + length) - start // 2  # half of every full node went left
        right = nth >= in_left
        nth = torch.where(right, nth - in_left, nth)
        length = torch.where(right, length - in_left, in_left)
        start = start + half * right
        node = place & -(2 * half)
        nth_left = lefts[:, :-1] - node // 2
        new_place = torch.where(goes_left, node + nth_left, place + half - nth_left)
        rank = torch.empty_like(rank).scatter_(-1, new_place, rank)
    return start


def _cap_spending(count: Tensor, budget: Tensor, spent: Tensor) -> Tensor:
    """Cut `count` so that the sum up to each token, on top of `spent`, stays within the budget there.

    count, budget (B, t), budget not falling along t; spent (B, 1), at most the budget before -> (B, t).

    The sum S_m = min(S_{m-1} + count_m, budget_m) in parallel: with A the uncapped sum, S = A + min(0, the
    lowest budget - A so far).
    """
    if count.shape[1] == 1:
        return torch.minimum(count, budget - spent)
    uncapped = spent + count.cumsum(-1)
    total = uncapped + (budget - uncapped).clamp(max=0).cummin(-1).values
    return total.diff(dim=-1, prepend=spent)


class ExpertCache:
    """What online SeqTopK remembers of one layer's past: the candidates' scores and the budget.

    Feeding a sequence in any chunks gives the mask of `online_seqtopk` on the whole of it. A step with one
    token never scans the past: it looks its c candidates up in a sorted buffer, and compares them with the
    `RECENT` newest tokens, which are merged into that buffer once in so many steps. Holds B * (max_tokens +
    RECENT) * c float32 scores, where keeping all scores, as the paper does, takes B * max_tokens * E.
    """

    RECENT = 64

    def __init__(
        self,
        batch_size: int,
        max_tokens: int,
        k: int,
        n_expert: int,
        min_experts: int = 1,
        max_experts: int | None = None,
        strict: bool = True,
        prior: Tensor | None = None,
        device: torch.device | str | None = None,
    ):
        """Raises ValueError for impossible bounds (check_bounds) and for batch_size or max_tokens below 1."""
        if batch_size < 1 or max_tokens < 1:
            sizes = f"batch_size is {batch_size} and max_tokens {max_tokens}"
            raise ValueError(f"{sizes}, but both must be at least 1")
        self.max_tokens, self.min_experts, self.strict = max_tokens, min_experts, strict
        self.max_experts = check_bounds(n_expert, k, min_experts, max_experts)
        self.per_token = k - min_experts  # what each token adds to the budget for candidates
        c = self.max_experts - min_experts
        self.prior = torch.empty(0, device=device) if prior is None else prior.sort().values
        self.n_prior = len(self.prior) // max(1, c)  # tokens
        room = (self.n_prior + max_tokens) * c
        self.sorted = torch.empty(batch_size, room, device=device)  # ascending, -inf where empty
        self.recent = torch.empty(batch_size, min(self.RECENT, max_tokens) * c, device=device)  # as they came
        self.budget = torch.empty(batch_size, 1, dtype=torch.int64, device=device)
        self.spent = torch.empty_like(self.budget)
        self.last_place = room + torch.arange(c, device=device)  # see _count_one
        self.reset()

    def reset(self) -> None:
        """Forget everything but the prior."""
        self.sorted.fill_(-torch.inf)
        self.sorted[:, self.sorted.shape[1] - len(self.prior) :] = self.prior
        self.recent.fill_(-torch.inf)
        self.budget.zero_()
        self.spent.zero_()
        self.n_sorted, self.n_recent = self.n_prior, 0  # tokens in each buffer

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))

    def select(self, scores: Tensor, active: Tensor | None = None) -> Tensor:
        """Route the next t tokens of every sequence.

        scores (B, t, E); active (B, t) bool: False marks padding and finished rows, which get no expert, do
        not compete and do not spend -> mask (B, t, E). Raises ValueError when more than max_tokens are fed in
        all.
        """
        t = scores.shape[1]
        seen = self.n_sorted + self.n_recent - self.n_prior
        if seen + t > self.max_tokens:
            raise ValueError(
                f"Expert Cache is full: {seen} tokens seen and {t} new, but max_tokens is {self.max_tokens}"
            )
        values, experts = _rank_experts(scores.detach(), self.max_experts)
        candidates = values[..., self.min_experts :]  # (B, t, c)
        if active is not None:
            budget = self.budget + self.per_token * active.cumsum(-1)
            candidates = candidates.masked_fill(~active.unsqueeze(-1), -torch.inf)
        elif t == 1:
            budget = self.budget + self.per_token
        else:
            budget = self.budget + self.per_token * torch.arange(1, t + 1, device=scores.device)
        count_above = self._count_one if t == 1 else self._count_many
        count = count_above(candidates, budget + self.n_prior * self.per_token)
        if self.strict:
            count = _cap_spending(count, budget, self.spent)
        self.budget.copy_(budget[:, -1:])
        self.spent += count if t == 1 else count.sum(-1, keepdim=True)
        self._remember(candidates)
        count = count + self.min_experts
        return _take_best(scores, experts, count if active is None else count * active)

    def _count_one(self, candidates: Tensor, budget: Tensor) -> Tensor:
        """`_count_above_threshold` for one token: candidates (B, 1, c), budget (B, 1) -> (B, 1).

        Better than a candidate are those above its place in the sorted buffer, the recent ones that are not
        below it, and the better ones of its own token.
        """
        place = torch.searchsorted(self.sorted, candidates.squeeze(1).contiguous())  # (B, c)
        recent = (self.recent.unsqueeze(1) >= candidates.mT).sum(-1)  # (B, c)
        return (self.last_place - place + recent < budget).sum(-1, keepdim=True)

    def _count_many(self, candidates: Tensor, budget: Tensor) -> Tensor:
        c = candidates.shape[-1]
        in_sorted = self.sorted[:, self.sorted.shape[1] - self.n_sorted * c :]
        past = torch.cat([in_sorted, self.recent[:, : self.n_recent * c]], dim=1)
        return _count_above_threshold(candidates, past, budget)

    def _remember(self, candidates: Tensor) -> None:
        """Add candidates (B, t, c) to the recent ones while there is room; else merge all into the sorted."""
        _, t, c = candidates.shape
        start, end = self.n_recent * c, (self.n_recent + t) * c
        if end <= self.recent.shape[1]:
            self.recent[:, start:end] = candidates.flatten(1)
            self.n_recent += t
            return
        new = torch.cat([self.recent, candidates.flatten(1)], dim=1).sort(dim=-1).values  # (B, n)
        place = torch.searchsorted(self.sorted, new) + torch.arange(new.shape[1], device=new.device)
        merged = new.new_empty(new.shape[0], self.sorted.shape[1] + new.shape[1])
        is_new = torch.zeros_like(merged, dtype=torch.bool).scatter_(1, place, True)
        merged = merged.masked_scatter_(~is_new, self.sorted).scatter_(1, place, new)
        self.sorted = merged[:, new.shape[1] :].clone()  # the n lowest are empty: every token has its room
        self.recent.fill_(-torch.inf)
        self.n_sorted, self.n_recent = self.n_sorted + self.n_recent + t, 0


def discount_by_rank(scores: Tensor) -> Tensor:
    """A token's best score stays, its second best is halved, its third best divided by three, and so on.

    Scores below 0 are multiplied instead, so that a token's order stays. scores (..., E) -> the same shape.
    """
    values, experts = scores.float().sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    discounted = torch.where(values > 0, values / ranks, values * ranks)
    return torch.empty_like(values).scatter_(-1, experts, discounted)


def seqtopk_discount(scores: Tensor, k: int) -> Tensor:
    """seqtopk without max_experts: the more experts a token has, the better the next one must be.

    scores (B, T, E) -> mask (B, T, E). Raises ValueError unless 1 <= k <= E.
    """
    return seqtopk(discount_by_rank(scores), k, max_experts=scores.shape[-1])


def online_seqtopk_discount(scores: Tensor, k: int, strict: bool = True) -> Tensor:
    """The causal form of seqtopk_discount.

    scores (B, T, E) -> mask (B, T, E). Raises ValueError unless 1 <= k <= E.
    """
    return online_seqtopk(discount_by_rank(scores), k, max_experts=scores.shape[-1], strict=strict)


class DiscountCache(ExpertCache):
    """What online_seqtopk_discount remembers: all scores but each token's best one."""

    def __init__(self, batch_size: int, max_tokens: int, k: int, n_expert: int, **options):
        """As ExpertCache, for options strict and device."""
        super().__init__(batch_size, max_tokens, k, n_expert, max_experts=n_expert, **options)

    def select(self, scores: Tensor, active: Tensor | None = None) -> Tensor:
        return super().select(discount_by_rank(scores), active)


def load_balance_loss(scores: Tensor, mask: Tensor) -> Tensor:
    """E * sum_e f_e P_e: 1 when the load is uniform (Switch Transformer, arXiv 2101.03961, equations 4 to 6).

    f_e is the share of the routed pairs that went to expert e, P_e the mean share of e in a token's scores.
    scores (..., E), mask (..., E) -> scalar; its gradient flows through P only.
    """
    share = mask.flatten(0, -2).sum(0) / mask.sum().clamp(min=1)
    probability = _shares(scores).flatten(0, -2).mean(0)
    return scores.shape[-1] * (share * probability).sum()


def _shares(scores: Tensor) -> Tensor:
    """The share of each expert in its token's scores: scores of any kind (..., E) -> (..., E)."""
    return scores / scores.sum(-1, keepdim=True).clamp(min=1e-9)  # sigmoids may all be 0


def entropy_loss(scores: Tensor) -> Tensor:
    """Mean entropy, in nats, of a token's scores: lower is fewer experts under top_p (arXiv 2403.07652).

    scores (..., E) -> scalar.
    """
    share = _shares(scores)
    return -(share * share.clamp(min=1e-9).log()).sum(-1).mean()


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


def kth_scores(scores: Tensor, k: int) -> Tensor:
    """The lowest score that each expert takes when it takes its S*k/E best of the S = B*T tokens.

    scores (B, T, E) -> (E,).
    """
    tokens = scores.flatten(0, 1)  # (S, E)
    S, E = tokens.shape
    return tokens.kthvalue(S + 1 - max(1, S * k // E), dim=0).values


def cutoff_update(bias: Tensor, kth: Tensor, step: int) -> Tensor:
    """The next bias of expert_threshold: 1 - a moving average of kth_scores (arXiv 2603.11535, algorithm 1,
    where it is of logits).

    step: updates before this one. The newest batch weighs 1/1000 as in the paper, but 10/(step + 10) in a
    run's first 10,000 steps, as scores change fast then: the first update leaves nothing old.
    bias, kth (..., E) -> (..., E).
    """
    return bias.lerp(1 - kth, max(0.001, 10 / (step + 10)))


L1_COEF = 1e-8  # the first and the lowest weight of l1_loss


def l1_loss(scores: Tensor, mask: Tensor, k: int) -> Tensor:
    """The sum of a token's scores, each times its expert's load (ReMoE, arXiv 2412.14711, eq. 10 and 11).

    A load of S*k/E of the S = B*T tokens counts as 1. Mean over tokens.
    scores, mask (B, T, E) -> scalar; its gradient flows through scores only.
    """
    load = mask.float().mean((0, 1)) * (scores.shape[-1] / k)
    return (load * scores.mean((0, 1))).sum()


def l1_coef_update(coef: Tensor, load: Tensor, k: int, tokens: int) -> Tensor:
    """The next weight of l1_loss: 1.2 times this one if more than k experts per token were spent, a 1.2th of
    it if fewer (arXiv 2412.14711, eq. 7 and 8), but never below L1_COEF, from where it would not come back.

    coef scalar; load (L, E) pairs that each expert got of `tokens` tokens -> scalar.
    """
    return (coef * 1.2 ** torch.sign(load.sum() - len(load) * tokens * k)).clamp(min=L1_COEF)


class Router(NamedTuple):
    """A row of ROUTERS: the function, and what the model and a reader of its losses must know about it."""

    select: Callable[..., Tensor]  # (scores, k, **options) -> mask
    causal: bool  # a token's row depends on its own past and present only
    exact: bool  # spends exactly B*T*k pairs, so every tensor behind it has a static shape
    decode: str  # the causal router that stands in when text is generated or a likelihood is reported
    options: tuple[str, ...] = ()  # the settings it takes besides k; "strict" means at most k pairs a token
    cache: type[ExpertCache] | None = None  # what decoding must remember; takes the same settings
    # settings that make it what it is, and their values; with bias_rate=0 it is given no bias of another run
    needs: tuple[tuple[str, object], ...] = ()
    cutoffs: bool = False  # training moves the bias by cutoff_update
    l1: bool = False  # training adds l1_loss

    @property
    def biased(self) -> bool:
        """Whether it is given the scores with the bias added."""
        return self.cutoffs or ("bias_rate", 0) not in self.needs


BOUNDS = ("min_experts", "max_experts")

ROUTERS = {
    "topk": Router(topk, causal=True, exact=True, decode="topk"),
    "batchtopk": Router(batchtopk, causal=False, exact=True, decode="online_seqtopk", options=BOUNDS),
    "seqtopk": Router(seqtopk, causal=False, exact=True, decode="online_seqtopk", options=BOUNDS),
    "online_seqtopk": Router(
        online_seqtopk,
        causal=True,
        exact=False,
        decode="online_seqtopk",
        options=(*BOUNDS, "strict", "prior"),
        cache=ExpertCache,
    ),
    "seqtopk_discount": Router(seqtopk_discount, causal=False, exact=True, decode="online_seqtopk_discount"),
    "online_seqtopk_discount": Router(
        online_seqtopk_discount,
        causal=True,
        exact=False,
        decode="online_seqtopk_discount",
        options=("strict",),
        cache=DiscountCache,
    ),
    "expert_choice": Router(expert_choice, causal=False, exact=True, decode="topk"),
    "top_p": Router(
        top_p, causal=True, exact=False, decode="top_p", options=("mass",), needs=(("bias_rate", 0),)
    ),
    "expert_threshold": Router(
        expert_threshold,
        causal=True,
        exact=False,
        decode="expert_threshold",
        needs=(("score_fn", "sigmoid"), ("bias_rate", 0)),
        cutoffs=True,
    ),
    "remoe": Router(
        remoe,
        causal=True,
        exact=False,
        decode="remoe",
        needs=(("score_fn", "relu"), ("bias_rate", 0)),
        l1=True,
    ),
    "null_experts": Router(
        null_experts,
        causal=True,
        exact=False,
        decode="null_experts",
        options=("n_null",),
        needs=(("norm_topk", True),),
    ),
}
