"""Make the reports of finished or half-way runs again, and lay several side by side.

python -m report ckpt/runs/glyphs/1-shot          # writes report.html into the folder
python -m report runs/a runs/b --out both.html    # those of a and b, and one page that compares them
"""

from pathlib import Path

from report import NAME, render, render_several, write
from report.folder import Run
from utils.cli import OneLineParser, run


def main() -> None:
    """Parse, read, write."""
    parser = OneLineParser(prog="python -m report", description="Make the report of a run again, or of several.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, help="of one run: its report (default RUN/report.html); of several: the "
                        "page that lays them side by side (default report.html)")  # fmt: skip
    args = parser.parse_args()
    runs = [Run.read(folder) for folder in args.runs]
    pages = {each.folder / NAME: lambda each=each: render(each) for each in runs}
    if len(runs) == 1:
        pages = {args.out or runs[0].folder / NAME: lambda: render(runs[0])}
    else:
        pages[args.out or Path(NAME)] = lambda: render_several(runs)
    for path, make in pages.items():
        write(make(), path)
        print(path)


if __name__ == "__main__":
    run(main)
