"""train.py: what it minimises, that a run stopped anywhere goes on as if it had not been, and bad input."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import SETTINGS, ref_seqtopk

import data
import train
from config import parse
from model import MoEConfig, MoEGPT, load_checkpoint, routing_summary, save_checkpoint
from router import ROUTERS
from train import TrainConfig

ROOT = Path(__file__).parents[1]
ESTIMATE = train.estimate  # most tests do without, for the forwards that they count
TEXT = [
    f"def f{i}(x):\n    return x * {i * 7919 % 1000} + {i}\n\nprint(f{i}({i * 31 % 100}))\n"
    for i in range(100)
]
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_expert": 4, "k": 2, "n_hidden": 16}
TINY = SHAPE | {
    "block_size": 32,
    "batch_size": 4,
    "max_iters": 10,
    "learning_rate": 0.01,
    "warmup_iters": 2,
    "eval_interval": 5,
    "eval_windows": 4,
    "log_interval": 1,
    "sample_tokens": 0,
    "device": "cpu",
}
# 6 windows in an iteration, and about 60 in an epoch: iteration 10 begins in one epoch and ends in the next
WARM_UP = {"first_router": "expert_choice", "first_iters": 3}
LONG = TINY | {"batch_size": 3, "gradient_accumulation_steps": 2, "bias_rate": 0.01, "max_iters": 12}


def said(router):
    """What a router needs to be told, for the command line."""
    return {name: str(value).lower() for name, value in SETTINGS.get(router, {}).items()}


def flags(**settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def write_dataset(folder, vocab_size=300):
    tokenizer = data.train_bpe(TEXT, vocab_size, "tiny")
    data.write_dataset(folder, ["".join(TEXT[:60])], TEXT[60:81], tokenizer, "0" * 64, prompt="def ")
    return folder


def contents(folder):
    """Every file below a folder, and what is in it."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def entries(folder, kind=None):
    """Lines of a run's log, without what the clock says."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    lines = [line for line in lines if kind in (None, line["kind"])]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def assert_same(a, b):
    """Equal to the last bit, through lists and dictionaries."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == b


def assert_same_runs(a, b, *names):
    """Two runs' checkpoints agree in all that training goes on from."""
    for name in names:
        left, right = load_checkpoint(a / name), load_checkpoint(b / name)
        for key in ("model", "optimizer", "scaler", "step", "best"):
            assert_same(left[key], right[key])


@pytest.fixture(autouse=True, scope="module")
def no_estimate():
    """The only forwards are those of iterations and evaluations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "estimate", lambda run: "soon")
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def straight(dataset, tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train.main(flags(**LONG, dataset=dataset, out_dir=folder))
    return folder


@pytest.fixture(scope="module")
def topk_run(dataset, tmp_path_factory):
    """A short TopK run whose best.pt and last.pt differ."""
    folder = tmp_path_factory.mktemp("topk") / "run"
    train.main(flags(**TINY | {"max_iters": 2}, dataset=dataset, out_dir=folder, router="topk"))
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
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train.main(list(argv))
        err = capsys.readouterr().err
        assert stop.value.code == 2
        assert err.startswith("error: ") and err.count("\n") == 1 and err[-1] == "\n"
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
    """Do something, once, when a number of iterations have been done."""
    train_step = train.train_step

    def after(step, action):
        def spy(run):
            metrics = train_step(run)
            if run.step == step:
                monkeypatch.setattr(train, "train_step", train_step)
                action()
            return metrics

        monkeypatch.setattr(train, "train_step", spy)

    return after


# ---- a run


def test_training_lowers_the_loss(start):
    """A tiny model learns a tiny text: both the training and the validation loss fall by more than a nat."""
    folder = start(max_iters=40, eval_interval=20)
    for loss in (
        [entry["loss"] for entry in entries(folder, "train")],
        [entry["causal"]["loss"] for entry in entries(folder, "eval")],
    ):
        assert loss[0] == pytest.approx(math.log(300), abs=0.3) and loss[-1] < loss[0] - 1


@pytest.mark.parametrize(
    "settings",
    [
        {"n_expert": 1, "k": 1, "router": "topk"},
        {"norm_topk": "true"},
        {"score_fn": "sigmoid", "norm_topk": "true", "bias_rate": 0.01, "balance_coef": 0},
        {
            "shared_hidden": 16,
            "n_dense_layer": 1,
            "tie_embeddings": "true",
            "qk_norm": "head",
            "n_kv_head": 1,
        },
        {"router": "online_seqtopk", "strict": "false"},
        {"router": "expert_choice"},
        {"router": "top_p", "mass": 0.6, "entropy_coef": 1e-3},
        {"router": "expert_threshold", "score_fn": "sigmoid"},
        {"router": "expert_threshold", "score_fn": "sigmoid", **WARM_UP, "balance_coef": 0},
        {"router": "remoe", "score_fn": "relu", "balance_coef": 0},
        {"router": "null_experts", "norm_topk": "true", "n_null": 4, "bias_rate": 0.01},
        {"router": "batchtopk", "min_experts": 0, "max_experts": 3},
        {"dtype": "bfloat16"},
        {"dtype": "float16", "grad_clip": 0},
    ],
    ids=str,
)
def test_every_kind_of_model_learns(start, settings):
    """Dense, sigmoid, normalised, balanced by bias, shared expert, any router, half precision: all work."""
    folder = start(**settings)
    causal = [entry["causal"]["loss"] for entry in entries(folder, "eval")]
    assert [entry["step"] for entry in entries(folder, "eval")] == [0, 5, 10]
    assert causal[2] < causal[1] < causal[0] - 0.3


def test_what_a_run_leaves_behind(start, dataset):
    """The log has the training and evaluation lines with all their fields; last.pt and best.pt load."""
    folder = start(max_iters=7, log_interval=2)
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


@pytest.mark.parametrize("settings", [{}, {"n_expert": 1, "k": 1, "router": "topk"}], ids=["moe", "dense"])
def test_table(start, capsys, settings):
    """Each evaluation is a line under the header, column below column, the causal loss first."""
    folder = start(**settings)
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("  step "))
    assert "causal validation" in lines[header - 1] and "under " in lines[header - 1]

    def edges(line):
        return [match.end() for match in re.finditer(r"\S+", line)]

    for line, entry in zip(lines[header + 1 :], entries(folder, "eval")):
        words = line.split()
        assert edges(line) == edges(lines[header])
        assert int(words[0]) == entry["step"]
        values = [entry[which][unit] for which in ("causal", "as_trained") for unit in ("loss", "bpb")]
        assert words[2:6] == [f"{value:.4f}" for value in values]
        if not settings:
            mean, low, high = entry["causal"]["experts"]
            entropy, dead = entry["causal"]["entropy"], entry["causal"]["dead"]
            assert words[6:11] == [f"{mean:.2f}", str(low), str(high), f"{entropy:.3f}", str(dead)]


def test_choices_are_printed_with_their_reasons(start, capsys):
    """What auto chose for dtype and compile is said with a reason, beside sizes and the run's folder."""
    folder = start(max_iters=1)
    out = capsys.readouterr().out
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


