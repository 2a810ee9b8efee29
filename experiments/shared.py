"""Is SeqTopK's gain smaller beside a shared expert, which every token gets on top of its K?

A shared expert does what all tokens need, and may leave less for SeqTopK to shift. TopK and SeqTopK are
trained without one, and with one as wide as the other experts, after a trunk that has it too. A row of
SeqTopK is compared to TopK with the same shared expert.
"""

from dataclasses import replace

from experiments.lab import Lab, compare, router_arms, run_question


def answer(lab: Lab) -> list[dict]:
    without = router_arms(lab, ["topk", "seqtopk"], lab.config.k)
    wider = {"shared_hidden": lab.shared["n_hidden"]}
    trunk, beside = lab.trunk and lab.trunk.vary(**wider), [arm.vary(**wider) for arm in without]
    return compare(lab, without + [replace(arm, base=beside[0].name, after=trunk) for arm in beside])


if __name__ == "__main__":
    run_question(answer)
