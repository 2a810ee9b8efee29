"""What the questions of this folder share: train what is compared, judge it, put means into rows.

A question compares arms: kinds of runs of train.py. From scratch, two seeds of one setting differ by more
than most arms do. So a model is trained under TopK, one for each seed: a trunk. Each arm has several short
runs that branch off from it, each with its own order of the data. Runs of one trunk and one order are
compared to each other. Runs are kept in out/experiments, under a name that says their settings: a finished
run is not repeated, a stopped one goes on, questions share their runs, and processes that answer the same
question at the same time share the work.
"""

import hashlib
import inspect
import json
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import IO, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from experiments import solve

import data
import train
from config import PLAIN, bad_input_exits, read_file, require, results
from config.device import autocast
from config.files import lock, whole
from model import MoEConfig, MoEGPT, load_checkpoint
from router import ROUTERS, Routing

RUNS = Path("out/experiments")
CODE = ["experiments/lab.py", "experiments/solve.py", "train.py", "model.py", "router.py"]  # of the figures
CODE += ["data/arithmetic/prepare.py"]  # which says what solves a problem
SOURCE = b"".join((results.HOME / name).read_bytes() for name in CODE)  # as loaded: it may change later
QUICK = 10  # --quick divides by it the judged tokens and these settings
QUICKENED = ("max_iters", "warmup_iters", "lr_decay_iters", "first_iters", "eval_interval", "eval_windows")
JUDGED_TOKENS = 2**17  # of the validation text, by which trained models are compared
PROBLEMS = 60  # of each level, if the data are arithmetic
USUAL_TOKENS = 2**14  # of the training text, which tell how a trained model routes
# Of a branch: it begins at the rate at which the trunk's cosine ended.
TUNING = {"max_iters": 100, "warmup_iters": 10, "eval_interval": 100, "learning_rate": 1e-3}
OTHER_DATA = 1000  # from the seed of one branch to that of the next, which decides the order of its data
UNTUNED = ", untuned"  # ends the name of an arm without training
FEWEST, ERRORS = 5, 3  # a difference is called one from so many runs and beyond so many standard errors
BETTER = {"nats": -1, "exact match": 1}  # what is compared, and whether less or more of it is better
EQUAL = "nats, at equal spending, to base"
VERDICTS = {"nats, to base": "verdict", "exact match, to base": "verdict, exact match"}
VERDICTS |= {EQUAL: "verdict, equal spending"}
COLUMNS = {
    "runs": "behind +- is the standard error of the mean over them; of untuned rows, a run is a part of the "
    "validation text under a trunk",
    "nats": "loss of the validation text under the rule that decodes (unless said), as a user would get it",
    "bits/byte": "the same in bits per byte of the text",
    "as trained": "the loss under the arm's own router, which may see the future",
    "gap": "nats less as trained: what the arm's own router gains by seeing the future and spending all",
    "experts per token": "mean over tokens and layers",
    "load entropy": "of the experts' shares of the pairs (1: uniform)",
    "load variance": "of share * E (0: uniform)",
    "dead": "experts without any token, of all layers",
    "exact match": "share of the test problems that are solved",
    "ms/iteration": "of training, one of each arm in turn, the median",
    "minutes": "of training, so many milliseconds an iteration; evaluations are not counted",
    "nats, to base": "the difference to the row that it is compared to, paired by trunk and order of data",
    "exact match, to base": "likewise",
    EQUAL: "the difference to TopK if it spent as many experts per token, by the curve of its losses",
    "verdict": f"better or worse: beyond {ERRORS} standard errors of at least {FEWEST} runs",
}


@dataclass(frozen=True)
class Options(results.Options):
    """What is trained."""

    config: str = "config/trunk.py"  # settings of train.py that all runs share
    seeds: int | None = None  # trunks or runs from scratch, from `seed` on (none: 2 trunks, 3 runs; quick: 1)
    quick: bool = False  # a tenth of iterations and of judged text, for a look in minutes
    budget: float | None = None  # minutes after which no training begins
    compile: str = "auto"  # torch.compile in training: auto, true or false


