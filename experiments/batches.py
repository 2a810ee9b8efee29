"""What does the number of sequences in a batch do to BatchTopK and SeqTopK at evaluation?

BatchTopK shares a budget among the sequences of a batch, so that a token's experts depend on its neighbours
there; the paper gives each sequence a budget of its own. Here each is trained, and then judged by the same
text in batches of 1, 4, 16 and 64 sequences, compared to 1. "nats" is the loss under the rule that trained,
and in the rows named online under the rule that decodes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from collections.abc import Iterator

import torch

from experiments import lab


def answer(bench: lab.Lab) -> list[dict]:
    def judge(arm: lab.Arm, folder: Path) -> Iterator[lab.Judged]:
        opened = lab.open_run(bench, folder)
        x, y = (torch.cat(parts) for parts in zip(*opened.batches))
        name = f"{arm.name}, {{}} sequences".format
        for size in (size for size in (1, 4, 16, 64) if size <= len(x)):
            batches = list(zip(x.split(size), y.split(size)))
            figures = lab.loss_figures(opened._replace(batches=batches), arm.settings["router"])
            yield name(size), name(1), figures
        yield f"{arm.name}, online", name(1), lab.loss_figures(opened, opened.decode)

    return lab.judged(bench, lab.router_arms(["seqtopk", "batchtopk"], bench.k), judge)


if __name__ == "__main__":
    lab.run(answer)
