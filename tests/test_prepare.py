"""Image folders made by datasets.prepare, each from a tiny copy of what people have."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import datasets.prepare as prepare
import guided_diffusion.image_train as image_train
from datasets import published, unpack
from datasets.folder import load_split
from datasets.glyphs import make_split
from utils.images import read_image

PER_CLASS = 3
CIFARFS = {"meta_train": ("apple", "train"), "meta_val": ("otter",), "meta_test": ("baby",)}  # train: also a folder
MINI = {"meta_train": ("n01", "n02"), "meta_val": ("n03",), "meta_test": ("n04",)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(published, "PER_CLASS", PER_CLASS)
    monkeypatch.setattr(published, "CIFARFS", CIFARFS)
    monkeypatch.setattr(published, "MINIIMAGENET", MINI)


def every(classes):
    return [name for names in classes.values() for name in names]


def pixels(*key, side=32):
    """A picture (side, side, 3) of its own for each key."""
    return np.random.default_rng([int.from_bytes(str(part).encode(), "big") for part in key]).integers(
        0, 256, (side, side, 3), dtype=np.uint8
    )


def made(out):
    """Every image in `out` by its path in it: (H, W, 3)."""
    return {path.relative_to(out).as_posix(): np.asarray(Image.open(path)) for path in sorted(out.rglob("*.png"))}


def expected(classes, side=32):
    return {
        f"{split}/{name}/{index:05d}.png": pixels(name, index, side=side)
        for split, names in classes.items()
        for name in names
        for index in range(PER_CLASS)
    }


def same(got, wanted):
    return got.keys() == wanted.keys() and all(np.array_equal(got[path], wanted[path]) for path in wanted)


def times(out):
    return {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}


def save(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def batches(folder, names=None, test_from=PER_CLASS - 1):
    """cifar-100-python in `folder`: of each class the last image in test, the others in train."""
    folder = folder / "cifar-100-python"
    folder.mkdir(parents=True)
    names = names or sorted(every(CIFARFS))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    for part, indices in (("train", range(test_from)), ("test", range(test_from, PER_CLASS))):
        rows = [(label, pixels(name, index)) for index in indices for label, name in enumerate(names)]
        data = np.stack([image.transpose(2, 0, 1).reshape(-1) for _, image in rows])
        content = {"data": data, "fine_labels": [label for label, _ in rows], "coarse_labels": [0] * len(rows)}
        (folder / part).write_bytes(pickle.dumps(content, protocol=2))
    return folder.parent


def folders(root, classes, side=32):
    """Class folders directly in `root`."""
    for name in every(classes):
        for index in range(PER_CLASS):
            save(root / name / f"{name}_{index}.png", pixels(name, index, side=side))
    return root


def caches(root, classes=MINI, change=None):
    root.mkdir(parents=True)
    for split, names in classes.items():
        images = np.stack([pixels(name, index, side=84) for index in range(PER_CLASS) for name in names])
        indices = {name: list(range(i, len(images), len(names))) for i, name in enumerate(names)}
        content = {"image_data": images, "class_dict": indices}
        if change:
            change(split, content)
        (root / f"mini-imagenet-cache-{split[5:]}.pkl").write_bytes(pickle.dumps(content))
    return root


def csv_lists(root, place, jpg=False):
    """Ravi and Larochelle's lists, and the images at place(name, file) in `root`."""
    for split, names in MINI.items():
        rows = ["filename,label"]
        for name in names:
            for index in range(PER_CLASS):
                file = f"{name}0000{index}.{'jpg' if jpg else 'png'}"
                rows.append(f"{file},{name}")
                save(root / place(name, file), pixels(name, index, side=84))
        (root / f"{split[5:]}.csv").write_text("\n".join(rows) + "\n")
    return root


def cifarfs_sources(root):
    batches(root / "batches")
    shutil.copytree(root / "batches" / "cifar-100-python", root / "inner")
    folders(root / "folders", CIFARFS)
    folders(root / "data_folder" / "data", CIFARFS)
    for name in every(CIFARFS):
        for index in range(PER_CLASS):
            part = "test" if index == PER_CLASS - 1 else "train"
            save(
                root / "two_parts" / part / name / f"{9 - index if part == 'test' else index}.png", pixels(name, index)
            )


