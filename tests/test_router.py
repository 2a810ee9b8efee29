"""Properties of the routers, over random shapes, bounds and kinds of scores."""

import math
import random
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import router
from model import MoEGPT
from router import (
    ROUTERS,
    ExpertCache,
    Routing,
    batchtopk,
    entropy_loss,
    expert_choice,
    load_balance_loss,
    loss_free_update,
    null_experts,
    online_seqtopk,
    prefix_order_statistic,
    rise_of_root,
    seqtopk,
    top_p,
    topk,
    z_loss,
)
from tests.cases import (
    CHUNKINGS,
    KINDS,
    Case,
    active_rows,
    cases,
    config_of,
    each_chunking,
    each_kind,
    feed,
    make_scores,
    pairs,
    ramp,
    refused,
    same,
    select,
)
from tests.reference import (
    ref_batchtopk,
    ref_expert_choice,
    ref_expert_threshold,
    ref_null_experts,
    ref_online_seqtopk,
    ref_remoe,
    ref_seqtopk,
    ref_top_p,
    ref_topk,
)

each_router = pytest.mark.parametrize("name", ROUTERS)
STRICT = {"strict": True}, {"strict": False}


def cached(scores: Tensor, k: int, min_experts: int, max_experts: int | None, strict: bool = True) -> Tensor:
    B, T, E = scores.shape
    return ExpertCache(B, T, k, E, min_experts, max_experts, strict).select(scores)


BUDGETED = {  # (scores, k, min_experts, max_experts) -> mask
    "seqtopk": seqtopk,
    "batchtopk": batchtopk,
    "strict": partial(online_seqtopk, strict=True),
    "unstrict": partial(online_seqtopk, strict=False),
    "cached": cached,
    "cached_unstrict": partial(cached, strict=False),
}


def lifted(name: str, scores: Tensor) -> Tensor:
    """The scores, moved to both sides of the line that the router draws, if it draws one."""
    return scores + {"expert_threshold": 0.5, "remoe": -0.5}.get(name, 0.0)


def test_the_cases_reach_every_extreme():
    """The random cases include both ends of every range that they are drawn from."""
    drawn = [c for kind in KINDS for c in cases(kind)]
    B, T, E = (set(sizes) for sizes in zip(*(c.scores.shape for c in drawn)))
    assert {1, 2, 3, 4} == B and {1, 300} <= T and {2, 128} <= E
    for extreme in (
        lambda c: c.k == 1,
        lambda c: c.k == c.scores.shape[-1],
        lambda c: c.min_experts == 0,
        lambda c: c.min_experts == c.k > 1,
        lambda c: c.min_experts < c.k < c.highest,
        lambda c: 1 < c.min_experts < c.k,
        lambda c: c.max_experts is None,
        lambda c: c.max_experts == c.k > 1,
        lambda c: c.max_experts == c.scores.shape[-1] > c.k,
    ):
        assert any(map(extreme, drawn))


# ---------------------------------------------------------------------------------------------------
# Each router is its definition

MASSES = (0.1, 0.25, 0.4, 0.5, 0.75, 1.0)  # one for each seed
REFERENCES = {
    "topk": ref_topk,
    "seqtopk": ref_seqtopk,
    "batchtopk": ref_batchtopk,
    "online_seqtopk": ref_online_seqtopk,
    "seqtopk_root": lambda scores, k, *how, **options: ref_seqtopk(rise_of_root(scores), k, *how, **options),
    "online_seqtopk_root": lambda scores, k, **how: ref_online_seqtopk(rise_of_root(scores), k, **how),
    "expert_choice": ref_expert_choice,
    "top_p": ref_top_p,
    "expert_threshold": lambda scores, k, state: ref_expert_threshold(scores, state["cutoff"]),
    "remoe": ref_remoe,
}


def ways(name: str, c: Case) -> list[dict]:
    """The settings that the case is routed with."""
    return {
        "seqtopk": [c.bounds],
        "batchtopk": [c.bounds],
        "online_seqtopk": [c.bounds | how for how in STRICT],
        "seqtopk_root": [c.bounds],
        "online_seqtopk_root": [c.bounds | how for how in STRICT],
        "top_p": [{"mass": MASSES[c.seed]}],
        "expert_threshold": [{"state": {"cutoff": c.scores[0, -1]}}],  # scores of a token: ties with itself
    }.get(name, [{}])


