"""Charts as SVG and HTML, in the colours of the page, light or dark. Every mark shows its numbers on hover."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from report.folder import Run, number
from report.page import Html, element, joined
from utils.plots import round_starts

COLOURS = [f"var(--c{i})" for i in range(6)]
_STYLES = {"solid": None, "dashed": "6 4", "dotted": "2 3"}  # of lines, as dashes
_WIDTH, _HEIGHT = 400, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 10, 20, 40  # margins
_SOFT = "var(--soft)"


class Chart:
    """A figure with one pair of axes. The caption is also its text for those who do not see it."""

    def __init__(self, caption: str, xlabel: str, *, ylim: tuple[float, float] | None = None):
        """ylim: the ends of the y axis; None fits them to what is drawn."""
        self.caption, self.xlabel, self.ylim = caption, xlabel, ylim
        self.names: list[tuple[str, str, str]] = []
        self.xs: list[float] = []
        self.ys: list[float] = []
        self._marks: list[Callable] = []  # each takes x -> pixels and y -> pixels and returns markup

    def line(self, name: str, points: Iterable[tuple[float, float]], colour: int, half: Sequence[float] = ()) -> None:
        """Draw a line through (x, y), and a band if `half` has the half-width of each point."""
        points = list(points)
        if not points:
            return
        ink, style = COLOURS[colour % len(COLOURS)], [*_STYLES][colour // len(COLOURS) % len(_STYLES)]
        half = list(half) if len(half) == len(points) else []
        self._reach(points)
        for (_, y), h in zip(points, half, strict=False):
            self.ys += [y - h, y + h]
        self.names.append((name, ink, style))

        def draw(px, py) -> list[Html]:
            drawn = []
            if half:
                ends = [(x, y + h) for (x, y), h in zip(points, half, strict=True)]
                ends += [(x, y - h) for (x, y), h in reversed([*zip(points, half, strict=True)])]
                drawn.append(element("polygon", points=_path(ends, px, py), style=f"fill: {ink}; opacity: 0.15"))
            stroke = f"fill: none; stroke: {ink}; stroke-width: 1.8; stroke-dasharray: {_STYLES[style] or 'none'}"
            drawn.append(element("polyline", points=_path(points, px, py), style=stroke))
            for i, (x, y) in enumerate(points):
                text = f"{self.xlabel} {x:g}: {y:.4g}" + (f" ± {half[i]:.2g}" if half else "")
                seen = ink if len(points) < 40 else "transparent"
                drawn.append(_dot(px(x), py(y), 2.4, seen, f"{name}, {text}" if name else text, reach=6))
            return drawn

        self._marks.append(draw)

    def level(self, name: str, y: float, style: str = "dotted") -> None:
        """Draw a line across at the height y."""
        self.ys.append(y)
        self.names.append((f"{name} {y:.1f}", _SOFT, style))
        self._marks.append(lambda px, py: [_rule(_LEFT, py(y), _WIDTH - _RIGHT, py(y), _STYLES[style])])

    def ring(self, name: str, x: float, y: float) -> None:
        """Mark a point."""
        self.names.append((name, "var(--ink)", "ring"))
        self._marks.append(
            lambda px, py: [
                element("circle", element("title", f"{name}: {y:.4g}"), cx=f"{px(x):.1f}", cy=f"{py(y):.1f}", r=6,
                        style="fill: none; stroke: var(--ink); stroke-width: 2; pointer-events: all")
            ]
        )  # fmt: skip

    def rounds(self, epochs: Sequence[Mapping[str, Any]]) -> None:
        """Draw a dotted line where each round starts, with its number."""
        known = [each for each in epochs if number(each.get("round")) is not None]
        starts, of = round_starts(known), {each["epoch"]: each["round"] for each in known}

        def draw(px, py) -> list[Html]:
            drawn = []
            for epoch in starts:
                text = f"round {of[epoch]}" if len(starts) <= 4 else of[epoch]
                drawn.append(_rule(px(epoch), _TOP, px(epoch), _HEIGHT - _BOTTOM, "1 3"))
                left = min(px(epoch), _WIDTH - 7 * len(str(text)))  # the last one stays within the figure
                drawn.append(element("text", text, x=f"{left:.1f}", y=_TOP - 6))
            return drawn

        self._marks.append(draw)

    def dots(self, points: Iterable[tuple[float, float, float, str]]) -> None:
        """Draw a dot for each (x, y, area in pixels, text)."""
        points = list(points)
        self._reach([(x, y) for x, y, *_ in points])
        self._marks.append(
            lambda px, py: [_dot(px(x), py(y), math.sqrt(a / math.pi), COLOURS[0], t, 0.5) for x, y, a, t in points]
        )

    def bars(self, values: Iterable[tuple[float, float, str]]) -> None:
        """Draw an upright bar for each (x, y, text), one unit apart."""
        values = list(values)
        self._reach([(x + d, y) for x, y, _ in values for d in (-0.5, 0.5)])

        def draw(px, py) -> list[Html]:
            wide, drawn = max(1.0, 0.75 * (px(1) - px(0))), []
            for x, y, text in values:
                top = min(py(y), _HEIGHT - _BOTTOM - 1)  # a bar of nothing is still a line that can be hovered over
                drawn.append(element("rect", element("title", text), x=f"{px(x) - wide / 2:.1f}", y=f"{top:.1f}",
                                     width=f"{wide:.1f}", height=f"{_HEIGHT - _BOTTOM - top:.1f}",
                                     style=f"fill: {COLOURS[0]}"))  # fmt: skip
            return drawn

        self._marks.append(draw)

    def diagonal(self) -> None:
        """Draw the line on which x and y are equal, and give both axes the same ends."""
        low, high = min(*self.xs, *self.ys) - 3, max(*self.xs, *self.ys) + 3
        self.xs += [low, high]
        self.ylim = (low, high)
        self._marks.append(lambda px, py: [_rule(px(low), py(low), px(high), py(high), "2 3")])

    def svg(self, *, ylabel: str = "") -> Html:
        """Return the figure with its caption and, of several lines, their names."""
        (x0, x1), (y0, y1) = _ends(self.xs, 0.02), self.ylim or _ends(self.ys, 0.06)

        def px(x: float) -> float:
            return _LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)

        def py(y: float) -> float:
            return _HEIGHT - _BOTTOM - (y - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)

        foot = _HEIGHT - _BOTTOM
        grid = [_rule(_LEFT, foot, _WIDTH - _RIGHT, foot)]
        for tick in ticks(y0, y1):
            grid.append(_rule(_LEFT, py(tick), _WIDTH - _RIGHT, py(tick), ink="var(--line)"))
            grid.append(element("text", f"{tick:g}", x=_LEFT - 6, y=f"{py(tick) + 4:.1f}", text_anchor="end"))
        for tick in ticks(x0, x1, whole=True):
            grid.append(element("text", f"{tick:g}", x=f"{px(tick):.1f}", y=foot + 16, text_anchor="middle"))
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        grid.append(element("text", self.xlabel, x=middle, y=_HEIGHT - 6, text_anchor="middle"))
        if ylabel:
            grid.append(element("text", ylabel, x=_LEFT, y=_TOP - 6))
        drawn = [mark for make in self._marks for mark in make(px, py)]
        svg = element("svg", *grid, *drawn, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=self.caption)
        one_line = len(self.names) == 1 and self.names[0][2] == "solid"  # which the caption names
        return element("figure", element("figcaption", self.caption), svg, legend(self.names) if not one_line else None)

    def _reach(self, points: Sequence[tuple[float, float]]) -> None:
        self.xs += [x for x, _ in points]
        self.ys += [y for _, y in points]


@dataclass(frozen=True)
class Bar:
    """An accuracy in percent with the half-width of its interval, if that is known, and the colour by number."""

    name: str
    value: float
    half: float | None = None
    colour: int = 0


def bars(rows: Sequence[Bar], marks: Sequence[tuple[str, float]] = ()) -> Html:
    """Draw accuracies as bars from 0 to 100 % with their intervals, and a line across for each (name, value)."""
    lines = [
        element("i", class_=f"mark m{i}", style=f"left: {value:.2f}%", title=f"{name} {value:.2f} %")
        for i, (name, value) in enumerate(marks)
    ]
    drawn = []
    for row in rows:
        text = f"{row.value:.2f}" + (f" ± {row.half:.2f}" if row.half is not None else "")
        inner = [element("i", class_="bar", style=f"width: {row.value:.2f}%; background: {COLOURS[row.colour % 6]}")]
        if row.half is not None:
            low, high = max(0.0, row.value - row.half), min(100.0, row.value + row.half)
            inner.append(element("i", class_="whisker", style=f"left: {low:.2f}%; width: {high - low:.2f}%"))
        drawn.append(
            element("div", element("span", row.name, class_="name"), element("div", *inner, *lines, class_="track"),
                    element("span", text, class_="value"), class_="row", title=f"{row.name}: {text} %")
        )  # fmt: skip
    named = [element("li", element("i", class_=f"mark m{i}"), f"{name} {value:.1f} %")
             for i, (name, value) in enumerate(marks)]  # fmt: skip
    return joined([element("div", *drawn, class_="accuracies"), element("ul", *named, class_="legend")])


def legend(names: Sequence[tuple[str, str, str]]) -> Html:
    """Return names with the colours and the styles of their lines."""
    items = []
    for name, ink, style in names:
        look = element("i", class_="ring") if style == "ring" else element("i", style=f"border-top: 3px {style} {ink}")
        items.append(element("li", look, name))
    return element("ul", *items, class_="legend")


def accuracy(runs: Mapping[str, Run], levels: Mapping[str, float] | None = None) -> Html | None:
    """Draw accuracy on meta_val by epoch: of one run with intervals, rounds and the epoch that was kept, or of several.

    levels: name -> accuracy in percent of lines across, such as chance.
    """
    chart = Chart("accuracy on meta_val, in %", "epoch")
    for index, (name, run) in enumerate(runs.items()):
        seen = [each for each in run.epochs if number(each.get("val_accuracy")) is not None]
        half = [number(each.get("val_ci95")) or 0 for each in seen] if len(runs) == 1 else ()
        chart.line(name or "meta_val", [(each["epoch"], each["val_accuracy"]) for each in seen], index, half)
        if len(runs) == 1:
            chart.rounds(seen)
            if best := run.best():
                chart.ring(f"epoch {best['epoch']}, kept as best_model.pt", best["epoch"], best["val_accuracy"])
    if not chart.names:
        return None
    for i, (name, value) in enumerate((levels or {}).items()):
        chart.level(name, value, ("dotted", "dashed")[i % 2])
    return chart.svg()


def losses(runs: Mapping[str, Run]) -> Html | None:
    """Draw training losses by epoch; of several runs only the meta-model's."""
    alone = len(runs) == 1
    chart = Chart("training loss" if alone else "training loss of the meta-model", "epoch")
    for index, (name, run) in enumerate(runs.items()):
        chart.line("meta-model" if alone else name, points_of(run.epochs, "loss"), index)
        if alone:
            chart.line("class-learner", points_of(run.epochs, "class_learner_loss"), 1)
            chart.rounds(run.epochs)
    return chart.svg() if chart.names else None


