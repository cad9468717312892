"""The demonstration: the method learns without data, on a CPU, in a few minutes.

    python -m benchmarks.demo

The rows of `benchmarks.table` on glyphs at a small size, one seed. It starts anew each time.
"""

import shutil
import time
from pathlib import Path

from benchmarks.table import INTERVALS, ROOT, as_text, run_rows

FOLDER = Path("ckpt/runs/demo")
TRAIN = "--samples-per-class 24 --max-epoch 14 --refresh-every 7 --train_epoch_size 60".split()
TEST = "--episodes 200".split()


def main() -> None:
    """Run every row, then show the table."""
    started = time.time()
    shutil.rmtree(ROOT / FOLDER, ignore_errors=True)
    rows = run_rows(FOLDER, [1], [1], ["none", "unguided", "guided", "real"], TRAIN, TEST)
    print(f"\nglyphs, novel classes, 5-way 1-shot, {rows[0].episodes} episodes, one seed. {INTERVALS}\n")
    print(as_text(rows))
    print(f"\n{time.time() - started:.0f} s in all; contact sheets: {FOLDER}/seed1/guided/pseudo/round*/sheet.png")


if __name__ == "__main__":
    main()
