"""What the report finds wrong with a run, from folders written by hand."""

import json
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import report
from config import Settings
from report import verdict
from report.folder import Run
from tests.test_report import Reader

SETTINGS = {
    "source": "guided", "recipe": "clusters", "dataset": "custom", "seed": 1, "nKnovel": 5, "nExemplars": 1,
    "num_classes": 4, "max_epoch": 6, "refresh_every": 2, "samples_per_class": 40, "sample_steps": 2, "renoise": 0.0,
    "image_size": 8, "contents": {"meta_val": "a", "pool": "b"},
}  # fmt: skip
RESULT = {"dataset": "custom", "split": "meta_test", "way": 5, "shot": 1, "query": 15, "episodes": 4, "seed": 1}


@pytest.fixture
def write(tmp_path):
    """write(name, accuracies, ...): a run folder whose epochs have these accuracies on meta_val."""

    def go(name="run", accuracies=(40, 50, 60, 70, 72, 75), half=1.0, base=80.0, rates=None, images=None, **settings):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        config = SETTINGS | settings
        (folder / "config.json").write_text(json.dumps(config))
        lines = []
        for epoch, value in enumerate(accuracies, 1):
            entries = {"epoch": epoch, "round": (epoch - 1) // config["refresh_every"], "loss": 1.0}
            entries |= {"val_accuracy": value, "val_ci95": half}
            learner = {"class_learner_accuracy": [base, 30, 28, 26]}
            entries |= {"base_accuracy": base} if config["recipe"] == "clusters" else learner
            lines.append(json.dumps(entries))
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        for number in range(3):
            place = folder / "pseudo" / f"round{number:02d}"
            place.mkdir(parents=True)
            guided = rates is not None and number > 0
            noted = (
                {"hit_rate": float(np.mean([r for r in rates if r is not None])), "hit_rate_by_class": rates}
                if guided
                else {"hit_rate": None}
            )
            (place / "manifest.json").write_text(json.dumps(noted))
            rng = np.random.default_rng(number)
            drawn = rng.integers(0, 256, (12, 3, 8, 8), dtype=np.uint8) if images is None else images
            np.save(place / "images.npy", drawn)
            np.save(place / "labels.npy", np.arange(4).repeat(3))
        return folder

    return go


def test_folder(folder, scores, **entries):
    """Write the results of a test into <folder>/1-shot."""
    (folder / "1-shot").mkdir()
    mean, half = float(np.mean(scores)), 1.0
    result = RESULT | {"accuracy": mean, "ci95": half, "accuracy_without_mix": mean, "ci95_without_mix": half}
    result |= {"by_episode": scores, "by_episode_without_mix": scores, "pool_models": 0} | entries
    (folder / "1-shot" / "results.json").write_text(json.dumps(result))


test_folder.__test__ = False


def found(folder):
    """Return the names of the rules that find something, and of those that look."""
    outcomes = verdict.findings(Run.read(folder))
    return {name for name, each in outcomes.items() if each}, set(outcomes)


def test_a_good_run_has_no_finding(write):
    nothing, looked = found(write(rates=[0.9, 0.8, 1.0, 0.7]))
    assert nothing == set()
    assert looked == {
        "the guide", "the hit rate", "validation", "the epoch that was kept", "the number of images",
        "variety within a class",
    }  # fmt: skip


@pytest.mark.parametrize("recipe", ["paper", "clusters"])
def test_a_guide_at_chance(write, recipe):
    chance = 100 / SETTINGS["num_classes"]
    assert "the guide" in found(write("low", base=chance + 1, recipe=recipe))[0]
    assert "the guide" in found(write("high", base=3 * chance, recipe=recipe))[1]
    assert "the guide" not in found(write("other", base=chance, recipe=recipe, source="unguided"))[1]
    name = verdict.findings(Run.read(write("again", base=chance, recipe=recipe)))["the guide"][0].what
    assert ("class-learner" in name) == (recipe == "paper")  # the other recipe has none


@pytest.mark.parametrize("count, wrong", [(3, True), (9, True), (40, False)])
def test_few_images(write, count, wrong):
    assert ("the number of images" in found(write(samples_per_class=count))[0]) == wrong


def test_a_fall_from_the_first_epoch_is_not_called_flat(write):
    told = verdict.findings(Run.read(write(accuracies=(60, 55, 54, 53, 53, 52))))["validation"][0].what
    assert "flat" not in told and "60.0" in told and "52.0" in told


def test_a_fall_between_two_networks_is_not_called_flat(write):
    """The clusters recipe starts networks anew, so the first epoch and the best may be of two."""
    assert "validation" not in found(write(accuracies=(60, 61, 40, 55, 61, 60.8), recipe="clusters"))[0]


@pytest.mark.parametrize(
    "rates, count",
    [
        ([0.3, 0.2, 0.4, 0.1], 2),
        ([1.0, 0.0, 1.0, 1.0], 1),
        ([0, 0, 0.1, 0.2], 2),
        ([1, 0.26, 1, 1], 0),
        ([0.3, None, 0.4, 0.1], 2),
    ],
)
def test_hit_rates(write, rates, count):
    assert len(verdict.findings(Run.read(write(rates=rates)))["the hit rate"]) == count


@pytest.mark.parametrize(
    "accuracies, wrong",
    [
        ((60, 60.2, 60.5, 60.1, 60.3, 60.4), True),  # flat
        ((40, 60, 70, 60, 55, 50), True),  # falling
        ((40, 60, 70, 60, 55), False),  # not finished
        ((19, 20, 20.5, 20, 20.5, 20), True),  # at chance
        ((40, 60, 70, 69.5, 69.8, 69.6), False),
        ((40,), False),
    ],
)
def test_validation(write, accuracies, wrong):
    assert ("validation" in found(write(accuracies=accuracies))[0]) == wrong


def test_validation_against_random_weights(write):
    folder = write(accuracies=(40, 45, 50, 52, 53, 54))
    assert "validation" not in found(folder)[0]
    write("floor", accuracies=(56,), source="none")
    assert "validation" in found(folder)[0]
    levels = verdict.levels(Run.read(folder))
    assert levels == {"chance": 20.0, "random weights": 56}
    other = write("other", accuracies=(40, 45, 50, 52, 53, 54), contents={"meta_val": "of other images"})
    assert verdict.levels(Run.read(other)) == {"chance": 20.0}


def test_the_best_epoch_came_before_guidance(write):
    assert "the epoch that was kept" in found(write("a", (70, 75, 60, 61, 62, 63), rates=[1.0] * 4))[0]
    assert "the epoch that was kept" not in found(write("b", (70, 75, 60, 61, 62, 80), rates=[1.0] * 4))[0]
    assert "the epoch that was kept" not in found(write("c", (70, 75), rates=[1.0] * 4))[1]


@pytest.mark.parametrize(
    "figure, wrong", [((1.05, 0.02), False), ((0.3, 0.02), True), ((1.0, 0.6), True), ((None, 0.05), False)]
)
def test_copies(write, tmp_path, figure, wrong):
    (tmp_path / "pool").mkdir()
    figures = {
        "subset1": {"ratio": 1.0, "too_near": 0.0},
        "subset2": dict(zip(("ratio", "too_near"), figure, strict=True)),
    }
    (tmp_path / "pool" / "pool.json").write_text(json.dumps({"memorisation": figures}))
    folder = write(pool=str(tmp_path / "pool"))
    assert ("copies in the pool" in found(folder)[0]) == wrong
    text = " ".join(each.what for each in verdict.findings(Run.read(folder))["copies in the pool"])
    assert ("subset2" in text) == wrong and "subset1" not in text


def test_images_of_a_class_all_alike(write):
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 8, 8), dtype=np.uint8)
    images[3:6] = images[3]  # class 1
    wrong = verdict.findings(Run.read(write(images=images)))["variety within a class"]
    assert len(wrong) == 1 and "1 of 4 classes" in wrong[0].what and wrong[0].what.endswith(": 1.")


