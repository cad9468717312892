"""Which device to work on, and in which precision."""

import ctypes
import sys
from contextlib import AbstractContextManager, nullcontext

import torch

PRECISIONS = ("auto", "float32", "bf16")


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" takes a GPU where there is one.

    Raises ValueError for a device that this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        _keep_freed_memory()
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(f"got device {name!r}, which this machine lacks ({cause}); choose auto, cpu or cuda") from None
    return torch.device(name)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """A context in which networks run in bf16 where `precision` says so ("auto": on GPUs that have it).

    On CPUs "auto" means float32: the small networks that a CPU affords were measured slower in bf16.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"got precision {precision!r}, expected one of {', '.join(PRECISIONS)}")
    wanted = precision == "bf16" or (precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())
    return torch.autocast(device.type, dtype=torch.bfloat16) if wanted else nullcontext()


def _keep_freed_memory() -> None:
    """Have the C library keep large blocks that are freed: mapping them anew took a fifth to two fifths of the time."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    trim_threshold, mmap_threshold = -1, -3  # from malloc.h
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, 2**31 - 1)
