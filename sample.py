"""Write text with a trained run or a pretrained model, token by token, from its KV cache and Expert Cache.

    python sample.py --out_dir=out/tiny_seqtopk --prompt="def main(" --show_experts
    python sample.py --out_dir=out/tiny_seqtopk --prompt="def main(" --num_samples=3 --html=experts.html
    python sample.py --out_dir=out/tiny_seqtopk --prompt=FILE:model.py --svg=experts.svg
    python sample.py --init_from=allenai/OLMoE-1B-7B-0924 --router=online_seqtopk --prompt="Bitcoin is"

Text may grow past the run's block_size: whenever the caches are full they are emptied, the newest half of
block_size is fed again, its experts chosen anew, and writing goes on. A longer prompt is cut to its newest
half of block_size.
"""

import codecs
import contextlib
import json
import re
import sys
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TextIO

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from config import bad_input_exits, parse, printable, require
from config.device import decoding_threads, pick_compiled_decoding, pick_device, pick_dtype
from config.files import whole
from data import AnyTokenizer, hf_tokenizer, make_tokenizer
from data.source import read_text
from model import TEMPERATURE, TOP_P, Cache, Chunk, MoEConfig, MoEGPT, load_checkpoint, sample_token

# Background and text (of a terminal's 256 colours, and in SVG) of fewer experts than k, about k, and more.
COLOURS = [
    (25, 231, "#005faf", "white"),
    (68, 16, "#5f87d7", "black"),
    (110, 16, "#87afd7", "black"),
    (252, 16, "#d0d0d0", "black"),
    (216, 16, "#ffaf87", "black"),
    (203, 16, "#ff5f5f", "black"),
    (160, 231, "#d70000", "white"),
]


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
    seed: int = 1337  # same seed, same text (on a CPU; a GPU may round differently each time)
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    dtype: str = "auto"  # auto (a Hugging Face model's own), float32, bfloat16 or float16
    compile: str = "auto"  # compile the step of a token: auto (where many steps repay it), true or false
    show_experts: bool = False  # colour each token by its experts, as the mean over layers
    html: str | None = None  # also write a page to this file, with the experts of each token in each layer
    svg: str | None = None  # also draw the last text, each token coloured by its experts, into this file

    def __post_init__(self) -> None:
        sample_token(torch.zeros(1, 1), self.temperature, self.top_k, self.top_p)  # which checks these
        require(self.checkpoint in ("best", "last"), "checkpoint", self.checkpoint, "best or last")
        for name in ("num_samples", "max_new_tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2**63 - 1")
        same = self.svg and self.html and Path(self.svg).resolve() == Path(self.html).resolve()
        require(not same, "svg", self.svg, "another file than html")


@dataclass
class Sample:
    """What has been written so far, so that an interrupted text is summed up too."""

    chunks: list[Chunk] = field(default_factory=list)  # the prompt, then one new token in each
    times: list[float] = field(default_factory=list)  # in seconds, when each chunk was there


def main(argv: list[str]) -> None:
    """Load a model, write samples to stdout, sum up. Raises ValueError or OSError for bad input."""
    config = SampleConfig(**parse(argv, SampleConfig)[0])
    with new_file("html", config.html) as html, new_file("svg", config.svg) as svg:
        run(config, html, svg)
    for file, what, name in ((html, "page", config.html), (svg, "picture", config.svg)):
        if file:
            print(f"{what}: {name}")


