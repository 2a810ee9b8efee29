"""experiments/: each question gives the rows it promises; runs are kept, resumed and judged."""

import fcntl
import importlib
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest
import torch
from reference import ref_online_seqtopk, ref_seqtopk
from runs import error_line, interrupt, lively, when

from experiments import arithmetic, batches, difficulty, lab, length, minutes, prune, report, routers, solve
from experiments.lab import Arm, BranchOptions, Lab, OptionsWithK, Start

import data
import train
from config import parse, results
from data.arithmetic.prepare import SPLIT, document, prompt_of
from data.arithmetic.problems import make_problem
from model import load_checkpoint, save_checkpoint
from router import ROUTERS, online_seqtopk

CONFIG = """
dataset = {dataset!r}
n_layer, n_head, n_embd, n_hidden, n_expert, k = 2, 2, 16, 8, 12, 4
block_size, batch_size, max_iters, warmup_iters, eval_windows, log_interval = 32, 4, 10, 0, 16, 1
learning_rate = 0.05
device = "cpu"
"""
FIRST = Start(1337, 1)
TWO_BRANCHES = "long", "oracle"  # the means over branches, with a base and without, are lab.py's for all
TUNING, TRAIN_HERE = lab.TUNING, lab.train_here  # as they are; tests have others in their places


@pytest.fixture(scope="module", autouse=True)
def own_routers():
    """The routers that files of experiments/ define are gone again for other tests."""
    before = dict(ROUTERS)
    yield
    ROUTERS.clear()
    ROUTERS.update(before)


def question(name):
    return pytest.fixture(scope="module")(lambda own_routers: importlib.import_module(f"experiments.{name}"))


gap, discount, oracle, layers, scores, sparsity = map(
    question, ("gap", "discount", "oracle", "layers", "scores", "sparsity")
)


@pytest.fixture(scope="module")
def ask(tmp_path_factory, gap, sparsity):
    """Rows of a question (each answered once), with a toy config: one branch or two, runs shared by them."""
    folder = tmp_path_factory.mktemp("runs")
    rng = random.Random(0)
    docs = [document(make_problem(rng, 1 + i % 5)) for i in range(60)]
    tokenizer = data.train_bpe(docs, 300, "arithmetic", SPLIT)
    data.write_dataset(folder / "arithmetic", docs[:30], docs[30:], tokenizer, "0" * 64)
    (folder / "config.py").write_text(CONFIG.format(dataset=str(folder / "arithmetic")))
    rows = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab, "RUNS", folder / "runs")
        short = {"max_iters": 2, "warmup_iters": 1, "eval_interval": 2, "learning_rate": 0.01}
        patch.setattr(lab, "TUNING", short)
        patch.setattr(lab, "USUAL_TOKENS", 256)
        patch.setattr(lab, "JUDGED_TOKENS", 16 * 32)
        patch.setattr(length, "LENGTHS", (8, 32))
        patch.setattr(length, "PLACES", (4, 8, 32))
        patch.setattr(sparsity, "KS", (2, 1))
        patch.setattr(gap, "PRIORS", (0, 1, 64))
        patch.setattr(gap, "OVERCOMMITS", (0.5,))

        def ask(name):
            if name not in rows:
                here = ask.lab if name in TWO_BRANCHES else ask.one
                found = importlib.import_module(f"experiments.{name}").answer(here)
                json.dumps(found, allow_nan=False)
                rows[name] = {row["what"]: row for row in found}
                assert len(rows[name]) == len(found)
            return rows[name]

        ask.folder, ask.docs = folder, docs
        ask.config = f"{folder}/config.py"
        ask.lab = Lab.of(OptionsWithK(config=ask.config, device="cpu", dtype="float32", seeds=1, branches=2))
        ask.one = changed(ask.lab, branches=1)
        yield ask


@pytest.fixture
def own(ask, monkeypatch, tmp_path):
    """A Lab with one branch, the folder of its own copy of the data, and none of the runs of the others."""
    folder = shutil.copytree(ask.folder / "arithmetic", tmp_path / "arithmetic")
    (tmp_path / "config.py").write_text(CONFIG.format(dataset=str(folder)))
    monkeypatch.setattr(lab, "RUNS", tmp_path / "runs")
    return changed(ask.lab, branches=1, config=f"{tmp_path}/config.py"), folder


def changed(here, **options):
    return Lab.of(replace(here.config, **options))


def opened(ask, trained_by, **changes):
    """The first run under a router, with k=2."""
    (arm,) = lab.router_arms(ask.lab, [trained_by], 2)
    assert lab.train_run(ask.lab, arm, FIRST)
    return lab.open_run(ask.lab, arm, FIRST, **changes)


# -------- what the questions promise

BOTH = ["seqtopk, k=2", "online_seqtopk, k=2"]
QUARTERS = [f"{kind}, quarter {i}" for kind in ("written", "read") for i in (1, 2, 3, 4)]
KINDS = [f"{kind}, {how}" for kind in difficulty.KINDS for how in ("read", "predicted")]
BOUNDS = [f"max_experts={bound}" for bound in (3, 5, 6, 12)]
LENGTHS = ["T=8", "T=8, tokens 1 to 4", "T=8, tokens 5 to 8", "T=32"]
RANKINGS = "weight,root of probabilities,root of weights,logits,centred logits"
RANKINGS = (*RANKINGS.split(","), "probability * entropy", "probability * norm")
LENGTHS += [f"T=32, tokens {tokens}" for tokens in ("1 to 4", "5 to 8", "9 to 32")]


def to(base, *names):
    """Rows that are compared to another."""
    return dict.fromkeys(names, base)


SEQUENCE = ("seqtopk", "seqtopk_root", "online_seqtopk")
ROWS = {  # row -> what it is compared to
    "sparsity": {
        **{
            f"{router}, k={k}{how}": f"topk, k={k}{how}"
            for k in (2, 1)
            for how in ("", lab.UNTUNED)
            for router in ("topk", "softmax_threshold", "batchtopk", *SEQUENCE)
            if (k > 1 or ("seq" not in router and "batch" not in router)) and not (how and "online" in router)
        },
        **to("topk, k=2", "topk, k=2, again", "topk, k=2, other data"),
    },
    "scores": {
        f"{arm}{how}": f"topk, k=2{how}"
        for arm in ("topk, k=2", "seqtopk, k=2", *(f"seqtopk, k=2, by {ranking}" for ranking in RANKINGS))
        for how in ("", lab.UNTUNED)
    },
    "oracle": {
        f"{name}, k=2{how}": f"topk, k=2{how}"
        for name in ("topk", "seqtopk", "online_seqtopk", "high loss", "low loss", "high entropy", "random")
        for how in ("", lab.UNTUNED)
    },
    "layers": {
        f"{name}, k=2{how}": f"topk, k=2{how}"
        for name in ("topk", "seqtopk", "a budget for each layer", "one for all layers")
        for how in ("", lab.UNTUNED)
    },
    "online": to("topk, k=2", "topk, k=2", *BOTH) | to(BOTH[0], "seqtopk, the last tenth online, k=2"),
    "bounds": {
        **to(BOTH[0], *BOTH, *(f"{BOTH[0]}, {bound}" for bound in (*BOUNDS, "min_experts=0"))),
        **to(BOTH[1], f"{BOTH[1]}, strict=false"),
        **to(
            f"{BOTH[0]}, decoded with strict=true",
            *(f"{BOTH[0]}, decoded with strict={x}" for x in ("true", "false")),
        ),
    },
    "batches": {
        f"{router}, k=2, {rest}": f"{router}, k=2, 1 sequences"
        for router in ("seqtopk", "batchtopk")
        for rest in (*(f"{n} sequences" for n in (1, 4, 16)), "online")
    },
    "difficulty": to(None, *(f"{arm}, {rest}" for arm in BOTH for rest in ("all tokens", *KINDS))),
    "length": to(None, *LENGTHS),
    "long": to(
        None, *(f"{arm}, {how}, {q}" for arm in BOTH for how in ("strict", "not strict") for q in QUARTERS)
    ),
    "shared": {
        f"{router}, k=2{beside}": f"topk, k=2{beside}"
        for beside in ("", ", shared_hidden=8")
        for router in ("topk", "seqtopk")
    },
    "gap": to(
        f"{BOTH[0]}, n0=0", *(f"{BOTH[0]}, {way}" for way in ("n0=0", "n0=1", "n0=64", "overcommit=0.5"))
    ),
    "discount": to(BOTH[0], BOTH[0], *(f"{BOTH[0]}, {bound}" for bound in BOUNDS), "seqtopk_discount, k=2"),
    "prune": {
        f"{router}, k={k}{rest}": f"{router}, k={k}"
        for k in (8, 2)
        for router in ("topk", "seqtopk")
        for rest in ("", ", a quarter dropped")
    },
}


