"""Write predictions.csv, the labels of a user's own images, and its sheet, and never over a user's files."""

import csv
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils.atomic import atomic_file
from utils.images import shown, to_float, to_uint8
from utils.plots import MADE_BY, contact_sheet
from utils.run_log import SKIPPED, cell

PAGE = f"{MADE_BY}: predictions"  # written into the page of predictions, to recognise it
_AGAIN = "give another --out"
_LONGEST = 1 << 20  # bytes read at the start of a file


def check_place(path: Path, *folders: str | os.PathLike) -> None:
    """Raise ValueError, before any work, if predictions cannot be written at `path` or would replace other files.

    `path`, its sheet, its page and the skipped_images.csv beside it never replace a file that this program did not
    write. They may not be in `folders`, where the sheet would be one of the images.
    """
    if path.name == SKIPPED:
        raise ValueError(f"{shown(path)}: is where the images that cannot be read are listed; {_AGAIN}")
    try:
        for folder in map(Path, folders):
            if folder.is_dir() and path.parent.resolve().is_relative_to(folder.resolve()):
                raise ValueError(
                    f"{shown(path)}: lies in {shown(folder)}, where its sheet would be one of the images; {_AGAIN}"
                )
        ours = {path: _is_table, path.with_suffix(".png"): _is_sheet, path.with_suffix(".html"): _is_page,
                path.with_name(SKIPPED): _is_list}  # fmt: skip
        for file, is_ours in ours.items():
            if file.is_dir():
                raise ValueError(f"{shown(file)}: is a folder, expected room for a file; {_AGAIN}")
            if os.path.lexists(file) and not (file.is_file() and is_ours(file)):
                raise ValueError(
                    f"{shown(file)}: is there, and this program did not write it; move it away, or {_AGAIN}"
                )
            _check_writable(file)
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead in a circle
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"{shown(path)}: cannot be written ({reason}); {_AGAIN}") from error


def write_predictions(
    path: Path, paths: Sequence[Path], images: torch.Tensor, classes: Sequence[str], probabilities: np.ndarray,
    most: int,
) -> int:  # fmt: skip
    """Write the table at `path`, and beside it a PNG sheet of the surest images. Return the number on the sheet.

    Args:
        path: the CSV to write.
        paths: N paths of the images.
        images: (N, 3, H, W) uint8, RGB.
        classes: C names.
        probabilities: (N, C), each row summing to 1.
        most: greatest number of images on the sheet.
    """
    names = [shown(name) for name in classes]
    labels = [names[number] for number in probabilities.argmax(1)]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["path", "label", *(f"p_{name}" for name in names)])  # no class name equals another column
    for image, label, row in zip(paths, labels, probabilities, strict=True):
        table.writerow([cell(shown(image)), cell(label), *(f"{value:.6f}" for value in row)])
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())
    surest = probabilities.max(1).argsort(kind="stable")[::-1][:most]
    surest = sorted(surest, key=lambda i: labels[i])  # label by label, the surest first
    larger = to_uint8(torch.nn.functional.interpolate(to_float(images[surest]), (96, 96)))  # room for the text
    below = [f"{labels[i]:.10} {probabilities[i].max():.2f}" for i in surest]
    contact_sheet(larger, 10, path.with_suffix(".png"), below)
    return len(surest)


def _is_table(path: Path) -> bool:
    head = _head(path)
    return head[:2] == ["path", "label"] and len(head) > 3 and all(name.startswith("p_") for name in head[2:])


def _is_list(path: Path) -> bool:
    return _head(path) == ["path", "reason"]


def _is_sheet(path: Path) -> bool:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return image.info.get("Software") == MADE_BY
    except Exception:  # Pillow can raise nearly anything on a strange file
        return False


def _is_page(path: Path) -> bool:
    with open(path, "rb") as file:
        return f'content="{PAGE}"'.encode() in file.read(_LONGEST)


def _head(path: Path) -> list[str]:
    """Return the first row of a CSV file; [] for any other file."""
    with open(path, "rb") as file:
        line = file.readline(_LONGEST)
    try:
        return next(csv.reader([line.decode()]), [])
    except (ValueError, csv.Error):
        return []


def _check_writable(path: Path) -> None:
    """Raise OSError if no file of that name can be made in its folder, or in the nearest existing folder above it."""
    folder = path.parent
    while True:
        try:
            os.lstat(folder)
            break
        except FileNotFoundError:
            folder = folder.parent
    handle, name = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.")
    os.close(handle)
    os.unlink(name)