def mini_sources(root):
    caches(root / "caches")
    csv_lists(root / "csv_flat", lambda name, file: f"images/{file}")
    csv_lists(root / "csv_nested", lambda name, file: f"images/{name}/{file}")
    csv_lists(root / "csv_beside", lambda name, file: f"{name}/{file}")
    folders(root / "folders", MINI, 84)
    folders(root / "images_folder" / "images", MINI, 84)
    for place in ("{}", "meta_{}"):
        for split, names in MINI.items():
            folders(root / place.format("three") / place.format(split[5:]), {split: names}, 84)


@pytest.mark.parametrize("source", ["batches", "inner", "folders", "data_folder", "two_parts"])
def test_cifarfs_from_disk(source, call, tmp_path, monkeypatch):
    cifarfs_sources(tmp_path)
    out = tmp_path / "out"
    status, text, err = call(prepare, "cifarfs", "--from", tmp_path / source, "--out", out)
    assert status == 0, err
    assert f"{out / 'meta_train'}: 2 classes of 3 images, 2 written now" in text
    assert same(made(out), expected(CIFARFS))
    assert load_split(out, "meta_train", 32).class_names == ["apple", "train"]
    before = times(out)
    monkeypatch.setattr(unpack, "read_plain_pickle", None)  # a complete folder needs no source
    status, text, _ = call(prepare, "cifarfs", "--from", tmp_path / source, "--out", out)
    assert status == 0 and times(out) == before and text.count(" 0 written now") == 3


def test_cifarfs_downloads_once(call, tmp_path, monkeypatch):
    asked = []

    class Fake:
        url, base_folder = "https://example.org/cifar.tar.gz", "cifar-100-python"

        def __init__(self, root, download):
            asked.append(root)
            batches(tmp_path / "out" / "download")

    monkeypatch.setattr("torchvision.datasets.CIFAR100", Fake)
    for written in (2, 0):
        status, text, _ = call(prepare, "cifarfs", "--out", tmp_path / "out")
        assert status == 0 and f"2 classes of 3 images, {written} written now" in text
    assert asked == [str(tmp_path / "out" / "download")] and same(made(tmp_path / "out"), expected(CIFARFS))

    def offline(self, root, download):
        raise OSError("no network")

    monkeypatch.setattr(Fake, "__init__", offline)
    status, _, err = call(prepare, "cifarfs", "--out", tmp_path / "other")
    assert status == 2 and "cannot be had (no network)" in err and "--from" in err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "source", ["caches", "csv_flat", "csv_nested", "csv_beside", "folders", "images_folder", "three", "meta_three"]
)
def test_miniimagenet_from_disk(source, call, tmp_path):
    mini_sources(tmp_path)
    out = tmp_path / "out"
    arguments = ("miniimagenet", "--from", tmp_path / source, "--out", out)
    status, text, err = call(prepare, *arguments)
    assert status == 0, err
    assert same(made(out), expected(MINI, 84))
    before = times(out)
    status, text, _ = call(prepare, *arguments)
    assert status == 0 and times(out) == before and text.count(" 0 written now") == 3


@pytest.mark.parametrize("source", ["caches", "csv"])
def test_size_and_crop(source, call, tmp_path):
    if source == "caches":
        caches(tmp_path / "from")
    else:
        csv_lists(tmp_path / "from", lambda name, file: f"images/{file}", jpg=True)
        save(tmp_path / "from" / "images" / "n0100000.jpg", pixels("wide", side=84)[:50])
    assert call(prepare, "miniimagenet", "--from", tmp_path / "from", "--out", tmp_path / "out", "--size", 16)[0] == 0
    got = made(tmp_path / "out")
    assert {image.shape for image in got.values()} == {(16, 16, 3)}
    if source == "csv":  # as every other part of the program reads it: the central square, by Lanczos
        wide = read_image(tmp_path / "from" / "images" / "n0100000.jpg", 16).transpose(1, 2, 0)
        assert np.array_equal(got["meta_train/n01/00000.png"], wide)


