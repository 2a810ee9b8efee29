"""Write text with a trained run or a pretrained model, token by token, from its KV cache and Expert Cache.

    python sample.py --out_dir=out/tiny_seqtopk --prompt="def main(" --show_experts
    python sample.py --out_dir=out/tiny_seqtopk --prompt="def main(" --num_samples=3 --html=experts.html
    python sample.py --init_from=allenai/OLMoE-1B-7B-0924 --router=online_seqtopk --prompt="Bitcoin is"

Text may grow past the run's block_size: whenever the caches are full they are emptied, the newest half of
block_size is fed again, its experts chosen anew, and writing goes on. A longer prompt is cut to that half.
"""

import codecs
import contextlib
import json
import os
import re
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from config import bad_input_exits, parse, require
from config.device import pick_device, pick_dtype
from data import AnyTokenizer, hf_tokenizer, make_tokenizer
from model import TEMPERATURE, TOP_P, Cache, Chunk, MoEConfig, MoEGPT, load_checkpoint, sample_token

# Background and text colours (of a terminal's 256) of tokens with fewer experts than k, about k, and more.
COLOURS = [(25, 231), (68, 16), (110, 16), (252, 16), (216, 16), (203, 16), (160, 231)]

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # generated ones must not reach the terminal


@dataclass(frozen=True)
class SampleConfig:
    """What to write, and which run writes it."""

    out_dir: str = "out/tiny_seqtopk"  # folder of the run
    init_from: str | None = None  # instead of a run, a Hugging Face model: its folder, or its name on the Hub
    checkpoint: str = "best"  # best (lowest causal validation loss) or last
    prompt: str | None = None  # text, FILE:path or - (standard input); not given: a new document
    router: str | None = None  # any causal one; none: the one that stands in for the run's own in decoding
    num_samples: int = 1  # texts, one after the other
    max_new_tokens: int = 200  # an end-of-text token ends a text sooner
    temperature: float = TEMPERATURE  # 0: always the likeliest token
    top_k: int | None = None  # draw from so many likeliest tokens only
    top_p: float | None = TOP_P  # draw from the likeliest tokens that hold this much probability
    seed: int = 1337  # same seed, same text
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    dtype: str = "auto"  # auto (a Hugging Face model's own), float32, bfloat16 or float16
    show_experts: bool = False  # colour each token by its experts, as the mean over layers
    html: str | None = None  # also write a page to this file, with the experts of each token in each layer

    def __post_init__(self) -> None:
        sample_token(torch.zeros(1, 1), self.temperature, self.top_k, self.top_p)  # which checks these
        require(self.checkpoint in ("best", "last"), "checkpoint", self.checkpoint, "best or last")
        require(self.num_samples >= 1, "num_samples", self.num_samples, "at least 1")
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        require(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2**63 - 1")


@dataclass
class Tally:
    """Sums over all samples, kept after every chunk, so that an interrupted run is summed up too."""

    fed: int = 0  # tokens, those of prompts included
    experts: float = 0.0  # of those tokens, as the mean over layers (nan in a dense model)
    written: int = 0  # new tokens
    seconds: float = 0.0  # spent on new tokens


def main(argv: list[str]) -> None:
    """Load a model, write samples to stdout, sum up. Raises ValueError or OSError for bad input."""
    config = SampleConfig(**parse(argv, SampleConfig)[0])
    with contextlib.nullcontext() if config.html is None else new_file(config.html) as html:
        sample(config, html)
    if html:
        print(f"page: {config.html}")


def sample(config: SampleConfig, html: TextIO | None) -> None:
    """Write samples to stdout and, if there is such a file, a page of them to html."""
    device, _ = pick_device(config.device)
    checkpoint, source = (None, config.init_from) if config.init_from else load_run(config)
    tokenizer = make_tokenizer(checkpoint.get("tokenizer")) if checkpoint else hf_tokenizer(source)
    prompt = encode_prompt(config.prompt, tokenizer)
    model = open_model(checkpoint, config, device)
    needed = len(prompt) + config.max_new_tokens
    cache = model.new_cache(1, min(needed, model.config.block_size), config.router)
    if config.show_experts or html:
        require_experts(model.config)
    show = painter(model.config.k) if config.show_experts else lambda text, experts: text
    about = [f"{source}: {describe(model, cache.router)}"]
    if needed > cache.max_tokens:
        about.append(window_note(cache.max_tokens))
    print(*about, sep="\n")
    if config.show_experts:
        print(legend(model.config.k))
    tally, samples = Tally(), []
    with contextlib.suppress(KeyboardInterrupt):
        for number, chunks in enumerate(streams(model, cache, prompt, tokenizer.eot, config), start=1):
            print(f"\n--- sample {number} of {config.num_samples}" if config.num_samples > 1 else "")
            samples.append([])
            write(kept(chunks, samples[-1]) if html else chunks, tokenizer, show, tally)
    if html:
        budget = f"K = {model.config.k} of {model.config.n_expert} experts per token on average"
        html.write(page(samples, model, tokenizer, [*about, f"{budget}; {drawn_by(config)}"]))
    print("\n" + summary(tally, cache))


def load_run(config: SampleConfig) -> tuple[dict, Path]:
    """The best or last checkpoint of a run, and its path; the last, with a note, where there is no best."""
    out_dir, which = Path(config.out_dir), config.checkpoint
    if not out_dir.is_dir():
        raise ValueError(f"no run at {out_dir}: give the out_dir that train.py wrote to as --out_dir")
    path = out_dir / f"{which}.pt"
    if which == "best" and not path.exists() and (out_dir / "last.pt").exists():
        path = out_dir / "last.pt"
        print(f"note: {out_dir} has no best.pt yet; {path} is used")
    return load_checkpoint(path), path


def open_model(checkpoint: dict | None, config: SampleConfig, device: torch.device) -> MoEGPT:
    """The model of a run's checkpoint, or else of init_from, in the dtype that was asked for."""
    dtype, _ = pick_dtype(config.dtype, device)
    if checkpoint is not None:
        return MoEGPT.from_checkpoint(checkpoint).to(device).cast(dtype)
    model = MoEGPT.from_pretrained(config.init_from, device)
    return model if config.dtype == "auto" else model.cast(dtype)


def encode_prompt(prompt: str | None, tokenizer: AnyTokenizer) -> list[int]:
    """Token ids of the prompt; without one, what a document begins after: the tokenizer's start, or eot.

    Raises ValueError for a prompt that is empty, cannot be read, or has characters that the tokenizer lacks.
    """
    if prompt is None:
        return [*tokenizer.start] or [tokenizer.eot]
    text = read_prompt(prompt)
    if not text:
        raise ValueError("the prompt is empty: give --prompt=TEXT, --prompt=FILE:path, or standard input")
    return tokenizer.encode(text)


def read_prompt(prompt: str) -> str:
    """The text that --prompt stands for, to the last newline. Raises ValueError if it cannot be read."""
    if prompt != "-" and not prompt.startswith("FILE:"):
        return prompt
    path = 0 if prompt == "-" else prompt.removeprefix("FILE:")
    name = "standard input" if path == 0 else path
    try:
        with open(path, "rb", closefd=path != 0) as file:
            return file.read().decode()
    except UnicodeDecodeError:
        raise ValueError(f"the prompt in {name} is not UTF-8 text") from None
    except OSError as err:
        raise ValueError(f"the prompt in {name} cannot be read: {err.strerror}") from None


def streams(
    model: MoEGPT, cache: Cache, prompt: list[int], stop: int, config: SampleConfig
) -> Iterator[Iterator[Chunk]]:
    """A stream of chunks per sample, to be used up in turn: they share the cache and the random numbers."""
    device = model.head.weight.device
    generator = torch.Generator(device).manual_seed(config.seed)
    options = {key: getattr(config, key) for key in ("max_new_tokens", "temperature", "top_k", "top_p")}
    for _ in range(config.num_samples):
        cache.reset()
        idx = torch.tensor([prompt], device=device)  # (1, P)
        yield model.generate(idx, cache=cache, stop=stop, generator=generator, **options)


def write(
    chunks: Iterable[Chunk], tokenizer: AnyTokenizer, show: Callable[[str, float], str], tally: Tally
) -> None:
    """Print the tokens as they come. A character made of several tokens is printed with the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    before = None  # the prompt, which comes first, is not timed
    for chunk in chunks:
        experts = chunk.experts[0].float().mean(-1).tolist()  # one number per token
        now = time.perf_counter()
        for token, mean in zip(chunk.tokens[0].tolist(), experts, strict=True):
            print(show(piece(token, tokenizer, decoder), mean), end="", flush=True)
        tally.fed += len(experts)
        tally.experts += sum(experts)
        if before is not None:
            tally.written += len(experts)
            tally.seconds += now - before
        before = now
    print(show(decoder.decode(b"", final=True), mean))


def piece(token: int, tokenizer: AnyTokenizer, decoder: codecs.IncrementalDecoder) -> str:
    """The text that a token completes: nothing for end-of-text and for the beginning of a character."""
    text = decoder.decode(b"" if token == tokenizer.eot else tokenizer.decode_bytes([token]))
    return CONTROL.sub("\ufffd", text)


def colour_cuts(k: int) -> list[float]:
    """Experts per token where one colour gives way to the next: equal ranges around k, the ends open."""
    return [k - 1 + 2 * i / len(COLOURS) for i in range(1, len(COLOURS))]


def legend(k: int) -> str:
    cuts = [f"{cut:.1f}" for cut in colour_cuts(k)]
    ranges = [f"<{cuts[0]}", *(f"{a}-{b}" for a, b in pairwise(cuts)), f">{cuts[-1]}"]
    swatches = (paint(f" {text} ", colour) for text, colour in zip(ranges, COLOURS, strict=True))
    return " ".join(["experts per token:", *swatches])


def require_experts(config: MoEConfig) -> None:
    if not any(map(config.has_experts, range(config.n_layer))):
        raise ValueError("show_experts and html show experts, but this is a dense model: it has none")


def painter(k: int) -> Callable[[str, float], str]:
    """The function that colours a token's text by its experts."""
    cuts = colour_cuts(k)
    return lambda text, experts: paint(text, COLOURS[bisect_right(cuts, experts)])


def paint(text: str, colour: tuple[int, int]) -> str:
    """Colour the text, but no line break, from which a terminal would colour the rest of the line."""
    start = f"\x1b[48;5;{colour[0]};38;5;{colour[1]}m"
    return re.sub(r"[^\n]+", lambda line: f"{start}{line[0]}\x1b[0m", text)


def describe(model: MoEGPT, router: str) -> str:
    total, active = model.n_params()
    weight = model.head.weight
    how = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}"
    trained = "" if router == model.config.router else f" (trained with {model.config.router})"
    size = f"{total:,} parameters, {active:,} active per token"
    return f"{size}, router {router}{trained}, {how}"


