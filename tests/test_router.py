"""Properties of the routers, over random shapes, bounds and kinds of scores."""

import math
import random
import re
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import router as router_module
from model import MoEConfig, MoEGPT
from router import (
    L1_COEF,
    ROUTERS,
    DiscountCache,
    ExpertCache,
    batchtopk,
    cutoff_update,
    discount_by_rank,
    entropy_loss,
    expert_choice,
    expert_threshold,
    kth_scores,
    l1_coef_update,
    l1_loss,
    load_balance_loss,
    loss_free_update,
    null_experts,
    online_seqtopk,
    online_seqtopk_discount,
    pseudo_candidates,
    remoe,
    seqtopk,
    seqtopk_discount,
    top_p,
    topk,
    z_loss,
)
from tests.reference import (
    ref_batchtopk,
    ref_discount,
    ref_expert_choice,
    ref_expert_threshold,
    ref_null_experts,
    ref_online_seqtopk,
    ref_remoe,
    ref_seqtopk,
    ref_top_p,
    ref_topk,
)

# ---------------------------------------------------------------------------------------------------
# Cases: what is routed

KINDS = {  # x (B, T, E) standard normal, g its generator -> scores
    "softmax": lambda x, g: x.softmax(-1),
    "sigmoid": lambda x, g: x.sigmoid(),
    "logits": lambda x, g: x - 1,  # mostly negative
    "two_levels": lambda x, g: (x > 0.8).float(),
    "four_levels": lambda x, g: (3 * x.sigmoid()).round() / 3,
    "all_equal": lambda x, g: torch.full_like(x, 0.5),
    "signed_zeros": lambda x, g: torch.where(x > 0, 0.0, -0.0),  # -0.0 == 0.0: all equal
    "growing": lambda x, g: (x + ramp(x, 8)).sigmoid(),
    "growing_steps": lambda x, g: (x / 4 + ramp(x, 8)).round(),
    "shrinking": lambda x, g: (x - ramp(x, 8)).sigmoid(),
    "swinging": lambda x, g: (x / 2 + 3 * (ramp(x, 20)).sin()).sigmoid(),
    "one_wins_all": lambda x, g: (x + 30 * one_expert(x, g)).softmax(-1),
    "one_never_wins": lambda x, g: (x - 200 * one_expert(x, g)).softmax(-1),  # its score is exactly 0
}


def ramp(x: Tensor, height: float) -> Tensor:
    return torch.linspace(0, height, x.shape[1])[None, :, None]


def one_expert(x: Tensor, g: torch.Generator) -> Tensor:
    return torch.eye(x.shape[-1])[torch.randint(x.shape[-1], (1,), generator=g)]


