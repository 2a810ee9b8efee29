"""What the tests of runs share: a tiny dataset, tokenizer and model, the settings of a tiny run, and how to
read what it left."""

import json
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

import data
import train
from config import bad_input_exits
from model import MoEConfig, MoEGPT

ROOT = Path(__file__).parents[1]
TEXT = [
    f"def f{i}(x):\n    return x * {i * 7919 % 1000} + {i}\n\nprint(f{i}({i * 31 % 100}))\n"
    for i in range(100)
]
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_expert": 4, "k": 2, "n_hidden": 16}
RUN = {"block_size": 32, "batch_size": 4, "max_iters": 10, "learning_rate": 0.01, "warmup_iters": 2}
RUN |= {"eval_interval": 5, "eval_windows": 4, "log_interval": 1, "sample_tokens": 0, "device": "cpu"}
PLAIN = {"optimizer": "adamw", "embedding_boost": 1, "weight_decay": 0.1, "norm_best": 0}  # not the defaults
TINY = SHAPE | RUN | PLAIN
SMALLEST = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_expert": 8, "k": 2, "n_hidden": 8}
assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)  # through lists and dictionaries


def flags(**settings):
    texts = {key: str(value).lower() if isinstance(value, bool) else value for key, value in settings.items()}
    return [f"--{key}={text}" for key, text in texts.items()]


def write_dataset(folder, vocab_size=300):
    tokenizer = data.train_bpe(TEXT, vocab_size, "tiny")
    data.write_dataset(folder, ["".join(TEXT[:60])], TEXT[60:81], tokenizer, "0" * 64, prompt="def ")
    return folder


def byte_level(texts, vocab_size, *special):
    """A tokenizer of the library `tokenizers`, of bytes as OLMoE's and Qwen's; special tokens come first."""
    tokenizers = pytest.importorskip("tokenizers")
    ByteLevel, decoder = tokenizers.pre_tokenizers.ByteLevel, tokenizers.decoders.ByteLevel()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoder
    how = {"initial_alphabet": ByteLevel.alphabet(), "special_tokens": [*special], "show_progress": False}
    tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, **how))
    return tokenizer


def lively(**settings):
    """A model of random weights, larger than at the start of training, so that routing and text vary."""
    torch.manual_seed(0)
    model = MoEGPT(MoEConfig(**SMALLEST | settings))
    for parameter in model.parameters():
        parameter.data *= 5
    return model


def entries(folder, kind=None):
    """Lines of a run's log, without what the clock says."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    lines = [line for line in lines if kind in (None, line["kind"])]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def assert_same_runs(a, b, *names):
    """Two runs agree to the last bit in their logs and in all that training goes on from."""
    assert entries(a) == entries(b)
    for name in names or ("last.pt", "best.pt"):
        left, right = torch.load(a / name), torch.load(b / name)
        for key in ("model", "optimizers", "scaler", "rng", "step", "best"):
            assert_same(left[key], right[key])


def contents(folder):
    """Every file below a folder, and what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def error_line(capsys, main, *argv):
    """The one line on stderr with which a script ends, and no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop, bad_input_exits():
        main([*argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and err[-1] == "\n"
    return err


def when(monkeypatch, step, action):
    """Do something, once, after so many iterations."""
    train_step = train.train_step

    def spy(run):
        metrics = train_step(run)
        if run.step == step:
            monkeypatch.setattr(train, "train_step", train_step)
            action()
        return metrics

    monkeypatch.setattr(train, "train_step", spy)


def interrupt():
    signal.raise_signal(signal.SIGINT)
