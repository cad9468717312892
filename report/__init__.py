"""report.html: what a run did, or what a pool holds, in one file that needs no other. `python -m report` writes it."""

import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from report import pool, sections
from report.comparison import render as render_comparison
from report.folder import Run
from report.page import Html, page
from report.sections import NAME
from utils import processes
from utils.atomic import atomic_file

SHARE = 0.02  # of a run's time that its reports may take


class Report:
    """The report of a run or a pool at work. The first process writes it. Whatever goes wrong here, work goes on."""

    def __init__(self, folder: str | os.PathLike):
        self.folder, self._next = Path(folder), 0.0

    def write(self) -> None:
        """Write it now."""
        if not processes.is_first():
            return
        started = time.perf_counter()
        try:
            write(render_folder(self.folder), self.folder / NAME)
        except Exception as error:  # a report is not worth the run
            print(f"no report ({type(error).__name__}: {' '.join(str(error).split())})", file=sys.stderr)
        took = time.perf_counter() - started
        self._next = time.perf_counter() + took * (1 / SHARE - 1)

    def write_sometimes(self) -> None:
        """Write it, unless reports would then take more than their share of the time."""
        if time.perf_counter() >= self._next:
            self.write()


def write(text: str, path: Path) -> None:
    """Write a page, whole or not at all."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def render(run: Run, comparison: Path | None = None) -> Html:
    """Return the report of one run. comparison: the page that will compare it with others."""
    parts = [sections.careful(make, run) for make in sections.SECTIONS]
    return page(sections.title(run), sections.heading(run, _now(), comparison), *parts)


def render_folder(folder: Path) -> Html:
    """Return the report of a run or of a pool. Raise ValueError for any other folder."""
    return pool.render(folder, _now()) if pool.is_pool(folder) else render(Run.read(folder))


def render_several(runs: Sequence[Run], folder: Path) -> Html:
    """Return the page that compares runs. folder: where it will lie."""
    return render_comparison(runs, _now(), folder)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
