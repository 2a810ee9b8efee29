"""How fast this code is, what SeqTopK costs, and which router is better.

    python bench.py                                      every part that needs no trained model, in minutes
    python bench.py decode --shape=heavy --batch_size=1  one part; --help lists the parts and the keys
    python bench.py gsm8k --init_from=allenai/OLMoE-1B-7B-0924 --shots=8
    python bench.py switch --init_from=allenai/OLMoE-1B-7B-0924 --text=FILE
    python bench.py quality --config=config/quality_arithmetic.py --routers=topk,seqtopk --ks=4,2
    python bench.py sparsity --quick                     one of the claims below, in minutes
    python bench.py --json=results/laptop.json --plot=plots/laptop.png
    python bench.py table                                the table of README.md, from results/*.json
    python bench.py table results/FILE.json              all rows of a file, as tables
    python bench.py figures                              the figures of README.md, from results/*.json

Speed: what is compared is run as A B A B ..., and a ratio is the median over these pairs, with the quartiles
behind it: what slows the machine for a while slows both. `time/x` is the time as a multiple of x's, so less
is better; `speed/x` is its inverse.

Quality: `quality` and the twelve claims train what they compare, by train.py with the settings of --config
and some of their own, for --seeds seeds. Runs are kept in out/quality under a name that says their settings:
what is finished is not run again, what was stopped goes on, and the claims share runs.

     1 sparsity    is the gain larger at K = 2 than 8?     7 length    sequences of 256 to 2048 tokens
     2 finetune    a TopK checkpoint trained on            8 long      texts of four times the context
     3 online      trained globally or online              9 shared    beside a shared expert
     4 bounds      per token; the strict budget           10 gap       can it be closed by a prior?
     5 batches     of how many sequences                  11 discount  a rule without max_experts
     6 difficulty  do hard tokens get more experts?       12 prune     a quarter of the experts dropped

Every run ends with one line of JSON, which --json keeps if it has any figure.
"""

import copy
import fcntl
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, quantiles, stdev
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
from config import bad_input_exits, parse, read_file, require
from config.device import give_back_freed_memory, keep_freed_memory, pick_compile, pick_device, pick_dtype
from data import AnyTokenizer
from data.arithmetic.prepare import FINAL_ANSWER, is_correct, prompt_of, result_of
from data.pairs.prepare import Pair, read_pairs
from data.source import read_text
from model import (
    MLP,
    Cache,
    Chunk,
    Context,
    MoE,
    MoEConfig,
    MoEGPT,
    evaluate_text,
    load_checkpoint,
)
from router import ROUTERS, ExpertCache, online_seqtopk, pseudo_candidates, seqtopk

if TYPE_CHECKING:  # figures only, which are all that need it, import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HOME = Path(__file__).parent
RESULTS = HOME / "experiments" / "results"
RUNS = Path("out/quality")
CODE = b"".join((HOME / name).read_bytes() for name in ("bench.py", "model.py", "router.py"))
PLAIN = [name for name, row in ROUTERS.items() if not row.needs]  # routers that any model can run under
MIN_ROUNDS, MAX_ROUNDS = 5, 200
CYCLE = ExpertCache.RECENT + 1  # steps of an Expert Cache, one of which merges its buffers
FINAL_LINE = re.compile(FINAL_ANSWER.pattern + r"\s")  # as FINAL_ANSWER, and no more digits can follow
CHECK_EVERY = 16  # tokens from one look for final answers to the next
ANSWER_TOKENS = 400  # the most for an answer in gsm8k
SWITCH_WINDOWS = 64  # of the text, in switch
QUALITY_PROBLEMS = 60  # of each level of arithmetic
JUDGED_TOKENS = 2**17  # of the validation text, by which trained models are compared
SEEDS, QUICK_SEEDS = 3, 2
QUICK = 4  # --quick has so many times fewer judged tokens, and fewer of
QUICKENED = ("max_iters", "warmup_iters", "lr_decay_iters", "first_iters", "eval_interval", "eval_windows")
SECONDS = "took {} seconds"  # a line of train.txt
TUNING = {"max_iters": 100, "warmup_iters": 10, "learning_rate": 1e-3}  # of a run that goes on
LENGTHS = (256, 1024, 2048)
PLACES = (16, 64, 256, 1024, 2048)  # ends of ranges of positions
PRIORS = (0, 1, 4, 16, 64, 256, 4096)  # tokens
USUAL_TOKENS = 2**14  # of the training text that tell how a trained model routes
EXTREMES = 8  # words with the most experts, and as many with the fewest
OTHER_BATCHES = 1000  # from the seed of a run to that of another that goes on with its weights
INIT_STD = 0.02  # of the model's random weights
HEAVY = {"n_layer": 4, "n_head": 8, "n_embd": 1024, "n_hidden": 512, "n_expert": 64, "k": 8}
OLMOE = MoEConfig(50304, 4096, n_layer=16, n_head=16, n_embd=2048, n_hidden=1024, n_expert=64, k=8)
SHAPES = {  # besides those of config/NAME_topk.py
    "heavy": HEAVY | {"block_size": 4096, "vocab_size": 512},
    "peers": {"n_embd": 256, "n_hidden": 680, "qk_norm": "full"},
}
NEAR = 0.4  # nats; differences beyond it would flatten all others
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # of Okabe and Ito
STYLES = list(itertools.product(("-", "--", ":"), COLOURS))  # of the lines in a figure, one after another
LOOK = {"font.size": 9, "font.sans-serif": ["DejaVu Sans"], "legend.frameon": False}
LOOK |= {"legend.handlelength": 3, "axes.grid": True, "grid.alpha": 0.3}
LOOK |= {"svg.fonttype": "none", "svg.hashsalt": "bench"}  # the same results, the same file
# FLOP/s in half precision without sparsity, from the vendor's data sheets
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


@dataclass(frozen=True)
class BenchConfig:
    """What to measure. A size that is not given suits the part and the machine."""

    shape: str | None = None  # train and decode: heavy, or the NAME of a config/NAME_topk.py
    batch_size: int | None = None  # sequences in a batch
    tokens: int | None = None  # tokens in a sequence; in decode and cache, those that came before
    vocab_size: int | None = None  # tokens in the vocabulary
    n_layer: int | None = None  # transformer blocks
    n_head: int | None = None  # attention heads
    n_embd: int | None = None  # model width
    n_hidden: int | None = None  # hidden width of one expert
    n_expert: int | None = None  # experts per layer
    k: int | None = None  # experts per token on average; none: the model's or the config's own
    effort: float = 1.0  # 2 measures twice as long, 0 for five rounds
    init_from: str | None = None  # arithmetic, gsm8k, switch: a run, a checkpoint, or a Hugging Face model
    out_dir: str | None = None  # the same, for a run (none of both: the run of config/NAME.py for that task)
    router: str | None = None  # arithmetic, gsm8k: any causal one; none: the stand-in for the run's own
    problems: int | None = None  # so many (none: of each level 300 in arithmetic, 60 in quality; gsm8k all)
    shots: int = 0  # gsm8k: solved examples in the prompt, for models that were not fine-tuned
    dataset: str = "gsm8k"  # gsm8k: where test.jsonl and the examples come from
    text: str | None = None  # switch: file with the text
    config: str = "config/quality.py"  # quality, claims: settings of train.py that all runs share
    routers: str = ",".join(PLAIN)  # quality: what to compare; the first is what others are compared to
    ks: str | None = None  # quality: values of k, each compared for itself (none: k)
    seeds: int | None = None  # quality, claims: runs of each kind, from `seed` on (none: 3, quick 2)
    quick: bool = False  # quality, claims: a quarter of iterations and of judged text, for a look in minutes
    budget: float | None = None  # quality, claims: minutes after which no training begins
    json: str | None = None  # file to keep the results in
    plot: str | None = None  # file to draw the ratios to; needs matplotlib
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    dtype: str = "auto"  # auto, float32, bfloat16 or float16
    compile: str = "auto"  # torch.compile in layer, train and peers: auto, true or false
    seed: int = 1337  # of weights, scores and tokens

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            low = 0 if name in ("budget", "effort", "seed", "shots") else 1
            require(isinstance(value, str | bool | None) or value >= low, name, value, f"at least {low}")


@dataclass(frozen=True)
class Bench:
    """The settings, where and in which number format to compute, and the clock."""

    config: BenchConfig
    device: torch.device
    dtype: torch.dtype
    compile: bool
    deadline: float = math.inf  # of time.monotonic(), after which no training begins
    missing: list[str] = field(default_factory=list)  # trainings that failed or did not begin

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def machine(self) -> str:
        if self.gpu:
            return torch.cuda.get_device_name(self.device)
        info = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
        return f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"

    def sized(self, **sizes: int) -> SimpleNamespace:
        """These sizes, but for those that were given."""
        given = {name: getattr(self.config, name) for name in sizes}
        return SimpleNamespace(**{name: given[name] or size for name, size in sizes.items()})

    def shape(self, name: str) -> MoEConfig:
        """The architecture of that name, but for the sizes that were given. Raises ValueError for others."""
        path = HOME / "config" / f"{name}_topk.py"
        known = name in SHAPES or path.is_file()
        require(known, "shape", name, f"{', '.join(SHAPES)}, or the NAME of a config/NAME_topk.py")
        settings = {"vocab_size": 4096, **(SHAPES.get(name) or runpy.run_path(str(path))), "router": "topk"}
        keys = {field.name for field in fields(MoEConfig)}
        given = {key: value for key, value in vars(self.config).items() if value and key != "router"}
        return MoEConfig(**{key: value for key, value in (settings | given).items() if key in keys})

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def compiled(self, function: Callable, fullgraph: bool = True) -> Callable:
        return torch.compile(function, fullgraph=fullgraph) if self.compile else function

    def text(self, vocab_size: int, batch_size: int, tokens: int) -> Tensor:
        """Token ids (batch_size, tokens), as uneven as words (Zipf's law), so that the experts' load is."""
        frequency = 1 / torch.arange(1, vocab_size + 1, dtype=torch.float32)
        return frequency.expand(batch_size, -1).multinomial(tokens, replacement=True).to(self.device)

    def scores(self, batch_size: int, tokens: int, n_expert: int, spread: float = 1.0) -> Tensor:
        """Scores (batch_size, tokens, n_expert) of random logits with that standard deviation."""
        return (torch.randn(batch_size, tokens, n_expert) * spread).softmax(-1).to(self.device)

    def seconds(self, call: Callable) -> float:
        """Time of one call, on a GPU by events on the device."""
        if not self.gpu:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    def interleave(
        self, calls: dict, seconds: float, before: Callable | None = None, clock: Callable | None = None
    ) -> dict:
        """Name -> seconds that the call took in each round A B A B ..., until the time is over.

        Rounds come after a warm-up. before(name), not timed, prepares each call; clock(call) makes it and
        tells the seconds (None: self.seconds).
        """
        clock = clock or self.seconds
        times = {name: [] for name in calls}
        warm_up = 3 if self.gpu else 1
        for done in range(-warm_up, MAX_ROUNDS):
            if done == 0:
                end = time.perf_counter() + seconds * self.config.effort
            if done >= MIN_ROUNDS and time.perf_counter() > end:
                break
            for name, call in calls.items():
                if before:
                    before(name)
                times[name].append(clock(call))
        return {name: values[warm_up:] for name, values in times.items()}

    def peak_gb(self, call: Callable) -> float | None:
        """Most memory held during a call: of the GPU, or of this process where Linux tells, else None."""
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
            call()
            return torch.cuda.max_memory_allocated() / 1e9
        give_back_freed_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (man 5 proc)
        except OSError:
            return None
        call()
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def make_bench(config: BenchConfig) -> Bench:
    """Raises ValueError for a device that is not there."""
    device, _ = pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # events and memory counters are the current device's
    dtype, _ = pick_dtype(config.dtype, device)
    return Bench(config, device, dtype, pick_compile(config.compile, device, dtype)[0])


