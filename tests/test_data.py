"""Tokenizers, dataset files, the loader, and the data sets that need no network."""

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
import torch
from tiktoken_ext import openai_public

import data
import data.source
from data import (
    Tokenizer,
    gpt2_tokenizer,
    hf_tokenizer,
    load,
    make_tokenizer,
    train_batch,
    train_bpe,
    val_batches,
    write_dataset,
)
from data.answers import Answers, pack
from data.arithmetic import prepare as arithmetic
from data.gsm8k import prepare as gsm8k
from data.pairs import prepare as pairs
from data.pysource import prepare as pysource
from data.shakespeare import prepare as shakespeare
from data.source import pieces, sample
from data.textfile import prepare as textfile
from data.tokenizer import END_OF_TEXT, choose_tokenizer

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
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


# ---- tokenizers


@pytest.mark.parametrize("text", ["", "a", ODD, TEXT, " " * 1_000_000, "ab" * 100_000 + "é" * 100_000])
def test_decode_inverts_encode(bpe, text):
    """Any text comes back unchanged, special-token text and very long runs of one kind included."""
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.eot not in ids
    assert bpe.token_bytes[ids].sum() == len(text.encode())


def test_vocabulary_counts_the_special_token(bpe):
    """A trained vocabulary has the size asked for, its last id is end-of-text, and that counts no bytes."""
    assert (bpe.vocab_size, bpe.eot) == (350, 349)
    assert bpe.token_bytes.shape == (350,) and bpe.token_bytes.dtype == np.int64
    assert bpe.token_bytes[bpe.eot] == 0 and (bpe.token_bytes[:-1] > 0).all()
    assert bpe.decode([bpe.eot]) == END_OF_TEXT


def test_tokenizer_survives_json(bpe):
    """A tokenizer rebuilt from the JSON of its meta encodes alike and has the same fingerprint."""
    again = Tokenizer(json.loads(json.dumps(bpe.meta)))
    assert again.encode(ODD) == bpe.encode(ODD)
    assert again.fingerprint == bpe.fingerprint != train_bpe([TEXT], 351, "test").fingerprint


def test_training_is_deterministic(bpe):
    """The same texts give the same tokenizer."""
    assert train_bpe(iter([TEXT]), 350, "test").fingerprint == bpe.fingerprint


@pytest.mark.parametrize("pattern", [data.tokenizer.SPLIT, openai_public.r50k_pat_str, arithmetic.SPLIT])
def test_cutting_a_text_changes_no_token(pattern):
    """Cut at newlines between visible characters, a text encodes as it does whole."""
    tokenizer = train_bpe([TEXT, ODD], 600, "cut", pattern)
    text = (TEXT + ODD + "\n\n x\n\nit\n's\n9\n9.\n.\n") * 20
    cut = [part for line in text.splitlines(keepends=True) for part in pieces(line + "x\n'" + line, 40)]
    assert all(0 < len(part) <= 40 for part in cut)
    parts = list(pieces(text, 500))
    assert "".join(parts) == text and len(parts) > len(text) / 500
    whole = tokenizer._encoding.encode_ordinary(text)
    assert [i for part in parts for i in tokenizer.encode(part)] == whole


def test_fewer_merges_than_asked():
    """A text with too few pairs gives a smaller vocabulary without gaps."""
    tokenizer = train_bpe(["aaab aaab"], 1000, "tiny")
    assert tokenizer.vocab_size < 300
    assert tokenizer.decode(tokenizer.encode("aaab!")) == "aaab!"


def test_unseen_characters_are_named():
    """A vocabulary of the bytes seen holds no others, and refuses a text by naming what it lacks."""
    tokenizer = train_bpe(["hello world"], 300, "few", only_seen_bytes=True)
    assert sum(tokenizer.token_bytes == 1) == len(set("hello world"))
    assert tokenizer.decode(tokenizer.encode("hold")) == "hold"
    with pytest.raises(ValueError, match=r"'few' has no token for 'x', 'é'$"):
        tokenizer.encode("hexéx")


def test_foreign_ids_and_broken_characters_are_refused(bpe):
    """Foreign ids, lone surrogates, impossible sizes and foreign descriptions are ValueErrors."""
    for bad in ([350], [-1]):
        with pytest.raises(ValueError, match=r"allowed are 0..349"):
            bpe.decode(bad)
    with pytest.raises(ValueError, match="surrogate"):
        bpe.encode("a\ud800b")
    for size in (256, 65537):
        with pytest.raises(ValueError, match=rf"vocab_size is {size}; allowed are 257\.\.65536"):
            train_bpe(["a"], size, "x")
    for meta in ({}, {"name": "x", "ranks": 3}, {**bpe.meta, "special": {}}):
        with pytest.raises(ValueError, match="not the description of a tokenizer"):
            Tokenizer(meta)


