"""Muon against a plain loop over matrices, against torch's, and against what it is for; AdamW that rounds at
random against torch's; and which of the two has which weight of a model."""

from functools import partial

import pytest
import torch
from runs import SHAPE

import optimizers
import train
from optimizers import Muon, RoundingAdamW, make_optimizers, orthogonalised, round_at_random
from train import TrainConfig


def descend(optimizer, weights, steps=3):
    """Steps along random gradients, the same for equally shaped weights, that pull these towards zero."""
    draw = torch.Generator().manual_seed(7)
    for _ in range(steps):
        for weight in weights:
            weight.grad = (weight.detach() + torch.randn(weight.shape, generator=draw)).to(weight.dtype)
        optimizer.step()


def muon_of(weight, **options):
    """Of matrices that are one each."""
    return Muon([{"params": [weight], "split": weight.shape[-1], "dim": -1}], **options)


@pytest.mark.parametrize("shape", [(1, 16, 16), (5, 16, 24), (5, 24, 16), (6, 8, 40)])
def test_singular_values_come_out_near_one(shape):
    """All that were above 0.02 of the matrix's norm lie within 10% of 1; the singular vectors stay."""
    u, s, vt = torch.linalg.svd(
        torch.randn(shape, generator=torch.Generator().manual_seed(1)), full_matrices=False
    )
    s = torch.linspace(0.05, 1, s.shape[-1]) * torch.ones_like(s)
    out = orthogonalised(u * s.unsqueeze(-2) @ vt)
    inside = u.mT @ out @ vt.mT  # diagonal, if the singular vectors are the same
    values = inside.diagonal(dim1=-2, dim2=-1)
    assert (values - 1).abs().max() < 0.1
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-4


@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
def test_together_or_apart_weights_learn_alike(weights_dtype, monkeypatch):
    """A model's weights in one batch, in some, each by itself: the same steps."""
    config, found = TrainConfig(**SHAPE, vocab_size=50, weights_dtype=weights_dtype), []
    for most in (1, 5000, 10**9):
        monkeypatch.setattr(optimizers, "TOGETHER", {"cpu": most})
        torch.manual_seed(0)
        model = train.make_model(config, None)
        weights = [p for p in model.blocks.parameters() if p.dim() > 1]
        _, muon = make_optimizers(model, config)
        descend(muon, weights)
        found.append(weights)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_a_matrix_of_zeros_stays_zero():
    """An expert that no token has reached gets no step, and no NaN; nor do weights without a gradient."""
    assert torch.equal(orthogonalised(torch.zeros(2, 4, 8)), torch.zeros(2, 4, 8))
    muon_of(weight := torch.ones(4, 8, requires_grad=True), lr=0.1, seed=1).step()
    assert torch.equal(weight, torch.ones(4, 8))


