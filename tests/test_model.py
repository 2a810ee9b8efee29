"""The model against the slow reference, and what it promises about decoding, causality and checkpoints."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from model import (
    ROUTERS,
    Context,
    MoE,
    MoEConfig,
    MoEGPT,
    load_checkpoint,
    rope_angles,
    rotate,
    run_experts,
    run_few_pairs,
    sample_token,
    save_checkpoint,
)
from router import pseudo_candidates
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

# ---------------------------------------------------------------------------------------------------
# Tiny models

TINY = {
    "vocab_size": 48,
    "block_size": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 32,
    "n_expert": 8,
    "k": 2,
    "n_hidden": 16,
}

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
    "wide_bounds": {"min_experts": 0, "max_experts": 8},
}

ONLINE = {
    "topk": {"router": "topk"},
    "seqtopk": {"router": "seqtopk"},
    "strict": {"router": "online_seqtopk"},
    "unstrict": {"router": "online_seqtopk", "strict": False},
}

each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_online = pytest.mark.parametrize("online", ONLINE)
each_router = pytest.mark.parametrize("name", ROUTERS)


def make(seed: int = 0, **changes) -> MoEGPT:
    """A tiny model with weights so large that any error shows in the logits, and a gate with favourites."""
    torch.manual_seed(seed)
    model = MoEGPT(MoEConfig(**TINY | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(30 if "gate" in name else 5)
    return model


def make_under(router: str, seed: int = 0, **changes) -> MoEGPT:
    """A tiny model that this router can route; cutoffs that give a token 1 to 4 experts."""
    model = make(seed, **{"router": router, **SETTINGS.get(router, {}), **changes})
    if ROUTERS[router].cutoffs:
        for layer in model.expert_layers():
            layer.bias.copy_(torch.linspace(0.1, 0.4, 8))
    return model


def tokens(B: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(TINY["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


def decode_router(model: MoEGPT) -> str:
    return ROUTERS[model.config.router].decode


def close(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> bool:
    return got.shape == want.shape and (got - want).abs().max() < tolerance


# ---------------------------------------------------------------------------------------------------
# Experts


def draw_mask(kind: str, S: int, E: int, g: torch.Generator) -> Tensor:
    """mask (S, E): a random number of experts per token, and then what `kind` says."""
    rank = torch.rand(S, E, generator=g).argsort(-1)
    mask = rank < torch.randint(min(5, E + 1), (S, 1), generator=g)
    if kind == "topk":
        mask = rank < min(2, E)
    elif kind == "idle_experts":
        mask[:, [0, E // 2, E - 1]] = False
    elif kind == "one_gets_all":
        mask = torch.arange(E).expand(S, E) == E // 2
    elif kind == "idle_tokens":
        mask[[0, -1]] = False
    elif kind == "no_pair":
        mask[:] = False
    elif kind == "all_pairs":
        mask[:] = True
    return mask


KINDS = "topk ragged idle_experts one_gets_all idle_tokens no_pair all_pairs".split()
SIZES = {
    "counted": lambda n: None,
    "exact": lambda n: n,
    "one_spare": lambda n: n + 1,
    "spare": lambda n: n + 23,
}
SHAPES = {"some": (17, 6), "one_token": (1, 6), "many_experts": (12, 64), "one_expert": (5, 1)}


@pytest.fixture
def poisoned_memory():
    """Memory that nobody has written reads as NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def draw_experts(kind: str, S: int, E: int, C: int = 16, H: int = 8) -> tuple[Tensor, list[Tensor], Tensor]:
    """mask (S, E); x (S, C), weight (S, E), w_in (E, C, 2H), w_out (E, H, C); the gradient of y (S, C)."""
    g = torch.Generator().manual_seed(S * E)
    mask = draw_mask(kind, S, E, g)
    inputs = [torch.randn(S, C, generator=g), torch.rand(S, E, generator=g)]
    inputs += [0.5 * torch.randn(E, C, 2 * H, generator=g), 0.5 * torch.randn(E, H, C, generator=g)]
    return mask, inputs, torch.randn(S, C, generator=g)


def with_gradients(run, inputs: list[Tensor], push: Tensor) -> dict[str, Tensor]:
    """y = run(*inputs), and the gradients of (y * push).sum() by name."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y = run(*leaves)
    gradients = torch.autograd.grad((y * push).sum(), leaves, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(("x", "weight", "w_in", "w_out"), gradients))}


def assert_near(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor within `tolerance` of its own norm; a tensor of zeros exactly."""
    for name in want:
        error = (got[name].float() - want[name]).norm()
        assert error <= tolerance * want[name].norm(), f"{name}: {error} of {want[name].norm()}"


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_run_experts_equals_the_loop_over_tokens_and_experts(kind, shape):
    """Values and the gradients of all inputs are those of the reference, for every mask, size and dtype; what
    is not routed has a gradient of exactly zero."""
    S, E = SHAPES[shape]
    mask, inputs, push = draw_experts(kind, S, E)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        rounded = [tensor if i == 1 else tensor.to(dtype) for i, tensor in enumerate(inputs)]
        want = with_gradients(
            lambda x, weight, w_in, w_out: ref_run_experts(x, mask, weight, w_in, w_out),
            [tensor.float() for tensor in rounded],
            push,
        )
        for size in SIZES.values():
            n = size(int(mask.sum()))
            got = with_gradients(
                lambda x, weight, *w, n=n: run_experts(x, mask, weight, *w, n), rounded, push
            )
            assert got["y"].dtype == torch.float32
            assert_near(got, want, tolerance)
            idle = ~mask.any(0)
            assert not got["w_in"][idle].any() and not got["w_out"][idle].any()
            assert not got["weight"][~mask].any() and not got["x"][~mask.any(1)].any()


@torch.no_grad()
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("run", [run_experts, run_few_pairs])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_both_ways_equal_the_loop(kind, shape, run):
    """When decoding, too, the output is the reference's, for every mask, size and dtype, and never NaN."""
    mask, inputs, _ = draw_experts(kind, *SHAPES[shape])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        x, weight, w_in, w_out = (tensor if i == 1 else tensor.to(dtype) for i, tensor in enumerate(inputs))
        want = ref_run_experts(x.float(), mask, weight, w_in.float(), w_out.float())
        for size in SIZES.values():
            got = run(x, mask, weight, w_in, w_out, size(int(mask.sum())))
            assert got.dtype == torch.float32 and got.isfinite().all()
            assert (got - want).norm() <= tolerance * want.norm()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("kind", ["ragged", "idle_tokens", "idle_experts", "no_pair"])
def test_spare_rows_change_nothing_however_large_the_numbers(kind):
    """With inputs around 10^4 spare rows move neither values nor gradients, and nothing is NaN."""
    mask, inputs, push = draw_experts(kind, 17, 6)
    inputs[0], inputs[2], inputs[3] = 1e4 * inputs[0], 1e4 * inputs[2], 1e4 * inputs[3]
    n = int(mask.sum())
    want, *others = (
        with_gradients(lambda x, weight, *w, size=size: run_experts(x, mask, weight, *w, size), inputs, push)
        for size in (None, n, n + 1, n + 500)
    )
    assert all(tensor.isfinite().all() for tensor in want.values())
    for got in others:
        assert_near(got, want, 1e-6)


