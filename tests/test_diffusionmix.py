"""Meta-testing end to end, tiny."""

import json
import shutil

import numpy as np
import pytest
import torch

import diffusionmix
import few_shot
from report import render_several
from report.folder import Run
from tests.conftest import NO_IMAGES
from utils.images import to_float
from utils.metrics import mean_confidence_interval, paired_difference

KEYS = (
    "dataset way shot query episodes seed accuracy ci95 accuracy_without_mix ci95_without_mix paired_difference "
    "paired_ci95 seconds mix_steps pool_models precision device torch"
).split()
QUICK = "--episodes 4 --nTestNovel 10 --mix-steps 2 --head-steps 5 --device cpu --sample-batch 7".split()

pytestmark = pytest.mark.usefixtures("few_glyphs")


@pytest.fixture
def test_run(call, two_models, trained, tmp_path):
    """Run diffusionmix.py in a copy of the run folder; returns results.json and what was printed."""

    def go(*flags, pool=two_models):
        folder = tmp_path / "run"
        if not folder.exists():
            shutil.copytree(trained, folder)
        shared = ("--save-dir", folder, "--pool", pool, "--data-root", NO_IMAGES, *QUICK)
        status, out, err = call(diffusionmix, *shared, *flags)
        assert status == 0, err
        return json.loads((folder / "results.json").read_text()), out

    return go


def test_results(test_run):
    results, out = test_run()
    assert set(KEYS) <= results.keys()
    expected = dict(
        dataset="glyphs", split="meta_test", way=5, shot=1, query=2, episodes=4, seed=1, mix_steps=2, pool_models=2,
        device="cpu", precision="float32", torch=torch.__version__,
    )  # fmt: skip
    assert {name: results[name] for name in expected} == expected
    mixed, plain = results["by_episode"], results["by_episode_without_mix"]
    assert len(mixed) == len(plain) == 4 and all(0 <= value <= 100 for value in mixed + plain)
    assert (results["accuracy"], results["ci95"]) == pytest.approx(mean_confidence_interval(mixed))
    assert (results["accuracy_without_mix"], results["ci95_without_mix"]) == pytest.approx(
        mean_confidence_interval(plain)
    )
    pair = (results["paired_difference"], results["paired_ci95"])
    assert pair == pytest.approx(paired_difference(mixed, plain))
    assert f"5-way 1-shot on meta_test: {results['accuracy']:.2f} +- {results['ci95']:.2f} % with mixes" in out
    again, _ = test_run()
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in results.items() if k != "seconds"}


def test_another_batch_gives_the_same_accuracies(test_run):
    first, _ = test_run("--nExemplars", 2, "--seed", 3, "--head-init", "random")
    second, _ = test_run(
        "--nExemplars", 2, "--seed", 3, "--head-init", "random", "--sample-batch", 40, "--test-batch", 3
    )
    assert first["by_episode"] == second["by_episode"] and first["shot"] == 2
    other, _ = test_run("--nExemplars", 2, "--seed", 4)
    assert other["by_episode_without_mix"] != first["by_episode_without_mix"]


def test_no_test_takes_the_place_of_another(test_run, tmp_path):
    kept = tmp_path / "run" / "results"
    first, out = test_run("--mix", "False")
    assert "with mixes" not in out and " % without mixes" in out
    assert "meta_test-5way-1shot.json" in out
    test_run("--mix", "False")  # the same again
    assert [path.name for path in kept.iterdir()] == ["meta_test-5way-1shot.json"]
    test_run("--mix", "False", "--seed", 5)
    test_run("--mix", "False", "--shot", 2)
    names = ["meta_test-5way-1shot-2.json", "meta_test-5way-1shot.json", "meta_test-5way-2shot.json"]
    assert sorted(path.name for path in kept.iterdir()) == names
    assert json.loads((kept / names[1]).read_text())["by_episode"] == first["by_episode"]
    assert json.loads((kept / names[0]).read_text())["seed"] == 5


