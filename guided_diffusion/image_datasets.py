"""A folder of images as one tensor in memory, with batches that depend on the step alone."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from utils.images import Skipped, describe, extensions, find_images, read_images, shown, to_float
from utils.progress import progress
from utils.seeding import generator


@dataclass(frozen=True)
class TrainingImages:
    """What a diffusion model is trained on.

    Attributes:
        images: (N, 3, H, W) uint8, RGB.
        labels: (N,) int64, the place of an image's class folder in `class_names`.
        class_names: the names of the class folders, sorted.
        skipped: by folder that was read, (path, reason) of what was left out of it.
    """

    images: torch.Tensor
    labels: torch.Tensor
    class_names: list[str]
    skipped: Skipped = field(default_factory=dict)

    def batch(
        self, size: int, step: int, seed: int, *, flip: bool, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch number `step`: images (size, 3, H, W) float in [-1, 1] and labels (size,), on `device`.

        Drawn with replacement from (seed, step) alone, so that a run that is taken up again sees the same ones.
        flip: mirror half of the images left to right.
        """
        rng = generator(seed, "batch", step)
        index = torch.randint(len(self.images), (size,), generator=rng)
        images = to_float(self.images[index])
        if flip:
            mirrored = torch.rand(size, generator=rng) < 0.5
            images[mirrored] = images[mirrored].flip(-1)
        return images.to(device), self.labels[index].to(device)


def load_images(folder: str | os.PathLike, size: int, classes: Sequence[str] | None = None) -> TrainingImages:
    """Read every image (png, jpg, jpeg, gif, webp) in `folder` and its subfolders, cropped to a square of `size`.

    classes: names of the folders directly in `folder` to read, in this order; None reads all that there are, and
    images directly in `folder` are one more class, ".".
    Files that cannot be read are left out, and one line on stderr counts them; so are classes left without an image
    where `classes` does not ask for them.
    Raises ValueError where there is no folder or no readable image, also of one class that is asked for.
    """
    root = Path(folder)
    found = {name: find_images(root / name) for name in (class_folders(root) if classes is None else classes)}
    if classes is None:
        loose, _ = find_images(root, deep=False)
        found["."] = [path for path in loose if not path.is_dir()], []
    images, labels, names, left_out = [], [], [], []
    skipped: Skipped = {} if classes else {shown(root): []}  # first, as what is in it comes after
    for name, (paths, not_searched) in progress(found.items(), desc=f"reading {root}", unit="class"):
        readable, unreadable = read_images(paths, size)
        own = not_searched + unreadable
        left_out += own
        if readable:
            images.append(np.stack(readable))
            labels += [len(names)] * len(readable)
            names.append(name)
        elif classes is not None:
            raise ValueError(_nothing(own, root / name))
        elif name != ".":
            own = [*own, (root / name, "is a class folder without a readable image")]
        skipped[shown(root / name)] = [(shown(path), reason) for path, reason in own]
    if not images:
        raise ValueError(_nothing(left_out, root))
    if left_out:
        print(f"{shown(root)}: left out {describe(left_out, root)}", file=sys.stderr)
    return TrainingImages(torch.from_numpy(np.concatenate(images)), torch.tensor(labels), names, skipped)


def check_classes(folder: str | os.PathLike, classes: Sequence[str]) -> None:
    """Raise ValueError, as `load_images` will, where one of `classes` has no readable image; one of each is read."""
    for name in classes:
        paths, not_searched = find_images(Path(folder) / name)
        readable, unreadable = read_images(paths, 1, most=1)
        if not readable:
            raise ValueError(_nothing(not_searched + unreadable, Path(folder) / name))


def class_folders(folder: str | os.PathLike) -> list[str]:
    """Names of the folders directly in `folder`, sorted. Raises ValueError where there is no such folder."""
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; --data_dir should hold images, or one folder of images a class")
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _nothing(left_out: list[tuple[Path, str]], folder: Path) -> str:
    """What an error says where `folder` has no readable image."""
    if not left_out:
        return f"{shown(folder)}: holds no images; expected files that end in {extensions()}"
    path, reason = left_out[0]
    return (
        f"{shown(folder)}: got no readable image among {len(left_out)}, the first {shown(path.relative_to(folder))}: "
        f"{reason}; give a folder of intact images"
    )