def make_scores(kind: str, B: int, T: int, E: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return KINDS[kind](torch.randn(B, T, E, generator=g), g)


@dataclass(frozen=True)
class Case:
    scores: Tensor  # (B, T, E)
    k: int
    min_experts: int
    max_experts: int | None

    @property
    def bounds(self) -> dict:
        return {"min_experts": self.min_experts, "max_experts": self.max_experts}

    @property
    def highest(self) -> int:
        return min(self.k + 2, self.scores.shape[-1]) if self.max_experts is None else self.max_experts

    @property
    def candidates(self) -> int:
        return self.highest - self.min_experts


def draw(kind: str, seed: int, budget: int = 40_000) -> Case:
    """A random case of at most `budget` scores; the ends of every range come often."""
    rng = random.Random(f"{kind} {seed}")
    E = rng.choice([2, 3, 4, 8, 128, rng.randint(2, 128)])
    k = rng.choice([1, 2, max(1, E // 4), E, rng.randint(1, E), rng.randint(1, E)])
    k = min(k, E)
    B = rng.randint(1, 4)
    T = min(rng.choice([1, 2, 17, 64, 300, rng.randint(1, 300)]), budget // (B * E))
    min_experts = rng.choice([0, 1, k, rng.randint(0, k)])
    max_experts = rng.choice([None, k, E, rng.randint(k, E)])
    return Case(make_scores(kind, B, T, E, seed), k, min_experts, max_experts)


SEEDS = range(6)
each_case = pytest.mark.parametrize("kind, seed", [(kind, seed) for kind in KINDS for seed in SEEDS])
each_third_case = pytest.mark.parametrize(
    "kind, seed", [(kind, seed) for kind in KINDS for seed in SEEDS[1::3]]
)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_strict = pytest.mark.parametrize("strict", [True, False], ids=["strict", "unstrict"])
each_router = pytest.mark.parametrize("name", ROUTERS)


def lifted(name: str, scores: Tensor) -> Tensor:
    """The scores, moved to both sides of the line that the router draws, if it draws one."""
    return scores + {"expert_threshold": 0.5, "remoe": -0.5}.get(name, 0.0)


def options(name: str, n_null: int) -> dict:
    return {"n_null": n_null} if name == "null_experts" else {}


ONLINE = {"strict": True}, {"strict": False}


def pairs(mask: Tensor) -> Tensor:
    """Experts of each token: (B, T, E) -> (B, T)."""
    return mask.sum(-1)


def same(got: Tensor, want: Tensor) -> bool:
    """Bool, of equal shape, equal everywhere."""
    return got.dtype == want.dtype == torch.bool and torch.equal(got, want)


def test_the_cases_reach_every_extreme():
    """The random cases include both ends of every range that they are drawn from."""
    cases = [draw(kind, seed) for kind in KINDS for seed in SEEDS]
    shapes = [c.scores.shape for c in cases]
    assert {1, 2, 3, 4} == {B for B, _, _ in shapes}
    assert {1, 300} <= {T for _, T, _ in shapes}
    assert {2, 128} <= {E for _, _, E in shapes}
    assert any(c.k == 1 for c in cases) and any(c.k == c.scores.shape[-1] for c in cases)
    assert {0, 1} <= {c.min_experts for c in cases} and any(c.min_experts == c.k > 1 for c in cases)
    assert any(c.min_experts < c.k < c.highest for c in cases)
    assert any(1 < c.min_experts < c.k for c in cases)
    assert any(c.max_experts is None for c in cases)
    assert any(c.max_experts == c.k > 1 for c in cases)
    assert any(c.max_experts == c.scores.shape[-1] > c.k for c in cases)


# ---------------------------------------------------------------------------------------------------
# Each router is its definition


@each_case
def test_topk_is_its_definition(kind, seed):
    """topk gives every token its k best experts."""
    c = draw(kind, seed)
    assert same(topk(c.scores, c.k), ref_topk(c.scores, c.k))


@each_case
def test_seqtopk_is_its_definition(kind, seed):
    """seqtopk equals the sorted reference, ties included."""
    c = draw(kind, seed)
    assert same(seqtopk(c.scores, c.k, **c.bounds), ref_seqtopk(c.scores, c.k, **c.bounds))


@each_case
def test_batchtopk_is_its_definition(kind, seed):
    """batchtopk equals the sorted reference, ties included."""
    c = draw(kind, seed)
    assert same(batchtopk(c.scores, c.k, **c.bounds), ref_batchtopk(c.scores, c.k, **c.bounds))


@each_strict
@each_case
def test_online_seqtopk_is_its_definition(kind, seed, strict):
    """online_seqtopk equals a loop over the tokens that sorts the past anew for each, ties included."""
    c = draw(kind, seed)
    got = online_seqtopk(c.scores, c.k, **c.bounds, strict=strict)
    assert same(got, ref_online_seqtopk(c.scores, c.k, **c.bounds, strict=strict))


def usual(kind: str, size: int, seed: int = 0) -> Tensor:
    """Scores (size,) like those of the case, in no order."""
    return make_scores(kind, 1, max(1, size), 2, seed + 50).flatten()[:size]


PRIORS = (1, 2, 5, 20, 50, 100)  # tokens, one for each seed


@each_strict
@each_case
def test_online_seqtopk_with_a_prior_is_its_definition(kind, seed, strict):
    """The prior's candidates compete as earlier tokens' would, and win ties; only real tokens spend."""
    c = draw(kind, seed, budget=8_000)
    n = min(PRIORS[seed], 1000 // max(1, c.candidates))
    prior = usual(kind, n * c.candidates, seed)
    got = online_seqtopk(c.scores, c.k, **c.bounds, strict=strict, prior=prior)
    assert same(got, ref_online_seqtopk(c.scores, c.k, **c.bounds, strict=strict, prior=(n, prior)))
    assert pairs(got).max() <= c.highest and pairs(got).min() >= c.min_experts
    used = pairs(got).cumsum(-1)
    assert not strict or (used <= c.k * torch.arange(1, used.shape[-1] + 1)).all()
    assert same(online_seqtopk(c.scores, c.k, **c.bounds, strict=strict, prior=prior.flip(0)), got)


@each_case
def test_expert_choice_is_its_definition(kind, seed):
    """expert_choice gives each expert its share of best tokens, and the spare pairs to the best next ones."""
    c = draw(kind, seed)
    assert same(expert_choice(c.scores, c.k), ref_expert_choice(c.scores, c.k))


MASSES = (0.1, 0.25, 0.4, 0.5, 0.75, 1.0)


@each_case
def test_top_p_is_its_definition(kind, seed):
    """top_p adds experts, best first, until they have their share of the token's scores; ties included."""
    scores = draw(kind, seed).scores.clamp(min=0)
    mass = MASSES[seed]
    assert same(top_p(scores, 1, mass), ref_top_p(scores, 1, mass))


@each_case
def test_top_p_takes_as_few_as_can_be(kind, seed):
    """The experts of a token hold the mass, and would not without the worst of them, unless it is alone."""
    scores, mass = draw(kind, seed).scores.clamp(min=0), MASSES[seed]
    mask = top_p(scores, 1, mass)
    held, total = (scores * mask).double().sum(-1), scores.double().sum(-1)
    worst = torch.where(mask, scores, torch.inf).amin(-1).double()
    assert (held >= mass * total - 1e-9).all() and pairs(mask).min() >= 1
    assert ((held - worst < mass * total + 1e-9) | (pairs(mask) == 1)).all()


@each_case
def test_null_experts_is_its_definition(kind, seed):
    """null_experts is topk over all slots, as many as leave k real experts if all get the same."""
    scores = make_scores(kind, 2, 30, 12, seed)
    for n_null, k in ((6, 1), (8, 2), (9, 1), (4, 6), (0, 3)):
        mask = null_experts(scores, k, n_null=n_null)
        assert same(mask, ref_null_experts(scores, k, n_null))
        assert (pairs(mask) * (12 - n_null) == 12 * k).all()


@pytest.mark.parametrize("n_null", [1, 3, 6])
def test_slots_must_be_whole(n_null):
    """Null experts that do not make a whole number of slots are refused, and the next that do are named."""
    with pytest.raises(ValueError, match=rf"n_null is {n_null}.*multiple of 4\b") as error:
        null_experts(make_scores("softmax", 2, 9, 8 + n_null), 2, n_null)
    assert_one_line(error)


@each_case
def test_expert_threshold_is_its_definition(kind, seed):
    """Scores lifted by 1 - cutoff are taken just when the scores are above the cutoff."""
    scores = draw(kind, seed).scores.sigmoid()
    cutoff = torch.rand(scores.shape[-1], generator=torch.Generator().manual_seed(seed))
    clear = (scores - cutoff).abs() > 1e-6  # the sum is rounded
    got, want = expert_threshold(scores + (1 - cutoff), 1), ref_expert_threshold(scores, cutoff)
    assert same(got[clear], want[clear])
    assert not expert_threshold(scores, 1).any()  # no cutoff yet
    assert not expert_threshold(torch.tensor([[[0.25, 0.5]]]) + torch.tensor([0.75, 0.5]), 1).any()  # at it


@each_case
def test_remoe_is_its_definition(kind, seed):
    """remoe takes what is above 0."""
    scores = draw(kind, seed).scores.relu()
    assert same(remoe(scores, 1), ref_remoe(scores, 1))


@pytest.mark.parametrize("E, k", [(2, 1), (8, 2), (8, 6), (9, 1), (64, 8)])
def test_the_default_bounds_are_one_and_k_plus_two(E, k):
    """Without bounds, at least 1 and at most min(k + 2, E) experts per token; online routing is strict."""
    scores = make_scores("growing", 2, 50, E)
    explicit = {"min_experts": 1, "max_experts": min(k + 2, E)}
    for router in (seqtopk, batchtopk, online_seqtopk):
        assert same(router(scores, k), router(scores, k, **explicit))
    assert same(online_seqtopk(scores, k), online_seqtopk(scores, k, strict=True))
    assert same(seqtopk(scores, k), ref_seqtopk(scores, k))
    assert same(ExpertCache(2, 50, k, E).select(scores), online_seqtopk(scores, k, **explicit, strict=True))


# ---------------------------------------------------------------------------------------------------
# A prior


@each_case
def test_a_prior_of_no_tokens_is_none(kind, seed):
    """An empty prior leaves online_seqtopk and its cache as they are without one."""
    c = draw(kind, seed, budget=8_000)
    B, T, E = c.scores.shape
    for online in ONLINE:
        want = online_seqtopk(c.scores, c.k, **c.bounds, **online)
        for empty in torch.empty(0), pseudo_candidates(c.scores, c.k, 0, **c.bounds):
            assert same(online_seqtopk(c.scores, c.k, **c.bounds, **online, prior=empty), want)
            assert same(ExpertCache(B, T, c.k, E, **c.bounds, **online, prior=empty).select(c.scores), want)


@each_case
def test_a_prior_made_of_earlier_tokens_is_those_tokens(kind, seed):
    """As many pseudo-candidates as tokens are those of the tokens: the sequence goes on after them."""
    c = draw(kind, seed, budget=8_000)
    n = c.scores.shape[1] // 2
    for sequence in c.scores.split(1):
        earlier, later = sequence[:, :n], sequence[:, n:]
        prior = pseudo_candidates(earlier, c.k, n, **c.bounds)
        values = earlier.sort(dim=-1, descending=True).values[..., c.min_experts : c.highest]
        assert torch.equal(prior, values.flatten().sort().values)
        whole = online_seqtopk(sequence, c.k, **c.bounds, strict=False)
        assert same(online_seqtopk(later, c.k, **c.bounds, strict=False, prior=prior), whole[:, n:])


def test_pseudo_candidates_by_hand():
    """Of the candidates 0 to 15: the middles of as many equal shares as the prior has candidates."""
    scores = torch.tensor([[[99.0, 2 * t, -5.0, 2 * t + 1] for t in torch.randperm(8).tolist()]])
    bounds = {"min_experts": 1, "max_experts": 3}
    for shape in (1, 8, 4), (2, 4, 4), (8, 1, 4):  # which sequence a token is of does not matter
        by_n = {
            n: pseudo_candidates(scores.view(shape), 2, n, **bounds).tolist() for n in (0, 1, 2, 4, 8, 16)
        }
        assert by_n[0] == [] and by_n[1] == [4, 12] and by_n[2] == [2, 6, 10, 14]
        assert by_n[4] == [1, 3, 5, 7, 9, 11, 13, 15]
        assert by_n[8] == list(range(16)) and by_n[16] == [n // 2 for n in range(32)]
    assert pseudo_candidates(scores, 2, 1).shape == (3,)  # by default of ranks 2 to k + 2
    assert pseudo_candidates(scores, 2, 3, min_experts=2, max_experts=2).shape == (0,)
    many = pseudo_candidates(scores, 2, 2**22)  # more than float32 can count
    assert many.shape == (3 * 2**22,) and (many.diff() >= 0).all() and many[0] < many[-1]
    with pytest.raises(ValueError, match="max_experts is 5"):
        pseudo_candidates(scores, 2, 1, max_experts=5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "growing", "shrinking", "swinging"])
@pytest.mark.parametrize("k, min_experts, max_experts", [(2, 1, None), (3, 0, 8), (2, 2, 5)])
def test_a_large_prior_is_a_fixed_threshold(kind, k, min_experts, max_experts):
    """After very many usual tokens a score is taken wherever it occurs, or nowhere at all."""
    T, n = 40, 20_000
    how = {"min_experts": min_experts, "max_experts": max_experts}
    scores = make_scores(kind, 2, T, 8)
    prior = pseudo_candidates(make_scores("sigmoid", 1, 3000, 8, 1), k, n, **how)
    mask = online_seqtopk(scores, k, **how, strict=False, prior=prior)
    c, best_first = len(prior) // n, prior.flip(0)
    low = best_first[min((n + T) * (k - min_experts), n * c - 1)]  # the real tokens can move it from the
    high = best_first[max(n * (k - min_experts) - T * c, 0)]  # n*(k - m0)-th so far at the most
    assert high - low < 0.01
    ranked = scores.sort(dim=-1, descending=True)
    taken = mask.gather(-1, ranked.indices)
    eligible = torch.arange(8) < min_experts + c
    sure = (torch.arange(8) < min_experts) | (eligible & (ranked.values > high))
    if min_experts == k:
        sure = torch.arange(8).expand_as(taken) < k
        low = high = torch.inf
    never = ~sure & (~eligible | (ranked.values < low))
    assert taken[sure].all() and not taken[never].any() and (sure | never).float().mean() > 0.97


# ---------------------------------------------------------------------------------------------------
# Scores discounted by rank


def test_discount_by_rank_by_hand():
    """The nth best is divided by n, below 0 multiplied; of equals the lower expert is the better one."""
    scores = torch.tensor([[0.125, 0.5, 0.375], [-2.0, -0.5, -1.0], [0.5, 0.5, 0.5], [-1.0, -1.0, 0.25]])
    want = [[0.125 / 3, 0.5, 0.1875], [-6, -0.5, -2], [0.5, 0.25, 0.5 / 3], [-2, -3, 0.25]]
    torch.testing.assert_close(discount_by_rank(scores), torch.tensor(want))
    assert torch.equal(discount_by_rank(torch.tensor([0.0, -0.0, 0.0])), torch.zeros(3))


@each_case
def test_discount_by_rank_is_its_definition_and_keeps_the_order(kind, seed):
    """The discounted scores are the reference's, and rank the experts of a token as before, ties included."""
    scores = draw(kind, seed, budget=8_000).scores
    got = discount_by_rank(scores)
    assert torch.equal(got, ref_discount(scores))
    order = scores.argsort(dim=-1, descending=True, stable=True)
    assert torch.equal(got.argsort(dim=-1, descending=True, stable=True), order)
    assert torch.equal(got.amax(-1), scores.amax(-1).where(scores.amax(-1) > 0, got.amax(-1)))


@each_case
def test_seqtopk_discount_is_its_definition(kind, seed):
    """seqtopk of the discounted scores without a bound from above; it spends T*k in every sequence."""
    c = draw(kind, seed, budget=8_000)
    mask = seqtopk_discount(c.scores, c.k)
    assert same(mask, ref_seqtopk(ref_discount(c.scores), c.k, 1, c.scores.shape[-1]))
    assert (pairs(mask).sum(-1) == c.scores.shape[1] * c.k).all() and pairs(mask).min() >= 1


@each_strict
@each_case
def test_online_seqtopk_discount_is_its_definition(kind, seed, strict):
    """online_seqtopk of the discounted scores without a bound from above."""
    c = draw(kind, seed, budget=8_000)
    want = ref_online_seqtopk(ref_discount(c.scores), c.k, 1, c.scores.shape[-1], strict)
    assert same(online_seqtopk_discount(c.scores, c.k, strict), want)


@each_third_case
def test_prefix_identity_of_the_discounted(kind, seed):
    """Row m of the unstrict online rule is the last row of seqtopk_discount over the first m tokens."""
    c = draw(kind, seed, budget=8_000)
    online = online_seqtopk_discount(c.scores, c.k, strict=False)
    for m in range(1, c.scores.shape[1] + 1):
        assert same(online[:, m - 1], seqtopk_discount(c.scores[:, :m], c.k)[:, -1])


def test_a_discount_makes_many_experts_dear():
    """Two tokens, k=2: with scores as they are all is spent on the first; discounted, both get two."""
    scores = torch.tensor([[[0.9, 0.8, 0.8], [0.6, 0.5, 0.1]]])
    assert pairs(seqtopk(scores, 2, max_experts=3)).tolist() == [[3, 1]]
    assert pairs(seqtopk_discount(scores, 2)).tolist() == [[3, 1]]  # 0.8 / 3 is still above 0.5 / 2
    scores[0, 0, 2] = 0.7
    assert pairs(seqtopk(scores, 2, max_experts=3)).tolist() == [[3, 1]]
    assert pairs(seqtopk_discount(scores, 2)).tolist() == [[2, 2]]


# ---------------------------------------------------------------------------------------------------
# Budgets and bounds


@each_case
def test_exact_budgets(kind, seed):
    """seqtopk and expert_choice spend T*k pairs in every sequence, batchtopk B*T*k in the batch."""
    c = draw(kind, seed)
    B, T, _ = c.scores.shape
    assert pairs(seqtopk(c.scores, c.k, **c.bounds)).sum(-1).tolist() == [T * c.k] * B
    assert pairs(expert_choice(c.scores, c.k)).sum(-1).tolist() == [T * c.k] * B
    assert pairs(batchtopk(c.scores, c.k, **c.bounds)).sum() == B * T * c.k


@each_case
def test_every_token_is_within_its_bounds(kind, seed):
    """Every token gets at least min_experts and at most max_experts experts, and they are its best ones."""
    c = draw(kind, seed)
    masks = [router(c.scores, c.k, **c.bounds) for router in (seqtopk, batchtopk)]
    masks += [online_seqtopk(c.scores, c.k, **c.bounds, **online) for online in ONLINE]
    best_first = c.scores.argsort(dim=-1, descending=True, stable=True)
    for mask in masks:
        assert pairs(mask).min() >= c.min_experts
        assert pairs(mask).max() <= c.highest
        by_rank = mask.gather(-1, best_first).int()
        assert (by_rank.diff(dim=-1) <= 0).all()


@each_case
def test_prefix_identity(kind, seed):
    """Row m of the unstrict online rule is the last row of seqtopk over the first m tokens."""
    c = draw(kind, seed)
    online = online_seqtopk(c.scores, c.k, **c.bounds, strict=False)
    for m in range(1, c.scores.shape[1] + 1):
        assert same(online[:, m - 1], seqtopk(c.scores[:, :m], c.k, **c.bounds)[:, -1])


@each_case
def test_strict_never_overspends(kind, seed):
    """Under the strict budget the pairs used by the first m tokens are at most m*k, for every m."""
    c = draw(kind, seed)
    used = pairs(online_seqtopk(c.scores, c.k, **c.bounds, strict=True)).cumsum(-1)  # (B, T)
    assert (used <= c.k * torch.arange(1, used.shape[-1] + 1)).all()


@each_case
def test_strict_equals_unstrict_until_that_overspends(kind, seed):
    """The strict budget changes nothing before the first token at which the unstrict rule overspends."""
    c = draw(kind, seed)
    strict, free = (online_seqtopk(c.scores, c.k, **c.bounds, **online) for online in ONLINE)
    used = pairs(free).cumsum(-1)
    over = (used > c.k * torch.arange(1, used.shape[-1] + 1)).cumsum(-1) > 0
    assert same(strict[~over], free[~over])
    first = over & (over.cumsum(-1) == 1)  # there the strict rule stops short
    assert (pairs(strict)[first] < pairs(free)[first]).all()


def test_growing_scores_overspend_without_the_strict_budget():
    """Growing scores overspend the unstrict rule, and the strict one then spends nearly all it may."""
    k, T = 2, 200
    noise = make_scores("sigmoid", 3, T, 8)
    growing, shrinking = noise + ramp(noise, T), noise - ramp(noise, T)
    assert (pairs(online_seqtopk(growing, k, strict=False)).sum(-1) > 1.5 * T * k).all()
    assert (pairs(online_seqtopk(growing, k, strict=True)).sum(-1) > 0.98 * T * k).all()
    strict, free = (online_seqtopk(shrinking, k, **online) for online in ONLINE)
    assert (pairs(free).sum(-1) < 0.7 * T * k).all()
    assert same(strict, free)


@pytest.mark.parametrize("E, expert, k", [(2, 0, 1), (8, 7, 2), (64, 31, 8)])
def test_an_expert_may_win_everything_or_nothing(E, expert, k):
    """An expert with all the score gets every token, one with none gets no token, and no budget breaks."""
    others = make_scores("sigmoid", 2, 40, E)
    always, never = others.clone(), others.clone()
    always[..., expert], never[..., expert] = 1.0, 0.0
    for name in {"topk", "seqtopk", "batchtopk", "online_seqtopk"}:
        masks = [ROUTERS[name].select(scores, k) for scores in (always, never)]
        assert masks[0][..., expert].all() and not masks[1][..., expert].any()
        assert all((pairs(mask).sum(-1) <= 40 * k).all() for mask in masks if name != "batchtopk")
    assert pairs(expert_choice(always, k)).sum() == pairs(expert_choice(never, k)).sum() == 2 * 40 * k


# ---------------------------------------------------------------------------------------------------
# Where the routers meet


@each_case
def test_one_token_is_topk(kind, seed):
    """With T=1 every router whose budget is the sequence is TopK."""
    c = draw(kind, seed)
    for t in {0, c.scores.shape[1] // 2, c.scores.shape[1] - 1}:
        token = c.scores[:, t : t + 1]
        want = ref_topk(token, c.k)
        assert same(seqtopk(token, c.k, **c.bounds), want)
        assert same(expert_choice(token, c.k), want)
        for online in ONLINE:
            assert same(online_seqtopk(token, c.k, **c.bounds, **online), want)
        for b in range(len(token)):
            assert same(batchtopk(token[b : b + 1], c.k, **c.bounds), want[b : b + 1])


@each_case
def test_one_expert_per_token_is_topk(kind, seed):
    """With k=1 and every token given its best expert, nothing is left to compete for: TopK."""
    c = draw(kind, seed)
    want = ref_topk(c.scores, 1)
    bounds = {"min_experts": 1, "max_experts": min(c.highest, c.scores.shape[-1])}
    assert same(topk(c.scores, 1), want)
    assert same(seqtopk(c.scores, 1, **bounds), want)
    assert same(batchtopk(c.scores, 1, **bounds), want)
    for online in ONLINE:
        assert same(online_seqtopk(c.scores, 1, **bounds, **online), want)
        cache = ExpertCache(*c.scores.shape[:2], 1, c.scores.shape[-1], **bounds, **online)
        assert same(cache.select(c.scores), want)


@each_case
def test_fixed_bounds_are_topk(kind, seed):
    """With min_experts = k, or max_experts = k, every token gets exactly k: TopK."""
    c = draw(kind, seed)
    want = ref_topk(c.scores, c.k)
    for bounds in {"min_experts": c.k, "max_experts": c.highest}, {"min_experts": 0, "max_experts": c.k}:
        assert same(seqtopk(c.scores, c.k, **bounds), want)
        assert same(batchtopk(c.scores, c.k, **bounds), want)
        for online in ONLINE:
            assert same(online_seqtopk(c.scores, c.k, **bounds, **online), want)


@each_kind
@pytest.mark.parametrize("min_experts", [0, 1, 5])
def test_a_budget_of_all_takes_all(kind, min_experts):
    """With k=E every token gets every expert under every router."""
    scores = make_scores(kind, 2, 30, 5)
    masks = [topk(scores, 5), expert_choice(scores, 5)]
    masks += [router(scores, 5, min_experts) for router in (seqtopk, batchtopk)]
    masks += [online_seqtopk(scores, 5, min_experts, **online) for online in ONLINE]
    masks += [ExpertCache(2, 30, 5, 5, min_experts, **online).select(scores) for online in ONLINE]
    assert all(mask.all() for mask in masks)


@each_case
def test_one_sequence_makes_batchtopk_seqtopk(kind, seed):
    """With B=1 batchtopk and seqtopk are the same."""
    c = draw(kind, seed)
    for sequence in c.scores.split(1):
        assert same(batchtopk(sequence, c.k, **c.bounds), seqtopk(sequence, c.k, **c.bounds))


# ---------------------------------------------------------------------------------------------------
# Expert Cache


def random_chunks(total: int, seed: int) -> list[int]:
    rng, sizes = random.Random(seed), []
    while sum(sizes) < total:
        sizes.append(min(rng.choice([1, 1, 2, 3, rng.randint(1, 100)]), total - sum(sizes)))
    return sizes


def pieces(total: int, *sizes: int) -> list[int]:
    """The given chunk sizes, as far as they fit, then one chunk with the rest."""
    ends = [0, *(min(sum(sizes[: i + 1]), total) for i in range(len(sizes))), total]
    return [b - a for a, b in pairwise(ends) if b > a]


CHUNKINGS = {  # T -> sizes of the chunks
    "all_at_once": lambda T: [T],
    "one_by_one": lambda T: [1] * T,
    "7+1+40": lambda T: pieces(T, 7, 1, 40),
    "prompt_then_one_by_one": lambda T: pieces(T, T // 2, *[1] * T),
    "powers_of_two": lambda T: pieces(T, *[2**i for i in range(12)]),
    "random_0": lambda T: random_chunks(T, 0),
    "random_1": lambda T: random_chunks(T, 1),
}
each_chunking = pytest.mark.parametrize("chunking", CHUNKINGS)


def feed(cache: ExpertCache, scores: Tensor, sizes: list[int], active: Tensor | None = None) -> Tensor:
    """The masks of scores (B, T, E), fed in chunks of these sizes."""
    chunks = scores.split(sizes, 1)
    if active is None:
        return torch.cat([cache.select(chunk) for chunk in chunks], 1)
    return torch.cat([cache.select(*chunk) for chunk in zip(chunks, active.split(sizes, 1))], 1)


@each_strict
@each_chunking
@each_third_case
def test_the_cache_is_online_seqtopk(kind, seed, chunking, strict):
    """Fed in any chunks, with room to spare or none, the cache gives the mask of online_seqtopk."""
    c = draw(kind, seed, budget=8_000)
    B, T, E = c.scores.shape
    cache = ExpertCache(B, T + 5 * (seed % 2), c.k, E, **c.bounds, strict=strict)
    want = online_seqtopk(c.scores, c.k, **c.bounds, strict=strict)
    assert same(feed(cache, c.scores, CHUNKINGS[chunking](T)), want)


@each_strict
@each_chunking
@each_kind
def test_a_long_sequence_fills_the_cache(kind, chunking, strict):
    """Several hundred tokens, up to the last one that fits, give the mask of online_seqtopk."""
    B, T, E, k = 2, 331, 6, 2
    scores = make_scores(kind, B, T, E)
    cache = ExpertCache(B, T, k, E, strict=strict)
    mask = feed(cache, scores, CHUNKINGS[chunking](T))
    assert same(mask, online_seqtopk(scores, k, strict=strict))
    if chunking == "7+1+40":
        assert same(mask, ref_online_seqtopk(scores, k, strict=strict))


@each_strict
@each_chunking
@each_kind
def test_the_cache_begins_from_its_prior(kind, chunking, strict):
    """Fed in any chunks, before and after it is reset, the cache is online_seqtopk with that prior."""
    seed = len(kind) + len(chunking)
    c, n = draw(kind, seed, budget=2_000), seed % 7 * 20
    B, T, E = c.scores.shape
    prior = usual(kind, n * c.candidates, seed)
    want = online_seqtopk(c.scores, c.k, **c.bounds, strict=strict, prior=prior)
    cache = ExpertCache(B, T, c.k, E, **c.bounds, strict=strict, prior=prior)
    nbytes = cache.nbytes
    for _ in range(2):
        assert same(feed(cache, c.scores, CHUNKINGS[chunking](T)), want)
        cache.reset()
    assert cache.nbytes == nbytes


@each_strict
@each_chunking
@pytest.mark.parametrize("kind", ["softmax", "four_levels", "growing", "all_equal"])
def test_a_long_sequence_after_a_prior(kind, chunking, strict):
    """The prior stays in place however often the recent tokens are merged, and takes none of their room."""
    B, T, E, k, n = 2, 231, 6, 2, 90
    scores, prior = make_scores(kind, B, T, E), usual(kind, n * 3)
    cache = ExpertCache(B, T, k, E, strict=strict, prior=prior)
    mask = feed(cache, scores, CHUNKINGS[chunking](T))
    assert same(mask, ref_online_seqtopk(scores, k, strict=strict, prior=(n, prior)))


@each_strict
@each_chunking
@each_kind
def test_the_discount_cache_is_online_seqtopk_discount(kind, chunking, strict):
    """Fed in any chunks, before and after it is reset, it gives the mask of online_seqtopk_discount."""
    c = draw(kind, len(chunking), budget=2_000)
    B, T, E = c.scores.shape
    cache = DiscountCache(B, T, c.k, E, strict=strict)
    want = online_seqtopk_discount(c.scores, c.k, strict)
    for _ in range(2):
        assert same(feed(cache, c.scores, CHUNKINGS[chunking](T)), want)
        cache.reset()


def active_rows(T: int, seed: int) -> Tensor:
    """Bool (7, T): all, none, left padding, finished early, both, holes at random, and one lone token."""
    rng = random.Random(seed)
    at = torch.arange(T)
    start, end = sorted(rng.sample(range(1, T), 2))
    holes = torch.rand(T, generator=torch.Generator().manual_seed(seed)) < rng.choice([0.2, 0.5, 0.9])
    lone = at == rng.randrange(T)
    rows = [at >= 0, at < 0, at >= start, at < end, (at >= start) & (at < end), holes, lone]
    rng.shuffle(rows)
    return torch.stack(rows)


def ref_active(scores: Tensor, active: Tensor, k: int, **how) -> Tensor:
    """Each row as if its active tokens were all there is; no expert for the others."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for b, real in enumerate(active):
        if real.any():
            mask[b, real] = ref_online_seqtopk(scores[b : b + 1, real], k, **how)[0]
    return mask


@each_strict
@each_chunking
@each_kind
def test_inactive_tokens_neither_compete_nor_spend(kind, chunking, strict):
    """Inactive tokens get no expert, and their row goes on as if they had never been fed."""
    T, E, k, seed = 100, 7, 3, len(kind) + len(chunking)
    how = {"min_experts": seed % 3, "max_experts": [None, 4, 7][seed // 3 % 3], "strict": strict}
    active = active_rows(T, seed)
    scores = make_scores(kind, len(active), T, E, seed)
    want = ref_active(scores, active, k, **how)
    for noise in (None, float("nan")):
        noisy = scores if noise is None else scores.masked_fill(~active[..., None], noise)
        cache = ExpertCache(len(active), T, k, E, **how)
        assert same(feed(cache, noisy, CHUNKINGS[chunking](T), active), want), f"inactive scores: {noise}"


@each_strict
@each_chunking
def test_inactive_tokens_after_a_prior_and_under_a_discount(chunking, strict):
    """Inactive tokens change nothing for the others there either, whatever their scores are."""
    T, E, k, n = 100, 7, 3, 40
    active = active_rows(T, len(chunking))
    scores, prior = make_scores("four_levels", len(active), T, E), usual("four_levels", n * 4)
    noisy, sizes = scores.masked_fill(~active[..., None], float("nan")), CHUNKINGS[chunking](T)
    cache = ExpertCache(len(active), T, k, E, strict=strict, prior=prior)
    want = ref_active(scores, active, k, strict=strict, prior=(n, prior))
    assert same(feed(cache, noisy, sizes, active), want)
    cache = DiscountCache(len(active), T, k, E, strict=strict)
    want = ref_active(ref_discount(scores), active, k, max_experts=E, strict=strict)
    assert same(feed(cache, noisy, sizes, active), want)


def test_active_everywhere_is_the_same_as_no_active():
    """active=None means that every token is real, also between chunks that say so and chunks that do not."""
    scores = make_scores("growing", 2, 60, 8)
    cache, want = ExpertCache(2, 60, 2, 8), online_seqtopk(scores, 2)
    first = cache.select(scores[:, :20], torch.ones(2, 20, dtype=torch.bool))
    rest = cache.select(scores[:, 20:])
    assert same(torch.cat([first, rest], 1), want)


@each_strict
def test_reset_makes_the_cache_fresh(strict):
    """After reset() the past is forgotten, and there is room for max_tokens again."""
    old, new = make_scores("growing", 3, 64, 8, seed=1), make_scores("shrinking", 3, 64, 8, seed=2)
    cache = ExpertCache(3, 64, 2, 8, strict=strict)
    nbytes = cache.nbytes
    for sizes in [64], [1] * 64, [7, 1, 40, 16]:
        feed(cache, old, sizes, torch.rand(3, 64, generator=torch.Generator().manual_seed(3)) < 0.8)
        cache.reset()
        assert same(feed(cache, new, sizes), online_seqtopk(new, 2, strict=strict))
        cache.reset()
    assert cache.nbytes == nbytes


@pytest.mark.parametrize("sizes", [[51], [50, 1], [1] * 51, [13, 30, 8]], ids=str)
@pytest.mark.parametrize("n", [0, 20, 300])
def test_more_than_max_tokens_is_refused(sizes, n):
    """One token too many is a one-line ValueError with the numbers, and leaves the cache as it was.

    The tokens of a prior are not counted.
    """
    scores, prior = make_scores("sigmoid", 2, 51, 6), usual("sigmoid", n * 3)
    cache = ExpertCache(2, 50, 2, 6, prior=prior)
    *fitting, last = scores.split(sizes, 1)
    for chunk in fitting:
        cache.select(chunk)
    seen = sum(sizes[:-1])
    with pytest.raises(ValueError, match=rf": {seen} tokens seen and {sizes[-1]} new.* 50$") as error:
        cache.select(last)
    assert_one_line(error)
    if room := 50 - seen:
        want = online_seqtopk(scores[:, :50], 2, prior=prior)[:, -room:]
        assert same(cache.select(last[:, :room]), want)


def tensors_of(thing: object) -> list[Tensor]:
    """The distinct tensors held by an object, in its attributes, lists, tuples and dicts."""
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, dict):
        thing = list(thing.values())
    if isinstance(thing, list | tuple):
        found = {t.untyped_storage().data_ptr(): t for item in thing for t in tensors_of(item)}
        return list(found.values())
    return tensors_of(vars(thing)) if isinstance(thing, ExpertCache) else []


@pytest.mark.parametrize(
    "B, max_tokens, k, bounds", [(2, 4096, 8, (1, None)), (1, 2048, 2, (0, 4)), (3, 4000, 4, (2, 64))]
)
def test_nbytes_is_what_the_cache_holds(B, max_tokens, k, bounds):
    """nbytes counts what the cache holds: (B, max_tokens, max - min) float32 and little beside."""
    cache = ExpertCache(B, max_tokens, k, 64, *bounds)
    width = (bounds[1] or k + 2) - bounds[0]
    candidates = B * max_tokens * width * 4
    for _ in range(2):
        held = tensors_of(cache)
        assert cache.nbytes == sum(t.untyped_storage().nbytes() for t in held)
        assert 0.98 * candidates <= cache.nbytes <= 1.2 * candidates + 4096
        cache.select(make_scores("softmax", B, 100, 64))


def test_the_cache_keeps_no_graph():
    """Scores that require a gradient are routed as values: what the cache keeps has no gradient."""
    scores = make_scores("sigmoid", 2, 40, 8).requires_grad_()
    cache = ExpertCache(2, 40, 2, 8)
    assert same(feed(cache, scores, [20, 1, 19]), online_seqtopk(scores.detach(), 2))
    assert not any(t.requires_grad for t in tensors_of(cache))


# ---------------------------------------------------------------------------------------------------
# Who sees whom


def moved(name: str, touch) -> list[bool]:
    """For 20 random batches: does touch() change the experts of the first half of sequence 0?"""
    answers = []
    for seed in range(20):
        scores = make_scores(("softmax", "sigmoid", "four_levels", "growing")[seed % 4], 3, 24, 8, seed)
        changed = scores.clone()
        touch(
            changed, torch.randn(scores.shape, generator=torch.Generator().manual_seed(100 + seed)).sigmoid()
        )
        select = partial(ROUTERS[name].select, k=2, **options(name, n_null=4))
        before, after = (select(lifted(name, s))[0, :12] for s in (scores, changed))
        answers.append(not torch.equal(before, after))
    return answers


def set_future(scores: Tensor, other: Tensor):
    scores[:, 12:] = 2 * other[:, 12:]


def set_other_sequences(scores: Tensor, other: Tensor):
    scores[1:] = 2 * other[1:]


@each_router
def test_only_causal_routers_are_unmoved_by_the_future(name):
    """The table's `causal` is true of exactly the routers whose rows ignore every later token."""
    assert any(moved(name, set_future)) != ROUTERS[name].causal


@each_router
def test_only_batchtopk_is_moved_by_other_sequences(name):
    """A sequence's rows do not depend on the rest of its batch, except under batchtopk."""
    assert any(moved(name, set_other_sequences)) == (name == "batchtopk")


@each_case
def test_online_seqtopk_of_a_prefix_is_a_prefix(kind, seed):
    """Cutting the future off leaves every row of the online rule as it was, strict or not."""
    c = draw(kind, seed)
    for online in ONLINE:
        whole = online_seqtopk(c.scores, c.k, **c.bounds, **online)
        for m in {1, 2, 3, c.scores.shape[1] // 2, c.scores.shape[1] - 1} & set(range(1, c.scores.shape[1])):
            assert same(online_seqtopk(c.scores[:, :m], c.k, **c.bounds, **online), whole[:, :m])


# ---------------------------------------------------------------------------------------------------
# The table


def test_the_table_says_what_each_router_is():
    """Each router's causal, exact and decode are what its definition implies."""
    expected = {
        "topk": (True, True, "topk"),
        "batchtopk": (False, True, "online_seqtopk"),
        "seqtopk": (False, True, "online_seqtopk"),
        "online_seqtopk": (True, False, "online_seqtopk"),
        "seqtopk_discount": (False, True, "online_seqtopk_discount"),
        "online_seqtopk_discount": (True, False, "online_seqtopk_discount"),
        "expert_choice": (False, True, "topk"),
        "top_p": (True, False, "top_p"),
        "expert_threshold": (True, False, "expert_threshold"),
        "remoe": (True, False, "remoe"),
        "null_experts": (True, False, "null_experts"),
    }
    table = {name: (row.causal, row.exact, row.decode) for name, row in ROUTERS.items()}
    assert {name: table.get(name) for name in expected} == expected


@each_router
def test_the_stand_in_for_decoding_is_causal(name):
    """Every router decodes as a causal one of the table, and a causal one as itself."""
    router = ROUTERS[name]
    assert ROUTERS[router.decode].causal
    assert router.decode == name or not router.causal


@each_router
@each_kind
def test_exact_routers_spend_the_whole_budget(name, kind):
    """Routers that the table calls exact spend B*T*k pairs on any scores."""
    for seed in SEEDS:
        c = draw(kind, seed)
        B, T, _ = c.scores.shape
        mask = ROUTERS[name].select(c.scores, c.k)
        assert mask.dtype == torch.bool and mask.shape == c.scores.shape
        assert mask.sum() == B * T * c.k or not ROUTERS[name].exact


@each_router
def test_routers_not_called_exact_do_spend_otherwise(name):
    """A router that is not called exact spends more or less on some scores."""
    some = options(name, n_null=4)
    mask = ROUTERS[name].select(make_scores("shrinking", 2, 100, 8), 2, **some)
    assert (mask[..., : 4 if some else 8].sum() == 2 * 100 * 2) == ROUTERS[name].exact


def test_the_router_of_the_readme_is_a_function_and_a_row():
    """The example in README.md, pasted into router.py, gives a causal router that the model can use."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    names = vars(router_module) | {"ROUTERS": {}}
    exec(code, names)
    ((name, row),) = names["ROUTERS"].items()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ROUTERS, name, row)
        model = MoEGPT(MoEConfig(vocab_size=11, n_layer=1, n_head=2, n_embd=16, n_hidden=8, router=name))
        _, loss, stats = model(torch.arange(10)[None], torch.arange(10)[None])
        chunks = list(model.generate(torch.arange(5)[None], 5))
    assert loss.isfinite() and stats.experts.min() >= 1 and stats.experts.max() <= 2 and len(chunks) == 6


# ---------------------------------------------------------------------------------------------------
# Tensors in and out


@each_router
@each_kind
def test_inputs_are_left_alone(name, kind):
    """Routers do not write to their scores, whatever their layout, and the layout does not matter."""
    scores = lifted(name, make_scores(kind, 3, 37, 6))
    select = partial(ROUTERS[name].select, k=2, **options(name, n_null=2))
    want = select(scores.clone())
    wide = torch.zeros(3, 74, 12)
    wide[:, ::2, 1::2] = scores
    for view in scores, scores.permute(2, 0, 1).contiguous().permute(1, 2, 0), wide[:, ::2, 1::2]:
        assert same(select(view), want)
        assert torch.equal(view, scores)
    expanded = scores[:1].expand(3, -1, -1)
    assert same(select(expanded), select(expanded.clone()))


def test_the_cache_leaves_its_inputs_alone():
    """The cache neither writes to the scores that it is given nor keeps a view of them."""
    scores = make_scores("sigmoid", 2, 60, 6).transpose(0, 1).contiguous().transpose(0, 1)
    before, cache, masks = scores.clone(), ExpertCache(2, 60, 2, 6), []
    for chunk, kept in zip(scores.split(15, 1), before.split(15, 1)):
        active = torch.ones(2, 15, dtype=torch.bool)
        masks.append(cache.select(chunk, active))
        assert torch.equal(chunk, kept) and active.all()
        chunk.fill_(7.0)
    assert same(torch.cat(masks, 1), online_seqtopk(before, 2))


@each_router
@each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_float_types_route_alike(name, kind, dtype):
    """Scores of another float type get the mask that the same values get in float32."""
    scores = lifted(name, make_scores(kind, 2, 33, 9)).bfloat16()
    assert same(ROUTERS[name].select(scores.to(dtype), 3), ROUTERS[name].select(scores.float(), 3))


@each_router
def test_the_choice_has_no_gradient(name):
    """Scores that require a gradient are accepted, and the mask is a plain bool tensor."""
    scores = make_scores("softmax", 2, 20, 6)
    mask = ROUTERS[name].select(scores.clone().requires_grad_(), 2)
    assert same(mask, ROUTERS[name].select(scores, 2)) and not mask.requires_grad


@each_router
def test_routers_read_nothing_back(name):
    """No router reads a value back to the host: all of them run on the meta device."""
    mask = ROUTERS[name].select(torch.empty(2, 50, 8, device="meta"), 2)
    assert (mask.shape, mask.dtype, mask.device.type) == ((2, 50, 8), torch.bool, "meta")


def test_the_cache_reads_nothing_back():
    """The cache too has static shapes, whatever is active."""
    cache = ExpertCache(2, 50, 2, 8, device="meta")
    for t, active in (20, None), (1, torch.ones(2, 1, dtype=torch.bool, device="meta")):
        mask = cache.select(torch.empty(2, t, 8, device="meta"), active)
        assert (mask.shape, mask.dtype, mask.device.type) == ((2, t, 8), torch.bool, "meta")


class CountOps(TorchDispatchMode):
    """Counts the tensor operations under it."""

    def __init__(self):
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += 1
        return func(*args, **(kwargs or {}))


@each_router
def test_no_loop_over_tokens(name):
    """64 times the tokens take at most twice the tensor operations: some more for each bit of the rank."""
    counts = []
    for T in (64, 4096):
        with CountOps() as count:
            ROUTERS[name].select(torch.empty(1, T, 8, device="meta"), 2)
        counts.append(count.ops)
    assert 0 < counts[1] <= 2 * counts[0]


# ---------------------------------------------------------------------------------------------------
# Errors


def assert_one_line(error: pytest.ExceptionInfo):
    message = str(error.value)
    assert message and "\n" not in message


BOUNDED = {
    "seqtopk": seqtopk,
    "batchtopk": batchtopk,
    "online_seqtopk": online_seqtopk,
    "ExpertCache": lambda scores, k, **bounds: ExpertCache(2, 9, k, scores.shape[-1], **bounds),
}
UNBOUNDED = {
    "topk": topk,
    "expert_choice": expert_choice,
    "null_experts": null_experts,
    "seqtopk_discount": seqtopk_discount,
    "online_seqtopk_discount": online_seqtopk_discount,
    "DiscountCache": lambda scores, k: DiscountCache(2, 9, k, scores.shape[-1]),
}


@pytest.mark.parametrize("name", BOUNDED | UNBOUNDED)
@pytest.mark.parametrize("k", [17, 100, 0, -3])
def test_k_beyond_the_experts_is_refused(name, k):
    """k outside 1..E is a ValueError of one line with the key, the value and the range."""
    with pytest.raises(ValueError) as error:
        (BOUNDED | UNBOUNDED)[name](make_scores("softmax", 2, 9, 16), k)
    assert_one_line(error)
    assert re.search(rf"\bk\b.*(?<!\S){k}\b", str(error.value)) or re.search(
        rf"\bk\s*=\s*{k}\b", str(error.value)
    )
    assert re.search(r"\b16\b", str(error.value)) and re.search(r"\b1\b", str(error.value))


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize(
    "bounds, key, seen",
    [
        ({"min_experts": 6}, "min_experts", (6, 5)),
        ({"min_experts": -1}, "min_experts", (-1, 0, 5)),
        ({"max_experts": 4}, "max_experts", (4, 5, 16)),
        ({"max_experts": 0}, "max_experts", (0, 5, 16)),
        ({"max_experts": 17}, "max_experts", (17, 16)),
        ({"min_experts": 6, "max_experts": 8}, "min_experts", (6, 5)),
    ],
    ids=str,
)
def test_impossible_bounds_are_refused(name, bounds, key, seen):
    """Bounds outside 0 <= min_experts <= k <= max_experts <= E are a one-line ValueError that says so."""
    with pytest.raises(ValueError, match=key) as error:
        BOUNDED[name](make_scores("softmax", 2, 9, 16), 5, **bounds)
    assert_one_line(error)
    for number in seen:
        assert re.search(rf"(?<![\w-]){number}\b", str(error.value)), f"{number} not in: {error.value}"


# ---------------------------------------------------------------------------------------------------
# Load balance


@pytest.mark.parametrize("k", [1, 2, 8])
def test_load_balance_loss_is_one_when_uniform(k):
    """load_balance_loss is 1 when scores or load are uniform, E/k when the same k experts have it all."""
    uniform = torch.full((2, 16, 8), 0.125)
    scores = make_scores("softmax", 2, 16, 8)
    first = (torch.arange(8) < k).expand(2, 16, 8)
    rotated = torch.stack([first[0, 0].roll(t) for t in range(16)]).expand(2, 16, 8)
    assert load_balance_loss(uniform, topk(scores, k)).item() == pytest.approx(1, abs=1e-6)
    assert load_balance_loss(scores, rotated).item() == pytest.approx(1, abs=1e-6)
    assert load_balance_loss(first / k, first).item() == pytest.approx(8 / k, abs=1e-6)


@each_kind
def test_load_balance_loss_is_its_formula(kind):
    """load_balance_loss is E times the sum over experts of (share of the pairs) * (mean normalised score)."""
    scores = make_scores(kind, 2, 11, 5) + 3.5  # positive: shares of a token's score must make sense
    mask = seqtopk(scores, 2)
    tokens = list(zip(scores.flatten(0, 1).tolist(), mask.flatten(0, 1).tolist()))
    want = 0.0
    for e in range(5):
        f = sum(chosen[e] for _, chosen in tokens) / sum(sum(chosen) for _, chosen in tokens)
        P = sum(token[e] / sum(token) for token, _ in tokens) / len(tokens)
        want += 5 * f * P
    assert load_balance_loss(scores, mask).item() == pytest.approx(want, rel=1e-5)


def test_load_balance_loss_teaches_the_scores():
    """The gradient of load_balance_loss is that of the mean scores, the load held constant."""
    scores = make_scores("sigmoid", 2, 12, 6).requires_grad_()
    mask = seqtopk(scores.detach(), 2)
    load_balance_loss(scores, mask).backward()
    other = scores.detach().clone().requires_grad_()
    P = (other / other.sum(-1, keepdim=True)).mean((0, 1))
    (6 * (mask.sum((0, 1)) / mask.sum() * P).sum()).backward()
    assert other.grad.abs().max() > 0
    torch.testing.assert_close(scores.grad, other.grad)


def test_losses_stay_finite_when_experts_die():
    """An expert without a token, or with all of them, gives finite losses and gradients."""
    for kind in ("one_wins_all", "one_never_wins"):
        scores = make_scores(kind, 2, 12, 6).requires_grad_()
        load_balance_loss(scores, topk(scores.detach(), 1)).backward()
        assert scores.grad.isfinite().all()
    logits = torch.tensor([[[1e4, -1e4], [-300.0, -300.0]]]).requires_grad_()
    z_loss(logits).backward()
    assert logits.grad.isfinite().all()


def test_z_loss_is_its_formula():
    """z_loss is the mean over tokens of the squared log of the sum of the exponentials."""
    logits = 3 * torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)) + 2
    tokens = logits.double().flatten(0, 1)
    want = sum(sum(x.exp() for x in token).log() ** 2 for token in tokens) / len(tokens)
    assert z_loss(logits).item() == pytest.approx(want.item(), rel=1e-5)
    assert z_loss(torch.tensor([[[1e4, 0.0]]])).item() == pytest.approx(1e8, rel=1e-5)


@pytest.mark.parametrize("mass", [0, -0.1, 1.1])
def test_an_impossible_mass_is_refused(mass):
    """The share of the scores that top_p wants is above 0 and at most 1."""
    with pytest.raises(ValueError, match=rf"mass is {mass}.* 0 .* 1") as error:
        top_p(make_scores("softmax", 2, 9, 8), 2, mass)
    assert_one_line(error)


# ---------------------------------------------------------------------------------------------------
# What keeps the routers without a budget near k


@pytest.mark.parametrize("k", [1, 3, 8])
@each_kind
def test_kth_scores_are_those_of_a_sorted_batch(kind, k):
    """The score at rank S*k/E, and at least at rank 1, of each expert over all sequences."""
    for T in (1, 3, 11):
        scores = make_scores(kind, 2, T, 8)
        rank = max(1, 2 * T * k // 8)
        want = [sorted(scores[..., e].flatten().tolist(), reverse=True)[rank - 1] for e in range(8)]
        assert kth_scores(scores, k).tolist() == want


def test_cutoffs_give_each_expert_its_share():
    """After the first update from zero each expert takes its S*k/E best tokens, but for the last of them."""
    scores = make_scores("sigmoid", 4, 64, 8) * torch.linspace(0.2, 1, 8)
    bias = cutoff_update(torch.zeros(8), kth_scores(scores, 2), 0)
    load = expert_threshold(scores + bias, 2).sum((0, 1))
    assert load.tolist() == pytest.approx([4 * 64 * 2 / 8] * 8, abs=1)


def test_cutoffs_are_a_moving_average():
    """The first update forgets all that was before, the millionth keeps 0.999 of it; the input is kept."""
    bias, kth = torch.tensor([0.0, 0.75]), torch.tensor([0.5, 0.125])
    torch.testing.assert_close(cutoff_update(bias, kth, 0), torch.tensor([0.5, 0.875]))
    torch.testing.assert_close(cutoff_update(bias, kth, 10), torch.tensor([0.25, 0.8125]))
    torch.testing.assert_close(cutoff_update(bias, kth, 10**6), torch.tensor([0.0005, 0.750125]))
    assert bias.tolist() == [0, 0.75] and kth.tolist() == [0.5, 0.125]


def test_l1_loss_is_its_formula():
    """Mean over tokens of a token's scores, each times its expert's load, S*k/E pairs being 1."""
    scores = make_scores("logits", 2, 7, 4).relu().requires_grad_()
    mask = scores > 0
    load = mask.sum((0, 1))
    want = sum(4 / (3 * 14) * load[e].item() * sum(scores[..., e].flatten().tolist()) / 14 for e in range(4))
    loss = l1_loss(scores, mask, 3)
    assert loss.item() == pytest.approx(want, rel=1e-5)
    loss.backward()
    torch.testing.assert_close(scores.grad, (load / (3 * 14) * 4 / 14).expand_as(scores))


@pytest.mark.parametrize("spent, factor", [(81, 1.2), (80, 1.0), (79, 1 / 1.2), (0, 1 / 1.2)])
def test_the_weight_of_the_l1_loss_follows_the_load(spent, factor):
    """It grows by 1.2 while more than k experts per token are spent, and shrinks by 1.2 while fewer are, but
    not below where it began."""
    load = torch.tensor([[spent, 0], [0, 0]])  # of 20 tokens in two layers
    for coef, low in (3e-8, 0), (L1_COEF, L1_COEF):
        new = l1_coef_update(torch.tensor(coef), load, 2, 20)
        assert new.item() == pytest.approx(max(low, coef * factor))


def test_entropy_loss_is_its_formula():
    """Mean over tokens of the entropy of the shares of their scores; the gradient is finite at entropy 0."""
    scores = make_scores("sigmoid", 2, 7, 5)
    want = 0.0
    for token in scores.flatten(0, 1).tolist():
        want -= sum(score / sum(token) * math.log(score / sum(token)) for score in token)
    assert entropy_loss(scores).item() == pytest.approx(want / 14, rel=1e-5)
    certain = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).requires_grad_()
    entropy_loss(certain).backward()
    assert entropy_loss(certain).item() == 0 and certain.grad.isfinite().all()
    assert entropy_loss(torch.full((3, 8), 0.1)).item() == pytest.approx(math.log(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_the_bias_lifts_the_underloaded(dtype):
    """loss_free_update moves a bias by the rate: up below the mean load, down above, not at it."""
    bias = torch.tensor([[0.5, -0.5, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    load = torch.tensor([[0, 6, 3], [4, 4, 4], [9, 100, 200]], dtype=dtype)
    kept_bias, kept_load = bias.clone(), load.clone()
    want = torch.tensor([[0.51, -0.51, 0.0], [1.0, 1.0, 1.0], [0.01, 0.01, -0.01]])
    torch.testing.assert_close(loss_free_update(bias, load, 0.01), want)
    torch.testing.assert_close(loss_free_update(bias[0], load[0], 0.01), want[0])
    assert torch.equal(bias, kept_bias) and torch.equal(load, kept_load)