def ratio(top: list[float], bottom: list[float]) -> list[float]:
    """Median, lower and upper quartile of the ratios of neighbours."""
    low, middle, high = quantiles([a / b for a, b in zip(top, bottom)], n=4, method="inclusive")
    return [middle, low, high]


# -------------------- the parts: each returns the rows of its table ---------------------------------------


def bench_router(bench: Bench) -> list[dict]:
    """Routers alone, on random scores, not compiled.

    What a routing decision costs before any expert runs, and how online SeqTopK grows with the length of a
    sequence: about as T log T, where ranking the past anew for every token grows as T^2.
    """
    size = bench.sized(batch_size=8, tokens=1024, n_expert=64, k=8)
    B, T = size.batch_size, size.tokens
    scores = bench.scores(B, T, size.n_expert)
    calls = {name: partial(ROUTERS[name].select, scores, size.k) for name in PLAIN}
    times = bench.interleave(calls, 6)
    rows = [router_row(f"{name}, B={B}, T={T}", times[name], B * T, "topk", times["topk"]) for name in times]
    lengths = [max(1, T // 4) * 2**i for i in range(6)]
    scores = bench.scores(1, lengths[-1], size.n_expert)
    times = bench.interleave({n: partial(online_seqtopk, scores[:, :n], size.k) for n in lengths}, 6)
    base = lengths[0]
    return rows + [
        router_row(f"online_seqtopk, B=1, T={n}", times[n], n, f"T={base}", times[base]) for n in lengths
    ]


def router_row(what: str, taken: list[float], tokens: int, base: str, base_taken: list[float]) -> dict:
    seconds = median(taken)
    row = {"what": what, "ms": seconds * 1e3, "us per token": seconds / tokens * 1e6}
    return row | {f"time/{base}": ratio(taken, base_taken)}


def bench_layer(bench: Bench) -> list[dict]:
    """A layer of experts against a dense layer of equal active FLOPs (k*H wide), both wholly in one dtype.

    What routing, sorting the pairs and uneven groups cost. "of matmul": the speed as a share of that of plain
    matrix products of as many FLOPs in all, the most that this machine could give.
    """
    batch_size, width, hidden = (64, 1024, 1024) if bench.gpu else (8, 384, 256)
    size = bench.sized(batch_size=batch_size, tokens=512, n_embd=width, n_hidden=hidden, n_expert=32, k=4)
    x = torch.randn(size.batch_size, size.tokens, size.n_embd).to(bench.device, bench.dtype).requires_grad_()
    matrix = torch.randn(size.n_embd, 3 * size.k * size.n_hidden).to(x)
    flops = 2 * size.batch_size * size.tokens * matrix.numel()
    layers = make_layers(bench, size)
    what = f"C={size.n_embd}, H={size.n_hidden}, E={size.n_expert}, K={size.k}, S={x[..., 0].numel()}"

    def forward(kind: str) -> Tensor:
        return layers[kind][0](x)

    def both(kind: str) -> None:
        forward(kind).backward(x.detach())

    def before(kind: str) -> None:
        x.grad = None
        if kind in layers:
            layers[kind][1].zero_grad()

    rows = []
    for run, label, products in ((forward, "forward", 1), (both, "forward+backward", 3)):
        calls = {kind: partial(run, kind) for kind in layers}
        calls["matmul"] = lambda n=products: [x.detach() @ matrix for _ in range(n)]
        times = bench.interleave(calls, 10, before)
        rows += [layer_row(f"{kind} {label}, {what}", kind, times, products * flops) for kind in layers]
    aimed = next(row for row in rows if row["what"].startswith("topk forward+backward"))
    aimed["aim"] = f"at least {0.75 if bench.gpu else 0.95}"
    return rows


def layer_row(what: str, kind: str, times: dict, flops: int) -> dict:
    seconds = median(times[kind])
    row = {"what": what, "ms": seconds * 1e3, "GFLOP/s": flops / seconds / 1e9}
    row["of matmul"] = ratio(times["matmul"], times[kind])[0]
    return row | {"speed/dense": ratio(times["dense"], times[kind])}


def make_layers(bench: Bench, size: SimpleNamespace) -> dict[str, tuple[Callable, torch.nn.Module]]:
    """Name -> a function of x, and the module in it: the dense layer, the experts under three routers."""
    shape = {"n_head": 1, "n_embd": size.n_embd, "n_hidden": size.n_hidden, "n_expert": size.n_expert}
    dense, experts = MLP(size.n_embd, size.k * size.n_hidden), MoE(MoEConfig(**shape, k=size.k))
    for module in (dense, experts):
        for parameter in module.to(bench.device, bench.dtype).parameters():
            torch.nn.init.normal_(parameter, std=INIT_STD)

    def through(router: str) -> Callable:
        context = Context(ROUTERS[router], None, None, None, 0)
        return bench.compiled(lambda x: experts(x, context, None)[0])

    routed = {name: (through(name), experts) for name in ("topk", "seqtopk", "online_seqtopk")}
    return {"dense": (bench.compiled(dense), dense), **routed}


def bench_train(bench: Bench) -> list[dict]:
    """Full training steps of one model, each router in its turn on the same weights.

    What a user waits for: forward, backward, clipping, AdamW. The paper says 246.4 GPU-hours under SeqTopK
    and 244.2 under TopK. Memory is the peak during a step, of the GPU or of the whole process.
    """
    shape = bench.config.shape or "small"
    model = MoEGPT(bench.shape(shape)).to(bench.device)
    size = bench.sized(batch_size=64 if bench.gpu else 4, tokens=model.config.block_size)
    text = bench.text(model.config.vocab_size, size.batch_size, size.tokens + 1)
    step = train_step(model, bench.compiled(model), text, bench.dtype)
    calls = {name: partial(step, name) for name in PLAIN}
    times = bench.interleave(calls, 25)
    aims = {"seqtopk": "at most 1.01", "online_seqtopk": "at most 1.05"} if shape == "small" else {}
    known = (peak for name, peak in PEAKS.items() if name in bench.machine and bench.dtype != torch.float32)
    peak_flops = next(known, None)
    rows = []
    for name, taken in times.items():
        rate = size.batch_size * size.tokens / median(taken)
        flops = rate * model.flops_per_token(size.tokens)
        row = {"what": f"{name}, {shape}, B={size.batch_size}, T={size.tokens}", "tokens/s": rate}
        row |= {"GFLOP/s": flops / 1e9, "MFU %": peak_flops and 100 * flops / peak_flops}
        row |= {"peak GB": bench.peak_gb(calls[name]), "time/topk": ratio(taken, times["topk"])}
        rows.append(row | {"paper": "1.009" if name == "seqtopk" else None, "aim": aims.get(name)})
    return rows


def train_step(model: MoEGPT, forward: Callable, text: Tensor, dtype: torch.dtype) -> Callable[[str], None]:
    """A function of the router's name: the work of train.py in an iteration on text (B, T+1), data apart."""
    update = updater(model)

    def step(router: str) -> None:
        half = dtype != next(model.parameters()).dtype
        with torch.autocast(text.device.type, dtype) if half else nullcontext():
            _, loss, stats = forward(text[:, :-1], text[:, 1:], router=router)
        update(loss + stats.balance_loss + stats.z_loss)

    return step


def updater(model: torch.nn.Module) -> Callable[[Tensor], None]:
    """A function of the loss: backward, clipping, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def update(loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def bench_decode(bench: Bench) -> list[dict]:
    """Writing token by token: TopK and online SeqTopK in turn, step by step, on the same weights.

    "heavy" has experts of real weight. The few small operations of an Expert Cache ("extra us per layer") are
    as many at any width: beside the small experts of the other shapes they are a larger share of a step.
    Before decoding, the caches are filled up to the context: keys and values with random numbers, Expert
    Caches with scores spread as the gates' are. A median passes over the one step in 65 that merges the
    buffers of the Expert Caches: the part "cache" counts it in. Prefill reads a real prompt, but not where
    that takes long. Memory is worked out: weights and caches. The paper says 139.41 tokens/s against 141.23,
    and 18.35 GB against 18.21.
    """
    rows, given = [], bench.config
    for shape in [given.shape] if given.shape else ["heavy", "small", "tiny"]:
        model = MoEGPT(bench.shape(shape)).to(bench.device).cast(bench.dtype).eval()
        contexts = (256, 512, 1024, 2048, 4096)[:: 1 if bench.gpu else 2]
        contexts = [n for n in contexts if n <= model.config.block_size]
        for batch_size in [given.batch_size] if given.batch_size else [1, 16]:
            for context in [given.tokens] if given.tokens else contexts:
                row = {"what": f"{shape}, batch {batch_size}, context {context}"}
                row |= decode_row(bench, model, batch_size, context)
                promise = {"paper": "0.987, memory 1.008", "aim": "at least 0.99"} if shape == "heavy" else {}
                rows.append(row | promise)
    olmoe = Cache(OLMOE, 1, 4096, "online_seqtopk", "meta", torch.bfloat16)
    sizes = {"KV MB": olmoe.kv_nbytes / 1e6, "expert MB": olmoe.expert_nbytes / 1e6}
    share = {"bytes/KV": olmoe.expert_nbytes / olmoe.kv_nbytes, "aim": "at most 0.01"}
    return [*rows, {"what": "Expert Cache of OLMoE's shape, bfloat16, context 4096", **sizes, **share}]


def decode_row(bench: Bench, model: MoEGPT, batch_size: int, context: int) -> dict:
    base, ours, steps = "topk", "online_seqtopk", MAX_ROUNDS + 4
    caches = {name: model.new_cache(batch_size, context + steps, name) for name in (base, ours)}
    caches[ours].kv = caches[base].kv  # one memory under both: its pages may lie better or worse
    prefill = prefill_figures(bench, model, caches, batch_size, context)
    fill(bench, model, caches, batch_size, context)
    token = bench.text(model.config.vocab_size, batch_size, 1)
    streams = {name: model.generate(token, steps, cache, 1.0, top_p=None) for name, cache in caches.items()}
    chunks = {name: [next(stream)] for name, stream in streams.items()}
    calls = {name: lambda name=name: chunks[name].append(next(streams[name])) for name in caches}
    times = bench.interleave(calls, 2)
    step = {name: median(taken) for name, taken in times.items()}
    experts = torch.cat([chunk.experts for chunk in chunks[ours]]).float().mean().item()
    weights, (small, large) = sum(p.nbytes for p in model.parameters()), (caches[base], caches[ours])
    memory = weights + small.kv_nbytes
    return {
        "topk tokens/s": batch_size / step[base],
        "online tokens/s": batch_size / step[ours],
        "speed/topk": ratio(times[base], times[ours]),
        "extra us per layer": (step[ours] - step[base]) / model.config.n_layer * 1e6,
        "experts per token": experts,
        **prefill,
        "KV MB": large.kv_nbytes / 1e6,
        "expert MB": large.expert_nbytes / 1e6,
        "memory/topk": (memory + large.expert_nbytes) / memory,
    }


def prefill_figures(bench: Bench, model: MoEGPT, caches: dict, batch_size: int, context: int) -> dict:
    """Reading a prompt of `context` tokens in one piece; nothing where that would take long."""
    if batch_size * context > (2**17 if bench.gpu else 1024):
        return {}
    prompt = bench.text(model.config.vocab_size, batch_size, context)
    calls = {name: lambda c=cache: next(model.generate(prompt, 1, c)) for name, cache in caches.items()}
    times = bench.interleave(calls, 1, lambda name: caches[name].reset())
    rate = batch_size * context / median(times["online_seqtopk"])
    return {"prefill tokens/s": rate, "speed/topk, prefill": ratio(times["topk"], times["online_seqtopk"])}


def fill(bench: Bench, model: MoEGPT, caches: dict, batch_size: int, context: int) -> None:
    """Bring the caches to where they would be after `context` tokens."""
    spread = INIT_STD * math.sqrt(model.config.n_embd)  # of the gate's logits: its input is normalised
    for cache in caches.values():
        cache.reset()
        for part in (part for kv in cache.kv for part in (kv.k, kv.v)):
            part.copy_(torch.randn_like(part[:1, :1]))
        for experts in filter(None, cache.experts):
            experts.select(bench.scores(batch_size, context, model.config.n_expert, spread))
        cache.mark(context, None)
        cache.advance(context)


def bench_cache(bench: Bench) -> list[dict]:
    """A step of one layer's Expert Cache, by the number of past tokens: mean of 65, of which one merges.

    A cache of n tokens costs little at 64 steps; then one step merges their candidates into a sorted buffer
    of all n, which costs the more the larger n is. The mean is what a token costs. Each cache is as large as
    it must be. A step that looked at all of the past would cost 128 times as much at 16,384 tokens as at 128.
    "ranking anew" is the definition: SeqTopK on all scores so far, at every step.
    """
    size = bench.sized(n_expert=64, k=8, tokens=16384)
    lengths = [n for n in (128, 512, 1024, 4096, 16384) if n <= size.tokens] or [size.tokens]
    batch_sizes = [bench.config.batch_size] if bench.config.batch_size else [1, 16]
    return [row for B in batch_sizes for row in cache_rows(bench, B, lengths, size.n_expert, size.k)]


def cache_rows(bench: Bench, batch_size: int, lengths: list[int], n_expert: int, k: int) -> list[dict]:
    scores = bench.scores(batch_size, max(lengths) + CYCLE, n_expert)
    full, used, base, anew = {}, {}, lengths[0], min(1024, lengths[-1])
    for past in lengths:
        full[past] = ExpertCache(batch_size, past + CYCLE, k, n_expert, device=bench.device)
        full[past].select(scores[:, :past])

    def steps(past: int) -> None:
        for token in range(past, past + CYCLE):
            used[past].select(scores[:, token : token + 1])

    calls = {past: partial(steps, past) for past in lengths}
    calls["anew"] = partial(seqtopk, scores[:, : anew + 1], k)
    times = bench.interleave(calls, 5, lambda past: used.update({past: copy.deepcopy(full.get(past))}))
    times |= {past: [seconds / CYCLE for seconds in times[past]] for past in lengths}
    rows = []
    for past in lengths:
        row = {"what": f"batch {batch_size}, {past} past tokens", "us per step": median(times[past]) * 1e6}
        row[f"time/{base}"] = ratio(times[past], times[base])
        rows.append(row | {"aim": "at most 1.5" if past == 4096 else None})
    row = {"what": f"batch {batch_size}, {anew} past tokens, against ranking anew"}
    row |= {"us per step": median(times["anew"]) * 1e6, "speed/anew": ratio(times["anew"], times[anew])}
    return [*rows, row | {"aim": "at least 25"}]


def bench_peers(bench: Bench) -> list[dict]:
    """The same model under TopK in Hugging Face transformers, as OLMoE: training steps, greedy generation.

    Same shape and tokens, fused AdamW and clipping for both, both wholly in one dtype. They take turns, each
    in a process of its own, so that each has the memory allocator as it sets it. Theirs is spared the
    load-balance and z-losses, which ours computes in every step: transformers leaves them out by default.
    """
    if not importlib.util.find_spec("transformers"):
        print("skipped: transformers is not installed (pip install transformers)")
        return []
    size = bench.sized(batch_size=8, tokens=bench.shape("peers").block_size)
    torch.cuda.empty_cache()  # what earlier parts have left: the processes need it
    peers = {kind: Peer(bench.config, kind) for kind in ("ours", "eager", "grouped_mm")}
    goals = (1.5, 8) if bench.gpu else (1.3, 4)
    works = {"training": size.batch_size * size.tokens, "generation": size.tokens // 2}
    rows = []
    try:
        for (work, tokens), goal in zip(works.items(), goals):
            calls = {kind: partial(peer.do, work) for kind, peer in peers.items()}
            times = bench.interleave(calls, 15, clock=lambda call: call())
            rows += peer_rows(f"{work}, {tokens} tokens", tokens, times, goal)
    finally:
        for peer in peers.values():
            peer.process.terminate()
    return rows


class Peer:
    """A process that trains or generates with one implementation, when it is told to."""

    def __init__(self, config: BenchConfig, kind: str):
        context = multiprocessing.get_context("spawn")
        self.kind, (self.connection, other) = kind, context.Pipe()
        self.process = context.Process(target=serve, args=(other, config, kind), daemon=True)
        self.process.start()
        other.close()

    def do(self, work: str) -> float:
        """Seconds that the work took, once. Raises RuntimeError if it failed, or if the process has ended."""
        try:
            self.connection.send(work)
            said = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(10)
            said = f"its process ended with exit code {self.process.exitcode}"
        if isinstance(said, str):
            raise RuntimeError(f"{self.kind}: {said}")
        return said


def serve(connection, config: BenchConfig, kind: str) -> None:
    """What the process of a Peer does: it says how long each work took, or what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C, the process that started this one ends it
    try:
        works = peer_works(config, kind)
        while True:
            connection.send(works[connection.recv()]())
    except EOFError:  # nobody asks any more
        return
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


def peer_works(config: BenchConfig, kind: str) -> dict[str, Callable[[], float]]:
    """Work -> a function that does it once and tells the seconds."""
    bench = make_bench(config)
    torch.manual_seed(config.seed)
    shape = bench.shape("peers")
    size = bench.sized(batch_size=8, tokens=shape.block_size)
    text = bench.text(shape.vocab_size, size.batch_size, size.tokens + 1)
    works = our_works(bench, shape, text) if kind == "ours" else their_works(bench, shape, text, kind)
    return {name: partial(bench.seconds, work) for name, work in works.items()}


def our_works(bench: Bench, shape: MoEConfig, text: Tensor) -> dict[str, Callable]:
    if not bench.gpu:
        keep_freed_memory()
    model = MoEGPT(shape).to(bench.device).cast(bench.dtype)
    step, n = train_step(model, bench.compiled(model), text, bench.dtype), text.shape[1] // 2
    return {
        "training": partial(step, "topk"),
        "generation": lambda: list(model.generate(text[:1, :n], n, temperature=0)),
    }


def their_works(bench: Bench, shape: MoEConfig, text: Tensor, experts: str) -> dict[str, Callable]:
    model = make_olmoe(shape).to(bench.device, bench.dtype).eval()  # it has no dropout that would train
    model.set_experts_implementation(experts)
    forward, update = bench.compiled(model, fullgraph=False), updater(model)
    prompt = text[:1, : text.shape[1] // 2].contiguous()
    batch = {"input_ids": text[:, :-1], "labels": text[:, :-1], "use_cache": False}
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": prompt.shape[1]}
    return {
        "training": lambda: update(forward(**batch).loss),
        "generation": lambda: model.generate(prompt, do_sample=False, **options),
    }


def make_olmoe(shape: MoEConfig) -> torch.nn.Module:
    """The model of `shape` by transformers."""
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    sizes = {"vocab_size": shape.vocab_size, "hidden_size": shape.n_embd, "intermediate_size": shape.n_hidden}
    sizes |= {"num_hidden_layers": shape.n_layer, "num_attention_heads": shape.n_head}
    sizes |= {"num_experts": shape.n_expert, "num_experts_per_tok": shape.k}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))  # none: text never ends early
    sizes |= {"max_position_embeddings": shape.block_size}
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**sizes, **special))


