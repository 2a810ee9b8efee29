"""Datasets: files of token ids made by data/<name>/prepare.py, and the loader that cuts batches from them.

A dataset is a folder with train.bin and val.bin (uint16 ids, uint32 where the vocabulary is larger, every
document followed by end-of-text) and meta.json (the tokenizer, sizes, where the text came from). Where only
answers are learned, train_learn.bin and val_learn.bin say which tokens those are (data/answers.py).
"""

import functools
import hashlib
import importlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import require
from config.check import COUNT, check, door
from config.files import put_on_disk, scratch
from data.answers import Answers, pack, train_windows
from data.hugging_face import hf_tokenizer, is_hugging_face
from data.source import file_sha256, pieces
from data.tokenizer import AnyTokenizer, make_tokenizer, train_bpe

__all__ = [
    "AnyTokenizer",
    "Dataset",
    "hf_tokenizer",
    "is_hugging_face",
    "load",
    "make_tokenizer",
    "train_batch",
    "train_bpe",
    "val_batches",
    "write_dataset",
]

HOME = Path(__file__).parent
PIECES_AT_ONCE = 256  # that the threads get together
SPLITS = ("train", "val")
FILE_DTYPES = {"uint16": "<u2", "uint32": "<u4"}  # of token ids
Document = str | np.ndarray | list[int]  # a text, or its token ids
Batch = tuple[torch.Tensor, torch.Tensor]  # inputs x and targets y, (B, T) int64 each


@dataclass(frozen=True)
class Dataset:
    """`train` and `val`: (n,) memory maps of token ids; `meta`: what meta.json in `folder` says.

    `train_answers` and `val_answers`: what is learned of them, None for all. `sha256` (hex) is of all these.
    """

    train: np.ndarray
    val: np.ndarray
    tokenizer: AnyTokenizer
    meta: dict
    folder: Path
    sha256: str
    train_answers: Answers | None = None
    val_answers: Answers | None = None

    def train_batch(self, step: int, batch_size: int, block_size: int, seed: int) -> Batch:
        with door(self.folder / "train.bin"):
            return train_batch(self.train, step, batch_size, block_size, seed, self.train_answers)

    def val_batches(self, block_size: int, batch_size: int, n_windows: int) -> list[Batch]:
        with door(self.folder / "val.bin"):
            return val_batches(self.val, block_size, batch_size, n_windows, self.val_answers)


def load(dataset: str) -> Dataset:
    """Open a dataset by the path of its folder, or by a name in data/, which is prepared now if need be.

    ValueError, one line: unknown, missing, truncated or empty dataset, or ids outside the vocabulary.
    """
    folder = _folder_of(dataset)
    if _missing(folder) and _is_known(folder):
        importlib.import_module(f"data.{folder.name}.prepare").main([])
    if missing := _missing(folder):
        raise ValueError(f"{folder} has no {missing}; {_remedy(folder)}")
    meta = _read_meta(folder)
    tokenizer = make_tokenizer(meta["tokenizer"], folder / "meta.json")
    for name, size in meta["files"].items():
        if (found := (folder / name).stat().st_size) != size:
            raise ValueError(f"{folder / name} has {found} bytes and not {size}; {_remedy(folder)}")
    train, val = (_open_tokens(folder / f"{split}.bin", meta, tokenizer.vocab_size) for split in SPLITS)
    learn = [_open_learn(folder, split, meta, len(tokens)) for split, tokens in zip(SPLITS, (train, val))]
    sums = {name: file_sha256(folder / name) for name in meta["files"]}
    for name, sha256 in meta.get("sha256", sums).items():  # older datasets have none
        if sums.get(name) != sha256:
            raise ValueError(f"{folder / name} is not as it was written (sha256); {_remedy(folder)}")
    whole = hashlib.sha256("".join(sums[name] for name in sorted(sums) if name.endswith(".bin")).encode())
    return Dataset(train, val, tokenizer, meta, folder, whole.hexdigest(), *learn)


