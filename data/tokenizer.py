"""Tokenizers: BPE trained by rustbpe or taken from GPT-2, run by tiktoken; and those of pretrained models.

A tokenizer is fully described by a JSON-able dictionary, `Tokenizer.meta`, which travels inside meta.json of
a dataset and inside checkpoints, so that nothing later needs the network or the text it was trained on.
"""

import base64
import functools
import hashlib
import importlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import rustbpe
import tiktoken

END_OF_TEXT = "<|endoftext|>"
N_BYTES = 256
MAX_VOCAB = 2**16  # of what is trained here; ids are then stored as uint16
PIECE_CHARS = 100_000
SAMPLE_CHARS = 10_000_000
# Merges stay within these. Made for code: a word takes along the space or underscore before it, line breaks
# the indentation after them, and numbers come in pairs of digits.
SPLIT = r"[ _]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\n+[ \t]*|[ \t]+|\s+"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # of a model: OWNER/MODEL


class Tokenizer:
    """Text to token ids and back, by byte-level BPE.

    `meta`: kind, name, pattern (regex that splits text before merging), ranks (every ordinary token's bytes
    as base64, in the order of ids, which is the order of merges), special ({"<|endoftext|>": id}). ValueError
    if `meta` is not such a dictionary.
    """

    start: tuple[int, ...] = ()  # ids before every text

    def __init__(self, meta: dict):
        try:
            ranks = {base64.b64decode(token): rank for rank, token in enumerate(meta["ranks"])}
            self.meta, self.name, self.eot = meta, meta["name"], meta["special"][END_OF_TEXT]
            self._encoding = tiktoken.Encoding(
                self.name, pat_str=meta["pattern"], mergeable_ranks=ranks, special_tokens=meta["special"]
            )
        except (KeyError, TypeError, ValueError) as err:
            raise ValueError(
                f"this is not the description of a tokenizer: {type(err).__name__} {err}"
            ) from err
        self.vocab_size = len(ranks) + len(meta["special"])
        self._known_bytes = frozenset(token[0] for token in ranks if len(token) == 1)
        self._ranks = ranks

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
        foreign = [i for i in ids if not 0 <= i < self.vocab_size]
        if foreign:
            raise ValueError(
                f"token id {foreign[0]} is not in the vocabulary: allowed are 0..{self.vocab_size - 1}"
            )
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
        if len(self._known_bytes) == N_BYTES or self._known_bytes.issuperset(data):
            return
        lacking = sorted({char for char in text if not self._known_bytes.issuperset(char.encode())})
        raise ValueError(f"the tokenizer {self.name!r} has no token for {', '.join(map(repr, lacking[:10]))}")


