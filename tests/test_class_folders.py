"""Class folders: leftovers, folders in them, empty ones, and what each command says of them."""

import os
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

import datasets.prepare as prepare
import diffusionmix
import guided_diffusion.image_train as image_train
from datasets import published
from datasets.folder import load_split
from guided_diffusion.image_datasets import class_folders, load_images
from tests import test_prepare
from tests.test_few_shot import rows_of
from utils.class_folders import is_leftover

LEFTOVERS = (
    "__MACOSX", ".ipynb_checkpoints", ".DS_Store", "Thumbs.db", "desktop.ini", "@eaDir", "lost+found", "._x.png",
)  # fmt: skip
TRAIN = (
    "--image_size 16 --num_channels 8 --num_res_blocks 1 --channel_mult 1 --num_heads 1 --attention_resolutions= "
    "--diffusion_steps 4 --batch_size 2 --steps 1 --device cpu"
).split()


@pytest.fixture
def root(picture_folder, tmp_path):
    """Splits of five classes of two images each."""
    for split in ("meta_train", "meta_val", "meta_test"):
        picture_folder(tmp_path / "mine" / split, {f"c{i}": [40 * i, 40 * i + 1] for i in range(5)})
    return tmp_path / "mine"


def litter(folder):
    """Leave leftovers in `folder` and in its class c1."""
    for place in (folder, folder / "c1"):
        for name in LEFTOVERS:
            if "." in name[1:]:
                Image.new("RGB", (8, 8)).save(place / name, "PNG")
            else:
                (place / name).mkdir()
                Image.new("RGB", (8, 8)).save(place / name / "1.png")


@pytest.mark.parametrize("name", LEFTOVERS)
def test_leftovers(name):
    assert is_leftover(name) and not is_leftover(f"x{name}x")


def test_leftovers_are_ignored_everywhere_and_said_in_one_line(call, root, capsys):
    for split in ("meta_train", "meta_val"):
        litter(root / split)
    data = load_split(root, "meta_val", 16)
    assert data.class_names == [f"c{i}" for i in range(5)] and data.labels.bincount().tolist() == [2] * 5
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "16 leftover(s)" in err
    images = load_images(root / "meta_train", 16)
    assert images.class_names == data.class_names and len(images.images) == 10
    assert capsys.readouterr().err.count("\n") == 1
    assert class_folders(root / "meta_train") == data.class_names
    assert capsys.readouterr().err.count("\n") == 1
    status, text, err = call(prepare, "subsets", "--data-root", root, "--classes_per_model", 2)
    assert status == 0 and "subset1: c0, c1\nsubset2: c2, c3\nsubset3: c4\n" in text and "8 leftover(s)" in err


def refused(outcome, *words):
    status, _, err = outcome
    assert status == 2 and len(err.strip().split("\n")) == 1, err
    assert all(str(word) in err for word in words), err