def train_batch(
    tokens: np.ndarray, step: int, batch_size: int, block_size: int, seed: int, answers: Answers | None = None
) -> Batch:
    """The batch, of batch_size sequences of block_size tokens, of training step `step` (0, 1, ...).

    A pure function of its arguments: resuming needs only the step, and nothing else can shift the data. An
    epoch visits the windows of one tiling of `tokens` once each, in random order; each epoch has its own
    tiling (random first token) and order. A batch may straddle epochs. With `answers`, windows are those of
    data/answers.py, and y is -1 where nothing is learned. ValueError: fewer tokens than one window.
    """
    samples = range(step * batch_size, (step + 1) * batch_size)
    if answers:
        return answers.rows(tokens, train_windows(answers, samples, block_size, seed), block_size)
    per_epoch = _windows_per_epoch(len(tokens), block_size)
    starts = [_epoch_starts(len(tokens), block_size, seed, n // per_epoch)[n % per_epoch] for n in samples]
    return _windows(tokens, starts, block_size)


def val_batches(
    tokens: np.ndarray, block_size: int, batch_size: int, n_windows: int, answers: Answers | None = None
) -> list[Batch]:
    """The same `n_windows` windows each time, never overlapping, spread evenly over `tokens`; all if fewer.

    They come in batches as in train_batch; the last may have fewer rows. ValueError: fewer tokens than one
    window.
    """
    windows = pack(answers, block_size) if answers else range(_whole_windows(len(tokens), block_size))
    count = min(n_windows, len(windows))
    chosen = [windows[i * len(windows) // count] for i in range(count)]
    batches = [chosen[i : i + batch_size] for i in range(0, count, batch_size)]
    if answers:
        return [answers.rows(tokens, batch, block_size) for batch in batches]
    return [_windows(tokens, [i * block_size for i in batch], block_size) for batch in batches]


def write_dataset(
    folder: Path | str,
    train_docs: Iterable[Document],
    val_docs: Iterable[Document],
    tokenizer: AnyTokenizer,
    source_sha256: str,
    files: dict[str, str | bytes] | None = None,
    **meta,
) -> dict:
    """Write a dataset and return what its meta.json says. Documents are texts or token ids (1-D).

    `files`: name -> content of further files of the dataset; `meta`: further entries of meta.json.
    Everything is written beside the old dataset first: if that fails, the old one stays whole.
    ValueError: an id or a character that the tokenizer lacks, an empty split.
    """
    folder, dtype = Path(folder), "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    folder.mkdir(parents=True, exist_ok=True)
    about = {"vocab_size": tokenizer.vocab_size, "source_sha256": source_sha256, **meta, "dtype": dtype}
    with scratch(folder) as new:
        for split, docs in zip(SPLITS, (train_docs, val_docs)):
            about[split] = _write_tokens(new / f"{split}.bin", docs, tokenizer, FILE_DTYPES[dtype])
        for name, content in (files or {}).items():
            (new / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        about["files"] = {path.name: path.stat().st_size for path in sorted(new.iterdir())}
        about["sha256"] = {name: file_sha256(new / name) for name in about["files"]}
        about["tokenizer"] = tokenizer.meta
        (new / "meta.json").write_text(json.dumps(about), encoding="utf-8")
        put_on_disk(new)
        _move_in(new, folder, [*about["files"], "meta.json"])
    return about


def _folder_of(dataset: str) -> Path:
    if _is_known(HOME / dataset):
        return HOME / dataset
    if Path(dataset).is_dir():
        return Path(dataset).resolve()
    names = ", ".join(sorted(path.parent.name for path in HOME.glob("*/prepare.py")))
    raise ValueError(f"unknown dataset {dataset!r}; give {names}, or a folder with a meta.json")


def _is_known(folder: Path) -> bool:
    return folder.parent == HOME and (folder / "prepare.py").is_file()


def _missing(folder: Path) -> str | None:
    if not (folder / "meta.json").is_file():
        return "meta.json"
    return next((name for name in _read_meta(folder)["files"] if not (folder / name).is_file()), None)


META = {"files": {"train.bin": COUNT, "val.bin": COUNT, str: COUNT}, "sha256?": {str: str}, "dtype?": str}
META |= {"tokenizer": dict, "source_sha256": str, "prompt?": str}


def _read_meta(folder: Path) -> dict:
    path = folder / "meta.json"
    with door(path, _remedy(folder)):
        meta = json.loads(path.read_text(encoding="utf-8"))
        check(meta, META)
        dtype = meta.setdefault("dtype", "uint16")  # as in older ones
        require(dtype in FILE_DTYPES, "dtype", dtype, " or ".join(FILE_DTYPES))
    return meta


def _remedy(folder: Path) -> str:
    return f"make it again: python data/{folder.name}/prepare.py" if _is_known(folder) else "prepare it again"


def _open_tokens(path: Path, meta: dict, vocab_size: int) -> np.ndarray:
    with door(path, _remedy(path.parent)):
        tokens = np.memmap(path, dtype=FILE_DTYPES[meta["dtype"]], mode="r")  # fails if it is empty
    if (largest := int(tokens.max())) >= vocab_size:
        raise ValueError(f"{path} holds token id {largest}; its tokenizer has ids 0..{vocab_size - 1} only")
    return tokens


def _open_learn(folder: Path, split: str, meta: dict, n_tokens: int) -> Answers | None:
    path = folder / f"{split}_learn.bin"
    if path.name not in meta["files"]:
        return None
    with door(path, _remedy(folder)):
        learn = np.fromfile(path, np.uint8)
        whole = len(learn) == n_tokens and learn.max() == 1
        require(whole, "its content", "damaged", f"{n_tokens} bytes, one for each token: 1 or 0, not all 0")
        return Answers(learn)


def _whole_windows(n_tokens: int, block_size: int) -> int:
    """Windows of block_size inputs that fit, each with one more token as the last target."""
    if n_tokens < block_size + 1:
        window, remedy = f"one window of block_size + 1 = {block_size + 1}", "use a smaller one, or more text"
        raise ValueError(f"{n_tokens} tokens are fewer than {window}: {remedy}")
    return (n_tokens - 1) // block_size


def _windows_per_epoch(n_tokens: int, block_size: int) -> int:
    """One less than fit, so that every random offset has room for the same number of windows."""
    return max(1, _whole_windows(n_tokens, block_size) - 1)


@functools.lru_cache(maxsize=4)
def _epoch_starts(n_tokens: int, block_size: int, seed: int, epoch: int) -> np.ndarray:
    count = _windows_per_epoch(n_tokens, block_size)
    rng = np.random.default_rng([seed, epoch])
    offset = rng.integers(min(block_size, n_tokens - count * block_size))
    return offset + block_size * rng.permutation(count)


def _windows(tokens: np.ndarray, starts: list[int], block_size: int) -> Batch:
    rows = np.stack([tokens[start : start + block_size + 1] for start in starts]).astype(np.int64)
    rows = torch.from_numpy(rows)  # (B, T+1)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _write_tokens(path: Path, docs: Iterable[Document], tokenizer: AnyTokenizer, dtype: str) -> dict:
    counts = {"documents": 0, "tokens": 0, "bytes": 0}
    total = sum(map(len, docs)) if isinstance(docs, list) else None
    bar = tqdm(desc=path.stem, total=total, unit="", unit_scale=True, disable=None)
    with open(path, "wb") as file, bar:
        for length, ids in _encoded(docs, tokenizer):
            file.write(ids.astype(dtype).tobytes())
            counts["documents"] += length is None
            counts["tokens"] += len(ids)
            counts["bytes"] += int(tokenizer.token_bytes[ids].sum())
            bar.update(length or 0)
    if counts["tokens"] == counts["documents"]:
        raise ValueError(f"the {path.stem} split would be empty")
    return counts


def _encoded(docs: Iterable[Document], tokenizer: AnyTokenizer) -> Iterator[tuple[int | None, np.ndarray]]:
    """(length, ids) of the pieces of all documents in order; length None marks the end of a document."""
    parts = _parts(docs, tokenizer)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while batch := list(itertools.islice(parts, PIECES_AT_ONCE)):
            lengths = [None if part is None else len(part) for part in batch]
            yield from zip(lengths, pool.map(functools.partial(_ids, tokenizer), batch), strict=True)


def _parts(docs: Iterable[Document], tokenizer: AnyTokenizer) -> Iterator[Document | None]:
    for doc in docs:
        yield from [tokenizer.start, *pieces(doc)] if isinstance(doc, str) else [doc]
        yield None


def _ids(tokenizer: AnyTokenizer, part: Document | None) -> np.ndarray:
    if part is None:
        return np.array([tokenizer.eot])
    if isinstance(part, str):
        return tokenizer.encode_array(part)
    ids = np.asarray(part, np.int64)
    if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        allowed = f"0..{tokenizer.vocab_size - 1}"
        raise ValueError(f"a document holds ids {ids.min()}..{ids.max()}; allowed are {allowed}")
    return ids


def _move_in(new: Path, folder: Path, names: list[str]) -> None:
    """Without meta.json a folder is no dataset: interrupted halfway, old and new files cannot mix."""
    (folder / "meta.json").unlink(missing_ok=True)
    for name in names:
        os.replace(new / name, folder / name)
