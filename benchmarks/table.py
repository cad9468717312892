"""The rows that a result table needs, over training seeds: floor, unguided, guided, guided + mix, real reference.

    python -m benchmarks.table                                  # glyphs, 1-shot, seeds 1 2 3
    python -m benchmarks.table --dataset custom --data-root data/mine --pool ckpt/pools/mine --split meta_val

Runs `main.py` and `diffusionmix.py` for every row and seed, every row of a seed on the same episodes. Rows already
made are kept, so that a killed run goes on. What is not a flag of this script goes to `main.py` as it is, and what
follows --test to `diffusionmix.py`.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from utils.metrics import mean_confidence_interval, paired_difference

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("none", "unguided", "guided", "real")
ROWS = ("floor (random weights)", "unguided", "guided", "guided + mix", "real reference")


@dataclass(frozen=True)
class Row:
    """One row: accuracies in percent of every episode of every seed, and the seconds of one training."""

    name: str
    by_episode: list[float]
    seconds: float


def run_rows(folder: Path, seeds: list[int], train: list[str], test: list[str]) -> list[Row]:
    """Train and test what is not there yet in <folder>/seed<k>/<source>; return the rows of the table."""
    results = {source: [] for source in SOURCES}
    for seed in seeds:
        for source in SOURCES:
            run = folder / f"seed{seed}" / source
            shared = [*_scenario(train), "--save-dir", str(run), "--seed", str(seed)]
            if not (ROOT / run / "results.json").exists():
                print(f"\n== seed {seed}, {source}", flush=True)
                _call("main.py", "--source", source, "--save-dir", str(run), "--seed", str(seed), *train)
                _call("diffusionmix.py", *shared, *test, "--mix", str(source == "guided"))
            made = json.loads((ROOT / run / "results.json").read_text())
            results[source].append((made, _training_seconds(ROOT / run / "metrics.jsonl")))

    def row(name: str, source: str, key: str) -> Row:
        made = results[source]
        values = [value for result, _ in made for value in result[key]]
        return Row(name, values, sum(seconds for _, seconds in made) / len(made))

    plain, mixed = "by_episode_without_mix", "by_episode"
    pairs = (("none", plain), ("unguided", plain), ("guided", plain), ("guided", mixed), ("real", plain))
    return [row(name, source, key) for name, (source, key) in zip(ROWS, pairs, strict=True)]


def as_text(rows: list[Row]) -> str:
    """The table: mean and 95 % interval over episodes, paired difference to the row above, share of the gap closed."""
    floor, real = (sum(r.by_episode) / len(r.by_episode) for r in (rows[0], rows[-1]))
    lines = [
        "| row | accuracy % | against the row above | gap closed | training s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for above, row in zip((None, *rows[:-1]), rows, strict=True):
        mean, half = mean_confidence_interval(row.by_episode)
        change = ""
        if above is not None:
            difference, spread = paired_difference(row.by_episode, above.by_episode)
            change = f"{difference:+.2f} ± {spread:.2f}"
        closed = f"{100 * (mean - floor) / (real - floor):.0f} %"
        lines.append(f"| {row.name} | {mean:.2f} ± {half:.2f} | {change} | {closed} | {row.seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description="The rows of a result table, over seeds.")
    parser.add_argument("--folder", type=Path, default=Path("ckpt/runs/table"), help="of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--test", nargs=argparse.REMAINDER, default=[], help="flags of diffusionmix.py, at the end")
    args, train = parser.parse_known_args()
    rows = run_rows(args.folder, args.seeds, train, args.test)
    text = as_text(rows)
    (ROOT / args.folder / "table.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{len(args.seeds)} seeds, {len(rows[0].by_episode)} episodes in all\n\n{text}")


def _scenario(train: list[str]) -> list[str]:
    """Those of the training flags that testing needs too."""
    kept = ("--dataset", "-d", "--data-root", "--pool", "--nExemplars", "--height", "--width")
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
