"""What is kept between a stop and its resumption belongs to the contents of images and pool, not to their paths."""

import json
import shutil

import numpy as np
import pytest

import bookkeeping
import diffusionmix
import main
from guided_diffusion.pool import Pool, subset_path
from tests.conftest import TINY, slow
from tests.test_few_shot import folders, pictures
from utils import checkpoint
from utils.pieces import Pieces

QUICK = "--nTestNovel 10 --mix-steps 2 --mix-level 900 --head-steps 30 --head-scale 20 --device cpu".split()


class Stop(Exception):
    """Stands for a kill."""


@pytest.fixture
def stop_after(monkeypatch):
    """stop_after(n): whatever runs next in the block is stopped once n pieces are kept."""

    def arrange(patch, count):
        kept, keep = [], Pieces.keep

        def counted(self, name, value):
            if len(kept) == count:
                raise Stop
            kept.append(name)
            keep(self, name, value)

        patch.setattr(Pieces, "keep", counted)

    return arrange


@pytest.fixture
def place(tmp_path, make_pool, paint_pool):
    """Pictures of five classes, a pool that can be written, and another one to put into its place."""
    for m in (1, 2):
        shutil.copytree(paint_pool / f"subset{m}", tmp_path / "pool" / f"subset{m}")
    rng = np.random.default_rng(0)
    for split in ("meta_test", "meta_val"):
        for c in range(5):
            images = rng.integers(0, 256, (6, 16, 16, 3)).astype(np.uint8)
            folders(tmp_path / "data" / split, images, [f"class{c}"] * 6)
    return tmp_path


def another_pool(place, models=2):
    """Put other contents into the same files: the painted grey levels are turned around."""
    for m in range(1, models + 1):
        path = subset_path(place / "pool", m)
        payload = checkpoint.load(path)
        payload["model"]["out.2.bias"] = -payload["model"]["out.2.bias"] + 0.3
        checkpoint.save(path, payload)


def other_images(place):
    """Put other pictures into the same files."""
    rng = np.random.default_rng(1)
    for c in range(5):
        images = rng.integers(0, 256, (6, 16, 16, 3)).astype(np.uint8)
        folders(place / "data" / "meta_test", images, [f"class{c}"] * 6)


def test_flags(place, trained):
    return ("--dataset", "custom", "--data-root", place / "data", "--pool", place / "pool", "--resume",
            trained / "best_model.pt", "--sample-batch", 4, *QUICK)  # fmt: skip


@pytest.mark.parametrize(
    "kind, change",
    [
        ("test", another_pool),
        ("own pictures", other_images),
        slow("test", other_images),
        slow("own pictures", another_pool),
    ],
)
def test_a_resumed_test_is_that_of_what_is_there_now(call, place, trained, monkeypatch, stop_after, change, kind):
    flags = (*test_flags(place, trained), "--episodes", 4)
    if kind == "own pictures":
        flags = (*test_flags(place, trained), "--support", place / "data" / "meta_test", "--query",
                 place / "data" / "meta_val")  # fmt: skip

    def outcome(folder):
        if kind == "own pictures":
            return (place / folder / "predictions.csv").read_text()
        results = json.loads((place / folder / "results.json").read_text())
        return results["by_episode"], np.load(place / folder / "mixes.npz")["mix"].tolist()

    assert call(diffusionmix, *flags, "--save-dir", place / "before")[0] == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stop):
            call(diffusionmix, *flags, "--save-dir", place / "stopped")
    kept = list((place / "stopped").rglob("*-items*.pt"))
    assert len(kept) == 3
    change(place)
    assert call(diffusionmix, *flags, "--save-dir", place / "stopped")[0] == 0
    assert call(diffusionmix, *flags, "--save-dir", place / "fresh")[0] == 0
    assert outcome("stopped") == outcome("fresh") != outcome("before")


test_flags.__test__ = False