def test_the_rise_of_the_root_by_hand():
    """Roots of 7, 12 and 16; of 3, 4 and 4; of 1, 2 and 3."""
    found = rise_of_root(torch.tensor([[5.0, 7.0, 4.0], [1.0, 0.0, 3.0], [1.0, 1.0, 1.0]]))
    root = [n**0.5 for n in range(17)]
    want = [[root[12] - root[7], root[7], 4 - root[12]], [2 - root[3], 0, root[3]]]
    torch.testing.assert_close(found, torch.tensor([*want, [1, root[2] - 1, root[3] - root[2]]]))
    share = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert torch.equal(rise_of_root(share).argsort(-1), share.argsort(-1))  # of a token's experts


@each_kind
@pytest.mark.parametrize("name", REFERENCES)
def test_each_router_is_its_definition(name, kind):
    """The mask of a loop that sorts, ties included (for online_seqtopk: the past anew for every token)."""
    for c in cases(kind):
        positive = name in ("top_p", "remoe") or name.endswith("_root")
        scores = c.scores.relu() if positive else c.scores
        for how in ways(name, c):
            got, want = ROUTERS[name].select(scores, c.k, **how), REFERENCES[name](scores, c.k, **how)
            assert same(got, want), (c.seed, how)


@each_kind
def test_null_experts_is_its_definition(kind):
    """null_experts is topk over all slots, as many as leave k real experts if all get the same."""
    scores = make_scores(kind, 2, 30, 12)
    for n_null, k in ((6, 1), (8, 2), (9, 1), (4, 6), (0, 3)):
        mask = null_experts(scores, k, n_null=n_null)
        assert same(mask, ref_null_experts(scores, k, n_null))
        assert (pairs(mask) * (12 - n_null) == 12 * k).all()


@pytest.mark.parametrize("E, k", [(2, 1), (8, 2), (8, 6), (9, 1), (64, 8)])
def test_the_default_bounds_are_one_and_k_plus_two(E, k):
    """Without bounds, at least 1 and at most min(k + 2, E) experts per token; online routing is strict."""
    scores = make_scores("growing", 2, 50, E)
    explicit = {"min_experts": 1, "max_experts": min(k + 2, E)}
    for route in seqtopk, batchtopk, online_seqtopk:
        assert same(route(scores, k), route(scores, k, **explicit))
    assert same(online_seqtopk(scores, k), online_seqtopk(scores, k, strict=True))
    assert same(ExpertCache(2, 50, k, E).select(scores), online_seqtopk(scores, k, **explicit, strict=True))
    assert same(seqtopk(scores, k), ref_seqtopk(scores, k))


@pytest.mark.parametrize("n", [1, 2, 3, 8, 37])
def test_prefix_order_statistic_is_a_loop_over_the_queries(n):
    """For every prefix of a permutation and every nth: the nth smallest of a sorted copy."""
    g = torch.Generator().manual_seed(n)
    rank = torch.stack([torch.randperm(n, generator=g) for _ in range(4)])
    queries = [(length, nth) for length in range(1, n + 1) for nth in range(length)]
    random.Random(n).shuffle(queries)
    length, nth = (torch.tensor(x).expand(4, -1) for x in zip(*queries))
    want = [[row[:length].sort().values[nth] for length, nth in queries] for row in rank]
    assert prefix_order_statistic(rank, length, nth).tolist() == torch.tensor(want).tolist()


# ---------------------------------------------------------------------------------------------------
# Budgets and bounds


@each_kind
def test_budgets_and_bounds(kind):
    """Every token gets its best experts, within its bounds; a sequence (of batchtopk: the batch) spends
    exactly T*k, and under the strict budget at most m*k in its first m tokens, for every m. A batch of one
    sequence makes batchtopk seqtopk."""
    for c in cases(kind):
        B, T, _ = c.scores.shape
        budget = c.k * torch.arange(1, T + 1)
        best_first = c.scores.argsort(dim=-1, descending=True, stable=True)
        masks = {name: route(c.scores, c.k, **c.bounds) for name, route in BUDGETED.items()}
        for name, mask in masks.items():
            assert c.min_experts <= pairs(mask).min() and pairs(mask).max() <= c.highest, name
            assert (mask.gather(-1, best_first).int().diff(dim=-1) <= 0).all(), name
        masks["expert_choice"] = expert_choice(c.scores, c.k)
        spent = {name: pairs(mask).cumsum(-1) for name, mask in masks.items()}
        assert (spent["seqtopk"][:, -1] == budget[-1]).all()
        assert (spent["expert_choice"][:, -1] == budget[-1]).all()
        assert spent["batchtopk"][:, -1].sum() == B * T * c.k
        assert (spent["strict"] <= budget).all()
        alone = [batchtopk(sequence, c.k, **c.bounds) for sequence in c.scores.split(1)]
        assert same(torch.cat(alone), masks["seqtopk"])

        over = (spent["unstrict"] > budget).cumsum(-1) > 0  # the strict rule changes nothing before,
        assert same(masks["strict"][~over], masks["unstrict"][~over])
        first = over & (over.cumsum(-1) == 1)  # and there it stops short
        assert (pairs(masks["strict"])[first] < pairs(masks["unstrict"])[first]).all()


