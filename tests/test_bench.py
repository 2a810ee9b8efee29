"""bench.py: every part runs at toy sizes and gives the promised figures; the statistics are right."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from runs import SMALLEST, error_line, flags

import bench
import config.device
from bench import Bench, BenchOptions
from config import results
from model import MoEGPT

SIZES = SMALLEST | {"vocab_size": 64}
TOY = flags(**SIZES, batch_size=2, tokens=16, effort=0, device="cpu", compile=False)


def on_cpu(**options):
    return Bench.of(BenchOptions(device="cpu", dtype="float32", effort=0, **options))


def part_of(rows):
    def part(measure):
        """What is known."""
        return rows

    return part


@pytest.fixture
def run(capsys):
    """Run bench.py; returns what its last line says, and all that it printed."""

    def run(*argv, failed=()):
        with pytest.raises(SystemExit) as stop:
            bench.main([*argv])
        out = capsys.readouterr().out
        report = json.loads(out.splitlines()[-1])
        assert report["failed"] == [*failed] and stop.value.code == bool(failed)
        return report, out

    return run


# -------- statistics


def test_ratio_is_the_median_of_pairs_and_not_the_ratio_of_medians():
    slow, fast = [2.0, 30.0, 8.0, 10.0, 6.0], [1.0, 10.0, 8.0, 1.0, 4.0]
    assert bench.ratio(slow, fast) == [2.0, 1.5, 3.0]  # of 2, 3, 1, 10, 1.5
    assert bench.ratio(fast, fast) == [1, 1, 1]


def test_ratio_survives_a_disturbed_round():
    """One pair that was disturbed, whichever side it hit, leaves the median where it was."""
    a, b = [1.0] * 9, [2.0] * 9
    assert bench.ratio([50.0] + a[1:], b)[0] == bench.ratio(a, [50.0] + b[1:])[0] == 0.5


def test_interleave_takes_turns_and_drops_the_warm_up():
    """Rounds go A B A B ..., each call prepared before it, and the first round does not count."""
    log, prepared = [], []

    def clock(call):  # the nth call takes n seconds
        call()
        return float(len(log))

    calls = {name: lambda name=name: log.append(name) for name in "AB"}
    times = on_cpu().interleave(calls, 1.0, prepared.append, clock)
    assert log == prepared == ["A", "B"] * (1 + bench.MIN_ROUNDS)
    assert times == {"A": [3.0, 5.0, 7.0, 9.0, 11.0], "B": [4.0, 6.0, 8.0, 10.0, 12.0]}
    several = on_cpu().interleave({"A": int}, 0, clock=lambda call: len(call()), in_a_row=3)
    assert set(several["A"]) == {1.0}  # three calls in three seconds


def test_the_peak_of_a_call_leaves_out_what_others_have_freed():
    """A small call after a large one has a small peak, on a CPU too, where freed memory is kept."""
    config.device.keep_freed_memory()
    calls = (lambda n=n: [torch.ones(2**20) for _ in range(n)] for n in (100, 1))  # of 4 MB
    large, small = map(on_cpu().peak_gb, calls)
    if large is None:
        pytest.skip("this system does not tell")
    assert 0.3 < large - small < 0.5


# -------- the parts

FIELDS = {
    "router": "ms, us per token, time/topk",
    "layer": "ms, GFLOP/s, of matmul, speed/dense",
    "train": "tokens/s, GFLOP/s, MFU %, peak GB, time/topk, paper",
    "decode": "topk tokens/s, online tokens/s, speed/topk, of bandwidth, MB experts, prefill tokens/s, "
    "KV MB, expert MB, paper",
    "cache": "us per step, time/16",
    "peers": "ours tokens/s, theirs, speed/theirs",
}


@pytest.mark.parametrize("part", FIELDS)
def test_part_gives_what_it_promises(part, run, monkeypatch):
    """Explanation, table, and one JSON line with the machine, the versions and the figures of every row."""
    if part == "peers":
        pytest.importorskip("transformers")
        monkeypatch.setattr(bench, "new_process", lambda: ThreadPoolExecutor(1))  # which has torch imported
    report, out = run(part, *TOY)
    assert {"machine", "versions", "commit", "seed", "dtype", "command"} <= set(report)
    assert list(report["parts"]) == [part] and bench.PARTS[part].__doc__.splitlines()[0] in out
    rows = report["parts"][part]
    assert rows[0].keys() >= set(FIELDS[part].split(", "))
    for row in rows:
        assert row["what"] in out
        for middle, low, high in (row[k] for k in row if results.is_ratio(k) and isinstance(row[k], list)):
            assert 0 < low <= middle <= high
    if part == "train":
        assert [row["what"].split(",")[0] for row in rows] == [*bench.BOUNDED, "topk"]


def test_cache_has_a_row_for_each_length(run):
    rows = run("cache", *TOY, "--tokens=512")[0]["parts"]["cache"]
    names = ["128 past tokens", "512 past tokens", "512 past tokens, against ranking anew"]
    assert [row["what"] for row in rows] == [f"batch 2, {name}" for name in names]


@pytest.mark.parametrize("past", [1, 63, 100])
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
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    report, out = run("peers", *TOY)
    assert "skipped: transformers is not installed (pip install transformers)" in out
    assert report["parts"] == {"peers": []}


def test_a_peer_that_fails_or_dies_is_a_line():
    """Whoever asks it for work gets one line that says what went wrong, and need not wait."""

    def error():
        with pytest.raises(RuntimeError) as error:
            bench.ask(peer, BenchOptions(device="cuda:99"), "ours", "training")
        assert "\n" not in str(error.value)
        return str(error.value)

    with bench.new_process() as peer:
        assert "ours: ValueError: device is cuda:99" in error()
        peer.submit(os._exit, 9)
        assert "ours: BrokenProcessPool" in error()


def test_decoding_is_measured_at_the_context_it_says():
    """After `fill`, every cache has seen `context` tokens, and the experts chosen are near the budget."""
    measure = on_cpu(**SIZES)
    model = MoEGPT(measure.shape("tiny"))
    caches = {name: model.new_cache(2, 340, name) for name in ("topk", "online_seqtopk")}
    bench.fill(measure, model, caches, 2, 300)
    for cache in caches.values():
        assert cache.pos == 300 and not cache.padded
        assert cache.kv[0].k[:, :, :300].abs().sum(-1).all()
    _, _, stats = model(torch.randint(64, (2, 20)), cache=caches["online_seqtopk"])
    assert 1.7 <= stats.n_taken.float().mean() <= 2.3


@pytest.mark.parametrize(
    ("error", "after"), [(KeyboardInterrupt(), False), (torch.OutOfMemoryError("no memory"), True)]
)
def test_a_part_that_fails_leaves_what_was_measured(run, monkeypatch, error, after):
    """Its name and exit code 1 say so; after Ctrl-C no part begins, after any other failure the rest do."""

    def fail(measure):
        """Cannot."""
        raise error

    rows = [{"what": "x", "ms": 1.0}]
    parts = {"cache": part_of(rows), "broken": fail, "router": part_of(rows)}
    monkeypatch.setattr(bench, "PARTS", parts)
    report, _ = run(*TOY, failed=["broken"])
    assert report["parts"] == {"cache": rows} | ({"router": rows} if after else {})


# -------- keeping and reading


def test_json_is_kept_and_tabled(run, tmp_path, capsys):
    """--json keeps what the last line says, and the table a column of each machine with speeds; of one
    machine's files the last one that has a row counts."""
    report, _ = run("cache", *TOY, f"--json={tmp_path}/new/a.json")
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == report
    (tmp_path / "new" / "b.json").write_text(json.dumps(report | {"machine": "another"}))
    no_speeds = {"parts": {"routers": [{"what": "topk, k=2", "nats": [5, None]}]}}
    (tmp_path / "new" / "c.json").write_text(json.dumps(report | no_speeds))
    last = report["parts"]["cache"][-1]
    again = {"parts": {"cache": [last | {"speed/anew": [77.0, 76.0, 78.0]}]}}
    (tmp_path / "new" / "d.json").write_text(json.dumps(report | again))
    head, _, *lines = results.speed_table(tmp_path / "new").splitlines()
    assert head.endswith(f"| {report['machine']}, float32 | another, float32 |")
    assert len(lines) == 1 and "against ranking anew" in lines[0] and "at least 25" in lines[0]
    assert lines[0].count("77 (76-78)") == 1
    with pytest.raises(ValueError, match="without speeds"):
        results.speed_table(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"parts": 3}', '{"parts": {"a": [3]}}'])
def test_a_file_that_holds_no_results_is_named(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json.* holds no results"):
        results.speed_table(tmp_path)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], ["trian", "train"]),
        (["train", "--shape=huge"], ["shape", "huge", "heavy"]),
        (["--batch_size=0"], ["batch_size", "at least 1"]),
        (["router", "--k=99"], ["k is 99"]),
        (["cache", "--json=bench.py/x.json"], ["bench.py"]),
        (["cache", "--batch=3"], ["batch_size"]),
    ],
)
def test_bad_input_is_one_line(argv, words, capsys, monkeypatch):
    monkeypatch.chdir(results.HOME)
    error = error_line(capsys, bench.main, *argv)
    assert all(word in error for word in words)


def test_results_are_not_replaced_by_nothing(run, tmp_path, monkeypatch):
    """A file of --json stays as it was where a part has no rows or fails, and a new one is not there."""
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text("mine")
    for path in (new, old):
        with pytest.raises(ValueError, match="k is 99"):
            bench.main(["router", "--k=99", f"--json={path}"])
    monkeypatch.setattr(bench, "PARTS", {"none": part_of([])})
    assert "old.json is left as it was" in run("none", f"--json={old}")[1]
    assert old.read_text() == "mine" and not new.exists()
