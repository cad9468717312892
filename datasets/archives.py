"""Unpack a data set from an archive while it is read."""

import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.class_folders import listing

MOST = 100  # an archive may unpack to this many times its size


class _Refused(ValueError):
    """An archive is not unpacked. The message says why."""


@contextmanager
def unpacked(source: Path, beside: Path) -> Iterator[Path]:
    """Unpack the archive `source` (.zip or .tar, also compressed), yield the folder, and remove it at the end.

    The folder is made in the nearest existing folder above `beside`, which should have room. If the archive holds a
    single folder, that one is yielded. A `source` that is not a file is yielded unchanged. Links and devices in the
    archive are left out.

    Raises ValueError for a file of another kind, and for an archive that is damaged, has paths that lead out of it, or
    claims to hold more than MOST times its size or more than the disk has room for.
    """
    if not source.is_file():
        yield source
        return
    place = next(folder for folder in beside.absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(dir=place, prefix=".unpacked-") as folder:
        try:
            _unpack(source, Path(folder), min(MOST * source.stat().st_size, shutil.disk_usage(place).free))
        except _Refused:
            raise
        except Exception as error:  # a damaged archive can raise nearly anything
            raise ValueError(f"{source}: cannot be unpacked ({error}); unpack it and give the folder") from error
        inner = Path(folder)
        while True:
            folders, files, _ = listing(inner)
            if files or len(folders) != 1:
                break
            inner = folders[0]
        yield inner


def _unpack(source: Path, folder: Path, most: int) -> None:
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            _check_sizes(source, [entry.file_size for entry in archive.infolist()], most)
            archive.extractall(folder)  # leaves out .. and leading slashes, and makes links plain files
    elif tarfile.is_tarfile(source):
        with tarfile.open(source) as archive:
            entries = [entry for entry in archive if entry.isfile() or entry.isdir()]
            _check_sizes(source, [entry.size for entry in entries], most)
            archive.extractall(folder, entries, filter="data")
    else:
        raise _Refused(f"{source}: is a file and no archive, expected a folder; give the folder that it lies in")


def _check_sizes(source: Path, sizes: list[int], most: int) -> None:
    if sum(sizes) > most:
        raise _Refused(f"{source}: claims to hold {sum(sizes):,} bytes, too many to unpack here; unpack it elsewhere")