@dataclass(frozen=True)
class BranchOptions(Options):
    """How it is compared."""

    branches: int | None = None  # runs of each arm after each trunk (none: 3, quick 2)
    from_scratch: bool = False  # arms are trained from scratch as --config says, without a trunk


@dataclass(frozen=True)
class OptionsWithK(BranchOptions):
    """How many experts."""

    k: int = 2  # experts per token on average


class Start(NamedTuple):
    """What runs that are compared to each other have in common."""

    seed: int  # of the trunk, or of all from scratch
    branch: int  # from 1 after a trunk, and 0 from scratch


@dataclass(frozen=True)
class Lab(results.Machine):
    """The options, the machine, the deadline, and what is told of the runs beside the rows."""

    missing: list[str] = field(default_factory=list)  # runs that failed or did not begin

    @cached_property
    def deadline(self) -> float:
        """When no training begins any more, in time.monotonic(); the budget counts from the first look."""
        return math.inf if self.config.budget is None else time.monotonic() + 60 * self.config.budget

    @cached_property
    def shared(self) -> dict[str, object]:
        """Settings of all arms: those of --config or of a branch, and train.py's defaults.

        Raises ValueError where max_iters is missing, for a seed, for a dense model, and for a k above
        n_expert.
        """
        name, said = self.config.config, file_settings(self.config.config)
        require("max_iters" in said, f"max_iters in {name}", "not said", "said there: --quick takes a tenth")
        require("seed" not in said, f"seed in {name}", said.get("seed"), "given as --seed")
        settings = asdict(train.TrainConfig()) | said
        n_expert = settings["n_expert"]
        require(n_expert > 1, f"n_expert in {name}", n_expert, "at least 2, for routers to choose from")
        k = getattr(self.config, "k", 1)
        require(k <= n_expert, "k", k, f"at most the {n_expert} experts of {name}")
        return settings | TUNING if self.trunk else settings

    @property
    def trunk(self) -> "Arm | None":
        """What arms branch off from (None: they begin from scratch)."""
        if getattr(self.config, "from_scratch", True):
            return None
        return Arm("trunk", {"router": "topk"}, "trunk")

    @property
    def branches(self) -> int:
        return (self.config.branches or (2 if self.config.quick else 3)) if self.trunk else 0

    @property
    def starts(self) -> list[Start]:
        first, usual = self.config.seed, 1 if self.config.quick else 2 if self.trunk else 3
        seeds = range(first, first + (self.config.seeds or usual))
        branches = range(1, self.branches + 1) if self.trunk else [0]
        return [Start(seed, branch) for seed in seeds for branch in branches]

    @property
    def design(self) -> str:
        """How arms are compared, for people."""
        name, seeds = self.config.config, len({start.seed for start in self.starts})
        if not self.trunk:
            return f"{seeds} runs of each arm from scratch, {name}"
        iterations = quickened(self.config, TUNING)["max_iters"]
        return f"{self.branches} branches of {iterations} iterations after each of {seeds} trunks, {name}"


def run_question(answer: Callable[[Lab], list[dict]], options: type[results.Options] = OptionsWithK) -> None:
    """What the file of a question does when it is started."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: a training then stops and saves
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, interrupt)
    with bad_input_exits():
        main(answer, options, sys.argv[1:])


def interrupt(*_) -> None:
    """What Ctrl-C does, also where it is ignored: in the background of a script."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


def main(answer: Callable[[Lab], list[dict]], options: type[results.Options], argv: list[str]) -> None:
    """Print the question (the docstring of its file), its table, what the columns are, and a line of JSON.

    Raises ValueError or OSError for bad input.
    """
    question, name = answer.__globals__["__doc__"].strip(), Path(inspect.getfile(answer)).stem
    lab = Lab.of(options.read(argv, question))
    report = results.measure(lab, {name: (question, answer)}) | {"missing": lab.missing}
    rows = report["parts"].get(name, [])
    columns = dict.fromkeys(key for row in rows for key in row)
    print(*(f"{key}: {COLUMNS[key]}" for key in columns if key in COLUMNS), sep="\n")
    if isinstance(lab.config, Options):
        report |= {"design": lab.design, "comparisons": comparisons(rows)}
        print(f"design: {lab.design}\ncomparisons: {report['comparisons']}")
    results.finish(report, lab.config.json)


