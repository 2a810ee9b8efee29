"""Fine-tuning: blocks computed again, gates alone; and the whole way from prompt/answer pairs and a
pretrained checkpoint to exact match."""

import importlib.util
import json
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from runs import ROOT, RUN, SHAPE, assert_same, byte_level, error_line, flags

from experiments import gsm8k, lab, solve, switch

import data
import train
from data.arithmetic.prepare import prompt_of
from data.gsm8k import prepare
from model import Chunk, MoE, MoEGPT, load_checkpoint
from optimizers import make_optimizers
from train import TrainConfig

SHARED = ROOT.parent / "shared" / "data"
HF = all(map(importlib.util.find_spec, ("transformers", "safetensors", "tokenizers")))
needs_hf = pytest.mark.skipif(not HF, reason="needs requirements-hf.txt")
PROBLEMS = [
    {
        "question": f"Ann has {a} pens and buys {b} more. How many?",
        "answer": f"{a} + {b} = {a + b}.\n#### {a + b}",
    }
    for a in range(3, 13)
    for b in range(2, 9)
]
TRAIN = RUN | {"router": "seqtopk", "block_size": 64, "batch_size": 2, "max_iters": 3, "warmup_iters": 0}
TRAIN |= {"learning_rate": 1e-3, "eval_interval": 2, "sample_tokens": 4}


def write_problems(path, problems=PROBLEMS):
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return path


# -------- what learns, and what is computed again


def tiny(**settings):
    return TrainConfig(**SHAPE | {"vocab_size": 50, "router": "seqtopk", "block_size": 16} | settings)


@pytest.mark.parametrize("router", ["seqtopk", "online_seqtopk"])
def test_blocks_computed_again_change_nothing(router, monkeypatch):
    """With checkpoint_activations each block runs again going backward, so that nothing was kept; loss and
    every gradient are the same to the last bit."""
    results, runs, select = [], [], MoE.select
    monkeypatch.setattr(MoE, "select", lambda *args: runs.append(1) or select(*args))
    idx = torch.randint(50, (3, 17), generator=torch.Generator().manual_seed(0))
    for again in (False, True):
        torch.manual_seed(1)
        config = tiny(checkpoint_activations=again, router=router)
        model = train.make_model(config, None)
        train.prepare_blocks(model, config, compiled=False)
        _, loss, stats = model(idx[:, :-1], idx[:, 1:])
        (loss + 0.01 * stats.balance_loss + 0.001 * stats.z_loss).backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    assert_same(*results)
    assert len(runs) == 2 + 4


@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
def test_the_gates_alone_learn(weights_dtype):
    """Under train_only=router only gates, float32 in any case, have gradients and places in the optimiser."""
    config = tiny(train_only="router", weights_dtype=weights_dtype, checkpoint_activations=True)
    model = train.make_model(config, None)
    train.prepare_blocks(model, config, compiled=False)
    (optimizer,) = make_optimizers(model, config)
    gates = [layer.gate.weight for layer in model.expert_layers()]
    assert [p for group in optimizer.param_groups for p in group["params"]] == gates
    assert {gate.dtype for gate in gates} == {torch.float32}
    assert model.head.weight.dtype == getattr(torch, weights_dtype)
    idx = torch.randint(50, (2, 16))
    model(idx, idx)[1].backward()
    assert all(gate.grad.abs().sum() > 0 for gate in gates)
    assert sum(p.grad is not None for p in model.parameters()) == len(gates)


def test_bfloat16_weights_are_computed_with_as_such(capsys):
    """On a CPU, where float32 is the choice for other weights, the dtype in use is printed."""
    run = train.set_up(tiny(weights_dtype="bfloat16", device="cpu"), None, None)
    assert run.dtype == torch.bfloat16
    assert "dtype     bfloat16 (that of the weights)" in capsys.readouterr().out
    assert train.set_up(tiny(device="cpu"), None, None).dtype == torch.float32


# -------- the whole way


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    return write_problems(tmp_path_factory.mktemp("problems") / "problems.jsonl")


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    """A random OLMoE checkpoint in a folder, whose embedding is padded to more ids than its tokenizer has."""
    import transformers

    folder = tmp_path_factory.mktemp("hf") / "olmoe"
    config = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 16, "max_position_embeddings": 256}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 8, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**config, eos_token_id=0))
    model.save_pretrained(folder)
    texts = [f"{problem['question']} {problem['answer']}" for problem in PROBLEMS]
    tokenizer = byte_level(texts, 300, "<|endoftext|>")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


