"""Whether a model copies: what is kept back, the distances, and where the figure goes."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import guided_diffusion.image_train as image_train
from guided_diffusion import memorisation
from guided_diffusion.image_datasets import TrainingImages, load_images
from guided_diffusion.pool import Pool, PoolModel, subset_path
from guided_diffusion.script_util import model_and_diffusion_defaults
from guided_diffusion.train_util import TrainLoop
from tests.conftest import ROOT
from tests.test_image_train import FLAGS
from utils.images import to_float

CPU = torch.device("cpu")


def pictures(seed, count, size=16):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8))


def keys(images):
    return {image.numpy().tobytes() for image in images}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of 40, 20 and 19 images of random pixels."""
    root = tmp_path_factory.mktemp("pictures")
    for number, (name, count) in enumerate({"a": 40, "b": 20, "c": 19}.items()):
        (root / name).mkdir()
        for index, image in enumerate(pictures(number, count)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / name / f"{index:02d}.png")
    return root


@pytest.mark.parametrize("mirrored", [False, True])
def test_nearest_is_the_smallest_difference(monkeypatch, mirrored):
    monkeypatch.setattr(memorisation, "CHUNK", 5 * 3 * 16 * 16)  # 5 images at once, so 3 chunks
    training, images = pictures(0, 13), to_float(pictures(1, 7))
    images[3] = to_float(training[12])
    images[4] = to_float(training[5]).flip(-1)
    both = torch.cat([training, training.flip(-1)]) if mirrored else training
    expected = (images[:, None] - to_float(both)).square().mean((2, 3, 4)).sqrt().min(1).values
    found = memorisation.nearest(images, training, mirrored=mirrored)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert found[3] == 0 and (found[4] < 1e-6) == mirrored


def test_copies_give_0_and_new_images_1():
    training, held_out = pictures(0, 100), pictures(1, 70)
    copies = memorisation.figure(to_float(training[:64]), held_out, training)
    assert copies["samples"] == 0 and copies["ratio"] == 0 and copies["too_near"] == 1 and copies["held_out"] > 0.5
    new = memorisation.figure(to_float(pictures(2, 64)), held_out, training)
    assert new["ratio"] == pytest.approx(1, abs=0.02) and new["too_near"] < 0.3
    assert memorisation.sentence(new).count("\n") == 0


def test_medians_ratio_and_share():
    def grey(*levels):
        return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)

    found = memorisation.figure(to_float(grey(0, 1, 51)), grey(100, 102, 104), grey(0, 255))
    assert found == {"samples": 0.0078, "held_out": 0.8, "ratio": 0.0098, "too_near": 1.0}
    none = memorisation.figure(to_float(grey(51)), grey(0)[:0], grey(0, 255))
    assert none == {"samples": 0.4, "held_out": None, "ratio": None, "too_near": None}
    assert "no images were held out" in memorisation.sentence(none)
    zero = memorisation.figure(to_float(grey(51)), grey(0, 0), grey(0, 255))
    assert zero == {"samples": 0.4, "held_out": 0.0, "ratio": None, "too_near": 0.0}
    assert "ratio none" in memorisation.sentence(zero)


class Parrot(torch.nn.Module):
    """Predicts, whatever its input, images that it has by heart; takes local labels where `by_label`."""

    def __init__(self, images, by_label=False):
        super().__init__()
        self.images, self.by_label = to_float(images), by_label

    def forward(self, x, t, y=None):
        assert (y is not None) == self.by_label
        return self.images[y] if self.by_label else self.images[: len(x)]


@pytest.mark.parametrize("class_cond", [False, True])
def test_a_model_that_copies(class_cond):
    training, held_out = pictures(0, 80), pictures(1, 16)
    flags = {**model_and_diffusion_defaults(), "image_size": 16, "predict_xstart": True, "class_cond": class_cond}
    model = PoolModel(Parrot(training, class_cond), flags, 5, Path("parrot"))
    found = memorisation.measure(model, training, held_out, mirrored=True, seed=0, precision="float32", device=CPU)
    assert found["ratio"] == pytest.approx(0, abs=1e-3) and found["too_near"] == 1


