"""The model against the slow reference, and what it promises about decoding, causality and checkpoints."""

import math
import random
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
import train
from config import parse
from config.device import as_graph, pick_compiled_decoding
from model import (
    Context,
    MoEConfig,
    MoEGPT,
    compiled_step,
    load_checkpoint,
    rope_angles,
    rotate,
    run_experts,
    run_on_cpu,
    sample_token,
    save_checkpoint,
)
from router import ROUTERS, ExpertCache
from tests.reference import (
    SETTINGS,
    ref_expert_choice,
    ref_expert_threshold,
    ref_model,
    ref_moe,
    ref_null_experts,
    ref_online_seqtopk,
    ref_remoe,
    ref_run_experts,
    ref_seqtopk,
    ref_top_p,
    ref_topk,
)

# -------------------- tiny models ------------------------------------------------------------------------

TINY = {"vocab_size": 48, "block_size": 24, "n_layer": 2, "n_head": 4, "n_embd": 32}
TINY |= {"n_expert": 8, "k": 2, "n_hidden": 16}
VARIANTS = {
    "plain": {},
    "grouped_query": {"n_kv_head": 2},
    "one_kv_head": {"n_kv_head": 1},
    "qk_norm_head": {"qk_norm": "head"},
    "qk_norm_full": {"qk_norm": "full", "n_kv_head": 2},
    "wide_heads": {"head_width": 12, "n_kv_head": 2, "qk_norm": "full"},
    "qkv_bias": {"qkv_bias": True},
    "shared_expert": {"shared_hidden": 24},
    "shared_gate": {"shared_hidden": 24, "shared_gate": True},
    "first_layer_dense": {"n_dense_layer": 1},
    "wide_dense_layer": {"n_dense_layer": 1, "dense_hidden": 40},
    "tied_head": {"tie_embeddings": True},
    "sigmoid": {"score_fn": "sigmoid"},
    "norm_topk": {"norm_topk": True},
    "raw_scores": {"norm_best": 0},
    "norm_best": {"norm_best": 5},
    "wide_bounds": {"min_experts": 0, "max_experts": 8},
}
ROUTINGS = {name: {"router": name} for name in ROUTERS}
ROUTINGS["unstrict"] = {"router": "online_seqtopk", "strict": False}
BUDGETED = ("topk", "batchtopk", "expert_choice")
BUDGETED += tuple(f"{how}seqtopk{root}" for how in ("", "online_") for root in ("", "_root"))
UNBUDGETED = {  # how the reference selects from scores of the whole layer
    "top_p": lambda scores, layer: ref_top_p(scores, 2, 0.7),
    "expert_threshold": lambda scores, layer: ref_expert_threshold(scores, layer.state.cutoff),
    "remoe": ref_remoe,
    "null_experts": lambda scores, layer: ref_null_experts(scores, 2, 4),
}
GREEDY = {"temperature": 0.0}

each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_routing = pytest.mark.parametrize("routing", ROUTINGS)
each_model = pytest.mark.parametrize("changes", [*VARIANTS.values(), *ROUTINGS.values()], ids=str)


