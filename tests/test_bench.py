"""bench.py: every part runs at toy sizes and gives the promised figures; the statistics are right."""

import fcntl
import importlib.util
import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import bench
import config.device
import data
import train
from bench import Arm, Bench, BenchConfig
from config import bad_input_exits, parse
from data.arithmetic.prepare import SPLIT, document
from data.arithmetic.problems import make_problem
from model import MoEConfig, MoEGPT, load_checkpoint, save_checkpoint
from router import ROUTERS, pseudo_candidates

SIZES = {"n_embd": 16, "n_hidden": 8, "n_expert": 8, "k": 2, "n_head": 2, "n_layer": 2, "vocab_size": 64}
TOY = [f"--{key}={value}" for key, value in SIZES.items()]
TOY += ["--batch_size=2", "--tokens=16", "--effort=0", "--device=cpu"]
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None


@pytest.fixture
def run(capsys):
    """Run bench.py; returns what its last line says, and all that it printed."""

    def run(*argv):
        with pytest.raises(SystemExit) as stop:
            bench.main([*argv])
        out = capsys.readouterr().out
        report = json.loads(out.splitlines()[-1])
        assert stop.value.code == bool(report["missing"]) and not report["failed"]
        return report, out

    return run


@pytest.fixture
def toy():
    """A Bench whose clock is a counter: the nth call takes n seconds."""

    class Toy(Bench):
        def seconds(self, call):
            call()
            return float(len(log))

    log = []
    toy = Toy(BenchConfig(effort=0), torch.device("cpu"), torch.float32, False)
    return SimpleNamespace(bench=toy, log=log)


# ------------------------------------------------------------------------------------------------------------
# -------- statistics


def test_ratio_is_the_median_of_pairs_and_not_the_ratio_of_medians():
    slow, fast = [2.0, 30.0, 8.0, 10.0, 6.0], [1.0, 10.0, 8.0, 1.0, 4.0]
    assert bench.ratio(slow, fast) == [2.0, 1.5, 3.0]  # of 2, 3, 1, 10, 1.5
    assert bench.ratio(fast, fast) == [1, 1, 1]


def test_ratio_survives_a_disturbed_round():
    """One pair that was disturbed, whichever side it hit, leaves the median where it was."""
    a, b = [1.0] * 9, [2.0] * 9
    assert bench.ratio([50.0] + a[1:], b)[0] == bench.ratio(a, [50.0] + b[1:])[0] == 0.5


def test_interleave_takes_turns_and_drops_the_warm_up(toy):
    """Rounds go A B A B ..., each call prepared before it, and the first round does not count."""
    calls = {name: lambda name=name: toy.log.append(name) for name in "AB"}
    prepared = []
    times = toy.bench.interleave(calls, 1.0, prepared.append)
    rounds = 1 + bench.MIN_ROUNDS
    assert toy.log == prepared == ["A", "B"] * rounds
    assert times == {"A": [3.0, 5.0, 7.0, 9.0, 11.0], "B": [4.0, 6.0, 8.0, 10.0, 12.0]}


def test_the_peak_of_a_call_leaves_out_what_others_have_freed():
    """A small call after a large one has a small peak, on a CPU too, where freed memory is kept."""
    config.device.keep_freed_memory()
    measure = Bench(BenchConfig(), torch.device("cpu"), torch.float32, False)
    large, small = (
        measure.peak_gb(lambda n=n: [torch.ones(2**20) for _ in range(n)]) for n in (100, 1)
    )  # of 4 MB
    if large is None:
        pytest.skip("this system does not tell")
    assert 0.3 < large - small < 0.5


def test_wilson_interval_by_hand():
    """8 of 10 is the textbook's example: 0.490 to 0.943; none and all stay within 0 and 1."""
    assert bench.wilson(8, 10) == pytest.approx([0.8, 0.4902, 0.9433], abs=1e-4)
    assert bench.wilson(0, 7)[:2] == [0, 0] and bench.wilson(7, 7)[::2] == [1, 1]


# ------------------------------------------------------------------------------------------------------------
# -------- the parts

FIELDS = {
    "router": {"ms", "us per token", "time/topk"},
    "layer": {"ms", "GFLOP/s", "of matmul", "speed/dense"},
    "train": {"tokens/s", "GFLOP/s", "MFU %", "peak GB", "time/topk", "paper"},
    "decode": {
        "topk tokens/s",
        "online tokens/s",
        "speed/topk",
        "prefill tokens/s",
        "KV MB",
        "expert MB",
        "paper",
    },
    "cache": {"us per step", "time/16"},
    "peers": {"ours tokens/s", "theirs", "speed/theirs"},
}


@pytest.mark.parametrize("part", FIELDS)
def test_part_gives_what_it_promises(part, run):
    """Explanation, table, and one JSON line with the machine, the versions and the figures of every row."""
    if part == "peers" and not HAS_TRANSFORMERS:
        pytest.skip("transformers is not installed")
    report, out = run(part, *TOY)
    assert {"machine", "versions", "commit", "seed", "dtype", "command"} <= set(report)
    assert list(report["parts"]) == [part] and report["failed"] == []
    rows = report["parts"][part]
    assert rows[0].keys() >= FIELDS[part]
    for row in rows:
        assert row["what"] in out
        for value in (row[key] for key in row if bench.is_ratio(key) and isinstance(row[key], list)):
            middle, low, high = value
            assert 0 < low <= middle <= high
    assert bench.PARTS[part].__doc__.splitlines()[0] in out


def test_rows_name_all_that_is_compared(run):
    """One row for each router, each layer and pass, each length."""
    train = run("train", *TOY)[0]["parts"]["train"]
    assert [row["what"].split(",")[0] for row in train] == bench.PLAIN
    cache = run("cache", *TOY, "--tokens=512")[0]["parts"]["cache"]
    assert [row["what"] for row in cache] == [
        "batch 2, 128 past tokens",
        "batch 2, 512 past tokens",
        "batch 2, 512 past tokens, against ranking anew",
    ]


@pytest.mark.parametrize("past", [1, 64, 100])
def test_one_of_the_steps_that_the_cache_is_timed_at_merges(past):
    """However many tokens came before, the mean of CYCLE steps holds a merge's cost once."""
    cache = bench.ExpertCache(2, past + bench.CYCLE, 2, 8)
    scores = torch.rand(2, past + bench.CYCLE, 8)
    cache.select(scores[:, :past])
    merged = [cache.n_sorted]
    for token in range(past, past + bench.CYCLE):
        cache.select(scores[:, token : token + 1])
        merged.append(cache.n_sorted)
    assert len(set(merged)) == 2


def test_peers_without_transformers_is_a_line(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report, out = run("peers", *TOY)
    assert "skipped: transformers is not installed (pip install transformers)" in out
    assert report["parts"] == {"peers": []}


@pytest.mark.parametrize(
    ("device", "words"), [("cuda:99", "ours: ValueError: device is cuda:99"), ("cpu", "-9")]
)
def test_a_peer_that_fails_or_dies_is_a_line(device, words):
    """Whoever asks it for work gets one line that says what went wrong, and need not wait."""
    peer = bench.Peer(BenchConfig(device=device), "ours")
    if device == "cpu":
        peer.process.kill()
    with pytest.raises(RuntimeError) as error:
        peer.do("training")
    assert words in str(error.value) and "\n" not in str(error.value)
    peer.process.join(10)
    assert peer.process.exitcode is not None


def test_decoding_is_measured_at_the_context_it_says():
    """After `fill`, every cache has seen `context` tokens, and the experts chosen are near the budget."""
    measure = Bench(BenchConfig(**SIZES, effort=0), torch.device("cpu"), torch.float32, False)
    model = MoEGPT(measure.shape("tiny"))
    caches = {name: model.new_cache(2, 340, name) for name in ("topk", "online_seqtopk")}
    bench.fill(measure, model, caches, 2, 300)
    for cache in caches.values():
        assert cache.pos == 300 and not cache.padded
        assert cache.kv[0].k[:, :, :300].abs().sum(-1).all()
    _, _, stats = model(torch.randint(64, (2, 20)), cache=caches["online_seqtopk"])
    assert 1.7 <= stats.experts.float().mean() <= 2.3


def test_ctrl_c_keeps_what_has_been_measured(capsys, monkeypatch):
    """The parts before the one that was stopped are in the last line; those after it do not start."""

    def stop(measure):
        """Stops."""
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "PARTS", {"cache": bench.bench_cache, "stopped": stop, "router": stop})
    with pytest.raises(SystemExit) as end:
        bench.main(TOY)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert end.value.code == 1 and report["failed"] == ["stopped"] and report["parts"]["cache"]


