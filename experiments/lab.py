"""What the questions of this folder share: train what is compared, judge it, put means over seeds into rows.

A question compares arms: kinds of runs of train.py. Each arm has a run for every seed, and runs of one seed
are compared to each other. Runs are kept in out/experiments, under a name that says their settings: a
finished run is not repeated, a stopped one goes on, and questions share their runs.
"""

import fcntl
import hashlib
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import mean, median, stdev
from typing import IO, NamedTuple, Self

import torch
from torch import Tensor
from tqdm import tqdm

from experiments import solve

import data
from config import PLAIN, bad_input_exits, read_file, require, results
from model import MoEConfig, MoEGPT, load_checkpoint
from router import ROUTERS
from train import evaluate_text

RUNS = Path("out/experiments")
CODE = ["experiments/lab.py", "experiments/solve.py", "train.py", "model.py", "router.py"]  # of the figures
SEEDS, QUICK_SEEDS = 3, 2
QUICK = 4  # --quick divides by it the judged tokens and these settings
QUICKENED = ("max_iters", "warmup_iters", "lr_decay_iters", "first_iters", "eval_interval", "eval_windows")
JUDGED_TOKENS = 2**17  # of the validation text, by which trained models are compared
PROBLEMS = 60  # of each level, if the data are arithmetic
USUAL_TOKENS = 2**14  # of the training text, which tell how a trained model routes
TUNING = {"max_iters": 100, "warmup_iters": 10, "learning_rate": 1e-3}  # of a run after another
OTHER_BATCHES = 1000  # is added to the seed of a run after another, so that it sees other batches
SECONDS = "took {} seconds"  # a line of train.txt
COLUMNS = {
    "runs": "seeds; behind +- is the standard error of the mean over them",
    "nats": "loss of the validation text under the rule that decodes (unless said), as a user would get it",
    "bits/byte": "the same in bits per byte of the text",
    "as trained": "the loss under the router that trained, which may see the future",
    "leak": "nats less as trained: what seeing the future gains, and spending all of the budget",
    "experts per token": "mean over tokens and layers",
    "load entropy": "of the experts' shares of the pairs (1: uniform)",
    "load variance": "of share * E (0: uniform)",
    "dead": "experts without any token, of all layers",
    "exact match": "share of the test problems that are solved",
    "steps/s": "the median of the training, without evaluations",
    "minutes": "all of the training, by the clock",
    "nats, to base": "the difference to the row that it is compared to, paired by seed",
    "exact match, to base": "likewise",
}


@dataclass(frozen=True)
class Options(results.Options):
    """What is trained."""

    config: str = "config/compare.py"  # settings of train.py that all runs share
    seeds: int | None = None  # runs of each kind, from `seed` on (none: 3, quick 2)
    quick: bool = False  # a quarter of iterations and of judged text, for a look in minutes
    budget: float | None = None  # minutes after which no training begins
    compile: str = "auto"  # torch.compile in training: auto, true or false


@dataclass(frozen=True)
class OptionsWithK(Options):
    """How many experts."""

    k: int | None = None  # experts per token on average (none: as in --config)


@dataclass(frozen=True)
class Lab(results.Machine):
    """The options, the machine, the deadline, and which trainings failed or did not begin."""

    missing: list[str] = field(default_factory=list)

    @cached_property
    def deadline(self) -> float:
        """When no training begins any more, in time.monotonic(); the budget counts from the first look."""
        return math.inf if self.config.budget is None else time.monotonic() + 60 * self.config.budget

    @cached_property
    def shared(self) -> dict[str, object]:
        """Settings of all runs: those of --config, and the model's defaults.

        Raises ValueError where max_iters or batch_size is missing, and for a dense model.
        """
        name = self.config.config
        settings = asdict(MoEConfig()) | file_settings(name)
        for key in ("max_iters", "batch_size"):
            require(key in settings, f"{key} in {name}", "not said", "said there, for the runs to share it")
        n_expert = settings["n_expert"]
        require(n_expert > 1, f"n_expert in {name}", n_expert, "at least 2, for routers to choose from")
        return settings

    @property
    def k(self) -> int:
        return self.config.k or self.shared["k"]

    @property
    def seeds(self) -> range:
        first = self.config.seed
        return range(first, first + (self.config.seeds or (QUICK_SEEDS if self.config.quick else SEEDS)))

    def autocast(self):
        """As in training."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)


def run_question(answer: Callable[[Lab], list[dict]], options: type[results.Options] = OptionsWithK) -> None:
    """What the file of a question does when it is started."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: a training then stops and saves
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    with bad_input_exits():
        main(answer, options, sys.argv[1:])


