"""Allow one run at a time in a folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils import processes
from utils.atomic import named, sweep

try:
    import fcntl
except ImportError:  # not Unix, where every other lock would outlive a crash
    fcntl = None


@contextmanager
def locked(folder: str | os.PathLike, *, wait: bool = False) -> Iterator[None]:
    """Hold `folder` for this process, and make it if it is missing.

    Temporary files that killed runs left in it are deleted. Of several processes of one run, the first holds the lock.
    It is a lock of the system on the file .lock, so it ends with the process, however that ends.

    wait: wait for another run to let go.
    Raises ValueError if the folder is a file, or without `wait` if another run holds it.
    """
    if not processes.is_first():
        yield
        return
    folder = Path(folder)
    try:
        with named(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{folder}: got a file, expected a folder for the run; choose another folder") from error
    with open(folder / ".lock", "a", encoding="utf-8") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise ValueError(
                    f"{folder}: another run is at work in this folder; wait for it, or give another --save-dir"
                ) from None
        if processes.count() == 1:  # other processes of this run may be writing already
            sweep(folder)
        yield
