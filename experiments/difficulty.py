"""Do hard tokens get more experts?

That is the idea of SeqTopK; a reviewer of the paper found "the" among the tokens with the most. "rho":
Spearman's rank correlation, over the tokens of the validation text, of a token's experts (mean over layers)
with the entropy of the prediction made there, and with its loss. Then experts and loss by kind of token. In
arithmetic: the parts of a problem, where they are read and where they are predicted. In other text: of the
tokens that are read at least 50 times, those that get the most experts under each router, and those that get
the fewest.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.lab import Arm, Judged, Lab, OpenRun, judged, router_arms, run_question

EXTREMES = 8  # words with the most experts, and as many with the fewest
KINDS = ("words of the question", "numbers of the question", "words of the answer")
KINDS += ("copied numbers", "results", "final result")


def answer(lab: Lab) -> list[dict]:
    arms = router_arms(lab, ["seqtopk", "online_seqtopk"], lab.config.k)
    rows = judged(lab, arms, judge)
    whole = [row for row in rows if "rho loss" in row]
    kinds = [row for row in rows if "rho loss" not in row]
    by_arm = ([row for row in kinds if row["what"].startswith(f"{arm.name}, ")] for arm in arms)
    return [*whole, *itertools.chain(*map(extremes, by_arm))]


def judge(arm: Arm, run: OpenRun) -> Iterator[Judged]:
    loss, entropy, experts = run.by_token(run.decode)
    mean_experts = experts.float().mean(-1)  # (windows, T)
    figures = {"rho entropy": spearman(mean_experts, entropy), "rho loss": spearman(mean_experts, loss)}
    figures |= {"experts per token": mean_experts.mean().item(), "nats": loss.mean().item()}
    yield f"{arm.name}, all tokens", "", figures | {"curve": experts_by_entropy(mean_experts, entropy)}
    kinds = problem_parts if run.dataset.folder.name == "arithmetic" else frequent_tokens
    for kind, chosen in kinds(run).items():
        if chosen.any():
            figures = {"tokens": chosen.sum().item(), "experts per token": mean_experts[chosen].mean().item()}
            yield f"{arm.name}, {kind}", "", figures | {"nats": loss[chosen].mean().item()}


def extremes(rows: list[dict]) -> list[dict]:
    """Of many rows, the EXTREMES with the most experts per token and as many with the fewest, in order."""
    if len(rows) <= 2 * EXTREMES:
        return rows
    ranked = sorted(rows, key=lambda row: row["experts per token"][0], reverse=True)
    return ranked[:EXTREMES] + ranked[-EXTREMES:]


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two tensors of one shape. Ties share the mean of their ranks; 0 if all tie."""
    ranks = []
    for values in (a, b):
        _, place, count = values.flatten().unique(return_inverse=True, return_counts=True)
        ranks.append((count.cumsum(0) - (count - 1) / 2)[place])
    return torch.corrcoef(torch.stack(ranks).double())[0, 1].nan_to_num().item()


def experts_by_entropy(experts: Tensor, entropy: Tensor) -> dict[str, list[float]]:
    """Means of both in twenty equal shares of the tokens, from low entropy to high.

    experts, entropy (windows, T).
    """
    order = entropy.flatten().argsort()
    shares = {"entropy": entropy, "experts": experts}
    return {name: [part.mean().item() for part in x.flatten()[order].chunk(20)] for name, x in shares.items()}


def frequent_tokens(run: OpenRun) -> dict[str, Tensor]:
    """Where (windows, T) each token is that occurs at least 50 times."""
    x = torch.cat([x for x, _ in run.batches])
    tokens, count = x.unique(return_counts=True)
    decode = run.dataset.tokenizer.decode
    return {f"{decode([i])!r}, read": x == i for i in tokens[count >= 50].tolist()}


def problem_parts(run: OpenRun) -> dict[str, Tensor]:
    """Of arithmetic, which tokens (windows, T) are of a kind, and which are followed by one of that kind."""
    windows = torch.cat([x for x, _ in run.batches]).tolist()
    tokenizer = run.dataset.tokenizer
    pieces = {token: tokenizer.decode([token]) for token in set(itertools.chain(*windows))}
    pieces[tokenizer.eot] = ""  # no text: the next problem begins a line
    kinds = np.array([kinds_of_text([pieces[token] for token in window]) for window in windows])
    masks = {}
    for kind in KINDS:
        read = torch.from_numpy(kinds == kind)  # (windows, T)
        masks[f"{kind}, read"] = read
        masks[f"{kind}, predicted"] = F.pad(read[:, 1:], (0, 1))
    return masks


def kinds_of_text(pieces: list[str]) -> list[str]:
    """The kind of each token: one of KINDS, "" if it is empty or its line's beginning is not in the text."""
    text, place, kinds = "".join(pieces), 0, []
    for piece in pieces:
        at = place + len(piece) - len(piece.lstrip(" "))
        start = text.rfind("\n", 0, at) + 1
        known = piece and (start or text.startswith(("Question:", "Answer:")))
        kinds.append(kind_of_character(text[start:], at - start) if known else "")
        place += len(piece)
    return kinds


def kind_of_character(line: str, at: int) -> str:
    """The kind of the character at `at`, in a text that begins with its line."""
    digit = line[at : at + 1].isdigit()
    if line.startswith("Question"):
        return KINDS[1 if digit else 0]
    if not digit:
        return KINDS[2]
    return KINDS[5] if line.startswith("#") else KINDS[4] if "=" in line[:at] else KINDS[3]


if __name__ == "__main__":
    run_question(answer)
