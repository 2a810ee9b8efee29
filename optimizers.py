"""Muon for stacks of matrices (torch.optim.Muon takes single ones), and AdamW for bfloat16 weights that are
rounded at random.

The random numbers of a step are a function of `seed` and the step: there is no random state to keep.
"""

from collections import defaultdict

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from config.device import tf32
from distributed import local, own_rows, whole_matrices


def make_optimizers(model, config) -> list[Optimizer]:
    """AdamW (arXiv 1711.05101), in one fused pass for float32, and for the matrices inside blocks Muon.

    A group's "boost" multiplies its learning rate. The embedding's is 10 by default, because a row of it
    learns only where its token occurs. Measured at the tiny shape, 250 iterations: 4.69 nats with 3e-3 for it
    and all else of AdamW's, 4.12 with 1e-2 and ten times that for it (experiments/recipe.md).
    """
    muon = muon_groups(model) if config.optimizer == "muon" else []
    taken = {weight for group in muon for weight in group["params"]}
    embedding, decay = model.embedding.weight, {"weight_decay": config.weight_decay}
    rest = [p for p in model.parameters() if p.requires_grad and p not in taken and p is not embedding]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], **decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        {"params": [embedding] * embedding.requires_grad, **decay, "boost": config.embedding_boost},
    ]
    options = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2)}
    if config.weights_dtype == "bfloat16":
        adamw = RoundingAdamW(groups, **options, seed=config.seed)
    else:
        adamw = AdamW(groups, **options, fused=True)
    return [adamw, *([Muon(muon, config.learning_rate, config.seed)] if muon else [])]


def muon_groups(model) -> list[dict]:
    """The matrices inside blocks that learn, but for gates, and how fused ones fall into matrices."""
    groups = []
    for name, weight in model.blocks.named_parameters():
        if not weight.requires_grad or weight.dim() < 2 or "gate." in name:
            continue
        split, dim = weight.shape[-1], -1  # one matrix
        if name.endswith("qkv.weight"):
            split, dim = model.blocks[0].attention.widths, -2
        elif name.endswith("w_in"):  # of experts: gate and up
            split = weight.shape[-1] // 2
        elif name.endswith("w_in.weight"):
            split, dim = weight.shape[0] // 2, -2
        groups.append({"params": [weight], "split": split, "dim": dim})
    return groups


# Polynomials a*s + b*s^3 + c*s^5, applied one after the other: together they take singular values from
# 0.02..1 to 0.91..1.09, the least error that three can have (Polar Express, arXiv 2505.16932).
POLYNOMIALS = ((7.6350, -21.4627, 15.4601), (3.1829, -2.3404, 0.4771), (2.2184, -1.5943, 0.4105))


