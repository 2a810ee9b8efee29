"""GSM8K: 8,792 grade school word problems with worked answers (arXiv 2110.14168), to fine-tune on.

    python data/gsm8k/prepare.py                             (downloads it; the tokenizer of OLMoE-1B-7B)
    python data/gsm8k/prepare.py --source=train.jsonl --test_source=test.jsonl --tokenizer=FOLDER

Problems are learned as data/pairs/prepare.py says. Answers stay as they are published, with their calculator
notes (<<48/2=24>>), and end in "#### RESULT". test.jsonl, which `python experiments/gsm8k.py` solves, is the
official test set; with --source alone it is the validation problems, which chose best.pt.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import bad_input_exits, parse
from data.pairs.prepare import Pair, document, read_pairs, split, write_pairs
from data.source import download, print_summary
from data.tokenizer import choose_tokenizer

FOLDER = Path(__file__).parent
COMMIT = "3101c7d5072418e28b9008a6636bde82a006892c"
URL = f"https://raw.githubusercontent.com/openai/grade-school-math/{COMMIT}/grade_school_math/data"
SHA256 = {
    "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}
VAL_FRACTION = 0.03


@dataclass(frozen=True)
class Options:
    """Options of data/gsm8k/prepare.py"""

    source: str | None = None  # problems to learn, on disk; none: download the official ones
    test_source: str | None = None  # problems to test with, on disk; none: official, or validation's
    tokenizer: str = "allenai/OLMoE-1B-7B-0924"  # as in data/pairs/prepare.py
    vocab_size: int = 4096  # tokens of the trained bpe
    out_dir: str | None = None  # folder of the dataset; none: data/gsm8k


def main(argv: list[str]) -> None:
    """Write the dataset. ValueError: no network, a line that is no problem, unknown tokenizer."""
    options = Options(**parse(argv, Options)[0])
    folder = Path(options.out_dir) if options.out_dir else FOLDER
    train, val = split(read_problems(options.source or fetch("train.jsonl")), VAL_FRACTION)
    tests = options.test_source or (None if options.source else fetch("test.jsonl"))
    test = read_problems(tests) if tests else val
    tokenizer = choose_tokenizer(options.tokenizer, list(map(document, train)), options.vocab_size, "gsm8k")
    lines = "".join(json.dumps({"question": p.prompt, "answer": p.answer}) + "\n" for p in test)
    meta = write_pairs(folder, train, val, tokenizer, {"test.jsonl": lines})
    print_summary(folder, meta)
    print(f"  test   {len(test):>9,} problems in test.jsonl{' (those of validation)' if test is val else ''}")


def read_problems(path: str | Path) -> list[Pair]:
    return read_pairs(path, "question", "answer")


def fetch(name: str) -> Path:
    """A file of the official repository, downloaded into this folder and verified."""
    return download(f"{URL}/{name}", SHA256[name], FOLDER / f"official_{name}")


if __name__ == "__main__":
    with bad_input_exits():
        main(sys.argv[1:])
