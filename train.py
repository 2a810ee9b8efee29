"""Train a Mixture-of-Experts language model under any router.

    python train.py config/tiny_seqtopk.py
    python train.py config/small_seqtopk.py --k=4 --max_iters=2000
    python train.py --init_from=resume --out_dir=out/tiny_seqtopk
    python train.py --init_from=out/small_topk --router=seqtopk --max_iters=100 --warmup_iters=10
    python train.py config/finetune_olmoe_gsm8k.py
    python train.py config/tiny_seqtopk.py --router=online_seqtopk --first_router=seqtopk --first_iters=630
    torchrun --standalone --nproc_per_node=2 train.py config/tiny_seqtopk.py --gradient_accumulation_steps=2

Each evaluation prints two validation losses. The first is causal: the router's `decode` stand-in routes,
which sees no future token, as when sampling; it is the likelihood of the text. The second is under the router
that trains.
"""

import itertools
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import numpy as np

# Before torch is loaded: how long its threads on a CPU spin before they sleep. By default so long that a step
# takes 30 times as long beside another process that computes; with this, 4 times (experiments/recipe.md).
if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm

import data
import distributed
from config import bad_input_exits, parse, printable, require
from config.check import COUNT, check, door
from config.device import (
    DTYPES,
    autocast,
    check_memory,
    compile_asked,
    keep_freed_memory,
    pick_compile,
    pick_device,
    pick_dtype,
)
from config.files import lock, remove_leftovers
from distributed import rank, world
from model import (
    MoEConfig,
    MoEGPT,
    Stats,
    check_router,
    known_routers,
    load_checkpoint,
    pretrained_config,
    routing_settings,
    save_checkpoint,
)
from optimizers import make_optimizers
from router import ROUTERS, Routing, entropy_loss, loss_free_update