def test_sample_is_spread_evenly():
    """A sample has about the size asked for and reaches the end of the texts."""
    texts = [str(i) * 100 for i in range(1000)]
    chosen = sample(texts, 10_000)
    assert sum(map(len, chosen)) <= 10_000 and len(chosen) > 30
    assert texts.index(chosen[-1]) > 950 and sample(texts) == texts


def test_choose_tokenizer(dataset, bpe):
    """--tokenizer takes the meta.json of a dataset or its folder; anything else is refused by name."""
    for path in (dataset, dataset / "meta.json"):
        assert choose_tokenizer(str(path), [], 999, "x").fingerprint == bpe.fingerprint
    with pytest.raises(ValueError, match="--tokenizer=gtp2 is neither"):
        choose_tokenizer("gtp2", [TEXT], 300, "x")
    (dataset / "meta.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        choose_tokenizer(str(dataset), [TEXT], 300, "x")


def test_gpt2_from_tiktokens_cache(tmp_path, monkeypatch):
    """GPT-2's BPE comes from tiktoken's cache without a network, and its meta alone is enough afterwards."""
    if not (SHARED / "gpt2_vocab.bpe").is_file():
        pytest.skip("no copy of GPT-2's vocabulary")
    base = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    for name, file in (("vocab.bpe", "gpt2_vocab.bpe"), ("encoder.json", "gpt2_encoder.json")):
        shutil.copyfile(SHARED / file, tmp_path / hashlib.sha1((base + name).encode()).hexdigest())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    tokenizer = Tokenizer(json.loads(json.dumps(gpt2_tokenizer().meta)))
    assert (tokenizer.vocab_size, tokenizer.eot) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.decode(tokenizer.encode(ODD)) == ODD


def test_gpt2_unavailable_is_one_line(monkeypatch):
    """Without network and cache the error says what to do instead."""

    def offline():
        raise ConnectionError("no route")

    monkeypatch.setattr(openai_public, "gpt2", offline)
    with pytest.raises(ValueError, match=r"could not be downloaded \(ConnectionError\).*--tokenizer=bpe"):
        choose_tokenizer("gpt2", [TEXT], 300, "x")


# ---- tokenizers of pretrained models


def save_hf(folder, tokenizer, **settings):
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture
def byte_level(tmp_path):
    """A folder with a tokenizer as OLMoE's and Qwen's: of bytes, a run of spaces added, special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens(["    "])
    tokenizer.add_special_tokens([END_OF_TEXT, "<|pad|>"])
    tokenizer.enable_truncation(3)
    return save_hf(tmp_path / "byte_level", tokenizer, eos_token={"content": END_OF_TEXT})


@pytest.fixture
def byte_fallback(tmp_path):
    """A folder with a tokenizer as Mixtral's: of characters, else bytes; <s> and a space before a text."""
    tokenizers = pytest.importorskip("tokenizers")
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "a",
        "b",
        "\u2581a",
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = tokenizers.models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True)
    tokenizer, normalizers, decoders = (
        tokenizers.Tokenizer(model),
        tokenizers.normalizers,
        tokenizers.decoders,
    )
    to_space = normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence(list(to_space))
    from_space = (
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1),
    )
    tokenizer.decoder = decoders.Sequence(list(from_space))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    template = tokenizers.processors.TemplateProcessing
    tokenizer.post_processor = template(single="<s> $A", special_tokens=[("<s>", 1)])
    return save_hf(tmp_path / "byte_fallback", tokenizer)


def test_byte_level_tokenizer_of_a_model(byte_level):
    """Any text comes back, special tokens in it are ordinary text, and single tokens give their bytes."""
    tokenizer = hf_tokenizer(byte_level)
    for text in ("", "a", ODD, TEXT, " " * 300_000):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.eot not in ids
        assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == text.encode()
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.decode([tokenizer.eot]) == END_OF_TEXT and tokenizer.token_bytes[tokenizer.eot] == 0
    assert tokenizer.start == () and tokenizer.vocab_size == 303
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == "\ufffd"  # the embedding may be padded


def test_byte_fallback_tokenizer_of_a_model(byte_fallback):
    """Texts begin with <s> and a space; characters without a token become bytes; end-of-text is config's."""
    tokenizer = hf_tokenizer(byte_fallback)
    ids = tokenizer.encode("a b\u00e9\n")
    assert tokenizer.start == (1,) and ids[0] == 1 and tokenizer.eot == 2
    assert tokenizer.decode(ids[1:]) == " a b\u00e9\n"
    assert tokenizer.token_bytes[ids].sum() == len(" a b\u00e9\n".encode())
    assert tokenizer.encode_array("a b\u00e9\n").tolist() == ids[1:]


