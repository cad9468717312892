"""Let the processes of a run share work and synchronise: a single one, or those that torchrun started."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from utils import stopping

_PATIENCE = timedelta(days=1)  # for the slowest process; if one dies, torchrun stops the rest at once
_T = TypeVar("_T")


@contextmanager
def together() -> Iterator[None]:
    """Connect the processes that torchrun started, by gloo, and on GPUs by nccl too. Does nothing for a single one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    store, number, size = next(dist.rendezvous("env://", timeout=_PATIENCE))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=_of_this_attempt(store, number, size),
        rank=number, world_size=size, timeout=_PATIENCE,
    )  # fmt: skip
    yield
    dist.destroy_process_group()  # not after an error: the other processes may wait forever


def _of_this_attempt(store: dist.Store, number: int, size: int) -> dist.Store:
    """Return a part of the job's store that no attempt before a restart (--max-restarts) has written to.

    The store still holds the addresses of earlier attempts, which torch would use. So the first process numbers the
    attempts, and all start once each has seen a number that is new to it.
    """
    if number == 0:
        attempt = store.add("attempt", 1)
        while not store.check([f"attempt{attempt}/{other}" for other in range(1, size)]):
            _pause()
        store.set(f"attempt{attempt}", "begins")
        return dist.PrefixStore(f"attempt{attempt}", store)
    known, begun = f"last attempt of {number}", False
    attempt = store.add(known, 0)
    while not begun:
        while (newest := store.add("attempt", 0)) <= attempt:
            _pause()
        store.add(known, newest - attempt)
        attempt = newest
        store.set(f"attempt{attempt}/{number}", "is here")
        while not (begun := store.check([f"attempt{attempt}"])) and store.add("attempt", 0) == attempt:
            _pause()
    return dist.PrefixStore(f"attempt{attempt}", store)


def _pause() -> None:
    stopping.check()
    time.sleep(0.05)


def count() -> int:
    """Return the number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Return whether this is the first process, which writes the run's files and prints for all."""
    return rank() == 0


def meet() -> None:
    """Wait until all processes have called this."""
    if count() > 1:
        dist.all_reduce(torch.zeros(1))  # on the CPU, by gloo, so that no GPU has to finish its work


def broadcast(value: _T) -> _T:
    """Return the first process's `value` in all processes, as files may change between two looks."""
    box: list[Any] = [value]
    if count() > 1:
        dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def own_share(items: Sequence[_T]) -> Sequence[_T]:
    """Return this process's part of `items`, a contiguous one, so that few processes need the same pool model."""
    total, parts, here = len(items), count(), rank()
    return items[total * here // parts : total * (here + 1) // parts]


def all_of(share: torch.Tensor) -> torch.Tensor:
    """Join `share` (N, ...) of all processes, in order of rank, on the CPU. All have the same shape."""
    if count() == 1:
        return share
    parts = [torch.empty_like(share, device="cpu") for _ in range(count())]
    dist.all_gather(parts, share.cpu())
    return torch.cat(parts)


def same_weights(*modules: nn.Module) -> None:
    """Copy the first process's parameters and buffers to all, as equal GPU trainings may differ in the last bits."""
    if count() > 1:
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                held = tensor.detach().cpu()
                dist.broadcast(held, 0)
                tensor.data.copy_(held)
