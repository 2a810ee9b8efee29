"""Is a TopK checkpoint better when it is trained on with SeqTopK than with TopK?

The paper tunes pretrained models, which takes about 100 iterations. Here a TopK run goes on for 100
iterations (--quick: 25) with other batches, under TopK, SeqTopK and online SeqTopK; the last two are compared
to the first. The first two rows are the checkpoint itself, decoded by TopK and by online SeqTopK without any
tuning.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from collections.abc import Iterator

from experiments import lab


def answer(bench: lab.Lab) -> list[dict]:
    topk = lab.router_arms(["topk"], bench.k)[0]

    def untuned(arm: lab.Arm, folder: Path) -> Iterator[lab.Judged]:
        opened = lab.open_run(bench, folder)
        for router in ("topk", "online_seqtopk"):
            yield f"{topk.name}, then {router}", f"{topk.name}, then topk", lab.loss_figures(opened, router)

    tuned = lab.tuned_arms(bench, topk, ["topk", "seqtopk", "online_seqtopk"])
    return lab.judged(bench, [topk], untuned) + lab.compare(bench, tuned)


if __name__ == "__main__":
    lab.run(answer)
