"""Labelled images from folders."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from utils.class_folders import class_folders, place_with, require_folder
from utils.images import Skipped, extensions, read_images, shown
from utils.progress import progress


@dataclass(frozen=True)
class LabelledImages:
    """Images with their classes.

    Attributes:
        images: (N, 3, size, size) uint8, RGB.
        labels: (N,) int64, indices into `class_names`.
        class_names: names of the classes; for folders, their sorted names.
        skipped: folder -> (path, reason) of each file left out of it.
    """

    images: torch.Tensor
    labels: torch.Tensor
    class_names: list[str]
    skipped: Skipped = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Return the number of images per class name."""
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
    """Read `<root>/<split>/<class>/*`, one folder per class, into memory.

    Unreadable files, and classes without a readable image, are left out; one line on stderr counts them.

    Args:
        root: the data folder.
        split: the folder in it, such as meta_val; "" for the data folder itself.
        size: side of the images in pixels.
        max_per_class: readable images to read per class, the first by name; None reads all.
        every_class: raise for a class without a readable image instead of leaving it out.
        workers: reading threads; None uses a few per core.

    Raises:
        ValueError: the folder is missing, or no class has a readable image, or with `every_class` some class has none;
            or a class folder is empty or holds folders of images.
    """
    folder = Path(root) / split
    holds = f"it should hold one folder per class with images ({extensions()})"
    if Path(root).is_file():
        require_folder(root, f"expected one with {split}" if split else holds)
    if split and not folder.exists() and (near := place_with(Path(root), split)):
        raise ValueError(f"{shown(folder)}: no such folder; give {shown(near)}, which has one")

    def cure(nested: Path, _: list[Path]) -> str:
        if split:
            return f"move the folders in it up to {shown(folder)}, if they are the classes"
        return f"give {shown(nested)} itself, if the folders in it are the classes"

    found, left_out = class_folders(folder, holds, cure)
    images: list[np.ndarray] = []
    labels: list[int] = []
    names: list[str] = []
    for class_folder, (paths, inner) in progress(found.items(), desc=f"reading {folder}", unit="class"):
        readable, unreadable = read_images(paths, size, max_per_class, workers)
        left_out.add(inner)
        left_out.add_unread(unreadable)
        if not readable:
            left_out.empty.append(class_folder)
            continue
        images.append(np.stack(readable))
        labels += [len(names)] * len(readable)
        names.append(class_folder.name)
    what = left_out.line(folder)
    if not names:
        raise ValueError(f"{shown(folder)}: has no class with a readable image; {holds}{f' ({what})' * bool(what)}")
    if left_out.empty and every_class:
        first = shown(left_out.empty[0])
        raise ValueError(f"{first}: is a class without a readable image; add one, or take the folder away ({what})")
    left_out.say(folder)
    return LabelledImages(
        torch.from_numpy(np.concatenate(images)), torch.tensor(labels), names, {shown(folder): left_out.rows()}
    )
