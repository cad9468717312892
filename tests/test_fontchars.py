"""fontchars, the set of real characters that ships, and the drawing of characters from fonts."""

import json
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

import datasets.prepare as prepare
import diffusionmix
import guided_diffusion.image_train as image_train
import main
from datasets import fontchars
from datasets.folder import load_split
from datasets.fonts import class_name
from datasets.sources import load_real
from guided_diffusion.train_util import TrainLoop
from tests.conftest import NO_IMAGES, ROOT, TINY, UNET

FILE = ROOT / "datasets" / "fontchars.npz"
DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
SPLITS = {  # split -> classes, images
    "meta_train": ("A B C D E F G H J K L M N O P Q R S T U V W X Y Z small_a small_b small_d small_e small_f", 6493),
    "meta_val": ("small_g small_h small_i small_m small_n small_q small_r small_t small_y", 1924),
    "meta_test": ("2 3 4 5 6 7 8 9 u0023 u0024 u0025 u0026 u003f u0040", 3038),
}


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_is_what_the_file_holds(split, tmp_path):
    data = load_real("fontchars", [NO_IMAGES], split, 32)
    names, count = SPLITS[split]
    assert data.class_names == names.split() and len(data.images) == count
    assert data.images.shape == (count, 3, 32, 32) and data.images.dtype == torch.uint8
    with np.load(FILE, allow_pickle=False) as file:
        images, labels = file[f"{split}_images"], file[f"{split}_labels"]
    for index in (0, -1):
        for colour in range(3):
            assert np.array_equal(data.images[index, colour].numpy(), images[index])
    assert data.labels.dtype == torch.int64 and data.labels.tolist() == labels.tolist()
    assert 200 < min(data.counts().values()) and max(data.counts().values()) == (217 if split != "meta_val" else 214)


def test_no_class_is_in_two_splits():
    names = [name for split in SPLITS for name in load_real("fontchars", [NO_IMAGES], split, 32, 1).class_names]
    assert len(names) == len({name.lower() for name in names}) == 53


def test_a_few_a_class():
    few, every = (load_real("fontchars", [NO_IMAGES], "meta_val", 32, count) for count in (2, None))
    assert few.labels.tolist() == [label for label in range(9) for _ in range(2)]
    for label in range(9):
        assert torch.equal(few.images[few.labels == label], every.images[every.labels == label][:2])


def test_an_unknown_split_and_a_damaged_file_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="meta_tset.*meta_test"):
        fontchars.load_fontchars("meta_tset")
    monkeypatch.setattr(fontchars, "FILE", tmp_path / "fontchars.npz")
    for content in (None, b"", FILE.read_bytes()[:5000]):
        if content is not None:
            fontchars.FILE.write_bytes(content)
        with pytest.raises(ValueError, match="fontchars.npz.*repository"):
            fontchars.load_fontchars("meta_val")


