"""The rows that a result table needs, over training seeds and shots, into RESULTS.md and results.csv.

    python -m benchmarks.table                                  # glyphs, seeds 1 2 3
    python -m benchmarks.table --small --dataset custom --data-root data/mine --pool ckpt/pools/mine

Runs `main.py` once and `diffusionmix.py` once a shot for every row and seed, every row of a seed on the same episodes.
What is made is kept, so that a killed run goes on. What is not a flag of this script goes to `main.py` as it is, and
what follows --test to `diffusionmix.py`.
"""

import argparse
import csv
import io
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.machine import commit, hardware
from config import SCENARIOS
from utils.atomic import atomic_file
from utils.metrics import mean_confidence_interval, paired_difference

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks"  # where RESULTS.md and results.csv are
RUNS = {  # a folder of the runs -> what main.py is told
    "none": ("--source", "none"),
    "unguided": ("--source", "unguided"),
    "paper": ("--source", "guided", "--recipe", "paper"),
    "guided": ("--source", "guided"),
    "real": ("--source", "real"),
}
ROWS = {  # name -> run, with or without mixes
    "floor (random weights)": ("none", False),
    "unguided": ("unguided", False),
    "the paper's recipe": ("paper", False),
    "guided": ("guided", False),
    "guided + mix": ("guided", True),
    "real reference": ("real", False),
}
SMALL = {k: v for k, v in SCENARIOS["glyphs"].defaults.items() if k not in ("image_size", "flip")}


@dataclass(frozen=True)
class Row:
    """One line of results.csv: one row of the table at one shot. Accuracies in percent, over all episodes of all seeds.

    difference, difference_ci95: against the row above, paired by episode; empty for the first.
    closed: share of the gap between the first row and the last, in percent; seconds: of one training.
    """

    dataset: str
    shot: int
    row: str
    accuracy: float
    ci95: float
    difference: float | str
    difference_ci95: float | str
    closed: float
    seconds: float
    seeds: int
    episodes: int
    split: str
    hardware: str
    torch: str
    commit: str


def run_rows(
    folder: Path, seeds: list[int], shots: list[int], runs: list[str], train: list[str], test: list[str]
) -> list[Row]:
    """Train and test what is not there yet in <folder>/seed<k>/<run>, and return the rows, shot by shot.

    runs: of RUNS, in the order of ROWS. The episodes of training have the first of `shots`; `main.py` is not run again
    for the others. The results of shot n lie in <folder>/seed<k>/<run>/<n>-shot.
    """
    results = {}
    for seed in seeds:
        for name in runs:
            run = folder / f"seed{seed}" / name
            if not all((ROOT / run / f"{shot}-shot" / "results.json").exists() for shot in shots):
                print(f"\n== seed {seed}, {name}", flush=True)
                flags = (*RUNS[name], "--save-dir", str(run), "--seed", str(seed), "--nExemplars", str(shots[0]))
                _call("main.py", *train, *flags)
            for shot in shots:
                place = run / f"{shot}-shot"
                if not (ROOT / place / "results.json").exists():
                    flags = ("--resume", str(run / "best_model.pt"), "--save-dir", str(place), "--seed", str(seed))
                    mix = str(any(ROWS[row] == (name, True) for row in ROWS))
                    _call("diffusionmix.py", *_scenario(train), *test, *flags, "--nExemplars", str(shot), "--mix", mix)
                made = json.loads((ROOT / place / "results.json").read_text(encoding="utf-8"))
                results[seed, name, shot] = made, _training_seconds(ROOT / run / "metrics.jsonl")
    return [row for shot in shots for row in _rows_of(results, seeds, shot, runs)]