def test_advice_names_flags_that_exist():
    named = set(re.findall(r"--[a-z][\w-]*", Path(verdict.__file__).read_text(encoding="utf-8")))
    assert named and {flag.replace("-", "_") for flag in named} <= {f"__{f.name}" for f in fields(Settings)}


def test_every_kept_test_is_shown(write):
    folder = write()
    test_folder(folder, [50.0, 60.0, 70.0, 80.0])
    (folder / "1-shot" / "results").mkdir()
    for name, shot in (("meta_test-5way-1shot", 1), ("meta_test-5way-5shot", 5)):
        entries = RESULT | {"shot": shot, "accuracy": 40.0 + shot, "ci95": 1.0}
        (folder / "1-shot" / "results" / f"{name}.json").write_text(json.dumps(entries))
    results = Run.read(folder).results
    assert {test: each["accuracy"] for test, each in results.items()} == {
        ("1-shot", "meta_test-5way-1shot"): 41.0, ("1-shot", "meta_test-5way-5shot"): 45.0,
    }  # fmt: skip
    assert classes(folder).count("test") == 2


def test_mixes_that_harm(write):
    folder = write()
    test_folder(folder, [50, 60, 70, 80], pool_models=2, paired_difference=-2.0, paired_ci95=0.5)
    assert "mixes" in found(folder)[0]


