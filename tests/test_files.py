"""Files that parse but lie: hundreds of altered checkpoints, datasets, Hugging Face folders and logs either
open and can be used, or are one line that names the file or the setting; none is a traceback, a hang or a
crash. And a bit that flips in a file is noticed."""

import copy
import json
import math
import random
import re

import pytest
import torch
from runs import TEXT, TINY, byte_level, flags, write_dataset
from torch import Tensor

import data
import train
from data.pairs import prepare as pairs
from model import MoEConfig, MoEGPT

LIES = [
    None,
    True,
    -1,
    0,
    1,
    7,
    2**40,
    10**30,
    0.5,
    math.nan,
    math.inf,
    "",
    "x",
    "../x",
    [],
    [None],
    {},
    {"x": 1},
]
TENSOR_LIES = [  # instead of a tensor
    lambda x: x[:0] if x.dim() else x.expand(3),
    lambda x: x.unsqueeze(0),
    lambda x: x.new_ones(()).expand(x.shape),  # its stride is 0
    lambda x: x.mT.contiguous().mT if x.dim() > 1 else x.flip(0) if x.dim() else -x,
    lambda x: x.int(),
    lambda x: x * torch.nan,
    lambda x: x.to(torch.complex64),
    lambda x: x.to_sparse(),
    lambda x: x.to("meta"),
]