@pytest.mark.parametrize("question", ROWS)
def test_a_question_has_the_rows_it_promises(ask, question):
    """Each row is a mean over all branches, differences are to its base, and every column is explained."""
    rows = ask(question)
    assert sorted(rows) == sorted(ROWS[question])
    text = importlib.import_module(f"experiments.{question}").__doc__
    for name, base in ROWS[question].items():
        row = rows[name]
        assert row["runs"] == (2 if question in TWO_BRANCHES else 1)
        error = row["experts per token" if "experts per token" in row else "gap"][1]
        assert (error is None) == (row["runs"] == 1)
        if base in (None, name):
            assert "nats, to base" not in row
        else:
            gain = row["nats"][0] - rows[base]["nats"][0]
            assert row["nats, to base"][0] == pytest.approx(gain, abs=1e-6)
        unknown = set(row) - {"what", "curves", "nats, by trunk", *lab.COLUMNS, *lab.VERDICTS.values()}
        assert all(key in text or key.split()[0] in text for key in unknown), unknown


def test_minutes_are_those_of_the_iterations(own, monkeypatch):
    """Each arm's curve ends at its iterations times the time of one; the second dense twin has more."""
    monkeypatch.setattr(minutes, "TIMED", 4)
    options = minutes.MinutesOptions(config=own[0].config.config, device="cpu", seeds=1, longer=1.5)
    rows = {row["what"]: row for row in minutes.answer(Lab.of(options))}
    iterations = {"topk": 10, "dense": 10, "dense, 1.5 times the iterations": 15}
    assert list(rows) == list(iterations)
    for name, row in rows.items():
        (curve,) = row["curves"]
        assert (
            curve["minutes"][-1]
            == row["minutes"]
            == pytest.approx(iterations[name] * row["ms/iteration"] / 60_000)
        )
        assert curve["nats"][-1] == pytest.approx(row["nats"][0], abs=0.2)  # of fewer windows
    monkeypatch.setattr(lab, "train_here", lambda *args: "failed")  # the runs of a second seed are missing
    rows = minutes.answer(Lab.of(replace(options, seeds=2)))
    assert [len(row["curves"]) for row in rows] == [row["runs"] for row in rows] == [1] * 3


def test_the_questions_agree_on_the_same_runs(ask):
    """A run's loss is what train.py logged, whichever question looks at it."""
    arms = lab.router_arms(ask.lab, ["topk", "seqtopk", "online_seqtopk"], 2)
    trained = {arm.settings["router"]: ask("online")[arm.name] for arm in arms}
    for router, question, name in (
        ("topk", "sparsity", "topk, k=2"),
        ("topk", "prune", "topk, k=2"),
        ("seqtopk", "prune", "seqtopk, k=2"),
        ("seqtopk", "bounds", "seqtopk, k=2, decoded with strict=true"),
        ("seqtopk", "batches", "seqtopk, k=2, online"),
        ("seqtopk", "gap", "seqtopk, k=2, n0=0"),
        ("seqtopk", "difficulty", "seqtopk, k=2, all tokens"),
        ("online_seqtopk", "difficulty", "online_seqtopk, k=2, all tokens"),
    ):
        row = ask(question)[name]
        for key in ("nats", "experts per token"):
            assert row[key][0] == pytest.approx(trained[router][key][0], rel=1e-4), (question, name, key)
    for arm in arms:
        logs = (lab.run_folder(ask.lab.config, arm, start) / "log.jsonl" for start in ask.one.starts)
        logged = [json.loads(log.read_text().splitlines()[-1])["causal"]["loss"] for log in logs]
        assert trained[arm.settings["router"]]["nats"][0] == pytest.approx(mean(logged), rel=1e-4)
    found = ask("gap")["seqtopk, k=2, n0=0"]["gap"][0]
    assert found == pytest.approx(trained["seqtopk"]["gap"][0], abs=1e-5)
    found = ask("batches")["seqtopk, k=2, 1 sequences"]["nats"][0]
    assert found == pytest.approx(trained["seqtopk"]["as trained"][0], rel=1e-4)


def test_batches_change_batchtopk_alone(ask):
    """SeqTopK does not mind how many sequences there are, BatchTopK does; both spend all."""
    for router, moves in (("seqtopk", False), ("batchtopk", True)):
        found = [ask("batches")[f"{router}, k=2, {n} sequences"] for n in (1, 4, 16)]
        assert all(row["experts per token"][0] == pytest.approx(2) for row in found)
        losses = [row["nats"][0] for row in found]
        assert (max(losses) - min(losses) > 1e-5) == moves


def test_length_splits_its_gap_by_position(ask):
    """The rows of a length are means over its positions: together they are the row of all."""
    rows = ask("length")
    for T, places in ((8, (0, 4, 8)), (32, (0, 4, 8, 32))):
        for key in ("nats", "gap"):
            parts = [rows[f"T={T}, tokens {a + 1} to {b}"][key][0] * (b - a) for a, b in pairwise(places)]
            assert sum(parts) / T == pytest.approx(rows[f"T={T}"][key][0], rel=1e-6, abs=1e-6)
        curve = rows[f"T={T}"]["curves"][0]
        assert curve["position"] == [4, 8, 16, 32][: 2 if T == 8 else 4]
        assert len(curve["gap"]) == len(curve["position"]) and any(curve["gap"])


def test_by_position_by_hand():
    """Means up to 4, 8, 16 ...; positions beyond the last power of two are left out."""
    assert length.by_position(torch.arange(20.0)) == {"position": [4, 8, 16], "gap": [1.5, 5.5, 11.5]}
    assert length.by_position(torch.arange(8.0)) == {"position": [4, 8], "gap": [1.5, 5.5]}


def test_long_texts_spend_what_their_quarters_say(ask):
    """ "spent" is the mean of the quarters so far over K; a strict budget never exceeds it."""
    rows = ask("long")
    for name in (name for name in rows if name.endswith("quarter 1")):
        quarters = [rows[name[:-1] + str(i)] for i in (1, 2, 3, 4)]
        experts = [row["experts per token"][0] for row in quarters]
        for i, row in enumerate(quarters, start=1):
            assert row["spent"][0] == pytest.approx(sum(experts[:i]) / i / 2)
            assert row["spent"][0] <= 1 + 1e-6 or "not strict" in name


# -------- difficulty


def test_difficulty_counts_the_tokens_of_each_kind(ask):
    """Every known token is read as one kind; what is predicted at a position is what is read at the next."""
    run = opened(ask, "seqtopk")
    masks = difficulty.problem_parts(run)
    assert list(masks) == KINDS
    windows = torch.cat([x for x, _ in run.batches])
    read = torch.stack([masks[f"{kind}, read"] for kind in difficulty.KINDS])
    assert read.shape[1:] == windows.shape and read.sum(0).max() == 1
    assert not read[:, windows == run.dataset.tokenizer.eot].any()
    for kind, mask in zip(difficulty.KINDS, read):
        predicted = masks[f"{kind}, predicted"]
        assert torch.equal(predicted[:, :-1], mask[:, 1:]) and not predicted[:, -1].any()
        assert ask("difficulty")[f"seqtopk, k=2, {kind}, read"]["tokens"] == mask.sum() > 0
    windows.fill_(run.dataset.tokenizer.eot)  # no kind occurs
    none = difficulty.problem_parts(run._replace(batches=[(windows, None)]))
    assert not any(mask.any() for mask in none.values())
    row = ask("difficulty")["seqtopk, k=2, all tokens"]
    assert -1 <= row["rho loss"][0] <= 1 and -1 <= row["rho entropy"][0] <= 1
    assert [curve["branch"] for curve in row["curves"]] == [1] and len(row["curves"][0]["experts"]) == 20


