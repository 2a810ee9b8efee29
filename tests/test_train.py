"""train.py: what it minimises, that a run stopped anywhere goes on as if it had not been, and bad input."""

import contextlib
import copy
import errno
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import SETTINGS, ref_seqtopk
from runs import (
    ROOT,
    RUN,
    SHAPE,
    TEXT,
    TINY,
    assert_same,
    assert_same_runs,
    contents,
    entries,
    error_line,
    flags,
    interrupt,
    when,
    write_dataset,
)

import data
import train
from config import parse, printable
from model import MoEConfig, MoEGPT, load_checkpoint, save_checkpoint
from router import ROUTERS, Routing
from train import TrainConfig

ESTIMATE = train.estimate  # most tests do without, for the forwards that they count
RECORDED = json.loads((ROOT / "tests" / "recorded_losses.json").read_text())
DENSE = {"n_expert": 1, "k": 1, "router": "topk"}
WARM_UP = {"first_router": "expert_choice", "first_iters": 3}
# 6 windows in an iteration, and about 60 in an epoch: iteration 10 begins in one epoch and ends in the next
LONG = TINY | {"batch_size": 3, "gradient_accumulation_steps": 2, "bias_rate": 0.01, "max_iters": 12}


@pytest.fixture(scope="module")
def train_once(dataset, tmp_path_factory):
    """For runs that several tests look at: train with these settings, return the run's folder."""

    def train_once(settings, *argv):
        folder = tmp_path_factory.mktemp("once") / "run"
        train.main([*flags(**settings, dataset=dataset, out_dir=folder), *argv])
        return folder

    return train_once


@pytest.fixture(scope="module")
def straight(train_once):
    """A run that nothing interrupted."""
    return train_once(LONG)


@pytest.fixture(scope="module")
def printed(train_once):
    """A short run, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        folder = train_once(TINY | {"max_iters": 7, "log_interval": 2, "sample_tokens": 20})
    return folder, out.getvalue()


@pytest.fixture(scope="module")
def topk_run(train_once):
    """A short TopK run whose best.pt and last.pt differ."""
    folder = train_once(TINY | {"max_iters": 2, "router": "topk"})
    best = load_checkpoint(folder / "best.pt")
    best["model"] = {name: weight * 1.01 for name, weight in best["model"].items()}
    torch.save(best, folder / "best.pt")
    return folder


@pytest.fixture
def start(dataset, tmp_path):
    """Run train.py in this process with TINY and these settings; returns the run's folder."""

    def start(name="run", **settings):
        train.main(flags(**TINY | {"dataset": dataset, "out_dir": tmp_path / name} | settings))
        return tmp_path / name

    return start


@pytest.fixture
def make_run(dataset, tmp_path):
    """A Run that has not begun, its weights large enough that routing varies."""

    def make_run(scale=5.0, **settings):
        config = TrainConfig(**TINY | {"dataset": str(dataset), "out_dir": str(tmp_path)} | settings)
        run = train.set_up(*train.open_dataset(config, None), None)
        for parameter in run.model.parameters():
            if parameter.dim() > 1:
                parameter.data *= scale
        return run

    return make_run


@pytest.fixture
def fails(capsys, tmp_path):
    """Run train.py with these arguments; returns its one line of error. No file below tmp_path may change."""

    def fails(*argv):
        before = contents(tmp_path)
        err = error_line(capsys, train.main, *argv)
        assert contents(tmp_path) == before
        return err

    return fails


@pytest.fixture
def seen(monkeypatch):
    """What each micro-batch of training saw: x, y, the weights before it, and the statistics after it."""
    calls, losses = [], train.losses

    def spy(run, x, y):
        weights = {name: weight.clone() for name, weight in run.model.state_dict().items()}
        result = losses(run, x, y)
        calls.append(SimpleNamespace(x=x, y=y, weights=weights, stats=result[2]))
        return result

    monkeypatch.setattr(train, "losses", spy)
    return calls


@pytest.fixture
def after(monkeypatch):
    return partial(when, monkeypatch)


def full(path, model, **extra):
    """In place of save_checkpoint."""
    raise OSError(28, "No space left on device")


# ---- a run


@pytest.fixture(scope="module", params=RECORDED)
def recorded(request, train_once):
    """A run whose losses were recorded: its router, its log, and the routers of its evaluations."""
    evaluated, evaluate = [], train.evaluate
    length = {"max_iters": 12, "eval_interval": 12, "eval_windows": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", lambda run, name: evaluated.append(name) or evaluate(run, name))
        folder = train_once(TINY | length, *request.param.split())
    router = load_checkpoint(folder / "last.pt")["config"]["router"]
    evals = entries(folder, "eval")
    losses = {which: [entry[which]["loss"] for entry in evals] for which in ("causal", "as_trained")}
    losses["train"] = [entry["loss"] for entry in entries(folder, "train")]
    return SimpleNamespace(key=request.param, router=router, evals=evals, evaluated=evaluated, losses=losses)


def test_every_kind_of_model_learns_as_it_did(recorded):
    """Any router, dense, sigmoid, normalised, balanced by bias, shared expert: the losses are those that an
    earlier version had (on another CPU the last digits differ), and fall by more than a nat and a half."""
    for which, losses in RECORDED[recorded.key].items():
        assert recorded.losses[which] == pytest.approx(losses, rel=1e-4), which
        assert losses[0] == pytest.approx(math.log(300), abs=0.3) and losses[-1] < losses[0] - 1.5


def test_every_router_is_recorded():
    """No router is without a row in recorded_losses.json."""
    assert {key.split()[0] for key in RECORDED} == {f"--router={router}" for router in ROUTERS}


def test_the_causal_loss_is_the_headline(recorded):
    """The causal loss is the decode router's; it equals the as-trained one just when the router is causal."""
    row, last = ROUTERS[recorded.router], recorded.evals[-1]
    assert recorded.evaluated[0] == row.decode
    assert recorded.evaluated[-1] == (row.decode if row.causal else recorded.router)
    assert (last["causal"] == last["as_trained"]) == row.causal
    assert (last["causal"]["loss"] == last["as_trained"]["loss"]) == row.causal


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"dtype": "float16", "grad_clip": 0}], ids=str)
def test_half_precision_learns(start, settings):
    causal = [entry["causal"]["loss"] for entry in entries(start(**settings, max_iters=6), "eval")]
    assert causal[2] < causal[1] < causal[0] - 0.3


