"""sample.py: what it prints is what the model generated, however it is asked, and bad input is one line."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from runs import SMALLEST, byte_level, error_line, lively

import sample
from config import printable
from data import train_bpe
from model import MoEGPT, load_checkpoint, save_checkpoint

ANSI = re.compile(r"\x1b\[[0-9;]*m")
PROMPT = "def f(x):\n    return x"
HOSTILE = "</script><b>&\n\t\"'é🙂\\"


def write_run(folder, *names, tokenizer, **changes):
    folder.mkdir(exist_ok=True)
    for name in names:
        model = lively(block_size=32, vocab_size=tokenizer.vocab_size, **changes)
        save_checkpoint(folder / name, model, tokenizer=tokenizer.meta, step=7)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([PROMPT * 3, "for i in range(9):\n    print(i)\n" * 3], 280, "tiny")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    return write_run(tmp_path_factory.mktemp("run"), "best.pt", "last.pt", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def ab_run(tmp_path_factory):
    """A run that knows the letters a and b only."""
    few = train_bpe(["ab" * 9], 258, "few", only_seen_bytes=True)
    return write_run(tmp_path_factory.mktemp("ab"), "best.pt", tokenizer=few)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The folder of a tiny OLMoE in bfloat16 with random weights, and its tokenizer."""
    pytest.importorskip("safetensors")
    tokenizer = byte_level([PROMPT] * 3, 270, "<end>")
    folder = tmp_path_factory.mktemp("pretrained") / "hf"
    meta = {"kind": "hf", "name": "tiny", "json": tokenizer.to_str(), "eot": 0}
    model = lively(block_size=32, vocab_size=280, router="topk", qk_norm="full")
    model.cast(torch.bfloat16).save_pretrained(folder, meta)
    return folder


@pytest.fixture
def say(capfd, run):
    """Run sample.py with these arguments; returns what it printed."""

    def say(*argv, out_dir=run):
        capfd.readouterr()
        sample.main([f"--out_dir={out_dir}", "--max_new_tokens=12", "--device=cpu", *argv])
        return capfd.readouterr().out

    return say


@pytest.fixture
def fails(capfd, run):
    """Run sample.py with these arguments; returns its one line of error."""

    def fails(*argv, out_dir=run):
        argv = f"--out_dir={out_dir}", "--prompt=def", "--max_new_tokens=2", *argv
        return error_line(capfd, sample.main, *argv)

    return fails


@pytest.fixture
def stdin():
    """Make the text of a file the standard input of this process."""
    saved = os.dup(0)

    def feed(path):
        file = os.open(path, os.O_RDONLY)
        os.dup2(file, 0)
        os.close(file)

    yield feed
    os.dup2(saved, 0)
    os.close(saved)


def body(out):
    """The text of a single sample: between the blank line after the header and the one before the summary."""
    return out.split("\n\n", 1)[1].rsplit("\n\n", 1)[0]


def samples(out, n):
    """The texts of n samples."""
    return re.split(rf"\n--- sample \d of {n}\n", out.rsplit("\n\n", 1)[0] + "\n")[1:]


def n_new(out):
    return int(re.search(r"(\d+) new tokens", out)[1])


def test_prints_what_the_model_generated(say, run, tokenizer):
    """The text is the prompt and the tokens of MoEGPT.generate, control characters made harmless."""
    out = say(f"--prompt={PROMPT}", "--temperature=0.9", "--top_k=50", "--top_p=0.9", "--seed=3")
    model = MoEGPT.from_checkpoint(load_checkpoint(run / "best.pt"))
    generator = torch.Generator().manual_seed(3)
    idx = torch.tensor([tokenizer.encode(PROMPT)])
    chunks = list(model.generate(idx, 12, None, 0.9, 50, 0.9, stop=tokenizer.eot, generator=generator))
    text = tokenizer.decode(torch.cat([chunk.tokens for chunk in chunks], 1)[0])
    assert body(out) == printable(text)
    experts = torch.cat([chunk.n_taken for chunk in chunks], 1).float().mean()
    assert f"{len(chunks) - 1} new tokens, " in out and f", {experts:.2f} experts per token" in out