def test_questions_after_the_first_problem_are_questions(ask):
    """A whole window of several problems: the kinds of a problem's tokens are the same wherever it stands."""
    tokenizer = data.make_tokenizer(data.load(str(ask.folder / "arithmetic")).meta["tokenizer"])
    ids = [[*tokenizer.encode(text), tokenizer.eot] for text in ask.docs[:3]]
    windows = [torch.tensor([list(chain(*ids))]), *(torch.tensor([one]) for one in ids)]
    kinds = []
    for window in windows:
        run = SimpleNamespace(batches=[(window, None)], dataset=SimpleNamespace(tokenizer=tokenizer))
        masks = difficulty.problem_parts(run)
        kinds.append(torch.stack([masks[f"{kind}, read"][0] for kind in difficulty.KINDS]))
    assert torch.equal(kinds[0], torch.cat(kinds[1:], dim=1))
    assert torch.equal(kinds[0].any(0), windows[0][0] != tokenizer.eot)


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
    names = dict(zip("qnwcrf", difficulty.KINDS, strict=True))
    pieces, letters = zip(*PIECES)
    want, kinds_of_text = [names[letter] for letter in letters], difficulty.kinds_of_text
    assert kinds_of_text(list(pieces)) == want
    assert kinds_of_text([*pieces, "", *pieces]) == [*want, "", *want]
    assert kinds_of_text(list(pieces[1:])) == [""] * 12 + want[13:]  # its first line has no beginning
    assert kinds_of_text(list(pieces[13:])) == want[13:]  # "Answer:" is a beginning too
    assert kinds_of_text(list("Question: 5\n")) == [names["q"]] * 9 + [names["n"]] * 2 + [names["q"]]


@pytest.mark.parametrize("levels", [2, 3, 10, 1000])
def test_spearman_is_the_correlation_of_ranks(levels):
    """Pearson's correlation of the ranks, which ties share; 1 or -1 for what rises or falls with it."""
    g = torch.Generator().manual_seed(levels)
    a, b = (torch.randint(levels, (5, 12), generator=g).double() for _ in range(2))

    def ranks(x):  # from 1; equal values get the mean of their places
        x = x.flatten()
        return (x < x[:, None]).sum(1) + ((x == x[:, None]).sum(1) + 1) / 2

    want = torch.corrcoef(torch.stack([ranks(a), ranks(a + b)]).double())[0, 1].item()
    assert difficulty.spearman(a, a + b) == pytest.approx(want)
    assert difficulty.spearman(a, a**3) == pytest.approx(1)
    assert difficulty.spearman(a, -a) == pytest.approx(-1)
    assert difficulty.spearman(a, torch.ones_like(a)) == 0  # nothing varies: neither rises nor falls
    by_hand = difficulty.spearman(torch.tensor([1.0, 2, 2, 9]), torch.tensor([1.0, 3, 2, 4]))
    assert by_hand == pytest.approx(4.5 / math.sqrt(4.5 * 5))  # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4


def test_extremes_are_the_ends_of_many_rows():
    """Few rows stay as they are; of many, the EXTREMES highest and as many of the lowest, in order."""
    rows = [{"experts per token": [float(n * 7 % 17), None]} for n in range(17)]
    assert difficulty.extremes(rows[:16]) == rows[:16]
    found = [row["experts per token"][0] for row in difficulty.extremes(rows)]
    assert found == [*range(16, 8, -1), *range(7, -1, -1)]


def test_experts_by_entropy_are_means_of_equal_shares():
    entropy = torch.randperm(60).view(3, 20).float()
    found = difficulty.experts_by_entropy(100 - entropy, entropy)
    assert found["entropy"] == [3 * i + 1 for i in range(20)]
    assert found["experts"] == [99 - 3 * i for i in range(20)]


def test_frequent_tokens_are_those_read_fifty_times():
    """Each by its text, where it is read."""
    x = torch.cat([torch.full((50,), 65), torch.full((49,), 66), torch.full((61,), 10)]).view(4, 40)
    dataset = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: chr(ids[0])))
    found = difficulty.frequent_tokens(
        SimpleNamespace(batches=[(x[:2], None), (x[2:], None)], dataset=dataset)
    )
    assert list(found) == ["'\\n', read", "'A', read"]
    assert torch.equal(found["'A', read"], x == 65) and found["'\\n', read"].sum() == 61


# -------- gap, discount and prune


def tied_scores(seed, B=3, T=20, E=8):
    """(B, T, E) multiples of 1/8 from -1/2 on: many tie, some are below 0."""
    return torch.randint(-4, 8, (B, T, E), generator=torch.Generator().manual_seed(seed)) / 8


def test_discount_by_rank_by_hand(discount):
    """The nth best is divided by n, below 0 multiplied; of equals the lower expert is the better one."""
    scores = torch.tensor([[0.125, 0.5, 0.375], [-2.0, -0.5, -1.0], [0.5, 0.5, 0.5], [-1.0, -1.0, 0.25]])
    want = [[0.125 / 3, 0.5, 0.1875], [-6, -0.5, -2], [0.5, 0.25, 0.5 / 3], [-2, -3, 0.25]]
    torch.testing.assert_close(discount.discount_by_rank(scores), torch.tensor(want))
    assert torch.equal(discount.discount_by_rank(torch.tensor([0.0, -0.0, 0.0])), torch.zeros(3))


@pytest.mark.parametrize("seed", range(5))
def test_discounting_keeps_the_order_of_a_token(discount, seed):
    scores = tied_scores(seed)
    both = torch.stack([scores, discount.discount_by_rank(scores)])
    assert torch.equal(*both.argsort(dim=-1, descending=True, stable=True))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_discounted_rules_are_their_definitions(discount, k, strict):
    """SeqTopK's for discounted scores, with no bound from above; the cache gives the same in chunks."""
    scores = tied_scores(k)
    discounted = discount.discount_by_rank(scores)
    assert torch.equal(discount.seqtopk_discount(scores, k), ref_seqtopk(discounted, k, 1, 8))
    online = discount.online_seqtopk_discount(scores, k, strict)
    assert torch.equal(online, ref_online_seqtopk(discounted, k, 1, 8, strict))
    cache = discount.DiscountCache(3, 20, k, 8, strict=strict)
    assert torch.equal(torch.cat([cache.select(part) for part in scores.split([7, 1, 1, 11], 1)], 1), online)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("bounds", [(1, None), (0, 3), (2, 2)])
def test_online_seqtopk_with_a_prior_is_its_definition(gap, bounds, strict):
    """Its candidates compete as earlier tokens' would, and win ties; only real tokens spend. One of no
    tokens is none, and the order of its candidates does not matter."""
    scores, before = tied_scores(0), tied_scores(1, 1, 5)
    min_experts, u = bounds[0], bounds[1] or 4
    prior = before.sort(descending=True).values[..., min_experts:u].flatten()
    for n, some in ((5, prior), (5, prior.flip(0)), (0, prior[:0])):
        state = {"prior": some, "overcommit": torch.tensor(0.0)}
        found = gap.online_seqtopk_prior(scores, 2, *bounds, strict, state=state)
        assert torch.equal(found, ref_online_seqtopk(scores, 2, *bounds, strict, prior=(n, some)))


def test_an_overcommit_is_a_larger_budget_under_the_same_cap(gap):
    """If not strict, one of 1 is online SeqTopK with twice the extra budget. Strict, no prefix spends more
    than its budget, and in all they spend more than without."""
    scores = torch.rand(3, 50, 8, generator=torch.Generator().manual_seed(0))
    state = {"prior": torch.empty(0), "overcommit": torch.tensor(1.0)}
    found = gap.online_seqtopk_prior(scores, 2, 1, 4, False, state=state)
    assert torch.equal(found, online_seqtopk(scores, 3, 1, 4, strict=False))
    strict = gap.online_seqtopk_prior(scores, 2, 1, 4, True, state=state)
    spent = strict.sum(-1).cumsum(-1)
    assert (spent <= 2 * torch.arange(1, 51)).all()
    assert strict.sum() > online_seqtopk(scores, 2, 1, 4).sum()


def test_a_prior_is_made_of_quantiles(gap):
    """Of n0 * c values at the middles of equal shares of the candidates; their bounds are the router's."""
    scores = torch.arange(1000.0).view(1, 100, 10)  # the candidates of rank 2 and 3 are 8, 7, 18, 17 ...
    candidates = (scores[0, :, [8, 7]]).flatten().sort().values
    found = gap.prior(scores, 1, 5)
    assert len(found) == 10 and torch.equal(found, candidates[10::20])
    assert len(gap.prior(scores, 1, 0)) == 0
    assert torch.equal(gap.prior(scores, 1, 100), candidates)


def test_the_rows_of_gap_are_losses_under_the_usual_prior(ask, gap):
    """n0 = 64: the loss with as many quantiles of each layer's own scores."""
    run, rows = opened(ask, "seqtopk", router="online_seqtopk_prior"), ask("gap")
    x = usual_text(ask, run)
    with torch.no_grad():
        routing = run.model(x, router="seqtopk")[2].routing
    for layer, seen in zip(run.model.expert_layers(), routing, strict=True):
        layer.state.prior = gap.prior(seen.scores, 2, 64)
    found = run.evaluate(run.decode)["loss"]
    (one,) = (r for r in gap.answer(ask.one) if r["what"] == "seqtopk, k=2, n0=64")
    assert one["nats"][0] == pytest.approx(found, rel=1e-6)
    assert one["nats"][0] != rows["seqtopk, k=2, n0=0"]["nats"][0]