def test_a_part_out_of_memory_leaves_the_others(capsys, monkeypatch):
    """What torch cannot do is reported at the end by exit code 1, with the results of the other parts."""

    def fail(measure):
        """Fails."""
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(bench, "PARTS", {"broken": fail, "cache": bench.bench_cache})
    with pytest.raises(SystemExit) as stop:
        bench.main(TOY)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert stop.value.code == 1 and report["failed"] == ["broken"] and report["parts"]["cache"]


# ------------------------------------------------------------------------------------------------------------
# -------- arithmetic


@pytest.fixture
def problems():
    question, answer = "Tom has {} dollars. Ida gives Tom {}.", "So Tom has {} dollars.\n#### {}"
    return [
        {"question": question.format(n, "7" * n), "answer": answer.format(2 * n, 2 * n), "result": 2 * n}
        | {"level": n % 2 + 1}
        for n in range(5, 10)
    ]


@pytest.fixture
def tokenizer(problems):
    texts = [bench.prompt_of(problem["question"]) + problem["answer"] for problem in problems]
    return data.train_bpe(texts, 300, "toy")


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": tokenizer.vocab_size}
    model = MoEGPT(MoEConfig(**sizes, router="seqtopk"))
    for parameter in model.parameters():
        parameter.data *= 5  # so that routing varies
    return model


@pytest.mark.parametrize("router", ["topk", "online_seqtopk"])
def test_problems_in_a_batch_are_solved_as_one_by_one(problems, tokenizer, model, router):
    """Padding changes neither the text nor the experts that a problem gets."""
    together = bench.solve(model, tokenizer, problems, router)
    alone = [bench.solve(model, tokenizer, [problem], router)[0] for problem in problems]
    assert [right for right, _ in together] == [right for right, _ in alone]
    assert [experts for _, experts in together] == pytest.approx([experts for _, experts in alone])


def test_arithmetic_counts_right_answers_by_level(problems, tokenizer, model, run, tmp_path, monkeypatch):
    """Problems are counted under their level, as many of each as asked for; the router is named."""
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    save_checkpoint(tmp_path / "best.pt", model, tokenizer=tokenizer.meta)
    monkeypatch.setattr(data, "load", lambda name: SimpleNamespace(folder=tmp_path))
    monkeypatch.setattr(
        bench, "solve", lambda model, tokenizer, some, router: [(p["level"] == 2, 2) for p in some]
    )
    report, _ = run("arithmetic", f"--out_dir={tmp_path}", "--problems=2", "--batch_size=3", "--device=cpu")
    rows = report["parts"]["arithmetic"]
    assert [(row["problems"], row["exact match"][0]) for row in rows] == [(2, 0), (2, 1), (4, 0.5)]
    assert all("online_seqtopk" in row["what"] for row in rows)


# ------------------------------------------------------------------------------------------------------------
# -------- keeping and reading


def test_json_is_kept_and_tabled(run, tmp_path):
    """--json keeps what the last line says, and the README's table has a column of each machine."""
    report, _ = run("cache", *TOY, f"--json={tmp_path}/new/a.json")
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == report
    other = report | {"machine": "another"}
    (tmp_path / "new" / "b.json").write_text(json.dumps(other))
    head, _, *lines = bench.readme_table(tmp_path / "new").splitlines()
    assert head.endswith(f"| a ({report['machine']}, float32) | b (another, float32) |")
    assert len(lines) == 1 and "against ranking anew" in lines[0] and "at least 25" in lines[0]
    (tmp_path / "new" / "c.json").touch()
    with pytest.raises(ValueError, match="holds no results"):
        bench.readme_table(tmp_path / "new")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], ["trian", "train"]),
        (["train", "--shape=huge"], ["shape", "huge", "heavy"]),
        (["--batch_size=0"], ["batch_size", "at least 1"]),
        (["router", "--k=99"], ["k is 99"]),
        (["arithmetic", "--out_dir=nowhere"], ["nowhere"]),
        (["cache", "--json=bench.py/x.json"], ["bench.py"]),
        (["cache", "--batch=3"], ["batch_size"]),
        (["quality", "--routers=topk,seqtop"], ["routers", "'seqtop'", "seqtopk"]),
        (["quality", "--ks=4,x"], ["ks", "'x'", "8,4,2"]),
        (["sparsity", "--ks=4"], ["ks", "quality"]),
        (["quality", "--config=config/qualty.py"], ["config/qualty.py", "did you mean"]),
        (["gap", "--k=2", "--config=config/small_dense.py"], ["n_expert", "at least 2"]),
    ],
)
def test_bad_input_is_one_line(argv, words, capsys, monkeypatch):
    monkeypatch.chdir(bench.HOME)
    with pytest.raises(SystemExit) as stop, bad_input_exits():
        bench.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert all(word in error for word in words)


def test_results_are_not_replaced_by_nothing(quality, tmp_path):
    """A part without rows leaves the file of --json as it was."""
    path = tmp_path / "a.json"
    path.write_text("mine")
    _, out = quality("--budget=0", f"--json={path}")
    assert path.read_text() == "mine" and "a.json is left as it was" in out


def test_what_fails_leaves_no_empty_results(tmp_path):
    """--json is tried before the minutes are spent; a new file is there only once it has results."""
    with pytest.raises(ValueError, match="k is 99"):
        bench.main(["router", "--k=99", f"--json={tmp_path}/new.json"])
    assert not (tmp_path / "new.json").exists()
    (tmp_path / "old.json").write_text("kept")
    with pytest.raises(ValueError, match="k is 99"):
        bench.main(["router", "--k=99", f"--json={tmp_path}/old.json"])
    assert (tmp_path / "old.json").read_text() == "kept"


def test_plot_needs_matplotlib_or_draws(run, tmp_path, capsys):
    path = tmp_path / "ratios.png"
    if importlib.util.find_spec("matplotlib"):
        run("cache", *TOY, f"--plot={path}")
        assert path.stat().st_size > 1000
        return
    with pytest.raises(SystemExit), bad_input_exits():
        bench.main(["cache", f"--plot={path}"])
    assert "pip install matplotlib" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# -------- routers compared by training

QUALITY = """
dataset = {dataset!r}
n_layer, n_head, n_embd, n_hidden, n_expert, k = 2, 2, 16, 8, 8, 2
block_size, batch_size, max_iters, eval_windows, log_interval = 16, 2, 3, 4, 1
device = "cpu"
"""


