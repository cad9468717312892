"""Read the usual copies of CIFAR-100 and miniImageNet as images by class: folders, csv lists, pickled arrays.

An image is the path of an image file or an array (H, W, 3) uint8, RGB. Every reader checks the classes and the number
of images against the published ones (datasets.published) and raises a one-line ValueError if they differ.
"""

import csv
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datasets import published
from datasets.plain_pickle import read_plain_pickle
from utils.class_folders import LeftOut, find_images, listing
from utils.images import Skipped, opens, shown

ImageSource = Path | np.ndarray
ImagesByClass = dict[str, Sequence[ImageSource]]  # class name -> its images, in a fixed order

PLACES = (".", "images", "data", "train", "val", "test", "meta_train", "meta_val", "meta_test")
USUAL = {".png", ".jpg", ".jpeg", ".gif", ".webp"}  # endings trusted without opening the file
CACHE_SIDE = 84  # pixels


def class_folders(root: Path, names: Collection[str], skipped: Skipped) -> ImagesByClass:
    """Find the image files of the class folders `names` in `root` or in its folders PLACES.

    A class in several places (such as train and test of CIFAR-100) has the images of all of them. Other files are left
    out, counted in one line on stderr, and added to `skipped`.
    """
    found: ImagesByClass = {}
    left_out = LeftOut()
    for name in names:
        found[name] = []
        for folder in _folders(root, name):
            paths, inner = find_images(folder, deep=False)
            others = {path for path in paths if path.suffix.lower() not in USUAL and not opens(path)}
            inner.others += sorted(others)
            found[name] += [path for path in paths if path not in others]
            left_out.add(inner)
    _check(root, found, "expected class folders in it, or in its images, data, train, val and test")
    left_out.say(root)
    skipped[shown(root)] = left_out.rows()
    return found


def check_level(root: Path, names: Collection[str], files: Collection[str]) -> None:
    """Raise ValueError if a folder above or below `root` has more of the data set's classes, and name that folder.

    names: the classes; files: names of files each of which stands for all classes.
    """

    def has(folder: Path) -> int:
        whole = any((folder / file).is_file() for file in files)
        return len(names) if whole else sum(bool(_folders(folder, name)) for name in names)

    inner = [folder for folder in listing(root)[0] if folder.name not in names]
    near = [root.parent, *inner, *(below for folder in inner for below in listing(folder)[0])]
    best = max(near, key=has)
    if has(best) > (there := has(root)):
        raise ValueError(f"{root}: got {there} of {len(names)} classes, {best} has {has(best)}: give --from {best}")


def _folders(root: Path, name: str) -> list[Path]:
    return [root / place / name for place in PLACES if (root / place / name).is_dir()]


def csv_lists(root: Path, classes: Mapping[str, Collection[str]]) -> ImagesByClass:
    """Find the image files that train.csv, val.csv and test.csv in `root` list (columns filename and label).

    Images may be in `root` or its folder images, directly or in class folders, or in class folders of the split.
    """
    found: ImagesByClass = {}
    missing: list[str] = []
    for split, names in classes.items():
        path = root / csv_name(split)
        listed: dict[str, set[str]] = {name: set() for name in names}
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"filename", "label"} <= set(rows.fieldnames or ()):
                raise ValueError(f"{path}: got columns {rows.fieldnames}, expected filename and label")
            for row in rows:
                if row["label"] not in listed:
                    raise ValueError(f"{path}: lists the class {row['label']}, which the published {split} lacks")
                listed[row["label"]].add(row["filename"] or "")
        _check(path, listed, "get the csv files of Ravi and Larochelle")
        for name, files in listed.items():
            places = [root / "images", root, root / "images" / name, root / name, root / _short(split) / name]
            paths = {file: next(filter(Path.is_file, (p / file for p in places)), None) for file in sorted(files)}
            missing += [file for file, path in paths.items() if path is None]
            found[name] = [path for path in paths.values() if path is not None]
    if missing:
        raise ValueError(
            f"{root}: lacks {len(missing)} images that its csv files list: {few(missing)}; put them into "
            f"{root / 'images'}, or if it has class folders of {published.PER_CLASS} images, move the csv files away"
        )
    return found


