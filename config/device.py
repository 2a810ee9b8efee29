"""Where and in which number format to compute: the choices that `auto` stands for, each with its reason."""

import ctypes
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

from config import require

BFLOAT16_ONLY = "grouped_mm compiles in bfloat16 only"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> tuple[torch.device, str]:
    """The device of that name (auto: CUDA if there is any), and why. Raises ValueError if it is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), torch.cuda.get_device_name()
        return torch.device("cpu"), f"no CUDA GPU found; {torch.get_num_threads()} threads"
    present = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    present += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name not in present:
        raise ValueError(f"device is {name}, but this machine has {', '.join(present)} (or auto)")
    return torch.device(name), "as asked"


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of that name (auto: fast and safe on the device), and why. Raises ValueError for others."""
    if name != "auto":
        require(name in DTYPES, "dtype", name, f"auto, {', '.join(DTYPES)}")
        return DTYPES[name], "as asked"
    if device.type != "cuda":
        return torch.float32, "the safe choice without a GPU"
    major, minor = torch.cuda.get_device_capability(device)  # is_bf16_supported() counts emulation too
    if major >= 8:
        return torch.bfloat16, f"compute capability {major}.{minor} has bfloat16"
    return torch.float16, f"compute capability {major}.{minor} lacks bfloat16"


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Matrix products in this dtype; float32 changes nothing."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def compile_asked(name: str) -> bool | None:
    """What a setting `compile` asks for, None for auto. Raises ValueError for other names."""
    name = name.lower()  # as for true and false elsewhere
    require(name in ("auto", "true", "false"), "compile", name, "auto, true or false")
    return None if name == "auto" else name == "true"


def pick_compile(name: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether to use torch.compile (auto: in bfloat16 on a GPU), and why. Raises ValueError for others."""
    asked = compile_asked(name)
    if asked is not None:
        return asked, "as asked"
    if device.type != "cuda":
        return False, "compiling takes longer than it saves on short CPU runs"
    if dtype != torch.bfloat16:
        return False, BFLOAT16_ONLY
    return True, "bfloat16 on a GPU"


def check_memory(n_bytes: int, what: str, device: torch.device) -> None:
    """Raise ValueError if so many bytes are more than all memory of the device."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
    if n_bytes > total and device.type != "meta":  # which needs none
        needs = f"needs at least {n_bytes / 1e9:,.0f} GB of memory, but {device} has {total / 1e9:,.0f} GB"
        raise ValueError(f"{what} {needs}: choose smaller ones")


def as_graph(function: Callable, **options) -> Callable:
    """torch.compile for a process that compiles a function under many routers, some without a bound."""
    settings = torch._dynamo.config
    settings.capture_dynamic_output_shape_ops = True  # or the graph breaks where a layer counts its pairs
    settings.recompile_limit = 64  # instead of 8: routers, batch sizes, buckets of a cache
    # two pieces of advice: tf32 everywhere, by which close scores of a gate would tie, and on torch's kernels
    for start in ("TensorFloat32", r"\s*Online softmax is disabled"):
        warnings.filterwarnings("ignore", start)
    return torch.compile(function, **options)


def grouped_mm_is_a_kernel(device: torch.device) -> bool:
    """Whether grouped_mm in bfloat16 is one kernel on that GPU. On others it is a loop on the host, which
    waits."""
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


@contextmanager
def tf32() -> Iterator[None]:
    """Inside, a GPU rounds what goes into float32 products to ten bits, which is several times as fast."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        yield
    finally:
        matmul.allow_tf32 = before


REPAID_STEPS = 20_000  # compiling took 18 to 26 s and saved 1.6 to 2.7 ms a step: four layers, C=256, a CPU
LOAD = Path("/proc/loadavg")


def pick_compiled_decoding(
    name: str, steps: int, device: torch.device, dtype: torch.dtype
) -> tuple[bool, str]:
    """Whether to compile the step of MoEGPT.generate (auto: where so many steps repay it), and why.

    Raises ValueError for other names, and for true where it cannot be done: on a GPU in another dtype than
    bfloat16 (of dense models as well), and without a C++ compiler.
    """
    asked = compile_asked(name)
    if asked is False:
        return False, "as asked"
    if device.type == "cuda" and dtype != torch.bfloat16:
        require(not asked, "compile", name, f"auto or false on a GPU in {dtype}: {BFLOAT16_ONLY}")
        return False, BFLOAT16_ONLY
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(compiler):
        require(not asked, "compile", name, f"auto or false where there is no C++ compiler ({compiler})")
        return False, f"no C++ compiler ({compiler}) is found"
    if asked:
        return True, "as asked"
    return steps >= REPAID_STEPS, f"compiling is repaid by {REPAID_STEPS:,} steps, and these are {steps:,}"


@contextmanager
def decoding_threads(device: torch.device) -> Iterator[int]:
    """As many CPU threads as cores that nothing else uses now: at least one, at most all of torch's.

    A step has some hundred products, and each waits for its last thread. So beside one process that computes,
    two threads of two cores take 19 to 46 times as long as one (experiments/cost.md).
    """
    n = all_threads = torch.get_num_threads()
    if device.type == "cpu" and all_threads > 1:
        n = max(1, min(all_threads, free_cores()))
    torch.set_num_threads(n)
    try:
        yield n
    finally:
        torch.set_num_threads(all_threads)


def free_cores() -> int:
    """Cores of the machine on which nothing but this thread runs now; all, where the system does not tell."""
    try:
        others = min(read_running() for _ in range(5)) - 1  # what runs for a moment only does not count
    except (OSError, ValueError, IndexError):  # not Linux, or not readable
        others = 0
    return (os.cpu_count() or 1) - others


def read_running() -> int:
    """Threads of the whole machine that run, this one included, or wait for a core."""
    time.sleep(0.06)  # our own other threads may spin for up to 0.2 s before they sleep
    return int(LOAD.read_text().split()[3].split("/")[0])


def keep_freed_memory() -> None:
    """Have the C library keep large freed blocks for the next tensors, where it is glibc.

    Otherwise it gives each back to the system, which fills in fresh memory page by page at the next use: that
    takes a twelfth to a third of a training step on a CPU (experiments/cost.md).
    """
    if mallopt := glibc("mallopt"):
        M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of malloc.h
        if not mallopt(M_MMAP_THRESHOLD, 2**30):  # older releases refuse more than 32 MB
            mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Give back what keep_freed_memory has kept so far: the process then holds what its tensors need."""
    if malloc_trim := glibc("malloc_trim"):
        malloc_trim(0)


def glibc(name: str) -> Callable | None:
    """That function of the C library, where it is glibc."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
