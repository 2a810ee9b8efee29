"""What is routed in the tests, and how: random scores, bounds, chunks and padding; the same in every run."""

import random
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from model import MoEConfig
from router import ROUTERS
from tests.reference import SETTINGS

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
SEEDS = range(6)
each_kind = pytest.mark.parametrize("kind", KINDS)


def ramp(x: Tensor, height: float) -> Tensor:
    return torch.linspace(0, height, x.shape[1])[None, :, None]


def one_expert(x: Tensor, g: torch.Generator) -> Tensor:
    return torch.eye(x.shape[-1])[torch.randint(x.shape[-1], (1,), generator=g)]


def make_scores(kind: str, B: int, T: int, E: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return KINDS[kind](torch.randn(B, T, E, generator=g), g)


@dataclass(frozen=True, eq=False)
class Case:
    seed: int
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


@cache
def draw(kind: str, seed: int, budget: int) -> Case:
    """A random case of at most `budget` scores; the ends of every range come often."""
    rng = random.Random(f"{kind} {seed}")
    E = rng.choice([2, 3, 4, 8, 128, rng.randint(2, 128)])
    k = rng.choice([1, 2, max(1, E // 4), E, rng.randint(1, E), rng.randint(1, E)])
    k = min(k, E)
    B = rng.randint(1, 4)
    T = min(rng.choice([1, 2, 17, 64, 300, rng.randint(1, 300)]), budget // (B * E))
    min_experts = rng.choice([0, 1, k, rng.randint(0, k)])
    max_experts = rng.choice([None, k, E, rng.randint(k, E)])
    return Case(seed, make_scores(kind, B, T, E, seed), k, min_experts, max_experts)


def cases(kind: str, budget: int = 40_000) -> list[Case]:
    return [draw(kind, seed, budget) for seed in SEEDS]


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


def feed(cache, scores: Tensor, sizes: list[int], active: Tensor | None = None) -> Tensor:
    """The masks of scores (B, T, E), fed to an Expert Cache in chunks of these sizes."""
    chunks = scores.split(sizes, 1)
    if active is None:
        return torch.cat([cache.select(chunk) for chunk in chunks], 1)
    return torch.cat([cache.select(*chunk) for chunk in zip(chunks, active.split(sizes, 1))], 1)


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


def config_of(name: str, **settings) -> MoEConfig:
    return MoEConfig(router=name, **SETTINGS.get(name, {}) | settings)


def select(name: str, scores: Tensor, k: int = 2, **settings) -> Tensor:
    """The mask of a router of the table in a new model with these settings."""
    row, E = ROUTERS[name], scores.shape[-1]
    sizes = {"n_expert": E // 2, "n_null": E // 2} if "n_null" in row.options else {"n_expert": E}
    config = config_of(name, k=k, **sizes, **settings)
    told = config.options_of(row)
    if "state" in row.options:
        told["state"] = {key: x.to(scores.device) for key, x in row.state(config).items()}
    return row.select(scores, k, **told)


def pairs(mask: Tensor) -> Tensor:
    """Experts of each token: (B, T, E) -> (B, T)."""
    return mask.sum(-1)


def same(got: Tensor, want: Tensor) -> bool:
    """Bool, of equal shape, equal everywhere."""
    return got.dtype == want.dtype == torch.bool and torch.equal(got, want)


def refused(message: str):
    """The code in this context must raise a ValueError of one line that says so (a regular expression)."""
    return pytest.raises(ValueError, match=rf"\A.*{message}.*\Z")