def test_drawn_alike_again(toy_pool, monkeypatch):
    monkeypatch.setattr(memorisation, "SAMPLES", 5)
    model = Pool(toy_pool).load(0)
    first, again, other = (memorisation.draw(model, seed, "float32", CPU) for seed in (1, 1, 2))
    assert first.shape == (5, 3, 16, 16) and first.abs().max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_held_out_images_are_not_trained_on(folder):
    data = load_images(folder, 16)
    kept, held_out = memorisation.split(data, 0.1)
    assert kept.labels.bincount().tolist() == [36, 18, 19] and kept.class_names == ["a", "b", "c"]
    assert not keys(kept.images) & keys(held_out) and keys(kept.images) | keys(held_out) == keys(data.images)
    assert keys(held_out[:4]) <= keys(data.images[data.labels == 0])
    sizes = {share: len(memorisation.split(data, share)[1]) for share in (0.0, 0.001, 0.9)}
    assert sizes == {0.0: 0, 0.001: 2, 0.9: 32}


def test_held_out_whatever_the_order(folder, tmp_path):
    data = load_images(folder, 16)
    expected = memorisation.split(data, 0.1)[1]
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    shuffled = TrainingImages(data.images[order], data.labels[order], data.class_names)
    assert torch.equal(memorisation.split(shuffled, 0.1)[1], expected)
    for name in "cba":  # written in another order, under other names
        (tmp_path / name).mkdir()
        for path in sorted((folder / name).iterdir(), reverse=True):
            shutil.copyfile(path, tmp_path / name / f"{99 - int(path.stem)}.png")
    assert torch.equal(memorisation.split(load_images(tmp_path, 16), 0.1)[1], expected)


def pool_command(folder, out, *flags):
    return ("--data_dir", folder, "--pool", out, "--classes_per_model", 2, *FLAGS, "--steps", 1, *flags)


def figures(out):
    return json.loads((out / "pool.json").read_text())["memorisation"]


def test_pool_holds_it(call, folder, tmp_path, monkeypatch):
    out, lengths, run = tmp_path / "pool", [], TrainLoop.run

    def counted(loop):
        lengths.append(len(loop.data.images))
        return run(loop)

    monkeypatch.setattr(TrainLoop, "run", counted)
    status, text, err = call(image_train, *pool_command(folder, out, "--hold_out", "0.1", "--subsets", 1))
    assert status == 0, err
    assert list(figures(out)) == ["subset1"]
    first = figures(out)["subset1"]
    assert first.keys() == {"samples", "held_out", "ratio", "too_near", "images"} and None not in first.values()
    assert lengths == [54] and first["images"] == 54
    path = subset_path(out, 1)
    assert f"{path}: its samples lie {first['samples']:.3f}" in text and f"ratio {first['ratio']:.2f}" in text
    # the other model: the first keeps its figure, and is not measured again
    status, text, err = call(image_train, *pool_command(folder, out, "--hold_out", "0.1"))
    assert status == 0 and text.count("whether it copies") == 1, err
    assert figures(out)["subset1"] == first and lengths == [54, 19]
    assert figures(out)["subset2"]["held_out"] is None  # 19 images can spare none
    before = (out / "pool.json").read_bytes()
    status, text, err = call(image_train, *pool_command(folder, out, "--hold_out", "0.2"))
    assert status == 0 and "was made with --hold_out 0.1, which stays" in text and "its samples" not in text
    assert (out / "pool.json").read_bytes() == before