# -------------------- arms --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One kind of run in a comparison."""

    name: str
    settings: dict[str, object]  # of train.py, beyond those that all arms share
    base: str  # name of the arm that it is compared to
    after: "Arm | None" = None  # the trunk whose last checkpoints its runs start from
    tuned: bool = True  # False: its runs are those checkpoints, opened with its settings
    rewire: Callable[[MoEGPT], None] | None = None  # changes a model before it is trained, and before judging
    other_data: int = 0  # n: its data have the order of branch + n

    def vary(self, **settings) -> Self:
        """An arm that differs in these settings, compared to this one."""
        said = ", ".join(f"{key}={value}".lower() for key, value in settings.items())
        return replace(self, name=f"{self.name}, {said}", settings=self.settings | settings, base=self.name)


def router_arms(lab: Lab, routers: list[str], k: int, **settings) -> list[Arm]:
    """An arm for each router with k experts per token, compared to the first.

    After a trunk the weights' divisor stays as it was: the checkpoint says it (norm_best).
    """
    name = f"{{}}, k={k}".format
    return [
        Arm(name(router), {"router": router, "k": k, **settings}, name(routers[0]), lab.trunk)
        for router in routers
    ]


def untuned(arms: list[Arm]) -> list[Arm]:
    """Of arms that branch off: their trunks with these arms' settings, before any tuning."""
    return [
        replace(arm, name=arm.name + UNTUNED, base=arm.base + UNTUNED, tuned=False)
        for arm in arms
        if arm.after
    ]


# -------------------- rows --------------------------------------------------------------------------------

Judged = tuple[str, str, dict]  # the name of a row, that of the row it is compared to, the figures of a run
Judge = Callable[[Arm, "OpenRun"], Iterable[Judged]]


class Compared(NamedTuple):
    """What becomes a row: the name of the row it is compared to, and the figures of each run."""

    base: str
    runs: dict[Start, dict]


def compare(lab: Lab, arms: list[Arm]) -> list[dict]:
    """A row for each arm, with all figures of its runs."""
    return judged(lab, arms, all_figures)


def judged(lab: Lab, arms: list[Arm], judge: Judge, **opening) -> list[dict]:
    """Train the arms where need be, and open each run (open_run). A row of means for each name of `judge`."""
    return rows_of(gather(lab, arms, judge, **opening))


def gather(lab: Lab, arms: list[Arm], judge: Judge, **opening) -> dict[str, Compared]:
    """What `judged` makes rows of, by their names. A line says which runs are missing."""
    assert lab.shared  # raises ValueError for a config that no run could share
    jobs = [(arm, start) for start in lab.starts for arm in arms]
    done = dict(share_out(len(jobs), lambda n, wait: judge_run(lab, *jobs[n], judge, opening, wait)))
    found: dict[str, Compared] = {}
    for number, (_, start) in enumerate(jobs):
        for name, base, figures in done[number]:
            found.setdefault(name, Compared(base, {})).runs[start] = figures
    return found


def rows_of(found: dict[str, Compared]) -> list[dict]:
    against = {name: found[base].runs for name, (base, _) in found.items() if base in found and base != name}
    return [mean_row(name, runs, against.get(name, {})) for name, (_, runs) in found.items()]