def test_tokenizer_of_a_model_survives_json(byte_level, tmp_path, bpe):
    """make_tokenizer opens either kind from its meta; a copy elsewhere counts as the same tokenizer."""
    tokenizer = hf_tokenizer(byte_level)
    again = make_tokenizer(json.loads(json.dumps(tokenizer.meta)))
    assert again.encode(ODD) == tokenizer.encode(ODD) and again.fingerprint == tokenizer.fingerprint
    copy = shutil.copytree(byte_level, tmp_path / "copy")
    assert choose_tokenizer(str(copy), [], 999, "x").fingerprint == tokenizer.fingerprint
    assert make_tokenizer(bpe.meta).fingerprint == bpe.fingerprint


def test_documents_in_the_tokens_of_a_model(byte_fallback, tmp_path):
    """Each document begins as every text does, however long it is, and ends with end-of-text."""
    tokenizer = hf_tokenizer(byte_fallback)
    write_dataset(tmp_path / "new", ["ab\nb" * 50_000, "a"], ["b"], tokenizer, "0" * 64)
    opened = load(str(tmp_path / "new"))
    assert (opened.train == 1).nonzero()[0].tolist() == [0, (opened.train == 2).argmax() + 1]
    assert opened.train[-3:].tolist() == [1, tokenizer.encode("a")[-1], 2]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "is not a tokenizer.json"),
        (lambda folder: (folder / "config.json").write_text("{}"), "names no end-of-text"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json is damaged"),
        (lambda folder: edit(folder, "decoder", {"type": "Fuse"}), "no decoder of the kind ByteLevel"),
    ],
)
def test_bad_tokenizers_of_models(byte_fallback, damage, words):
    """Each is one line that names the folder or what is missing."""
    damage(Path(byte_fallback))
    with pytest.raises(ValueError, match=words) as error:
        hf_tokenizer(byte_fallback)
    assert "\n" not in str(error.value)


def edit(folder, key, value):
    said = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(said | {key: value}))


def test_no_network_and_no_package(byte_level, monkeypatch):
    """A name that the Hub does not give, and a missing package, are one line with the remedy."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(
        hub, "snapshot_download", lambda name, **files: exec("raise ConnectionError('no route')")
    )
    with pytest.raises(ValueError, match=r"nobody/nothing is no folder.*\(ConnectionError\)"):
        choose_tokenizer("nobody/nothing", [], 300, "x")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"needs tokenizers: pip install -r requirements-hf.txt"):
        hf_tokenizer(byte_level)


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
    """A step's batch never depends on earlier calls, and the stream of windows ignores the batch size."""
    forward = [starts(step) for step in range(40)]
    val_batches(TOKENS, BLOCK, BATCH, 5)
    data._epoch_starts.cache_clear()
    assert [starts(step) for step in reversed(range(40))] == forward[::-1]
    stream = [start for batch in forward for start in batch]
    assert [start for step in range(20) for start in starts(step, batch=14)] == stream


def test_a_batch_straddles_epochs():
    """A batch may be larger than several epochs and is still full."""
    x, _ = train_batch(TOKENS[:35], 1, 16, BLOCK, 0)  # 2 windows an epoch
    assert x.shape == (16, BLOCK)
    assert all(abs(int(a) - int(b)) == BLOCK for a, b in zip(x[::2, 0], x[1::2, 0], strict=True))


def test_seeds_differ():
    """Another seed gives another order."""
    assert starts(0, seed=1) != starts(0, seed=2)


def test_offsets_reach_every_place():
    """Over many epochs every offset of the tiling occurs, and no window reaches beyond the end."""
    tokens = np.arange(2 * BLOCK + 1).astype("<u2")  # one window an epoch
    seen = {starts(step, batch=1, tokens=tokens)[0] for step in range(300)}
    assert seen == set(range(BLOCK))
    assert starts(0, batch=3, tokens=tokens[: BLOCK + 1]) == [0, 0, 0]


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
    again = val_batches(TOKENS, BLOCK, BATCH, n_windows)
    assert all(
        torch.equal(a, b) for pair in zip(batches, again, strict=True) for a, b in zip(*pair, strict=True)
    )


# ---- windows of pairs: prompts of 3 tokens and answers of 1 to 5

LENGTHS = [1 + n * 7 % 5 for n in range(40)]
LEARN = np.array([bit for length in LENGTHS for bit in [0, 0, 0] + [1] * length], np.uint8)
ANSWERS, PAIRS = Answers(LEARN), np.arange(len(LEARN)).astype("<u4")
STARTS = np.cumsum([0, *(3 + length for length in LENGTHS)])


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
    assert sorted(y[y >= 0].tolist()) == np.flatnonzero(LEARN).tolist()
    assert ((y >= 0).any(1)).all()


