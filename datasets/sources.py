"""The real images of a scenario: for validation, for testing, and for the real-data reference."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from datasets.folder import LabelledImages, load_split
from datasets.fontchars import load_fontchars
from datasets.glyphs import make_split
from utils.class_folders import is_leftover, require_folder

GLYPHS_PER_CLASS = 100  # images per class to draw episodes from
# Sets that need no folder: name -> function (split, images per class or None, size) -> images.
EMBEDDED: dict[str, Callable[[str, int | None, int], LabelledImages]] = {
    "glyphs": lambda split, per_class, size: make_split(split, per_class or GLYPHS_PER_CLASS, size=size),
    "fontchars": lambda split, per_class, size: load_fontchars(split, per_class, size=size),
}


def embedded(dataset: str, roots: Sequence[Path], split: str) -> bool:
    """Return whether the images of a split are `EMBEDDED`: none of the data folders has that split."""
    return dataset in EMBEDDED and not any((root / split).is_dir() for root in roots)


def load_real(
    dataset: str,
    roots: Sequence[Path],
    split: str,
    size: int,
    per_class: int | None = None,
    workers: int | None = None,
) -> LabelledImages:
    """Return the images of a split, read from <root>/<split>, or those of an `EMBEDDED` set.

    roots: one data folder per domain; with several, classes are named <root's name>/<class>.
    size: side in pixels; per_class: most images per class, None for all (100 for embedded glyphs); workers: threads.
    An `EMBEDDED` set is used if each root is an empty folder, or data/<dataset> without the split.
    Raises ValueError for a folder that is missing, empty or without the split in any other case.
    """
    if embedded(dataset, roots, split):
        instead = f"leave --data-root out to use the images of {dataset}"
        for root in roots:
            if root == Path("data", dataset):
                continue
            if any(not is_leftover(path.name) for path in require_folder(root, instead).iterdir()):
                raise ValueError(f"{root}: got no folder {split}; add it, or {instead}")
        return EMBEDDED[dataset](split, per_class, size)
    domains = [load_split(root, split, size, per_class, workers=workers) for root in roots]
    if len(domains) == 1:
        return domains[0]
    images, labels, names, skipped = [], [], [], {}
    for root, domain in zip(roots, domains, strict=True):
        images.append(domain.images)
        labels.append(domain.labels + len(names))
        names += [f"{root.name}/{name}" for name in domain.class_names]
        skipped |= domain.skipped
    return LabelledImages(torch.cat(images), torch.cat(labels), names, skipped)
