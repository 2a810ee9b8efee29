"""Fine-tuning: the optimiser that rounds at random, blocks computed again, gates alone; and the whole way
from prompt/answer pairs and a pretrained checkpoint to exact match."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench
import data
import train
from config import bad_input_exits
from data.gsm8k import prepare as gsm8k
from model import Chunk, MoEGPT, load_checkpoint
from train import RoundingAdamW, TrainConfig, round_at_random

ROOT = Path(__file__).parents[1]
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
TRAIN = {
    "router": "seqtopk",
    "block_size": 64,
    "batch_size": 2,
    "max_iters": 3,
    "warmup_iters": 0,
    "learning_rate": 1e-3,
    "eval_interval": 2,
    "eval_windows": 4,
    "log_interval": 1,
    "sample_tokens": 4,
    "device": "cpu",
}


def flags(**settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def fails(capsys, main, *argv):
    """The one line on stderr with which a script ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop, bad_input_exits():
        main([*argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    return err


# -------- the optimiser


def test_rounding_is_unbiased():
    """A number between two of bfloat16 becomes one of these, and on average itself; bfloat16 ones stay."""
    draw = torch.Generator().manual_seed(0)
    low, high = torch.tensor(0.02).bfloat16(), torch.tensor(0.02).bfloat16() * (1 + 2**-7)
    for share in (0.1, 0.5, 0.9):
        for sign in (1, -1):
            x = sign * (low.float() + share * (high.float() - low.float()))
            rounded = round_at_random(x.repeat(100_000), draw).float()
            assert {*rounded.abs().tolist()} <= {low.item(), low.float().item() + 2**-13}
            assert rounded.mean().item() == pytest.approx(x.item(), abs=3 * 2**-13 / 2 / 100_000**0.5 + 1e-8)
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(round_at_random(exact.float(), draw), exact)


def groups(dtype, count=2):
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(40, 50, generator=generator).to(dtype).requires_grad_() for _ in range(count)]
    return weights, grouped(weights)


def grouped(weights):
    return [{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0.0}]


def descend(optimizer, weights, steps, start=0):
    """Follow gradients that depend on the weights and on the number of the step."""
    for step in range(start, start + steps):
        for place, weight in enumerate(weights):
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(10 * step + place))
            weight.grad = (weight.detach().float() + noise).to(weight.dtype)
        optimizer.step()


def test_in_float32_it_is_torchs_adamw(monkeypatch):
    """Float32 weights follow torch's AdamW, in pieces or not, with weight decay and without."""
    monkeypatch.setattr(RoundingAdamW, "PIECE", 700)
    options = {"lr": 0.01, "betas": (0.8, 0.9)}
    ours, our_groups = groups(torch.float32)
    theirs, their_groups = groups(torch.float32)
    descend(RoundingAdamW(our_groups, **options, seed=1), ours, 20)
    descend(torch.optim.AdamW(their_groups, **options), theirs, 20)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_small_updates_add_up():
    """200 updates of a sixth of half the spacing arrive on average; rounded to nearest, none would."""
    weight = torch.full((5000,), 0.02).bfloat16().requires_grad_()
    before = weight.detach().clone()
    optimizer = RoundingAdamW([weight], lr=1e-5, betas=(0.9, 0.95), seed=1)
    for _ in range(200):
        weight.grad = torch.full_like(weight, 1e-3)
        optimizer.step()
    assert torch.equal((before.float() - 1e-5).bfloat16(), before)
    moved = (before.float() - weight.detach().float()).mean().item()
    assert moved == pytest.approx(200 * 1e-5, rel=0.05)


def test_its_state_resumes_to_the_last_bit():
    """Stopped after 3 steps, saved, loaded and continued, bfloat16 weights are those of 6 steps."""
    options = {"lr": 0.01, "betas": (0.8, 0.9)}
    straight, straight_groups = groups(torch.bfloat16)
    descend(RoundingAdamW(straight_groups, **options, seed=1), straight, 6)
    stopped, stopped_groups = groups(torch.bfloat16)
    first = RoundingAdamW(stopped_groups, **options, seed=1)
    descend(first, stopped, 3)
    resumed = [weight.detach().clone().requires_grad_() for weight in stopped]
    second = RoundingAdamW(grouped(resumed), **options, seed=2)
    second.load_state_dict(first.state_dict())
    descend(second, resumed, 3, start=3)
    for a, b in zip(straight, resumed):
        assert torch.equal(a, b)


# -------- what learns, and what is computed again