@pytest.fixture
def quality(run, tmp_path, monkeypatch):
    """Run bench.py quality on a toy config, its runs in tmp_path: the rows, and all that it printed."""
    tokenizer = data.train_bpe(TEXT, 300, "toy")
    data.write_dataset(tmp_path / "toy", TEXT[:60], TEXT[60:], tokenizer, "0" * 64)
    (tmp_path / "config.py").write_text(QUALITY.format(dataset=str(tmp_path / "toy")))
    monkeypatch.setattr(bench, "RUNS", tmp_path / "runs")

    def quality(*argv):
        report, out = run("quality", f"--config={tmp_path / 'config.py'}", "--device=cpu", *argv)
        return report["parts"]["quality"], out

    return quality


TEXT = [f"def f{i}(x):\n    return x + {i * 7}\n\n" for i in range(80)]


def test_quality_compares_pairs_of_runs_and_runs_none_twice(quality, monkeypatch):
    """Rows are means over seeds, differences are paired by seed, TopK leaks nothing, and what is finished is
    read again."""
    argv = ("--routers=topk,seqtopk", "--seeds=2", "--ks=1,2")
    ((alone,), _) = quality("--routers=topk", "--seeds=1", "--ks=1")  # in a process of its own; all else here
    assert alone["minutes"][0] > 0
    monkeypatch.setattr(bench, "wait_for", train_here)
    rows, _ = quality(*argv)
    assert [row["what"] for row in rows] == ["topk, k=1", "seqtopk, k=1", "topk, k=2", "seqtopk, k=2"]
    base, other = rows[2:]
    assert base["runs"] == other["runs"] == 2 and base["leak"] == [0, 0] and "nats, to base" not in base
    for key in ("nats", "bits/byte", "as trained", "load entropy", "load variance"):
        assert base[key][0] > 0 and base[key][1] > 0  # seeds differ
    assert base["steps/s"][0] > 0 and len(base["steps/s"]) == len(base["dead"]) == 2
    assert base["bits/byte"][0] < base["nats"][0] and base["load variance"][0] < base["load entropy"][0]
    assert base["experts per token"] == [2, 0] and other["experts per token"][0] <= 2
    assert other["nats, to base"][0] == pytest.approx(other["nats"][0] - base["nats"][0], abs=2e-4)
    assert other["leak"][0] == pytest.approx(other["nats"][0] - other["as trained"][0], abs=2e-4)
    monkeypatch.setattr(bench, "wait_for", lambda *args, **options: pytest.fail("a run began"))
    assert quality(*argv)[0] == rows


def test_quality_stops_at_its_budget_and_reports_runs_that_fail(quality, tmp_path):
    """Without time nothing begins and every missing run is named; a run that fails is a line, not the end."""
    rows, out = quality("--routers=topk", "--seeds=2", "--budget=0.0")
    assert rows == [] and "missing: topk, k=2, seed 1338" in out
    with open(tmp_path / "config.py", "a") as file:
        file.write("learning_rate = 1e9\ngrad_clip = 0.0\nwarmup_iters = 0\n")
    rows, out = quality("--routers=topk", "--seeds=1")
    assert rows == [] and re.search(
        "topk, k=2, seed 1337 failed: error: the loss became .* at iteration", out
    )


def test_means_have_the_error_of_the_mean():
    assert bench.mean_and_error([1.0, 2.0, 3.0]) == pytest.approx([2.0, 1 / 3**0.5])
    assert bench.mean_and_error([4.0]) == [4.0, None]
    runs = {1: {"nats": 2.0}, 2: {"nats": 4.0}, 3: {"nats": 9.0}}
    base = {1: {"nats": 1.0}, 2: {"nats": 2.0}}
    row = bench.quality_row("x", runs, base)
    assert row["nats"][0] == 5 and row["nats, to base"] == [1.5, 0.5]  # the pairs of seeds 1 and 2 only


# ------------------------------------------------------------------------------------------------------------
# -------- claims

CLAIMS = """
dataset = {dataset!r}
n_layer, n_head, n_embd, n_hidden, n_expert, k = 2, 2, 16, 8, 12, 2
block_size, batch_size, max_iters, warmup_iters, eval_windows, log_interval = 32, 4, 10, 0, 40, 1
learning_rate = 0.05
device = "cpu"
"""
TOYS = {
    "TUNING": {"max_iters": 2, "warmup_iters": 1, "learning_rate": 0.01},
    "LENGTHS": (8, 32),
    "PLACES": (4, 8, 32),
    "PRIORS": (0, 1, 64),
    "USUAL_TOKENS": 256,
    "JUDGED_TOKENS": 40 * 32,
}


def problem_documents(n):
    rng = random.Random(0)
    return [document(make_problem(rng, 1 + i % 5)) for i in range(n)]


WAIT_FOR = bench.wait_for  # as it is; most tests have train_here in its place


def train_here(command, output):
    """What the command would do in a process of its own: python train.py ..."""
    with redirect_stdout(output), redirect_stderr(output):
        try:
            train.main(command[2:])
        except SystemExit as stop:
            return stop.code
    return 0


@pytest.fixture(scope="module")
def claims(tmp_path_factory):
    """Rows of a part (each computed once), with a toy config: two seeds, runs shared by the parts."""
    folder = tmp_path_factory.mktemp("claims")
    docs = problem_documents(60)
    tokenizer = data.train_bpe(docs, 300, "arithmetic", SPLIT)
    data.write_dataset(folder / "arithmetic", docs[:30], docs[30:], tokenizer, "0" * 64)
    (folder / "config.py").write_text(CLAIMS.format(dataset=str(folder / "arithmetic")))
    settings = BenchConfig(config=str(folder / "config.py"), device="cpu", dtype="float32", seeds=2, k=2)
    rows = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "RUNS", folder / "runs")
        patch.setattr(bench, "wait_for", train_here)
        patch.setattr(train, "estimate", lambda run: "soon")
        for name, value in TOYS.items():
            patch.setattr(bench, name, value)

        def claims(part):
            if part not in rows:
                found = bench.PARTS[part](claims.bench)
                json.dumps(found, allow_nan=False)
                rows[part] = {row["what"]: row for row in found}
                assert len(rows[part]) == len(found)
            return rows[part]

        claims.bench, claims.folder, claims.docs = bench.make_bench(settings), folder, docs
        yield claims


def opened(claims, router, **changes):
    """The first run under a router, with k=2."""
    arm = bench.router_arms([router], 2)[0]
    ((_, _, folder),) = bench.trained(replace_config(claims.bench, seeds=1), [arm])
    return bench.open_run(claims.bench, folder, **changes)


def replace_config(measure, **changes):
    return replace(measure, config=replace(measure.config, **changes))


