"""Rebuild the reports of runs, finished or not, and compare several runs; or rebuild the report of a pool.

python -m report ckpt/runs/glyphs/1-shot          # writes report.html into the folder
python -m report ckpt/pools/mine                  # the models of a pool
python -m report runs/a runs/b --out both.html    # writes both reports, and one page that compares the runs
"""

from pathlib import Path

from report import NAME, render, render_folder, render_several, write
from report.folder import Run
from utils.cli import OneLineParser, run


def main() -> None:
    """Parse, read, write."""
    parser = OneLineParser(prog="python -m report", description="Rebuild and compare the reports of runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, or one pool folder")
    parser.add_argument("--out", type=Path, help="report of one folder (default RUN/report.html), or the page that "
                        "compares several (default report.html)")  # fmt: skip
    args = parser.parse_args()
    if len(args.runs) == 1:
        pages = {args.out or args.runs[0] / NAME: lambda: render_folder(args.runs[0])}
    else:
        runs = [Run.read(folder) for folder in args.runs]
        out = args.out or Path(NAME)
        pages = {each.folder / NAME: lambda each=each: render(each, out) for each in runs}
        pages[out] = lambda: render_several(runs, out.parent)
    for path, make in pages.items():
        write(make(), path)
        print(path)


if __name__ == "__main__":
    run(main)