def test_killed_before_the_figure(call, folder, tmp_path, monkeypatch):
    out = tmp_path / "pool"
    command = pool_command(folder, out, "--hold_out", "0.1", "--subsets", 1)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(image_train, "measure", killed)
        assert call(image_train, *command)[0] == 130
    before = subset_path(out, 1).stat().st_mtime_ns
    assert not figures(out)
    assert call(image_train, *command, "--image_size", 32)[0] == 2 and not figures(out)  # of other images
    assert call(image_train, *command)[0] == 0
    assert subset_path(out, 1).stat().st_mtime_ns == before
    found = figures(out)["subset1"]
    assert None not in found.values() and json.loads((out / "pool.json").read_text())["image_size"] == 16
    os.remove(subset_path(out, 1))  # a model made anew is measured anew, and as if never killed
    assert call(image_train, *command)[0] == 0 and figures(out)["subset1"] == found


def test_pool_from_before_the_figure(call, folder, tmp_path):
    out = tmp_path / "pool"
    assert call(image_train, *pool_command(folder, out, "--hold_out", 0))[0] == 0
    contents = json.loads((out / "pool.json").read_text())
    del contents["hold_out"], contents["memorisation"]
    (out / "pool.json").write_text(json.dumps(contents))
    status, text, err = call(image_train, *pool_command(folder, out, "--subsets", 1))
    assert status == 0, err
    # it was trained on everything, so nothing can be called unseen
    assert "was made with --hold_out 0, which stays" in text and "no images were held out" in text
    found = figures(out)["subset1"]
    assert found["samples"] > 0 and found["held_out"] is found["ratio"] is found["too_near"] is None
    assert len(Pool(out)) == 2


def test_images_of_another_folder_that_the_pool_never_saw(call, folder, tmp_path, picture_folder):
    out, command = tmp_path / "pool", pool_command(folder, tmp_path / "pool", "--hold_out", 0, "--subsets", 1)
    assert call(image_train, *command)[0] == 0
    assert figures(out)["subset1"]["held_out"] is None
    unseen = picture_folder(tmp_path / "unseen", {name: [10, 90, 200] for name in "abc"})
    status, text, err = call(image_train, *command, "--held_out_dir", unseen)
    assert status == 0 and "is done" in text and "held-out images" in text, err
    found = figures(out)["subset1"]
    assert found["ratio"] > 0 and found["held_out"] > 0
    assert "its samples" not in call(image_train, *command, "--held_out_dir", unseen)[1]  # measured once
    others = picture_folder(tmp_path / "others", {name: [20, 60, 180] for name in "abc"})
    assert call(image_train, *command, "--held_out_dir", others)[0] == 0
    assert figures(out)["subset1"]["held_out"] != found["held_out"]
    assert "its samples" not in call(image_train, *command)[1]


def test_a_folder_of_held_out_images_without_a_class(call, folder, tmp_path, picture_folder):
    names = sorted(path.name for path in folder.iterdir())[:-1]  # the last model's only
    unseen = picture_folder(tmp_path / "unseen", {name: [10, 90] for name in names})
    status, _, err = call(image_train, *pool_command(folder, tmp_path / "pool"), "--held_out_dir", unseen)
    assert status == 2 and "unseen" in err and err.count("\n") == 1
    assert not (tmp_path / "pool").exists()


def test_the_pool_that_ships_loads_and_does_not_copy():
    pool = ROOT / "ckpt" / "glyphs"
    assert len(Pool(pool)) == len(figures(pool)) == 8
    assert all(one["ratio"] > 0.9 for one in figures(pool).values())


def test_one_model_prints_it(call, folder, tmp_path):
    status, text, err = call(image_train, "--data_dir", folder, "--save_dir", tmp_path / "out", *FLAGS)
    assert status == 0 and "76 images of 3 classes" in text and "held-out images" in text, err


@pytest.mark.parametrize("share", ["-0.1", "1", "nan"])
def test_no_such_share(call, folder, tmp_path, share):
    status, _, err = call(image_train, *pool_command(folder, tmp_path / "pool"), f"--hold_out={share}")
    assert status == 2 and "--hold_out" in err and not (tmp_path / "pool").exists()
