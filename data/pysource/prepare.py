"""The Python source on this machine, about 70 MB, with a BPE trained on it. Needs no network; half a minute.

    python data/pysource/prepare.py

Folders: the standard library, and the installed torch, numpy and sympy packages (those that are there). Left
out: site-packages, test folders (they are half of the files and not installed everywhere), files that are
empty, not UTF-8 or above 500 kB (generated tables), and files whose content occurred before.
"""

import importlib.util
import os
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import bad_input_exits, parse
from data import train_bpe, write_dataset
from data.source import digest, name_hash, print_summary, read_text, sample

FOLDER = Path(__file__).parent
PACKAGES = ("torch", "numpy", "sympy")
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "testing", "idle_test"}
MAX_FILE_BYTES = 500_000


@dataclass(frozen=True)
class Options:
    """Options of data/pysource/prepare.py"""

    vocab_size: int = 4096  # tokens of the BPE trained on the source
    val_fraction: float = 0.015  # share of the files kept for validation; a file's path alone decides


def main(argv: list[str]) -> None:
    """Write the dataset pysource. ValueError: no source found, options out of range."""
    options = Options(**parse(argv, Options)[0])
    if not 0 < options.val_fraction < 1:
        raise ValueError(f"--val_fraction={options.val_fraction}; allowed is anything between 0 and 1")
    start = time.time()
    files = read_files(roots())
    train = [text for name, text in files.items() if name_hash(name) >= options.val_fraction]
    val = [text for name, text in files.items() if name_hash(name) < options.val_fraction]
    tokenizer = train_bpe(sample(train), options.vocab_size, "pysource")
    meta = write_dataset(FOLDER, train, val, tokenizer, digest(files.items()), prompt="class")
    print_summary(FOLDER, meta, time.time() - start)


def roots() -> dict[str, Path]:
    """Name -> folder of everything that is read, in order."""
    folders = {"stdlib": Path(sysconfig.get_path("stdlib"))}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            print(f"{package} is not installed: its source is left out")
        else:
            folders[package] = Path(spec.submodule_search_locations[0])
    return folders


def read_files(folders: dict[str, Path]) -> dict[str, str]:
    """Name ("torch/nn/functional.py") -> text of every Python file wanted, sorted, each text once."""
    names = {
        f"{root}/{name}": folder / name for root, folder in folders.items() for name in python_files(folder)
    }
    files, seen = {}, set()
    for name, path in tqdm(names.items(), desc="reading", unit=" files", disable=None):
        try:
            text = read_text(path)
        except (ValueError, OSError):  # another encoding, or not ours to read
            continue
        if text.strip() and text not in seen:
            files[name] = text
            seen.add(text)
    return files


def python_files(folder: Path) -> Iterator[str]:
    """Paths relative to `folder`, with forward slashes, in sorted order."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED]
        found += [Path(parent, name) for name in files if name.endswith(".py")]
    small = [path for path in found if path.is_file() and path.stat().st_size <= MAX_FILE_BYTES]
    return iter(sorted(path.relative_to(folder).as_posix() for path in small))


if __name__ == "__main__":
    with bad_input_exits():
        main(sys.argv[1:])
