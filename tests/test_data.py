"""Tokenizers, dataset files, the loader, and the data sets that need no network."""

import base64
import hashlib
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
from runs import assert_same, byte_level, contents
from tiktoken_ext import openai_public

import data
import data.source
from data import hf_tokenizer, load, make_tokenizer, train_batch, train_bpe, val_batches, write_dataset
from data.answers import Answers, pack
from data.arithmetic import prepare as arithmetic
from data.gsm8k import prepare as gsm8k
from data.pairs import prepare as pairs
from data.pysource import prepare as pysource
from data.shakespeare import prepare as shakespeare
from data.source import pieces, sample
from data.textfile import prepare as textfile
from data.tokenizer import END_OF_TEXT, SPLIT, Tokenizer, choose_tokenizer, gpt2_tokenizer

ROOT = Path(__file__).parents[1]
TEXT = "".join(
    f"Line {i} has words, {i * 7919 % 1000} numbers\n    and some structure.\n" for i in range(300)
)
ODD = f"naïve 日本語 🙂🏽 \r\n\t  {END_OF_TEXT} \x00\x7f ''s it's 12345.678\n\n\n  x\u2028y {END_OF_TEXT}"


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([TEXT], 350, "test")


@pytest.fixture
def dataset(tmp_path, bpe):
    """A small dataset in tmp_path."""
    write_dataset(tmp_path, [TEXT, "second"], [TEXT[:500]], bpe, "0" * 64)
    return tmp_path


def refused(words, call, *args):
    """The call is a ValueError or an OSError of one line with these words."""
    with pytest.raises((ValueError, OSError), match=words) as error:
        call(*args)
    assert "\n" not in str(error.value)


# ---- tokenizers


@pytest.mark.parametrize("text", ["", "a", ODD, TEXT, " " * 1_000_000, "ab" * 100_000 + "é" * 100_000])
def test_decode_inverts_encode(bpe, text):
    """Any text comes back unchanged, special-token text and very long runs of one kind included."""
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.eot not in ids
    assert bpe.token_bytes[ids].sum() == len(text.encode())


def test_vocabulary_counts_the_special_token(bpe):
    """A vocabulary has the size asked for, or less without gaps if the text has too few pairs; its last id is
    end-of-text, and that counts no bytes."""
    assert (bpe.vocab_size, bpe.eot) == (350, 349)
    assert bpe.token_bytes.shape == (350,) and bpe.token_bytes.dtype == np.int64
    assert bpe.token_bytes[bpe.eot] == 0 and (bpe.token_bytes[:-1] > 0).all()
    assert bpe.decode([bpe.eot]) == END_OF_TEXT
    tiny = train_bpe(["aaab aaab"], 1000, "tiny")
    assert tiny.vocab_size < 300 and tiny.decode(tiny.encode("aaab!")) == "aaab!"


def test_a_tokenizer_is_its_meta(bpe):
    """Rebuilt from the JSON of its meta, or trained again, it encodes alike and has the same fingerprint."""
    again = make_tokenizer(json.loads(json.dumps(bpe.meta)))
    assert again.encode(ODD) == bpe.encode(ODD)
    assert again.fingerprint == bpe.fingerprint == train_bpe(iter([TEXT]), 350, "test").fingerprint
    assert bpe.fingerprint != train_bpe([TEXT], 351, "test").fingerprint


def in_tiktokens_words(meta):
    ranks = {base64.b64decode(token): rank for rank, token in enumerate(meta["ranks"])}
    words = {"name": "x", "pat_str": meta["pattern"], "special_tokens": meta["special"]}
    return words | {"mergeable_ranks": ranks}


@pytest.mark.parametrize("pattern", [SPLIT, openai_public.r50k_pat_str, arithmetic.SPLIT])
def test_cutting_a_text_changes_no_token(pattern):
    """Cut at newlines between visible characters, a text encodes as it does whole."""
    tokenizer = train_bpe([TEXT, ODD, *["x \n"] * 99], 600, "cut", pattern)
    text = (TEXT + ODD + "\n\n x\n\nit\n's\n9\n9.\n.\n") * 20
    cut = [part for line in text.splitlines(keepends=True) for part in pieces(line + "x\n'" + line, 40)]
    assert all(0 < len(part) <= 40 for part in cut)
    reference = tiktoken.Encoding(**in_tiktokens_words(tokenizer.meta))
    for whole, size in ((text, 500), ("word \nnext.\n" * 99, 20)):
        parts = list(pieces(whole, size))
        assert "".join(parts) == whole and len(parts) > len(whole) / size
        assert [i for part in parts for i in tokenizer.encode(part)] == reference.encode_ordinary(whole)


def test_unseen_characters_are_named():
    """A vocabulary of the bytes seen holds no others, and refuses a text by naming what it lacks."""
    tokenizer = train_bpe(["hello world"], 300, "few", only_seen_bytes=True)
    assert sum(tokenizer.token_bytes == 1) == len(set("hello world"))
    assert tokenizer.decode(tokenizer.encode("hold")) == "hold"
    refused(r"'few' has no token for 'x', 'é'$", tokenizer.encode, "hexéx")


