"""Killed at any moment, on a full disk, or beside another process: what was written is whole, a run goes on
bit for bit, and best.pt is the best so far."""

import contextlib
import errno
import fcntl
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
from functools import partial

import pytest
import torch
from runs import (
    TEXT,
    TINY,
    assert_same,
    assert_same_runs,
    contents,
    entries,
    error_line,
    flags,
    when,
)

import data
import train
from config import results
from config.files import scratch, whole
from model import MoEConfig, MoEGPT, load_checkpoint, save_checkpoint
from sample import new_file

KILLS = 30
TOUCHES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
# at this rate the lowest loss is not the last one: if best.pt is lost, no later evaluation makes up for it
RUN = TINY | {"learning_rate": 0.3, "eval_interval": 1, "max_iters": 8, "n_layer": 1, "router": "topk"}
MODEL = MoEGPT(MoEConfig(n_layer=1, n_embd=16, vocab_size=96, qk_norm="full", norm_best=0))
TOKENIZER = data.train_bpe(TEXT, 300, "tiny")  # here, because rustbpe's threads are not in a forked process


@pytest.fixture(scope="module")
def straight(dataset, tmp_path_factory):
    """A run that nothing disturbed, whose best iteration is not among the last."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    begin(folder, dataset)
    assert load_checkpoint(folder / "best.pt")["step"] < 4
    return folder


def begin(folder, dataset):
    train.main(flags(**RUN, dataset=dataset, out_dir=folder))


def resume(folder):
    train.main(flags(init_from="resume", out_dir=folder))


# ---- killed


def is_killed(action, folder, moment=None, seconds=None):
    """Whether an action in a forked process is killed, when it is about to touch a file below the folder for
    the moment-th time (0, 1 ...) or after so many seconds; or else ends well."""

    left = iter(range(moment or 0))

    def hook(event, args):
        if event in TOUCHES and str(args[0]).startswith(str(folder)) and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    def child():
        if moment is not None:
            sys.addaudithook(hook)
        with contextlib.redirect_stdout(io.StringIO()):
            action()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(20 if seconds is None else seconds)  # it may wait for a lock lost in the fork
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def go_on(folder, dataset):
    resume(folder) if (folder / "last.pt").exists() else begin(folder, dataset)


@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd's threads for a GPU are not in a fork")
def test_runs_killed_at_any_moment_go_on(straight, dataset, tmp_path):
    """Runs that are killed again and again, between any two touches of files or at any time, become the run
    that nothing killed, to the last bit. last.pt never knows of a better iteration than best.pt holds; what a
    save had begun is gone at the end."""
    rng, kills, saving = random.Random(0), 0, 0

    def moment_or_seconds():
        return rng.choice([(rng.randrange(60), None), (None, rng.random() / 5)])

    while kills < KILLS:
        folder = tmp_path / f"after_{kills}_kills"
        act = partial(go_on, folder, dataset)
        while kills < KILLS and is_killed(act, folder, *moment_or_seconds()):
            kills += 1
            saving += any(folder.glob(".seqtopk-*"))
            best = {path.name: load_checkpoint(path)["best"] for path in folder.glob("*.pt")}
            assert "last.pt" not in best or best["best.pt"] <= best["last.pt"]
        act()
        assert_same_runs(folder, straight)
        assert contents(folder).keys() == {"best.pt", "last.pt", "log.jsonl"}
    assert saving > 3


def page(path, text):
    with new_file("html", str(path)) as file:
        file.write(text)


def dataset_of(path, text):
    data.write_dataset(path, [text], TEXT, TOKENIZER, "0" * 64)


def checkpoint(path, text):
    save_checkpoint(path, MODEL, text=text)


def pretrained(path, text):
    shutil.rmtree(path, ignore_errors=True)
    MODEL.save_pretrained(path, {"kind": "hf", "json": text, "eot": 0})


def report(path, text):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        results.finish({"parts": {"a": [text]}, "failed": []}, path)


each_writer = pytest.mark.parametrize("write", [page, dataset_of, checkpoint, pretrained, report])


def written(path):
    """What is at a path, for any number of files; {} for a dataset or a folder that is not to be opened."""
    found = contents(path) if path.is_dir() else {"": path.read_bytes()}
    found = {name: content for name, content in found.items() if not name.startswith(".seqtopk-")}
    for name in [name for name in found if name.endswith(".safetensors")]:  # its header is in any order
        size = 8 + int.from_bytes(found[name][:8], "little")
        found[name] = (json.loads(found[name][8:size]), found[name][size:])
    return found if found.keys() & {"", "meta.json", "config.json"} else {}


@each_writer
def test_a_writer_killed_at_any_moment(tmp_path, write):
    """Before each touch of a file: what is there is the old content or the new one, or, of several files, not
    to be opened. The next write is not disturbed by what was left, and removes it."""
    path, new = tmp_path / "here" / "it", tmp_path / "new"
    path.parent.mkdir()
    write(path, "old text"), write(new, "new text")
    allowed, moment = [written(path), written(new), {}], 0
    while is_killed(partial(write, path, "new text"), path.parent, moment):
        assert not path.exists() or written(path) in allowed
        moment += 1
    assert moment > 8 and written(path) == written(new)
    assert not list(path.parent.rglob(".seqtopk-*"))


# ---- a full disk


@contextlib.contextmanager
def full_disk(size):
    """No file grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@each_writer
