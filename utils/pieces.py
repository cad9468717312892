"""The pieces of a long job, kept until all are there: a stopped job goes on, and processes share it."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from utils import checkpoint, processes


class Pieces:
    """What each piece of a job gave, in a file of its own; without a folder in memory, each process making all.

    A file is whole or not there. Who makes a piece does not matter: the folder, shared by all processes, is how they
    hand one another what they made.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = Path(folder) if folder is not None else None
        self._held: dict[str, Any] = {}

    def mine(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that are not made yet and are this process's to make, in order."""
        if not self.folder:
            return list(names)
        missing = processes.first_says([name for name in names if not self._path(name).exists()])
        return list(processes.own_share(missing))

    def keep(self, name: str, value: Any) -> None:
        """Keep what a piece gave: tensors, numbers, strings and containers of them."""
        if self.folder:
            checkpoint.save(self._path(name), value)
        else:
            self._held[name] = value

    def collect(self, names: Sequence[str]) -> list[Any]:
        """What all pieces gave, in the order of `names`, once every process has made its own."""
        if self.folder:
            processes.meet()
        return [checkpoint.load(self._path(name)) if self.folder else self._held[name] for name in names]

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.pt"


def digest_of(*tensors: torch.Tensor) -> str:
    """SHA-256 of the shapes, types and values of tensors on any device, as hex digits."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(f"{tuple(tensor.shape)} {tensor.dtype};".encode())
        whole.update(tensor.detach().cpu().contiguous().numpy())
    return whole.hexdigest()


def discard(folder: str | os.PathLike) -> None:
    """Delete a folder of pieces, once every process has read what it needs."""
    processes.meet()
    if processes.is_first():
        shutil.rmtree(folder, ignore_errors=True)