def test_ends_with_a_summary(say, run, tokenizer):
    """The last line has speed, experts per token and the sizes of both caches, which have room for a text
    of at most block_size; the first line names the run. bfloat16 halves the KV cache."""
    lines = say(f"--prompt={PROMPT}", "--max_new_tokens=31").splitlines()
    assert str(run / "best.pt") in lines[0]
    assert "router online_seqtopk (trained with seqtopk), float32 on cpu" in lines[0]
    numbers = r"31 new tokens, [\d.]+ tokens/s on 1 thread, [12]\.\d\d experts per token; "
    sizes = r"KV cache 8 KiB, Expert Cache [\d.]+ (KiB|B) \(room for 32 tokens\)"
    assert re.fullmatch(numbers + sizes, lines[-1])
    assert f"(room for {len(tokenizer.encode('def f')) + 12} tokens)" in say("--prompt=def f")
    out = say("--prompt=def", "--dtype=bfloat16", "--max_new_tokens=31")
    assert "bfloat16 on cpu" in out and "KV cache 4 KiB" in out


def test_every_way_to_give_a_prompt(say, stdin, tmp_path):
    """The same text as an argument, FILE: or -, with its newlines, leads to the same sample, also where a
    file has a byte order mark and other line ends, as training text may. Without a prompt the text begins
    after end-of-text, which is not printed."""
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xef\xbb\xbf" + (PROMPT + "\n").replace("\n", "\r\n").encode())
    expected = body(say(f"--prompt={PROMPT}\n"))
    assert expected.startswith(PROMPT + "\n")
    assert body(say(f"--prompt=FILE:{path}")) == expected
    stdin(path)
    assert body(say("--prompt=-")) == expected
    assert "12 new tokens" in (out := say()) and "endoftext" not in out


def test_a_seed_is_a_text(say):
    """Same seed, same samples; another seed, others, except at temperature 0. The samples of one run differ,
    and the first does not depend on how many follow."""
    two = "--prompt=def", "--num_samples=2"
    once, again, other = (samples(say(*two, f"--seed={seed}"), 2) for seed in (1, 1, 2))
    assert once == again != other
    assert len(once) == 2 and once[0].rstrip() != once[1].rstrip()
    assert body(say("--prompt=def", "--seed=1")) == once[0][:-1]
    likeliest = (body(say("--prompt=def", "--temperature=0", f"--seed={seed}")) for seed in range(3))
    assert len(set(likeliest)) == 1


def test_show_experts_colours_the_same_text(say):
    """Without its colours the output of --show_experts is the plain text, under a legend of all colours.
    Under TopK all tokens get k experts: one colour, the middle one."""
    plain, coloured = say(f"--prompt={PROMPT}"), say(f"--prompt={PROMPT}", "--show_experts")
    assert body(ANSI.sub("", coloured)) == body(plain)
    legend = next(line for line in coloured.splitlines() if line.startswith("experts per token: "))
    assert " <1.3 " in legend and " 1.9-2.1 " in legend and " >2.7 " in legend
    assert len(set(ANSI.findall(legend)) - {"\x1b[0m"}) == len(sample.COLOURS)
    used = set(ANSI.findall(body(coloured))) - {"\x1b[0m"}
    assert len(used) > 1 and used <= set(ANSI.findall(legend))
    assert not re.search(r"\x1b\[48[^\x1b]*\n", coloured)  # no background runs over a line break
    out = say(f"--prompt={PROMPT}", "--router=topk", "--show_experts")
    assert set(ANSI.findall(body(out))) == {"\x1b[48;5;252;38;5;16m", "\x1b[0m"}
    assert ", 2.00 experts per token" in out and "Expert Cache 0 B" in out


def test_show_experts_gives_each_token_its_colour(capfd, tokenizer):
    """A token's text has the colour of its mean over layers; the middle of the colours is k."""
    ids = tokenizer.encode("def f")
    experts = torch.tensor([[[1, 1], [4, 4], [1, 3], [2, 3]]])
    chunk = SimpleNamespace(tokens=torch.tensor([ids[:1] * 4]), n_taken=experts)
    sample.write([chunk], tokenizer, SMALLEST["k"], sample.Sample())
    text = tokenizer.decode(ids[:1])
    expected = [sample.paint(text, sample.COLOURS[i]) for i in (0, 6, 3, 5)]
    assert capfd.readouterr().out == "".join(expected) + "\n"


