"""The door through which files come in: a description says what one must hold, and whatever else fails while
it is read becomes one line that names it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from config import printable, require

COUNT = range(2**63)


def check(value: object, wanted: object, name: str = "") -> None:
    """Raise ValueError, which names the part that is wrong, unless a value from a file is as described.

    wanted: a type or a union of types (a bool is no int, an int is a float, too); a range; [wanted] for a
    list of such; {key: wanted}, where a key that ends in "?" may be missing, `str` stands for every key, and
    further keys are let be. No int has more than 64 bits.
    """
    if type(value) is int:
        require(-(2**63) <= value < 2**63, name, value, "of 64 bits")
    kind = type(wanted) if isinstance(wanted, dict | list) else wanted
    if not _fits(value, kind):
        allowed = kind.__name__ if isinstance(kind, type) else kind
        require(False, name or "its content", repr(value)[:60], allowed)
    if isinstance(wanted, list):
        value, wanted = dict(enumerate(value)), {str: wanted[0]}
    for key, part in wanted.items() if isinstance(wanted, dict) else ():
        if key is not str and not key.endswith("?"):
            require(key in value, f"{name}.{key}".lstrip("."), "missing", "there")
        for own in value if key is str else value.keys() & {key.removesuffix("?")}:
            check(value[own], part, f"{name}.{own}".lstrip("."))


def _fits(value: object, kind: object) -> bool:
    if isinstance(kind, range):
        return type(value) is int and value in kind
    kinds = get_args(kind) or (kind,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, (*kinds, int) if float in kinds else kinds)


@contextlib.contextmanager
def door(path: str | Path, remedy: str = "") -> Iterator[None]:
    """Whatever fails while the file at `path` is read is a ValueError of one line that names it."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        text = printable(" ".join(str(error).split()))[:300]
        if type(error) is not ValueError:  # which our own checks raise
            text = f"{path} is damaged or foreign ({type(error).__name__}: {text})"
        elif str(path) in text:  # said at an inner door
            raise
        else:
            text = f"{path}: {text}"
        raise ValueError(f"{text}; {remedy}" if remedy else text) from error
