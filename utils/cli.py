"""What a command shows its user when something is wrong or it is stopped: one line, not a traceback."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from utils import processes, stopping

_USER_ERRORS = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError, MemoryError)


def run(main: Callable[[], object]) -> None:
    """Call `main()` and turn an error that its user can mend into one line on stderr.

    ValueError, FileNotFoundError, NotADirectoryError, PermissionError and MemoryError become `error: ...` and exit
    status 2. Ctrl-C and SIGTERM end the run after the step that it is at, with exit status 130 and 143. Any other
    error is a fault of the program and keeps its traceback. With TRACEBACK=1 in the environment every error keeps it.
    Processes that torchrun started are joined meanwhile.
    """
    try:
        with stopping.heeded(), processes.together():
            main()
    except stopping.Stopped as stopped:
        print(f"stopped by {stopped}; the same command again goes on", file=sys.stderr)
        sys.exit(128 + stopped.number)
    except (*_USER_ERRORS, KeyboardInterrupt) as error:
        if os.environ.get("TRACEBACK") == "1":
            raise
        if isinstance(error, KeyboardInterrupt):
            print("interrupted; the same command again goes on from the last save", file=sys.stderr)
            sys.exit(130)
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaint about a command line is one ValueError, without the list of all flags."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help lists the flags")


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
