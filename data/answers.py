"""Windows of prompt/answer pairs, of which only the answers are learned.

A window begins where a pair begins, as a prompt does when the model is used, and goes on with other pairs.
A pair that does not fit to its end is only read there; it is learned in the next window, where it stands
first. So an epoch learns every answer once, each time among other neighbours. No window is padded, because
SeqTopK gives it T*K pairs of token and expert whatever is in it: padding would compete for them or, left out,
lend its share to the others. A window as long as the longest pair comes nearest to the use of the model,
where a sequence is one pair, and costs nothing in speed.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

Window = tuple[np.ndarray, int, int]  # an order of all pairs, the first place in the window, the one after it


@dataclass(frozen=True, eq=False)  # hashed by identity, for the cache below
class Answers:
    """learn (n,) uint8: 1 at the tokens of a split that are learned, answers with their end-of-text, else 0.

    Every pair is some 0s, its prompt, and then some 1s.
    """

    learn: np.ndarray

    @functools.cached_property
    def bounds(self) -> np.ndarray:
        """(pairs + 1,) where each pair begins, and the end of all."""
        begins = np.flatnonzero((self.learn[1:] == 0) & (self.learn[:-1] == 1)) + 1
        return np.concatenate([[0], begins, [len(self.learn)]])

    def rows(
        self, tokens: np.ndarray, windows: Iterable[Window], block_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, y (windows, block_size) int64 of the pairs of a split; y is -1 where nothing is learned."""
        positions, learned = map(np.stack, zip(*(self._row(*window, block_size + 1) for window in windows)))
        rows = tokens[positions].astype(np.int64)  # (B, T+1)
        targets = np.where(learned, rows, -1)
        return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(targets[:, 1:].copy())

    def _row(self, order: np.ndarray, begin: int, end: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(size,) positions of a window's tokens in the split, and whether each is learned."""
        place, parts, filled, whole = begin, [], 0, 0
        while filled < size:
            pair = order[place % len(order)]
            parts.append(np.arange(self.bounds[pair], self.bounds[pair + 1]))
            filled += len(parts[-1])
            whole = filled if place < end else whole  # pairs from `end` on are only read
            place += 1
        positions = np.concatenate(parts)[:size]
        return positions, (np.arange(size) < whole) & (self.learn[positions] == 1)


def train_windows(answers: Answers, samples: range, block_size: int, seed: int) -> list[Window]:
    """The windows of these samples (0, 1, ...). Every epoch is in its own order. ValueError as in pack."""
    windows, epoch, before = [], 0, 0
    for n in samples:
        while n - before >= len(packed := pack(answers, block_size, seed, epoch)):
            before, epoch = before + len(packed), epoch + 1
        windows.append(packed[n - before])
    return windows


@functools.cache  # few epochs, and each begins where the ones before it end
def pack(answers: Answers, block_size: int, seed: int | None = None, epoch: int = 0) -> list[Window]:
    """All windows of an epoch; without a seed, with the pairs as they come.

    A pair that is longer than block_size + 1 tokens is cut to them. ValueError: no answer begins within any.
    """
    sizes = np.diff(answers.bounds)
    order = np.arange(len(sizes))
    if seed is not None:
        order = np.random.default_rng([seed, epoch]).permutation(order)
    ends = sizes[order].cumsum()
    prompts = sizes - np.add.reduceat(answers.learn, answers.bounds[:-1], dtype=np.int64)
    windows, begin = [], 0
    while begin < len(order):
        limit = ends[begin] - sizes[order[begin]] + block_size + 1
        end = max(begin + 1, int(np.searchsorted(ends, limit, side="right")))
        if prompts[order[begin]] <= block_size:
            windows.append((order, begin, end))
        begin = end
    if not windows:
        remedy = "use a larger one, or shorter prompts"
        raise ValueError(f"every prompt is longer than block_size = {block_size}: {remedy}")
    return windows
