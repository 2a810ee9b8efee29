"""Prompts and their answers from a JSON Lines file, to fine-tune on: only the answers are learned.

    python data/pairs/prepare.py --source=FILE.jsonl --prompt_field=instruction --answer_field=output
    python data/pairs/prepare.py --source=FILE.jsonl --tokenizer=allenai/OLMoE-1B-7B-0924 --out_dir=data/law

Every line is a JSON object, two fields of which are texts. A pair becomes

    Question: PROMPT
    Answer: ANSWER<end-of-text>

and is learned from the space before ANSWER to end-of-text; a model is used by giving it all before that space
(prompt_of). Pairs are drawn for validation by their prompts, so that a prompt is never on both sides.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import bad_input_exits, parse, require
from data import AnyTokenizer, write_dataset
from data.arithmetic.prepare import prompt_of
from data.source import digest, name_hash, print_summary, read_text
from data.tokenizer import choose_tokenizer

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Options:
    """Options of data/pairs/prepare.py"""

    source: str | None = None  # the JSON Lines file to read (required)
    prompt_field: str = "prompt"  # the field of each line that is given
    answer_field: str = "answer"  # the field of each line that is learned
    tokenizer: str = "bpe"  # bpe (trained), gpt2, a meta.json, or a Hugging Face folder or OWNER/MODEL
    vocab_size: int = 4096  # tokens of the trained bpe
    val_fraction: float = 0.05  # share of the pairs kept for validation
    out_dir: str | None = None  # folder of the dataset; none: data/pairs


class Pair(NamedTuple):
    prompt: str
    answer: str


def main(argv: list[str]) -> None:
    """Write a dataset from --source. ValueError: no file, a line that is no pair, a bad option."""
    options = Options(**parse(argv, Options)[0])
    require(0 < options.val_fraction < 1, "val_fraction", options.val_fraction, "between 0 and 1")
    if options.source is None:
        raise ValueError("say what to read: python data/pairs/prepare.py --source=FILE.jsonl")
    folder = Path(options.out_dir) if options.out_dir else FOLDER
    pairs = read_pairs(options.source, options.prompt_field, options.answer_field)
    train, val = split(pairs, options.val_fraction)
    texts = list(map(document, train))
    tokenizer = choose_tokenizer(options.tokenizer, texts, options.vocab_size, folder.name)
    print_summary(folder, write_pairs(folder, train, val, tokenizer))


def read_pairs(source: str | Path, prompt_field: str, answer_field: str) -> list[Pair]:
    """The pairs of a JSON Lines file. ValueError: what is wrong, and with which line."""
    pairs = []
    for number, line in enumerate(read_text(Path(source)).split("\n"), start=1):
        if line.strip():
            pairs.append(Pair(*read_fields(line, (prompt_field, answer_field), f"{source}, line {number}")))
    if len(pairs) < 2:
        raise ValueError(f"{source} holds {len(pairs)} pairs; give at least 2: one to learn, one to validate")
    return pairs


def read_fields(line: str, names: Iterable[str], where: str) -> list[str]:
    """The texts of these fields. ValueError, beginning with `where`, if they are not there."""
    try:
        fields = json.loads(line)
    except ValueError as err:
        raise ValueError(f"{where} is not JSON: {err}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{where} is not a JSON object: write {{...}}")
    for name in names:
        if name not in fields:
            raise ValueError(f"{where} has no field {name!r}; its fields are {', '.join(map(repr, fields))}")
        if not isinstance(fields[name], str) or not fields[name].strip():
            raise ValueError(f"{where}: field {name!r} is {fields[name]!r}, but must be a text, not empty")
    return [fields[name].strip() for name in names]


def split(pairs: list[Pair], val_fraction: float) -> tuple[list[Pair], list[Pair]]:
    """Pairs for training and validation; both get at least one. ValueError: all have the same prompt."""
    places = [name_hash(pair.prompt) for pair in pairs]
    if min(places) == max(places):
        raise ValueError("all pairs have the same prompt: give at least two, one of them to validate")
    limit = min(max(val_fraction, min(places)), np.nextafter(max(places), 0))
    train, val = [], []
    for pair, place in zip(pairs, places, strict=True):
        (val if place <= limit else train).append(pair)
    return train, val


def document(pair: Pair) -> str:
    """The text a model is trained on."""
    return f"{prompt_of(pair.prompt)} {pair.answer}"


def write_pairs(
    folder: Path, train: list[Pair], val: list[Pair], tokenizer: AnyTokenizer, files: dict | None = None
) -> dict:
    """Write a dataset of which only the answers are learned; as data.write_dataset."""
    splits, docs, files = {"train": train, "val": val}, [], dict(files or {})
    for name, pairs in splits.items():
        encoded = [encode(tokenizer, pair) for pair in pairs]
        docs.append([prompt + answer for prompt, answer in encoded])
        masks = ([0] * len(prompt) + [1] * (len(answer) + 1) for prompt, answer in encoded)  # end-of-text too
        files[f"{name}_learn.bin"] = b"".join(map(bytes, masks))
    sha256 = digest((name, "".join(map(document, pairs))) for name, pairs in splits.items())
    return write_dataset(folder, *docs, tokenizer, sha256, files, prompt=prompt_of(val[0].prompt))


def encode(tokenizer: AnyTokenizer, pair: Pair) -> tuple[list[int], list[int]]:
    """Ids of the prompt, exactly as they are when the model is used, and of the answer."""
    prompt, both = tokenizer.encode(prompt_of(pair.prompt)), tokenizer.encode(document(pair))
    if both[: len(prompt)] == prompt:
        return prompt, both[len(prompt) :]
    return prompt, tokenizer.encode_array(f" {pair.answer}").tolist()  # a token would span the two


if __name__ == "__main__":
    with bad_input_exits():
        main(sys.argv[1:])