def test_ends_with_a_sample(start, capsys, dataset):
    """The last lines are what the trained model generates from the data's prompt, and how to get more."""
    folder = start(max_iters=2, sample_tokens=20)
    printed = capsys.readouterr().out.split("--- sample\n")[1]
    text, more = printed.rsplit("--- more: ", 1)
    assert more == f"python sample.py --out_dir={folder} --show_experts\n"
    assert text.startswith("def ")
    model = MoEGPT.from_checkpoint(load_checkpoint(folder / "last.pt"))
    tokenizer, generator = data.load(str(dataset)).tokenizer, torch.Generator().manual_seed(1337)
    prompt = torch.tensor([tokenizer.encode("def ")])
    chunks = list(model.generate(prompt, 20, stop=tokenizer.eot, generator=generator))
    assert text == tokenizer.decode(torch.cat([chunk.tokens for chunk in chunks], 1)[0]) + "\n"


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
    made_up = {"bpb": 1.0, "experts": [2.0, 1, 4], "entropy": 1.0, "dead": 0}
    monkeypatch.setattr(
        train,
        "evaluate",
        lambda run, router: made_up | {"loss": next(causal) if ROUTERS[router].causal else 0.1},
    )
    folder = start(max_iters=4, eval_interval=1)
    assert (
        load_checkpoint(folder / "last.pt")["step"] == 4
        and load_checkpoint(folder / "last.pt")["best"] == 1.5
    )
    for max_iters, best in ((5, 3), (6, 6)):
        train.main(flags(init_from="resume", out_dir=folder, max_iters=max_iters))
        assert load_checkpoint(folder / "best.pt")["step"] == best


def test_a_full_disk_does_not_end_the_run(start, capsys, monkeypatch):
    """When a checkpoint cannot be written the run says so and goes on to its end."""

    def full(path, model, **extra):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "save_checkpoint", full)
    folder = start()
    assert entries(folder)[-1]["step"] == 10
    assert "last.pt could not be saved ([Errno 28] No space left on device)" in capsys.readouterr().out


# ---- what is minimised, and how


def test_loss_by_hand(make_run):
    """losses() is the cross-entropy plus the auxiliary losses times their coefficients; gradients too."""
    run = make_run(balance_coef=0.3, z_coef=0.2)
    inputs = []
    for block in run.model.blocks:
        block.mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    x, y = train.batch(run, 0)
    cross_entropy = F.cross_entropy(run.model(x)[0].flatten(0, 1), y.flatten())
    auxiliary = []
    for h, block in zip(list(inputs), run.model.blocks):
        logits = h @ block.mlp.gate.weight.T
        scores = logits.softmax(-1)
        mask = ref_seqtopk(scores.detach(), 2)
        share, probability = mask.sum((0, 1)) / mask.sum(), scores.mean((0, 1))
        auxiliary.append(
            0.3 * 4 * (share * probability).sum() + 0.2 * (logits.exp().sum(-1).log() ** 2).mean()
        )
    by_hand = cross_entropy + sum(auxiliary) / 2
    total, loss, _ = train.losses(run, x, y)
    torch.testing.assert_close(total, by_hand)
    torch.testing.assert_close(loss, cross_entropy.detach())
    parameters = list(run.model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(total, parameters), torch.autograd.grad(by_hand, parameters)
    )


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
        torch.testing.assert_close(
            run.optimizer.state[parameter]["exp_avg"], 0.1 * step, rtol=1e-3, atol=1e-8
        )
        expected = old * (1 - lr * decay) - lr * step / (step.abs() + 1e-8)
        large = step.abs() > 1e-5  # below, rounding in the sum of a gradient decides
        torch.testing.assert_close(parameter[large], expected[large])


