"""Image files to pixels, and the one pixel convention: float in [-1, 1] and uint8 in 0..255, RGB."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

EXTENSIONS = (".png", ".jpg", ".jpeg", ".gif", ".webp")
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)  # what Pillow raises


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Map uint8 pixels 0..255 to float32 in [-1, 1], in any shape; `to_uint8` takes them back exactly."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Map floats in [-1, 1] (others are clipped) to the nearest of the uint8 pixels 0..255, in any shape."""
    return ((images.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def image_paths(folder: str | os.PathLike) -> list[Path]:
    """List the image files in `folder` and the folders in it, sorted by path, without hidden ones.

    Raises:
        ValueError: `folder` is missing or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one with images ({extensions()})")
    paths = sorted(path for path in folder.rglob("*") if is_image(path.relative_to(folder)) and path.is_file())
    if not paths:
        raise ValueError(f"{folder}: holds no images; expected files that end in {extensions()}")
    return paths


def read_image(path: str | os.PathLike, size: int) -> np.ndarray:
    """Read one image as (3, size, size) uint8 RGB: its central square, resized by Lanczos.

    Transparent pixels are laid over white. Raises what Pillow raises where the file is no image.
    """
    with Image.open(path) as file:
        image = _as_rgb(ImageOps.exif_transpose(file))
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    square = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to white
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def is_image(relative: Path) -> bool:
    """Whether a path, relative to the folder searched, ends like an image and no part of it is hidden."""
    return relative.suffix.lower() in EXTENSIONS and not any(part.startswith(".") for part in relative.parts)


def extensions() -> str:
    """The file endings that are read, for messages."""
    return ", ".join(extension[1:] for extension in EXTENSIONS)
