"""Several processes give the losses, the weights and the files of one process that has the same batches.

Two processes are spawned once and train, one after the other, all that the tests look at, while this process
trains the same alone.
"""

import multiprocessing
import os
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import distributed
import train
from model import MoEConfig, MoEGPT, load_checkpoint
from tests.cases import refused
from tests.reference import SETTINGS
from tests.runs import TINY, contents, entries, flags, interrupt, when, write_dataset

SMALL = {"n_layer": 1, "n_embd": 16, "n_hidden": 8, "block_size": 16, "batch_size": 2, "max_iters": 8}
SMALL |= {"gradient_accumulation_steps": 2, "eval_interval": 8, "eval_windows": 2}
UNBALANCED = {"balance_coef": 0, "z_coef": 0}
ROUTED = {
    "topk": {"gradient_accumulation_steps": 4},
    "seqtopk": {"checkpoint_activations": True},
    "online_seqtopk": {"tie_embeddings": True},
    "loss_free_bias": {"router": "topk", "bias_rate": 0.01, "balance_coef": 0},
    "expert_threshold": SETTINGS["expert_threshold"] | UNBALANCED,
    "remoe": SETTINGS["remoe"] | UNBALANCED,
}
# each router and each optimiser in DDP and sharded
CASES = {
    f"{name}-{optimizer}-{'sharded' if shard else 'ddp'}": TINY
    | SMALL
    | {"router": name, "optimizer": optimizer, "shard": bool(shard)}
    | settings
    for number, (name, settings) in enumerate(ROUTED.items())
    for shard, optimizer in enumerate(("muon", "adamw") if number % 2 else ("adamw", "muon"))
}
SHARDED = "topk-muon-sharded"


def work(rank: int, port: int, folder: Path) -> None:
    """What one of the two processes does, started as by torchrun. It prints into a file of its own."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    for name in ("stdout", "stderr"):
        setattr(sys, name, open(folder / f"{name}-{rank}", "w", buffering=1))  # noqa: SIM115
    with distributed.joined():
        for name in CASES:
            start(name, folder / "two")
        start(SHARDED, folder / "resumed_by_two", init_from="resume")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="130"):
            if rank == 1:
                when(patch, 4, interrupt)
            start(SHARDED, folder / "resumed_by_one")
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                when(patch, 3, lambda: os._exit(9))
            start(SHARDED, folder / "dies")


def start(name: str, folder: Path, **settings) -> None:
    settings = CASES[name] | {"out_dir": folder / name} | settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "estimate", lambda run: "soon")
        train.main(flags(**settings, dataset=folder.parent / "dataset"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the runs of two processes and of one."""
    folder = tmp_path_factory.mktemp("runs")
    write_dataset(folder / "dataset")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        when(patch, 4, interrupt)
        start(SHARDED, folder / "resumed_by_two")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=work, args=(rank, port, folder), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    for name in CASES:
        start(name, folder / "one")
    for process in processes:
        process.join(timeout=240)
    assert [process.exitcode for process in processes] == [1, 9], (folder / "stderr-0").read_text()
    shutil.copytree(folder / "resumed_by_one", folder / "interrupted")
    start(SHARDED, folder / "resumed_by_one", init_from="resume")
    return folder


def assert_close_runs(a: Path, b: Path) -> None:
    for left, right in zip(entries(a), entries(b), strict=True):
        assert left.keys() == right.keys()
        for key in left.keys() - {"kind"}:
            torch.testing.assert_close(left[key], right[key], rtol=1e-5, atol=1e-5)
    for name in ("last.pt", "best.pt"):
        left, right = load_checkpoint(a / name), load_checkpoint(b / name)
        assert left.keys() == right.keys()
        for key in ("model", "optimizers", "scaler", "rng", "step", "best"):
            torch.testing.assert_close(left[key], right[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_as_one(runs, name):
    """After 8 iterations the log, the weights, the routers' states and the moments agree."""
    assert_close_runs(runs / "two" / name, runs / "one" / name)


@pytest.mark.parametrize("how", ["resumed_by_two", "resumed_by_one"])
def test_another_number_of_processes_resumes(runs, how):
    """What one process saved two go on from, sharded, and the reverse."""
    assert_close_runs(runs / how / SHARDED, runs / "one" / SHARDED)


def test_an_interrupted_run_is_saved_once(runs):
    """The second process alone got Ctrl-C after iteration 4: both stopped there."""
    folder = runs / "interrupted" / SHARDED
    assert load_checkpoint(folder / "last.pt")["step"] == 4
    assert contents(folder).keys() == {"last.pt", "best.pt", "log.jsonl"}
    assert (runs / "stdout-0").read_text().count("saved iteration 4") == 1


def test_the_first_process_prints(runs):
    assert (runs / "stdout-0").read_text().count("causal validation") == len(CASES) + 3
    assert (runs / "stdout-1").read_text() == ""


def test_a_process_that_dies_ends_the_run_with_a_line(runs):
    """The other one does not wait for it; its last checkpoint is whole."""
    line = "error: process 0 of 2 ends, because another one has ended\n"
    assert (runs / "stderr-0").read_text().endswith(line)
    assert load_checkpoint(runs / "dies" / SHARDED / "last.pt")["step"] == 0


def test_micro_batches_must_divide_among_processes(monkeypatch):
    monkeypatch.setattr(train, "world", lambda: 4)
    with refused("gradient_accumulation_steps is 6, but must be a multiple of 4, the number of processes"):
        train.check_processes(train.TrainConfig(gradient_accumulation_steps=6))


@pytest.mark.parametrize("gpu, backend", [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_numbers_of_the_host_go_through_gloo(monkeypatch, gpu, backend):
    """With a GPU as well, for whose tensors there is NCCL."""
    found = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(distributed.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(distributed.dist, "init_process_group", found.append)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    with distributed.joined():
        assert found == [backend]


@pytest.mark.parametrize("world, shard, prints", [(1, True, 1), (2, False, 1), (2, True, 0)])
def test_only_a_whole_model_prints_a_sample(monkeypatch, world, shard, prints):
    """In DDP `forward` is another module than the model; sharded it is the model."""
    printed, model = [], MoEGPT(MoEConfig(vocab_size=2))
    config = train.TrainConfig(shard=shard, max_iters=1)
    forward = model if shard else torch.nn.Module()
    run = SimpleNamespace(config=config, model=model, forward=forward, step=1, saved=1)
    for name, value in {"world": lambda: world, "describe": str, "train": lambda run: True}.items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(train, "print_sample", printed.append)
    train.run_to_the_end(run)
    assert len(printed) == prints


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    """The current device is the one that is asked for, or that of the process's number on its machine."""
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    distributed.own_device(torch.device("cuda:1"))
    monkeypatch.setattr(distributed, "world", lambda: 4)
    assert distributed.own_device(torch.device("cuda")) == torch.device("cuda:1")
    assert [torch.device("cuda", device) for device in current] == [torch.device("cuda:1")] * 2
    with refused("device is cuda:1, but must be auto, cpu or cuda"):
        distributed.own_device(torch.device("cuda:1"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with refused("nproc_per_node is 3, but must be at most 2"):
        distributed.own_device(torch.device("cuda"))
