"""report.html: what a run did, in one file that needs no other. `python -m report RUN` makes it again."""

import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from report import charts, sections
from report.folder import Run, total
from report.page import Content, Html, element, page, section, table
from utils import processes
from utils.atomic import atomic_file

NAME = "report.html"
SHARE = 0.02  # of the time of a run that its reports may take
_DAMAGED = (  # what reading damaged files raises
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, RecursionError,
)  # fmt: skip


class Report:
    """The report of a run that is going on. The first process writes; whatever goes wrong in it, the run goes on."""

    def __init__(self, folder: str | os.PathLike):
        self.folder, self._next = Path(folder), 0.0

    def write(self) -> None:
        """Write it now."""
        if not processes.is_first():
            return
        started = time.perf_counter()
        try:
            write(render(Run.read(self.folder)), self.folder / NAME)
        except Exception as error:  # a picture of the run is not worth the run
            print(f"no report ({type(error).__name__}: {' '.join(str(error).split())})", file=sys.stderr)
        took = time.perf_counter() - started
        self._next = time.perf_counter() + took * (1 / SHARE - 1)

    def write_sometimes(self) -> None:
        """Write it unless the last one is so new that reports would take more than their share of the time."""
        if time.perf_counter() >= self._next:
            self.write()


def write(text: str, path: Path) -> None:
    """Write a page, whole or not at all."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def render(run: Run) -> Html:
    """The report of one run."""
    parts = [_careful(make, run) for make in (sections.tiles, *sections.SECTIONS)]
    return page(sections.title(run), sections.heading(run, _now()), *parts)


def render_several(runs: Sequence[Run]) -> Html:
    """Runs side by side: settings that differ, results, all curves in one figure."""
    named = dict(zip(names([run.folder for run in runs]), runs, strict=True))
    results = [row for name, run in named.items() for row in _result_rows(name, run)]
    drawn = [chart for chart in (charts.accuracy(named), charts.losses(named)) if chart]
    settings = {key: None for run in runs for key in run.settings}  # in order
    differ = [key for key in settings if len({repr(run.settings.get(key)) for run in runs}) > 1 and key != "save_dir"]
    rows = [(key, *(sections.shown(run.settings.get(key)) for run in runs)) for key in differ]
    seconds = [
        (name, *(sections.duration(total(run.epochs, key)) for key in ("synthesis_seconds", "seconds")))
        for name, run in named.items()
    ]
    told = (
        "Accuracy in percent, with 95 % intervals over episodes; meta_val is the best epoch's. Each run is one "
        "training seed, and another can differ by more than the interval: compare methods over several seeds."
    )
    head = ("run", "best on meta_val", *sections.RESULT_HEAD)
    parts: list[Content] = [section("Results", told, table(head, results, class_="numbers"))]
    if drawn:
        parts.append(section("Learning", "All runs, by epoch.", element("div", *drawn, class_="charts large")))
    if rows:
        table_ = table(("setting", *named), rows, class_="pairs")
        parts.append(section("Settings that differ", "All others are the same in all runs.", table_))
    else:
        parts.append(section("Settings that differ", "None, but for the folders."))
    parts.append(
        section("Time", "Of all epochs.", table(("run", "drawing images", "training"), seconds, class_="numbers"))
    )
    heading = element("header", element("h1", f"{len(runs)} runs"), element("p", f"written {_now()}", class_="soft"))
    return page(f"{len(runs)} runs", heading, *parts)


def names(folders: Sequence[Path]) -> list[str]:
    """Short names that tell the folders apart: without the parts that all have in common."""
    whole = [folder.resolve() for folder in folders]
    common = Path(os.path.commonpath(whole))
    short = [str(each.relative_to(common)) if each != common else each.name for each in whole]
    return [f"{name} ({i + 1})" if short.count(name) > 1 else name for i, name in enumerate(short)]


def _result_rows(name: str, run: Run) -> list[tuple[Content, ...]]:
    best = run.best()
    seen = sections.plus_minus(best or {}, "val_accuracy", "val_ci95")
    rows = [row for place, result in run.results.items() for row in sections.result_rows(place, result)]
    return [(name, seen, *row) for row in rows] or [(name, seen, *["–"] * len(sections.RESULT_HEAD))]


def _careful(make, run: Run) -> Html | None:
    """A part of the page; of damaged files it says so in its place."""
    try:
        return make(run)
    except _DAMAGED as error:
        what = make.__name__.replace("_", " ")
        return element("p", f"The part “{what}” cannot be shown: {type(error).__name__}: {error}", class_="warn")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
