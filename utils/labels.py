"""Convert labels, one per image, from a list, array, column or table to plain values, and check them."""

import numbers
from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch


def plain_labels(labels: Iterable[Hashable]) -> list:
    """Return labels as plain Python values, one per image.

    labels: N hashable values in a list, array, tensor, series or the like, or in a column (N, 1).

    Raises ValueError for unordered labels (a set, a dictionary), rows of several values (one-hot), values that are not
    hashable, and NaN or another missing value.
    """
    if isinstance(labels, str | bytes | Mapping | Set) or not isinstance(labels, Iterable):
        raise ValueError(f"got labels of type {type(labels).__name__}, expected a list or array, one per image")
    if hasattr(labels, "to_numpy"):  # iterating over a table would give the names of its columns
        labels = labels.to_numpy()
    given = _plain(labels)
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise ValueError("got labels of no dimension, expected a list or array, one per image")
    found = [_plain(label) for label in given]
    while found and all(isinstance(label, list) and len(label) == 1 for label in found):
        found = [_plain(label[0]) for label in found]  # a column
    for label in found:
        if isinstance(label, list) or not _hashes(label):
            raise ValueError(
                f"got a label of type {type(label).__name__}, expected one hashable value per image; of one-hot rows "
                "give labels.argmax(1)"
            )
        if type(label).__name__ in ("NAType", "NaTType") or label != label:  # NAType has no truth value
            raise ValueError("got NaN or a missing value among the labels, expected one value per image")
    return found


def encoded(labels: Sequence[Hashable]) -> tuple[np.ndarray, torch.Tensor]:
    """Return the classes in order, and the class number of each label, (N,) int64.

    Classes are sorted, or if they do not compare, ordered by type and text.

    labels: as `plain_labels` returns them.

    Raises ValueError for fewer than 2 classes, and for more than 2 labels that all differ and include fractions, as
    these are measurements.
    """
    found = set(labels)
    if len(found) < 2:
        raise ValueError(f"got {len(found)} classes, expected 2 or more: give labelled images of another class too")
    if 2 < len(labels) == len(found) and any(isinstance(each, float) and not each.is_integer() for each in found):
        raise ValueError(
            f"got {len(found)} different fractions as labels, which are measurements, expected classes; give texts if "
            "each is a class of its own"
        )
    try:
        ordered = sorted(found)
    except TypeError:  # types that do not compare
        ordered = sorted(found, key=lambda label: (type(label).__name__, repr(label)))
    numbers_ = {label: number for number, label in enumerate(ordered)}
    return as_array(ordered), torch.tensor([numbers_[label] for label in labels])


def as_array(labels: Sequence[Hashable]) -> np.ndarray:
    """Return labels as an array (N,) that changes none of them; an array of objects if NumPy would change some."""
    plain = len({type(label) for label in labels}) == 1 and isinstance(labels[0], str | int | float)
    array = np.array(labels) if plain else None
    if array is None or array.tolist() != list(labels):  # NumPy rounds large integers and cuts trailing zero bytes
        array = np.empty(len(labels), object)
        for number, label in enumerate(labels):  # one by one, as NumPy takes tuples for axes
            array[number] = label
    return array


def check_kinds(labels: Sequence[Hashable], classes: Sequence[Hashable]) -> None:
    """Raise ValueError for labels of a kind that no class has, such as texts if the classes are numbers."""
    known = {_kind(label) for label in classes}
    if strange := sorted({_kind(label) for label in labels} - known):
        raise ValueError(
            f"got labels of kind {', '.join(strange)}, expected {', '.join(sorted(known))}, as those of fit were; give "
            "both in one kind"
        )


def _kind(label: Hashable) -> str:
    """Return the kind of a label. Labels of two kinds are never equal."""
    if isinstance(label, str):
        return "text"
    return "number" if isinstance(label, numbers.Number) else type(label).__name__


def _plain(value: Any) -> Any:
    """Return a value of NumPy or torch as a Python value or nested lists; any other value unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value


def _hashes(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:  # also of a value inside a tuple
        return False
    return True