def places(tree, before=()):
    """Where something can be altered: the keys that lead to it. Of long lists and vocabularies, four each."""
    if isinstance(tree, dict | list):
        keys = list(tree if isinstance(tree, dict) else range(len(tree)))
        for key in keys if len(keys) < 60 else keys[:: len(keys) // 3]:
            yield (*before, key)
            yield from places(tree[key], (*before, key))


def altered(tree, count):
    """So many copies of a tree in which one thing is removed, or is a lie; with the place and the lie."""
    draw, everywhere = random.Random(0), list(places(tree))
    for n in range(count):
        *way, key = everywhere[n % len(everywhere)]
        new = copy.deepcopy(tree)
        node = new
        for step in way:
            node = node[step]
        lies = [lambda x, f=f: f(x) for f in TENSOR_LIES] if isinstance(node[key], Tensor) else []
        lie = draw.choice([*lies, *lies, *LIES, "remove"])
        if lie == "remove":
            del node[key]
        else:
            node[key] = lie(node[key]) if callable(lie) else lie
        yield new, (*way, key), lie


def sweep(files, use, write):
    """Use all altered files; -> how many open. files: (altered, place, lie) and the file's name."""
    opened, wrong, total = 0, [], 0
    for (new, place, lie), path in files:
        total += 1
        whole = path.read_bytes()
        write(new, path)
        try:
            use()
            opened += 1
        except ValueError as error:
            words = [str(path.parent), path.name, *(word for word in place if isinstance(word, str))]
            named = any(word in str(error) for word in words)
            if not named or "\n" in str(error):
                wrong.append(f"{path.name} {place} {lie!r}: {error}")
        except Exception as error:
            wrong.append(f"{path.name} {place} {lie!r}: {type(error).__name__} {error}")
        path.write_bytes(whole)
    assert not wrong, f"{len(wrong)} of {total}:\n" + "\n".join(line[:300] for line in wrong[:40])
    return opened, total


def write_json(said, path):
    path.write_text(json.dumps(said))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one layer, some steps done by both optimisers. What a test alters it puts back."""
    folder = tmp_path_factory.mktemp("run")
    small = {"n_layer": 1, "n_embd": 16, "n_head": 1, "n_expert": 2, "n_hidden": 8, "k": 1, "batch_size": 1}
    settings = TINY | small | {"optimizer": "muon", "max_iters": 2, "eval_interval": 2, "eval_windows": 1}
    train.main(flags(**settings, dataset=write_dataset(folder / "data"), out_dir=folder / "run"))
    return folder / "run"


@pytest.mark.filterwarnings("ignore")
def test_altered_checkpoints(run, capsys):
    """Resumed: settings, weights, moments, random state, tokenizer and counters may each lie."""
    path, argv = run / "last.pt", flags(init_from="resume", out_dir=run, max_iters=9)

    def resume():
        config, checkpoint = train.read_config(argv)
        config, dataset = train.open_dataset(config, checkpoint)
        going = train.set_up(config, dataset, checkpoint)
        if config.gradient_accumulation_steps < 9:
            train.train_step(going)

    whole = torch.load(path, weights_only=True)
    opened, total = sweep(((file, path) for file in altered(whole, 200)), resume, torch.save)
    assert total == 200 and 10 < opened < 100


def test_altered_datasets(tmp_path):
    """meta.json, where also the checksums may be those of an older dataset: absent."""
    rows = [{"prompt": f"What is {n} + 1?", "answer": f"{n + 1}"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "data"
    pairs.main(flags(source=tmp_path / "rows.jsonl", out_dir=folder, vocab_size=280))
    path = folder / "meta.json"

    def use():
        dataset = data.load(str(folder))
        dataset.train_batch(3, 2, 32, 1), dataset.val_batches(32, 1, 2)
        dataset.tokenizer.decode(dataset.tokenizer.encode("What?"))

    whole = json.loads(path.read_text())
    opened, total = sweep(((file, path) for file in altered(whole, 250)), use, write_json)
    assert total == 250 and 10 < opened < 125
    old = {key: value for key, value in whole.items() if key != "sha256"}
    write_json(old, path)
    use()
    draw = random.Random(0)
    for _ in range(80):  # bytes of the arrays, which an older dataset has no checksums of
        file = folder / draw.choice(["train.bin", "val.bin", "train_learn.bin", "val_learn.bin"])
        before = bytearray(file.read_bytes())
        file.write_bytes(bytes(draw.randrange(256) if draw.random() < 0.05 else byte for byte in before))
        try:
            use()
        except ValueError as error:
            assert str(file) in str(error)
        file.write_bytes(before)


@pytest.mark.filterwarnings("ignore")
def test_altered_hugging_face_folders(tmp_path, capfd):
    """config.json, generation_config.json, the index and the tokenizer's files."""
    pytest.importorskip("safetensors")
    tokenizer = byte_level(TEXT, 280)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    eot = tokenizer.token_to_id("<|endoftext|>")
    meta = {"kind": "hf", "name": "x", "json": tokenizer.to_str(), "eot": eot}
    small = {"n_layer": 1, "n_embd": 16, "n_head": 1, "n_expert": 2, "n_hidden": 8, "k": 1, "qk_norm": "full"}
    folder = tmp_path / "hf"
    MoEGPT(MoEConfig(vocab_size=eot + 1, block_size=32, **small)).save_pretrained(folder, meta, 3000)
    write_json({"eos_token": {"content": "<|endoftext|>"}}, folder / "tokenizer_config.json")
    write_json({"eos_token_id": [eot, 1]}, folder / "generation_config.json")

    def use():
        model, tokenizer = MoEGPT.from_pretrained(folder), data.hf_tokenizer(str(folder))
        ids = torch.tensor([tokenizer.encode("def f")])
        if ids.max() < model.config.vocab_size:
            list(model.generate(ids, 2, stop=tokenizer.stops))
        tokenizer.decode(ids[0].tolist()), tokenizer.token_bytes.sum()

    def files():
        for path in sorted(folder.glob("*.json")):
            count = 90 if path.name in ("config.json", "tokenizer.json") else 20
            yield from ((file, path) for file in altered(json.loads(path.read_text()), count))

    opened, total = sweep(files(), use, write_json)
    assert total == 240 and 20 < opened < 140


def test_altered_logs(tmp_path):
    """Of a log, what is no entry of an iteration is dropped."""
    log, good = tmp_path / "log.jsonl", '{"kind": "train", "step": 3}'
    lines = [json.dumps({"kind": "train", "step": lie}) for lie in LIES if lie not in (0, 1, 0.5, -1)]
    lines += [*map(json.dumps, LIES), "{", '{"step"', "\x00", "[" * 10_000]
    log.write_text("\n".join(["", *lines, good, ""]))
    train.Log(log, 3)
    assert log.read_text() == good + "\n"


@pytest.mark.parametrize("which", ["checkpoint", "dataset"])
def test_a_bit_that_flips_is_noticed(run, which):
    """Anywhere in the weights or the tokens."""
    path = run / "last.pt" if which == "checkpoint" else run.parent / "data" / "train.bin"
    whole, draw = path.read_bytes(), random.Random(0)
    noticed = 0
    for _ in range(60):
        flipped, at = bytearray(whole), draw.randrange(len(whole))
        flipped[at] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        argv = flags(init_from="resume", out_dir=run)
        try:
            train.open_dataset(*train.read_config(argv))
        except ValueError as error:
            noticed += 1
            assert re.search(
                rf"{re.escape(str(path))}.*(sha256|check|CRC|damaged|tokens|token id)", str(error)
            )
    path.write_bytes(whole)
    assert noticed == 60 if which == "dataset" else noticed > 35  # the rest fell between the records