def test_half_precision_is_autocast(make_run):
    """Under bfloat16 the forward rounds, and weights, loss and routing scores stay float32."""
    torch.manual_seed(0)
    exact, rounded = make_run(), make_run(dtype="bfloat16")
    x, y = train.batch(exact, 0)
    (_, a, _), (_, b, stats) = train.losses(exact, x, y), train.losses(rounded, x, y)
    assert a != b and a.item() == pytest.approx(b.item(), rel=0.02)
    assert b.dtype == stats.z_loss.dtype == torch.float32
    train.train_step(rounded)
    assert {weight.dtype for weight in rounded.model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("router", ["topk", "seqtopk"])
def test_gradient_accumulation_is_a_larger_batch(start, seen, router):
    """Two micro-batches of 4 see the windows of one batch of 8, in order, and lead to the same weights."""
    settings = {"max_iters": 3, "balance_coef": 0, "router": router}  # balance is not a mean over sequences
    halves = start("halves", batch_size=4, gradient_accumulation_steps=2, **settings)
    whole = start("whole", batch_size=8, **settings)
    assert len(seen) == 9
    assert torch.equal(torch.cat([call.x for call in seen[:6]]), torch.cat([call.x for call in seen[6:]]))
    assert torch.equal(torch.cat([call.y for call in seen[:6]]), torch.cat([call.y for call in seen[6:]]))
    for a, b in zip(entries(halves, "train"), entries(whole, "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    a, b = (load_checkpoint(folder / "last.pt")["model"] for folder in (halves, whole))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4)


def test_bias_by_hand(start, seen):
    """Each iteration moves the bias of an expert up by bias_rate if it got less than the mean of the whole
    iteration, micro-batches together, and down if it got more."""
    folder = start(max_iters=2, gradient_accumulation_steps=2, bias_rate=0.01)
    bias = torch.zeros(2, 4)
    for first, second in (seen[:2], seen[2:]):
        load = (first.stats.load + second.stats.load).tolist()
        for layer in range(2):
            mean = sum(load[layer]) / 4
            for expert in range(4):
                got = load[layer][expert]
                bias[layer, expert] += 0.01 * ((got < mean) - (got > mean))
    model = load_checkpoint(folder / "last.pt")["model"]
    assert bias.any()
    for layer in range(2):
        torch.testing.assert_close(model[f"blocks.{layer}.mlp.bias"], bias[layer])


def kth_by_hand(routing, rank):
    """The rank-th largest score of each expert in each layer (L, E)."""
    return torch.stack(
        [layer.scores.flatten(0, 1).sort(dim=0, descending=True).values[rank - 1] for layer in routing]
    )


@pytest.mark.parametrize("first, then", [("expert_choice", "expert_threshold"), ("expert_threshold", "topk")])
def test_cutoffs_by_hand(start, seen, first, then):
    """Each iteration moves a cutoff towards the score at which its expert would have taken its share of each
    micro-batch, from the first on, whichever router routes."""
    settings = {"first_router": first, "first_iters": 2, "router": then, "score_fn": "sigmoid"}
    folder = start(gradient_accumulation_steps=2, max_iters=3, **settings)
    cutoff = torch.ones(2, 4)
    for step in range(3):
        kth = [kth_by_hand(call.stats.routing, 4 * 32 * 2 // 4) for call in seen[2 * step : 2 * step + 2]]
        cutoff = cutoff + 10 / (step + 10) * ((kth[0] + kth[1]) / 2 - cutoff)
    model = load_checkpoint(folder / "last.pt")["model"]
    for layer in range(2):
        torch.testing.assert_close(1 - model[f"blocks.{layer}.mlp.bias"], cutoff[layer])
    exact = [ROUTERS[router].exact for router in (first, first, then) for _ in range(2)]
    assert [call.stats.load.sum().item() == 2 * 4 * 32 * 2 for call in seen] == exact


@pytest.mark.parametrize("k", [1, 3])
def test_the_weight_of_remoes_loss_by_hand(start, seen, k):
    """It is 1.2 times what it was after each iteration under remoe that spent more than k per token, a 1.2th
    after others, and never less than at first."""
    warm_up = {"first_router": "top_p", "mass": 0.9, "first_iters": 1}
    settings = {"router": "remoe", "score_fn": "relu", "max_iters": 4, "gradient_accumulation_steps": 2}
    folder = start(**settings, **warm_up, k=k)
    coef = 1e-8
    for first, second in zip(seen[2::2], seen[3::2]):
        spent = (first.stats.load + second.stats.load).sum().item()
        coef = max(1e-8, coef * (1.2 if spent > 2 * 2 * 4 * 32 * k else 1 / 1.2))
    assert load_checkpoint(folder / "last.pt")["l1_coef"].item() == pytest.approx(coef, rel=1e-5)


def test_tuning_goes_on_with_the_weight_of_remoes_loss(start):
    """A run that begins from a ReMoE checkpoint moves the weight that the checkpoint has."""
    settings = {"router": "remoe", "score_fn": "relu"}
    begun = start("begun", **settings)
    tuned = start("tuned", **settings, init_from=begun, max_iters=1)
    paths = begun / "best.pt", tuned / "last.pt"
    before, after = (load_checkpoint(path)["l1_coef"].item() for path in paths)
    assert before > 2e-8 and max(after / before, before / after) == pytest.approx(1.2)


def test_losses_of_routers_by_hand(make_run):
    """The weighted entropy is added where asked for, and under remoe the L1 loss with its own weight."""
    run = make_run(router="remoe", score_fn="relu", balance_coef=0, z_coef=0, entropy_coef=0.5)
    run.l1_coef = torch.tensor(0.25)
    total, loss, stats = train.losses(run, *train.batch(run, 0))
    scores = torch.stack([layer.scores for layer in stats.routing])  # (L, B, T, E)
    share = scores / scores.sum(-1, keepdim=True).clamp(min=1e-9)
    entropy = torch.special.entr(share).sum(-1).mean()
    l1 = (stats.load[:, None, None] * 4 / (2 * 4 * 32) * scores).sum(-1).mean()
    torch.testing.assert_close(total, loss + 0.5 * entropy + 0.25 * l1)
    later = {"router": "remoe", "score_fn": "relu", "first_router": "topk", "first_iters": 1}
    for settings in ({"router": "topk"}, later):
        run = make_run(**settings, balance_coef=0, z_coef=0)
        run.l1_coef = torch.tensor(0.25)
        total, loss, _ = train.losses(run, *train.batch(run, 0))
        assert total == loss


def test_the_first_router_is_first(start, seen):
    """first_router trains first_iters iterations, then router; the causal loss is router's throughout."""
    folder = start(max_iters=4, eval_interval=1, router="online_seqtopk", first_router="topk", first_iters=2)
    for step, call in enumerate(seen):
        assert (call.stats.experts == 2).all() == (step < 2)
    lines = entries(folder, "eval")
    assert [line["as_trained"] == line["causal"] for line in lines] == [False] * 2 + [True] * 3
    assert all(line["as_trained"]["experts"] == [2, 2, 2] for line in lines[:2])


ADAPTING = {
    "expert_threshold": {"score_fn": "sigmoid", **WARM_UP},
    "remoe": {"score_fn": "relu", "balance_coef": 0},
    "null_experts": {"norm_topk": "true", "n_null": 4, "bias_rate": 0.01},
    "seqtopk": {"first_router": "topk", "first_iters": 7},
}


@pytest.mark.parametrize("router", ADAPTING)
def test_resume_under_routers_with_a_state(start, after, tmp_path, router):
    """What steers the routing goes on where it was: the run is that which nothing interrupted."""
    settings = {"router": router, "max_iters": 8, **ADAPTING[router]}
    straight = start("straight", **settings)
    after(4, interrupt)
    with pytest.raises(SystemExit):
        start("stopped", **settings)
    train.main(flags(init_from="resume", out_dir=tmp_path / "stopped"))
    assert_same_runs(tmp_path / "stopped", straight, "last.pt", "best.pt")
    left, right = (load_checkpoint(tmp_path / name / "last.pt") for name in ("stopped", "straight"))
    assert_same(left["l1_coef"], right["l1_coef"])
    assert entries(tmp_path / "stopped") == entries(straight)


@pytest.mark.parametrize("router", ["top_p", "expert_threshold"])
def test_a_topk_checkpoint_goes_on_without_a_budget(start, tmp_path, router):
    """A TopK run of the same scores is tuned under another router, cutoffs found in the first iteration."""
    settings = SETTINGS[router] if router == "expert_threshold" else {}
    begun = start("begun", router="topk", **settings)
    tuned = start("tuned", router=router, init_from=begun, warmup_iters=0, learning_rate=1e-3)
    before, lines = entries(begun, "eval")[-1], entries(tuned, "eval")
    assert lines[-1]["causal"]["loss"] < before["causal"]["loss"] + 0.1
    if router == "expert_threshold":
        assert lines[0]["causal"]["experts"] == [0, 0, 0] and lines[0]["causal"]["entropy"] == 0
        assert 1 < lines[-1]["causal"]["experts"][0] < 3


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"router": "remoe"}, "router remoe needs score_fn=relu"),
        ({"router": "remoe", "score_fn": "relu", "bias_rate": 0.1}, "router remoe needs bias_rate=0"),
        ({"router": "expert_threshold"}, "needs score_fn=sigmoid"),
        ({"router": "expert_threshold", "score_fn": "sigmoid", "bias_rate": 0.1}, "needs bias_rate=0"),
        ({"router": "top_p", "bias_rate": 0.1}, "router top_p needs bias_rate=0"),
        ({"router": "null_experts", "norm_topk": "true", "n_null": 3}, "n_null is 3, but .* multiple of 8"),
        ({"first_router": "expert_choice"}, "first_iters is 0, but must be at least 1 for first_router"),
        ({"first_iters": 5}, "first_router is None, but must be one of topk, "),
        ({"first_router": "topp", "first_iters": 5}, "first_router is topp, but must be one of topk, "),
        ({"first_router": "remoe", "first_iters": 5}, "router remoe needs score_fn=relu"),
        ({"entropy_coef": -1}, "entropy_coef is -1.0"),
    ],
    ids=str,
)
def test_routers_that_cannot_be_are_refused(fails, dataset, settings, words):
    """What a router needs, and a first router that is none or has no iterations, is said in one line."""
    assert re.search(words, fails(*flags(dataset=dataset, **settings)))


def test_learning_rate_by_hand():
    """Linear warm-up to the peak, half-way down at half the time, min_lr from lr_decay_iters on."""
    config = TrainConfig(
        learning_rate=1.0, min_lr=0.2, warmup_iters=10, lr_decay_iters=110, max_iters=500, k=1
    )
    by_hand = {0: 1 / 11, 4: 5 / 11, 9: 10 / 11, 10: 1.0, 60: 0.6, 110: 0.2, 111: 0.2, 499: 0.2}
    assert {step: train.learning_rate(config, step) for step in by_hand} == pytest.approx(by_hand)
    assert train.learning_rate(config, 35) == pytest.approx(0.6 + 0.4 * math.sqrt(0.5))
    rates = [train.learning_rate(config, step) for step in range(500)]
    assert (np.diff(rates)[:10] > 0).all() and (np.diff(rates)[10:110] < 0).all()


def test_learning_rate_defaults():
    """The cosine ends at max_iters and at a tenth of the peak; warm-up may be nothing or all."""
    config = TrainConfig(learning_rate=0.5, warmup_iters=0, max_iters=20)
    assert train.learning_rate(config, 0) == 0.5
    assert train.learning_rate(config, 10) == pytest.approx(0.275)
    assert train.learning_rate(config, 20) == pytest.approx(0.05)
    all_warmup = replace(config, warmup_iters=20)
    assert train.learning_rate(all_warmup, 19) == pytest.approx(0.5 * 20 / 21)


def test_the_optimiser_gets_the_learning_rate(start):
    """The rate in the log and in the optimiser is the schedule's for the iteration that was just done."""
    folder = start(max_iters=6)
    last = load_checkpoint(folder / "last.pt")
    config = TrainConfig(**last["train_config"])
    rates = [train.learning_rate(config, step) for step in range(6)]
    assert [entry["lr"] for entry in entries(folder, "train")] == rates
    assert {group["lr"] for group in last["optimizer"]["param_groups"]} == {rates[-1]}


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
        experts += stats.experts.flatten().tolist()
        load += stats.load
    entropies = [
        -sum(p * math.log(p) for p in row.tolist() if p) for row in load / load.sum(-1, keepdim=True)
    ]
    relative = [[4 * n / sum(row) for n in row] for row in load.tolist()]  # of 4 experts; the mean is 1
    variances = [sum((share - 1) ** 2 for share in row) / 4 for row in relative]
    return {
        "loss": sum(nats) / len(nats),
        "bpb": sum(nats) / math.log(2) / n_bytes,
        "experts": pytest.approx([sum(experts) / len(experts), min(experts), max(experts)]),
        "entropy": pytest.approx(sum(entropies) / 2 / math.log(4), abs=1e-5),
        "variance": pytest.approx(sum(variances) / 2, abs=1e-5),
        "dead": (load == 0).sum().item(),
    }


@pytest.mark.parametrize("router", ["topk", "seqtopk", "online_seqtopk"])
def test_evaluation_by_hand(make_run, router):
    """Loss per token, bits per byte, experts per token, entropy and dead experts, over windows that do not
    fill the last batch."""
    run = make_run(eval_windows=1000, batch_size=3)
    val, n_bytes = run.dataset.val, run.dataset.tokenizer.token_bytes
    n_windows = (len(val) - 1) // 32
    assert n_windows % 3 != 0 and n_bytes[val[0]] != n_bytes[val[n_windows * 32]]
    run.model.blocks[0].mlp.bias[3] = -100.0  # an expert that nobody selects
    with torch.no_grad():
        by_hand = evaluate_by_hand(run, router)
    result = train.evaluate(run, router)
    assert by_hand["dead"] == 1
    assert result["loss"] == pytest.approx(by_hand["loss"], rel=1e-5)
    assert result["bpb"] == pytest.approx(by_hand["bpb"], rel=1e-5)
    assert result["bpb"] < result["loss"]  # fewer than ln 2 tokens to a byte
    for key in ("experts", "entropy", "dead"):
        assert result[key] == by_hand[key]


@pytest.mark.parametrize(
    ("load", "entropy", "dead"),
    [
        ([[8, 8, 8, 8], [2, 2, 2, 2]], 1.0, 0),
        ([[32, 0, 0, 0], [0, 0, 8, 0]], 0.0, 6),
        ([[16, 16, 0, 0], [8, 8, 8, 8]], 0.75, 2),
    ],
)
def test_routing_summary(load, entropy, dead):
    """Entropy is 1 when all experts get the same, 0 when one gets all; mean over layers."""
    summary = routing_summary(torch.tensor(load), torch.tensor([1, 2, 2, 4]))
    assert summary["entropy"] == pytest.approx(entropy) and summary["dead"] == dead
    assert summary["experts"] == [2.25, 1, 4]


def test_evaluation_is_a_function_of_the_weights(make_run):
    """Neither random state, nor training batches, nor the iteration change a loss or are changed by it."""
    run = make_run()
    before = train.evaluate(run, "seqtopk")
    train.losses(run, *train.batch(run, 3))
    run.step = 7
    state = torch.get_rng_state()
    assert train.evaluate(run, "seqtopk") == before
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert train.evaluate(run, "seqtopk") == before
    assert all(parameter.grad is None for parameter in run.model.parameters())


@pytest.mark.parametrize("router", list(ROUTERS))
def test_the_causal_loss_is_the_headline(start, monkeypatch, router):
    """The causal loss is the decode router's; it equals the as-trained one just when the router is causal."""
    routers, evaluate = [], train.evaluate
    monkeypatch.setattr(
        train, "evaluate", lambda run, router: routers.append(router) or evaluate(run, router)
    )
    far = {"learning_rate": 0.1, "warmup_iters": 0}  # so that scores differ
    entry = entries(start(max_iters=2, router=router, **far, **said(router)), "eval")[-1]
    assert routers[0] == ROUTERS[router].decode
    assert set(routers) == {ROUTERS[router].decode, router}
    assert (entry["causal"] == entry["as_trained"]) == ROUTERS[router].causal
    assert (entry["causal"]["loss"] == entry["as_trained"]["loss"]) == ROUTERS[router].causal


def test_evaluation_does_not_change_training(start):
    """However often and on however much a run is evaluated, the same weights come out."""
    often = start("often", eval_interval=1, eval_windows=7, max_iters=6)
    never = start("never", eval_interval=100, eval_windows=1, max_iters=6)
    assert len(entries(often, "eval")) == 7 and len(entries(never, "eval")) == 2
    a, b = load_checkpoint(often / "last.pt"), load_checkpoint(never / "last.pt")
    assert_same(a["model"], b["model"])
    assert_same(a["optimizer"], b["optimizer"])
    losses = [[entry["loss"] for entry in entries(folder, "train")] for folder in (often, never)]
    assert losses[0] == losses[1]


def test_routers_start_alike(start, seen):
    """Runs that differ in the router begin with the same weights and see the same batches; seeds differ in
    both."""
    for router in ROUTERS:
        start(router, router=router, max_iters=2, **said(router))
    start("other", max_iters=2, seed=1)
    runs = [seen[i : i + 2] for i in range(0, len(seen), 2)]
    assert len(runs) == len(ROUTERS) + 1
    for run in runs[1:-1]:
        first = {name: weight[: len(runs[0][0].weights[name])] for name, weight in run[0].weights.items()}
        assert_same(first, runs[0][0].weights)  # of gates the rows that are not of null experts
        assert_same([(call.x, call.y) for call in run], [(call.x, call.y) for call in runs[0]])
    assert not torch.equal(runs[-1][0].weights["head.weight"], runs[0][0].weights["head.weight"])
    assert not torch.equal(runs[-1][0].x, runs[0][0].x)


# ---- stopping and going on


def interrupt():
    signal.raise_signal(signal.SIGINT)


def crash():
    raise RuntimeError("the power fails")


@pytest.mark.parametrize("step", [1, 7, 10, 11])
def test_ctrl_c_and_resume(dataset, straight, tmp_path, after, capsys, step):
    """Stopped after any iteration, evaluated there or not, a run goes on bit for bit: checkpoints and log."""
    folder = tmp_path / "run"
    after(step, interrupt)
    with pytest.raises(SystemExit) as stop:
        train.main(flags(**LONG, dataset=dataset, out_dir=folder))
    assert stop.value.code == 130
    assert load_checkpoint(folder / "last.pt")["step"] == step
    out = capsys.readouterr().out
    command = f"python train.py --init_from=resume --out_dir={folder}"
    assert f"saved iteration {step}" in out and command in out
    train.main(shlex.split(command)[2:])
    assert_same_runs(folder, straight, "last.pt", "best.pt")
    assert entries(folder) == entries(straight)


@pytest.mark.parametrize("step", [3, 8])
def test_crash_and_resume(dataset, straight, tmp_path, after, step):
    """After a crash the run goes on from last.pt; what the log says of iterations after it is forgotten."""
    folder = tmp_path / "run"
    after(step, crash)
    with pytest.raises(RuntimeError):
        train.main(flags(**LONG, dataset=dataset, out_dir=folder))
    assert load_checkpoint(folder / "last.pt")["step"] == step // 5 * 5
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"kind": "train", "st')
    train.main(flags(init_from="resume", out_dir=folder))
    assert_same_runs(folder, straight, "last.pt", "best.pt")
    assert entries(folder) == entries(straight)


def test_resume_with_more_iterations(dataset, straight, tmp_path):
    """A run that ended can be made longer; with lr_decay_iters it is the run that was long from the start."""
    folder = tmp_path / "run"
    train.main(flags(**LONG | {"max_iters": 5, "lr_decay_iters": 12}, dataset=dataset, out_dir=folder))
    train.main(flags(init_from="resume", out_dir=folder, max_iters=12))
    assert_same_runs(folder, straight, "last.pt", "best.pt")
    assert entries(folder) == entries(straight)


def test_resume_of_a_finished_run(straight, tmp_path):
    """There is nothing left to do: weights and log stay as they are."""
    folder = shutil.copytree(straight, tmp_path / "run")
    train.main(flags(init_from="resume", out_dir=folder))
    assert_same_runs(folder, straight, "last.pt", "best.pt")
    assert entries(folder) == entries(straight)


def test_sigterm_stops_like_ctrl_c_and_handlers_are_given_back(start, after, tmp_path):
    """SIGTERM saves too; afterwards both signals do again what they did before."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    after(3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        start()
    assert stop.value.code == 130 and load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 3
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_ctrl_c_with_a_full_disk_claims_nothing(start, after, capsys, monkeypatch):
    """A checkpoint that could not be written is not reported as saved."""

    def full(path, model, **extra):
        raise OSError(28, "No space left on device")

    after(3, lambda: (monkeypatch.setattr(train, "save_checkpoint", full), interrupt()))
    with pytest.raises(SystemExit):
        start()
    out = capsys.readouterr().out
    assert "could not be saved" in out and "saved iteration 3" not in out


def wait_for_iteration(folder, step, process):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "log.jsonl").exists() and f'"step": {step},' in (folder / "log.jsonl").read_text():
            return
        time.sleep(0.02)
    raise AssertionError("training did not begin")


def test_ctrl_c_from_a_shell(dataset, tmp_path):
    """A real SIGINT to a real process: exit code 130, no traceback, and the printed command goes on bit for
    bit."""
    folder = tmp_path / "run"
    settings = TINY | {"eval_interval": 1000, "lr_decay_iters": 50, "dataset": dataset}
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *flags(**settings | {"max_iters": 10**6}, out_dir=folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_iteration(folder, 3, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err
    step = load_checkpoint(folder / "last.pt")["step"]
    command = next(line for line in out.splitlines() if "--init_from=resume" in line)
    script, *argv = shlex.split(command)[1:]
    assert script == "train.py" and step >= 3
    train.main([*argv, f"--max_iters={step + 2}"])
    train.main(flags(**settings | {"max_iters": step + 2}, out_dir=tmp_path / "straight"))
    assert_same_runs(folder, tmp_path / "straight", "last.pt")


def test_divergence_keeps_the_last_good_checkpoint(start, tmp_path, capsys):
    """A loss that is no number ends the run with one line; last.pt is sound, and resuming with a lower rate
    goes on to the end."""
    with pytest.raises(SystemExit) as stop:
        start(learning_rate=1e30, max_iters=8, grad_clip=0)
    folder, err = tmp_path / "run", capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "nan" in err and "learning_rate below 1e+30" in err and str(folder / "last.pt") in err
    for name in ("last.pt", "best.pt"):
        checkpoint = load_checkpoint(folder / name)
        assert all(weight.isfinite().all() for weight in checkpoint["model"].values())
    assert load_checkpoint(folder / "last.pt")["step"] == 0
    train.main(flags(init_from="resume", out_dir=folder, learning_rate=1e-3))
    assert load_checkpoint(folder / "last.pt")["step"] == 8
    assert all(math.isfinite(entry["causal"]["loss"]) for entry in entries(folder, "eval"))
    assert [entry["step"] for entry in entries(folder, "train")] == list(range(1, 9))


@pytest.mark.parametrize("broken", ["loss", "gradient", "validation", "loss before ctrl-c"])
def test_whatever_is_not_finite_stops_the_run(start, tmp_path, capsys, monkeypatch, broken):
    """A training loss, gradient or validation loss that is not finite is never followed by a checkpoint."""
    train_step, evaluate = train.train_step, train.evaluate

    def step(run):
        loss, norm = train_step(run)
        if run.step == 7 and "loss" in broken:
            loss = torch.tensor(math.nan)
        if run.step == 7 and broken == "gradient":
            norm = torch.tensor(math.inf)
        if run.step == 7 and "ctrl-c" in broken:
            interrupt()
        return torch.stack([loss, norm])

    def validate(run, router):
        diverged = run.step == 8 and broken == "validation"
        return evaluate(run, router) | ({"loss": math.nan} if diverged else {})

    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(train, "evaluate", validate)
    with pytest.raises(SystemExit) as stop:
        start(max_iters=8, log_interval=100)
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 5


def test_an_old_run_is_moved_aside(start, tmp_path, capsys):
    """Starting again in the same folder loses nothing of what was there; resuming moves nothing."""
    kept = []
    for n in range(3):
        folder = start(max_iters=n + 1)
        kept.append({path.name: content for path, content in contents(folder).items()})
    assert f"{folder} is now in {folder}.2" in capsys.readouterr().out
    train.main(flags(init_from="resume", out_dir=folder, max_iters=4))
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.1", "run.2"}
    for name, old in (("run.1", kept[0]), ("run.2", kept[1])):
        assert {path.name: content for path, content in contents(tmp_path / name).items()} == old
    assert load_checkpoint(folder / "last.pt")["step"] == 4


def test_a_checkpoint_without_its_log_is_not_lost(start, tmp_path):
    """A folder that has only a checkpoint left is moved aside as well."""
    folder = start(max_iters=1)
    (folder / "log.jsonl").unlink()
    old = (folder / "last.pt").read_bytes()
    start(max_iters=2)
    assert (tmp_path / "run.1" / "last.pt").read_bytes() == old


def test_resume_obeys_new_settings(straight, tmp_path):
    """Settings that may change when resuming do change: none is taken and then silently dropped."""
    folder = shutil.copytree(straight, tmp_path / "run")
    new = {"weight_decay": 0.03, "beta1": 0.7, "beta2": 0.8, "learning_rate": 0.003}
    train.main(flags(init_from="resume", out_dir=folder, max_iters=14, **new))
    last = load_checkpoint(folder / "last.pt")
    matrices, vectors = last["optimizer"]["param_groups"]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.03, 0.0)
    assert matrices["betas"] == vectors["betas"] == (0.7, 0.8)
    assert {name: last["train_config"][name] for name in new} == new
    assert entries(folder, "train")[-1]["lr"] == train.learning_rate(TrainConfig(**last["train_config"]), 13)


@pytest.mark.parametrize("router", ["topk", "online_seqtopk"])
def test_resume_under_another_router(straight, tmp_path, router):
    """The router is no part of the architecture: a run may go on under another."""
    folder = shutil.copytree(straight, tmp_path / "run")
    train.main(flags(init_from="resume", out_dir=folder, max_iters=13, router=router))
    assert load_checkpoint(folder / "last.pt")["config"]["router"] == router


@pytest.mark.parametrize(("first", "then"), [("float32", "float16"), ("float16", "bfloat16")])
def test_resume_in_another_precision(start, first, then):
    """The weights are float32 in any case: a run can go on in another number format, as another GPU asks."""
    folder = start(max_iters=2, dtype=first)
    train.main(flags(init_from="resume", out_dir=folder, max_iters=4, dtype=then))
    assert load_checkpoint(folder / "last.pt")["step"] == 4


# ---- fine-tuning


@pytest.mark.parametrize("name", ["", "best.pt", "last.pt"])
def test_fine_tuning_under_another_router(dataset, topk_run, tmp_path, seen, name):
    """A TopK run opens under SeqTopK, from its folder (best.pt) or a file: its weights and architecture, and
    in all else a new run; the old one stays."""
    before = contents(topk_run)
    settings = {key: value for key, value in TINY.items() if key not in SHAPE} | {"max_iters": 2}
    folder = tmp_path / "tuned"
    train.main(
        flags(**settings, init_from=topk_run / name, router="seqtopk", dataset=dataset, out_dir=folder)
    )
    assert_same(seen[0].weights, load_checkpoint(topk_run / (name or "best.pt"))["model"])
    last = load_checkpoint(folder / "last.pt")
    assert {key: last["config"][key] for key in SHAPE} == SHAPE and last["config"]["router"] == "seqtopk"
    assert last["step"] == 2
    assert {state["step"].item() for state in last["optimizer"]["state"].values()} == {2.0}
    evals = entries(folder, "eval")
    assert evals[0]["step"] == 0 and evals[0]["causal"] != evals[0]["as_trained"]
    assert contents(topk_run) == before


@pytest.mark.parametrize("block_size", [16, 64])
def test_fine_tuning_may_change_the_block_size(start, topk_run, block_size):
    """Positions are rotary: fine-tuning may use shorter or longer sequences."""
    folder = start(init_from=topk_run, block_size=block_size, max_iters=1)
    assert load_checkpoint(folder / "last.pt")["config"]["block_size"] == block_size


def test_fine_tuning_can_be_resumed(start, topk_run, after, tmp_path):
    """A fine-tuning run that was interrupted goes on from its own last.pt, not from where it began."""
    straight = start("straight", init_from=topk_run, max_iters=4)
    after(3, interrupt)
    with pytest.raises(SystemExit):
        start(init_from=topk_run, max_iters=4)
    train.main(flags(init_from="resume", out_dir=tmp_path / "run"))
    assert_same_runs(tmp_path / "run", straight, "last.pt")


@pytest.mark.parametrize(
    ("name", "value", "old"),
    [
        ("n_embd", 64, 32),
        ("n_expert", 8, 4),
        ("n_layer", 3, 2),
        ("score_fn", "sigmoid", "softmax"),
        ("tie_embeddings", "true", False),
        ("n_kv_head", 1, None),
        ("rope_theta", 500, 10000.0),
    ],
)
@pytest.mark.parametrize("how", ["fine-tune", "resume"])
def test_another_architecture_is_refused(fails, topk_run, dataset, tmp_path, how, name, value, old):
    """A setting that contradicts the checkpoint's is named with both values."""
    folder = shutil.copytree(topk_run, tmp_path / "run")
    argv = {"init_from": "resume"} if how == "resume" else {"init_from": topk_run, "dataset": dataset}
    err = fails(*flags(**argv, out_dir=folder, **{name: value}))
    assert re.search(rf"\b{name}\b.*\b{old}\b.*\b{re.escape(str(value).title())}", err, re.IGNORECASE)


@pytest.mark.parametrize(
    ("name", "value", "old"),
    [
        ("batch_size", 5, 4),
        ("gradient_accumulation_steps", 2, 1),
        ("block_size", 16, 32),
        ("seed", 7, 1337),
        ("dataset", "shakespeare", "dataset"),
    ],
)
def test_another_order_of_the_data_is_refused_when_resuming(fails, topk_run, tmp_path, name, value, old):
    """What decides which windows come next cannot change in a run: both values are named."""
    folder = shutil.copytree(topk_run, tmp_path / "run")
    err = fails(*flags(init_from="resume", out_dir=folder, **{name: value}))
    assert re.search(rf"\b{name} .*{old}.*\b{value}\b", err)


@pytest.mark.parametrize("how", ["fine-tune", "resume"])
def test_another_vocabulary_is_refused(fails, topk_run, dataset, tmp_path, how):
    """A checkpoint is not trained on with token ids that mean something else, however many there are."""
    folder = shutil.copytree(topk_run, tmp_path / "run")
    other = write_dataset(tmp_path / "data", 290)
    if how == "fine-tune":
        err = fails(*flags(init_from=topk_run, dataset=other, out_dir=folder))
    else:
        last = torch.load(folder / "last.pt", weights_only=True)
        last["train_config"]["dataset"] = str(other)  # prepared anew since
        torch.save(last, folder / "last.pt")
        err = fails(*flags(init_from="resume", out_dir=folder))
    assert "vocabulary" in err and str(other) in err


# ---- bad input


def test_no_number_may_be_negative():
    """Every setting that is a number is refused below zero, with its name and the value."""
    numbers = [
        field.name
        for field in fields(TrainConfig)
        if str(getattr(field.type, "__name__", field.type)).split(" ")[0] in ("int", "float")
    ]
    assert len(numbers) > 30
    for name in numbers:
        with pytest.raises(ValueError, match=r"-1\b") as err:
            TrainConfig(**{name: -1})
        assert name in str(err.value) and "\n" not in str(err.value)


def test_what_may_not_be_zero():
    """Sizes, counts, intervals, and the numbers that something is divided by, are refused at zero."""
    names = "block_size n_layer n_head n_kv_head n_embd n_expert k n_hidden rope_theta batch_size max_iters"
    names += " gradient_accumulation_steps learning_rate eval_interval eval_windows log_interval"
    for name in names.split():
        with pytest.raises(ValueError, match=rf"{name}.* is 0\b.*, but must be .") as err:
            TrainConfig(**{name: 0})
        assert "\n" not in str(err.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--batch_size=0", "batch_size is 0, but must be at least 1"),
        ("--learning_rate=-1", "learning_rate is -1.0, but must be above 0"),
        ("--beta2=1", "beta2 is 1.0, but must be from 0 to below 1"),
        ("--n_exprt=4", "did you mean n_expert"),
        ("--batch_size=four", "--batch_size=four"),
        ("--batch_size=2.5", "whole number"),
        ("--learning_rate=nan", "--learning_rate=nan"),
        ("--norm_topk=maybe", "true or false"),
        ("nowhere.py", "nowhere.py"),
        ("--k=5", "k is 5, but must be from 1 to n_expert = 4"),
        ("--k=0", "k is 0"),
        ("--min_experts=3", "min_experts is 3, but must be from 0 to k = 2"),
        ("--max_experts=1", "max_experts is 1"),
        ("--max_experts=5", "max_experts is 5"),
        ("--n_head=5", "n_embd is 32, but must be a multiple of n_head = 5"),
        ("--n_kv_head=3", "n_kv_head is 3"),
        ("--n_hidden=12", "n_hidden is 12, but must be a multiple of 8"),
        ("--router=topq", "router is topq, but must be one of topk, "),
        ("--score_fn=tanh", "score_fn is tanh, but must be one of softmax, sigmoid, relu"),
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
    ],
)
def test_bad_settings(fails, topk_run, dataset, tmp_path, argv, words):
    """Each is one line that names the value and what is allowed, and the run in out_dir stays where it is."""
    folder = shutil.copytree(topk_run, tmp_path / "run")
    settings = TINY | {"dataset": dataset, "out_dir": folder}
    assert words in fails(*flags(**settings), argv)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "no meta.json"),
        ("train.bin missing", "no train.bin"),
        ("empty", "train.bin has 0 bytes"),
        ("truncated", "train.bin has "),
        ("foreign id", "holds token id 300; its tokenizer has ids 0..299 only"),
        ("short", "fewer than one window of block_size + 1 = 33"),
        ("short val", "fewer than one window of block_size + 1 = 33"),
    ],
)
def test_bad_data(fails, dataset, topk_run, tmp_path, damage, words):
    """Data that is missing, damaged or too little is refused before anything is written."""
    folder, run = shutil.copytree(dataset, tmp_path / "data"), shutil.copytree(topk_run, tmp_path / "run")
    path = folder / "train.bin"
    if damage == "missing":
        (folder / "meta.json").unlink()
    elif damage == "train.bin missing":
        path.unlink()
    elif damage in ("empty", "truncated"):
        path.write_bytes(path.read_bytes()[:-100] if damage == "truncated" else b"")
    elif damage == "foreign id":
        path.write_bytes(path.read_bytes()[:-2] + np.array([300], "<u2").tobytes())
    else:
        docs = {"short": (["abc"], TEXT), "short val": (TEXT, ["abc"])}[damage]
        data.write_dataset(folder, *docs, data.load(str(dataset)).tokenizer, "0" * 64)
    settings = TINY | {"dataset": folder, "out_dir": run}
    assert words in fails(*flags(**settings))