def test_long_pairs_are_cut():
    """An answer that does not fit is learned as far as it goes; with prompts too long, nothing can be."""
    y = torch.cat([y for _, y in val_batches(PAIRS, 4, 8, 100, ANSWERS)])
    assert sorted(y[y >= 0].tolist()) == [
        s + i for s, n in zip(STARTS, LENGTHS) for i in range(3, 3 + min(n, 2))
    ]
    with pytest.raises(ValueError, match="every prompt is longer than block_size = 2"):
        val_batches(PAIRS, 2, 8, 100, ANSWERS)


def test_batches_of_pairs_are_a_pure_function_of_the_step():
    """Epochs differ in the neighbours of pairs; steps come in any order; validation is always the same."""
    count, second_count = (len(pack(ANSWERS, 20, 0, epoch)) for epoch in (0, 1))
    y = train_batch(PAIRS, 0, count + second_count, 20, 0, ANSWERS)[1]
    for part in (y[:count], y[count:]):
        assert sorted(part[part >= 0].tolist()) == np.flatnonzero(LEARN).tolist()
    first, second = (train_batch(PAIRS, step, count, 20, 0, ANSWERS)[0] for step in (0, 1))
    assert not {*map(tuple, first.tolist())} & {*map(tuple, second.tolist())}
    again = Answers(LEARN.copy())
    assert torch.equal(train_batch(PAIRS, 1, count, 20, 0, again)[0], second)
    assert not torch.equal(train_batch(PAIRS, 0, count, 20, 1, again)[0], first)
    a, b = (val_batches(PAIRS, 20, 3, 5, answers) for answers in (ANSWERS, again))
    assert [len(x) for x, _ in a] == [3, 2]
    assert all(torch.equal(left, right) for x, y in zip(a, b) for left, right in zip(x, y))


def test_too_short_for_a_window():
    """Data shorter than one window is refused with both sizes."""
    for call in (lambda t: train_batch(t, 0, 1, BLOCK, 0), lambda t: val_batches(t, BLOCK, 1, 1)):
        with pytest.raises(ValueError, match=r"10 tokens are fewer than one window of block_size \+ 1 = 11"):
            call(TOKENS[:BLOCK])


# ---- dataset files


def test_documents_end_with_end_of_text(dataset, bpe):
    """Documents are stored one after another, each followed by end-of-text, with true counts in meta.json."""
    loaded = load(str(dataset))
    assert loaded.train.dtype == np.uint16
    assert loaded.train.tolist() == [*bpe.encode(TEXT), bpe.eot, *bpe.encode("second"), bpe.eot]
    assert loaded.tokenizer.fingerprint == bpe.fingerprint
    train = {"documents": 2, "tokens": len(loaded.train), "bytes": len(TEXT) + len("second")}
    assert loaded.meta["train"] == train and loaded.meta["vocab_size"] == 350


