"""Settings of a script: a frozen dataclass holds the defaults, config files and --key=value change them.

    python train.py config/tiny_seqtopk.py --max_iters=200 --compile=false

What comes later wins. A config file is Python that assigns only what differs from the defaults. A number,
text, bool or None in it must be a setting, unless its name starts with _. Functions, classes and all else are
the file's own, so that it can define a router and register it:

    def relative(scores, k): ...

    ROUTERS["relative"] = Router(relative, causal=True, exact=False, decode="relative")

The comment beside a field of the dataclass is what --help prints.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import math
import os
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ALLOWED = {
    "int": "a whole number such as 8, below 2**63",
    "float": "a finite number such as 0.1 or 3e-4",
    "bool": "true or false",
    "str": "text",
}
PLAIN = (int, float, str, bool, type(None))  # what a setting can be
# What a model or a file says must not steer the terminal. XML forbids the last two, which are no characters.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")
HINT = "; a file's own names start with _, and a router that sample.py is to know has a file of its own"


def parse(argv: list[str], cls: type) -> tuple[dict[str, Any], list[Path]]:
    """Read the settings in `argv` (sys.argv[1:]) for the dataclass `cls`.

    Returns what was given, each value with the type of its field, and the config files that were read.
    ValueError, one line, for an unknown key, a wrong type, a config file that is missing or fails.
    --help prints and exits.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(cls))
        raise SystemExit(0)
    types = {field.name: _type_name(field.type) for field in dataclasses.fields(cls)}
    given, files = {}, []
    for arg in argv:
        if arg.startswith("-"):
            given |= _command_line_setting(arg, types)
        else:
            given |= _file_settings(arg, types)
            files.append(Path(arg))
    return given, files


def read_file(name: str | Path) -> dict[str, Any]:
    """What a config file assigns, unchecked, without its functions, classes and modules.

    ValueError, one line, for a file that is missing or fails.
    """
    path = _config_path(str(name))
    module = ModuleType(str(path.resolve()))
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # torch.compile looks there for what a router of the file uses
    try:
        exec(compile(path.read_bytes(), path, "exec"), vars(module))
    except (Exception, SystemExit) as err:
        raise ValueError(f"config file {path} fails with {type(err).__name__}: {err}") from err
    assigned = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    return {k: v for k, v in assigned.items() if not (callable(v) or isinstance(v, ModuleType))}


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise ValueError, naming the setting, its value and what is allowed, unless it is ok."""
    if not ok:
        raise ValueError(f"{name} is {value}, but must be {allowed}")


def printable(text: str) -> str:
    """The text with U+FFFD in place of each character that steers a terminal."""
    return CONTROL.sub("\ufffd", text)


@contextlib.contextmanager
def bad_input_exits() -> Iterator[None]:
    """Turn a ValueError or OSError, which a user's input caused, into one line on stderr and exit code 2."""
    try:
        yield
    except BrokenPipeError:  # `python sample.py | head`: nobody reads on, and Python would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (ValueError, OSError) as err:
        message = printable(" ".join(str(err).split())) or type(err).__name__
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def help_text(cls: type) -> str:
    """All keys of `cls` with type, default and meaning, below the first sentence about their class."""
    owners, meanings = {}, {}
    for base in reversed(cls.__mro__[:-1]):
        owners = dict.fromkeys(inspect.get_annotations(base), base) | owners
        meanings |= {name: text for name, text in _comments(base).items() if text}
    fields = dataclasses.fields(cls)
    rows = [(f"--{f.name}={_type_name(f.type)}", _written(f.default), f.name) for f in fields]
    width = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"usage: python {sys.argv[0]} [config/FILE.py ...] [--key=value ...]      later wins"]
    heading = None
    for key, default, name in rows:
        if owners[name] is not heading:
            heading = owners[name]
            lines += ["", " ".join(heading.__doc__.split()).split(". ")[0]]
        lines.append(f"  {key:{width[0]}}  {default:{width[1]}}  {meanings.get(name, '')}".rstrip())
    return "\n".join(lines)