def run(config: SampleConfig, html: TextIO | None, svg: TextIO | None) -> None:
    """Write samples to stdout and, where there are such files, a page of them and a picture of the last."""
    device, _ = pick_device(config.device)
    checkpoint = None if config.init_from else load_run(config)
    source = checkpoint["path"] if checkpoint else config.init_from
    tokenizer = make_tokenizer(checkpoint.get("tokenizer"), source) if checkpoint else hf_tokenizer(source)
    prompt = encode_prompt(config.prompt, tokenizer)
    model = open_model(checkpoint, config, device)
    needed = len(prompt) + config.max_new_tokens
    cache = model.new_cache(1, min(needed, model.config.block_size), config.router)
    model.check_promises(cache.router)
    if (config.show_experts or html or svg) and not model.expert_layers():
        raise ValueError("show_experts, html and svg show experts, but this is a dense model: it has none")
    about = [f"{source}: {describe(model, cache.router)}"]
    if needed > (window := cache.max_tokens):
        again = f"the newest {window // 2} are fed again, their experts chosen anew"
        about.append(f"note: past block_size = {window} tokens, {again}")
    steps = config.num_samples * config.max_new_tokens
    compile, why = pick_compiled_decoding(config.compile, steps, device, model.head.weight.dtype)
    about.append(f"compile: {str(compile).lower()} ({why})")
    print(*about, sep="\n")
    if config.show_experts:
        print("experts per token:", *(paint(text, colour) for text, colour in legend(model.config.k)))
    with decoding_threads(device) as threads:
        samples = write_samples(model, cache, prompt, tokenizer, config, compile)
    texts = [token_rows(sample.chunks, model.head, tokenizer) for sample in samples] if html or svg else []
    if html:
        html.write(page(texts, model.config, [*about, drawn_by(config, model.config)]))
    if svg:
        svg.write(picture(texts[-1] if texts else [], model.config.k))
    print("\n" + summary(samples, cache, threads if device.type == "cpu" else None))


def load_run(config: SampleConfig) -> dict:
    """The best or last checkpoint of a run; the last, with a note, where there is no best."""
    out_dir = Path(config.out_dir)
    if not out_dir.is_dir():
        raise ValueError(f"no run at {out_dir}: give the out_dir that train.py wrote to as --out_dir")
    checkpoint = load_checkpoint(out_dir / "last.pt" if config.checkpoint == "last" else out_dir)
    if Path(checkpoint["path"]).stem != config.checkpoint:
        print(f"note: {out_dir} has no best.pt yet; {checkpoint['path']} is used")
    return checkpoint


def open_model(checkpoint: dict | None, config: SampleConfig, device: torch.device) -> MoEGPT:
    """The model of a run's checkpoint, or else of init_from, in the dtype that was asked for."""
    dtype, _ = pick_dtype(config.dtype, device)
    if checkpoint is not None:
        return MoEGPT.from_checkpoint(checkpoint).to(device).cast(dtype)
    model = MoEGPT.from_pretrained(config.init_from, device)
    return model if config.dtype == "auto" else model.cast(dtype)


def encode_prompt(prompt: str | None, tokenizer: AnyTokenizer) -> list[int]:
    """Token ids of the prompt; without one, those before every document: the tokenizer's start, or eot.

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
    return read_text(path, f"the prompt in {path or 'standard input'}")  # as training text was


def write_samples(
    model: MoEGPT,
    cache: Cache,
    prompt: list[int],
    tokenizer: AnyTokenizer,
    config: SampleConfig,
    compile: bool,
) -> list[Sample]:
    """Write the samples one after the other, until Ctrl-C. They share the cache and the random numbers."""
    idx = torch.tensor([prompt], device=model.head.weight.device)  # (1, P)
    options = {key: getattr(config, key) for key in ("max_new_tokens", "temperature", "top_k", "top_p")}
    options |= {"generator": torch.Generator(idx.device).manual_seed(config.seed), "stop": tokenizer.stops}
    options["compile"] = compile
    samples = []
    with contextlib.suppress(KeyboardInterrupt):
        for number in range(1, config.num_samples + 1):
            print(f"\n--- sample {number} of {config.num_samples}" if config.num_samples > 1 else "")
            cache.reset()
            samples.append(Sample())
            chunks = model.generate(idx, cache=cache, **options)
            write(chunks, tokenizer, model.config.k if config.show_experts else None, samples[-1])
    return [sample for sample in samples if sample.chunks]


def write(chunks: Iterable[Chunk], tokenizer: AnyTokenizer, k: int | None, sample: Sample) -> None:
    """Print the tokens as they come and keep them in `sample`; coloured if k, their usual number of experts,
    is given. A character made of several tokens is printed with the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for chunk in chunks:
        experts = chunk.n_taken[0].float().mean(-1).tolist()  # one number per token
        sample.chunks.append(chunk)
        sample.times.append(time.perf_counter())
        for token, mean in zip(chunk.tokens[0].tolist(), experts, strict=True):
            text = piece(token, tokenizer, decoder)
            print(text if k is None else paint(text, colour_of(mean, k)), end="", flush=True)
    text = decoder.decode(b"", final=True)
    print(text if k is None else paint(text, colour_of(mean, k)))


