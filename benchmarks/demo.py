"""The demonstration: the method learns without data, on a CPU, in a few minutes.

    python -m benchmarks.demo

It makes rows of `benchmarks.table` on fontchars, a set of real characters, at a small size and with one seed. Each call
starts afresh.
"""

import shutil
import time
from pathlib import Path

from benchmarks.table import FLOOR, GUIDED, INTERVALS, REAL, ROOT, UNGUIDED, as_text, rows_of, run_all
from utils.cli import run

FOLDER = Path("ckpt/runs/demo")
TRAIN = (
    "--dataset fontchars --samples-per-class 16 --sample-steps 8 --views 2 --max-epoch 12 --refresh-every 6 "
    "--train_epoch_size 240 --image-batch 24 --validate-every 12"
).split()
TEST = "--episodes 200".split()


def main() -> None:
    """Make every row, print the table, and print a summary."""
    started = time.time()
    shutil.rmtree(ROOT / FOLDER, ignore_errors=True)
    rows = rows_of(run_all(FOLDER, [1], [1], ["none", "unguided", "guided", "real"], TRAIN, TEST))
    print(f"\nfontchars, novel classes, 5-way 1-shot, {rows[0].episodes} episodes, one seed. {INTERVALS}\n")
    print(as_text(rows))
    found = {row.row: row.accuracy for row in rows}
    print(
        "\nFrom a pool of diffusion models alone, a network learnt to tell new characters apart: "
        f"{found[GUIDED]:.0f} % "
        f"right with guidance, {found[UNGUIDED]:.0f} % without, {found[FLOOR]:.0f} % with random weights, "
        f"{found[REAL]:.0f} % with real images and labels; chance is 20 %. "
        "This is one small run: benchmarks/RESULTS.md has several seeds at full size."
    )
    print(f"{time.time() - started:.0f} s in all. Report: {FOLDER}/seed1/guided/report.html")


if __name__ == "__main__":
    run(main)