@pytest.mark.parametrize("kind", ["caches", "folders"])
def test_a_killed_run_goes_on(kind, call, tmp_path, monkeypatch):
    source = caches(tmp_path / "from") if kind == "caches" else folders(tmp_path / "from", MINI, 84)
    out = tmp_path / "out"
    arguments = ("miniimagenet", "--from", source, "--out", out)
    write, written = prepare._write, []

    def dies(path, picture, size):
        if path.parent.name == "n02" and path.name == "00001.png":
            raise KeyboardInterrupt
        write(path, picture, size)

    monkeypatch.setattr(prepare, "_write", dies)
    assert call(prepare, *arguments)[0] == 130
    assert (out / "meta_train" / "n01" / "00002.png").exists() and not (out / "meta_val").exists()
    (out / "meta_train" / "n02" / ".00001.png.1.tmp").write_bytes(b"half")  # what SIGKILL leaves
    before = times(out)

    def counts(path, picture, size):
        written.append(f"{path.parent.name}/{path.name}")
        write(path, picture, size)

    monkeypatch.setattr(prepare, "_write", counts)
    status, text, _ = call(prepare, *arguments)
    assert status == 0 and "2 classes of 3 images, 1 written now" in text
    assert not any(name.startswith("n01/") for name in written)  # complete: not even opened
    assert times(out).items() >= before.items() and same(made(out), expected(MINI, 84))


def test_images_appear_whole(call, tmp_path, monkeypatch):
    def half(self, file, kind):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    source = folders(tmp_path / "from", MINI, 84)
    monkeypatch.setattr(Image.Image, "save", half)
    status, _, err = call(prepare, "miniimagenet", "--from", source, "--out", tmp_path / "out")
    assert status == 2 and "the disk is full" in err
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [tmp_path / "out" / "prepared.json"]