def test_an_overflow_stops_both_optimizers(start, monkeypatch):
    """In float16, an overflow in one of AdamW's gradients leaves all weights and Muon's moments alone too."""
    train_step = train.train_step

    def overflowing(run):
        run.model.embedding.weight.register_hook(lambda gradient: gradient * math.inf)
        before = copy.deepcopy(run.model.state_dict())
        metrics = train_step(run)
        assert_same(run.model.state_dict(), before)
        assert not any(optimizer.state for optimizer in run.optimizers)
        return metrics

    monkeypatch.setattr(train, "train_step", overflowing)
    start(dtype="float16", optimizer="muon", grad_clip=0, max_iters=1)


@pytest.mark.parametrize("asked", ["auto", "true"])
def test_a_compiler_that_fails(start, capsys, monkeypatch, asked):
    """What auto chose is given up, with a line that says why; what was asked for is refused."""

    def broken(*args, **kwargs):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(torch, "compile", lambda function: broken)
    monkeypatch.setattr(train, "pick_compile", lambda *args: (True, "tried"))
    if asked == "auto":
        again = []
        monkeypatch.setattr(train, "recomputed", lambda f, *args, **_: again.append(f(*args)) or again[-1])
        folder = start(compile=asked, max_iters=2, checkpoint_activations=True)
        assert entries(folder, "eval")[-1]["step"] == 2 and again
        assert "compile   off after all: RuntimeError: no compiler\n" in capsys.readouterr().out
    else:
        err = error_line(capsys, lambda argv: start(compile=asked))
        assert "compile is true, but torch.compile fails here with no compiler here" in err


def test_what_a_run_leaves_behind(printed, dataset):
    """The log has the training and evaluation lines with all their fields; last.pt and best.pt load."""
    folder, _ = printed
    assert {path.name for path in folder.iterdir()} == {"last.pt", "best.pt", "log.jsonl"}
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = {kind: [line["step"] for line in lines if line["kind"] == kind] for kind in ("train", "eval")}
    assert steps == {"train": [2, 4, 5, 6, 7], "eval": [0, 5, 7]}
    for line in lines:
        if line["kind"] == "train":
            assert line.keys() == {"kind", "step", "loss", "grad_norm", "lr", "tokens_per_second"}
            assert line["tokens_per_second"] > 0 and line["grad_norm"] > 0
        else:
            assert line.keys() == {"kind", "step", "causal", "as_trained"}
            assert line["causal"].keys() == {"loss", "bpb", "experts", "entropy", "variance", "dead"}
    last = load_checkpoint(folder / "last.pt")
    assert last["step"] == 7 and last["train_config"]["batch_size"] == 4 and last["config"]["n_expert"] == 4
    assert last["tokenizer"] == data.load(str(dataset)).tokenizer.meta
    assert last["best"] == min(line["causal"]["loss"] for line in lines if line["kind"] == "eval")
    MoEGPT.from_checkpoint(load_checkpoint(folder / "best.pt"))


@pytest.mark.parametrize("settings", [{}, DENSE], ids=["moe", "dense"])
def test_table(start, capsys, settings):
    """Each evaluation is a line under the header, column below column, the causal loss first."""
    folder = start(**settings, max_iters=2)
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("  step "))
    assert "causal validation" in lines[header - 1] and "under " in lines[header - 1]

    def edges(line):
        return [match.end() for match in re.finditer(r"\S+", line)]

    for line, entry in zip(lines[header + 1 :], entries(folder, "eval"), strict=True):
        words, causal = line.split(), entry["causal"]
        assert edges(line) == edges(lines[header]) and int(words[0]) == entry["step"]
        values = [entry[which][unit] for which in ("causal", "as_trained") for unit in ("loss", "bpb")]
        assert words[2:6] == [f"{value:.4f}" for value in values]
        if not settings:
            mean, low, high = causal["experts"]
            routing = [f"{mean:.2f}", str(low), str(high), f"{causal['entropy']:.3f}", str(causal["dead"])]
            assert words[6:11] == routing


def test_choices_are_printed_with_their_reasons(printed):
    """What auto chose for dtype and compile is said with a reason, beside sizes and the run's folder."""
    folder, out = printed
    for words in (
        r"device +cpu \(as asked\)",
        r"dtype +float32 \(.*GPU.*\)",
        r"compile +False \(.*CPU.*\)",
        r"model +[\d,]+ parameters, [\d,]+ active",
        r"router +seqtopk, 2 of 4 experts per token; causal stand-in online_seqtopk",
        r"vocabulary 300\b",
        re.escape(str(folder)),
    ):
        assert re.search(words, out)


def test_ends_with_a_sample(printed, dataset):
    """The last lines are what the trained model generates from the data's prompt, and how to get more."""
    folder, out = printed
    text, more = out.split("--- sample\n")[1].rsplit("--- more: ", 1)
    assert more == f"python sample.py --out_dir={folder} --show_experts\n" and text.startswith("def ")
    model = MoEGPT.from_checkpoint(load_checkpoint(folder / "last.pt"))
    tokenizer, generator = data.load(str(dataset)).tokenizer, torch.Generator().manual_seed(1337)
    prompt = torch.tensor([tokenizer.encode("def ")])
    chunks = list(model.generate(prompt, 20, stop=tokenizer.eot, generator=generator))
    assert text == printable(tokenizer.decode(torch.cat([chunk.tokens for chunk in chunks], 1)[0])) + "\n"


def test_the_folder_is_named_after_the_config_file(dataset, tmp_path, monkeypatch):
    """Without out_dir a run goes to out/<config file>; the command line wins over the file."""
    monkeypatch.chdir(tmp_path)
    settings = TINY | {"dataset": str(dataset), "max_iters": 50}
    Path("mine.py").write_text("".join(f"{name} = {value!r}\n" for name, value in settings.items()))
    train.main(["mine.py", "--max_iters=1"])
    assert load_checkpoint("out/mine/last.pt")["step"] == 1


def test_best_is_the_checkpoint_with_the_lowest_causal_loss(start, monkeypatch):
    """best.pt is overwritten only when the causal loss falls below all before it, also after resuming."""
    causal = iter([3.0, 2.0, 2.5, 1.5, 1.7, 1.6, 1.4])
    result = {"bpb": 1.0, "experts": [2.0, 1, 4], "entropy": 1.0, "dead": 0}

    def evaluate(run, router):
        return result | {"loss": next(causal) if ROUTERS[router].causal else 0.1}

    monkeypatch.setattr(train, "evaluate", evaluate)
    folder = start(max_iters=4, eval_interval=1)
    last = load_checkpoint(folder / "last.pt")
    assert last["step"] == 4 and last["best"] == 1.5
    for max_iters, best in ((5, 3), (6, 6)):
        train.main(flags(init_from="resume", out_dir=folder, max_iters=max_iters))
        assert load_checkpoint(folder / "best.pt")["step"] == best


