"""fontchars: real characters of open fonts, a labelled image set that ships with the program.

A class is a character; each of its images is that character in one style of one font. docs/fonts.md lists the fonts and
their licences.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datasets.folder import LabelledImages

FILE = Path(__file__).with_name("fontchars.npz")
SPLITS = ("meta_train", "meta_val", "meta_test")  # 30 base, 9 validation and 14 novel classes


def read_split(split: str) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """Read a split from the file, sorted by class, then by font.

    Returns images (N, 32, 32) uint8 in [0, 255], black on white; labels (N,) int64; the class names; and the font name
    of each image. Raises ValueError for an unknown split or a damaged file.
    """
    if split not in SPLITS:
        raise ValueError(f"got fontchars split {split!r}, expected one of {', '.join(SPLITS)}")
    try:
        with np.load(FILE, allow_pickle=False) as arrays:
            parts = (arrays[f"{split}_{part}"] for part in ("images", "labels", "names", "fonts"))
            images, labels, names, fonts = parts
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{FILE}: is missing or damaged ({error}); get it from the repository again") from error
    return images, labels, names.tolist(), fonts.tolist()


def load_fontchars(split: str, per_class: int | None = None, *, size: int = 32) -> LabelledImages:
    """Load a split as RGB.

    per_class: number of images per class, the first by font name; None for all. size: side in pixels; if not 32, images
    are resized by Lanczos, as images from folders are.
    Returns images (N, 3, size, size) uint8 in [0, 255] and labels (N,) int64. Raises ValueError as `read_split` does.
    """
    images, labels, names, _ = read_split(split)
    if per_class is not None:
        kept = np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in range(len(names))])
        images, labels = images[kept], labels[kept]
    if size != images.shape[-1]:
        resample = Image.Resampling.LANCZOS
        images = np.stack([np.asarray(Image.fromarray(image).resize((size, size), resample)) for image in images])
    return LabelledImages(torch.from_numpy(images)[:, None].repeat(1, 3, 1, 1), torch.from_numpy(labels), names)