def mini_cache(root: Path, split: str, names: Collection[str]) -> ImagesByClass:
    """Read mini-imagenet-cache-{train,val,test}.pkl: `image_data` (N, 84, 84, 3) uint8, `class_dict` of indices."""
    path = root / cache_name(split)
    images, classes = _entries(path, "image_data", "class_dict")
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (CACHE_SIDE, CACHE_SIDE, 3):
        raise ValueError(
            f"{path}: got image_data {images.dtype} {images.shape}, expected uint8 (N, {CACHE_SIDE}, {CACHE_SIDE}, 3)"
        )
    if not isinstance(classes, dict):
        raise ValueError(f"{path}: got class_dict of type {type(classes).__name__}, expected a dict")
    classes = _texts(classes)
    try:
        indices = {name: np.unique(np.asarray(classes.get(name, ()), np.int64)) for name in names}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: class_dict should hold lists of indices ({error}); get it again") from error
    _check(path, indices, "get the file from its source again")
    if max(index[-1] for index in indices.values()) >= len(images) or min(index[0] for index in indices.values()) < 0:
        raise ValueError(f"{path}: class_dict names images beyond the {len(images)} of image_data; get it again")
    return {name: [images[i] for i in index] for name, index in indices.items()}


def cache_name(split: str) -> str:
    """Return the file name of a split in the pickled miniImageNet."""
    return f"mini-imagenet-cache-{_short(split)}.pkl"


def csv_name(split: str) -> str:
    """Return the file name of a split in the lists of Ravi and Larochelle."""
    return f"{_short(split)}.csv"


def cifar_batches(folder: Path, names: Collection[str]) -> ImagesByClass:
    """Read cifar-100-python (files meta, train and test). Each class has its train images, then its test images."""
    (fine,) = _entries(folder / "meta", "fine_label_names")
    fine = [_text(name) for name in fine]
    if sorted(fine) != sorted(names):
        raise ValueError(f"{folder / 'meta'}: got {len(fine)} classes that are not CIFAR-100's; get the data again")
    found: dict[str, list[ImageSource]] = {name: [] for name in names}
    for part in ("train", "test"):
        path = folder / part
        data, labels = map(np.asarray, _entries(path, "data", "fine_labels"))
        if data.dtype != np.uint8 or data.shape != (len(labels), 3 * 32 * 32):
            raise ValueError(f"{path}: got data {data.dtype} {data.shape}, expected uint8 ({len(labels)}, 3072)")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(fine):
            raise ValueError(f"{path}: got labels {labels.min()} to {labels.max()}, expected 0 to {len(fine) - 1}")
        images = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # (N, H, W, 3)
        for image, label in zip(images, labels, strict=True):
            found[fine[label]].append(image)
    _check(folder, found, "get the data again")
    return found


def download_cifar100(folder: Path) -> Path:
    """Download CIFAR-100 into `folder` unless it exists there. Return the path of cifar-100-python."""
    from torchvision.datasets import CIFAR100  # the one use of torchvision

    try:
        CIFAR100(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{CIFAR100.url}: cannot be had ({error}); unpack a copy from elsewhere and give its folder as --from"
        ) from error
    return folder / CIFAR100.base_folder


def require_files(root: Path, names: Collection[str]) -> None:
    """Raise ValueError if `root` lacks any of the files `names`."""
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise ValueError(f"{root}: lacks {', '.join(missing)}; expected {', '.join(names)}")


def few(items: Sequence[str]) -> str:
    """Return the first three of `items` as text, and how many more there are."""
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more


def _check(where: Path, found: Mapping[str, Collection], advice: str) -> None:
    """Raise ValueError if a class of `found` is empty or lacks PER_CLASS images."""
    counts = {name: len(images) for name, images in found.items()}
    missing = [name for name, count in counts.items() if count == 0]
    if missing:
        raise ValueError(
            f"{where}: got {len(counts) - len(missing)} of {len(counts)} classes, without {few(missing)}; {advice}"
        )
    wrong = [f"{count} in {name}" for name, count in counts.items() if count != published.PER_CLASS]
    if wrong:
        raise ValueError(
            f"{where}: got {few(wrong)} of {len(counts)} classes, expected {published.PER_CLASS} per class; {advice}"
        )


def _entries(path: Path, *keys: str) -> list[Any]:
    content = _texts(read_plain_pickle(path))
    missing = [key for key in keys if key not in content]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}, has {few([str(key) for key in content])}; get it again")
    return [content[key] for key in keys]


def _text(value: Any) -> Any:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _texts(content: Mapping) -> dict:
    """Return `content` with str keys. A Python 2 pickle that was saved again has bytes keys."""
    return {_text(key): value for key, value in content.items()}


def _short(split: str) -> str:
    return split.removeprefix("meta_")