def piece(token: int, tokenizer: AnyTokenizer, decoder: codecs.IncrementalDecoder) -> str:
    """The text that a token completes: nothing for end-of-text and for the beginning of a character."""
    text = decoder.decode(b"" if token == tokenizer.eot else tokenizer.decode_bytes([token]))
    return printable(text)


def colour_cuts(k: int) -> list[float]:
    """The experts per token at which each colour but the first begins: equal ranges around k."""
    return [k - 1 + 2 * i / len(COLOURS) for i in range(1, len(COLOURS))]


def legend(k: int) -> list[tuple[str, tuple]]:
    """Each colour with the experts per token that it stands for."""
    cuts = [f"{cut:.1f}" for cut in colour_cuts(k)]
    ranges = [f"<{cuts[0]}", *(f"{a}-{b}" for a, b in pairwise(cuts)), f">{cuts[-1]}"]
    return [(f" {text} ", colour) for text, colour in zip(ranges, COLOURS, strict=True)]


def colour_of(experts: float, k: int) -> tuple:
    return COLOURS[bisect_right(colour_cuts(k), experts)]


def paint(text: str, colour: tuple) -> str:
    """Colour the text, but no line break, from which a terminal would colour the rest of the line."""
    back, front, *_ = colour
    start = f"\x1b[48;5;{back};38;5;{front}m"
    return re.sub(r"[^\n]+", lambda line: f"{start}{line[0]}\x1b[0m", text)


def describe(model: MoEGPT, router: str) -> str:
    (total, active), weight = model.n_params(), model.head.weight
    trained = "" if router == model.config.router else f" (trained with {model.config.router})"
    size = f"{total:,} parameters, {active:,} active per token"
    dtype = str(weight.dtype).removeprefix("torch.")
    return f"{size}, router {router}{trained}, {dtype} on {weight.device}"


def summary(samples: list[Sample], cache: Cache, threads: int | None) -> str:
    written = sum(len(sample.chunks) - 1 for sample in samples)
    seconds = sum(sample.times[-1] - sample.times[0] for sample in samples)  # without the prompts
    counts = [chunk.n_taken.flatten() for sample in samples for chunk in sample.chunks]
    experts = torch.cat(counts).float() if counts else torch.empty(0)  # none in a dense model
    mean = f", {experts.mean():.2f} experts per token" if len(experts) else ""
    sizes = f"KV cache {human_bytes(cache.kv_nbytes)}, Expert Cache {human_bytes(cache.expert_nbytes)}"
    speed = f"{written} new tokens, {written / max(seconds, 1e-9):.1f} tokens/s"
    speed += f" on {threads} thread{'s'[: threads > 1]}" if threads else ""
    return f"{speed}{mean}; {sizes} (room for {cache.max_tokens} tokens)"


def human_bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} GiB"


# -------------------- the page and the picture ------------------------------------------------------------


@contextlib.contextmanager
def new_file(setting: str, name: str | None) -> Iterator[TextIO | None]:
    """A text file that gets its name when all is written: nobody finds half of it. None without a name.

    Raises ValueError, which names the setting, or OSError, at once, where no such file can be written.
    """
    if name is None:
        yield None
        return
    path = Path(name)
    free = path.parent.is_dir() and (path.is_file() or not path.exists())
    require(free, setting, name or "empty", "the name of a file in a folder that exists")
    with whole(path) as new, open(new, "w", encoding="utf-8") as file:
        yield file


