"""Labelled images from folders."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from utils.images import UNREADABLE, extensions, is_image, read_image


@dataclass(frozen=True)
class LabelledImages:
    """Images with their classes.

    Attributes:
        images: (N, 3, size, size) uint8, RGB.
        labels: (N,) int64, indices into `class_names`.
        class_names: the folder names, sorted.
    """

    images: torch.Tensor
    labels: torch.Tensor
    class_names: list[str]


def load_split(root: str | os.PathLike, split: str, size: int, max_per_class: int | None = None) -> LabelledImages:
    """Read `<root>/<split>/<class>/*`, one folder a class, into memory.

    Files that cannot be read, and classes left without an image, are left out, and one line on stderr says so.

    Args:
        root: the data folder.
        split: the folder in it, such as meta_val.
        size: side of the images in pixels.
        max_per_class: read only the first of each class, by name; None reads all.

    Raises:
        ValueError: the folder is missing, or has no class with a readable image.
    """
    folder = Path(root) / split
    holds = f"it should hold one folder a class with images ({extensions()})"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; {holds}")
    class_folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    images: list[np.ndarray] = []
    labels: list[int] = []
    names: list[str] = []
    unreadable: list[Path] = []
    empty: list[str] = []
    with ThreadPoolExecutor() as pool:
        for class_folder in class_folders:
            paths = sorted(path for path in class_folder.iterdir() if is_image(Path(path.name)) and path.is_file())
            paths = paths[:max_per_class]
            pictures = list(pool.map(lambda path: _read_or_none(path, size), paths))
            unreadable += [path for path, picture in zip(paths, pictures, strict=True) if picture is None]
            readable = [picture for picture in pictures if picture is not None]
            if not readable:
                empty.append(class_folder.name)
                continue
            images.append(np.stack(readable))
            labels += [len(names)] * len(readable)
            names.append(class_folder.name)
    if not names:
        raise ValueError(f"{folder}: has no class with a readable image; {holds}")
    _report(folder, unreadable, empty)
    return LabelledImages(torch.from_numpy(np.concatenate(images)), torch.tensor(labels), names)


def _report(folder: Path, unreadable: list[Path], empty: list[str]) -> None:
    parts = []
    if unreadable:
        parts.append(f"{len(unreadable)} unreadable image(s), the first {unreadable[0].relative_to(folder)}")
    if empty:
        parts.append(f"{len(empty)} class(es) without an image, the first {empty[0]}")
    if parts:
        print(f"{folder}: left out {' and '.join(parts)}", file=sys.stderr)


def _read_or_none(path: Path, size: int) -> np.ndarray | None:
    try:
        return read_image(path, size)
    except UNREADABLE:
        return None
