"""A folder of images as one tensor in memory, with batches that depend on the step alone."""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from utils.images import UNREADABLE, image_paths, is_image, read_image, to_float
from utils.seeding import generator


@dataclass(frozen=True)
class TrainingImages:
    """What a diffusion model is trained on.

    Attributes:
        images: (N, 3, H, W) uint8, RGB.
        labels: (N,) int64, the place of an image's class folder in `class_names`.
        class_names: the names of the class folders, sorted.
    """

    images: torch.Tensor
    labels: torch.Tensor
    class_names: list[str]

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
    Files that cannot be read are left out, and one line on stderr counts them.
    Raises ValueError where there is no folder or no readable image.
    """
    root = Path(folder)
    found = {name: image_paths(root / name) for name in (class_folders(root) if classes is None else classes)}
    if classes is None:
        loose = sorted(path for path in root.iterdir() if is_image(Path(path.name)) and path.is_file())
        if loose or not found:
            found["."] = loose or image_paths(root)
    images, labels, broken = [], [], []
    with ThreadPoolExecutor() as threads:
        for label, paths in enumerate(found.values()):
            for path, image in zip(paths, threads.map(lambda path: _read(path, size), paths), strict=True):
                if image is None:
                    broken.append(path)
                else:
                    images.append(image)
                    labels.append(label)
    if broken:
        print(f"{root}: left out {len(broken)} unreadable image(s), the first {broken[0]}", file=sys.stderr)
    if not images:
        raise ValueError(f"{root}: got no readable image among {len(broken)}; give a folder of intact images")
    return TrainingImages(torch.from_numpy(np.stack(images)), torch.tensor(labels), list(found))


def class_folders(folder: str | os.PathLike) -> list[str]:
    """Names of the folders directly in `folder`, sorted. Raises ValueError where there is no such folder."""
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; --data_dir should hold images, or one folder of images a class")
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _read(path: Path, size: int) -> np.ndarray | None:
    try:
        return read_image(path, size)
    except UNREADABLE:
        return None