@each_kind
def test_online_routing_depends_on_a_prefix_only(kind):
    """Without the tokens that come later every row stays; unless strict it is seqtopk's last row."""
    for c in cases(kind, budget=8_000):
        T = c.scores.shape[1]
        masks = [online_seqtopk(c.scores, c.k, **c.bounds, **how) for how in STRICT]
        for m in {1, T, *random.Random(c.seed).sample(range(1, T + 1), min(T, 8))}:
            prefix = c.scores[:, :m]
            assert same(masks[1][:, m - 1], seqtopk(prefix, c.k, **c.bounds)[:, -1])
            for mask, how in zip(masks, STRICT):
                assert same(online_seqtopk(prefix, c.k, **c.bounds, **how), mask[:, :m])


def test_growing_scores_overspend_without_the_strict_budget():
    """Growing scores overspend the unstrict rule, and the strict one then spends nearly all it may."""
    k, T = 2, 200
    noise = make_scores("sigmoid", 3, T, 8)
    growing, shrinking = noise + ramp(noise, T), noise - ramp(noise, T)
    assert (pairs(online_seqtopk(growing, k, strict=False)).sum(-1) > 1.5 * T * k).all()
    assert (pairs(online_seqtopk(growing, k, strict=True)).sum(-1) > 0.98 * T * k).all()
    strict, free = (online_seqtopk(shrinking, k, **how) for how in STRICT)
    assert (pairs(free).sum(-1) < 0.7 * T * k).all()
    assert same(strict, free)


# ---------------------------------------------------------------------------------------------------
# Where the routers meet

DEGENERATE = {  # a case -> scores, k and bounds that leave nothing to compete for
    "one token": lambda c: (c.scores[:, -1:], c.k, c.bounds),
    "min_experts = k": lambda c: (c.scores, c.k, {"min_experts": c.k, "max_experts": c.highest}),
    "max_experts = k": lambda c: (c.scores, c.k, {"min_experts": 0, "max_experts": c.k}),
    "k = E": lambda c: (c.scores, c.scores.shape[-1], {"min_experts": c.min_experts, "max_experts": None}),
}


@pytest.mark.parametrize("degenerate", DEGENERATE)
@each_kind
def test_without_competition_every_router_is_topk(kind, degenerate):
    """One token, min_experts or max_experts = k, or a budget of all."""
    for c in cases(kind, budget=8_000):
        scores, k, bounds = DEGENERATE[degenerate](c)
        want = ref_topk(scores, k)
        assert same(topk(scores, k), want)
        for name, route in BUDGETED.items():
            batches = scores.split(1 if name == "batchtopk" else len(scores))  # it pools the sequences
            assert same(torch.cat([route(batch, k, **bounds) for batch in batches]), want), name
        if scores.shape[1] == 1 or k == scores.shape[-1]:
            assert same(expert_choice(scores, k), want)


# ---------------------------------------------------------------------------------------------------
# Expert Cache


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "unstrict"])
@each_chunking
@each_kind
def test_the_cache_is_online_seqtopk(kind, chunking, strict):
    """Fed in any chunks, with room to spare or none, the cache gives the mask of online_seqtopk; so it does
    after a reset, whatever it has seen before."""
    several_merges = Case(3, make_scores(kind, 2, 150, 6), 2, 1, None)
    for c in several_merges, *cases(kind, budget=2_000)[len(chunking) % 3 :: 3]:
        B, T, E = c.scores.shape
        cache = ExpertCache(B, T + c.seed % 3, c.k, E, **c.bounds, strict=strict)
        nbytes = cache.nbytes
        if c.seed % 2:
            feed(cache, c.scores.flip(1), CHUNKINGS["7+1+40"](T), c.scores[..., 0] > 0.5)
            cache.reset()
        want = online_seqtopk(c.scores, c.k, **c.bounds, strict=strict)
        assert same(feed(cache, c.scores, CHUNKINGS[chunking](T)), want)
        assert cache.nbytes == nbytes


