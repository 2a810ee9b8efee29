"""The Python source on this machine, about 70 MB, with a BPE trained on it. Needs no network; half a minute.

    python data/pysource/prepare.py

Folders: the standard library, and the installed torch, numpy and sympy packages (those that are there). Left
out: site-packages, test folders (they are half of the files and not installed everywhere), files that are
empty, not UTF-8 or above 500 kB (generated tables), and files whose content occurred before.
"""

import importlib.util
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import bad_input_exits, parse, require
from data import train_bpe, write_dataset
from data.source import digest, name_hash, print_summary, read_texts, sample, walk

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
    require(0 < options.val_fraction < 1, "val_fraction", options.val_fraction, "between 0 and 1")
    files = read_files(roots())
    train = [text for name, text in files.items() if name_hash(name) >= options.val_fraction]
    val = [text for name, text in files.items() if name_hash(name) < options.val_fraction]
    tokenizer = train_bpe(sample(train), options.vocab_size, "pysource")
    meta = write_dataset(FOLDER, train, val, tokenizer, digest(files.items()), prompt="class")
    print_summary(FOLDER, meta)


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
    """Name ("torch/nn/functional.py") -> text of every Python file wanted, in order, each text once."""
    paths = {}
    for root, folder in folders.items():
        for name in walk(folder, SKIPPED.__contains__):
            path = folder / name
            if path.suffix == ".py" and path.is_file() and path.stat().st_size <= MAX_FILE_BYTES:
                paths[f"{root}/{name}"] = path
    first = {}
    for name, text in read_texts(paths).items():
        first.setdefault(text, name)
    return {name: text for text, name in first.items()}


if __name__ == "__main__":
    with bad_input_exits():
        main(sys.argv[1:])
