"""How much do max_experts, min_experts and the strict budget matter?

The paper lets a token have at least one expert and at most K + 2; its results with K + 1 to K + 4 fluctuate.
It says that the online rule never overspends, but without the strict budget it can. Here models are trained
and decoded within other bounds, and compared to the defaults (min_experts=1 and max_experts=K+2); online
SeqTopK is trained with and without the strict budget. The last row has the models of the first, decoded
without it.
"""

from collections.abc import Iterator

from experiments.lab import Arm, Judged, Lab, OpenRun, compare, judged, router_arms, run_question


def answer(lab: Lab) -> list[dict]:
    k = lab.config.k
    base, online = router_arms(lab, ["seqtopk", "online_seqtopk"], k)
    bounds = [{"max_experts": k + extra} for extra in (1, 3, 4)]
    bounds += [{"max_experts": lab.shared["n_expert"]}, {"min_experts": 0}]
    arms = [base, *(base.vary(**bound) for bound in bounds), online, online.vary(strict=False)]

    def decoded_loosely(arm: Arm, run: OpenRun) -> Iterator[Judged]:
        name = f"{arm.name}, decoded with strict={{}}".format
        yield name("true"), name("true"), run.losses()
        yield name("false"), name("true"), run.changed(strict=False).losses()

    return compare(lab, arms) + judged(lab, [base], decoded_loosely)


if __name__ == "__main__":
    run_question(answer)