def test_both_commands(call, two_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared = ("--dataset", "fontchars", "--device", "cpu")
    status, _, err = call(main, *shared)
    assert status == 2 and err.startswith("error: ckpt/fontchars:") and "image_train.py" in err and "prepare" in err
    assert not any(tmp_path.iterdir())
    Path("ckpt").mkdir()
    Path("ckpt/fontchars").symlink_to(two_models)  # of 16 pixels: images are resized to it
    status, _, err = call(main, *shared, *TINY, "--max-epoch", 1)
    assert status == 0, err
    settings = json.loads(Path("ckpt/runs/fontchars/1-shot/config.json").read_text())
    assert settings["flip"] is False and settings["pool"] == ""
    status, _, err = call(diffusionmix, *shared, "--episodes", 2, "--head-steps", 2, "--mix-steps", 1,
                          "--nTestNovel", 10)  # fmt: skip
    assert status == 0, err
    results = json.loads(Path("ckpt/runs/fontchars/1-shot/results.json").read_text())
    assert results["dataset"] == "fontchars" and results["episodes"] == 2 and results["split"] == "meta_test"
    assert not Path("data").exists()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    prepare.fontchars(folder, ["meta_val"])
    return folder


def test_on_disk_it_is_the_same(written, call, tmp_path):
    for size in (32, 16):
        there, shipped = load_split(written, "meta_val", size), load_real("fontchars", [tmp_path], "meta_val", size)
        assert there.class_names == shipped.class_names and torch.equal(there.labels, shipped.labels)
        assert torch.equal(there.images, shipped.images)
    assert Image.open(written / "meta_val" / "small_g" / "abeezee-400-italic.png").mode == "L"


def test_it_is_written_only_where_it_is_missing_or_damaged(written, call, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(written, out)
    folder = out / "meta_val" / "small_y"
    first, second, *_ = sorted(folder.iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes()[:60])
    status, text, _ = call(prepare, "fontchars", "--out", out, "--splits", "meta_val")
    assert status == 0 and "9 classes, 1924 images, 2 images written now" in text
    assert torch.equal(load_split(out, "meta_val", 32).images, fontchars.load_fontchars("meta_val").images)
    Image.new("L", (32, 32)).save(second)
    first.unlink()
    status, _, err = call(prepare, "fontchars", "--out", out, "--splits", "meta_val")
    assert status == 2 and second.name in err and "--out" in err and not first.exists()


@pytest.mark.usefixtures("enough_memory")
def test_a_pool_model_learns_from_it(written, call, tmp_path, monkeypatch):
    sheet = TrainLoop.sample_sheet
    monkeypatch.setattr(TrainLoop, "sample_sheet", lambda loop: sheet(loop, 2))
    monkeypatch.setattr("guided_diffusion.memorisation.SAMPLES", 4)
    flags = [word for name, value in UNET.items() for word in (f"--{name}", value)]
    status, _, err = call(image_train, "--data_dir", written / "meta_val", "--pool", tmp_path / "pool", *flags,
                          "--classes_per_model", 5, "--lr_anneal_steps", 1, "--batch_size", 2, "--half_weights", True,
                          "--random_flip", False, "--hold_out", 0.05)  # fmt: skip
    assert status == 0, err
    models = json.loads((tmp_path / "pool" / "pool.json").read_text())["models"]
    assert [len(model["classes"]) for model in models] == [5, 4]


# ---- datasets.prepare fonts


@pytest.fixture
def own_fonts(tmp_path):
    """Two real fonts, one of them in a folder."""
    folder = tmp_path / "fonts"
    (folder / "Serif").mkdir(parents=True)
    shutil.copyfile(DEJAVU / "DejaVuSans.ttf", folder / "DejaVuSans.ttf")
    shutil.copyfile(DEJAVU / "DejaVuSerif.ttf", folder / "Serif" / "DejaVu Serif.TTF")
    (folder / "OFL.txt").write_text("a licence")
    return folder


def draw(call, folder, out, characters):
    return call(prepare, "fonts", "--from", folder, "--out", out, "--characters", characters)


def test_classes_and_pictures(call, own_fonts, tmp_path):
    out = tmp_path / "out"
    assert draw(call, own_fonts, out, "Aa#7Aä")[0] == 0  # A twice
    files = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    names = ("A", "small_a", "u0023", "7", "u00e4")
    assert files == {f"{name}/{font}.png" for name in names for font in ("dejavusans", "serif-dejavu-serif")}
    for path in out.rglob("*.png"):
        picture = Image.open(path)
        assert picture.mode == "L" and picture.size == (32, 32)
        ink = np.argwhere(np.asarray(picture) < 255)
        assert np.asarray(picture).min() < 64 and np.asarray(picture).mean() > 128  # black on white
        assert 23 <= (np.ptp(ink, axis=0) + 1).max() <= 24 and ink.min() >= 2 and ink.max() <= 29
    assert len({path.read_bytes() for path in out.rglob("*.png")}) == 10


def test_given_again_it_draws_what_is_missing(call, own_fonts, tmp_path):
    draw(call, own_fonts, tmp_path / "out", "AB")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")}
    first, second, *_ = before
    first.unlink()
    second.write_bytes(b"")
    status, text, _ = draw(call, own_fonts, tmp_path / "out", "AB")
    assert status == 0 and "2 images written now" in text
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")} == before
    Image.new("L", (32, 32)).save(first)
    status, _, err = draw(call, own_fonts, tmp_path / "out", "AB")
    assert status == 2 and first.name in err and "--out" in err


def test_what_else_is_there_is_named(call, own_fonts, tmp_path):
    assert draw(call, own_fonts, tmp_path / "out", "AB")[2] == ""
    (own_fonts / "DejaVuSans.ttf").unlink()
    status, _, err = draw(call, own_fonts, tmp_path / "out", "A")
    assert status == 0 and "3 images of other" in err and "dejavusans.png" in err and err.count("\n") == 1


def test_a_font_without_a_character_is_left_out(call, own_fonts, tmp_path):
    shutil.copyfile(DEJAVU / "DejaVuSansDisplay.ttf", own_fonts / "display.ttf")  # integrals and sums, no letters
    status, _, err = draw(call, own_fonts, tmp_path / "out", "A∫क")
    assert status == 0 and len(err.splitlines()) == 2  # one of A, one of the letter that none has
    assert any(line.startswith("A: ") and "1 of 3" in line and "display" in line for line in err.splitlines())
    assert any(line.startswith("u0915: ") and "3 of 3" in line for line in err.splitlines())
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")}
    expected = {f"{name}/{font}.png" for name in ("A", "u222b") for font in ("dejavusans", "serif-dejavu-serif")}
    assert files == expected | {"u222b/display.png"}


def test_unreadable_fonts_and_doubles_are_named(call, own_fonts, tmp_path):
    (own_fonts / "bad.otf").write_bytes(b"no font")
    (own_fonts / "half.ttf").write_bytes((DEJAVU / "DejaVuSans.ttf").read_bytes()[:500])
    shutil.copyfile(DEJAVU / "DejaVuSans.ttf", own_fonts / "dejavusans.woff")
    status, text, err = draw(call, own_fonts, tmp_path / "out", "A")
    assert status == 0 and "1 classes, 2 images of 2 fonts" in text
    lines = err.splitlines()
    assert len(lines) == 3 and all(any(name in line for line in lines) for name in ("bad.otf", "half.ttf", ".woff"))


def test_what_cannot_be_drawn_is_refused(call, own_fonts, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, characters, words in (
        (tmp_path / "nowhere", "A", "nowhere"),
        (tmp_path / "empty", "A", ".woff2"),
        (own_fonts, "", "--characters"),
        (own_fonts, "A b", "--characters"),
        (own_fonts, "क", "--characters"),
    ):
        status, _, err = draw(call, folder, tmp_path / "out", characters)
        assert status == 2 and words in err and err.count("error: ") == 1 and not (tmp_path / "out").exists()


def test_names_of_classes_are_told_apart_without_case():
    characters = [chr(code) for code in range(33, 0x250)]
    names = {class_name(character).lower() for character in characters}
    assert len(names) == len(characters) and all(name.replace("_", "").isalnum() for name in names)
    assert [class_name(character) for character in "Aa7#"] == ["A", "small_a", "7", "u0023"]


def test_the_documents_name_every_font():
    page = (ROOT / "docs" / "fonts.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.count("|") == 5]
    cuts = {row[0]: int(row[1]) for row in rows if row[1].isdigit() and row[3] in ("OFL-1.1", "Apache-2.0", "MIT")}
    found = {font for split in SPLITS for font in fontchars.read_split(split)[3]}
    assert sum(cuts.values()) == 217 == len(found) and len(cuts) == 108
    assert {font.rsplit("-", 2)[0] for font in found} == set(cuts)
