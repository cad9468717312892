"""Bad images: read rightly where they can be, else left out with their reason, by pretraining and by evaluation."""

import csv
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

import guided_diffusion.image_train as image_train
from datasets.folder import load_split
from datasets.sources import load_real
from guided_diffusion.image_datasets import check_classes, load_images
from utils import images
from utils.class_folders import find_images
from utils.images import NO_IMAGE, ImageError, read_image, read_images, shown
from utils.run_log import write_skipped

RED, GREEN, BLUE = (250, 10, 20), (10, 240, 20), (10, 20, 230)


def picture(path, colour=RED, size=(8, 8), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def near(image, colour, tolerance=3):
    return bool((np.abs(image.astype(int) - np.array(colour)[:, None, None]) <= tolerance).all())


def png(path, pixels, bits=8, size=None):
    """Write (H, W, C) pixels as a PNG of `bits`; size: (width, height) that its header claims instead."""
    height, width, channels = pixels.shape
    width, height = size or (width, height)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in pixels)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in (*parts, (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(content)
    return path


def reason(path):
    with pytest.raises(ImageError) as caught:
        read_image(path, 8)
    message = str(caught.value)
    assert "\n" not in message and str(path.parent) not in message
    return message


# ---- odd, but read


def test_the_content_decides_not_the_ending(tmp_path):
    picture(tmp_path / "a.jpg", format="PNG")
    assert near(read_image(tmp_path / "a.jpg", 8), RED, 0)
    picture(tmp_path / "b.png", format="JPEG")
    assert near(read_image(tmp_path / "b.png", 8), RED)


def test_cmyk(tmp_path):
    picture(tmp_path / "a.jpg", (0, 255, 255, 0), mode="CMYK")
    assert near(read_image(tmp_path / "a.jpg", 8), (255, 0, 0))


@pytest.mark.parametrize("values", [(0,), (100,), (255,), (200, 255), (10, 100, 250), (10, 100, 250, 255)])
def test_16_bits_are_scaled_to_8(tmp_path, values):
    for more in (0, 255):  # the lower 8 bits
        pixels = np.broadcast_to(np.array(values, np.uint16) * 256 + more, (4, 4, len(values)))
        colour = values[:3] if len(values) > 2 else values[:1] * 3
        assert near(read_image(png(tmp_path / "a.png", pixels, 16), 8), colour, 0)


def test_transparency_of_a_palette_is_white(tmp_path):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:, 4:] = 1
    image = Image.fromarray(pixels).convert("P")
    image.putpalette([*RED, *GREEN])
    for name, transparency in (("a.png", 1), ("a.gif", 1), ("b.png", b"\xff\x00")):
        image.save(tmp_path / name, transparency=transparency)
        read = read_image(tmp_path / name, 8)
        assert near(read[:, :, :3], RED, 40) and near(read[:, :, 5:], (255, 255, 255), 40), name


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_the_first_frame_of_an_animation(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    assert near(read_image(tmp_path / name, 8), RED, 6)


def test_exif_turns_it_upright(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = RED  # above, and after a quarter turn clockwise on the right
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    read = read_image(tmp_path / "a.jpg", 16)
    assert near(read[:, :, 9:], RED, 12) and near(read[:, :, :7], (0, 0, 0), 12)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_one_pixel_wide(tmp_path, size):
    assert near(read_image(picture(tmp_path / "a.png", size=size), 8), RED, 0)


# ---- bad, and why


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp"])
def test_cut_short(tmp_path, name):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for share in (0.02, 0.5):
        (tmp_path / name).write_bytes(content[: int(share * len(content))])
        assert "cut short" in (why := reason(tmp_path / name)) or "is no image" in why


def test_no_image_at_all(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    assert reason(tmp_path / "empty.png") == "is empty (0 bytes)"
    (tmp_path / "text.png").write_text("no image")
    assert reason(tmp_path / "text.png").startswith("is no image (PNG, JPEG")
    (tmp_path / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")  # Pillow would run it
    assert reason(tmp_path / "program.png").startswith("is no image (PNG, JPEG")


def test_what_is_no_file(tmp_path):
    (tmp_path / "x.jpg").mkdir()
    assert reason(tmp_path / "x.jpg") == "is a folder, not an image"
    os.mkfifo(tmp_path / "pipe.png")
    assert reason(tmp_path / "pipe.png") == "is no regular file"
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert reason(tmp_path / "loop.png") == "is a symbolic link that leads in a circle"
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    assert reason(tmp_path / "gone.png") == "is a link to a file that is not there"


@pytest.mark.parametrize("size", [(20_000, 20_000), (10_001, 10_000)])
def test_a_bomb_is_refused_before_it_takes_memory(tmp_path, monkeypatch, size):
    def unpacked(*_):
        raise AssertionError("its pixels were asked for")

    monkeypatch.setattr(ImageFile.ImageFile, "load", unpacked)
    path = png(tmp_path / "a.png", np.zeros((4, 4, 3)), size=size)
    assert reason(path) == f"is {size[0]} x {size[1]} pixels, expected at most 100,000,000 in all"
    gif = struct.pack("<6sHHBBB", b"GIF89a", *size, 0, 0, 0) + struct.pack("<BHHHHBB", 44, 0, 0, *size, 0, 2) + b"\0;"
    (tmp_path / "a.gif").write_bytes(gif)
    assert f"is {size[0]} x {size[1]} pixels" in reason(tmp_path / "a.gif")


def forbid(monkeypatch, *forbidden):
    """Refuse to open files and to list folders of these names, also to root."""

    def guarded(function):
        def call(path, *args, **kwargs):
            if os.path.basename(os.fspath(path)) in forbidden:
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return function(path, *args, **kwargs)

        return call

    monkeypatch.setattr(images.os, "scandir", guarded(os.scandir))
    monkeypatch.setattr(Image, "open", guarded(Image.open))


def test_what_may_not_be_read(tmp_path, monkeypatch):
    picture(tmp_path / "meta_val" / "a" / "1.png")
    picture(tmp_path / "meta_val" / "a" / "2.png")
    picture(tmp_path / "meta_val" / "b" / "3.png")
    forbid(monkeypatch, "1.png", "b")
    for data in (load_split(tmp_path, "meta_val", 8), load_images(tmp_path / "meta_val", 8)):
        assert len(data.images) == 1 and data.class_names == ["a"]
        found = {os.path.basename(path): why for scanned in data.skipped.values() for path, why in scanned[:2]}
        assert found["1.png"] == "may not be read; change its permissions (chmod u+r)"
        rows = [row for scanned in data.skipped.values() for row in scanned]
        assert (str(tmp_path / "meta_val" / "b"), "may not be read; change its permissions (chmod u+r)") in rows


# ---- finding


def test_links_to_folders_are_not_walked_for_ever(tmp_path):
    picture(tmp_path / "a" / "deep" / "1.png")
    (tmp_path / "a" / "deep" / "up").symlink_to("..")
    (tmp_path / "b").symlink_to("a")  # a class may be a link
    (tmp_path / "self").symlink_to(".")
    paths, left_out = find_images(tmp_path / "a")
    assert paths == [tmp_path / "a" / "deep" / "1.png"]
    assert left_out.images == [(tmp_path / "a" / "deep" / "up", "is a link to a folder, which is not followed")]
    data = load_images(tmp_path, 8)
    assert data.class_names == ["a", "b"] and len(data.images) == 2
    rows = [row for scanned in data.skipped.values() for row in scanned]
    assert (str(tmp_path / "self"), "is a link back to a folder that it lies in") in rows


def test_names_that_are_no_utf_8(tmp_path, capsys):
    folder = os.fsencode(tmp_path) + b"/meta_val/caf\xe9"
    os.makedirs(folder)
    picture(tmp_path / "good.png")
    os.link(tmp_path / "good.png", folder + b"/\xff good.png")
    for name in (b"/\xe9.png", b"/two\nlines.png"):
        with open(folder + name, "wb"):
            pass
    for load in (lambda: load_split(tmp_path, "meta_val", 8), lambda: load_images(tmp_path / "meta_val", 8)):
        data = load()
        assert len(data.images) == 1 and [os.fsencode(name) for name in data.class_names] == [b"caf\xe9"]
        rows = [row for scanned in data.skipped.values() for row in scanned]
        assert sorted(os.path.basename(path) for path, _ in rows) == ["\\xe9.png", "two\\nlines.png"]
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "caf\\xe9/two\\nlines.png: is empty (0 bytes)" in error
        write_skipped(tmp_path, data.skipped)
        assert "\\xe9.png,is empty" in (tmp_path / "skipped_images.csv").read_text(encoding="utf-8")


def test_plain_names_are_shown_as_they_are():
    assert shown("a/b c/Grüße 猫.png") == "a/b c/Grüße 猫.png"


def test_read_images_takes_the_first_that_can_be_read_and_tries_each_once(tmp_path, monkeypatch):
    paths = [picture(tmp_path / f"{i}.png", (i, 0, 0)) for i in range(6)]
    for i in (0, 2, 3):
        paths[i].write_text("no image")
    tried, read = [], images.read_image
    monkeypatch.setattr(images, "read_image", lambda path, size: tried.append(path) or read(path, size))
    for most, expected, bad in ((1, [1], 1), (2, [1, 4], 3), (5, [1, 4, 5], 3), (None, [1, 4, 5], 3), (0, [], 0)):
        tried.clear()
        found, left_out = read_images(paths, 8, most)
        assert [int(image[0, 0, 0]) for image in found] == expected and len(left_out) == bad
        assert len(tried) == len(set(tried)) == len(expected) + bad
    assert read_images([], 8) == ([], [])


# ---- in the two loaders


@pytest.fixture
def mixed(tmp_path):
    """meta_val with good and bad files of many kinds: a 2 good, b 1 good, c none, x.jpg no image, d empty."""
    folder = tmp_path / "data" / "meta_val"
    picture(folder / "a" / "1.png")
    picture(folder / "a" / "2.jpg", GREEN)
    picture(folder / "b" / "1.webp", BLUE)
    (folder / "a" / "0.png").write_bytes(b"")
    (folder / "a" / "3.png").write_text("text")
    (folder / "a" / "dir.png").mkdir()
    (folder / "b" / "loop.gif").symlink_to("loop.gif")
    path = picture(folder / "c" / "cut.png", size=(300, 300))
    path.write_bytes(path.read_bytes()[:-80])
    for name in ("d", "x.jpg"):
        (folder / name).mkdir()
        (folder / name / "notes.txt").write_text("no image")
    return folder


EXPECTED = {
    "a/0.png": "is empty (0 bytes)",
    "a/3.png": "is no image (PNG, JPEG, GIF, WEBP, BMP, ",
    "a/dir.png": "is a folder, not an image",
    "b/loop.gif": "is a symbolic link that leads in a circle",
    "c/cut.png": "is cut short",
    "c": "is a class folder without a readable image",
    "d": "is a class folder without a readable image",
    "x.jpg": "is a class folder without a readable image",
}


def rows_of(path, root):
    with open(path, newline="", encoding="utf-8") as file:
        columns, *rows = csv.reader(file)
    assert columns == ["path", "reason"]
    return {os.path.relpath(row[0], root): row[1] for row in rows}


@pytest.mark.parametrize("load", ["evaluation", "pretraining"])
def test_each_is_left_out_with_its_reason(load, mixed, tmp_path, capsys):
    data = load_split(mixed.parent, "meta_val", 8) if load == "evaluation" else load_images(mixed, 8)
    assert data.class_names == ["a", "b"] and data.labels.tolist() == [0, 0, 1]
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "left out 5 unreadable image(s), the first a/0.png: is empty (0 bytes)" in error
    write_skipped(tmp_path / "run", data.skipped)
    assert os.listdir(tmp_path / "run") == ["skipped_images.csv"]
    rows = rows_of(tmp_path / "run" / "skipped_images.csv", mixed)
    assert rows.keys() == EXPECTED.keys()
    assert all(rows[path].startswith(why) for path, why in EXPECTED.items())


def test_a_first_image_that_is_bad_is_made_up_for(mixed):
    data = load_split(mixed.parent, "meta_val", 8, max_per_class=1)
    assert data.class_names == ["a", "b"] and near(data.images[0].numpy(), RED, 0)


def test_domains_carry_what_they_left_out(mixed, tmp_path):
    (tmp_path / "other").symlink_to("data")
    data = load_real("cifar_mini", [tmp_path / "data", tmp_path / "other"], "meta_val", 8)
    assert [len(rows) for rows in data.skipped.values()] == [10, 10]


def test_nothing_left_stops_with_a_line(tmp_path):
    for name in ("a/1.png", "b/2.png"):
        picture(tmp_path / "meta_val" / name).write_text("no image")
    with pytest.raises(
        ValueError, match="no class with a readable image.*left out 2 .* the first a/1.png: is no image"
    ):
        load_split(tmp_path, "meta_val", 8)
    with pytest.raises(ValueError, match="meta_val: got no readable image among 2, the first a/1.png: is no image"):
        load_images(tmp_path / "meta_val", 8)
    picture(tmp_path / "meta_val" / "a" / "1.png")
    assert load_images(tmp_path / "meta_val", 8).class_names == ["a"]
    for call in (load_images, check_classes):
        with pytest.raises(ValueError, match="meta_val/b: got no readable image among 1, the first 2.png"):
            arguments = (8, ["a", "b"]) if call is load_images else (["a", "b"],)
            call(tmp_path / "meta_val", *arguments)
    with pytest.raises(ValueError, match="empty: holds no images; expected some .png"):
        (tmp_path / "empty").mkdir()
        load_images(tmp_path / "empty", 8)


# ---- skipped_images.csv


def test_rows_of_other_folders_stay_and_mended_files_go(tmp_path):
    path = tmp_path / "skipped_images.csv"
    write_skipped(
        tmp_path, {"data/a": [("data/a/1.png", 'is "odd", as they say')]}, {"data/ab": [("data/ab/2.png", "x")]}
    )
    assert path.read_text() == 'path,reason\ndata/a/1.png,"is ""odd"", as they say"\ndata/ab/2.png,x\n'
    write_skipped(tmp_path, {"data/a": []})
    assert path.read_text() == "path,reason\ndata/ab/2.png,x\n"
    write_skipped(tmp_path, {"data": []})
    assert os.listdir(tmp_path) == []
    write_skipped(tmp_path / "run", {"data": []})
    assert os.listdir(tmp_path) == []  # no folder for nothing


FLAGS = (
    "--image_size 16 --num_channels 8 --num_res_blocks 1 --channel_mult 1 --num_heads 1 --attention_resolutions= "
    "--noise_schedule cosine --diffusion_steps 4 --batch_size 2 --steps 1 --device cpu"
).split()


def test_pretraining_writes_it_into_the_model_folder(call, mixed, tmp_path):
    held_out = tmp_path / "unseen"
    picture(held_out / "a" / "1.png")
    (held_out / "a" / "2.png").write_text("no image")
    out = tmp_path / "out"
    flags = ("--data_dir", mixed, "--save_dir", out, "--held_out_dir", held_out, *FLAGS)
    status, _, err = call(image_train, *flags)
    assert status == 0, err
    rows = rows_of(out / "skipped_images.csv", mixed)
    assert rows.keys() == {*EXPECTED, "../../unseen/a/2.png"} and (out / "model.pt").exists()


def test_pretraining_writes_it_into_the_pool_folder(call, mixed, tmp_path):
    pool = tmp_path / "pool"
    flags = ("--data_dir", mixed, "--pool", pool, "--classes_per_model", 1, *FLAGS)
    status, _, err = call(image_train, *flags)
    assert status == 2 and f"{mixed}/c: got no readable image among 1, the first cut.png" in err
    assert not pool.exists()  # it stops before anything is trained
    for subset in (1, 2):
        status, _, err = call(image_train, *flags, "--subsets", subset)
        assert status == 0, err
    rows = rows_of(pool / "skipped_images.csv", mixed)
    assert list(rows) == ["a/0.png", "a/3.png", "a/dir.png", "b/loop.gif"]


def test_pictures_of_kinds_that_are_not_read_are_named(tmp_path):
    for name in ("a.png", "b.HEIC", "c.tif", "notes.txt", ".d.heic"):
        (tmp_path / name).touch()
    paths, left_out = find_images(tmp_path)
    assert [path.name for path in left_out.leftovers] == [".d.heic"]
    _, unread = read_images(paths, 8)
    assert [(path.name, reason) for path, reason in unread] == [
        ("a.png", "is empty (0 bytes)"), ("b.HEIC", "is a .HEIC; save it as png or jpg"),
        ("c.tif", "is empty (0 bytes)"), ("notes.txt", NO_IMAGE),
    ]  # fmt: skip