def alone(scores: Tensor, active: Tensor, k: int, **how) -> Tensor:
    """Each row as if its active tokens were all there is; no expert for the others."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for b, real in enumerate(active):
        if real.any():
            mask[b, real] = online_seqtopk(scores[b : b + 1, real], k, **how)[0]
    return mask


@each_chunking
@each_kind
def test_inactive_tokens_neither_compete_nor_spend(kind, chunking):
    """Inactive tokens get no expert, and their row goes on as if they had never been fed."""
    T, E, k, seed = 80, 7, 3, len(kind) + len(chunking)
    active = active_rows(T, seed)
    scores = make_scores(kind, len(active), T, E, seed)
    for strict, noise in (True, scores), (False, torch.nan), (True, torch.nan):
        how = {"min_experts": seed % 3, "max_experts": [None, 4, 7][seed // 3 % 3], "strict": strict}
        cache = ExpertCache(len(active), T, k, E, **how)
        got = feed(cache, scores.where(active[..., None], noise), CHUNKINGS[chunking](T), active)
        assert same(got, alone(scores, active, k, **how))


@pytest.mark.parametrize("sizes", [[51], [50, 1], [1] * 51, [13, 30, 8]], ids=str)
def test_more_than_max_tokens_is_refused(sizes):
    """One token too many is refused with the numbers, and leaves the cache as it was."""
    scores = make_scores("sigmoid", 2, 51, 6)
    cache = ExpertCache(2, 50, 2, 6)
    *fitting, last = scores.split(sizes, 1)
    for chunk in fitting:
        cache.select(chunk)
    seen = sum(sizes[:-1])
    with refused(rf": {seen} tokens seen and {sizes[-1]} new, but max_tokens is 50"):
        cache.select(last)
    if room := 50 - seen:
        assert same(cache.select(last[:, :room]), online_seqtopk(scores[:, :50], 2)[:, -room:])


def tensors_of(cache: ExpertCache) -> list[Tensor]:
    """The distinct tensors that the cache holds."""
    held = [value for value in vars(cache).values() if isinstance(value, Tensor)]
    assert not any(isinstance(value, list | tuple | dict) for value in vars(cache).values())
    return list({t.untyped_storage().data_ptr(): t for t in held}.values())


@pytest.mark.parametrize(
    "B, T, k, bounds", [(2, 4096, 8, (1, 10)), (1, 2048, 2, (0, 4)), (3, 4000, 4, (2, 64))]
)
def test_nbytes_is_what_the_cache_holds(B, T, k, bounds):
    """nbytes counts what the cache holds: (B, max_tokens, max - min) float32 and little beside."""
    cache = ExpertCache(B, T, k, 64, *bounds)
    candidates = B * T * (bounds[1] - bounds[0]) * 4
    for _ in range(2):
        assert cache.nbytes == sum(t.untyped_storage().nbytes() for t in tensors_of(cache))
        assert 0.98 * candidates <= cache.nbytes <= 1.2 * candidates + 4096
        cache.select(make_scores("softmax", B, 100, 64))


def test_the_cache_keeps_neither_graph_nor_inputs():
    """Scores that require a gradient are routed as values, no input is written to and no view of it kept; to
    say that all tokens are active is to say nothing."""
    scores = make_scores("growing", 2, 60, 6).transpose(0, 1).contiguous().transpose(0, 1)
    kept, cache, masks = scores.clone(), ExpertCache(2, 60, 2, 6), []
    for chunk, before in zip(scores.split([15, 1, 28, 1, 15], 1), kept.split([15, 1, 28, 1, 15], 1)):
        active = torch.ones(chunk.shape[:2], dtype=torch.bool)
        masks.append(cache.select(chunk.detach().requires_grad_(), active if len(masks) % 3 else None))
        assert torch.equal(chunk, before) and active.all()
        chunk.fill_(7.0)
    assert same(torch.cat(masks, 1), online_seqtopk(kept, 2))
    assert not any(t.requires_grad for t in tensors_of(cache))


# ---------------------------------------------------------------------------------------------------
# The table


def test_what_stands_in_for_decoding():
    """Every router decodes as a causal one of the table, and a causal one as itself."""
    assert all(ROUTERS[row.decode].causal for row in ROUTERS.values())
    stand_ins = {name: row.decode for name, row in ROUTERS.items() if row.decode != name}
    online = "online_seqtopk"
    assert stand_ins.items() >= {"seqtopk": online, "batchtopk": online, "expert_choice": "topk"}.items()
    assert not any(ROUTERS[name].causal for name in stand_ins)


def moves(name: str, where: slice | tuple) -> bool:
    """Whether other scores there move the first half of sequence 0 to other experts, in 20 random batches."""
    for seed in range(20):
        scores = make_scores(("softmax", "sigmoid", "four_levels", "growing")[seed % 4], 3, 24, 8, seed)
        changed = scores.clone()
        changed[where] = 2 * make_scores("sigmoid", 3, 24, 8, 100 + seed)[where]
        before, after = (select(name, lifted(name, s))[0, :12] for s in (scores, changed))
        if not torch.equal(before, after):
            return True
    return False


@each_router
def test_who_sees_whom(name):
    """The routers called causal, and no others, ignore later tokens; only batchtopk sees other sequences."""
    assert moves(name, (slice(None), slice(12, None))) != ROUTERS[name].causal
    assert moves(name, slice(1, None)) == (name == "batchtopk")


@each_router
def test_exactly_the_exact_routers_spend_the_whole_budget(name):
    """Routers called exact spend B*T*k pairs on any scores; each other one more or less on some."""
    spends_all = []
    for kind in KINDS:
        for E, k in (8, 2), (4, 1), (6, 3), (128, 5):
            scores = make_scores(kind, 2, 50, E)
            n_expert = E // 2 if name == "null_experts" else E
            spends_all.append(select(name, scores, k)[..., :n_expert].sum() == 2 * 50 * k)
    assert all(spends_all) == ROUTERS[name].exact


def test_the_code_of_the_readme_does_what_it_says():
    """Its seqtopk is the router's; its example of a router of one's own is causal, and a model can use it."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    shown, example = (block.split("```")[0] for block in readme.split("```python\n")[1:])
    exec(shown, names := vars(router).copy())
    for c in cases("four_levels"):
        assert same(names["seqtopk"](c.scores, c.k, **c.bounds), seqtopk(c.scores, c.k, **c.bounds))
    with patch.dict(ROUTERS):
        exec(example, {})
        sizes = {"vocab_size": 11, "n_layer": 1, "n_head": 2, "n_embd": 16, "n_hidden": 8}
        model = MoEGPT(config_of(list(ROUTERS)[-1], **sizes))
        _, loss, stats = model(torch.arange(10)[None], torch.arange(10)[None])
        chunks = list(model.generate(torch.arange(5)[None], 5))
    assert loss.isfinite() and stats.n_taken.min() >= 1 and stats.n_taken.max() <= 2 and len(chunks) == 6


