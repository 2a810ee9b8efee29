"""Tokenizers: BPE trained by rustbpe or taken from GPT-2, run by tiktoken; and those of pretrained models.

A tokenizer is fully described by a JSON-able dictionary, `Tokenizer.meta`, which travels inside meta.json of
a dataset and inside checkpoints, so that nothing later needs the network or the text it was trained on.
"""

import base64
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

from config import require
from config.check import COUNT, check, door
from data.hugging_face import HFTokenizer, hf_tokenizer, is_hugging_face
from data.source import pieces, sample

END_OF_TEXT = "<|endoftext|>"
N_BYTES = 256
MAX_VOCAB = 2**16  # of what is trained here; ids are then stored as uint16
# Text is cut into these pieces, and no token reaches beyond one. Made for code: a word takes along the space
# or underscore before it, line breaks the indentation after them, and numbers come in pairs of digits.
SPLIT = r"[ _]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\n+[ \t]*|[ \t]+|\s+"


META = {"name": str, "pattern": str, "ranks": [str], "special": {str: COUNT, END_OF_TEXT: COUNT}}


class Tokenizer:
    """Text to token ids and back, by byte-level BPE.

    `meta`: kind, name, pattern (regex that splits text before merging), ranks (every ordinary token's bytes
    as base64, in the order of ids, which is the order of merges), special ({"<|endoftext|>": id}). ValueError
    if `meta` is not such a dictionary.
    """

    start: tuple[int, ...] = ()  # ids before every text

    def __init__(self, meta: dict):
        check(meta, META, "tokenizer")
        ranks = {base64.b64decode(token, validate=True): rank for rank, token in enumerate(meta["ranks"])}
        self.meta, self.name, self.eot = meta, meta["name"], meta["special"][END_OF_TEXT]
        ids = sorted([*ranks.values(), *meta["special"].values()])
        distinct = ids == list(range(len(ids)))
        require(distinct, "tokens of the tokenizer", "repeated or with gaps", "one for each id from 0 on")
        self._encoding = tiktoken.Encoding(
            self.name, pat_str=meta["pattern"], mergeable_ranks=ranks, special_tokens=meta["special"]
        )
        self._ranks, self.vocab_size, self.stops = ranks, len(ids), (self.eot,)
        self._known_bytes = frozenset(token[0] for token in ranks if len(token) == 1)
        self._encoding.encode_ordinary("".join(map(chr, self._known_bytes & {*range(128)})))  # it may panic

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; "<|endoftext|>" inside it is ordinary text. ValueError names unknown characters."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """As `encode`, as an array (n,) uint32. Other threads can run meanwhile."""
        self._check_characters(text)
        encode = functools.partial(self._encoding.encode_to_numpy, disallowed_special=())
        arrays = [encode(piece) for piece in pieces(text)]
        return np.concatenate(arrays) if arrays else np.empty(0, np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 become the replacement character."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the ids, end-of-text written out. ValueError names an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        foreign = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        require(foreign is None, "token id", foreign, f"0 to {self.vocab_size - 1}, as in the vocabulary")
        return self._encoding.decode_bytes(ids)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: bytes of text each token stands for, 0 for end-of-text."""
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, rank in self._ranks.items():
            lengths[rank] = len(token)
        return lengths

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the canonical JSON of `meta`: equal only for tokenizers that are the same."""
        return hashlib.sha256(json.dumps(self.meta, sort_keys=True).encode()).hexdigest()

    def _check_characters(self, text: str) -> None:
        try:
            data = text.encode()
        except UnicodeEncodeError as err:
            raise ValueError(f"{text[err.start]!r} is half of a surrogate pair, not a character") from None
        if len(self._known_bytes) < N_BYTES and not self._known_bytes.issuperset(data):
            lacking = sorted({char for char in text if not self._known_bytes.issuperset(char.encode())})
            few = ", ".join(map(repr, lacking[:10]))
            raise ValueError(f"the tokenizer {self.name!r} has no token for {few}")


AnyTokenizer = Tokenizer | HFTokenizer


def make_tokenizer(meta: dict, where: str | Path = "the description of a tokenizer") -> AnyTokenizer:
    """The tokenizer that the file `where` describes, which a ValueError names if it describes none."""
    with door(where):
        check(meta, {}, "tokenizer")
        return HFTokenizer(meta) if meta.get("kind") == "hf" else Tokenizer(meta)


def train_bpe(
    texts: Iterable[str], vocab_size: int, name: str, pattern: str = SPLIT, only_seen_bytes: bool = False
) -> Tokenizer:
    """Train a BPE of `vocab_size` tokens, end-of-text included; fewer if there are too few pairs to merge.

    `only_seen_bytes` drops the single bytes that never occur, so that the vocabulary has no token that cannot
    be learned; such a tokenizer refuses text with other characters. ValueError: vocab_size outside
    257..65536.
    """
    allowed = range(N_BYTES + 1, MAX_VOCAB + 1)
    require(vocab_size in allowed, "vocab_size", vocab_size, f"{allowed[0]} to {allowed[-1]}")
    texts = [piece for text in texts for piece in pieces(text)]
    seen = set().union(*(text.encode() for text in texts)) if only_seen_bytes else set(range(N_BYTES))
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size=vocab_size - 1 + N_BYTES - len(seen), pattern=pattern)
    by_rank = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    tokens = [bytes(token) for token, _ in by_rank if len(token) > 1 or token[0] in seen]
    return Tokenizer(_meta("bpe", name, pattern, tokens, {END_OF_TEXT: len(tokens)}))


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's BPE (50,257 tokens) from tiktoken: cached, or downloaded. ValueError if it cannot be had."""
    from tiktoken_ext import openai_public

    try:
        parts = openai_public.gpt2()
    except Exception as err:  # whatever the network or the cache raises
        why = f"GPT-2's tokenizer could not be downloaded ({type(err).__name__})"
        remedy = "train one on the text instead with --tokenizer=bpe, or set TIKTOKEN_CACHE_DIR to a copy"
        raise ValueError(f"{why}; {remedy}") from err
    tokens = sorted(parts["mergeable_ranks"], key=parts["mergeable_ranks"].get)
    return Tokenizer(_meta("gpt2", "gpt2", parts["pat_str"], tokens, parts["special_tokens"]))