# ---------------------------------------------------------------------------------------------------
# The MoE layer

NOWHERE = Context(ROUTERS["topk"], angles=None, visible=None, active=None, pos=0)  # all that MoE looks at


def moe_layer(**changes) -> MoE:
    return make(n_layer=1, **changes).blocks[0].mlp


def parameters_of(layer: MoE) -> dict[str, Tensor]:
    return dict(layer.named_parameters()) | dict(layer.named_buffers())


@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("shared_hidden", [0, 24], ids=["", "shared"])
@pytest.mark.parametrize("norm_topk", [False, True], ids=["", "norm_topk"])
@pytest.mark.parametrize("score_fn", ["softmax", "sigmoid"])
def test_the_layer_equals_its_reference(score_fn, norm_topk, shared_hidden, biased):
    """Output, routing and the gradients of all parameters are the reference's, whatever the options."""
    layer = moe_layer(score_fn=score_fn, norm_topk=norm_topk, shared_hidden=shared_hidden)
    x, push = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    if biased:
        layer.bias += 0.3 * torch.randn(8)
    got, routing = layer(x, NOWHERE, None)
    parameters = parameters_of(layer)
    rows = [ref_moe(row, parameters, layer.config, lambda scores: ref_topk(scores, 2)) for row in x]
    want, scores, mask = (torch.stack(part) for part in zip(*rows))
    assert close(got, want, 1e-5)
    leaves = list(layer.parameters())
    for mine, reference in zip(
        torch.autograd.grad((got * push).sum(), leaves), torch.autograd.grad((want * push).sum(), leaves)
    ):
        assert (mine - reference).norm() <= 1e-5 * reference.norm()
    assert torch.equal(routing.mask, mask) and close(routing.scores, scores)
    assert close(routing.logits, x @ layer.gate.weight.T)


def test_the_bias_selects_and_never_weighs():
    """A bias makes every token choose an expert, and that expert's output is still multiplied by its plain
    score."""
    layer = moe_layer()
    x = torch.randn(2, 9, 32)
    free = layer(x, NOWHERE, None)[1]
    layer.bias[5] = 10.0
    y, forced = layer(x, NOWHERE, None)
    assert free.mask[..., 5].sum() < forced.mask[..., 5].sum() == 18
    scores = (x @ layer.gate.weight.T).softmax(-1).flatten(0, 1)
    pairs = ref_topk((scores + layer.bias).unsqueeze(0), 2).squeeze(0)
    want = ref_run_experts(x.flatten(0, 1), pairs, scores, layer.w_in, layer.w_out)
    assert close(y.flatten(0, 1), want, 1e-5)


# ---------------------------------------------------------------------------------------------------
# The whole model


@torch.no_grad()
@each_variant
def test_the_model_equals_its_reference(variant):
    """The logits are those of a forward written with loops over tokens, heads and experts."""
    model = make(**VARIANTS[variant])
    config, idx = model.config, tokens(2, 10)
    got = model(idx)[0]
    for row in range(2):
        want = ref_model(
            model,
            idx[row],
            lambda scores: ref_seqtopk(scores, config.k, config.min_experts, config.max_experts),
        )
        assert close(got[row], want)


@torch.no_grad()
@pytest.mark.parametrize(
    "name, reference",
    {"topk": ref_topk, "online_seqtopk": ref_online_seqtopk, "expert_choice": ref_expert_choice}.items(),
)
def test_the_router_of_the_config_or_of_the_call_routes(name, reference):
    """`router` decides who routes: the config's by default, the call's instead if it names one."""
    idx = tokens(1, 10)
    model = make(router=name)
    want = ref_model(model, idx[0], lambda scores: reference(scores, 2))
    assert close(model(idx)[0][0], want)
    assert close(make(router="seqtopk")(idx, router=name)[0][0], want)
    assert not close(make(router="seqtopk")(idx)[0][0], want)


def test_the_loss_is_the_mean_over_the_targets_that_count():
    """The loss is the mean cross-entropy in nats over the targets that are not -1."""
    model, idx, targets = make(), tokens(2, 10), tokens(2, 10, seed=1)
    targets[0, 3:] = -1
    logits, loss, _ = model(idx, targets)
    probability = logits.exp() / logits.exp().sum(-1, keepdim=True)
    chosen = [probability[b, t, targets[b, t]] for b in range(2) for t in range(10) if targets[b, t] >= 0]
    assert len(chosen) == 13 and close(loss, -torch.stack(chosen).log().mean(), 1e-5)


def test_the_statistics_are_those_of_the_layers():
    """Losses are means over the layers that have experts; load and experts have one row for each of these."""
    model, seen = make(n_layer=4, n_dense_layer=1), []
    for block in model.blocks[1:]:
        block.mlp.register_forward_hook(lambda layer, args, result: seen.append(result[1]))
    stats = model(tokens(2, 10))[2]
    assert len(seen) == 3
    for layer, routing in enumerate(seen):
        assert torch.equal(stats.load[layer], routing.mask.sum((0, 1)))
        assert torch.equal(stats.experts[layer], routing.mask.sum(-1))
    share = torch.stack([routing.mask.sum((0, 1)) / routing.mask.sum() for routing in seen])  # (L, E)
    probability = torch.stack([routing.scores.mean((0, 1)) for routing in seen])
    assert close(stats.balance_loss, 8 * (share * probability).sum(-1).mean(), 1e-5)
    z_loss = torch.stack([routing.logits.exp().sum(-1).log().square().mean() for routing in seen]).mean()
    assert close(stats.z_loss, z_loss, 1e-3)
    assert (stats.load.sum(-1) == 2 * 10 * 2).all() and (stats.experts != 2).any()


def test_new_weights_are_gpt2s():
    """All matrices start with deviation 0.02, those that add to the residual stream with 0.02 / sqrt(2L);
    gains start at 1 and biases at 0."""
    torch.manual_seed(0)
    changes = {"n_embd": 64, "shared_hidden": 32, "n_dense_layer": 1, "qkv_bias": True}
    model = MoEGPT(MoEConfig(**TINY | changes))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
        else:
            residual = "w_out" in name or "attention.out" in name
            assert float(parameter.detach().std()) == pytest.approx(0.01 if residual else 0.02, rel=0.15), (
                name
            )


def test_the_dense_twin_has_no_experts():
    """With n_expert=1 there is no gate, no layer in the statistics and no Expert Cache; all parameters are
    active, as many as in the MoE but for its gates."""
    dense, moe = make(n_expert=1, k=1, n_hidden=32), make(k=2, n_hidden=16)
    idx = tokens(2, 10)
    logits, loss, stats = dense(idx, idx)
    loss.backward()
    assert not any("gate" in name for name, _ in dense.named_parameters())
    assert close(logits[1], ref_model(dense, idx[1], None))
    assert stats.load.shape == (0, 1) and stats.experts.shape == (0, 2, 10)
    assert stats.balance_loss == stats.z_loss == 0 and stats.routing == []
    assert dense.new_cache(2).expert_nbytes == 0
    assert [chunk.experts.shape for chunk in dense.generate(idx, 1)] == [(2, 10, 0), (2, 1, 0)]
    total, active = dense.n_params()
    assert total == active == moe.n_params()[1] - 2 * 8 * 32


