"""Several processes that train one model, each on a GPU of its own; torchrun starts them.

    torchrun --standalone --nproc_per_node=2 train.py config/tiny_seqtopk.py --gradient_accumulation_steps=2

Each process computes an equal part of an iteration's micro-batches. By default each has the whole model, and
DDP averages the gradients while the backward pass goes on. Under `--shard=true` each has a part of every
weight, gradient and moment, a DTensor; FSDP2 gathers the weights of a block when its turn comes.

In one process nothing here communicates. Numbers of the host go through gloo: nobody waits for a GPU.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from config import require


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def joined() -> Iterator[None]:
    """Inside, this process works with the others that torchrun has started, if it has; the first one prints.

    If another one dies, this one says so and exits with code 1.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    # left to itself torch takes NCCL alone where there is a GPU, and that carries no tensors of the CPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank() else sys.stdout):
            yield
    except RuntimeError as error:
        if "by peer" not in str(error):  # closed, or reset
            raise
        line = f"error: process {rank()} of {world()} ends, because another one has ended"
        print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # a usual exit can abort: gloo's threads still wait for the other process
    dist.destroy_process_group()


@contextmanager
def first_before_others() -> Iterator[None]:
    """The other processes do what is inside when the first one has done it: it prepares what all need."""
    if rank() > 0:
        anyone(False)
    yield
    if rank() == 0:
        anyone(False)


def own_device(device: torch.device) -> torch.device:
    """The device of this process, current from now on: under torchrun the GPU of its own number.

    Raises ValueError if there are fewer GPUs than processes, or one GPU is asked for by all.
    """
    if device.type == "cpu":
        return device
    if world() > 1:
        require(device.index is None, "device", device, "auto, cpu or cuda, as each process has its own GPU")
        number, processes = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        found = torch.cuda.device_count()
        require(processes <= found, "nproc_per_node", processes, f"at most {found}, one for each GPU")
        device = torch.device("cuda", number)
    torch.cuda.set_device(device.index or 0)
    return device


# -------------------- the model ---------------------------------------------------------------------------


def distribute(model: nn.Module, device: torch.device, shard: bool) -> nn.Module:
    """Move the model, which has `blocks`, to the device: if `shard`, a part of it. -> the module to call."""
    if world() > 1 and shard:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh(device.type, (world(),))
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
    model.to(device)
    if world() == 1 or shard:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def accumulating(forward: nn.Module, more: bool) -> AbstractContextManager:
    """Forward and backward inside. `more` micro-batches follow: DDP need not average the gradients yet.

    FSDP2 averages anyway: to wait, each process would have to hold whole gradients.
    """
    return forward.no_sync() if more and hasattr(forward, "no_sync") else nullcontext()


def is_shard(x: Any) -> bool:
    return hasattr(x, "full_tensor")  # to import DTensor takes a second and a half


def full(x: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded, in every process."""
    return x.full_tensor() if is_shard(x) else x


def own_part(x: Tensor, like: Tensor) -> Tensor:
    """x, whole in every process, sharded as `like` is, if that is a shard of the same shape."""
    if is_shard(like) and getattr(x, "shape", None) == like.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)
    return x


def local(x: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return x.to_local() if is_shard(x) else x


def whole_matrices(x: Tensor) -> Tensor:
    """What this process computes of x (..., rows, columns), of which each matrix is treated by itself.

    A sharded stack of experts consists of whole matrices, and each process computes its own. A sharded
    matrix consists of rows: every process gathers and computes all of it and keeps its rows (`own_rows`),
    because the matrices outside of experts are few, and a second message would take longer.
    """
    return full(x) if x.dim() == 2 else local(x)


def own_rows(x: Tensor, like: Tensor) -> Tensor:
    """What this process keeps of x, which was computed from whole_matrices(like)."""
    return local(own_part(x, like)) if like.dim() == 2 else x


def unsharded(state: Any) -> Any:
    """A state_dict of any depth without shards: whole tensors, in the first process and on its CPU only."""
    if isinstance(state, dict):
        return {key: unsharded(value) for key, value in state.items()}
    if isinstance(state, list):
        return [unsharded(value) for value in state]
    if not is_shard(state):
        return state
    tensor = full(state)
    return None if rank() else tensor.cpu()


def sharded(state: dict, optimizer: Optimizer) -> dict:
    """The state_dict of whole tensors as the optimizer must have it: sharded as its weights are."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    of_weights = {
        number: {key: own_part(value, weights[number]) for key, value in entries.items()}
        for number, entries in state["state"].items()
    }
    return state | {"state": of_weights}


# -------------------- messages ----------------------------------------------------------------------------


def total(x: Tensor) -> Tensor:
    """The sum over processes."""
    if world() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def gathered(x: Tensor, dim: int) -> Tensor:
    """The tensors of all processes, one behind the other in that dimension."""
    if world() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim)


def anyone(wish: bool) -> bool:
    """Whether any process wishes it. All wait here for the last one."""
    return total(torch.tensor(float(wish))).item() > 0


def by_first(call: Callable[[], Any]) -> Any:
    """What call() gives in the first process, which alone makes it."""
    result = [None if rank() else call()]
    if world() > 1:
        dist.broadcast_object_list(result)
    return result[0]