@pytest.mark.parametrize("name", [name for name, row in ROUTERS.items() if row.max_pairs])
@each_kind
def test_max_pairs_are_never_exceeded(name, kind):
    """Neither by whole sequences, nor by the tokens that follow a prefix."""
    for c, how in product(cases(kind), STRICT):
        B, T, E = c.scores.shape
        spent = pairs(select(name, c.scores, c.k, **c.bounds, **how))
        config = config_of(name, n_expert=E, k=c.k, **c.bounds, **how)
        starts = (0, True), (0, False), (T // 2, False), (T - 1, False)
        most = [ROUTERS[name].max_pairs(config, B * (T - start), fresh) for start, fresh in starts]
        assert any(most)
        assert all(n is None or spent[:, start:].sum() <= n for n, (start, _) in zip(most, starts))


# ---------------------------------------------------------------------------------------------------
# Tensors in and out


@each_router
def test_inputs_are_left_alone(name):
    """Routers do not write to their scores, whatever their layout, and the layout does not matter."""
    for kind in KINDS:
        scores = lifted(name, make_scores(kind, 3, 37, 6))
        want = select(name, scores.clone())
        wide = torch.zeros(3, 74, 12)
        wide[:, ::2, 1::2] = scores
        for view in scores, scores.permute(2, 0, 1).contiguous().permute(1, 2, 0), wide[:, ::2, 1::2]:
            assert same(select(name, view), want)
            assert torch.equal(view, scores)
        expanded = scores[:1].expand(3, -1, -1)
        assert same(select(name, expanded), select(name, expanded.clone()))


@each_router
def test_other_float_types_route_alike(name):
    """The same values get the same mask in any float type; a gradient is accepted, and the mask has none."""
    for kind in KINDS:
        scores = lifted(name, make_scores(kind, 2, 33, 8)).bfloat16()
        want = select(name, scores.float())
        for dtype in torch.float64, torch.bfloat16, torch.float32:
            mask = select(name, scores.to(dtype).requires_grad_())
            assert same(mask, want) and not mask.requires_grad


class CountOps(TorchDispatchMode):
    """Counts the tensor operations under it."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))


@each_router
def test_routers_neither_read_back_nor_loop_over_tokens(name):
    """On the meta device, which has no values to read, 64 times the tokens take at most twice the tensor
    operations: some more for each bit of the rank."""
    n_ops = []
    for T in 64, 4096:
        with CountOps() as count:
            mask = select(name, torch.empty(1, T, 8, device="meta"))
        n_ops.append(count.n)
        assert (mask.shape, mask.dtype, mask.device.type) == ((1, T, 8), torch.bool, "meta")
    assert 0 < n_ops[1] <= 2 * n_ops[0]


class CountElements(TorchDispatchMode):
    """Counts the elements of all inputs; of a row that is searched, which halves its way, so many bits."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        seen = list(args)
        if func is torch.ops.aten.searchsorted.Tensor:
            row, values, *_ = args
            seen, self.n = [values], self.n + values.numel() * row.shape[-1].bit_length()
        self.n += sum(x.numel() for x in tree_leaves((seen, kwargs)) if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))


