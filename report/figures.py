"""Write what a paper needs of some runs: curves as PDF and PNG, the results as LaTeX and CSV, images as PNG.

python -m report.figures runs/a runs/b --out figures
"""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from report import pictures
from report.charts import points_of
from report.comparison import names
from report.folder import DAMAGED, Run, number
from utils.atomic import atomic_file
from utils.cli import OneLineParser, run
from utils.images import shown
from utils.plots import MADE_BY, new_figure
from utils.run_log import cell

HEAD = ("run", "test", "with_mixes", "with_mixes_ci95", "without_mixes", "without_mixes_ci95", "difference",
        "difference_ci95", "episodes")  # fmt: skip
_TEX_HEAD = "run & test & with mixes & without mixes & difference & episodes"
_FIGURES = ("accuracy", "ci95", "accuracy_without_mix", "ci95_without_mix", "paired_difference", "paired_ci95")
_TEX = {each: f"\\{each}" for each in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip
_MARK = f"% {MADE_BY}\n"  # in the table in LaTeX
_CLASSES, _IMAGES = 8, 6  # of a run, in the grid
_MOST = 1 << 26  # bytes of a file that are read to see who made it


def curves(runs: Mapping[str, Run]) -> Any | None:
    """Return a figure of the accuracy on meta_val by epoch, a line per run; None if no run was validated."""
    known = {name: points_of(each.epochs, "val_accuracy") for name, each in runs.items()}
    if not any(known.values()):
        return None
    figure = new_figure(5, 3.2)
    axis = figure.subplots()
    for name, points in known.items():
        if points:
            axis.plot(*zip(*points, strict=True), marker=".", label=_plain(name))
    axis.set(xlabel="epoch", ylabel="accuracy on meta_val, in %")
    axis.legend()
    return figure


def grid(runs: Mapping[str, Run]) -> Any | None:
    """Return a figure of images of each run's newest round, a row per class; None if no run has images."""
    strips = {name: found for name, each in runs.items() if (found := _strips(each)) is not None}
    if not strips:
        return None
    figure = new_figure(2.6 * len(strips), 3.6)
    for axis, (name, image) in zip(figure.subplots(1, len(strips), squeeze=False)[0], strips.items(), strict=True):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(_plain(name), fontsize=8)
        axis.axis("off")
    return figure


def rows(runs: Mapping[str, Run]) -> Iterator[tuple[Any, ...]]:
    """Yield a row of the table, as in HEAD, for each test of each run; for a run without a test its best epoch."""
    for name, each in runs.items():
        for test, result in each.results.items():
            told = f"{result.get('way')}-way {result.get('shot')}-shot on {result.get('split')}"
            figures = [number(result.get(key)) for key in _FIGURES]
            if not result.get("pool_models"):
                figures[:2] = figures[4:] = [None, None]
            other = [part for part in test if part not in ("", f"{result.get('shot')}-shot")]
            yield name, ", ".join((told, *other)), *figures, number(result.get("episodes"))
        if not each.results and (best := each.best()):
            half = number(best.get("val_ci95"))
            yield name, "best on meta_val", None, None, best["val_accuracy"], half, None, None, None


def as_csv(table: Sequence[tuple[Any, ...]]) -> str:
    """Return the table as CSV."""
    text = io.StringIO()
    plain = [[cell(shown(each)) if isinstance(each, str) else each for each in row] for row in table]
    csv.writer(text, lineterminator="\n").writerows([HEAD, *plain])
    return text.getvalue()


def as_latex(table: Sequence[tuple[Any, ...]]) -> str:
    """Return the table as LaTeX, which needs no package."""
    lines = [r"\begin{tabular}{llrrrr}", r"\hline", rf"{_TEX_HEAD} \\", r"\hline"]
    for name, test, with_, h1, without, h2, change, h3, episodes in table:
        cells = [_tex(name), _tex(test), _value(with_, h1), _value(without, h2), _value(change, h3, "+")]
        lines.append(" & ".join([*cells, "--" if episodes is None else f"{episodes}"]) + r" \\")
    return _MARK + "\n".join([*lines, r"\hline", r"\end{tabular}"]) + "\n"


def check_place(folder: Path) -> None:
    """Raise ValueError for a folder that holds anything that this program did not write."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{shown(folder)}: is a file, expected a folder; give another --out")
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name not in _OURS or not _OURS[path.name](path):
            raise ValueError(f"{shown(path)}: is there, and this program did not write it; give another --out")


def _marked(path: Path) -> bool:
    with open(path, "rb") as file:
        return MADE_BY.encode() in file.read(_MOST)


def _headed(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.readline(_MOST) == f"{','.join(HEAD)}\n".encode()


_OURS: dict[str, Callable[[Path], bool]] = {
    "curves.pdf": _marked, "curves.png": _marked, "images.png": _marked, "table.csv": _headed, "table.tex": _marked,
}  # fmt: skip


def _strips(each: Run) -> np.ndarray | None:
    """Return images of the newest round, (height, width, 3) uint8 on white."""
    try:
        rounds = each.rounds()
        images, labels = pictures.arrays(rounds[-1])
        known = np.unique(labels)
        chosen = [known[i] for i in pictures.spread(len(known), _CLASSES)]
        side, columns = images.shape[-1] + 2, _IMAGES
        sheet = np.full((len(chosen) * side - 2, columns * side - 2, 3), 255, np.uint8)
        for row, c in enumerate(chosen):
            for column, i in enumerate(np.flatnonzero(labels == c)[:columns]):
                sheet[row * side :, column * side :][: side - 2, : side - 2] = images[i].transpose(1, 2, 0)
        return sheet
    except DAMAGED:  # or there is no round
        return None


def _tex(text: str) -> str:
    return "".join(_TEX.get(each, each) for each in shown(text))


def _plain(text: str) -> str:
    """Return a text that matplotlib shows as it is: no formula, and not hidden as names with _ in front are."""
    text = shown(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _value(value: float | None, half: float | None, sign: str = "") -> str:
    if value is None:
        return "--"
    return f"${value:{sign}.2f}" + ("$" if half is None else rf" \pm {half:.2f}$")


def main() -> None:
    """Parse, refuse, read, write."""
    parser = OneLineParser(prog="python -m report.figures", description="Write figures and tables of runs for a paper.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, required=True, help="folder that is new, empty, or was written before")
    args = parser.parse_args()
    check_place(args.out)
    found = [Run.read(folder) for folder in args.runs]
    runs = dict(zip(names([each.folder for each in found]), found, strict=True))
    drawn, images, table = curves(runs), grid(runs), [*rows(runs)]
    if not drawn and not table:
        raise ValueError(f"{shown(args.runs[0])}: was neither validated nor tested; expected a run with results")
    noted = {"png": {"Software": MADE_BY}, "pdf": {"Creator": MADE_BY}}

    def drawing(figure: Any, kind: str) -> Callable[[BinaryIO], None] | None:
        return figure and (lambda file: figure.savefig(file, format=kind, dpi=200, metadata=noted[kind]))

    writers = {
        "curves.pdf": drawing(drawn, "pdf"), "curves.png": drawing(drawn, "png"), "images.png": drawing(images, "png"),
        "table.csv": lambda file: file.write(as_csv(table).encode()),
        "table.tex": lambda file: file.write(as_latex(table).encode()),
    }  # fmt: skip
    for name, write in writers.items():
        if write:
            with atomic_file(args.out / name) as file:
                write(file)
            print(args.out / name)
        else:
            (args.out / name).unlink(missing_ok=True)  # of other runs, written by this


if __name__ == "__main__":
    run(main)
