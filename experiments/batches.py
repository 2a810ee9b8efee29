"""What does the number of sequences in a batch do to BatchTopK and SeqTopK at evaluation?

BatchTopK shares a budget among the sequences of a batch, so that a token's experts depend on its neighbours
there; the paper gives each sequence a budget of its own. Here a model is trained with each, and judged by the
same text in batches of 1, 4, 16 and 64 sequences. Rows are compared to batches of 1. "nats" is the loss under
the router that trained and, in the rows named online, under the one that decodes.
"""

from collections.abc import Iterator

import torch

from experiments.lab import Arm, Judged, Lab, OpenRun, judged, router_arms, run_question


def answer(lab: Lab) -> list[dict]:
    def judge(arm: Arm, run: OpenRun) -> Iterator[Judged]:
        x, y = (torch.cat(parts) for parts in zip(*run.batches))
        name = f"{arm.name}, {{}} sequences".format
        for size in (size for size in (1, 4, 16, 64) if size <= len(x)):
            resized = run._replace(batches=list(zip(x.split(size), y.split(size))))
            yield name(size), name(1), resized.losses(arm.settings["router"])
        yield f"{arm.name}, online", name(1), run.losses()

    return judged(lab, router_arms(lab, ["seqtopk", "batchtopk"], lab.config.k), judge)


if __name__ == "__main__":
    run_question(answer)
