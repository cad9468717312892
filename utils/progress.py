"""Show progress: a bar on a terminal, occasional plain lines elsewhere, nothing with --quiet."""

import re
import sys
from typing import TextIO

from tqdm import tqdm

from utils import processes

_SOON = 5.0  # seconds; shorter work shows nothing
_SELDOM = 30.0  # seconds between plain lines
_quiet = False


def hush(quiet: bool) -> None:
    """Set whether, from now on, bars are hidden and log lines go only to their file."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Return what `hush` last set."""
    return _quiet


def say(text: str) -> None:
    """Print a line in the first process, unless hushed. A command prints its last line by itself, hushed or not."""
    if not _quiet and processes.is_first():
        print(text)


def progress(*items, total: int | None = None, desc: str, unit: str, **options) -> tqdm:
    """Return a tqdm bar (over `items`, if given) that only the first process shows.

    It appears after 5 seconds. If stderr is not a terminal, it prints a line every 30 seconds.
    """
    if not sys.stderr.isatty():
        options |= dict(file=_Lines(sys.stderr), mininterval=_SELDOM, maxinterval=_SELDOM)
    hidden = _quiet or not processes.is_first()
    return tqdm(*items, total=total, desc=desc, unit=unit, delay=_SOON, leave=False, disable=hidden, **options)


def duration(seconds: float) -> str:
    """Return seconds as text: 90 s, 12 min, 3.4 h or 5 days."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.0f} days"


class _Lines:
    """A stream that writes tqdm's updates on separate lines."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if line := re.sub(r"\x1b\[[0-9;]*[A-Z]", "", text).replace("\r", "").strip():  # without cursor codes
            self.stream.write(line + "\n")

    def flush(self) -> None:
        self.stream.flush()
