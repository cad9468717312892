"""The cost of an image to a network, in bytes and operations, and how many images at once fit into free memory.

A CPU run must know this in advance: the system does not refuse memory, it kills the process that used too much.
"""

import functools
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from guided_diffusion.from_diffusers import create_network
from utils import processes
from utils.progress import is_quiet

TRIAL = 10.0  # seconds of work from which a dry run estimates the rest
_SPARE = 2  # memory per byte of tensors: kernels need workspace, and the allocator leaves gaps


def image_bytes(flags: Mapping[str, Any], *, training: bool = False) -> int:
    """Return the peak bytes that one more image needs in the network of `flags`; training: with gradients.

    Run the network on the meta device and count the live tensors; cached for the same flags.
    """
    return _image_bytes(tuple(sorted(flags.items())), training)


@functools.cache  # pool models often share their flags, and each count takes a second
def _image_bytes(items: tuple[tuple[str, Any], ...], training: bool) -> int:
    flags = dict(items)  # with 7 images the peak is in the images, not in the gradients of the weights
    return peak_bytes(lambda images: _pass(flags, images, training), 7)


def peak_bytes(work: Callable[[int], object], images: int) -> int:
    """Return the peak bytes that `work` (number of images -> anything) needs for one more image than `images`."""
    peaks = []
    for count in (images, images + 1):
        with _Alive() as alive:
            work(count)
        peaks.append(alive.most)
    return peaks[1] - peaks[0]


def image_flops(flags: Mapping[str, Any], *, training: bool = False) -> int:
    """Return the operations of one image, 2 per multiply-add; training: with the backward pass."""
    with FlopCounterMode(display=False) as counter:
        _pass(flags, 1, training)
    return counter.get_total_flops()


def _pass(flags: Mapping[str, Any], images: int, training: bool) -> None:
    """Run the network of `flags` on `images` images, on the meta device."""
    size = flags["image_size"]
    with torch.device("meta"), torch.set_grad_enabled(training):
        network = create_network(flags)
        t = torch.zeros(images, dtype=torch.int64)
        out = network(torch.zeros(images, 3, size, size), t, *([t] if flags["class_cond"] else []))
        if training:
            out.sum().backward()


def that_fit(
    flags: Mapping[str, Any], most: int, device: torch.device, *, training: bool = False, other: int = 0
) -> int:
    """Return how many images at once, up to `most`, fit into free memory in the network of `flags`.

    other: peak bytes per image of other work that takes turns with the network, such as the guide's gradient.
    Returns `most` on a GPU, which raises when memory runs out, and where the system does not report free memory.
    """
    free = free_memory() if device.type == "cpu" else None
    if free is None:
        return most
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this machine
    each = max(other, image_bytes(flags, training=training))
    fitting = max(1, min(most, int(free / here / (_SPARE * each))))
    if fitting < most and processes.is_first() and not is_quiet():
        tqdm.write(f"{free / 1e9:,.1f} GB of memory: batches of {fitting}", file=sys.stderr)
    return fitting


class _Alive(TorchDispatchMode):
    """Count the bytes of the tensors made in this context: `now` alive, and `most` at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Callable, types, args=(), kwargs=None):  # noqa: D105
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor):
                self._add(each.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        number, size = storage._cdata, storage.nbytes()
        if number in self._known:
            return
        self._known.add(number)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, number, size)

    def _drop(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.now -= size


def free_memory() -> int | None:
    """Return the bytes that the system can give this process, or None if it does not say."""
    free = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        return None
    try:  # the limit of a container or a job
        group = Path("/sys/fs/cgroup" + Path("/proc/self/cgroup").read_text().split("::")[1].split()[0])
        most, now = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        free += [int(most) - int(now) + _file_cache(group)] if most != "max" else []
    except (OSError, IndexError, ValueError):
        pass
    return max(0, min(free)) if free else None


def _file_cache(group: Path) -> int:
    """Return the bytes of cached files. They count as used by `group`, but are freed when memory is short."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))