def test_damaged_images_leave_the_other_rules(write):
    folder = write(rates=[0.0, 1.0, 1.0, 1.0])
    (folder / "pseudo" / "round02" / "images.npy").write_bytes(b"no")
    wrong, looked = found(folder)
    assert "the hit rate" in wrong and "variety within a class" not in looked


def test_the_result_stands_beside_floor_and_reference(write):
    folder, floor, real = write(), write("floor", (30,), source="none"), write("real", source="real")
    test_folder(folder, [60.0, 62.0, 58.0, 64.0])
    text = " ".join("".join(Reader(report.render(Run.read(folder))).text).split())
    assert "61.00 ± 1.00 %" in text and "chance 20.0 %" in text and "random weights" not in text.split("Best on")[0]
    test_folder(floor, [30.0, 33.0, 27.0, 34.0])
    test_folder(real, [80.0, 80.0, 80.0, 80.0], seed=2)  # other episodes: no interval, and none of its numbers
    text = " ".join("".join(Reader(report.render(Run.read(folder))).text).split())
    # differences 30, 29, 31, 30: s = 0.8165, t(3) = 3.1824, half-width 1.2992
    assert "30.00 ± 1.30 points above random weights" in text and "real images" not in text.split("Best on")[0]


def test_guided_and_unguided_images_of_the_same_noise(write):
    folder = write(rates=[1.0] * 4)
    assert "pair" not in classes(folder)
    write("unguided", source="unguided")
    assert classes(folder).count("pair") == 12  # three images of four classes
    other = write("again", rates=[1.0] * 4, seed=2)
    assert "pair" not in classes(other)


def classes(folder):
    """Return the class of each element of the report that has one."""
    found_ = []

    class Classes(Reader):
        def handle_starttag(self, tag, attrs):
            found_.extend(value for key, value in attrs if key == "class")

    Classes(report.render(Run.read(folder)))
    return found_


@pytest.mark.parametrize("recipe, source", [("paper", "guided"), ("clusters", "guided"), ("clusters", "unguided")])
def test_a_class_learner_is_told_of_only_where_there_is_one(write, recipe, source):
    text = "".join(Reader(report.render(Run.read(write(recipe=recipe, source=source)))).text)
    assert ("accuracy of the class-learner" in text) == (recipe == "paper")
    assert ("The class-learner guides" in text) == (recipe == "paper")


# ---- several runs


@pytest.fixture
def compared(write):
    """Two seeds of three methods on four episodes each: the compared page, as rows of cells."""
    scores = {
        ("none", 1): [10, 10, 10, 10], ("none", 2): [10, 10, 10, 10],
        ("guided", 1): [50, 52, 48, 50], ("guided", 2): [40, 44, 40, 44],
        ("real", 1): [60, 60, 60, 60], ("real", 2): [60, 70, 60, 70],
    }  # fmt: skip
    folders = []
    for (source, seed), values in scores.items():
        folder = write(f"seed{seed}/{source}", source=source, seed=seed)
        test_folder(folder, [float(value) for value in values], seed=seed)
        folders.append(folder)
    text = report.render_several([Run.read(folder) for folder in folders], folders[0])
    rows = []

    class Rows(Reader):
        def handle_starttag(self, tag, attrs):
            if tag == "tr":
                rows.append([])
            if tag in ("td", "th"):
                rows[-1].append("")
            self.inside = tag not in ("section", "style")

        def handle_data(self, data):
            if rows and rows[-1] and self.inside:
                rows[-1][-1] += data

    Rows(text)
    return text, {row[0]: row[1:] for row in reversed(rows) if row}, rows


def test_a_row_for_each_run_and_both_intervals(compared):
    _, first, _ = compared
    assert first["seed1/guided"][0] == "50.00" and first["seed2/guided"][0] == "42.00"
    accuracy, episodes, seeds, closed = first["seed*/guided"][:4]
    # all eight episodes: mean 46, s = 4.6599, t(7) = 2.3646; means of seeds 50 and 42, t(1) = 12.7062
    assert accuracy == "46.00" and float(episodes) == pytest.approx(2.3646 * 4.6599 / 8**0.5, abs=0.006)
    assert float(seeds.split()[0]) == pytest.approx(12.7062 * 4, abs=0.006)
    # gained 36 of 52.5
    assert closed.split()[0] == f"{100 * 36 / 52.5:.0f}"