def test_a_step_of_the_cache_never_scans_the_past():
    """With 16 times the tokens before it, and the room for them, it touches hardly more elements."""
    touched = []
    for T in 200, 3200:
        past, token = make_scores("sigmoid", 2, T + 1, 8).split([T, 1], 1)
        cache = ExpertCache(2, T + 1, 2, 8)
        cache.select(past)
        with CountElements() as count:
            cache.select(token)
        touched.append(count.n)
    assert touched[0] < touched[1] < 1.01 * touched[0]


def test_the_cache_reads_nothing_back():
    """The cache too has static shapes, whatever is active."""
    cache = ExpertCache(2, 50, 2, 8, device="meta")
    for t, active in (20, None), (1, torch.ones(2, 1, dtype=torch.bool, device="meta")):
        mask = cache.select(torch.empty(2, t, 8, device="meta"), active)
        assert (mask.shape, mask.dtype, mask.device.type) == ((2, t, 8), torch.bool, "meta")


# ---------------------------------------------------------------------------------------------------
# Errors


def refusals():
    """(call, settings, message) of what is impossible with 16 experts."""
    bounded = seqtopk, batchtopk, online_seqtopk, lambda scores, k, **how: ExpertCache(2, 9, k, 16, **how)
    for call, k in product((*bounded, topk, expert_choice, null_experts), (17, 100, 0, -3)):
        yield call, {"k": k}, rf"\bk is {k}\b.*\b1\b.*\b16\b"
    for call in bounded:
        yield call, {"k": 5, "min_experts": 6}, r"min_experts is 6\b.*\b0\b.*\b5\b"
        yield call, {"k": 5, "min_experts": 6, "max_experts": 8}, r"min_experts is 6\b.*\b0\b.*\b5\b"
        yield call, {"k": 5, "min_experts": -1}, r"min_experts is -1\b.*\b0\b.*\b5\b"
        for u in 4, 0, 17:
            yield call, {"k": 5, "max_experts": u}, rf"max_experts is {u}\b.*\b5\b.*\b16\b"
    for mass in 0, -0.1, 1.1:
        yield top_p, {"k": 2, "mass": mass}, rf"mass is {mass}\b.* 0 .* 1"
    for n in 1, 3, 5:
        yield null_experts, {"k": 2, "n_null": n}, rf"n_null is {n}\b.*multiple of {16 - n}\b"
    for B, T in (0, 9), (2, 0):
        message = f"{'max_tokens' if B else 'batch_size'} is 0, .* at least 1"
        yield lambda scores, B, T: ExpertCache(B, T, 2, 16), {"B": B, "T": T}, message


@pytest.mark.parametrize("call, how, message", list(refusals()))
def test_impossible_settings_are_refused(call, how, message):
    """In one line with the key, the value and what would be possible."""
    with refused(message):
        call(make_scores("softmax", 2, 9, 16), **how)


