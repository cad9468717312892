"""What a command shows its user when something is wrong or it is stopped: one line, not a traceback."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

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
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
