"""Is a rule without a bound set by hand as good as a fixed bound?

The paper leaves open how to choose max_experts. seqtopk_discount has no bound: it divides a token's scores by
their rank, so that each further expert must be better. It is compared, like other bounds, to SeqTopK with the
default of K + 2. To train or sample with it, name this file:

    python train.py config/tiny_topk.py experiments/discount.py --router=seqtopk_discount
"""

import torch
from torch import Tensor

from experiments.lab import Lab, compare, router_arms, run_question

from router import ROUTERS, ExpertCache, Router, online_seqtopk, seqtopk


def answer(lab: Lab) -> list[dict]:
    k = lab.config.k
    base, discounted = router_arms(lab, ["seqtopk", "seqtopk_discount"], k)
    bounds = [k + 1, k + 3, k + 4, lab.shared["n_expert"]]
    bounded = [base.vary(max_experts=bound) for bound in bounds]
    return compare(lab, [base, *bounded, discounted])


def discount_by_rank(scores: Tensor) -> Tensor:
    """A token's best score stays, its second best is halved, its third best divided by three, and so on.

    Scores below 0 are multiplied instead, so that a token's order stays. scores (..., E) -> the same shape.
    """
    values, expert_ids = scores.float().sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    discounted = torch.where(values > 0, values / ranks, values * ranks)
    return torch.empty_like(values).scatter_(-1, expert_ids, discounted)


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

    def route(self, scores: Tensor, active: Tensor | None = None) -> Tensor:
        return super().route(discount_by_rank(scores), active)


ROUTERS["seqtopk_discount"] = Router(
    seqtopk_discount, causal=False, exact=True, decode="online_seqtopk_discount"
)
ROUTERS["online_seqtopk_discount"] = Router(
    online_seqtopk_discount,
    causal=True,
    exact=False,
    decode="online_seqtopk_discount",
    options=("strict",),
    cache=DiscountCache,
)

if __name__ == "__main__":
    run_question(answer)
