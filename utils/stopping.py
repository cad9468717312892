"""Let Ctrl-C and SIGTERM stop a run between two steps, with all its files whole."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_HEEDED = (signal.SIGINT, signal.SIGTERM)
_asked: list[int] = []  # the signal, once one has arrived


class Stopped(Exception):
    """The run was asked to stop, by the signal `number`."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def heeded() -> Iterator[None]:
    """Hold the first SIGINT or SIGTERM in this block for `check`. A second one has its usual effect.

    Does nothing outside the main thread, as only that one receives signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _HEEDED}

    def hear(number: int, _frame: object) -> None:
        _asked.append(number)
        for each in _HEEDED:
            signal.signal(each, before[each])
        print("stopping after this step; once more stops at once", file=sys.stderr)

    for number in _HEEDED:
        signal.signal(number, hear)
    try:
        yield
    finally:
        _asked.clear()
        for number in _HEEDED:
            signal.signal(number, before[number])


def asked() -> bool:
    """Return whether the run was asked to stop."""
    return bool(_asked)


def check() -> None:
    """Raise Stopped if the run was asked to stop. Call this between two steps."""
    if _asked:
        raise Stopped(_asked[0])