class HFTokenizer:
    """The tokenizer of a pretrained model, run by the `tokenizers` library; used like Tokenizer.

    `meta`: kind "hf", name, json (the text of tokenizer.json), eot (the id of end-of-text). Byte-level BPE
    (GPT-2, OLMoE, Qwen), or BPE of characters that falls back to bytes (Mixtral), where a text comes back
    with the space before it that the tokenizer puts there. Special tokens in a text are ordinary text, as in
    Tokenizer. ValueError if `meta` is not such a dictionary, or the tokenizer is of another kind.
    """

    def __init__(self, meta: dict):
        tokenizers = _optional("tokenizers")
        try:
            self.meta, self.name, self.eot = meta, meta["name"], meta["eot"]
            decoder = json.dumps(json.loads(meta["json"])["decoder"])
            self._encoding = tokenizers.Tokenizer.from_str(meta["json"])
        except Exception as err:  # the library raises a bare Exception
            raise ValueError(f"this is not a tokenizer.json: {type(err).__name__} {err}") from err
        to_bytes = next((read for kind, read in TOKEN_BYTES.items() if f'"{kind}"' in decoder), None)
        if to_bytes is None:
            known = " or ".join(TOKEN_BYTES)
            raise ValueError(f"the tokenizer of {self.name} has no decoder of the kind {known}")
        self._encoding.no_truncation()
        self._encoding.no_padding()
        self._encoding.encode_special_tokens = True  # as ordinary text
        added = self._encoding.get_added_tokens_decoder()
        self._special = {i for i, token in added.items() if token.special}
        tokens = {i: to_bytes(token) for token, i in self._encoding.get_vocab(False).items()}
        self._tokens = tokens | {i: token.content.encode() for i, token in added.items()}
        self.vocab_size = max(self._tokens) + 1
        around = self._encoding.encode("a")
        self.start = tuple(around.ids[: around.special_tokens_mask.index(0)])  # by its own post-processor

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, after those that the tokenizer puts before every text (Mixtral's <s>, none else)."""
        return [*self.start, *self.encode_array(text).tolist()]

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of `text` alone, as an array (n,) uint32. Other threads can run meanwhile."""
        encode = functools.partial(self._encoding.encode, add_special_tokens=False)
        return np.array([i for piece in pieces(text) for i in encode(piece).ids], np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 become the replacement character."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the ids, special tokens written out, U+FFFD for ids that only pad a model's embedding."""
        return b"".join(self._tokens.get(int(i), b"\xef\xbf\xbd") for i in ids)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: bytes of text each token stands for, 0 for special tokens."""
        lengths = np.zeros(self.vocab_size, np.int64)
        for i, token in self._tokens.items():
            lengths[i] = 0 if i in self._special or i == self.eot else len(token)
        return lengths

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of tokenizer.json and the end-of-text id: wherever they were found."""
        return hashlib.sha256(f"{self.eot} {self.meta['json']}".encode()).hexdigest()


def _byte_level(token: str) -> bytes:
    known = BYTE_OF_CHAR.keys() >= set(token)  # tokens for special uses may be plain text
    return bytes(BYTE_OF_CHAR[char] for char in token) if known else token.encode()


def _byte_fallback(token: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("\u2581", " ").encode()


# GPT-2 writes bytes as characters: visible ones of Latin-1 as themselves, the others as those from 256 on
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(N_BYTES) if byte not in _VISIBLE]
BYTE_OF_CHAR = {chr(b): b for b in _VISIBLE} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}
TOKEN_BYTES = {"ByteLevel": _byte_level, "ByteFallback": _byte_fallback}  # by a decoder in tokenizer.json
AnyTokenizer = Tokenizer | HFTokenizer


def make_tokenizer(meta: dict) -> AnyTokenizer:
    """The tokenizer that a dataset or a checkpoint describes. ValueError: none."""
    is_hf = isinstance(meta, dict) and meta.get("kind") == "hf"
    return HFTokenizer(meta) if is_hf else Tokenizer(meta)


def hf_tokenizer(name_or_path: str) -> HFTokenizer:
    """The tokenizer of a Hugging Face folder, or of a model on the Hub. ValueError if it cannot be had."""
    path = _hf_file(name_or_path, "tokenizer.json")
    if path is None:
        raise ValueError(f"{name_or_path} has no tokenizer.json: give a model or folder that has one")
    eot = _end_of_text(name_or_path, _json(path).get("added_tokens", []))
    text = path.read_text(encoding="utf-8")
    return HFTokenizer({"kind": "hf", "name": name_or_path, "json": text, "eot": eot})


def is_hugging_face(name_or_path: str) -> bool:
    """Whether this is a Hugging Face folder, or is no path and may be the name of a model on the Hub."""
    path = Path(name_or_path)
    is_name = HUB_NAME.fullmatch(name_or_path) and not path.exists() and not path.parent.exists()
    return bool(is_name) or (path / "config.json").is_file()


def _end_of_text(name_or_path: str, added_tokens: list[dict]) -> int:
    """The id of eos_token in tokenizer_config.json, or else eos_token_id (the first) in config.json."""
    settings = {}
    for name in ("config.json", "tokenizer_config.json"):
        if path := _hf_file(name_or_path, name):
            settings |= _json(path)
    token, eot = settings.get("eos_token"), settings.get("eos_token_id")
    token = token["content"] if isinstance(token, dict) else token
    eot = eot[0] if isinstance(eot, list) else eot
    added = {entry["content"]: entry["id"] for entry in added_tokens}
    if added.get(token, eot) is None:
        raise ValueError(f"{name_or_path} names no end-of-text: its tokenizer_config.json needs an eos_token")
    return added.get(token, eot)


def _json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as err:
        raise ValueError(f"{path} is damaged: {type(err).__name__} {err}") from err


