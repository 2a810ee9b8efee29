"""Tables and figures of what was measured and kept with --json.

python experiments/report.py table [FILE ...]   all rows of these files (none: of all in results/) as tables
python experiments/report.py figures            the figures of README.md, from results/*.json
"""

import importlib.util
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.lab import mean_and_error

from config import bad_input_exits, require
from config.results import RESULTS, lines_of, markdown, read_report

if TYPE_CHECKING:  # figures only, which are all that need it, import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BY_K = re.compile(r"(.+), k=(\d+)(, untuned)?")  # the names of rows that are drawn against K
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # of Okabe and Ito
STYLES = list(itertools.product(("-", "--", ":"), COLOURS))  # of the lines in a figure, one after another
LOOK = {"font.size": 9, "font.sans-serif": ["DejaVu Sans"], "legend.frameon": False}
LOOK |= {"legend.handlelength": 3, "axes.grid": True, "grid.alpha": 0.3}
LOOK |= {"svg.fonttype": "none", "svg.hashsalt": "bench"}  # the same results, the same file


def table(path: Path) -> str:
    """Markdown: each part of a file, below what made it. Raises ValueError if the file has no rows."""
    report = read_report(path)
    source = "`{command}`, {machine}, {dtype}, commit {commit}".format(**report)
    source += "".join(f"; {report[key]}" for key in ("design", "comparisons") if key in report)
    tables = [f"**{part}**: {source}\n\n{rows_table(rows)}" for part, rows in report["parts"].items() if rows]
    require(bool(tables), f"{path}", "without rows", "what --json=FILE wrote")
    return "\n\n".join(tables)


def rows_table(rows: list[dict]) -> str:
    """Markdown of what results.show prints. Names are code, because some have tokens in them: '**' or '`'."""
    head, *body = lines_of(rows)
    fences = ["```" if "`" in name else "`" for name, *_ in body]
    named = [[fence + name + fence, *texts] for fence, (name, *texts) in zip(fences, body)]
    return markdown([head, *named]).replace(" +-", " ± ")


def save_figures(folder: Path) -> Iterator[str]:
    """Draw FIGURES into `folder` from the results there. A line for each says what it was drawn from."""
    there = importlib.util.find_spec("matplotlib") is not None
    require(there, "matplotlib", "not installed", "there for figures: pip install matplotlib")
    import matplotlib
    from matplotlib.figure import Figure

    found = {path.stem: read_report(path) for path in sorted(folder.glob("*.json"))}
    for name, (part, column, draw_onto) in FIGURES.items():
        rows = [(stem, row) for stem, report in found.items() for row in report["parts"].get(part, [])]
        rows = [(stem, row) for stem, row in rows if row.get(column)]
        if not rows:
            yield f"{name} is left out; first: python experiments/{part}.py --json={folder}/NAME.json"
            continue
        with matplotlib.rc_context(LOOK):
            figure = Figure(layout="constrained")
            draw_onto(figure, rows)
            figure.savefig(folder / name, metadata={"Date": None, "Creator": None})
        yield f"{name}: {part}, from {', '.join(dict.fromkeys(stem for stem, _ in rows))}"


def draw_by_k(column: str, figure: "Figure", found: list[tuple[str, dict]]) -> None:
    """For each file a panel without tuning and one with: a column against K, a line for each router."""
    panels: dict[tuple[str, bool], dict[str, dict[int, list[float]]]] = {}  # -> router -> K -> mean, error
    for stem, row in found:
        if match := BY_K.fullmatch(row["what"]):
            router, k, untuned = match.groups()
            panels.setdefault((stem, not untuned), {}).setdefault(router, {})[int(k)] = row[column]
    routers = list(dict.fromkeys(itertools.chain(*panels.values())))  # each has one colour in all panels
    stems = list(dict.fromkeys(stem for stem, _ in panels))
    figure.set_size_inches(10.5, 3.4 * len(stems))
    axes = figure.subplots(len(stems), 2, squeeze=False, sharey="row")
    for (stem, tuned), lines in panels.items():
        panel = axes[stems.index(stem), int(tuned)]
        panel.set(title=f"{stem}, {'tuned' if tuned else 'untuned'}", xlabel="K", xscale="log")
        panel.set_xticks(ks := sorted(set().union(*lines.values())), ks)
        panel.set_xticks([], minor=True)
        for router, points in lines.items():
            at = sorted(points)
            middle, error = np.array([points[k] for k in at], dtype=float).T  # of one run, the error is nan
            stroke, colour = STYLES[routers.index(router) % len(STYLES)]
            panel.errorbar(at, middle, error, linestyle=stroke, color=colour, capsize=3, label=router)
        if column != "nats":  # from a thousandth to a tenth, on both sides of 0
            panel.set_yscale("symlog", linthresh=1e-3)
    for row in axes:
        drawn = [panel for panel in row if panel.has_data()]
        drawn[0].set_ylabel(AXES[column])
        put_legend(drawn[-1], "bar: standard error over runs")
        for panel in set(row).difference(drawn):
            panel.set_axis_off()