def window_note(window: int) -> str:
    return (
        f"note: past block_size = {window} tokens, the newest {window // 2} are fed again, "
        "their experts chosen anew"
    )


def summary(tally: Tally, cache: Cache) -> str:
    speed = f"{tally.written} new tokens, {tally.written / max(tally.seconds, 1e-9):.1f} tokens/s"
    experts = f", {tally.experts / tally.fed:.2f} experts per token" if tally.experts > 0 else ""
    sizes = f"KV cache {human_bytes(cache.kv_nbytes)}, Expert Cache {human_bytes(cache.expert_nbytes)}"
    return f"{speed}{experts}; {sizes} (room for {cache.max_tokens} tokens)"


def human_bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} GiB"


# -------------------- the page ----------------------------------------------------------------------------


@contextlib.contextmanager
def new_file(name: str) -> Iterator[TextIO]:
    """A text file that gets its name when all is written: nobody finds half of it.

    Raises ValueError or OSError, at once, where no file of that name can be written.
    """
    path = Path(name)
    free = path.parent.is_dir() and (path.is_file() or not path.exists())
    require(free, "html", name or "empty", "the name of a file in a folder that exists")
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def kept(chunks: Iterable[Chunk], into: list[Chunk]) -> Iterator[Chunk]:
    for chunk in chunks:
        into.append(chunk)
        yield chunk


