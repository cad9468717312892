"""A folder of images as one tensor in memory. A batch depends on the seed and the step alone."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from utils.class_folders import LeftOut, find_images, listing, require_folder
from utils.class_folders import class_folders as class_folders_of
from utils.images import Skipped, extensions, read_images, shown, to_float
from utils.progress import progress
from utils.seeding import generator

HOLDS = "--data_dir should hold images, or one folder of images per class"
TRAINING = ("meta_train", "train", "training")
SPLITS = {*TRAINING, "meta_val", "val", "valid", "validation", "meta_test", "test", "testing"}


@dataclass(frozen=True)
class TrainingImages:
    """The training images of a diffusion model.

    Attributes:
        images: (N, 3, H, W) uint8, RGB.
        labels: (N,) int64, indices into `class_names`.
        class_names: names of the class folders, in the order they were read.
        skipped: folder -> (path, reason) of each file left out of it.
    """

    images: torch.Tensor
    labels: torch.Tensor
    class_names: list[str]
    skipped: Skipped = field(default_factory=dict)

    def batch(
        self, size: int, step: int, seed: int, *, flip: bool, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw batch number `step`: images (size, 3, H, W) float in [-1, 1] and labels (size,), on `device`.

        Draw with replacement, from (seed, step) alone, so that a resumed run sees the same images.
        flip: mirror half of the images left to right.
        """
        rng = generator(seed, "batch", step)
        index = torch.randint(len(self.images), (size,), generator=rng)
        images = to_float(self.images[index])
        if flip:
            mirrored = torch.rand(size, generator=rng) < 0.5
            images[mirrored] = images[mirrored].flip(-1)
        # asynchronous: the next batch is sent while the GPU is still at work
        return images.to(device, non_blocking=True), self.labels[index].to(device, non_blocking=True)


def load_images(folder: str | os.PathLike, size: int, classes: Sequence[str] | None = None) -> TrainingImages:
    """Read every image in `folder` and its subfolders, cropped to a square of `size` pixels a side.

    classes: names of the folders directly in `folder` to read, in this order. None reads all; images directly in
    `folder` then form one more class, ".".
    Unreadable files are left out. If `classes` is None, so are folders without an image. A line on stderr counts them.
    Raises ValueError if the folder is missing, or if it or one of `classes` has no readable image. If `classes` is
    None, also if the folders in `folder` are splits, such as meta_train and meta_test.
    """
    root = Path(folder)
    if classes is None:
        folders, files, left_out = listing(require_folder(root, HOLDS))
        splits = [path.name for path in folders if path.name in SPLITS]
        if splits and len(splits) == len(folders) and (len(splits) > 1 or listing(folders[0])[0]):
            raise ValueError(
                f"{shown(root)}: holds splits ({', '.join(splits)}), and a model must not learn those to test on; "
                f"{_train_part(folders[0], folders)}"
            )
        found = {path.name: find_images(path) for path in folders} | {".": (files, left_out)}
    else:
        found = {name: find_images(root / name) for name in classes}
    images, labels, names = [], [], []
    everything = LeftOut()
    skipped: Skipped = {} if classes else {shown(root): []}  # listed before the folders in it
    for name, (paths, own) in progress(found.items(), desc=f"reading {root}", unit="class"):
        readable, unreadable = read_images(paths, size)
        own.add_unread(unreadable)
        if readable:
            images.append(np.stack(readable))
            labels += [len(names)] * len(readable)
            names.append(name)
        elif classes is not None:
            raise ValueError(_nothing(own, root / name))
        elif name != ".":
            own.empty.append(root / name)
        everything.add(own)
        skipped[shown(root / name)] = own.rows()
    if not images:
        raise ValueError(_nothing(everything, root))
    everything.say(root)
    return TrainingImages(torch.from_numpy(np.concatenate(images)), torch.tensor(labels), names, skipped)


def check_classes(folder: str | os.PathLike, classes: Sequence[str]) -> None:
    """Raise ValueError, as `load_images` would, if one of `classes` has no readable image. Reads one image of each."""
    for name in classes:
        paths, left_out = find_images(Path(folder) / name)
        readable, unreadable = read_images(paths, 1, most=1)
        left_out.add_unread(unreadable)
        if not readable:
            raise ValueError(_nothing(left_out, Path(folder) / name))


def class_folders(folder: str | os.PathLike) -> list[str]:
    """Return the names of the folders directly in `folder`, sorted; a line on stderr counts what is left out.

    Raises ValueError if `folder` is missing, or if a folder in it is empty or holds folders of images.
    """
    found, left_out = class_folders_of(folder, HOLDS, _train_part)
    left_out.say(Path(folder))
    return [path.name for path in found]


def _train_part(nested: Path, folders: list[Path]) -> str:
    """Return the advice if classes are a level deeper: train on the training split, if there is one."""
    part = next((path for name in TRAINING for path in folders if path.name == name), nested)
    return f"give --data_dir {shown(part)}, if the folders in it are the classes"


def _nothing(left_out: LeftOut, folder: Path) -> str:
    """Return the message that `folder` has no readable image, with the reason."""
    if not left_out.images:
        return f"{shown(folder)}: holds no images; expected some ({extensions()})"
    path, reason = min(left_out.images)
    return (
        f"{shown(folder)}: got no readable image among {len(left_out.images)}, the first "
        f"{shown(path.relative_to(folder))}: {reason}; give a folder of intact images"
    )