def usual_text(ask, run):
    """What the use of experts is counted in."""
    return run.dataset.train_batch(0, 8, 32, ask.lab.config.seed)[0]


def test_experts_without_a_token_are_dropped_for_nothing(ask):
    """Dropping experts that no token uses leaves the logits, and the run's own model, as they are."""
    run = opened(ask, "seqtopk")
    x, bias = usual_text(ask, run), torch.zeros(12).index_fill_(0, torch.tensor([1, 5, 11]), -100.0)
    for layer in run.model.expert_layers():
        layer.bias.copy_(bias)
    smaller = prune.without_least_used(run, ask.lab.config.seed)
    assert torch.equal(smaller(x, router=run.decode)[0], run.model(x, router=run.decode)[0])
    assert all(torch.equal(layer.bias, bias) for layer in run.model.expert_layers())


@pytest.mark.parametrize("router", ["topk", "seqtopk"])
def test_the_least_used_quarter_is_dropped(ask, router):
    """No token goes to the three of twelve experts that fewest tokens of the training text go to."""
    run = opened(ask, router)
    x = usual_text(ask, run)
    load = run.model(x, router=run.decode)[2].load.tolist()
    found = prune.without_least_used(run, ask.lab.config.seed)(x, router=run.decode)[2].load
    for before, after in zip(load, found, strict=True):
        dropped = sorted(range(12), key=lambda e: (-before[e], e))[9:]
        assert not after[dropped].any() and (after > 0).sum() > 3


def test_more_experts_per_token_than_are_kept_is_one_line(ask):
    with pytest.raises(ValueError, match=r"^k is 10, .*\b9\b[^\n]*$"):
        prune.without_least_used(opened(ask, "topk", k=10), ask.lab.config.seed)


# -------- sparsity, scores, oracle and layers


def test_interpolated_by_hand(sparsity):
    """A cubic in log K is found again from four points, between them and beyond; from two, a line."""
    cubic = {2**x: 5 - x + x**2 / 4 - x**3 / 32 for x in (0, 1, 2, 3, 0.5, 1.96, -0.1, 3.1)}
    losses = {k: cubic[k] for k in (1, 2, 4, 8)}
    for k, want in cubic.items():
        assert sparsity.interpolated(losses, k) == pytest.approx(want)
    assert sparsity.interpolated({2: 4.0, 8: 3.0}, 4) == pytest.approx(3.5)


def test_equal_spending_is_the_difference_to_topk_of_as_many_experts(ask, sparsity):
    """Of the start's own curve; TopK has none."""
    starts = Start(1, 1), Start(1, 2)

    def runs(k, nats):
        return {start: {"nats": nats + start.branch, "experts per token": k} for start in starts}

    found = {
        f"{router}, k={k}{how}": lab.Compared("", runs(k, nats + len(how)))
        for router, k, nats in (("topk", 2, 4.0), ("topk", 8, 3.0), ("other", 4, 3.4))
        for how in ("", lab.UNTUNED)
    }
    sparsity.add_equal_spending(found)
    for how in ("", lab.UNTUNED):
        equal = [found[f"other, k=4{how}"].runs[start][lab.EQUAL] for start in starts]
        assert equal == pytest.approx([-0.1] * 2)
    assert lab.EQUAL not in found["topk, k=2"].runs[starts[0]]
    row = ask("sparsity")["seqtopk, k=2"]
    assert row["experts per token"][0] < 2 and row[lab.EQUAL][0] != row["nats, to base"][0]
    assert lab.EQUAL not in ask("sparsity")["topk, k=2"]


def test_cutoffs_that_are_set_give_usual_text_k_experts(ask, sparsity):
    run = opened(ask, "topk", router=sparsity.THRESHOLD)
    assert run.losses()["experts per token"] == 0  # before
    sparsity.set_cutoffs(run, 0)
    (usual, _) = run.usual_routing("topk", 0)
    layer = run.model.expert_layers()[0]
    taken = ROUTERS[sparsity.THRESHOLD].select(usual.scores, 2, state=layer.router_state())
    assert all(40 <= pairs <= 42 for pairs in taken.sum((0, 1)).tolist())  # 256 * 2 / 12, less ties


def test_selecting_by_probabilities_changes_nothing_and_by_others_no_weight(ask, scores):
    """A rewired layer selects by its ranking alone, also from a cache; logits are the order of sigmoids."""
    run, x = opened(ask, "seqtopk"), opened(ask, "seqtopk").batches[0][0]
    plain = run.model(x)

    def rewired(ranking):
        model = opened(ask, "seqtopk").model
        scores.select_by(ranking)(model)
        cache = model.new_cache(len(x), 32)
        parts = torch.cat([model(part, cache=cache)[0] for part in x.split([7, 1, 24], 1)], 1)
        torch.testing.assert_close(parts, model(x, router="online_seqtopk")[0])
        return model(x)

    assert torch.equal(rewired(lambda logits, scores, weight, x: scores)[0], plain[0])
    by_logits = rewired(scores.RANKINGS["logits"])
    assert torch.equal(by_logits[0], rewired(lambda logits, *others: logits.sigmoid())[0])
    assert not torch.equal(by_logits[0], plain[0])
    assert torch.equal(by_logits[2].routing[0].scores, plain[2].routing[0].scores)  # of the first layer


@pytest.mark.parametrize("order", ["high loss", "low loss", "high entropy", "random"])
def test_an_oracle_gives_thirds_of_a_sequence_one_two_and_three_experts(ask, oracle, order):
    """By the losses under TopK; a second reading follows it, and leaves nothing behind."""
    run = opened(ask, "topk", router="allotted")
    x, y = run.batches[0]
    logits, _, _ = run.model(x)
    loss, entropy = lab.loss_and_entropy(logits, y)
    oracle.read_twice(oracle.by_thirds(oracle.ORDERS[order]))(run.model)
    _, found, stats = run.model(x, y)
    n_taken = stats.n_taken[0]
    assert torch.equal(n_taken, stats.n_taken[1])
    assert [(n_taken == n).sum(1).tolist() for n in (1, 2, 3)] == [[11] * 4, [11] * 4, [10] * 4]
    if order != "random":
        by = {"high loss": loss, "low loss": -loss, "high entropy": entropy}[order]
        assert by[n_taken == 1].sum() < by[n_taken == 2].sum() < by[n_taken == 3].sum()
        assert by[0][n_taken[0] == 1].max() <= by[0][n_taken[0] == 3].min()
    assert torch.equal(found, run.model(x, y)[1])  # also the random one: a function of the text
    assert all(layer.state.n_taken.numel() == 0 for layer in run.model.expert_layers())


@pytest.mark.parametrize("name", ["layers", "oracle", "scores"])
def test_a_judgement_is_named_after_its_questions_own_file(ask, request, monkeypatch, name):
    """The file holds how a model is rewired: another rewiring is another judgement."""
    module, arms = request.getfixturevalue(name), []
    monkeypatch.setattr(module, "compare", lambda lab, found: arms.extend(found))
    module.answer(ask.lab)
    rewired = [arm for arm in arms if arm.rewire]
    assert rewired and all(module.__file__ in lab.code_of(arm, lab.all_figures) for arm in rewired)


def test_layers_share_what_their_sequence_has(ask, layers, monkeypatch):
    """With a budget for each layer all spend T*K; with one for all only the sum is that of all layers."""
    allots = {}
    monkeypatch.setattr(layers, "read_twice", lambda allot: allots.setdefault(allot.__name__, allot))
    monkeypatch.setattr(layers, "compare", lambda lab, arms: [])
    layers.answer(ask.lab)
    run = opened(ask, "topk")
    x, y = run.batches[0]
    logits, _, stats = run.model(x)
    each, shared = (torch.stack(allots[name](x, y, logits, stats)) for name in ("each_layer", "all_layers"))
    assert each.shape == shared.shape == (2, 4, 32) and (each.sum(2) == 64).all()
    assert (shared.sum((0, 2)) == 128).all() and not (shared.sum(2) == 64).all()
    assert torch.equal(each[1], ROUTERS["seqtopk"].select(stats.routing[1].scores, 2).sum(-1))


# -------- judging


