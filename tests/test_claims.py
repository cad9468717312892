"""Claims about a method: what the table prints over three training seeds, against numbers worked out by hand."""

import csv
import json

import pytest

from benchmarks import table
from utils.metrics import over_seeds

# accuracies of two episodes of each of three seeds
MADE_UP = {
    "none": [[20, 20], [20, 20], [20, 20]],
    "unguided": [[50, 50], [50, 50], [50, 50]],
    "guided": [[53, 55], [52, 54], [49, 55]],  # 54, 53, 52 by seed
    "real": [[70, 70], [70, 70], [70, 70]],
}


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Stand-ins for the two scripts, whose results are `MADE_UP`."""

    def made(script, *flags):
        given = dict(zip(flags[::2], flags[1::2], strict=True))
        folder = tmp_path / given["--save-dir"]
        folder.mkdir(parents=True, exist_ok=True)
        if script == "main.py":
            (folder / "metrics.jsonl").write_text('{"epoch": 1, "seconds": 2}\n')
            (folder / "best_model.pt").touch()
            return
        values = MADE_UP[folder.parent.name][int(given["--seed"]) - 1]
        results = {"by_episode": values, "by_episode_without_mix": values, "dataset": "glyphs", "split": "meta_test",
                   "device": "cpu", "torch": "2"}  # fmt: skip
        (folder / "results.json").write_text(json.dumps(results))

    monkeypatch.setattr(table, "call", made)
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    return tmp_path


def test_three_seeds_print_both_intervals(made_up, call):
    status, out, _ = call(
        table, "--runs", "none", "unguided", "guided", "real", "--shots", "1", "--seeds", *"123", "--publish"
    )
    assert status == 0
    guided = next(line for line in out.splitlines() if line.startswith("| 1 | guided |"))
    # over episodes: 53 55 52 54 49 55, squares about 53 sum to 26, s = sqrt(26 / 5), t(5) = 2.5706: 2.39
    # over seeds: 54 53 52, s = 1, t(2) = 4.3027, 4.3027 / sqrt(3) = 2.48
    # the other rows are constant: the difference has the same half-widths, the gap of 50 points twice those, in percent
    assert guided == "| 1 | guided | 53.00 ± 2.39 ± 2.48 | +3.00 ± 2.39 ± 2.48 (unguided) | 66 ± 5 ± 5 | 2 |"
    assert guided in (made_up / "RESULTS.md").read_text(encoding="utf-8")
    with open(made_up / "results.csv", newline="", encoding="utf-8") as file:
        row = next(line for line in csv.DictReader(file) if line["row"] == "guided")
    assert row["by_seed"] == "54.00 53.00 52.00" and float(row["seeds_ci95"]) == pytest.approx(2.4841, abs=1e-4)
    assert float(row["closed_seeds_ci95"]) == pytest.approx(4.9683, abs=1e-4)


@pytest.mark.parametrize(
    "by_seed, half",
    [
        ((4.4, 3.4, 1.9), 3.1),  # glyphs, guided minus unguided, 1-shot
        ((2.2, 1.9, 0.3), 2.5),  # the same, 5-shot
        ((81.7, 79.9, 78.4), 4.1),
        ((77.3, 76.5, 76.5), 1.1),
        ((69, 56, 91), 44),  # emojifs, gap closed, 1-shot
        ((58, 62, 79), 28),
    ],
)
def test_the_intervals_over_seeds_of_the_documents(by_seed, half):
    got = over_seeds([[value] for value in by_seed])[2]
    assert got == pytest.approx(half, abs=0.5 if half > 10 else 0.06)