def tiny(**settings):
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_expert": 4, "k": 2, "n_hidden": 16, "vocab_size": 50}
    return TrainConfig(**shape | {"router": "seqtopk", "block_size": 16} | settings)


@pytest.mark.parametrize("router", ["seqtopk", "online_seqtopk"])
def test_blocks_computed_again_change_nothing(router):
    """Loss and every gradient are the same to the last bit, with recomputed blocks and without."""
    torch.manual_seed(0)
    idx = torch.randint(50, (3, 17))
    results = []
    for again in (False, True):
        torch.manual_seed(1)
        model = train.make_model(tiny(checkpoint_activations=again, router=router), None)
        _, loss, stats = model(idx[:, :-1], idx[:, 1:])
        (loss + 0.01 * stats.balance_loss + 0.001 * stats.z_loss).backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_recomputed_block_runs_twice(monkeypatch):
    """With checkpoint_activations each block runs again in the backward pass, so that nothing was kept."""
    model, runs = train.make_model(tiny(checkpoint_activations=True), None), []
    gate = model.blocks[0].mlp.gate
    monkeypatch.setattr(type(model.blocks[0].mlp), "select", counting(type(model.blocks[0].mlp).select, runs))
    idx = torch.randint(50, (1, 16))
    model(idx, idx)[1].backward()
    assert len(runs) == 4 and gate.weight.grad is not None


def counting(function, calls):
    def counted(*args):
        calls.append(1)
        return function(*args)

    return counted


@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
def test_the_gates_alone_learn(weights_dtype):
    """Under train_only=router only gates, float32 in any case, have gradients and places in the optimiser."""
    config = tiny(train_only="router", weights_dtype=weights_dtype, checkpoint_activations=True)
    model = train.make_model(config, None)
    optimizer = train.make_optimizer(model, config)
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
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    return path


def save_tokenizer(folder):
    """A byte-level tokenizer.json of 300 tokens, as OLMoE's is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([p["question"] + " " + p["answer"] for p in PROBLEMS], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    """A random OLMoE checkpoint in a folder, whose embedding is padded to more ids than its tokenizer has."""
    import transformers

    folder = tmp_path_factory.mktemp("hf") / "olmoe"
    config = transformers.OlmoeConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    transformers.OlmoeForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(problems, olmoe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gsm8k")
    gsm8k.main(flags(source=problems, tokenizer=olmoe, out_dir=folder))
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
    old, new = MoEGPT.from_pretrained(olmoe), MoEGPT.from_checkpoint(load_checkpoint(folder / "last.pt"))
    assert new.config == replace(old.config, router="seqtopk", block_size=64)
    for (name, a), b in zip(old.named_parameters(), new.parameters()):
        may_move = settings.get("train_only") != "router" or ".gate." in name
        b = b.to(a.dtype)
        assert torch.allclose(a, b, atol=1e-3 if not may_move else 0.05), name
        if ".gate." in name:
            assert not torch.equal(a, b)
    if settings.get("train_only") == "router":
        assert torch.equal(new.head.weight, old.head.weight.bfloat16().float())


@needs_hf
def test_tuning_resumes_to_the_last_bit(tuned, tmp_path):
    """Two iterations and one more, after resuming, end with the same weights and moments as three."""
    settings, folder = tuned
    train.main(flags(**settings | {"max_iters": 2, "lr_decay_iters": 3}, out_dir=tmp_path / "run"))
    train.main(flags(init_from="resume", out_dir=tmp_path / "run", max_iters=3))
    straight, resumed = (load_checkpoint(path / "last.pt") for path in (folder, tmp_path / "run"))
    assert straight["optimizer"].keys() == resumed["optimizer"].keys()
    for name in straight["model"]:
        assert straight["model"][name].dtype == resumed["model"][name].dtype
        assert torch.equal(straight["model"][name], resumed["model"][name]), name
    for key, state in straight["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, resumed["optimizer"]["state"][key][name]), (key, name)


@needs_hf
def test_the_validation_loss_is_that_of_the_answers(olmoe, dataset):
    """Nats per learned token and bits per byte of the answers, as summed over windows one by one."""
    config = TrainConfig(**TRAIN | {"init_from": str(olmoe), "dataset": str(dataset), "eval_windows": 99})
    _, checkpoint = train.read_config(flags(init_from=olmoe, dataset=dataset))
    config, opened = train.open_dataset(
        replace(config, **checkpoint["config"] | {"block_size": 64}), checkpoint
    )
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


def measure(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        bench.main([*argv, "--device=cpu"])
    out = capsys.readouterr().out
    assert stop.value.code == 0, out
    return json.loads(out.splitlines()[-1])["parts"]


@needs_hf
@pytest.mark.parametrize("shots", [0, 2])
def test_exact_match(tuned, dataset, capsys, shots, monkeypatch):
    """Answers are kept; a second start computes none again, and another router's are not taken for them."""
    _, folder = tuned
    monkeypatch.setattr(bench, "ANSWER_TOKENS", 12)
    argv = ["gsm8k", *flags(init_from=folder, dataset=dataset, shots=shots, batch_size=2, problems=3)]
    [row] = measure(capsys, *argv)["gsm8k"]
    assert row["problems"] == 3 and row["exact match"][0] == 0
    kept = {path: path.read_text() for path in folder.glob(f"gsm8k-online_seqtopk-{shots}shot-*.jsonl")}
    assert len(kept) == 1

    with monkeypatch.context() as patch:
        patch.setattr(bench, "answer", None)
        assert measure(capsys, *argv)["gsm8k"] == [row]
    [(path, text)] = kept.items()
    path.write_text(text[:-9])  # as a crash may leave it
    assert measure(capsys, *argv)["gsm8k"] == [row]
    measure(capsys, *argv, "--router=topk")
    assert len(list(folder.glob(f"gsm8k-*-{shots}shot-*.jsonl"))) == 2


