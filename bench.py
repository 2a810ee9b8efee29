"""How fast this code is, and what SeqTopK costs: time and memory. Which router is better: experiments/.

    python bench.py                                      every part, in minutes
    python bench.py decode --shape=heavy --batch_size=1  one part; --help lists the parts and the keys
    python bench.py --json=experiments/results/laptop.json
    python bench.py table                                the table of cost.md, from experiments/results
    torchrun --standalone --nproc_per_node=8 bench.py train   several GPUs, and what they lose by waiting

What is compared takes turns, A B A B ..., so that what slows the machine for a while slows both. A ratio is
the median over these pairs, with its quartiles. `time/x` is the time as a multiple of x's, so less is better;
`speed/x` is its inverse. Every run ends with one line of JSON, which --json keeps.
"""

import copy
import importlib.util
import inspect
import math
import multiprocessing
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from itertools import islice, product
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.optim import Optimizer

import distributed
from config import bad_input_exits, read_file, require, results
from config.device import (
    as_graph,
    give_back_freed_memory,
    keep_freed_memory,
    pick_compile,
    pick_compiled_decoding,
)
from model import MLP, Cache, Context, MoE, MoEConfig, MoEGPT
from optimizers import make_optimizers
from router import BOUNDED, ROUTERS, ExpertCache, online_seqtopk, seqtopk
from train import TrainConfig

MIN_ROUNDS, MAX_ROUNDS = 5, 200
CYCLE = ExpertCache.RECENT + 1  # so many steps of an Expert Cache merge its buffers once
INIT_STD = 0.02  # of the model's random weights
GGUF_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
OLMOE = MoEConfig(
    50304,
    4096,
    n_layer=16,
    n_head=16,
    n_embd=2048,
    n_hidden=1024,
    n_expert=64,
    k=8,
    qk_norm="full",
    norm_best=0,
)
SHAPES = {  # besides those of config/NAME_topk.py
    "heavy": {"n_layer": 4, "n_head": 8, "n_embd": 1024, "n_hidden": 512, "n_expert": 64, "k": 8}
    | {"block_size": 4096, "vocab_size": 512},
    "peers": {"n_embd": 256, "n_hidden": 680, "qk_norm": "full", "norm_best": 0},
    "olmoe": asdict(OLMOE),
}
# FLOP/s in half precision without sparsity, from the vendor's data sheets
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


@dataclass(frozen=True)
class BenchOptions(results.Options):
    """What to measure. A size that is not given suits the part and the machine."""

    shape: str | None = None  # train and decode: heavy, olmoe, or the NAME of a config/NAME_topk.py
    batch_size: int | None = None  # sequences in a batch
    tokens: int | None = None  # tokens in a sequence; in decode and cache, those that came before
    vocab_size: int | None = None  # tokens in the vocabulary
    n_layer: int | None = None  # transformer blocks
    n_head: int | None = None  # attention heads
    n_embd: int | None = None  # model width
    n_hidden: int | None = None  # hidden width of one expert
    n_expert: int | None = None  # experts per layer
    k: int | None = None  # experts per token on average
    effort: float = 1.0  # 2 measures twice as long, 0 for five rounds
    compile: str = "auto"  # torch.compile in layer, train, decode and peers: auto, true or false


