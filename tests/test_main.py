"""Meta-training end to end, tiny."""

import json
import shutil
from functools import partial

import pytest
import torch

import main
from datasets.pseudo import PseudoDataset
from models.learners import ClusterLearners, PaperLearners
from report import verdict
from report.folder import Run
from tests.conftest import NO_IMAGES, TINY, same, slow
from utils import checkpoint

pytestmark = pytest.mark.usefixtures("few_glyphs", "few_rounds")


@pytest.fixture
def train(call, toy_pool, tmp_path):
    """train(folder, *flags): run main.py on few glyphs with the toy pool; returns its output."""

    def go(folder, *flags, pool=toy_pool, status=0):
        arguments = ("--save-dir", folder, "--pool", pool, "--data-root", NO_IMAGES, *TINY, *flags)
        got, out, err = call(main, *arguments)
        assert got == status, err
        return out if status == 0 else err

    return go


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


ALWAYS = set(
    ".lock config.json environment.json log_train.txt metrics.jsonl last.pt last.previous.pt best_model.pt curves.png "
    "report.html".split()
)
CLUSTERS = ("--recipe", "clusters", "--refresh-every", 2, "--max-epoch", 4)
SOURCES = {
    "guided": (),
    "unguided": ("--source", "unguided"),
    "real": ("--source", "real"),
    "none": ("--source", "none"),
    "clusters": CLUSTERS,
    "map": ("--features", "map"),
    "clusters, unguided": (*CLUSTERS, "--source", "unguided"),
    "clusters, by_model": (*CLUSTERS, "--source", "by_model"),
    "clusters, real": (*CLUSTERS, "--source", "real"),
}
QUICK = ("guided", "none", "clusters")