def test_another_pool_of_as_many_models_is_another_test(test_run, make_pool, tmp_path):
    first, _ = test_run()
    other = make_pool(tmp_path / "other", [4, 4], lambda network, m: network.out[2].bias.data.fill_(0.5))
    assert test_run(pool=other)[0]["pool"] != first["pool"]
    kept = sorted((tmp_path / "run" / "results").iterdir())
    assert [json.loads(path.read_text())["pool"] for path in reversed(kept)][0] == first["pool"] and len(kept) == 2
    page = render_several([Run.read(tmp_path / "run")] * 2, tmp_path)
    assert "(2 seeds)" not in page


def test_a_result_that_does_not_name_its_pool_is_the_same_test(test_run, tmp_path):
    kept = tmp_path / "run" / "results" / "meta_test-5way-1shot.json"
    results, _ = test_run("--mix", "False")
    del results["pool"]
    kept.write_text(json.dumps(results))
    assert test_run("--mix", "False")[0]["pool"] == ""
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_compare(test_run, call, trained, two_models, tmp_path):
    results, _ = test_run("--mix", "False")
    other = dict(results, accuracy=50.0, by_episode=[value - 10 - i for i, value in enumerate(results["by_episode"])])
    (tmp_path / "other.json").write_text(json.dumps(other))
    flags = ("--save-dir", tmp_path / "run", "--compare", tmp_path / "other.json")
    status, out, err = call(diffusionmix, *flags)
    assert status == 0 and "+11.50 +- 2.05" in out, err  # of 10, 11, 12, 13
    (tmp_path / "other.json").write_text(json.dumps(dict(other, seed=2)))
    status, _, err = call(diffusionmix, *flags)
    assert status == 2 and "seed 1 and 2" in err
    assert call(diffusionmix, *flags[:3], tmp_path / "none")[0] == 2
    for itself in (tmp_path / "run", tmp_path / "run" / "results.json"):
        assert call(diffusionmix, *flags[:3], itself)[0] == 2


