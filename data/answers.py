"""Windows of prompt/answer pairs, of which only the answers are learned.

A window begins where a pair begins, as a prompt does when the model is used, and goes on with the pairs after
it. What does not fit to its end is there for the model to read and is learned in the next window, where it
stands first; so an epoch learns every answer once. Nothing is padding: SeqTopK gives a window T*K pairs of
token and expert whatever is in it, and padding would compete for them (or, left out, lend its share to the
others). A window as long as the longest pair therefore comes nearest to the use of the model, where a
sequence is one pair, and costs nothing in speed.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, eq=False)  # hashed by identity, for the cache below
class Answers:
    """learn (n,) uint8: 1 at the tokens of a split that are learned, answers with their end-of-text, else 0.

    Every pair is some 0s, its prompt, and then some 1s.
    """

    learn: np.ndarray

    def rows(self, tokens: np.ndarray, windows: Iterable[tuple[int, int]], block_size: int):
        """x, y (len(windows), block_size) int64; y is -1 where nothing is learned. The end of the text goes
        on with its beginning."""
        start, end = np.array(windows).T[..., None]  # (B, 1)
        place = start + np.arange(block_size + 1)  # (B, T+1)
        rows = tokens.take(place, mode="wrap").astype(np.int64)
        learned = (place < end) & (self.learn.take(place, mode="wrap") == 1)
        x, y = rows[:, :-1], np.where(learned, rows, -1)[:, 1:]
        return torch.from_numpy(x.copy()), torch.from_numpy(y.copy())


@functools.lru_cache(maxsize=4)
def answer_windows(answers: Answers, block_size: int) -> list[tuple[int, int]]:
    """Where each window starts, and up to where it is learned: the end of its last whole pair.

    A pair that is longer than block_size + 1 tokens is cut to them. ValueError: no answer begins within any.
    """
    bounds = _pair_bounds(answers.learn)
    windows, pair = [], 0
    while pair < len(bounds) - 1:
        start, limit = int(bounds[pair]), int(bounds[pair]) + block_size + 1
        pair = max(pair + 1, int(np.searchsorted(bounds, limit, side="right")) - 1)
        end = min(int(bounds[pair]), limit)
        if answers.learn[start + 1 : end].any():
            windows.append((start, end))
    if not windows:
        raise ValueError(
            f"every prompt is longer than block_size = {block_size}: use a larger one, or shorter prompts"
        )
    return windows


def _pair_bounds(learn: np.ndarray) -> np.ndarray:
    """(pairs + 1,) where each pair begins, and the end of all."""
    begins = np.flatnonzero((learn[1:] == 0) & (learn[:-1] == 1)) + 1
    return np.concatenate([[0], begins, [len(learn)]])
