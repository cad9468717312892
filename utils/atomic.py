"""Files that are either whole or not there: write beside the target, then rename."""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DISK = {errno.EIO, errno.EROFS, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EISDIR}
_LITTLE = 4096  # bytes free: a disk with less is full
_LONG = 200  # bytes of a name; the system takes 255, of which the temporary name needs some


class DiskFull(ValueError):
    """A file could not be written for want of room. The older one is as it was."""


def previous(path: Path) -> Path:
    """Where the file before `path` is kept: last.pt -> last.previous.pt."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


@contextmanager
def named(path: str | os.PathLike, size: int = 0, temporary: Path | None = None) -> Iterator[None]:
    """Within, an error of writing `path` names it, as those of the system often do not.

    size: bytes that are to be written, where that is known; temporary: where they go first.
    Raises DiskFull where the disk, or one's share of it, does not suffice, and OSError of `path` for other errors.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter is how torch's writer passes some of the former on
        number = next((n for each in (error, error.__context__) if (n := getattr(each, "errno", None))), None)
        place, written = getattr(error, "filename", None), _size(temporary)
        free, needed = _free(Path(path)), max(size, written)
        short = free < max(size, _LITTLE)
        if number not in _FULL and not (written and short):
            if number in _DISK and (place is None or str(place) == str(temporary)):
                raise OSError(number, os.strerror(number), str(path)) from error
            raise
        what = "your share of the disk (quota) is used up" if number == errno.EDQUOT else "the disk is full"
        what += f": {needed:,} bytes are needed for this file" * bool(needed)
        if number == errno.ENOSPC and not short:
            what += f" (and {free:,} are free, so it may have no room for more files: inodes)"
        raise DiskFull(
            f"{path}: {what}; make room and give the same command again: what was saved before is whole"
        ) from error


def _size(path: Path | None) -> int:
    try:
        return path.stat().st_size if path else 0
    except OSError:
        return 0


def _free(path: Path) -> int:
    """Bytes that are free on the disk of `path`, which need not be there."""
    for folder in path.absolute().parents:
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return 0


def _beside(path: Path) -> Path:
    """The temporary name for `path`, in the same folder."""
    raw = os.fsencode(path.name)
    name = path.name if len(raw) <= _LONG else hashlib.sha256(raw).hexdigest()
    return path.with_name(f".{name}.{os.getpid()}.tmp")


@contextmanager
def atomic_file(path: str | os.PathLike, *, size: int = 0, keep_old: bool = False) -> Iterator[BinaryIO]:
    """Open a binary file that appears at `path` only when the block ends without an error.

    The bytes go to a temporary name in the same folder (made with its parents where missing), are
    flushed to the disk and renamed over `path`. A killed or failing block leaves an older file as it was.

    size: bytes that will be written, where that is known, for the message of a full disk.
    keep_old: rename the file that was there to `previous(path)`.
    Raises DiskFull where the disk, or one's share of it, does not suffice, and OSError of `path` for other errors.
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        with named(path, size, temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if keep_old and path.exists():
                os.replace(path, previous(path))
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
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