def orthogonalised(x: Tensor) -> Tensor:
    """U V' of each x = U S V', nearly. (n, rows, columns) float32 -> the same shape.

    The polynomials are even but for one factor x, so their product is a matrix of the smaller side, and x
    comes in once. This needs the ten bits of tf32 at least: bfloat16 would round small eigenvalues of x x'
    below zero, where they explode.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalised(x.mT).mT
    gram = x @ x.mT  # (n, rows, rows)
    bound = torch.linalg.matrix_norm(gram, keepdim=True).clamp(min=1e-30)  # of its largest eigenvalue
    gram, p, product = gram / bound, None, None
    for a, b, c in POLYNOMIALS:
        if p is not None:
            gram = p @ gram @ p
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        product = p if product is None else p @ product
    return product @ (x * bound.rsqrt())


# Elements of the weights that step at once: a GPU would wait for many calls, a CPU need memory for nothing.
TOGETHER = {"cuda": 2**26, "cpu": 2**22}


def muon_steps(matrices: list[Tensor]) -> list[Tensor]:
    """The steps at a rate of 1 along directions (..., rows, columns) float32: orthogonalised, and as long as
    AdamW's (arXiv 2502.16982, section 2.2).

    Matrices of one shape are one stack: a GPU would wait for the many calls that small products take one by
    one.
    """
    by_shape = defaultdict(list)
    for number, x in enumerate(matrices):
        by_shape[x.shape[-2:]].append(number)
    steps = [Tensor()] * len(matrices)
    for shape, numbers in by_shape.items():
        stacks = [matrices[n].reshape(-1, *shape) for n in numbers]
        together = orthogonalised(torch.cat(stacks)).mul_(0.2 * max(shape) ** 0.5)
        for n, step in zip(numbers, together.split([len(stack) for stack in stacks]), strict=True):
            steps[n] = step.reshape(matrices[n].shape)
    return steps


Entry = tuple[Tensor, dict, torch.Generator | None]  # a weight, its group, and what rounds it at random


class SeededOptimizer(Optimizer):
    """Gives `update` an Entry for each weight that has a gradient; bfloat16 ones have a generator each."""

    def __init__(self, groups: list[dict], seed: int, **defaults):
        super().__init__(groups, defaults | {"seed": seed, "step": 0})

    @torch.no_grad()
    def step(self) -> None:
        number, entries = 0, []
        for group in self.param_groups:
            group["step"] += 1
            for weight in group["params"]:
                seed = (group["seed"] + group["step"] * 2**24 + number) % 2**63
                number += 1
                if weight.grad is not None:
                    rounds = weight.dtype == torch.bfloat16
                    draw = torch.Generator(weight.device).manual_seed(seed) if rounds else None
                    entries.append((weight, group, draw))
        self.update(entries)


class Muon(SeededOptimizer):
    """Momentum whose matrices are orthogonalised, so that all directions of a matrix learn at one rate.

    For matrices (rows, columns) and stacks of them (n, rows, columns), each by itself. A group's "split" and
    "dim" are Tensor.split's: how a weight that holds several matrices side by side falls into them.
    Source: Jordan et al., kellerjordan.github.io/posts/muon.
    """

    def __init__(self, groups: list[dict], lr: float, seed: int, momentum: float = 0.95):
        super().__init__(groups, seed, lr=lr, momentum=momentum)

    def update(self, weights: list[Entry]) -> None:
        batch, size = [], 0
        for entry in weights:
            if batch and size + entry[0].numel() > TOGETHER[entry[0].device.type]:
                self._step_together(batch)
                batch, size = [], 0
            batch.append(entry)
            size += entry[0].numel()
        if batch:
            self._step_together(batch)

    def _step_together(self, weights: list[Entry]) -> None:
        directions = [self._direction(weight, group) for weight, group, _ in weights]
        split = [
            whole_matrices(direction).float().split(group["split"], group["dim"])
            for direction, (_, group, _) in zip(directions, weights, strict=True)
        ]
        with tf32():
            steps = iter(muon_steps([part for parts in split for part in parts]))
        for (weight, group, draw), direction, parts in zip(weights, directions, split, strict=True):
            step = own_rows(torch.cat([next(steps) for _ in parts], group["dim"]), direction)
            weight = local(weight)
            if draw:
                weight.copy_(round_at_random(weight.float().sub_(step, alpha=group["lr"]), draw))
            else:
                weight.sub_(step, alpha=group["lr"])

    def _direction(self, weight: Tensor, group: dict) -> Tensor:
        """The gradient and its mean over the past, in Nesterov's way."""
        state = self.state[weight]
        if not state:
            state["mean"] = torch.zeros_like(weight)
        mean = state["mean"].lerp_(weight.grad, 1 - group["momentum"])
        return weight.grad.lerp(mean, group["momentum"])


class RoundingAdamW(SeededOptimizer):
    """AdamW whose moments have the dtype of their weight. What is bfloat16 is rounded at random, so that
    updates far below its spacing, 1/256 to 1/128 of a weight, add up as they should.

    It computes in float32, in pieces that need little memory.
    """

    PIECE = 2**24  # elements

    def __init__(self, groups, lr: float, betas: tuple[float, float], seed: int, weight_decay: float = 0.0):
        super().__init__(groups, seed, lr=lr, betas=betas, eps=1e-8, weight_decay=weight_decay)

    def update(self, weights: list[Entry]) -> None:
        for weight, group, draw in weights:
            state = self.state[weight]
            if not state:
                state |= {"mean": torch.zeros_like(weight), "square": torch.zeros_like(weight)}
            whole = weight, state["mean"], state["square"], weight.grad
            for piece in zip(*(tensor.view(-1).split(self.PIECE) for tensor in whole)):
                self._update(*piece, group, draw)

    @staticmethod
    def _update(weight, mean, square, grad, group: dict, draw: torch.Generator | None) -> None:
        """One step for (n,) tensors, of which the first three are changed."""
        w, m, v, g = (tensor.float() for tensor in (weight, mean, square, grad))
        (beta1, beta2), lr, n = group["betas"], group["lr"], group["step"]
        m = m.lerp(g, 1 - beta1)
        v = (v * beta2).addcmul_(g, g, value=1 - beta2)
        scale = (v / (1 - beta2**n)).sqrt_().add_(group["eps"])
        w = (w * (1 - lr * group["weight_decay"])).addcdiv_(m, scale, value=-lr / (1 - beta1**n))
        for target, value in ((weight, w), (mean, m), (square, v)):
            target.copy_(round_at_random(value, draw) if draw else value)


def round_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16, up or down with the probability that makes the mean of the result x.

    bfloat16 is the upper half of the bits of float32: a random lower half is added, and carries into it.
    """
    noise = torch.randint(2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return ((x.view(torch.int32) + noise) & -(2**16)).view(torch.float32).bfloat16()
