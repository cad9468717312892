"""Convert any Pillow image to a square of 8-bit RGB, with little memory for large images."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition

import numpy as np
from PIL import Image

MAX_PIXELS = 100_000_000  # of one image, which then takes 400 MB in Pillow
LARGE = 16_000_000  # pixels; a larger image is converted to RGB and shrunk in bands
BAND = 1_000_000  # pixels
IN_FLIGHT = 50_000_000  # most pixels decoded at once; a larger image is decoded alone

MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"}  # Pillow converts them
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
ORIENTATION = 0x0112  # EXIF tag

# The C library returns freed blocks of this size to the system at once. Smaller ones stay with the thread that decoded
# the image, so four threads would hold the memory of four large images.
Image.core.set_block_size(64 * 2**20)

Box = tuple[int, int, int, int]  # left, top, right, bottom


class ImageError(ValueError):
    """An image cannot be read. The message is the reason in one line, without the path."""


class _Room:
    """A limit on the pixels decoded at once. A thread that needs more than are free waits."""

    def __init__(self, pixels: int):
        self.all = self.free = pixels
        self.changed = Condition()

    @contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        wanted = min(pixels, self.all)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= wanted)
            self.free -= wanted
        try:
            yield
        finally:
            with self.changed:
                self.free += wanted
                self.changed.notify_all()


_ROOM = _Room(IN_FLIGHT)


def square(image: Image.Image, size: int, *, own: bool = False) -> np.ndarray:
    """Return the central square of an image as (3, size, size) uint8 RGB, resized by Lanczos.

    EXIF orientation is applied. Transparent pixels become white. 16 bits are scaled to 8. 32-bit grey integers (mode I)
    are read as 8 bits if all are at most 255, else as 16. Grey floats (mode F) are read in [0, 1], or if any is above 1
    in [0, 255]. In images of more than LARGE pixels, blocks are averaged before resizing.

    own: the caller no longer needs `image`. It is closed, and a large JPEG is decoded at a smaller scale.

    Raises:
        ImageError: the image has more than MAX_PIXELS pixels, values outside these ranges, or a mode that Pillow cannot
            convert to RGB.
    """
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise ImageError(f"is {image.width} x {image.height} pixels, expected at most {MAX_PIXELS:,} in all")
    with _ROOM.of(pixels):
        if own and pixels > LARGE:
            image.draft(None, (4 * size, 4 * size))  # decodes a JPEG at a half, a quarter or an eighth
        part = _rgb_parts(image)
        whole = (0, 0, *image.size)
        upright = part(whole) if image.width * image.height <= LARGE else _smaller(part, image.size, 4 * size)
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
        if own:
            image.close()  # frees its memory before the next image is decoded
    if turn is not None:
        upright = upright.transpose(turn)
    side = min(upright.size)
    left, top = (upright.width - side) / 2, (upright.height - side) / 2
    box = (left, top, left + side, top + side)
    small = upright.resize((size, size), Image.Resampling.LANCZOS, box=box)
    return np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))


def _smaller(part: Callable[[Box], Image.Image], size: tuple[int, int], least: int) -> Image.Image:
    """Return the central square shrunk by averaging blocks, band by band, to at least `least` pixels a side.

    An image with fewer pixels a side is not shrunk.
    """
    factor = max(1, min(size) // least)
    side = min(size) // factor
    left, top = ((length - side * factor) // 2 for length in size)
    result = Image.new("RGB", (side, side))
    rows = max(1, BAND // (side * factor * factor))
    for row in range(0, side, rows):
        end = min(row + rows, side)
        band = part((left, top + row * factor, left + side * factor, top + end * factor))
        result.paste(band.reduce(factor), (0, row))
    return result


def _rgb_parts(image: Image.Image) -> Callable[[Box], Image.Image]:
    """Load an image, and return a function that crops a box from it as RGB."""
    coded = _coded(image)
    image.load()
    key = image.info.get("transparency")  # the transparent value, or the alphas of a palette
    if image.mode[0] in "IF":
        return _grey_parts(image, key)
    if image.mode not in MODES:
        raise ImageError(f"is of mode {image.mode}, which is not read; save it as a png in RGB")
    if coded == "RGB;16B" and isinstance(key, tuple):
        return _keyed_parts(image, key)
    if coded in ("L;2", "L;4") and isinstance(key, int):  # Pillow scales the values to 0..255, but not this one
        bits = int(coded[-1])
        key = (key & (2**bits - 1)) * 255 // (2**bits - 1)

    def part(box: Box) -> Image.Image:
        cut = image.crop(box)
        if key is not None:
            cut.info["transparency"] = key
        if cut.has_transparency_data:
            cut = cut.convert("RGBA")
            cut = Image.alpha_composite(Image.new("RGBA", cut.size, "white"), cut)
        return cut.convert("RGB")

    return part


def _coded(image: Image.Image) -> str:
    """Return the pixel encoding of a PNG, such as L;2 for 2-bit grey; "" if unknown."""
    tiles = getattr(image, "tile", ())
    return tiles[0].args if image.format == "PNG" and tiles and isinstance(tiles[0].args, str) else ""


def _grey_parts(image: Image.Image, key: int | None) -> Callable[[Box], Image.Image]:
    """Return a function as `_rgb_parts` does, for grey images of 16 or 32 bits, or floats."""
    scaled = _scale(image)

    def part(box: Box) -> Image.Image:
        values = np.asarray(image.crop(box))
        grey = scaled(values).astype(np.uint8)
        if key is not None:
            grey[values == key] = 255
        return Image.fromarray(grey).convert("RGB")

    return part


def _scale(image: Image.Image) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that maps the values of a grey image to 0..255. Raises ImageError for an unknown range."""
    if image.mode.startswith("I;16") or image.format == "PPM" and image.mode == "I":  # the file says 16 bits
        return lambda values: values >> 8  # as Pillow does for 16-bit colours
    step = max(1, BAND // image.width)
    bands = [(0, top, image.width, min(top + step, image.height)) for top in range(0, image.height, step)]
    ends = [(values.min(), values.max()) for values in (np.asarray(image.crop(box)) for box in bands)]
    low, high = (float(end(of)) for end, of in zip((np.min, np.max), zip(*ends, strict=True), strict=True))  # NaN stays
    ranges = {255.0: 1.0, 65535.0: 1 / 257} if image.mode == "I" else {1.0: 255.0, 255.0: 1.0}
    for greatest, factor in ranges.items():
        if -0.001 <= low and high <= 1.001 * greatest if image.mode == "F" else 0 <= low and high <= greatest:
            return lambda values: np.rint(values * factor).clip(0, 255)
    kind, expected = ("integers", "0 to 255 or 65535") if image.mode == "I" else ("floats", "[0, 1] or [0, 255]")
    raise ImageError(f"has {kind} from {low:g} to {high:g}, expected {expected}; save it as an 8-bit png")


def _keyed_parts(image: Image.Image, key: tuple[int, ...]) -> Callable[[Box], Image.Image]:
    """Return a function as `_rgb_parts` does, for a PNG of 16-bit colours in which the colour `key` is transparent."""
    bytes_of = [(image, np.array(key) >> 8)]
    if filename := getattr(image, "filename", ""):  # Pillow keeps the upper bytes; as little-endian, the lower
        lower = Image.open(filename, formats=["PNG"])
        lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]
        bytes_of.append((lower, np.array(key) & 255))

    def part(box: Box) -> Image.Image:
        parts = [(np.asarray(each.crop(box)), value) for each, value in bytes_of]
        rgb = parts[0][0].copy()
        rgb[np.logical_and.reduce([(found == value).all(-1) for found, value in parts])] = 255
        return Image.fromarray(rgb)

    return part