def test_characters_of_several_tokens_come_out_whole(capfd, tokenizer):
    """Tokens that are bytes of a character print it once it is complete, and broken bytes as U+FFFD."""
    ids = [*tokenizer.encode("é中🙂\n"), *tokenizer.encode("éx")[::2], *tokenizer.encode("中")[:2]]
    assert len(ids) > 10
    chunks = [SimpleNamespace(tokens=torch.tensor([[i]]), n_taken=torch.ones(1, 1, 2)) for i in ids]
    sample.write(chunks, tokenizer, None, sample.Sample())
    assert tokenizer.decode(ids) == "é中🙂\n\ufffdx\ufffd"
    assert capfd.readouterr().out == tokenizer.decode(ids) + "\n"


@pytest.mark.parametrize("prompt", ["def", "def f(x): return x\n" * 20])
def test_text_past_block_size(say, prompt):
    """A text or a prompt longer than block_size goes on, and the rule for it is told once."""
    out = say(f"--prompt={prompt}", "--max_new_tokens=80", "--num_samples=2")
    assert out.count("note: past block_size = 32 tokens, the newest 16 are fed again") == 1
    assert "160 new tokens" in out
    assert "note:" not in say("--prompt=def")


def test_stops_at_end_of_text(say, ab_run, pretrained):
    """An end-of-text token, which is that of the model's tokenizer, ends the sample and is not printed."""
    out = say("--prompt=ab", "--max_new_tokens=500", "--temperature=10", out_dir=ab_run)
    assert n_new(out) < 500 and set(body(out)) == {"a", "b"}
    out = say(f"--init_from={pretrained}", "--max_new_tokens=5000", "--temperature=30", "--top_p=1")
    assert n_new(out) < 5000 and "<end>" not in out


def test_without_a_best_checkpoint_the_last_is_used(say, tmp_path, tokenizer):
    """A run that was never evaluated has no best.pt: last.pt is used, and that is said."""
    folder = write_run(tmp_path / "run", "last.pt", tokenizer=tokenizer)
    out = say("--prompt=def", out_dir=folder)
    assert out.startswith("note: ") and "last.pt is used" in out
    assert "note:" not in say("--prompt=def", "--checkpoint=last", out_dir=folder)