def mean_row(name: str, runs: dict[Start, dict], base: dict[Start, dict]) -> dict:
    """Means over runs with their standard errors, and differences to `base` over what both have."""
    row = {"what": name, "runs": len(runs)}
    for key in dict.fromkeys(key for figures in runs.values() for key in figures):
        values = [figures[key] for figures in runs.values() if key in figures]
        if key == "curve":
            row["curves"] = [{**start._asdict(), **curve} for start, curve in zip(runs, values)]
        elif key == "tokens":
            row["tokens"] = values[0]
        else:
            row |= with_verdict(key, values, -1)
        if key in BETTER and (paired := differences(runs, base, key)):
            row |= with_verdict(f"{key}, to base", list(paired.values()), BETTER[key])
            row[f"{key}, by trunk"] = {
                a.seed: mean(paired[b] for b in paired if b.seed == a.seed) for a in paired
            }
    return row


def differences(runs: dict[Start, dict], base: dict[Start, dict], key: str) -> dict[Start, float]:
    return {
        start: runs[start][key] - base[start][key] for start in runs if start in base and key in runs[start]
    }


def with_verdict(column: str, values: list[float], better: int) -> dict[str, object]:
    """Mean and error of a column and, if it holds differences, whether they are told apart from 0."""
    middle, error = mean_and_error(values)
    if column not in VERDICTS:
        return {column: [middle, error]}
    told = len(values) >= FEWEST and abs(middle) > ERRORS * error
    verdict = ("better" if middle * better > 0 else "worse") if told else "not told apart"
    return {column: [middle, error], VERDICTS[column]: verdict}


def mean_and_error(values: list[float]) -> list[float]:
    """Mean, and its standard error (None for one value)."""
    return [mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None]


def comparisons(rows: list[dict]) -> str:
    """How many differences could be called better or worse, and how many would be by chance alone."""
    tried = [row["runs"] for row in rows for key in VERDICTS.values() if key in row and row["runs"] >= FEWEST]
    expected = sum(map(chance, tried))
    return f"{len(tried)} have {FEWEST} runs or more; chance alone would call {expected:.1f} better or worse"


def chance(runs: int) -> float:
    """How often a mean of so many normal values around 0 is more than ERRORS standard errors away from it.

    Student's t with n = runs - 1: its density at sqrt(n) * tan(x) is that of x, cos(x)^(n - 1), scaled.
    """
    angle = np.linspace(0, math.pi / 2, 10_001)
    density = np.cos(angle) ** (runs - 2)
    return float(density[np.tan(angle) > ERRORS / math.sqrt(runs - 1)].sum() / density.sum())


# -------------------- training ----------------------------------------------------------------------------


def share_out(count: int, work: Callable[[int, bool], object]) -> Iterator[tuple[int, object]]:
    """work(number, wait) of each job, and its number. A job that another process does now comes later.

    work raises BlockingIOError for such a job, unless it is told to wait: when all that are left are such.
    """
    todo, busy = deque(range(count)), 0
    with tqdm(total=count, unit="run", disable=None) as bar:
        while todo:
            number = todo.popleft()
            try:
                result = work(number, busy > len(todo))
            except BlockingIOError:
                todo.append(number)
                busy += 1
                continue
            busy = 0
            bar.update()
            yield number, result


def judge_run(lab: Lab, arm: Arm, start: Start, judge: Judge, opening: dict, wait: bool) -> list[Judged]:
    """Train a run if need be, and judge it; [] if it is missing, which a line says.

    What is judged is kept with the run, under a name that changes with the settings and with the code: CODE,
    and code_of.
    """
    if not train_run(lab, arm, start, wait):
        name = f"{arm.name}, {named(start)}"
        tqdm.write(f"missing: {name}")
        if name not in lab.missing:  # two tables of a question may share an arm
            lab.missing.append(name)
        return []
    folder, config = run_folder(lab.config, arm, start), lab.config
    sha = hashlib.sha256(SOURCE + b"".join(Path(name).read_bytes() for name in code_of(arm, judge)))
    part = arm.tuned or lab.branches
    depends = [arm.name, arm.base, sorted(arm.settings.items()), part, start, opening]
    sha.update(repr([*depends, config.quick, config.seed, str(lab.device), lab.dtype]).encode())
    kept = folder / f"judged-{sha.hexdigest()[:12]}.json"
    with nullcontext() if kept.is_file() else locked(folder, wait):
        if not kept.is_file():  # nor meanwhile
            with autocast(lab.device, lab.dtype):
                found = list(judge(arm, open_run(lab, arm, start, **opening)))
            with whole(kept) as new:
                new.write_text(json.dumps(found))
    return json.loads(kept.read_text())


