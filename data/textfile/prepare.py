"""Any text of yours: one file, or a folder with everything in it that is UTF-8 text.

    python data/textfile/prepare.py --source=PATH
    python data/textfile/prepare.py --source=PATH --tokenizer=data/pysource/meta.json --out_dir=data/mine

To fine-tune a checkpoint on new text give it the tokenizer of the checkpoint's dataset, as in the second
line. A file is one document; its last lines are for validation. In a folder every file is a document, read in
sorted order (names that begin with a dot are skipped, and so are binary files), and files are drawn for
validation by their names. With --split_on='<|endoftext|>' a file is as many documents as that marker joins.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import bad_input_exits, parse, require
from data import write_dataset
from data.source import digest, name_hash, print_summary, read_text, read_texts, walk
from data.tokenizer import END_OF_TEXT, choose_tokenizer

FOLDER = Path(__file__).parent
MIN_CHARS = 1_000


@dataclass(frozen=True)
class Options:
    """Options of data/textfile/prepare.py"""

    source: str | None = None  # the file or folder to read (required)
    split_on: str | None = None  # a text that separates documents within a file, and is left out
    tokenizer: str = "bpe"  # bpe (trained), gpt2, a meta.json, or a Hugging Face folder or OWNER/MODEL
    vocab_size: int = 4096  # tokens of the trained bpe; 1024 is plenty for 1 MB
    val_fraction: float = 0.1  # share of the text kept for validation
    out_dir: str | None = None  # folder of the dataset; none: data/textfile


def main(argv: list[str]) -> None:
    """Write a dataset from --source. ValueError: nothing there, not text, too small, options out of range."""
    options = Options(**parse(argv, Options)[0])
    require(0 < options.val_fraction < 1, "val_fraction", options.val_fraction, "between 0 and 1")
    require(options.split_on != "", "split_on", "''", "a text, or none")
    out_dir = Path(options.out_dir) if options.out_dir else FOLDER
    files = read_source(options.source, out_dir)
    if options.split_on:
        files = dict(documents(files, options.split_on))
    elif any(END_OF_TEXT in text for text in files.values()):
        print(f"note: the text has {END_OF_TEXT}; if it ends documents, give --split_on='{END_OF_TEXT}'")
    n_chars = sum(map(len, files.values()))
    if n_chars < MIN_CHARS:
        raise ValueError(
            f"--source={options.source} holds {n_chars} characters of text; give at least {MIN_CHARS:,}"
        )
    train, val = split(files, options.val_fraction)
    tokenizer = choose_tokenizer(options.tokenizer, train, options.vocab_size, out_dir.name)
    meta = write_dataset(out_dir, train, val, tokenizer, digest(files.items()))
    print_summary(out_dir, meta)


def read_source(source: str | None, out_dir: Path) -> dict[str, str]:
    """Name -> text of the file, or of all text files in the folder except those of the dataset itself."""
    if source is None:
        raise ValueError("say what to read: python data/textfile/prepare.py --source=FILE_OR_FOLDER")
    path = Path(source)
    if not path.is_dir():
        return {path.name: read_text(path)}
    paths = {name: path / name for name in walk(path, lambda name: name.startswith("."))}
    paths = {name: path for name, path in paths.items() if out_dir.resolve() not in path.resolve().parents}
    files = read_texts(paths)
    print(f"{len(files)} text files; {len(paths) - len(files)} others were skipped")
    return files


def documents(files: dict[str, str], marker: str) -> Iterator[tuple[str, str]]:
    """Name and text of every part between markers, without the space around it."""
    for name, text in files.items():
        parts = filter(None, map(str.strip, text.split(marker)))
        yield from ((f"{name} {number}", part) for number, part in enumerate(parts))


def split(files: dict[str, str], val_fraction: float) -> tuple[list[str], list[str]]:
    """Documents for training and validation; both get at least one, and no giant goes to validation."""
    if len(files) == 1:
        [text] = files.values()
        cut = nearest_line_start(text, int((1 - val_fraction) * len(text)))
        return [text[:cut]], [text[cut:]]
    wanted, taken, val = val_fraction * sum(map(len, files.values())), 0, set()
    for name in sorted(files, key=name_hash):
        if taken + len(files[name]) <= wanted:
            val.add(name)
            taken += len(files[name])
    val = val or {min(files, key=lambda name: len(files[name]))}
    return [files[name] for name in files if name not in val], [files[name] for name in files if name in val]


def nearest_line_start(text: str, at: int) -> int:
    """The start of a line that is nearest to position `at`; `at` itself if the lines there are very long."""
    starts = [text.rfind("\n", 0, at) + 1, text.find("\n", at) + 1 or len(text)]
    cut = min(starts, key=lambda start: abs(start - at))
    return cut if 0 < cut < len(text) and abs(cut - at) < len(text) // 20 else at


if __name__ == "__main__":
    with bad_input_exits():
        main(sys.argv[1:])
