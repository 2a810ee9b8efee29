"""How many problems of data/arithmetic/test.jsonl does a trained run solve, by level?

The level of a problem is its number of steps. Answers are greedy, from KV cache and Expert Cache, many at
once. "exact match": the share of right final answers, with its 95% interval. The paper's tasks are others;
experiments/gsm8k.py has one of them.
"""

from dataclasses import dataclass

from experiments import solve
from experiments.lab import Lab, run_question

import data
from router import ROUTERS

ANSWER_TOKENS = 100  # about so many for the longest answer


@dataclass(frozen=True)
class Options(solve.DecodeOptions):
    """Which problems."""

    problems: int = 300  # so many of each level


def answer(lab: Lab) -> list[dict]:
    config = lab.config
    model, tokenizer, folder = solve.open_model(lab, "out/arithmetic_seqtopk", config.k)
    problems = solve.test_problems(data.load("arithmetic").folder, config.problems)
    compile = config.compiles(model, len(problems), ANSWER_TOKENS)
    solved = solve.solve(model, tokenizer, problems, config.router, config.batch_size, compile)
    name = f"{folder}, router {config.router or ROUTERS[model.config.router].decode}"
    rows = []
    for level in sorted({problem["level"] for problem in problems}):
        of_level = [found for problem, found in zip(problems, solved) if problem["level"] == level]
        rows.append(solve.score(f"level {level}, {name}", of_level))
    return [*rows, solve.score(f"level all, {name}", solved)]


if __name__ == "__main__":
    run_question(answer, Options)