def test_episodes_are_there_for_another_method(test_run, tmp_path):
    results, _ = test_run("--mix", "False")
    with np.load(tmp_path / "run" / "episodes.npz") as episodes:
        support, query, classes = (episodes[name] for name in ("support", "query", "classes"))
    assert support.shape == (4, 5) and query.shape == (4, 10) and classes.shape == (4, 5)
    assert (support // 10 == classes).all()  # ten glyphs per class, class by class


def test_without_mixes(test_run):
    with_mixes, _ = test_run()
    results, _ = test_run("--mix", "False", pool="no/such/pool")
    assert (results["pool_models"], results["mix_steps"], results["paired_difference"]) == (0, 0, 0.0)
    assert results["by_episode"] == results["by_episode_without_mix"] == with_mixes["by_episode_without_mix"]


@pytest.mark.parametrize("flags", [("--split", "meta_val"), ("--phase", "val")])
def test_validation_classes(test_run, flags, monkeypatch):
    asked, load = [], diffusionmix.load_real
    monkeypatch.setattr(diffusionmix, "load_real", lambda *a, **more: asked.append(a[2]) or load(*a, **more))
    results, _ = test_run(*flags, "--mix", "False")
    assert results["split"] == "meta_val" and asked == ["meta_val"]


@pytest.mark.parametrize("init", ["zeros", "random", "prototypes"])
def test_head_settings(test_run, init):
    results, _ = test_run("--head-init", init, "--head-scale", 5, "--mix", "False")
    assert 0 <= results["accuracy"] <= 100


def test_partners_and_labels_of_mixes_agree(trained, two_models, tmp_path, monkeypatch):
    seen = []

    def spy(model, x_a, x_b, weight, noise, *, level, steps, local_labels):
        seen.append((x_a, x_b, weight, noise))
        return x_a

    monkeypatch.setattr(few_shot, "diffusion_mixes", spy)
    flags = ("--save-dir", trained, "--pool", two_models, "--data-root", NO_IMAGES, *QUICK, "--nExemplars", 2)
    settings = diffusionmix.parse([str(flag) for flag in flags], description="test")
    testing = diffusionmix.Testing(settings, settings.data_paths[0])
    e = testing.episodes
    targets = torch.nn.functional.one_hot(e.support_labels, 5).float()
    features, labels = testing.mixes(targets)
    assert features.shape == (4, 2 * 10, 64) and labels.shape == (4, 2 * 10, 5)
    torch.testing.assert_close(labels.sum(-1), torch.ones(4, 20))
    x_a, x_b, weight, noise = (torch.cat(parts) for parts in zip(*seen, strict=True))
    support = to_float(testing.images.images)[e.support]  # (E, S, 3, H, W)
    shape = (2, 4, 10)  # models, episodes, support
    a, b = x_a.unflatten(0, shape), x_b.unflatten(0, shape)
    assert torch.equal(a, support.expand_as(a))
    match = (b[:, :, :, None] == support[None, :, None]).flatten(4).all(-1)  # (M, E, S, S): which image b is
    assert bool((match.sum(-1) == 1).all()) and bool((match.sum(-2) == 1).all())  # a permutation
    partner = match.float() @ targets
    w = weight.view(*shape, 1)
    expected = w * targets + (1 - w) * partner
    torch.testing.assert_close(labels, expected.transpose(0, 1).flatten(1, 2))
    assert len({tuple(row.tolist()) for row in noise.flatten(1)[:, :4]}) == len(noise)  # every mix its own
    assert 0 <= float(weight.min()) < 0.1 and 0.9 < float(weight.max()) <= 1


def test_the_class_of_a_mix_says_nothing_about_its_label(trained, make_pool, tmp_path, monkeypatch):
    """With 5-way 1-shot and 5 classes a model, image s of every episode would always be of class s."""
    seen = []
    monkeypatch.setattr(
        few_shot, "diffusion_mixes", lambda m, a, *_, local_labels, **__: seen.append(local_labels) or a
    )
    pool = make_pool(tmp_path / "conditional", [5], class_cond=True, num_classes=5)
    for batch in (7, 40):
        flags = ("--save-dir", trained, "--pool", pool, "--data-root", NO_IMAGES, *QUICK, "--episodes", 40,
                 "--sample-batch", batch)  # fmt: skip
        testing = diffusionmix.Testing(diffusionmix.parse([str(f) for f in flags], description="test"), NO_IMAGES)
        testing.mixes(torch.nn.functional.one_hot(testing.episodes.support_labels, 5).float())
    labels = torch.cat(seen).view(2, 40, 5)
    assert torch.equal(*labels)  # whatever the batch
    for image in labels[0].T:
        assert 3 <= len(image.unique()) and int(image.bincount().max()) < 24


def test_pools_of_other_sizes_and_kinds(test_run, make_pool, tmp_path):
    make_pool(tmp_path / "mixed", [3], class_cond=True)
    make_pool(tmp_path / "large", [2], image_size=32, channel_mult="1,1,1")
    (tmp_path / "large" / "subset1").rename(tmp_path / "mixed" / "subset2")
    results, _ = test_run(pool=tmp_path / "mixed")
    assert results["pool_models"] == 2


def test_mixes_towards_the_pool_change_the_heads(test_run, paint_pool):
    results, _ = test_run("--head-steps", 50, "--mix-level", 900, "--head-scale", 20, pool=paint_pool)
    assert results["by_episode"] != results["by_episode_without_mix"]


def test_resume_names_the_checkpoint(test_run, trained):
    results, _ = test_run("--resume", trained / "last.pt", "--mix", "False")
    assert results["by_episode"] == test_run("--mix", "False")[0]["by_episode"]
