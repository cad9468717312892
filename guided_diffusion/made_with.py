"""What a model is trained with: kept in its files, so that nothing else resumes from them."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from guided_diffusion.image_datasets import TrainingImages
from utils import checkpoint

STATE_FILE = "state.pt"  # what a run resumes from; gone when it is done, but for --keep_state
MODEL_FILE = "model.pt"  # the EMA weights with their settings: the checkpoint that others use
ENTRY = "made_with"  # in both, and in pool.json
IMAGES = "images"
# flags that do not change the weights, but for rounding; classes are told by the images
NO_EFFECT = {
    "data_dir", "save_dir", "pool", "classes_per_model", "subsets", "held_out_dir", "keep_state", "microbatch",
    "log_interval", "save_interval", "device", "quiet", "dry_run", "use_checkpoint", "num_classes",
}  # fmt: skip


def digest(data: TrainingImages) -> str:
    """What tells `data` from other images: a hash of pixels, labels and class names, wherever their folder is."""
    names = json.dumps([data.class_names, list(data.images.shape)]).encode()
    found = hashlib.sha256(names)
    for array in (data.labels, data.images):
        found.update(array.contiguous().numpy())
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class Kept:
    """What is there of a model.

    Attributes:
        state: what to resume from, None where there is none, or only one from before `model`.
        model: the finished model, of as many steps as are asked for or fewer.
        steps: that are asked for.
        notes: lines to show before training.
        leftover: whether a state is there that is of no use any more.
    """

    state: Mapping[str, Any] | None
    model: Mapping[str, Any] | None
    steps: int
    notes: list[str] = field(default_factory=list)
    leftover: bool = False

    @property
    def step(self) -> int:
        """Steps that are done."""
        newest = self.state or self.model
        return newest["step"] if newest else 0

    @property
    def done(self) -> bool:
        """Whether the model is finished."""
        return self.model is not None and self.model["step"] == self.steps


def kept(folder: str | os.PathLike, here: Mapping[str, Any], device: str | torch.device = "cpu") -> Kept:
    """What `folder` has of a model that is made with `here`: flags that change the weights, `steps` among them.

    More steps than before are taken: from a finished model, and where the rate is not annealed.
    Raises ValueError, naming what differs, where the files there were made with anything else.
    """
    model_path, state_path = Path(folder) / MODEL_FILE, Path(folder) / STATE_FILE
    model = checkpoint.load(model_path) if model_path.exists() else None
    state = checkpoint.load_newest(state_path, device)
    notes: list[str] = []
    for path, payload in ((model_path, model), (state_path, state)):
        if payload is None:
            continue
        if not isinstance(payload, Mapping) or not isinstance(payload.get("step"), int):
            raise ValueError(f"{path}: is no file of image_train.py; give another --save_dir or --pool")
        record = payload.get(ENTRY)
        if not isinstance(record, Mapping):
            flags = payload.get("flags")
            record = dict(flags) if isinstance(flags, Mapping) else {}
            record |= {"steps": payload["step"]} if payload is model else {}
            notes.append(
                f"{path}: is of an older version and does not say what it was trained with; flags and images are taken "
                "to be the same (older versions mirrored images unless told --random_flip False)"
            )
        finished = model is not None or payload["step"] == record.get("steps")
        check_same(path, record, here, longer=finished or not here.get("lr_anneal_steps"))
    leftover = model is not None and state is not None and state["step"] < model["step"]
    found = Kept(None if leftover else state, model, here["steps"], notes, leftover)
    if model is not None and not found.done:
        notes.append(f"{model_path}: {_further(found, here)}")
    return found


def check_same(path: Path, record: Mapping[str, Any], here: Mapping[str, Any], *, longer: bool) -> None:
    """Refuse to train on what `record` was made with where `here` differs; longer: more steps do not count."""
    may_change = set()
    before = record.get("steps")
    if longer and isinstance(before, int) and here["steps"] > before:
        may_change = {"steps", "lr_anneal_steps"}
    other = {n: v for n, v in record.items() if n in here and here[n] != v and n not in may_change}
    if here.get("lr_anneal_steps") == 0 and record.get("lr_anneal_steps"):
        other["lr_anneal_steps"] = record["lr_anneal_steps"]
    images = other.pop(IMAGES, None) is not None and "image_size" not in other  # else they differ by their size
    words = [f"{name} {value!r} (got {here[name]!r})" for name, value in other.items()]
    words += ["other images than --data_dir has now"] * images
    if words:
        raise ValueError(f"{path}: was made with {', '.join(words)}; give the same, or another --save_dir or --pool")


def _further(found: Kept, here: Mapping[str, Any]) -> str:
    """How a finished model is trained further."""
    text = f"has {found.model['step']} steps, trains further to {found.steps}"
    if found.state is None:
        return (
            f"{text} from its average weights with a fresh optimiser: not what {found.steps} steps from the start give "
            "(--keep_state True keeps what that takes)"
        )
    if not here.get("lr_anneal_steps"):
        return text
    before = found.model.get(ENTRY)
    if isinstance(before, Mapping) and before.get("lr_anneal_steps"):
        return f"{text}, raising its rate again from 0; the result differs from {found.steps} steps in one run"
    return f"{text}, lowering its rate from here on"
