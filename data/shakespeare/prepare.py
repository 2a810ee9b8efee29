"""Tiny Shakespeare, 1.1 MB of plays: the smallest text on which a language model shows something.

    python data/shakespeare/prepare.py                        (downloads it)
    python data/shakespeare/prepare.py --source=PATH          (a copy on disk)

The first 90% is for training and the last 10% for validation, as in nanoGPT. The default tokenizer is a BPE
of 1,024 tokens trained on the text itself: with GPT-2's 50,257 the text would be 300 thousand tokens, and
most of the vocabulary would never occur.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import bad_input_exits, parse
from data import write_dataset
from data.source import check_sha256, download, print_summary, read_text
from data.tokenizer import choose_tokenizer

FOLDER = Path(__file__).parent
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TRAIN_FRACTION = 0.9


@dataclass(frozen=True)
class Options:
    """Options of data/shakespeare/prepare.py"""

    source: str | None = None  # Tiny Shakespeare already on disk; none: download it
    tokenizer: str = "bpe"  # bpe (trained), gpt2, a meta.json, or a Hugging Face folder or OWNER/MODEL
    vocab_size: int = 1024  # tokens of the trained bpe


def main(argv: list[str]) -> None:
    """Write the dataset. ValueError: no network, another file than expected, unknown tokenizer."""
    options = Options(**parse(argv, Options)[0])
    text = read_text(source_file(options.source))
    cut = int(TRAIN_FRACTION * len(text))
    tokenizer = choose_tokenizer(options.tokenizer, [text[:cut]], options.vocab_size, "shakespeare")
    meta = write_dataset(FOLDER, [text[:cut]], [text[cut:]], tokenizer, SHA256, prompt="ROMEO:\n")
    print_summary(FOLDER, meta)


def source_file(source: str | None) -> Path:
    """The verified file: the user's copy, or one downloaded into this folder."""
    if source is None:
        return download(URL, SHA256, FOLDER / "input.txt")
    what = f"--source={source} (for text of your own use data/textfile/prepare.py; this)"
    check_sha256(Path(source), SHA256, what)
    return Path(source)


if __name__ == "__main__":
    with bad_input_exits():
        main(sys.argv[1:])
