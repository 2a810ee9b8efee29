"""In texts of four times the training context, what becomes of experts per token and budget?

A strict budget should hold at any length. The caches hold all of the text, so that no window begins anew; the
text is the model's own (written) or the validation data's (read). Rows are its quarters: "experts per token"
in that quarter, and "spent", the share of the budget of all tokens so far, at its end. Positions beyond the
first quarter are new to the model: what it writes gets worse there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from experiments import lab


def answer(bench: lab.Lab) -> list[dict]:
    def judge(arm: lab.Arm, folder: Path) -> Iterator[lab.Judged]:
        for strict, kind in itertools.product((True, False), ("written", "read")):
            opened = lab.open_run(bench, folder, strict=strict)
            experts = written_experts(bench, opened) if kind == "written" else read_experts(bench, opened)
            quarters = experts.cpu().unflatten(1, (4, -1)).mean((0, 2, 3))  # (4,)
            spent = quarters.cumsum(0) / torch.arange(1, 5) / opened.model.config.k
            for i in range(4):
                name = f"{arm.name}, {'' if strict else 'not '}strict, {kind}, quarter {i + 1}"
                yield name, "", {"experts per token": quarters[i].item(), "spent": spent[i].item()}

    return lab.judged(bench, lab.router_arms(["seqtopk", "online_seqtopk"], bench.k), judge)


def written_experts(bench: lab.Lab, opened: lab.Opened) -> Tensor:
    """Experts (16, T, L) of each token of 16 texts that the model writes, T = 4 * block_size."""
    model, T = opened.model, 4 * opened.model.config.block_size
    idx = torch.full((16, 1), opened.dataset.tokenizer.eot, device=bench.device)
    generator = torch.Generator(bench.device).manual_seed(bench.config.seed)
    chunks = model.generate(idx, T - 1, model.new_cache(16, T), generator=generator)
    return torch.cat([chunk.n_taken for chunk in chunks], dim=1).float()


@torch.no_grad()
def read_experts(bench: lab.Lab, opened: lab.Opened) -> Tensor:
    """Experts (16, T, L) of each token of 16 windows of the validation text, T = 4 * block_size."""
    T = 4 * opened.model.config.block_size
    x = torch.cat([x for x, _ in opened.dataset.val_batches(T, 16, 16)]).to(bench.device)
    return opened.model(x, cache=opened.model.new_cache(len(x), T))[2].n_taken.movedim(0, -1).float()


if __name__ == "__main__":
    lab.run(answer)