def peer_rows(what: str, tokens: int, times: dict, goal: float) -> list[dict]:
    rate = {kind: tokens / median(taken) for kind, taken in times.items()}
    rows = [
        {"what": f"{what}, against {kind}", "ours tokens/s": rate["ours"], "theirs": rate[kind]}
        | {"speed/theirs": ratio(times[kind], times["ours"])}
        for kind in ("eager", "grouped_mm")
    ]
    rows[-1]["aim"] = f"at least {goal}"
    return rows


def bench_arithmetic(bench: Bench) -> list[dict]:
    """Problems of data/arithmetic/test.jsonl that a trained run solves, by level (their number of steps).

    Greedy, from KV cache and Expert Cache, many problems at once; exact match with its 95% interval.
    """
    config = bench.config
    model, tokenizer, folder = open_model(bench, "out/arithmetic_seqtopk")
    chosen = test_problems(data.load("arithmetic").folder, config.problems or 300)
    solved = solve_all(bench, model, tokenizer, chosen, config.router)
    run = f"{folder}, router {config.router or ROUTERS[model.config.router].decode}"
    rows = []
    for level in [*sorted({problem["level"] for problem in chosen}), "all"]:
        right, experts = zip(*(s for p, s in zip(chosen, solved) if level in ("all", p["level"])))
        row = {"what": f"level {level}, {run}", "problems": len(right)}
        rows.append(row | {"exact match": wilson(sum(right), len(right)), "experts per token": mean(experts)})
    return rows


def test_problems(folder: Path, per_level: int) -> list[dict]:
    """So many test problems of each level of the arithmetic in a folder, level by level."""
    levels: dict[int, list[dict]] = {}
    for line in (folder / "test.jsonl").read_text().splitlines():
        problem = json.loads(line)
        levels.setdefault(problem["level"], []).append(problem)
    return [problem for level in sorted(levels) for problem in levels[level][:per_level]]


def solve_all(
    bench: Bench, model: MoEGPT, tokenizer: AnyTokenizer, problems: list[dict], router: str | None
) -> list[tuple]:
    """`solve` for any number of problems, a batch at a time."""
    size, solved = bench.sized(batch_size=100).batch_size, []
    for start in tqdm(range(0, len(problems), size), unit="batch", disable=None):
        solved += solve(model, tokenizer, problems[start : start + size], router)
    return solved


def solve(model: MoEGPT, tokenizer: AnyTokenizer, problems: list[dict], router: str | None) -> list[tuple]:
    """Of each problem, whether the likeliest answer is right, and the mean experts per token."""
    prompts = [prompt_of(problem["question"]) for problem in problems]
    room = 32 + max(len(tokenizer.encode(problem["answer"])) for problem in problems)
    answers = answer(model, tokenizer, prompts, room, router)
    return [(is_correct(text, p["result"]), experts) for (text, experts), p in zip(answers, problems)]


def answer(
    model: MoEGPT, tokenizer: AnyTokenizer, prompts: list[str], room: int, router: str | None
) -> list[tuple[str, float]]:
    """Of each prompt, the likeliest continuation, and the mean experts per token of both.

    It ends at end-of-text, after `room` tokens, or some time after the line of its final answer.
    """
    device, pad = model.head.weight.device, partial(pad_sequence, batch_first=True, padding_side="left")
    ids = [torch.tensor(tokenizer.encode(prompt)) for prompt in prompts]
    idx, active = pad(ids).to(device), pad([torch.ones_like(p).bool() for p in ids]).to(device)
    cache = model.new_cache(len(prompts), idx.shape[1] + room, router)
    chunks = []
    for chunk in model.generate(idx, room, cache, temperature=0, stop=tokenizer.eot, active=active):
        chunks.append(chunk)
        if len(chunks) % CHECK_EVERY == 0:
            texts = continuations(tokenizer, chunks)
            if all(FINAL_LINE.search(text) or not alive for text, alive in zip(texts, chunk.active[:, -1])):
                break
    experts, real = (torch.cat([getattr(c, name) for c in chunks], dim=1) for name in ("experts", "active"))
    experts = (experts.float().mean(-1) * real).sum(1) / real.sum(1)
    return list(zip(continuations(tokenizer, chunks), experts.tolist()))