# ---------------------------------------------------------------------------------------------------
# Losses


def routing(scores: Tensor, mask: Tensor | None = None) -> Routing:
    return Routing(scores, scores, scores > 0 if mask is None else mask)


def by_token(x: Tensor) -> list[Tensor]:
    return list(x.flatten(0, -2))


def ref_load_balance(scores: Tensor, mask: Tensor) -> Tensor:
    """E times the sum over experts of (share of the pairs) * (mean share of a token's scores)."""
    E, load = scores.shape[-1], sum(token.double() for token in by_token(mask))
    P = sum(token / token.sum() for token in by_token(scores)) / len(by_token(scores))
    return E * sum(load[e] / load.sum() * P[e] for e in range(E))


def ref_entropy(scores: Tensor, mask: Tensor) -> Tensor:
    shares = [token / token.sum() for token in by_token(scores)]
    return -sum(p * p.log() for share in shares for p in share) / len(shares)


def ref_z(logits: Tensor, mask: Tensor) -> Tensor:
    return sum(sum(x.exp() for x in token).log() ** 2 for token in by_token(logits)) / len(by_token(logits))


L1_STATE, L1_CONFIG = {"l1_coef": torch.tensor(0.5)}, config_of("remoe", n_expert=5, k=3)


def ref_l1(scores: Tensor, mask: Tensor) -> Tensor:
    """The mean of a token's scores, each times its expert's load, S*k/E pairs being 1 (ReMoE, eq. 10, 11)."""
    (S, E), load = scores.flatten(0, 1).shape, sum(token.double() for token in by_token(mask))
    return 0.5 * sum(load[e] / (S * 3 / E) * token[e] for token in by_token(scores) for e in range(E)) / S


LOSSES = {
    "load_balance": (load_balance_loss, ref_load_balance),
    "entropy": (lambda scores, mask: entropy_loss(scores), ref_entropy),
    "z": (lambda scores, mask: z_loss(scores), ref_z),
    "l1": (lambda scores, mask: ROUTERS["remoe"].loss(routing(scores, mask), L1_STATE, L1_CONFIG), ref_l1),
}


