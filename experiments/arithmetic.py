"""How many problems of data/arithmetic/test.jsonl does a trained run solve, by level?

The level of a problem is its number of steps. Answers are greedy, from KV cache and Expert Cache, many at
once. "exact match": the share of right final answers, with its 95% interval.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from dataclasses import dataclass
from statistics import mean

import data
from experiments import lab, solve
from router import ROUTERS


@dataclass(frozen=True)
class Options(solve.DecodeOptions):
    """Which problems."""

    problems: int = 300  # so many of each level
    batch_size: int = 100  # problems at once


def answer(bench: lab.Lab) -> list[dict]:
    config = bench.config
    model, tokenizer, folder = solve.open_model(bench, "out/arithmetic_seqtopk", config.k)
    chosen = solve.test_problems(data.load("arithmetic").folder, config.problems)
    solved = solve.solve(model, tokenizer, chosen, config.router, config.batch_size)
    name = f"{folder}, router {config.router or ROUTERS[model.config.router].decode}"
    rows = []
    for level in [*sorted({problem["level"] for problem in chosen}), "all"]:
        right, experts = zip(*(s for p, s in zip(chosen, solved) if level in ("all", p["level"])))
        row = {"what": f"level {level}, {name}", "problems": len(right)}
        row["exact match"] = solve.wilson(sum(right), len(right))
        rows.append(row | {"experts per token": mean(experts)})
    return rows


if __name__ == "__main__":
    lab.run(answer, Options)