def test_differences_are_paired(compared):
    _, _, rows = compared
    head = next(row for row in rows if row[0] == "" and "seed*/real" in row)
    row = next(each for each in rows[rows.index(head) :] if each[0] == "seed*/guided")
    mean, episodes, _ = row[head.index("seed*/real")].split(" ± ")
    # guided less real: -10 -8 -12 -10, -20 -26 -20 -26; s = 7.3872
    assert float(mean) == -16.5 and float(episodes) == pytest.approx(2.3646 * 7.3872 / 8**0.5, abs=0.006)


def test_runs_on_other_episodes_are_not_paired(write):
    folders = [write("a", lr=1), write("b", lr=2)]
    for folder, seed in zip(folders, (1, 2), strict=True):
        test_folder(folder, [50.0, 60.0, 70.0, 80.0], seed=seed)
    page = Reader(report.render_several([Run.read(folder) for folder in folders], folders[0]))
    assert "–" in page.text and not any("± 0.00" in text for text in page.text)


def test_a_run_tested_on_other_episodes_is_no_second_seed(write):
    folders = [write("a", lr=1), write("b", lr=2)]
    for folder in folders:
        test_folder(folder, [50.0, 60.0, 70.0, 80.0], seed=1)
    again = json.loads((folders[0] / "1-shot" / "results.json").read_text()) | {"seed": 2, "accuracy_without_mix": 99.0}
    (folders[0] / "1-shot-again").mkdir()
    (folders[0] / "1-shot-again" / "results.json").write_text(json.dumps(again))
    page = Reader(report.render_several([Run.read(folder) for folder in folders], folders[0]))
    assert page.text.count("one seed") == 3 and not any("(2 seeds)" in text for text in page.text)
    assert "a, test seed 2" in page.text


def test_one_checkpoint_tested_thrice_is_one_seed(write):
    folders = [write(name, seed=seed) for seed, name in enumerate("abc")]
    for seed, folder in enumerate(folders):
        test_folder(folder, [50.0, 60.0, 70.0, 80.0 + seed], seed=seed, trained_seed=7)
    page = Reader(report.render_several([Run.read(folder) for folder in folders], folders[0]))
    assert page.text.count("one seed") == 3 and not any("seeds)" in text for text in page.text)


def test_runs_of_the_same_seed_are_compared(write):
    """Of another pool at the same place, for example, which the settings do not tell."""
    folders = [write("a"), write("b")]
    for folder, score in zip(folders, (50.0, 60.0), strict=True):
        test_folder(folder, [score, score + 1, score, score + 1], seed=1)
    text = report.render_several([Run.read(folder) for folder in folders], folders[0])
    assert "(2 seeds)" not in text and "b minus a: +10.00 ± 0.00 points" in text


def test_given_weights_are_no_random_weights(write):
    trained, floor = write("trained"), write("floor", source="none", resume="W.pt")
    for folder in (trained, floor):
        test_folder(folder, [50.0, 60.0], seed=1)
    page = Reader(report.render(Run.read(floor))).text
    assert any("weights of W.pt, nothing to train" in text for text in page)
    assert not any("random weights" in text for text in Reader(report.render(Run.read(trained))).text)


def test_random_weights_of_another_network_are_not_beside(write):
    trained = write("trained", backbone="conv4")
    write("floor", source="none", backbone="resnet12", accuracies=(99,))
    assert Run.read(trained).beside("none") is None and verdict.levels(Run.read(trained)).keys() == {"chance"}


def test_the_gap_is_that_of_the_same_network(write):
    scores, folders = {"none": (10, 40), "guided": (50, 70), "real": (60, 80)}, []
    for source, pair in scores.items():
        for backbone, score in zip(("conv4", "resnet12"), pair, strict=True):
            folders.append(write(f"{backbone}-{source}", source=source, backbone=backbone))
            test_folder(folders[-1], [float(score)] * 4, seed=1)
    text = report.render_several([Run.read(folder) for folder in folders], folders[0])
    assert "80 ± 0" in text and "75 ± 0" in text  # 40 of 50 points, and 30 of 40


def test_entries_that_no_float_holds_and_lines_without_a_round(write):
    folder = write()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    del lines[1]["round"]
    lines[2]["loss"] = 10**400
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = report.render(Run.read(folder))
    assert "accuracy on meta_val" in text and "training loss" in text


def test_chance_and_kept_epoch_are_in_the_curves(write):
    text = report.render(Run.read(write(accuracies=(40, 50, 75, 70, 71, 72))))
    assert "epoch 3, kept" in text and "<title>meta_val, epoch 3: 75 ± 1</title>" in text and "chance 20.0" in text
