"""What a measurement prints and keeps: options, machine, tables, and the JSON that --json writes.

A row is a dictionary: "what" names it; a value is a number, a word, a ratio with its quartiles [median, low,
high], or a mean with its standard error [mean, error].
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from config import parse, require
from config.check import check, door
from config.device import keep_freed_memory, pick_device, pick_dtype
from config.files import whole
from distributed import own_device

HOME = Path(__file__).parents[1]
RESULTS = HOME / "experiments" / "results"
MAY_BE_0 = ("seed", "effort", "budget", "shots")  # other numbers of options are at least 1


@dataclass(frozen=True)
class Options:
    """Where to compute, and where to keep the results."""

    json: str | None = None  # file to keep the results in
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    dtype: str = "auto"  # auto, float32, bfloat16 or float16
    seed: int = 1337  # of what is drawn at random

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            low = 0 if name in MAY_BE_0 else 1
            require(isinstance(value, str | bool | None) or value >= low, name, value, f"at least {low}")

    @classmethod
    def read(cls, argv: list[str], about: str) -> Self:
        """What the command line says. --help prints `about` and the keys, and exits.

        Raises ValueError for bad settings, and OSError now, not when the minutes are spent, for a file that
        cannot be written.
        """
        if "--help" in argv or "-h" in argv:
            print(about + "\n")
        options = cls(**parse(argv, cls)[0])
        if options.json:
            check_writable(Path(options.json))
        return options


@dataclass(frozen=True)
class Machine:
    """The options, and what computes, in which number format."""

    config: Options
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, config: Options) -> Self:
        """Raises ValueError for a device that is not there."""
        device, _ = pick_device(config.device)
        device = own_device(device)  # the current one: whose events and memory counters are read
        return cls(config, device, pick_dtype(config.dtype, device)[0])

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        if self.gpu:
            return torch.cuda.get_device_name(self.device)
        info = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
        return f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"


# -------------------- measuring and keeping ---------------------------------------------------------------


def measure(machine: Machine, parts: dict[str, tuple[str, Callable]]) -> dict:
    """Explain, measure and print each part, and return all that --json keeps.

    parts: name -> explanation, function. Where a part fails, the others go on; a ValueError of the only part
    is raised. Ctrl-C ends measuring, and what has been measured is returned.
    """
    report = describe(machine)
    print(", ".join(f"{key} {report[key]}" for key in ("machine", "dtype", "compile", "versions", "load")))
    report |= {"parts": {}, "failed": []}
    if not machine.gpu:
        keep_freed_memory()
    for name, (text, part) in parts.items():
        print(f"\n--- {name}: {text}\n", flush=True)
        torch.manual_seed(machine.config.seed)
        start = time.perf_counter()
        try:
            report["parts"][name] = rows = rounded(part(machine))
        except KeyboardInterrupt:
            print(f"{name} was stopped")
            report["failed"].append(name)
            break
        except (RuntimeError, ValueError) as error:  # too little memory, say
            if isinstance(error, ValueError) and len(parts) == 1:
                raise
            print(f"{name} failed: {error}")
            report["failed"].append(name)
            continue
        if rows:
            show(rows)
        print(f"({time.perf_counter() - start:.0f} s)", flush=True)
    return report


def describe(machine: Machine) -> dict:
    """Where the figures come from."""
    packages = filter(importlib.util.find_spec, ("torch", "transformers"))
    try:
        git = ["git", "-C", str(HOME), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine.name,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "compile": getattr(machine.config, "compile", "false"),  # as asked
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),  # of other work, at the start: with any, expect noise
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "commit": commit,
        "seed": machine.config.seed,
    }


def rounded(value: object) -> object:
    """The same, its floats cut to five digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def finish(report: dict, path: str | None) -> None:
    """Keep the report at `path`, if it has any row; print it last; exit, with 1 if it has gaps."""
    if path and any(report["parts"].values()):
        with whole(Path(path)) as new:
            new.write_text(json.dumps(report, indent=1) + "\n")
    elif path:
        print(f"{path} is left as it was: there is no row for it")
    print("\n" + json.dumps(report))
    sys.exit(bool(report["failed"] or report.get("missing")))


def check_writable(path: Path) -> None:
    """Raises OSError. Leaves no new file: nobody could read results from it."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    open(path, "a").close()
    if new:
        path.unlink()


def read_report(path: Path) -> dict:
    """What --json kept. Raises ValueError for a file that is none of those, and OSError where none is."""
    raw = path.read_bytes()
    with door(path, "it holds no results: measure again, or delete it"):
        report = json.loads(raw)
        said = {"command": str, "machine": str, "dtype": str, "commit": str | None}
        check(report, {"parts": {str: [{"what": str}]}} | said)
        return report


# -------------------- tables ------------------------------------------------------------------------------


def show(rows: list[dict]) -> None:
    lines = lines_of(rows)
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *others in lines:
        print("  ".join([first.ljust(widths[0]), *(t.rjust(w) for t, w in zip(others, widths[1:]))]))


def lines_of(rows: list[dict]) -> list[list[str]]:
    """Head and body of a table of the keys that have a value in some row, and one that fits a cell."""
    found = dict.fromkeys(key for row in rows for key in row if row[key] is not None)
    keys = [key for key in found if not key.endswith(("curves", "by trunk"))]
    return [keys] + [[cell(row.get(key), key.endswith("to base")) for key in keys] for row in rows]


def cell(value: object, signed: bool = False) -> str:
    """A median with its quartiles, a mean with its error, a number or a word, for people."""
    if isinstance(value, list) and len(value) == 2:
        middle, error = value
        exact = middle % 1 == 0 and not error
        decimals = 0 if exact else max(0, 5 - len(f"{abs(middle) // 1:.0f}"))  # five digits, as kept
        if error:
            decimals = max(decimals, min(5, math.ceil(-math.log10(error))))  # a small error is no 0
        text = f"{middle:{'+' * signed},.{decimals}f}"
        return text if exact or error is None else f"{text} +-{error:,.{decimals}f}"
    if isinstance(value, list):
        return "{:.4g} ({:.4g}-{:.4g})".format(*value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else str(value)


def markdown(lines: list[list[str]]) -> str:
    """The table whose first line is the head."""
    head, *body = [[text.replace("|", r"\|") for text in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body])


def is_ratio(key: str) -> bool:
    return key.startswith(("time/", "speed/", "bytes/"))


def speed_table(folder: Path) -> str:
    """Markdown: each ratio with an aim or a figure of the paper, and what it is on the machines in `folder`;
    of one machine's files the last one, by name, that has a row counts. Raises ValueError where none is.
    """
    table: dict[tuple, dict[str, str]] = {}
    for path in sorted(folder.glob("*.json")):
        report = read_report(path)
        machine = f"{report['machine']}, {report['dtype']}"
        rows = [(part, row) for part, found in report["parts"].items() for row in found]
        for part, row in rows:
            key = next(filter(is_ratio, row), None)
            if key and (row.get("aim") or row.get("paper")):
                line = (f"`{part}`", row["what"], key, cell(row.get("aim")), cell(row.get("paper")))
                table.setdefault(line, {})[machine] = cell(row[key])
    require(bool(table), f"{folder}", "without speeds", f"filled: python bench.py --json={folder}/NAME.json")
    machines = list(dict.fromkeys(machine for found in table.values() for machine in found))
    head = ["`python bench.py`", "of what", "ratio", "aim", "paper", *machines]
    body = [[*line, *(found.get(machine, "-") for machine in machines)] for line, found in table.items()]
    return markdown([head, *body])
