"""How many problems of GSM8K's test set does a fine-tuned run or a Hugging Face model solve?

    python experiments/gsm8k.py --init_from=out/finetune_olmoe_gsm8k
    python experiments/gsm8k.py --init_from=allenai/OLMoE-1B-7B-0924 --shots=8

In the paper SeqTopK gains 2.1% over TopK at K = 8, and 16.9% at K = 2. Here answers are greedy, from KV cache
and Expert Cache, many at once. "exact match": the share of right numbers after "####", with its 95% interval.
Fine-tuned models get "Question: ...\\nAnswer:", as in training (data/pairs/prepare.py). Others need examples:
--shots=8 puts the first 8 of the training set before it. Answers are kept in gsm8k-*.jsonl in the folder of
the run; a second start does only those that are missing.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from experiments import solve
from experiments.lab import Lab, run_question

import data
from config import require
from data.arithmetic.prepare import is_correct, prompt_of, result_of
from data.pairs.prepare import Pair, read_pairs
from model import MoEGPT
from router import ROUTERS

ANSWER_TOKENS = 400  # the most for an answer


@dataclass(frozen=True)
class Options(solve.DecodeOptions):
    """Which problems."""

    problems: int | None = None  # so many (none: all)
    shots: int = 0  # solved examples in the prompt, for models that were not fine-tuned
    dataset: str = "gsm8k"  # where test.jsonl and the examples come from
    batch_size: int = 32  # problems at once


def answer(lab: Lab) -> list[dict]:
    config = lab.config
    model, tokenizer, folder = solve.open_model(lab, "out/finetune_olmoe_gsm8k", config.k)
    dataset = data.load(config.dataset)
    tests = read_test(dataset.folder / "test.jsonl")
    enough = (config.problems or 0) <= len(tests)
    require(enough, "problems", config.problems, f"at most {len(tests)}, or none")
    problems = tests[: config.problems]
    before = examples(dataset, config.shots)
    prompts = [before + prompt_of(problem.prompt) for problem in problems]
    note_lengths([len(tokenizer.encode(prompt)) for prompt in prompts], model.config.block_size)
    router = config.router or ROUTERS[model.config.router].decode
    name = f"gsm8k-{router}-{config.shots}shot-{identity(model, lab.dtype, router, before)}.jsonl"
    answers = read_answers(folder / name)
    todo = sorted(dict.fromkeys(p for p in prompts if p not in answers), key=len)  # little padding
    compile = config.compiles(model, len(todo), ANSWER_TOKENS)
    for start in tqdm(range(0, len(todo), config.batch_size), unit="batch", disable=None):
        some = todo[start : start + config.batch_size]
        new = dict(zip(some, solve.answer_prompts(model, tokenizer, some, ANSWER_TOKENS, router, compile)))
        append_answers(folder / name, new)
        answers |= new
    solved = []
    for prompt, problem in zip(prompts, problems):
        text, experts = answers[prompt]
        own_text = text.partition("\nQuestion:")[0]  # a model may go on with a question of its own
        solved.append((is_correct(own_text, result_of(problem.answer)), experts))
    return [solve.score(f"{folder}, K={model.config.k}, router {router}, {config.shots} examples", solved)]


def note_lengths(lengths: list[int], block_size: int) -> None:
    """Say how many prompts of these lengths, in tokens, leave too little room for an answer."""
    if long := sum(length + ANSWER_TOKENS > block_size for length in lengths):
        what = f"{long} of {len(lengths)} prompts (up to {max(lengths)} tokens) and {ANSWER_TOKENS} of answer"
        print(f"note: {what} are more than block_size = {block_size}, which the model was trained for")


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
    require(len(ends) == shots, "shots", shots, f"at most {len(ends)}, the problems of the training set")
    texts = (dataset.tokenizer.decode(dataset.train[a:b]) for a, b in zip([0, *(ends + 1)], ends))
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
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        for prompt, (text, experts) in new.items():
            file.write("\n" + json.dumps({"prompt": prompt, "text": text, "experts": experts}))


if __name__ == "__main__":
    run_question(answer, Options)
