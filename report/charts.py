"""The curves of a report as SVG, sharp at any size and in the colours of the page, light or dark."""

import html
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from report.folder import Run, number
from report.page import Html, element
from utils.plots import round_starts

COLOURS = [f"var(--c{i})" for i in range(6)]
# What is drawn in these is drawn in the colours of the page: matplotlib knows of no others than its own.
_INK, _SOFT, _LINE = "#010101", "#020202", "#030303"
_DRAWN = [f"#0400{i:02x}" for i in range(len(COLOURS))]
_OF_PAGE = {_INK: "var(--ink)", _SOFT: "var(--soft)", _LINE: "var(--line)", **dict(zip(_DRAWN, COLOURS, strict=True))}
_STYLES = ("solid", "dashed", "dotted")  # of lines, when there are no more colours
_SIZE = (4.6, 2.9)  # inches of 72 points
_numbers = itertools.count()  # one figure's names must not be another's on a page


class Chart:
    """A figure with one axis. `caption` is its text for those who do not see it, too."""

    def __init__(self, caption: str, xlabel: str, *, counted: bool = True):
        """counted: whether x counts something, and so has whole numbers alone."""
        from matplotlib.figure import Figure  # here, as it is slow to import

        self.caption, self.names = caption, []
        self.figure = Figure(figsize=_SIZE, layout="constrained", facecolor="none")
        self.axis = self.figure.subplots()
        self.axis.set_facecolor("none")
        self.axis.set_xlabel(xlabel, color=_SOFT, fontsize=9)
        self.axis.tick_params(colors=_SOFT, labelsize=9, length=0)
        self.axis.grid(color=_LINE, linewidth=0.6)
        self.axis.set_axisbelow(True)
        self.axis.xaxis.get_major_locator().set_params(integer=counted)
        for side, spine in self.axis.spines.items():
            spine.set(visible=side == "bottom", color=_LINE)

    def line(self, name: str, points: Iterable[tuple[float, float]], colour: int, half: Sequence = ()) -> None:
        """A line through (x, y), and where `half` has a number for each a band of that half-width."""
        points = list(points)
        if not points:
            return
        x, y = zip(*points, strict=True)
        drawn, style = _DRAWN[colour % len(_DRAWN)], _STYLES[colour // len(_DRAWN) % len(_STYLES)]
        dots = colour < len(_DRAWN) and len(points) < 40 or len(points) == 1
        self.axis.plot(x, y, linestyle=style, color=drawn, linewidth=1.6, marker="o" if dots else None, markersize=2.6)
        if len(half) == len(points):
            low, high = zip(*((b - h, b + h) for b, h in zip(y, half, strict=True)), strict=True)
            self.axis.fill_between(x, low, high, color=drawn, alpha=0.15, linewidth=0)
        self.names.append((name, COLOURS[colour % len(COLOURS)], style))

    def level(self, name: str, y: float) -> None:
        """A dotted line across, at a height that says something."""
        self.axis.axhline(y, color=_SOFT, linestyle=":", linewidth=0.9)
        self.names.append((name, "var(--soft)", "dotted"))

    def rounds(self, epochs: Sequence[Mapping[str, Any]]) -> None:
        """A dotted line where each round starts, with its number."""
        starts = round_starts([each for each in epochs if number(each.get("round")) is not None])
        of = {each["epoch"]: each["round"] for each in epochs}
        for epoch in starts:
            self.axis.axvline(epoch, color=_SOFT, linestyle=":", linewidth=0.8)
            text = f" round {of[epoch]}" if len(starts) <= 4 else f" {of[epoch]}"
            self.axis.annotate(
                text, (epoch, 1), xycoords=("data", "axes fraction"), color=_SOFT, fontsize=7.5, va="bottom"
            )

    def svg(self) -> Html:
        """The figure with its caption, as markup."""
        file = io.StringIO()
        with _settings():
            self.figure.savefig(file, format="svg", transparent=True)
        text = file.getvalue()
        text = text[text.index("<svg") :]  # without the XML declaration and the address of its grammar
        text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
        text = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", text)  # HTML knows what an svg is
        prefix = f"f{next(_numbers)}-"
        text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{prefix}", text)
        for drawn, colour in _OF_PAGE.items():
            text = text.replace(drawn, colour)
        text = re.sub(r'^<svg width="[^"]*" height="[^"]*"|^<svg height="[^"]*"', "<svg", text)
        text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
        return element(
            "figure",
            element("figcaption", self.caption),
            Html(text.replace("<svg", f'<svg role="img" aria-label="{html.escape(self.caption)}"', 1)),
            legend(self.names) if len(self.names) > 1 else None,
        )


def legend(names: Sequence[tuple[str, str, str]]) -> Html:
    """Names with the colours and the styles of their lines."""
    items = [element("li", element("i", style=f"border-top: 3px {style} {c}"), name) for name, c, style in names]
    return element("ul", *items, class_="legend")


def accuracy(runs: Mapping[str, Run]) -> Html | None:
    """meta_val by epoch, of one run with its intervals and rounds, or of several by their names."""
    chart = Chart("accuracy on meta_val, in %", "epoch")
    for index, (name, run) in enumerate(runs.items()):
        seen = [each for each in run.epochs if number(each.get("val_accuracy")) is not None]
        half = [number(each.get("val_ci95")) or 0 for each in seen] if len(runs) == 1 else ()
        chart.line(name, [(each["epoch"], each["val_accuracy"]) for each in seen], index, half)
        if len(runs) == 1:
            chart.rounds(seen)
    return chart.svg() if chart.names else None


def losses(runs: Mapping[str, Run]) -> Html | None:
    """Training losses by epoch, as `accuracy`; of several runs the meta-model's alone."""
    alone = len(runs) == 1
    chart = Chart("training loss" if alone else "training loss of the meta-model", "epoch")
    for index, (name, run) in enumerate(runs.items()):
        chart.line("meta-model" if alone else name, _points(run.epochs, "loss"), index)
        if alone:
            chart.line("class-learner", _points(run.epochs, "class_learner_loss"), 1)
            chart.rounds(run.epochs)
    return chart.svg() if chart.names else None


def levels(run: Run) -> Html | None:
    """The class-learner's accuracy by epoch, a line for each quarter of the noise levels."""
    chart = Chart("accuracy of the class-learner, in %", "epoch")
    known = [each for each in run.epochs if isinstance(each.get("class_learner_accuracy"), list)]
    for quarter, name in enumerate(("least noise", "second quarter", "third quarter", "most noise")):
        by_epoch = [(each["epoch"], each["class_learner_accuracy"][quarter : quarter + 1]) for each in known]
        chart.line(name, [(e, v[0]) for e, v in by_epoch if v and number(v[0]) is not None], quarter)
    if not chart.names:
        return None
    if classes := number(run.settings.get("num_classes")):
        chart.level("chance", 100 / classes)
    chart.rounds(known)
    return chart.svg()


def hit_rates(by_round: Sequence[tuple[int, float | None, Sequence[float | None]]]) -> Html:
    """(round, overall rate, rate by class), 0 to 1: a dot a class, a line through the overall rates."""
    chart = Chart("guided hit rate, in %: a dot a class, the line over all", "round")
    for round_, _, rates in by_round:
        known = [100 * rate for rate in rates if number(rate) is not None]
        # spread sideways, class by class, so that equal ones are not one dot
        x = [round_ + 0.3 * (i / max(1, len(known) - 1) - 0.5) for i in range(len(known))]
        chart.axis.plot(x, known, "o", color=_DRAWN[0], alpha=0.45, markersize=3.5, markeredgewidth=0)
    points = [(round_, 100 * rate) for round_, rate, _ in by_round if number(rate) is not None]
    chart.line("over all", points, 1)
    chart.axis.set_ylim(-3, 103)
    chart.axis.set_xlim(by_round[0][0] - 0.5, by_round[-1][0] + 0.5)
    if len(by_round) <= 10:
        chart.axis.set_xticks([round_ for round_, *_ in by_round])
    return chart.svg()


def pairs(title: str, without: Sequence[float], with_: Sequence[float]) -> Html:
    """A dot an episode, or more where it is larger: its accuracy without mixes and with them."""
    chart = Chart(title, "without mixes, in %", counted=False)
    counts = Counter(zip(without, with_, strict=True))
    x, y = zip(*counts, strict=True)
    low, high = min(*x, *y) - 3, max(*x, *y) + 3
    chart.axis.plot([low, high], [low, high], ":", color=_SOFT, linewidth=0.9)
    chart.axis.scatter(x, y, s=[8 * n for n in counts.values()], color=_DRAWN[0], alpha=0.45, linewidths=0)
    chart.axis.set_xlim(low, high)
    chart.axis.set_ylim(low, high)
    chart.axis.set_ylabel("with mixes, in %", color=_SOFT, fontsize=9)
    return chart.svg()


def _points(epochs: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(each["epoch"], each[name]) for each in epochs if number(each.get(name)) is not None]


@contextmanager
def _settings():
    import matplotlib

    # Text as text takes the page's font; a salt has the same figure get the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        yield