def continuations(tokenizer: AnyTokenizer, chunks: list[Chunk]) -> list[str]:
    """Texts of what was generated after the prompt, which is the first of the chunks."""
    if len(chunks) == 1:
        return [""] * len(chunks[0].tokens)
    tokens, real = (torch.cat([getattr(c, name) for c in chunks[1:]], dim=1) for name in ("tokens", "active"))
    return [tokenizer.decode(row[mask].tolist()) for row, mask in zip(tokens, real)]


def open_model(bench: Bench, run: str) -> tuple[MoEGPT, AnyTokenizer, Path]:
    """The model of init_from, of out_dir or else of `run`, its tokenizer, and the folder of the run.

    A Hugging Face model has no such folder, and gets out/MODEL. A `k` that was given replaces the model's.
    """
    name = bench.config.init_from or bench.config.out_dir or run
    if name == bench.config.init_from and data.is_hugging_face(name):
        tokenizer, model = data.hf_tokenizer(name), MoEGPT.from_pretrained(name, bench.device)
        folder = Path("out") / Path(name).resolve().name
    else:
        path = Path(name)
        path = path / "best.pt" if path.suffix != ".pt" else path
        checkpoint, folder = load_checkpoint(path), path.parent
        tokenizer = data.make_tokenizer(checkpoint.get("tokenizer"))
        model = MoEGPT.from_checkpoint(checkpoint)
    model = model.to(bench.device).cast(bench.dtype).eval()
    return with_k(model, bench.config.k) if bench.config.k else model, tokenizer, folder


def bench_gsm8k(bench: Bench) -> list[dict]:
    """Problems of GSM8K's test set that a fine-tuned run or a Hugging Face model (--init_from) solves.

    Greedy, from KV cache and Expert Cache, many problems at once; exact match of the number after "####" with
    its 95% interval. Fine-tuned models get "Question: ...\\nAnswer:", as in training (data/pairs/prepare.py);
    others want examples: --shots=8 puts the first 8 of the training set before it, with empty lines between.
    Answers are kept in gsm8k-*.jsonl in the folder of the run; a second start does those that are missing.
    """
    config = bench.config
    model, tokenizer, folder = open_model(bench, "out/finetune_olmoe_gsm8k")
    dataset = data.load(config.dataset)
    problems = read_test(dataset.folder / "test.jsonl")[: config.problems]
    before = examples(dataset, config.shots)
    prompts = [before + prompt_of(problem.prompt) for problem in problems]
    router = config.router or ROUTERS[model.config.router].decode
    name = f"gsm8k-{router}-{config.shots}shot-{identity(model, bench.dtype, router, before)}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    done = read_answers(folder / name)
    todo = sorted({p for p in prompts if p not in done}, key=len)  # of like lengths: little padding
    size = bench.sized(batch_size=32).batch_size
    with tqdm(total=len(prompts), initial=len(prompts) - len(todo), unit="problem", disable=None) as bar:
        for start in range(0, len(todo), size):
            some = todo[start : start + size]
            new = dict(zip(some, answer(model, tokenizer, some, ANSWER_TOKENS, router)))
            append_answers(folder / name, new)
            done |= new
            bar.update(len(some))
    texts = (done[prompt][0].partition("\nQuestion:")[0] for prompt in prompts)  # not of the next question
    right = [is_correct(text, result_of(p.answer)) for text, p in zip(texts, problems, strict=True)]
    what = f"{folder}, K={model.config.k}, router {router}, {config.shots} examples"
    row = {"what": what, "problems": len(right)}
    row["exact match"] = wilson(sum(right), len(right))
    return [row | {"experts per token": mean(done[prompt][1] for prompt in prompts)}]


