"""Do experts pay: at equal tokens, and in equal minutes?

TopK and its dense twin, which has one MLP as wide as the experts of a token, are trained from scratch. A
second twin has so many more iterations that it takes as long as TopK. The seconds of an iteration are
measured here, in turns: have an idle machine then. Losses do not depend on it.
"""

import io
import json
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

from tqdm import trange

from experiments.lab import Arm, Lab, Options, compare, run_folder, run_question, run_settings, set_up
from experiments.routers import recipe

from train import train_step

TIMED = 20  # iterations of each arm


@dataclass(frozen=True)
class MinutesOptions(Options):
    """What to compare."""

    config: str = "config/tiny_topk.py"  # settings of train.py that all runs share
    longer: float = 1.35  # iterations of the second twin for one of TopK's


def answer(lab: Lab) -> list[dict]:
    shared, longer = lab.shared, lab.config.longer
    arms = [Arm(name, recipe(shared, name, shared["k"]), "topk") for name in ("topk", "dense")]
    more = {"max_iters": round(longer * shared["max_iters"])}
    arms.append(Arm(f"dense, {longer:g} times the iterations", arms[-1].settings | more, "topk"))
    rows = {row["what"]: row for row in compare(lab, arms)}
    arms = [arm for arm in arms if arm.name in rows]
    for arm, seconds in zip(arms, seconds_of_iterations(lab, arms), strict=True):
        folders = [run_folder(lab.config, arm, start) for start in lab.starts]
        curves = [curve(folder, seconds) for folder in folders if (folder / "finished").is_file()]
        rows[arm.name] |= {
            "ms/iteration": 1000 * seconds,
            "minutes": curves[0]["minutes"][-1],
            "curves": curves,
        }
    return list(rows.values())


def seconds_of_iterations(lab: Lab, arms: list[Arm]) -> list[float]:
    """The median of each arm. They take turns, so that whatever else the machine does slows all alike."""
    with redirect_stdout(io.StringIO()):
        runs = [set_up(run_settings(lab.config, arm, lab.starts[0])) for arm in arms]
    taken = [[] for _ in arms]
    for _ in trange(TIMED, unit="turn", disable=None):
        for run, seconds in zip(runs, taken, strict=True):
            begin = perf_counter()
            train_step(run).tolist()  # waits for the device
            seconds.append(perf_counter() - begin)
    return [median(seconds[2:]) for seconds in taken]


def curve(folder: Path, seconds: float) -> dict[str, list[float]]:
    """The losses of a run's evaluations, and the minutes of training until then."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    evals = [line for line in lines if line["kind"] == "eval" and line["step"]]
    return {
        "minutes": [line["step"] * seconds / 60 for line in evals],
        "nats": [line["causal"]["loss"] for line in evals],
    }


if __name__ == "__main__":
    run_question(answer, MinutesOptions)