@dataclass(frozen=True)
class TrainConfig(MoEConfig):
    """Training: data, optimiser, device and reports. Raises ValueError for impossible values."""

    out_dir: str = ""  # folder of the run (empty: out/<name of the config file>)
    init_from: str = "scratch"  # scratch, resume (out_dir), a run, a checkpoint or a Hugging Face model
    train_only: str = "all"  # all, or router: the gates alone learn, which takes far less memory
    dataset: str = "pysource"  # a folder of data/, prepared if need be, or the path of one
    batch_size: int = 16  # sequences in a micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches in an iteration, of all processes
    max_iters: int = 1000  # iterations: steps of the optimiser
    first_router: str | None = None  # the router of the first first_iters iterations (none: router)
    first_iters: int = 0  # iterations under first_router
    optimizer: str = "muon"  # of the matrices inside blocks: muon or adamw; all else has AdamW
    learning_rate: float = 1e-2  # the highest
    embedding_boost: float = 10.0  # the embedding learns at so many times the rate of all else
    warmup_iters: int = 100  # iterations of linear warm-up
    lr_decay_iters: int | None = None  # the cosine reaches min_lr here (none: max_iters)
    min_lr: float | None = None  # none: learning_rate / 10
    weight_decay: float = 0.0  # AdamW's, of matrices; vectors have none
    beta1: float = 0.9  # AdamW's
    beta2: float = 0.95  # AdamW's
    grad_clip: float = 1.0  # largest norm of the gradient (0: any)
    balance_coef: float = 0.01  # weight of the load-balance loss
    entropy_coef: float = 0.0  # weight of the entropy of scores, for top_p (arXiv 2403.07652 has 1e-4)
    z_coef: float = 0.001  # weight of the router z-loss
    bias_rate: float = 0.0  # step of the loss-free balancing bias (0: none; arXiv 2408.15664 has 0.001)
    eval_interval: int = 100  # iterations between evaluations; each one saves last.pt
    eval_windows: int = 128  # sequences of the validation data in an evaluation, always the same
    log_interval: int = 10  # iterations between lines of log.jsonl and checks for NaN
    sample_tokens: int = 150  # length of the sample printed at the end
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    dtype: str = "auto"  # auto, float32, bfloat16 or float16, to compute in
    weights_dtype: str = "float32"  # or bfloat16, rounded at random: weights and AdamW in half the memory
    checkpoint_activations: bool = False  # each block is computed again going backward: saves memory
    shard: bool = False  # under torchrun: each process has a part of weights, gradients and moments
    compile: str = "auto"  # torch.compile: auto, true or false
    seed: int = 1337  # of the weights and the order of the data

    def __post_init__(self):
        super().__post_init__()
        counts = "batch_size gradient_accumulation_steps max_iters eval_interval eval_windows log_interval"
        for name in counts.split():
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        or_none = "first_iters warmup_iters sample_tokens weight_decay grad_clip"
        for name in [*or_none.split(), "balance_coef", "entropy_coef", "z_coef", "bias_rate"]:
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "from 0 to below 1")
        for name in ("learning_rate", "embedding_boost"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        highest = f"from 0 to learning_rate = {self.learning_rate:g}, or none for a tenth of it"
        within = self.min_lr is None or 0 <= self.min_lr <= self.learning_rate
        require(within, "min_lr", self.min_lr, highest)
        end = self.lr_decay_iters
        require(end is None or end >= 1, "lr_decay_iters", end, "at least 1, or none")
        require(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2**63 - 1")
        choices = {
            "optimizer": ("muon", "adamw"),
            "train_only": ("all", "router"),
            "weights_dtype": ("float32", "bfloat16"),
        }
        for name, allowed in choices.items():
            require(getattr(self, name) in allowed, name, getattr(self, name), " or ".join(allowed))
        self._check_first_router()
        learns = self.n_expert > 1 or self.train_only == "all"
        require(learns, "train_only", "router", "all in a dense model")
        other = self.weights_dtype == "bfloat16" and self.dtype not in ("auto", "bfloat16")
        require(not other, "dtype", self.dtype, "auto or bfloat16 for weights_dtype=bfloat16")
        mixed = self.shard and self.weights_dtype == "bfloat16"  # FSDP2 refuses float32 gates beside it
        require(not mixed, "weights_dtype", "bfloat16", "float32 for shard=true")

    def _check_first_router(self) -> None:
        first = self.first_router
        if not self.first_iters:
            require(first is None, "first_iters", 0, f"at least 1 for first_router = {first}")
            return
        require(first in ROUTERS, "first_router", first, known_routers())
        check_router(self, first)
        learns, own = ROUTERS[first].state, ROUTERS[self.router].state
        require(learns in (None, own), "first_router", first, "one without a state, or with the router's own")

    @property
    def tokens_per_iter(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps * self.block_size

    def router_at(self, step: int) -> str:
        """The router that trains when `step` iterations have been done."""
        return self.first_router if step < self.first_iters else self.router


# What a run that is resumed cannot change: what decides the order of its data and the state of its optimiser.
DATA_ORDER = ["dataset", "seed", "block_size", "batch_size", "gradient_accumulation_steps"]
OPTIMIZER = ["optimizer", "train_only", "weights_dtype"]
# What train.py adds to a checkpoint, for check; and the names of what each optimiser keeps of a weight.
RUN = {"train_config": dict, "tokenizer": dict, "data_sha256": str, "optimizers": list}
RUN |= {"step": COUNT, "evaluated": range(-1, 2**63), "best": float, "scaler": dict, "rng": Tensor}
KEPT = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "RoundingAdamW": {"mean", "square"}, "Muon": {"mean"}}


def architecture() -> list[str]:
    """The settings that decide the shapes and the meaning of weights. The routing may change."""
    changeable = routing_settings() | {"k", "block_size"}
    return [field.name for field in fields(MoEConfig) if field.name not in changeable]


def read_config(argv: list[str]) -> tuple[TrainConfig, dict | None]:
    """The configuration, and the checkpoint to start from, if any: its settings hold unless given anew.

    Raises ValueError for bad settings, a bad checkpoint, or settings that contradict the checkpoint's.
    """
    given, files = parse(argv, TrainConfig)
    given["out_dir"] = given.get("out_dir") or f"out/{files[-1].stem if files else 'run'}"
    init_from = given.get("init_from", TrainConfig.init_from)
    if init_from == "scratch":
        return TrainConfig(**given), None
    checkpoint = read_checkpoint(init_from, given["out_dir"])
    old, fixed = checkpoint["config"], architecture()
    if init_from == "resume":
        old, fixed = checkpoint["train_config"], fixed + DATA_ORDER + OPTIMIZER
    old = asdict(TrainConfig()) | old  # settings younger than the checkpoint
    changed = [name for name in fixed if name in given and given[name] != old[name]]
    if changed:
        difference = ", ".join(f"{name} is {old[name]} there and {given[name]} here" for name in changed)
        remedy = "drop these or start from scratch"
        raise ValueError(f"init_from={init_from} does not fit: {difference}; {remedy}")
    with door(checkpoint["path"], "what is not given is as there"):
        return TrainConfig(**old | given), checkpoint


def read_checkpoint(init_from: str, out_dir: str) -> dict:
    """The checkpoint that training starts from; of a Hugging Face model, its settings and tokenizer only."""
    resume = init_from == "resume"
    if not resume and data.is_hugging_face(init_from):
        config = asdict(pretrained_config(init_from))
        return {"path": init_from, "config": config, "tokenizer": data.hf_tokenizer(init_from).meta}
    checkpoint = load_checkpoint(Path(out_dir) / "last.pt" if resume else init_from)
    path = checkpoint["path"]
    anew = f"begin a new run with its weights: --init_from={shlex.quote(path)}"
    with door(path, anew if resume else "give a checkpoint that train.py wrote"):
        check(checkpoint, RUN if resume else {"tokenizer": dict})
    return checkpoint


def check_processes(config: TrainConfig) -> None:
    """Raise ValueError unless each process gets as many micro-batches."""
    n, remedy = config.gradient_accumulation_steps, "give more, and a batch_size smaller by as much"
    allowed = f"a multiple of {world()}, the number of processes: {remedy}"
    require(n % world() == 0, "gradient_accumulation_steps", n, allowed)


def open_dataset(config: TrainConfig, checkpoint: dict | None) -> tuple[TrainConfig, data.Dataset]:
    """The data, and the configuration with its vocabulary filled in. Raises ValueError if they do not fit."""
    dataset = data.load(config.dataset)
    tokenizer = dataset.tokenizer
    meta = checkpoint and checkpoint["tokenizer"]
    if meta and data.make_tokenizer(meta, checkpoint["path"]).fingerprint != tokenizer.fingerprint:
        theirs = shlex.quote(meta["name"]) if meta.get("kind") == "hf" else "..."
        remedy = f"prepare it with the checkpoint's (prepare.py --tokenizer={theirs}), or start from scratch"
        raise ValueError(f"dataset {config.dataset} has another vocabulary than the checkpoint: {remedy}")
    if config.init_from == "resume" and checkpoint["data_sha256"] != dataset.sha256:
        since = "was prepared anew, with other tokens, since the run began"
        raise ValueError(f"dataset {config.dataset} {since}: start from scratch")
    padded = checkpoint and config.vocab_size > tokenizer.vocab_size  # pretrained embeddings often are
    right = padded or config.vocab_size in (0, tokenizer.vocab_size)
    require(right, "vocab_size", config.vocab_size, f"0 or the data's {tokenizer.vocab_size}")
    config = replace(config, vocab_size=config.vocab_size or tokenizer.vocab_size, norm_best=config.n_best)
    if config.n_dense_layer:  # or else another k would mean other shapes
        config = replace(config, dense_hidden=config.dense_width)
    dataset.train_batch(0, 1, config.block_size, config.seed)  # raises if the text is too short
    dataset.val_batches(config.block_size, 1, 1)
    return config, dataset


@dataclass
class Run:
    """A model in training and all that moves it."""

    config: TrainConfig
    dataset: data.Dataset
    device: torch.device
    dtype: torch.dtype
    model: MoEGPT
    forward: torch.nn.Module  # the model, perhaps in DDP
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    step: int = 0  # iterations done
    evaluated: int = -1  # the step of the last evaluation
    best: float = math.inf  # lowest causal validation loss so far
    saved: int = -1  # the step of last.pt

    def save(self, name: str) -> bool:
        """Write the run to a file of this name in out_dir. False if it cannot be written, which is said."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        weights, optimizers = distributed.unsharded([self.model.state_dict(), optimizers])
        state = {
            "weights": weights,
            "optimizers": optimizers,
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),  # nothing in training draws from it, unless somebody adds dropout
            "step": self.step,  # the data order is a function of it
            "evaluated": self.evaluated,
            "best": self.best,
            "data_sha256": self.dataset.sha256,
            "train_config": asdict(self.config),
            "tokenizer": self.dataset.tokenizer.meta,
        }
        saved = distributed.by_first(lambda: self._write(name, state))
        if saved and name == "last.pt":
            self.saved = self.step
        return saved

    def _write(self, name: str, state: dict) -> bool:
        try:
            save_checkpoint(Path(self.config.out_dir) / name, self.model, **state)
        except OSError as error:
            tqdm.write(f"warning: {name} could not be saved ({error.strerror or error})")
            return False
        return True

    def restore(self, checkpoint: dict) -> None:
        """Continue where the checkpoint was written. The model has its weights already."""
        with door(checkpoint["path"]):
            for optimizer, state in zip(self.optimizers, checkpoint["optimizers"], strict=True):
                optimizer.load_state_dict(distributed.sharded(fitting_state(optimizer, state), optimizer))
            if self.scaler.is_enabled() and checkpoint["scaler"]:  # another GPU may need another dtype
                self.scaler.load_state_dict(checkpoint["scaler"])
            torch.set_rng_state(checkpoint["rng"].cpu())
        for name in ("step", "evaluated", "best"):
            setattr(self, name, checkpoint[name])
        self.saved = self.step


def fitting_state(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """The saved state, under the settings that are given now: `step` alone is taken over of a group.
    Fails unless its tensors fit the weights, because the optimisers' kernels trust them."""
    kept = dict.fromkeys(KEPT[type(optimizer).__name__], Tensor)
    check(state, {"state": {str: kept}, "param_groups": [{"step?": COUNT}]}, "the state of an optimiser")
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, tensors in state["state"].items():
        for name in kept:
            tensor, shape = tensors[name], () if name == "step" else weights[number].shape
            dense = tensor.layout == torch.strided and tensor.is_contiguous() and tensor.is_floating_point()
            fits = dense and tensor.shape == shape
            require(fits, f"{name} of weight {number}", tuple(tensor.shape), f"{tuple(shape)}, dense floats")
    groups = optimizer.state_dict()["param_groups"]
    for group, other in zip(groups, state["param_groups"], strict=True):
        if "step" in group:
            group["step"] = other["step"]
    return {"state": state["state"], "param_groups": groups}


def set_up(config: TrainConfig, dataset: data.Dataset, checkpoint: dict | None) -> Run:
    """Build the run and print what was chosen and why. Raises ValueError for a device that is not there."""
    device, device_reason = pick_device(config.device)
    device = distributed.own_device(device)
    check_training_memory(config, device)
    dtype, dtype_reason = pick_dtype(config.dtype, device)
    if config.weights_dtype == "bfloat16" and dtype != torch.bfloat16:  # auto chose it, as on a CPU
        dtype, dtype_reason = torch.bfloat16, "that of the weights"
    compiled, compile_reason = pick_compile(config.compile, device, dtype)
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(config.seed)
    model = make_model(config, checkpoint)
    forward = distributed.distribute(model, device, config.shard)
    print(f"device    {device} ({device_reason})")
    print(f"dtype     {str(dtype).removeprefix('torch.')} ({dtype_reason})")
    print(f"compile   {compiled} ({compile_reason})")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run = Run(config, dataset, device, dtype, model, forward, make_optimizers(model, config), scaler)
    if config.init_from == "resume":
        run.restore(checkpoint)
    model.check_promises(config.router, ROUTERS[config.router].decode, config.first_router or config.router)
    if not (compiled and try_compiled(run)):
        prepare_blocks(model, config, compiled=False)
    return run


def check_training_memory(config: TrainConfig, device: torch.device) -> None:
    """Raise ValueError where weights, gradients, the optimisers' moments, the blocks' inputs and the logits
    with their gradient are more than the device's memory: the least that training needs."""
    size = 4 if config.weights_dtype == "float32" else 2
    copies = 1 if config.train_only == "router" else 3 if config.optimizer == "muon" else 4
    states = config.n_matrix_weights * size * copies // (world() if config.shard else 1)
    tokens = config.batch_size * config.block_size
    inputs = tokens * (config.n_layer * config.n_embd * 2 + config.vocab_size * 8)
    check_memory(states + inputs, "training with these sizes and this batch_size", device)


def make_model(config: TrainConfig, checkpoint: dict | None) -> MoEGPT:
    """The model in weights_dtype (gates are float32 in any case), what is not to learn frozen."""
    shape = {field.name: getattr(config, field.name) for field in fields(MoEConfig)}
    if checkpoint is None:
        model = MoEGPT(MoEConfig(**shape))
    elif "model" in checkpoint:
        model = MoEGPT.from_checkpoint(checkpoint, **shape)
    else:
        model = MoEGPT.from_pretrained(config.init_from, **shape)
    model.cast(DTYPES[config.weights_dtype])
    if config.train_only == "router":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".gate." in name)
    return model


def prepare_blocks(model: MoEGPT, config: TrainConfig, compiled: bool) -> None:
    """Compile the model or not; let each block be computed again going backward or not. What is computed
    again is what was compiled: the same graph routes the second time as the first."""
    model.compile() if compiled else model.uncompile()
    if config.checkpoint_activations:
        for block in model.blocks:  # nothing in one is drawn at random, so no random state to restore
            block.forward = partial(recomputed, block.forward, use_reentrant=False, preserve_rng_state=False)


def try_compiled(run: Run) -> bool:
    """Compile the model and try it on one batch. Where that fails, it is said; ValueError if asked for."""
    prepare_blocks(run.model, run.config, compiled=True)
    try:
        for router in dict.fromkeys((run.config.router_at(run.step), run.config.router)):
            losses(run, *batch(run, 0), router)[0].backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if compile_asked(run.config.compile):
            raise ValueError(f"compile is true, but torch.compile fails here with {error}") from error
        print(f"compile   off after all: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
        return False
    finally:
        run.model.zero_grad()
    return True


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to min_lr, which it keeps (arXiv 1608.03983)."""
    min_lr = config.learning_rate / 10 if config.min_lr is None else config.min_lr
    end = config.lr_decay_iters or config.max_iters
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if step >= end:
        return min_lr
    progress = (step - config.warmup_iters) / (end - config.warmup_iters)
    return min_lr + (config.learning_rate - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def batch(run: Run, micro_step: int) -> list[Tensor]:
    """Inputs and targets (batch_size, block_size) of a micro-batch, on the device."""
    config = run.config
    pair = run.dataset.train_batch(micro_step, config.batch_size, config.block_size, config.seed)
    if run.device.type == "cuda":
        return [x.pin_memory().to(run.device, non_blocking=True) for x in pair]
    return [x.to(run.device) for x in pair]


def losses(run: Run, x: Tensor, y: Tensor, router: str | None = None) -> tuple[Tensor, Tensor, Stats]:
    """What is minimised, the cross-entropy in it (both scalars), and the routing statistics, under a router
    (None: the one that trains now)."""
    config, router = run.config, router or run.config.router_at(run.step)
    with autocast(run.device, run.dtype):
        _, loss, stats = run.forward(x, y, router=router)
    total = loss + config.balance_coef * stats.balance_loss + config.z_coef * stats.z_loss
    for layer, routing in zip(run.model.expert_layers(), stats.routing, strict=True):
        share = 1 / len(stats.routing)  # means over layers, as the others are
        if config.entropy_coef:
            total = total + share * config.entropy_coef * entropy_loss(routing.scores)
        if ROUTERS[router].loss:
            total = total + share * ROUTERS[router].loss(routing, layer.router_state(), config)
    return total, loss.detach(), stats


def train_step(run: Run) -> Tensor:
    """One iteration, without waiting for the device: -> (2,) mean cross-entropy and norm of the gradient."""
    config, n = run.config, run.config.gradient_accumulation_steps // world()  # of this process
    mean_loss, routings = 0.0, []
    first = (run.step * world() + rank()) * n
    for micro_step in range(first, first + n):
        with distributed.accumulating(run.forward, more=micro_step + 1 < first + n):
            total, loss, stats = losses(run, *batch(run, micro_step))
            run.scaler.scale(total / n).backward()  # all count alike, however many answers they hold
        mean_loss = mean_loss + loss / n
        if stats.routing and (config.bias_rate or ROUTERS[config.router].update):
            routings.append([Routing(*map(Tensor.detach, layer)) for layer in stats.routing])
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf)
    norm = distributed.full(norm)
    overflowed = run.scaler.is_enabled() and not norm.isfinite()  # in float16: then no optimiser steps
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.get("boost", 1.0) * learning_rate(config, run.step)
        if not overflowed:  # GradScaler.step would ask for each optimiser by itself
            optimizer.step()
        optimizer.zero_grad()
    run.scaler.update()
    if routings:
        adapt(run, routings)
    run.step += 1
    return torch.stack([mean_loss, norm])


def adapt(run: Run, routings: list[list[Routing]]) -> None:
    """Move what steers the routing and has no gradient: the loss-free bias, and the router's state.

    routings: of each micro-batch of the iteration a list, with the Routing of each of the L expert layers.
    """
    config, layers = run.config, run.model.expert_layers()
    by_layer = ([torch.cat(parts) for parts in zip(*micro_batches)] for micro_batches in zip(*routings))
    routing = Routing(*map(torch.stack, zip(*by_layer)))  # (L, n*B, T, E) each, of this process
    if config.bias_rate:
        load = distributed.total(routing.mask.sum((1, 2)))  # (L, E)
        for layer, pairs_of_expert in zip(layers, load, strict=True):
            layer.bias.copy_(loss_free_update(layer.bias, pairs_of_expert, config.bias_rate))
    if update := ROUTERS[config.router].update:
        states = [layer.router_state() for layer in layers]
        routing = Routing(*(distributed.gathered(tensor, dim=1) for tensor in routing))
        old = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        for name, tensors in update(old, routing, config).items():
            for state, tensor in zip(states, tensors, strict=True):
                state[name].copy_(tensor)


# -------------------- evaluation --------------------------------------------------------------------------


@torch.no_grad()
def evaluate_text(
    model: MoEGPT, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: np.ndarray, router: str
) -> dict:
    """Loss and routing on batches of inputs and targets, (B, T) each, under one router.

    token_bytes: the length of each token of the vocabulary. Targets of -1 are not learned, and do not count.
    loss: mean cross-entropy in nats per token. bpb: the same in bits per byte of the text. experts: mean, min
    and max experts per token. entropy (1 when all experts get the same share of the pairs) and variance of
    share * E (then 0): means over layers. dead: experts that got no token, in all layers. A dense model has
    loss and bpb only.
    """
    device, n_bytes = model.head.weight.device, torch.from_numpy(token_bytes)
    nats = tokens = text_bytes = load = 0
    n_taken = []
    for x, y in batches:
        _, loss, stats = model(x.to(device), y.to(device), router=router)
        learned = y[y >= 0]
        nats, tokens = nats + loss.double() * learned.numel(), tokens + learned.numel()
        text_bytes += n_bytes[learned].sum().item()
        load = load + stats.load
        n_taken.append(stats.n_taken.flatten())
    result = {"loss": (nats / tokens).item(), "bpb": (nats / text_bytes / math.log(2)).item()}
    return result | routing_summary(load, torch.cat(n_taken))


def routing_summary(load: Tensor, n_taken: Tensor) -> dict:
    """Pairs of each expert, load (L, E), and experts of each token, n_taken (n,) -> what evaluate_text says
    of routing: {} if L is 0."""
    if not len(load):
        return {}
    share = load / load.sum(-1, keepdim=True).clamp(min=1)
    entropy = torch.special.entr(share).sum(-1).mean() / math.log(load.shape[-1])
    return {
        "experts": [n_taken.float().mean().item(), n_taken.min().item(), n_taken.max().item()],
        "entropy": entropy.item(),
        "variance": (share * load.shape[-1]).var(-1, correction=0).mean().item(),
        "dead": (load == 0).sum().item(),
    }


def evaluate(run: Run, router: str) -> dict:
    """evaluate_text of the validation windows; a pure function of the weights."""
    config = run.config
    windows = run.dataset.val_batches(config.block_size, config.batch_size, config.eval_windows)
    with autocast(run.device, run.dtype):
        return evaluate_text(run.model, windows, run.dataset.tokenizer.token_bytes, router)


HEADER = (
    "          train  causal validation   {as_trained:^17}  causal experts/token    load    dead    tokens\n"
    "  step     nats     nats bits/byte      nats bits/byte     mean   min   max  entropy experts        /s"
)


def table_line(step: int, train_loss: float, causal: dict, as_trained: dict, rate: float) -> str:
    """One evaluation, under HEADER."""
    routing = f"{'-':>6} {'-':>5} {'-':>5}  {'-':>7} {'-':>7}"
    if "experts" in causal:
        mean, low, high = causal["experts"]
        routing = f"{mean:6.2f} {low:5d} {high:5d}  {causal['entropy']:7.3f} {causal['dead']:7d}"
    both = "   ".join(f"{result['loss']:7.4f} {result['bpb']:9.4f}" for result in (causal, as_trained))
    trained = "-" if math.isnan(train_loss) else f"{train_loss:.4f}"  # before the first iteration
    return f"{step:6d}  {trained:>7}  {both}   {routing} {rate:9,.0f}"


# -------------------- the loop ----------------------------------------------------------------------------


class Log:
    """log.jsonl: one JSON object a line, "kind" train or eval. Lines of later steps than `step`, at which the
    run goes on, are dropped, in the file itself: prepare_out_dir has locked it."""

    def __init__(self, path: Path, step: int):
        self.path = path
        path.touch()
        lines = path.read_bytes().splitlines()
        with open(path, "r+b") as file:
            file.write(b"".join(line + b"\n" for line in lines if self._step(line) <= step))
            file.truncate()

    @staticmethod
    def _step(line: bytes) -> float:
        try:
            return float(json.loads(line)["step"])
        except Exception:  # a crash cut the line short, or it is no entry at all
            return math.inf

    def write(self, **entry) -> None:
        try:
            end = self.path.stat().st_size
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError:
                os.truncate(self.path, end)  # half a line would swallow the next one
                raise
        except OSError as error:
            tqdm.write(f"warning: {self.path} cannot be written ({error.strerror})")


class Diverged(Exception):
    """A loss or a gradient is not finite."""


class Meter:
    """Collects the metrics of iterations. To read them waits for the device: that is done now and then."""

    def __init__(self, log: Log):
        self.log, self.loss, self.tokens_per_second = log, math.nan, 0.0
        self.losses: list[float] = []  # of all iterations since the last evaluation
        self.restart()

    def restart(self) -> None:
        self.pending: list[Tensor] = []
        self.start = time.perf_counter()

    def read(self, run: Run) -> None:
        """Average and log what has come since the last time. Raises Diverged."""
        if not self.pending:
            return
        rows = (distributed.total(torch.stack(self.pending)) / world()).tolist()
        self.losses += [loss for loss, _ in rows]
        self.loss, norm = (sum(values) / len(rows) for values in zip(*rows, strict=True))
        seconds = time.perf_counter() - self.start
        self.tokens_per_second = len(self.pending) * run.config.tokens_per_iter / seconds
        scaled = run.scaler.is_enabled()  # float16 skips the iterations whose gradient overflows
        if not math.isfinite(self.loss) or not (scaled or math.isfinite(norm)):
            raise Diverged(f"the loss became {self.loss:.4g} (gradient {norm:.4g}) at iteration {run.step}")
        norm = norm if math.isfinite(norm) else None  # JSON has no infinity
        entry = {"loss": self.loss, "grad_norm": norm, "lr": learning_rate(run.config, run.step - 1)}
        entry["tokens_per_second"] = round(self.tokens_per_second)
        self.log.write(kind="train", step=run.step, **entry)
        self.restart()


class Interrupt:
    """Turns the first Ctrl-C (or SIGTERM) into a wish to stop soon; the second stops at once."""

    def __enter__(self) -> "Interrupt":
        self.wished = False
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self._wish) for number in numbers}
        return self

    def _wish(self, number: int, frame: object) -> None:
        self.wished = True
        signal.signal(number, signal.SIG_DFL)
        tqdm.write("\nstopping after this iteration; once more to stop at once, without saving")

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def evaluate_and_save(run: Run, meter: Meter) -> None:
    """Log a line of the table; write last.pt, and best.pt if this causal loss is the lowest.
    Print the line last, because that ends the run where nobody reads any more."""
    meter.read(run)
    decodes, trains = ROUTERS[run.config.router].decode, run.config.router_at(run.step)
    causal = evaluate(run, decodes)
    as_trained = causal if trains == decodes else evaluate(run, trains)
    causal, as_trained = distributed.by_first(lambda: (causal, as_trained))  # others may differ in a last bit
    train_loss = sum(meter.losses) / len(meter.losses) if meter.losses else math.nan
    if not math.isfinite(causal["loss"]):
        raise Diverged(f"the validation loss became {causal['loss']:.4g} at iteration {run.step}")
    meter.log.write(kind="eval", step=run.step, causal=causal, as_trained=as_trained)
    before, run.evaluated = run.best, run.step
    run.best = min(before, causal["loss"])
    if run.best < before and not run.save("best.pt"):  # the first of the two: last.pt knows no better one
        run.best = before  # the next evaluation tries again
    run.save("last.pt")
    tqdm.write(table_line(run.step, train_loss, causal, as_trained, meter.tokens_per_second))
    meter.losses.clear()
    meter.restart()


def train(run: Run) -> bool:
    """Run the iterations that are left; True if they were all run, False after Ctrl-C. Raises Diverged."""
    config = run.config
    silent = SimpleNamespace(write=lambda **entry: None)
    meter = Meter(silent if rank() else Log(Path(config.out_dir) / "log.jsonl", run.step))
    print("\n" + HEADER.format(as_trained="as trained" if config.first_iters else f"under {config.router}"))
    progress = tqdm(total=config.max_iters, initial=run.step, disable=rank() > 0 or None)
    with Interrupt() as interrupt, progress as bar:
        while run.step < config.max_iters and not distributed.anyone(interrupt.wished):
            if run.step % config.eval_interval == 0 and run.step != run.evaluated:
                evaluate_and_save(run, meter)
            meter.pending.append(train_step(run))
            bar.update()
            if run.step % config.log_interval == 0:
                meter.read(run)
                bar.set_postfix_str(f"loss {meter.loss:.3f}, {meter.tokens_per_second:,.0f} tokens/s")
        finished = run.step >= config.max_iters
        if not finished:
            meter.read(run)
            if run.save("last.pt"):
                tqdm.write(f"\nsaved iteration {run.step}; go on with:")
                tqdm.write(f"  {command('train.py', config, '--init_from=resume')}")
        elif run.step != run.evaluated:
            evaluate_and_save(run, meter)
        return finished


# -------------------- from the command line to the first iteration, and after the last --------------------


def prepare_out_dir(config: TrainConfig) -> IO:
    """Make the run's folder; move aside a run that is in it and not resumed. Raises ValueError. -> its log,
    which keeps other runs out until it is closed."""
    folder = Path(config.out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = open(folder / "log.jsonl", "a")  # noqa: SIM115
        lock_run(folder, log)
        remove_leftovers(folder)
        if config.init_from != "resume":
            move_aside(folder, log)
        return log
    except OSError as error:
        why = f"cannot be written ({error.strerror})"
        raise ValueError(f"out_dir {folder} {why}: give another --out_dir") from error


def lock_run(folder: Path, log: IO) -> None:
    """Raises ValueError if another process has locked the log of the run in a folder."""
    try:
        lock(log)
    except BlockingIOError:
        remedy = "wait for it, or give another --out_dir"
        raise ValueError(f"out_dir {folder} is in use: another process trains there; {remedy}") from None
    except OSError as error:
        print(f"note: {folder} cannot be locked ({error.strerror}): start no other run there meanwhile")


def move_aside(folder: Path, log: IO) -> None:
    """Move the files of a run, if there is one, to a new folder beside its own; its locked log is emptied."""
    checkpoints = [path for path in (folder / "best.pt", folder / "last.pt") if path.exists()]
    logged = os.path.getsize(log.name)
    if not checkpoints and not logged:
        return
    aside = next(path for n in itertools.count(1) if not (path := Path(f"{folder}.{n}")).exists())
    aside.mkdir()
    if logged:
        shutil.copy(log.name, aside)
    for path in checkpoints:
        shutil.move(path, aside)  # copies where out_dir is a volume of its own
    log.truncate(0)
    print(f"the run that was in {folder} is now in {aside}")


def command(script: str, config: TrainConfig, *options: str) -> str:
    """What a user types to go on with this run; it names the file that defines a router of the user's own."""
    module = getattr(ROUTERS[config.router].select, "__module__", "")  # of a config file: its path
    own = [os.path.relpath(module)] if module.endswith(".py") else []
    several = world() > 1 and script == "train.py"
    start = ["torchrun", "--standalone", f"--nproc_per_node={world()}"] if several else ["python"]
    return shlex.join([*start, script, *own, f"--out_dir={config.out_dir}", *options])


def describe(run: Run) -> str:
    config, (total, active) = run.config, run.model.n_params()
    flops, size = run.model.flops_per_token(config.block_size), len(run.dataset.train)
    epochs = config.tokens_per_iter * config.max_iters / size
    end = config.lr_decay_iters or config.max_iters
    low = f"; warm-up takes all {end:,}: lower --warmup_iters" if config.warmup_iters >= end else ""
    stand_in = ROUTERS[config.router].decode
    router = f"{config.router}, {config.k} of {config.n_expert} experts per token; causal stand-in {stand_in}"
    if config.first_iters:
        router = f"{config.first_router} for {config.first_iters:,} iterations, then {router}"
    return (
        f"model     {total:,} parameters, {active:,} active per token, {flops / 1e6:.1f} MFLOP per token\n"
        f"router    {router if config.n_expert > 1 else 'none: a dense model'}\n"
        f"data      {config.dataset}: {size:,} tokens, vocabulary {config.vocab_size:,}\n"
        f"training  {config.max_iters:,} iterations of {config.tokens_per_iter:,} tokens, "
        f"{epochs:.2f} epochs in all{low}\n"
        f"run       {config.out_dir}"
    )


def estimate(run: Run) -> str:
    """How long the iterations that are left will take, from one micro-batch; nothing of the run changes."""
    size = run.config.batch_size
    rows = size if run.device.type == "cuda" else max(1, size // 4)  # a large model takes long on a CPU
    x, y = (tokens[:rows] for tokens in batch(run, 0))
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        losses(run, x, y)[0].backward()
        run.model.zero_grad()
        if run.device.type == "cuda":
            torch.cuda.synchronize()
    left = (run.config.max_iters - run.step) * run.config.gradient_accumulation_steps // world()
    minutes = left * (time.perf_counter() - start) * size / rows / 60
    took = f"{minutes:.1f} minutes" if minutes < 100 else f"{minutes / 60:.1f} hours"
    return f"about {took} on this machine, evaluations not counted"


def print_sample(run: Run) -> None:
    """A short text from the trained model."""
    tokenizer, config = run.dataset.tokenizer, run.config
    prompt = run.dataset.meta.get("prompt", "")
    generator = torch.Generator(run.device).manual_seed(config.seed)
    idx = torch.tensor([tokenizer.encode(prompt) or [tokenizer.eot]], device=run.device)
    with autocast(run.device, run.dtype):
        _, *written = run.model.generate(idx, config.sample_tokens, stop=tokenizer.stops, generator=generator)
    text = prompt + tokenizer.decode([chunk.tokens.item() for chunk in written])
    print("\n--- sample\n" + printable(text))


def main(argv: list[str]) -> None:
    with bad_input_exits():
        with distributed.first_before_others():
            config, checkpoint = read_config(argv)
            check_processes(config)
            config, dataset = open_dataset(config, checkpoint)
        with too_large_exits(config):
            run = set_up(config, dataset, checkpoint)
        log = nullcontext() if rank() else prepare_out_dir(config)
        del checkpoint  # the run has its own copy, and these may be many gigabytes
    with log, too_large_exits(run.config):
        run_to_the_end(run)


@contextmanager
def too_large_exits(config: TrainConfig) -> Iterator[None]:
    """If the GPU's memory is too small for what is done inside: one line on stderr and exit code 2."""
    try:
        yield
    except torch.OutOfMemoryError:
        remedy = f"lower batch_size ({config.batch_size}) and raise gradient_accumulation_steps as much"
        remedy = remedy if config.batch_size > 1 else "give --checkpoint_activations"
        print(f"error: the GPU's memory is too small: {remedy}, or take a smaller model", file=sys.stderr)
        sys.exit(2)


def run_to_the_end(run: Run) -> None:
    """Train, print a sample. What a user cannot repair here is one line on stderr and an exit code."""
    config = run.config
    print(describe(run))
    try:
        if run.step < config.max_iters:
            print(f"time      {estimate(run)}")
        else:
            print(f"time      all {config.max_iters:,} iterations are done: go on with a higher --max_iters")
        finished = train(run)
        if finished and config.sample_tokens and rank() == 0:
            if world() == 1 or not config.shard:  # no process alone has the weights of a shard
                print_sample(run)
            shown = ["--show_experts"] * bool(run.model.expert_layers())
            print(f"--- more: {command('sample.py', config, *shown)}")
    except Diverged as error:
        last = Path(config.out_dir) / "last.pt"
        remedy = f"resume {last}, which is kept," if last.exists() else "start again"
        rate = f"with a learning_rate below {config.learning_rate:g}"
        print(f"error: {error}; {remedy} {rate}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before the first iteration or after the last
        finished = False
    if not finished:
        sys.exit(130)
    if run.saved != run.step:
        kept = f"last.pt holds iteration {run.saved}" if run.saved >= 0 else "there is no last.pt"
        print(f"error: iteration {run.step}, the last one, is not saved ({kept}): make room", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    # a terminal may lack characters that the model writes; a pipe would show the table late
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    with distributed.joined():
        main(sys.argv[1:])