def test_a_dense_run(say, fails, tmp_path, tokenizer):
    """A dense model writes too; it has no experts to report or to show."""
    folder = write_run(tmp_path / "run", "best.pt", tokenizer=tokenizer, n_expert=1, k=1, router="topk")
    out = say("--prompt=def", out_dir=folder)
    assert "12 new tokens" in out and "experts per token" not in out
    for shown in ("--show_experts", f"--html={tmp_path / 'a'}", f"--svg={tmp_path / 'a'}"):
        assert "dense" in fails(shown, out_dir=folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_pretrained_model_writes(say, pretrained):
    """With init_from a Hugging Face folder writes under any causal router, in its own dtype and tokenizer."""
    out = say(f"--init_from={pretrained}", f"--prompt={PROMPT}", "--router=online_seqtopk")
    assert out.startswith(f"{pretrained}: ") and body(out).startswith(PROMPT)
    assert "router online_seqtopk (trained with topk), bfloat16 on cpu" in out
    assert re.search(r"12 new tokens, .* (1\.[5-9]|2\.0)\d experts per token", out)
    assert "float32 on cpu" in say(f"--init_from={pretrained}", "--dtype=float32")
    assert ", 2.00 experts per token" in say(f"--init_from={pretrained}", f"--prompt={PROMPT}")


def interrupt(monkeypatch, after, error=KeyboardInterrupt):
    """Let the error come up when `after` chunks have been generated."""
    generate = MoEGPT.generate

    def interrupted(*args, **kwargs):
        for n, chunk in enumerate(generate(*args, **kwargs)):
            if n == after:
                raise error
            yield chunk

    monkeypatch.setattr(MoEGPT, "generate", interrupted)


@pytest.mark.parametrize("after", [0, 4])
def test_ctrl_c_stops_and_sums_up(say, monkeypatch, tmp_path, after):
    """Ctrl-C ends the writing; what was printed until then is counted, on the page and in the picture."""
    interrupt(monkeypatch, after)
    path, drawing = tmp_path / "a.html", tmp_path / "a.svg"
    out = say("--prompt=def", "--num_samples=3", f"--html={path}", f"--svg={drawing}")
    assert n_new(out) == max(0, after - 1) and "sample 2" not in out
    rows = [row for rows in read_page(path)["samples"] for row in rows]
    assert [row["prompt"] for row in rows].count(False) == n_new(out)
    text = "".join(row["text"] for row in rows)
    assert text.rstrip("\ufffd") in out
    drawn = "".join(cell[0] for cell in read_picture(drawing.read_text(encoding="utf-8")))
    assert drawn.split("\n\n", 1)[1] == text.replace("\t", "    ")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--prompt=", "prompt is empty"),
        ("--prompt=FILE:nowhere.txt", "nowhere.txt cannot be read (No such file"),
        ("--prompt=FILE:.", "cannot be read"),
        ("--prompt=a\udcff", "surrogate"),
        ("--temperature=-0.1", "temperature is -0.1"),
        ("--temperature=hot", "--temperature=hot"),
        ("--num_samples=0", "num_samples is 0"),
        ("--max_new_tokens=0", "max_new_tokens is 0"),
        ("--seed=-1", "seed is -1"),
        ("--checkpoint=middle", "checkpoint is middle, but must be best or last"),
        ("--router=seqtopk", "router is seqtopk, but must be causal to decode: topk, online_seqtopk"),
        ("--router=nonsense", "online_seqtopk"),
        ("--device=tpu", "device is tpu, but this machine has cpu"),
        ("--dtype=int8", "dtype is int8, but must be auto, float32"),
        ("--temprature=1", "did you mean temperature?"),
        ("--out_dir=nowhere", "no run at nowhere"),
        ("--html=a --svg=a", "svg is a, but must be another file than html"),
    ],
)
def test_bad_input(fails, argv, words):
    """Each is one line that names the value and what is allowed, and exit code 2."""
    assert words in fails(*argv.split())


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "prompt is empty"), (b"\xff\xfea", "not UTF-8"), (b"a\0", "zero byte")]
)
def test_bad_prompt_file(fails, stdin, tmp_path, content, words):
    """An empty prompt, or one that is not text, is refused wherever it comes from."""
    path = tmp_path / "prompt"
    path.write_bytes(content)
    assert words in fails(f"--prompt=FILE:{path}")
    stdin(path)
    assert words in fails("--prompt=-")


def test_characters_that_the_tokenizer_lacks(fails, ab_run):
    """A prompt with characters that the vocabulary cannot spell is refused with the characters."""
    assert "'é'" in fails("--prompt=abé", out_dir=ab_run)


@pytest.mark.parametrize(
    ("damage", "words"), [("missing", "no checkpoint at"), ("no tokenizer", "tokenizer is None")]
)
def test_bad_checkpoint(fails, tmp_path, tokenizer, damage, words):
    """A checkpoint that is missing, or knows no tokenizer, is refused."""
    path = write_run(tmp_path / "run", "best.pt", tokenizer=tokenizer) / "best.pt"
    if damage == "missing":
        path.unlink()
    else:
        save_checkpoint(path, lively(vocab_size=280))
    assert words in fails(out_dir=path.parent)


def test_a_run_is_no_hugging_face_model(fails, tmp_path, tokenizer):
    """The message says which setting takes it."""
    run = write_run(tmp_path / "run", "last.pt", tokenizer=tokenizer)
    for name in (run, run / "last.pt"):
        assert "give the run's folder as --out_dir" in fails(f"--init_from={name}")


@pytest.mark.parametrize(("removed", "words"), [("tokenizer.json", "tokenizer"), ("config.json", "config")])
def test_bad_pretrained_folder(fails, pretrained, tmp_path, removed, words):
    """A Hugging Face folder that lacks a file is refused by name."""
    folder = shutil.copytree(pretrained, tmp_path / "hf")
    (folder / removed).unlink()
    assert words in fails(f"--init_from={folder}")