def test_ids_and_texts_are_written_alike(tmp_path, bpe):
    """A document given as ids, as a generator's item, or as a long text gives the same file."""
    long = TEXT * 10
    write_dataset(tmp_path / "a", [long], ["v"], bpe, "0")
    write_dataset(
        tmp_path / "b", (bpe.encode(text) for text in [long]), [np.array(bpe.encode("v"))], bpe, "0"
    )
    for name in ("train.bin", "val.bin"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def snapshot(folder):
    """Contents of every file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def broken():
    """Documents that fail after the first."""
    yield TEXT
    raise OSError("disk gone")


@pytest.mark.parametrize(
    ("train", "val", "error"),
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
def test_a_failing_write_leaves_the_old_dataset(dataset, bpe, train, val, error):
    """When writing fails nothing of the old dataset changes and nothing else is left."""
    before = snapshot(dataset)
    with pytest.raises((ValueError, OSError), match=error):
        write_dataset(dataset, train, val, bpe, "0")
    assert snapshot(dataset) == before and not list(dataset.glob(".tmp-*"))


def test_an_interrupted_move_is_no_dataset(dataset, bpe, monkeypatch):
    """Stopped between two renames, old and new files are not taken for a dataset."""
    replace, moved = data.os.replace, []

    def failing(source, target):
        if moved:
            raise OSError("stopped")
        moved.append(replace(source, target))

    monkeypatch.setattr(data.os, "replace", failing)
    with pytest.raises(OSError, match="stopped"):
        write_dataset(dataset, ["new"], ["new"], bpe, "0")
    with pytest.raises(ValueError, match=r"has no meta.json"):
        load(str(dataset))


def test_damaged_files_are_refused(dataset):
    """A dataset that is truncated, empty, incomplete or has ids outside the vocabulary is refused by name."""
    train, meta = dataset / "train.bin", dataset / "meta.json"
    whole, about = train.read_bytes(), json.loads(meta.read_text())
    train.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=rf"train.bin has {len(whole) - 2} bytes and not {len(whole)}"):
        load(str(dataset))
    train.write_bytes(b"\x5e\x01" + whole[2:])
    with pytest.raises(ValueError, match=r"train.bin holds token id 350; its tokenizer has ids 0..349"):
        load(str(dataset))
    train.write_bytes(b"")
    meta.write_text(json.dumps({**about, "files": {**about["files"], "train.bin": 0}}))
    with pytest.raises(ValueError, match=r"train.bin is empty"):
        load(str(dataset))
    train.unlink()
    with pytest.raises(ValueError, match=r"has no train.bin"):
        load(str(dataset))
    meta.write_text("{}")
    with pytest.raises(ValueError, match=r"not the meta.json of a dataset"):
        load(str(dataset))


def test_large_vocabularies_take_four_bytes(tmp_path, bpe):
    """Ids above 65,535 come back, and datasets from before the dtype was recorded still open."""
    tokenizer = SimpleNamespace(
        vocab_size=70_000, eot=69_999, start=(), meta=bpe.meta, token_bytes=np.ones(70_000, np.int64)
    )
    meta = write_dataset(tmp_path / "large", [[1, 65_536, 68_000]], [[2]], tokenizer, "0" * 64)
    assert meta["dtype"] == "uint32"
    tokens = np.fromfile(tmp_path / "large" / "train.bin", "<u4")
    assert tokens.tolist() == [1, 65_536, 68_000, 69_999]
    old = write_dataset(tmp_path / "old", [TEXT], [TEXT], bpe, "0" * 64)
    assert old.pop("dtype") == "uint16"
    (tmp_path / "old" / "meta.json").write_text(json.dumps(old))
    assert bpe.decode(load(str(tmp_path / "old")).train[:-1]) == TEXT


def test_unknown_dataset_is_refused(tmp_path):
    """An unknown name lists the known ones; a folder without a dataset says what it lacks."""
    with pytest.raises(ValueError, match=r"unknown dataset 'pysorce'; give arithmetic, .*pysource"):
        load("pysorce")
    with pytest.raises(ValueError, match=r"has no meta.json"):
        load(str(tmp_path))


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


def evaluate(problem):
    """Results of the equations in the worked steps, each recomputed from its text."""
    results = []
    for left, sign, right, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", problem["answer"]):
        left, right, result = int(left), int(right), int(result)
        assert {"+": left + right, "-": left - right, "*": left * right}.get(sign, left / right) == result
        known = [*map(int, re.findall(r"\d+", problem["question"])), *results]
        assert left in known and right in known
        results.append(result)
    return results


def test_worked_steps_are_right(splits):
    """Each of `level` equations holds, with operands known by then; the last result is the answer."""
    for problem in [problem for split in splits for problem in split]:
        results = evaluate(problem)
        assert len(results) == problem["level"] == len(problem["answer"].splitlines()) - 2
        assert results[-1] == problem["result"] and min(results) >= 2
        assert problem["answer"].endswith(f"\n#### {problem['result']}")


def test_every_number_of_the_question_is_used(splits):
    """The worked steps use each number of the question, so that reading all of it matters."""
    for problem in splits[0]:
        operands = re.findall(r"\d+(?= [-+*/])|(?<=[-+*/] )\d+", problem["answer"])
        assert set(re.findall(r"\d+", problem["question"])) <= set(operands)


def test_splits_never_overlap(splits):
    """No problem occurs twice, within a split or across; all levels are in every split equally often."""
    keys = [arithmetic.normalized(problem["question"]) for split in splits for problem in split]
    assert len(keys) == len(set(keys)) == 3000 + 5 * arithmetic.TEST_PER_LEVEL
    for split in splits:
        counts = np.bincount([problem["level"] for problem in split])
        assert len(counts) == 6 and counts[1:].max() - counts[1:].min() <= 1


def test_normalized_ignores_punctuation_and_case():
    """Problems that differ in case, spacing or punctuation only count as the same; other numbers do not."""
    assert arithmetic.normalized("Tom has  3 pies.") == arithmetic.normalized("tom has 3 pies?")
    assert arithmetic.normalized("Tom has 3 pies.") != arithmetic.normalized("Tom has 4 pies.")


def test_problems_are_deterministic(splits):
    """A seed fixes all problems, the test set whatever the number of others; another seed differs."""
    assert arithmetic.make_splits(3000, 7) == splits
    assert arithmetic.make_splits(100, 7)[2] == splits[2] != arithmetic.make_splits(100, 8)[2]


@pytest.mark.parametrize(
    ("generated", "correct"),
    [
        (" Now Tom has 12 + 7 = 19 pies.\n#### 19", True),
        ("#### 19\nQuestion: and so on\n#### 20", True),
        ("#### 20\n#### 19", False),
        ("####19<|endoftext|>", True),
        ("#### 19.", True),
        ("#### 1,9", True),
        ("#### 190", False),
        ("#### 19.5", False),
        ("#### -19", False),
        ("12 + 7 = 19", False),
        ("####\n19", False),
        ("#### nineteen #### 19", True),
        ("", False),
    ],
)
def test_is_correct(generated, correct):
    """Only the first "#### <integer>" counts."""
    assert arithmetic.is_correct(generated, 19) is correct


def test_is_correct_reads_commas():
    """Thousands may be written with commas."""
    assert arithmetic.is_correct("#### 1,234", 1234) and not arithmetic.is_correct("#### 1,234", 1)


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
    assert sorted(token for token in tokens if re.search(rb"\d", token)) == [
        b"%d" % digit for digit in range(10)
    ]
    lines = (tmp_path / "test.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == splits[2]
    prompt = tokenizer.encode(arithmetic.prompt_of(splits[2][0]["question"]))
    assert tokenizer.encode(arithmetic.document(splits[2][0]))[: len(prompt)] == prompt
    with pytest.raises(ValueError, match="no token for 'é'"):
        tokenizer.encode("Zoé has 3 apples.")


@pytest.mark.parametrize(
    "argv", [["--n_problems=10"], ["--seed=-1"], ["--n_problems=many"], ["--problems=9"]]
)
def test_arithmetic_options_are_checked(argv):
    """Impossible options are refused."""
    with pytest.raises(ValueError):
        arithmetic.main(argv)


# ---- textfile, shakespeare, pysource


def test_textfile_splits_a_file_at_a_line(tmp_path):
    """A file is cut at a line near the wanted share, and the parts put together are the file."""
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    textfile.main([f"--source={tmp_path / 'book.txt'}", f"--out_dir={tmp_path / 'out'}", "--vocab_size=300"])
    loaded = load(str(tmp_path / "out"))
    train, val = (loaded.tokenizer.decode(part[:-1]) for part in (loaded.train, loaded.val))
    assert train + val == TEXT and train.endswith("\n")
    assert len(val) / len(TEXT) == pytest.approx(0.1, abs=0.01)


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


def make_tree(folder):
    """A folder with text in sub-folders, and with things that are not text."""
    for i in range(40):
        path = folder / f"part{i % 3}" / f"{i:02d}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {i}\n" + TEXT[i : i + 200], encoding="utf-8")
    (folder / "image.png").write_bytes(bytes(range(256)))
    (folder / "zero.txt").write_bytes(b"a\0b")
    (folder / "empty.txt").touch()
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")


def test_textfile_reads_a_folder(tmp_path):
    """Every text file of a folder is in one split; binaries, hidden files and the output are skipped."""
    make_tree(tmp_path)
    argv = [f"--source={tmp_path}", f"--out_dir={tmp_path / 'out'}", "--vocab_size=300", "--val_fraction=0.2"]
    textfile.main(argv)
    first = snapshot(tmp_path / "out")
    textfile.main(argv)
    assert snapshot(tmp_path / "out") == first
    loaded = load(str(tmp_path / "out"))
    train, val = (
        loaded.tokenizer.decode(part).split(END_OF_TEXT)[:-1] for part in (loaded.train, loaded.val)
    )
    numbers = [[int(text.split()[1]) for text in part] for part in (train, val)]
    assert sorted(numbers[0] + numbers[1]) == list(range(40)) and 5 <= len(val) <= 8


def test_textfile_reuses_a_tokenizer(tmp_path, dataset, bpe):
    """--tokenizer=meta.json gives the new dataset the very tokenizer of the old one."""
    (tmp_path / "new.txt").write_text(TEXT[::-1])
    out = tmp_path / "out"
    textfile.main(
        [f"--source={tmp_path / 'new.txt'}", f"--tokenizer={dataset / 'meta.json'}", f"--out_dir={out}"]
    )
    assert load(str(out)).tokenizer.fingerprint == bpe.fingerprint


@pytest.mark.parametrize(
    ("content", "options", "error"),
    [
        (None, [], "does not exist"),
        (b"", [], "holds 0 characters"),
        (b"short", [], "holds 5 characters of text; give at least 1,000"),
        (b"\xff\xfe" * 999, [], "is not UTF-8 text: byte 0 is 0xff"),
        (b"a\0" * 999, [], "zero byte"),
        (TEXT.encode(), ["--val_fraction=0"], "val_fraction=0.0"),
        (TEXT.encode(), ["--vocab_size=9"], "vocab_size is 9"),
        (TEXT.encode(), ["--tokenizer=nowhere.json"], "nowhere.json is neither"),
    ],
)
def test_textfile_refuses_and_keeps_the_old(dataset, tmp_path_factory, content, options, error):
    """Any source or option that cannot work is one line, and the dataset that was there stays."""
    source = tmp_path_factory.mktemp("source") / "text"
    if content is not None:
        source.write_bytes(content)
    before = snapshot(dataset)
    with pytest.raises(ValueError, match=error) as caught:
        textfile.main([f"--source={source}", f"--out_dir={dataset}", *options])
    assert "\n" not in str(caught.value) and snapshot(dataset) == before


def test_prepare_as_a_script(tmp_path):
    """Run as a program from elsewhere, bad input is one line on stderr and exit code 2."""
    script = [sys.executable, ROOT / "data" / "textfile" / "prepare.py", "--sorce=x"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: unknown key 'sorce'")


@pytest.mark.parametrize("name", ["arithmetic", "pysource", "shakespeare", "textfile"])
def test_prepare_has_help(name, capsys, monkeypatch):
    """--help lists the options with their meaning and exits 0."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "data" / name / "prepare.py"), run_name="__main__")
    assert caught.value.code == 0 and "--" in capsys.readouterr().out


def test_shakespeare_from_a_file(tmp_path, monkeypatch):
    """A copy on disk gives the same split as nanoGPT: the first 90% of the characters for training."""
    source = SHARED / "tinyshakespeare.txt"
    if not source.is_file():
        pytest.skip("no copy of Tiny Shakespeare")
    monkeypatch.setattr(shakespeare, "FOLDER", tmp_path)
    shakespeare.main([f"--source={source}"])
    loaded, text = load(str(tmp_path)), source.read_text()
    assert loaded.tokenizer.decode(loaded.train[:-1]) == text[: int(0.9 * len(text))]
    assert loaded.tokenizer.decode(loaded.val[:-1]) == text[int(0.9 * len(text)) :]
    assert loaded.tokenizer.vocab_size == 1024 and loaded.meta["source_sha256"] == shakespeare.SHA256


def test_shakespeare_refuses_another_text(tmp_path):
    """A file that is not Tiny Shakespeare, or none at all, is refused with a pointer to textfile."""
    (tmp_path / "x.txt").write_text(TEXT)
    with pytest.raises(ValueError, match=r"use data/textfile/prepare.py.*sha256"):
        shakespeare.main([f"--source={tmp_path / 'x.txt'}"])
    with pytest.raises(ValueError, match="is not a file"):
        shakespeare.main([f"--source={tmp_path / 'y.txt'}"])


def test_download(tmp_path, monkeypatch):
    """A failed or altered download is one line that names --source and leaves nothing; a good one is kept."""
    sha256 = hashlib.sha256(b"text").hexdigest()
    target = tmp_path / "input.txt"
    with pytest.raises(ValueError, match=r"could not download .*nothing-here.*--source=PATH"):
        data.source.download("file:///nothing-here", sha256, target)
    monkeypatch.setattr(data.source, "_fetch", lambda url, path: path.write_bytes(b"other"))
    with pytest.raises(ValueError, match="not the same file"):
        data.source.download("https://x", sha256, target)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(data.source, "_fetch", lambda url, path: path.write_bytes(b"text"))
    assert data.source.download("https://x", sha256, target).read_bytes() == b"text"
    monkeypatch.setattr(data.source, "_fetch", None)
    assert data.source.download("https://x", sha256, target) == target


def test_pysource(tmp_path, monkeypatch):
    """Files are read once each, in order, without tests and giants, and split by their paths."""
    package = tmp_path / "package"
    for name in (
        "a",
        "b",
        "sub/c",
        "sub/tests/d",
        "sub/site-packages/e",
        *(f"many/m{i:03d}" for i in range(200)),
    ):
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n{TEXT[:300]}")
    (package / "b.py").write_text((package / "a.py").read_text())
    (package / "latin.py").write_bytes(b"# caf\xe9")
    (package / "empty.py").touch()
    (package / "giant.py").write_text("x = 1\n" * 100_000)
    files = pysource.read_files({"package": package})
    assert list(files) == sorted(files) and len(files) == 202
    assert {"package/a.py", "package/sub/c.py"} < files.keys()
    monkeypatch.setattr(pysource, "roots", lambda: {"package": package})
    monkeypatch.setattr(pysource, "FOLDER", tmp_path)
    pysource.main(["--vocab_size=300", "--val_fraction=0.1"])
    loaded = load(str(tmp_path))
    val = loaded.tokenizer.decode(loaded.val).split(END_OF_TEXT)[:-1]
    assert val == [text for name, text in files.items() if data.source.name_hash(name) < 0.1]
    assert loaded.meta["train"]["documents"] == 202 - len(val)


def test_pysource_roots_exist():
    """The folders read are the standard library and the installed packages."""
    roots = pysource.roots()
    assert {"stdlib", "torch", "numpy"} <= roots.keys()
    assert all(
        (folder / name).is_file() for folder, name in ((roots["stdlib"], "os.py"), (roots["torch"], "hub.py"))
    )


# ---- pairs and gsm8k

ROWS = [{"ask": f"What is {n} + 1?", "say": f" {n + 1}\n", "id": n} for n in range(60)]


@pytest.fixture
def rows(tmp_path):
    """A file of pairs; write(text) replaces what is in it."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def prepare_pairs(path, *argv):
    pairs.main([f"--source={path}", "--prompt_field=ask", "--answer_field=say", "--vocab_size=300", *argv])


def test_pairs(rows, tmp_path):
    """Each pair is a document of which the answer and end-of-text are learned; splits share no prompt."""
    prepare_pairs(rows, f"--out_dir={tmp_path / 'new'}", "--val_fraction=0.2")
    opened = load(str(tmp_path / "new"))
    asked = {}
    for split in ("train", "val"):
        tokens, learn = getattr(opened, split), getattr(opened, f"{split}_answers").learn
        assert len(tokens) == len(learn)
        said = opened.tokenizer.decode(tokens[learn == 1]).split(END_OF_TEXT)
        asked[split] = opened.tokenizer.decode(tokens[learn == 0])
        numbers = [int(n) for n in re.findall(r"Question: What is (\d+) \+ 1\?\nAnswer:", asked[split])]
        assert said == [*(f" {n + 1}" for n in numbers), ""]
        asked[split] = set(numbers)
    assert asked["train"] | asked["val"] == set(range(60)) and not asked["train"] & asked["val"]
    assert 3 < len(asked["val"]) < 25


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds 0 pairs"),
        ('\n{"ask": "a", "say": "b"}\n', "holds 1 pairs"),
        ('{"ask": "a", "say": "b"}\n{"ask": "a", "say": "c"}', "all pairs have the same prompt"),
        ('{"ask": "a", "say": "b"}\n{"ask": "a"}', r"line 2 has no field 'say'; its fields are 'ask'"),
        ('{"ask": "a", "say": "b"}\n\n{"ask": "a"', r"line 3 is not JSON"),
        ('["a", "b"]', r"line 1 is not a JSON object"),
        ('{"ask": "a", "say": " "}', r"line 1: field 'say' is ' ', but must be a text"),
        ('{"ask": 1, "say": "b"}', r"line 1: field 'ask' is 1, but must be a text"),
    ],
)
def test_bad_pairs(rows, tmp_path, text, words):
    """What is wrong is said of the line that has it, in one line, and nothing is written."""
    rows.write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        prepare_pairs(rows, f"--out_dir={tmp_path / 'new'}")
    assert "\n" not in str(error.value) and not (tmp_path / "new").exists()


def test_bad_options_of_pairs(rows, tmp_path):
    """No source, no such file, an impossible fraction."""
    for argv, words in (
        ([], "say what to read"),
        (["--source=nowhere.jsonl"], "nowhere.jsonl is not a file"),
    ):
        with pytest.raises(ValueError, match=words):
            pairs.main(argv)
    with pytest.raises(ValueError, match=r"val_fraction=1\.0"):
        prepare_pairs(rows, "--val_fraction=1")


def test_gsm8k_downloads(tmp_path, monkeypatch):
    """Without a source, both official files are fetched; offline, the error says what to do instead."""
    asked = []

    def fake(url, sha256, path):
        asked.append((url, sha256))
        path = tmp_path / path.name
        path.write_text(
            "".join(json.dumps({"question": f"Q{i}?", "answer": f"#### {i}"}) + "\n" for i in range(9))
        )
        return path

    monkeypatch.setattr(gsm8k, "download", fake)
    gsm8k.main([f"--out_dir={tmp_path / 'new'}", "--tokenizer=bpe", "--vocab_size=280"])
    assert [url.rsplit("/")[-1] for url, _ in asked] == ["train.jsonl", "test.jsonl"]
    assert len((tmp_path / "new" / "test.jsonl").read_text().splitlines()) == 9
    monkeypatch.undo()
    monkeypatch.setattr(data.source.urllib.request, "urlopen", offline)
    with pytest.raises(ValueError, match=r"could not download https://.*/train.jsonl .*--source=PATH"):
        gsm8k.main([f"--out_dir={tmp_path / 'new'}", "--tokenizer=bpe"])


def offline(*args, **kwargs):
    raise OSError("no route to host")


def test_the_checksum_of_gsm8k():
    """A copy of the official training file has the checksum that a download is held to."""
    if not (SHARED / "gsm8k_train.jsonl").is_file():
        pytest.skip("no copy of GSM8K")
    assert data.source.file_sha256(SHARED / "gsm8k_train.jsonl") == gsm8k.SHA256["train.jsonl"]