def test_by_token_is_the_loss_token_by_token(ask):
    """The means of by_token are evaluate_text's; entropy and experts are those of the model's own forward."""
    run = opened(ask, "seqtopk")
    for router in ("topk", "seqtopk", "online_seqtopk"):
        loss, entropy, experts = run.by_token(router)
        found = run.evaluate(router)
        assert loss.mean().item() == pytest.approx(found["loss"], rel=1e-5)
        assert experts.float().mean().item() == pytest.approx(found["experts"][0], rel=1e-5)
    assert loss.shape == entropy.shape == experts.shape[:2] == (16, 32) and experts.shape[2] == 2
    x, y = run.batches[1]
    logits, _, stats = run.model(x, router="online_seqtopk")
    share = logits.softmax(-1).double()
    expected = -share.gather(-1, y[..., None])[..., 0].log(), -(share * share.log()).sum(-1)
    for found, want in zip((loss, entropy), expected):
        torch.testing.assert_close(found[4:8].double(), want, atol=1e-4, rtol=0)
    assert torch.equal(experts[4:8], stats.n_taken.permute(1, 2, 0))


def test_only_what_is_learned_counts_in_a_loss(ask):
    """Targets of -1 are in no mean and have no bytes, however many a batch has of them."""
    run = opened(ask, "seqtopk")
    loss, _, _ = run.by_token("topk")
    learned = torch.rand(loss.shape, generator=torch.Generator().manual_seed(0)) < torch.linspace(0.1, 1, 32)
    xs, targets = (torch.cat(parts) for parts in zip(*run.batches))
    batches = list(zip(xs.split(8), targets.masked_fill(~learned, -1).split(8), strict=True))
    found = run._replace(batches=batches).evaluate("topk")
    n_bytes = run.dataset.tokenizer.token_bytes[targets[learned]].sum()
    assert found["loss"] == pytest.approx(loss[learned].mean().item(), rel=1e-5) and found["experts"][0] == 2
    assert found["bpb"] == pytest.approx(loss[learned].sum().item() / math.log(2) / n_bytes, rel=1e-5)
    with pytest.raises(ValueError, match="all tokens are learned"):
        run._replace(dataset=replace(run.dataset, val_answers=object())).by_token("topk")


def test_a_run_opens_changed(ask):
    """open_run gives the last checkpoint, its validation windows, and a config with the changes."""
    run, loose = opened(ask, "seqtopk"), opened(ask, "seqtopk", strict=False)
    assert run.model.config.strict and not loose.model.config.strict and run.decode == "online_seqtopk"
    assert not run.model.training
    for a, b in zip(run.model.parameters(), loose.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.cat([x for x, _ in run.batches]).shape == (16, 32)
    short = opened(ask, "seqtopk", block_size=8)
    assert short.model.config.block_size == 8 and short.batches[0][0].shape == (4, 8)


def starts(*figures, key="nats"):
    return {Start(1, branch): {key: value} for branch, value in enumerate(figures)}


def test_means_have_the_error_of_the_mean():
    assert lab.mean_and_error([1.0, 2.0, 3.0]) == pytest.approx([2.0, 1 / 3**0.5])
    assert lab.mean_and_error([4.0]) == [4.0, None]
    row = lab.mean_row("x", starts(2.0, 4.0, 9.0), starts(1.0, 2.0))
    assert row["nats"][0] == 5 and row["nats, to base"] == [1.5, 0.5]  # the first two pairs only


@pytest.mark.parametrize(
    ("key", "values", "verdict"),
    [
        ("nats", [-1.0, -1.1, -0.9, -1.0, -1.2], "better"),
        ("nats", [1.0, 1.1, 0.9, 1.0, 1.2], "worse"),
        ("exact match", [1.0, 1.1, 0.9, 1.0, 1.2], "better"),
        ("nats", [1.0, 1.1, 0.9, 1.0], "not told apart"),  # four runs
        ("nats", [3.0, -1.0, 4.0, 1.0, 2.0], "not told apart"),  # 1.8 +- 0.86
        ("nats", [0.0] * 5, "not told apart"),
    ],
)
def test_a_verdict_asks_for_five_runs_and_three_errors(key, values, verdict):
    row = lab.mean_row("x", starts(*values, key=key), starts(*[0.0] * 5, key=key))
    assert row[lab.VERDICTS[f"{key}, to base"]] == verdict
    assert ("1 have" in lab.comparisons([row])) == (len(values) == 5)


@pytest.mark.parametrize(("runs", "share"), [(2, 0.2048), (3, 0.0955), (6, 0.0301), (1001, 0.0028)])
def test_chance_is_students(runs, share):
    """Two-sided, beyond 3, of a table."""
    assert lab.chance(runs) == pytest.approx(share, abs=1e-4)


def test_a_column_may_be_missing_in_the_first_run():
    """A mean is over the runs that have the column."""
    row = lab.mean_row("a", {FIRST: {"b": 1.0}, Start(1338, 1): {"b": 2.0, "c": 3.0}}, {})
    assert row["b"][0] == 1.5 and row["c"] == [3.0, None]


def test_the_difference_for_each_trunk_is_kept():
    runs = {Start(s, b): {"nats": float(s * b)} for s in (1, 2) for b in (1, 2)}
    row = lab.mean_row("b", runs, {start: {"nats": 1.0} for start in runs})
    assert row["nats, by trunk"] == {1: 0.5, 2: 2.0}


def test_runs_of_other_data_are_refused(own):
    """A dataset that was prepared anew since a run was trained is one line that says what to do."""
    here, folder = own
    arms = lab.router_arms(here, ["topk"], 2)
    assert len(lab.compare(here, arms)) == 1
    meta, text = json.loads((folder / "meta.json").read_text()), (folder / "val.bin").read_bytes()
    (folder / "meta.json").write_text(json.dumps(meta | {"sha256": {}}))
    (folder / "val.bin").write_bytes(text[2:] + text[:2])
    with pytest.raises(ValueError, match=r"other than when .* was trained.*delete .*runs"):
        lab.open_run(here, arms[0], FIRST)


def test_a_finished_run_whose_checkpoint_was_deleted(own):
    """Who needs it says what is missing and what to delete: its judge, and a branch that starts from it."""
    here, said = own[0], r"last.pt of a finished run is missing.*delete .*runs"
    (trunk,) = lab.router_arms(here, ["topk"], 2)
    assert len(lab.compare(here, [trunk])) == 1
    (lab.run_folder(here.config, trunk, FIRST) / "last.pt").unlink()
    with pytest.raises(ValueError, match=said):
        lab.open_run(here, trunk, FIRST)
    branch = replace(trunk, after=trunk)
    settings = lab.run_settings(here.config, branch, FIRST)
    assert re.search(said, lab.train_here(branch, settings, lab.run_folder(here.config, branch, FIRST)))


def test_what_a_run_compiled_is_forgotten(own, monkeypatch):
    """Its graphs do not count against the next model, nor shape it; also where training fails."""
    runs, resets, set_up = [], [], lab.set_up
    monkeypatch.setattr(train, "pick_compile", lambda *args: (True, "tried"))
    monkeypatch.setattr("model.as_graph", lambda function: function)
    monkeypatch.setattr(lab, "set_up", lambda settings: runs.append(set_up(settings)) or runs[-1])
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(len(runs)))
    assert torch._dynamo  # loaded, as by a run that compiles
    here, folder = own
    arm = replace(lab.router_arms(here, ["topk"], 2)[0], after=None)

    def fail(model):
        assert "forward" in vars(model.blocks[0])
        raise train.Diverged("the loss")

    for number, (rewire, said) in enumerate([(None, None), (fail, "the loss")], 1):
        settings, place = lab.run_settings(here.config, arm, FIRST), folder / str(number)
        place.mkdir()
        assert lab.train_here(replace(arm, rewire=rewire), settings, place) == said
        assert resets == list(range(1, number + 1))
        assert "forward" not in vars(runs[-1].model.blocks[0])


def test_an_oracle_of_answers_is_refused_before_anything_is_trained(own, oracle, monkeypatch):
    here, folder = own
    monkeypatch.setattr(lab, "train_run", None)
    monkeypatch.setattr(data, "load", lambda path: SimpleNamespace(folder=folder, val_answers=[]))
    with pytest.raises(ValueError, match=r"dataset is .*, but must be one of which all tokens are learned"):
        oracle.answer(here)