def test_a_full_disk_does_not_end_the_run(start, after, tmp_path, capsys, monkeypatch):
    """A checkpoint that cannot be written is said not to be saved, also after Ctrl-C, and the run goes on."""
    monkeypatch.setattr(train, "save_checkpoint", full)
    after(6, interrupt)
    with pytest.raises(SystemExit):
        start()
    out = capsys.readouterr().out
    assert [entry["step"] for entry in entries(tmp_path / "run", "eval")] == [0, 5]
    assert out.count("last.pt could not be saved (No space left on device)") == 3
    assert "saved iteration" not in out


def test_a_lost_best_checkpoint_is_made_up_for(start, after, monkeypatch):
    """When the disk was full at the lowest loss, best.pt is written as soon as it can be."""
    monkeypatch.setattr(train, "save_checkpoint", full)
    after(4, lambda: monkeypatch.setattr(train, "save_checkpoint", save_checkpoint))
    assert load_checkpoint(start(learning_rate=1e-30) / "best.pt")["step"] == 5  # the loss stays


# ---- what is minimised, and how


def test_loss_by_hand(make_run):
    """losses() is the cross-entropy plus the auxiliary losses times their coefficients; gradients too."""
    run = make_run(balance_coef=0.3, z_coef=0.2, entropy_coef=0.5)
    inputs = []
    for block in run.model.blocks:
        block.mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    x, y = train.batch(run, 0)
    cross_entropy = F.cross_entropy(run.model(x)[0].flatten(0, 1), y.flatten())
    by_hand = cross_entropy
    for h, block in zip(list(inputs), run.model.blocks):
        logits = h @ block.mlp.gate.weight.T
        scores = logits.softmax(-1)
        mask = ref_seqtopk(scores.detach(), 2)
        share, probability = mask.sum((0, 1)) / mask.sum(), scores.mean((0, 1))
        balance, z = 4 * (share * probability).sum(), (logits.exp().sum(-1).log() ** 2).mean()
        entropy = torch.special.entr(scores).sum(-1).mean()
        by_hand = by_hand + (0.3 * balance + 0.2 * z + 0.5 * entropy) / 2
    total, loss, _ = train.losses(run, x, y)
    torch.testing.assert_close(total, by_hand)
    torch.testing.assert_close(loss, cross_entropy.detach())
    parameters = list(run.model.parameters())
    gradients = [torch.autograd.grad(value, parameters) for value in (total, by_hand)]
    torch.testing.assert_close(*gradients)