def test_a_malicious_cache_is_refused_and_runs_nothing(call, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    def change(split, content):
        if split == "meta_train":
            content["image_data"] = Evil()

    caches(tmp_path / "from", change=change)
    status, _, err = call(prepare, "miniimagenet", "--from", tmp_path / "from", "--out", tmp_path / "out")
    assert status == 2 and len(err.splitlines()) == 1
    assert "mini-imagenet-cache-train.pkl" in err and ".mkdir" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["from"]


def lacks_class(root):
    shutil.rmtree(folders(root, MINI, 84) / "n03")
    return "got 3 of 4 classes, without n03"


def lacks_classes(root):
    folders(root, {"meta_train": ("n99",)}, 84)
    return "got 0 of 4 classes, without n01, n02, n03 and 1 more"


def lacks_image(root):
    (folders(root, MINI, 84) / "n02" / "n02_1.png").unlink()
    return "got 2 in n02 of 4 classes, expected 3 per class"


def too_many(root):
    save(folders(root, MINI, 84) / "n04" / "x.png", pixels("x"))
    return "got 4 in n04"


def unreadable(root):
    (folders(root, MINI, 84) / "n01" / "n01_0.png").write_bytes(b"no image")
    return "n01_0.png: is no readable image"


def lacks_csv(root):
    (csv_lists(root, lambda name, file: f"images/{file}") / "val.csv").unlink()
    return "lacks val.csv; expected train.csv, val.csv, test.csv"


def csv_lacks_images(root):
    shutil.rmtree(csv_lists(root, lambda name, file: f"images/{name}/{file}") / "images" / "n02")
    return "lacks 3 images that its csv files list: n0200000.png, n0200001.png, n0200002.png; put them into"


def csv_columns(root):
    (csv_lists(root, lambda name, file: f"images/{file}") / "test.csv").write_text("a,b\n1,2\n")
    return "test.csv: got columns ['a', 'b'], expected filename and label"


def csv_other_split(root):
    csv_lists(root, lambda name, file: f"images/{file}")
    shutil.copy(root / "val.csv", root / "test.csv")
    return "test.csv: lists the class n03, which the published meta_test lacks"


def csv_lists_twice(root):
    csv_lists(root, lambda name, file: f"images/{file}")
    (root / "val.csv").write_text((root / "val.csv").read_text().replace("n0300001", "n0300000"))
    return "val.csv: got 2 in n03"


def lacks_cache(root):
    (caches(root) / "mini-imagenet-cache-test.pkl").unlink()
    return "lacks mini-imagenet-cache-test.pkl"


def changed_cache(words, change):
    def make(root):
        caches(root, change=lambda split, content: change(content) if split == "meta_train" else None)
        return words

    return make


MINI_ERRORS = [
    lacks_class, lacks_classes, lacks_image, too_many, lacks_csv, csv_lacks_images, csv_columns, csv_other_split,
    csv_lists_twice, lacks_cache,
    changed_cache("lacks class_dict, has image_data", lambda c: c.pop("class_dict")),
    changed_cache("got image_data float32", lambda c: c.update(image_data=np.zeros((6, 84, 84, 3), np.float32))),
    changed_cache("got image_data uint8 (6, 3, 84, 84)", lambda c: c.update(image_data=np.zeros((6, 3, 84, 84), "u1"))),
    changed_cache("without n02", lambda c: c["class_dict"].pop("n02")),
    changed_cache("got 2 in n01", lambda c: c["class_dict"].update(n01=[0, 2, 2])),
    changed_cache("beyond the 6", lambda c: c["class_dict"].update(n01=[0, 2, 6])),
    changed_cache("should hold lists of indices", lambda c: c["class_dict"].update(n01="abc")),
    changed_cache("got class_dict of type list", lambda c: c.update(class_dict=[1])),
]  # fmt: skip


@pytest.mark.parametrize("make", MINI_ERRORS)
def test_what_is_missing_is_named(make, call, tmp_path):
    words = make(tmp_path / "from")
    status, _, err = call(prepare, "miniimagenet", "--from", tmp_path / "from", "--out", tmp_path / "out")
    assert status == 2 and len(err.splitlines()) == 1 and words in err, err
    assert not (tmp_path / "out").exists()  # nothing is written before the source is known to be good


def test_an_unreadable_image_is_named_and_the_run_can_go_on(call, tmp_path):
    words = unreadable(tmp_path / "from")
    arguments = ("miniimagenet", "--from", tmp_path / "from", "--out", tmp_path / "out")
    status, _, err = call(prepare, *arguments)
    assert status == 2 and words in err
    save(tmp_path / "from" / "n01" / "n01_0.png", pixels("n01", 0, side=84))
    assert call(prepare, *arguments)[0] == 0 and same(made(tmp_path / "out"), expected(MINI, 84))


def test_wrong_cifar_is_named(call, tmp_path):
    def fails(source):
        status, _, err = call(prepare, "cifarfs", "--from", source, "--out", tmp_path / "out")
        assert status == 2 and len(err.splitlines()) == 1 and not (tmp_path / "out").exists()
        return err

    assert "no such folder; give the folder that holds cifar-100-python" in fails(tmp_path / "nowhere")
    other = batches(tmp_path / "other", names=["apple", "baby", "otter", "plane"])
    assert "meta: got 4 classes that are not CIFAR-100's" in fails(other)
    short = batches(tmp_path / "short")
    shutil.copy(short / "cifar-100-python" / "test", short / "cifar-100-python" / "train")
    assert "got 2 in apple, 2 in train, 2 in otter and 1 more of 4 classes, expected 3 per class" in fails(short)
    cut = batches(tmp_path / "cut") / "cifar-100-python"
    (cut / "train").write_bytes((cut / "train").read_bytes()[:100])
    assert "train: is cut short" in fails(cut)
    (cut / "train").unlink()
    assert f"error: {cut / 'train'}: No such file" in fails(cut)
    (folders(tmp_path / "folders", CIFARFS) / "train" / "train_0.png").unlink()
    assert "got 2 in train of 4 classes" in fails(tmp_path / "folders")


def test_two_sources_do_not_mix(call, tmp_path):
    source, out = folders(tmp_path / "from", MINI, 84), tmp_path / "out"
    assert call(prepare, "miniimagenet", "--from", source, "--out", out)[0] == 0
    assert json.loads((out / "prepared.json").read_text()) == {
        "dataset": "miniimagenet", "source": "class folders", "size": 84,
    }  # fmt: skip
    status, _, err = call(prepare, "miniimagenet", "--from", source, "--out", out, "--size", 32)
    assert status == 2 and "prepared.json" in err and "another --out" in err
    save(out / "meta_val" / "n03" / "mine.png", pixels("mine"))
    (out / "meta_val" / "n77").mkdir()
    status, _, err = call(prepare, "miniimagenet", "--from", source, "--out", out)
    assert status == 2 and "meta_val: got n77, n03/mine.png, expected only the 1 classes" in err
    (tmp_path / "file").touch()
    status, _, err = call(prepare, "miniimagenet", "--from", source, "--out", tmp_path / "file")
    assert status == 2 and "file: got a file" in err
    assert call(prepare, "miniimagenet", "--from", source, "--out", tmp_path / "o2", "--size", 0)[0] == 2


def test_subsets_are_those_of_the_pool(call, tmp_path, picture_folder, monkeypatch):
    root = tmp_path / "data"
    picture_folder(root / "meta_train", {f"c{i}": [9] for i in (10, 9, 2, 1, 5, 7, 8)}, size=8)
    (root / "meta_train" / ".hidden").mkdir()
    status, text, _ = call(prepare, "subsets", "--data-root", root, "--classes_per_model", 3)
    assert status == 0 and "subset1: c1, c10, c2\nsubset2: c5, c7, c8\nsubset3: c9\n" in text
    written = json.loads((root / "subsets.json").read_text())
    assert written["classes_per_model"] == 3

    class Loop:
        def restore(self):
            pass

        def run(self):
            raise KeyboardInterrupt  # pool.json is written by now

    monkeypatch.setattr(image_train, "training", lambda *_: Loop())
    pool = ("--data_dir", root / "meta_train", "--pool", tmp_path / "pool", "--classes_per_model", 3, "--device", "cpu")
    status, _, err = call(image_train, *pool)
    assert status == 130, err
    assert json.loads((tmp_path / "pool" / "pool.json").read_text())["models"] == written["models"]


def test_subsets_of_nothing(call, tmp_path):
    assert "no such folder; make it with" in call(prepare, "subsets", "--data-root", tmp_path)[2]
    (tmp_path / "meta_train").mkdir()
    assert "got no class folders" in call(prepare, "subsets", "--data-root", tmp_path)[2]
    status, _, err = call(prepare, "subsets", "--data-root", tmp_path, "--classes_per_model", 0)
    assert status == 2 and "--classes_per_model 0" in err and list(tmp_path.iterdir()) == [tmp_path / "meta_train"]


def test_glyphs_on_disk_are_the_glyphs(call, tmp_path):
    status, out, _ = call(prepare, "glyphs", "--out", tmp_path, "--per-class", 3, "--splits", "meta_val")
    assert status == 0 and "10 classes of 3 images" in out
    drawn, read = make_split("meta_val", 3), load_split(tmp_path, "meta_val", 32)
    assert torch.equal(drawn.images, read.images) and torch.equal(drawn.labels, read.labels)
    assert drawn.class_names == read.class_names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta_val"]


def test_what_is_there_is_kept(call, tmp_path):
    arguments = ("glyphs", "--out", tmp_path, "--per-class", 2, "--splits", "meta_val")
    call(prepare, *arguments)
    first = tmp_path / "meta_val" / "glyph040" / "00000.png"
    (first.parent / "00001.png").unlink()
    before = first.stat().st_mtime_ns
    assert call(prepare, *arguments)[0] == 0
    assert first.stat().st_mtime_ns == before and (first.parent / "00001.png").exists()
