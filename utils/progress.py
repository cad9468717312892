"""Progress of what takes long: a bar on a terminal, a plain line now and then elsewhere, nothing with --quiet."""

import re
import sys
from typing import TextIO

from tqdm import tqdm

from utils import processes

_SOON = 5.0  # seconds; what is done by then shows nothing
_SELDOM = 30.0  # seconds between plain lines
_quiet = False


def hush(quiet: bool) -> None:
    """Whether bars are to show nothing from here on, and log lines to go to their file alone."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """What `hush` was last told."""
    return _quiet


def progress(*items, total: int | None = None, desc: str, unit: str, **options) -> tqdm:
    """A tqdm bar (of `items`, if they are given) that only the first of several processes shows.

    It comes after 5 seconds. Where stderr is no terminal it is a line every 30.
    """
    if not sys.stderr.isatty():
        options |= dict(file=_Lines(sys.stderr), mininterval=_SELDOM, maxinterval=_SELDOM)
    hidden = _quiet or not processes.is_first()
    return tqdm(*items, total=total, desc=desc, unit=unit, delay=_SOON, leave=False, disable=hidden, **options)


def duration(seconds: float) -> str:
    """90 s, 12 min or 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


class _Lines:
    """A stream on which tqdm's lines stand one below the other."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if line := re.sub(r"\x1b\[[0-9;]*[A-Z]", "", text).replace("\r", "").strip():  # nor do they move the cursor
            self.stream.write(line + "\n")

    def flush(self) -> None:
        self.stream.flush()
