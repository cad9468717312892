"""Write files so that they are whole or absent: write beside the target, then rename."""

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
_LITTLE = 4096  # bytes; a disk with less free counts as full
_LONG = 200  # bytes of a file name; systems allow 255, and the temporary name adds some


class DiskFull(ValueError):
    """There was no room to write a file. An older file is unchanged."""


def previous(path: Path) -> Path:
    """Return the path that keeps the previous version of `path`: last.pt -> last.previous.pt."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


@contextmanager
def named(path: str | os.PathLike, size: int = 0, temporary: Path | None = None) -> Iterator[None]:
    """Make errors in this block name `path`, as the system's own often do not.

    size: bytes to be written, if known; temporary: the file that they are written to first.
    Raises DiskFull if the disk or the quota is full, and OSError naming `path` for other errors.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer turns some OSErrors into RuntimeErrors
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
    """Return the free bytes on the disk of `path`, which need not exist."""
    for folder in path.absolute().parents:
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return 0


def _beside(path: Path) -> Path:
    """Return a temporary path for `path`, in the same folder."""
    raw = os.fsencode(path.name)
    name = path.name if len(raw) <= _LONG else hashlib.sha256(raw).hexdigest()
    return path.with_name(f".{name}.{os.getpid()}.tmp")


@contextmanager
def atomic_file(path: str | os.PathLike, *, size: int = 0, keep_old: bool = False) -> Iterator[BinaryIO]:
    """Open a binary file that appears at `path` only when the block ends without an error.

    Missing folders are made. The file is written under a temporary name in the same folder, flushed to the disk and
    renamed to `path`. If the block fails or is killed, an older file stays unchanged.

    size: bytes to be written, if known, for the message of a full disk.
    keep_old: rename the older file to `previous(path)`.
    Raises DiskFull if the disk or the quota is full, and OSError naming `path` for other errors.
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
            temporary.unlink(missing_ok=True)  # gone already after the rename


def sweep(folder: Path) -> None:
    """Delete the temporary files that killed runs left in `folder`, except in subfolders with a lock of their own.

    Call this only while holding the lock of `folder`; otherwise the files may belong to a running program.
    """
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not Path(place, name, ".lock").exists()]
        for name in files:
            if re.fullmatch(r"\..+\.\d+\.tmp", name):
                Path(place, name).unlink(missing_ok=True)