def code_of(arm: Arm, judge: Judge) -> list[str]:
    """The files of the judge, the router, the rewiring, and the functions in its closure."""
    functions = [judge, ROUTERS[arm.settings["router"]].select]
    if arm.rewire:
        functions += [arm.rewire, *inspect.getclosurevars(arm.rewire).nonlocals.values()]
    functions = [getattr(f, "func", f) for f in functions]  # of a partial
    return sorted({inspect.getfile(f) for f in functions if inspect.isfunction(f)})


def named(start: Start) -> str:
    return f"seed {start.seed}" + (f", branch {start.branch}" if start.branch else "")


def train_run(lab: Lab, arm: Arm, start: Start, wait: bool = True) -> bool:
    """Start or resume a run, unless it is finished. False if it fails (a line says why) or is too late.

    Raises BlockingIOError if another process trains it or its trunk now, unless told to wait for that.
    """
    if not arm.tuned:
        return train_run(lab, arm.after, start, wait)
    folder = run_folder(lab.config, arm, start)
    finished = folder / "finished"
    if finished.is_file():
        return True
    if time.monotonic() >= lab.deadline or (arm.after and not train_run(lab, arm.after, start, wait)):
        return False
    with locked(folder, wait) as output:
        if finished.is_file() or time.monotonic() >= lab.deadline:
            return finished.is_file()
        if not (folder / "last.pt").is_file():
            (folder / "log.jsonl").unlink(missing_ok=True)  # of a start that was cut short
        with redirect_stdout(output), redirect_stderr(output):
            error = train_here(arm, run_settings(lab.config, arm, start), folder)
        if error:
            tqdm.write(f"{arm.name}, {named(start)} failed: {error} (more in {output.name})")
            return False
        (folder / "best.pt").unlink(missing_ok=True)  # large, and nothing here reads it
        finished.touch()
    return True


def train_here(arm: Arm, settings: dict[str, object], folder: Path) -> str | None:
    """What train.py does, with the arm's rewiring. What went wrong, if anything did."""
    resume = {"init_from": "resume"} if (folder / "last.pt").is_file() else {}
    run = None
    try:
        if arm.after and not resume:
            still_there(settings["init_from"])
        run = set_up(settings | {"out_dir": folder} | resume)
        if arm.rewire:
            arm.rewire(run.model)
        if not train.train(run):
            raise KeyboardInterrupt
    except (ValueError, OSError, train.Diverged, torch.OutOfMemoryError) as error:
        return str(error)
    finally:
        if run is not None:
            run.model.uncompile()
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # or what was compiled would count against the next model and shape it
    run.optimizers = []  # half of the file, and no run goes on with them
    return None if run.save("last.pt") else "its end could not be saved"


def still_there(checkpoint: Path) -> Path:
    """The same path. Raises ValueError if a finished run's checkpoint was deleted."""
    remedy = f"there: delete {checkpoint.parent}, so that it is trained again"
    require(checkpoint.is_file(), f"{checkpoint.name} of a finished run", "missing", remedy)
    return checkpoint


def set_up(settings: dict[str, object]) -> train.Run:
    """The run of train.py with these settings."""
    texts = {key: str(v).lower() if isinstance(v, bool | None) else v for key, v in settings.items()}
    config, checkpoint = train.read_config([f"--{key}={text}" for key, text in texts.items()])
    config, dataset = train.open_dataset(config, checkpoint)
    return train.set_up(config, dataset, checkpoint)


