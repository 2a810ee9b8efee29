"""Train a Mixture-of-Experts language model under any router.

    python train.py config/tiny_seqtopk.py
    python train.py config/small_seqtopk.py --k=4 --max_iters=2000
    python train.py --init_from=resume --out_dir=out/tiny_seqtopk
    python train.py --init_from=out/small_topk --router=seqtopk --max_iters=100 --warmup_iters=10
    python train.py config/finetune_olmoe_gsm8k.py
    python train.py config/tiny_seqtopk.py --router=online_seqtopk --first_router=seqtopk --first_iters=630

Each evaluation prints two validation losses. The first is causal: the router's `decode` stand-in routes,
which sees no future token, as when sampling; it is the likelihood of the text. The second is under the router
that trains.
"""

import itertools
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm

import data
from config import bad_input_exits, parse
from config.device import DTYPES, keep_freed_memory, pick_compile, pick_device, pick_dtype
from model import (
    ROUTING,
    MoEConfig,
    MoEGPT,
    Stats,
    check_router,
    evaluate_text,
    load_checkpoint,
    pretrained_config,
    require,
    save_checkpoint,
)
from optimizers import Muon, RoundingAdamW
from router import (
    L1_COEF,
    ROUTERS,
    cutoff_update,
    entropy_loss,
    kth_scores,
    l1_coef_update,
    l1_loss,
    loss_free_update,
)