def levels(run: Run) -> Html | None:
    """Draw the class-learner's accuracy by epoch, a line for each quarter of the noise levels."""
    chart = Chart("accuracy of the class-learner on noised images, in %", "epoch")
    known = [each for each in run.epochs if isinstance(each.get("class_learner_accuracy"), list)]
    for quarter, name in enumerate(("lowest noise", "second quarter", "third quarter", "highest noise")):
        by_epoch = [(each["epoch"], each["class_learner_accuracy"][quarter : quarter + 1]) for each in known]
        chart.line(name, [(e, v[0]) for e, v in by_epoch if v and number(v[0]) is not None], quarter)
    return _of_classes(chart, run, known)


def training_accuracy(run: Run) -> Html | None:
    """Draw by epoch how often the network names the pseudo class of the images that it trains on."""
    chart = Chart("accuracy on its training images, in %", "epoch")
    chart.line("network", points_of(run.epochs, "base_accuracy"), 0)
    return _of_classes(chart, run, run.epochs)


def _of_classes(chart: Chart, run: Run, epochs: Sequence[Mapping[str, Any]]) -> Html | None:
    if not chart.names:
        return None
    if classes := number(run.settings.get("num_classes")):
        chart.level("chance", 100 / classes)
    chart.rounds(epochs)
    return chart.svg()


