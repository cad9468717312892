"""The device, the precision, and batches that fit into memory."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

PRECISIONS = ("auto", "float32", "bf16")
_T = TypeVar("_T")
_WIDE = 64  # a network with at least so many channels is compiled on a GPU


def pick_device(name: str = "auto") -> torch.device:
    """Return the named device; make it the current one of this process if it is a GPU.

    "auto" picks a GPU if there is one. With several processes, "auto" and "cuda" give each its own GPU.
    Raises ValueError for a device that this machine lacks.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    elif name == "auto":
        name = "cpu"
    if name == "cpu":
        _keep_freed_memory()
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(f"got device {name!r}, which this machine lacks ({cause}); choose auto, cpu or cuda") from None
    device = torch.device(name)
    if device.type == "meta":
        raise ValueError("got device 'meta', whose tensors hold no numbers; choose auto, cpu or cuda")
    if device.type == "cuda":  # collectives and caches of this process use it too
        torch.cuda.set_device(device)
    return device


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Return a context in which networks train in bf16 if `precision` says so ("auto": on GPUs that have it).

    On CPUs "auto" means float32: networks small enough for a CPU were measured to be slower in bf16.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16) if _wants_bf16(precision, device) else nullcontext()


def inference_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a diffusion model's weights for sampling. The diffusion process stays in float32.

    "auto" is bf16 on GPUs that have it. On a CPU, `Pool.precision` times both and picks the faster.
    """
    return torch.bfloat16 if _wants_bf16(precision, device) else torch.float32


def may_gain_from_bf16(device: torch.device) -> bool:
    """Return whether this is a CPU with bf16 instructions. Without them bf16 is emulated, and slow."""
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def worth_compiling(device: torch.device, channels: int) -> bool:
    """Return whether to compile a network: only a wide one on a GPU. On a CPU, minutes of compiling save a sixth."""
    return device.type == "cuda" and channels >= _WIDE


def compile_in_place(network: nn.Module, backend: str | Callable = "inductor") -> None:
    """Compile `network` when it is first called, and again for each new batch size.

    Networks of the same shape share the result, so a pool is compiled once. Code that cannot be compiled runs
    uncompiled, and torch says so on stderr.
    """
    torch._dynamo.config.suppress_errors = True
    network.compile(backend=backend, dynamic=False)


def in_batches(work: Callable[[Tensor], _T], count: int, batch: int, first: int = 0) -> Iterator[tuple[Tensor, _T]]:
    """Yield (index, work(index)) for first .. first + count - 1 in order, `batch` items at a time.

    If memory runs out, halve the batch, say so on stderr, and try the same part again. The result of `work` must not
    depend on the batch size. Raises MemoryError if a single item does not fit.
    """
    start, stop = first, first + count
    while start < stop:
        index = torch.arange(start, min(start + batch, stop))
        done = or_too_much(partial(work, index))
        if done is None:
            batch = smaller(len(index))
            continue
        yield index, done
        start += len(index)


def or_too_much(work: Callable[[], _T]) -> _T | None:
    """Return work(), or None if it runs out of memory."""
    try:
        return work()
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
    if torch.cuda.is_available():  # after the except clause, which keeps the tensors alive
        torch.cuda.empty_cache()
    return None


def smaller(batch: int) -> int:
    """Halve a batch that did not fit into memory, and say so on stderr. Raises MemoryError for a batch of one."""
    if batch <= 1:
        raise MemoryError("out of memory for a single image; use a machine with more memory, or a smaller network")
    tqdm.write(f"out of memory: going on with batches of {batch // 2}", file=sys.stderr)
    return batch // 2


def _wants_bf16(precision: str, device: torch.device) -> bool:
    if precision not in PRECISIONS:
        raise ValueError(f"got precision {precision!r}, expected one of {', '.join(PRECISIONS)}")
    return precision == "bf16" or (precision == "auto" and device.type == "cuda" and _has_bf16(device))


def _has_bf16(device: torch.device) -> bool:
    """Return whether this GPU has bf16: compute capability 8 or higher. Torch's own check also accepts emulation."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _keep_freed_memory() -> None:
    """Make the C library keep large freed blocks. Mapping them anew took a fifth to two fifths of the run time."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    trim_threshold, mmap_threshold = -1, -3  # from malloc.h
    mallopt(mmap_threshold, 2**31 - 1)  # a batch of the paper's size has blocks above 1 GiB
    mallopt(trim_threshold, 2**31 - 1)