def test_one_expert_may_get_everything():
    """A gate that sends all tokens to one expert, with scores of exactly 1 and 0, gives finite losses and
    gradients."""
    for changes in ({}, {"router": "topk", "k": 1}, {"norm_topk": True}, {"score_fn": "sigmoid"}):
        model, idx = make(**changes), tokens(2, 10)
        with torch.no_grad():
            model.embedding.weight[:, 0] = 20  # so every token has one feature in common
            for block in model.blocks:
                block.mlp_norm.weight.fill_(1)
                block.mlp.gate.weight[:, 0] = -1e3
                block.mlp.gate.weight[3, 0] = 1e3
        _, loss, stats = model(idx, idx)
        assert (stats.load[:, 3] == 20).all()
        (loss + stats.balance_loss + stats.z_loss).backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_no_expert_may_want_a_token():
    """Sigmoid scores that are all exactly 0 still give finite losses and gradients."""
    model, idx = make(score_fn="sigmoid", norm_topk=True), tokens(2, 10)
    with torch.no_grad():
        model.embedding.weight[:, 0] = 20
        for block in model.blocks:
            block.mlp_norm.weight.fill_(1)
            block.mlp.gate.weight[:, 0] = -1e3
    _, loss, stats = model(idx, idx)
    (loss + stats.balance_loss).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# ---------------------------------------------------------------------------------------------------
# Who sees whom

LOOKS = {name: {"router": name} for name in ROUTERS} | {"unstrict": ONLINE["unstrict"]}


@torch.no_grad()
@pytest.mark.parametrize("name", LOOKS)
def test_who_sees_the_future_and_the_other_sequences(name):
    """A new future token leaves earlier logits alone under causal routers and moves them under the others;
    another sequence is moved under batchtopk only."""
    model = make_under(**LOOKS[name])
    idx, changed = tokens(2, 24), tokens(2, 24)
    changed[0, 12:] = tokens(1, 12, seed=1)
    moved = (model(idx)[0] - model(changed)[0]).abs().amax(-1)  # (B, T)
    past, other = moved[0, :12].max(), moved[1].max()
    assert moved[0, 12:].min() > 1e-3
    assert past < 1e-5 if ROUTERS[model.config.router].causal else past > 1e-3
    assert other > 1e-3 if name == "batchtopk" else other < 1e-5