def test_what_tokenizers_refuse(bpe, dataset):
    """Foreign ids, lone surrogates, impossible sizes, foreign descriptions, and files without a tokenizer."""
    for bad in ([350], [-1]):
        refused("token id is .*, but must be 0 to 349", bpe.decode, bad)
    refused("surrogate", bpe.encode, "a\ud800b")
    for size in (256, 65537):
        refused(f"vocab_size is {size}, but must be 257 to 65536", train_bpe, ["a"], size, "x")
    for meta in ({}, {"name": "x", "ranks": 3}, {**bpe.meta, "special": {}}):
        refused("the description of a tokenizer: ", make_tokenizer, meta)
    refused("--tokenizer=gtp2 is neither", choose_tokenizer, "gtp2", [TEXT], 300, "x")
    (dataset / "meta.json").write_text("[]")
    refused(
        "tokenizer is None, but must be dict; give the meta.json",
        choose_tokenizer,
        str(dataset),
        [TEXT],
        300,
        "x",
    )


def test_sample_is_spread_evenly():
    """A sample has about the size asked for and reaches the end of the texts."""
    texts = [str(i) * 100 for i in range(1000)]
    chosen = sample(texts, 10_000)
    assert sum(map(len, chosen)) <= 10_000 and len(chosen) > 30
    assert texts.index(chosen[-1]) > 950 and sample(texts) == texts


def test_gpt2_comes_from_tiktoken(monkeypatch, bpe):
    """GPT-2's BPE is what tiktoken says, and its meta alone is enough afterwards; offline, what to do."""
    parts = in_tiktokens_words(bpe.meta | {"pattern": openai_public.r50k_pat_str})
    monkeypatch.setattr(openai_public, "gpt2", lambda: parts)
    tokenizer = Tokenizer(json.loads(json.dumps(gpt2_tokenizer().meta)))
    assert tokenizer.encode(ODD) == tiktoken.Encoding(**parts).encode_ordinary(ODD)
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.name) == (350, 349, "gpt2")
    monkeypatch.setattr(openai_public, "gpt2", offline)
    refused(r"could not be downloaded \(OSError\).*--tokenizer=bpe", choose_tokenizer, "gpt2", [], 300, "x")


def offline(*args, **kwargs):
    raise OSError("no route to host")


# ---- tokenizers of pretrained models


def save_hf(folder, tokenizer, **settings):
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture
def of_bytes(tmp_path):
    """A folder with a tokenizer as OLMoE's and Qwen's: of bytes, a run of spaces added, special tokens."""
    tokenizer = byte_level([TEXT], 300)
    tokenizer.add_tokens(["    "])
    tokenizer.add_special_tokens([END_OF_TEXT, "<|pad|>"])
    tokenizer.enable_truncation(3)
    return save_hf(tmp_path / "byte_level", tokenizer, eos_token={"content": END_OF_TEXT})


