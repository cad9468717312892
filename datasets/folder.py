"""Labelled images from folders."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from utils.images import Skipped, describe, extensions, find_images, read_images, shown
from utils.progress import progress


@dataclass(frozen=True)
class LabelledImages:
    """Images with their classes.

    Attributes:
        images: (N, 3, size, size) uint8, RGB.
        labels: (N,) int64, indices into `class_names`.
        class_names: the folder names, sorted.
        skipped: by folder that was read, (path, reason) of what was left out of it.
    """

    images: torch.Tensor
    labels: torch.Tensor
    class_names: list[str]
    skipped: Skipped = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Images of each class, by its name."""
        return dict(zip(self.class_names, self.labels.bincount(minlength=len(self.class_names)).tolist(), strict=True))


def load_split(
    root: str | os.PathLike,
    split: str,
    size: int,
    max_per_class: int | None = None,
    *,
    every_class: bool = False,
    workers: int | None = None,
) -> LabelledImages:
    """Read `<root>/<split>/<class>/*`, one folder a class, into memory.

    Files that cannot be read, and classes left without an image, are left out, and one line on stderr says so.

    Args:
        root: the data folder.
        split: the folder in it, such as meta_val; "" for the data folder itself.
        size: side of the images in pixels.
        max_per_class: read only the first of each class that can be read, by name; None reads all.
        every_class: refuse a class without a readable image.
        workers: threads that read; None: a few a core.

    Raises:
        ValueError: the folder is missing, or has no class with a readable image, or not `every_class` has one.
    """
    folder = Path(root) / split
    holds = f"it should hold one folder a class with images ({extensions()})"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; {holds}")
    class_folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    images: list[np.ndarray] = []
    labels: list[int] = []
    names: list[str] = []
    left_out: list[tuple[Path, str]] = []
    empty: list[Path] = []
    for class_folder in progress(class_folders, desc=f"reading {folder}", unit="class"):
        paths, not_searched = find_images(class_folder, deep=False)
        readable, unreadable = read_images(paths, size, max_per_class, workers)
        left_out += not_searched + unreadable
        if not readable:
            empty.append(class_folder)
            continue
        images.append(np.stack(readable))
        labels += [len(names)] * len(readable)
        names.append(class_folder.name)
    parts = []
    if left_out:
        parts.append(describe(left_out, folder))
    if empty:
        parts.append(f"{len(empty)} class(es) without an image, the first {shown(empty[0].name)}")
    what = f"left out {' and '.join(parts)}"
    refused = empty and (every_class or not names)
    if refused and any(path.is_dir() and find_images(path)[0] for path in empty[0].iterdir()):
        raise ValueError(
            f"{shown(empty[0])}: holds folders of pictures, expected pictures; give {shown(empty[0])} itself, if the "
            "folders in it are the classes"
        )
    if not names:
        raise ValueError(f"{shown(folder)}: has no class with a readable image; {holds}{f' ({what})' * bool(parts)}")
    if refused:
        raise ValueError(
            f"{shown(empty[0])}: is a class without a readable image; add one, or take the folder away ({what})"
        )
    if parts:
        print(f"{shown(folder)}: {what}", file=sys.stderr)
    left_out += [(path, "is a class folder without a readable image") for path in empty]
    skipped = {shown(folder): [(shown(path), reason) for path, reason in left_out]}
    return LabelledImages(torch.from_numpy(np.concatenate(images)), torch.tensor(labels), names, skipped)