def test_right_answers_are_counted(problems, tmp_path, capsys, monkeypatch):
    """Exact match compares the first number after #### and before another question with the official one."""
    gsm8k.main(flags(source=problems, tokenizer="bpe", vocab_size=280, out_dir=tmp_path / "data"))
    run = tmp_path / "run"
    train.main(flags(**TRAIN | {"max_iters": 1}, dataset=tmp_path / "data", out_dir=run))
    right = {bench.prompt_of(p["question"]): p["answer"] for p in PROBLEMS}
    tested = bench.read_test(tmp_path / "data" / "test.jsonl")
    wrong = bench.prompt_of(tested[0].prompt)

    def answer(model, tokenizer, prompts, room, router):
        answers = [f" {right[prompt]}\n#### 7" for prompt in prompts]
        if wrong in prompts:  # the right number, but below another question
            answers[prompts.index(wrong)] = f" #### $1\n\nQuestion: And?\nAnswer: {right[wrong]}"
        return [(text, 2.0) for text in answers]

    monkeypatch.setattr(bench, "answer", answer)
    [row] = measure(capsys, "gsm8k", *flags(out_dir=run, dataset=tmp_path / "data"))["gsm8k"]
    assert row["problems"] == len(tested) > 1 and row["experts per token"] == 2
    assert row["exact match"][0] == pytest.approx(1 - 1 / len(tested), rel=1e-4)
    [row] = measure(capsys, "gsm8k", *flags(out_dir=run, dataset=tmp_path / "data", k=3))["gsm8k"]
    assert ", K=3, " in row["what"] and len(list(run.glob("gsm8k-*.jsonl"))) == 2


def test_what_was_learned_is_solved(tmp_path, capsys):
    """A model that has learned some problems, each among others, solves them one by one."""
    source = tmp_path / "few.jsonl"
    source.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS[::3]))
    folder, run = tmp_path / "data", tmp_path / "run"
    gsm8k.main(flags(source=source, test_source=source, tokenizer="bpe", vocab_size=300, out_dir=folder))
    settings = {"max_iters": 120, "eval_interval": 120, "batch_size": 8, "block_size": 96, "n_layer": 2}
    settings |= {"learning_rate": 4e-3, "warmup_iters": 10, "eval_windows": 1, "sample_tokens": 0}
    train.main(flags(**TRAIN | settings, dataset=folder, out_dir=run))
    [row] = measure(capsys, "gsm8k", *flags(init_from=run / "last.pt", dataset=folder))["gsm8k"]
    assert row["problems"] == 24 and row["exact match"][0] > 0.7


