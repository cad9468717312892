"""The networks that are trained, with their optimisers, and what is saved of them."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from models import learners
from models.class_learner import ClassLearner, load_statistics, statistics
from models.meta_model import BACKBONES, FEATURES, MetaModel
from utils import checkpoint
from utils.seeding import generator

PARTS = ("model", "class_learner")


class Pair:
    """The meta-model (f and g) and the class-learner h, with random weights that depend on the seed alone.

    num_classes: C; scale_cls, backbone, features, drop_rate: of `MetaModel`; image_size: in pixels; optim,
    weight_decay: of `learners.make_optimizer`; learner: whether there is a class-learner apart from g.
    """

    def __init__(
        self, num_classes: int, *, scale_cls: float, backbone: str, features: str, image_size: int, drop_rate: float,
        optim: str, weight_decay: float, learner: bool, seed: int, device: torch.device,
    ) -> None:  # fmt: skip
        rng = generator(seed, "weights")
        model = MetaModel(num_classes, scale_cls, backbone, features=features, image_size=image_size,
                          drop_rate=drop_rate, generator=rng)  # fmt: skip
        self.model = model.to(device)
        self.learner = ClassLearner(num_classes, model.channels, generator=rng).to(device) if learner else None
        self.networks = [network for network in (self.model, self.learner) if network is not None]
        self.optimizers = [learners.make_optimizer(optim, network, weight_decay) for network in self.networks]

    def set_rates(self, rate: float, share: float) -> None:
        """Set the learning rate of the meta-model, and that of the class-learner as a share of it."""
        for optimizer, factor in zip(self.optimizers, (1.0, share), strict=False):
            learners.set_rate(optimizer, rate * factor)

    def state(self) -> dict[str, Any]:
        """Return the weights, with the statistics that their state dicts leave out."""
        parts = {}
        for name, network in zip(PARTS, self.networks, strict=False):
            parts |= {name: network.state_dict(), f"{name}_statistics": statistics(network)}
        return parts

    def optimizer_states(self) -> list[dict[str, Any]]:
        """Return what the optimisers need to resume, for `load_optimizers`."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load(self, state: Mapping[str, Any], path: Path) -> None:
        """Take the weights of `state`, read from `path`. Raises CheckpointError for those of other networks."""
        for name, network in zip(PARTS, self.networks, strict=False):
            if state.get(name) is None or state.get(f"{name}_statistics") is None:
                raise checkpoint.CheckpointError(f"{path}: has no {name}; give a run of --recipe paper")
            checkpoint.load_state(network, state[name], path)
        for name, network in zip(PARTS, self.networks, strict=False):
            load_statistics(network, state[f"{name}_statistics"], path)

    def load_optimizers(self, states: list[dict[str, Any]], path: Path) -> None:
        """Put back what `optimizer_states` gave, read from `path`. Raises CheckpointError for that of others."""
        if len(states) != len(self.optimizers):
            raise checkpoint.CheckpointError(f"{path}: has {len(states)} optimisers, expected {len(self.optimizers)}")
        for optimizer, saved in zip(self.optimizers, states, strict=True):
            checkpoint.load_optimizer(optimizer, saved, path)


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


# What a checkpoint of a run must hold, for `checkpoint.entries`: to test with, to start from, to resume
MODEL_ENTRIES = {
    "model": _mapping, "model_statistics": _mapping, "num_classes": _whole(1, 100_000), "image_size": _whole(8, 4096),
    "settings": lambda value: isinstance(value, Mapping) and _number(value.get("scale_cls"))
    and value.get("backbone") in BACKBONES and value.get("features", "pooled") in FEATURES,
    "epoch": _or_missing(_whole(0, 1_000_000)), "val_accuracy": _or_missing(_number),
}  # fmt: skip
PAIR_ENTRIES = {
    **MODEL_ENTRIES, "class_learner": _or_missing(_mapping), "class_learner_statistics": _or_missing(_mapping),
}  # fmt: skip
WHAT = "checkpoint of main.py; give best_model.pt or last.pt of a run"


def run_entries(epochs: int) -> dict[str, Callable[[Any], bool]]:
    """What last.pt of a run of so many epochs must hold."""
    return {**PAIR_ENTRIES, "optimizers": _pair, "epoch": _whole(0, epochs), "val_accuracy": _number}
