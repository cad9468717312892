"""The page that compares several runs: results, paired differences, images and curves side by side."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from config import that_affect
from report import charts, pictures
from report.folder import SAME_EPISODES, Run, number, scores, total
from report.page import Content, Html, element, page, section, table
from report.sections import NAME, careful, image_tag, link, shown
from utils.metrics import gap_closed, over_seeds
from utils.progress import duration

_ASIDE = that_affect("nothing", "testing") | {"seed", "contents"}  # settings that make no other method
_HEAD = ("head_steps", "head_init", "head_scale")  # of a test
_MIXES = ("mix_steps", "mix_level", "pool", "pool_models")
_NETWORK = ("backbone", "features")  # what random weights can do depends on these
_MOST_COLUMNS = 8  # of the table of differences
_ROWS, _IMAGES = 8, 6  # of the images side by side


@dataclass
class Method:
    """Runs that differ only in their seed, tested with mixes or without.

    Attributes:
        name: what the tables call it.
        source: the images that it was trained on.
        network: settings that decide what its random weights can do.
        runs: seed -> name of the run.
        results: seed -> (accuracy, half-width of its interval) in percent.
        values: seed -> accuracy of each episode, if noted.
        keys: seed -> what drew the episodes.
        tests: seed -> name of the run, and what drew the episodes.
    """

    name: str
    source: str
    network: tuple
    runs: dict[Any, str] = field(default_factory=dict)
    results: dict[Any, tuple[float, float | None]] = field(default_factory=dict)
    values: dict[Any, list[float]] = field(default_factory=dict)
    keys: dict[Any, tuple] = field(default_factory=dict)
    tests: dict[Any, tuple] = field(default_factory=dict)

    @property
    def same_episodes(self) -> bool:
        """Whether all seeds were tested on the same episodes."""
        return len(set(self.keys.values())) == 1

    def mean(self) -> tuple[float, float | None, float | str]:
        """Return the mean accuracy, and its half-widths over episodes and over seeds ("" with one seed)."""
        rows = _table(self.values, [*self.results])
        if rows is not None:
            return over_seeds(rows, self.same_episodes)
        halves = [half for _, half in self.results.values()]
        return float(np.mean([mean for mean, _ in self.results.values()])), halves[0] if len(halves) == 1 else None, ""

    def shared(self, *others: "Method") -> list[np.ndarray] | None:
        """Return the accuracies (seeds, episodes) of this method and of others on the same episodes; None for none."""
        methods = (self, *others)
        seeds = [s for s, key in self.keys.items() if all(other.keys.get(s) == key for other in others)]
        rows = [_table(each.values, seeds) for each in methods]
        alike = all(each is not None for each in rows) and len({each.shape for each in rows}) == 1
        return rows if alike else None


def render(runs: Sequence[Run], written: str, folder: Path) -> Html:
    """Return the page. folder: where it will lie, for its links."""
    named = dict(zip(names([run.folder for run in runs]), runs, strict=True))
    title = f"{len(runs)} runs"
    links = [link(name, run.folder / NAME, folder) for name, run in named.items()]
    heading = element("header", element("h1", title), element("p", f"written {written}", class_="soft"),
                      element("nav", *links))  # fmt: skip
    return page(title, heading, *results(named), *(careful(make, named) for make in (images, curves, times, settings)))


def names(folders: Sequence[Path]) -> list[str]:
    """Return short names that tell the folders apart: without the parts that all have in common."""
    whole = [folder.resolve() for folder in folders]
    common = Path(os.path.commonpath(whole))
    short = [str(each.relative_to(common)) if each != common else each.name for each in whole]
    return [f"{name} ({i + 1})" if short.count(name) > 1 else name for i, name in enumerate(short)]


def results(named: Mapping[str, Run]) -> list[Html]:
    """Return a section for each kind of test: bars, a row per run, gap closed, paired differences."""
    kinds = {_kind(result): None for run in named.values() for result in run.results.values()}
    parts = []
    for kind in sorted(kinds, key=str):
        methods = _methods(named, kind)
        if methods:
            parts.append(_results_of(kind, methods))
    if not parts:
        rows = [(name, *_best(run)) for name, run in named.items()]
        told = "No run has been tested. These are the best epochs on meta_val."
        parts.append(section("Results", told, table(("run", "accuracy %", "± over episodes"), rows, class_="numbers")))
    return parts


def _results_of(kind: tuple, methods: Sequence[Method]) -> Html:
    dataset, split, way, shot = kind
    rows, drawn = [], []
    for number_, each in enumerate(methods):
        mean, half, over = each.mean()
        closed = _closed(each, methods)
        drawn.append(charts.Bar(each.name, mean, half if over == "" else over, number_))
        count = len(each.results)
        if count > 1:
            rows += [(each.runs[s], f"{m:.2f}", _half(h), "", "") for s, (m, h) in each.results.items()]
        seeds = "one seed" if count == 1 else f"{_half(over)} ({count} seeds)"
        name = each.name if count == 1 else element("b", each.name)
        rows.append((name, element("b", f"{mean:.2f}"), _half(half), seeds, closed))
    told = (
        "Accuracy in percent, with half-widths of two 95 % intervals. The interval over episodes is for the networks "
        "as trained. A claim about a method needs the interval over training seeds. Bars show it if there are several "
        "seeds."
    )
    head = ("run", "accuracy %", "± over episodes", "± over seeds", "gap closed %")
    marks = [("chance", 100 / way)] if number(way) else []
    gap = any(row[-1] for row in rows)
    shown_rows = rows if gap else [row[:-1] for row in rows]
    parts: list[Content] = [charts.bars(drawn, marks), table(head if gap else head[:-1], shown_rows, class_="numbers")]
    if gap:
        parts.append(element("p", "Gap closed: 0 % is random weights, 100 % is real images.", class_="told"))
    if len(methods) > 1:
        parts += _differences(methods)
    return section(f"{dataset}, {way}-way {shot}-shot on {split}", told, *parts)


def _differences(methods: Sequence[Method]) -> list[Content]:
    """Return a table of row minus column on the same episodes."""
    columns = methods[:_MOST_COLUMNS]
    rows, any_seeds = [], False
    for row in methods:
        cells: list[Content] = []
        for column in columns:
            both = row.shared(column) if row is not column else None
            if both is None:
                cells.append("" if row is column else "–")
                continue
            mean, half, over = over_seeds(both[0] - both[1], row.same_episodes)
            any_seeds |= over != ""
            clear = abs(mean) > (half if over == "" else over)
            text = f"{mean:+.2f} ± {half:.2f}" + (f" ± {over:.2f}" if over != "" else "")
            title = f"{row.name} minus {column.name}: {text} points"
            cells.append(element("span", text, title=title, class_="clear" if clear else None))
        rows.append((row.name, *cells))
    second = ", then over seeds" if any_seeds else ""
    told = (
        "Row minus column in points, on the same episodes, with the half-width of the 95 % interval over episodes"
        f"{second}. Bold: the interval excludes 0. Dash: different episodes."
    )
    more = f" Columns show only the first {_MOST_COLUMNS} runs." if len(methods) > _MOST_COLUMNS else ""
    return [element("h3", "Paired differences"), element("p", told + more, class_="told"),
            table(("", *(each.name for each in columns)), rows, class_="numbers")]  # fmt: skip


def _closed(each: Method, methods: Sequence[Method]) -> str:
    """Return the share of the gap from random weights to real images that a method closes."""
    floor, real = (
        next((m for m in methods if (m.source, m.network) == (source, each.network) and each.shared(m)), None)
        for source in ("none", "real")
    )
    shared = each.shared(floor, real) if floor and real else None
    if shared is None:
        return ""
    own, low, high = shared
    if (high - low).mean() <= 0:
        return ""  # there is nothing to close
    if each in (floor, real):
        return "0" if each is floor else "100"
    share, half, over = gap_closed(own - low, high - low, each.same_episodes)
    return f"{share:.0f} ± {half:.0f}" + (f" ± {over:.0f}" if over != "" else "")


def images(named: Mapping[str, Run]) -> Html | None:
    """Return images of each run side by side, from the same noise if the runs allow that."""
    rounds = {name: {each.number: each for each in run.rounds()} for name, run in named.items()}
    rounds = {name: found for name, found in rounds.items() if found}
    if not rounds:
        return None
    first = next(iter(rounds))
    alike = {name: found for name, found in rounds.items() if named[first].same_noise(named[name])}
    rounds = alike if len(alike) > 1 else rounds
    shared = set.intersection(*map(set, rounds.values()))
    data = {name: pictures.arrays(found[max(shared or found)]) for name, found in rounds.items()}
    sizes = {len(labels) for _, labels in data.values()}
    if shared and rounds is alike and len(sizes) == 1:
        count = min(sizes)
        index = {str(i): dict.fromkeys(data, np.arange(i, min(i + _IMAGES, count)))
                 for i in pictures.spread(max(1, count - _IMAGES + 1), _ROWS)}  # fmt: skip
        told = f"Round {max(shared)}. Within a row, all runs start from the same noise. Rows are named by first image."
    else:
        most = min(int(labels.max()) for _, labels in data.values()) + 1
        index = {str(c): {name: np.flatnonzero(labels == c)[:_IMAGES] for name, (_, labels) in data.items()}
                 for c in pictures.spread(most, _ROWS)}  # fmt: skip
        told = "The newest round that all runs share, or else the newest of each. Rows are classes. The noise differs."
    rows = []
    for row, by_run in index.items():
        strips = [pictures.strip(data[name][0][i]) if len(i) else None for name, i in by_run.items()]
        alt = [f"{name}, row {row}" for name in by_run]
        rows.append((row, *(image_tag(s, a) if s else "–" for s, a in zip(strips, alt, strict=True))))
    return section("Images", told, table(("", *data), rows, class_="sheet"))


def curves(named: Mapping[str, Run]) -> Html | None:
    """Return the curves of all runs in one figure each."""
    ways = {number(run.settings.get("nKnovel")) for run in named.values()}
    way = ways.pop() if len(ways) == 1 else None
    drawn = [charts.accuracy(named, {"chance": 100 / way} if way else None), charts.losses(named)]
    return section("Learning", None, element("div", *drawn, class_="charts large")) if any(drawn) else None


def times(named: Mapping[str, Run]) -> Html:
    """Return what each run took."""
    rows = [(name, *(duration(total(run.epochs, key)) for key in ("synthesis_seconds", "seconds")))
            for name, run in named.items()]  # fmt: skip
    return section("Time", "Sums of all epochs.", table(("run", "drawing images", "training"), rows, class_="numbers"))


def settings(named: Mapping[str, Run]) -> Html:
    """Return the settings that differ."""
    runs = [*named.values()]
    every = {key: None for run in runs for key in run.settings}  # in order
    differ = [key for key in every if len({repr(run.settings.get(key)) for run in runs}) > 1]
    rows = [
        (key, *(shown(run.settings.get(key)) for run in runs)) for key in differ if key not in ("save_dir", "contents")
    ]
    if not rows:
        return section("Settings that differ", "None except the folders.")
    return section("Settings that differ", "The others are the same.", table(("setting", *named), rows, class_="pairs"))


def _kind(result: Mapping[str, Any]) -> tuple:
    return tuple(_plain(result.get(name)) for name in ("dataset", "split", "way", "shot"))


def _plain(value: Any) -> str | int | None:
    """Return a value that hashes, even if a file is damaged."""
    return value if value is None or isinstance(value, str | int) else str(value)


def _methods(named: Mapping[str, Run], kind: tuple) -> list[Method]:
    """Return the methods that were tested so, in the order of the runs, each without mixes and then with them."""
    found: dict[tuple, Method] = {}
    for name, run in named.items():
        key = json.dumps({k: v for k, v in run.settings.items() if k not in _ASIDE}, default=str)
        network = tuple(_plain(run.settings.get(n)) for n in _NETWORK)
        tests = {test: result for test, result in run.results.items() if _kind(result) == kind}
        for test, result in tests.items():
            for mixed in (False, True)[: 1 + bool(result.get("pool_models"))]:
                end = "" if mixed else "_without_mix"
                mean, half = number(result.get(f"accuracy{end}")), number(result.get(f"ci95{end}"))
                if mean is None:
                    continue
                counted = (*_HEAD, *(_MIXES if mixed else ()), "episodes", "query", "images")
                tested = tuple(_plain(result.get(n)) for n in counted)
                same, drawn = (key, tested, mixed), tuple(_plain(result.get(n)) for n in SAME_EPISODES)
                seed = _plain(result.get("trained_seed", run.settings.get("seed")))
                label = name + (" + mixes" if mixed else "")
                if mixed and len(tests) > 1:
                    label += f" ({' '.join(filter(None, test))})"
                alone = Method("", str(run.weights or run.settings.get("source", "")), network)
                method = found.setdefault(same, alone)
                if seed in method.results and method.tests[seed] != (name, drawn):  # no other training seed
                    if method.tests[seed][0] == name:
                        label += f", test seed {result.get('seed')}"
                    method = found.setdefault((*same, name, drawn), alone)
                if method.runs.get(seed) == label:
                    continue  # without mixes it is the same test again
                method.runs[seed], method.tests[seed] = label, (name, drawn)
                method.results[seed] = (mean, half)
                method.keys[seed] = drawn
                if values := scores(result, mixed):
                    method.values[seed] = values
    for method in found.values():
        method.name = _pattern([*method.runs.values()])
    return [*found.values()]


def _pattern(texts: Sequence[str]) -> str:
    """Return one text for several: what they begin with, a star, what they end with."""
    start = os.path.commonprefix(texts)
    if len(start) == len(texts[0]):
        return texts[0]
    end = os.path.commonprefix([text[len(start) :][::-1] for text in texts])[::-1]
    return f"{start}*{end}"


def _table(values: Mapping[Any, list[float]], seeds: Sequence) -> np.ndarray | None:
    """Return values as (seeds, episodes); None if some are missing, or their numbers differ."""
    rows = [values[s] for s in seeds if s in values]
    return np.array(rows) if rows and len(rows) == len(seeds) and len({*map(len, rows)}) == 1 else None


def _best(run: Run) -> tuple[str, str]:
    best = run.best() or {}
    value = number(best.get("val_accuracy"))
    return ("–" if value is None else f"{value:.2f}"), _half(number(best.get("val_ci95")))


def _half(half: float | str | None) -> str:
    return "–" if half is None or half == "" else f"{half:.2f}"
