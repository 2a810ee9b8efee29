"""Write text with a trained run or a pretrained model, token by token, from its KV cache and Expert Cache.

    python sample.py --out_dir=out/tiny_seqtopk --prompt="def main(" --show_experts
    python sample.py --init_from=allenai/OLMoE-1B-7B-0924 --router=online_seqtopk --prompt="Bitcoin is"

Text may grow past the run's block_size: whenever the caches are full they are emptied, the newest half of
block_size is fed again, its experts chosen anew, and writing goes on. A longer prompt is cut to that half.
"""

import codecs
import contextlib
import re
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from config import bad_input_exits, parse
from config.device import pick_device, pick_dtype
from data import AnyTokenizer, hf_tokenizer, make_tokenizer
from model import TEMPERATURE, TOP_P, Cache, Chunk, MoEConfig, MoEGPT, load_checkpoint, require, sample_token

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
    device, _ = pick_device(config.device)
    checkpoint, source = (None, config.init_from) if config.init_from else load_run(config)
    tokenizer = make_tokenizer(checkpoint.get("tokenizer")) if checkpoint else hf_tokenizer(source)
    prompt = encode_prompt(config.prompt, tokenizer)
    model = open_model(checkpoint, config, device)
    needed = len(prompt) + config.max_new_tokens
    cache = model.new_cache(1, min(needed, model.config.block_size), config.router)
    show = painter(model.config) if config.show_experts else lambda text, experts: text
    print(f"{source}: {describe(model, cache.router)}")
    if needed > cache.max_tokens:
        print(window_note(cache.max_tokens))
    if config.show_experts:
        print(legend(model.config.k))
    tally = Tally()
    with contextlib.suppress(KeyboardInterrupt):
        for number, chunks in enumerate(streams(model, cache, prompt, tokenizer.eot, config), start=1):
            print(f"\n--- sample {number} of {config.num_samples}" if config.num_samples > 1 else "")
            write(chunks, tokenizer, show, tally)
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
            text = decoder.decode(b"" if token == tokenizer.eot else tokenizer.decode_bytes([token]))
            print(show(CONTROL.sub("\ufffd", text), mean), end="", flush=True)
        tally.fed += len(experts)
        tally.experts += sum(experts)
        if before is not None:
            tally.written += len(experts)
            tally.seconds += now - before
        before = now
    print(show(decoder.decode(b"", final=True), mean))


def colour_cuts(k: int) -> list[float]:
    """Experts per token where one colour gives way to the next: equal ranges around k, the ends open."""
    return [k - 1 + 2 * i / len(COLOURS) for i in range(1, len(COLOURS))]


def legend(k: int) -> str:
    cuts = [f"{cut:.1f}" for cut in colour_cuts(k)]
    ranges = [f"<{cuts[0]}", *(f"{a}-{b}" for a, b in pairwise(cuts)), f">{cuts[-1]}"]
    swatches = (paint(f" {text} ", colour) for text, colour in zip(ranges, COLOURS, strict=True))
    return " ".join(["experts per token:", *swatches])


def painter(config: MoEConfig) -> Callable[[str, float], str]:
    """The function that colours a token's text by its experts. Raises ValueError for a dense model."""
    if not any(map(config.has_experts, range(config.n_layer))):
        raise ValueError("show_experts is true, but this is a dense model: it has no experts to show")
    cuts = colour_cuts(config.k)
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


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters that the model writes
    with bad_input_exits():
        main(sys.argv[1:])