QUARTERS = [f"{kind}, quarter {i}" for kind in ("written", "read") for i in (1, 2, 3, 4)]
KINDS = [f"{kind}, {how}" for kind in bench.KINDS for how in ("read", "predicted")]
BOUNDS = [f"max_experts={bound}" for bound in (3, 5, 6, 12)]
SEQTOPKS = ("seqtopk", "online_seqtopk")
BOTH = [f"{router}, k=2" for router in SEQTOPKS]
ROWS = {  # row -> what it is compared to
    "sparsity": {f"{r}, k={k}": f"topk, k={k}" for k in (8, 4, 2) for r in ("topk", "seqtopk")},
    "finetune": {
        "topk, k=2, then topk": None,
        "topk, k=2, then online_seqtopk": "topk, k=2, then topk",
        **{
            f"topk, k=2, 2 more of {router}": "topk, k=2, 2 more of topk"
            for router in ("topk", "seqtopk", "online_seqtopk")
        },
    },
    "online": dict.fromkeys(("topk, k=2", *BOTH), "topk, k=2")
    | {"seqtopk, the last tenth online, k=2": "seqtopk, k=2"},
    "bounds": {
        "seqtopk, k=2": None,
        **{f"seqtopk, k=2, {bound}": "seqtopk, k=2" for bound in (*BOUNDS, "min_experts=0")},
        "online_seqtopk, k=2": "seqtopk, k=2",
        "online_seqtopk, k=2, strict=false": "online_seqtopk, k=2",
        "seqtopk, k=2, decoded with strict=true": None,
        "seqtopk, k=2, decoded with strict=false": "seqtopk, k=2, decoded with strict=true",
    },
    "batches": {
        f"{router}, k=2, {rest}": f"{router}, k=2, 1 sequences"
        for router in ("seqtopk", "batchtopk")
        for rest in (*(f"{n} sequences" for n in (1, 4, 16)), "online")
    },
    "difficulty": {f"{arm}, {rest}": None for arm in BOTH for rest in ("all tokens", *KINDS)},
    "length": dict.fromkeys(
        ["T=8", "T=8, tokens 1 to 4", "T=8, tokens 5 to 8"]
        + ["T=32", "T=32, tokens 1 to 4", "T=32, tokens 5 to 8", "T=32, tokens 9 to 32"]
    ),
    "long": {
        f"{arm}, {how}, {q}": None for arm in BOTH for how in ("strict", "not strict") for q in QUARTERS
    },
    "shared": {
        f"{router}, k=2{beside}": f"topk, k=2{beside}"
        for beside in ("", ", shared_hidden=8")
        for router in ("topk", "seqtopk")
    },
    "gap": {
        **{f"seqtopk, k=2, n0={n}": "seqtopk, k=2, n0=0" for n in (0, 1, 64)},
        **{
            f"{BOTH[0]}, 2 more of {r}": f"{BOTH[0]}, 2 more of seqtopk"
            for r in ("seqtopk", "online_seqtopk")
        },
    },
    "discount": {
        "seqtopk, k=2": None,
        **{f"seqtopk, k=2, {bound}": "seqtopk, k=2" for bound in BOUNDS},
        "seqtopk_discount, k=2": "seqtopk, k=2",
    },
    "prune": {
        f"{router}, k={k}{rest}": f"{router}, k={k}"
        for k in (8, 2)
        for router in ("topk", "seqtopk")
        for rest in ("", ", a quarter dropped")
    },
}


@pytest.mark.parametrize("part", ROWS)
def test_a_claim_has_the_rows_it_promises(claims, part):
    """Each row is a mean over both seeds, and its difference is that to the row that is its base."""
    rows = claims(part)
    assert sorted(rows) == sorted(ROWS[part])
    for name, base in ROWS[part].items():
        row = rows[name]
        assert row["runs"] == 2 and row["experts per token" if "gap" not in row else "gap"][1] is not None
        if base in (None, name):
            assert "nats, to base" not in row
        else:
            gain = row["nats"][0] - rows[base]["nats"][0]
            assert row["nats, to base"][0] == pytest.approx(gain, abs=1e-6)


def test_the_claims_agree_on_the_same_runs(claims):
    """A run's loss is what train.py logged, whichever part looks at it."""
    trained = {router: claims("online")[f"{router}, k=2"] for router in ("topk", *SEQTOPKS)}
    for router, part, name in (
        ("topk", "finetune", "topk, k=2, then topk"),
        ("topk", "prune", "topk, k=2"),
        ("seqtopk", "prune", "seqtopk, k=2"),
        ("seqtopk", "bounds", "seqtopk, k=2, decoded with strict=true"),
        ("seqtopk", "batches", "seqtopk, k=2, online"),
        ("seqtopk", "gap", "seqtopk, k=2, n0=0"),
        ("seqtopk", "difficulty", "seqtopk, k=2, all tokens"),
        ("online_seqtopk", "difficulty", "online_seqtopk, k=2, all tokens"),
    ):
        row = claims(part)[name]
        for key in ("nats", "experts per token"):
            assert row[key] == pytest.approx(trained[router][key], rel=1e-4), (part, name, key)
        logged = [curve["nats"][-1] for curve in trained[router]["curves"]]
        assert row["nats"][0] == pytest.approx(mean_of(logged), rel=1e-4)
    assert claims("gap")["seqtopk, k=2, n0=0"]["gap"] == pytest.approx(trained["seqtopk"]["leak"], abs=1e-5)
    one = claims("batches")["seqtopk, k=2, 1 sequences"]["nats"]
    assert one == pytest.approx(trained["seqtopk"]["as trained"], rel=1e-5)


def test_batches_change_batchtopk_alone(claims):
    """SeqTopK does not mind how many sequences there are, BatchTopK does; both spend all."""
    rows = claims("batches")
    for router, moves in (("seqtopk", False), ("batchtopk", True)):
        found = [rows[f"{router}, k=2, {n} sequences"] for n in (1, 4, 16)]
        assert all(row["experts per token"][0] == pytest.approx(2) for row in found)
        losses = [row["nats"][0] for row in found]
        assert (max(losses) - min(losses) > 1e-5) == moves


def test_length_splits_its_gap_by_position(claims):
    """The rows of a length are means over its positions: together they are the row of all."""
    rows = claims("length")
    for T, places in ((8, (0, 4, 8)), (32, (0, 4, 8, 32))):
        for key in ("nats", "gap"):
            parts = [rows[f"T={T}, tokens {a + 1} to {b}"][key][0] * (b - a) for a, b in pairwise(places)]
            assert sum(parts) / T == pytest.approx(rows[f"T={T}"][key][0], rel=1e-6, abs=1e-6)
        curve = rows[f"T={T}"]["curves"][0]
        assert curve["position"] == [4, 8, 16, 32][: 2 if T == 8 else 4]
        assert len(curve["gap"]) == len(curve["position"]) and any(curve["gap"])


def test_long_texts_spend_what_their_quarters_say(claims):
    """ "spent" is the mean of the quarters so far over K; a strict budget never exceeds it."""
    rows = claims("long")
    for name in (name for name in rows if name.endswith("quarter 1")):
        quarters = [rows[name[:-1] + str(i)] for i in (1, 2, 3, 4)]
        experts = [row["experts per token"][0] for row in quarters]
        for i, row in enumerate(quarters, start=1):
            assert row["spent"][0] == pytest.approx(sum(experts[:i]) / i / 2)
            assert row["spent"][0] <= 1 + 1e-6 or "not strict" in name


def test_difficulty_counts_the_tokens_of_each_kind(claims):
    """Every known token is read as one kind; what is predicted at a position is what is read at the next."""
    run = opened(claims, "seqtopk")
    masks = bench.problem_parts(run)
    assert list(masks) == KINDS
    windows = torch.cat([x for x, _ in run.batches])
    read = torch.stack([masks[f"{kind}, read"] for kind in bench.KINDS])
    assert read.shape[1:] == windows.shape and read.sum(0).max() == 1
    assert not read[:, windows == run.dataset.tokenizer.eot].any()
    for kind in bench.KINDS:
        read, predicted = masks[f"{kind}, read"], masks[f"{kind}, predicted"]
        assert torch.equal(predicted[:, :-1], read[:, 1:]) and not predicted[:, -1].any()
        row = claims("difficulty")[f"seqtopk, k=2, {kind}, read"]
        assert row["tokens"] == read.sum() > 0
    windows.fill_(run.dataset.tokenizer.eot)  # no kind occurs
    assert not any(
        mask.any() for mask in bench.problem_parts(run._replace(batches=[(windows, None)])).values()
    )
    all_tokens = claims("difficulty")["seqtopk, k=2, all tokens"]
    assert -1 <= all_tokens["rho loss"][0] <= 1 and -1 <= all_tokens["rho entropy"][0] <= 1
    assert len(all_tokens["curves"]) == 2 and len(all_tokens["curves"][0]["experts"]) == 20