def test_pieces_stay_good_where_only_the_place_changed(call, place, trained, monkeypatch, stop_after):
    flags = (*test_flags(place, trained), "--episodes", 4, "--save-dir", place / "run")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stop):
            call(diffusionmix, *flags)
    (place / "pool").rename(place / "moved")
    with monkeypatch.context() as patch:
        made, keep = [], Pieces.keep
        patch.setattr(Pieces, "keep", lambda self, name, value: (made.append(name), keep(self, name, value)))
        assert call(diffusionmix, *flags, "--pool", place / "moved")[0] == 0
    assert len(made) == 2 * 5 - 3  # 2 models, 20 support images in batches of 4


def test_the_digest_is_of_the_contents(place):
    first = Pool(place / "pool").digest()
    shutil.copytree(place / "pool", place / "copy")
    assert Pool(place / "copy").digest() == first == Pool(place / "pool").digest() and len(first) == 64
    another_pool(place, 1)
    assert Pool(place / "pool").digest() != first
    paths = [subset_path(place / "copy", m) for m in (1, 2)]
    paths[0].rename(place / "x"), paths[1].rename(paths[0]), (place / "x").rename(paths[1])
    assert Pool(place / "copy").digest() != first  # the order counts


# ---- main.py

SHARED = ("--dataset", "custom", "--nTestNovel", 5)


@pytest.fixture
def train(call, place):
    def go(*flags):
        shared = ("--data-root", place / "data", "--pool", place / "pool", "--save-dir", place / "run")
        return call(main, *TINY, *SHARED, *shared, *flags)

    return go


def state_of(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name[0] != "."]
    return {str(path): path.read_bytes() for path in files}


def stopped(train, monkeypatch, epoch, and_then):
    """Train, and after that epoch do something, and go on or stop."""
    record = bookkeeping.RunLog.record

    def then(self, entries):
        record(self, entries)
        if entries["epoch"] == epoch:
            and_then()

    with monkeypatch.context() as patch:
        patch.setattr(bookkeeping.RunLog, "record", then)
        return train()


def test_a_pool_retrained_between_two_rounds_is_refused(train, place, monkeypatch):
    status, _, err = stopped(train, monkeypatch, 1, lambda: another_pool(place))
    assert status == 2 and str(place / "pool") in err and "--save-dir" in err and err.count("\n") == 1
    assert not (place / "run" / "pseudo" / "round01").exists()
    another_pool(place)  # twice turned around is as it was but for the sum: still another
    before = state_of(place / "run")
    status, _, err = train()
    assert status == 2 and str(place / "pool") in err and state_of(place / "run") == before


def test_a_pool_retrained_while_a_run_was_stopped_is_refused_and_the_old_one_goes_on(train, place, monkeypatch):
    shutil.copytree(place / "pool", place / "kept")

    def stop():
        raise Stop

    with pytest.raises(Stop):
        stopped(train, monkeypatch, 1, stop)  # before last.pt: config.json alone knows
    another_pool(place)
    before = state_of(place / "run")
    status, _, err = train()
    assert status == 2 and str(place / "pool") in err and state_of(place / "run") == before
    shutil.rmtree(place / "pool")
    shutil.copytree(place / "kept", place / "pool")
    assert train()[0] == 0
    assert checkpoint.load(place / "run" / "last.pt")["contents"]["pool"] == Pool(place / "kept").digest()
    assert json.loads((place / "run" / "config.json").read_text())["contents"]["pool"] == Pool(place / "kept").digest()


def test_other_images_to_validate_on_are_refused(train, place, monkeypatch):
    assert train("--max-epoch", 2)[0] == 0
    images, labels = pictures({f"class{c}": 6 for c in range(5)}, seed=5)
    shutil.rmtree(place / "data" / "meta_val")
    folders(place / "data" / "meta_val", images, labels)
    status, _, err = train("--max-epoch", 2)
    assert status == 2 and "meta_val" in err and "--save-dir" in err


def test_a_run_of_before_this_was_noted_goes_on(train, place):
    assert train()[0] == 0
    for name in ("last.pt", "last.previous.pt"):
        state = checkpoint.load(place / "run" / name)
        del state["contents"]
        checkpoint.save(place / "run" / name, state)
    assert train()[0] == 0
