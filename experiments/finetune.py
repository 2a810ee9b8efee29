"""Is a TopK checkpoint better when it is trained on with SeqTopK than with TopK?

In the paper OLMoE's mean over five tasks is 29.74 under TopK and 31.49 under SeqTopK, tuned for about 100
iterations. Here a TopK run goes on for 100 iterations (--quick: 25) with other batches, under TopK, SeqTopK
and online SeqTopK; the last two are compared to the first. The first two rows are the checkpoint itself
without any tuning, decoded by TopK and by online SeqTopK.
"""

from collections.abc import Iterator

from experiments.lab import Arm, Judged, Lab, OpenRun, compare, judged, router_arms, run_question, tuned_arms


def answer(lab: Lab) -> list[dict]:
    def untuned(arm: Arm, run: OpenRun) -> Iterator[Judged]:
        for router in ("topk", "online_seqtopk"):
            yield f"{arm.name}, then {router}", f"{arm.name}, then topk", run.losses(router)

    topk = router_arms(["topk"], lab.k)
    tuned = tuned_arms(lab, topk[0], ["topk", "seqtopk", "online_seqtopk"])
    return judged(lab, topk, untuned) + compare(lab, tuned)


if __name__ == "__main__":
    run_question(answer)
