"""Pixels of images of unusual modes, transparency, formats and sizes, against values worked out by hand."""

import os
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.test_images import png
from utils import pixels
from utils.class_folders import LeftOut, find_images
from utils.images import FORMATS, NO_IMAGE, ImageError, pixels_of, read_image, read_images


def grey(path, side=16):
    """What is read of a grey image at its own size: (side, side), the same in all channels."""
    read = read_image(path, side)
    assert (read == read[:1]).all()
    return read[0]


def levels(dtype, factor=1):
    """All of 0 to 255, in some order, times `factor`: (16, 16)."""
    return (np.random.default_rng(0).permutation(256).reshape(16, 16) * factor).astype(dtype)


# ---- mode I and mode F


@pytest.mark.parametrize("factor, divisor", [(1, 1), (257, 257), (100, 257)])
def test_integers_of_32_bits(tmp_path, factor, divisor):
    values = levels(np.int32, factor)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert Image.open(tmp_path / "a.tif").mode == "I"
    expected = np.rint(values / divisor)
    assert np.array_equal(grey(tmp_path / "a.tif"), expected)
    assert np.array_equal(pixels_of(Image.fromarray(values), 16)[0], expected)


@pytest.mark.parametrize("divisor", [1, 255])
def test_floats(tmp_path, divisor):
    Image.fromarray(levels(np.float32) / np.float32(divisor)).save(tmp_path / "a.tiff")
    assert Image.open(tmp_path / "a.tiff").mode == "F"
    assert np.array_equal(grey(tmp_path / "a.tiff"), levels(int))


@pytest.mark.parametrize(
    "values",
    [
        np.int32([[-1, 5]]), np.int32([[0, 65536]]), np.float32([[-1, 1]]), np.float32([[0, 256]]),
        np.float32([[0, np.nan]]), np.float32([[np.inf, 0]]),
    ],
)  # fmt: skip
def test_values_of_no_known_range_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="expected .*0"):
        read_image(tmp_path / "a.tif", 8)
    _, left_out = read_images([tmp_path / "a.tif"], 8)
    assert [path.name for path, _ in left_out] == ["a.tif"]