def _command_line_setting(arg: str, types: dict[str, str]) -> dict[str, Any]:
    key, equals, text = arg.lstrip("-").partition("=")
    _check_known(key, types, "on the command line")
    if not equals and types[key] != "bool":
        raise ValueError(f"--{key} has no value; write --{key}=VALUE with {_allowed(types[key])}")
    with _naming(f"--{key}={text[:60]}", types[key]):
        return {key: _checked(_from_text(text if equals else "true", types[key]), types[key])}


def _config_path(arg: str) -> Path:
    path = Path(arg)
    if path.is_file() and path.suffix == ".py":
        return path
    if "=" in arg:
        raise ValueError(f"{arg!r} is not a config file; a setting is written --{arg}")
    if path.exists():
        raise ValueError(f"{arg!r} is not a config file; give a .py file of assignments")
    siblings = [str(sibling) for sibling in sorted(path.parent.glob("*.py"))]
    raise ValueError(f"config file {arg!r} does not exist{_nearest(str(path), siblings)}")


def _file_settings(name: str, types: dict[str, str]) -> dict[str, Any]:
    settings = {}
    for key, value in read_file(name).items():
        if key not in types and not isinstance(value, PLAIN):
            continue
        _check_known(key, types, f"in {name}", HINT)
        with _naming(f"{key} = {value!r} in {name}", types[key]):
            settings[key] = _checked(value, types[key])
    return settings


def _from_text(text: str, kind: str) -> Any:
    wanted = kind.removesuffix(" | None")
    if kind.endswith("None") and wanted != "str" and text in ("none", "None"):
        return None
    if wanted == "bool":
        return {"true": True, "false": False}[text.lower()]
    return {"int": int, "float": float, "str": str}[wanted](text)


def _checked(value: Any, kind: str) -> Any:
    wanted = kind.removesuffix(" | None")
    if kind.endswith("None") and value is None:
        return None
    if wanted == "float" and type(value) is int:
        value = float(value)
    if wanted == "str" and type(value) is bool:  # compile = True in a file, as on the command line
        value = str(value).lower()
    if type(value).__name__ != wanted or (wanted == "float" and not math.isfinite(value)):
        raise TypeError
    if wanted == "int" and abs(value) >= 2**63:
        raise OverflowError
    return value


@contextlib.contextmanager
def _naming(setting: str, kind: str) -> Iterator[None]:
    """If what is done inside fails, say which setting it was and what it may be."""
    try:
        yield
    except (ValueError, TypeError, KeyError, OverflowError):
        raise ValueError(f"{setting} is not allowed; give {_allowed(kind)}") from None


def _check_known(key: str, known: Iterable[str], where: str, more: str = "") -> None:
    if key not in known:
        raise ValueError(f"unknown key {key!r} {where}{_nearest(key, known)}; --help lists all keys{more}")


def _nearest(word: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, known)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def _comments(cls: type) -> dict[str, str]:
    """Field name -> the comment on the line, or the lines, that declare it."""
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    texts = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    nodes = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    lines = {node.target.id: range(node.lineno, node.end_lineno + 1) for node in nodes}
    return {name: " ".join(texts[line] for line in lines[name] if line in texts) for name in lines}


def _type_name(annotation: Any) -> str:
    name = annotation.__name__ if type(annotation) is type else str(annotation)
    assert name.removesuffix(" | None") in ALLOWED, f"a setting cannot have the type {name}"
    return name


def _allowed(kind: str) -> str:
    return ALLOWED[kind.removesuffix(" | None")] + (" or none" if kind.endswith("None") else "")


def _written(default: Any) -> str:
    """A default as the command line takes it."""
    text = str(default) or "''"
    return text.lower() if default is None or isinstance(default, bool) else text
