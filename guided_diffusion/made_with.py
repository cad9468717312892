"""Record the settings and images that a model is trained with, so that no run with different ones resumes it."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from guided_diffusion.from_diffusers import is_model
from guided_diffusion.image_datasets import TrainingImages
from guided_diffusion.train_flags import WEIGHTS, TrainSettings
from utils import checkpoint

STATE_FILE = "state.pt"  # what a run resumes from; deleted when the run is done, unless --keep_state
MODEL_FILE = "model.pt"  # the finished checkpoint: EMA weights with their flags
ENTRY = "made_with"  # the entry in both, and in pool.json
IMAGES = "images"
NO_EFFECT = {f.name for f in fields(TrainSettings) if f.metadata["affects"] != WEIGHTS}  # except for rounding


def record(settings: TrainSettings) -> dict[str, Any]:
    """Return the settings that change the weights."""
    return {name: value for name, value in asdict(settings).items() if name not in NO_EFFECT}


def digest(data: TrainingImages) -> str:
    """Return a hash of pixels, labels and class names, which identifies `data` wherever its folder is."""
    names = json.dumps([data.class_names, list(data.images.shape)]).encode()
    found = hashlib.sha256(names)
    for array in (data.labels, data.images):
        found.update(array.contiguous().numpy())
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class Kept:
    """What a folder already holds of a model.

    Attributes:
        state: the state to resume from; None if there is none, or if it is older than `model`.
        model: the finished model, None if there is none; it may have fewer steps than asked for.
        step: number of steps done.
        done: whether the model has all its steps.
        leftover: whether there is a state older than `model`, of no more use.
        notes: lines to print before training.
    """

    state: Mapping[str, Any] | None
    model: Mapping[str, Any] | None
    step: int
    done: bool
    leftover: bool
    notes: list[str]


def kept(folder: str | os.PathLike, here: Mapping[str, Any], device: str | torch.device = "cpu") -> Kept:
    """Return what `folder` already holds of a model made with `here`.

    here: the settings from `record`, and the hash of the images if it is known. More steps than before are allowed for
    a finished model, and if the rate is not annealed.
    Raises ValueError if the files were made with anything else, naming it, or if `folder` is inside a public model.
    """
    for place in (Path(folder), *Path(folder).parents[:2]):  # in a pool, ckpt is inside subset1
        if is_model(place):
            raise ValueError(
                f"{place}: is a model of diffusers, which stays as it is; give another --save_dir or --pool"
            )
    model_path, state_path = Path(folder) / MODEL_FILE, Path(folder) / STATE_FILE
    model = checkpoint.load(model_path) if model_path.exists() else None
    state = checkpoint.load_newest(state_path, device)
    notes: list[str] = []
    for path, payload in ((model_path, model), (state_path, state)):
        if payload is None:
            continue
        if not isinstance(payload, Mapping) or not isinstance(payload.get("step"), int):
            raise ValueError(f"{path}: got no file of image_train.py; give another --save_dir or --pool")
        then = payload.get(ENTRY)
        if not isinstance(then, Mapping):
            flags = payload.get("flags")
            then = dict(flags) if isinstance(flags, Mapping) else {}
            then |= {"steps": payload["step"]} if payload is model else {}
            notes.append(
                f"{path}: is of an older version, which does not say what it was trained with; assuming the same flags "
                "and images (older versions mirrored images unless told --random_flip False)"
            )
        finished = model is not None or payload["step"] == then.get("steps")
        check_same(path, then, here, longer=finished or not here.get("lr_anneal_steps"))
    leftover = model is not None and state is not None and state["step"] < model["step"]
    state = None if leftover else state
    newest, done = state or model, model is not None and model["step"] == here["steps"]
    if model is not None and not done:
        notes.append(f"{model_path}: {_further(model, state, here)}")
    return Kept(state, model, newest["step"] if newest else 0, done, leftover, notes)


def check_same(path: Path, then: Mapping[str, Any], here: Mapping[str, Any], *, longer: bool) -> None:
    """Raise ValueError if `path` was made with settings other than `here`. longer: allow more steps."""
    before = then.get("steps")
    more = longer and isinstance(before, int) and here["steps"] > before
    may_change = {"steps", "lr_anneal_steps"} if more else set()
    other = {n: v for n, v in then.items() if n in here and here[n] != v and n not in may_change}
    if here.get("lr_anneal_steps") == 0 and then.get("lr_anneal_steps"):
        other["lr_anneal_steps"] = then["lr_anneal_steps"]
    images = other.pop(IMAGES, None) is not None and "image_size" not in other  # the hash changes with the size
    words = [f"{name} {value!r} (got {here[name]!r})" for name, value in other.items()]
    words += ["other images than --data_dir has now"] * images
    if words:
        raise ValueError(f"{path}: was made with {', '.join(words)}; give the same, or another --save_dir or --pool")


def _further(model: Mapping[str, Any], state: Mapping[str, Any] | None, here: Mapping[str, Any]) -> str:
    """Return a line on how a finished model is trained further."""
    steps, before = here["steps"], model.get(ENTRY)
    text = f"has {model['step']} steps, trains on to {steps}"
    if state is None:
        return (
            f"{text} from its average weights with a fresh optimiser: not the same as {steps} steps in one run "
            "(--keep_state True keeps what that takes)"
        )
    if not here.get("lr_anneal_steps"):
        return text
    if isinstance(before, Mapping) and before.get("lr_anneal_steps"):
        return f"{text}, raising its rate again from 0; the result differs from {steps} steps in one run"
    return f"{text}, lowering its rate from here on"