def test_attention_knows_relative_positions_only():
    """Rotary scores depend on the distance of query and key, and change with it; rotation keeps norms."""
    config = MoEConfig(**TINY)
    x, q, k = (torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    position = torch.tensor([[0, 1, 2, 5, 11, 23]])

    def rotated(x: Tensor, shift: int) -> Tensor:
        return rotate(x, rope_angles(position + shift, config))

    scores = rotated(q, 0) @ rotated(k, 0).mT
    for shift in (1, 7, 100):
        assert close(rotated(q, shift) @ rotated(k, shift).mT, scores, 1e-4)
        assert not close(rotated(q, shift) @ rotated(k, 0).mT, scores, 0.1)
    assert close(rotated(x, 3).norm(dim=-1), x.norm(dim=-1), 1e-5)
    assert torch.equal(rotated(x, 0)[:, :, 0], x[:, :, 0])


# ---------------------------------------------------------------------------------------------------
# Routers without a budget, and what they need

UNBUDGETED = {  # how the reference selects from biased scores of the whole layer
    "top_p": lambda scores, layer: ref_top_p(scores, 2, 0.7),
    "expert_threshold": lambda scores, layer: ref_expert_threshold(scores - layer.bias, 1 - layer.bias),
    "remoe": ref_remoe,
    "null_experts": lambda scores, layer: ref_null_experts(scores, 2, 4),
}
ROUTERLESS = {  # why a plain model cannot be under these
    "remoe": "router remoe needs score_fn=relu, but score_fn is softmax: give --score_fn=relu",
    "expert_threshold": "router expert_threshold needs score_fn=sigmoid, .* give --score_fn=sigmoid",
    "null_experts": "router null_experts needs norm_topk=true, but norm_topk is False: give --norm_topk=true",
}


@pytest.mark.parametrize("name", UNBUDGETED)
def test_layers_without_a_budget_equal_their_reference(name):
    """Output and gradients are the reference's where tokens have any number of experts, under two routers
    none at times, and what is null is neither computed nor counted."""
    model = make_under(name, n_layer=1)
    layer, x, push = model.blocks[0].mlp, torch.randn(2, 9, 32) / 4, torch.randn(2, 9, 32)
    layer.bias[8:] += 0.1
    context = NOWHERE._replace(router=ROUTERS[name])
    got, routing = layer(x, context, None)
    parameters = parameters_of(layer)
    rows = [ref_moe(row, parameters, layer.config, lambda s: UNBUDGETED[name](s, layer)) for row in x]
    want, scores, mask = (torch.stack(part) for part in zip(*rows))
    assert torch.equal(routing.mask, mask) and close(routing.scores, scores) and close(got, want, 1e-5)
    assert mask.shape[-1] == 8 + layer.config.n_null
    counts = set(mask[..., :8].sum(-1).flatten().tolist())
    assert len(counts) > 2 and (
        name in ("top_p", "remoe") or min(counts) == 0
    )  # of these no token of x has none
    leaves = list(layer.parameters())
    for mine, reference in zip(
        torch.autograd.grad((got * push).sum(), leaves), torch.autograd.grad((want * push).sum(), leaves)
    ):
        assert (mine - reference).norm() <= 1e-5 * reference.norm()


@pytest.mark.parametrize("name", UNBUDGETED)
def test_statistics_count_what_is_computed(name):
    """Load and experts are of real experts; the balance loss is over all that a token can choose."""
    model, idx = make_under(name), tokens(2, 24)
    _, _, stats = model(idx, idx)
    mask, scores = (torch.stack([getattr(r, name) for r in stats.routing]) for name in ("mask", "scores"))
    assert stats.load.shape == (2, 8) and mask.shape == (2, 2, 24, 8 + model.config.n_null)
    assert torch.equal(stats.load, mask[..., :8].sum((1, 2)))
    assert torch.equal(stats.experts, mask[..., :8].sum(-1))
    share = mask.sum((1, 2)) / mask.sum((1, 2, 3))[:, None]
    P = (scores / scores.sum(-1, keepdim=True).clamp(min=1e-9)).mean((1, 2))
    assert close(stats.balance_loss, (share * P).sum(-1).mean() * mask.shape[-1])


@pytest.mark.parametrize("shared_hidden", [0, 24], ids=["", "shared"])
def test_tokens_without_experts(shared_hidden):
    """Before any cutoff is known no token has an expert: the residual stream carries it, the loss and the
    gradients are finite, and text can be generated."""
    model, idx = (
        make(router="expert_threshold", score_fn="sigmoid", shared_hidden=shared_hidden),
        tokens(2, 24),
    )
    _, loss, stats = model(idx, idx)
    assert stats.load.sum() == 0
    (loss + stats.balance_loss + stats.z_loss).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert not model.blocks[0].mlp.w_in.grad.any()
    (*_, last) = model.generate(idx[:, :3], 4, **GREEDY)
    assert not last.experts.any()


def test_null_experts_leave_the_other_weights_as_they_are():
    """A model with null experts starts with the weights of one without, and more rows in its gates."""
    torch.manual_seed(3)
    plain = MoEGPT(MoEConfig(**TINY)).state_dict()
    torch.manual_seed(3)
    nulls = MoEGPT(MoEConfig(**TINY, router="null_experts", **SETTINGS["null_experts"])).state_dict()
    assert plain.keys() == nulls.keys()
    for name, weight in plain.items():
        assert torch.equal(nulls[name][:8] if "gate" in name or "bias" in name else nulls[name], weight)
    assert 0.01 < nulls["blocks.1.mlp.gate.weight"][8:].std() < 0.03


@pytest.mark.parametrize("name", ROUTERLESS)
def test_a_router_says_what_it_needs(name):
    """A config that contradicts its router is refused in one line that names the remedy."""
    with pytest.raises(ValueError, match=ROUTERLESS[name]):
        MoEConfig(**TINY, router=name)
    MoEConfig(**TINY, router=name, **SETTINGS[name])


@torch.no_grad()
@pytest.mark.parametrize("name", ["top_p", "remoe"])
def test_a_bias_that_another_run_left_moves_no_router_that_has_none(name):
    """Routers that need bias_rate=0 choose as if the bias of the weights were 0; TopK does not."""
    model, idx = make_under(name), tokens(2, 24)
    want, wanted = model(idx)[2].experts, model(idx, router="topk")[2].load
    for layer in model.expert_layers():
        layer.bias.copy_(torch.linspace(-0.5, 0.5, 8))
    assert torch.equal(model(idx)[2].experts, want)
    assert not torch.equal(model(idx, router="topk")[2].load, wanted)


def test_cutoffs_are_found_in_training_only():
    """expert_threshold does not decode a model that was trained under another router: no token might get
    any expert."""
    with pytest.raises(ValueError, match="router is expert_threshold, but must be that of the training"):
        make(score_fn="sigmoid").new_cache(1, router="expert_threshold")
    assert make_under("expert_threshold").new_cache(1).router == "expert_threshold"


@pytest.mark.parametrize("name", UNBUDGETED)
def test_compiled_routers_without_a_budget(name):
    """Their pairs have to be counted, which splits the graph; loss and gradients are still the eager ones."""
    model, idx = make_under(name, n_layer=1).bfloat16(), tokens(2, 24)

    def step(run) -> tuple[float, Tensor]:
        _, loss, stats = run(idx, idx)
        (gradient,) = torch.autograd.grad(loss + 0.01 * stats.balance_loss, [model.blocks[0].mlp.w_in])
        return loss.item(), gradient.float()

    torch._dynamo.reset()
    (loss, gradient), (want, wanted) = step(torch.compile(model, backend="aot_eager")), step(model)
    assert loss == pytest.approx(want, abs=0.02)
    assert (gradient - wanted).norm() <= 0.05 * wanted.norm()


# ---------------------------------------------------------------------------------------------------
# Decoding with caches

FEEDINGS = {"whole": [20], "one_by_one": [1] * 20, "pieces": [7, 1, 1, 5, 6], "late_prompt": [1, 1, 18]}


@torch.no_grad()
@each_online
@each_variant
def test_decoding_with_caches_equals_the_forward_without(variant, online):
    """However the tokens are cut up, logits and experts per token are those of one forward under the same
    causal router, where some tokens have more experts than k and some fewer."""
    model = make(**VARIANTS[variant], **ONLINE[online])
    idx = tokens(3, 20)
    want, _, stats = model(idx, router=decode_router(model))
    assert (stats.load > 0).sum() > 8 * len(stats.load) / 2
    assert online == "topk" or {1, 3} <= set(stats.experts.flatten().tolist())
    cache = model.new_cache(3)
    for sizes in FEEDINGS.values():
        cache.reset()
        parts = [model(part, cache=cache) for part in idx.split(sizes, dim=1)]
        assert cache.pos == 20
        assert close(torch.cat([logits for logits, _, _ in parts], dim=1), want)
        assert torch.equal(torch.cat([stats.experts for _, _, stats in parts], dim=-1), stats.experts)


@torch.no_grad()
def test_decoding_beyond_the_recent_tokens_of_the_expert_cache():
    """Decoding equals the uncached forward also after the Expert Cache has merged its recent tokens."""
    model = make(n_layer=1, block_size=140)
    idx = tokens(2, 140)
    want = model(idx, router="online_seqtopk")[0]
    cache = model.new_cache(2)
    got = [model(part, cache=cache)[0] for part in idx.split([30] + [1] * 110, dim=1)]
    assert close(torch.cat(got, dim=1), want)


@torch.no_grad()
def test_priors_of_the_layers_reach_the_caches():
    """With a prior for each layer decoding equals the uncached forward, and differs from that without."""
    model = make()
    idx = tokens(2, 20)
    without = model(idx, router="online_seqtopk")[0]
    for layer, routing in zip(model.expert_layers(), model(idx)[2].routing, strict=True):
        layer.prior = pseudo_candidates(routing.scores, layer.config.k, 8) * 1.05
    want = model(idx, router="online_seqtopk")[0]
    cache = model.new_cache(2)
    got = torch.cat([model(part, cache=cache)[0] for part in idx.split([7] + [1] * 13, dim=1)], dim=1)
    assert close(got, want) and not close(want, without)


@torch.no_grad()
@pytest.mark.parametrize("feeding", [[9], [1] * 9, [3, 6]], ids=["whole", "one_by_one", "pieces"])
@each_online
def test_a_padded_row_is_as_if_alone(online, feeding):
    """Each row of a padded batch gets the logits and experts that its active tokens get alone, wherever the
    others are: on the left, in between, or after its end."""
    model = make(**ONLINE[online], n_kv_head=2)
    idx, column = tokens(4, 20), torch.arange(20)
    active = torch.stack(
        [column >= 0, (column >= 7) & (column < 14), (column >= 4) & (column < 16), column % 3 > 0]
    )
    cache = model.new_cache(4)
    sizes = [*feeding, *[1] * 11]
    parts = [
        model(part, cache=cache, active=real)
        for part, real in zip(idx.split(sizes, 1), active.split(sizes, 1))
    ]
    logits = torch.cat([logits for logits, _, _ in parts], dim=1)
    experts = torch.cat([stats.experts for _, _, stats in parts], dim=-1)
    assert logits.isfinite().all() and not experts[:, ~active].any()
    for b in range(4):
        want, _, stats = model(idx[b : b + 1, active[b]], router=decode_router(model))
        assert close(logits[b, active[b]], want[0])
        assert torch.equal(experts[:, b, active[b]], stats.experts[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("name", UNBUDGETED)
def test_decoding_under_routers_without_a_budget(name):
    """However the tokens are cut up and padded, logits and experts are those of each row's forward alone,
    where tokens differ in their experts."""
    model, idx = make_under(name), tokens(3, 20)
    want, _, stats = model(idx)
    assert len(set(stats.experts.flatten().tolist())) > 2
    cache = model.new_cache(3)
    for sizes in FEEDINGS.values():
        cache.reset()
        parts = [model(part, cache=cache) for part in idx.split(sizes, dim=1)]
        assert close(torch.cat([logits for logits, _, _ in parts], dim=1), want)
        assert torch.equal(torch.cat([stats.experts for _, _, stats in parts], dim=-1), stats.experts)
    active = torch.arange(20) >= torch.tensor([[0], [7], [4]])
    cache.reset()
    logits, _, stats = model(idx, cache=cache, active=active)
    assert not stats.experts[:, ~active].any()
    for b in range(3):
        assert close(logits[b, active[b]], model(idx[b : b + 1, active[b]])[0][0])


def test_what_a_forward_refuses():
    """Padding without a cache, a text longer than block_size or the cache, and a router that cannot decode
    are ValueErrors, and the refused text leaves the cache as it was."""
    model, idx = make(), tokens(1, 25)
    with pytest.raises(ValueError, match="active needs a cache"):
        model(idx[:, :4], active=torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"25 .* 24 .* block_size"):
        model(idx)
    cache = model.new_cache(1, max_tokens=6)
    model(idx[:, :5], cache=cache)
    with pytest.raises(ValueError, match=r"7 .* 6 .* cache"):
        model(idx[:, 5:7], cache=cache)
    assert close(model(idx[:, 5:6], cache=cache)[0], model(idx[:, :6], router="online_seqtopk")[0][:, -1:])
    for name, row in ROUTERS.items():
        if not row.causal:
            with pytest.raises(ValueError, match=rf"router is {name}.*topk, online_seqtopk"):
                model.new_cache(1, router=name)
    for name, remedy in ROUTERLESS.items():
        with pytest.raises(ValueError, match=remedy):
            model.new_cache(1, router=name)


def test_bytes_of_the_caches():
    """The KV cache holds 2 * L * B * kv heads * tokens * D numbers; only an online router needs an Expert
    Cache."""
    model = make(n_kv_head=2)
    cache = model.new_cache(3, max_tokens=10)
    assert cache.kv_nbytes == 2 * 2 * 3 * 2 * 10 * 8 * 4
    assert cache.expert_nbytes == sum(experts.nbytes for experts in cache.experts) > 0
    assert model.new_cache(3, router="topk").expert_nbytes == 0


# ---------------------------------------------------------------------------------------------------
# Generation

GREEDY = {"temperature": 0.0}


def text_of(chunks: list) -> Tensor:
    return torch.cat([chunk.tokens for chunk in chunks], dim=1)


@torch.no_grad()
def greedy_by_hand(model: MoEGPT, idx: Tensor, real: Tensor, n: int, window: int) -> Tensor:
    """What `generate` must write, by a whole forward of each row by itself for each token: (B, P + n)."""
    begin = 0 if idx.shape[1] <= window else idx.shape[1] - window // 2
    idx, real = idx[:, begin:], real[:, begin:]
    begin = 0
    for _ in range(n):
        rows = [row[keep].unsqueeze(0) for row, keep in zip(idx[:, begin:], real[:, begin:])]
        last = torch.cat([model(row, router=decode_router(model))[0][:, -1] for row in rows])
        if idx.shape[1] - begin == window:
            begin = idx.shape[1] - window // 2
        idx = torch.cat([idx, last.argmax(-1, keepdim=True)], dim=1)
        real = torch.cat([real, torch.ones_like(real[:, :1])], dim=1)
    return idx


@torch.no_grad()
@each_router
def test_greedy_text_and_its_experts_are_those_of_whole_forwards(name):
    """Inside the window, temperature 0 writes the argmax of whole forwards under the decode router, and the
    chunks tell the experts of every token, the last one included, and what the logits are made of."""
    model, idx = make_under(name), tokens(2, 6)
    chunks = list(model.generate(idx, 14, **GREEDY))
    assert [chunk.tokens.shape for chunk in chunks] == [(2, 6)] + [(2, 1)] * 14
    text = text_of(chunks)
    assert torch.equal(text, greedy_by_hand(model, idx, torch.ones_like(idx, dtype=torch.bool), 14, 24))
    logits, _, stats = model(text, router=decode_router(model))
    experts = torch.cat([chunk.experts for chunk in chunks], dim=1)  # (B, P + n, L)
    assert torch.equal(experts, stats.experts.permute(1, 2, 0))
    mask = torch.cat([chunk.mask for chunk in chunks], dim=1)  # (B, P + n, L, E)
    want = [layer.mask[..., : model.config.n_expert] for layer in stats.routing]
    assert torch.equal(mask, torch.stack(want, dim=2))
    assert close(model.head(torch.cat([chunk.last_hidden for chunk in chunks], dim=1)), logits)
    assert torch.cat([chunk.active for chunk in chunks], dim=1).all()


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("prompt, window", [(4, 10), (10, 10), (15, 10), (4, 9), (1, 2), (9, 3)])
def test_past_the_window_the_newest_half_is_fed_again(prompt, window, padded):
    """When the cache is full, text goes on as if the newest half of the window were a new prompt; a prompt
    that does not fit is cut to that half."""
    model, idx = make(), tokens(2, prompt)
    active = torch.ones(2, prompt, dtype=torch.bool)
    active[0, :-1] = False
    options = {"active": active} if padded else {}
    cache = model.new_cache(2, max_tokens=window)
    chunks = list(model.generate(idx, 25, cache, **GREEDY, **options))
    fed = idx if prompt <= window else idx[:, -(window // 2) :]
    assert torch.equal(chunks[0].tokens, fed) and len(chunks) == 26
    want = greedy_by_hand(model, idx, active if padded else torch.ones_like(active), 25, window)
    assert torch.equal(text_of(chunks), want)


@torch.no_grad()
def test_logits_after_refeeding_are_those_of_a_fresh_forward():
    """After the window was full, logits are those of an uncached forward on its newest half and the tokens
    since."""
    model, cache = make(), None
    for extra in (0, 3):
        cache = model.new_cache(2, max_tokens=12)
        text = text_of(
            list(model.generate(tokens(2, 5), 8 + extra, cache, **GREEDY))
        )  # 12, refeed 6, 1, extra
        assert cache.pos == 7 + extra
        following = tokens(2, 1, seed=5)
        want = model(torch.cat([text[:, -7 - extra :], following], dim=1), router="online_seqtopk")[0][:, -1]
        assert close(model(following, cache=cache)[0][:, -1], want)


def test_padded_prompts_are_continued_as_if_alone():
    """Prompts of several lengths, padded on the left, are continued with the tokens that each gets alone."""
    model = make()
    idx, lengths = tokens(3, 9), (2, 9, 5)
    active = torch.arange(9) >= 9 - torch.tensor(lengths).unsqueeze(1)
    chunks = list(model.generate(idx, 12, active=active, **GREEDY))
    assert torch.equal(chunks[0].active, active) and not chunks[0].experts[~active].any()
    for b, length in enumerate(lengths):
        alone = text_of(list(model.generate(idx[b : b + 1, -length:], 12, **GREEDY)))
        assert torch.equal(text_of(chunks)[b, 9:], alone[0, length:])


def test_a_row_that_stops_leaves_the_others_alone():
    """From its stop token on a row is inactive and gets no experts, while the other row goes on as before."""
    model, idx = make(seed=1), tokens(2, 6)
    plain = text_of(list(model.generate(idx, 17, **GREEDY)))
    new = plain[:, 6:].tolist()
    stop = next(token for token in new[0] if token not in new[1] and 2 < new[0].index(token) < 12)
    end = 6 + new[0].index(stop)
    chunks = list(model.generate(idx, 17, stop=stop, **GREEDY))
    active = torch.cat([chunk.active for chunk in chunks], dim=1)
    experts = torch.cat([chunk.experts for chunk in chunks], dim=1)
    assert active[1].all() and active[0].tolist() == [True] * end + [False] * (23 - end)
    assert text_of(chunks)[0, : end + 1].tolist() == plain[0, : end + 1].tolist()
    assert torch.equal(text_of(chunks)[1], plain[1])
    assert not experts[0, end:].any() and experts[1].sum(0).min() >= 23


def test_generation_ends_when_all_rows_have_ended():
    """With rows that stop at different times, past the window too, nothing follows the last row's last token,
    and no active token is the stop token."""
    model = make(vocab_size=12)
    idx = tokens(4, 3).clamp(1, 11)
    g = torch.Generator().manual_seed(0)
    cache = model.new_cache(4, max_tokens=8)
    chunks = list(model.generate(idx, 300, cache, 1.0, None, None, stop=0, generator=g))
    text, active = text_of(chunks), torch.cat([chunk.active for chunk in chunks], dim=1)
    assert 8 < text.shape[1] < 303 and active[:, -1].any()
    lengths = active.sum(-1).tolist()
    assert len(set(lengths)) == 4 and not (text[active] == 0).any()
    for b, length in enumerate(lengths):
        assert active[b, :length].all()
        assert length == text.shape[1] or text[b, length] == 0
    probe = make(vocab_size=12)
    first = int(probe(idx[:1], router="online_seqtopk")[0][0, -1].argmax())
    assert len(list(probe.generate(idx[:1], 5, stop=first, **GREEDY))) == 1


def test_sampling_repeats_and_its_narrow_forms_are_greedy():
    """The same seed draws the same text, another seed another; top_k=1 and a tiny top_p are greedy, the
    default is not; where no new token is asked for, none comes."""
    model, idx = make(), tokens(2, 6)

    def text(**options) -> list[list[int]]:
        return text_of(list(model.generate(idx, 12, **options))).tolist()

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    assert text(generator=seeded(1)) == text(generator=seeded(1)) != text(generator=seeded(2))
    greedy = text(temperature=0)
    assert text(top_k=1) == text(top_p=1e-6) == text(temperature=1e-4) == greedy
    assert text(generator=seeded(1)) != greedy
    assert [chunk.tokens.tolist() for chunk in model.generate(idx, 0)] == [idx.tolist()]


def drawn(logits: list[float], n: int = 20000, **options) -> dict[int, float]:
    """The share of each token among n drawn ones."""
    g = torch.Generator().manual_seed(0)
    token = sample_token(torch.tensor([logits]).expand(n, -1), generator=g, **options)
    assert token.shape == (n, 1)
    values, counts = token.unique(return_counts=True)
    return {int(value): int(count) / n for value, count in zip(values, counts)}


P = [0.1, 0.5, 0.15, 0.25]


@pytest.mark.parametrize(
    "options, want",
    [
        ({}, {0: 0.1, 1: 0.5, 2: 0.15, 3: 0.25}),
        ({"top_k": 4, "top_p": 1.0}, {0: 0.1, 1: 0.5, 2: 0.15, 3: 0.25}),
        ({"top_k": 9}, {0: 0.1, 1: 0.5, 2: 0.15, 3: 0.25}),
        ({"top_k": 2}, {1: 2 / 3, 3: 1 / 3}),
        ({"top_k": 1}, {1: 1.0}),
        ({"top_p": 0.01}, {1: 1.0}),
        ({"top_p": 0.49}, {1: 1.0}),
        ({"top_p": 0.51}, {1: 2 / 3, 3: 1 / 3}),
        ({"top_p": 0.74}, {1: 2 / 3, 3: 1 / 3}),
        ({"top_p": 0.76}, {1: 0.5 / 0.9, 2: 0.15 / 0.9, 3: 0.25 / 0.9}),
        ({"top_p": 0.8, "top_k": 3}, {1: 2 / 3, 3: 1 / 3}),  # the share is of what top_k has left: 0.9
        ({"temperature": 0.0}, {1: 1.0}),
        ({"temperature": 0.5}, {i: p * p / 0.345 for i, p in enumerate(P)}),
        ({"temperature": 0.5, "top_p": 0.9}, {1: 0.8, 3: 0.2}),  # 0.25 and 0.0625 of 0.345
    ],
)
def test_tokens_are_drawn_from_the_right_distribution(options, want):
    """temperature sharpens, top_k keeps the k likeliest, top_p the fewest likeliest that hold the share p."""
    got = drawn([math.log(p) for p in P], **options)
    assert got.keys() == want.keys() and got == pytest.approx(want, abs=0.015)


def test_ties_are_cut_to_the_right_number():
    """Of equally likely tokens top_p keeps the fewest that hold its share, top_k lets no less likely one in,
    and temperature 0 takes the first."""
    assert len(drawn([0.0] * 4, top_p=0.45)) == len(drawn([0.0] * 4, top_p=0.3)) == 2
    assert len(drawn([0.0] * 4, top_p=0.2)) == 1 and len(drawn([0.0] * 4)) == 4
    assert {0, 2} <= drawn([2.0, 0.0, 2.0, 1.0], top_k=2).keys() <= {0, 2}
    assert {1} < drawn([0.0, 2.0, 1.0, 1.0], top_k=2).keys() <= {1, 2, 3}
    assert drawn([1.0, 3.0, 3.0], temperature=0).keys() == {1}


@pytest.mark.parametrize(
    "options",
    [{"temperature": -0.1}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.01}],
)
def test_impossible_sampling_is_refused(options):
    """The ValueError names the option and its value."""
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        sample_token(torch.zeros(1, 4), **options)


def test_a_cache_of_its_own_has_the_room_that_is_needed(monkeypatch):
    """Without a cache, `generate` makes one for the prompt and the new tokens, but not beyond block_size."""
    rooms, new_cache = [], MoEGPT.new_cache
    monkeypatch.setattr(MoEGPT, "new_cache", lambda self, B, T: rooms.append(T) or new_cache(self, B, T))
    for prompt, new in ((3, 4), (20, 30), (30, 1), (1, 0)):
        list(make().generate(tokens(1, prompt), new))
    assert rooms == [7, 24, 24, 2]


# ---------------------------------------------------------------------------------------------------
# Counting

COUNTED = {"n_kv_head": 2, "qk_norm": "head", "shared_hidden": 24, "n_dense_layer": 1}
ATTENTION = 32 * (4 + 2 + 2) * 8 + 32 * 32  # q, k, v and out
DENSE = 32 * 2 * 32 + 32 * 32  # hidden width k * H = 32
GATE, SHARED, EXPERT = 32 * 8, 32 * 2 * 24 + 24 * 32, 32 * 2 * 16 + 16 * 32
GAINS = (
    2 * (2 * 32 + 2 * 8) + 32
)  # RMSNorms: two of the block and two of the heads in a layer, one at the end
EMBEDDING = 48 * 32


def test_parameters_counted_by_hand():
    """n_params is (all, all but the experts that an average token does not use); a tied head counts once."""
    rest = 2 * ATTENTION + DENSE + GATE + SHARED + GAINS
    for tied, tables in ((False, 2), (True, 1)):
        got = make(**COUNTED, tie_embeddings=tied).n_params()
        assert got == (rest + 8 * EXPERT + tables * EMBEDDING, rest + 2 * EXPERT + tables * EMBEDDING)


def test_operations_counted_by_hand():
    """A training step costs 3 times 2 per weight of the products that a token goes through, and 4*D per
    head and token in its reach."""
    products = 2 * ATTENTION + DENSE + GATE + SHARED + 2 * EXPERT + EMBEDDING  # the head is the last one
    for tied in (False, True):
        model = make(**COUNTED, tie_embeddings=tied)
        for T in (1, 24):
            assert model.flops_per_token(T) == 3 * (2 * products + 2 * 4 * 32 * T)


def test_wide_heads_biases_and_a_shared_gate_are_counted():
    """Wider heads cost what their matrices and their reach do, a shared gate its weights, a bias nothing."""
    plain, rich = make(**COUNTED), make(**COUNTED, head_width=12, qkv_bias=True, shared_gate=True)
    weights = 2 * (32 * (4 + 2 + 2) * 4 + 4 * 4 * 32) + 32  # of 4 more per head, and of the gate
    vectors = 2 * (4 + 2 + 2) * 12 + 2 * 2 * 4  # the biases, and the gains of the wider heads
    assert rich.n_params()[0] - plain.n_params()[0] == weights + vectors
    assert rich.flops_per_token(24) - plain.flops_per_token(24) == 3 * (2 * weights + 2 * 4 * 4 * 4 * 24)


# ---------------------------------------------------------------------------------------------------
# Checkpoints


@each_variant
def test_a_checkpoint_brings_everything_back(variant, tmp_path):
    """A model read back has the same config, weights and logits, bit for bit, and `extra` comes with it."""
    model, idx = make(**VARIANTS[variant]), tokens(2, 10)
    with torch.no_grad():
        for block in model.blocks[1:]:
            block.mlp.bias.copy_(torch.randn(8))
    extra = {"step": 7, "optimizer": {"state": [torch.arange(3), None, 0.1]}, "best_loss": math.inf}
    save_checkpoint(tmp_path / "a.pt", model, **extra)
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert checkpoint["step"] == 7 and checkpoint["best_loss"] == math.inf
    assert torch.equal(checkpoint["optimizer"]["state"][0], torch.arange(3))
    back = MoEGPT.from_checkpoint(checkpoint)
    assert back.config == model.config
    old, new = model.state_dict(), back.state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert torch.equal(model(idx)[0], back(idx)[0])
    assert (back.head.weight is back.embedding.weight) == model.config.tie_embeddings
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_checkpoint_from_before_a_field_existed(tmp_path):
    """Fields that a checkpoint's config lacks have their defaults."""
    model = make()
    save_checkpoint(tmp_path / "a.pt", model)
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    for name in ("head_width", "qkv_bias", "shared_gate", "dense_hidden"):
        del checkpoint["config"][name]
    assert MoEGPT.from_checkpoint(checkpoint).config == model.config


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
    "change",
    [
        {"n_embd": 64},
        {"n_layer": 2},
        {"n_layer": 3, "n_dense_layer": 1},
        {"vocab_size": 50},
        {"n_expert": 16},
        {"n_expert": 1, "k": 1},
        {"n_hidden": 24},
        {"shared_hidden": 0},
        {"shared_hidden": 32},
        {"qk_norm": "head"},
        {"n_kv_head": 2},
        {"head_width": 16},
        {"qkv_bias": True},
        {"shared_gate": True},
        {"tie_embeddings": True},
    ],
    ids=str,
)
def test_another_architecture_is_refused(saved, change):
    """Weights that do not fit the changed config are a ValueError of one line that says which."""
    with pytest.raises(ValueError) as refused:
        MoEGPT.from_checkpoint(load_checkpoint(saved), **change)
    message = str(refused.value)
    assert "\n" not in message and "checkpoint" in message and len(message) < 300


def assert_refused(path) -> None:
    with pytest.raises(ValueError) as refused:
        load_checkpoint(path)
    message = str(refused.value)
    assert str(path) in message and "\n" not in message and len(message) > len(str(path)) + 20


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_are_refused(saved):
    """A missing, empty or truncated checkpoint, or a folder, is a ValueError that names the path."""
    whole = saved.read_bytes()
    for n in (0, 1, 2, 10, 100, 1000, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        saved.write_bytes(whole[:n])
        assert_refused(saved)
    saved.unlink()
    assert_refused(saved)
    saved.mkdir()
    assert_refused(saved)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_foreign_files_are_refused(tmp_path):
    """Text, random bytes and what other programs save with torch are ValueErrors that name the path."""
    path = tmp_path / "foreign.pt"
    texts = "import torch\n", "0.1 0.2", "loss 3.2", "{}", "h", "t", "R", "just some words", "\x80\x02.", "é"
    for content in (*(text.encode() for text in texts), *(text.encode("latin-1") for text in texts)):
        path.write_bytes(content)
        assert_refused(path)
    g = torch.Generator().manual_seed(0)
    for n in (1, 3, 10, 100, 5000) * 10:
        path.write_bytes(bytes(torch.randint(256, (n,), generator=g).tolist()))
        assert_refused(path)
    weights = make().state_dict()
    for other in (weights, {"model": weights}, {"format": 1}, torch.zeros(3), [1, 2], None, tmp_path):
        torch.save(other, path)
        assert_refused(path)


@pytest.mark.parametrize("where", ["write", "flush", "content"])
def test_a_failing_write_leaves_the_old_file(where, saved, monkeypatch):
    """Whatever goes wrong while writing, the error is raised and the file that was there is still whole."""
    old, extra = saved.read_bytes(), {}

    def disk_is_full(*args):
        if where == "write":
            args[1].write(b"half")
        raise OSError(28, "No space left on device")

    if where == "content":
        extra["bad"] = lambda: None  # which cannot be pickled
    else:
        monkeypatch.setattr("torch.save" if where == "write" else "os.fsync", disk_is_full)
    with pytest.raises(Exception, match=r"No space left|pickle"):
        save_checkpoint(saved, make(seed=1), **extra)
    assert saved.read_bytes() == old
    monkeypatch.undo()
    save_checkpoint(saved, make(seed=1), step=2)
    assert load_checkpoint(saved)["step"] == 2


# ---------------------------------------------------------------------------------------------------
# Configuration


@pytest.mark.parametrize(
    "change, words",
    [
        ({"k": 9}, "k is 9 1 n_expert 8"),
        ({"k": 0}, "k is 0 1 n_expert 8"),
        ({"min_experts": 3}, "min_experts is 3 0 k = 2"),
        ({"min_experts": -1}, "min_experts is -1 0 k = 2"),
        ({"max_experts": 1}, "max_experts is 1 k = 2 n_expert = 8"),
        ({"max_experts": 9}, "max_experts is 9 k = 2 n_expert = 8"),
        ({"n_embd": 40, "n_head": 3}, "n_embd is 40 multiple n_head = 3"),
        ({"n_embd": 24, "n_head": 8}, "n_embd / n_head is 3 even"),
        ({"head_width": 7}, "head_width is 7 even"),
        ({"head_width": 0}, "head_width is 0 at least 1"),
        ({"dense_hidden": 0}, "dense_hidden is 0 at least 1"),
        ({"n_kv_head": 3}, "n_kv_head is 3 divisor n_head = 4"),
        ({"n_kv_head": 8}, "n_kv_head is 8 divisor n_head = 4"),
        ({"n_kv_head": 0}, "n_kv_head is 0 at least 1"),
        ({"n_embd": 36, "n_head": 2}, "n_embd is 36 multiple of 8"),
        ({"n_hidden": 20}, "n_hidden is 20 multiple of 8"),
        ({"n_hidden": 0}, "n_hidden is 0 at least 1"),
        ({"n_layer": 0}, "n_layer is 0 at least 1"),
        ({"n_head": 0}, "n_head is 0 at least 1"),
        ({"n_embd": -8}, "n_embd is -8 at least 1"),
        ({"n_expert": 0}, "n_expert is 0 at least 1"),
        ({"block_size": 0}, "block_size is 0 at least"),
        ({"shared_hidden": -1}, "shared_hidden is -1 at least 0"),
        ({"n_dense_layer": -1}, "n_dense_layer is -1 at least 0"),
        ({"vocab_size": -1}, "vocab_size is -1 at least 0"),
        ({"router": "topp"}, "router is topp topk batchtopk seqtopk online_seqtopk expert_choice"),
        ({"score_fn": "tanh"}, "score_fn is tanh softmax sigmoid relu"),
        ({"mass": 0.0}, "mass is 0.0 above 0 at most 1"),
        ({"mass": 1.5}, "mass is 1.5 above 0 at most 1"),
        ({"n_null": -1}, "n_null is -1 at least 0"),
        ({"n_null": 4}, "n_null is 4 0 under router seqtopk"),
        ({"router": "null_experts", "norm_topk": True}, "n_null is 0 at least 1 under router null_experts"),
        ({"router": "null_experts", "norm_topk": True, "n_null": 5}, "n_null is 5 multiple of 4"),
        ({"qk_norm": "yes"}, "qk_norm is yes none head full"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(change, words):
    """The ValueError is one line with the key, the value and what is allowed."""
    with pytest.raises(ValueError) as refused:
        MoEConfig(**TINY | change)
    message = str(refused.value)
    key = words[: words.index(" is ")]
    assert message.startswith(f"{key} is ") and "\n" not in message
    position = 0
    for word in words.split():
        assert word in message[position:], message
        position = message.index(word, position) + len(word)


def test_a_model_needs_a_vocabulary():
    """vocab_size 0 stands for the data's: a model cannot be made with it."""
    with pytest.raises(ValueError, match="vocab_size is 0"):
        MoEGPT(MoEConfig(**TINY | {"vocab_size": 0}))


# ---------------------------------------------------------------------------------------------------
# Number formats and compilation


@each_variant
def test_bfloat16_weights(variant):
    """With all weights in bfloat16 losses and gradients are finite and near float32's."""
    idx, targets = tokens(2, 24), tokens(2, 24, seed=1)
    model = make(**VARIANTS[variant], router="topk")
    want = model(idx, targets)[1]
    logits, loss, stats = model.bfloat16()(idx, targets)
    assert logits.dtype == loss.dtype == stats.balance_loss.dtype == stats.z_loss.dtype == torch.float32
    assert close(loss, want, 0.05)
    (loss + stats.balance_loss + stats.z_loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.bfloat16 and parameter.grad.isfinite().all(), name


def test_autocast_leaves_the_gate_in_float32(monkeypatch):
    """Under bfloat16 autocast the router sees scores computed in float32 from the layer's input; losses and
    gradients are finite and near float32's."""
    model, idx, seen = make(n_layer=1, shared_hidden=24), tokens(2, 24), {}
    want = model(idx, idx)[1]

    def spy(scores: Tensor, *args, **options) -> Tensor:
        seen["scores"] = scores
        return seqtopk.select(scores, *args, **options)

    seqtopk = ROUTERS["seqtopk"]
    monkeypatch.setitem(ROUTERS, "seqtopk", seqtopk._replace(select=spy))
    layer = model.blocks[0].mlp
    layer.register_forward_pre_hook(lambda layer, args: seen.update(x=args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        _, loss, stats = model(idx, idx)
    (loss + stats.balance_loss + stats.z_loss).backward()
    assert seen["scores"].dtype == stats.z_loss.dtype == stats.balance_loss.dtype == torch.float32
    assert close(seen["scores"], F.linear(seen["x"].float(), layer.gate.weight).softmax(-1), 1e-6)
    assert close(loss, want, 0.1) and loss != want
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


STATIC = {name: {"router": name} for name, row in ROUTERS.items() if row.exact} | {"strict": ONLINE["strict"]}


def fake_step(**changes) -> None:
    """A training step of tensors that have a shape and no numbers: asking for a number is an error."""
    with FakeTensorMode():
        model, idx = make(**changes), torch.zeros(2, 24, dtype=torch.int64)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        with torch.autocast("cpu", torch.bfloat16):  # torch knows grouped_mm's shapes in no other format
            _, loss, stats = model(idx, idx)
        (loss + stats.balance_loss + stats.z_loss).backward()
        assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@pytest.mark.parametrize("name", STATIC)
def test_training_never_looks_at_the_data(name):
    """Under a router with a known budget no shape and no branch of a training step, clipping and AdamW
    included, depends on a number: nothing waits for the device."""
    fake_step(**STATIC[name], norm_topk=True, shared_hidden=24)


def test_the_check_for_looking_at_the_data_works():
    """A router without a known budget has its pairs counted, and the check of the training step notices."""
    with pytest.raises(DynamicOutputShapeException):
        fake_step(**ONLINE["unstrict"])


@pytest.mark.parametrize("name", ["topk", "seqtopk", "online_seqtopk"])
def test_a_training_step_is_one_graph(name):
    """Forward and loss in bfloat16 are captured whole by torch.compile, with the eager loss and gradients."""
    model, idx = make(router=name, n_layer=1).bfloat16(), tokens(2, 24)

    def loss_of(model: MoEGPT, idx: Tensor) -> Tensor:
        _, loss, stats = model(idx, idx)
        return loss + 0.01 * stats.balance_loss

    def step(run) -> tuple[float, Tensor]:
        loss = run(model, idx)
        (gradient,) = torch.autograd.grad(loss, [model.blocks[0].mlp.w_in])
        return loss.item(), gradient.float()

    torch._dynamo.reset()
    # aot_eager captures forward and backward like the default, and spares a minute of C++ compilation
    (loss, gradient), (want, wanted) = (
        step(torch.compile(loss_of, fullgraph=True, backend="aot_eager")),
        step(loss_of),
    )
    assert loss == pytest.approx(want, abs=0.02)
    assert (gradient - wanted).norm() <= 0.05 * wanted.norm()


class NothingRead(TorchDispatchMode):
    """Fails at an operation whose result the host has to wait for on a GPU."""

    aten = torch.ops.aten
    reads = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in self.reads, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("router", ["topk", "online_seqtopk"])
def test_a_decode_step_reads_nothing_back(router, batch_size):
    """Prefill and steps of generation never wait for the device, whichever way the experts run."""
    model = make(router=router)
    with NothingRead():
        assert len(list(model.generate(tokens(batch_size, 6), 70, model.new_cache(batch_size, 80)))) == 71
    with pytest.raises(AssertionError, match="waits for the device"), NothingRead():
        torch.ones(3).nonzero()