@pytest.fixture(scope="module")
def dataset(problems, olmoe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gsm8k")
    prepare.main(flags(source=problems, tokenizer=olmoe, out_dir=folder))
    return folder


@pytest.fixture(scope="module", params=["float32", "bfloat16", "router"])
def tuned(request, olmoe, dataset, tmp_path_factory):
    """Runs of three iterations from the pretrained model: its settings and its folder."""
    how = {
        "float32": {},
        "bfloat16": {"weights_dtype": "bfloat16", "checkpoint_activations": "true"},
        "router": {"train_only": "router", "weights_dtype": "bfloat16"},
    }
    settings = TRAIN | how[request.param] | {"init_from": olmoe, "dataset": dataset}
    folder = tmp_path_factory.mktemp(request.param) / "run"
    train.main(flags(**settings, out_dir=folder))
    return settings, folder


@needs_hf
def test_a_pretrained_model_is_tuned(tuned, olmoe):
    """The loss starts at the pretrained model's; what is to learn has moved, and the rest has not."""
    settings, folder = tuned
    gates_alone = settings.get("train_only") == "router"
    old, new = MoEGPT.from_pretrained(olmoe), MoEGPT.from_checkpoint(load_checkpoint(folder / "last.pt"))
    assert new.config == replace(old.config, router="seqtopk", block_size=64)
    for (name, a), b in zip(old.named_parameters(), new.parameters()):
        atol = 1e-3 if gates_alone and ".gate." not in name else 0.05
        assert torch.allclose(a, b.to(a.dtype), atol=atol), name
        assert ".gate." not in name or not torch.equal(a, b)
    if gates_alone:
        assert torch.equal(new.head.weight, old.head.weight.bfloat16().float())


@needs_hf
@pytest.mark.parametrize("tuned", ["router"], indirect=True)  # the others' ways are test_train.py's
def test_tuning_resumes_to_the_last_bit(tuned, tmp_path):
    """Two iterations and one more, after resuming, end with the same weights and moments as three."""
    settings, folder = tuned
    train.main(flags(**settings | {"max_iters": 2, "lr_decay_iters": 3}, out_dir=tmp_path / "run"))
    train.main(flags(init_from="resume", out_dir=tmp_path / "run", max_iters=3))
    straight, resumed = (load_checkpoint(path / "last.pt") for path in (folder, tmp_path / "run"))
    for part in ("model", "optimizers"):
        assert_same(straight[part], resumed[part])


@needs_hf
def test_the_validation_loss_is_that_of_the_answers(olmoe, dataset):
    """Nats per learned token and bits per byte of the answers, as summed over windows one by one."""
    settings = TRAIN | {"init_from": olmoe, "dataset": dataset, "eval_windows": 99}
    config, checkpoint = train.read_config(flags(**settings))
    config, opened = train.open_dataset(config, checkpoint)
    run = train.set_up(config, opened, checkpoint)
    nats, learned = 0.0, []
    for x, y in opened.val_batches(64, 1, 99):
        logits = run.model(x, router="online_seqtopk")[0]
        nats += torch.nn.functional.cross_entropy(logits[y >= 0], y[y >= 0], reduction="sum").item()
        learned += y[y >= 0].tolist()
    result, text = train.evaluate(run, "online_seqtopk"), opened.tokenizer.decode(learned)
    answers = [p["answer"] for p in PROBLEMS if f" {p['answer']}" in text]
    assert text == "".join(f" {answer}<|endoftext|>" for answer in answers)
    assert result["loss"] == pytest.approx(nats / len(learned), rel=1e-5)
    n_bytes = sum(len(answer) + 1 for answer in answers)
    assert result["bpb"] == pytest.approx(nats / n_bytes / 0.693147, rel=1e-5)


def measure(capsys, question, *argv):
    """The rows of an experiment's answer."""
    with pytest.raises(SystemExit) as stop:
        lab.main(question.answer, question.Options, [*argv, "--device=cpu"])
    out = capsys.readouterr().out
    assert stop.value.code == 0, out
    [rows] = json.loads(out.splitlines()[-1])["parts"].values()
    return rows


@needs_hf
@pytest.mark.parametrize("tuned", ["bfloat16"], indirect=True)
@pytest.mark.parametrize("shots", [0, 2])
def test_exact_match(tuned, dataset, capsys, shots, monkeypatch):
    """Answers are kept; a second start computes none again, and another router's are not taken for them."""
    _, folder = tuned
    monkeypatch.setattr(gsm8k, "ANSWER_TOKENS", 12)
    argv = [gsm8k, *flags(init_from=folder, dataset=dataset, shots=shots, batch_size=2, problems=3)]
    [row] = measure(capsys, *argv)
    assert row["problems"] == 3 and row["exact match"][0] == 0
    kept = {path: path.read_text() for path in folder.glob(f"gsm8k-online_seqtopk-{shots}shot-*.jsonl")}
    assert len(kept) == 1

    with monkeypatch.context() as patch:
        patch.setattr(solve, "answer_prompts", None)
        assert measure(capsys, *argv) == [row]
    [(path, text)] = kept.items()
    path.write_text(text[:-9])  # as a crash may leave it
    assert measure(capsys, *argv) == [row]
    measure(capsys, *argv, "--router=topk")
    assert len(list(folder.glob(f"gsm8k-*-{shots}shot-*.jsonl"))) == 2


def test_right_answers_are_counted(problems, tmp_path, capsys, monkeypatch):
    """Exact match compares the first number after #### and before another question with the official one."""
    prepare.main(flags(source=problems, tokenizer="bpe", vocab_size=280, out_dir=tmp_path / "data"))
    run = tmp_path / "run"
    train.main(flags(**TRAIN | {"max_iters": 1}, dataset=tmp_path / "data", out_dir=run))
    right = {prompt_of(p["question"]): p["answer"] for p in PROBLEMS}
    tested = gsm8k.read_test(tmp_path / "data" / "test.jsonl")
    wrong = prompt_of(tested[0].prompt)

    def answer(model, tokenizer, prompts, room, router, compile):
        answers = [f" {right[prompt]}\n#### 7" for prompt in prompts]
        if wrong in prompts:  # the right number, but below another question
            answers[prompts.index(wrong)] = f" #### $1\n\nQuestion: And?\nAnswer: {right[wrong]}"
        return [(text, 2.0) for text in answers]

    monkeypatch.setattr(solve, "answer_prompts", answer)
    [row] = measure(capsys, gsm8k, *flags(init_from=run, dataset=tmp_path / "data"))
    assert row["problems"] == len(tested) > 1 and row["experts per token"] == 2
    assert row["exact match"][0] == pytest.approx(1 - 1 / len(tested), rel=1e-4)
    [row] = measure(capsys, gsm8k, *flags(init_from=run, dataset=tmp_path / "data", k=3))
    assert ", K=3, " in row["what"] and len(list(run.glob("gsm8k-*.jsonl"))) == 2


def test_what_was_learned_is_solved(tmp_path, capsys):
    """A model that has learned some problems, each among others, solves them one by one."""
    source = write_problems(tmp_path / "few.jsonl", PROBLEMS[::6])
    folder, run = tmp_path / "data", tmp_path / "run"
    prepare.main(flags(source=source, test_source=source, tokenizer="bpe", vocab_size=300, out_dir=folder))
    settings = {"n_layer": 2, "n_embd": 64, "n_expert": 4, "n_hidden": 64, "block_size": 96, "batch_size": 8}
    settings |= {"max_iters": 100, "eval_interval": 100, "learning_rate": 0.01, "warmup_iters": 10}
    train.main(flags(**TRAIN | settings, dataset=folder, out_dir=run))
    [row] = measure(capsys, gsm8k, *flags(init_from=run / "last.pt", dataset=folder))
    assert row["problems"] == 12 and row["exact match"][0] > 0.7


def test_prompts_that_do_not_fit_are_counted(capsys):
    """With room for an answer; nothing is said where all fit."""
    gsm8k.note_lengths([10, 112], 512)
    assert capsys.readouterr().out == ""
    gsm8k.note_lengths([10, 113, 600], 512)
    assert capsys.readouterr().out.startswith("note: 2 of 3 prompts (up to 600 tokens) and 400 of answer ")


def test_generation_ends_after_the_final_answers():
    """Nothing is generated for long once all rows have ended or written the line of their final answer."""
    tokenizer = data.train_bpe(["ab"], 257, "x")
    texts = ["a #### 12\nQuestion: b", "#### 1"]

    def generate(idx, room, cache, temperature, stop, active, compile):
        yield Chunk(idx, torch.ones(*idx.shape, 1, 1), active, None)
        for place in range(room):
            ids = [[tokenizer.encode(text.ljust(200))[place]] for text in texts]
            alive = torch.tensor([[True], [place < len(texts[1])]])
            yield Chunk(torch.tensor(ids), torch.ones(2, 1, 1, 3), alive, None)

    head = SimpleNamespace(weight=torch.zeros(1))
    model = SimpleNamespace(head=head, new_cache=lambda *size: None, generate=generate)
    (first, mean), (second, _) = solve.answer_prompts(model, tokenizer, ["ab", "a"], 150, None)
    assert first.startswith("a #### 12\nQ") and len(first) <= 2 * solve.CHECK_EVERY and second == "#### 1"
    assert mean == pytest.approx((2 + 3 * len(first)) / (2 + len(first)))


@needs_hf
def test_the_prompt_is_that_of_training(dataset):
    """What the experiment gives a model comes before the first learned token; examples are whole problems."""
    opened = data.load(str(dataset))
    x, y = opened.train_batch(0, 1, 64, 1)
    first = int((y[0] >= 0).nonzero()[0])
    text = opened.tokenizer.decode(x[0, : first + 1].tolist())
    question = text.removeprefix("Question: ").removesuffix("\nAnswer:")
    assert text == prompt_of(question) and question in [p["question"] for p in PROBLEMS]
    shots = gsm8k.examples(opened, 2).split("\n\n")
    documents = [f"{prompt_of(p['question'])} {p['answer']}" for p in PROBLEMS]
    assert len(shots) == 3 and set(shots[:2]) <= set(documents) and shots[2] == ""


@needs_hf
@pytest.mark.parametrize("tuned", ["router"], indirect=True)
@pytest.mark.parametrize("which", ["run", "folder"])
def test_switch(tuned, olmoe, capsys, tmp_path, which):
    """A row for each K up to E and each router; under topk, the checkpoint's K gives the model's loss."""
    (tmp_path / "text.txt").write_text("".join(p["question"] for p in PROBLEMS[:8]))
    argv = flags(init_from=tuned[1] if which == "run" else olmoe, text=tmp_path / "text.txt", tokens=32)
    rows = measure(capsys, switch, *argv, "--dtype=float32")
    assert [row["what"].split(", ")[1] for row in rows[::3]] == ["K=8", "K=4", "K=2"] and len(rows) == 9
    assert ["(sees the future)" in row["what"] for row in rows] == [False, True, False] * 3
    assert rows[0]["nats/token"] == rows[1]["nats/token"] == rows[2]["nats/token"]  # K = E: all to all
    assert [row["experts per token"] for row in rows[::3]] == [8, 4, 2]
    if which == "folder":
        model, tokenizer = MoEGPT.from_pretrained(olmoe), data.hf_tokenizer(str(olmoe))
        ids = torch.tensor(tokenizer.encode((tmp_path / "text.txt").read_text()))
        n = (len(ids) - 1) // 32 * 32
        loss = model(ids[:n].view(-1, 32), ids[1 : n + 1].view(-1, 32))[1].item()
        assert rows[6]["nats/token"] == pytest.approx(loss, rel=1e-4)
        bits = loss * n / len(tokenizer.decode_bytes(ids[1 : n + 1].tolist())) / 0.693147
        assert rows[6]["bits/byte"] == pytest.approx(bits, rel=1e-4)


@needs_hf
def test_the_real_gsm8k(olmoe, tmp_path):
    """The official training file is read whole, and every answer has its result."""
    source = SHARED / "gsm8k_train.jsonl"
    if not source.is_file():
        pytest.skip("no copy of GSM8K")
    prepare.main(flags(source=source, tokenizer=olmoe, out_dir=tmp_path))
    opened = data.load(str(tmp_path))
    assert opened.meta["train"]["documents"] + opened.meta["val"]["documents"] == 7473
    assert len(gsm8k.read_test(tmp_path / "test.jsonl")) == opened.meta["val"]["documents"]
    _, y = opened.train_batch(0, 4, 512, 1)
    assert ((y >= 0).sum(1) > 50).all()


# -------- bad input


@needs_hf
def test_what_cannot_be_tuned(olmoe, dataset, problems, capsys, tmp_path):
    """Another width, tokenizer, or none: one line each, with what differs or the remedy."""
    prepare.main(flags(source=problems, tokenizer="bpe", vocab_size=280, out_dir=tmp_path / "bpe"))
    bare = shutil.copytree(olmoe, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    for settings, words in (
        ({"init_from": olmoe, "dataset": dataset, "n_embd": 64}, "n_embd is 32 there and 64 here"),
        ({"init_from": olmoe, "dataset": tmp_path / "bpe"}, f"prepare.py --tokenizer={olmoe}"),
        ({"init_from": bare, "dataset": dataset}, "tokenizer.json is missing"),
    ):
        assert words in error_line(capsys, train.main, *flags(**settings, out_dir=tmp_path / "run"))


@needs_hf
def test_what_cannot_be_measured(olmoe, dataset, capsys, tmp_path):
    """A model without a tokenizer, switch without a text, gsm8k without a run: one line each."""
    bare = shutil.copytree(olmoe, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    for question, argv, words in (
        (switch, flags(init_from=bare, text="x"), "tokenizer.json is missing"),
        (switch, flags(init_from=tmp_path), "text is None"),
        (gsm8k, flags(init_from=tmp_path), "no checkpoint at"),
        (
            gsm8k,
            flags(init_from=olmoe, dataset=dataset, problems=999),
            "problems is 999, but must be at most",
        ),
        (gsm8k, flags(init_from=olmoe, dataset=dataset, shots=999), "shots is 999, but must be at most"),
    ):
        assert words in error_line(capsys, partial(lab.main, question.answer, question.Options), *argv)
