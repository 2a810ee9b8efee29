"""What the prepare.py scripts have in common: finding, reading and cutting text, downloads, a summary."""

import hashlib
import http.client
import os
import shutil
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from config.files import whole

TIMEOUT_S = 30
PIECE_CHARS = 100_000
SAMPLE_CHARS = 10_000_000


def walk(folder: Path, skip: Callable[[str], bool]) -> list[str]:
    """Paths of the files below `folder`, relative to it, sorted, with forward slashes.

    `skip` says which names of files and folders are passed over.
    """
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not skip(name)]
        found += [Path(parent, name).relative_to(folder).as_posix() for name in files if not skip(name)]
    return sorted(found)


def read_texts(paths: dict[str, Path]) -> dict[str, str]:
    """The texts by their names, without files that are empty, cannot be read, or are not text."""
    texts = {}
    for name, path in tqdm(paths.items(), desc="reading", unit=" files", disable=None):
        try:
            text = read_text(path)
        except ValueError:
            continue
        if text.strip():
            texts[name] = text
    return texts


def read_text(path: str | Path | int, name: str = "") -> str:
    """The text of a UTF-8 file, or of one that is open (0 is standard input), line ends as "\\n".

    ValueError, which calls it `name`: cannot be read, or not text.
    """
    name = name or str(path)
    try:
        with open(path, "rb", closefd=path != 0) as file:
            text = file.read().decode("utf-8-sig")
    except OSError as err:
        raise ValueError(f"{name} cannot be read ({err.strerror}): correct the path") from err
    except UnicodeDecodeError as err:
        wrong = err.object[err.start]
        raise ValueError(f"{name} is not UTF-8 text: byte {err.start} is {wrong:#04x}") from None
    if "\0" in text:
        raise ValueError(f"{name} is not text: it has a zero byte")
    return text.replace("\r\n", "\n")


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


def sample(texts: Iterable[str], max_chars: int = SAMPLE_CHARS) -> list[str]:
    """About `max_chars` characters of `texts`, in pieces spread evenly over all of them."""
    parts = [piece for text in texts for piece in pieces(text)]
    return parts[:: max(1, -(-sum(map(len, parts)) // max_chars))]


def name_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name only: the split of a file never depends on other files."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:6], "big") / 2**48


def digest(named_texts: Iterable[tuple[str, str]]) -> str:
    """sha256 (hex) over the names and contents of texts, in order."""
    sha = hashlib.sha256()
    for name, text in named_texts:
        sha.update(f"{name}\0{len(text)}\0".encode(errors="surrogateescape"))
        sha.update(text.encode())
    return sha.hexdigest()


def download(url: str, sha256: str, path: Path) -> Path:
    """Fetch `url` to `path` unless it is there already. ValueError: no network, or another checksum."""
    if path.is_file() and file_sha256(path) == sha256:
        return path
    with whole(path) as new:
        try:
            _fetch(url, new)
        except (OSError, http.client.HTTPException) as err:
            remedy = "get it another way and give --source=PATH"
            raise ValueError(f"could not download {url} ({err}); {remedy}") from err
        check_sha256(new, sha256, f"what {url} sent")
    return path


def _fetch(url: str, path: Path) -> None:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, open(path, "wb") as file:
        total = int(response.headers.get("Content-Length") or 0) or None
        with tqdm.wrapattr(response, "read", total, desc=path.name, disable=None) as body:
            shutil.copyfileobj(body, file)


def check_sha256(path: Path, sha256: str, what: str) -> None:
    """ValueError unless the file has this checksum."""
    if (found := file_sha256(path)) != sha256:
        differ = f"has the sha256 {found[:16]}..., expected {sha256[:16]}..."
        raise ValueError(f"{what} {differ}: it is not the same file")


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def print_summary(folder: Path, meta: dict) -> None:
    """Say what write_dataset has made, in a few lines."""
    print(f"{folder}: vocabulary {meta['vocab_size']:,}")
    for split in ("train", "val"):
        documents, tokens, n_bytes = (meta[split][of] for of in ("documents", "tokens", "bytes"))
        print(
            f"  {split:5}  {documents:>9,} documents  {n_bytes:>13,} bytes  "
            f"{tokens:>12,} tokens  {n_bytes / tokens:.2f} bytes per token"
        )