def page(texts: list[list[dict]], config: MoEConfig, about: list[str]) -> str:
    """The HTML of a page that shows the rows of each text, under the lines of `about`."""
    layers = [layer for layer in range(config.n_layer) if config.has_experts(layer)]
    data = json.dumps({"about": about, "k": config.k, "layers": layers, "samples": texts})
    template = Path(__file__).with_name("sample.html").read_text(encoding="utf-8")
    return template.replace("{DATA}", data.replace("<", "\\u003c"))  # so that no text can end the script


def drawn_by(config: SampleConfig, model: MoEConfig) -> str:
    values = {key: getattr(config, key) for key in ("temperature", "top_k", "top_p", "seed")}
    drawn = ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
    return f"K = {model.k} of {model.n_expert} experts per token on average; drawn with {drawn}"


@torch.no_grad()
def token_rows(chunks: list[Chunk], head: nn.Module, tokenizer: AnyTokenizer) -> list[dict]:
    """What the page says of each token of a sample. Nothing predicted the first one."""
    names = ("tokens", "mask", "last_hidden")
    tokens, mask, hidden = (torch.cat([getattr(chunk, name)[0] for chunk in chunks]) for name in names)
    prompt_length = chunks[0].tokens.shape[1]
    predicted = [{"entropy": None, "probability": None}, *predictions(head, hidden[:-1], tokens[1:])]
    experts = [[layer.nonzero().flatten().tolist() for layer in layers] for layers in mask.cpu()]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    rows = []
    for position, token in enumerate(tokens.tolist()):
        rows.append({"text": piece(token, tokenizer, decoder), "name": token_name(token, tokenizer)})
        rows[-1] |= {"id": token, "prompt": position < prompt_length, "experts": experts[position]}
        rows[-1] |= predicted[position]
    rows[-1]["text"] += decoder.decode(b"", final=True)
    return rows


def predictions(head: nn.Module, last_hidden: Tensor, following: Tensor) -> list[dict[str, float]]:
    """To four digits, at n positions: the entropy in nats of the distribution that last_hidden (n, C)
    gives, at temperature 1 and before top_k and top_p, and the probability of the token following (n,)."""
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


def picture(rows: list[dict], k: int) -> str:
    """The SVG of a text, each token on the colour of its experts (mean over layers), under a legend.

    A line has up to 100 columns, a tab is four spaces, and a line break has a column to show its colour.
    """
    plain, cells, line, column = (None, None, "white", "black"), [], 0, 0
    pieces = [("experts per token: ", plain), *legend(k), ("\n\n", plain)]
    pieces += [(row["text"], colour_of(fmean(map(len, row["experts"])), k)) for row in rows]
    for text, (*_, back, front) in pieces:
        for part in re.findall(r"\n|[^\n]{1,100}", text.replace("\t", "    ")):
            if part != "\n" and column + len(part) > 100:
                line, column = line + 1, 0
            place, width = f'x="{8 * column + 8}" y="{18 * line + 8}"', 8 * len(part)
            fit = f'dy="13" textLength="{width}" lengthAdjust="spacingAndGlyphs"'  # in any font
            cells.append(f'<rect {place} width="{width}" height="18" fill="{back}"/>')
            cells.append(f'<text {place} {fit} fill="{front}">{escape(part)}</text>\n')
            line, column = (line + 1, 0) if part == "\n" else (line, column + len(part))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="824" height="{18 * line + 34}" font-size="13" '
        'font-family="ui-monospace, Menlo, Consolas, monospace" xml:space="preserve">\n'
        '<rect width="100%" height="100%" rx="6" fill="white"/>\n' + "".join(cells) + "</svg>\n"
    )


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters that the model writes
    with bad_input_exits():
        main(sys.argv[1:])
