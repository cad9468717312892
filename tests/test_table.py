"""The result table, from made-up results."""

import csv
import json
import os
from dataclasses import replace

import pytest

from benchmarks import table


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Stand-ins for the two scripts that write what they would; what was called, in order."""
    made = []

    def call(script, *flags):
        given = dict(zip(flags[::2], flags[1::2], strict=True))
        made.append((script, given))
        if script == "main.py" and (tmp_path / given["--save-dir"] / "best_model.pt").exists():
            return
        folder = tmp_path / given["--save-dir"]
        folder.mkdir(parents=True, exist_ok=True)
        if script == "main.py":
            lines = ('{"epoch": 1, "seconds": 2, "synthesis_seconds": 1}', '{"epoch": 2, "seconds": 9}')
            (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"epoch": 2, "seconds": 4}\n')
            (folder / "best_model.pt").touch()
            (folder / "config.json").write_text('{"contents": {"pool": "p"}}')
            return
        run, seed, shot = folder.parent.name, int(given["--seed"]), int(given["--nExemplars"])
        base = {"none": 30, "by_model": 50, "unguided": 60, "paper": 61, "guided": 70, "real": 80}[run]
        base += 5 * (shot - 1) // 4
        plain = [base + seed + i for i in range(-2, 3)]
        results = {
            "by_episode": [value + 2 for value in plain] if given["--mix"] == "True" else plain,
            "by_episode_without_mix": plain, "dataset": "custom", "split": "meta_val", "device": "cpu", "torch": "2",
            "way": 5, "images": "digest",
        }  # fmt: skip
        (folder / "results.json").write_text(json.dumps(results))

    monkeypatch.setattr(table, "call", call)
    monkeypatch.setattr(table, "ROOT", tmp_path)
    return made


RUNS = ["none", "unguided", "guided", "real"]


def run_all(tmp_path, *test, seeds=(1, 3), runs=RUNS):
    return table.run_all(tmp_path / "runs", seeds, [1, 5], runs, ["--dataset", "custom", "--lr", "1"], list(test))


def rows(tmp_path, *test):
    return table.rows_of(run_all(tmp_path, *test))


def test_rows(calls, tmp_path):
    got = rows(tmp_path)
    names = ["floor (random weights)", "unguided", "guided", "guided + mix", "real reference"]
    assert [(r.shot, r.row) for r in got] == [(shot, name) for shot in (1, 5) for name in names]
    one = got[:5]
    assert [r.accuracy for r in one] == [32, 62, 72, 74, 82]
    assert [(r.against, r.difference) for r in one] == [
        ("", ""), (names[0], 30), ("unguided", 10), ("guided", 2), (names[0], 50)
    ]  # fmt: skip
    assert one[3].difference_ci95 == 0 and one[3].by_seed == "73.00 75.00"
    assert one[3].seeds_ci95 == pytest.approx(12.7062, abs=1e-4)  # t(1) of means 2 apart: 12.7062 * sqrt(2) / sqrt(2)
    assert [r.closed for r in one] == pytest.approx([0, 60, 80, 84, 100])
    assert {(r.seeds, r.episodes, r.seconds) for r in got} == {(2, 10, 7)}
    assert got[5].accuracy == 37


def results_of(**by_run):
    """What `_rows_of` takes of two seeds, from accuracies (seeds, episodes) of each run."""
    same = {"dataset": "d", "split": "s", "torch": "2", "hardware": "h", "commit": "c", "training_seconds": 1.0}
    same["flags"] = {"--mix": "True"}
    return {
        (seed, run, 1): same | {"by_episode": values, "by_episode_without_mix": values}
        for run, table_ in by_run.items()
        for seed, values in enumerate(table_)
    }


def test_both_intervals_of_the_gap_closed():
    results = results_of(none=[[10, 10], [10, 10]], guided=[[50, 52], [40, 44]], real=[[60, 60], [60, 70]])
    guided = {r.row: r for r in table._rows_of(results, 1)}["guided"]
    assert guided.closed == pytest.approx(100 * 36.5 / 52.5)
    # over seeds: shares 41 / 50 and 32 / 55, half their distance times t(1) = 12.70620
    assert guided.closed_seeds_ci95 == pytest.approx(100 * 0.1190909 * 12.70620, abs=1e-3)
    # over episodes: gained - share * gap is 5.2381, 7.2381, -4.7619, -7.7143; t(3) = 3.182446
    assert guided.closed_ci95 == pytest.approx(100 * 3.182446 * 7.348785 / 2 / 52.5, abs=1e-3)


def test_no_share_of_a_gap_that_was_not_measured():
    results = results_of(none=[[10, 10]], guided=[[50, 52]], real=[[5, 5]])
    for runs in (["none", "guided"], ["guided", "real"], ["none", "guided", "real"]):
        some = {key: one for key, one in results.items() if key[1] in runs}
        assert {r.closed for r in table._rows_of(some, 1)} == {""}


def test_one_seed_has_no_interval_over_seeds(calls, tmp_path):
    one = table.rows_of(table.run_all(tmp_path / "runs", [1], [1], RUNS, ["--dataset", "custom"], []))
    assert {r.seeds_ci95 for r in one} == {r.difference_seeds_ci95 for r in one} == {""}
    assert table.as_text(one).count("± ?") == 3 * 5 - 1  # the floor is compared with nothing


def test_what_is_made_is_kept(calls, tmp_path):
    first = rows(tmp_path)
    scripts = [script for script, _ in calls]
    assert (scripts.count("main.py"), scripts.count("diffusionmix.py")) == (8, 16)
    assert calls[0][1]["--lr"] == "1" and "--lr" not in calls[1][1] and calls[1][1]["--dataset"] == "custom"
    calls.clear()
    (tmp_path / "runs" / "seed3" / "guided" / "5-shot" / "results.json").unlink()
    assert rows(tmp_path) == first
    tests = [(given["--seed"], given["--nExemplars"]) for script, given in calls if script == "diffusionmix.py"]
    assert tests == [("3", "5")] and len(calls) == 9  # main.py is asked each time: it refuses other settings


def test_results_of_other_settings_or_older_than_the_weights_are_not_taken(calls, tmp_path):
    rows(tmp_path)
    with pytest.raises(ValueError, match=r"was made with --episodes None \(got '9'\)"):
        rows(tmp_path, "--episodes", "9")
    calls.clear()
    weights = tmp_path / "runs" / "seed1" / "real" / "best_model.pt"
    os.utime(weights, (weights.stat().st_mtime + 60,) * 2)
    rows(tmp_path)
    assert [given["--resume"] for script, given in calls if script == "diffusionmix.py"] == [str(weights)] * 2


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--seed 3", "got --seed, which"),
        ("--source real", "got --source"),
        ("--test --mix False", "got --mix"),
        ("--test --shot 10", "got --shot"),
        ("--dataset co_cifarfs --runs paper", "--runs paper"),
        ("--refresh-every 1", "--refresh-every"),
    ],
)
def test_refused_before_anything_runs(calls, call, flags, words):
    status, _, err = call(table, *flags.split())
    assert status == 2 and words in err and not calls


def test_paper_row_samples_and_guides_as_published_whatever_is_given(calls, call, tmp_path):
    given = ("--runs", "none", "paper", "guided", "--shots", "1", "--seeds", "1", "--renoise", "0.5")
    assert call(table, "--recipe", "clusters", *given)[0] == 0
    by_run = {flags["--save-dir"].rpartition("/")[2]: flags for script, flags in calls if script == "main.py"}
    assert by_run["guided"]["--renoise"] == "0.5" and by_run["paper"]["--renoise"] == "0.0"
    assert by_run["paper"]["--features"] == "map" and by_run["paper"]["--optim"] == "adamw"
    assert by_run["paper"]["--guidance-scale"] == "1.0" and by_run["paper"]["--refresh-every"] == "10"
    calls.clear()
    assert call(table, "--dataset", "custom", "--recipe", "paper", *given)[0] == 0  # the guided row is the paper's
    assert len(calls) == 4


def test_publish_replaces_the_rows_of_a_data_set(calls, tmp_path):
    made = rows(tmp_path)
    table.publish(made, tmp_path)
    other = [table.Row(**{**vars(r), "dataset": "a, b"}) for r in made]
    table.publish(other, tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    table.publish(made, tmp_path)
    assert (tmp_path / "RESULTS.md").read_text() == text
    with open(tmp_path / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["dataset"] for line in lines] == ["a, b"] * 10 + ["custom"] * 10
    assert "| 1 | guided + mix | 74.00 ± 1.31 ± 12.71 | +2.00 ± 0.00 ± 0.00 (guided) | 84 ± 0 ± 0 | 7 |" in text


def test_seeds_and_rows_are_added_to_what_is_kept(calls, tmp_path):
    path = tmp_path / "kept" / "custom.jsonl"
    table.keep(run_all(tmp_path, seeds=[1]), path)
    kept = table.keep(run_all(tmp_path, seeds=[3], runs=["none", "guided"]), path)
    found = {(r.shot, r.row): r for r in table.rows_of(kept)}
    guided, real = found[1, "guided"], found[1, "real reference"]
    assert (guided.seeds, guided.by_seed, real.seeds) == (2, "71.00 73.00", 1)
    assert (guided.difference, guided.difference_seeds_ci95) == (10, "")  # paired with the seed that both have
    assert guided.closed == pytest.approx(80)
    found[1, "guided"] = replace(guided, hardware="this / that")
    table.publish(list(found.values()), tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "2 training seeds (real reference: 1, unguided: 1), 5 episodes each" in text
    assert f"{found[1, 'real reference'].hardware}; this; that; torch" in text  # every machine, as every commit


@pytest.mark.parametrize(
    "change, words",
    [
        ({"trained_with": ["--dataset", "custom", "--lr", "2"]}, r"lr 1.0 \(got 2.0\)"),
        ({"trained_shot": 5}, r"shot of training 1 \(got 5\)"),
        ({"flags": {"--mix-steps": "9"}}, r"mix_steps of tests '1' \(got '9'\)"),
        ({"flags": {"--nKnovel": "10"}}, r"nKnovel of tests '5' \(got '10'\)"),
        ({"trained_with": ["--dataset", "custom", "--lr", "1", "--pool", "other"]}, r"pool '' \(got 'other'\)"),
        ({"pool_digest": "other"}, "different pools"),
        ({"images": "other"}, "different test images"),
    ],
)
def test_what_is_kept_of_other_settings_stays(calls, tmp_path, change, words):
    path = tmp_path / "kept" / "custom.jsonl"
    table.keep(run_all(tmp_path, seeds=[1]), path)
    before = path.read_bytes()
    other = {key: one | change for key, one in run_all(tmp_path, seeds=[3]).items()}
    with pytest.raises(ValueError, match=words):
        table.keep(other, path)
    assert path.read_bytes() == before


def test_flags_that_change_no_result_are_no_other_settings(calls, tmp_path):
    path = tmp_path / "kept" / "custom.jsonl"
    table.keep(run_all(tmp_path, seeds=[1]), path)
    words = ["-d", "custom", "--workers", "2", "--lr", "1.0", "--quiet"]
    other = {key: one | {"trained_with": words} for key, one in run_all(tmp_path, seeds=[3]).items()}
    assert {key[0] for key in table.keep(other, path)} == {1, 3}


def test_flags_of_tests_in_any_spelling(calls, tmp_path):
    rows(tmp_path, "--split=meta_val", "--quiet", "--way", "10")
    flags = [flags for script, flags in calls if script == "diffusionmix.py"]
    assert {(f["--split"], f["--quiet"], f["--nKnovel"], f["--nTestNovel"]) for f in flags} == {
        ("meta_val", "True", "10", "150")
    }
    assert {f["--mix"] for f in flags} == {"True", "False"}


def test_the_name_of_a_data_set_is_not_taken_by_a_folder(calls, call, tmp_path):
    flags = ("--publish", "--dataset", "custom", "--data-root", tmp_path / "fontchars")
    status, _, err = call(table, *flags)
    assert status == 2 and "fontchars" in err and not calls


def test_no_row_of_mixes_at_shots_that_are_not_mixed(calls, tmp_path):
    train = ["--dataset", "custom"]
    results = table.run_all(tmp_path / "runs", [1], [1, 5], RUNS, train, [], [1])
    assert [r.shot for r in table.rows_of(results) if r.row == "guided + mix"] == [1]
    tests = [given for script, given in calls if script == "diffusionmix.py" and "/guided/" in given["--save-dir"]]
    mixed = [(given["--nExemplars"], given["--mix"]) for given in tests]
    assert mixed == [("1", "True"), ("5", "False")]