@pytest.mark.parametrize("kind", ["html", "svg"])
@pytest.mark.parametrize("name", ["", ".", "nowhere/a", "folder", "file/a", "/dev/null"])
def test_a_file_that_cannot_be_written(fails, tmp_path, monkeypatch, kind, name):
    """It is refused before anything is generated, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MoEGPT, "generate", None)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    assert f"{kind} is " in fails(f"--{kind}={name}")
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}


@pytest.mark.parametrize("kind", ["html", "svg"])
def test_a_failure_leaves_the_old_file(say, monkeypatch, tmp_path, kind):
    """What breaks off with an error neither replaces an older file nor leaves half of a new one."""
    path = tmp_path / "a"
    path.write_text("old")
    interrupt(monkeypatch, after=4, error=RuntimeError)
    with pytest.raises(RuntimeError):
        say("--prompt=def", f"--{kind}={path}")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def read_page(path):
    """The data of a page, after a look at what is around it: two scripts, as a browser separates them."""
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"src=|href=|url\(|@import|https?:|fetch\(", page)  # nothing from elsewhere
    data, code = re.findall(r"<script[^>]*>(.*?)</script", page, re.S | re.I)
    assert code.strip().endswith("}") and not path.with_name(path.name + ".tmp").exists()
    return json.loads(data)


@torch.no_grad()
def by_hand(model, ids, window):
    """Of each token entropy, probability and experts, by an uncached forward on all that its window held."""
    begin, ahead, rows = 0, None, []
    for position, token in enumerate(ids):
        if position - begin == window:
            begin = position - window // 2
        numbers = (None, None)
        if ahead is not None:
            numbers = (-(ahead * ahead.log()).sum().item(), ahead[token].item())
        logits, _, stats = model(torch.tensor([ids[begin : position + 1]]), router="online_seqtopk")
        ahead = logits[0, -1].double().softmax(-1)
        experts = [layer.mask[0, -1].nonzero().flatten().tolist() for layer in stats.routing]
        rows.append((*numbers, experts))
    return rows


@pytest.mark.parametrize("new_tokens", [7, 90], ids=["within block_size", "beyond it"])
def test_the_page_says_what_the_model_did(say, run, tokenizer, tmp_path, new_tokens):
    """Its tokens are the printed text, each with the experts, the entropy and the probability that whole
    forwards give, whatever the sampling options."""
    path = tmp_path / "a.html"
    out = say(f"--prompt={HOSTILE}", f"--max_new_tokens={new_tokens}", "--top_k=50", f"--html={path}")
    data = read_page(path)
    (rows,) = data["samples"]
    assert "".join(row["text"] for row in rows) == body(out) and body(out).startswith(HOSTILE)
    ids, prompt = [row["id"] for row in rows], tokenizer.encode(HOSTILE)
    assert [row["id"] for row in rows if row["prompt"]] == prompt == ids[: len(prompt)]
    assert f"{len(ids) - len(prompt)} new tokens" in out and (data["k"], data["layers"]) == (2, [0, 1])
    model = MoEGPT.from_checkpoint(load_checkpoint(run / "best.pt"))
    assert (rows[0]["entropy"], rows[0]["probability"]) == (None, None)
    for row, (*numbers, experts) in zip(rows, by_hand(model, ids, window=32), strict=True):
        assert row["experts"] == experts
        if row is not rows[0]:
            assert [row["entropy"], row["probability"]] == pytest.approx(numbers, rel=1e-3, abs=1e-5)
    assert out.startswith(data["about"][0] + "\n") and ("note:" in data["about"][1]) == (new_tokens == 90)
    assert data["about"][-1].startswith("K = 2 of 8 experts") and "top_k 50" in data["about"][-1]


def test_the_page_has_every_sample_and_changes_none(say, tmp_path):
    """Samples are the same with and without --html, and all on one page, after the token that begins them."""
    plain, out = say("--num_samples=3"), say("--num_samples=3", f"--html={tmp_path / 'a.html'}")
    assert out.endswith(f"\npage: {tmp_path / 'a.html'}\n")
    pages = read_page(tmp_path / "a.html")["samples"]
    assert ["".join(row["text"] for row in rows) + "\n" for rows in pages] == samples(plain, 3)
    assert samples(plain, 3) == samples(out, 3)
    assert all(rows[0]["text"] == "" and "endoftext" in rows[0]["name"] for rows in pages)


def test_no_text_ends_the_script_of_the_page(say, run, tmp_path):
    """What would end the script, or begin a comment in it, is data like any other."""
    folder = shutil.copytree(run, tmp_path / "<!--<script><" / "script><b>&")
    say(f"--prompt={HOSTILE}", f"--html={tmp_path / 'a.html'}", out_dir=folder)
    about = read_page(tmp_path / "a.html")["about"]
    assert about[0].startswith(f"{folder}/best.pt: ") and "</script><b>&" in about[0]


def test_tokens_of_the_page_have_printable_names(tokenizer):
    """Parts of characters are named by their bytes; a backslash and a control character are escaped."""
    names = [sample.token_name(token, tokenizer) for token in tokenizer.encode("é\\\x1b\t a"[:4])]
    assert names == ["\\xc3", "\\xa9", "\\\\", "\\x1b", "\\t"]


def test_dense_layers_are_not_on_the_page(say, tmp_path, tokenizer):
    """A page of a model whose first layer is dense has the experts of the other, under its own number."""
    folder = write_run(tmp_path / "run", "best.pt", tokenizer=tokenizer, n_dense_layer=1)
    say("--prompt=def", f"--html={tmp_path / 'a.html'}", out_dir=folder)
    data = read_page(tmp_path / "a.html")
    assert data["layers"] == [1] and {len(row["experts"]) for row in data["samples"][0]} == {1}


SVG = "{http://www.w3.org/2000/svg}"


def read_picture(svg):
    """The cells of a picture: text, background, colour. Each begins where the last one ends, or on a new line
    after a line break or where it does not fit into the rest of 100 columns; and none is cut off."""
    root = ElementTree.fromstring(svg)
    page, *rects = root.iter(f"{SVG}rect")
    assert root.tag == f"{SVG}svg" and page.get("fill") == "white"
    assert root.get("{http://www.w3.org/XML/1998/namespace}space") == "preserve"
    cells, x, y = [], 8, 8
    for rect, text in zip(rects, root.iter(f"{SVG}text"), strict=True):
        width = 8 * len(text.text)
        if x + width > 808 and text.text != "\n":
            x, y = 8, y + 18
        for element, size in ((rect, "width"), (text, "textLength")):
            assert [element.get(key) for key in ("x", "y", size)] == [str(x), str(y), str(width)]
        assert x + width <= int(root.get("width")) - 8 and y + 18 <= int(root.get("height")) - 8
        cells.append((text.text, rect.get("fill"), text.get("fill")))
        x, y = (8, y + 18) if text.text == "\n" else (x + width, y)
    return cells


def test_the_picture_is_the_last_text_on_its_colours(say, tmp_path):
    """Every character of the last sample is there, on the legend's colour for the experts of its token."""
    names = f"--html={tmp_path / 'a.html'}", f"--svg={tmp_path / 'a.svg'}"
    out = say("--prompt=\ufffe\x1b</text>&\n\t'é🙂", "--num_samples=2", "--max_new_tokens=8", *names)
    assert out.endswith(f"\npicture: {tmp_path / 'a.svg'}\n")
    cells = read_picture((tmp_path / "a.svg").read_text(encoding="utf-8"))
    title, swatches, line_break, cells = cells[0], cells[1:8], cells[8:10], cells[10:]
    assert title[0] == "experts per token: " and [text for text, *_ in line_break] == ["\n", "\n"]
    assert [text for text, *_ in swatches[::3]] == [" <1.3 ", " 1.9-2.1 ", " >2.7 "]
    assert len({swatch[1:] for swatch in swatches}) == 7
    expected = []
    for row in read_page(tmp_path / "a.html")["samples"][1]:
        mean = sum(map(len, row["experts"])) / 2
        index = sum(mean >= 1 + 2 * i / 7 for i in range(1, 7))
        expected += [(character, *swatches[index][1:]) for character in row["text"].replace("\t", "    ")]
    assert [(character, *colours) for text, *colours in cells for character in text] == expected


