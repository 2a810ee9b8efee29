"""What becomes of a model's loss when its router and K are changed without any tuning?

    python experiments/switch.py --init_from=allenai/OLMoE-1B-7B-0924 --text=FILE

The paper's OLMoE loses little: without tuning, its mean over five tasks is 29.74 under TopK and 29.34 under
online SeqTopK. Here it is the loss on a text of yours, under TopK, SeqTopK and online SeqTopK at K = 8, 4 and
2. SeqTopK sees tokens that come later, so its loss is no likelihood of the text. That of online SeqTopK,
which sees none, is what a user of the model would get.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments import solve
from experiments.lab import Lab, run_question

import data
from config import require
from data.source import read_text
from router import ROUTERS
from train import evaluate_text

WINDOWS = 64  # of the text


@dataclass(frozen=True)
class Options(solve.Options):
    """Which text."""

    text: str | None = None  # file with the text
    tokens: int | None = None  # in a window (none: 1024, or fewer where the model or the text has fewer)
    batch_size: int = 8  # windows at once


def answer(lab: Lab) -> list[dict]:
    config = lab.config
    require(config.text is not None, "text", config.text, "the path of a text: --text=FILE")
    model, tokenizer, folder = solve.open_model(lab, "out/small_topk")
    require(bool(model.expert_layers()), "the model", "dense", "one with experts")
    text = np.array(tokenizer.encode(read_text(Path(config.text))))
    tokens = config.tokens or max(1, min(model.config.block_size, 1024, len(text) - 1))
    batches = data.val_batches(text, tokens, config.batch_size, WINDOWS)
    routers = ("topk", "seqtopk", "online_seqtopk")
    pairs = [(k, router) for k in (8, 4, 2) if k <= model.config.n_expert for router in routers]
    rows = []
    for k, router in tqdm(pairs, unit="row", disable=None):
        found = evaluate_text(solve.with_k(model, k), batches, tokenizer.token_bytes, router)
        sees = "" if ROUTERS[router].causal else " (sees the future)"
        row = {"what": f"{folder.name}, K={k}, {router}{sees}", "nats/token": found["loss"]}
        rows.append(row | {"bits/byte": found["bpb"], "experts per token": found["experts"][0]})
    return rows


if __name__ == "__main__":
    run_question(answer, Options)