def test_questions_after_the_first_problem_are_questions(claims):
    """A whole window of several problems: the kinds of a problem's tokens are the same wherever it stands."""
    tokenizer = data.make_tokenizer(data.load(str(claims.folder / "arithmetic")).meta["tokenizer"])
    ids = [[*tokenizer.encode(text), tokenizer.eot] for text in claims.docs[:3]]
    windows = [torch.tensor([[i for one in ids for i in one]]), *(torch.tensor([one]) for one in ids)]
    kinds = []
    for window in windows:
        run = SimpleNamespace(batches=[(window, None)], dataset=SimpleNamespace(tokenizer=tokenizer))
        masks = bench.problem_parts(run)
        kinds.append(torch.stack([masks[f"{kind}, read"][0] for kind in bench.KINDS]))
    assert torch.equal(kinds[0], torch.cat(kinds[1:], dim=1))
    assert kinds[0].sum(0).tolist() == [int(i != tokenizer.eot) for i in windows[0][0].tolist()]


PIECES = [  # of a problem, and their kinds: q, n of the question; w, c, r, f of the answer
    ("Question:", "q"), (" Tom", "q"), (" has", "q"), (" ", "n"), ("1", "n"), ("2", "n"), (" marbles.", "q"),
    (" Ida", "q"), (" gives", "q"), (" ", "n"), ("7", "n"), (".", "q"), ("\n", "q"),
    ("Answer:", "w"), (" At", "w"), (" first:", "w"), (" ", "c"), ("1", "c"), ("2", "c"), (" marbles.", "w"),
    ("\n", "w"), ("Ida:", "w"), (" ", "c"), ("1", "c"), ("2", "c"), (" +", "w"), (" ", "c"), ("7", "c"),
    (" =", "w"), (" ", "r"), ("1", "r"), ("9", "r"), (" marbles.", "w"), ("\n", "w"),
    ("##", "w"), ("##", "w"), (" ", "f"), ("1", "f"), ("9", "f"), ("\n", "w"),
]  # fmt: skip


def test_kinds_of_text_by_hand():
    """Each token has the kind of its first character that is no space, by the line that it is in."""
    names = dict(zip("qnwcrf", bench.KINDS, strict=True))
    pieces, letters = zip(*PIECES)
    want = [names[letter] for letter in letters]
    assert bench.kinds_of_text(list(pieces)) == want
    assert bench.kinds_of_text([*pieces, "", *pieces]) == [*want, "", *want]
    assert bench.kinds_of_text(list(pieces[1:])) == [""] * 12 + want[13:]  # its first line has no beginning
    assert bench.kinds_of_text(list(pieces[13:])) == want[13:]  # "Answer:" is a beginning too
    assert bench.kinds_of_text(list("Question: 5\n")) == [names["q"]] * 9 + [names["n"]] * 2 + [names["q"]]


def test_kinds_of_a_generated_problem(claims):
    """Digits are of the question, after "=", after "####" or copied; all else is words."""
    question, answer = bench.KINDS[0], bench.KINDS[2]
    for text in claims.docs[:20]:
        kinds = iter(bench.kinds_of_text(list(text)))
        for line in text.splitlines(keepends=True):
            asks, final, equals = line.startswith("Question"), line.startswith("####"), line.find("=")
            for n, character in enumerate(line):
                kind = next(kinds)
                if character.isdigit():
                    said = [asks, final, 0 <= equals < n, True]
                    assert kind == bench.KINDS[(1, 5, 4, 3)[said.index(True)]]
                elif character != " ":
                    assert kind == (question if asks else answer)
        assert next(kinds, None) is None


def ranks(values):
    """From 1; equal values get the mean of their places."""
    return [
        mean_of([place for place, other in enumerate(sorted(values), start=1) if other == value])
        for value in values
    ]


def mean_of(values):
    return sum(values) / len(values)


@pytest.mark.parametrize("levels", [2, 3, 10, 1000])
def test_spearman_is_the_correlation_of_ranks(levels):
    """Pearson's correlation of the ranks, which ties share; 1 or -1 for what rises or falls with it."""
    g = torch.Generator().manual_seed(levels)
    a, b = (torch.randint(levels, (5, 12), generator=g).float() for _ in range(2))
    x, y = ranks(a.flatten().tolist()), ranks((b := a + b).flatten().tolist())
    dx, dy = [v - mean_of(x) for v in x], [v - mean_of(y) for v in y]
    want = sum(p * q for p, q in zip(dx, dy)) / math.sqrt(sum(p * p for p in dx) * sum(q * q for q in dy))
    assert bench.spearman(a, b) == pytest.approx(want)
    assert bench.spearman(a, a**3) == pytest.approx(1) and bench.spearman(a, -a) == pytest.approx(-1)
    by_hand = bench.spearman(torch.tensor([1.0, 2, 2, 9]), torch.tensor([1.0, 3, 2, 4]))
    assert bench.spearman(a, torch.ones_like(a)) == 0  # nothing varies: neither rises nor falls
    assert by_hand == pytest.approx(4.5 / math.sqrt(4.5 * 5))  # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4


def test_extremes_are_the_ends_of_many_rows():
    """Few rows stay as they are; of many, the EXTREMES highest and as many of the lowest, in order."""
    rows = [{"experts per token": [float(n * 7 % 17), None]} for n in range(17)]
    assert bench.extremes(rows[:16]) == rows[:16]
    assert [row["experts per token"][0] for row in bench.extremes(rows)] == [
        *range(16, 8, -1),
        *range(7, -1, -1),
    ]


def test_experts_by_entropy_are_means_of_equal_shares():
    entropy = torch.randperm(60).view(3, 20).float()
    found = bench.experts_by_entropy(100 - entropy, entropy)
    assert found["entropy"] == [3 * i + 1 for i in range(20)]
    assert found["experts"] == [99 - 3 * i for i in range(20)]


def test_by_position_by_hand():
    """Means up to 4, 8, 16 ...; positions beyond the last power of two are left out."""
    assert bench.by_position(torch.arange(20.0)) == {"position": [4, 8, 16], "gap": [1.5, 5.5, 11.5]}
    assert bench.by_position(torch.arange(8.0)) == {"position": [4, 8], "gap": [1.5, 5.5]}