def main(answer: Callable[[Lab], list[dict]], options: type[results.Options], argv: list[str]) -> None:
    """Print the question (the docstring of its file), its table, what the columns are, and a line of JSON.

    Raises ValueError or OSError for bad input.
    """
    question, name = answer.__globals__["__doc__"].strip(), Path(inspect.getfile(answer)).stem
    lab = Lab.of(options.read(argv, question))
    report = results.measure(lab, {name: (question, answer)}) | {"missing": lab.missing}
    columns = dict.fromkeys(key for row in report["parts"].get(name, []) for key in row)
    print(*(f"{key}: {COLUMNS[key]}" for key in columns if key in COLUMNS), sep="\n")
    results.finish(report, lab.config.json)


# -------------------- arms and their rows -----------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One kind of run in a comparison."""

    name: str
    settings: dict[str, object]  # of train.py, beyond those that all arms share
    base: str  # name of the arm that it is compared to
    after: "Arm | None" = None  # the arm whose last checkpoints its runs start from
    file: Path | None = None  # that defines its router, if router.py does not

    def vary(self, **settings) -> Self:
        """An arm that differs in these settings, compared to this one."""
        said = ", ".join(f"{key}={value}".lower() for key, value in settings.items())
        return replace(self, name=f"{self.name}, {said}", settings=self.settings | settings, base=self.name)


def router_arms(routers: list[str], k: int, **settings) -> list[Arm]:
    """An arm for each router with k experts per token, compared to the first."""
    name = f"{{}}, k={k}".format
    return [Arm(name(r), {"router": r, "k": k, **settings}, base=name(routers[0])) for r in routers]


def tuned_arms(lab: Lab, first: Arm, routers: list[str]) -> list[Arm]:
    """An arm for each router that goes on where the runs of `first` ended, compared to the first of these."""
    iterations = TUNING["max_iters"] // (QUICK if lab.config.quick else 1)
    name = f"{first.name}, {iterations} more of {{}}".format
    tuning = {"k": lab.k, **TUNING}
    return [Arm(name(r), {"router": r, **tuning}, base=name(routers[0]), after=first) for r in routers]


Judged = tuple[str, str, dict]  # the name of a row, that of the row it is compared to, the figures of a run
Judge = Callable[[Arm, "OpenRun"], Iterable[Judged]]


def judged(lab: Lab, arms: list[Arm], judge: Judge, **opening) -> list[dict]:
    """Train the arms where need be, and open each run (open_run). A row of means for each name of `judge`."""
    by_seed: dict[str, dict[int, dict]] = {}  # name of a row -> seed -> figures
    bases = {}
    for arm, seed, folder in trained(lab, arms):
        with lab.autocast():
            for name, base, figures in judge(arm, open_run(lab, folder, **opening)):
                by_seed.setdefault(name, {})[seed] = figures
                bases[name] = base
    return [mean_row(name, found, by_seed.get(bases[name], {})) for name, found in by_seed.items()]