@dataclass(frozen=True)
class TrainConfig(MoEConfig):
    """Training: data, optimiser, device and reports. Raises ValueError for impossible values."""

    out_dir: str = ""  # folder of the run (empty: out/<name of the config file>)
    init_from: str = "scratch"  # scratch, resume (out_dir), a run, a checkpoint or a Hugging Face model
    train_only: str = "all"  # all, or router: the gates alone learn, which takes far less memory
    dataset: str = "pysource"  # a folder of data/, prepared if need be, or the path of one
    batch_size: int = 16  # sequences in a micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches in an iteration
    max_iters: int = 1000  # iterations: steps of the optimiser
    first_router: str | None = None  # the router of the first first_iters iterations (none: router)
    first_iters: int = 0  # iterations under first_router
    optimizer: str = "muon"  # of the matrices inside blocks: muon or adamw; all else has AdamW
    learning_rate: float = 1e-2  # the highest
    embedding_boost: float = 10.0  # the embedding learns at so many times the rate of all else
    warmup_iters: int = 100  # iterations of linear warm-up
    lr_decay_iters: int | None = None  # the cosine reaches min_lr here (none: max_iters)
    final_lr: float = 0.1  # the rate at the end, as a share of the highest
    weight_decay: float = 0.0  # AdamW's, of matrices; vectors and gates have none
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
    compile: str = "auto"  # torch.compile: auto, true or false
    seed: int = 1337  # of the weights and the order of the data

    def __post_init__(self):
        super().__post_init__()
        for name in (
            "batch_size",
            "gradient_accumulation_steps",
            "max_iters",
            "eval_interval",
            "eval_windows",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.log_interval >= 1, "log_interval", self.log_interval, "at least 1")
        for name in ("learning_rate", "embedding_boost"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("warmup_iters", "sample_tokens", "weight_decay", "grad_clip"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("balance_coef", "entropy_coef", "z_coef", "bias_rate", "first_iters"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "from 0 to below 1")
        require(0 <= self.final_lr <= 1, "final_lr", self.final_lr, "from 0 to 1")
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
        routed = any(map(self.has_experts, range(self.n_layer)))
        require(routed or self.train_only == "all", "train_only", "router", "all in a dense model")
        finer = self.weights_dtype == "bfloat16" and self.dtype == "float32"
        require(not finer, "dtype", "float32", "auto, bfloat16 or float16 for weights_dtype=bfloat16")

    def _check_first_router(self) -> None:
        first = self.first_router
        if not self.first_iters:
            require(first is None, "first_iters", 0, f"at least 1 for first_router = {first}")
            return
        require(first in ROUTERS, "first_router", first, "one of " + ", ".join(ROUTERS))
        check_router(self, first)

    @property
    def tokens_per_iter(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps * self.block_size

    def router_at(self, step: int) -> str:
        """The router that trains when `step` iterations have been done."""
        return self.first_router if step < self.first_iters else self.router

    @property
    def has_cutoffs(self) -> bool:
        return any(ROUTERS[router].cutoffs for router in (self.router, self.router_at(0)))


# what decides the shapes and the meaning of the weights; the routing may change from run to run
CHANGEABLE = {*ROUTING, "k", "block_size"}
ARCHITECTURE = [field.name for field in fields(MoEConfig) if field.name not in CHANGEABLE]
DATA_ORDER = ["dataset", "seed", "block_size", "batch_size", "gradient_accumulation_steps"]
GIVEN = {"boost", "weight_decay", "betas"}  # of an optimiser's group: what is given now holds
OPTIMIZER = ["optimizer", "train_only", "weights_dtype"]  # what decides its state


def read_config(argv: list[str]) -> tuple[TrainConfig, dict | None]:
    """The configuration, and the checkpoint to start from, if any: what it says holds unless given anew.

    Raises ValueError for bad settings, a bad checkpoint, or settings that contradict the checkpoint's.
    """
    given, files = parse(argv, TrainConfig)
    given["out_dir"] = given.get("out_dir") or f"out/{files[-1].stem if files else 'run'}"
    init_from = given.get("init_from", TrainConfig.init_from)
    if init_from == "scratch":
        return TrainConfig(**given), None
    if init_from == "resume":
        checkpoint = load_checkpoint(Path(given["out_dir"]) / "last.pt")
        if "train_config" not in checkpoint:
            raise ValueError(f"{given['out_dir']}/last.pt holds no run to resume: train.py did not write it")
        old, fixed = checkpoint["train_config"], ARCHITECTURE + DATA_ORDER + OPTIMIZER
    elif data.is_hugging_face(init_from):
        checkpoint = {"config": asdict(pretrained_config(init_from))}
        checkpoint["tokenizer"] = data.hf_tokenizer(init_from).meta
        old, fixed = checkpoint["config"], ARCHITECTURE
    else:
        path = Path(init_from)
        path = path / "best.pt" if path.is_dir() else path
        checkpoint = load_checkpoint(path)
        if "tokenizer" not in checkpoint:
            raise ValueError(f"{path} has no tokenizer: give a checkpoint that train.py wrote")
        old, fixed = checkpoint["config"], ARCHITECTURE
    old = asdict(TrainConfig()) | old  # settings younger than the checkpoint
    changed = [name for name in fixed if given.get(name, old[name]) != old[name]]
    if changed:
        difference = ", ".join(f"{name} is {old[name]} there and {given[name]} here" for name in changed)
        raise ValueError(
            f"init_from={init_from} does not fit: {difference}; drop these or start from scratch"
        )
    return TrainConfig(**{**old, **given}), checkpoint


def open_dataset(config: TrainConfig, checkpoint: dict | None) -> tuple[TrainConfig, data.Dataset]:
    """The data, and the configuration with its vocabulary filled in. Raises ValueError if they do not fit."""
    dataset = data.load(config.dataset)
    tokenizer = dataset.tokenizer
    if checkpoint and data.make_tokenizer(checkpoint["tokenizer"]).fingerprint != tokenizer.fingerprint:
        theirs = checkpoint["tokenizer"]["name"] if checkpoint["tokenizer"]["kind"] == "hf" else "..."
        raise ValueError(
            f"dataset {config.dataset} has another vocabulary than the checkpoint: prepare it with the "
            f"checkpoint's (prepare.py --tokenizer={theirs}), or start from scratch"
        )
    if config.init_from == "resume" and checkpoint["source_sha256"] != dataset.meta["source_sha256"]:
        raise ValueError(
            f"dataset {config.dataset} was prepared anew since the run began: start from scratch"
        )
    padded = checkpoint and config.vocab_size > tokenizer.vocab_size  # pretrained embeddings often are
    right = padded or config.vocab_size in (0, tokenizer.vocab_size)
    require(right, "vocab_size", config.vocab_size, f"0 or the data's {tokenizer.vocab_size}")
    config = replace(config, vocab_size=config.vocab_size or tokenizer.vocab_size)
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
    forward: MoEGPT  # the model, perhaps compiled
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    step: int = 0  # iterations done
    evaluated: int = -1  # the step of the last evaluation
    best: float = math.inf  # lowest causal validation loss so far
    l1_coef: Tensor = field(default_factory=partial(torch.tensor, L1_COEF))  # weight of router.l1_loss

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()

    def save(self, *names: str) -> bool:
        """Write everything to files in out_dir; a full disk is reported, with False, and ends nothing."""
        state = {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),  # nothing in training draws from it, unless somebody adds dropout
            "step": self.step,  # the data order is a function of it
            "evaluated": self.evaluated,
            "best": self.best,
            "l1_coef": self.l1_coef,
            "source_sha256": self.dataset.meta["source_sha256"],
            "train_config": asdict(self.config),
            "tokenizer": self.dataset.tokenizer.meta,
        }
        for name in names:
            try:
                save_checkpoint(Path(self.config.out_dir) / name, self.model, **state)
            except (OSError, RuntimeError) as error:  # torch.save reports a failed write as a RuntimeError
                tqdm.write(f"warning: {name} could not be saved ({error})")
                return False
        return True

    def restore(self, checkpoint: dict) -> None:
        """Continue where the checkpoint was written. The model has its weights already."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizers"], strict=True):
            given = [{key: group[key] for key in GIVEN & group.keys()} for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, settings in zip(optimizer.param_groups, given, strict=True):
                group |= settings
        if self.scaler.is_enabled() and checkpoint["scaler"]:  # another GPU may need another dtype
            self.scaler.load_state_dict(checkpoint["scaler"])
        torch.set_rng_state(checkpoint["rng"].cpu())
        for name in ("step", "evaluated", "best"):
            setattr(self, name, checkpoint[name])


def set_up(config: TrainConfig, dataset: data.Dataset, checkpoint: dict | None) -> Run:
    """Build the run and print what was chosen and why. Raises ValueError for a device that is not there."""
    device, device_reason = pick_device(config.device)
    dtype, dtype_reason = pick_dtype(config.dtype, device)
    if dtype == torch.float32 and config.weights_dtype == "bfloat16":  # no autocast: as if it were bfloat16
        dtype, dtype_reason = torch.bfloat16, "that of the weights"
    compiled, compile_reason = pick_compile(config.compile, device, dtype)
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(config.seed)
    model = make_model(config, checkpoint).to(device)
    print(f"device    {device} ({device_reason})")
    print(f"dtype     {str(dtype).removeprefix('torch.')} ({dtype_reason})")
    print(f"compile   {compiled} ({compile_reason})")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run = Run(config, dataset, device, dtype, model, model, make_optimizers(model, config), scaler)
    if checkpoint:  # a new run that begins from it, too: at 1e-8 the gates would open again
        run.l1_coef = checkpoint.get("l1_coef", run.l1_coef)
    if config.init_from == "resume":
        run.restore(checkpoint)
    if compiled:
        run.forward = compile_or_explain(run)
    return run


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
    if config.checkpoint_activations:
        for block in model.blocks:  # nothing in a block is drawn at random, so no random state to restore
            block.forward = partial(recomputed, block.forward, use_reentrant=False, preserve_rng_state=False)
    return model


def make_optimizers(model: MoEGPT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW (arXiv 1711.05101) and, for the matrices inside blocks, Muon."""
    groups = muon_groups(model) if config.optimizer == "muon" else []
    taken = {weight for group in groups for weight in group["params"]}
    embedding = model.embedding.weight
    others = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p not in taken]
    matrices = [p for name, p in others if p.dim() >= 2 and "gate." not in name and p is not embedding]
    plain = [p for name, p in others if p.dim() < 2 or "gate." in name]
    rest = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
        {"params": [embedding] * embedding.requires_grad, "boost": config.embedding_boost},
    ]
    options = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "weight_decay": 0.0}
    rounds = config.weights_dtype == "bfloat16"
    adamw = RoundingAdamW(rest, **options, seed=config.seed) if rounds else AdamW(rest, **options, fused=True)
    return [adamw, *([Muon(groups, config.learning_rate, config.seed)] if groups else [])]