@contextmanager
def locked(folder: Path, wait: bool) -> Iterator[IO]:
    """The file train.txt of a run, to be added to, while no other process has it.

    Raises BlockingIOError if another one has it now, unless told to wait.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "train.txt", "a") as file:
        try:
            lock(file)
        except BlockingIOError:
            if not wait:
                raise
            tqdm.write(f"waiting for another process that works in {folder}")
            lock(file, wait=True)
        yield file


@cache
def file_settings(name: str) -> dict[str, object]:
    """What a config file sets, without what is no setting, such as a table that it has imported.

    Read once: an edit while a question runs would give its later runs other settings.
    """
    return {key: value for key, value in read_file(name).items() if isinstance(value, PLAIN)}


def quickened(config: Options, settings: dict[str, object]) -> dict[str, object]:
    """These settings, or those of --quick."""
    fewer = {key: max(1, settings[key] // QUICK) for key in QUICKENED if settings.get(key)}
    return settings | fewer if config.quick else settings


def run_settings(config: Options, arm: Arm, start: Start) -> dict[str, object]:
    """What train.py is told for a run, apart from its folder."""
    settings = file_settings(config.config) | (TUNING if arm.after else {}) | arm.settings
    settings = quickened(config, settings) | {"seed": start.seed}
    where = {key: getattr(config, key) for key in ("device", "dtype", "compile")}
    settings |= {key: value for key, value in where.items() if value != "auto"}
    if arm.after:
        settings["seed"] += OTHER_DATA * (start.branch + arm.other_data)
        settings["init_from"] = run_folder(config, arm.after, start) / "last.pt"
    return settings


def run_folder(config: Options, arm: Arm, start: Start) -> Path:
    """Where a run is kept. Other settings have another folder, so a config that has changed has new runs."""
    if not arm.tuned:
        return run_folder(config, arm.after, start)
    settings = run_settings(config, arm, start) | ({"rewired": arm.name} if arm.rewire else {})
    digest = hashlib.sha256(str(sorted((key, str(value)) for key, value in settings.items())).encode())
    words = "-".join(f"{key}-{value}" for key, value in sorted(arm.settings.items()))
    return RUNS / f"{Path(config.config).stem}-{words}-seed{settings['seed']}-{digest.hexdigest()[:8]}"


# -------------------- judging what was trained ------------------------------------------------------------


class OpenRun(NamedTuple):
    """A finished run, open to be judged."""

    model: MoEGPT
    dataset: data.Dataset
    batches: list[tuple[Tensor, Tensor]]  # of validation windows
    part: slice  # of the validation text and of test problems, by which it is judged

    @property
    def decode(self) -> str:
        """The router under which the model writes."""
        return ROUTERS[self.model.config.router].decode

    def changed(self, **settings) -> Self:
        """The same weights under other settings of the routing."""
        return self._replace(model=deepcopy(self.model).rerouted(**settings))

    def evaluate(self, router: str | None = None) -> dict:
        """evaluate_text of the validation windows under a router (None: the one that decodes)."""
        token_bytes = self.dataset.tokenizer.token_bytes
        return train.evaluate_text(self.model, self.batches, token_bytes, router or self.decode)

    def losses(self, router: str | None = None) -> dict[str, float]:
        """Three columns of `evaluate`."""
        found = self.evaluate(router)
        return {"nats": found["loss"], "bits/byte": found["bpb"], "experts per token": found["experts"][0]}

    def figures(self) -> dict[str, float]:
        """Columns of losses and routing."""
        router, causal = self.model.config.router, self.evaluate()
        as_trained = causal if router == self.decode else self.evaluate(router)
        found = {"nats": causal["loss"], "bits/byte": causal["bpb"], "as trained": as_trained["loss"]}
        found["gap"] = causal["loss"] - as_trained["loss"]
        if "experts" in causal:
            found |= {"experts per token": causal["experts"][0], "load entropy": causal["entropy"]}
            found |= {"load variance": causal["variance"], "dead": causal["dead"]}
        return found

    @torch.no_grad()
    def by_token(self, router: str) -> tuple[Tensor, Tensor, Tensor]:
        """Of the validation windows' tokens: loss and entropy in nats (windows, T), experts (windows, T, L).

        Raises ValueError for a dataset of which only answers are learned.
        """
        all_learned(self.dataset)
        device, T = self.model.head.weight.device, self.batches[0][0].shape[1]
        windows, layers = sum(len(x) for x, _ in self.batches), len(self.model.expert_layers())
        # made first: small results between large freed blocks would leave holes, of 13 GB in all at T = 2,048
        loss, entropy = torch.empty(2, windows, T)
        experts = torch.empty(windows, T, layers, dtype=torch.int64)
        at = 0
        for x, y in self.batches:
            part, at = slice(at, at + len(x)), at + len(x)
            logits, _, stats = self.model(x.to(device), router=router)
            loss[part], entropy[part] = loss_and_entropy(logits, y.to(device))
            experts[part] = stats.n_taken.movedim(0, -1)
        return loss, entropy, experts

    @torch.no_grad()
    def usual_routing(self, router: str, seed: int) -> list[Routing]:
        """How each layer routes a piece of the training text, (n, T, E) each."""
        size, T = self.batches[0][0].shape
        x, _ = self.dataset.train_batch(0, USUAL_TOKENS // T, T, seed)
        text = x.to(self.model.head.weight.device).split(size)
        found = zip(*(self.model(x, router=router)[2].routing for x in text))
        return [Routing(*map(torch.cat, zip(*layer))) for layer in found]


def all_learned(dataset: data.Dataset) -> None:
    """Raise ValueError for a dataset of which only answers are learned."""
    complete = dataset.val_answers is None
    require(complete, "dataset", dataset.folder.name, "one of which all tokens are learned")


def loss_and_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """In nats, of each token: logits (B, T, V), targets (B, T) -> (B, T) each."""
    loss = F.cross_entropy(logits.movedim(-1, 1), targets, reduction="none")
    return loss, torch.special.entr(logits.softmax(-1)).sum(-1)


def open_run(lab: Lab, arm: Arm, start: Start, tokens: int | None = None, **changes) -> OpenRun:
    """A run by its last checkpoint, with `changes` of its config, to be judged by so many tokens.

    tokens None: JUDGED_TOKENS. --quick has fewer, whatever was asked for. Branches of an arm without tuning
    would be all alike, so each is judged by a part of the text. Raises ValueError if the dataset was prepared
    anew since.
    """
    folder = run_folder(lab.config, arm, start)
    checkpoint = load_checkpoint(still_there(folder / "last.pt"))
    own = {} if arm.tuned else arm.settings
    changes = {f.name: own[f.name] for f in fields(MoEConfig) if f.name in own} | changes
    settings = checkpoint["train_config"] | changes
    dataset = data.load(settings["dataset"])
    same, remedy = checkpoint["data_sha256"] == dataset.sha256, f"the same: delete {folder} to train it again"
    require(same, f"the data in {dataset.folder}", "other than when a run was trained", remedy)
    model = MoEGPT.from_checkpoint(checkpoint, **changes).to(lab.device).eval()
    if arm.rewire:
        arm.rewire(model)
    tokens = JUDGED_TOKENS // QUICK if lab.config.quick else tokens or JUDGED_TOKENS
    windows = max(1, tokens // settings["block_size"])
    batches = dataset.val_batches(settings["block_size"], settings["batch_size"], windows)
    part = slice(None) if arm.tuned else slice(start.branch - 1, None, lab.branches)
    fewer = f"at most {len(batches)}, for each to be judged by a batch of its own"
    require(arm.tuned or lab.branches <= len(batches), "branches", lab.branches, fewer)
    return OpenRun(model, dataset, batches[part], part)


def all_figures(arm: Arm, run: OpenRun) -> Iterator[Judged]:
    """OpenRun.figures; and the share of problems solved if the data are arithmetic and nothing is rewired."""
    figures, folder = run.figures(), run.dataset.folder
    if not arm.rewire and folder.name == "arithmetic" and (folder / "test.jsonl").is_file():
        problems = solve.test_problems(folder, PROBLEMS)[run.part]
        solved = solve.solve(run.model, run.dataset.tokenizer, problems)
        figures["exact match"] = mean(right for right, _ in solved)
    yield arm.name, arm.base, figures
