"""What the tasks of this folder share: open any model, let it write answers, count those that are right."""

import json
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
from config import results
from config.device import pick_compiled_decoding
from data import AnyTokenizer
from data.arithmetic.prepare import is_correct, prompt_of
from model import Chunk, MoEGPT, load_checkpoint

FINAL_LINE = re.compile(r"####[^\n]*[0-9][^\n]*\n")  # result_of takes its number
ROOM_STEP = 256  # tokens: a cache's room is a multiple, because each size costs a graph when compiled
CHECK_EVERY = 16  # tokens from one look for final answers to the next
Solved = tuple[bool, float]  # whether an answer is right, and its mean experts per token


@dataclass(frozen=True)
class Options(results.Options):
    """Which model."""

    init_from: str | None = None  # a run, a checkpoint, or a Hugging Face model (none: the task's own run)


@dataclass(frozen=True)
class DecodeOptions(Options):
    """How it writes."""

    router: str | None = None  # any causal one (none: the stand-in for the run's own)
    k: int | None = None  # experts per token on average (none: the model's)
    compile: str = "auto"  # compile the step of a token: auto (where many steps repay it), true or false
    batch_size: int = 100  # problems at once

    def compiles(self, model: MoEGPT, problems: int, tokens: int) -> bool:
        """Whether to compile for so many answers of up to so many tokens."""
        steps, weight = math.ceil(problems / self.batch_size) * tokens, model.head.weight
        return pick_compiled_decoding(self.compile, steps, weight.device, weight.dtype)[0]


def open_model(machine: results.Machine, run: str, k: int | None = None) -> tuple[MoEGPT, AnyTokenizer, Path]:
    """The model of init_from (none: of `run`), its tokenizer, and the folder of its run.

    k: as in with_k, None for the model's own. A Hugging Face model has no run, and gets the folder out/MODEL.
    """
    name = machine.config.init_from
    if name and data.is_hugging_face(name):
        tokenizer, model = data.hf_tokenizer(name), MoEGPT.from_pretrained(name, machine.device)
        folder = Path("out") / Path(name).resolve().name
    else:
        checkpoint = load_checkpoint(name or run)
        folder = Path(checkpoint["path"]).parent
        tokenizer = data.make_tokenizer(checkpoint.get("tokenizer"), checkpoint["path"])
        model = MoEGPT.from_checkpoint(checkpoint)
    model = model.to(machine.device).cast(machine.dtype).eval()
    return with_k(model, k) if k else model, tokenizer, folder


def with_k(model: MoEGPT, k: int) -> MoEGPT:
    """The model itself, which from now on has k experts per token on average and the default bounds."""
    return model.rerouted(k=k, min_experts=1, max_experts=None)


def test_problems(folder: Path, per_level: int) -> list[dict]:
    """The first `per_level` test problems of each level of the arithmetic in a folder, level by level."""
    problems = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    by_level = [[p for p in problems if p["level"] == n] for n in sorted({p["level"] for p in problems})]
    return [problem for level in by_level for problem in level[:per_level]]


def solve(
    model: MoEGPT,
    tokenizer: AnyTokenizer,
    problems: list[dict],
    router: str | None = None,
    batch_size: int = 100,
    compile: bool = False,
) -> list[Solved]:
    """Of each problem, whether the greedy answer is right, and its mean experts per token."""
    solved = []
    for start in tqdm(range(0, len(problems), batch_size), unit="batch", disable=None):
        some = problems[start : start + batch_size]
        room = 32 + max(len(tokenizer.encode(problem["answer"])) for problem in some)
        answers = answer_prompts(
            model, tokenizer, [prompt_of(p["question"]) for p in some], room, router, compile
        )
        solved += [(is_correct(text, p["result"]), experts) for (text, experts), p in zip(answers, some)]
    return solved


def answer_prompts(
    model: MoEGPT,
    tokenizer: AnyTokenizer,
    prompts: list[str],
    room: int,
    router: str | None,
    compile: bool = False,
) -> list[tuple[str, float]]:
    """Of each prompt, the greedy continuation, and the mean experts per token of both.

    It ends at end-of-text, after `room` tokens, or up to CHECK_EVERY after the lines of all final answers.
    """
    device, pad = model.head.weight.device, partial(pad_sequence, batch_first=True, padding_side="left")
    ids = [torch.tensor(tokenizer.encode(prompt)) for prompt in prompts]
    idx, active = pad(ids).to(device), pad([torch.ones_like(p).bool() for p in ids]).to(device)
    needed = -(-(idx.shape[1] + room) // ROOM_STEP) * ROOM_STEP
    cache = model.new_cache(len(prompts), needed, router)
    chunks = []
    options = {"temperature": 0, "stop": tokenizer.stops, "active": active, "compile": compile}
    for chunk in model.generate(idx, room, cache, **options):
        chunks.append(chunk)
        if len(chunks) % CHECK_EVERY == 0:
            texts = continuations(tokenizer, chunks)
            if all(FINAL_LINE.search(text) or not alive for text, alive in zip(texts, chunk.active[:, -1])):
                break
    experts, real = (torch.cat([getattr(c, name) for c in chunks], dim=1) for name in ("n_taken", "active"))
    experts = (experts.float().mean(-1) * real).sum(1) / real.sum(1)
    return list(zip(continuations(tokenizer, chunks), experts.tolist()))


def continuations(tokenizer: AnyTokenizer, chunks: list[Chunk]) -> list[str]:
    """What was written after each prompt; the prompts are the first of the chunks."""
    if len(chunks) == 1:
        return [""] * len(chunks[0].tokens)
    tokens, real = (torch.cat([getattr(c, name) for c in chunks[1:]], dim=1) for name in ("tokens", "active"))
    return [tokenizer.decode(row[mask].tolist()) for row, mask in zip(tokens, real)]


def score(what: str, solved: list[Solved]) -> dict:
    """The row of a task."""
    right, experts = zip(*solved)
    row = {"what": what, "problems": len(right), "exact match": wilson(sum(right), len(right))}
    return row | ({} if math.isnan(mean(experts)) else {"experts per token": mean(experts)})


def wilson(right: int, n: int, z: float = 1.96) -> list[float]:
    """The share that is right, and its 95% interval (E. B. Wilson, 1927)."""
    share, scale = right / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [share, max(0.0, middle - half), min(1.0, middle + half)]