def test_figures_have_the_exact_match(ask, own, monkeypatch):
    """Where the data has test problems, the share of them that is solved, of PROBLEMS of each level."""
    here, folder = own
    lines = ({"question": f"{n}?", "answer": f"#### {n}", "result": n, "level": n % 2} for n in range(6))
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = {prompt_of(f"{n}?"): (f"#### {3 if n == 1 else n}\n", 2) for n in range(4)}
    monkeypatch.setattr(lab, "PROBLEMS", 2)
    monkeypatch.setattr(
        solve, "answer_prompts", lambda model, tokenizer, prompts, *rest: [answers[p] for p in prompts]
    )
    arms = lab.router_arms(here, ["topk"], 2)
    assert lab.compare(here, arms)[0]["exact match"] == [0.75, None]
    halves = lab.gather(changed(here, branches=2), lab.untuned(arms), lab.all_figures)[
        f"topk, k=2{lab.UNTUNED}"
    ]
    parts = [figures["exact match"] for figures in halves.runs.values()]
    assert parts == [0.5, 1.0]  # of problems 0 and 1, and of 2 and 3: each half has both levels
    assert "exact match" not in ask("online")["topk, k=2"]


def test_a_dense_model_stands_beside_routers(ask):
    """It has losses, and nothing to say of experts."""
    here = changed(ask.lab, from_scratch=True, seeds=2)
    arms = lab.router_arms(here, ["topk"], 2)
    arms.append(Arm("dense", routers.recipe(here.shared, "dense", 2), "topk, k=2"))
    topk, dense = lab.compare(here, arms)
    assert "experts per token" in topk and "experts per token" not in dense
    assert len(dense["nats, to base"]) == 2 and len(results.lines_of([topk, dense])) == 3


# -------- arms and their runs


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN])
def test_a_killed_question_stops_as_by_ctrl_c(ctrl_c):
    """Also in the background of a script, where Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, ctrl_c)
    try:
        with pytest.raises(KeyboardInterrupt):
            lab.interrupt()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("router", [*ROUTERS, "loss_free", "dense"])
def test_the_recipe_of_each_router_is_accepted(router, quick):
    """train.py takes the settings with which a router is compared, and they are what its row needs."""
    here = Lab.of(routers.RouterOptions(quick=quick, device="cpu"))
    arm = Arm(router, routers.recipe(here.shared, router, 2), router)
    settings = lab.run_settings(here.config, arm, Start(1, 0))
    argv = [f"--{key}={str(value).lower()}" for key, value in settings.items()]
    config = train.TrainConfig(**parse(argv, train.TrainConfig)[0])
    assert config.router == {"loss_free": "topk", "dense": "topk"}.get(router, router)
    width = config.k * (config.dense_hidden or config.n_hidden)
    assert width == 2 * here.shared["n_hidden"] and (config.n_expert == 1) == (router == "dense")
    assert all(getattr(config, key) == value for key, value in ROUTERS[config.router].needs.items())
    alone = router in ("loss_free", "expert_threshold", "remoe")
    assert (config.balance_coef == 0) == (config.z_coef == 0) == alone
    assert (config.entropy_coef, config.mass) == ((1e-4, 0.1) if router == "top_p" else (0, 0.4))
    assert (config.bias_rate > 0) == (router == "loss_free")
    assert config.max_iters == here.shared["max_iters"] // (lab.QUICK if quick else 1)


def test_a_run_has_a_folder_of_its_settings(tmp_path):
    """Other settings, another seed and --quick have another folder; their order makes none."""
    options, one = OptionsWithK(), Arm("a", {"router": "seqtopk", "k": 2}, "a")
    other, more = Arm("another name", {"k": 2, "router": "seqtopk"}, "b"), one.vary(max_experts=3)
    assert (more.base, more.name) == ("a", "a, max_experts=3") and "max_experts" not in one.settings
    config = tmp_path / "trunk.py"  # the same name, another setting
    config.write_text("from config.trunk import *\nlearning_rate = 1e-3\n")
    branch = replace(one, after=other)
    arms = [one, more, branch, replace(one, after=more), replace(branch, other_data=7)]
    arms += [replace(branch, rewire=print), replace(branch, rewire=print, name="c")]
    folders = {lab.run_folder(options, arm, Start(1, 1)) for arm in arms}
    folders |= {lab.run_folder(options, one, Start(2, 1)), lab.run_folder(options, branch, Start(1, 2))}
    folders |= {lab.run_folder(replace(options, quick=True), one, Start(1, 1))}
    folders |= {lab.run_folder(replace(options, config=str(config)), one, Start(1, 1))}
    assert len(folders) == 11
    alike = [
        lab.run_folder(options, arm, start) for arm in (one, other) for start in (Start(1, 1), Start(1, 2))
    ]
    alike.append(lab.run_folder(options, replace(branch, tuned=False), Start(1, 1)))
    assert set(alike) == {lab.run_folder(options, one, Start(1, 1))} <= folders


def test_a_branch_goes_on_with_its_trunks_weights_and_other_batches(ask):
    """From the last checkpoint of the same seed; the divisor of its weights stays that of the trunk."""
    (arm,) = lab.router_arms(ask.lab, ["seqtopk"], 2, learning_rate=1e-30)  # so the weights stay
    assert lab.train_run(ask.lab, arm, Start(1337, 2))
    said = lab.run_settings(ask.lab.config, arm, Start(1337, 2))
    start = lab.run_folder(ask.lab.config, ask.lab.trunk, FIRST) / "last.pt"
    assert said["init_from"] == start and said["seed"] == 1337 + 2 * lab.OTHER_DATA
    end = load_checkpoint(lab.run_folder(ask.lab.config, arm, Start(1337, 2)) / "last.pt")
    start = load_checkpoint(start)
    assert (end["config"]["router"], end["config"]["k"], end["config"]["norm_best"]) == ("seqtopk", 2, 4)
    assert start["train_config"]["seed"] == 1337 and end["train_config"]["seed"] == said["seed"]
    assert end["step"] == 2 and all(torch.equal(start["model"][n], end["model"][n]) for n in start["model"])


def test_an_untuned_arm_is_its_trunk_judged_by_parts_of_the_text(ask):
    """Nothing is trained; the parts are all of the text, and the settings of routing are the arm's."""
    (arm,) = lab.untuned(lab.router_arms(ask.lab, ["seqtopk"], 2, first_iters=1))
    assert arm.name == arm.base == "seqtopk, k=2, untuned"
    runs = [lab.open_run(ask.lab, arm, start) for start in ask.lab.starts]
    assert sorted(len(run.batches) for run in runs) == [2, 2] and runs[0].model.config.router == "seqtopk"
    whole = opened(ask, "topk").batches
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(runs[0].batches, whole[::2], strict=True))
    assert not lab.untuned([replace(arm, after=None)])


@pytest.mark.parametrize(
    ("options", "said", "starts"),
    [
        ({}, "3 branches of 100 iterations after each of 2 trunks", 6),
        ({"quick": True}, "2 branches of 10 iterations after each of 1 trunks", 2),
        ({"from_scratch": True}, "3 runs of each arm from scratch", 3),
        ({"from_scratch": True, "quick": True, "seeds": 4}, "4 runs of each arm from scratch", 4),
    ],
)
def test_a_design_is_as_its_name_says(monkeypatch, options, said, starts):
    monkeypatch.setattr(lab, "TUNING", TUNING)
    here = Lab.of(BranchOptions(device="cpu", **options))
    assert here.design == f"{said}, config/trunk.py" and len(set(here.starts)) == starts
    (arm,) = lab.router_arms(here, ["topk"], 2)
    iterations = lab.run_settings(here.config, arm, here.starts[0])["max_iters"]
    assert iterations == {6: 100, 2: 10, 3: 2500, 4: 250}[starts]


def test_failures_are_left_out(ask, capsys):
    """A run that fails, or whose trunk does, is named and left out; the others go on."""
    (good,) = lab.router_arms(ask.lab, ["topk"], 2)
    bad = Arm("bad", {"router": "topk", "k": 99}, "bad")
    after, here = replace(good, name="after bad", after=bad), changed(ask.lab)
    found = lab.gather(here, [bad, good, after], lab.all_figures)
    assert list(found) == ["topk, k=2"] and list(found["topk, k=2"].runs) == here.starts
    out = "".join(capsys.readouterr())
    assert "bad, seed 1337, branch 1 failed: k is 99" in out and "missing: bad, seed 1337, branch 2" in out
    assert here.missing == [f"{name}, seed 1337, branch {b}" for b in (1, 2) for name in ("bad", "after bad")]
    assert not (lab.run_folder(here.config, bad, FIRST) / "finished").exists()


