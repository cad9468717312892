"""Images from folders, and the pixel convention."""

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.folder import load_split
from utils.class_folders import find_images
from utils.images import read_image, to_float, to_uint8


def write(path, colour, size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def test_pixels_round_trip_exactly():
    pixels = torch.arange(256, dtype=torch.uint8)
    floats = to_float(pixels)
    assert floats.dtype == torch.float32
    assert (floats[0].item(), floats[255].item()) == (-1.0, 1.0)
    assert torch.equal(to_uint8(floats), pixels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_load_split_sorts_classes_and_files(tmp_path):
    write(tmp_path / "meta_val" / "b" / "2.PNG", (20, 0, 0))
    write(tmp_path / "meta_val" / "b" / "1.png", (10, 0, 0))
    write(tmp_path / "meta_val" / "a" / "9.webp", (0, 0, 0))
    write(tmp_path / "meta_val" / "a" / "8.gif", (0, 0, 0))
    (tmp_path / "meta_val" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "meta_val" / ".hidden").mkdir()
    data = load_split(tmp_path, "meta_val", 8)
    assert data.class_names == ["a", "b"]
    assert data.labels.dtype == torch.int64 and data.labels.tolist() == [0, 0, 1, 1]
    assert data.images.dtype == torch.uint8 and data.images.shape == (4, 3, 8, 8)
    assert data.images[:, 0, 0, 0].tolist()[2:] == [10, 20]
    assert load_split(tmp_path, "meta_val", 8, max_per_class=1).labels.tolist() == [0, 1]


def test_unreadable_images_are_counted_once_in_one_line(tmp_path, capsys):
    folder = tmp_path / "meta_val"
    write(folder / "a" / "1.png", (10, 0, 0))
    content = (folder / "a" / "1.png").read_bytes()
    (folder / "a" / "0.png").write_bytes(content[: len(content) // 2])
    (folder / "a" / "2.jpg").write_text("no image")
    (folder / "b").mkdir()
    (folder / "b" / "notes.txt").write_text("no image")
    data = load_split(tmp_path, "meta_val", 8)
    assert data.class_names == ["a"] and len(data.images) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "2 unreadable image(s), the first a/0.png" in error and "1 class(es) without an image" in error


def test_crop_is_central(tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 4:12] = (255, 128, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png", 8) == np.array([255, 128, 0])[:, None, None]).all()
    small = read_image(tmp_path / "a.png", 4)
    assert small.shape == (3, 4, 4) and (small[0] > 240).all()


def test_resize_averages_rather_than_drops(tmp_path):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, ::2] = 255  # nearest or plain bilinear would give black or white
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.abs(read_image(tmp_path / "a.png", 8)[:, 1:-1, 1:-1].astype(int) - 127).max() < 12


def test_transparent_is_white_and_16_bit_grey_is_kept(tmp_path):
    write(tmp_path / "clear.png", (255, 0, 0, 0), mode="RGBA")
    assert (read_image(tmp_path / "clear.png", 8) == 255).all()
    Image.fromarray(np.full((8, 8), 100 * 256, np.uint16)).save(tmp_path / "grey.png")
    assert (read_image(tmp_path / "grey.png", 8) == 100).all()


def test_paths_are_sorted_and_recursive(tmp_path):
    for name in ("b/2.png", "b/1.JPG", "a.jpeg", ".hidden/3.png", "b/._1.png"):
        write(tmp_path / name.replace(".JPG", ".jpg"), (0, 0, 0))
    (tmp_path / "b" / "1.jpg").rename(tmp_path / "b" / "1.JPG")
    paths, left_out = find_images(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["a.jpeg", "b/1.JPG", "b/2.png"]
    assert left_out.images == [] and find_images(tmp_path, deep=False)[0] == [tmp_path / "a.jpeg"]


def test_missing_folders_say_what_they_should_hold(tmp_path):
    (tmp_path / "meta_val").mkdir()
    for call in (
        lambda: load_split(tmp_path, "meta_test", 8),
        lambda: load_split(tmp_path, "meta_val", 8),
        lambda: find_images(tmp_path / "none"),
    ):
        with pytest.raises(ValueError, match="png, jpg, jpeg, gif, webp") as caught:
            call()
        assert "\n" not in str(caught.value)