def test_the_picture_has_lines_of_100_columns():
    """A token that is too long for the rest of a line goes to the next one, and on from there if need be."""
    rows = [{"text": text, "experts": [[0]]} for text in ("a" * 60, "b" * 40, "\n", "c" * 60, "d" * 250, "")]
    cells = read_picture(sample.picture(rows, 2))[10:]
    assert [len(text) for text, *_ in cells] == [60, 40, 1, 60, 100, 100, 50]


def test_colours_are_one_in_the_terminal_and_in_svg():
    """A terminal's colours from 16 on are a cube of six steps, and from 232 on greys."""
    steps = (0, 95, 135, 175, 215, 255)
    for back, front, *named in sample.COLOURS:
        cube = [steps[(back - 16) // base % 6] for base in (36, 6, 1)]
        assert named[0] == "#" + bytes(cube if back < 232 else [10 * back - 2312] * 3).hex()
        assert named[1] == {231: "white", 16: "black"}[front]


# Points at the middle of each token, and notes what is there, what the panel then says, and the shades.
PROBE = """<script>
const seen = spans.map((span) => {
  span.scrollIntoView({ block: "center" })
  const box = span.getClientRects()[0]
  const target = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2)
  target.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }))
  const facts = [...find("facts").rows].map((row) => [...row.cells].map((cell) => cell.textContent))
  return { text: span.textContent, name: find("name").textContent, width: box.width, facts, shades: [],
    here: [...document.querySelectorAll(".here")].indexOf(span) }
})
for (const option of find("layer").options) {
  find("layer").value = option.value
  find("layer").onchange()
  spans.forEach((span, i) => seen[i].shades.push(getComputedStyle(span).backgroundColor))
}
const page = () => getComputedStyle(document.body).backgroundColor
const pages = [page(), find("theme").click() ?? page(), find("theme").click() ?? page()]
spans[0].focus()
spans[0].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }))
const found = { seen, pages, focus: spans.indexOf(document.activeElement), about: find("about").innerText,
  fits: document.documentElement.scrollWidth <= innerWidth }
document.body.replaceChildren()
add(document.body, "pre", JSON.stringify(found))
</script>"""


def look(path, profile, window):
    """What PROBE finds in a real browser with a window of that size."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("needs chromium or Chrome")
    probed = path.with_name("probed.html")
    probed.write_text(path.read_text(encoding="utf-8") + PROBE, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command = [browser, *flags, f"--window-size={window}", "--dump-dom", probed.as_uri()]
    dump = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120).stdout
    return json.loads(html.unescape(re.search(r"<pre>(.*)</pre>", dump, re.S)[1]))


@pytest.mark.parametrize("window", ["1200,800", "500,800"], ids=["wide", "phone"])
def test_a_browser_shows_every_token_and_its_numbers(say, tmp_path, window):
    """All tokens are visible; the pointer on one brings up its numbers; in each layer every number of experts
    has its shade; the arrow keys and the theme's button work; no line is wider than the window."""
    path = tmp_path / "a.html"
    out = say(f"--prompt={HOSTILE}", "--max_new_tokens=60", "--num_samples=2", f"--html={path}")
    rows = [row for rows in read_page(path)["samples"] for row in rows]
    found = look(path, tmp_path / "profile", window)
    light, dark, again = found["pages"]
    assert found["fits"] and found["focus"] == 1 and light == again != dark
    assert found["about"].startswith(out.splitlines()[0])
    for row, seen in zip(rows, found["seen"], strict=True):
        assert (seen["text"], seen["name"]) == (row["text"], row["name"])
        assert seen["width"] > 0 and seen["here"] == 0
        facts = dict(seen["facts"])
        assert int(facts["token id"]) == row["id"]
        for name, key in (("entropy, nats", "entropy"), ("probability", "probability")):
            assert facts[name] == "\u2013" if row[key] is None else float(facts[name]) == row[key]
        counts = [len(experts) for experts in row["experts"]]
        assert float(facts["experts, mean"]) == sum(counts) / 2
        for layer, experts in enumerate(row["experts"]):
            assert facts[f"layer {layer}"] == f"{len(experts)}: {' '.join(map(str, experts))}"
        seen["counts"] = [sum(counts) / 2, *counts]
    for column in range(3):
        pairs = {(seen["counts"][column], seen["shades"][column]) for seen in found["seen"]}
        assert len({count for count, _ in pairs}) == len({shade for _, shade in pairs}) == len(pairs) > 1


def test_from_a_shell(run):
    """The script itself: a piped prompt, a sample and exit code 0; a typo, one line and exit code 2."""
    command = [sys.executable, sample.__file__, f"--out_dir={run}", "--max_new_tokens=5", "--show_experts"]
    command += ["--prompt=-"]
    good = subprocess.run(command, input="def f", capture_output=True, text=True)
    assert (good.returncode, good.stderr) == (0, "")
    assert "\ndef f" in ANSI.sub("", good.stdout) and "5 new tokens" in good.stdout
    bad = subprocess.run([*command, "--prompt=def", "--top-p=1"], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stdout == "" and bad.stderr.count("\n") == 1