def test_the_budget_is_of_the_question_and_in_minutes(ask, monkeypatch):
    """All trainings of a question share one deadline; what has no budget begins."""
    now = [0.0]
    monkeypatch.setattr(lab.time, "monotonic", lambda: now[0])
    assert Lab.of(OptionsWithK()).deadline == math.inf
    here, never = changed(ask.lab, budget=2.0), Arm("never", {"router": "topk", "learning_rate": 0.5}, "")
    assert here.deadline == 120.0
    now[0] = 121.0
    assert here.deadline == 120.0 and lab.gather(here, [never], lab.all_figures) == {}
    assert here.missing == ["never, seed 1337, branch 1", "never, seed 1337, branch 2"]


def fresh_run(ask, monkeypatch, folder, train_here):
    """What train_run says of a run that is not there yet, which train_here trains; and its folder."""
    monkeypatch.setattr(lab, "RUNS", folder)
    monkeypatch.setattr(lab, "train_here", train_here)
    arm = ask.lab.trunk
    return lab.train_run(ask.lab, arm, FIRST), lab.run_folder(ask.lab.config, arm, FIRST)


def is_locked(path):
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_nobody_else_trains_in_the_folder_of_a_run(ask, monkeypatch, tmp_path):
    """While a run is trained its folder is locked; then it holds its end, without the optimisers."""

    def locked(arm, settings, folder):
        assert is_locked(folder / "train.txt")
        return TRAIN_HERE(arm, settings, folder)

    done, folder = fresh_run(ask, monkeypatch, tmp_path, locked)
    assert done and (folder / "finished").exists() and not (folder / "best.pt").exists()
    assert not is_locked(folder / "train.txt") and "causal validation" in (folder / "train.txt").read_text()
    assert load_checkpoint(folder / "last.pt")["optimizers"] == []


def test_work_is_shared_out_among_processes():
    """What another process does comes later; only when nothing else is left is it waited for."""
    asked, busy = [], {0: 3, 2: 1}  # job -> how often it is found busy

    def work(number, wait):
        asked.append((number, wait))
        if not wait and busy.get(number, 0):
            busy[number] -= 1
            raise BlockingIOError
        return number * 10

    assert list(lab.share_out(4, work)) == [(1, 10), (3, 30), (2, 20), (0, 0)]
    order = [(0, False), (1, False), (2, False), (3, False), (0, False), (2, False), (0, False), (0, True)]
    assert asked == order


def test_a_run_that_another_process_trains_is_busy(ask, monkeypatch, tmp_path):
    """Unless it is waited for; and so are its branches."""
    monkeypatch.setattr(lab, "RUNS", tmp_path)
    (branch,) = lab.router_arms(ask.lab, ["topk"], 2)
    with lab.locked(lab.run_folder(ask.lab.config, ask.lab.trunk, FIRST), wait=False):
        for arm in (ask.lab.trunk, branch):
            with pytest.raises(BlockingIOError):
                lab.train_run(ask.lab, arm, FIRST, wait=False)


@pytest.mark.parametrize("late", [False, True])
def test_what_another_process_has_finished_meanwhile_is_not_trained(ask, monkeypatch, tmp_path, late):
    """After the wait for a lock a run may be finished, or the deadline over: nothing begins then."""
    here, now, locked = changed(ask.lab, budget=1.0), [0.0], lab.locked
    monkeypatch.setattr(lab, "RUNS", tmp_path)
    monkeypatch.setattr(lab, "train_here", lambda *args: pytest.fail("a run began"))
    monkeypatch.setattr(lab.time, "monotonic", lambda: now[0])

    def waited(folder, wait):
        now[0] = 100.0
        if not late:
            folder.mkdir()
            (folder / "finished").touch()
        return locked(folder, wait)

    monkeypatch.setattr(lab, "locked", waited)
    assert lab.train_run(here, here.trunk, FIRST) == (not late)


def test_a_run_whose_end_was_not_saved_is_not_finished(ask, monkeypatch, tmp_path, capsys):
    """It is named, and done again."""
    monkeypatch.setattr(train.Run, "save", lambda *args: False)
    done, folder = fresh_run(ask, monkeypatch, tmp_path, TRAIN_HERE)
    assert not done and not (folder / "finished").exists()
    assert "its end could not be saved" in capsys.readouterr().out
    monkeypatch.undo()
    assert fresh_run(ask, monkeypatch, tmp_path, TRAIN_HERE)[0]


def test_a_start_that_was_cut_short_leaves_no_log(ask, monkeypatch, tmp_path):
    """What a run wrote before its first checkpoint is gone when it begins again."""
    _, folder = fresh_run(ask, monkeypatch, tmp_path, lambda *args: "cut short")
    (folder / "log.jsonl").write_text('{"kind": "train", "step": 1}\n')
    assert fresh_run(ask, monkeypatch, tmp_path, TRAIN_HERE) == (True, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps.count(1) == 1


def test_a_run_that_is_interrupted_goes_on_where_it_stopped(ask, monkeypatch, tmp_path):
    """Ctrl-C saves it, and stops the question too."""
    when(monkeypatch, 7, interrupt)
    with pytest.raises(KeyboardInterrupt):
        fresh_run(ask, monkeypatch, tmp_path, TRAIN_HERE)
    (folder,) = tmp_path.iterdir()
    assert load_checkpoint(folder / "last.pt")["step"] == 7 and not (folder / "finished").exists()
    assert fresh_run(ask, monkeypatch, tmp_path, TRAIN_HERE) == (True, folder)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line["kind"] == "train"] == list(range(1, 11))


# -------- from the command line


@pytest.fixture
def command(ask, capsys, monkeypatch):
    """Answer a question as its file would: its rows, and all that is printed."""

    def command(module, options, *argv):
        argv = [f"--config={ask.folder}/config.py", "--device=cpu", "--dtype=float32", *argv]
        with pytest.raises(SystemExit) as stop:
            lab.main(module.answer, options, argv)
        out = capsys.readouterr().out
        found = json.loads(out.splitlines()[-1])
        assert stop.value.code == bool(found["missing"]) and not found["failed"]
        return found["parts"][module.__name__.rpartition(".")[2]], out

    return command


def test_routers_are_compared_in_pairs_and_none_is_trained_twice(command, ask, monkeypatch, tmp_path):
    """Rows are means over seeds, differences are paired by seed, TopK has no gap, and what is finished is
    read again, with all that it said of itself."""
    monkeypatch.setattr(lab, "RUNS", tmp_path)
    argv = (routers, routers.RouterOptions, "--routers=topk,seqtopk", "--seeds=2", "--ks=1,2")
    rows, out = command(*argv)
    assert [row["what"] for row in rows] == ["topk, k=1", "seqtopk, k=1", "topk, k=2", "seqtopk, k=2"]
    assert routers.__doc__.strip() in out and f"gap: {lab.COLUMNS['gap']}" in out.splitlines()
    assert "design: 2 runs of each arm from scratch" in out and "comparisons: 0 have 5" in out
    base, other = rows[2:]
    assert base["runs"] == other["runs"] == 2 and base["gap"] == [0, 0] and "nats, to base" not in base
    for key in ("nats", "bits/byte", "as trained", "load entropy", "load variance"):
        assert base[key][0] > 0 and base[key][1] > 0  # seeds differ
    assert len(base["dead"]) == 2 and base["bits/byte"][0] < base["nats"][0]
    assert base["experts per token"] == [2, 0] and other["experts per token"][0] <= 2
    assert other["nats, to base"][0] == pytest.approx(other["nats"][0] - base["nats"][0], abs=2e-4)
    assert other["gap"][0] == pytest.approx(other["nats"][0] - other["as trained"][0], abs=2e-4)
    monkeypatch.setattr(lab, "train_here", lambda *args: pytest.fail("a run began"))
    monkeypatch.setattr(lab, "open_run", lambda *args: pytest.fail("a run was judged"))
    assert command(*argv)[0] == rows


def test_without_time_or_with_runs_that_fail_no_results_are_replaced(command, own, tmp_path):
    """Every missing run is named, a run that fails is a line, and --json stays as it was."""
    kept = tmp_path / "kept.json"
    kept.write_text("mine")
    argv = (routers, routers.RouterOptions, "--routers=topk", f"--config={own[0].config.config}")
    rows, out = command(*argv, "--seeds=2", "--budget=0.0", f"--json={kept}")
    assert rows == [] and "missing: topk, k=4, seed 1338" in out
    assert kept.read_text() == "mine" and "kept.json is left as it was" in out
    hot = tmp_path / "hot.py"
    text = Path(own[0].config.config).read_text()
    hot.write_text(text + "learning_rate = 1e9\ngrad_clip = 0.0\nwarmup_iters = 0\n")
    rows, out = command(*argv[:-1], f"--config={hot}", "--seeds=1")
    failed = "topk, k=4, seed 1337 failed: the loss became .* at iteration"
    assert rows == [] and re.search(failed, out)