def compare(lab: Lab, arms: list[Arm]) -> list[dict]:
    """A row for each arm, with the figures of its runs (run_figures).

    They are kept with the run, under a name that changes with the code that made them.
    """
    made_by = hashlib.sha256(b"".join((results.HOME / name).read_bytes() for name in CODE)).hexdigest()[:8]

    def judge(arm: Arm, run: OpenRun) -> Iterator[Judged]:
        kept = run.folder / f"figures-{made_by}.json"
        if not kept.is_file():
            whole = kept.with_suffix(f".{os.getpid()}.tmp")
            whole.write_text(json.dumps(run_figures(run)))
            whole.replace(kept)
        yield arm.name, arm.base, json.loads(kept.read_text())

    return judged(lab, arms, judge)


def mean_row(name: str, runs: dict[int, dict], base: dict[int, dict]) -> dict:
    """Means over seeds with their standard errors; the difference to `base`, over the seeds that both have.

    runs, base: seed -> figures.
    """
    row = {"what": name, "runs": len(runs)}
    both = [seed for seed in runs if seed in base]
    for key in next(iter(runs.values())):
        values = [run[key] for run in runs.values()]
        if key == "curve":
            row["curves"] = [{"seed": seed, **run[key]} for seed, run in runs.items()]
        elif key == "tokens":
            row["tokens"] = values[0]
        else:
            row[key] = mean_and_error(values)
        if key in ("nats", "exact match") and both and runs is not base:
            row[f"{key}, to base"] = mean_and_error([runs[seed][key] - base[seed][key] for seed in both])
    return row


def mean_and_error(values: list[float]) -> list[float]:
    """Mean, and its standard error (None for one value)."""
    return [mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None]


# -------------------- training ----------------------------------------------------------------------------


def trained(lab: Lab, arms: list[Arm]) -> Iterator[tuple[Arm, int, Path]]:
    """Each arm and seed with the folder of its run, which is trained now if it is not yet; seed by seed.

    A line says which runs are left out, because they fail or would begin after the deadline.
    """
    assert lab.shared  # raises ValueError for a config that no run could share
    for seed, arm in tqdm([(s, a) for s in lab.seeds for a in arms], unit="run", disable=None):
        if all(train_run(lab, run, seed) for run in filter(None, (arm.after, arm))):
            yield arm, seed, run_folder(lab.config, arm, seed)
        else:
            name = f"{arm.name}, seed {seed}"
            tqdm.write(f"missing: {name}")
            if name not in lab.missing:
                lab.missing.append(name)


def file_settings(name: str) -> dict[str, object]:
    """What a config file sets, without what is no setting, such as a table that it has imported."""
    return {key: value for key, value in read_file(name).items() if isinstance(value, PLAIN)}


