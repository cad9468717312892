"""The two learners that are trained in turns, with their optimisers, and what is saved of them."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from models import learners
from models.class_learner import ClassLearner, load_statistics, statistics
from models.meta_model import BACKBONES, MetaModel
from utils import checkpoint
from utils.seeding import generator


class Pair:
    """The meta-model (f and g) and the class-learner h, with random weights that depend on the seed alone.

    num_classes: C; scale_cls, backbone, drop_rate: of `MetaModel`; optim, weight_decay: of `learners.make_optimizer`.
    """

    def __init__(
        self, num_classes: int, *, scale_cls: float, backbone: str, drop_rate: float, optim: str, weight_decay: float,
        seed: int, device: torch.device,
    ) -> None:  # fmt: skip
        rng = generator(seed, "weights")
        model = MetaModel(num_classes, scale_cls, backbone, drop_rate=drop_rate, generator=rng)
        self.model = model.to(device)
        self.learner = ClassLearner(num_classes, model.feature_dim, generator=rng).to(device)
        self.model_optimizer = learners.make_optimizer(optim, self.model, weight_decay)
        self.learner_optimizer = learners.make_optimizer(optim, self.learner, weight_decay)

    def set_rates(self, rate: float, share: float) -> None:
        """The learning rate of the meta-model, and that of the class-learner as a share of it."""
        learners.set_rate(self.model_optimizer, rate)
        learners.set_rate(self.learner_optimizer, rate * share)

    def state(self) -> dict[str, Any]:
        """The weights of both, with the statistics that their state dicts leave out."""
        return {
            "model": self.model.state_dict(),
            "model_statistics": statistics(self.model),
            "class_learner": self.learner.state_dict(),
            "class_learner_statistics": statistics(self.learner),
        }

    def optimizer_states(self) -> list[dict[str, Any]]:
        """What the optimisers need to go on, for `load_optimizers`."""
        return [self.model_optimizer.state_dict(), self.learner_optimizer.state_dict()]

    def load(self, state: Mapping[str, Any], path: Path) -> None:
        """Take the weights of `state`, read from `path`. Raises CheckpointError for those of other networks."""
        checkpoint.load_state(self.model, state["model"], path)
        checkpoint.load_state(self.learner, state["class_learner"], path)
        load_statistics(self.model, state["model_statistics"], path)
        load_statistics(self.learner, state["class_learner_statistics"], path)

    def load_optimizers(self, states: list[dict[str, Any]], path: Path) -> None:
        """Put back what `optimizer_states` gave, read from `path`. Raises CheckpointError for that of others."""
        for optimizer, saved in zip((self.model_optimizer, self.learner_optimizer), states, strict=True):
            checkpoint.load_optimizer(optimizer, saved, path)


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _or_missing(sound: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or sound(value)


# What a checkpoint of a run must hold, for `checkpoint.entries`: to test with, to start from, to resume
MODEL_ENTRIES = {
    "model": _mapping, "model_statistics": _mapping, "num_classes": _whole(1, 100_000), "image_size": _whole(8, 4096),
    "settings": lambda value: isinstance(value, Mapping) and _number(value.get("scale_cls"))
    and value.get("backbone") in BACKBONES,
    "epoch": _or_missing(_whole(0, 1_000_000)), "val_accuracy": _or_missing(_number),
}  # fmt: skip
PAIR_ENTRIES = {**MODEL_ENTRIES, "class_learner": _mapping, "class_learner_statistics": _mapping}
WHAT = "checkpoint of main.py; give best_model.pt or last.pt of a run"


def run_entries(epochs: int) -> dict[str, Callable[[Any], bool]]:
    """What last.pt of a run of so many epochs must hold."""
    return {**PAIR_ENTRIES, "optimizers": _pair, "epoch": _whole(0, epochs), "val_accuracy": _number}