def test_by_token_is_the_loss_token_by_token(claims):
    """The means of by_token are evaluate_text's; entropy and experts are those of the model's own forward."""
    run = opened(claims, "seqtopk")
    for router in ("topk", "seqtopk", "online_seqtopk"):
        loss, entropy, experts = bench.by_token(claims.bench, run, router)
        found = bench.judge_text(run, router)
        assert loss.mean().item() == pytest.approx(found["loss"], rel=1e-5)
        assert experts.float().mean().item() == pytest.approx(found["experts"][0], rel=1e-5)
    assert loss.shape == entropy.shape == experts.shape[:2] == (40, 32) and experts.shape[2] == 2
    x, y = run.batches[1]
    logits, _, stats = run.model(x, router="online_seqtopk")
    share = logits.softmax(-1).double()
    torch.testing.assert_close(
        loss[4:8].double(), -share.gather(-1, y[..., None])[..., 0].log(), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(entropy[4:8].double(), -(share * share.log()).sum(-1), atol=1e-4, rtol=0)
    assert torch.equal(experts[4:8], stats.experts.permute(1, 2, 0))


def test_only_what_is_learned_counts_in_a_loss(claims):
    """Targets of -1 are in no mean and have no bytes, however many a batch has of them."""
    run = opened(claims, "seqtopk")
    loss, _, _ = bench.by_token(claims.bench, run, "topk")
    learned = torch.rand(loss.shape, generator=torch.Generator().manual_seed(0)) < torch.linspace(0.1, 1, 32)
    targets = torch.cat([y for _, y in run.batches])
    xs = torch.cat([x for x, _ in run.batches]).split(8)
    batches = list(zip(xs, targets.masked_fill(~learned, -1).split(8), strict=True))
    tokenizer = run.dataset.tokenizer
    found = bench.judge_text(run._replace(batches=batches), "topk")
    n_bytes = tokenizer.token_bytes[targets[learned]].sum()
    assert found["loss"] == pytest.approx(loss[learned].mean().item(), rel=1e-5) and found["experts"][0] == 2
    assert found["bpb"] == pytest.approx(loss[learned].sum().item() / math.log(2) / n_bytes, rel=1e-5)
    answers = run._replace(dataset=replace(run.dataset, val_answers=object()))
    with pytest.raises(ValueError, match="all tokens are learned"):
        bench.by_token(claims.bench, answers, "topk")


def test_figures_of_other_problems_are_made_anew(claims, monkeypatch):
    """What is kept of a run for some number of problems does not stand for another number."""
    arms = bench.router_arms(["topk"], 2)
    monkeypatch.setattr(bench, "run_figures", lambda measure, folder: {"nats": measure.config.problems})
    for problems in (5, 7):
        measure = replace_config(claims.bench, seeds=1, problems=problems)
        (found,) = bench.compare(measure, arms)
        assert found["nats"][0] == problems


def test_a_run_opens_changed(claims):
    """open_run gives the last checkpoint, its validation windows, and a config with the changes."""
    run, loose = opened(claims, "seqtopk"), opened(claims, "seqtopk", strict=False)
    assert run.model.config.strict and not loose.model.config.strict and run.decode == "online_seqtopk"
    assert not run.model.training
    for a, b in zip(run.model.parameters(), loose.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.cat([x for x, _ in run.batches]).shape == (40, 32)
    short = opened(claims, "seqtopk", block_size=8)
    assert short.model.config.block_size == 8 and short.batches[0][0].shape == (4, 8)


def usual_text(claims, run):
    """What the use of experts is counted in."""
    return run.dataset.train_batch(0, 8, 32, claims.bench.config.seed)[0]


def test_experts_without_a_token_are_dropped_for_nothing(claims):
    """Dropping experts that no token uses leaves the logits as they are."""
    run = opened(claims, "seqtopk")
    x, bias = usual_text(claims, run), torch.zeros(12).index_fill_(0, torch.tensor([1, 5, 11]), -100.0)
    for layer in run.model.expert_layers():
        layer.bias.copy_(bias)
    smaller = bench.without_least_used(claims.bench, run)
    assert torch.equal(smaller(x, router=run.decode)[0], run.model(x, router=run.decode)[0])
    for layer in run.model.expert_layers():
        assert torch.equal(layer.bias, bias)  # the run's own model stays whole


@pytest.mark.parametrize("router", ["topk", "seqtopk"])
def test_the_least_used_quarter_is_dropped(claims, router):
    """No token goes to the three of twelve experts that fewest tokens of the training text go to."""
    run = opened(claims, router)
    x = usual_text(claims, run)
    load = run.model(x, router=run.decode)[2].load.tolist()
    found = bench.without_least_used(claims.bench, run)(x, router=run.decode)[2].load
    for before, after in zip(load, found, strict=True):
        dropped = sorted(range(12), key=lambda e: (-before[e], e))[9:]
        assert not after[dropped].any() and (after > 0).sum() > 3


def test_more_experts_per_token_than_are_kept_is_one_line(claims):
    run = opened(claims, "topk", k=10)
    with pytest.raises(ValueError, match=r"k is 10, .*\b9\b") as error:
        bench.without_least_used(claims.bench, run)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------
# -------- arms and their runs


def accepted(config, arm, seed=1):
    """The settings of an arm's run as train.py understands them."""
    argv = [bench.command_line(setting) for setting in bench.run_settings(config, arm, seed).items()]
    return train.TrainConfig(**parse(argv, train.TrainConfig)[0])


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("router", [*ROUTERS, "loss_free", "dense"])
def test_the_recipe_of_each_router_is_accepted(router, quick):
    """train.py takes the settings with which a router is compared, and they are what its row needs."""
    settings = BenchConfig(quick=quick)
    config = accepted(settings, Arm(router, bench.recipe(settings, router, 2), router))
    assert config.router == {"loss_free": "topk", "dense": "topk"}.get(router, router)
    one = bench.shared_settings(settings)["n_hidden"]
    assert (config.k * (config.dense_hidden or config.n_hidden), config.n_expert > 1) == (
        2 * one,
        router != "dense",
    )
    for key, value in dict(ROUTERS[config.router].needs).items():
        assert getattr(config, key) == value
    alone = router in ("loss_free", "expert_threshold", "remoe")
    assert (config.balance_coef == 0) == (config.z_coef == 0) == alone
    assert (config.entropy_coef, config.mass) == ((1e-4, 0.1) if router == "top_p" else (0, 0.4))
    assert (config.bias_rate > 0) == (router == "loss_free")
    whole = bench.shared_settings(settings)["max_iters"]
    assert config.max_iters == (whole // 4 if quick else whole)


def test_a_run_has_a_folder_of_its_settings(tmp_path):
    """Other settings, another seed and --quick have another folder; their order makes none."""
    settings, one = BenchConfig(), Arm("a", {"router": "seqtopk", "k": 2}, "a")
    folder = bench.run_folder(settings, one, 1)
    other = Arm("another name", {"k": 2, "router": "seqtopk"}, "b")
    assert bench.run_folder(settings, other, 1) == folder
    more = bench.vary(one, max_experts=3)
    assert (
        more.base == "a" and more.name == "a, max_experts=3" and one.settings == {"router": "seqtopk", "k": 2}
    )
    folders = {
        folder,
        bench.run_folder(settings, one, 2),
        bench.run_folder(BenchConfig(quick=True), one, 1),
        bench.run_folder(settings, more, 1),
        bench.run_folder(settings, replace(one, after=more), 1),
        bench.run_folder(settings, replace(one, after=other), 1),
    }
    assert len(folders) == 6
    changed = tmp_path / "quality.py"  # the same name, another setting
    changed.write_text("from config.quality import *\nlearning_rate = 1e-3\n")
    assert bench.run_folder(BenchConfig(config=str(changed)), one, 1) not in folders


def test_an_arm_after_another_goes_on_with_its_weights_and_other_batches(claims):
    """It starts from the last checkpoint of the same seed, and its seed for the data is another."""
    base = bench.router_arms(["topk"], 2)[0]
    after = replace(bench.router_arms(["seqtopk"], 2, max_iters=2)[0], after=base)
    settings = claims.bench.config
    said = bench.run_settings(settings, after, 7)
    assert said["init_from"] == bench.run_folder(settings, base, 7) / "last.pt"
    assert said["seed"] == 7 + bench.OTHER_BATCHES != bench.run_settings(settings, base, 7)["seed"]
    still = replace(after, settings=after.settings | {"learning_rate": 1e-30})  # so the weights stay
    for _, seed, folder in bench.trained(replace_config(claims.bench, seeds=1), [still]):
        start, end = (
            load_checkpoint(path)
            for path in (bench.run_folder(settings, base, seed) / "last.pt", folder / "last.pt")
        )
        assert (
            end["train_config"]["seed"] == seed + bench.OTHER_BATCHES and end["config"]["router"] == "seqtopk"
        )
        assert end["step"] == 2 and all(
            torch.equal(start["model"][n], end["model"][n]) for n in start["model"]
        )


def fresh_run(claims, monkeypatch, folder, wait_for):
    """What train_run says of a run that is not there yet, whose training is wait_for."""
    monkeypatch.setattr(bench, "RUNS", folder)
    monkeypatch.setattr(bench, "wait_for", wait_for)
    arm = bench.router_arms(["topk"], 2)[0]
    return bench.train_run(claims.bench, arm, 1), bench.run_folder(claims.bench.config, arm, 1)


def is_locked(path):
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_nobody_else_trains_in_the_folder_of_a_run(claims, monkeypatch, tmp_path):
    """While a run is trained its folder is locked."""

    def locked(command, output):
        assert is_locked(output.name)
        return train_here(command, output)

    done, folder = fresh_run(claims, monkeypatch, tmp_path, locked)
    assert done and (folder / "finished").exists() and not (folder / "best.pt").exists()
    assert not is_locked(folder / "train.txt")


def test_a_training_keeps_its_lock_when_nobody_waits_for_it(tmp_path):
    """The process that writes to a locked file has the lock too, until it ends."""
    path = tmp_path / "train.txt"
    with open(path, "a") as output:
        bench.lock(output)
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=output)
    assert is_locked(path)
    child.communicate(b"\n")
    assert not is_locked(path)


@pytest.mark.parametrize("late", [False, True])
def test_what_another_process_has_finished_meanwhile_is_not_trained(claims, monkeypatch, tmp_path, late):
    """After the wait for a lock a run may be finished, or the deadline over: nothing begins then."""
    measure, arm = replace(claims.bench, missing=[]), bench.router_arms(["topk"], 2)[0]
    monkeypatch.setattr(bench, "RUNS", tmp_path)
    monkeypatch.setattr(bench, "wait_for", lambda *args: pytest.fail("a run began"))
    folder, now = bench.run_folder(measure.config, arm, 1), [0.0]
    monkeypatch.setattr(bench.time, "monotonic", lambda: now[0])

    def waited(file):
        now[0] = 100.0
        if not late:
            (folder / "finished").touch()

    monkeypatch.setattr(bench, "lock", waited)
    assert bench.train_run(replace(measure, deadline=50.0), arm, 1) == (not late)


def test_a_run_whose_end_was_not_saved_is_not_finished(claims, monkeypatch, tmp_path, capsys):
    """A training that ends well but whose last checkpoint is older, or missing, is named and done again."""
    assert not fresh_run(claims, monkeypatch, tmp_path / "none", lambda *args: 0)[0]

    def unsaved(command, output):
        return train_here([*command, "--max_iters=3"], output)

    done, folder = fresh_run(claims, monkeypatch, tmp_path / "old", unsaved)
    assert not done and not (folder / "finished").exists()
    assert capsys.readouterr().out.count("seed 1 failed") == 2
    assert fresh_run(claims, monkeypatch, tmp_path / "old", train_here)[0]
    assert load_checkpoint(folder / "last.pt")["step"] == 10


def test_a_start_that_was_cut_short_leaves_no_log(claims, monkeypatch, tmp_path):
    """What a run wrote before its first checkpoint is gone when it begins again."""
    _, folder = fresh_run(claims, monkeypatch, tmp_path, lambda *args: 1)
    (folder / "log.jsonl").write_text('{"kind": "train", "step": 1}\n')
    assert fresh_run(claims, monkeypatch, tmp_path, train_here) == (True, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps.count(1) == 1


def test_the_seconds_of_a_command_are_in_its_output(tmp_path):
    """All of them, whatever its exit code."""
    path, run = tmp_path / "out.txt", "import time, sys; time.sleep(0.3); sys.exit(3)"
    with open(path, "a") as output:
        assert WAIT_FOR([sys.executable, "-c", run], output) == 3
    (seconds,) = re.findall(bench.SECONDS.format(r"([\d.]+)"), path.read_text())
    assert 0.3 < float(seconds) < 30


def test_ctrl_c_is_handed_on(tmp_path, monkeypatch):
    """The command gets the signal once, and what it writes then is waited for."""
    run = "import time\ntry:\n print('go', flush=True); time.sleep(60)\n"
    run += "except KeyboardInterrupt:\n time.sleep(0.3); print('saved')"
    path, wait = tmp_path / "out.txt", subprocess.Popen.wait

    def interrupted(process, *args):
        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        for _ in range(600):
            if "go" in path.read_text():
                raise KeyboardInterrupt
            time.sleep(0.05)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with open(path, "a") as output, pytest.raises(KeyboardInterrupt):
        WAIT_FOR([sys.executable, "-c", run], output)
    assert "saved" in path.read_text()


@pytest.fixture
def own(claims, monkeypatch, tmp_path):
    """A Bench with one seed, the folder of its own copy of the data, and none of the runs of the others."""
    folder = shutil.copytree(claims.folder / "arithmetic", tmp_path / "arithmetic")
    config = tmp_path / "config.py"
    config.write_text(CLAIMS.format(dataset=str(folder)))
    monkeypatch.setattr(bench, "RUNS", tmp_path / "runs")
    return replace_config(claims.bench, seeds=1, config=str(config)), folder


def test_runs_of_other_data_are_refused(own):
    """A dataset that was prepared anew since a run was trained is one line that says what to do."""
    (measure, folder), arms = own, bench.router_arms(["topk"], 2)
    assert len(bench.compare(measure, arms)) == 1
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"source_sha256": "1" * 64}))
    with pytest.raises(ValueError, match=r"other than when .* was trained.*delete .*runs"):
        bench.compare(measure, arms)