def run_settings(config: Options, arm: Arm, seed: int) -> dict[str, object]:
    """What train.py is told for a run, apart from its folder."""
    settings = file_settings(config.config) | arm.settings
    if config.quick:
        settings |= {key: max(1, settings[key] // QUICK) for key in QUICKENED if key in settings}
    where = {key: getattr(config, key) for key in ("device", "dtype", "compile")}
    settings |= {key: value for key, value in where.items() if value != "auto"}
    if arm.after is None:
        return settings | {"seed": seed}
    start = run_folder(config, arm.after, seed) / "last.pt"
    return settings | {"seed": seed + OTHER_BATCHES, "init_from": start}


def run_folder(config: Options, arm: Arm, seed: int) -> Path:
    """Where a run is kept. Other settings have another folder, so a config that has changed has new runs."""
    settings = run_settings(config, arm, seed)
    digest = hashlib.sha256(str(sorted((key, str(value)) for key, value in settings.items())).encode())
    words = "-".join(f"{key}-{value}" for key, value in sorted(arm.settings.items()))
    return RUNS / f"{Path(config.config).stem}-{words}-seed{seed}-{digest.hexdigest()[:8]}"


def train_run(lab: Lab, arm: Arm, seed: int) -> bool:
    """Start or resume a run, unless it is finished. False if it fails (a line says why) or is too late."""
    folder = run_folder(lab.config, arm, seed)
    finished = folder / "finished"
    if finished.is_file() or time.monotonic() >= lab.deadline:
        return finished.is_file()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "train.txt", "a") as output:
        lock(output)
        if finished.is_file() or time.monotonic() >= lab.deadline:
            return finished.is_file()
        settings = run_settings(lab.config, arm, seed) | {"sample_tokens": 0, "out_dir": folder}
        if (folder / "last.pt").is_file():
            settings["init_from"] = "resume"
        else:
            (folder / "log.jsonl").unlink(missing_ok=True)  # of a start that was cut short
        code = wait_for(command_line(arm, settings), output)
        if code or not is_saved(folder, settings["max_iters"]):
            tqdm.write(f"{arm.name}, seed {seed} failed: {last_words(folder / 'train.txt')}")
            return False
        (folder / "best.pt").unlink(missing_ok=True)  # large, and nothing here reads it
        finished.touch()
    return True


def command_line(arm: Arm, settings: dict[str, object]) -> list[str]:
    """What trains an arm."""
    files = [arm.file] if arm.file else []
    texts = {key: str(v).lower() if isinstance(v, bool | None) else v for key, v in settings.items()}
    options = [f"--{key}={text}" for key, text in texts.items()]
    return [sys.executable, str(results.HOME / "train.py"), *map(str, files), *options]


def lock(file: IO) -> None:
    """Wait until no other process has a lock on the file. Processes that write to it inherit this lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        tqdm.write(f"waiting for another process that trains in {Path(file.name).parent}")
        fcntl.flock(file, fcntl.LOCK_EX)


def wait_for(command: list[str], output: IO) -> int:
    """The exit code of a command, which writes to `output`; then the seconds that it took are written there.

    Ctrl-C does not reach it from the terminal: it is told to stop from here, and has time to save.
    """
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=output, stderr=output, process_group=0)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    finally:
        print(SECONDS.format(time.monotonic() - start), file=output, flush=True)


def is_saved(folder: Path, iterations: int) -> bool:
    """Whether the last checkpoint of a run is its end: on a full disk train.py goes on without saving."""
    try:
        return load_checkpoint(folder / "last.pt")["step"] == iterations
    except ValueError:
        return False


def last_words(path: Path) -> str:
    """The last line of train.py in train.txt, and where there is more."""
    lines = path.read_text().strip().splitlines()
    said = [line for line in lines if not re.fullmatch(SECONDS.format(r"[\d.]+"), line)]
    return f"{' '.join(said[-1:])} (more in {path})"


# -------------------- judging what was trained ------------------------------------------------------------


class OpenRun(NamedTuple):
    """A finished run, open to be judged."""

    folder: Path
    model: MoEGPT
    dataset: data.Dataset
    batches: list[tuple[Tensor, Tensor]]  # of validation windows
    settings: dict  # of train.py

    @property
    def decode(self) -> str:
        """The router under which the model writes."""
        return ROUTERS[self.model.config.router].decode

    def evaluate(self, router: str | None = None) -> dict:
        """evaluate_text of the validation windows under a router (None: the one that decodes)."""
        token_bytes = self.dataset.tokenizer.token_bytes
        return evaluate_text(self.model, self.batches, token_bytes, router or self.decode)

    def losses(self, router: str | None = None) -> dict[str, float]:
        """Three columns of `evaluate`."""
        found = self.evaluate(router)
        return {"nats": found["loss"], "bits/byte": found["bpb"], "experts per token": found["experts"][0]}

    @torch.no_grad()
    def by_token(self, router: str) -> tuple[Tensor, Tensor, Tensor]:
        """Of the validation windows' tokens: loss and entropy in nats (windows, T), experts (windows, T, L).

        Raises ValueError for a dataset of which only answers are learned.
        """
        whole, device = self.dataset.val_answers is None, self.model.head.weight.device
        require(whole, "dataset", self.dataset.folder.name, "one of which all tokens are learned")
        parts = []
        for x, y in self.batches:
            logits, _, stats = self.model(x.to(device), router=router)
            log_share = logits.log_softmax(-1)
            loss = -log_share.gather(-1, y.to(device).unsqueeze(-1)).squeeze(-1).float()
            entropy = -(log_share.exp() * log_share).sum(-1).float()
            parts.append([each.cpu() for each in (loss, entropy, stats.n_taken.movedim(0, -1))])
        return tuple(torch.cat(each) for each in zip(*parts))

    def usual_text(self, seed: int) -> tuple[Tensor, ...]:
        """Batches of the training text, which tell how the model routes: (batch_size, T) each."""
        size, T = self.batches[0][0].shape
        x, _ = self.dataset.train_batch(0, USUAL_TOKENS // T, T, seed)
        return x.to(self.model.head.weight.device).split(size)


def open_run(lab: Lab, folder: Path, tokens: int | None = None, **changes) -> OpenRun:
    """A run by its last checkpoint, with `changes` of its config, to be judged by so many tokens.

    tokens None: JUDGED_TOKENS. --quick has fewer, whatever was asked for. Raises ValueError if the dataset
    was prepared anew since.
    """
    checkpoint = load_checkpoint(folder / "last.pt")
    settings = checkpoint["train_config"] | changes
    dataset = data.load(settings["dataset"])
    same = checkpoint["source_sha256"] == dataset.meta["source_sha256"]
    same = same and data.make_tokenizer(checkpoint["tokenizer"]).fingerprint == dataset.tokenizer.fingerprint
    remedy = f"the same: delete {folder} to train it again"
    require(same, f"the data in {dataset.folder}", "other than when a run was trained", remedy)
    model = MoEGPT.from_checkpoint(checkpoint, **changes).to(lab.device).eval()
    tokens = JUDGED_TOKENS // QUICK if lab.config.quick else tokens or JUDGED_TOKENS
    windows = max(1, tokens // settings["block_size"])
    batches = dataset.val_batches(settings["block_size"], settings["batch_size"], windows)
    return OpenRun(folder, model, dataset, batches, settings)


def run_figures(run: OpenRun) -> dict[str, object]:
    """Columns of a finished run: by its last checkpoint and, of how it went, by its log."""
    router, causal = run.model.config.router, run.evaluate()
    as_trained = causal if router == run.decode else run.evaluate(router)
    figures = {"nats": causal["loss"], "bits/byte": causal["bpb"], "as trained": as_trained["loss"]}
    figures["leak"] = causal["loss"] - as_trained["loss"]
    if "experts" in causal:
        figures |= {"experts per token": causal["experts"][0], "load entropy": causal["entropy"]}
        figures |= {"load variance": causal["variance"], "dead": causal["dead"]}
    data_folder, tokenizer = run.dataset.folder, run.dataset.tokenizer
    if data_folder.name == "arithmetic" and (data_folder / "test.jsonl").is_file():
        problems = solve.test_problems(data_folder, PROBLEMS)
        figures["exact match"] = mean(right for right, _ in solve.solve(run.model, tokenizer, problems))
    return figures | course(run)


def course(run: OpenRun) -> dict[str, object]:
    """How a run went: losses on the way, speed, and time."""
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    evals = [line for line in lines if line["kind"] == "eval"]
    curve = {"step": [e["step"] for e in evals], "nats": [e["causal"]["loss"] for e in evals]}
    per_step = [run.settings[key] for key in ("batch_size", "gradient_accumulation_steps", "block_size")]
    rate = median(line["tokens_per_second"] for line in lines if line["kind"] == "train")
    seconds = re.findall(SECONDS.format(r"([\d.]+)"), (run.folder / "train.txt").read_text())
    return {"curve": curve, "steps/s": rate / math.prod(per_step), "minutes": sum(map(float, seconds)) / 60}
