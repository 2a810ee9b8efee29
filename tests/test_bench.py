"""bench.py: every part runs at toy sizes and gives the promised figures; the statistics are right."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch

import bench
import config.device
import data
from bench import Bench, BenchConfig
from config import bad_input_exits
from model import MoEConfig, MoEGPT, save_checkpoint

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
        assert stop.value.code == 0
        return json.loads(out.splitlines()[-1]), out

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
    ],
)
def test_bad_input_is_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stop, bad_input_exits():
        bench.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert all(word in error for word in words)


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
    rows, _ = quality(*argv)
    assert [row["what"] for row in rows] == ["topk, k=1", "seqtopk, k=1", "topk, k=2", "seqtopk, k=2"]
    base, other = rows[2:]
    assert base["runs"] == other["runs"] == 2 and base["leak"] == [0, 0] and "nats, to base" not in base
    for key in ("nats", "bits/byte", "as trained", "load entropy", "load variance", "dead", "steps/s"):
        assert len(base[key]) == 2
    assert base["experts per token"] == [2, 0] and other["experts per token"][0] <= 2
    assert other["nats, to base"][0] == pytest.approx(other["nats"][0] - base["nats"][0], abs=2e-4)
    assert other["leak"][0] == pytest.approx(other["nats"][0] - other["as trained"][0], abs=2e-4)
    monkeypatch.setattr(bench.subprocess, "call", lambda *args, **options: pytest.fail("a run began"))
    assert quality(*argv)[0] == rows


def test_quality_stops_at_its_budget_and_reports_runs_that_fail(quality, tmp_path):
    """Without time nothing begins and every missing run is named; a run that fails is a line, not the end."""
    rows, out = quality("--routers=topk", "--seeds=2", "--budget=0.0")
    assert rows == [] and "missing: topk, k=2, seed 1338" in out
    with open(tmp_path / "config.py", "a") as file:
        file.write("learning_rate = 1e9\ngrad_clip = 0.0\nwarmup_iters = 0\n")
    rows, out = quality("--routers=topk", "--seeds=1")
    assert rows == [] and "topk, k=2, seed 1337 failed" in out


def test_means_have_the_error_of_the_mean():
    assert bench.mean_and_error([1.0, 2.0, 3.0]) == pytest.approx([2.0, 1 / 3**0.5])
    assert bench.mean_and_error([4.0]) == [4.0, None]
    runs = {1: {"nats": 2.0}, 2: {"nats": 4.0}, 3: {"nats": 9.0}}
    base = {1: {"nats": 1.0}, 2: {"nats": 2.0}}
    row = bench.quality_row("x", runs, base)
    assert row["nats"][0] == 5 and row["nats, to base"] == [1.5, 0.5]  # the pairs of seeds 1 and 2 only


# ------------------------------------------------------------------------------------------------------------
# -------- tables and figures of what was kept

REPORT = {"command": "python bench.py quality", "machine": "a CPU", "dtype": "float32", "commit": "abc"}


def write_results(folder, stem, **parts):
    (folder / f"{stem}.json").write_text(json.dumps({**REPORT, "parts": parts}))
    return folder / f"{stem}.json"


def row(what, *curves, **values):
    return {"what": what, "runs": len(curves), **values, "curves": list(curves)}


def losses(name, *ends):
    """A row of quality: the loss goes from 8 to an end for each seed."""
    return row(name, *({"step": [0, 10, 20], "nats": [8, end + 1, end]} for end in ends))


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
    assert ">seqtopk -0.200 ± 0.100<" in curves and ">batchtopk<" in curves  # one seed of two has no pairs
    assert ">code: seqtopk, k=2<" in entropy and ">sums: seqtopk, k=2<" in entropy and ">T=8<" in gap


def test_figures_without_matplotlib_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        list(bench.save_figures(tmp_path))