def test_a_writer_on_a_full_disk(tmp_path, write):
    """It raises the system's error, wherever the file breaks off, and leaves what was there and no more."""
    path = tmp_path / "it"
    write(path, "old text" * 100)
    before = contents(tmp_path)
    for size in (0, 1, 200, 700):
        with full_disk(size), pytest.raises(Exception, match="File too large"):
            write(path, "new text" * 100)
        assert contents(tmp_path) == (before if write is not pretrained else {})


@pytest.mark.parametrize("until", [5, None])
def test_a_run_on_a_full_disk(straight, dataset, tmp_path, capsys, monkeypatch, until):
    """It goes on to the end; no line of the log is cut. If the end is not saved, it says so and exits 2; with
    room again, resuming leads to the run that had a disk. best.pt is the best of what was saved."""
    folder, disk = tmp_path / "run", contextlib.ExitStack()

    def fill():
        disk.enter_context(full_disk((folder / "log.jsonl").stat().st_size + 20))
        if until:
            when(monkeypatch, until, disk.close)

    when(monkeypatch, 3, fill)
    with disk:
        err = "" if until else error_line(capsys, lambda argv: begin(folder, dataset))
        if until:
            begin(folder, dataset)
    out = capsys.readouterr().out
    if until:
        assert out.count("last.pt could not be saved (File too large)") == until - 3
        assert entries(folder) == [e for e in entries(straight) if not 3 <= e["step"] < until]
        ours, theirs = (load_checkpoint(path / "best.pt") for path in (folder, straight))
        assert_same([ours["model"], ours["best"]], [theirs["model"], theirs["best"]])
    else:
        assert "iteration 8, the last one, is not saved (last.pt holds iteration 2): make room" in err
        assert entries(folder) == [e for e in entries(straight) if e["step"] < 3]
        resume(folder)
        assert_same_runs(folder, straight)


# ---- beside another process


@pytest.mark.parametrize("again", [begin, resume])
def test_a_folder_has_one_run_at_a_time(dataset, tmp_path, capsys, monkeypatch, again):
    """A second run in the folder of one that trains, new or resumed, is refused in one line and changes
    nothing; afterwards it is not."""
    folder, refused = tmp_path / "run", []
    begin_or_resume = partial(begin, dataset=dataset) if again is begin else resume

    def second():
        before = contents(tmp_path)
        refused.append(error_line(capsys, lambda argv: begin_or_resume(folder)))
        assert contents(tmp_path) == before

    when(monkeypatch, 3, second)
    begin(folder, dataset)
    assert refused[0].startswith(f"error: out_dir {folder} is in use: another process trains there; ")
    begin_or_resume(folder)


def test_a_file_system_without_locks(dataset, tmp_path, capsys, monkeypatch):
    """One line says so, the run is made, and nobody takes what is being written for a leftover."""

    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    folder = tmp_path / "run"
    begin(folder, dataset)
    assert capsys.readouterr().out.count(f"{folder} cannot be locked (No locks available): ") == 1
    with scratch(folder), whole(folder / "a") as a:
        a.touch()
        assert len(list(folder.glob(".seqtopk-*"))) == 4
    assert contents(folder).keys() == {"best.pt", "last.pt", "log.jsonl", "a"}


def test_writers_to_one_name_do_not_disturb_each_other(tmp_path):
    """Each writes to a place of its own, the last one wins, and nothing else is left, even if another process
    took a lock for a leftover before it was locked."""
    with whole(tmp_path / "a") as first:
        next(tmp_path.glob("*.lock")).unlink()
        with whole(tmp_path / "a") as second:
            first.write_text("first")
            second.write_text("second")
        assert (tmp_path / "a").read_text() == "second"
    assert (tmp_path / "a").read_text() == "first" and os.listdir(tmp_path) == ["a"]