class Bench(results.Machine):
    """A machine, what it computes in a measurement, and the clock."""

    def sized(self, **sizes: int) -> SimpleNamespace:
        """These sizes, except where the options give others."""
        return SimpleNamespace(**{name: getattr(self.config, name) or size for name, size in sizes.items()})

    def shape(self, name: str) -> MoEConfig:
        """The architecture of that name, with the options' sizes. Raises ValueError for other names."""
        path = results.HOME / "config" / f"{name}_topk.py"
        known = name in SHAPES or path.is_file()
        require(known, "shape", name, f"{', '.join(SHAPES)}, or the NAME of a config/NAME_topk.py")
        settings = {"vocab_size": 4096, **(SHAPES.get(name) or read_file(path))}
        settings |= {key: value for key, value in vars(self.config).items() if value}
        keys = {field.name for field in fields(MoEConfig)}
        return MoEConfig(**{key: value for key, value in settings.items() if key in keys})

    @property
    def compile(self) -> bool:
        return pick_compile(self.config.compile, self.device, self.dtype)[0]

    @property
    def compiles_decoding(self) -> bool:
        return pick_compiled_decoding(self.config.compile, 10**9, self.device, self.dtype)[0]

    def compiled(self, function: Callable) -> Callable:
        return as_graph(function, fullgraph=True) if self.compile else function

    def text(self, vocab_size: int, batch_size: int, tokens: int) -> Tensor:
        """Token ids (batch_size, tokens), as uneven as words (Zipf's law): so is then the experts' load."""
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
        self,
        calls: dict,
        seconds: float,
        before: Callable | None = None,
        clock: Callable | None = None,
        in_a_row: int = 1,
    ) -> dict:
        """Name -> seconds that the call took in each round A B A B ..., until `seconds` are over.

        A warm-up comes first. before(name), not timed, prepares each call; clock(call) makes it and returns
        its seconds (None: self.seconds). in_a_row: so many calls are timed together; the time is their mean.
        """
        times = {name: [] for name in calls}
        warm_up = 3 if self.gpu else 1
        for done in range(-warm_up, MAX_ROUNDS):
            if done == 0:
                end = time.perf_counter() + seconds * self.config.effort
            if done >= MIN_ROUNDS and distributed.anyone(time.perf_counter() > end):
                break
            for name, call in calls.items():
                if before:
                    before(name)
                several = call if in_a_row == 1 else lambda call=call: [call() for _ in range(in_a_row)]
                times[name].append((clock or self.seconds)(several) / in_a_row)
        return {name: values[warm_up:] for name, values in times.items()}

    def copy_speed(self) -> float:
        """Bytes a second that a plain copy of 256 MB reads and writes, with the threads of now."""
        source = torch.zeros(2**26, device=self.device)
        target = torch.empty_like(source)
        times = self.interleave({"copy": lambda: target.copy_(source)}, 1)["copy"]
        return 2 * source.nbytes / median(times)

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
    calls = {f"{name}, B={B}, T={T}": partial(ROUTERS[name].select, scores, size.k) for name in BOUNDED}
    rows = router_rows(bench, calls, "topk", [B * T] * len(calls))
    lengths = [max(1, T // 4) * 2**i for i in range(6)]
    scores = bench.scores(1, lengths[-1], size.n_expert)
    calls = {f"online_seqtopk, B=1, T={n}": partial(online_seqtopk, scores[:, :n], size.k) for n in lengths}
    return rows + router_rows(bench, calls, f"T={lengths[0]}", lengths)


def router_rows(bench: Bench, calls: dict[str, Callable], base: str, tokens: list[int]) -> list[dict]:
    """A row for each call, which routes so many tokens, compared to the first, which is called `base`."""
    times = bench.interleave(calls, 6)
    first = next(iter(times.values()))
    rows = []
    for (what, taken), n in zip(times.items(), tokens):
        row = {"what": what, "ms": median(taken) * 1e3, "us per token": median(taken) / n * 1e6}
        rows.append(row | {f"time/{base}": ratio(taken, first)})
    return rows


def bench_layer(bench: Bench) -> list[dict]:
    """A layer of experts against a dense layer of equal active FLOPs (k*H wide), both wholly in one dtype.

    What routing, sorting the pairs and uneven groups cost. "of matmul": the speed as a share of that of plain
    matrix products with as many FLOPs, the most that this machine could give.
    """
    batch_size, width, hidden = (64, 1024, 1024) if bench.gpu else (8, 384, 256)
    size = bench.sized(batch_size=batch_size, tokens=512, n_embd=width, n_hidden=hidden, n_expert=32, k=4)
    x = torch.randn(size.batch_size, size.tokens, size.n_embd).to(bench.device, bench.dtype).requires_grad_()
    matrix = torch.randn(size.n_embd, 3 * size.k * size.n_hidden).to(x)
    flops = 2 * x[..., 0].numel() * matrix.numel()
    layers, modules = make_layers(bench, size)
    what = f"C={size.n_embd}, H={size.n_hidden}, E={size.n_expert}, K={size.k}, S={x[..., 0].numel()}"

    def forward(kind: str) -> Tensor:
        return layers[kind](x)

    def both(kind: str) -> None:
        forward(kind).backward(x.detach())

    def clear_gradients(kind: str) -> None:
        x.grad = None
        modules.zero_grad()

    rows = []
    for label, run, products in (("forward", forward, 1), ("forward+backward", both, 3)):
        calls = {kind: partial(run, kind) for kind in layers}
        calls["matmul"] = lambda n=products: [x.detach() @ matrix for _ in range(n)]
        times = bench.interleave(calls, 10, clear_gradients)
        for kind in layers:
            seconds = median(times[kind])
            row = {"what": f"{kind} {label}, {what}", "ms": seconds * 1e3}
            row |= {"GFLOP/s": products * flops / seconds / 1e9}
            row |= {"of matmul": ratio(times["matmul"], times[kind])[0]}
            rows.append(row | {"speed/dense": ratio(times["dense"], times[kind])})
    rows[len(layers) + 1]["aim"] = f"at least {0.75 if bench.gpu else 0.95}"  # topk, forward and backward
    return rows


def make_layers(bench: Bench, size: SimpleNamespace) -> tuple[dict[str, Callable], torch.nn.ModuleList]:
    """Functions of x by name: a dense layer, and experts under three routers; and the modules of both."""
    shape = {"n_head": 1, "n_embd": size.n_embd, "n_hidden": size.n_hidden, "n_expert": size.n_expert}
    dense, experts = MLP(size.n_embd, size.k * size.n_hidden), MoE(MoEConfig(**shape, k=size.k))
    modules = torch.nn.ModuleList([dense, experts]).to(bench.device, bench.dtype)
    for parameter in modules.parameters():
        torch.nn.init.normal_(parameter, std=INIT_STD)

    def through(router: str) -> Callable:
        context = Context(ROUTERS[router], None)
        return bench.compiled(lambda x: experts(x, context, None)[0])

    routed = {name: through(name) for name in ("topk", "seqtopk", "online_seqtopk")}
    return {"dense": bench.compiled(dense), **routed}, modules


def bench_train(bench: Bench) -> list[dict]:
    """Full training steps of one model: the routers take turns on the same weights.

    What a user waits for: forward, backward, clipping, Muon and AdamW; in the last row AdamW alone. On a GPU
    ten steps in a row are timed at once: in training the host does not wait between them.
    The paper trains 246.4 GPU-hours under SeqTopK and 244.2 under TopK. Memory is the peak during a step, of
    the GPU or of the whole process.

    Under torchrun, B is what each process has, and tokens/s are those of all together. The scaling
    efficiency is "speed/alone": against the same step when no process waits for the gradients of others.
    """
    shape = bench.config.shape or "small"
    model = MoEGPT(bench.shape(shape))
    forward = distributed.distribute(model, bench.device, shard=False)
    size = bench.sized(batch_size=64 if bench.gpu else 4, tokens=model.config.block_size)
    text = bench.text(model.config.vocab_size, size.batch_size, size.tokens + 1)
    if bench.compile:
        model.compile()
    settings = (TrainConfig(optimizer=name, learning_rate=1e-4) for name in ("muon", "adamw"))
    step, plain = (train_step(model, forward, text, bench.dtype, make_optimizers(model, s)) for s in settings)
    calls = {name: partial(step, name) for name in BOUNDED} | {"topk, AdamW": partial(plain, "topk")}
    if distributed.world() > 1:
        calls["topk, alone"] = partial(step, "topk", alone=True)
    times = bench.interleave(calls, 25, in_a_row=10 if bench.gpu else 1)
    aims = {"seqtopk": "at most 1.01", "online_seqtopk": "at most 1.05"} if shape == "small" else {}
    peaks = {} if bench.dtype == torch.float32 else PEAKS
    peak_flops = next((peak for name, peak in peaks.items() if name in bench.name), None)
    n = distributed.world()
    rows = []
    for name, taken in times.items():
        rate = n * size.batch_size * size.tokens / median(taken)
        flops = rate * model.flops_per_token(size.tokens)
        row = {"what": f"{name}, {shape}, B={size.batch_size}, T={size.tokens}", "tokens/s": rate}
        row |= {"GFLOP/s": flops / 1e9, "MFU %": peak_flops and 100 * flops / peak_flops / n}
        row |= {"peak GB": bench.peak_gb(calls[name]), "time/topk": ratio(taken, times["topk"])}
        if name == "topk" and n > 1:
            row["speed/alone"] = ratio(times["topk, alone"], taken)
        rows.append(row | {"paper": "1.009" if name == "seqtopk" else None, "aim": aims.get(name)})
    return rows


def train_step(
    model: MoEGPT, forward: Callable, text: Tensor, dtype: torch.dtype, optimizers: list[Optimizer]
) -> Callable[..., None]:
    """A function of the router's name: an iteration of train.py on text (B, T+1), without reading data; if
    `alone`, gradients stay with their process."""
    update = updater(model, optimizers)
    mixed = dtype != next(model.parameters()).dtype

    def step(router: str, alone: bool = False) -> None:
        with distributed.accumulating(forward, more=alone):
            with torch.autocast(text.device.type, dtype) if mixed else nullcontext():
                _, loss, stats = forward(text[:, :-1], text[:, 1:], router=router)
            update(loss + stats.balance_loss + stats.z_loss)

    return step


def adamw(model: torch.nn.Module) -> list[Optimizer]:
    """What both peers train with."""
    return [torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)]


def updater(model: torch.nn.Module, optimizers: list[Optimizer]) -> Callable[[Tensor], None]:
    """A function of the loss: backward, clipping, the optimisers' steps."""

    def update(loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()

    return update


def bench_decode(bench: Bench) -> list[dict]:
    """Writing token by token: TopK and online SeqTopK take turns, step by step, on the same weights.

    An Expert Cache needs as many small operations ("extra us per layer") at any width. On a CPU they are a
    small share of a step in "heavy", whose experts are large, and a larger one in the other shapes. Before
    decoding, the caches are filled up to the context: keys and values with random numbers, Expert Caches with
    scores spread as the gates' are. One step in 64 merges the buffers of the Expert Caches; the median leaves
    it out, the part "cache" counts it. Prefill reads a prompt, but only where that is soon done: it matters
    where prompts are longer than what is written. Memory is calculated: weights and caches. The paper has
    139.41 tokens/s against 141.23, and 18.35 GB against 18.21.

    Eager and compiled. "of bandwidth": the bytes that a step of online SeqTopK must read (the "MB" of weights
    and of the cached context), over its time, as a share of what a plain copy of 256 MB reads and writes a
    second.
    """
    rows, given, can_compile = [], bench.config, bench.compiles_decoding
    contexts = [given.tokens] if given.tokens else [256, 1024, 4096]
    batch_sizes = [given.batch_size] if given.batch_size else [1, 16]
    for shape in [given.shape] if given.shape else ["heavy", "small", "tiny"]:
        with bench.device:  # not on the CPU first: olmoe has 7 billion weights
            model = MoEGPT(bench.shape(shape)).cast(bench.dtype).eval()
        promise = {"paper": "0.987, memory 1.008", "aim": "at least 0.99"} if shape == "heavy" else {}
        fitting = [n for n in contexts if n <= model.config.block_size or n == given.tokens]
        for batch_size, context, compile in product(batch_sizes, fitting, (False, True)[: 1 + can_compile]):
            how = "compiled" if compile else "eager"
            row = {"what": f"{shape}, batch {batch_size}, context {context}, {how}"}
            rows.append(row | decode_row(bench, model, batch_size, context, compile) | promise)
            if compile:
                torch.compiler.reset()
    olmoe = Cache(OLMOE, 1, 4096, "online_seqtopk", "meta", torch.bfloat16)
    sizes = {"KV MB": olmoe.kv_nbytes / 1e6, "expert MB": olmoe.expert_nbytes / 1e6}
    share = {"bytes/KV": olmoe.expert_nbytes / olmoe.kv_nbytes, "aim": "at most 0.01"}
    return [*rows, {"what": "Expert Cache of OLMoE's shape, bfloat16, context 4096", **sizes, **share}]


def decode_row(bench: Bench, model: MoEGPT, batch_size: int, context: int, compile: bool) -> dict:
    steps = MAX_ROUNDS + 4  # with the warm-up, and the first
    caches = {name: model.new_cache(batch_size, context + steps, name) for name in ("topk", "online_seqtopk")}
    topk, online = caches.values()
    online.kv = topk.kv  # the same memory for both: its pages may lie better or worse
    prefill = {} if compile else prefill_figures(bench, model, caches, batch_size, context)
    fill(bench, model, caches, batch_size, context)
    token = bench.text(model.config.vocab_size, batch_size, 1)
    options = {"temperature": 1.0, "top_p": None, "compile": compile}
    streams = {name: model.generate(token, steps, cache, **options) for name, cache in caches.items()}
    chunks = {name: [next(stream)] for name, stream in streams.items()}
    calls = {name: lambda name=name: chunks[name].append(next(streams[name])) for name in caches}
    times = bench.interleave(calls, 2)
    topk_step, online_step = map(median, times.values())
    memory = sum(p.nbytes for p in model.parameters()) + topk.kv_nbytes
    masks = torch.stack([c.mask for c in chunks["online_seqtopk"][1:]])  # (steps, B, 1, L, E)
    parts = bytes_read(model, masks.any(1).sum(-1).float().mean().item(), batch_size, context)
    speed = sum(parts.values()) / online_step / bench.copy_speed()
    return {
        "topk tokens/s": batch_size / topk_step,
        "online tokens/s": batch_size / online_step,
        "speed/topk": ratio(*times.values()),
        "extra us per layer": (online_step - topk_step) / model.config.n_layer * 1e6,
        "experts per token": torch.cat([c.n_taken for c in chunks["online_seqtopk"]]).float().mean().item(),
        "of bandwidth": speed,
        **{f"MB {name}": n / 1e6 for name, n in parts.items()},
        **prefill,
        "KV MB": topk.kv_nbytes / 1e6,
        "expert MB": online.expert_nbytes / 1e6,
        "memory/topk": (memory + online.expert_nbytes) / memory,
    }


def bytes_read(model: MoEGPT, experts: float, batch_size: int, context: int) -> dict[str, float]:
    """Bytes that a step must read, by part, where a layer reads so many experts."""
    config, size = model.config, model.head.weight.element_size()
    matrices = sum(
        block.attention.qkv.weight.nbytes + block.attention.out.weight.nbytes for block in model.blocks
    )
    expert = 3 * config.n_embd * config.n_hidden * size
    kv = 2 * config.n_layer * config.kv_heads * config.head_dim * context * batch_size * size
    return {
        "attention": matrices,
        "experts": len(model.expert_layers()) * experts * expert,
        "gates": sum(layer.gate.weight.nbytes for layer in model.expert_layers()),
        "head": model.head.weight.nbytes,
        "KV": kv,
    }


def prefill_figures(bench: Bench, model: MoEGPT, caches: dict, batch_size: int, context: int) -> dict:
    """How fast a prompt of `context` tokens is read in one piece; nothing where that would take long."""
    if batch_size * context > (2**17 if bench.gpu else 1024):
        return {}
    prompt = bench.text(model.config.vocab_size, batch_size, context)
    calls = {name: lambda c=cache: next(model.generate(prompt, 1, c)) for name, cache in caches.items()}
    times = bench.interleave(calls, 1, lambda name: caches[name].reset())
    rate = batch_size * context / median(times["online_seqtopk"])
    return {"prefill tokens/s": rate, "speed/topk, prefill": ratio(*times.values())}


def fill(bench: Bench, model: MoEGPT, caches: dict, batch_size: int, context: int) -> None:
    """Bring the caches to where they would be after `context` tokens."""
    spread = INIT_STD * math.sqrt(model.config.n_embd)  # of the gate's logits: its input is normalised
    for cache in caches.values():
        cache.reset()
        cache.make_room(context, False)
        cache.locate(context, None)
        for part in (part for kv in cache.kv for part in (kv.k, kv.v)):
            part.copy_(torch.randn_like(part[:1, :1]))
        for experts in filter(None, cache.expert_caches):
            experts.route(bench.scores(batch_size, context, model.config.n_expert, spread))


def bench_cache(bench: Bench) -> list[dict]:
    """A step of one layer's Expert Cache, by the number of past tokens: mean of 65, of which one merges.

    64 steps cost little, whatever the past. The next one merges their candidates into the sorted buffer of
    the past, and costs more the longer that is. The mean is what a token costs. Each cache is as large as
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
        aim = "at most 1.5" if past == 4096 else None
        rows.append(row | {f"time/{base}": ratio(times[past], times[base]), "aim": aim})
    row = {"what": f"batch {batch_size}, {anew} past tokens, against ranking anew", "aim": "at least 25"}
    row |= {"us per step": median(times["anew"]) * 1e6, "speed/anew": ratio(times["anew"], times[anew])}
    return [*rows, row]


def bench_peers(bench: Bench) -> list[dict]:
    """The same model under TopK, as OLMoE, in transformers: training steps, greedy generation.

    On a CPU llama.cpp, if it is installed, takes part in the generation. All have the same shape, tokens and
    dtype; those that train, fused AdamW and clipping. They take turns, each in a process of its own, so that
    each sets the memory allocator for itself. Transformers does without the load-balance and z-losses, which
    ours computes in every step: it leaves them out by default.
    """
    if not importlib.util.find_spec("transformers"):
        print("skipped: transformers is not installed (pip install transformers)")
        return []
    kinds = ["ours", "eager", "grouped_mm"]
    if not bench.gpu and importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf"):
        kinds.append("llama.cpp")
    elif not bench.gpu:
        print("without llama.cpp: pip install llama-cpp-python gguf, which needs a C++ compiler")
    size = bench.sized(batch_size=8, tokens=bench.shape("peers").block_size)
    torch.cuda.empty_cache()  # what earlier parts have left: the processes need it
    with ExitStack() as stack:
        peers = {kind: stack.enter_context(new_process()) for kind in kinds}

        def rows(work: str, tokens: int, goal: float, kinds: list[str]) -> list[dict]:
            calls = {kind: partial(ask, peers[kind], bench.config, kind, work) for kind in kinds}
            times = bench.interleave(calls, 15, clock=lambda call: call())
            rate = {kind: tokens / median(taken) for kind, taken in times.items()}
            return [
                {"what": f"{work}, {tokens} tokens, against {kind}", "ours tokens/s": rate["ours"]}
                | {"theirs": rate[kind], "speed/theirs": ratio(times[kind], times["ours"])}
                | {"aim": f"at least {goal}" if kind == "grouped_mm" else None}
                for kind in kinds[1:]
            ]

        training = rows("training", size.batch_size * size.tokens, 1.5 if bench.gpu else 1.3, kinds[:3])
        writing = rows("generation", size.tokens // 2, 8 if bench.gpu else 1.7, kinds)
        if not bench.compiles_decoding:
            return training + writing
        goal = 8 if bench.gpu else 2.7
        return training + writing + rows("compiled generation", size.tokens // 2, goal, kinds)


def new_process() -> ProcessPoolExecutor:
    """A process of its own, which leaves Ctrl-C to this one."""
    ignore = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), **ignore)


def ask(peer: ProcessPoolExecutor, config: BenchOptions, kind: str, work: str) -> float:
    """Seconds that the work took there, once. Raises RuntimeError if it failed or the process ended."""
    try:
        return peer.submit(do, config, kind, work).result()
    except Exception as error:
        raise RuntimeError(f"{kind}: {type(error).__name__}: {error}") from None


def do(config: BenchOptions, kind: str, work: str) -> float:
    return peer_works(config, kind)[work]()


@lru_cache
def peer_works(config: BenchOptions, kind: str) -> dict[str, Callable[[], float]]:
    """Work -> a function that does it once and returns its seconds. One model does all works of its kind."""
    bench = Bench.of(config)
    torch.manual_seed(config.seed)
    shape = bench.shape("peers")
    size = bench.sized(batch_size=8, tokens=shape.block_size)
    text = bench.text(shape.vocab_size, size.batch_size, size.tokens + 1)
    makers = {"ours": our_works, "llama.cpp": llama_works}
    works = makers.get(kind, partial(transformers_works, experts=kind))(bench, shape, text)
    return {name: partial(bench.seconds, work) for name, work in works.items()}


def our_works(bench: Bench, shape: MoEConfig, text: Tensor) -> dict[str, Callable]:
    if not bench.gpu:
        keep_freed_memory()
    model = MoEGPT(shape).to(bench.device).cast(bench.dtype)
    if bench.compile:
        model.compile()
    step = train_step(model, model, text, bench.dtype, adamw(model))
    n = text.shape[1] // 2

    def write(compile: bool) -> None:
        list(model.generate(text[:1, :n], n, temperature=0, compile=compile))

    generation = {"generation": partial(write, False), "compiled generation": partial(write, True)}
    return {"training": partial(step, "topk"), **generation}


def transformers_works(bench: Bench, shape: MoEConfig, text: Tensor, experts: str) -> dict[str, Callable]:
    model = make_olmoe(shape).to(bench.device, bench.dtype).eval()  # it has no dropout that would train
    model.set_experts_implementation(experts)
    forward, update = torch.compile(model) if bench.compile else model, updater(model, adamw(model))
    prompt = text[:1, : text.shape[1] // 2].contiguous()
    batch = {"input_ids": text[:, :-1], "labels": text[:, :-1], "use_cache": False}
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": prompt.shape[1]}
    generate = partial(model.generate, prompt, do_sample=False, **options)
    training = {"training": lambda: update(forward(**batch).loss)}
    return training | dict.fromkeys(("generation", "compiled generation"), generate)


def make_olmoe(shape: MoEConfig) -> torch.nn.Module:
    """The model of `shape` by transformers."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    sizes = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.n_embd,
        "intermediate_size": shape.n_hidden,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_experts": shape.n_expert,
        "num_experts_per_tok": shape.k,
        "max_position_embeddings": shape.block_size,
    }
    never = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))  # text never ends early
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**sizes, **never))


