"""Tables and figures of what was measured and kept with --json.

python experiments/report.py table [FILE ...]   all rows of these files (none: of all in results/) as tables
python experiments/report.py figures            the figures of README.md, from results/*.json
"""

import itertools
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.lab import mean_and_error

from config import bad_input_exits, require
from config.results import RESULTS, lines_of, markdown, read_report, require_matplotlib

if TYPE_CHECKING:  # figures only, which are all that need it, import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEAR = 0.4  # nats; larger differences are cut off, because they would flatten all others
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # of Okabe and Ito
STYLES = list(itertools.product(("-", "--", ":"), COLOURS))  # of the lines in a figure, one after another
LOOK = {"font.size": 9, "font.sans-serif": ["DejaVu Sans"], "legend.frameon": False}
LOOK |= {"legend.handlelength": 3, "axes.grid": True, "grid.alpha": 0.3}
LOOK |= {"svg.fonttype": "none", "svg.hashsalt": "bench"}  # the same results, the same file


def table(path: Path) -> str:
    """Markdown: each part of a file, below what made it. Raises ValueError if the file has no rows."""
    report = read_report(path)
    source = "`{command}`, {machine}, {dtype}, commit {commit}".format(**report)
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
    require_matplotlib("figures")
    import matplotlib
    from matplotlib.figure import Figure

    found = {path.stem: read_report(path) for path in sorted(folder.glob("*.json"))}
    for name, (parts, draw_onto) in FIGURES.items():
        part = next((part for part in parts if curve_rows(found, part)), None)
        if part is None:
            yield f"{name} is left out; first: python experiments/{parts[0]}.py --json={folder}/NAME.json"
            continue
        rows = curve_rows(found, part)
        with matplotlib.rc_context(LOOK):
            figure = Figure(layout="constrained")
            draw_onto(figure, rows)
            figure.savefig(folder / name, metadata={"Date": None, "Creator": None})
        yield f"{name}: {part}, from {', '.join(dict.fromkeys(stem for stem, _ in rows))}"


def curve_rows(found: dict[str, dict], part: str) -> list[tuple[str, dict]]:
    """The rows of a part that have curves, each with the stem of its file."""
    rows = [(stem, row) for stem, report in found.items() for row in report["parts"].get(part, [])]
    return [(stem, row) for stem, row in rows if row.get("curves")]


def draw_curves(figure: "Figure", found: list[tuple[str, dict]]) -> None:
    """For each file and k the losses, and beside them the differences to the first router."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for stem, row in found:
        groups.setdefault((stem, row["what"].rpartition(", ")[2]), []).append(row)
    routers = list(dict.fromkeys(router_of(row) for _, row in found))  # each has one colour in all panels
    figure.set_size_inches(11, 3.6 * len(groups))
    for (titles, rows), panels in zip(groups.items(), figure.subplots(len(groups), 2, squeeze=False)):
        draw_routers(*panels, rows, routers)
        panels[0].set_title(", ".join(titles))


def router_of(row: dict) -> str:
    return row["what"].rpartition(", ")[0]


def draw_routers(losses: "Axes", differences: "Axes", rows: list[dict], routers: list[str]) -> None:
    """Losses, and differences paired by seed: none for a row whose seeds are not those of the first row."""
    steps = rows[0]["curves"][0]["step"][1:]  # before the first step all are alike
    for row in rows:
        nats, label, place = losses_of(row), router_of(row), routers.index(router_of(row))
        paired = [curve["seed"] for curve in row["curves"]] == [curve["seed"] for curve in rows[0]["curves"]]
        draw_band(losses, place, steps, nats, label)
        if "nats, to base" in row:
            middle, error = row["nats, to base"]
            label += f" {middle:+.3f}" + (f" ± {error:.3f}" if error is not None else "")
        draw_band(differences, place, steps, nats - losses_of(rows[0]) if paired else nats[:0], label)
    bottom, top = differences.get_ylim()
    differences.set_ylim(max(bottom, -NEAR), min(top, NEAR))
    losses.set(xlabel="training step", ylabel="causal validation loss (nats per token)")
    differences.set(xlabel="training step", ylabel=f"difference to {rows[0]['what']}, same seed (nats)")
    put_legend(differences, "number: that of the table, after the last step")


def losses_of(row: dict) -> np.ndarray:
    """Losses on the way, after the first step: (seeds, n)."""
    return np.array([curve["nats"][1:] for curve in row["curves"]])


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
        put_legend(panel)
    panels[0].set_ylabel(AXES[y])


def draw_band(axes: "Axes", place: int, x: Iterable[float], seeds: np.ndarray, label: str) -> None:
    """A panel's line number `place`: the mean of seeds (runs, n) against x (n,), and its standard error."""
    stroke, colour = STYLES[place % len(STYLES)]
    points = [(at, *mean_and_error(values)) for at, values in zip(x, seeds.T.tolist()) if values]
    at, middle, error = np.array(points, dtype=float).reshape(-1, 3).T  # of one run, the error is nan
    axes.plot(at, middle, linestyle=stroke, marker=".", color=colour, label=label)
    axes.fill_between(at, middle - error, middle + error, color=colour, alpha=0.2, linewidth=0)


def put_legend(axes: "Axes", *more: str) -> None:
    """Beside the panel, where it hides no line."""
    title = "\n".join(["line: mean over seeds", "band: its standard error", *more])
    axes.legend(title=title, loc="upper left", alignment="left", bbox_to_anchor=(1, 1))


AXES = {
    "entropy": "entropy of the prediction (nats; a point: 1/20 of the tokens)",
    "experts": "experts per token",
    "position": "position (a point: the mean of the tokens since the point before)",
    "gap": "online loss less global loss (nats)",
}
FIGURES = {  # each is drawn from the first of these questions that has curves, by this function
    "curves.svg": (("routers", "online", "sparsity"), draw_curves),
    "experts_by_entropy.svg": (("difficulty",), partial(draw_lines, "entropy", "experts")),
    "gap_by_position.svg": (("length",), partial(draw_lines, "position", "gap")),
}


def main(argv: list[str]) -> None:
    """Raises ValueError for bad input."""
    if argv == ["figures"]:
        return print(*save_figures(RESULTS), sep="\n")
    if argv[:1] != ["table"]:
        return print(__doc__)
    paths = map(Path, argv[1:]) if argv[1:] else sorted(RESULTS.glob("*.json"))
    print("\n\n".join(map(table, paths)))


if __name__ == "__main__":
    with bad_input_exits():
        main(sys.argv[1:])
