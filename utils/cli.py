"""What a command shows its user when something is wrong or it is stopped: one line, not a traceback."""

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
_CURES = {  # of what the system says
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
    """Call `main()` and turn an error that its user can mend into one line on stderr.

    ValueError, what the system says of files (OSError) and a lack of memory become `error: ...` and exit status 2; so
    does an output that nobody reads any more. Ctrl-C and SIGTERM end the run after the step that it is at, with exit
    status 130 and 143. Any other error is a fault of the program and keeps its traceback. With TRACEBACK=1 in the
    environment every error keeps it. Processes that torchrun started are joined meanwhile.
    """
    try:
        with stopping.heeded(), processes.together():
            try:
                main()
            except SystemExit:  # of --help
                sys.stdout.flush()
                raise
        sys.stdout.flush()  # here, where a closed pipe can still be told
    except stopping.Stopped as stopped:
        _end(f"stopped by {stopped}; give the same command again to resume", 128 + stopped.number)
    except (*_TOLD, RuntimeError) as error:
        if os.environ.get("TRACEBACK") == "1" or not (isinstance(error, _TOLD) or _lacks_memory(error)):
            raise
        if isinstance(error, KeyboardInterrupt):
            _end("interrupted; the same command again goes on from the last save", 130)
        _end(f"error: {_one_line(error)}", 2)


def _lacks_memory(error: BaseException) -> bool:
    bare = isinstance(error, MemoryError) and not str(error)  # of Python itself, without a word
    return bare or isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # of a CPU


def _end(line: str, status: int) -> NoReturn:
    """Print `line` on stderr and exit. What cannot be written there any more is dropped."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):  # which Python flushes once more at the end
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaint about a command line is one ValueError, without the list of all flags.

    A flag is taken with dashes as with underscores, but not cut short, which hides misspelt ones.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse's, of flags spelt either way."""
        known = {_plain(flag): flag for flag in self._option_string_actions}
        words = []
        for word in sys.argv[1:] if args is None else args:
            name, is_, value = word.partition("=")
            words.append(known.get(_plain(name), name) + is_ + value if word.startswith("--") else word)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with `message`, and where a flag is unknown the one that it is most like."""
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