def test_an_empty_class_is_refused_by_name(call, root, tmp_path):
    for split in ("meta_train", "meta_val"):
        (root / split / "c2b" / ".ipynb_checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="meta_val/c2b: .*empty"):
        load_split(root, "meta_val", 16)
    refused(call(prepare, "subsets", "--data-root", root), "meta_train/c2b")
    assert not (root / "subsets.json").exists()
    flags = ("--data_dir", root / "meta_train", "--pool", tmp_path / "pool", *TRAIN)
    refused(call(image_train, *flags), "meta_train/c2b")
    assert not (tmp_path / "pool").exists()


@pytest.mark.parametrize("flags", [("--pool", "out"), ("--save_dir", "out", "--class_cond", 1), ("--save_dir", "out")])
def test_no_model_learns_test_pictures(flags, call, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(call(image_train, "--data_dir", root, *flags, *TRAIN), root / "meta_train", "--data_dir")
    assert not (tmp_path / "out").exists()


def test_folders_in_class_folders_are_refused(call, root, picture_folder):
    picture_folder(root / "meta_val" / "c3", {"more": [5]})  # beside its images
    with pytest.raises(ValueError, match="meta_val/c3: holds folders"):
        load_split(root, "meta_val", 16)
    picture_folder(root / "meta_train", {"group/c9": [5]})
    refused(call(prepare, "subsets", "--data-root", root), "meta_train/group")
    with pytest.raises(ValueError, match="meta_train/group: holds folders"):
        class_folders(root / "meta_train")


def test_a_root_one_level_off_names_the_right_one(call, root):
    for wrong in (root.parent, root / "meta_train"):
        with pytest.raises(ValueError, match=f"give {root}, which"):
            load_split(wrong, "meta_val", 16)
    refused(call(prepare, "subsets", "--data-root", root.parent), f"--data-root {root}")


def test_a_file_is_no_folder(root, tmp_path):
    (tmp_path / "mine.zip").write_bytes(b"PK")
    for load in (lambda path: load_split(path, "meta_val", 16), lambda path: load_images(path, 16), class_folders):
        with pytest.raises(ValueError, match="mine.zip: is a file.*unpack"):
            load(tmp_path / "mine.zip")


def test_images_beside_the_class_folders_are_listed(root, capsys):
    Image.new("RGB", (8, 8)).save(root / "meta_val" / "loose.png")
    (root / "meta_val" / "README.md").write_text("about")
    (root / "meta_val" / "c1" / "notes.txt").write_text("about")
    data = load_split(root, "meta_val", 16)
    (rows,) = data.skipped.values()
    assert [os.path.basename(path) for path, _ in rows] == ["loose.png", "c1"]
    assert len(data.images) == 10 and capsys.readouterr().err.count("\n") == 1


def test_one_picture_is_labelled(call, trained, root, tmp_path):
    query = root / "meta_test" / "c1" / "000.png"
    flags = ("--resume", trained / "best_model.pt", "--mix", False, "--save-dir", tmp_path / "run", "--device", "cpu")
    status, _, err = call(diffusionmix, "--support", root / "meta_val", "--query", query, *flags)
    assert status == 0, err
    rows = rows_of(tmp_path / "run" / "predictions.csv")
    assert [row["path"] for row in rows] == [str(query)]
    query.write_text("no image")
    refused(call(diffusionmix, "--support", root / "meta_val", "--query", query, *flags), query)


# ---- datasets.prepare: sources


@pytest.fixture
def mini(monkeypatch, tmp_path):
    """miniImageNet of four classes of three images, as class folders in tmp_path/from."""
    monkeypatch.setattr(published, "PER_CLASS", test_prepare.PER_CLASS)
    monkeypatch.setattr(published, "MINIIMAGENET", test_prepare.MINI)
    return test_prepare.folders(tmp_path / "from", test_prepare.MINI, 84)


def from_mini(call, source, out):
    return call(prepare, "miniimagenet", "--from", source, "--out", out)


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
@pytest.mark.parametrize("top", ["", "outer/mini"])
def test_a_source_in_an_archive(kind, top, call, mini, tmp_path):
    archive, out = tmp_path / f"mini.{kind}", tmp_path / "out"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in mini.rglob("*.png"):
                file.write(path, os.path.join(top, path.relative_to(mini)))
    else:
        with tarfile.open(archive, "w:gz" if kind == "tar.gz" else "w") as file:
            file.add(mini, top or ".")
    status, _, err = from_mini(call, archive, out)
    assert status == 0, err
    assert test_prepare.same(test_prepare.made(out), test_prepare.expected(test_prepare.MINI, 84))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["from", archive.name, "out"]


def test_hostile_archives_write_nothing_outside(call, mini, tmp_path):
    with tarfile.open(tmp_path / "up.tar", "w") as file:
        file.add(mini, "../../owned")
    (tmp_path / "cut.tar.gz").write_bytes(b"\x1f\x8b\x08\0 cut")
    (tmp_path / "one.pkl").write_bytes(b"x")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for i in range(3):
            file.writestr(f"{i}.bin", bytes(3_000_000))
    before = sorted(tmp_path.rglob("*"))
    for name in ("up.tar", "cut.tar.gz", "one.pkl", "bomb.zip"):
        cure = "give the folder" if name == "one.pkl" else "unpack"
        refused(from_mini(call, tmp_path / name, tmp_path / "out"), tmp_path / name, cure)
        assert sorted(tmp_path.rglob("*")) == before and not (tmp_path.parent / "owned").exists()


def test_a_source_one_level_off_names_the_right_one(call, mini, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    mini.rename(tmp_path / "a" / "b" / "mini")
    refused(from_mini(call, tmp_path / "a", tmp_path / "out"), f"--from {tmp_path / 'a' / 'b' / 'mini'}")
    three = tmp_path / "three"
    for split, names in test_prepare.MINI.items():
        test_prepare.folders(three / split[5:], {split: names}, 84)
    refused(from_mini(call, three / "train", tmp_path / "out"), f"--from {three}\n")
    caches = test_prepare.caches(tmp_path / "up" / "caches")
    refused(from_mini(call, caches.parent, tmp_path / "out"), f"--from {caches}")


def test_keys_that_are_bytes(call, mini, tmp_path):
    def as_bytes(split, content):
        content["class_dict"] = {name.encode(): indices for name, indices in content["class_dict"].items()}
        for name in list(content):
            content[name.encode()] = content.pop(name)

    source = test_prepare.caches(tmp_path / "caches", change=as_bytes)
    status, _, err = from_mini(call, source, tmp_path / "out")
    assert status == 0, err
    assert test_prepare.same(test_prepare.made(tmp_path / "out"), test_prepare.expected(test_prepare.MINI, 84))


def test_sources_are_read_by_content_and_leftovers_are_not(call, mini, tmp_path):
    for name in ("._n01_0.png", "Thumbs.db", "notes.txt"):
        (mini / "n01" / name).write_bytes(b"x")
    (mini / "n02" / "n02_0.png").rename(mini / "n02" / "n02_0")
    status, _, err = from_mini(call, mini, tmp_path / "out")
    assert status == 0 and len(err.splitlines()) >= 1, err
    assert test_prepare.same(test_prepare.made(tmp_path / "out"), test_prepare.expected(test_prepare.MINI, 84))
    assert "notes.txt" in (tmp_path / "out" / "skipped_images.csv").read_text()


# ---- datasets.prepare glyphs


def glyphs(call, out, *flags):
    return call(prepare, "glyphs", "--out", out, "--splits", "meta_val", *flags)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.png")}


def test_glyphs_that_a_kill_left_empty_or_half_are_drawn_again(call, tmp_path):
    assert glyphs(call, tmp_path / "whole", "--per-class", 3)[0] == 0
    out = tmp_path / "out"
    assert glyphs(call, out, "--per-class", 2)[0] == 0
    first = out / "meta_val" / "glyph040"
    kept = (first / "00000.png").stat().st_mtime_ns
    (first / "00001.png").write_bytes(b"")
    half = out / "meta_val" / "glyph049" / "00000.png"
    half.write_bytes(half.read_bytes()[:100])
    status, text, _ = glyphs(call, out, "--per-class", 3)
    assert status == 0 and "12 images written now" in text  # the two, and one more of ten classes
    assert contents(out) == contents(tmp_path / "whole") and (first / "00000.png").stat().st_mtime_ns == kept


def test_a_kill_leaves_no_half_glyph(call, tmp_path, monkeypatch):
    save = Image.Image.save

    def dies(self, file, *rest):
        file.write(b"half") if hasattr(file, "write") else open(file, "wb").write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", dies)
    assert glyphs(call, tmp_path, "--per-class", 1)[0] == 130
    assert not contents(tmp_path)
    monkeypatch.setattr(Image.Image, "save", save)
    assert glyphs(call, tmp_path, "--per-class", 1)[0] == 0 and len(contents(tmp_path)) == 10


def test_glyphs_of_another_seed_or_a_lower_count_are_refused(call, tmp_path):
    assert glyphs(call, tmp_path, "--per-class", 2, "--seed", 1)[0] == 0
    before = contents(tmp_path)
    refused(glyphs(call, tmp_path, "--per-class", 3), "--seed 0", "glyph040/00000.png")
    refused(glyphs(call, tmp_path, "--per-class", 1, "--seed", 1), "--per-class", "00001.png")
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "meta_val" / "glyph041" / "mine.png")
    refused(glyphs(call, tmp_path, "--per-class", 2, "--seed", 1), "glyph041/mine.png")
    (tmp_path / "meta_val" / "glyph041" / "mine.png").unlink()
    assert contents(tmp_path) == before