def muon_groups(model: MoEGPT) -> list[dict]:
    """The matrices inside blocks that learn, but for gates, and how fused ones fall into matrices."""
    groups = []
    for name, weight in model.blocks.named_parameters():
        if not weight.requires_grad or weight.dim() < 2 or "gate." in name:
            continue
        split, dim = weight.shape[-1], -1  # one matrix
        if name.endswith("qkv.weight"):
            split, dim = model.blocks[0].attention.widths, -2
        elif name.endswith("w_in"):  # of experts: gate and up
            split = weight.shape[-1] // 2
        elif name.endswith("w_in.weight"):
            split, dim = weight.shape[0] // 2, -2
        groups.append({"params": [weight], "split": split, "dim": dim})
    return groups


def compile_or_explain(run: Run) -> MoEGPT:
    """The compiled model, tried on one batch; if that fails and nobody insisted, the plain one."""
    compiled = torch.compile(run.model)
    try:
        run.forward = compiled
        for router in {run.config.router_at(run.step), run.config.router}:
            losses(run, *batch(run, 0), router)[0].backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if run.config.compile == "true":
            raise ValueError(f"compile is true, but torch.compile fails here with {error}") from error
        print(f"compile   off after all: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
        compiled = run.model
    run.model.zero_grad()
    return compiled


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to a share final_lr of the highest (arXiv 1608.03983)."""
    end = config.lr_decay_iters or config.max_iters
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    progress = min(1.0, (step - config.warmup_iters) / max(1, end - config.warmup_iters))
    share = config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * share


def batch(run: Run, micro_step: int) -> list[Tensor]:
    """Inputs and targets (batch_size, block_size) of a micro-batch, on the device."""
    config = run.config
    pair = run.dataset.train_batch(micro_step, config.batch_size, config.block_size, config.seed)
    if run.device.type == "cuda":
        return [x.pin_memory().to(run.device, non_blocking=True) for x in pair]
    return [x.to(run.device) for x in pair]


def losses(run: Run, x: Tensor, y: Tensor, router: str | None = None) -> tuple[Tensor, Tensor, Stats]:
    """What is minimised, the cross-entropy in it (both scalars), and the routing statistics.

    router: None for the one that trains now.
    """
    config, router = run.config, router or run.config.router_at(run.step)
    with run.autocast():
        _, loss, stats = run.forward(x, y, router=router)
    total = loss + config.balance_coef * stats.balance_loss + config.z_coef * stats.z_loss
    for layer in stats.routing:
        share = 1 / len(stats.routing)  # means over layers, as the others are
        if config.entropy_coef:
            total = total + share * config.entropy_coef * entropy_loss(layer.scores)
        if ROUTERS[router].l1:
            total = total + share * run.l1_coef * l1_loss(layer.scores, layer.mask, config.k)
    return total, loss.detach(), stats


def train_step(run: Run) -> Tensor:
    """One iteration, without waiting for the device: -> (2,) mean cross-entropy and norm of the gradient."""
    config, n = run.config, run.config.gradient_accumulation_steps
    mean_loss, load, kth = 0.0, 0, 0.0
    for micro_step in range(run.step * n, (run.step + 1) * n):
        total, loss, stats = losses(run, *batch(run, micro_step))
        run.scaler.scale(total / n).backward()  # all count alike, however many answers they hold
        mean_loss = mean_loss + loss / n
        if stats.routing:
            load = load + torch.stack([layer.mask.sum((0, 1)) for layer in stats.routing])
            if config.has_cutoffs:
                kths = [kth_scores(layer.scores.detach(), config.k) for layer in stats.routing]
                kth = kth + torch.stack(kths) / n
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.get("boost", 1.0) * learning_rate(config, run.step)
        run.scaler.step(optimizer)
        optimizer.zero_grad()
    run.scaler.update()
    if run.model.expert_layers():
        adapt(run, load, kth)
    run.step += 1
    return torch.stack([mean_loss, norm])


def adapt(run: Run, load: Tensor, kth: Tensor | float) -> None:
    """Move what steers the routing and is not learned.

    load (L, E) pairs of each expert in the iteration, null experts included; kth (L, E) its kth_scores, the
    mean of its micro-batches, if a router has cutoffs.
    """
    config = run.config
    if config.bias_rate:
        move_bias(run.model, load, partial(loss_free_update, rate=config.bias_rate))
    if config.has_cutoffs:
        move_bias(run.model, kth, partial(cutoff_update, step=run.step))
    if ROUTERS[config.router_at(run.step)].l1:
        run.l1_coef = l1_coef_update(run.l1_coef, load, config.k, config.tokens_per_iter)


def move_bias(model: MoEGPT, seen: Tensor, update: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The bias of each layer becomes update(bias, its row of `seen`)."""
    for layer, row in zip(model.expert_layers(), seen, strict=True):
        layer.bias.copy_(update(layer.bias, row))


# -------------------- evaluation --------------------------------------------------------------------------


def evaluate(run: Run, router: str) -> dict:
    """evaluate_text of the validation windows; a pure function of the weights."""
    config = run.config
    windows = run.dataset.val_batches(config.block_size, config.batch_size, config.eval_windows)
    with run.autocast():
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
    """log.jsonl: one JSON object a line, "kind" train or eval. A resumed run forgets what came after its
    checkpoint."""

    def __init__(self, path: Path, step: int):
        lines = path.read_text().splitlines() if path.exists() else []
        new = path.with_name(path.name + ".tmp")
        new.write_text("".join(line + "\n" for line in lines if self._step(line) <= step))
        self.path = new.replace(path)

    @staticmethod
    def _step(line: str) -> float:
        try:
            return json.loads(line)["step"]
        except ValueError:  # a crash cut the line short
            return math.inf

    def write(self, **entry) -> None:
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            tqdm.write(f"warning: {self.path} cannot be written ({error.strerror})")


class Diverged(Exception):
    """A loss or a gradient is not finite."""


class Meter:
    """Collects the metrics of iterations, and reads them, which waits for the device, only now and then."""

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
        rows = torch.stack(self.pending).tolist()
        self.losses += [loss for loss, _ in rows]
        self.loss, norm = (sum(values) / len(rows) for values in zip(*rows, strict=True))
        seconds = time.perf_counter() - self.start
        self.tokens_per_second = len(self.pending) * run.config.tokens_per_iter / seconds
        scaled = run.scaler.is_enabled()  # float16 skips the iterations whose gradient overflows
        if not math.isfinite(self.loss) or not (scaled or math.isfinite(norm)):
            raise Diverged(f"the loss became {self.loss:.4g} (gradient {norm:.4g}) at iteration {run.step}")
        lr = learning_rate(run.config, run.step - 1)
        norm = norm if math.isfinite(norm) else None  # JSON has no infinity
        speed = round(self.tokens_per_second)
        self.log.write(
            kind="train", step=run.step, loss=self.loss, grad_norm=norm, lr=lr, tokens_per_second=speed
        )
        self.restart()


class Interrupt:
    """Turns the first Ctrl-C (or SIGTERM) into a wish to stop soon; the second stops at once."""

    def __enter__(self) -> "Interrupt":
        self.wished = False
        self.before = {
            number: signal.signal(number, self._wish) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _wish(self, number: int, frame: object) -> None:
        self.wished = True
        signal.signal(number, signal.SIG_DFL)
        tqdm.write("\nstopping after this iteration; once more to stop at once, without saving")

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def evaluate_and_save(run: Run, meter: Meter) -> None:
    """Print and log a line of the table; write last.pt, and best.pt if this causal loss is the lowest."""
    meter.read(run)
    decodes, trains = ROUTERS[run.config.router].decode, run.config.router_at(run.step)
    causal = evaluate(run, decodes)
    as_trained = causal if trains == decodes else evaluate(run, trains)
    train_loss = sum(meter.losses) / len(meter.losses) if meter.losses else math.nan
    tqdm.write(table_line(run.step, train_loss, causal, as_trained, meter.tokens_per_second))
    if not math.isfinite(causal["loss"]):
        raise Diverged(f"the validation loss became {causal['loss']:.4g} at iteration {run.step}")
    meter.log.write(kind="eval", step=run.step, causal=causal, as_trained=as_trained)
    before, run.evaluated = run.best, run.step
    run.best = min(before, causal["loss"])
    if not run.save("last.pt", *["best.pt"] * (run.best < before)):
        run.best = before  # best.pt may not hold it: the next evaluation tries again
    meter.losses.clear()
    meter.restart()


def train(run: Run) -> bool:
    """Run the iterations that are left; True if they were all run, False after Ctrl-C. Raises Diverged."""
    config = run.config
    meter = Meter(Log(Path(config.out_dir) / "log.jsonl", run.step))
    print("\n" + HEADER.format(as_trained="as trained" if config.first_iters else f"under {config.router}"))
    with Interrupt() as interrupt, tqdm(total=config.max_iters, initial=run.step, disable=None) as bar:
        while run.step < config.max_iters and not interrupt.wished:
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
                tqdm.write(f"  python train.py --init_from=resume --out_dir={shlex.quote(config.out_dir)}")
        elif run.step != run.evaluated:
            evaluate_and_save(run, meter)
        return finished


# -------------------- from the command line to the first iteration, and after the last --------------------


def prepare_out_dir(config: TrainConfig) -> None:
    """Make the run's folder; move aside a run that is in it and not resumed. Raises ValueError."""
    folder = Path(config.out_dir)
    try:
        old = any((folder / name).exists() for name in ("log.jsonl", "last.pt", "best.pt"))
        if old and config.init_from != "resume":
            number = next(n for n in itertools.count(1) if not Path(f"{folder}.{n}").exists())
            folder.rename(f"{folder}.{number}")
            print(f"the run that was in {folder} is now in {folder}.{number}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise ValueError(
            f"out_dir {folder} cannot be written ({error.strerror}): give another --out_dir"
        ) from error


def describe(run: Run) -> str:
    config, (total, active) = run.config, run.model.n_params()
    tokens = config.tokens_per_iter * config.max_iters
    size = len(run.dataset.train)
    flops = run.model.flops_per_token(config.block_size)
    stand_in = ROUTERS[config.router].decode
    routing = f"{config.k} of {config.n_expert} experts per token; causal stand-in {stand_in}"
    first = (
        f"{config.first_router} for {config.first_iters:,} iterations, then " if config.first_iters else ""
    )
    routing = f"{first}{config.router}, {routing}" if config.n_expert > 1 else "none: a dense model"
    return (
        f"model     {total:,} parameters, {active:,} active per token, {flops / 1e6:.1f} MFLOP per token\n"
        f"router    {routing}\n"
        f"data      {config.dataset}: {size:,} tokens, vocabulary {config.vocab_size:,}\n"
        f"training  {config.max_iters:,} iterations of {config.tokens_per_iter:,} tokens, "
        f"{tokens / size:.2f} epochs in all\n"
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
    left = (run.config.max_iters - run.step) * run.config.gradient_accumulation_steps
    minutes = left * (time.perf_counter() - start) * size / rows / 60
    took = f"{minutes:.1f} minutes" if minutes < 100 else f"{minutes / 60:.1f} hours"
    return f"about {took} on this machine, evaluations not counted"


def print_sample(run: Run) -> None:
    """A short text from the trained model."""
    tokenizer, config = run.dataset.tokenizer, run.config
    prompt = tokenizer.encode(run.dataset.meta.get("prompt", "")) or [tokenizer.eot]
    generator = torch.Generator(run.device).manual_seed(config.seed)
    idx = torch.tensor([prompt], device=run.device)
    chunks = run.model.generate(idx, config.sample_tokens, stop=tokenizer.eot, generator=generator)
    ids = torch.cat([chunk.tokens for chunk in chunks], dim=1)[0].tolist()
    print("\n--- sample\n" + tokenizer.decode(ids[prompt == [tokenizer.eot] :]))


def main(argv: list[str]) -> None:
    with bad_input_exits():
        config, checkpoint = read_config(argv)
        config, dataset = open_dataset(config, checkpoint)
        run = set_up(config, dataset, checkpoint)
        prepare_out_dir(config)
        del checkpoint  # the run has its own copy, and these may be many gigabytes
    print(describe(run))
    try:
        if run.step < config.max_iters:
            print(f"time      {estimate(run)}")
        finished = train(run)
        if finished and config.sample_tokens:
            print_sample(run)
            print(f"--- more: python sample.py --out_dir={config.out_dir} --show_experts")
    except torch.OutOfMemoryError:
        remedy = f"lower batch_size ({config.batch_size}) and raise gradient_accumulation_steps as much"
        print(f"error: the GPU's memory is too small: {remedy}", file=sys.stderr)
        sys.exit(2)
    except Diverged as error:
        last = Path(config.out_dir) / "last.pt"
        remedy = f"resume {last}, which is kept," if last.exists() else "start again"
        rate = f"learning_rate below {config.learning_rate:g}"
        print(f"error: {error}; {remedy} with a {rate}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before the first iteration or after the last
        finished = False
    if not finished:
        sys.exit(130)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters that the model writes
    main(sys.argv[1:])