def test_each_matrix_of_a_stack_and_each_part_learns_as_if_alone():
    """A stack whose last dimension holds two matrices takes the steps of ten separate weights."""
    start = torch.randn(5, 16, 48, generator=torch.Generator().manual_seed(2))
    stack = start.clone().requires_grad_()
    single = [half.clone().requires_grad_() for matrix in start for half in matrix.split(24, -1)]
    together = Muon([{"params": [stack], "split": 24, "dim": -1}], lr=0.1, seed=1)
    apart = Muon([{"params": single, "split": 24, "dim": -1}], lr=0.1, seed=1)
    for step in range(3):
        stack.grad = torch.randn(stack.shape, generator=torch.Generator().manual_seed(step))
        for weight, grad in zip(
            single, (half for matrix in stack.grad for half in matrix.split(24, -1)), strict=True
        ):
            weight.grad = grad
        together.step(), apart.step()
    expected = torch.stack([torch.cat(pair, -1) for pair in zip(single[::2], single[1::2], strict=True)])
    torch.testing.assert_close(stack, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
def test_muon_is_torchs_for_matrices(shape, monkeypatch):
    """2-D weights take the steps of torch.optim.Muon, where both iterate to the end (torch's in bfloat16)."""
    newton = (1.875, -1.25, 0.375)
    monkeypatch.setattr(optimizers, "POLYNOMIALS", (newton,) * 12)
    ours, theirs = (torch.ones(shape, requires_grad=True) for _ in range(2))
    options = {
        "weight_decay": 0.0,
        "adjust_lr_fn": "match_rms_adamw",
        "ns_coefficients": newton,
        "ns_steps": 12,
    }
    descend(muon_of(ours, lr=0.1, seed=1), [ours])
    descend(torch.optim.Muon([theirs], lr=0.1, **options), [theirs])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
    assert (ours - 1).abs().max() > 0.1


def test_rounding_is_unbiased():
    """A number between two of bfloat16 becomes one of these, and on average itself; bfloat16 ones stay."""
    draw = torch.Generator().manual_seed(0)
    low, high = torch.tensor(0.02).bfloat16(), torch.tensor(0.02).bfloat16() * (1 + 2**-7)
    for share in (0.1, 0.5, 0.9):
        for sign in (1, -1):
            x = sign * (low.float() + share * (high.float() - low.float()))
            rounded = round_at_random(x.repeat(100_000), draw).float()
            assert {*rounded.abs().tolist()} <= {low.item(), low.float().item() + 2**-13}
            assert rounded.mean().item() == pytest.approx(x.item(), abs=3 * 2**-13 / 2 / 100_000**0.5 + 1e-8)
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(round_at_random(exact.float(), draw), exact)


def test_in_float32_it_is_torchs_adamw(monkeypatch):
    """Float32 weights follow torch's AdamW, in pieces or not, with weight decay and without."""
    monkeypatch.setattr(RoundingAdamW, "PIECE", 700)
    start = torch.randn(2, 40, 50, generator=torch.Generator().manual_seed(3))
    ours, theirs = ([weight.clone().requires_grad_() for weight in start] for _ in range(2))
    for weights, kind in (ours, partial(RoundingAdamW, seed=1)), (theirs, torch.optim.AdamW):
        groups = [{"params": [weight], "weight_decay": decay} for weight, decay in zip(weights, (0.1, 0.0))]
        descend(kind(groups, lr=0.01, betas=(0.8, 0.9)), weights, 20)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda weight: RoundingAdamW([weight], lr=1e-5, betas=(0.9, 0.95), seed=1),
        lambda weight: muon_of(weight, lr=3e-4, seed=1),
    ],
    ids=["adamw", "muon"],
)
def test_small_updates_add_up(make):
    """200 updates of about a sixth of half the spacing of bfloat16 move a weight as far, on average, as one
    in float32; rounded to nearest, none would move it at all."""
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.full((64, 64), 0.02, dtype=dtype, requires_grad=True)
        before, optimizer = weight.detach().clone(), make(weight)
        weight.grad = torch.full_like(weight, 1e-3)
        for _ in range(200):
            optimizer.step()
        moved.append((before.float() - weight.detach().float()).mean().item())
    assert torch.equal((before.float() - moved[0] / 200).bfloat16(), before) and moved[0] > 1e-3
    assert moved[1] == pytest.approx(moved[0], rel=0.05)


def test_each_matrix_of_a_model_has_its_optimizer():
    """The first step by hand. Muon has the matrices of the blocks, those side by side in qkv and w_in one by
    one; AdamW has gates, head and embedding, which decay, and vectors, which do not."""
    sizes = {"shared_hidden": 24, "shared_gate": True, "n_dense_layer": 1, "n_kv_head": 1, "qkv_bias": True}
    config = TrainConfig(**SHAPE | sizes, vocab_size=50, learning_rate=0.01, weight_decay=0.1)
    model = train.make_model(config, None)
    kinds = [type(optimizer) for optimizer in make_optimizers(model, config)]
    assert kinds == [torch.optim.AdamW, Muon]
    want = []
    for name, weight in model.named_parameters():
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(want)))
        if weight.dim() == 1 or "gate" in name or not name.startswith("blocks."):
            decay = 1 - 0.01 * (0.1 if weight.dim() > 1 else 0)
            want.append(weight.detach() * decay - 0.01 * weight.grad.sign())
            continue
        widths, dim = [weight.shape[-1]], -1
        if "qkv" in name:
            widths, dim = [32, 16, 16], -2  # two heads, and one of keys and values
        elif "w_in" in name:  # gate and up: of experts H columns each, of an nn.Linear so many rows
            dim = -1 if weight.dim() == 3 else -2
            widths = [weight.shape[dim] // 2] * 2
        parts = weight.grad.split(widths, dim)
        steps = [0.2 * max(p.shape[-2:]) ** 0.5 * orthogonalised(p.view(-1, *p.shape[-2:])) for p in parts]
        want.append(weight.detach() - 0.01 * torch.cat(steps, dim).view(weight.shape))
    for optimizer in make_optimizers(model, config):
        optimizer.step()
    torch.testing.assert_close(list(model.parameters()), want, rtol=0, atol=1e-6)
