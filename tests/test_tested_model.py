"""The report of a test says what was trained, not what the flags of the test would have trained."""

import json

import pytest

import diffusionmix
import main
from tests.conftest import NO_IMAGES, TINY, slow

pytestmark = [pytest.mark.usefixtures("few_glyphs"), pytest.mark.pictures]
TEST = "--episodes 4 --nTestNovel 10 --head-steps 3 --device cpu --mix False".split()
TRAININGS = {
    "none": (("--source", "none"), "none", 1, 4),
    "real": (("--source", "real", "--max-epoch", 1, "--samples-per-class", 5), "real", 40, 5),
    "unguided": (("--source", "unguided", "--max-epoch", 1, "--num-classes", 10), "unguided", 10, 4),
}


@pytest.mark.parametrize("name", ["none", "real", slow("unguided")])
def test_the_report_tells_of_the_training(call, toy_pool, tmp_path, name):
    flags, source, classes, per_class = TRAININGS[name]
    shared = ("--pool", toy_pool, "--data-root", NO_IMAGES)
    status, _, err = call(main, *TINY, *shared, "--seed", 7, "--save-dir", tmp_path / "run", *flags)
    assert status == 0, err
    weights = tmp_path / "run" / "best_model.pt"
    places = ("--resume", weights, "--save-dir", tmp_path / "test")
    status, _, err = call(diffusionmix, *TEST, *shared, *places, "--seed", 2)
    assert status == 0, err
    page = (tmp_path / "test" / "report.html").read_text()
    assert f"{source} on glyphs, seed 2" in page and (source == "guided" or "guided on" not in page.replace(source, ""))
    start = json.loads((tmp_path / "test" / "environment.json").read_text())[-1]
    told = start["settings"]
    assert (told["source"], told["num_classes"], told["samples_per_class"]) == (source, classes, per_class)
    assert start["trained"]["seed"] == 7 and start["trained"]["model"] == str(weights)
    assert (told["seed"], told["episodes"]) == (2, 4)  # of the test are those of the test
    for row in (f"<dt>num_classes</dt><dd>{classes}</dd>", f"<dt>samples_per_class</dt><dd>{per_class}</dd>"):
        assert row in page
    results = json.loads((tmp_path / "test" / "results.json").read_text())
    keys = ("trained_source", "trained_seed", "trained_num_classes", "trained_samples_per_class")
    assert tuple(results[key] for key in keys) == (source, 7, classes, per_class)
