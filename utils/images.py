"""Read image files as RGB pixels: uint8 in 0..255, or float in [-1, 1], the convention of all modules."""

import errno
import os
import stat
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from utils.pixels import ImageError, square
from utils.progress import progress

# Accepted contents, whatever the file's ending: all formats that Pillow decodes itself, except those that run a program
# (EPS), contain a file of another format and size (ICO, ICNS, BLP, IPTC), or that a text file can pass for (IM).
FORMATS = (
    "PNG", "JPEG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "PCX", "SGI", "SUN",
    "QOI", "DDS", "PSD", "MSP", "XBM", "XPM", "SPIDER", "FITS",
)  # fmt: skip
UNREAD = {".heic", ".heif", ".jxl", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"}
NO_IMAGE = "is no image"  # the reason for a file that is not an image and not named like one

Image.MAX_IMAGE_PIXELS = None  # `square` enforces MAX_PIXELS instead of Pillow's own limit
warnings.filterwarnings("ignore", module=r"PIL\.")  # Pillow prints several lines for each damaged EXIF

Skipped = dict[str, list[tuple[str, str]]]  # scanned folder -> (path, reason) of each file left out


class _NotAnImage(ImageError):
    """The file's content is not an image."""


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Map uint8 pixels 0..255 of any shape to float32 in [-1, 1]; `to_uint8` inverts this exactly."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Map floats in [-1, 1] of any shape to the nearest uint8 pixels 0..255; other values are clipped."""
    return ((images.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """Return float images (N, 3, H, W) with H = W at `size` pixels a side, resampled bilinearly with antialiasing."""
    if images.shape[-1] == size:
        return images
    return torch.nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)


def read_images(
    paths: Sequence[Path], size: int, most: int | None = None, workers: int | None = None
) -> tuple[list[np.ndarray], list[tuple[Path, str]]]:
    """Read images as `read_image` does, until there are `most`. Each path is tried once.

    Args:
        paths: files, in order.
        size: side in pixels.
        most: number of images to read; None reads all.
        workers: threads; None uses a few per core.

    Returns:
        The readable images in order, each (3, size, size) uint8. And (path, reason) of the unreadable ones; the reason
        is NO_IMAGE if neither content nor name is that of an image.
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
    """Read the central square of one image as (3, size, size) uint8 RGB, as `square` does.

    The content decides the format, not the ending. For an animation, the first frame is read.

    Raises:
        ImageError: as for `square`; or the file is not an image, is damaged, or may not be read.
    """
    try:
        _check_file(path)
        with Image.open(path, formats=FORMATS) as file:  # reads only the header
            return square(file, size, own=True)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # a damaged file can raise nearly anything out of Pillow
        kind = _NotAnImage if isinstance(error, UnidentifiedImageError) else ImageError
        raise kind(why(error)) from error


def pixels_of(image: object, size: int) -> np.ndarray:
    """Return the central square of one image as (3, size, size) uint8 RGB.

    Args:
        image: a path; a PIL image; or a NumPy array or tensor, (H, W, 3) uint8 or (3, H, W) float in [-1, 1].
        size: side in pixels.

    Raises:
        ImageError: as for `read_image`, or `image` is anything else. The message does not name the path.
    """
    if isinstance(image, str | os.PathLike):
        if not os.path.lexists(image):
            raise ImageError("no such file")
        return read_image(image, size)
    if isinstance(image, Image.Image):
        try:
            return square(image, size)
        except (ImageError, MemoryError):
            raise
        except Exception as error:  # Pillow reads the file only now
            raise ImageError(why(error)) from error
    return square(Image.fromarray(_as_uint8(image).numpy()), size)


def _as_uint8(array: object) -> torch.Tensor:
    """Return an array or tensor as (H, W, 3) uint8."""
    expected = "expected a path, a PIL image, or an array (H, W, 3) uint8 or (3, H, W) float in [-1, 1]"
    if not isinstance(array, np.ndarray | torch.Tensor):
        raise ImageError(f"is of type {type(array).__name__}, {expected}")
    kind = f"{tuple(array.shape)} {str(array.dtype).removeprefix('torch.')}"
    try:
        found = torch.as_tensor(np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array).detach().cpu()
    except TypeError:  # a type that torch lacks
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


def shown(path: str | os.PathLike) -> str:
    """Return a path as one line of printable text: other bytes as \\xe9, a line break as \\n."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _image_or_reason(path: Path, size: int) -> np.ndarray | str:
    try:
        return read_image(path, size)
    except _NotAnImage as error:
        if path.suffix.lower() in UNREAD:
            return f"is a {path.suffix}; save it as png or jpg"
        return str(error) if is_named_like_an_image(path) else NO_IMAGE
    except ImageError as error:
        return str(error)


def _check_file(path: str | os.PathLike) -> None:
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise ImageError("is a folder, not an image")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("is no regular file")  # opening a pipe would wait for ever
    if not status.st_size:
        raise _NotAnImage("is empty (0 bytes)")


def why(error: Exception) -> str:
    """Return the reason why a file or folder cannot be read, in one line without its path."""
    if isinstance(error, PermissionError):
        return "may not be read; change its permissions (chmod u+r)"
    if isinstance(error, UnidentifiedImageError):
        return f"is no image ({', '.join(FORMATS[:9])} and so on), or damaged from its start"
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "is a symbolic link that leads in a circle"
    if isinstance(error, FileNotFoundError):
        return "is a link to a file that is not there"
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read ({error.strerror})"
    return f"is cut short or damaged ({text})"


def is_named_like_an_image(path: Path) -> bool:
    """Return whether a path has the ending of an image, of a readable format or not, or no ending."""
    ending = path.suffix.lower()
    return not ending or ending in UNREAD or ending in Image.registered_extensions()


def opens(path: str | os.PathLike) -> bool:
    """Return whether a file starts like an image. The rest is not read."""
    try:
        _check_file(path)
        with Image.open(path, formats=FORMATS):
            return True
    except Exception:  # a damaged file can raise nearly anything out of Pillow
        return False


def extensions() -> str:
    """Return the usual endings of images, for messages."""
    return "png, jpg, jpeg, gif, webp and others"