@pytest.mark.pictures
@pytest.mark.parametrize("source", [name if name in QUICK else slow(name) for name in SOURCES])
def test_run_folder(train, two_models, toy_pool, tmp_path, monkeypatch, source):
    folder, few = tmp_path / "run", source in QUICK
    pool, classes = (two_models, 8) if few else (toy_pool, 20)  # five classes, without guidance one for each model
    out = train(folder, *SOURCES[source], pool=pool)
    draws = source not in ("real", "none", "clusters, real")
    expected = ALWAYS | ({"pseudo"} if draws else set())
    expected -= {"last.previous.pt"} if source == "none" else set()
    assert {path.name for path in folder.iterdir()} == expected
    settings = json.loads((folder / "config.json").read_text())
    assert settings["num_classes"] == {"real": 40, "clusters, real": 40, "none": 1}.get(source, classes)
    assert settings["image_size"] == 16
    lines = metrics(folder)
    epochs = 4 if "clusters" in source else 2
    assert [line["epoch"] for line in lines] == ([0] if source == "none" else list(range(1, epochs + 1)))
    assert all({"val_accuracy", "val_ci95"} <= line.keys() for line in lines)
    assert ("class_learner_loss" in lines[0]) == ("class_learner_loss" in lines[-1]) == (source in ("guided", "map"))
    best = checkpoint.load(folder / "best_model.pt")
    assert best["val_accuracy"] == max(line["val_accuracy"] for line in lines)
    assert "optimizers" not in best and f"best on meta_val {best['val_accuracy']:.2f} %" in out
    if draws:
        labels = {"clusters.npy", "labels01.npy"} if source in ("clusters", "clusters, unguided") else set()
        for r in range(2):
            names = {path.name for path in (folder / "pseudo" / f"round{r:02d}").iterdir()}
            assert names == {"images.npy", "labels.npy", "manifest.json", "sheet.png"} | (labels if r == 0 else set())
        data = PseudoDataset.load(folder / "pseudo" / "round01")
        assert data.images.shape == (4 * classes, 3, 16, 16) and data.num_classes == classes
        every = torch.arange(classes).repeat_interleave(4)
        if source in ("unguided", "clusters, by_model"):
            assert torch.equal(data.labels, every // 4 * 4)
        elif labels:  # noise is asked for what it shows, not class after class
            assert torch.equal(data.labels // 4, every // 4) and not torch.equal(data.labels, every)
        else:
            assert torch.equal(data.labels, every)
    for owner in (PaperLearners, ClusterLearners):  # the same command again trains no more
        monkeypatch.setattr(owner, "train_meta_model", None)
    monkeypatch.setattr(main, "synthesise", None)
    weights = checkpoint.load(folder / "last.pt")
    again = train(folder, *SOURCES[source], pool=pool)
    assert "is finished" in again and "random weights" not in again and " images" not in again  # does nothing again
    best_epoch = next(line["epoch"] for line in lines if line["val_accuracy"] == best["val_accuracy"])
    assert ("in epoch" not in again) if source == "none" else (f" in epoch {best_epoch}, chance is 20 %" in again)
    assert same(checkpoint.load(folder / "last.pt")["model"], weights["model"])


def test_each_network_starts_from_the_same_new_weights(train, two_models, tmp_path, monkeypatch):
    seen, real = [], ClusterLearners.train_meta_model

    def spy(self, *args):
        seen.append({name: value.clone() for name, value in self.model.state_dict().items()})
        return real(self, *args)

    monkeypatch.setattr(ClusterLearners, "train_meta_model", spy)
    train(tmp_path / "run", *CLUSTERS, pool=two_models)
    assert len(seen) == 4 and same(seen[0], seen[1]) and same(seen[0], seen[2]) and not same(seen[2], seen[3])


@pytest.mark.pictures
def test_a_run_with_an_empty_class(train, two_models, tmp_path, monkeypatch):
    """A pool model may draw a single class. Then its other classes have no images."""
    for name in ("cluster_classes", "likeliest_classes"):
        monkeypatch.setattr(main, name, lambda _, first, *rest: first.clone())
    train(tmp_path / "run", *CLUSTERS, pool=two_models)
    manifest = json.loads((tmp_path / "run" / "pseudo" / "round01" / "manifest.json").read_text())
    assert [line["images"] for line in manifest["class_to_index"]] == [16, 0, 0, 0] * 2
    assert [rate is None for rate in manifest["hit_rate_by_class"]] == [False, True, True, True] * 2
    assert "the hit rate" in verdict.findings(Run.read(tmp_path / "run"))


def test_as_many_real_images_as_the_method_has(train, tmp_path, monkeypatch):
    seen, real = [], main.load_real
    monkeypatch.setattr(main, "load_real", lambda *args, **how: seen.append(args[4:5]) or real(*args, **how))
    train(tmp_path / "a", *CLUSTERS, "--source", "real")
    train(tmp_path / "b", "--source", "real")
    assert [each for each in seen if each] == [(8,), (4,)]  # of 2 rounds, of 1


@pytest.mark.parametrize(
    "where, flags",
    [
        ("train_meta_model", CLUSTERS),
        ("train_meta_model", ()),
        slow("train_class_learner", ()),
        slow("train_meta_model", ("--refresh-every", 2)),
        slow("train_meta_model", ("--recipe", "clusters", "--refresh-every", 2, "--max-epoch", 7)),
    ],
)
def test_killed_run_goes_on_bit_for_bit(train, two_models, tmp_path, monkeypatch, where, flags):
    train = partial(train, pool=two_models)
    train(tmp_path / "whole", *flags)
    owner = ClusterLearners if "clusters" in flags else PaperLearners
    real, calls = getattr(owner, where), []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, killed)
        train(tmp_path / "cut", *flags, status=130)
    assert checkpoint.load(tmp_path / "cut" / "last.pt")["epoch"] == 1
    torch.manual_seed(99)
    assert "after epoch 1" in train(tmp_path / "cut", *flags)
    for name in ("last.pt", "best_model.pt"):
        whole, cut = (checkpoint.load(tmp_path / folder / name) for folder in ("whole", "cut"))
        for state in (whole, cut):
            del state["settings"]["save_dir"]
        assert same(whole, cut)
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "cut"), strict=True):
        assert {k: v for k, v in one.items() if "seconds" not in k} == {
            k: v for k, v in other.items() if "seconds" not in k
        }