def page(samples: list[list[Chunk]], model: MoEGPT, tokenizer: AnyTokenizer, about: list[str]) -> str:
    """The HTML of a page that shows the chunks of each sample, under the lines of `about`."""
    layers = [layer for layer in range(model.config.n_layer) if model.config.has_experts(layer)]
    texts = [token_rows(chunks, model.head, tokenizer) for chunks in samples if chunks]
    data = json.dumps({"about": about, "k": model.config.k, "layers": layers, "samples": texts})
    return PAGE.replace("{DATA}", data.replace("<", "\\u003c"))  # so that no text can end the script


def drawn_by(config: SampleConfig) -> str:
    values = {key: getattr(config, key) for key in ("temperature", "top_k", "top_p", "seed")}
    return "drawn with " + ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)


@torch.no_grad()
def token_rows(chunks: list[Chunk], head: nn.Module, tokenizer: AnyTokenizer) -> list[dict]:
    """What the page says of each token of a sample. The first one was not predicted."""
    names = ("tokens", "mask", "last_hidden")
    tokens, mask, hidden = (torch.cat([getattr(chunk, name)[0] for chunk in chunks]) for name in names)
    ids, prompt = tokens.tolist(), chunks[0].tokens.shape[1]
    predicted = [{"entropy": None, "probability": None}, *predictions(head, hidden[:-1], tokens[1:])]
    experts = [[layer.nonzero().flatten().tolist() for layer in layers] for layers in mask.cpu()]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    rows = [
        {"text": piece(token, tokenizer, decoder), "name": token_name(token, tokenizer), "id": token}
        | {"prompt": position < prompt, "experts": experts[position]}
        | predicted[position]
        for position, token in enumerate(ids)
    ]
    rows[-1]["text"] += decoder.decode(b"", final=True)
    return rows