def test_a_grey_map_of_16_bits_is_of_16_bits_however_dark(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 2 2 65535\n" + np.array([0, 255, 256, 65535], ">u2").tobytes())
    assert grey(tmp_path / "a.pgm", 2).tolist() == [[0, 0], [1, 255]]


# ---- one value that is transparent (tRNS)


def coded_png(path, rows, bits, kind, trns, palette=None):
    """Write a PNG of packed rows (bytes each) with a tRNS chunk."""
    height, width = len(rows), 4
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))]
    chunks += [(b"PLTE", bytes(palette))] if palette else []
    chunks += [(b"tRNS", trns), (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(content)
    return path


def packed(values, bits):
    """One row of `values` of `bits` each, as a PNG has it."""
    if bits == 16:
        return np.array(values, ">u2").tobytes()
    number = "".join(f"{value:0{bits}b}" for value in values)
    return int(number.ljust(-(-len(number) // 8) * 8, "0"), 2).to_bytes(-(-len(number) // 8), "big")


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey(tmp_path, bits):
    greatest = 2**bits - 1
    values = [0, 1, greatest // 2, greatest]
    spread = [value >> 8 if bits == 16 else value * 255 // greatest for value in values]
    for key in values:
        expected = [255 if value == key else seen for value, seen in zip(values, spread, strict=True)]
        path = coded_png(tmp_path / "a.png", [packed(values, bits)] * 4, bits, 0, struct.pack(">H", key))
        assert (grey(path, 4) == expected).all(), key
        with Image.open(path) as image:
            assert (pixels_of(image, 4)[0] == expected).all(), key


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_transparent_palette_entry(tmp_path, bits):
    indices = [0, 1, 1, 0]
    palette = [10, 20, 30, 40, 50, 60]
    for key, alphas in ((0, b"\0"), (1, b"\xff\0")):
        path = coded_png(tmp_path / "a.png", [packed(indices, bits)] * 4, bits, 3, alphas, palette)
        expected = [[255] * 3 if index == key else palette[3 * index : 3 * index + 3] for index in indices]
        assert (read_image(path, 4) == np.array(expected).T[:, None]).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_colour_is_that_colour_alone(tmp_path, bits):
    key = [7, 8, 9] if bits == 8 else [1000, 2000, 3000]
    colours = [key, [*key[:2], key[2] + 1], [key[0] + 1, *key[1:]], [0, 0, 0]]
    row = np.array(colours, ">u2" if bits == 16 else "u1").tobytes()
    path = coded_png(tmp_path / "a.png", [row] * 4, bits, 2, struct.pack(">HHH", *key))
    shift = bits - 8
    expected = [[255] * 3, *[[value >> shift for value in colour] for colour in colours[1:]]]
    assert (read_image(path, 4) == np.array(expected).T[:, None]).all()


def test_sixteen_bits_as_pillow_saves_them(tmp_path):
    values = np.array([[0, 40000], [40000, 0]], np.uint16)
    Image.fromarray(values).save(tmp_path / "t.png", transparency=0)
    assert grey(tmp_path / "t.png", 2).tolist() == [[255, 156], [156, 255]]


# ---- the content decides


@pytest.mark.parametrize(
    "name, kind",
    [
        ("a.jfif", "JPEG"), ("a.jpe", "JPEG"), ("a.ppm", "PPM"), ("a.avif", "AVIF"), ("a", "PNG"), ("a.bmp", "BMP"),
        ("a.tif", "TIFF"), ("a.tga", "TGA"), ("a.jp2", "JPEG2000"), ("a.qoi", "QOI"), ("a.mpo", "MPO"),
        ("a.txt", "PNG"), ("a.JPEG", "WEBP"), ("a.pcx", "PCX"), ("a.sgi", "SGI"), ("a.dds", "DDS"),
    ],
)  # fmt: skip
def test_any_ending(tmp_path, name, kind):
    Image.new("RGB", (16, 16), (200, 100, 50)).save(tmp_path / name, kind)
    paths, _ = find_images(tmp_path)
    (image,), left_out = read_images(paths, 16)
    assert not left_out and (np.abs(image.astype(int) - [[[200]], [[100]], [[50]]]) < 12).all()


def test_what_is_no_image_is_one_row_a_folder(tmp_path):
    for name in ("1.txt", "2.csv", "3.json", "labels.npy"):
        (tmp_path / name).write_text("Name: cats\nDate: today\n")
    (tmp_path / "4.png").write_text("no image")
    (tmp_path / "5").write_text("no image, perhaps damaged")
    paths, left_out = find_images(tmp_path)
    images, unread = read_images(paths, 8)
    left_out.add_unread(unread)
    assert not images and sorted(path.name for path in left_out.others) == ["1.txt", "2.csv", "3.json", "labels.npy"]
    rows = left_out.rows()
    assert [os.path.basename(path) for path, _ in rows] == ["4.png", "5", tmp_path.name]
    assert "4 file(s)" in rows[-1][1] and "1.txt" in rows[-1][1]
    assert "\n" not in left_out.line(tmp_path)
    assert LeftOut().line(tmp_path) == "" and NO_IMAGE not in dict(rows).values()


def test_no_format_runs_a_program_or_hides_a_size():
    assert not {"EPS", "WMF", "ICO", "ICNS", "IPTC", "BLP"} & set(FORMATS)


# ---- large ones


def test_a_large_image_is_the_mean_of_its_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "LARGE", 100)
    monkeypatch.setattr(pixels, "BAND", 3000)
    picture = np.zeros((260, 400, 3), np.uint8)
    picture[:, 70:200] = (250, 10, 20)  # the central square is from 70 to 330
    picture[:, 200:330] = (10, 250, 20)
    Image.fromarray(picture).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png", 8).astype(int)
    assert (np.abs(read[:, :, :3] - [[[250]], [[10]], [[20]]]) < 6).all()
    assert (np.abs(read[:, :, 5:] - [[[10]], [[250]], [[20]]]) < 6).all()
    Image.fromarray(picture).save(tmp_path / "a.jpg", quality=95)
    jpeg = read_image(tmp_path / "a.jpg", 8).astype(int)
    assert (np.abs(jpeg[:, :, 1:3] - [[[250]], [[10]], [[20]]]) < 12).all()
    assert (np.abs(jpeg[:, :, 5:7] - [[[10]], [[250]], [[20]]]) < 12).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    Image.fromarray(picture).save(tmp_path / "b.png", exif=exif)
    assert np.abs(np.rot90(read, -1, (1, 2)) - read_image(tmp_path / "b.png", 8)).max() <= 1


def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "_ROOM", pixels._Room(1000))
    Image.new("L", (40, 40)).save(tmp_path / "0.png")
    for i in range(1, 8):
        os.link(tmp_path / "0.png", tmp_path / f"{i}.png")
    at_work, most, guard, load = set(), [], threading.Lock(), pixels._rgb_parts

    def watched(image):
        with guard:
            at_work.add(threading.get_ident())
            most.append(len(at_work))
        part = load(image)
        with guard:
            at_work.discard(threading.get_ident())
        return part

    monkeypatch.setattr(pixels, "_rgb_parts", watched)
    images, left_out = read_images(sorted(tmp_path.iterdir()), 8, workers=8)
    assert len(images) == 8 and not left_out and max(most) == 1
    assert pixels._ROOM.free == 1000


def test_a_bomb_has_one_line_and_the_others_are_read(tmp_path):
    png(tmp_path / "bomb.png", np.zeros((4, 4, 3)), size=(30_000, 30_000))
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    images, left_out = read_images(sorted(tmp_path.iterdir()), 8)
    assert len(images) == 1 and [path.name for path, _ in left_out] == ["bomb.png"] and "30000" in left_out[0][1]