@each_kind
@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_is_its_formula(name, kind):
    """Its value and its gradient, through the scores only: the load is held constant."""
    scores = make_scores(kind, 2, 11, 5) + 3.5  # positive, so that shares of a token's scores make sense
    mask = topk(scores, 2) | (scores > 4.3)
    fast, slow = scores.clone().requires_grad_(), scores.double().requires_grad_()
    for x, loss in (fast, LOSSES[name][0](fast, mask)), (slow, LOSSES[name][1](slow, mask)):
        loss.backward()
        x.loss = loss.detach()
    torch.testing.assert_close(fast.loss.double(), slow.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(fast.grad.double(), slow.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("k", [1, 2, 8])
def test_load_balance_loss_is_one_when_uniform(k):
    """load_balance_loss is 1 when scores or load are uniform, E/k when the same k experts have it all."""
    uniform, scores = torch.full((2, 16, 8), 0.125), make_scores("softmax", 2, 16, 8)
    first = (torch.arange(8) < k).expand(2, 16, 8)
    rotated = torch.stack([first[0, 0].roll(t) for t in range(16)]).expand(2, 16, 8)
    for loss, want in (
        (load_balance_loss(uniform, topk(scores, k)), 1),
        (load_balance_loss(scores, rotated), 1),
        (load_balance_loss(first / k, first), 8 / k),
    ):
        assert loss.item() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    "loss, scores, want",
    [
        (lambda s: load_balance_loss(s, topk(s, 1)), make_scores("one_wins_all", 2, 12, 6), None),
        (lambda s: load_balance_loss(s, topk(s, 1)), make_scores("one_never_wins", 2, 12, 6), None),
        (entropy_loss, torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 0),
        (entropy_loss, torch.full((3, 8), 0.1), math.log(8)),
        (z_loss, torch.tensor([[[1e4, 0.0]]]), 1e8),
        (z_loss, torch.tensor([[[1e4, -1e4], [-300.0, -300.0]]]), None),
    ],
)
def test_losses_stay_finite_at_extremes(loss, scores, want):
    """An expert with no token or with all, no entropy, and large logits: loss and gradient are finite."""
    value = loss(x := scores.clone().requires_grad_())
    value.backward()
    assert value.isfinite() and x.grad.isfinite().all()
    assert want is None or value.item() == pytest.approx(want, rel=1e-5)


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


# ---------------------------------------------------------------------------------------------------
# What keeps the routers without a budget near k


@pytest.mark.parametrize("name", [name for name, row in ROUTERS.items() if row.update])
def test_an_update_is_a_new_state_of_the_same_form(name):
    """Its names, shapes and types stay, the old state is left alone, and no value is read on the host."""
    row, config = ROUTERS[name], config_of(name, n_expert=8)
    for device in "cpu", "meta":
        old = {key: torch.stack([x, x]).to(device) for key, x in row.state(config).items()}
        kept = {key: x.clone() for key, x in old.items()}
        new = row.update(old, routing(make_scores("sigmoid", 6, 20, 8).view(2, 3, 20, 8).to(device)), config)
        form = [{key: (x.shape, x.dtype, x.device) for key, x in state.items()} for state in (old, new)]
        assert form[0] == form[1] and any(new[key] is not old[key] for key in old)
        assert device == "meta" or all(torch.equal(old[key], kept[key]) for key in old)


@pytest.mark.parametrize("k", [1, 3, 8])
@each_kind
def test_cutoffs_are_moving_averages_of_the_kth_best_scores(kind, k):
    """Of each layer and expert: the score at rank S*k/E, and at least at rank 1, over all sequences; the
    newest weighs max(0.001, 10 / (n + 10)) after n updates for this k (arXiv 2603.11535, algorithm 1)."""
    config, old = config_of("expert_threshold", n_expert=8, k=k), make_scores("softmax", 1, 3, 8, 1)[0]
    for n, T, of_k in (0, 1, k), (1, 3, k), (10, 11, k), (9_989, 11, k), (10**6, 11, k), (50, 11, k + 1):
        scores = torch.stack([make_scores(kind, 2, T, 8, layer) for layer in range(3)])
        state = {"cutoff": old, "k": torch.full((3,), of_k), "updates": torch.full((3,), n)}
        new = ROUTERS["expert_threshold"].update(state, routing(scores), config)
        n = n if of_k == k else 0  # another k begins a new average
        assert new["updates"].tolist() == [n + 1] * 3 and new["k"].tolist() == [k] * 3
        rank, weight = max(1, 2 * T * k // 8), max(0.001, 10 / (n + 10))
        for layer, e in product(range(3), range(8)):
            kth = sorted(scores[layer, ..., e].flatten().tolist(), reverse=True)[rank - 1]
            want = (1 - weight) * old[layer, e].item() + weight * kth
            assert new["cutoff"][layer, e].item() == pytest.approx(want, rel=1e-5, abs=1e-7)


def test_cutoffs_give_each_expert_its_share():
    """No token gets an expert before the first update; then each takes its S*k/E best but for the last."""
    scores, row = make_scores("sigmoid", 4, 64, 8) * torch.linspace(0.2, 1, 8), ROUTERS["expert_threshold"]
    config = config_of("expert_threshold", n_expert=8, k=2)
    state = row.state(config)
    assert not row.select(torch.ones_like(scores), 2, state=state).any()
    state = row.update({key: x[None] for key, x in state.items()}, routing(scores[None]), config)
    load = row.select(scores, 2, state={key: x[0] for key, x in state.items()}).sum((0, 1))
    assert load.tolist() == [4 * 64 * 2 / 8 - 1] * 8


@pytest.mark.parametrize("spent, power", [(81, 1), (80, 0), (79, -1), (0, -1)])
def test_the_weight_of_the_l1_loss_follows_the_load(spent, power):
    """It grows by 1.2 while all layers together spend more than k experts per token, shrinks by 1.2 while
    they spend fewer (ReMoE, eq. 7 and 8), but not below 1e-8, where it begins."""
    row, config = ROUTERS["remoe"], config_of("remoe", n_expert=4, k=2)
    mask = torch.arange(2 * 2 * 10 * 4).view(2, 2, 10, 4) < spent  # the first layer alone spends all, or more
    assert row.state(config)["l1_coef"].item() == pytest.approx(1e-8)
    for coef in 3e-8, 1e-8:
        new = row.update({"l1_coef": torch.full((2,), coef)}, routing(mask.float(), mask), config)
        want = max(1e-8, coef * 1.2**power)
        assert new["l1_coef"].tolist() == pytest.approx([want] * 2, rel=1e-5, abs=0)