def _hf_file(name_or_path: str, name: str) -> Path | None:
    """A file of a Hugging Face folder or model, None if it has none. ValueError: no network, or no model."""
    if (folder := Path(name_or_path)).is_dir():
        return folder / name if (folder / name).is_file() else None
    hub = _optional("huggingface_hub")
    _optional("huggingface_hub.utils").logging.set_verbosity_error()  # one line is enough, below
    try:
        return Path(hub.hf_hub_download(name_or_path, name))
    except Exception as err:  # the library's errors are many, and long
        if type(err).__name__ in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
            return None
        raise ValueError(
            f"{name_or_path} is no folder here, and {name} could not be downloaded from the Hugging Face Hub "
            f"({type(err).__name__}): correct the name, or give the folder of a copy"
        ) from err


def _optional(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as err:
        raise ValueError(f"pretrained tokenizers need {package}: pip install -r requirements-hf.txt") from err


def pieces(text: str, size: int = PIECE_CHARS) -> Iterator[str]:
    """Cut `text` into pieces of at most `size` characters, if possible where the cut changes no token.

    That is after a newline between two visible characters. Pieces let threads share one document, and keep a
    run of a million spaces from overflowing the stack of tiktoken's regex engine.
    """
    start = 0
    while len(text) - start > size:
        cut = _last_lone_newline(text, start, start + size) or start + size
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def _last_lone_newline(text: str, start: int, end: int) -> int | None:
    at = text.rfind("\n", start + 1, end)
    while at > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at + 1
        at = text.rfind("\n", start + 1, at)
    return None


def train_bpe(
    texts: Iterable[str], vocab_size: int, name: str, pattern: str = SPLIT, only_seen_bytes: bool = False
) -> Tokenizer:
    """Train a BPE of `vocab_size` tokens, end-of-text included; fewer if there are too few pairs to merge.

    `only_seen_bytes` drops the single bytes that never occur, so that the vocabulary has no token that cannot
    be learned; such a tokenizer refuses text with other characters. ValueError: vocab_size outside
    257..65536.
    """
    if not N_BYTES < vocab_size <= MAX_VOCAB:
        raise ValueError(f"vocab_size is {vocab_size}; allowed are {N_BYTES + 1}..{MAX_VOCAB}")
    texts = [piece for text in texts for piece in pieces(text)]
    seen = set().union(*(text.encode() for text in texts)) if only_seen_bytes else set(range(N_BYTES))
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size=vocab_size - 1 + N_BYTES - len(seen), pattern=pattern)
    merged = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    tokens = [bytes(token) for token, _ in merged]
    tokens = [token for token in tokens if len(token) > 1 or token[0] in seen]
    return Tokenizer(_meta("bpe", name, pattern, tokens, {END_OF_TEXT: len(tokens)}))


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's BPE (50,257 tokens) from tiktoken: cached, or downloaded. ValueError if it cannot be had."""
    from tiktoken_ext import openai_public

    try:
        parts = openai_public.gpt2()
    except Exception as err:  # whatever the network or the cache raises
        raise ValueError(
            f"GPT-2's tokenizer could not be downloaded ({type(err).__name__}); "
            "train one on the text instead with --tokenizer=bpe, or set TIKTOKEN_CACHE_DIR to a copy"
        ) from err
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
    try:
        return make_tokenizer(json.loads(path.read_text(encoding="utf-8"))["tokenizer"])
    except (KeyError, TypeError, ValueError) as err:
        raise ValueError(f"{path} holds no tokenizer; give the meta.json of a prepared dataset") from err


def sample(texts: Iterable[str], max_chars: int = SAMPLE_CHARS) -> list[str]:
    """About `max_chars` characters of `texts`, in pieces spread evenly over all of them."""
    parts = [piece for text in texts for piece in pieces(text)]
    every = max(1, -(-sum(map(len, parts)) // max_chars))
    return parts[::every]


def _meta(kind: str, name: str, pattern: str, tokens: list[bytes], special: dict[str, int]) -> dict:
    ranks = [base64.b64encode(token).decode() for token in tokens]
    return {"kind": kind, "name": name, "pattern": pattern, "ranks": ranks, "special": dict(special)}