def test_generation_ends_after_the_final_answers():
    """Nothing is generated for long once all rows have ended or written the line of their final answer."""
    tokenizer = data.train_bpe(["ab"], 257, "x")
    texts = ["a #### 12\nQuestion: b", "#### 1"]

    def generate(idx, room, cache, temperature, stop, active):
        yield Chunk(idx, torch.ones(*idx.shape, 1, 1), active, None)
        for place in range(room):
            ids = [[tokenizer.encode(text.ljust(200))[place]] for text in texts]
            alive = torch.tensor([[True], [place < len(texts[1])]])
            yield Chunk(torch.tensor(ids), torch.ones(2, 1, 1, 3), alive, None)

    head = SimpleNamespace(weight=torch.zeros(1))
    model = SimpleNamespace(head=head, new_cache=lambda *size: None, generate=generate)
    (first, mean), (second, _) = bench.answer(model, tokenizer, ["ab", "a"], 150, None)
    assert first.startswith("a #### 12\nQ") and len(first) <= 2 * bench.CHECK_EVERY and second == "#### 1"
    assert mean == pytest.approx((2 + 3 * len(first)) / (2 + len(first)))


@needs_hf
def test_the_prompt_is_that_of_training(dataset):
    """What bench.py gives a model comes before the first learned token; examples are whole problems."""
    opened = data.load(str(dataset))
    x, y = opened.train_batch(0, 1, 64, 1)
    first = int((y[0] >= 0).nonzero()[0])
    text = opened.tokenizer.decode(x[0, : first + 1].tolist())
    question = text.removeprefix("Question: ").removesuffix("\nAnswer:")
    assert text == bench.prompt_of(question) and question in [p["question"] for p in PROBLEMS]
    shots = bench.examples(opened, 2).split("\n\n")
    documents = [f"{bench.prompt_of(p['question'])} {p['answer']}" for p in PROBLEMS]
    assert len(shots) == 3 and set(shots[:2]) <= set(documents) and shots[2] == ""


@needs_hf
@pytest.mark.parametrize("which", ["run", "folder"])
def test_switch(tuned, olmoe, capsys, tmp_path, which):
    """A row for each K up to E and each router; under topk, the checkpoint's K gives the model's loss."""
    (tmp_path / "text.txt").write_text("".join(p["question"] for p in PROBLEMS[:8]))
    argv = flags(init_from=tuned[1] if which == "run" else olmoe, text=tmp_path / "text.txt", tokens=32)
    rows = measure(capsys, "switch", *argv, "--dtype=float32")["switch"]
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
    gsm8k.main(flags(source=source, tokenizer=olmoe, out_dir=tmp_path))
    opened = data.load(str(tmp_path))
    assert opened.meta["train"]["documents"] + opened.meta["val"]["documents"] == 7473
    assert len(bench.read_test(tmp_path / "test.jsonl")) == opened.meta["val"]["documents"]
    _, y = opened.train_batch(0, 4, 512, 1)
    assert ((y >= 0).sum(1) > 50).all()


# -------- bad input


@needs_hf
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ({"dataset": "gsm8k", "n_embd": 64}, "n_embd is 32 there and 64 here"),
        ({"train_only": "experts"}, "train_only is experts, but must be all or router"),
        ({"weights_dtype": "float16"}, "weights_dtype is float16, but must be float32 or bfloat16"),
        ({"weights_dtype": "bfloat16", "dtype": "float32"}, "dtype is float32, but must be auto, bfloat16"),
        ({"train_only": "router", "init_from": "scratch", "n_expert": 1, "k": 1}, "all in a dense model"),
    ],
)
def test_bad_settings(olmoe, capsys, tmp_path, argv, words):
    """One line each, that names the value and what is allowed."""
    argv = {"init_from": olmoe, "out_dir": tmp_path / "run"} | argv
    assert words in fails(capsys, train.main, *flags(**argv))


@needs_hf
def test_bad_checkpoints(olmoe, dataset, problems, capsys, tmp_path):
    """Another tokenizer, none, or fewer embeddings than ids: one line each, with the remedy."""
    gsm8k.main(flags(source=problems, tokenizer="bpe", vocab_size=280, out_dir=tmp_path / "bpe"))
    argv = flags(init_from=olmoe, dataset=tmp_path / "bpe", out_dir=tmp_path / "run")
    assert f"prepare.py --tokenizer={olmoe}" in fails(capsys, train.main, *argv)
    bare = shutil.copytree(olmoe, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in fails(capsys, train.main, *flags(init_from=bare, dataset=dataset))
    assert "has no tokenizer.json" in fails(capsys, bench.main, "switch", f"--init_from={bare}", "--text=x")


def test_bad_files_for_the_benchmark(capsys, tmp_path):
    """switch without a text, gsm8k without a run: one line each."""
    assert "text is None" in fails(capsys, bench.main, "switch", f"--init_from={tmp_path}")
    assert "no checkpoint at" in fails(capsys, bench.main, "gsm8k", f"--out_dir={tmp_path}")