@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "empty", "text", "foreign", "pickle", "bare", "other version"]
)
@pytest.mark.parametrize("how", ["fine-tune", "resume"])
def test_bad_checkpoint(fails, topk_run, dataset, tmp_path, how, damage):
    """A checkpoint that is missing, damaged, or made by something else is refused, whatever lacks in it."""
    folder = shutil.copytree(topk_run, tmp_path / "run")
    path = folder / "last.pt"
    if damage == "missing":
        path.unlink()
    elif damage in ("foreign", "pickle"):
        torch.save({"model": {"w": torch.ones(2)}} if damage == "foreign" else Path("x"), path)
    elif damage == "bare":  # weights and config only, as a converter may write them
        save_checkpoint(path, MoEGPT(MoEConfig(vocab_size=300, **SHAPE)))
    elif damage == "other version":
        torch.save(torch.load(path, weights_only=True) | {"format": "seqtopk checkpoint 0"}, path)
    else:
        whole = path.read_bytes()
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hello\n"}[damage])
    init_from = "resume" if how == "resume" else path
    err = fails(*flags(init_from=init_from, dataset=dataset, out_dir=folder))
    assert "last.pt" in err


def test_weights_that_do_not_fit_are_refused(fails, topk_run, dataset, tmp_path):
    """A checkpoint whose config and weights disagree is refused, and a run in out_dir stays where it is."""
    folder = shutil.copytree(topk_run, tmp_path / "run")
    best = torch.load(topk_run / "best.pt", weights_only=True)
    del best["model"]["head.weight"]
    torch.save(best, tmp_path / "odd.pt")
    settings = TINY | {"dataset": dataset, "out_dir": folder}
    assert "head.weight" in fails(*flags(**settings, init_from=tmp_path / "odd.pt"))


