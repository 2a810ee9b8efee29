"""A router in a file of one's own: train.py and sample.py take it from there; nothing else changes."""

import re
import shlex

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
)

import sample
import train
from router import ROUTERS, ExpertCache, Router, online_seqtopk, seqtopk, topk

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
    fair, causal=True, exact=True, decode="fair", options=("state",), state=start, loss=pull, update=move
)
""",
}


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


@pytest.fixture(scope="module")
def topk_run(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("topk") / "run"
    train_with(None, dataset=dataset, out_dir=folder, router="topk")
    return folder


def test_it_trains_goes_on_and_writes_as_it_is_told(own, dataset, tmp_path, monkeypatch, capsys):
    """The loss falls. A run that was stopped goes on by the command that it prints, to the last bit as one
    that nothing stopped, and the command at its end writes text under its router: both name its file."""
    name, file, straight = own
    losses = [entry["causal"]["loss"] for entry in entries(straight, "eval")]
    assert losses[-1] < losses[0] - 1
    when(monkeypatch, 3, interrupt)
    with pytest.raises(SystemExit):
        train_with(file, dataset=dataset, out_dir=tmp_path / "run", router=name)
    assert torch.load(tmp_path / "run" / "last.pt")["step"] == 3
    hint = re.search(r"python train.py (.*)", capsys.readouterr().out)[1]
    command(train.main, *shlex.split(hint), "--sample_tokens=2")
    assert_same_runs(tmp_path / "run", straight)
    hint = re.search(r"--- more: python sample.py (.*) --show_experts", capsys.readouterr().out)[1]
    command(sample.main, *shlex.split(hint), *flags(prompt="def ", max_new_tokens=8, device="cpu"))
    out = capsys.readouterr().out
    assert "\ndef " in out and f"router {name}, " in out


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
        assert "defined in a file that is given too: python SCRIPT.py FILE.py" in err


def test_a_topk_run_goes_on_under_it(own, topk_run, dataset, tmp_path, capsys):
    """A TopK run of the same architecture opens under it and gets better still. As it is it writes text under
    a router that learns nothing, and under no other."""
    name, file, _ = own
    train_with(file, init_from=topk_run, dataset=dataset, out_dir=tmp_path / "run", router=name)
    before, after = (entries(run, "eval")[-1]["causal"]["loss"] for run in (topk_run, tmp_path / "run"))
    assert after < before and torch.load(tmp_path / "run" / "last.pt")["config"]["router"] == name
    argv = file, *flags(out_dir=topk_run, router=name, max_new_tokens=2, device="cpu")
    if name == "fair":
        err = error_line(capsys, lambda argv: command(sample.main, *argv), *argv)
        assert "router is fair, but must be " in err and "learned" in err
    else:
        command(sample.main, *argv)
        assert "router relative (trained with topk)" in capsys.readouterr().out


def test_state_loss_and_update_all_count(topk_run, dataset, tmp_path):
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
        models[name] = torch.load(tmp_path / name / "last.pt")["model"]
    for name, updates in (("whole", 10), ("no loss", 10), ("no update", 0)):
        for layer in range(2):
            head_start = models[name][f"blocks.{layer}.mlp.state.head_start"]
            assert models[name][f"blocks.{layer}.mlp.state.updates"] == updates
            assert head_start.any() == (updates > 0) and head_start.sum().abs() < 1e-6
    topk = torch.load(topk_run / "last.pt")["model"]
    assert_same({key: models["no update"][key] for key in topk}, topk)
    heads = [model["head.weight"] for model in models.values()]
    assert not any(torch.equal(heads[a], heads[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def relative(scores, k):
    return scores >= 0.5 * scores.amax(-1, keepdim=True)


ROW = Router(relative, causal=True, exact=False, decode="relative")
ROOT, IS = ROUTERS["online_seqtopk_root"], "of router relative is"


def odd(scores):
    return torch.arange(scores.shape[1])[:, None] % 2 > 0


WRONG = {
    "no row": (relative, "the row of router relative is function, but must be a router.Router"),
    "no such stand-in": (
        ROW._replace(decode="topp"),
        "decode of router relative is topp, .* causal",
    ),
    "stand-in that sees": (ROW._replace(decode="seqtopk"), "decode of router relative is seqtopk, .* causal"),
    "stand-in that learns": (ROW._replace(decode="remoe", select=topk), None),
    "stand-in whose state it lacks": (ROW._replace(decode="expert_threshold"), "decode .* without a state"),
    "option": (ROW._replace(options=("width",)), "an option of router relative is width, .* MoEConfig"),
    "not exact": (ROW._replace(exact=True), r"router relative is exact, its pairs is \d+, .* B\*T\*k = 128"),
    "not causal": (
        ROW._replace(select=seqtopk),
        "causal of router relative is True, .* come later",
    ),
    "remembers": (ROW._replace(select=online_seqtopk), f"cache {IS} None, .* token by token"),
    "place": (ROW._replace(select=lambda s, k: topk(s, k) & odd(s)), f"cache {IS} None, .* token by token"),
    "another cache": (ROOT._replace(cache=ExpertCache), f"cache {IS} ExpertCache, .* token by token"),
    "other sequences": (ROW._replace(select=lambda s, k: topk(s * s.mean(0), k)), ".* or other sequences"),
    "a step": (ROOT._replace(max_pairs=lambda c, n, fresh: n * c.k), r"max_pairs .* is 2, .* \d, as"),
    "random": (ROW._replace(select=lambda s, k: topk(torch.rand_like(s), k)), "another at a second call"),
    "too many": (
        ROW._replace(max_pairs=lambda config, n, fresh: n),
        r"max_pairs .* is \d+, .* at least \d+,",
    ),
    "shape": (ROW._replace(select=lambda s, k: s[:1] > 0), "returns is torch.bool .1, 32, 4., .* .2, 32, 4"),
    "dtype": (ROW._replace(select=lambda s, k: s), "what router relative returns is torch.float32"),
    "no tensor": (ROW._replace(select=lambda s, k: None), "what router relative returns is NoneType"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_row_that_breaks_its_word_is_refused(dataset, tmp_path, monkeypatch, capsys, wrong):
    """Before a run begins, in one line: a row of other types and names, and a router that does not do what
    its row promises. A stand-in may learn if it does not read its state."""
    row, words = WRONG[wrong]
    monkeypatch.setitem(ROUTERS, "relative", row)
    argv = flags(**TINY | {"max_iters": 1}, dataset=dataset, out_dir=tmp_path / "run", router="relative")
    if words is None:
        assert "remoe needs score_fn=relu" in error_line(capsys, train.main, *argv)
        return train.main([*argv, "--score_fn=relu", "--norm_best=0"])
    assert re.search(words, error_line(capsys, train.main, *argv))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"router": "relative"}, {"first_router": "alone", "first_iters": 1}])
def test_stand_ins_and_first_routers_keep_their_word(dataset, tmp_path, monkeypatch, capsys, changes):
    """A router that needs a cache is refused wherever it would route, not as --router alone."""
    alone = ROW._replace(select=online_seqtopk, decode="alone")
    monkeypatch.setitem(ROUTERS, "alone", alone)
    monkeypatch.setitem(ROUTERS, "relative", ROUTERS["seqtopk"]._replace(decode="alone"))
    argv = flags(**TINY | {"max_iters": 1} | changes, dataset=dataset, out_dir=tmp_path / "run")
    assert "cache of router alone is None" in error_line(capsys, train.main, *argv)


def test_a_state_is_not_inherited_from_another_router(dataset, tmp_path):
    """A router whose state has the names of another's begins anew."""
    settings = {"score_fn": "sigmoid", "dataset": dataset, "out_dir": tmp_path / "threshold"}
    train.main(flags(**TINY | settings, router="expert_threshold"))
    file = tmp_path / "fair.py"
    file.write_text(FILES["fair"])
    more = settings | {"init_from": settings["out_dir"], "out_dir": tmp_path / "fair", "max_iters": 2}
    train_with(file, router="fair", **more)
    weights = torch.load(tmp_path / "fair" / "last.pt")["model"]
    assert weights["blocks.0.mlp.state.updates"] == 2 and "blocks.0.mlp.state.cutoff" not in weights
