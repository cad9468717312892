"""Download pools and checkpoints into a local cache once, and verify their checksums from then on."""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from itertools import count
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import blobfile

from utils import processes
from utils.atomic import atomic_file
from utils.progress import progress

CACHE = Path("ckpt/cache")
_SCHEMES = ("gs", "az", "https", "http")
_ONE_FILE = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_NAMES = ("model.pt", "model.safetensors")  # file names of a pool model
_PATIENCE = 30  # seconds to wait for an answer
_TRIES = 4  # retries of blobfile, which would otherwise retry forever
_PIECE = 1 << 20  # bytes
_PAGE = (b"<!doctype", b"<html", b"<?xml")  # how a login page, or that of a missing file, begins


def local(place: str) -> Path:
    """Return the local path of `place`: a path unchanged, an address (gs://, az://, https://) in the cache.

    Files that the cache lacks are downloaded. An address that ends like a checkpoint is one file. Any other is the
    folder of a pool, with subset1/ckpt/model.pt and so on. The cache, `CACHE`, mirrors addresses up to a question mark,
    with a SHA-256 beside each file and a list of a pool's files. A file that does not match its checksum is downloaded
    again, with a line on stderr. Only the first process downloads.

    Raises ValueError if there is nothing at the address, or it cannot be read.
    """
    if place.partition("://")[0] not in _SCHEMES or "://" not in place:
        return Path(place)
    url = urlsplit(place)
    parts = PurePosixPath(f"{url.netloc}{url.path}").parts
    if ".." in parts or not url.netloc:
        raise ValueError(f"got the address {place}, expected one such as gs://bucket/pool, without ..")
    target = CACHE.joinpath(url.scheme, *parts)
    if processes.is_first():
        if target.suffix in _ONE_FILE:
            _fetch(place, target)
        else:
            for name in _listed(place.rstrip("/"), target):
                _fetch(f"{place.rstrip('/')}/{name}", target / name)
    processes.meet()
    return target


def _listed(place: str, target: Path) -> list[str]:
    """Return the names of a pool's files from the list in the cache. The list is made if it is missing."""
    kept = target / "files.txt"
    if kept.exists():
        return kept.read_text().split("\n")
    if _is_blob(place):
        with _in_one_line(place):
            found = sorted(_blobs().glob(f"{place}/subset*/ckpt/model.*"))
        names = [path[len(place) + 1 :] for path in found if path.endswith(_NAMES)]
    else:
        names = []
        for m in count():
            if name := _name_of(place, m, target):
                names.append(name)
            elif m:  # pools are numbered from 0 or 1
                break
    if not names:
        raise ValueError(f"{place}: got no diffusion models there, expected subset1/ckpt/model.pt and so on")
    with atomic_file(kept) as file:
        file.write("\n".join(names).encode())
    return names


def _name_of(place: str, m: int, target: Path) -> str:
    """Download model m and return its name, or "". Each name is tried, as a plain web server lists no files."""
    for name in _NAMES:
        try:
            _fetch(f"{place}/subset{m}/ckpt/{name}", target / f"subset{m}" / "ckpt" / name)
        except _Nothing:
            continue
        return f"subset{m}/ckpt/{name}"
    return ""


def _fetch(place: str, target: Path) -> None:
    """Download `place` to `target`, unless `target` exists and matches the checksum beside it."""
    checksum = target.with_name(f"{target.name}.sha256")  # as sha256sum -c reads it
    if target.exists() and checksum.exists():
        with open(target, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == checksum.read_text(errors="replace").split(" ")[0]:
                return
        print(f"{target}: does not match its checksum, reading {place} again", file=sys.stderr)
    digest, read = hashlib.sha256(), 0  # not bar.n, which stays 0 with --quiet
    with _in_one_line(place), _opened(place) as (source, size):
        with atomic_file(target, size=size or 0) as file:
            with progress(total=size, desc=target.name, unit="B", unit_scale=True) as bar:
                while piece := source.read(_PIECE):
                    if not read and piece.lstrip()[:9].lower().startswith(_PAGE):
                        raise ValueError(f"{place}: got a web page, expected a model; check address and login")
                    digest.update(piece)
                    file.write(piece)
                    bar.update(len(piece))
                    read += len(piece)
                if size is not None and read != size:
                    raise ValueError(f"{place}: ended after {read:,} of {size:,} bytes; give the same command again")
    with atomic_file(checksum) as file:
        file.write(f"{digest.hexdigest()}  {target.name}\n".encode())


@contextmanager
def _opened(place: str) -> Iterator[tuple[BinaryIO, int | None]]:
    """Open a remote file. Yield its stream, and its length in bytes, or None if the server does not say."""
    if _is_blob(place):
        context = _blobs()
        size = context.stat(place).size
        with context.BlobFile(place, "rb", streaming=True) as source:
            yield source, size
        return
    with urlopen(place, timeout=_PATIENCE) as source:
        length = source.headers.get("Content-Length")
        yield source, int(length) if length else None


class _Nothing(ValueError):
    """There is no file at an address."""


@contextmanager
def _in_one_line(place: str) -> Iterator[None]:
    try:
        yield
    except (HTTPError, FileNotFoundError) as error:
        if getattr(error, "code", 404) == 404:
            raise _Nothing(f"{place}: nothing is there; check the address") from error
        raise ValueError(_unread(place, error)) from error
    except (blobfile.Error, HTTPException, OSError) as error:
        if getattr(error, "filename", None):  # an error of the cache, such as a full disk
            raise
        raise ValueError(_unread(place, error)) from error


def _unread(place: str, error: Exception) -> str:
    return (
        f"{place}: cannot be read ({str(error).splitlines()[0][:200]}); "
        "check address, network and credentials, or copy it here and give its path"
    )


def _is_blob(place: str) -> bool:
    """Return whether blobfile reads `place`, with credentials: Google's and Azure's stores. Any other is plain HTTP."""
    return place.startswith(("gs://", "az://")) or urlsplit(place).netloc.endswith(".blob.core.windows.net")


def _blobs() -> blobfile.Context:
    return blobfile.create_context(
        log_callback=lambda message: None, retry_limit=_TRIES, connect_timeout=_PATIENCE, read_timeout=_PATIENCE
    )