def _rows_of(results: dict, seeds: list[int], shot: int, runs: list[str]) -> list[Row]:
    names = [name for name, (run, _) in ROWS.items() if run in runs]
    by_episode = {}
    for name in names:
        run, mixed = ROWS[name]
        key = "by_episode" if mixed else "by_episode_without_mix"
        by_episode[name] = [value for seed in seeds for value in results[seed, run, shot][0][key]]
    floor, top = (sum(by_episode[name]) / len(by_episode[name]) for name in (names[0], names[-1]))
    rows = []
    for above, name in zip((None, *names), names, strict=False):
        values, run = by_episode[name], ROWS[name][0]
        made = results[seeds[0], run, shot][0]
        accuracy, ci95 = mean_confidence_interval(values)
        difference = paired_difference(values, by_episode[above]) if above else ("", "")
        rows.append(
            Row(
                made["dataset"],
                shot,
                name,
                accuracy,
                ci95,
                *difference,
                closed=100 * (accuracy - floor) / (top - floor) if top > floor else 0.0,
                seconds=sum(results[seed, run, shot][1] for seed in seeds) / len(seeds),
                seeds=len(seeds),
                episodes=len(values),
                split=made["split"],
                hardware=hardware(made["device"]),
                torch=made["torch"],
                commit=commit(),
            )  # fmt: skip
        )
    return rows


def as_text(rows: list[Row]) -> str:
    """The table in Markdown: accuracy with its 95 % interval, paired difference, share of the gap, seconds."""
    lines = [
        "| shot | row | accuracy % | against the row above | gap closed | training s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        change = "" if r.difference == "" else f"{float(r.difference):+.2f} ± {float(r.difference_ci95):.2f}"
        lines.append(
            f"| {r.shot} | {r.row} | {float(r.accuracy):.2f} ± {float(r.ci95):.2f} | {change} "
            f"| {float(r.closed):.0f} % | {float(r.seconds):.0f} |"
        )
    return "\n".join(lines)


def publish(rows: list[Row], folder: Path = RESULTS) -> None:
    """Put the rows into <folder>/results.csv, in place of those of the same data set, and write RESULTS.md from it."""
    path, names = folder / "results.csv", [f.name for f in fields(Row)]
    kept = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            kept = [Row(**line) for line in csv.DictReader(file) if line["dataset"] != rows[0].dataset]
    rows = sorted([*kept, *rows], key=lambda r: r.dataset)  # stable: rows of a data set stay in order
    text = io.StringIO(newline="")
    lines = csv.DictWriter(text, names, lineterminator="\n")
    lines.writeheader()
    lines.writerows(asdict(r) for r in rows)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())
    parts = ["# Results", "", "Made by `python -m benchmarks.table`; intervals are 95 %, over episodes.", ""]
    for dataset in dict.fromkeys(r.dataset for r in rows):
        own = [r for r in rows if r.dataset == dataset]
        r = own[0]
        parts += [
            f"## {dataset}, {r.split}, 5-way",
            "",
            f"{r.seeds} training seeds, {r.episodes} episodes. {r.hardware}, torch {r.torch}, commit {r.commit}.",
            "",
            as_text(own),
            "",
        ]
    with atomic_file(folder / "RESULTS.md") as file:
        file.write("\n".join(parts).encode())


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description="The rows of a result table, over seeds and shots.")
    parser.add_argument("--folder", type=Path, help="of the runs (default ckpt/runs/table/DATASET)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5], help="the first is that of training")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS), help="rows to make (default all)")
    parser.add_argument("--small", action="store_true", help="train at the sizes of glyphs, for a CPU")
    parser.add_argument("--publish", action="store_true", help="write benchmarks/RESULTS.md and results.csv")
    parser.add_argument("--test", nargs=argparse.REMAINDER, default=[], help="flags of diffusionmix.py, at the end")
    args, train = parser.parse_known_args()
    if args.small:
        train = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))] + train
    scenario = _scenario(train)
    dataset = next((v for f, v in zip(scenario, scenario[1:], strict=False) if f in ("--dataset", "-d")), "glyphs")
    runs = [name for name in RUNS if name in args.runs]
    rows = run_rows(args.folder or Path("ckpt/runs/table") / dataset, args.seeds, args.shots, runs, train, args.test)
    if args.publish:
        publish(rows)
    print(f"\n{len(args.seeds)} seeds, {rows[0].episodes} episodes in all\n\n{as_text(rows)}")


def _scenario(train: list[str]) -> list[str]:
    """Those of the training flags that testing needs too."""
    kept = ("--dataset", "-d", "--data-root", "--pool", "--height", "--width")
    pairs = zip(train, train[1:], strict=False)
    return [word for flag, value in pairs if flag in kept for word in (flag, value)]


def _training_seconds(path: Path) -> float:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sum(line.get("seconds", 0) + line.get("synthesis_seconds", 0) for line in lines)


def _call(script: str, *flags: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
