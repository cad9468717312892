"""Run a command so that an error or a stop prints one line, not a traceback."""

import argparse
import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import torch

from utils import processes, stopping

_TOLD = (ValueError, OSError, MemoryError, KeyboardInterrupt)
_CURES = {  # what to do about system errors
    errno.EIO: "the disk fails; what was saved before is whole: look after the disk, or choose a folder on another",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "change its permissions (chmod), or choose another",
    errno.EPERM: "change its permissions (chmod), or choose another",
    errno.ENOSPC: "make room and give the same command again",
    errno.EDQUOT: "make room in your share (quota) and give the same command again",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "it is a link that leads back to itself; give another",
    errno.EISDIR: "a file was expected; move the folder away or give another name",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENOTDIR: "a folder was expected; check the path",
}


def run(main: Callable[[], object]) -> None:
    """Call `main()` and turn an error that the user can fix into one line on stderr.

    ValueError, OSError (including a closed pipe) and lack of memory print `error: ...` and exit with status 2. Ctrl-C
    and SIGTERM end the run after the current step, with status 130 and 143. Any other error is a bug and keeps its
    traceback. TRACEBACK=1 in the environment keeps it for every error. Processes that torchrun started are joined while
    `main()` runs.
    """
    try:
        with stopping.heeded(), processes.together():
            try:
                main()
            except SystemExit:  # from --help
                sys.stdout.flush()
                raise
        sys.stdout.flush()  # here a closed pipe can still be reported
    except stopping.Stopped as stopped:
        _end(f"stopped by {stopped}; give the same command again to resume", 128 + stopped.number)
    except (*_TOLD, RuntimeError) as error:
        if os.environ.get("TRACEBACK") == "1" or not (isinstance(error, _TOLD) or _lacks_memory(error)):
            raise
        if isinstance(error, KeyboardInterrupt):
            _end("interrupted; the same command again goes on from the last save", 130)
        _end(f"error: {_one_line(error)}", 2)


def _lacks_memory(error: BaseException) -> bool:
    bare = isinstance(error, MemoryError) and not str(error)  # raised by Python itself
    return bare or isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # on a CPU


def _end(line: str, status: int) -> NoReturn:
    """Print `line` on stderr, if it is still open, and exit."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):  # Python flushes them once more at exit
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports a wrong command line as a one-line ValueError, without the list of all flags.

    Flags may be written with dashes or underscores. They may not be abbreviated, as that hides misspelt flags.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse as argparse does, accepting dashes or underscores in flags."""
        known = {_plain(flag): flag for flag in self._option_string_actions}
        words = []
        for word in sys.argv[1:] if args is None else args:
            name, is_, value = word.partition("=")
            words.append(known.get(_plain(name), name) + is_ + value if word.startswith("--") else word)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with `message`, plus the most similar known flag if a flag is unknown."""
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        alike = difflib.get_close_matches(unknown[1], self._option_string_actions, 1) if unknown else []
        meant = f", did you mean {alike[0]}?" if alike else ""
        raise ValueError(f"{message}{meant}; {self.prog} --help lists the flags")


def _plain(flag: str) -> str:
    return flag.replace("_", "-")


def _one_line(error: Exception) -> str:
    if _lacks_memory(error):
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        what = f"out of memory{f' ({asked[1]} were asked for)' if asked else ''}"
        return (
            f"{what}; give a lower --train-batch, --sample-batch or --samples-per-class "
            "(image_train.py: --microbatch), or smaller images"
        )
    if isinstance(error, BrokenPipeError):
        return "nobody reads the output any more (a closed pipe); the same command again resumes"
    if isinstance(error, OSError) and error.errno is not None:
        place = f"{error.filename}: " if error.filename is not None else ""
        cure = _CURES.get(error.errno)
        return " ".join(f"{place}{error.strerror}{f'; {cure}' if cure else ''}".split())
    return " ".join(str(error).split()) or type(error).__name__
