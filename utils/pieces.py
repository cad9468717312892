"""Store the pieces of a long job until all are made, so that a stopped job resumes and processes share the work."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from utils import checkpoint, processes


class Pieces:
    """The results of a job's pieces, each in its own file. Without a folder they are in memory: each process makes all.

    A file is whole or absent. All processes share the folder, so any of them may make a piece.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = Path(folder) if folder is not None else None
        self._held: dict[str, Any] = {}

    def mine(self, names: Sequence[str]) -> list[str]:
        """Return the names of the pieces that this process still has to make, in order."""
        if not self.folder:
            return list(names)
        missing = processes.broadcast([name for name in names if not self._path(name).exists()])
        return list(processes.own_share(missing))

    def keep(self, name: str, value: Any) -> None:
        """Store the result of a piece: tensors, numbers, strings and containers of them."""
        if self.folder:
            checkpoint.save(self._path(name), value)
        else:
            self._held[name] = value

    def collect(self, names: Sequence[str]) -> list[Any]:
        """Wait for all processes, and return the results of all pieces in the order of `names`."""
        if self.folder:
            processes.meet()
        return [checkpoint.load(self._path(name)) if self.folder else self._held[name] for name in names]

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.pt"


def digest_of(*tensors: torch.Tensor) -> str:
    """Return the SHA-256 of the shapes, dtypes and values of tensors on any device, as hex digits."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(f"{tuple(tensor.shape)} {tensor.dtype};".encode())
        whole.update(tensor.detach().cpu().contiguous().numpy())
    return whole.hexdigest()


def discard(folder: str | os.PathLike) -> None:
    """Delete a folder of pieces once all processes have called this."""
    processes.meet()
    if processes.is_first():
        shutil.rmtree(folder, ignore_errors=True)
