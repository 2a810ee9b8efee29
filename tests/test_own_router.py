"""A router in a file of one's own: train.py and sample.py take it from there; nothing else changes."""

import pytest
import torch
from runs import (
    TINY,
    assert_same,
    assert_same_runs,
    entries,
    error_line,
    flags,
    interrupt,
    when,
    write_dataset,
)

import sample
import train
from model import load_checkpoint
from router import ROUTERS

FILES = {
    "relative": """
from router import ROUTERS, Router

def relative(scores, k):
    "Every token takes the experts that score at least half as high as its best one."
    return scores >= 0.5 * scores.amax(-1, keepdim=True)

ROUTERS["relative"] = Router(relative, causal=True, exact=False, decode="relative")
""",
    "fair": """
import torch
from router import ROUTERS, Router, topk

def fair(scores, k, state):
    "TopK, with a head start for the experts that have got little so far."
    return topk(scores + state["head_start"], k)

def start(config):
    return {"head_start": torch.zeros(config.n_expert), "updates": torch.tensor(0)}

def pull(routing, state, config):
    "The scores of experts with a head start shall grow."
    return -(routing.scores * state["head_start"]).sum(-1).mean()

def move(state, routing, config):
    lack = config.k / config.n_expert - routing.mask.float().mean((1, 2))  # (L, E)
    return {"head_start": state["head_start"] + 0.01 * lack, "updates": state["updates"] + 1}

ROUTERS["fair"] = Router(
    fair, causal=True, exact=True, decode="fair", state=start, loss=pull, update=move
)
""",
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module", params=FILES)
def own(request, dataset, tmp_path_factory):
    """A router's name, the user's file, and a run that it has trained."""
    folder = tmp_path_factory.mktemp("own")
    file = folder / f"{request.param}.py"
    file.write_text(FILES[request.param])
    train_with(file, dataset=dataset, out_dir=folder / "run", router=request.param)
    return request.param, file, folder / "run"


def command(main, *argv):
    """Run a script as a process of its own does: it knows no routers but those of the files on its line."""
    known = dict(ROUTERS)
    try:
        main([str(arg) for arg in argv])
    finally:
        ROUTERS.clear()
        ROUTERS.update(known)


def train_with(file, **settings):
    command(train.main, *filter(None, [file]), *flags(**TINY | settings))


def test_it_trains_and_resumes(own, dataset, tmp_path, monkeypatch):
    """The loss falls; a run that was stopped and goes on is to the last bit the one that nothing stopped."""
    name, file, straight = own
    losses = [entry["causal"]["loss"] for entry in entries(straight, "eval")]
    assert losses[-1] < losses[0] - 1
    when(monkeypatch, 3, interrupt)
    with pytest.raises(SystemExit):
        train_with(file, dataset=dataset, out_dir=tmp_path / "run", router=name)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 3
    command(train.main, file, *flags(init_from="resume", out_dir=tmp_path / "run"))
    assert_same_runs(tmp_path / "run", straight)


def test_its_run_writes_text(own, capsys):
    """sample.py, given the file, opens the run and routes as it trained."""
    name, file, folder = own
    command(sample.main, file, *flags(out_dir=folder, prompt="def ", max_new_tokens=8, device="cpu"))
    out = capsys.readouterr().out
    assert "\ndef " in out and f"router {name}" in out


def test_without_its_file_it_is_refused(own, capsys):
    """Training, resuming, tuning and sampling say in one line that a file must be given that defines it."""
    name, _, folder = own
    for main, argv in (
        (train.main, flags(**TINY, router=name)),
        (train.main, flags(init_from="resume", out_dir=folder)),
        (train.main, flags(init_from=folder, out_dir=folder)),
        (sample.main, flags(out_dir=folder)),
    ):
        err = error_line(capsys, main, *argv)
        assert f"router is {name}, but must be one of topk, " in err
        assert "defined in a file that is named first: python SCRIPT.py FILE.py" in err


def test_a_topk_run_goes_on_under_it(own, dataset, tmp_path):
    """A TopK run of the same architecture opens under it and gets better still."""
    name, file, _ = own
    train_with(None, dataset=dataset, out_dir=tmp_path / "topk", router="topk")
    train_with(file, init_from=tmp_path / "topk", dataset=dataset, out_dir=tmp_path / "run", router=name)
    before, after = (entries(tmp_path / run, "eval")[-1]["causal"]["loss"] for run in ("topk", "run"))
    assert after < before and load_checkpoint(tmp_path / "run" / "last.pt")["config"]["router"] == name


def test_state_loss_and_update_all_count(dataset, tmp_path):
    """Without update the state stays, and `fair` is TopK to the last bit; with it routing changes, and with
    loss the weights do as well. The state is saved with each layer."""
    texts = {
        "whole": FILES["fair"],
        "no loss": FILES["fair"].replace("loss=pull, ", ""),
        "no update": FILES["fair"].replace(", update=move", ""),
    }
    models = {}
    for name, text in texts.items():
        (tmp_path / "mine.py").write_text(text)
        train_with(tmp_path / "mine.py", dataset=dataset, out_dir=tmp_path / name, router="fair")
        models[name] = load_checkpoint(tmp_path / name / "last.pt")["model"]
    for name, updates in (("whole", 10), ("no loss", 10), ("no update", 0)):
        for layer in range(2):
            head_start = models[name][f"blocks.{layer}.mlp.state.head_start"]
            assert models[name][f"blocks.{layer}.mlp.state.updates"] == updates
            assert head_start.any() == (updates > 0) and head_start.sum().abs() < 1e-6
    train_with(None, dataset=dataset, out_dir=tmp_path / "topk", router="topk")
    topk = load_checkpoint(tmp_path / "topk" / "last.pt")["model"]
    assert_same({key: models["no update"][key] for key in topk}, topk)
    heads = [model["head.weight"] for model in models.values()]
    assert not any(torch.equal(heads[a], heads[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
