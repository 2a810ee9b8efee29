"""Muon against a plain loop over matrices, against torch's, and against what it is for."""

import pytest
import torch

import optimizers
from optimizers import Muon, orthogonalised


def descend(optimizer, weights, steps=3):
    """Steps along random gradients, the same for equally shaped weights."""
    draw = torch.Generator().manual_seed(7)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=draw)
        optimizer.step()


@pytest.mark.parametrize("shape", [(16, 16), (5, 16, 24), (5, 24, 16), (2, 3, 8, 40)])
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


def test_a_matrix_of_zeros_stays_zero():
    """An expert that no token has reached gets no step, and no NaN."""
    assert torch.equal(orthogonalised(torch.zeros(2, 4, 8)), torch.zeros(2, 4, 8))


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
    descend(Muon([{"params": [ours], "split": shape[1], "dim": -1}], lr=0.1, seed=1), [ours])
    descend(torch.optim.Muon([theirs], lr=0.1, **options), [theirs])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
    assert (ours - 1).abs().max() > 0.1


def test_bfloat16_weights_follow_float32_ones_on_average():
    """Steps far below a weight's spacing add up, as they are rounded at random."""
    weights = [
        torch.ones(32, 64, dtype=dtype, requires_grad=True) for dtype in (torch.float32, torch.bfloat16)
    ]
    for weight in weights:
        optimizer = Muon([{"params": [weight], "split": 64, "dim": -1}], lr=1e-3, seed=3)
        weight.grad = torch.ones_like(weight)
        for _ in range(20):
            optimizer.step()
    moved = [(1 - weight.float()).mean().item() for weight in weights]
    assert moved[0] > 0 and abs(moved[1] / moved[0] - 1) < 0.15
