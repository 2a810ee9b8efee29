"""The door through which files come in: a description says what one must hold, and whatever else fails while
it is read becomes one line that names it."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import get_args

from config import PLAIN, printable, require

INT64 = range(-(2**63), 2**63)
COUNT = range(2**63)
WORDS = {
    int: "a whole number below 2**63",
    float: "a number",
    str: "text",
    bool: "true or false",
    NoneType: "none",
}
WORDS |= {dict: "a dictionary", list: "a list"}


def check(value: object, wanted: object, name: str) -> None:
    """Raise ValueError, which names the part that is wrong, unless a value from a file is as described.

    wanted: a type, or a union of them (a bool is no number, an int is a float, and both fit into 64 bits); a
    range of whole numbers; [wanted] or {type: wanted}, whose entries are all alike; {key: wanted}, where a
    key that ends in "?" may be missing and further ones are let be; a dataclass, for some of its fields.
    """
    if dataclasses.is_dataclass(wanted):
        types = {field.name: field.type for field in dataclasses.fields(wanted)}
        check(value, {str: object}, name)
        unknown = ", ".join(value.keys() - types.keys())
        require(not unknown, name, f"one with {_shown(unknown)}", "without settings that are not known here")
        wanted = {f"{key}?": kind for key, kind in types.items()}
    inside = isinstance(wanted, (dict, list))
    if not _fits(value, kind := type(wanted) if inside else wanted):
        require(False, name or "its content", _shown(value), _words(kind))
    if not inside:
        return
    for key, part, kind in _parts(value, wanted, name):
        check(part, kind, f"{name}.{key}" if name else str(key))


def _parts(value: dict | list, wanted: dict | list, name: str) -> Iterator[tuple[object, object, object]]:
    """Key, part and description of the part."""
    if isinstance(wanted, list):
        yield from ((n, part, wanted[0]) for n, part in enumerate(value))
        return
    for key, kind in wanted.items():
        if isinstance(key, type):
            for own, part in value.items():
                check(own, key, f"a key of {name}")
                yield own, part, kind
        elif key.removesuffix("?") in value:
            yield key.removesuffix("?"), value[key.removesuffix("?")], kind
        else:
            require(key.endswith("?"), f"{name}.{key}" if name else key, "missing", "there")


def _fits(value: object, wanted: object) -> bool:
    if isinstance(wanted, range):
        return type(value) is int and value in wanted
    kinds = get_args(wanted) or (wanted,)
    if isinstance(value, int) and wanted is not object:  # as a bool is in Python
        alike = (bool,) if isinstance(value, bool) else (int, float)
        return value in INT64 and any(kind in alike for kind in kinds)
    return isinstance(value, kinds)


def _shown(value: object) -> str:
    text = repr(value) if isinstance(value, PLAIN) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _words(wanted: object) -> str:
    if isinstance(wanted, range):
        return f"a whole number from {wanted.start} to {wanted.stop - 1}"
    kinds = get_args(wanted) or (wanted,)
    return " or ".join(WORDS.get(kind, f"a {kind.__name__}") for kind in kinds)


@contextlib.contextmanager
def door(path: str | Path, remedy: str = "") -> Iterator[None]:
    """Whatever fails while the file at `path` is read is a ValueError of one line that names it."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        text = printable(" ".join(str(error).split()))[:300]
        if type(error) is not ValueError:  # which our own checks raise
            text = f"{path} is damaged ({type(error).__name__}: {text})"
        elif str(path) in text:  # said at an inner door
            raise
        else:
            text = f"{path}: {text}"
        raise ValueError(f"{text}; {remedy}" if remedy else text) from error
