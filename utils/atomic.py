"""Files that are either whole or not there: write beside the target, then rename."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LITTLE = 4096  # bytes free: a disk with less is full


class DiskFull(ValueError):
    """A file could not be written for want of room. The older one is as it was."""


def previous(path: Path) -> Path:
    """Where the file before `path` is kept: last.pt -> last.previous.pt."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


@contextmanager
def atomic_file(path: str | os.PathLike, *, size: int = 0, keep_old: bool = False) -> Iterator[BinaryIO]:
    """Open a binary file that appears at `path` only when the block ends without an error.

    The bytes go to a temporary name in the same folder (made with its parents where missing), are
    flushed to the disk and renamed over `path`. A killed or failing block leaves an older file as it was.

    size: bytes that will be written, where that is known, for the message of a full disk.
    keep_old: rename the file that was there to `previous(path)`.
    Raises DiskFull where the disk, or one's share of it, does not suffice.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep_old and path.exists():
            os.replace(path, previous(path))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter is how torch's writer passes the former on
        full = temporary.exists() and shutil.disk_usage(path.parent).free < max(size, _LITTLE)
        if not full and not {getattr(each, "errno", None) for each in (error, error.__context__)} & _FULL:
            raise
        needed = max(size, temporary.stat().st_size if temporary.exists() else 0)
        raise DiskFull(
            f"{path}: the disk is full: {needed:,} bytes are needed for this file; make room and give the same "
            "command again: what was saved before is whole"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)  # gone already where the rename went through


def sweep(folder: Path) -> None:
    """Delete the temporary files that killed runs left in `folder`, but in no folder in it that has a lock of its own.

    For who holds the lock of `folder`: else they may be of a run at work.
    """
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not Path(place, name, ".lock").exists()]
        for name in files:
            if re.fullmatch(r"\..+\.\d+\.tmp", name):
                Path(place, name).unlink(missing_ok=True)
