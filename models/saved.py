"""The entries that a checkpoint of `main.py` must hold, each with its check, for `checkpoint.entries`."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from models import backbones
from models.meta_model import FEATURES


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) in (1, 2)


def _mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _or_missing(sound: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or sound(value)


# required for testing
MODEL_ENTRIES = {
    "model": _mapping, "model_statistics": _mapping, "num_classes": _whole(1, 100_000), "image_size": _whole(8, 4096),
    "settings": lambda value: isinstance(value, Mapping) and _number(value.get("scale_cls"))
    and backbones.is_known(value.get("backbone")) and value.get("features", "pooled") in FEATURES,
    "epoch": _or_missing(_whole(0, 1_000_000)), "val_accuracy": _or_missing(_number),
}  # fmt: skip
# required to start training from
PAIR_ENTRIES = {
    **MODEL_ENTRIES, "class_learner": _or_missing(_mapping), "class_learner_statistics": _or_missing(_mapping),
}  # fmt: skip
WHAT = "checkpoint of main.py; give best_model.pt or last.pt of a run"


def run_entries(epochs: int) -> dict[str, Callable[[Any], bool]]:
    """Return the entries that last.pt must hold to resume a run of `epochs` epochs."""
    return {**PAIR_ENTRIES, "optimizers": _pair, "epoch": _whole(0, epochs), "val_accuracy": _number}