@pytest.mark.parametrize("source", ["real", slow("guided")])
def test_same_seed_same_run(train, two_models, tmp_path, source):
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tmp_path / name, "--source", source, "--seed", seed, "--max-epoch", 1, pool=two_models)
        states.append(checkpoint.load(tmp_path / name / "last.pt")["model"])
    assert same(states[0], states[1]) and not same(states[0], states[2])


def test_other_settings_do_not_go_on(train, two_models, tmp_path, monkeypatch):
    folder, train = tmp_path / "run", partial(train, pool=two_models)
    with monkeypatch.context() as patch:
        patch.setattr(PaperLearners, "train_meta_model", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(folder)  # killed after the images of round 0, before any checkpoint
    assert (folder / "pseudo" / "round00" / "manifest.json").exists() and not (folder / "last.pt").exists()
    assert "config.json: was made with seed 1 (got 2)" in train(folder, "--seed", 2, status=2)
    train(folder)
    assert "last.pt: was made with seed 1 (got 2)" in train(folder, "--seed", 2, status=2)
    for other in (1, 3):  # the rates' schedule depends on it
        assert f"max_epoch 2 (got {other})" in train(folder, "--max-epoch", other, status=2)
    assert "is finished" in train(folder, "--sample-batch", 3)


def test_resume_starts_from_weights(train, two_models, tmp_path):
    train(tmp_path / "a", "--max-epoch", 1, pool=two_models)
    train(tmp_path / "b", "--resume", tmp_path / "a" / "last.pt", "--source", "none", "--num-classes", 8)
    first, second = (checkpoint.load(tmp_path / name / "last.pt") for name in "ab")
    assert all(same(first[part], second[part]) for part in ("model", "model_statistics", "class_learner"))


def test_rates_follow_the_schedule(train, tmp_path):
    train(tmp_path / "run", "--source", "real", "--max-epoch", 3, "--lr", 0.01)
    assert [line["lr"] for line in metrics(tmp_path / "run")] == pytest.approx([0.01, 0.01, 0.0006])


def test_diverged_epoch_is_not_saved(train, two_models, tmp_path, monkeypatch):
    folder, losses, saved = tmp_path / "run", [1.0, float("nan")], []

    def loss(*_, **__):
        saved.append((folder / "last.pt").read_bytes() if len(saved) else b"")
        return {"class_learner_loss": losses[len(saved) - 1], "class_learner_accuracy": [0.0] * 4}

    monkeypatch.setattr(PaperLearners, "train_class_learner", loss)
    assert "got class_learner_loss nan in epoch 2" in train(folder, pool=two_models, status=2)
    assert (folder / "last.pt").read_bytes() == saved[1]


@pytest.mark.slow
def test_dropblock_goes_on_bit_for_bit(train, tmp_path):
    flags = ("--source", "real", "--backbone", "resnet12", "--drop-rate", 0.3, "--train_epoch_size", 1)
    flags += ("--samples-per-class", 3, "--max-epoch", 1, "--epoch_size", 2)
    states = []
    for name in "ab":
        torch.manual_seed(ord(name))  # nothing may depend on it
        train(tmp_path / name, *flags)
        states.append(checkpoint.load(tmp_path / name / "last.pt")["model"])
        shutil.rmtree(tmp_path / name)
    assert same(*states)


@pytest.mark.parametrize("more", [("--max-epoch", 1), CLUSTERS], ids=["paper", "clusters"])
def test_images_larger_than_those_of_the_pool(train, two_models, tmp_path, more):
    train(tmp_path / "run", "--height", 24, "--width", 24, *more, pool=two_models)
    newest = max((tmp_path / "run" / "pseudo").glob("round*"))  # guided
    assert PseudoDataset.load(newest).images.shape == (32, 3, 24, 24)
