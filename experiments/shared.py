"""Is SeqTopK's gain smaller beside a shared expert, which every token gets on top of its K?

A shared expert does what all tokens need, and may leave less for SeqTopK to shift. TopK and SeqTopK are
trained without one and with one as wide as any other expert. A row of SeqTopK is compared to TopK with the
same shared expert.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from dataclasses import replace

from experiments import lab


def answer(bench: lab.Lab) -> list[dict]:
    plain = lab.router_arms(["topk", "seqtopk"], bench.k)
    beside = [lab.vary(arm, shared_hidden=bench.shared["n_hidden"]) for arm in plain]
    return lab.compare(bench, plain + [replace(arm, base=beside[0].name) for arm in beside])


if __name__ == "__main__":
    lab.run(answer)
