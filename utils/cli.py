"""What a command shows its user when something is wrong: one line, not a traceback."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

_USER_ERRORS = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError)


def run(main: Callable[[], object]) -> None:
    """Call `main()` and turn an error that its user can mend into one line on stderr.

    ValueError, FileNotFoundError, NotADirectoryError and PermissionError become `error: ...` and exit
    status 2; Ctrl-C becomes one line and exit status 130. Any other error is a fault of the program
    and keeps its traceback. With TRACEBACK=1 in the environment every error keeps it.
    """
    try:
        main()
    except (*_USER_ERRORS, KeyboardInterrupt) as error:
        if os.environ.get("TRACEBACK") == "1":
            raise
        if isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
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