def test_figures_have_the_exact_match(claims, own, monkeypatch):
    """Where the data has test problems with answers, their share that is solved, of so many of each level."""
    measure, folder = own
    lines = ({"question": f"{n}?", "answer": f"#### {n}", "result": n, "level": n % 2} for n in range(6))
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    solved = {"0?": True, "1?": False, "2?": True, "3?": True}
    monkeypatch.setattr(
        bench, "solve", lambda model, tokenizer, some, router: [(solved[p["question"]], 2) for p in some]
    )
    (found,) = bench.compare(replace_config(measure, problems=2), bench.router_arms(["topk"], 2))
    assert found["exact match"] == [0.75, None]
    assert "exact match" not in claims("online")["topk, k=2"]


def test_a_prior_of_the_usual_scores_is_what_gap_sets(claims):
    """The rows of n0 are the losses with pseudo_candidates of each layer's own scores as its prior."""
    run, rows = opened(claims, "seqtopk"), claims("gap")
    x = usual_text(claims, run)
    with torch.no_grad():
        for layer, routing in zip(run.model.expert_layers(), run.model(x)[2].routing, strict=True):
            layer.prior = pseudo_candidates(routing.scores, 2, 64)
    found = bench.judge_text(run, "online_seqtopk")
    measure = replace_config(claims.bench, seeds=1)
    (one,) = (row for row in bench.bench_gap(measure) if row["what"] == "seqtopk, k=2, n0=64")
    assert one["nats"][0] == pytest.approx(found["loss"], rel=1e-6)
    assert one["nats"][0] != rows["seqtopk, k=2, n0=0"]["nats"][0]


def test_frequent_tokens_are_those_read_fifty_times():
    """Each by its text, where it is read."""
    x = torch.cat([torch.full((50,), 65), torch.full((49,), 66), torch.full((61,), 10)]).view(4, 40)
    tokenizer = SimpleNamespace(decode=lambda ids: chr(ids[0]))
    run = SimpleNamespace(
        batches=[(x[:2], None), (x[2:], None)], dataset=SimpleNamespace(tokenizer=tokenizer)
    )
    found = bench.frequent_tokens(run)
    assert list(found) == ["'\\n', read", "'A', read"]
    assert torch.equal(found["'A', read"], x == 65) and found["'\\n', read"].sum() == 61