def choose_tokenizer(choice: str, texts: Sequence[str], vocab_size: int, name: str) -> AnyTokenizer:
    """The tokenizer a user asked for with --tokenizer.

    "bpe" trains one of `vocab_size` tokens on a sample of `texts`, "gpt2" is GPT-2's. A path is a dataset's
    meta.json or its folder, whose tokenizer is used again, or a Hugging Face folder; OWNER/MODEL is the name
    of a model on the Hub. ValueError: no such file, foreign file, no network.
    """
    if choice == "bpe":
        return train_bpe(sample(texts), vocab_size, name)
    if choice == "gpt2":
        return gpt2_tokenizer()
    path = Path(choice)
    if is_hugging_face(choice) or (path / "tokenizer.json").is_file():
        return hf_tokenizer(choice)
    path = path / "meta.json" if path.is_dir() else path
    if not path.is_file():
        known = "bpe nor gpt2 nor the meta.json of a dataset nor a Hugging Face folder or OWNER/MODEL"
        raise ValueError(f"--tokenizer={choice} is neither {known}")
    with door(path, "give the meta.json of a prepared dataset"):
        return make_tokenizer(dict(json.loads(path.read_text(encoding="utf-8"))).get("tokenizer"))


def _meta(kind: str, name: str, pattern: str, tokens: list[bytes], special: dict[str, int]) -> dict:
    ranks = [base64.b64encode(token).decode() for token in tokens]
    return {"kind": kind, "name": name, "pattern": pattern, "ranks": ranks, "special": dict(special)}