@pytest.mark.parametrize(
    ("module", "options", "argv", "words"),
    [
        (routers, routers.RouterOptions, ["--routers=topk,seqtop"], ["routers", "'seqtop'", "seqtopk"]),
        (routers, routers.RouterOptions, ["--ks=4,x"], ["ks", "'x'", "8,4,2"]),
        (prune, BranchOptions, ["--ks=4"], ["unknown key 'ks'"]),
        (prune, BranchOptions, ["--k=4"], ["unknown key 'k'"]),
        (prune, BranchOptions, ["--seeds=0"], ["seeds", "at least 1"]),
        (prune, BranchOptions, ["--config=config/trunc.py"], ["config/trunc.py", "did you mean"]),
        (batches, OptionsWithK, ["--k=2", "--config=config/small_dense.py"], ["n_expert", "at least 2"]),
        (arithmetic, arithmetic.Options, ["--init_from=nowhere/x"], ["nowhere"]),
    ],
)
def test_bad_input_is_one_line(module, options, argv, words, capsys, monkeypatch):
    monkeypatch.chdir(results.HOME)
    monkeypatch.setattr(data, "is_hugging_face", lambda name: False)
    error = error_line(capsys, partial(lab.main, module.answer, options), *argv, "--device=cpu")
    assert all(word in error for word in words)


def test_a_question_is_a_script(tmp_path):
    """Started by its path, from any folder, it finds what it imports: its neighbours and the folder above."""
    script = results.HOME / "experiments" / "arithmetic.py"
    command = [sys.executable, str(script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and arithmetic.__doc__.strip() in done.stdout, done.stderr


# -------- problems and their answers

QUESTION, ANSWER = "Tom has {} dollars. Ida gives Tom {}.", "So Tom has {} dollars.\n#### {}"
PROBLEMS = [
    {"question": QUESTION.format(n, "7" * n), "answer": ANSWER.format(2 * n, 2 * n), "result": 2 * n}
    | {"level": n % 2 + 1}
    for n in range(5, 10)
]


@pytest.fixture(scope="module")
def solver():
    """A model whose routing varies, and its tokenizer."""
    tokenizer = data.train_bpe([prompt_of(p["question"]) + p["answer"] for p in PROBLEMS], 300, "toy")
    return lively(vocab_size=tokenizer.vocab_size), tokenizer


@pytest.mark.parametrize("router", ["topk", "online_seqtopk"])
def test_problems_in_a_batch_are_solved_as_one_by_one(solver, router):
    """Padding changes neither the text nor the experts that a problem gets."""
    together, alone = (solve.solve(*solver, PROBLEMS, router, batch_size) for batch_size in (100, 1))
    assert [right for right, _ in together] == [right for right, _ in alone]
    assert [experts for _, experts in together] == pytest.approx([experts for _, experts in alone])


def test_arithmetic_counts_right_answers_by_level(solver, tmp_path, monkeypatch):
    """Problems are counted under their level, as many of each as asked for; the router is named."""
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    save_checkpoint(tmp_path / "best.pt", solver[0], tokenizer=solver[1].meta)
    monkeypatch.setattr(data, "load", lambda name: SimpleNamespace(folder=tmp_path))
    monkeypatch.setattr(
        solve, "solve", lambda model, tokenizer, some, *rest: [(p["level"] == 2, 2) for p in some]
    )
    options = arithmetic.Options(init_from=str(tmp_path), problems=2, device="cpu")
    rows = arithmetic.answer(Lab.of(options))
    assert [(row["problems"], row["exact match"][0]) for row in rows] == [(2, 0), (2, 1), (4, 0.5)]
    assert all("online_seqtopk" in row["what"] for row in rows)


def test_wilson_interval_by_hand():
    """8 of 10 is the textbook's example: 0.490 to 0.943; none and all stay within 0 and 1."""
    assert solve.wilson(8, 10) == pytest.approx([0.8, 0.4902, 0.9433], abs=1e-4)
    assert solve.wilson(0, 7)[:2] == [0, 0] and solve.wilson(7, 7)[::2] == [1, 1]


# -------- tables and figures of what was kept


def write_results(folder, stem, **parts):
    origin = {"command": "python x.py", "machine": "a CPU", "dtype": "float32", "commit": "abc"}
    (folder / f"{stem}.json").write_text(json.dumps({**origin, "parts": parts}))
    return folder / f"{stem}.json"


def row(what, *curves, **values):
    return {"what": what, "runs": len(curves), **values, "curves": list(curves)}


def test_table_of_a_file_by_hand(tmp_path, capsys):
    """Means with their errors, signed differences, no column without a value, names shown as they are."""
    rows = [
        {"what": "topk", "runs": 3, "nats": [4.963, 0.012], "dead": [0, 0.0], "MFU %": None, "curves": []},
        {"what": "a|b", "runs": 1, "nats": [5.0125, None], "nats, to base": [0.0495, 0.003]},
        {"what": "'`'", "steps/s": [1234.56, 7.89], "nats, to base": [-0.5, None]},
    ]
    report.main(["table", str(write_results(tmp_path, "a", routers=rows, empty=[]))])
    assert capsys.readouterr().out.splitlines() == [
        "**routers**: `python x.py`, a CPU, float32, commit abc",
        "",
        "| what | runs | nats | dead | nats, to base | steps/s |",
        "| --- | --- | --- | --- | --- | --- |",
        "| `topk` | 3 | 4.9630 ± 0.0120 | 0 | - | - |",
        "| `a\\|b` | 1 | 5.0125 | - | +0.0495 ± 0.0030 | - |",
        "| ```'`'``` | - | - | - | -0.5000 | 1,234.6 ± 7.9 |",
    ]
    with pytest.raises(ValueError, match="without rows"):
        report.table(write_results(tmp_path, "b", empty=[]))


def test_figures_are_the_same_when_made_again(tmp_path):
    """Each has the labels of its rows, and with several files their names; what is missing is a line."""
    pytest.importorskip("matplotlib")
    names = (
        "loss_by_minutes.svg loss_by_k.svg gain_by_k.svg experts_by_entropy.svg gap_by_position.svg".split()
    )
    lines = list(report.save_figures(tmp_path))
    assert len(lines) == 5 and all(f"{name} is left out" in line for name, line in zip(names, lines))
    assert "python experiments/sparsity.py --json" in lines[1] and not list(tmp_path.iterdir())
    some = {"entropy": [0.5, 2], "experts": [1.5, 2.5]}
    for stem in ("code", "sums"):
        rows = [row("seqtopk, k=2, all tokens", some, some), {"what": "seqtopk, k=2, words, read"}]
        write_results(tmp_path, stem, difficulty=rows)
    gaps = row("T=8", {"position": [4, 8], "gap": [0.2, 0.1]})
    by_k = [
        {"what": f"{router}, k={k}{how}", "nats": [5.0 - k / 10, 0.1]}
        | ({"nats, to base": [-0.01 * k, None]} if router == "seqtopk" else {})
        for router in ("topk", "seqtopk")
        for k in (8, 2)
        for how in ("", ", untuned", ", again")
    ]
    times = row("dense", {"minutes": [0.1, 0.2], "nats": [5.5, 5]})
    write_results(tmp_path, "rest", length=[gaps], sparsity=by_k, minutes=[times])
    lines = list(report.save_figures(tmp_path))
    assert lines[:4] == [
        "loss_by_minutes.svg: minutes, from rest",
        "loss_by_k.svg: sparsity, from rest",
        "gain_by_k.svg: sparsity, from rest",
        "experts_by_entropy.svg: difficulty, from code, sums",
    ]
    first = [(tmp_path / name).read_bytes() for name in names]
    assert list(report.save_figures(tmp_path)) == lines
    assert [(tmp_path / name).read_bytes() for name in names] == first
    clock, losses, gains, entropy, positions = (text.decode() for text in first)
    assert ">dense<" in clock
    for panel in (">rest, tuned<", ">rest, untuned<", ">seqtopk<", ">8<"):
        assert panel in losses and panel in gains
    assert ">topk<" in losses and ">topk<" not in gains and "again" not in losses
    assert ">code<" in entropy and ">sums<" in entropy and entropy.count(">seqtopk, k=2<") == 2
    assert ">rest<" in positions and ">T=8<" in positions


def test_figures_without_matplotlib_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        list(report.save_figures(tmp_path))