def predictions(head: nn.Module, last_hidden: Tensor, following: Tensor) -> list[dict[str, float]]:
    """Of each of the tokens following (n,), to four digits: the entropy in nats of the distribution that
    last_hidden (n, C) gives, at temperature 1 and before top_k and top_p, and its probability there."""
    found = []
    for hidden, token in zip(last_hidden.split(256), following.split(256), strict=True):  # (256, V) is enough
        ahead = Categorical(logits=head(hidden).float())
        found += zip(ahead.entropy().tolist(), ahead.log_prob(token).exp().tolist(), strict=True)
    return [{"entropy": float(f"{h:.4g}"), "probability": float(f"{p:.4g}")} for h, p in found]


def token_name(token: int, tokenizer: AnyTokenizer) -> str:
    r"""A token in printable characters, as in a Python string: \n, or \xf0 for a part of a character."""
    raw = tokenizer.decode_bytes([token])
    try:
        return repr(raw.decode())[1:-1]
    except UnicodeDecodeError:
        return repr(raw)[2:-1]


PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Experts of each token</title>
<style>
:root {
  color-scheme: light dark;
  --page: light-dark(#fff, #15171c); --panel: light-dark(#f3f4f6, #20242c);
  --text: light-dark(#1a1c20, #e8eaee); --quiet: light-dark(#5d636e, #a2a9b5);
  --fewer: light-dark(#1f78d1, #3f8fe0); --more: light-dark(#ec6a1a, #d9600f);
}
* { box-sizing: border-box; }
body { margin: auto; padding: 1.2rem; max-width: 76rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.3rem; }
h2 { margin: 1.6rem 0 .4rem; font-size: 1rem; }
p { margin: .3rem 0; color: var(--quiet); font-size: .87rem; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; align-items: center; margin: .9rem 0; }
select, button { font: inherit; padding: .15rem .5rem; }
b { padding: .1rem .45rem; font-weight: normal; }
.columns { display: grid; grid-template-columns: minmax(0, 1fr) 22rem; gap: 1.5rem; align-items: start; }
.text, #name { font: 14px/1.75 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; tab-size: 4;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.text span { padding: .15em 0; box-shadow: inset 1px 0 var(--page); cursor: pointer; }
.prompt { border-bottom: 2px solid var(--quiet); }
.text .here { outline: 2px solid var(--text); }
i::before { content: "\21b5"; color: var(--quiet); }
[data-name]::before { content: attr(data-name); padding: 0 .3em; border: 1px solid; border-radius: .5em;
  font-size: .8em; }
aside { position: sticky; top: 1.2rem; max-height: calc(100vh - 2.4rem); overflow: auto; padding: .8rem 1rem;
  border-radius: .5rem; background: var(--panel); }
#name:not(:empty) { border: 1px solid var(--quiet); border-radius: .2rem; padding: .1rem 0; }
td { padding: 0 .6rem 0 0; color: var(--quiet); font-size: .85rem; line-height: 1.4; vertical-align: top; }
td + td { color: var(--text); }
tr + tr td:first-child { white-space: nowrap; }
@media (max-width: 46rem) {
  .columns { display: block; padding-bottom: 45vh; }
  aside { position: fixed; inset: auto 0 0; max-height: 42vh; box-shadow: 0 0 12px #0005; }
}
</style>
<h1>Experts of each token</h1>
<div id="about"></div>
<nav>
  <label>Layer <select id="layer"><option value="-1">mean of all</option></select></label>
  <span>Experts <span id="legend"></span></span>
  <span class="prompt">prompt</span>
  <button id="theme">light / dark</button>
</nav>
<div class="columns">
  <main id="samples"></main>
  <aside aria-live="polite"><code id="name"></code>
    <table id="facts"><tr><td>Hover over a token, tap it, or walk with Tab and the arrow keys.</table></aside>
</div>
<p>Entropy and probability are those of the model's own distribution of the next token, at temperature 1 and
before top_k and top_p, when this token came. Layers, experts and positions are counted from 0.</p>
<noscript>This page needs JavaScript, all of which is inside it.</noscript>
<script type="application/json" id="data">{DATA}</script>
<script>
const find = (id) => document.getElementById(id)
const data = JSON.parse(find("data").textContent), tokens = data.samples.flat(), spans = []

function add(parent, tag, text = "") {
  const element = parent.appendChild(document.createElement(tag))
  element.textContent = text
  return element
}

function count(token, layer) { // layer -1: the mean
  const counts = token.experts.map((experts) => experts.length)
  return layer < 0 ? counts.reduce((a, b) => a + b) / counts.length : counts[layer]
}

function addToken(parent, token, position) {
  const span = add(parent, "span")
  for (const part of token.text.split(/(\n)/)) part === "\n" ? add(span, "i", part) : span.append(part)
  if (!token.text) span.dataset.name = token.name
  span.classList.toggle("prompt", token.prompt)
  span.tabIndex = position ? -1 : 0
  span.onmouseover = span.onfocus = () => show(span, token, position)
  spans.push(span)
}

function show(span, token, position) {
  document.querySelector(".here")?.classList.remove("here")
  span.classList.add("here")
  find("name").textContent = token.name
  const facts = { "token id": token.id, position, "entropy, nats": token.entropy ?? "\u2013",
    probability: token.probability ?? "\u2013", "experts, mean": count(token, -1).toFixed(2) }
  token.experts.forEach((experts, i) => {
    facts["layer " + data.layers[i]] = experts.length + (experts.length ? ": " : "") + experts.join(" ")
  })
  find("facts").replaceChildren()
  for (const fact of Object.entries(facts)) {
    const row = find("facts").insertRow()
    for (const text of fact) row.insertCell().textContent = text
  }
}

function shade() {
  const layer = Number(find("layer").value), counts = tokens.map((token) => count(token, layer)), k = data.k
  const low = counts.reduce((a, b) => Math.min(a, b), k), high = counts.reduce((a, b) => Math.max(a, b), k)
  const reach = Math.max(k - low, high - k) || 1, step = layer < 0 ? reach / 3 : Math.ceil(reach / 3)
  const percent = (n) => Math.min(60, 60 * Math.abs(n - k) / reach) + "%"
  const colour = (n) => `color-mix(in srgb, var(--${n < k ? "fewer" : "more"}) ${percent(n)}, transparent)`
  spans.forEach((span, i) => { span.style.background = colour(counts[i]) })
  find("legend").replaceChildren()
  for (const n of [-3, -2, -1, 0, 1, 2, 3].map((i) => k + i * step)) {
    if (n < 0 || n <= low - step || n >= high + step) continue
    add(find("legend"), "b", +n.toFixed(2)).style.background = colour(n)
  }
}

for (const line of data.about) add(find("about"), "p", line)
data.layers.forEach((layer, i) => { add(find("layer"), "option", layer).value = i })
data.samples.forEach((sample, i) => {
  if (data.samples.length > 1) add(find("samples"), "h2", `Sample ${i + 1}`)
  const text = add(find("samples"), "div")
  text.className = "text"
  sample.forEach((token, position) => addToken(text, token, position))
})
shade()
find("layer").onchange = shade
find("theme").onclick = () => {
  const style = document.documentElement.style, dark = matchMedia("(prefers-color-scheme: dark)").matches
  style.colorScheme = (style.colorScheme || (dark ? "dark" : "light")) === "dark" ? "light" : "dark"
}
onkeydown = (event) => {
  const at = spans.indexOf(document.activeElement), step = { ArrowLeft: -1, ArrowRight: 1 }[event.key]
  if (at < 0 || !step || !spans[at + step]) return
  spans[at + step].focus()
  event.preventDefault()
}
</script>
"""


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters that the model writes
    with bad_input_exits():
        main(sys.argv[1:])