@pytest.fixture
def byte_fallback(tmp_path):
    """A folder with a tokenizer as Mixtral's: of characters, else bytes; <s> and a space before a text."""
    tokenizers = pytest.importorskip("tokenizers")
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    special, letters = ["<unk>", "<s>", "</s>"], ["\u2581", "a", "b", "\u2581a"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = tokenizers.models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    to_space = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(to_space)
    from_space, strip = decoders.Replace("\u2581", " "), decoders.Strip(" ", 1)
    tokenizer.decoder = decoders.Sequence([from_space, decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens(special)
    template = tokenizers.processors.TemplateProcessing
    tokenizer.post_processor = template(single="<s> $A", special_tokens=[("<s>", 1)])
    (tmp_path / "byte_fallback").mkdir()
    (tmp_path / "byte_fallback" / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    return save_hf(tmp_path / "byte_fallback", tokenizer)


def test_byte_level_tokenizer_of_a_model(of_bytes):
    """Any text comes back, special tokens in it are ordinary text, and single tokens give their bytes."""
    tokenizer = hf_tokenizer(of_bytes)
    for text in ("", "a", ODD, TEXT, " " * 300_000):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.eot not in ids
        assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == text.encode()
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.decode([tokenizer.eot]) == END_OF_TEXT and tokenizer.token_bytes[tokenizer.eot] == 0
    assert tokenizer.start == () and tokenizer.vocab_size == 303
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == "\ufffd"  # the embedding may be padded


def test_byte_fallback_tokenizer_of_a_model(byte_fallback, tmp_path):
    """Texts begin with <s> and a space; characters without a token become bytes; end-of-text is config's.
    A document begins as every text does, however long it is."""
    tokenizer = hf_tokenizer(byte_fallback)
    ids = tokenizer.encode("a b\u00e9\n")
    assert tokenizer.start == (1,) and ids[0] == 1 and tokenizer.eot == 2 and tokenizer.stops == (2, 1, 5)
    assert tokenizer.decode(ids[1:]) == " a b\u00e9\n"
    assert tokenizer.token_bytes[ids].sum() == len(" a b\u00e9\n".encode())
    assert tokenizer.encode_array("a b\u00e9\n").tolist() == ids[1:]
    write_dataset(tmp_path / "new", ["ab\nb" * 50_000, "a"], ["b"], tokenizer, "0" * 64)
    train = load(str(tmp_path / "new")).train
    assert (train == 1).nonzero()[0].tolist() == [0, (train == 2).argmax() + 1]
    assert train[-3:].tolist() == [1, tokenizer.encode("a")[-1], 2]


def test_whose_tokenizer_is_used_again(of_bytes, dataset, bpe):
    """A tokenizer of a model is its meta, too, and the same elsewhere; --tokenizer takes a Hugging Face
    folder, and the meta.json of a dataset or its folder."""
    tokenizer = hf_tokenizer(of_bytes)
    again = make_tokenizer(json.loads(json.dumps(tokenizer.meta)))
    assert again.encode(ODD) == tokenizer.encode(ODD) and again.fingerprint == tokenizer.fingerprint
    copy = shutil.copytree(of_bytes, dataset / "copy")
    for path, same in ((copy, tokenizer), (dataset, bpe), (dataset / "meta.json", bpe)):
        assert choose_tokenizer(str(path), [], 999, "x").fingerprint == same.fingerprint


def edit(folder, key, value):
    said = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(said | {key: value}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json: model is missing"),
        (
            lambda folder: [path.write_text("{}") for path in folder.glob("*config.json")],
            "names no end-of-text",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json is damaged"),
        (lambda folder: edit(folder, "decoder", {"type": "Fuse"}), "no decoder of the kind ByteLevel"),
        (
            lambda folder: edit(folder, "added_tokens", [{"id": 2, "content": 7}]),
            "added_tokens.0.content is 7",
        ),
    ],
)
def test_bad_tokenizers_of_models(byte_fallback, damage, words):
    """Each is one line that names the folder or what is missing."""
    damage(Path(byte_fallback))
    refused(words, hf_tokenizer, byte_fallback)


def test_no_network_and_no_package(of_bytes, monkeypatch):
    """A name that the Hub does not give, and a missing package, are one line with the remedy."""
    monkeypatch.setattr(pytest.importorskip("huggingface_hub"), "snapshot_download", offline)
    refused(r"nobody/nothing is no folder.*\(OSError\)", choose_tokenizer, "nobody/nothing", [], 300, "x")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused("needs tokenizers: pip install -r requirements-hf.txt", hf_tokenizer, of_bytes)


# ---- the loader

N, BLOCK, BATCH = 1003, 10, 7
TOKENS = np.arange(N).astype("<u2")


def starts(step, batch=BATCH, block=BLOCK, seed=0, tokens=TOKENS):
    """First tokens of the windows of a batch; in TOKENS they say where the window begins."""
    return train_batch(tokens, step, batch, block, seed)[0][:, 0].tolist()


def test_targets_are_inputs_shifted_by_one():
    """Each target is the token after its input, in training and validation."""
    for x, y in [train_batch(TOKENS, 3, BATCH, BLOCK, 0), *val_batches(TOKENS, BLOCK, BATCH, 20)]:
        assert x.dtype == y.dtype == torch.int64 and x.shape[1] == y.shape[1] == BLOCK
        assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(BLOCK))


def test_an_epoch_visits_each_window_once():
    """The windows of an epoch are one tiling without repeats or overlaps, and miss less than two windows."""
    per_epoch = (N - 1) // BLOCK - 1
    offsets, orders = set(), set()
    for epoch in range(5):
        seen = [starts(n, batch=1)[0] for n in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        first = min(seen)
        assert sorted(seen) == list(range(first, first + per_epoch * BLOCK, BLOCK))
        assert N - 1 - per_epoch * BLOCK < 2 * BLOCK and first < BLOCK
        offsets.add(first)
        orders.add(tuple(start - first for start in seen))
    assert len(offsets) > 1 and len(orders) == 5


def test_batches_are_a_pure_function_of_the_step():
    """A step's batch depends on the seed but not on earlier calls, and the stream of windows ignores the
    batch size."""
    forward = [starts(step) for step in range(40)]
    others = [starts(0, seed=seed) for seed in range(1, 9)]
    val_batches(TOKENS, BLOCK, BATCH, 5)
    assert [starts(step) for step in reversed(range(40))] == forward[::-1]
    stream = [start for batch in forward for start in batch]
    assert [start for step in range(20) for start in starts(step, batch=14)] == stream
    assert len({*map(tuple, [forward[0], *others])}) == 9


def test_short_epochs():
    """A batch may straddle epochs and is still full; over many epochs every offset of the tiling occurs, and
    no window reaches beyond the end."""
    x, _ = train_batch(TOKENS[:35], 1, 16, BLOCK, 0)  # 2 windows an epoch
    assert x.shape == (16, BLOCK)
    assert all(abs(int(a) - int(b)) == BLOCK for a, b in zip(x[::2, 0], x[1::2, 0], strict=True))
    one_window = np.arange(2 * BLOCK + 1).astype("<u2")
    assert {starts(step, batch=1, tokens=one_window)[0] for step in range(300)} == set(range(BLOCK))
    assert starts(0, batch=3, tokens=TOKENS[: BLOCK + 1]) == [0, 0, 0]


@pytest.mark.parametrize("n_windows", [1, 3, 20, 99, 100, 1000])
def test_validation_windows_are_fixed_and_disjoint(n_windows):
    """Validation windows never change, never overlap, and are spread evenly over the whole split."""
    batches = val_batches(TOKENS, BLOCK, BATCH, n_windows)
    x = torch.cat([x for x, _ in batches])
    assert len(x) == min(n_windows, 100) == len(set(x[:, 0].tolist()))
    gaps = x[:, 0].diff()
    assert (gaps >= BLOCK).all() and (len(x) < 2 or gaps.max() - gaps.min() <= BLOCK)
    assert x[0, 0] == 0 and x[-1, 0] >= N * (1 - 1 / len(x)) - 2 * BLOCK
    assert all(len(x) == BATCH for x, _ in batches[:-1])
    assert_same(batches, val_batches(TOKENS, BLOCK, BATCH, n_windows))


# ---- windows of pairs: prompts of 3 tokens and answers of 1 to 5

LENGTHS = [1 + n * 7 % 5 for n in range(40)]
LEARN = np.array([bit for length in LENGTHS for bit in [0, 0, 0] + [1] * length], np.uint8)
ANSWERS, PAIRS = Answers(LEARN), np.arange(len(LEARN)).astype("<u4")
STARTS = np.cumsum([0, *(3 + length for length in LENGTHS)])


def learned(y):
    return sorted(y[y >= 0].tolist())


@pytest.mark.parametrize("block", [7, 8, 20, 100, 1000])
def test_windows_begin_with_a_pair_and_an_epoch_learns_each_answer_once(block):
    """Every window begins where a pair does and is full; its pairs are whole but for the last; its targets
    are the next tokens, or -1 at prompts and in the last pair if that is cut."""
    count = len(pack(ANSWERS, block, 0))
    x, y = train_batch(PAIRS, 0, count, block, 0, ANSWERS)
    assert x.shape == y.shape == (count, block) and x.dtype == y.dtype == torch.int64
    assert {*x[:, 0].tolist()} <= {*STARTS.tolist()}
    assert {*x[:, 1:][x[:, 1:] != x[:, :-1] + 1].tolist()} <= {*STARTS.tolist()}
    assert torch.equal((x + 1)[y >= 0], y[y >= 0])
    assert learned(y) == np.flatnonzero(LEARN).tolist()
    assert ((y >= 0).any(1)).all()


def test_long_pairs_are_cut():
    """An answer that does not fit is learned as far as it goes; with prompts too long, nothing can be."""
    y = torch.cat([y for _, y in val_batches(PAIRS, 4, 8, 100, ANSWERS)])
    assert learned(y) == [s + i for s, n in zip(STARTS, LENGTHS) for i in range(3, 3 + min(n, 2))]
    refused("every prompt is longer than block_size = 2", val_batches, PAIRS, 2, 8, 100, ANSWERS)


def test_batches_of_pairs_are_a_pure_function_of_the_step():
    """Epochs differ in the neighbours of pairs; steps come in any order; validation is always the same."""
    count, second_count = (len(pack(ANSWERS, 20, 0, epoch)) for epoch in (0, 1))
    y = train_batch(PAIRS, 0, count + second_count, 20, 0, ANSWERS)[1]
    assert learned(y[:count]) == learned(y[count:]) == np.flatnonzero(LEARN).tolist()
    first, second = (train_batch(PAIRS, step, count, 20, 0, ANSWERS)[0] for step in (0, 1))
    assert not {*map(tuple, first.tolist())} & {*map(tuple, second.tolist())}
    again = Answers(LEARN.copy())
    assert torch.equal(train_batch(PAIRS, 1, count, 20, 0, again)[0], second)
    assert not torch.equal(train_batch(PAIRS, 0, count, 20, 1, again)[0], first)
    a, b = (val_batches(PAIRS, 20, 3, 5, answers) for answers in (ANSWERS, again))
    assert [len(x) for x, _ in a] == [3, 2]
    assert_same(a, b)


def test_too_short_for_a_window():
    """Data shorter than one window is refused with both sizes."""
    words = r"10 tokens are fewer than one window of block_size \+ 1 = 11"
    refused(words, train_batch, TOKENS[:BLOCK], 0, 1, BLOCK, 0)
    refused(words, val_batches, TOKENS[:BLOCK], BLOCK, 1, 1)


# ---- dataset files


def test_documents_end_with_end_of_text(dataset, tmp_path, bpe):
    """Documents are stored one after another, each followed by end-of-text, with true counts in meta.json;
    given as ids, or as a generator's items, they give the same files."""
    loaded = load(str(dataset))
    assert loaded.train.dtype == np.uint16
    assert loaded.train.tolist() == [*bpe.encode(TEXT), bpe.eot, *bpe.encode("second"), bpe.eot]
    assert loaded.tokenizer.fingerprint == bpe.fingerprint
    train = {"documents": 2, "tokens": len(loaded.train), "bytes": len(TEXT) + len("second")}
    assert loaded.meta["train"] == train and loaded.meta["vocab_size"] == 350
    ids = (bpe.encode(text) for text in (TEXT, "second"))
    write_dataset(tmp_path / "ids", ids, [np.array(bpe.encode(TEXT[:500]))], bpe, "0" * 64)
    for name in ("train.bin", "val.bin", "meta.json"):
        assert (tmp_path / "ids" / name).read_bytes() == (dataset / name).read_bytes()


def broken():
    """Documents that fail after the first."""
    yield TEXT
    raise OSError("disk gone")


@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        (broken(), ["v"], "disk gone"),
        (["t"], broken(), "disk gone"),
        (["a\ud800"], ["v"], "surrogate"),
        ([[1, 350]], ["v"], r"ids 1..350; allowed are 0..349"),
        ([[-1]], ["v"], r"ids -1..-1"),
        (["t"], [""], "val split would be empty"),
        ([], ["v"], "train split would be empty"),
    ],
)
def test_a_failing_write_leaves_the_old_dataset(dataset, bpe, train, val, words):
    """When writing fails nothing of the old dataset changes and nothing else is left."""
    before = contents(dataset)
    refused(words, write_dataset, dataset, train, val, bpe, "0")
    assert contents(dataset) == before and not list(dataset.glob(".tmp-*"))


def test_what_is_no_dataset_is_refused(dataset):
    """A dataset that is truncated, empty, incomplete or has ids outside the vocabulary is refused by name,
    and an unknown name with the known ones."""
    refused(r"unknown dataset 'pysorce'; give arithmetic, .*pysource", load, "pysorce")
    train, meta = dataset / "train.bin", dataset / "meta.json"
    whole, about = train.read_bytes(), json.loads(meta.read_text())
    for content, words in (
        (whole[:-2], rf"train.bin has {len(whole) - 2} bytes and not {len(whole)}"),
        (b"\x5e\x01" + whole[2:], r"train.bin holds token id 350; its tokenizer has ids 0..349"),
    ):
        train.write_bytes(content)
        refused(words, load, str(dataset))
    train.write_bytes(b"")
    meta.write_text(json.dumps({**about, "files": {**about["files"], "train.bin": 0}}))
    refused("train.bin.* empty", load, str(dataset))
    train.unlink()
    refused("has no train.bin", load, str(dataset))
    meta.write_text("{}")
    refused("meta.json: files is missing, .*; prepare it again", load, str(dataset))
    meta.unlink()
    refused("has no meta.json", load, str(dataset))


def test_large_vocabularies_take_four_bytes(tmp_path, bpe):
    """Ids above 65,535 come back, and datasets from before the dtype was recorded still open."""
    lengths = np.ones(70_000, np.int64)
    large = SimpleNamespace(vocab_size=70_000, eot=69_999, start=(), meta=bpe.meta, token_bytes=lengths)
    meta = write_dataset(tmp_path / "large", [[1, 65_536, 68_000]], [[2]], large, "0" * 64)
    assert meta["dtype"] == "uint32"
    tokens = np.fromfile(tmp_path / "large" / "train.bin", "<u4")
    assert tokens.tolist() == [1, 65_536, 68_000, 69_999]
    old = write_dataset(tmp_path / "old", [TEXT], [TEXT], bpe, "0" * 64)
    assert old.pop("dtype") == "uint16"
    (tmp_path / "old" / "meta.json").write_text(json.dumps(old))
    assert bpe.decode(load(str(tmp_path / "old")).train[:-1]) == TEXT


def test_load_prepares_a_known_dataset(tmp_path, monkeypatch):
    """A known name whose files are missing is prepared at once, and only then."""
    folder = tmp_path / "arithmetic"
    folder.mkdir()
    (folder / "prepare.py").touch()
    main, calls = arithmetic.main, []
    monkeypatch.setattr(data, "HOME", tmp_path)
    monkeypatch.setattr(arithmetic, "FOLDER", folder)
    monkeypatch.setattr(arithmetic, "TEST_PER_LEVEL", 5)
    monkeypatch.setattr(arithmetic, "main", lambda argv: calls.append(main(["--n_problems=200"])))
    assert load("arithmetic").meta["train"]["documents"] == 195
    assert len(load("arithmetic").train) and len(calls) == 1
    (folder / "test.jsonl").unlink()
    load("arithmetic")
    assert len(calls) == 2


# ---- arithmetic


@pytest.fixture(scope="module")
def splits():
    return arithmetic.make_splits(3000, 7)


def test_worked_steps_are_right(splits):
    """Each of `level` equations holds, with operands known by then; the last result is the answer. The steps
    use each number of the question, so that reading all of it matters."""
    compute = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__truediv__}
    for problem in [problem for split in splits for problem in split]:
        asked = [*map(int, re.findall(r"\d+", problem["question"]))]
        operands, results = set(), []
        for left, sign, right, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", problem["answer"]):
            left, right, result = int(left), int(right), int(result)
            assert compute[sign](left, right) == result and {left, right} <= {*asked, *results}
            operands |= {left, right}
            results.append(result)
        assert operands >= {*asked}
        assert len(results) == problem["level"] == len(problem["answer"].splitlines()) - 2
        assert results[-1] == problem["result"] and min(results) >= 2
        assert problem["answer"].endswith(f"\n#### {problem['result']}")


def test_splits_never_overlap(splits):
    """No problem occurs twice, within a split or across, whatever its case, spaces and punctuation; all
    levels are in every split equally often; a seed fixes all problems, and those of the test alone."""
    assert arithmetic.normalized("Tom has  3 pies.") == arithmetic.normalized("tom has 3 pies?")
    assert arithmetic.normalized("Tom has 3 pies.") != arithmetic.normalized("Tom has 4 pies.")
    keys = [arithmetic.normalized(problem["question"]) for split in splits for problem in split]
    assert len(keys) == len(set(keys)) == 3000 + 5 * arithmetic.TEST_PER_LEVEL
    for split in splits:
        counts = np.bincount([problem["level"] for problem in split])
        assert len(counts) == 6 and counts[1:].max() - counts[1:].min() <= 1
    assert arithmetic.make_splits(3000, 7) == splits
    assert arithmetic.make_splits(100, 7)[2] == splits[2] != arithmetic.make_splits(100, 8)[2]


ANSWERED = {  # what may stand behind "####"
    19: (
        " 19;19<|endoftext|>; 19.; 19\nQuestion: and so on\n#### 20; nineteen #### 19; $19; 19.00; **19**;"
        " **19; `19`; (19); +19; €19; 19 €; $19$; \\$19; 19\\%; 19%; \\boxed{19}; $\\boxed{19}$;"
        " 19 dollars; 19, or so; 19 (nineteen); 019; x = 19; Answer: 19; The answer is 19; $$19$$;"
        ' 19 kg; 19\n2 more; 19 boxes; "19"; \u201c19\u201d; US$19; \u20b919; \\mathbf{19}'
    ),
    -19: " -19; \u221219; -$19; $-19; - 19",
    1234: " 1,234; 1 234; 1\u202f234; 1'234; 1\u2019234; 1{,}234; $1\\,234$; 1,234.00; 1234.0",
    19000: " 19 thousand; 19k; $19K; $19 Thousand; 19,000",
    1900000: " $1.9M; 1.9 Million",
    19.5: " 19.5; $19.50; 019.5",
    0.5: " .5; 0.50",
    None: (
        " 1,9; 19/2; 19 1/2; 19-20; 19 - 20; 19 to 20; 19 or 20; 19 and 20; 3:19; 1e19; 2^19; 19 x 2; 19=19;"
        " 19E2; 19½; 19²; 19\u201420; 19 \\times 2 = 38; 19 plus 2; 5'10;"
        " 12 + 7 = 19; 19.0.1; 1,23,456; 1234,567; nineteen;\n19; 19,5; "
    ),
}


@pytest.mark.parametrize("number", ANSWERED)
def test_the_result_of_an_answer(number):
    """The first "####" with a number counts, however people and models write it, and what only begins like a
    number is none; without "####" there is none."""
    for text in ANSWERED[number].split(";"):
        assert arithmetic.result_of(f"12 + 7 = 19\n####{text}") == number, text
        assert arithmetic.is_correct(f"####{text}", 19) is (number == 19), text
    assert arithmetic.result_of("12 + 7 = 19") is None


def test_arithmetic_files(tmp_path, monkeypatch, splits):
    """The files round trip, digits are single tokens, prompts are prefixes, other characters are refused."""
    monkeypatch.setattr(arithmetic, "FOLDER", tmp_path)
    arithmetic.main(["--n_problems=3000", "--seed=7"])
    loaded = load(str(tmp_path))
    tokenizer = loaded.tokenizer
    assert tokenizer.vocab_size == arithmetic.VOCAB_SIZE
    documents = [arithmetic.document(problem) for problem in splits[0]]
    assert tokenizer.decode(loaded.train) == "".join(document + END_OF_TEXT for document in documents)
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    assert sorted(token for token in tokens if re.search(rb"\d", token)) == [b"%d" % n for n in range(10)]
    lines = (tmp_path / "test.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == splits[2]
    prompt = tokenizer.encode(arithmetic.prompt_of(splits[2][0]["question"]))
    assert tokenizer.encode(arithmetic.document(splits[2][0]))[: len(prompt)] == prompt
    refused("no token for 'é'", tokenizer.encode, "Zoé has 3 apples.")


# ---- textfile, shakespeare, pysource


def run(script, source, out_dir, *argv):
    script.main([f"--source={source}", f"--out_dir={out_dir}", "--vocab_size=300", *argv])
    return load(str(out_dir))


def texts(opened):
    """The documents of both splits."""
    return [opened.tokenizer.decode(split).split(END_OF_TEXT)[:-1] for split in (opened.train, opened.val)]


def test_textfile_splits_a_file_at_a_line(tmp_path):
    """A file is cut at a line near the wanted share, and the parts put together are the file."""
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    [train], [val] = texts(run(textfile, tmp_path / "book.txt", tmp_path / "out"))
    assert train + val == TEXT and train.endswith("\n")
    assert len(val) / len(TEXT) == pytest.approx(0.1, abs=0.01)


def test_textfile_splits_at_a_marker(tmp_path, capsys):
    """Documents that a marker joins in one file are documents, without it and the space around it; a marker
    of end-of-text that nobody asked to split at is said."""
    stories = [f"Story {i}.\nIt has {i * 37} words.\n" for i in range(100)]
    (tmp_path / "stories.txt").write_text(f"\n{END_OF_TEXT}\n".join([*stories, ""]))
    train, val = texts(run(textfile, tmp_path / "stories.txt", tmp_path / "a", f"--split_on={END_OF_TEXT}"))
    assert sorted(train + val) == sorted(map(str.strip, stories)) and 1 <= len(val) <= 20
    assert "note" not in capsys.readouterr().out
    run(textfile, tmp_path / "stories.txt", tmp_path / "b")
    assert f"--split_on='{END_OF_TEXT}'" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["title\n" + "word " * 500, "word " * 500 + "\nend\n", "word " * 500])
def test_textfile_with_very_long_lines(text):
    """A text without a line end near the place is cut there all the same."""
    train, val = textfile.split({"x": text}, 0.25)
    assert train[0] + val[0] == text and len(val[0]) == pytest.approx(len(text) / 4, rel=0.1)


def test_textfile_never_gives_a_giant_to_validation():
    """Validation gets at most the wanted share of a folder, or the smallest file if every file is larger."""
    files = {str(i): "x" * size for i, size in enumerate([9000, 80, 500, 60, 300, 5000])}
    for share in (0.001, 0.01, 0.05, 0.5, 0.9):
        train, val = textfile.split(files, share)
        assert sorted(train + val) == sorted(files.values()) and train
        assert sum(map(len, val)) <= share * sum(map(len, files.values())) or val == ["x" * 60]


def write_tree(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def test_textfile_reads_a_folder(tmp_path):
    """Every text file of a folder is in one split; binaries, hidden files and the output are skipped."""
    names = {f"part{i % 3}/{i:02d}.md": f"document {i}\n" + TEXT[i : i + 200] for i in range(40)}
    others = {"image.png": bytes(range(256)), "zero.txt": b"a\0b", "empty.txt": "", ".git/config": "hidden"}
    others[".notes.txt"] = "hidden"
    write_tree(tmp_path, names | others)
    opened = run(textfile, tmp_path, tmp_path / "out", "--val_fraction=0.2")
    first = contents(tmp_path / "out")
    run(textfile, tmp_path, tmp_path / "out", "--val_fraction=0.2")
    assert contents(tmp_path / "out") == first
    train, val = ([int(text.split()[1]) for text in split] for split in texts(opened))
    assert sorted(train + val) == list(range(40)) and 5 <= len(val) <= 8


AB = '{"ask": "a", "say": "b"}\n'
FIELDS = ["--prompt_field=ask", "--answer_field=say"]


@pytest.mark.parametrize(
    ("script", "content", "words"),
    [
        (textfile, None, "cannot be read"),
        (textfile, "", "holds 0 characters"),
        (textfile, "short", "holds 5 characters of text; give at least 1,000"),
        (textfile, b"\xff\xfe" * 999, "is not UTF-8 text: byte 0 is 0xff"),
        (textfile, b"a\0" * 999, "zero byte"),
        (pairs, None, "cannot be read"),
        (pairs, "", "holds 0 pairs"),
        (pairs, "\n" + AB, "holds 1 pairs"),
        (pairs, AB + '{"ask": "a", "say": "c"}', "all pairs have the same prompt"),
        (pairs, AB + '{"ask": "a"}', "line 2 has no field 'say'; its fields are 'ask'"),
        (pairs, AB + '\n{"ask": "a"', "line 3 is not JSON"),
        (pairs, '["a", "b"]', "line 1 is not a JSON object"),
        (pairs, '{"ask": "a", "say": " "}', "line 1: field 'say' is ' ', but must be a text"),
        (pairs, '{"ask": 1, "say": "b"}', "line 1: field 'ask' is 1, but must be a text"),
    ],
)
def test_bad_sources(dataset, tmp_path_factory, script, content, words):
    """A source that is no text, too little, or not of pairs is one line, which names the line that is wrong,
    and the dataset that was there stays."""
    source = tmp_path_factory.mktemp("source")
    write_tree(source, {} if content is None else {"source": content})
    before = contents(dataset)
    refused(words, run, script, source / "source", dataset, *(FIELDS if script is pairs else []))
    assert contents(dataset) == before


@pytest.mark.parametrize(
    ("script", "argv", "words"),
    [
        (arithmetic, ["--n_problems=10"], "n_problems is 10, but must be 100 to 1,000,000"),
        (arithmetic, ["--seed=-1"], "seed is -1"),
        (arithmetic, ["--n_problems=many"], "--n_problems=many is not allowed"),
        (arithmetic, ["--problems=9"], "unknown key 'problems'"),
        (pairs, [], "say what to read"),
        (pairs, ["--source=x", "--val_fraction=1"], r"val_fraction is 1\.0"),
        (pysource, ["--val_fraction=1"], r"val_fraction is 1\.0"),
        (shakespeare, [f"--source={__file__}"], r"use data/textfile/prepare.py.*sha256"),
        (shakespeare, ["--source=nowhere.txt"], r"No such file .*nowhere.txt"),
        (textfile, [], "say what to read"),
        (textfile, ["--source=x", "--val_fraction=0"], r"val_fraction is 0\.0"),
        (textfile, [f"--source={__file__}", "--vocab_size=9"], "vocab_size is 9"),
        (textfile, [f"--source={__file__}", "--split_on="], "split_on is '', but must be a text, or none"),
        (textfile, [f"--source={__file__}", "--tokenizer=nowhere.json"], "nowhere.json is neither"),
    ],
)
def test_bad_options(script, argv, words):
    """What cannot work is refused before anything is written."""
    refused(words, script.main, argv)


def test_prepare_as_a_script(tmp_path):
    """Run as a program from elsewhere, bad input is one line on stderr and exit code 2."""
    script = [sys.executable, ROOT / "data" / "textfile" / "prepare.py", "--sorce=x"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: unknown key 'sorce'")


@pytest.mark.parametrize("name", sorted(path.parent.name for path in data.HOME.glob("*/prepare.py")))
def test_prepare_has_help(name, capsys, monkeypatch):
    """--help lists the options with their meaning and exits 0."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "data" / name / "prepare.py"), run_name="__main__")
    assert caught.value.code == 0 and "--" in capsys.readouterr().out


def test_shakespeare_from_a_file(tmp_path, monkeypatch):
    """A verified copy on disk is split as nanoGPT does: the first 90% of the characters for training."""
    (tmp_path / "plays.txt").write_text(TEXT)
    monkeypatch.setattr(shakespeare, "FOLDER", tmp_path)
    monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    shakespeare.main([f"--source={tmp_path / 'plays.txt'}", "--vocab_size=300"])
    opened = load(str(tmp_path))
    assert texts(opened) == [[TEXT[: int(0.9 * len(TEXT))]], [TEXT[int(0.9 * len(TEXT)) :]]]
    assert opened.meta["source_sha256"] == shakespeare.SHA256


def test_download(tmp_path):
    """A failed or altered download is one line that names --source and leaves nothing; a good one is kept."""
    there, target = tmp_path / "there", tmp_path / "here" / "input.txt"
    target.parent.mkdir()
    fetch = data.source.download, there.as_uri(), hashlib.sha256(b"text").hexdigest(), target
    refused(r"could not download .*/there .*--source=PATH", *fetch)
    there.write_bytes(b"other")
    refused("not the same file", *fetch)
    assert not list(target.parent.iterdir())
    there.write_bytes(b"text")
    assert fetch[0](*fetch[1:]).read_bytes() == b"text"
    there.unlink()
    assert fetch[0](*fetch[1:]) == target


def test_pysource(tmp_path, monkeypatch):
    """Files are read once each, in order, without tests and giants, and split by their paths."""
    names = ["a", "sub/c", "sub/tests/d", "sub/site-packages/e", *(f"many/m{i:03d}" for i in range(200))]
    files = {f"{name}.py": f"# {name}\n{TEXT[:300]}" for name in names}
    others = {"b.py": files["a.py"], "latin.py": b"# caf\xe9", "empty.py": "", "notes.txt": "text"}
    others["giant.py"] = "x = 1\n" * 100_000
    write_tree(tmp_path / "package", files | others)
    found = pysource.read_files({"package": tmp_path / "package"})
    assert list(found) == sorted(found) and len(found) == 202
    assert {"package/a.py", "package/sub/c.py"} < found.keys()
    monkeypatch.setattr(pysource, "roots", lambda: {"package": tmp_path / "package"})
    monkeypatch.setattr(pysource, "FOLDER", tmp_path)
    pysource.main(["--vocab_size=300", "--val_fraction=0.1"])
    opened = load(str(tmp_path))
    val = [text for name, text in found.items() if data.source.name_hash(name) < 0.1]
    assert texts(opened)[1] == val and opened.meta["train"]["documents"] == 202 - len(val)


def test_pysource_roots_exist():
    """The folders read are the standard library and the installed packages."""
    roots = pysource.roots()
    assert {"stdlib", "torch", "numpy"} <= roots.keys()
    assert (roots["stdlib"] / "os.py").is_file() and (roots["torch"] / "hub.py").is_file()


# ---- pairs and gsm8k


@pytest.fixture
def rows(tmp_path):
    """A file of pairs."""
    rows = [{"ask": f"What is {n} + 1?", "say": f" {n + 1}\n", "id": n} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "rows.jsonl"


def test_pairs(rows, tmp_path):
    """Each pair is a document of which the answer and end-of-text are learned; splits share no prompt."""
    opened = run(pairs, rows, tmp_path / "new", "--val_fraction=0.2", *FIELDS)
    asked = []
    for tokens, answers in ((opened.train, opened.train_answers), (opened.val, opened.val_answers)):
        assert len(tokens) == len(answers.learn)
        said, given = (opened.tokenizer.decode(tokens[answers.learn == bit]) for bit in (1, 0))
        numbers = [int(n) for n in re.findall(r"Question: What is (\d+) \+ 1\?\nAnswer:", given)]
        assert said.split(END_OF_TEXT) == [*(f" {n + 1}" for n in numbers), ""]
        asked.append(set(numbers))
    assert asked[0] | asked[1] == set(range(60)) and not asked[0] & asked[1]
    assert 3 < len(asked[1]) < 25


def test_gsm8k_downloads(tmp_path, monkeypatch):
    """Without a source, both official files are fetched; offline, the error says what to do instead."""
    asked = []

    def fake(url, sha256, path):
        asked.append((url.rsplit("/")[-1], sha256))
        lines = [json.dumps({"question": f"Q{i}?", "answer": f"#### {i}"}) for i in range(9)]
        (tmp_path / path.name).write_text("\n".join(lines))
        return tmp_path / path.name

    argv = [f"--out_dir={tmp_path / 'new'}", "--tokenizer=bpe", "--vocab_size=280"]
    with monkeypatch.context() as patched:
        patched.setattr(gsm8k, "download", fake)
        gsm8k.main(argv)
    assert asked == [(name, gsm8k.SHA256[name]) for name in ("train.jsonl", "test.jsonl")]
    assert len((tmp_path / "new" / "test.jsonl").read_text().splitlines()) == 9
    monkeypatch.setattr(data.source.urllib.request, "urlopen", offline)
    refused(r"could not download https://.*/train.jsonl .*--source=PATH", gsm8k.main, argv)