def make(router: str = "seqtopk", seed: int = 0, **changes) -> MoEGPT:
    """A tiny model with weights so large that any error shows in the logits, a gate with favourites, and
    cutoffs that give a token 1 to 4 experts."""
    torch.manual_seed(seed)
    model = MoEGPT(MoEConfig(**{**TINY, "router": router, **SETTINGS.get(router, {}), **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(30 if "gate" in name else 5)
    if router == "expert_threshold":
        for layer in model.expert_layers():
            layer.state.cutoff.copy_(torch.linspace(0.9, 0.6, 8))
    return model


def tokens(B: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(TINY["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


def decode_router(model: MoEGPT) -> str:
    return ROUTERS[model.config.router].decode


def close(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> bool:
    return got.shape == want.shape and (got - want).abs().max() < tolerance


def assert_near(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    """Each tensor is within `tolerance` of its own norm; a tensor of zeros is met exactly."""
    for number, (mine, reference) in enumerate(zip(got, want, strict=True)):
        error = (mine.float() - reference).norm()
        assert error <= tolerance * reference.norm(), f"{number}: {error} of {reference.norm()}"


def assert_finite_gradients(model: MoEGPT, loss: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """All parameters have one: for none DDP would wait."""
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == dtype and parameter.grad.isfinite().all(), name


# -------------------- experts ----------------------------------------------------------------------------

KINDS = "topk ragged idle_experts one_gets_all idle_tokens no_pair all_pairs".split()
SHAPES = {"some": (17, 6), "one_token": (1, 6), "many_experts": (4, 32), "one_expert": (5, 1)}
NUMBERS = {  # the dtype, the sizes of x, w_in and w_out, and the relative tolerance
    "float32": (torch.float32, (1, 0.5, 0.5), 1e-5),
    "bfloat16": (torch.bfloat16, (1, 0.5, 0.5), 0.02),
    "huge": (torch.float32, (1e6, 1e-6, 1e9), 1e-5),
}


@pytest.fixture
def poisoned_memory():
    """Memory that nobody has written reads as NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def draw_mask(kind: str, S: int, E: int, g: torch.Generator) -> Tensor:
    """mask (S, E): a random number of experts per token, and then what `kind` says."""
    rank = torch.rand(S, E, generator=g).argsort(-1)
    ragged = rank < torch.randint(min(5, E + 1), (S, 1), generator=g)
    token, expert = torch.arange(S).unsqueeze(1), torch.arange(E)
    return {
        "topk": rank < 2,
        "ragged": ragged,
        "idle_experts": ragged & (expert != 0) & (expert != E // 2) & (expert != E - 1),
        "one_gets_all": (expert == E // 2).expand(S, E),
        "idle_tokens": ragged & (token != 0) & (token != S - 1),
        "no_pair": torch.zeros_like(ragged),
        "all_pairs": torch.ones_like(ragged),
    }[kind]


def with_gradients(run, inputs: list[Tensor], push: Tensor) -> list[Tensor]:
    """y = run(*inputs), and the gradients of (y * push).sum()."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad((y * push).sum(), leaves, materialize_grads=True)]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_experts_equal_the_loop_over_tokens_and_experts(kind, shape, numbers):
    """Whatever the mask, and however many rows are spare: with gradients and without, run_experts gives the
    reference's values, run_on_cpu does too, and what is not routed has a gradient of exactly zero."""
    (S, E), (dtype, scales, tolerance) = SHAPES[shape], NUMBERS[numbers]
    g = torch.Generator().manual_seed(9)  # no sum cancels, which would magnify what bfloat16 rounds
    mask, weight = draw_mask(kind, S, E, g), torch.rand(S, E, generator=g)
    push, *drawn = (torch.randn(size, generator=g) for size in ((S, 16), (S, 16), (E, 16, 16), (E, 8, 16)))
    x, w_in, w_out = ((scale * tensor).to(dtype) for scale, tensor in zip(scales, drawn))
    inputs, n = [x, weight, w_in, w_out], int(mask.sum())
    exact = [tensor.float() for tensor in inputs]
    want = with_gradients(lambda x, *weights: ref_run_experts(x, mask, *weights), exact, push)
    for size in (None, n, n + 1, n + 99):
        got = with_gradients(lambda x, *w, size=size: run_experts(x, mask, *w, size), inputs, push)
        assert_near(got, want, tolerance)
        _, d_x, d_weight, d_in, d_out = got
        assert not d_x[~mask.any(1)].any() and not d_weight[~mask].any()
        assert not d_in[~mask.any(0)].any() and not d_out[~mask.any(0)].any()
        with torch.no_grad():
            found = run_experts(x, mask, weight, w_in, w_out, size), run_on_cpu(x, mask, weight, w_in, w_out)
        for y in found:
            assert y.dtype == got[0].dtype == torch.float32
            assert_near([y], want[:1], tolerance)


def test_the_pairs_of_a_token_are_added_up_in_float32():
    """Their outputs, and going backward their gradients: in bfloat16 a GPU would round each partial sum."""

    class Sums(TorchDispatchMode):
        dtypes = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name().startswith("aten::index_add"):
                self.dtypes.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    model, idx = make(n_layer=1).bfloat16(), tokens(2, 24)
    with Sums():
        model(idx, idx)[1].backward()
    assert Sums.dtypes == [torch.float32] * 3  # the pairs' outputs, weights and inputs


def test_a_gpu_that_leaves_garbage(monkeypatch):
    """Where grouped_mm gives experts without tokens any gradient, theirs is zero all the same."""
    grouped_mm = F.grouped_mm

    def like_b200(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        idle, w = offs.diff(prepend=offs.new_zeros(1)) == 0, w.clone()
        w.register_hook(lambda gradient: gradient.masked_fill(idle.view(-1, 1, 1), math.nan))
        return grouped_mm(x, w, offs=offs)

    model, idx = make("topk", n_layer=1), tokens(1, 2)  # four of eight experts at most
    want = torch.autograd.grad(model(idx, idx)[1], list(model.parameters()))
    monkeypatch.setattr(F, "grouped_mm", like_b200)
    for garbage in (False, True):
        monkeypatch.setattr(model_module, "leaves_garbage", lambda device, garbage=garbage: garbage)
        got = torch.autograd.grad(model(idx, idx)[1], list(model.parameters()))
        assert all(gradient.isfinite().all() for gradient in got) == garbage
    assert_near(got, want, 1e-6)


# -------------------- the MoE layer ----------------------------------------------------------------------

NOWHERE = Context(None, angles=None)  # all that MoE looks at but its router
BESTS = [{"norm_best": n} for n in (None, 0, 1, 5)]
NORMS = [{"norm_topk": True}, *BESTS]
LAYERS = [("topk", {"score_fn": fn, **norm}) for fn in ("softmax", "sigmoid") for norm in NORMS]
LAYERS += [("top_p", norm) for norm in BESTS[1:]] + [(name, {}) for name in UNBUDGETED]
LAYERS += [("topk", {"shared_hidden": 24})]


@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("name, changes", LAYERS, ids=str)
def test_the_layer_equals_its_reference(name, changes, biased):
    """Output, routing and the gradients of all parameters are the reference's, also where tokens have any
    number of experts. The bias selects, never weighs, and leaves routers alone that take none."""
    layer = make(name, n_layer=1, **changes).blocks[0].mlp
    x, push, row = torch.randn(2, 9, 32) / 4, torch.randn(2, 9, 32), ROUTERS[name]
    layer.bias[8:] += 0.1  # so that some tokens have null experts only
    if biased:
        layer.bias += 0.3 * torch.randn_like(layer.bias)
        layer.bias[5] = 10
    select = UNBUDGETED.get(name, lambda scores, layer: ref_topk(scores, 2))
    weights = dict(layer.named_parameters()) | {"bias": layer.bias * row.takes_bias}
    parts = [ref_moe(rows, weights, layer.config, lambda scores: select(scores, layer)) for rows in x]
    want, scores, mask = (torch.stack(part) for part in zip(*parts))
    got, routing = layer(x, NOWHERE._replace(row=row), None)
    assert torch.equal(routing.mask, mask) and close(routing.scores, scores) and close(got, want, 1e-5)
    assert close(routing.logits, x @ layer.gate.weight.T) and mask.shape[-1] == 8 + layer.config.n_null
    leaves = list(layer.parameters())
    gradients = [torch.autograd.grad((y * push).sum(), leaves) for y in (got, want)]
    assert_near(*gradients, 1e-5)
    counts = mask[..., :8].sum(-1).unique()
    if biased and row.takes_bias:
        assert mask[..., 5].all()  # however low its score
    elif name in UNBUDGETED:  # of the other two no token of x has none
        assert len(counts) > 2 and (counts.min() == 0 or name in ("top_p", "remoe"))


@torch.no_grad()
@pytest.mark.parametrize("n_best", [1, 2, 5, 8])
def test_an_expert_weighs_the_same_whatever_else_is_chosen(n_best):
    """Weights sum to 1 over the norm_best best scores, and the outputs of two disjoint choices add up to that
    of both; under norm_topk each choice sums to 1 by itself."""
    over_best, over_chosen = make("topk", norm_best=n_best), make("topk", norm_topk=True)
    x, some = torch.randn(2, 9, 32) / 4, torch.rand(2, 9, 8) < 0.4
    for model, adds_up in ((over_best, True), (over_chosen, False)):
        layer, outputs = model.blocks[0].mlp, []
        for mask in (some, ~some, some | ~some):
            row = ROUTERS["top_p"]._replace(select=lambda *args, mask=mask, **options: mask)
            outputs.append(layer(x, NOWHERE._replace(row=row), None)[0])
        assert close(outputs[0] + outputs[1], outputs[2], 1e-5) == adds_up
        scores = layer.score(x)[1]
        weight = layer.weigh(scores, some)
        summed = weight.topk(n_best).values if adds_up else (weight * some)[some.any(-1)]
        assert close(summed.sum(-1), torch.ones_like(summed[..., 0]), 1e-5)


# -------------------- the whole model --------------------------------------------------------------------


@torch.no_grad()
@each_variant
def test_the_model_equals_its_reference(variant):
    """The logits are those of a forward written with loops over tokens, heads and experts."""
    model, idx = make(**VARIANTS[variant]), tokens(2, 10)
    bounds = model.config.k, model.config.min_experts, model.config.max_experts
    want = [ref_model(model, row, lambda scores: ref_seqtopk(scores, *bounds)) for row in idx]
    assert close(model(idx)[0], torch.stack(want))


@torch.no_grad()
@pytest.mark.parametrize("select", [ref_topk, ref_online_seqtopk, ref_expert_choice])
def test_the_router_of_the_config_or_of_the_call_routes(select):
    """`router` decides who routes: the config's by default, the call's instead if it names one."""
    name, seqtopk, idx = select.__name__.removeprefix("ref_"), make(), tokens(1, 10)
    want = ref_model(seqtopk, idx[0], lambda scores: select(scores, 2)).unsqueeze(0)
    assert close(make(name)(idx)[0], want) and close(seqtopk(idx, router=name)[0], want)
    assert not close(seqtopk(idx)[0], want)


SOME, FIRST, MIDDLE, LAST = slice(3, 300, 2), slice(128), slice(256, 384), slice(512, 600)


@pytest.mark.parametrize("left_out", [[], [SOME], [FIRST], [MIDDLE], [LAST], [SOME, FIRST, LAST]], ids=str)
def test_a_loss_in_pieces_is_that_of_all_logits(left_out):
    """On a CPU the head sees 128 tokens at a time: loss and gradients are those of all logits at once, also
    where some targets, or all of a piece, do not count."""
    model, idx, targets = make("topk", n_layer=1), tokens(25, 24), tokens(25, 24, seed=1)
    for part in left_out:
        targets.view(-1)[part] = -1
    logits, no_loss, _ = model(idx)
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    no_logits, loss, _ = model(idx, targets)
    assert no_logits is no_loss is None
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    gradients = [torch.autograd.grad(y, list(model.parameters())) for y in (loss, want)]
    assert_near(*gradients, 1e-5)


@pytest.mark.parametrize("name", ["seqtopk", *UNBUDGETED])
def test_the_statistics_are_those_of_the_layers(name):
    """Load and experts are of real experts, a row for each layer that has some; losses are means over these
    layers, the balance loss over all that a token can choose."""
    model, seen = make(name, n_layer=3, n_dense_layer=1), []
    for layer in model.expert_layers():
        layer.register_forward_hook(lambda layer, args, result: seen.append(result[1]))
    stats = model(tokens(2, 10))[2]
    assert len(seen) == 2 and all(mine is its for mine, its in zip(stats.routing, seen, strict=True))
    logits, scores, mask = (torch.stack(part) for part in zip(*seen))
    assert mask.shape == (2, 2, 10, 8 + model.config.n_null)
    assert torch.equal(stats.load, mask[..., :8].sum((1, 2)))
    assert torch.equal(stats.n_taken, mask[..., :8].sum(-1)) and (stats.n_taken != 2).any()
    share = mask.sum((1, 2)) / mask.sum((1, 2, 3))[:, None]  # (L, E)
    probability = (scores / scores.sum(-1, keepdim=True).clamp(min=1e-9)).mean((1, 2))
    assert close(stats.balance_loss, mask.shape[-1] * (share * probability).sum(-1).mean())
    z_loss = logits.double().exp().sum(-1).log().square().mean()
    assert stats.z_loss.item() == pytest.approx(z_loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["seqtopk", "null_experts"])
def test_new_weights_are_gpt2s(name):
    """All matrices start with deviation 0.02, those that add to the residual stream with 0.02 / sqrt(2L);
    gains start at 1 and biases at 0."""
    torch.manual_seed(0)
    changes = {"n_embd": 64, "shared_hidden": 32, "n_dense_layer": 1, "qkv_bias": True, "router": name}
    config = MoEConfig(**TINY | changes | SETTINGS.get(name, {}))
    for name, parameter in MoEGPT(config).named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
        else:
            want = 0.01 if "w_out" in name or "attention.out" in name else 0.02
            assert parameter.std().item() == pytest.approx(want, rel=0.15), name


def test_the_dense_twin_has_no_experts():
    """With n_expert=1 there is no gate, no layer in the statistics and no Expert Cache; all parameters are
    active, as many as in the MoE but for its gates."""
    dense, idx = make(n_expert=1, k=1, n_hidden=32), tokens(2, 10)
    logits, _, stats = dense(idx)
    assert_finite_gradients(dense, dense(idx, idx)[1])
    assert not any("gate" in name for name, _ in dense.named_parameters())
    assert close(logits[1], ref_model(dense, idx[1], None))
    assert stats.load.shape == (0, 1) and stats.n_taken.shape == (0, 2, 10)
    assert stats.balance_loss == stats.z_loss == 0 and stats.routing == []
    assert dense.new_cache(2).expert_nbytes == 0
    assert [chunk.n_taken.shape for chunk in dense.generate(idx, 1)] == [(2, 10, 0), (2, 1, 0)]
    total, active = dense.n_params()
    assert total == active == make().n_params()[1] - 2 * 8 * 32


THRESHOLD = {"router": "expert_threshold", **SETTINGS["expert_threshold"]}


@pytest.mark.parametrize(
    "changes, favour, load",
    [
        ({}, 1e3, 20),  # one expert has scores of exactly 1, the others of 0
        ({"norm_best": 0}, 1e3, 20),
        ({"router": "topk", "k": 1}, 1e3, 20),
        ({"norm_topk": True}, 1e3, 20),
        ({"score_fn": "sigmoid"}, 1e3, 20),
        ({"score_fn": "sigmoid", "norm_best": 0}, 1e3, 20),
        ({"score_fn": "sigmoid"}, -1e3, 6),  # all scores are 0: the first tokens go first
        ({"score_fn": "sigmoid", "norm_topk": True}, -1e3, 6),
        (THRESHOLD, 1e3, 0),  # no cutoff is known yet
        (THRESHOLD | {"shared_hidden": 24}, 1e3, 0),
    ],
    ids=str,
)
def test_one_expert_may_get_everything_or_nothing(changes, favour, load):
    """Losses and gradients are finite, and text can be generated, when every token wants the same expert, or
    none, or when no token has any expert, so that the residual stream alone carries it."""
    torch.manual_seed(0)
    model, idx = MoEGPT(MoEConfig(**TINY | changes)), tokens(2, 10)
    with torch.no_grad():
        model.embedding.weight[:, 0] = 20  # a feature that all tokens have
        for layer in model.expert_layers():
            layer.gate.weight[:, 0] = -1e3
            layer.gate.weight[3, 0] = favour
    _, loss, stats = model(idx, idx)
    assert (stats.load[:, 3] == load).all() and (load or not stats.load.any())
    assert_finite_gradients(model, loss + stats.balance_loss + stats.z_loss)
    assert load or not model.blocks[0].mlp.w_in.grad.any()
    (*_, last) = model.generate(idx[:, :3], 4, **GREEDY)
    assert last.n_taken.any() == bool(load)


# -------------------- who sees whom ----------------------------------------------------------------------


@torch.no_grad()
@each_routing
def test_who_sees_the_future_and_the_other_sequences(routing):
    """A new future token leaves earlier logits alone under causal routers and moves them under the others;
    another sequence is moved under batchtopk only."""
    model = make(**ROUTINGS[routing])
    idx, changed = tokens(2, 24), tokens(2, 24)
    changed[0, 12:] = tokens(1, 12, seed=1)
    moved = (model(idx)[0] - model(changed)[0]).abs().amax(-1)  # (B, T)
    past, other = moved[0, :12].max(), moved[1].max()
    assert moved[0, 12:].min() > 1e-3
    assert past < 1e-5 if ROUTERS[model.config.router].causal else past > 1e-3
    assert other > 1e-3 if routing == "batchtopk" else other < 1e-5


def test_attention_knows_relative_positions_only():
    """Rotary scores depend on the distance of query and key, and change with it; rotation keeps norms."""
    config = MoEConfig(**TINY)
    x, q, k = torch.randn(3, 1, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    position = torch.tensor([[0, 1, 2, 5, 11, 23]])

    def rotated(x: Tensor, shift: int) -> Tensor:
        return rotate(x, rope_angles(position + shift, config))

    scores = rotated(q, 0) @ rotated(k, 0).mT
    for shift in (1, 7, 100):
        assert close(rotated(q, shift) @ rotated(k, shift).mT, scores, 1e-4)
        assert not close(rotated(q, shift) @ rotated(k, 0).mT, scores, 0.1)
    assert close(rotated(x, 3).norm(dim=-1), x.norm(dim=-1), 1e-5)
    assert torch.equal(rotated(x, 0)[:, :, 0], x[:, :, 0])


# -------------------- decoding with caches ---------------------------------------------------------------

FEEDINGS = ([20], [1] * 20, [7, 1, 1, 5, 6], [1, 1, 18])


@pytest.fixture
def short_memory(monkeypatch):
    """Expert Caches merge their recent tokens after 8."""
    monkeypatch.setattr(ExpertCache, "RECENT", 8)


@torch.no_grad()
@pytest.mark.usefixtures("short_memory")
@each_model
def test_decoding_with_caches_equals_the_forward_without(changes):
    """However the tokens are cut up, logits and experts per token are those of one forward under the same
    causal router, where some tokens have more experts than k and some fewer."""
    model, idx = make(**changes), tokens(3, 20)
    want, _, stats = model(idx, router=decode_router(model))
    assert (stats.load > 0).sum() > 8 * len(stats.load) / 2
    assert decode_router(model) == "topk" or stats.n_taken.min() < 2 < stats.n_taken.max()
    cache = model.new_cache(3)
    for sizes in FEEDINGS:
        cache.reset()
        parts = [model(part, cache=cache) for part in idx.split(sizes, dim=1)]
        assert cache.pos == 20
        assert close(torch.cat([logits for logits, _, _ in parts], dim=1), want)
        assert torch.equal(torch.cat([stats.n_taken for _, _, stats in parts], dim=-1), stats.n_taken)


@torch.no_grad()
@pytest.mark.usefixtures("short_memory")
@each_routing
def test_a_padded_row_is_as_if_alone(routing):
    """Each row of a padded batch gets the logits and experts that its active tokens get alone, wherever the
    others are: on the left, in between, or after its end."""
    model, idx, column = make(**ROUTINGS[routing], n_kv_head=2), tokens(4, 20), torch.arange(20)
    ends = (column >= 7) & (column < 14), (column >= 4) & (column < 16)
    active, cache = torch.stack([column >= 0, *ends, column % 3 > 0]), model.new_cache(4)
    alone = [model(row[real][None], router=decode_router(model)) for row, real in zip(idx, active)]
    for start in ([20], [9], [1] * 9, [3, 6]):
        cache.reset()
        sizes = [*start, *[1] * (20 - sum(start))]
        cut = zip(idx.split(sizes, 1), active.split(sizes, 1))
        parts = [model(part, cache=cache, active=real) for part, real in cut]
        logits = torch.cat([logits for logits, _, _ in parts], dim=1)
        experts = torch.cat([stats.n_taken for _, _, stats in parts], dim=-1)
        assert logits.isfinite().all() and not experts[:, ~active].any()
        for b, (want, _, stats) in enumerate(alone):
            assert close(logits[b, active[b]], want[0])
            assert torch.equal(experts[:, b, active[b]], stats.n_taken[:, 0])


def test_a_refused_text_leaves_the_cache_as_it_was():
    """After a text that is too long for it, the cache goes on from where it was."""
    model, idx = make(), tokens(1, 7)
    cache = model.new_cache(1, max_tokens=6)
    model(idx[:, :5], cache=cache)
    with pytest.raises(ValueError, match=r"7 .* 6 .* cache"):
        model(idx[:, 5:], cache=cache)
    want = model(idx[:, :6], router="online_seqtopk")[0]
    assert close(model(idx[:, 5:6], cache=cache)[0], want[:, -1:])


@pytest.mark.parametrize("router", [name for name, row in ROUTERS.items() if row.causal])
def test_a_cache_promises_the_addresses_of_all_its_tensors(router):
    """Those of each layer's keys, values and Expert Cache too: for one that is left out, torch.compile
    captures no CUDA graph."""
    cache = make(router).new_cache(1, router=router)
    cache.fix_addresses()
    parts = [cache, *cache.kv, *filter(None, cache.expert_caches)]
    tensors = [t for part in parts for t in vars(part).values() if torch.is_tensor(t)]
    assert len(tensors) >= 3 + 2 * len(cache.kv)
    assert {t._dynamo_static_input_type for t in tensors} == {"unguarded"}


def test_bytes_of_the_caches():
    """The KV cache holds 2 * L * B * kv heads * tokens * D numbers; only an online router needs an Expert
    Cache."""
    model = make(n_kv_head=2)
    cache = model.new_cache(3, max_tokens=10)
    assert cache.kv_nbytes == 2 * 2 * 3 * 2 * 10 * 8 * 4
    assert cache.expert_nbytes == sum(experts.nbytes for experts in cache.expert_caches) > 0
    assert model.new_cache(3, router="topk").expert_nbytes == 0


# -------------------- generation -------------------------------------------------------------------------


def joined(chunks: list, field: str = "tokens") -> Tensor:
    return torch.cat([getattr(chunk, field) for chunk in chunks], dim=1)


@torch.no_grad()
def by_hand(model: MoEGPT, idx: Tensor, real: Tensor, n: int, window: int) -> tuple[Tensor, Tensor]:
    """What greedy `generate` must write, (B, P + n), and take it from, (B, n, V): for each token a whole
    forward of each row by itself. `real` (B, P) marks the tokens that are no padding."""
    if idx.shape[1] > window:
        idx, real = idx[:, -(window // 2) :], real[:, -(window // 2) :]
    begin, logits = 0, []
    for _ in range(n):
        rows = [row[keep][None] for row, keep in zip(idx[:, begin:], real[:, begin:])]
        logits.append(torch.cat([model(row, router=decode_router(model))[0][:, -1] for row in rows]))
        if idx.shape[1] - begin == window:
            begin = idx.shape[1] - window // 2
        idx = torch.cat([idx, logits[-1].argmax(-1, keepdim=True)], dim=1)
        real = F.pad(real, (0, 1), value=True)
    return idx, torch.stack(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("name", ROUTERS)
def test_chunks_tell_what_the_model_gave_each_token(name):
    """Temperature 0 writes the argmax of whole forwards under the decode router, and the chunks tell the
    experts of every token, the last one included, and what the logits are made of."""
    model, idx = make(name), tokens(2, 6)
    chunks = list(model.generate(idx, 14, **GREEDY))
    assert [chunk.tokens.shape for chunk in chunks] == [(2, 6)] + [(2, 1)] * 14
    text = joined(chunks)
    assert torch.equal(text, by_hand(model, idx, idx >= 0, 14, 24)[0])
    logits, _, stats = model(text, router=decode_router(model))
    assert torch.equal(joined(chunks, "n_taken"), stats.n_taken.permute(1, 2, 0))  # (B, P + n, L)
    masks = [routing.mask[..., : model.config.n_expert] for routing in stats.routing]
    assert torch.equal(joined(chunks, "mask"), torch.stack(masks, dim=2))  # (B, P + n, L, E)
    assert close(model.head(joined(chunks, "last_hidden")), logits) and joined(chunks, "active").all()


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("prompt, window", [(4, 10), (10, 10), (15, 10), (4, 9), (1, 2), (9, 3), (9, 24)])
def test_past_the_window_the_newest_half_is_fed_again(prompt, window, padded):
    """When the cache is full, text goes on, to the logits, as if the newest half of the window were a new
    prompt; a prompt that does not fit is cut to that half. Padded prompts are continued as if alone."""
    model, idx = make(), tokens(3, prompt)
    lengths = torch.tensor([1, prompt // 2 + 1, prompt] if padded else [prompt] * 3)
    active = torch.arange(prompt) >= prompt - lengths.unsqueeze(1)
    cache = model.new_cache(3, max_tokens=window)
    chunks = list(model.generate(idx, 15, cache, **GREEDY, active=active if padded else None))
    fed = slice(None) if prompt <= window else slice(-(window // 2), None)
    assert torch.equal(chunks[0].tokens, idx[:, fed]) and torch.equal(chunks[0].active, active[:, fed])
    assert len(chunks) == 16 and not chunks[0].n_taken[~active[:, fed]].any()
    text, logits = by_hand(model, idx, active, 15, window)
    assert torch.equal(joined(chunks), text)
    assert close(torch.stack([model.head(chunk.last_hidden[:, -1]) for chunk in chunks[:-1]], dim=1), logits)


def test_a_row_that_stops_leaves_the_others_alone():
    """From its stop token on a row is inactive and gets no experts, the others go on as without it, past the
    window too, and nothing follows the last row's last token."""
    model = make(vocab_size=12)
    idx = tokens(4, 3).clamp(1, 11)

    def write(stop: int | None) -> list:
        cache, g = model.new_cache(4, max_tokens=8), torch.Generator().manual_seed(0)
        return list(model.generate(idx, 100, cache, 1.0, None, None, stop=stop, generator=g))

    plain, chunks = joined(write(None)), write(0)
    text, active = joined(chunks), joined(chunks, "active")
    ends = [row.index(0) for row in plain.tolist()]
    assert len(set(ends)) == 4 and text.shape[1] == max(ends) > 8 + 4
    assert torch.equal(active, torch.arange(max(ends)) < torch.tensor(ends).unsqueeze(1))
    for b, end in enumerate(ends):
        assert torch.equal(text[b, : end + 1], plain[b, : end + 1][: max(ends)])
    experts = joined(chunks, "n_taken")
    assert not experts[~active].any() and (experts[active] > 0).all()
    first = int(model(idx[:1], router="online_seqtopk")[0][0, -1].argmax())
    assert len(list(model.generate(idx[:1], 5, stop=first, **GREEDY))) == 1


def test_sampling_repeats_and_its_narrow_forms_are_greedy():
    """The same seed draws the same text, another seed another; top_k=1 and a tiny top_p are greedy, the
    default is not; where no new token is asked for, none comes."""
    model, idx = make(), tokens(2, 6)

    def text(seed: int = 0, **options) -> list[list[int]]:
        g = torch.Generator().manual_seed(seed)
        return joined(list(model.generate(idx, 9, generator=g, **options))).tolist()

    assert text(1) == text(1) != text(2)
    assert text(top_k=1) == text(top_p=1e-6) == text(temperature=1e-4) == text(temperature=0) != text()
    assert [chunk.tokens.tolist() for chunk in model.generate(idx, 0)] == [idx.tolist()]


def drawn(logits: list[float], n: int = 20000, **options) -> dict[int, float]:
    """The share of each token among n drawn ones."""
    g = torch.Generator().manual_seed(0)
    token = sample_token(torch.tensor([logits]).expand(n, -1), generator=g, **options)
    assert token.shape == (n, 1)
    values, counts = token.unique(return_counts=True)
    return dict(zip(values.tolist(), (counts / n).tolist()))


P = [0.1, 0.5, 0.15, 0.25]
HIGHEST, TWO_HIGHEST = {1: 1.0}, {1: 2 / 3, 3: 1 / 3}


@pytest.mark.parametrize(
    "want, cases",
    [
        (dict(enumerate(P)), [{}, {"top_k": 4, "top_p": 1.0}, {"top_k": 9}]),
        (HIGHEST, [{"top_k": 1}, {"top_p": 0.01}, {"top_p": 0.49}, {"temperature": 0.0}]),
        (TWO_HIGHEST, [{"top_k": 2}, {"top_p": 0.51}, {"top_p": 0.74}]),
        (TWO_HIGHEST, [{"top_p": 0.8, "top_k": 3}]),  # the share is of what top_k has left: 0.9
        ({1: 0.5 / 0.9, 2: 0.15 / 0.9, 3: 0.25 / 0.9}, [{"top_p": 0.76}]),
        ({i: p * p / 0.345 for i, p in enumerate(P)}, [{"temperature": 0.5}]),
        ({1: 0.8, 3: 0.2}, [{"temperature": 0.5, "top_p": 0.9}]),  # 0.25 and 0.0625 of 0.345
    ],
)
def test_tokens_are_drawn_from_the_right_distribution(want, cases):
    """temperature sharpens, top_k keeps the k likeliest, top_p the fewest likeliest that hold the share p."""
    for options in cases:
        assert drawn([math.log(p) for p in P], **options) == pytest.approx(want, abs=0.015), options


def test_ties_are_cut_to_the_right_number():
    """Of equally likely tokens top_p keeps the fewest that hold its share, top_k lets no less likely one in,
    and temperature 0 takes the first."""
    assert [len(drawn([0.0] * 4, top_p=p)) for p in (0.2, 0.3, 0.45, 1.0)] == [1, 2, 2, 4]
    assert {0, 2} <= drawn([2.0, 0.0, 2.0, 1.0], top_k=2).keys() <= {0, 2}
    assert {1} < drawn([0.0, 2.0, 1.0, 1.0], top_k=2).keys() <= {1, 2, 3}
    assert drawn([1.0, 3.0, 3.0], temperature=0).keys() == {1}


def test_a_cache_of_its_own_has_the_room_that_is_needed(monkeypatch):
    """Without a cache, `generate` makes one for the prompt and the new tokens, but not beyond block_size."""
    rooms, new_cache, model = [], MoEGPT.new_cache, make()
    monkeypatch.setattr(MoEGPT, "new_cache", lambda self, B, T: rooms.append(T) or new_cache(self, B, T))
    for prompt, new in ((3, 4), (20, 30), (30, 1), (1, 0)):
        list(model.generate(tokens(1, prompt), new))
    assert rooms == [7, 24, 24, 2]


@pytest.fixture
def compiling(monkeypatch):
    """torch.compile begins anew, and is told its backend by whoever calls this."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled_step.cache_clear()
    yield lambda backend: monkeypatch.setattr("torch.compile", partial(torch.compile, backend=backend))
    compiled_step.cache_clear()


NO_COMPILER = not pick_compiled_decoding("auto", 10**9, torch.device("cpu"), torch.float32)[0]


@pytest.mark.parametrize(
    "backend, n, graphs",
    [
        ("aot_eager", 94, 2),  # 64 and 100 tokens
        pytest.param("inductor", 5, 1, marks=pytest.mark.skipif(NO_COMPILER, reason="needs a C++ compiler")),
    ],
)
def test_a_compiled_step_is_one_graph_for_each_bucket(compiling, backend, n, graphs):
    """The new tokens cost a graph for each size of the bucket, whatever is padded or has been merged, and are
    those that are written without."""
    compiling(backend)
    model, idx, active = make(n_layer=1), tokens(2, 6), torch.ones(2, 6) > 0
    active[0, :2] = False

    def text(compile: bool) -> Tensor:
        cache = model.new_cache(2, 100)
        return joined(list(model.generate(idx, n, cache, **GREEDY, active=active, compile=compile)))

    want = text(compile=False)
    assert torch.equal(text(compile=True), want) and want.shape == (2, 6 + n)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("name", ["null_experts", "top_p"])
def test_other_routers_decode_in_one_graph(name, compiling):
    """With a bound on their pairs, and without."""
    compiling("aot_eager")
    model, idx = make(name, n_layer=1), tokens(2, 6)
    texts = [joined(list(model.generate(idx, 5, **GREEDY, compile=compile))) for compile in (False, True)]
    assert torch.equal(*texts)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# -------------------- counting ---------------------------------------------------------------------------

EMBEDDING, DENSE, GATE = 48 * 32, 3 * 32 * 32, 32 * 8  # hidden width k * H = 32 of the dense layer
SHARED, EXPERT = 3 * 32 * 24, 3 * 32 * 16


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize(
    "D, extra", [(8, {}), (12, {"head_width": 12, "qkv_bias": True, "shared_gate": True})]
)
def test_parameters_and_operations_counted_by_hand(D, extra, tied):
    """n_params is (all, all but the experts that an average token does not use); a tied head counts once. A
    training step costs 3 times 2 per weight of the products that a token goes through, and 4*D per head and
    token in its reach; gains and biases cost nothing."""
    model = make(n_kv_head=2, qk_norm="head", shared_hidden=24, n_dense_layer=1, tie_embeddings=tied, **extra)
    attention = 32 * (4 + 2 + 2) * D + 4 * D * 32  # q, k, v and out
    matrices = 2 * attention + DENSE + GATE + SHARED + (32 if extra else 0)
    vectors = 2 * (2 * 32 + 2 * D) + 32 + (2 * (4 + 2 + 2) * D if extra else 0)  # the gains, and the biases
    rest = matrices + vectors + (1 if tied else 2) * EMBEDDING
    assert model.n_params() == (rest + 8 * EXPERT, rest + 2 * EXPERT)
    for T in (1, 24):
        products = matrices + 2 * EXPERT + EMBEDDING  # the head is the last one
        assert model.flops_per_token(T) == 3 * (2 * products + 2 * 4 * 4 * D * T)


# -------------------- checkpoints ------------------------------------------------------------------------


@each_model
def test_a_checkpoint_brings_everything_back(changes, tmp_path):
    """A model read back has the same config, weights and logits, bit for bit, and `extra` comes with it;
    fields that its config did not have yet get their defaults."""
    model, idx, path = make(**changes), tokens(2, 10), tmp_path / "a.pt"
    for buffer in model.buffers():  # biases, and what routers have learned
        buffer.copy_(3 * torch.rand(buffer.shape))
    extra = {"step": 7, "optimizer": {"state": [torch.arange(3), None, 0.1]}, "best_loss": math.inf}
    save_checkpoint(path, model, **extra)
    checkpoint = load_checkpoint(path)
    assert checkpoint["step"] == 7 and checkpoint["best_loss"] == math.inf
    assert torch.equal(checkpoint["optimizer"]["state"][0], torch.arange(3))
    for name in {"head_width", "qkv_bias", "shared_gate", "dense_hidden"} - changes.keys():
        del checkpoint["config"][name]
    back = MoEGPT.from_checkpoint(checkpoint)
    old, new = model.state_dict(), back.state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert back.config == model.config and torch.equal(model(idx)[0], back(idx)[0])
    assert (back.head.weight is back.embedding.weight) == model.config.tie_embeddings
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("part, name", [("config", "norm_best"), ("model", "blocks.0.mlp.state.cutoff")])
def test_a_checkpoint_from_before_it_had_all_that_decides_its_loss(tmp_path, part, name):
    """It is refused in one line that names the file and what is missing, and not read with a default."""
    model, path = make("expert_threshold"), tmp_path / "old.pt"
    save_checkpoint(path, model)
    old = torch.load(path)
    del old[part][name]
    torch.save(old, path)
    with pytest.raises(ValueError, match=f"(?=.*{path}).*{name}.* is missing, but must be ") as stop:
        MoEGPT.from_checkpoint(load_checkpoint(path))
    assert "\n" not in str(stop.value)


@pytest.fixture
def saved(tmp_path):
    """The path of a tiny model's checkpoint."""
    save_checkpoint(tmp_path / "last.pt", make(n_layer=1, shared_hidden=24), step=1)
    return tmp_path / "last.pt"


def test_a_checkpoint_opens_under_another_router(saved):
    """from_checkpoint changes the routing and keeps the weights."""
    checkpoint, idx = load_checkpoint(saved), tokens(2, 10)
    topk = MoEGPT.from_checkpoint(checkpoint, router="topk", max_experts=3)
    assert (topk.config.router, topk.config.max_experts) == ("topk", 3)
    assert torch.equal(topk(idx)[0], MoEGPT.from_checkpoint(checkpoint)(idx, router="topk")[0])


@pytest.mark.parametrize(
    "sizes",
    [{}, {"n_expert": 1, "k": 1}, {"n_kv_head": 2, "head_width": 10, "tie_embeddings": True}]
    + [{"shared_hidden": 24, "shared_gate": True, "n_dense_layer": 1, "n_layer": 3}],
    ids=str,
)
def test_the_weights_are_counted_before_a_model_is_made(sizes):
    """All but the vectors."""
    config = MoEConfig(vocab_size=48, **sizes)
    matrices = [weight.numel() for weight in MoEGPT(config).parameters() if weight.dim() > 1]
    assert config.n_matrix_weights == sum(matrices)


ARCHITECTURES = (
    "n_embd=64; n_layer=2; n_layer=3 n_dense_layer=1; vocab_size=50; n_expert=16; n_expert=1 k=1; "
    "n_hidden=24; shared_hidden=0; shared_hidden=32; qk_norm=head; n_kv_head=2; head_width=16; "
    "qkv_bias=true; shared_gate=true; tie_embeddings=true"
)


@pytest.mark.parametrize("change", ARCHITECTURES.split("; "))
def test_another_architecture_is_refused(saved, change):
    """Weights that do not fit the changed config are a ValueError of one line that says which."""
    changes, _ = parse([f"--{setting}" for setting in change.split()], MoEConfig)
    with pytest.raises(ValueError, match=r"\A.*(checkpoint|last.pt).*\Z") as refused:
        MoEGPT.from_checkpoint(load_checkpoint(saved), **changes)
    assert len(str(refused.value)) < 300


FOREIGN = [b"import torch\n", b"0.1 0.2", b"loss 3.2", b"{}", b"h", b"t", b"R", b"just some words"]
FOREIGN += [b"\x80\x02.", b"\xc2\x80\x02.", b"\xe9", b"\xc3\xa9"]
FOREIGN += [random.Random(seed).randbytes(n) for n in (1, 3, 10, 100, 5000) for seed in range(10)]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_and_foreign_files_are_refused(saved):
    """A missing, empty or truncated checkpoint, a folder, text, random bytes, and what other programs save
    with torch are ValueErrors of one line that names the path and what to do."""
    whole, weights, path = saved.read_bytes(), make().state_dict(), re.escape(str(saved))
    cuts = 0, 1, 2, 10, 100, 1000, len(whole) // 2, len(whole) - 1000, len(whole) - 1
    objects = weights, {"model": weights}, {"format": 1}, torch.zeros(3), [1, 2], None, saved.parent
    for content in (*(whole[:n] for n in cuts), *FOREIGN, *objects, "missing", "folder"):
        saved.unlink(missing_ok=True)
        if content == "folder":
            saved.mkdir()
        elif isinstance(content, bytes):
            saved.write_bytes(content)
        elif content != "missing":
            torch.save(content, saved)
        with pytest.raises(ValueError, match=rf"\A.*{path}.*\Z") as refused:
            load_checkpoint(saved)
        assert len(str(refused.value)) > len(str(saved)) + 20


@pytest.mark.parametrize("where", ["write", "flush", "content"])
def test_a_failing_write_leaves_the_old_file(where, saved, monkeypatch):
    """Whatever goes wrong while writing, the error is raised and the file that was there is still whole."""

    def disk_is_full(*args):
        if where == "write":
            args[1].write(b"half")
        raise OSError(28, "No space left on device")

    old, extra = saved.read_bytes(), {"bad": lambda: None} if where == "content" else {}  # cannot be pickled
    if where != "content":
        monkeypatch.setattr("torch.save" if where == "write" else "os.fsync", disk_is_full)
    with pytest.raises(Exception, match=r"No space left|pickle"):
        save_checkpoint(saved, make(seed=1), **extra)
    assert saved.read_bytes() == old
    monkeypatch.undo()
    save_checkpoint(saved, make(seed=1), step=2)
    assert load_checkpoint(saved)["step"] == 2


# -------------------- what is refused --------------------------------------------------------------------

NEEDS = {  # why a plain model cannot be under these
    "remoe": "router remoe needs score_fn=relu, but score_fn is softmax: train with --score_fn=relu",
    "expert_threshold": "router expert_threshold needs score_fn=sigmoid, .* train with --score_fn=sigmoid",
    "null_experts": "router null_experts needs norm_topk=true, .* is False: train with --norm_topk=true",
}
RAW = ("remoe", "expert_threshold")
NEEDS_RAW = "router {} needs norm_best=0, but norm_best is None: train with --norm_best=0"
AT_LEAST_1 = "n_layer n_head n_embd n_expert n_hidden head_width dense_hidden n_kv_head".split()
AT_LEAST_0 = "shared_hidden n_dense_layer vocab_size n_null".split()
NULLS = {"router": "null_experts", "norm_topk": True}
SETTINGS_REFUSED = [
    *(({name: 0}, f"{name} is 0, .* at least 1.*") for name in AT_LEAST_1),
    *(({name: -1}, f"{name} is -1, .* at least 0") for name in AT_LEAST_0),
    *(({"router": name}, message) for name, message in NEEDS.items()),
    *(({"router": n, **SETTINGS[n], "norm_best": None}, NEEDS_RAW.format(n)) for n in RAW),
    *(({"norm_best": n}, f"norm_best is {n}, .* from 0 to n_expert = 8, or none") for n in (-1, 9)),
    ({"n_embd": -8}, "n_embd is -8, .* at least 1"),
    ({"block_size": 1}, "block_size is 1, .* at least 2"),
    ({"n_dense_layer": 2}, "n_dense_layer is 2, .* below n_layer = 2 .*"),
    ({"k": 9}, "k is 9, .* 1 .* n_expert = 8"),
    ({"k": 0}, "k is 0, .* 1 .* n_expert = 8"),
    ({"min_experts": 3}, "min_experts is 3, .* 0 .* k = 2"),
    ({"min_experts": -1}, "min_experts is -1, .* 0 .* k = 2"),
    ({"max_experts": 1}, "max_experts is 1, .* k = 2 .* n_expert = 8.*"),
    ({"max_experts": 9}, "max_experts is 9, .* k = 2 .* n_expert = 8.*"),
    ({"n_embd": 40, "n_head": 3}, "n_embd is 40, .* multiple of n_head = 3"),
    ({"n_embd": 24, "n_head": 8}, "n_embd / n_head is 3, .* even.*"),
    ({"head_width": 7}, "head_width is 7, .* even.*"),
    ({"n_kv_head": 3}, "n_kv_head is 3, .* divisor of n_head = 4"),
    ({"n_kv_head": 8}, "n_kv_head is 8, .* divisor of n_head = 4"),
    ({"n_embd": 36, "n_head": 2}, "n_embd is 36, .* multiple of 8"),
    ({"n_hidden": 20}, "n_hidden is 20, .* multiple of 8"),
    ({"router": "topp"}, f"router is topp, .* {', '.join(ROUTERS)}, .* file .* FILE.py"),
    ({"score_fn": "tanh"}, "score_fn is tanh, .* softmax, sigmoid, relu"),
    ({"qk_norm": "yes"}, "qk_norm is yes, .* none, head, full"),
    ({"mass": 0.0}, "mass is 0.0, .* above 0 and at most 1"),
    ({"mass": 1.5}, "mass is 1.5, .* above 0 and at most 1"),
    ({"n_null": 4}, "n_null is 4, .* 0 under router seqtopk"),
    (NULLS, "n_null is 0, .* at least 1 under router null_experts"),
    (NULLS | {"n_null": 5}, "n_null is 5, .* multiple of 4.*"),
    *(({name: 0}, f"{name} is 0, .* above 0") for name in ("rope_theta", "norm_eps")),
]


@pytest.mark.parametrize("changes, message", SETTINGS_REFUSED, ids=str)
def test_impossible_settings_are_refused(changes, message):
    """The ValueError is one line with the key, the value and what is allowed or what to do."""
    with pytest.raises(ValueError, match=rf"\A{message}\Z"):
        MoEConfig(**TINY | changes)


def under(name: str):
    return lambda model: model.new_cache(1, router=name)


def sampled(**options):
    return lambda model: sample_token(torch.zeros(1, 4), **options)


NOT_CAUSAL = [name for name, row in ROUTERS.items() if not row.causal]
CALLS_REFUSED = [
    (lambda model: model(tokens(1, 4), active=torch.ones(1, 4) > 0), "active needs a cache.*"),
    (
        lambda model: model(tokens(1, 4), cache=model.new_cache(1), router="topk"),
        "router is topk, .* online_seqtopk, the cache's.*",
    ),
    (lambda model: model(tokens(1, 25)), "25 .* 24 .* block_size.*"),
    (lambda model: model.new_cache(1, max_tokens=1), "max_tokens is 1, .* at least 2"),
    (lambda model: next(model.generate(tokens(1, 0), 1)), ".* prompt is 0, .* at least 1"),
    (lambda model: MoEGPT(MoEConfig()), "vocab_size is 0, .* at least 1"),
    *((under(name), f"router is {name}, .* topk, online_seqtopk.*") for name in NOT_CAUSAL),
    *((under(name), message) for name, message in NEEDS.items()),
    (
        lambda model: under("expert_threshold")(make(score_fn="sigmoid", norm_best=0)),
        "router is expert_threshold, .* seqtopk, .* learned .*",
    ),
    (
        lambda model: make(score_fn="sigmoid")(tokens(1, 4), router="expert_threshold"),
        "router is expert_threshold, .* learned .*",
    ),
    (sampled(temperature=-0.1), "temperature is -0.1, .* at least 0"),
    (sampled(temperature=math.nan), "temperature is nan, .* at least 0"),
    (sampled(top_k=0), "top_k is 0, .* at least 1"),
    (sampled(top_p=0.0), "top_p is 0.0, .* above 0 and at most 1"),
    (sampled(top_p=1.01), "top_p is 1.01, .* above 0 and at most 1"),
]


@pytest.mark.parametrize("call, message", CALLS_REFUSED)
def test_what_cannot_be_done_is_refused(call, message):
    """Padding without a cache, what does not fit, a router that is not here or cannot decode this model, and
    impossible ways to sample are ValueErrors of one line."""
    with pytest.raises(ValueError, match=rf"\A{message}\Z"):
        call(make())


# -------------------- number formats and compilation -----------------------------------------------------


@each_variant
def test_bfloat16_weights(variant):
    """With all weights in bfloat16 losses and gradients are finite and near float32's."""
    model, idx, targets = make("topk", **VARIANTS[variant]), tokens(2, 24), tokens(2, 24, seed=1)
    want = model(idx, targets)[1]
    (logits, *_), (_, loss, stats) = model.bfloat16()(idx), model(idx, targets)
    assert logits.dtype == loss.dtype == stats.balance_loss.dtype == stats.z_loss.dtype == torch.float32
    assert close(loss, want, 0.05)
    assert_finite_gradients(model, loss + stats.balance_loss + stats.z_loss, torch.bfloat16)


def test_autocast_leaves_the_gate_in_float32(monkeypatch):
    """Under bfloat16 autocast the router sees scores computed in float32 from the layer's input; losses and
    gradients are finite and near float32's."""
    model, idx, seen = make(n_layer=1, shared_hidden=24), tokens(2, 24), []
    want, layer = model(idx, idx)[1], model.blocks[0].mlp
    layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        _, loss, stats = model(idx, idx)
    assert_finite_gradients(model, loss + stats.balance_loss + stats.z_loss)
    _, scores, mask = stats.routing[0]
    assert scores.dtype == stats.z_loss.dtype == stats.balance_loss.dtype == torch.float32
    assert close(scores, F.linear(seen[0].float(), layer.gate.weight).softmax(-1), 1e-6)
    assert torch.equal(mask, ref_seqtopk(scores, 2)) and close(loss, want, 0.1) and loss != want


def test_decoding_under_autocast():
    """A float32 model that decodes under bfloat16 autocast keeps its past in bfloat16; its logits are near
    those without a cache."""
    model, idx = make(), tokens(2, 20)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cache = model.new_cache(2)
        assert cache.kv[0].k.dtype == torch.bfloat16
        steps = torch.cat([model(token, cache=cache)[0] for token in idx.split(1, dim=1)], dim=1)
        assert close(steps, model(idx, router=cache.router)[0], 0.05)
        assert len(list(model.generate(idx[:, :4], 3))) == 4


@each_routing
def test_who_has_a_known_budget_never_looks_at_the_data(routing):
    """Under a router with a known budget no shape and no branch of a training step, clipping and AdamW
    included, depends on a number: nothing waits for the device. Otherwise the pairs have to be counted."""

    def step() -> None:
        model, idx = make(**ROUTINGS[routing], shared_hidden=24), torch.zeros(2, 24, dtype=torch.int64)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        with torch.autocast("cpu", torch.bfloat16):  # torch knows grouped_mm's shapes in no other format
            _, loss, stats = model(idx, idx)
        (loss + stats.balance_loss + stats.z_loss).backward()
        assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    with FakeTensorMode():  # tensors have a shape and no numbers: asking for a number is an error
        if routing in BUDGETED:
            step()
        else:
            with pytest.raises(DynamicOutputShapeException):
                step()


@pytest.mark.parametrize("name", ROUTERS)
def test_a_compiled_training_step(name):
    """Loss and gradients in bfloat16 are the eager ones; forward and loss are one graph, which counts the
    pairs. One router of each kind has the model compiled, the others a layer, which is quicker."""
    model, idx = make(name, n_layer=1).bfloat16(), tokens(2, 24)
    layer, x = model.blocks[0].mlp, torch.randn(2, 24, 32).bfloat16()

    def loss_of_model() -> Tensor:
        _, loss, stats = model(idx, idx)
        return loss + 0.01 * stats.balance_loss

    def loss_of_layer() -> Tensor:
        return layer(x, NOWHERE._replace(row=ROUTERS[name]), None)[0].square().mean()

    torch._dynamo.reset()
    loss_of = loss_of_model if name in ("seqtopk", "expert_threshold") else loss_of_layer
    # aot_eager captures forward and backward like the default, and spares a minute of C++ compilation
    graphs = CompileCounterWithBackend("aot_eager")
    loss, want = as_graph(loss_of, backend=graphs)(), loss_of()
    assert graphs.frame_count == 1
    assert loss.item() == pytest.approx(want.item(), rel=0.01)
    gradients = [torch.autograd.grad(y, [layer.w_in])[0].float() for y in (loss, want)]
    assert_near(gradients[:1], gradients[1:], 0.05)


def test_a_model_compiled_in_parts(monkeypatch):
    """One graph for all blocks, one each for loss and statistics, used to learn only; the gradients are the
    eager ones, the same when blocks are computed again going backward, and the eager ones once more when
    `uncompile` has undone it."""
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr("model.as_graph", partial(as_graph, backend=graphs, fullgraph=True))
    torch._dynamo.reset()
    model, idx = make(n_layer=3).bfloat16(), tokens(2, 24)

    def gradients() -> list[Tensor]:
        _, loss, stats = model(idx, idx)
        return [g.float() for g in torch.autograd.grad(loss + stats.balance_loss, list(model.parameters()))]

    want = gradients()
    model.compile()
    list(model.generate(idx, 3))
    assert graphs.frame_count == 0
    compiled = gradients()
    assert_near(compiled, want, 0.05)
    train.prepare_blocks(model, train.TrainConfig(checkpoint_activations=True), compiled=True)
    assert all(map(torch.equal, gradients(), compiled))
    assert graphs.frame_count == 3
    model.uncompile()
    assert all(map(torch.equal, gradients(), want))
    assert graphs.frame_count == 3 and not any("forward" in vars(block) for block in model.blocks)


class NothingRead(TorchDispatchMode):
    """Fails at an operation whose result the host has to wait for on a GPU."""

    aten = torch.ops.aten
    reads = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in self.reads, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("short_memory")
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("router", ["topk", "online_seqtopk"])
def test_a_decode_step_reads_nothing_back(router, batch_size):
    """Prefill and steps of generation never wait for the device, whichever way the experts run."""
    model = make(router)
    with NothingRead():
        assert len(list(model.generate(tokens(batch_size, 6), 14, model.new_cache(batch_size, 24)))) == 15
    with pytest.raises(AssertionError, match="waits for the device"), NothingRead():
        torch.ones(3).nonzero()
