"""The images of a report, put into the page itself."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, features

from report.folder import Round

CLASSES = 20  # at most, of a contact sheet
IMAGES = 6  # per class and round, at most
MOST = 800  # images of a contact sheet
ROUNDS = 10  # shown side by side, at most
PAIRED = 10  # classes that are shown guided and unguided
_TILE = 84  # pixels of an image, at most
_GAP = 2
_GRID = (360, 200)  # pixels of a pool model's samples, at most
_MANY = 200_000_000  # pixels that no picture of a run has


def data_uri(image: Image.Image) -> str:
    """Return the image itself as an address."""
    file = io.BytesIO()
    if features.check("webp"):
        image.save(file, "WEBP", quality=90, use_sharp_yuv=True)
    else:
        image.save(file, "PNG")
    kind = "webp" if features.check("webp") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def strip(images: np.ndarray) -> Image.Image:
    """Return images (N, 3, H, W) uint8 side by side, with clear gaps."""
    side = min(_TILE, images.shape[-1])
    sheet = Image.new("RGBA", (len(images) * (side + _GAP) - _GAP, side))
    for index, pixels in enumerate(images):
        sheet.paste(picture(pixels, side), (index * (side + _GAP), 0))
    return sheet


def picture(pixels: np.ndarray, side: int = _TILE) -> Image.Image:
    """Return one image (3, H, W) uint8, no larger than `side`."""
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return image.resize((side, side), Image.Resampling.LANCZOS) if image.width > side else image


def samples(path: Path) -> Image.Image:
    """Return the grid of samples that a pool model's training left, made small. Raise ValueError for a huge one."""
    with Image.open(path, formats=("PNG",)) as file:
        if file.width * file.height > _MANY:
            raise ValueError(f"{path}: is {file.width} x {file.height} pixels")
        image = file.convert("RGB")
    image.thumbnail(_GRID, Image.Resampling.LANCZOS)
    return image


def arrays(each: Round) -> tuple[np.ndarray, np.ndarray]:
    """Return the images (N, 3, S, S) uint8 and labels (N,) of a round, read from the disk only if they are used.

    Raises ValueError for other shapes or types.
    """
    images, labels = (
        np.load(path, mmap_mode="r", allow_pickle=False) for path in (each.folder / "images.npy", each.labels)
    )
    _check(images, 4)
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{each.folder}: got {labels.shape} labels for {len(images)} images")
    return images, labels


def shown_rounds(rounds: Sequence[Round]) -> list[Round]:
    """Return all rounds, or of many the first, the last and some between."""
    return [rounds[i] for i in spread(len(rounds), ROUNDS)]


def contact_sheet(rounds: Sequence[Round]) -> tuple[list[int], list[list[Image.Image | None]]]:
    """Return some classes, spread over all that have images, and for each a strip of its first images per round."""
    data = [arrays(each) for each in rounds]
    known = np.unique(data[-1][1])
    classes = [int(known[i]) for i in spread(len(known), CLASSES)]
    most = max(1, min(IMAGES, MOST // max(1, len(classes) * len(rounds))))
    rows = []
    for c in classes:
        chosen = [(images, np.flatnonzero(labels == c)[:most]) for images, labels in data]
        rows.append([strip(images[index]) if len(index) else None for images, index in chosen])
    return classes, rows


def pairs(guided: Round, unguided: Round) -> list[tuple[int, list[tuple[Image.Image, Image.Image]]]]:
    """Return for some classes of a guided round its first images: (class, [(unguided, guided) from the same noise])."""
    images, labels = arrays(guided)
    before, _ = arrays(unguided)
    if before.shape != images.shape:
        raise ValueError(f"{unguided.folder}: got images {before.shape}, expected {images.shape}")
    known = np.unique(labels)
    chosen = [int(known[i]) for i in spread(len(known), PAIRED)]
    return [
        (c, [(picture(before[i]), picture(images[i])) for i in np.flatnonzero(labels == c)[:IMAGES]]) for c in chosen
    ]


def mixes(path: Path) -> list[list[tuple[Image.Image, Image.Image, Image.Image, float]]]:
    """Return the mixes in mixes.npz by pool model: (x_a, x_b, mix, share of x_a). Raise ValueError for another file."""
    with np.load(path, allow_pickle=False) as file:
        a, b, mix, share = (file[name] for name in ("x_a", "x_b", "mix", "share"))
    for images in (a, b, mix):
        _check(images, 5)
    if not a.shape == b.shape == mix.shape or share.shape != a.shape[:2]:
        raise ValueError(f"{path}: got mixes {mix.shape} of {a.shape}, {b.shape} and {share.shape}")
    return [
        [(picture(a[m, k]), picture(b[m, k]), picture(mix[m, k]), float(share[m, k])) for k in range(a.shape[1])]
        for m in range(len(a))
    ]


def spread(count: int, most: int) -> list[int]:
    """Return the numbers 0 to count - 1, or `most` of them, with the first and the last."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def _check(images: np.ndarray, axes: int) -> None:
    if images.dtype != np.uint8 or images.ndim != axes or images.shape[-3] != 3 or images.shape[-1] != images.shape[-2]:
        raise ValueError(f"got {images.dtype} images {images.shape}, expected uint8 (..., 3, S, S)")