def hit_rates(rates: Sequence[float | None], over_all: float, round_: int) -> Html:
    """Draw the hit rate of each class in one round, 0 to 1, and the rate over all."""
    chart = Chart(f"hit rate of each class in round {round_}, in %", "class", ylim=(0, 100))
    known = [(c, 100 * rate) for c, rate in enumerate(rates) if rate is not None]
    chart.bars((c, rate, f"class {c}: {rate:.0f} %") for c, rate in known)
    chart.level("overall", 100 * over_all)
    return chart.svg()


def pairs(title: str, without: Sequence[float], with_: Sequence[float]) -> Html:
    """Draw a dot for each pair of accuracies without and with mixes, larger for several equal ones."""
    chart = Chart(title, "without mixes, in %")
    chart.dots((x, y, 12 * n, f"{x:.1f} % without, {y:.1f} % with: {n} episode{'s' * (n > 1)}")
               for (x, y), n in Counter(zip(without, with_, strict=True)).items())  # fmt: skip
    chart.diagonal()
    return chart.svg(ylabel="with mixes, in %")


def ticks(low: float, high: float, *, whole: bool = False, most: int = 6) -> list[float]:
    """Return at most `most` round numbers from low to high, of those that are whole if `whole`."""
    raw = (high - low) / most
    step = 10.0 ** math.floor(math.log10(raw))
    step *= next(factor for factor in (1, 2, 5, 10) if raw <= step * factor * (1 + 1e-9))
    step = max(1.0, step) if whole else step
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _ends(values: Sequence[float], spare: float) -> tuple[float, float]:
    """Return the ends of an axis: the values' own, and a share of their range on either side."""
    low, high = min(values), max(values)
    room = spare * (high - low) or 0.5
    return low - room, high + room


def points_of(entries: Sequence[Mapping[str, Any]], name: str, by: str = "epoch") -> list[tuple[float, float]]:
    """Return (epoch, value) of the entries that have a number of that name. by: what stands in place of the epoch."""
    return [(each[by], each[name]) for each in entries if number(each.get(name)) is not None]


def _path(points: Iterable[tuple[float, float]], px, py) -> str:
    return " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)


def _rule(x1: float, y1: float, x2: float, y2: float, dashes: str | None = None, ink: str = _SOFT) -> Html:
    style = f"stroke: {ink}; stroke-width: 1; stroke-dasharray: {dashes or 'none'}"
    return element("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", style=style)


def _dot(x: float, y: float, radius: float, ink: str, text: str, opacity: float = 1, *, reach: float = 0) -> Html:
    """Return a dot with its text. reach: a ring around it, of so many pixels, that can be hovered over as well."""
    look = f"fill: {ink}; opacity: {opacity}" + (f"; stroke: transparent; stroke-width: {reach}" if reach else "")
    return element("circle", element("title", text), cx=f"{x:.1f}", cy=f"{y:.1f}", r=f"{radius:.1f}", style=look)