@pytest.mark.parametrize("below", ["", "run", "a/b"])
def test_unwritable_out_dir(fails, dataset, tmp_path, below):
    """A folder that cannot be made, because a file is in the way, is refused with its name."""
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" / below
    err = fails(*flags(**TINY, dataset=dataset, out_dir=folder))
    assert f"out_dir {folder} cannot be written" in err and "--out_dir" in err


def test_bad_input_from_a_shell(tmp_path):
    """The script itself: one line on stderr, nothing on stdout, exit code 2, no folder made."""
    command = [sys.executable, ROOT / "train.py", "--k=99", "--dataset=arithmetic", "--out_dir=run"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "error: k is 99, but must be from 1 to n_expert = 16\n"
    assert list(tmp_path.iterdir()) == []


# ---- settings and config files


def test_help_lists_every_key(capsys):
    """--help explains the keys of the model and of training, each with its meaning, and exits 0."""
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    out = capsys.readouterr().out
    rows = {line.split("=")[0].strip(): line.strip() for line in out.splitlines() if line.startswith("  --")}
    assert stop.value.code == 0
    assert rows.keys() == {f"--{field.name}" for field in fields(TrainConfig)}
    assert {f"--{field.name}" for field in fields(MoEConfig)} < rows.keys()
    assert all(len(re.split(r" {2,}", row)) == 3 for row in rows.values())
    assert out.index("--n_expert") < out.index("Training:") < out.index("--batch_size")


CONFIGS = sorted(path for path in (ROOT / "config").glob("*.py") if path.stem not in ("__init__", "device"))


def settings_of(path):
    return parse([str(path)], TrainConfig)[0]


def test_config_files_exist():
    """The configs that README speaks of are there."""
    expected = (
        "tiny_topk tiny_seqtopk small_topk small_seqtopk small_dense arithmetic_topk arithmetic_seqtopk"
    )
    assert {path.stem for path in CONFIGS} >= set(expected.split())


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
    elif not path.stem.startswith("quality"):  # what bench.py adds a router to
        assert path.stem.endswith(f"_{config.router}")


@pytest.mark.parametrize("path", [p for p in CONFIGS if "_seqtopk" in p.stem], ids=lambda path: path.stem)
def test_config_pairs_differ_in_the_router_only(path):
    """X_seqtopk.py builds on X_topk.py and changes nothing but the router."""
    partner = path.with_name(path.name.replace("_seqtopk", "_topk"))
    seqtopk, topk = TrainConfig(**settings_of(path)), TrainConfig(**settings_of(partner))
    assert (seqtopk.router, topk.router) == ("seqtopk", "topk")
    assert replace(topk, router="seqtopk") == seqtopk
    assert f"from config.{partner.stem} import *" in path.read_text()


def test_the_dense_config_is_the_twin_of_the_small_ones():
    """small_dense has the active width of small_topk: k experts in one, and all else alike."""
    dense, topk = (TrainConfig(**settings_of(ROOT / "config" / f"small_{x}.py")) for x in ("dense", "topk"))
    assert (dense.n_expert, dense.k) == (1, 1)
    assert dense.n_hidden == topk.k * topk.n_hidden
    twin = replace(topk, n_expert=1, k=1, n_hidden=dense.n_hidden, router=dense.router)
    assert twin == dense


def test_the_estimate_changes_nothing(make_run):
    """Timing a micro-batch beforehand leaves weights, gradients and the random state as they were."""
    run = make_run()
    weights, rng = [p.clone() for p in run.model.parameters()], torch.get_rng_state()
    assert re.fullmatch(
        r"about [\d.]+ (minutes|hours) on this machine, evaluations not counted", ESTIMATE(run)
    )
    assert all(torch.equal(a, b) for a, b in zip(weights, run.model.parameters(), strict=True))
    assert all(p.grad is None for p in run.model.parameters()) and torch.equal(rng, torch.get_rng_state())