def llama_works(bench: Bench, shape: MoEConfig, text: Tensor) -> dict[str, Callable]:
    from gguf import GGMLQuantizationType
    from llama_cpp import Llama

    n, kind = text.shape[1] // 2, GGMLQuantizationType[GGUF_TYPES[bench.dtype]]
    options = dict.fromkeys(("n_threads", "n_threads_batch"), torch.get_num_threads())
    options |= dict.fromkeys(("type_k", "type_v"), kind)  # of its KV cache
    with tempfile.TemporaryDirectory() as folder:
        write_gguf(path := f"{folder}/olmoe.gguf", shape, bench.dtype)
        model = Llama(path, n_ctx=2 * n, **options, verbose=False)

    def write() -> None:
        model.reset()
        for _ in islice(model.generate(text[0, :n].tolist(), temp=0), n):
            pass

    return dict.fromkeys(("generation", "compiled generation"), write)


def write_gguf(path: str, shape: MoEConfig, dtype: torch.dtype) -> None:
    """A file of random weights of that shape, by the names that llama.cpp has for OLMoE's."""
    from gguf import GGMLQuantizationType, GGUFWriter

    C, H, E = shape.n_embd, shape.n_hidden, shape.n_expert
    square, experts = ("attn_q", "attn_k", "attn_v", "attn_output"), ("ffn_gate_exps", "ffn_up_exps")
    block = dict.fromkeys(("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm"), (C,))
    block |= dict.fromkeys(square, (C, C)) | dict.fromkeys(experts, (E, H, C))
    block |= {"ffn_gate_inp": (E, C), "ffn_down_exps": (E, C, H)}
    sizes = dict.fromkeys(("token_embd", "output"), (shape.vocab_size, C)) | {"output_norm": (C,)}
    sizes |= {f"blk.{i}.{name}": size for i in range(shape.n_layer) for name, size in block.items()}
    writer = GGUFWriter(path, "olmoe")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(shape.block_size)
    writer.add_block_count(shape.n_layer)
    writer.add_embedding_length(C)
    writer.add_feed_forward_length(H)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_expert_count(E)
    writer.add_expert_used_count(shape.k)
    for name, size in sizes.items():
        own = torch.float32 if len(size) == 1 or "gate_inp" in name else dtype
        data, kind = (torch.randn(size) * INIT_STD).to(own).view(torch.uint8).numpy(), GGUF_TYPES[own]
        writer.add_tensor(f"{name}.weight", data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


PARTS = {
    part.__name__.removeprefix("bench_"): part
    for part in (bench_router, bench_layer, bench_train, bench_decode, bench_cache, bench_peers)
}


def main(argv: list[str]) -> None:
    """Measure what is asked for. Raises ValueError or OSError for bad input."""
    if argv == ["table"]:
        return print(results.speed_table(results.RESULTS))
    texts = {name: inspect.getdoc(part) for name, part in PARTS.items()}
    named = [name for name in argv[:1] if not name.startswith("-")]
    for name in named:
        require(name in PARTS, "the part", name, f"one of {', '.join(PARTS)}, or table")
    alone = distributed.world() == 1
    require(alone or named == ["train"], "the part", named or "all", "train under torchrun")
    firsts = "\n".join(f"  {name:10}  {text.splitlines()[0]}" for name, text in texts.items())
    with distributed.first_before_others():
        config = BenchOptions.read(argv[len(named) :], f"{__doc__}\n{firsts}")
    report = results.measure(Bench.of(config), {name: (texts[name], PARTS[name]) for name in named or PARTS})
    results.finish(report, None if distributed.rank() else config.json)


if __name__ == "__main__":
    with distributed.joined(), bad_input_exits():
        main(sys.argv[1:])
