"""Does SeqTopK gain more over TopK the sparser the model is?

The paper says yes: after fine-tuning, OLMoE's mean over five tasks goes from 29.74 to 31.49 at K = 8 and from
14.49 to 22.04 at K = 2. Here both are trained from scratch with K = 8, 4 and 2 of the same experts. A row of
SeqTopK is compared to TopK with the same K.
"""

from experiments.lab import Lab, Options, compare, router_arms, run_question


def answer(lab: Lab) -> list[dict]:
    return compare(lab, [arm for k in (8, 4, 2) for arm in router_arms(["topk", "seqtopk"], k)])


if __name__ == "__main__":
    run_question(answer, Options)
