"""Should a model that is decoded online be trained with SeqTopK or with online SeqTopK?

The paper trains with SeqTopK and decodes online. Trained online as well, its model solves less of GSM8K:
45.80 against 46.09. Here both are trained, and a third run that begins with SeqTopK and spends its last tenth
under online SeqTopK. "nats" is the loss under online SeqTopK, and TopK's own for TopK. Each row is compared
to TopK, but the last to SeqTopK.
"""

from dataclasses import replace

from experiments.lab import Lab, compare, router_arms, run_question


def answer(lab: Lab) -> list[dict]:
    arms = router_arms(lab, ["topk", "seqtopk", "online_seqtopk"], lab.config.k)
    start = {"first_router": "seqtopk", "first_iters": lab.shared["max_iters"] * 9 // 10}
    name = f"seqtopk, the last tenth online, k={lab.config.k}"
    switched = replace(arms[2], name=name, settings=arms[2].settings | start, base=arms[1].name)
    return compare(lab, [*arms, switched])


if __name__ == "__main__":
    run_question(answer)