def read_test(path: Path) -> list[Pair]:
    """Problems with their answers. Raises ValueError for an answer without its "#### RESULT"."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: make it with data/gsm8k/prepare.py")
    problems = read_pairs(path, "question", "answer")
    for number, problem in enumerate(problems, start=1):
        found = result_of(problem.answer) is not None
        require(found, f"answer {number} in {path}", "without a result", "one that has #### NUMBER")
    return problems


def examples(dataset: data.Dataset, shots: int) -> str:
    """The first problems of the training set with their answers, each with an empty line after it."""
    ends = (dataset.train == dataset.tokenizer.eot).nonzero()[0][:shots]
    begins = [0, *(ends + 1)]
    texts = (dataset.tokenizer.decode(dataset.train[a:b]) for a, b in zip(begins, ends))
    return "".join(text[text.index("Question:") :] + "\n\n" for text in texts)  # without <s> and the like


def identity(model: MoEGPT, *others: object) -> str:
    """Twelve hex digits that differ where weights, routing or `others` do; of the weights, the small ones."""
    sha = hashlib.sha256(f"{model.config} {others}".encode())
    for tensor in model.state_dict().values():
        if tensor.numel() <= 2**20:
            sha.update(tensor.float().cpu().numpy().tobytes())
    return sha.hexdigest()[:12]


def read_answers(path: Path) -> dict[str, tuple[str, float]]:
    """Prompt -> its continuation, experts per token. A line that a crash cut short is dropped."""
    done = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            done[entry["prompt"]] = entry["text"], entry["experts"]
    return done


def append_answers(path: Path, new: dict[str, tuple[str, float]]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        for prompt, (text, experts) in new.items():
            file.write("\n" + json.dumps({"prompt": prompt, "text": text, "experts": experts}))


def bench_switch(bench: Bench) -> list[dict]:
    """Loss of a model (--init_from) on a text of yours (--text), its router and K changed without any tuning.

    SeqTopK as it trains sees the tokens to come, so its loss is no likelihood of the text; that of online
    SeqTopK, which sees none, is what a user of the model would get.
    """
    config = bench.config
    require(config.text is not None, "text", config.text, "the path of a text: --text=FILE")
    model, tokenizer, folder = open_model(bench, "out/small_topk")
    tokens = np.array(tokenizer.encode(read_text(Path(config.text))))
    size = bench.sized(batch_size=8, tokens=max(1, min(model.config.block_size, 1024, len(tokens) - 1)))
    batches = data.val_batches(tokens, size.tokens, size.batch_size, SWITCH_WINDOWS)
    routers = ("topk", "seqtopk", "online_seqtopk")
    pairs = [(k, router) for k in (8, 4, 2) if k <= model.config.n_expert for router in routers]
    require(bool(model.expert_layers()), "the model", "dense", "one with experts")
    rows = []
    for k, router in tqdm(pairs, unit="row", disable=None):
        found = evaluate_text(with_k(model, k), batches, tokenizer.token_bytes, router)
        sees = "" if ROUTERS[router].causal else " (sees the future)"
        row = {"what": f"{folder.name}, K={k}, {router}{sees}", "nats/token": found["loss"]}
        rows.append(row | {"bits/byte": found["bpb"], "experts per token": found["experts"][0]})
    return rows


def with_k(model: MoEGPT, k: int) -> MoEGPT:
    """The same model, from now on with k experts per token on average, and the default bounds."""
    changed = replace(model.config, k=k, min_experts=1, max_experts=None)
    for module in (model, *model.expert_layers()):
        module.config = changed
    return model


@dataclass(frozen=True)
class Arm:
    """One kind of run in a comparison."""

    name: str
    settings: dict[str, object]  # of train.py, beyond those that all share
    base: str  # name of the arm that it is compared to
    after: "Arm | None" = None  # the arm whose last checkpoint it starts from


def bench_quality(bench: Bench) -> list[dict]:
    """Routers compared by training: same config, data order, initial weights and budget k, several seeds.

    "nats" and "bits/byte" are causal: the loss of JUDGED_TOKENS of validation text (--quick: a quarter) after
    the last iteration, under what decodes, as a user of the model would get it.
    "as trained" is under the router itself, and "leak" what that gains: by seeing the future, and by spending
    all of the budget, of which a strict stand-in leaves some. "to base" is the difference to the first router
    for the same k and seed, with the standard error of its mean over seeds, as is all behind a +-. Load:
    entropy of the experts' shares (1: uniform), variance of share * E (0: uniform), experts without any
    token. "steps/s": the median of the training, without evaluations; "minutes": all of it, by the clock.
    "dense" has no experts, and other initial weights. Runs are kept in out/quality, and what is finished is
    not run again.
    """
    ks = [k.strip() for k in (bench.config.ks or str(k_of(bench))).split(",")]
    for k in ks:
        require(k.isdecimal(), "ks", repr(k), "whole numbers with commas between, such as 8,4,2")
    routers = [name.strip() for name in bench.config.routers.split(",")]
    known = [*ROUTERS, "loss_free", "dense"]
    for name in routers:
        require(name in known, "routers", repr(name), f"of {', '.join(known)}, with commas between")
    return compare(
        bench,
        [
            Arm(f"{router}, k={k}", recipe(bench.config, router, int(k)), f"{routers[0]}, k={k}")
            for k in ks
            for router in routers
        ],
    )


def recipe(config: BenchConfig, router: str, k: int) -> dict[str, object]:
    """Settings of train.py under which a router is what it should be; "loss_free" is TopK with that bias, and
    "dense" a model of equal active compute without experts.

    Losses are its paper's. No z-loss where scores are no softmax: it would move them, not just their logits.
    """
    shared, alone = shared_settings(config), {"balance_coef": 0.0, "z_coef": 0.0}
    warm_up = {"first_router": "expert_choice", "first_iters": max(1, shared["max_iters"] // 10)}
    more = {
        "loss_free": {
            "router": "topk",
            "score_fn": "sigmoid",
            "norm_topk": True,
            "bias_rate": 0.001,
            **alone,
        },
        "dense": {"router": "topk", "n_expert": 1, "k": 1, "dense_hidden": k * shared["n_hidden"]},
        "expert_threshold": {**alone, **warm_up},
        "remoe": alone,
        "null_experts": {"n_null": shared["n_expert"], "balance_coef": 0.02},  # as in arXiv 2601.15370
        # about k experts, where scores are as even as those of config/quality.py
        "top_p": {"mass": min(1.0, 1.6 * k / shared["n_expert"]), "entropy_coef": 1e-4},
    }
    needs = dict(ROUTERS[router].needs) if router in ROUTERS else {}
    return {"router": router, "k": k, **needs, **more.get(router, {})}


def router_arms(routers: list[str], k: int, **settings) -> list[Arm]:
    """An arm for each router with k experts per token, compared to the first."""
    return [
        Arm(f"{router}, k={k}", {"router": router, "k": k, **settings}, f"{routers[0]}, k={k}")
        for router in routers
    ]


Judged = tuple[str, str, dict]  # the name of a row, that of the row it is compared to, and its figures


def judged(bench: Bench, arms: list[Arm], judge: Callable[[Arm, Path], Iterable[Judged]]) -> list[dict]:
    """A row for each name that `judge` gives to some of the runs: means over seeds."""
    runs: dict[str, dict[int, dict]] = {}
    bases = {}
    for arm, seed, folder in trained(bench, arms):
        with bench.autocast():  # as in training
            for name, base, figures in judge(arm, folder):
                runs.setdefault(name, {})[seed] = figures
                bases[name] = base
    return [quality_row(name, found, runs.get(bases[name], {})) for name, found in runs.items()]


def compare(bench: Bench, arms: list[Arm]) -> list[dict]:
    """Train what is not trained yet, seed by seed, and put the figures of each arm into a row.

    Figures are kept with the run, under a name that differs where the code or --problems do.
    """
    made_by = hashlib.sha256(CODE + str(bench.config.problems).encode()).hexdigest()[:8]

    def judge(arm: Arm, folder: Path) -> Iterator[Judged]:
        load_run(folder)  # raises if its data are not those of today
        kept = folder / f"figures-{made_by}.json"
        if not kept.is_file():
            whole = kept.with_suffix(f".{os.getpid()}.tmp")
            whole.write_text(json.dumps(run_figures(bench, folder)))
            whole.replace(kept)
        yield arm.name, arm.base, json.loads(kept.read_text())

    return judged(bench, arms, judge)


def trained(bench: Bench, arms: list[Arm]) -> Iterator[tuple[Arm, int, Path]]:
    """Each arm and seed with the folder of its run, which is trained now if it is not yet; seed by seed.

    Left out, with a line that says so, is what fails and what would begin after the deadline.
    """
    config = bench.config
    shared_settings(config)  # raises for a config that no run could share
    seeds = range(config.seed, config.seed + (config.seeds or (QUICK_SEEDS if config.quick else SEEDS)))
    for seed, arm in tqdm([(seed, arm) for seed in seeds for arm in arms], unit="run", disable=None):
        if all(train_run(bench, run, seed) for run in filter(None, (arm.after, arm))):
            yield arm, seed, run_folder(config, arm, seed)
        else:
            name = f"{arm.name}, seed {seed}"
            tqdm.write(f"missing: {name}")
            if name not in bench.missing:
                bench.missing.append(name)


def shared_settings(config: BenchConfig) -> dict[str, object]:
    """What the config file says, and the defaults of the model.

    Raises ValueError if sizes are missing, and for a dense model.
    """
    settings = asdict(MoEConfig()) | read_file(config.config)
    for key in ("max_iters", "batch_size"):
        require(
            key in settings, f"{key} in {config.config}", "not said", "said there, for the runs to share it"
        )
    n_expert = settings["n_expert"]
    require(n_expert > 1, f"n_expert in {config.config}", n_expert, "at least 2, for routers to choose from")
    return settings


def k_of(bench: Bench) -> int:
    k = shared_settings(bench.config)["k"]
    return bench.config.k or k


def run_settings(config: BenchConfig, arm: Arm, seed: int) -> dict[str, object]:
    """All settings of an arm's run that are not defaults of train.py."""
    settings = read_file(config.config) | arm.settings
    if config.quick:
        settings |= {key: max(1, settings[key] // QUICK) for key in QUICKENED if key in settings}
    where = {key: getattr(config, key) for key in ("device", "dtype", "compile")}
    settings |= {key: value for key, value in where.items() if value != "auto"}
    if arm.after:  # the batches of the first run shall not come again
        start = run_folder(config, arm.after, seed) / "last.pt"
        return settings | {"seed": seed + OTHER_BATCHES, "init_from": start}
    return settings | {"seed": seed}


def run_folder(config: BenchConfig, arm: Arm, seed: int) -> Path:
    """Other settings have another folder: a config that has changed since has runs of its own."""
    settings = run_settings(config, arm, seed)
    digest = hashlib.sha256(str(sorted((key, str(value)) for key, value in settings.items())).encode())
    words = "-".join(f"{key}-{value}" for key, value in sorted(arm.settings.items()))
    return RUNS / f"{Path(config.config).stem}-{words}-seed{seed}-{digest.hexdigest()[:8]}"


def train_run(bench: Bench, arm: Arm, seed: int) -> bool:
    """Do or finish a run of train.py. False if it may not begin, or fails, of which a line says why."""
    folder = run_folder(bench.config, arm, seed)
    finished = folder / "finished"
    if finished.is_file() or time.monotonic() >= bench.deadline:
        return finished.is_file()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "train.txt", "a") as output:
        lock(output)
        if finished.is_file() or time.monotonic() >= bench.deadline:
            return finished.is_file()
        settings = run_settings(bench.config, arm, seed) | {"sample_tokens": 0, "out_dir": folder}
        if (folder / "last.pt").is_file():
            settings["init_from"] = "resume"
        else:
            (folder / "log.jsonl").unlink(missing_ok=True)  # of a start that was cut short
        command = [sys.executable, str(HOME / "train.py"), *map(command_line, settings.items())]
        code = wait_for(command, output)
        if code or not is_whole(folder, settings["max_iters"]):
            tqdm.write(f"{arm.name}, seed {seed} failed: {last_words(folder / 'train.txt')}")
            return False
        (folder / "best.pt").unlink(missing_ok=True)  # large, and nothing here reads it
        finished.touch()
    return True


def lock(file: IO) -> None:
    """Wait until nobody else has a lock on the file. Processes that write to it inherit this one."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        tqdm.write(f"waiting for another process that trains in {Path(file.name).parent}")
        fcntl.flock(file, fcntl.LOCK_EX)


def last_words(path: Path) -> str:
    """The last line that train.py wrote to train.txt, and where there is more."""
    lines = path.read_text().strip().splitlines()
    said = [line for line in lines if not re.fullmatch(SECONDS.format(r"[\d.]+"), line)]
    return f"{' '.join(said[-1:])} (more in {path})"


def is_whole(folder: Path, iterations: int) -> bool:
    """Whether all of a run is in its last checkpoint: a full disk ends no training."""
    try:
        return load_checkpoint(folder / "last.pt")["step"] == iterations
    except ValueError:
        return False


def wait_for(command: list[str], output: IO) -> int:
    """The exit code of a command, with a line of the seconds that it took in `output`.

    After Ctrl-C, which does not reach it from the terminal, it is told to stop and has time to save.
    """
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=output, stderr=output, process_group=0)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    finally:
        print(SECONDS.format(time.monotonic() - start), file=output, flush=True)


def command_line(setting: tuple[str, object]) -> str:
    key, value = setting
    return f"--{key}={str(value).lower() if isinstance(value, bool | None) else value}"


def run_figures(bench: Bench, folder: Path) -> dict[str, object]:
    """What a finished run of train.py has come to: by its last checkpoint and, of its course, by its log."""
    run = open_run(bench, folder)
    router, causal = run.model.config.router, judge_text(run, run.decode)
    as_trained = causal if router == run.decode else judge_text(run, router)
    figures = {"nats": causal["loss"], "bits/byte": causal["bpb"], "as trained": as_trained["loss"]}
    figures["leak"] = causal["loss"] - as_trained["loss"]
    if "experts" in causal:
        figures |= {"experts per token": causal["experts"][0], "load entropy": causal["entropy"]}
        figures |= {"load variance": causal["variance"], "dead": causal["dead"]}
    folder_of_data = run.dataset.folder
    if folder_of_data.name == "arithmetic" and (folder_of_data / "test.jsonl").is_file():
        problems = test_problems(folder_of_data, bench.config.problems or QUALITY_PROBLEMS)
        solved = solve_all(bench, run.model, run.dataset.tokenizer, problems, None)
        figures["exact match"] = mean(right for right, _ in solved)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    evals = [line for line in lines if line["kind"] == "eval"]
    figures["curve"] = {"step": [e["step"] for e in evals], "nats": [e["causal"]["loss"] for e in evals]}
    per_step = [run.settings[k] for k in ("batch_size", "gradient_accumulation_steps", "block_size")]
    rate = median(line["tokens_per_second"] for line in lines if line["kind"] == "train")
    seconds = re.findall(SECONDS.format(r"([\d.]+)"), (folder / "train.txt").read_text())
    return figures | {"steps/s": rate / math.prod(per_step), "minutes": sum(map(float, seconds)) / 60}


def quality_row(name: str, runs: dict[int, dict], base: dict[int, dict]) -> dict:
    """Means over seeds with their standard errors; the difference to base only for seeds that both have."""
    row = {"what": name, "runs": len(runs)}
    both = [seed for seed in runs if seed in base]
    for key in next(iter(runs.values())):
        values = [run[key] for run in runs.values()]
        if key in ("curve", "tokens"):
            curves = [{"seed": seed, **run[key]} for seed, run in runs.items()] if key == "curve" else None
            row |= {"curves": curves} if curves else {"tokens": values[0]}
            continue
        row[key] = mean_and_error(values)
        if key in ("nats", "exact match") and both and runs is not base:
            row[f"{key}, to base"] = mean_and_error([runs[seed][key] - base[seed][key] for seed in both])
    return row


def mean_and_error(values: list[float]) -> list[float]:
    """Mean, and its standard error (None for one value)."""
    return [mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None]


# -------------------- claims: what was trained, looked at ---------------------------------------------------


class Opened(NamedTuple):
    """A finished run."""

    model: MoEGPT
    dataset: data.Dataset
    batches: list[tuple[Tensor, Tensor]]  # of validation windows
    settings: dict  # of train.py

    @property
    def decode(self) -> str:
        return ROUTERS[self.model.config.router].decode


def load_run(folder: Path) -> tuple[dict, data.Dataset]:
    """The last checkpoint of a run, and its dataset. Raises ValueError if that was prepared anew since."""
    checkpoint = load_checkpoint(folder / "last.pt")
    dataset = data.load(checkpoint["train_config"]["dataset"])
    tokenizer = data.make_tokenizer(checkpoint["tokenizer"])
    same = checkpoint["source_sha256"] == dataset.meta["source_sha256"]
    same = same and tokenizer.fingerprint == dataset.tokenizer.fingerprint
    remedy = f"the same: delete {folder} to train it again"
    require(same, f"the data in {dataset.folder}", "other than when a run was trained", remedy)
    return checkpoint, dataset


def open_run(bench: Bench, folder: Path, tokens: int | None = None, **changes) -> Opened:
    """The last checkpoint of a run, some fields of its config changed, to be judged by so many tokens (None:
    JUDGED_TOKENS)."""
    checkpoint, dataset = load_run(folder)
    settings = checkpoint["train_config"] | changes
    model = MoEGPT.from_checkpoint(checkpoint, **changes).to(bench.device).eval()
    tokens = JUDGED_TOKENS // QUICK if bench.config.quick else tokens or JUDGED_TOKENS
    windows = max(1, tokens // settings["block_size"])
    batches = dataset.val_batches(settings["block_size"], settings["batch_size"], windows)
    return Opened(model, dataset, batches, settings)


def judge_text(run: Opened, router: str) -> dict:
    return evaluate_text(run.model, run.batches, run.dataset.tokenizer.token_bytes, router)


def loss_figures(bench: Bench, run: Opened, router: str) -> dict[str, float]:
    found = judge_text(run, router)
    return {"nats": found["loss"], "bits/byte": found["bpb"], "experts per token": found["experts"][0]}


@torch.no_grad()
def by_token(bench: Bench, run: Opened, router: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of the validation windows' tokens: loss and entropy in nats (windows, T), experts (windows, T, L).

    Raises ValueError for a dataset of which only answers are learned.
    """
    whole, name = run.dataset.val_answers is None, run.dataset.folder.name
    require(whole, "dataset", name, "one of which all tokens are learned")
    windows, T = sum(len(x) for x, _ in run.batches), run.batches[0][0].shape[1]
    loss, entropy = torch.empty(2, windows, T)
    experts = torch.empty(windows, T, len(run.model.expert_layers()), dtype=torch.int64)
    end = 0
    for x, y in run.batches:
        logits, _, stats = run.model(x.to(bench.device), router=router)
        log_share = logits.log_softmax(-1)
        start, end = end, end + len(x)
        loss[start:end] = -log_share.gather(-1, y.to(bench.device).unsqueeze(-1)).squeeze(-1)
        entropy[start:end] = -(log_share.exp() * log_share).sum(-1)
        experts[start:end] = stats.experts.movedim(0, -1)
    return loss, entropy, experts


def bench_sparsity(bench: Bench) -> list[dict]:
    """Claim 1: does SeqTopK gain more over TopK the sparser the model is? K = 8, 4, 2 of the same E."""
    return compare(bench, [arm for k in (8, 4, 2) for arm in router_arms(["topk", "seqtopk"], k)])


def bench_finetune(bench: Bench) -> list[dict]:
    """Claim 2: a TopK checkpoint trained on with SeqTopK for 100 iterations (--quick: 25), or with TopK.

    The first rows are the checkpoint itself, decoded under other rules without any training.
    """
    topk = router_arms(["topk"], k_of(bench))[0]
    tuned = tuned_arms(bench, topk, ["topk", "seqtopk", "online_seqtopk"])

    def untuned(arm: Arm, folder: Path) -> Iterator[Judged]:
        run = open_run(bench, folder)
        for router in ("topk", "online_seqtopk"):
            yield f"{topk.name}, then {router}", f"{topk.name}, then topk", loss_figures(bench, run, router)

    return judged(bench, [topk], untuned) + compare(bench, tuned)


def tuned_arms(bench: Bench, first: Arm, routers: list[str]) -> list[Arm]:
    """Runs that go on where those of `first` ended, one for each router, compared to the first of these."""
    k, iterations = k_of(bench), TUNING["max_iters"] // (QUICK if bench.config.quick else 1)
    name = f"{first.name}, {iterations} more of {{}}"
    return [
        Arm(name.format(router), {"router": router, "k": k, **TUNING}, name.format(routers[0]), first)
        for router in routers
    ]


def bench_online(bench: Bench) -> list[dict]:
    """Claim 3: trained globally or online, decoded online; and global first, online for the last tenth.

    Each is compared to TopK, but the last to SeqTopK. "nats" is the loss under online SeqTopK, but TopK's own
    for TopK.
    """
    k, last = k_of(bench), shared_settings(bench.config)["max_iters"] * 9 // 10
    arms = router_arms(["topk", "seqtopk", "online_seqtopk"], k)
    switched = {"router": "online_seqtopk", "k": k, "first_router": "seqtopk", "first_iters": last}
    return compare(bench, [*arms, Arm(f"seqtopk, the last tenth online, k={k}", switched, arms[1].name)])


def bench_bounds(bench: Bench) -> list[dict]:
    """Claim 4: how much do max_experts, min_experts and the strict budget matter?

    Trained and decoded within these bounds; the last row is the first one's runs, decoded without the
    strict budget. Compared to the defaults, min_experts=1 and max_experts=K+2.
    """
    k = k_of(bench)
    base = router_arms(["seqtopk"], k)[0]
    bounds = [{"max_experts": k + extra} for extra in (1, 3, 4)]
    bounds += [{"max_experts": shared_settings(bench.config)["n_expert"]}, {"min_experts": 0}]
    arms = [base] + [vary(base, **bound) for bound in bounds]
    online = replace(router_arms(["online_seqtopk"], k)[0], base=base.name)
    loose = replace(vary(online, strict=False), base=online.name)

    def decoded_loosely(arm: Arm, folder: Path) -> Iterator[Judged]:
        for strict in (True, False):
            run = open_run(bench, folder, strict=strict)
            name = f"{base.name}, decoded with strict={strict}".lower()
            yield name, f"{base.name}, decoded with strict=true", loss_figures(bench, run, run.decode)

    return compare(bench, [*arms, online, loose]) + judged(bench, [base], decoded_loosely)


def vary(arm: Arm, **settings) -> Arm:
    """The arm with other settings, compared to the arm."""
    said = ", ".join(f"{key}={value}".lower() for key, value in settings.items())
    return replace(arm, name=f"{arm.name}, {said}", settings=arm.settings | settings, base=arm.name)


def bench_batches(bench: Bench) -> list[dict]:
    """Claim 5: what does the number of sequences in a batch do to BatchTopK and SeqTopK at evaluation?

    "nats" is the loss under the rule that trained, with a budget that BatchTopK shares among the batch.
    """

    def judge(arm: Arm, folder: Path) -> Iterator[Judged]:
        run = open_run(bench, folder)
        x, y = (torch.cat(parts) for parts in zip(*run.batches))
        for size in (size for size in (1, 4, 16, 64) if size <= len(x)):
            same = run._replace(batches=list(zip(x.split(size), y.split(size))))
            name = "{}, {} sequences".format
            yield name(arm.name, size), name(arm.name, 1), loss_figures(bench, same, arm.settings["router"])
        yield f"{arm.name}, online", f"{arm.name}, 1 sequences", loss_figures(bench, run, run.decode)

    return judged(bench, router_arms(["seqtopk", "batchtopk"], k_of(bench)), judge)


def bench_difficulty(bench: Bench) -> list[dict]:
    """Claim 6: do hard tokens get more experts?

    Spearman's rank correlation, over the tokens of the validation text, of a token's experts (mean over
    layers) with the entropy and with the loss of the prediction made there; then the experts and the loss of
    some kinds of tokens: in arithmetic, of what is read and of what is predicted; in other text, of the
    tokens, read at least 50 times, that get the most and the fewest under each router.
    """
    arms = router_arms(["seqtopk", "online_seqtopk"], k_of(bench))

    def judge(arm: Arm, folder: Path) -> Iterator[Judged]:
        run = open_run(bench, folder)
        loss, entropy, experts = by_token(bench, run, run.decode)
        mean_experts = experts.float().mean(-1)
        figures = {"rho entropy": spearman(mean_experts, entropy), "rho loss": spearman(mean_experts, loss)}
        figures |= {"experts per token": mean_experts.mean().item(), "nats": loss.mean().item()}
        figures["curve"] = experts_by_entropy(mean_experts, entropy)
        yield f"{arm.name}, all tokens", "", figures
        kinds = (problem_parts if run.dataset.folder.name == "arithmetic" else frequent_tokens)(run)
        for kind, chosen in ((kind, chosen) for kind, chosen in kinds.items() if chosen.any()):
            figures = {"tokens": chosen.sum().item(), "experts per token": mean_experts[chosen].mean().item()}
            yield f"{arm.name}, {kind}", "", figures | {"nats": loss[chosen].mean().item()}

    rows = judged(bench, arms, judge)
    whole = [row for row in rows if "rho loss" in row]
    kinds = [row for row in rows if "rho loss" not in row]
    by_arm = ([row for row in kinds if row["what"].startswith(f"{arm.name}, ")] for arm in arms)
    return [*whole, *itertools.chain(*map(extremes, by_arm))]


def extremes(rows: list[dict]) -> list[dict]:
    """Of many rows those with the most experts per token, from the most on, and those with the fewest."""
    if len(rows) <= 2 * EXTREMES:
        return rows
    ranked = sorted(rows, key=lambda row: row["experts per token"][0], reverse=True)
    return ranked[:EXTREMES] + ranked[-EXTREMES:]


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two tensors of one shape, ties with the mean of their ranks; 0 if all tie."""
    ranks = []
    for values in (a, b):
        _, place, count = values.flatten().unique(return_inverse=True, return_counts=True)
        ranks.append((count.cumsum(0) - (count - 1) / 2)[place])
    return torch.corrcoef(torch.stack(ranks).double())[0, 1].nan_to_num().item()


def experts_by_entropy(experts: Tensor, entropy: Tensor) -> dict[str, list[float]]:
    """Their means in twenty equal shares of the tokens, by entropy. experts, entropy (windows, T)."""
    order = entropy.flatten().argsort()
    shares = {"entropy": entropy, "experts": experts}
    return {name: [part.mean().item() for part in x.flatten()[order].chunk(20)] for name, x in shares.items()}


def by_position(values: Tensor) -> dict[str, list[float]]:
    """Means of values (T,) over the first 4 positions, those up to 8, up to 16 ...; none beyond the last."""
    cuts = [0, *(2**i for i in range(2, 20) if 2**i <= len(values))]
    parts = [values[start:end].mean().item() for start, end in pairwise(cuts)]
    return {"position": cuts[1:], "gap": parts}


def problem_parts(run: Opened) -> dict[str, Tensor]:
    """Which tokens (windows, T) of arithmetic are of some kind themselves, and which precede one that is."""
    windows = torch.cat([x for x, _ in run.batches]).tolist()
    tokenizer = run.dataset.tokenizer
    pieces = {token: tokenizer.decode([token]) for token in set(itertools.chain(*windows))}
    pieces[tokenizer.eot] = ""  # no text: the next problem begins a line
    kinds = np.array([kinds_of_text([pieces[token] for token in window]) for window in windows])
    masks = {}
    for kind in KINDS:
        read = torch.from_numpy(kinds == kind)  # (windows, T)
        masks[f"{kind}, read"] = read
        masks[f"{kind}, predicted"] = F.pad(read[:, 1:], (0, 1))
    return masks


def kinds_of_text(pieces: list[str]) -> list[str]:
    """The kind of each of a text's tokens: one of KINDS, "" if empty or in a first line without its start."""
    text, place, kinds = "".join(pieces), 0, []
    for piece in pieces:
        at = place + len(piece) - len(piece.lstrip(" "))
        start = text.rfind("\n", 0, at) + 1
        known = piece and (start or text.startswith(("Question:", "Answer:")))
        kinds.append(kind_of_character(text[start:], at - start) if known else "")
        place += len(piece)
    return kinds


KINDS = ("words of the question", "numbers of the question", "words of the answer")
KINDS += ("copied numbers", "results", "final result")


def kind_of_character(line: str, at: int) -> str:
    """The kind of the character at `at`, in a text that begins with its line."""
    digit = line[at : at + 1].isdigit()
    if line.startswith("Question"):
        return KINDS[1 if digit else 0]
    if not digit:
        return KINDS[2]
    return KINDS[5] if line.startswith("#") else KINDS[4] if "=" in line[:at] else KINDS[3]


def frequent_tokens(run: Opened) -> dict[str, Tensor]:
    """Which tokens (windows, T) are each of those that occur at least 50 times."""
    x = torch.cat([x for x, _ in run.batches])
    tokens, count = x.unique(return_counts=True)
    decode = run.dataset.tokenizer.decode
    return {f"{decode([i])!r}, read": x == i for i in tokens[count >= 50].tolist()}


def bench_length(bench: Bench) -> list[dict]:
    """Claim 7: how does the gap between global and online routing change with length and position?

    Trained with SeqTopK on sequences of 256, 1024 and 2048 tokens, the same number of tokens. "gap": the loss
    under online SeqTopK less that under SeqTopK, of the same weights and tokens.
    """
    k, shared = k_of(bench), shared_settings(bench.config)
    arms = [replace(router_arms(["seqtopk"], k, **longer(shared, T))[0], name=f"T={T}") for T in LENGTHS]

    def judge(arm: Arm, folder: Path) -> Iterator[Judged]:
        run = open_run(bench, folder, tokens=sys.maxsize)  # all of the text, for each T to have the same
        online, globally = (by_token(bench, run, router)[0] for router in ("online_seqtopk", "seqtopk"))
        gap = online - globally  # (windows, T)
        T = gap.shape[1]
        figures = {"nats": online.mean().item(), "gap": gap.mean().item()}
        figures["curve"] = by_position(gap.mean(0))
        yield f"T={T}", "", figures
        for start, end in pairwise(place for place in (0, *PLACES) if place <= T):
            figures = {"nats": online[:, start:end].mean().item(), "gap": gap[:, start:end].mean().item()}
            yield f"T={T}, tokens {start + 1} to {end}", "", figures

    return judged(bench, arms, judge)


def longer(shared: dict, T: int) -> dict[str, int]:
    """Settings for sequences of T tokens in place of those that are shared, and as many tokens in all."""
    if shared["block_size"] == T:
        return {}
    per_step = shared["batch_size"] * shared["block_size"]
    batch_size = max(1, per_step // T)
    max_iters = shared["max_iters"] * per_step // (batch_size * T)
    size = {"block_size": T, "batch_size": batch_size, "max_iters": max_iters}
    return size | {"eval_interval": max_iters}  # the validation windows are longer as well


def bench_long(bench: Bench) -> list[dict]:
    """Claim 8: in texts of four times the training context, what becomes of experts per token and budget?

    The caches hold all of the text, so that no window begins anew. "experts per token" of each quarter;
    "spent", the share of the budget of all tokens so far, at its end. Positions beyond the first quarter are
    new to the model: its text gets worse there, and the text of the validation data stays what it is.
    """
    arms = router_arms(["seqtopk", "online_seqtopk"], k_of(bench))

    def judge(arm: Arm, folder: Path) -> Iterator[Judged]:
        for strict, kind in itertools.product((True, False), ("written", "read")):
            run = open_run(bench, folder, strict=strict)
            experts = (generated_experts if kind == "written" else read_experts)(bench, run)
            quarters = experts.cpu().unflatten(1, (4, -1)).mean((0, 2, 3))  # (4,)
            spent = quarters.cumsum(0) / torch.arange(1, 5) / run.model.config.k
            for i in range(4):
                name = f"{arm.name}, {'' if strict else 'not '}strict, {kind}, quarter {i + 1}"
                yield name, "", {"experts per token": quarters[i].item(), "spent": spent[i].item()}

    return judged(bench, arms, judge)


def generated_experts(bench: Bench, run: Opened) -> Tensor:
    """Experts (16, T, L) of each token of 16 texts that the model writes, T = 4 * block_size."""
    model, T = run.model, 4 * run.model.config.block_size
    idx = torch.full((16, 1), run.dataset.tokenizer.eot, device=bench.device)
    generator = torch.Generator(bench.device).manual_seed(bench.config.seed)
    chunks = model.generate(idx, T - 1, model.new_cache(16, T), generator=generator)
    return torch.cat([chunk.experts for chunk in chunks], dim=1).float()


@torch.no_grad()
def read_experts(bench: Bench, run: Opened) -> Tensor:
    """Experts (16, T, L) of each token of 16 windows of the validation text, T = 4 * block_size."""
    T = 4 * run.model.config.block_size
    x = torch.cat([x for x, _ in run.dataset.val_batches(T, 16, 16)]).to(bench.device)
    return run.model(x, cache=run.model.new_cache(len(x), T))[2].experts.movedim(0, -1).float()


def bench_shared(bench: Bench) -> list[dict]:
    """Claim 9: is SeqTopK's gain smaller beside a shared expert, which every token gets on top of its K?"""
    k, hidden = k_of(bench), shared_settings(bench.config)["n_hidden"]
    plain = router_arms(["topk", "seqtopk"], k)
    beside = [vary(arm, shared_hidden=hidden) for arm in plain]
    beside = [replace(arm, base=beside[0].name) for arm in beside]
    return compare(bench, plain + beside)


def bench_gap(bench: Bench) -> list[dict]:
    """Claim 10: can the gap between global training and online decoding be closed?

    "gap" is the loss less that under SeqTopK of the same weights. With a prior of n0 tokens a text begins
    as if after n0 usual ones: quantiles of the scores that the trained model gives to training text. n0=0 is
    online SeqTopK, and the largest n0 all but a fixed threshold. The last rows had more iterations.
    """
    seqtopk = router_arms(["seqtopk"], k_of(bench))[0]
    tuned = tuned_arms(bench, seqtopk, ["seqtopk", "online_seqtopk"])

    def judge(arm: Arm, folder: Path) -> Iterator[Judged]:
        run = open_run(bench, folder)
        globally = loss_figures(bench, run, "seqtopk")["nats"]
        scores = usual_scores(bench, run)
        for n in PRIORS:
            for layer, found in zip(run.model.expert_layers(), scores, strict=True):
                bounds = layer.config.min_experts, layer.config.max_experts
                layer.prior = pseudo_candidates(found, layer.config.k, n, *bounds)
            figures = loss_figures(bench, run, "online_seqtopk")
            figures["gap"] = figures["nats"] - globally
            yield f"{arm.name}, n0={n}", f"{arm.name}, n0=0", figures

    return judged(bench, [seqtopk], judge) + compare(bench, tuned)


def usual_text(bench: Bench, run: Opened) -> tuple[Tensor, ...]:
    """Batches of the training text, which tell how a trained model routes: (batch_size, T) each."""
    size, T = run.batches[0][0].shape
    return run.dataset.train_batch(0, USUAL_TOKENS // T, T, bench.config.seed)[0].to(bench.device).split(size)


@torch.no_grad()
def usual_scores(bench: Bench, run: Opened) -> list[Tensor]:
    """Of each layer with experts, the scores that select, (n, T, E), for usual_text."""
    found = [run.model(x)[2].routing for x in usual_text(bench, run)]
    layers = zip(run.model.expert_layers(), zip(*found), strict=True)
    return [torch.cat([routing.scores for routing in seen]) + layer.bias for layer, seen in layers]


def bench_discount(bench: Bench) -> list[dict]:
    """Claim 11: a rule without a bound set by hand, against fixed bounds.

    seqtopk_discount divides a token's scores by their rank, so that many experts are dear, and has no bound.
    """
    k = k_of(bench)
    base = router_arms(["seqtopk"], k)[0]
    bounds = [k + 1, k + 3, k + 4, shared_settings(bench.config)["n_expert"]]
    rule = replace(router_arms(["seqtopk_discount"], k)[0], base=base.name)
    return compare(bench, [base, *(vary(base, max_experts=bound) for bound in bounds), rule])


def bench_prune(bench: Bench) -> list[dict]:
    """Claim 12: the least used quarter of each layer's experts is dropped after training.

    Used: in the training text, under the rule that decodes. "nats" is compared to the whole model's.
    """

    def judge(arm: Arm, folder: Path) -> Iterator[Judged]:
        run = open_run(bench, folder)
        yield arm.name, arm.name, loss_figures(bench, run, run.decode)
        pruned = run._replace(model=without_least_used(bench, run))
        yield f"{arm.name}, a quarter dropped", arm.name, loss_figures(bench, pruned, run.decode)

    kept_experts(shared_settings(bench.config)["n_expert"], 8)  # now, and not when the minutes are spent
    return judged(bench, [arm for k in (8, 2) for arm in router_arms(["topk", "seqtopk"], k)], judge)


def kept_experts(n_expert: int, k: int) -> int:
    """How many experts are left when a quarter is dropped. Raises ValueError if these are fewer than k."""
    kept = n_expert * 3 // 4
    require(k <= kept, "k", k, f"at most {kept}, the experts that are kept of {n_expert}")
    return kept


@torch.no_grad()
def without_least_used(bench: Bench, run: Opened) -> MoEGPT:
    """The model with the three quarters of each layer's experts that most tokens go to.

    A score stays the share that it was among all experts: without the dropped ones in it, every weight would
    grow. Raises ValueError if fewer than k experts are kept.
    """
    model = copy.deepcopy(run.model)
    kept = kept_experts(model.config.n_expert, model.config.k)
    load = sum(model(x, router=run.decode)[2].load for x in usual_text(bench, run))  # (L, E)
    for layer, pairs in zip(model.expert_layers(), load, strict=True):
        layer.bias[pairs.argsort(descending=True, stable=True)[kept:]] = -torch.inf  # never chosen
    return model


def wilson(right: int, n: int, z: float = 1.96) -> list[float]:
    """The share that is right, and its 95% interval (E. B. Wilson, 1927)."""
    share, scale = right / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [share, max(0.0, middle - half), min(1.0, middle + half)]


ON_REQUEST = {  # they need a model, or an hour
    "arithmetic": bench_arithmetic,
    "gsm8k": bench_gsm8k,
    "switch": bench_switch,
    "quality": bench_quality,
    "sparsity": bench_sparsity,
    "finetune": bench_finetune,
    "online": bench_online,
    "bounds": bench_bounds,
    "batches": bench_batches,
    "difficulty": bench_difficulty,
    "length": bench_length,
    "long": bench_long,
    "shared": bench_shared,
    "gap": bench_gap,
    "discount": bench_discount,
    "prune": bench_prune,
}
PARTS = {
    "router": bench_router,
    "layer": bench_layer,
    "train": bench_train,
    "decode": bench_decode,
    "cache": bench_cache,
    "peers": bench_peers,
    **ON_REQUEST,
}


# -------------------- showing and keeping -----------------------------------------------------------------


def is_ratio(key: str) -> bool:
    return key.startswith(("time/", "speed/", "bytes/"))


def cell(value: object, signed: bool = False) -> str:
    """A median with its quartiles, a mean with its error, a number or a word, for people."""
    if isinstance(value, list) and len(value) == 2:
        middle, error = value
        exact = middle % 1 == 0 and not error
        decimals = 0 if exact else max(0, 5 - len(f"{abs(middle) // 1:.0f}"))  # five digits, as kept
        if error:
            decimals = max(decimals, min(5, math.ceil(-math.log10(error))))  # a small error is no 0
        text = f"{middle:{'+' * signed},.{decimals}f}"
        return text if exact or error is None else f"{text} +-{error:,.{decimals}f}"
    if isinstance(value, list):
        return "{:.4g} ({:.4g}-{:.4g})".format(*value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else str(value)


def lines_of(rows: list[dict]) -> list[list[str]]:
    """Head and body of a table of the keys that have a value in some row."""
    keys = dict.fromkeys(key for row in rows for key in row if row[key] is not None and key != "curves")
    return [list(keys)] + [[cell(row.get(key), key.endswith("to base")) for key in keys] for row in rows]


def show(rows: list[dict]) -> None:
    lines = lines_of(rows)
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *others in lines:
        print("  ".join([first.ljust(widths[0]), *(t.rjust(w) for t, w in zip(others, widths[1:]))]))


def markdown(lines: list[list[str]]) -> str:
    """The table whose first line is the head."""
    head, *body = [[text.replace("|", r"\|") for text in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body])


def describe(bench: Bench, argv: list[str]) -> dict:
    """Where the figures come from."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if importlib.util.find_spec("transformers"):
        versions["transformers"] = importlib.metadata.version("transformers")
    try:
        git = ["git", "-C", str(HOME), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "command": " ".join(["python bench.py", *argv]),
        "machine": bench.machine,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "compile": bench.compile,
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),  # of other work, at the start: with any, expect noise
        "versions": versions,
        "commit": commit,
        "seed": bench.config.seed,
    }


def rounded(value: object) -> object:
    """The same, its floats cut to five digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def draw(report: dict, path: str) -> None:
    """The ratios with their quartiles, one line each."""
    from matplotlib.figure import Figure

    rows = [(part, row) for part, rows in report["parts"].items() for row in rows]
    keys = [(f"{part}: {row['what']}: {key}", row[key]) for part, row in rows for key in row if is_ratio(key)]
    marks = [(label, value) for label, value in keys if isinstance(value, list)]
    figure = Figure(figsize=(11, 1 + 0.2 * len(marks)), layout="constrained")
    axes = figure.add_subplot(title=f"{report['machine']}, {report['dtype']}", xscale="log")
    for height, (_, (middle, low, high)) in enumerate(marks):
        axes.plot([low, high], [-height, -height], color="tab:blue")
        axes.plot(middle, -height, "o", color="tab:blue", markersize=4)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks([-height for height in range(len(marks))], [label for label, _ in marks], fontsize=7)
    figure.savefig(path)


def read_report(path: Path) -> dict:
    """What --json kept. Raises ValueError for a file that is none of those."""
    try:
        report = json.loads(path.read_text())
        return {**report, "parts": {**report["parts"]}}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} holds no results: measure again, or delete it") from None


def reports(folder: Path) -> dict[str, dict]:
    return {path.stem: read_report(path) for path in sorted(folder.glob("*.json"))}


def readme_table(folder: Path) -> str:
    """Markdown: what was aimed at, and what each machine in `folder` gave. Raises ValueError if none did."""
    table: dict[tuple, dict[str, str]] = {}
    for stem, report in reports(folder).items():
        machine = f"{stem} ({report['machine']}, {report['dtype']})"
        for part, row in ((part, row) for part, rows in report["parts"].items() for row in rows):
            key = next(filter(is_ratio, row), None)
            if key and (row.get("aim") or row.get("paper")):
                line = (f"`{part}`", row["what"], key, cell(row.get("aim")), cell(row.get("paper")))
                table.setdefault(line, {})[machine] = cell(row[key])
    require(bool(table), f"{folder}", "without speeds", "filled: python bench.py --json=results/NAME.json")
    machines = list(dict.fromkeys(machine for found in table.values() for machine in found))
    head = ["`python bench.py`", "of what", "ratio", "aim", "paper", *machines]
    body = [[*line, *(found.get(machine, "-") for machine in machines)] for line, found in table.items()]
    return markdown([head, *body])


def report_tables(path: Path) -> str:
    """Markdown: each part of a file, with where its rows come from. Raises ValueError if it has none."""
    report = read_report(path)
    source = "`{command}`, {machine}, {dtype}, commit {commit}".format(**report)
    tables = [f"**{part}**: {source}\n\n{rows_table(rows)}" for part, rows in report["parts"].items() if rows]
    require(bool(tables), f"{path}", "without rows", "filled: python bench.py PART --json=results/NAME.json")
    return "\n\n".join(tables)


def rows_table(rows: list[dict]) -> str:
    """Markdown of what `show` prints. Names are code: some are of tokens, such as '**' or '`'."""
    head, *body = lines_of(rows)
    fences = ["```" if "`" in name else "`" for name, *_ in body]
    named = [[fence + name + fence, *texts] for fence, (name, *texts) in zip(fences, body)]
    return markdown([head, *named]).replace(" +-", " ± ")


def require_matplotlib(name: str) -> None:
    if not importlib.util.find_spec("matplotlib"):
        raise ValueError(f"{name} needs matplotlib, which is not installed: pip install matplotlib")


def save_figures(folder: Path) -> Iterator[str]:
    """Draw FIGURES into `folder` from the results there: for each a line that says what became of it."""
    require_matplotlib("figures")
    import matplotlib
    from matplotlib.figure import Figure

    found = reports(folder)
    for name, (parts, draw_onto) in FIGURES.items():
        part = next((part for part in parts if curve_rows(found, part)), None)
        if part is None:
            yield f"{name} is left out; first: python bench.py {parts[0]} --json=results/NAME.json"
            continue
        rows = curve_rows(found, part)
        with matplotlib.rc_context(LOOK):
            figure = Figure(layout="constrained")
            draw_onto(figure, rows)
            figure.savefig(folder / name, metadata={"Date": None, "Creator": None})
        yield f"{name}: {part}, from {', '.join(dict.fromkeys(stem for stem, _ in rows))}"


def curve_rows(found: dict[str, dict], part: str) -> list[tuple[str, dict]]:
    """The rows of a part that have curves, each with the stem of its file."""
    rows = [(stem, row) for stem, report in found.items() for row in report["parts"].get(part, [])]
    return [(stem, row) for stem, row in rows if row.get("curves")]


def draw_curves(figure: "Figure", found: list[tuple[str, dict]]) -> None:
    """For each file and k the losses, and beside them the differences to the first router."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for stem, row in found:
        groups.setdefault((stem, row["what"].rpartition(", ")[2]), []).append(row)
    routers = list(dict.fromkeys(router_of(row) for _, row in found))  # each has one colour in all panels
    figure.set_size_inches(11, 3.6 * len(groups))
    for (titles, rows), panels in zip(groups.items(), figure.subplots(len(groups), 2, squeeze=False)):
        draw_routers(*panels, rows, routers)
        panels[0].set_title(", ".join(titles))


def router_of(row: dict) -> str:
    return row["what"].rpartition(", ")[0]


def draw_routers(losses: "Axes", differences: "Axes", rows: list[dict], routers: list[str]) -> None:
    """Losses, and differences paired by seed: none for a row that has not the seeds of the first."""
    steps = rows[0]["curves"][0]["step"][1:]  # before the first step all are alike
    base = np.array([curve["nats"][1:] for curve in rows[0]["curves"]])  # (seeds, n)
    for row in rows:
        nats = np.array([curve["nats"][1:] for curve in row["curves"]])
        label, place = router_of(row), routers.index(router_of(row))
        draw_band(losses, place, steps, nats, label)
        paired = nats - base if seeds_of(row) == seeds_of(rows[0]) else nats[:0]
        if "nats, to base" in row:
            middle, error = row["nats, to base"]
            label += f" {middle:+.3f}" + (f" ± {error:.3f}" if error is not None else "")
        draw_band(differences, place, steps, paired, label)
    bottom, top = differences.get_ylim()
    differences.set_ylim(max(bottom, -NEAR), min(top, NEAR))
    losses.set(xlabel="training step", ylabel="causal validation loss (nats per token)")
    differences.set(xlabel="training step", ylabel=f"difference to {rows[0]['what']}, same seed (nats)")
    put_legend(differences, "number: that of the table, after the last step")


def seeds_of(row: dict) -> list[int]:
    return [curve["seed"] for curve in row["curves"]]


def draw_lines(x: str, y: str, figure: "Figure", found: list[tuple[str, dict]]) -> None:
    """A panel for each file, with a line for each row: its curves' y against their x, two of AXES."""
    from matplotlib.ticker import LogFormatter

    files: dict[str, list[dict]] = {}
    for stem, row in found:
        files.setdefault(stem, []).append(row)
    figure.set_size_inches(2 + 6 * len(files), 3.8)
    panels = figure.subplots(1, len(files), squeeze=False, sharey=True, subplot_kw={"xscale": "log"})[0]
    for panel, (stem, rows) in zip(panels, files.items()):
        panel.set(title=stem, xlabel=AXES[x])
        for place, row in enumerate(rows):
            across, up = (np.array([curve[key] for curve in row["curves"]]) for key in (x, y))
            draw_band(panel, place, across.mean(0), up, row["what"].removesuffix(", all tokens"))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(LogFormatter())
        put_legend(panel)
    panels[0].set_ylabel(AXES[y])


def draw_band(axes: "Axes", place: int, x: Iterable[float], seeds: np.ndarray, label: str) -> None:
    """A panel's line number `place`: the mean of seeds (runs, n) against x (n,), and its standard error."""
    stroke, colour = STYLES[place % len(STYLES)]
    points = [(at, *mean_and_error(values)) for at, values in zip(x, seeds.T.tolist()) if values]
    at, middle, error = np.array(points, dtype=float).reshape(-1, 3).T  # of one run, the error is nan
    axes.plot(at, middle, linestyle=stroke, marker=".", color=colour, label=label)
    axes.fill_between(at, middle - error, middle + error, color=colour, alpha=0.2, linewidth=0)


def put_legend(axes: "Axes", *more: str) -> None:
    """Beside the panel, where it hides no line."""
    title = "\n".join(["line: mean over seeds", "band: its standard error", *more])
    axes.legend(title=title, loc="upper left", alignment="left", bbox_to_anchor=(1, 1))


AXES = {
    "entropy": "entropy of the prediction (nats; a point: 1/20 of the tokens)",
    "experts": "experts per token",
    "position": "position (a point: the mean of the tokens since the point before)",
    "gap": "online loss less global loss (nats)",
}
FIGURES = {  # the parts that each may be drawn from, of which the first that has curves is taken; and how
    "curves.svg": (("quality", "online", "sparsity"), draw_curves),
    "experts_by_entropy.svg": (("difficulty",), partial(draw_lines, "entropy", "experts")),
    "gap_by_position.svg": (("length",), partial(draw_lines, "position", "gap")),
}


# -------------------- from the command line ---------------------------------------------------------------


def read_command(argv: list[str]) -> tuple[list[str], BenchConfig]:
    """The parts to run, and the settings. Raises ValueError or OSError for what cannot be done."""
    named, options = (argv[:1], argv[1:]) if argv and not argv[0].startswith("-") else ([], argv)
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        print(
            "\n".join(f"  {name:10}  {inspect.getdoc(part).splitlines()[0]}" for name, part in PARTS.items())
        )
    for name in named:
        require(name in PARTS, "the part", name, f"one of {', '.join(PARTS)}, table or figures")
    given = parse(options, BenchConfig)[0]
    for key in {"routers", "ks"} & given.keys():
        require(named == ["quality"], key, given[key], "left out: only `python bench.py quality` takes it")
    config = BenchConfig(**given)
    if config.plot:
        require_matplotlib("plot")
    for path in filter(None, (config.json, config.plot)):  # now, and not when the minutes are spent
        check_writable(Path(path))
    return named or [name for name in PARTS if name not in ON_REQUEST], config


def check_writable(path: Path) -> None:
    """Raises OSError. A file that is new goes again: `table` and `figures` would find no results in it."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    open(path, "a").close()
    if new:
        path.unlink()


def run_part(name: str, bench: Bench) -> list[dict]:
    """Explain, measure and print one part."""
    print(f"\n--- {name}: {inspect.getdoc(PARTS[name])}\n", flush=True)
    torch.manual_seed(bench.config.seed)
    start = time.perf_counter()
    if bench.config.budget is not None:
        bench = replace(bench, deadline=time.monotonic() + 60 * bench.config.budget)
    rows = rounded(PARTS[name](bench))
    if rows:
        show(rows)
    print(f"({time.perf_counter() - start:.0f} s)", flush=True)
    return rows


def main(argv: list[str]) -> None:
    """Do what is asked for. Raises ValueError or OSError for bad input."""
    if argv[:1] == ["table"]:
        return print("\n\n".join(map(report_tables, map(Path, argv[1:]))) or readme_table(RESULTS))
    if argv == ["figures"]:
        return print(*save_figures(RESULTS), sep="\n")
    names, config = read_command(argv)
    bench = make_bench(config)
    if not bench.gpu:
        keep_freed_memory()
    report = describe(bench, argv)
    print(", ".join(f"{key} {report[key]}" for key in ("machine", "dtype", "compile", "versions", "load")))
    report |= {"parts": {}, "failed": [], "missing": bench.missing}
    for name in names:
        try:
            report["parts"][name] = run_part(name, bench)
        except (RuntimeError, ValueError) as error:  # too little memory, say; other parts may still do
            if isinstance(error, ValueError) and names == [name]:
                raise
            print(f"{name} failed: {error}")
            report["failed"].append(name)
        except KeyboardInterrupt:  # what has been measured is kept
            print(f"{name} was stopped")
            report["failed"].append(name)
            break
    if config.json and any(report["parts"].values()):
        Path(config.json).write_text(json.dumps(report, indent=1) + "\n")
    elif config.json:
        print(f"{config.json} is left as it was: there is no row for it")
    if config.plot:
        draw(report, config.plot)
    print("\n" + json.dumps(report))
    sys.exit(bool(report["failed"] or report["missing"]))


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: what trains for this shall stop and save
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    with bad_input_exits():
        main(sys.argv[1:])