def draw_lines(x: str, y: str, figure: "Figure", found: list[tuple[str, dict]]) -> None:
    """A panel for each file, with a line for each row: y of its curves against x (keys of AXES)."""
    from matplotlib.ticker import LogFormatter

    files: dict[str, list[dict]] = {}
    for stem, row in found:
        files.setdefault(stem, []).append(row)
    figure.set_size_inches(2 + 6 * len(files), 3.8)
    panels = figure.subplots(1, len(files), squeeze=False, sharey=True, subplot_kw={"xscale": "log"})[0]
    for panel, (stem, rows) in zip(panels, files.items()):
        panel.set(title=stem, xlabel=AXES[x])
        for place, row in enumerate(rows):
            across, up = (np.array([curve[key] for curve in row["curves"]]) for key in (x, y))
            draw_band(panel, place, across.mean(0), up, row["what"].removesuffix(", all tokens"))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(LogFormatter())
        put_legend(panel, "line: mean over runs", "band: its standard error")
    panels[0].set_ylabel(AXES[y])


def draw_band(axes: "Axes", place: int, x: Iterable[float], runs: np.ndarray, label: str) -> None:
    """A panel's line number `place`: the mean of runs (runs, n) against x (n,), and its standard error."""
    stroke, colour = STYLES[place % len(STYLES)]
    points = [(at, *mean_and_error(values)) for at, values in zip(x, runs.T.tolist())]
    at, middle, error = np.array(points, dtype=float).reshape(-1, 3).T  # of one run, the error is nan
    axes.plot(at, middle, linestyle=stroke, marker=".", color=colour, label=label)
    axes.fill_between(at, middle - error, middle + error, color=colour, alpha=0.2, linewidth=0)


def put_legend(axes: "Axes", *title: str) -> None:
    """Beside the panel, where it hides no line."""
    axes.legend(title="\n".join(title), loc="upper left", alignment="left", bbox_to_anchor=(1, 1))


AXES = {
    "entropy": "entropy of the prediction (nats; a point: 1/20 of the tokens)",
    "experts": "experts per token",
    "position": "position (a point: the mean of the tokens since the point before)",
    "gap": "online loss less global loss (nats)",
    "minutes": "minutes of training (its evaluations not counted)",
    "nats": "causal validation loss (nats per token)",
    "nats, to base": "difference to TopK with the same K (nats)",
}
FIGURES = {  # each is drawn from the rows of a question that have a column, by a function
    "loss_by_minutes.svg": ("minutes", "curves", partial(draw_lines, "minutes", "nats")),
    "loss_by_k.svg": ("sparsity", "nats", partial(draw_by_k, "nats")),
    "gain_by_k.svg": ("sparsity", "nats, to base", partial(draw_by_k, "nats, to base")),
    "experts_by_entropy.svg": ("difficulty", "curves", partial(draw_lines, "entropy", "experts")),
    "gap_by_position.svg": ("length", "curves", partial(draw_lines, "position", "gap")),
}


def main(argv: list[str]) -> None:
    """Raises ValueError for bad input."""
    if argv == ["figures"]:
        return print(*save_figures(RESULTS), sep="\n")
    if argv[:1] != ["table"]:
        return print(__doc__)
    paths = [*map(Path, argv[1:])] or sorted(RESULTS.glob("*.json"))
    require(bool(paths), f"{RESULTS}", "empty", "filled: python experiments/QUESTION.py --json=FILE")
    print("\n\n".join(map(table, paths)))


if __name__ == "__main__":
    with bad_input_exits():
        main(sys.argv[1:])