def test_one_iteration_by_hand(make_run):
    """An iteration is a step of AdamW on the clipped gradient; matrices decay, vectors do not."""
    run = make_run(grad_clip=0.5, weight_decay=0.2, warmup_iters=1)
    parameters = list(run.model.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    total, loss, _ = train.losses(run, *train.batch(run, 0))
    gradients = torch.autograd.grad(total, parameters)
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    assert norm > 0.5
    torch.testing.assert_close(train.train_step(run), torch.stack([loss, norm]))
    lr = 0.01 / 2
    for parameter, old, gradient in zip(parameters, before, gradients):
        decay = 0.2 if parameter.dim() > 1 else 0.0
        step = gradient * 0.5 / norm
        mean = run.optimizers[0].state[parameter]["exp_avg"]
        torch.testing.assert_close(mean, 0.1 * step, rtol=1e-3, atol=1e-8)
        expected = old * (1 - lr * decay) - lr * step / (step.abs() + 1e-8)
        large = step.abs() > 1e-5  # below, rounding in the sum of a gradient decides
        torch.testing.assert_close(parameter[large], expected[large])


def test_half_precision_is_autocast(make_run):
    """Under bfloat16 the forward rounds, and weights, loss and routing scores stay float32."""
    exact, rounded = make_run(), make_run(dtype="bfloat16")
    x, y = train.batch(exact, 0)
    (_, a, _), (_, b, stats) = train.losses(exact, x, y), train.losses(rounded, x, y)
    assert a != b and a.item() == pytest.approx(b.item(), rel=0.02)
    assert {t.dtype for t in (b, stats.z_loss, stats.routing[0].scores)} == {torch.float32}
    train.train_step(rounded)
    assert {weight.dtype for weight in rounded.model.parameters()} == {torch.float32}


def test_gradient_accumulation_is_a_larger_batch(start, seen):
    """Two micro-batches of 4 see the windows of one batch of 8, in order, and lead to the same weights."""
    settings = {"max_iters": 3, "balance_coef": 0}  # balance is not a mean over sequences
    halves = start("halves", batch_size=4, gradient_accumulation_steps=2, **settings)
    whole = start("whole", batch_size=8, **settings)
    assert len(seen) == 9
    for name in ("x", "y"):
        windows = [getattr(call, name) for call in seen]
        assert torch.equal(torch.cat(windows[:6]), torch.cat(windows[6:]))
    for a, b in zip(entries(halves, "train"), entries(whole, "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    a, b = (load_checkpoint(folder / "last.pt")["model"] for folder in (halves, whole))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_bias_by_hand(start, seen):
    """Each iteration moves the bias of an expert up by bias_rate if it got less than the mean of the whole
    iteration, micro-batches together, and down if it got more."""
    folder = start(max_iters=2, gradient_accumulation_steps=2, bias_rate=0.01)
    bias = torch.zeros(2, 4)
    for first, second in (seen[:2], seen[2:]):
        load = (first.stats.load + second.stats.load).tolist()
        for layer, row in enumerate(load):
            for expert, got in enumerate(row):
                bias[layer, expert] += 0.01 * ((got < sum(row) / 4) - (got > sum(row) / 4))
    model = load_checkpoint(folder / "last.pt")["model"]
    assert bias.any()
    torch.testing.assert_close(torch.stack([model[f"blocks.{n}.mlp.bias"] for n in range(2)]), bias)


def test_k_may_change_beside_a_dense_layer(start):
    """Its width, k * n_hidden where none is given, stays what it was."""
    begun = start(n_dense_layer=1, k=2, max_iters=1) / "last.pt"
    tuned = load_checkpoint(start("tuned", init_from=begun, k=1, max_iters=1) / "last.pt")
    assert tuned["config"]["k"] == 1 and tuned["config"]["dense_hidden"] == 2 * TINY["n_hidden"]


LEARNING = {
    "expert_threshold": {"score_fn": "sigmoid", **WARM_UP},
    "remoe": {"score_fn": "relu", "k": 1, "first_router": "top_p", "mass": 0.9, "first_iters": 1},
}


@pytest.mark.parametrize("router", LEARNING)
def test_what_a_router_learns_by_hand(start, seen, router):
    """Each iteration makes one update of the state of all layers, from its micro-batches together, whichever
    router routes; a run that begins from the checkpoint goes on with it."""
    begun = start(router=router, gradient_accumulation_steps=2, max_iters=4, **LEARNING[router]) / "last.pt"
    start("tuned", router=router, init_from=begun, max_iters=1, **LEARNING[router])
    last = load_checkpoint(begun)
    row, config = ROUTERS[router], MoEConfig(**last["config"])
    state = {name: torch.stack([tensor] * 2) for name, tensor in row.state(config).items()}
    for step in range(4):
        calls = seen[2 * step : 2 * step + 2]
        for name, tensor in state.items():
            layers = [calls[0].weights[f"blocks.{n}.mlp.state.{name}"] for n in range(2)]
            assert_same(torch.stack(layers), tensor)
        micro = [Routing(*map(torch.stack, zip(*call.stats.routing))) for call in calls]
        routing = Routing(*(torch.cat(parts, dim=1).detach() for parts in zip(*micro)))  # (L, 2*B, T, E)
        state = row.update(state, routing, config)
    assert_same(seen[8].weights, last["model"])


@pytest.mark.parametrize("first", [{}, {"first_router": "topk", "first_iters": 1}], ids=["remoe", "topk"])
def test_the_loss_of_a_router_by_hand(make_run, first):
    """Under remoe, and only under it, its L1 loss, weighed by its state, is added: the mean over layers."""
    run = make_run(router="remoe", score_fn="relu", balance_coef=0, z_coef=0, **first)
    for layer in run.model.expert_layers():
        layer.router_state()["l1_coef"].fill_(0.25)
    total, loss, stats = train.losses(run, *train.batch(run, 0))
    scores = torch.stack([layer.scores for layer in stats.routing])  # (L, B, T, E)
    l1 = (stats.load[:, None, None] * 4 / (2 * 4 * 32) * scores).sum(-1).mean()
    torch.testing.assert_close(total, loss if first else loss + 0.25 * l1)


def test_the_first_router_is_first(start, seen):
    """first_router trains first_iters iterations, then router; the causal loss is router's throughout."""
    folder = start(max_iters=4, eval_interval=1, router="online_seqtopk", first_router="topk", first_iters=2)
    for step, call in enumerate(seen):
        assert (call.stats.n_taken == 2).all() == (step < 2)
    lines = entries(folder, "eval")
    assert [line["as_trained"] == line["causal"] for line in lines] == [False] * 2 + [True] * 3
    assert all(line["as_trained"]["experts"] == [2, 2, 2] for line in lines[:2])


@pytest.mark.parametrize("router", ["top_p", "expert_threshold"])
def test_a_topk_checkpoint_goes_on_without_a_budget(start, tmp_path, router):
    """A TopK run of the same scores is tuned under another router, cutoffs found in the first iteration."""
    settings = SETTINGS[router] if router == "expert_threshold" else {}
    begun = start("begun", router="topk", **settings)
    tuned = start("tuned", router=router, init_from=begun, warmup_iters=0, learning_rate=1e-3, max_iters=5)
    before, (first, last) = entries(begun, "eval")[-1], entries(tuned, "eval")
    assert last["causal"]["loss"] < before["causal"]["loss"] + 0.1
    if router == "expert_threshold":
        assert first["causal"]["experts"] == [0, 0, 0] and first["causal"]["entropy"] == 0
        assert 1 < last["causal"]["experts"][0] < 3


def test_learning_rate_by_hand():
    """Linear warm-up to the peak, half-way down at half the time, min_lr from lr_decay_iters on; by default a
    tenth of the peak at max_iters. Warm-up may be nothing or all."""
    config = TrainConfig(learning_rate=1.0, min_lr=0.2, warmup_iters=10, lr_decay_iters=110, max_iters=500)
    short = TrainConfig(learning_rate=0.5, warmup_iters=0, max_iters=20)
    by_hand = {0: 1 / 11, 4: 5 / 11, 9: 10 / 11, 10: 1.0, 60: 0.6, 110: 0.2, 111: 0.2, 499: 0.2}
    by_hand[35] = 0.6 + 0.4 * math.sqrt(0.5)
    for settings, rates in (
        (config, by_hand),
        (short, {0: 0.5, 10: 0.275, 20: 0.05}),
        (replace(short, warmup_iters=20), {19: 0.5 * 20 / 21}),
    ):
        assert {step: train.learning_rate(settings, step) for step in rates} == pytest.approx(rates)
    slopes = np.diff([train.learning_rate(config, step) for step in range(500)])
    assert (slopes[:10] > 0).all() and (slopes[10:110] < 0).all()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_optimisers_get_the_learning_rate(start, optimizer):
    """The rate in the log and in the optimisers is the schedule's for the iteration that was just done, the
    embedding's so many times more."""
    folder = start(optimizer, optimizer=optimizer, embedding_boost=3, max_iters=4)
    last = load_checkpoint(folder / "last.pt")
    config = TrainConfig(**last["train_config"])
    rates = [train.learning_rate(config, step) for step in range(4)]
    assert [entry["lr"] for entry in entries(folder, "train")] == rates
    groups = [group for each in last["optimizers"] for group in each["param_groups"]]
    assert [group["lr"] / rates[-1] for group in groups[:3]] == pytest.approx([1, 1, 3])
    assert {group["lr"] for group in groups[3:]} == ({rates[-1]} if optimizer == "muon" else set())


# ---- evaluation


def evaluate_by_hand(run, router):
    """evaluate(), one window at a time, over all of the validation data."""
    T, tokenizer = run.config.block_size, run.dataset.tokenizer
    tokens = torch.from_numpy(np.array(run.dataset.val, dtype=np.int64))
    nats, experts, load, n_bytes = [], [], torch.zeros(2, 4), 0
    for i in range(0, len(tokens) - T, T):
        logits, _, stats = run.model(tokens[None, i : i + T], router=router)
        targets = tokens[i + 1 : i + T + 1]
        nats += [-row[target].item() for row, target in zip(logits[0].double().log_softmax(-1), targets)]
        n_bytes += len(tokenizer.decode_bytes(t for t in targets.tolist() if t != tokenizer.eot))
        experts += stats.n_taken.flatten().tolist()
        load += stats.load
    shares = (load / load.sum(-1, keepdim=True)).tolist()
    of_uniform = [4 * share for row in shares for share in row]  # of 2 layers; the mean is 1
    return {
        "loss": sum(nats) / len(nats),
        "bpb": sum(nats) / math.log(2) / n_bytes,
        "experts": [sum(experts) / len(experts), min(experts), max(experts)],
        "entropy": -sum(p * math.log(p) for row in shares for p in row if p) / 2 / math.log(4),
        "variance": sum((p - 1) ** 2 for p in of_uniform) / 4 / 2,
        "dead": (load == 0).sum().item(),
    }


@pytest.mark.parametrize("router", ["topk", "seqtopk", "online_seqtopk"])
def test_evaluation_by_hand(make_run, router):
    """Loss per token, bits per byte, experts per token, entropy, variance and dead experts, over windows that
    do not fill the last batch."""
    run = make_run(eval_windows=1000, batch_size=3)
    val, n_bytes = run.dataset.val, run.dataset.tokenizer.token_bytes
    n_windows = (len(val) - 1) // 32
    assert n_windows % 3 != 0 and n_bytes[val[0]] != n_bytes[val[n_windows * 32]]
    run.model.blocks[0].mlp.bias[3] = -100.0  # an expert that nobody selects
    with torch.no_grad():
        by_hand = evaluate_by_hand(run, router)
    result = train.evaluate(run, router)
    assert by_hand["dead"] == 1 and result.keys() == by_hand.keys()
    for key, value in by_hand.items():
        assert result[key] == pytest.approx(value, rel=1e-5), key
    assert result["bpb"] < result["loss"]  # fewer than ln 2 tokens to a byte


def test_evaluation_is_a_function_of_the_weights(make_run):
    """Neither random state, nor training batches, nor the iteration change a loss. Evaluations, and the
    estimate of the time, change no weight, no gradient and no random state."""
    run = make_run()
    before = train.evaluate(run, "seqtopk")
    weights = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    train.losses(run, *train.batch(run, 3))
    run.step = 7
    for seed in (1, 99):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        assert train.evaluate(run, "seqtopk") == before
        said = r"about [\d.]+ (minutes|hours) on this machine, evaluations not counted"
        assert re.fullmatch(said, ESTIMATE(run))
        assert torch.equal(torch.get_rng_state(), state)
    assert_same(dict(run.model.state_dict()), weights)
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_evaluation_does_not_change_training(start):
    """However often and on however much a run is evaluated, the same weights come out."""
    often = start("often", eval_interval=1, eval_windows=7, max_iters=3)
    never = start("never", eval_interval=100, eval_windows=1, max_iters=3)
    assert len(entries(often, "eval")) == 4 and len(entries(never, "eval")) == 2
    a, b = load_checkpoint(often / "last.pt"), load_checkpoint(never / "last.pt")
    assert_same([a["model"], a["optimizers"]], [b["model"], b["optimizers"]])
    losses = [[entry["loss"] for entry in entries(folder, "train")] for folder in (often, never)]
    assert losses[0] == losses[1]


def test_routers_start_alike(make_run):
    """Runs that differ in the router begin with the same weights and see the same batches; seeds differ in
    both."""

    def begin(**settings):
        run = make_run(**settings)
        return dict(run.model.named_parameters()), train.batch(run, 0)

    weights, batch = begin(router="topk")
    for router in ROUTERS:
        theirs, their_batch = begin(router=router, **SETTINGS.get(router, {}))
        # of gates the rows that are not of null experts
        assert_same({name: weight[: len(weights[name])] for name, weight in theirs.items()}, weights)
        assert_same(their_batch, batch)
    theirs, their_batch = begin(router="topk", seed=1)
    assert not torch.equal(theirs["head.weight"], weights["head.weight"])
    assert not torch.equal(their_batch[0], batch[0])


# ---- stopping and going on


def terminate():
    signal.raise_signal(signal.SIGTERM)


def crash():
    raise RuntimeError("the power fails")


@pytest.mark.parametrize(
    ("settings", "stops"),  # after which iteration, how, and the iteration that last.pt then holds
    [
        (LONG, [(1, interrupt, 1), (3, crash, 1), (6, crash, 5), (7, terminate, 7), (8, crash, 7)]),
        (LONG, [(10, terminate, 10), (11, interrupt, 11)]),
        ({"router": "expert_threshold", "score_fn": "sigmoid", **WARM_UP}, [(4, interrupt, 4)]),
        ({"router": "remoe", "score_fn": "relu", "balance_coef": 0}, [(4, interrupt, 4)]),
        ({"optimizer": "muon", "gradient_accumulation_steps": 2}, [(2, interrupt, 2), (7, crash, 5)]),
        ({"optimizer": "muon", "weights_dtype": "bfloat16", "norm_best": 2}, [(4, terminate, 4)]),
        ({"router": "null_experts", "norm_topk": True, "n_null": 4, "bias_rate": 0.01}, [(4, interrupt, 4)]),
        ({"first_router": "topk", "first_iters": 7}, [(4, interrupt, 4)]),
        ({"dtype": "float16"}, [(4, interrupt, 4)]),
        ({"init_from": "topk_run", "max_iters": 4}, [(3, interrupt, 3)]),
    ],
    ids="often late cutoffs remoe muon rounding null first_router scaled tuned".split(),
)
def test_stopped_anywhere_a_run_goes_on(
    straight, start, after, dataset, topk_run, tmp_path, capsys, settings, stops
):
    """Stopped by Ctrl-C, SIGTERM or a crash after any iteration, evaluated there or not, a run goes on bit
    for bit: checkpoints and log become those of a run that nothing stopped. Signals do what they did."""
    handlers = list(map(signal.getsignal, signal.Signals))
    if settings is not LONG:
        settings = {"max_iters": 8} | settings | ({"init_from": topk_run} if "init_from" in settings else {})
        straight = start("straight", **settings)
    folder, command = tmp_path / "run", f"python train.py --out_dir={tmp_path / 'run'} --init_from=resume"
    argv = flags(**TINY | settings, dataset=dataset, out_dir=folder)
    for step, how, saved in stops:
        after(step, how)
        with pytest.raises(RuntimeError if how is crash else SystemExit) as stop:
            train.main(argv)
        assert load_checkpoint(folder / "last.pt")["step"] == saved
        if how is crash:
            with open(folder / "log.jsonl", "a") as log:
                log.write('{"kind": "train", "st')
        else:
            out = capsys.readouterr().out
            assert stop.value.code == 130 and f"saved iteration {step}" in out and command in out
        argv = shlex.split(command)[2:]
    train.main(argv)
    assert_same_runs(folder, straight)
    assert list(map(signal.getsignal, signal.Signals)) == handlers


def test_a_finished_run_can_be_made_longer(dataset, straight, tmp_path):
    """With lr_decay_iters it becomes the run that was long from the start; resumed again, it stays that."""
    folder = tmp_path / "run"
    train.main(flags(**LONG | {"max_iters": 5, "lr_decay_iters": 12}, dataset=dataset, out_dir=folder))
    for _ in range(2):
        train.main(flags(init_from="resume", out_dir=folder, max_iters=12))
        assert_same_runs(folder, straight)


@pytest.mark.parametrize(
    "new",
    [
        {"weight_decay": 0.03, "beta1": 0.7, "beta2": 0.8, "learning_rate": 0.003, "max_iters": 14}
        | {"embedding_boost": 5.0, "router": "topk"},
        {"max_iters": 13, "router": "online_seqtopk", "dtype": "float16"},
    ],
    ids=str,
)
def test_resume_obeys_new_settings(straight, tmp_path, new):
    """What may change when resuming does change, the router and the number format too: nothing is taken and
    then silently dropped."""
    folder = shutil.copytree(straight, tmp_path / "run")
    train.main(flags(init_from="resume", out_dir=folder, **new))
    last = load_checkpoint(folder / "last.pt")
    config = TrainConfig(**last["train_config"])
    assert {name: getattr(config, name) for name in new} == new and last["step"] == config.max_iters
    assert last["config"]["router"] == config.router
    groups, betas = last["optimizers"][0]["param_groups"], (config.beta1, config.beta2)
    decays = [(group["weight_decay"], group["betas"]) for group in groups]
    assert decays == [(config.weight_decay, betas), (0.0, betas), (config.weight_decay, betas)]
    assert entries(folder, "train")[-1]["lr"] == train.learning_rate(config, config.max_iters - 1)
    if "dtype" in new:  # and from a format whose gradients are scaled to another
        train.main(flags(init_from="resume", out_dir=folder, max_iters=14, dtype="bfloat16"))
        assert load_checkpoint(folder / "last.pt")["step"] == 14


def test_ctrl_c_from_a_shell(start, dataset, tmp_path):
    """A real SIGINT to a real process: exit code 130, no traceback, and the printed command goes on bit for
    bit."""
    folder, settings = tmp_path / "run", {"eval_interval": 10**4, "lr_decay_iters": 50}
    argv = flags(**TINY | settings | {"max_iters": 10**4}, dataset=dataset, out_dir=folder)
    with subprocess.Popen(
        [sys.executable, "-u", ROOT / "train.py", *argv],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        next(line for line in process.stdout if line.startswith("     0 "))  # the first evaluation
        process.send_signal(signal.SIGINT)
        out = process.stdout.read()
    assert process.returncode == 130 and "Traceback" not in out
    step = load_checkpoint(folder / "last.pt")["step"]
    command = next(line for line in out.splitlines() if "--init_from=resume" in line)
    script, *argv = shlex.split(command)[1:]
    assert script == "train.py" and 1 <= step < 10**4
    train.main([*argv, f"--max_iters={step + 2}"])
    assert_same_runs(folder, start("straight", **settings, max_iters=step + 2), "last.pt")


def test_divergence_keeps_the_last_good_checkpoint(start, tmp_path, capsys):
    """A loss that is no number ends the run with one line; last.pt is sound, and resuming with a lower rate
    goes on to the end."""
    folder = tmp_path / "run"
    err = error_line(capsys, lambda argv: start(learning_rate=1e30, max_iters=8, grad_clip=0))
    assert "nan" in err and "learning_rate below 1e+30" in err and str(folder / "last.pt") in err
    for name in ("last.pt", "best.pt"):
        checkpoint = load_checkpoint(folder / name)
        assert all(weight.isfinite().all() for weight in checkpoint["model"].values())
        assert checkpoint["step"] == 0
    train.main(flags(init_from="resume", out_dir=folder, learning_rate=1e-3))
    assert load_checkpoint(folder / "last.pt")["step"] == 8
    assert all(math.isfinite(entry["causal"]["loss"]) for entry in entries(folder, "eval"))
    assert [entry["step"] for entry in entries(folder, "train")] == list(range(1, 9))


@pytest.mark.parametrize("broken", ["loss", "gradient", "validation", "loss before ctrl-c"])
def test_whatever_is_not_finite_stops_the_run(start, tmp_path, capsys, monkeypatch, broken):
    """A training loss, gradient or validation loss that is not finite is never followed by a checkpoint."""
    train_step, evaluate = train.train_step, train.evaluate

    def step(run):
        metrics = train_step(run)
        if run.step == 3 and "loss" in broken:
            metrics[0] = math.nan
        if run.step == 3 and broken == "gradient":
            metrics[1] = math.inf
        if run.step == 3 and "ctrl-c" in broken:
            interrupt()
        return metrics

    def validate(run, router):
        diverged = run.step == 4 and broken == "validation"
        return evaluate(run, router) | ({"loss": math.nan} if diverged else {})

    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(train, "evaluate", validate)
    error_line(capsys, lambda argv: start(max_iters=4, eval_interval=2, log_interval=100))
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2


def test_an_old_run_is_moved_aside(start, tmp_path, capsys, monkeypatch):
    """Starting again in the same folder, a volume of its own here, loses nothing of what was there, be it a
    checkpoint without its log, and moves nothing that is not the run's; resuming moves nothing."""
    kept, others = [], {"other/last.pt": b"another run", "notes": b"mine"}

    def within(move, old, new):
        if "run" in Path(old).parts and "run" not in Path(new).parts:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        move(old, new)

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, partial(within, getattr(os, name)))
    for name, content in others.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(content)
    for n in range(3):
        folder = start(max_iters=n + 1)
        if n == 1:
            (folder / "log.jsonl").unlink()
        kept.append(dict(contents(folder).items() - others.items()))
        assert len(kept[-1]) == len(contents(folder)) - 2
    assert f"{folder} is now in {folder}.2" in capsys.readouterr().out
    train.main(flags(init_from="resume", out_dir=folder, max_iters=4))
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.1", "run.2"}
    assert [contents(tmp_path / name) for name in ("run.1", "run.2")] == kept[:2]
    assert load_checkpoint(folder / "last.pt")["step"] == 4


# ---- fine-tuning


@pytest.mark.parametrize(("name", "block_size"), [("", 32), ("best.pt", 16), ("last.pt", 64)])
def test_fine_tuning_under_another_router(dataset, topk_run, tmp_path, seen, name, block_size):
    """A TopK run opens under SeqTopK, from its folder (best.pt) or a file: its weights and architecture, and
    in all else, the length of sequences too, a new run; the old one stays."""
    before, folder = contents(topk_run), tmp_path / "tuned"
    settings = RUN | {"max_iters": 2, "router": "seqtopk", "block_size": block_size}
    settings["init_from"] = topk_run / name
    train.main(flags(**settings, dataset=dataset, out_dir=folder))
    assert_same(seen[0].weights, load_checkpoint(topk_run / (name or "best.pt"))["model"])
    last = load_checkpoint(folder / "last.pt")
    wanted = SHAPE | {"router": "seqtopk", "block_size": block_size}
    assert {key: last["config"][key] for key in wanted} == wanted and last["step"] == 2
    adamw, muon = last["optimizers"]
    assert {state["step"].item() for state in adamw["state"].values()} == {2.0}
    assert {group["step"] for group in muon["param_groups"]} == {2}
    evals = entries(folder, "eval")
    assert evals[0]["step"] == 0 and evals[0]["causal"] != evals[0]["as_trained"]
    assert contents(topk_run) == before


def test_what_a_checkpoint_fixes():
    """The architecture, but not the routing, and the order of the data when resuming."""
    fixed = {*train.architecture()}
    assert fixed >= {*"n_embd n_expert n_layer score_fn tie_embeddings n_kv_head rope_theta".split()}
    assert not fixed & {"router", "k", "max_experts", "block_size", *train.DATA_ORDER}
    of_data = "batch_size gradient_accumulation_steps block_size seed dataset"
    assert {*train.DATA_ORDER} >= {*of_data.split()}


@pytest.mark.parametrize(
    ("how", "name", "value", "old"),
    [
        ("fine-tune", "n_embd", 64, 32),
        ("resume", "n_embd", 64, 32),
        ("resume", "rope_theta", 500, 10000.0),
        ("resume", "batch_size", 5, 4),
        ("resume", "dataset", "shakespeare", "dataset"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused(
    fails, topk_run, dataset, tmp_path, how, name, value, old
):
    """Another architecture, and another order of the data when resuming: named with both values."""
    folder = shutil.copytree(topk_run, tmp_path / "run")
    argv = {"init_from": "resume"} if how == "resume" else {"init_from": topk_run, "dataset": dataset}
    err = fails(*flags(**argv | {"out_dir": folder, name: value}))
    assert re.search(rf"\b{name} .*{old}.* {value}\b", err, re.IGNORECASE)


@pytest.mark.parametrize("how", ["fine-tune", "resume"])
def test_another_vocabulary_is_refused(fails, topk_run, tmp_path, how):
    """A checkpoint is not trained on with token ids that mean something else, however many there are."""
    folder = shutil.copytree(topk_run, tmp_path / "run")
    other = write_dataset(tmp_path / "data", 290)
    argv = flags(init_from=topk_run, dataset=other, out_dir=folder)
    if how == "resume":
        last = torch.load(folder / "last.pt", weights_only=True)
        last["train_config"]["dataset"] = str(other)  # prepared anew since
        torch.save(last, folder / "last.pt")
        argv = flags(init_from="resume", out_dir=folder)
    err = fails(*argv)
    assert "vocabulary" in err and str(other) in err


def test_other_tokens_under_the_same_name_are_not_trained_on(fails, start, dataset, tmp_path):
    """A dataset that was prepared anew with another split is no longer the run's, whatever its source; one
    that was prepared anew and is the same still is."""
    folder = shutil.copytree(dataset, tmp_path / "data")
    run, tokenizer = start(dataset=folder, max_iters=2), data.load(str(dataset)).tokenizer
    argv = flags(init_from="resume", out_dir=run, max_iters=3)
    write_dataset(folder)
    train.main(argv)
    data.write_dataset(folder, ["".join(TEXT[:61])], TEXT[61:81], tokenizer, "0" * 64)
    assert "prepared anew, with other tokens" in fails(*argv)


def test_what_is_said_of_settings_that_leave_nothing(start, capsys):
    """Warm-up that never ends, a run that is finished, and no experts to show in a dense model."""
    run = start(max_iters=2, warmup_iters=9, sample_tokens=2, **DENSE)
    out = capsys.readouterr().out
    assert "warm-up takes all 2: lower --warmup_iters" in out
    assert out.endswith(f"--- more: python sample.py --out_dir={run}\n")
    train.main(flags(init_from="resume", out_dir=run))
    assert "all 2 iterations are done: go on with a higher --max_iters" in capsys.readouterr().out


# ---- bad input


def test_what_no_number_may_be():
    """Every number is refused below zero, and at zero where it is a size, a count, an interval or a divisor:
    one line with its name, the value and what is allowed."""
    kinds = {field.name: str(getattr(field.type, "__name__", field.type)) for field in fields(TrainConfig)}
    numbers = [name for name, kind in kinds.items() if kind.split(" ")[0] in ("int", "float")]
    assert len(numbers) > 30
    above = "block_size n_layer n_head n_kv_head n_embd n_expert k n_hidden rope_theta batch_size max_iters"
    above += " gradient_accumulation_steps learning_rate eval_interval eval_windows log_interval"
    for name, value in [(name, -1) for name in numbers] + [(name, 0) for name in above.split()]:
        with pytest.raises(ValueError, match=rf"^{name}\b.*is {value}\b.*, but must be .*$"):
            TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--beta2=1", "beta2 is 1.0, but must be from 0 to below 1"),
        ("--n_exprt=4", "did you mean n_expert"),
        ("nowhere.py", "nowhere.py"),
        ("--router=topq", "router is topq, but must be one of topk, "),
        ("--device=tpu", "device is tpu, but this machine has cpu"),
        ("--device=cuda:99", "device is cuda:99, but this machine has cpu"),
        ("--dtype=int8", "dtype is int8, but must be auto, float32"),
        ("--compile=yes", "compile is yes, but must be auto, true or false"),
        ("--dataset=nowhere", "unknown dataset 'nowhere'; give arithmetic, "),
        ("--init_from=nowhere.pt", "no checkpoint at nowhere.pt"),
        ("--vocab_size=299", "vocab_size is 299, but must be 0 or the data's 300"),
        ("--vocab_size=301", "vocab_size is 301, but must be 0 or the data's 300"),
        ("--block_size=100000", "fewer than one window of block_size + 1 = 100001"),
        ("--seed=1000000000000000000000000000000", "seed"),
        (f"--max_iters=1{400 * '0'}", "is not allowed; give a whole number such as 8, below 2**63"),
        ("--n_embd=2147483648", "needs at least "),
        ("--n_layer=2147483648", "GB of memory, but cpu has "),
        ("--batch_size=1000000000000", "training with these sizes and this batch_size needs at least "),
        ("--min_lr=1", "min_lr is 1.0, but must be from 0 to learning_rate = 0.01, or none"),
        ("--router=remoe --score_fn=relu --bias_rate=0.1", "router remoe needs bias_rate=0"),
        ("--router=expert_threshold --score_fn=sigmoid --bias_rate=0.1", "needs bias_rate=0"),
        ("--router=top_p --bias_rate=0.1", "router top_p needs bias_rate=0"),
        ("--first_router=expert_choice", "first_iters is 0, but must be at least 1 for first_router"),
        ("--first_iters=5", "first_router is None, but must be one of topk, "),
        ("--first_router=topp --first_iters=5", "first_router is topp, but must be one of topk, "),
        ("--first_router=remoe --first_iters=5", "router remoe needs score_fn=relu"),
        ("--train_only=experts", "train_only is experts, but must be all or router"),
        ("--train_only=router --n_expert=1 --k=1", "train_only is router, but must be all in a dense model"),
        ("--weights_dtype=float16", "weights_dtype is float16, but must be float32 or bfloat16"),
        ("--weights_dtype=bfloat16 --dtype=float16", "dtype is float16, but must be auto or bfloat16"),
        ("--weights_dtype=bfloat16 --shard", "weights_dtype is bfloat16, but must be float32 for shard"),
    ],
)
def test_bad_settings(fails, topk_run, dataset, tmp_path, argv, words):
    """Each is one line that names the value and what is allowed, and the run in out_dir stays where it is.

    (What config.parse and MoEConfig refuse is in their tests; here one of each reaches the command line.)
    """
    folder = shutil.copytree(topk_run, tmp_path / "run")
    assert words in fails(*flags(**TINY, dataset=dataset, out_dir=folder), *argv.split())


@pytest.mark.parametrize("damage", ["truncated", "short", "short val"])
def test_bad_data(fails, dataset, topk_run, tmp_path, damage):
    """Data that is damaged or too little is refused before anything is written."""
    folder, run = shutil.copytree(dataset, tmp_path / "data"), shutil.copytree(topk_run, tmp_path / "run")
    name, words = "train.bin", "4 tokens are fewer than one window of block_size + 1 = 33"
    if damage == "truncated":
        words = "train.bin has "
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])
    else:
        docs = {"short": (["abc"], TEXT), "short val": (TEXT, ["abc"])}[damage]
        name = "val.bin" if "val" in damage else name
        data.write_dataset(folder, *docs, data.load(str(dataset)).tokenizer, "0" * 64)
    err = fails(*flags(**TINY, dataset=folder, out_dir=run))
    assert name in err and words in err


@pytest.mark.parametrize("damage", ["truncated", "bare"])
@pytest.mark.parametrize("how", ["fine-tune", "resume"])
def test_bad_checkpoint(fails, topk_run, dataset, tmp_path, how, damage):
    """A checkpoint that is damaged, or has no more than weights and config, is refused."""
    folder = shutil.copytree(topk_run, tmp_path / "run")
    path = folder / "last.pt"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    else:  # as a converter may write it
        save_checkpoint(path, MoEGPT(MoEConfig(vocab_size=300, **SHAPE)))
    init_from = "resume" if how == "resume" else path
    assert "last.pt" in fails(*flags(init_from=init_from, dataset=dataset, out_dir=folder))


@pytest.mark.parametrize("below", ["", "run", "a/b"])
def test_unwritable_out_dir(fails, dataset, tmp_path, below):
    """A folder that cannot be made, because a file is in the way, is refused with its name."""
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" / below
    err = fails(*flags(**TINY, dataset=dataset, out_dir=folder))
    assert f"out_dir {folder} cannot be written" in err and "--out_dir" in err


def test_bad_input_ends_the_script(tmp_path, monkeypatch, capsys):
    """One line on stderr, nothing on stdout, exit code 2, no folder made."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main(["--k=99", "--dataset=arithmetic", "--out_dir=run"])
    err = "error: k is 99, but must be from 1 to n_expert = 16\n"
    assert stop.value.code == 2 and capsys.readouterr() == ("", err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["set_up", "train"])
@pytest.mark.parametrize(
    ("batch_size", "remedy"), [(4, "lower batch_size (4)"), (1, "--checkpoint_activations")]
)
def test_too_little_memory_is_one_line(dataset, tmp_path, monkeypatch, capsys, place, batch_size, remedy):
    """Of the GPU, where the model is made and compiled, or where it trains."""
    monkeypatch.setattr(train, place, Mock(side_effect=torch.OutOfMemoryError("no memory")))
    argv = flags(**TINY | {"batch_size": batch_size}, dataset=dataset, out_dir=tmp_path / "run")
    assert remedy in error_line(capsys, train.main, *argv)


# ---- settings and config files


CONFIGS = sorted(
    path
    for path in (ROOT / "config").glob("*.py")
    if path.stem not in ("__init__", "device", "files", "results")
)


def settings_of(path):
    return parse([str(path)], TrainConfig)[0]


def config_of(name):
    return TrainConfig(**settings_of(ROOT / "config" / f"{name}.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_file(path):
    """A config file is a valid configuration, holds only what differs from the defaults, and no out_dir."""
    given = settings_of(path)
    config = TrainConfig(**given)
    assert (ROOT / "data" / config.dataset / "prepare.py").is_file()
    assert "out_dir" not in given and ("init_from" in given) == path.stem.startswith("finetune_")
    if "init_from" in given:
        assert config.router == "seqtopk"
    elif "dense" in path.stem:
        assert config.n_expert == 1
    elif path.stem.endswith("topk"):
        assert path.stem.endswith(f"_{config.router}")


@pytest.mark.parametrize("name", ["tiny", "small", "arithmetic"])
def test_config_pairs_differ_in_the_router_only(name):
    """X_seqtopk.py builds on X_topk.py and changes nothing but the router."""
    topk = config_of(f"{name}_topk")
    assert topk.router == "topk" and replace(topk, router="seqtopk") == config_of(f"{name}_seqtopk")
    assert f"from config.{name}_topk import *" in (ROOT / "config" / f"{name}_seqtopk.py").read_text()


def test_the_dense_config_is_the_twin_of_the_small_ones():
    """small_dense has the active width of small_topk: k experts in one, and all else alike."""
    dense, topk = config_of("small_dense"), config_of("small_topk")
    assert replace(topk, n_expert=1, k=1, n_hidden=topk.k * topk.n_hidden, router=dense.router) == dense
