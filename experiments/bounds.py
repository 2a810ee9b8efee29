"""How much do max_experts, min_experts and the strict budget matter?

The paper lets a token have at least one expert and at most K + 2; its results with K + 1 to K + 4 fluctuate.
It says that the online rule never overspends, but without the strict budget it can. Here runs are trained and
decoded within other bounds, and compared to the defaults (min_experts=1 and max_experts=K+2); online SeqTopK
is trained with and without the strict budget. The last row is the first one's runs, decoded without it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from collections.abc import Iterator

from experiments import lab


def answer(bench: lab.Lab) -> list[dict]:
    base, online = lab.router_arms(["seqtopk", "online_seqtopk"], bench.k)
    bounds = [{"max_experts": bench.k + extra} for extra in (1, 3, 4)]
    bounds += [{"max_experts": bench.shared["n_expert"]}, {"min_experts": 0}]
    arms = [base, *(lab.vary(base, **bound) for bound in bounds), online, lab.vary(online, strict=False)]

    def decoded_loosely(arm: lab.Arm, folder: Path) -> Iterator[lab.Judged]:
        name = f"{base.name}, decoded with strict={{}}".format
        for strict in (True, False):
            opened = lab.open_run(bench, folder, strict=strict)
            figures = lab.loss_figures(opened, opened.decode)
            yield name(str(strict).lower()), name("true"), figures

    return lab.compare(bench, arms) + lab.judged(bench, [base], decoded_loosely)


if __name__ == "__main__":
    lab.run(answer)
