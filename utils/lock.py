"""Lock a folder, so that only one run at a time works in it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils import processes
from utils.atomic import named, sweep

try:
    import fcntl
except ImportError:  # not on Unix; any other kind of lock would outlive a crash
    fcntl = None


@contextmanager
def locked(folder: str | os.PathLike, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of `folder` during this block. The folder is made if it is missing.

    Temporary files that killed runs left in it are deleted. If a run has several processes, the first holds the lock.
    It is a system lock on the file .lock, so it ends with the process, however that ends.

    wait: wait until another run releases the lock.
    Raises ValueError if the folder is a file, or without `wait` if another run holds the lock.
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
