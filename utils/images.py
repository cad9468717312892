"""Image files to pixels, and the one pixel convention: float in [-1, 1] and uint8 in 0..255, RGB."""

import errno
import os
import stat
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.progress import progress

EXTENSIONS = (".png", ".jpg", ".jpeg", ".gif", ".webp")
OTHERS = (".heic", ".heif", ".avif", ".tif", ".tiff", ".bmp", ".jp2", ".jxl", ".svg", ".dng", ".cr2", ".nef", ".arw")
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")  # that the content may be, whatever the ending says
MAX_PIXELS = 100_000_000  # of one image: 300 MB as RGB

Image.MAX_IMAGE_PIXELS = None  # Pillow's own guard does not tell the size; `read_image` has MAX_PIXELS instead
warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged EXIF and the like, several lines each

Skipped = dict[str, list[tuple[str, str]]]  # folder that was scanned: (path, reason) of what was left out of it


class ImageError(ValueError):
    """An image file that cannot be read. The message is the reason, without the path, in one line."""


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Map uint8 pixels 0..255 to float32 in [-1, 1], in any shape; `to_uint8` takes them back exactly."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Map floats in [-1, 1] (others are clipped) to the nearest of the uint8 pixels 0..255, in any shape."""
    return ((images.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def find_images(folder: str | os.PathLike, *, deep: bool = True) -> tuple[list[Path], list[tuple[Path, str]]]:
    """List what is named like an image in `folder` (`deep`: and in the folders in it), without what is hidden.

    Links to folders in `folder` are not followed, and neither is `folder` where it is a link back to a folder that it
    lies in, so no circle of links is walked for ever.

    Returns:
        The paths, sorted; nothing says yet that they can be read. And (path, reason) of what is left out: folders, and
        pictures of kinds that are not read.

    Raises:
        ValueError: `folder` is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one with images ({extensions()})")
    if folder.is_symlink() and folder.absolute().parent.resolve().is_relative_to(folder.resolve()):
        return [], [(folder, "is a link back to a folder that it lies in")]
    paths: list[Path] = []
    left_out: list[tuple[Path, str]] = []

    def failed(error: OSError) -> None:
        left_out.append((Path(error.filename), _reason(error)))

    for place, folders, files in os.walk(folder, onerror=failed):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(place, name) for name in (*folders, *files) if is_image(Path(name))]
        others = [Path(place, name) for name in files if Path(name).suffix.lower() in OTHERS and name[0] != "."]
        left_out.extend((path, f"is a {path.suffix}; save it as png or jpg") for path in others)
        if not deep:
            break
        links = [Path(place, name) for name in folders if Path(place, name).is_symlink()]
        left_out.extend((path, "is a link to a folder, which is not followed") for path in links if not is_image(path))
    return sorted(paths), sorted(left_out)


def read_images(
    paths: Sequence[Path], size: int, most: int | None = None, workers: int | None = None
) -> tuple[list[np.ndarray], list[tuple[Path, str]]]:
    """Read images as `read_image` does, until there are `most` (None: all), by `workers` threads (None: a few a core).

    Returns those that can be read, in order, and (path, reason) of the others. Each path is tried once.
    """
    images: list[np.ndarray] = []
    left_out: list[tuple[Path, str]] = []
    most = len(paths) if most is None else most
    tried = 0
    with ThreadPoolExecutor(None if workers is None else max(1, workers)) as threads:
        while tried < len(paths) and len(images) < most:
            part = paths[tried : tried + most - len(images)]
            tried += len(part)
            results = threads.map(lambda path: _image_or_reason(path, size), part)
            for path, result in zip(part, progress(results, total=len(part), desc="images", unit="image"), strict=True):
                if isinstance(result, str):
                    left_out.append((path, result))
                else:
                    images.append(result)
    return images, left_out


def read_image(path: str | os.PathLike, size: int) -> np.ndarray:
    """Read one image as (3, size, size) uint8 RGB: its central square, resized by Lanczos.

    It is turned upright as its EXIF says; transparent pixels are laid over white, 16 bits scaled to 8; of an animation
    it is the first frame. The content decides what it is, not the ending.

    Raises:
        ImageError: the file is no image, damaged, may not be read, or has more than MAX_PIXELS pixels.
    """
    try:
        _check_file(path)
        with Image.open(path, formats=FORMATS) as file:  # reads the header alone
            return _pixels(file, size)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # a damaged file can raise nearly anything out of Pillow
        raise ImageError(_reason(error)) from error


def pixels_of(image: object, size: int) -> np.ndarray:
    """One image as `read_image` gives it, (3, size, size) uint8 RGB, from wherever it is.

    Args:
        image: a path; a PIL image; or a NumPy array or tensor, (H, W, 3) uint8 or (3, H, W) float in [-1, 1].
        size: side in pixels.

    Raises:
        ImageError: as for `read_image`, or anything else is given. Its message has no path and no number.
    """
    if isinstance(image, str | os.PathLike):
        if not os.path.lexists(image):
            raise ImageError("no such file")
        return read_image(image, size)
    if isinstance(image, Image.Image):
        try:
            return _pixels(image, size)
        except (ImageError, MemoryError):
            raise
        except Exception as error:  # its file is read only now
            raise ImageError(_reason(error)) from error
    return _pixels(Image.fromarray(_as_uint8(image).numpy()), size)


def _as_uint8(array: object) -> torch.Tensor:
    """(H, W, 3) uint8 of an array or tensor."""
    expected = "expected a path, a PIL image, or an array (H, W, 3) uint8 or (3, H, W) float in [-1, 1]"
    if not isinstance(array, np.ndarray | torch.Tensor):
        raise ImageError(f"is of type {type(array).__name__}, {expected}")
    kind = f"{tuple(array.shape)} {str(array.dtype).removeprefix('torch.')}"
    try:
        found = torch.as_tensor(np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array).detach().cpu()
    except TypeError:  # of types that torch lacks
        raise ImageError(f"is {kind}, {expected}") from None
    whole = found.ndim == 3 and found.numel()
    if whole and found.dtype == torch.uint8 and found.shape[2] == 3:
        return found.contiguous()
    if not (whole and found.is_floating_point() and found.shape[0] == 3):
        raise ImageError(f"is {kind}, {expected}")
    low, high = float(found.min()), float(found.max())
    if not -1.001 < low <= high < 1.001:  # refuses NaN, too
        raise ImageError(f"has values from {low:g} to {high:g}, expected [-1, 1]: 2 x - 1 of floats in [0, 1]")
    return to_uint8(found).permute(1, 2, 0).contiguous()


def _pixels(image: Image.Image, size: int) -> np.ndarray:
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"is {image.width} x {image.height} pixels, expected at most {MAX_PIXELS:,} in all")
    image = _as_rgb(ImageOps.exif_transpose(image))
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    square = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def describe(left_out: Sequence[tuple[Path, str]], root: Path) -> str:
    """How many images were left out, and the first, with its reason, as a path in `root`."""
    path, reason = left_out[0]
    return f"{len(left_out)} unreadable image(s), the first {shown(path.relative_to(root))}: {reason}"


def shown(path: str | os.PathLike) -> str:
    """A path as text that any UTF-8 file or terminal takes, in one line: other bytes as \\xe9, a line break as \\n."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _image_or_reason(path: Path, size: int) -> np.ndarray | str:
    try:
        return read_image(path, size)
    except ImageError as error:
        return str(error)


def _check_file(path: str | os.PathLike) -> None:
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise ImageError("is a folder, not an image")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("is no regular file")  # to open a pipe is to wait for ever
    if not status.st_size:
        raise ImageError("is empty (0 bytes)")


def _reason(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "may not be read; change its permissions (chmod u+r)"
    if isinstance(error, UnidentifiedImageError):
        return f"is no image ({', '.join(FORMATS)}), or damaged from its start"
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "is a symbolic link that leads in a circle"
    if isinstance(error, FileNotFoundError):
        return "is a link to a file that is not there"
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read ({error.strerror})"
    return f"is cut short or damaged ({text})"


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to white; of 16-bit colours it takes 8 itself
        pixels = np.asarray(image).clip(0, 65535).astype(np.uint16)
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
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