def test_the_budget_is_of_the_part_and_in_minutes(claims, monkeypatch):
    """All trainings of a part share one deadline; what has none begins."""
    now = [0.0]
    monkeypatch.setattr(bench.time, "monotonic", lambda: now[0])
    seen = []

    def part(measure):
        """A part."""
        seen.append(measure.deadline)
        return []

    monkeypatch.setitem(bench.PARTS, "part", part)
    bench.run_part("part", replace_config(claims.bench, budget=2.0))
    bench.run_part("part", replace_config(claims.bench, budget=None))
    assert seen == [120.0, math.inf]
    now[0] = 121.0
    arm = Arm("never", {"router": "topk", "k": 2, "learning_rate": 0.5}, "never")
    assert list(bench.trained(replace(claims.bench, deadline=120.0, missing=[]), [arm])) == []


def test_a_dense_model_stands_beside_routers(claims):
    """It has losses, and nothing to say of experts; it is of equal active compute."""
    settings = bench.recipe(claims.bench.config, "dense", 2)
    arms = [*bench.router_arms(["topk"], 2), Arm("dense", settings, "topk, k=2")]
    topk, dense = bench.compare(claims.bench, arms)
    assert "experts per token" in topk and "experts per token" not in dense
    assert len(dense["nats, to base"]) == 2 and len(bench.lines_of([topk, dense])) == 3


def test_tuning_is_as_long_as_its_name_says(claims):
    """--quick has a quarter of the iterations, in the name as in the settings."""
    first = bench.router_arms(["topk"], 2)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.TUNING, "max_iters", 8)
        for quick, iterations in ((False, 8), (True, 2)):
            measure = replace_config(claims.bench, quick=quick)
            arm = bench.tuned_arms(measure, first, ["topk", "seqtopk"])[1]
            assert arm.name == f"topk, k=2, {iterations} more of seqtopk" and arm.after == first
            assert bench.run_settings(measure.config, arm, 1)["max_iters"] == iterations


def test_trained_leaves_out_failures(claims, capsys, monkeypatch):
    """A run that fails, or whose first part does, is named and left out; the others go on, seed by seed."""
    good = bench.router_arms(["topk"], 2)[0]
    bad = Arm("bad", {"router": "topk", "k": 99}, "bad")
    after = replace(bench.router_arms(["seqtopk"], 2)[0], name="after bad", after=bad)
    measure = replace_config(claims.bench, seeds=2)
    found = [(arm.name, seed) for arm, seed, _ in bench.trained(measure, [bad, good, after])]
    assert found == [("topk, k=2", 1337), ("topk, k=2", 1338)]
    out = "".join(capsys.readouterr())
    assert "bad, seed 1337 failed: error: k is 99" in out and "missing: bad, seed 1338" in out
    assert "missing: after bad, seed 1337" in out
    assert not (bench.run_folder(measure.config, bad, 1337) / "finished").exists()


# -------- tables and figures of what was kept

REPORT = {"command": "python bench.py quality", "machine": "a CPU", "dtype": "float32", "commit": "abc"}


def write_results(folder, stem, **parts):
    (folder / f"{stem}.json").write_text(json.dumps({**REPORT, "parts": parts}))
    return folder / f"{stem}.json"


def row(what, *curves, **values):
    return {"what": what, "runs": len(curves), **values, "curves": list(curves)}


def losses(name, *ends):
    """A row of quality: the loss goes from 8 to an end for each seed."""
    curves = ({"seed": seed, "step": [0, 10, 20], "nats": [8, end + 1, end]} for seed, end in enumerate(ends))
    return row(name, *curves)


def test_table_of_a_file_by_hand(tmp_path, capsys):
    """Means with their errors, signed differences, no column without a value, names shown as they are."""
    rows = [
        {"what": "topk", "runs": 3, "nats": [4.963, 0.012], "dead": [0, 0.0], "MFU %": None, "curves": []},
        {"what": "a|b", "runs": 1, "nats": [5.0125, None], "nats, to base": [0.0495, 0.003]},
    ]
    rows += [{"what": "'`'", "steps/s": [1234.56, 7.89], "nats, to base": [-0.5, None]}]
    path = write_results(tmp_path, "a", quality=rows, empty=[])
    bench.main(["table", str(path)])
    assert capsys.readouterr().out.splitlines() == [
        "**quality**: `python bench.py quality`, a CPU, float32, commit abc",
        "",
        "| what | runs | nats | dead | nats, to base | steps/s |",
        "| --- | --- | --- | --- | --- | --- |",
        "| `topk` | 3 | 4.9630 ± 0.0120 | 0 | - | - |",
        "| `a\\|b` | 1 | 5.0125 | - | +0.0495 ± 0.0030 | - |",
        "| ```'`'``` | - | - | - | -0.5000 | 1,234.6 ± 7.9 |",
    ]


def test_files_without_speeds_have_no_column_in_the_readme_table(tmp_path):
    write_results(tmp_path, "other", quality=[losses("topk, k=2", 5)])
    with pytest.raises(ValueError, match="without speeds"):
        bench.readme_table(tmp_path)
    write_results(tmp_path, "fast", cache=[{"what": "x", "time/16": [1.0, 0.9, 1.1], "aim": "1"}])
    assert bench.readme_table(tmp_path).splitlines()[0].endswith("| paper | fast (a CPU, float32) |")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"parts": 3}'])
def test_a_file_that_holds_no_results_is_named(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json holds no results"):
        bench.report_tables(tmp_path / "a.json")


def test_figures_are_the_same_when_made_again(tmp_path):
    """Each has the labels of its rows, and with several files their names; what is missing is a line."""
    pytest.importorskip("matplotlib")
    names = ["curves.svg", "experts_by_entropy.svg", "gap_by_position.svg"]
    lines = list(bench.save_figures(tmp_path))
    assert len(lines) == 3 and all(f"{name} is left out" in line for name, line in zip(names, lines))
    assert "python bench.py quality --json" in lines[0] and not list(tmp_path.iterdir())
    some = {"entropy": [0.5, 2], "experts": [1.5, 2.5]}
    for stem in ("code", "sums"):
        rows = [row("seqtopk, k=2, all tokens", some, some), {"what": "seqtopk, k=2, words, read"}]
        write_results(tmp_path, stem, difficulty=rows)
    gaps = row("T=8", {"position": [4, 8], "gap": [0.2, 0.1]})
    online = [losses("topk, k=2", 5, 6), losses("seqtopk, k=2", 4.9, 5.7), losses("batchtopk, k=2", 5)]
    online[1]["nats, to base"] = [-0.25, 0.1]
    write_results(tmp_path, "rest", length=[gaps], online=online)
    lines = list(bench.save_figures(tmp_path))
    assert lines[:2] == [
        "curves.svg: online, from rest",
        "experts_by_entropy.svg: difficulty, from code, sums",
    ]
    first = [(tmp_path / name).read_bytes() for name in names]
    assert list(bench.save_figures(tmp_path)) == lines
    assert [(tmp_path / name).read_bytes() for name in names] == first
    curves, entropy, gap = (text.decode() for text in first)
    assert ">seqtopk -0.250 ± 0.100<" in curves and ">batchtopk<" in curves
    assert ">code<" in entropy and ">sums<" in entropy and entropy.count(">seqtopk, k=2<") == 2
    assert ">rest<" in gap and ">T=8<" in gap


def test_figures_without_matplotlib_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        list(bench.save_figures(tmp_path))
