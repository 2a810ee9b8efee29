"""In texts of four times the training context, how many experts do tokens get, and does the budget hold?

The paper says that online SeqTopK never overspends; a strict budget should hold at any length. The caches
hold all of the text, which is the model's own (written) or the validation data's (read). Rows are its
quarters: "experts per token" in that quarter, and "spent", the share of the budget of all tokens so far, at
its end. Positions beyond the first quarter are new to the model: what it writes gets worse there.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from experiments.lab import Arm, Judged, Lab, OpenRun, judged, router_arms, run_question


def answer(lab: Lab) -> list[dict]:
    def judge(arm: Arm, run: OpenRun) -> Iterator[Judged]:
        for strict, kind in itertools.product((True, False), ("written", "read")):
            opened = run.changed(strict=strict)
            experts = read_experts(opened) if kind == "read" else written_experts(opened, lab.config.seed)
            quarters = experts.cpu().unflatten(1, (4, -1)).mean((0, 2, 3))  # (4,)
            spent = quarters.cumsum(0) / torch.arange(1, 5) / run.model.config.k
            for i in range(4):
                name = f"{arm.name}, {'' if strict else 'not '}strict, {kind}, quarter {i + 1}"
                yield name, "", {"experts per token": quarters[i].item(), "spent": spent[i].item()}

    return judged(lab, router_arms(lab, ["seqtopk", "online_seqtopk"], lab.config.k), judge)


def written_experts(run: OpenRun, seed: int) -> Tensor:
    """Experts (16, T, L) of each token of 16 texts that the model writes, T = 4 * block_size."""
    model, T = run.model, 4 * run.model.config.block_size
    device = model.head.weight.device
    idx = torch.full((16, 1), run.dataset.tokenizer.eot, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    chunks = model.generate(idx, T - 1, model.new_cache(16, T), generator=generator)
    return torch.cat([chunk.n_taken for chunk in chunks], dim=1).float()


@torch.no_grad()
def read_experts(run: OpenRun) -> Tensor:
    """Experts (16, T, L) of each token of 16 windows of the validation text, T = 4 * block_size."""
    model, T = run.model, 4 * run.model.config.block_size
    x = torch.cat([x for x, _ in run.dataset.val_batches(T, 16, 16)]).to(model.head.weight.device)
    return model(x, cache=model.new_cache(len(x), T))[2].n_taken.movedim(0, -1).float()


if __name__ == "__main__":
    run_question(answer)
