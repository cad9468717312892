"""The processes of one run: one, or those that torchrun started. How they share work and meet."""

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

_PATIENCE = timedelta(days=1)  # for the slowest; of one that died torchrun hears at once and ends the others
_T = TypeVar("_T")


@contextmanager
def together() -> Iterator[None]:
    """Within, the processes that torchrun started are joined: by gloo, and on GPUs by nccl too. One needs nothing."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    store, number, size = next(dist.rendezvous("env://", timeout=_PATIENCE))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=_of_this_attempt(store, number, size),
        rank=number, world_size=size, timeout=_PATIENCE,
    )  # fmt: skip
    yield
    dist.destroy_process_group()  # not after an error: the others may wait for what will not come


def _of_this_attempt(store: dist.Store, number: int, size: int) -> dist.Store:
    """A part of the job's store that no attempt before a restart (--max-restarts) has written to.

    Of those the store still has the addresses, which torch would call. So the first process numbers the attempts, and
    all begin once each has taken a number that it did not have before.
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
    """How many processes this run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this one writes the files of the run and speaks for it."""
    return rank() == 0


def meet() -> None:
    """Wait until all processes are here."""
    if count() > 1:
        dist.all_reduce(torch.zeros(1))  # on the CPU, so by gloo: nothing waits on a GPU


def first_says(value: _T) -> _T:
    """What the first process gives here, in all: for what files say, which may change between two looks."""
    box: list[Any] = [value]
    if count() > 1:
        dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def own_share(items: Sequence[_T]) -> Sequence[_T]:
    """This process's part of `items`: neighbours, so that few processes need the same pool model."""
    total, parts, here = len(items), count(), rank()
    return items[total * here // parts : total * (here + 1) // parts]


def all_of(share: torch.Tensor) -> torch.Tensor:
    """The tensors (N, ...) of all processes, of one shape, in their order, as one on the CPU."""
    if count() == 1:
        return share
    parts = [torch.empty_like(share, device="cpu") for _ in range(count())]
    dist.all_gather(parts, share.cpu())
    return torch.cat(parts)


def same_weights(*modules: nn.Module) -> None:
    """Give the first process's parameters and buffers to all. On GPUs equal training may differ in the last bits."""
    if count() > 1:
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                held = tensor.detach().cpu()
                dist.broadcast(held, 0)
                tensor.data.copy_(held)
