"""The real images of a scenario: for validation, for testing, and for the real-data reference."""

from pathlib import Path

from datasets.folder import LabelledImages, load_split
from datasets.glyphs import make_split

GLYPHS_PER_CLASS = 100  # images a class to draw episodes from


def load_real(dataset: str, root: Path, split: str, size: int, per_class: int | None = None) -> LabelledImages:
    """Images of a split: drawn where `dataset` is glyphs (unless `root` is there), else read from <root>/<split>.

    size: pixels a side; per_class: images a class at most, None for all (100 a class of glyphs).
    Raises ValueError where the folder is missing or empty.
    """
    if dataset == "glyphs" and not (root / split).is_dir():
        return make_split(split, per_class or GLYPHS_PER_CLASS, size=size)
    return load_split(root, split, size, per_class)
