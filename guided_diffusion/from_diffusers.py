"""Folders in the format of the library diffusers: public unconditional models (`UNet2DModel`) as members of a pool.

The network is the library's own. Weights and settings are read and checked here: no file is trusted, none is fetched.
"""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from guided_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from guided_diffusion.respace import SpacedDiffusion
from guided_diffusion.script_util import create_gaussian_diffusion, create_model
from utils import checkpoint
from utils.checkpoint import CheckpointError

INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # the first that exists counts
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # attention layers before 2023
_MOST = {"sample_size": 4096, "num_class_embeds": 10_000, "layers_per_block": 100}  # the limits that `pool` has too
_LARGEST, _LONGEST = 100_000, 50  # limits of other numbers, and of a list's length
_ONLY = {  # values that the pool relies on
    "_class_name": ("UNet2DModel",), "in_channels": (3,), "out_channels": (3, 6), "class_embed_type": (None,),
    "time_embedding_type": ("positional", "learned"),
}  # fmt: skip
_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_ONLY_SCHEDULER = {
    "beta_schedule": _SCHEDULES, "prediction_type": ("epsilon", "sample"), "trained_betas": (None,),
    "rescale_betas_zero_snr": (False,),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range"),
}  # fmt: skip


def is_model(folder: Path) -> bool:
    """Return whether `folder` looks like a model of diffusers: a pipeline, or a network with its config.json."""
    if (folder / INDEX).is_file() or any((folder / name).is_file() for name in WEIGHTS):
        return True
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "_diffusers_version" in config


def files_of(folder: Path) -> list[Path]:
    """Return the files of a model: config.json, weights and, if it exists, scheduler_config.json.

    folder: a pipeline, its folder unet, or a folder with all the files.
    Raises CheckpointError for a pipeline with other parts, or if a file is missing.
    """
    if (folder / INDEX).is_file():
        parts = [name for name, value in _read(folder / INDEX).items() if isinstance(value, list) and any(value)]
        if set(parts) - {"unet", "scheduler"}:
            raise CheckpointError(
                f"{folder / INDEX}: has the parts {', '.join(sorted(parts))}, expected unet and scheduler alone; "
                "give a model that draws pixels from noise"
            )
    network = folder / "unet" if (folder / "unet").is_dir() else folder
    weights = [network / name for name in WEIGHTS if (network / name).is_file()]
    if not (network / CONFIG).is_file() or not weights:
        raise CheckpointError(
            f"{network}: expected {CONFIG} and {' or '.join(WEIGHTS)} there; download the whole model again"
        )
    places = [folder / "scheduler", folder, *[folder.parent / "scheduler"] * (folder.name == "unet")]
    schedulers = [place / SCHEDULER for place in places if (place / SCHEDULER).is_file()]
    return [network / CONFIG, weights[0], *schedulers[:1]]


def describe(folder: Path, unsaid: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of a model, as `PoolModel` holds them.

    `image_size`, `class_cond`, `num_classes`, `num_channels` and `learn_sigma` have the meaning of our own flags.
    `unet` and `scheduler` are JSON. All other flags come from `unsaid`.
    unsaid: defaults: image_size for a model without sample_size, and the process flags for one without
        scheduler_config.json.
    Raises CheckpointError, naming the entry, for a network or process that the pool cannot use.
    """
    config_path, _, *scheduler = files_of(folder)
    config = _read(config_path)
    _check(config, _ONLY, config_path)
    for name, value in config.items():
        _check_value(name, value, config_path)
    size, classes, outputs = (config.get(name) for name in ("sample_size", "num_class_embeds", "out_channels"))
    size = size[0] if isinstance(size, list) and len({*map(str, size)}) == 1 else size
    for name, value in (("sample_size", size), ("num_class_embeds", classes)):
        if value is not None and not (type(value) is int and value > 0):
            raise CheckpointError(f"{config_path}: got {name} {value!s:.40}, expected a whole number; give another")
    widths = [width for width in config.get("block_out_channels") or () if type(width) is int]
    flags = dict(unsaid) | {
        "image_size": size or unsaid["image_size"],
        "class_cond": classes is not None,
        "num_classes": classes or 0,
        "num_channels": min(widths, default=224),  # the library's default
        "learn_sigma": outputs == 6,
        "unet": json.dumps({name: value for name, value in config.items() if name[0] != "_"}, sort_keys=True),
    }
    for path in scheduler:
        process = {"variance_type": None, "prediction_type": "epsilon", **_read(path)}
        if "beta_schedule" not in process:
            raise CheckpointError(f"{path}: is a {process.get('_class_name')}, which has no betas; give another model")
        _check(process, _ONLY_SCHEDULER, path)
        if process["variance_type"] and (process["variance_type"] == "learned_range") != (outputs == 6):
            raise CheckpointError(
                f"{path}: got variance_type {process['variance_type']} of a network with {outputs} outputs; "
                "the two belong together, so download the whole model again"
            )
        for name, above, kinds in (
            ("num_train_timesteps", 100_001, (int,)), ("beta_start", 1, (int, float)), ("beta_end", 1, (int, float)),
        ):  # fmt: skip
            value = process.get(name)
            if type(value) not in kinds or not 0 < value < above:
                raise CheckpointError(
                    f"{path}: got {name} {value!s:.40}, expected {'a number' if float in kinds else 'a whole number'} "
                    f"above 0 and below {above}; give another model"
                )
        kept = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "prediction_type")
        flags["scheduler"] = json.dumps({name: process[name] for name in kept}, sort_keys=True)
    return flags


def create_network(flags: Mapping[str, Any]) -> nn.Module:
    """Return the network of `flags`, our own or the library's.

    Raises ValueError if the library is missing or does not know a setting.
    """
    if "unet" not in flags:
        return create_model(**flags)
    model = library().UNet2DModel
    config = json.loads(flags["unet"])
    if unknown := sorted(set(config) - set(inspect.signature(model.__init__).parameters)):
        raise ValueError(f"the installed diffusers does not know {', '.join(unknown)}; pip install -U diffusers")
    return Network(model(**config))


def create_process(flags: Mapping[str, Any]) -> SpacedDiffusion:
    """Return the diffusion process of `flags`, from our own flags or the model's `scheduler`, over all its timesteps.

    With a `scheduler`, the variance is learned or the upper bound; DDIM uses neither.
    """
    if "scheduler" not in flags:
        return create_gaussian_diffusion(**flags)
    s = json.loads(flags["scheduler"])
    steps, first, last = s["num_train_timesteps"], s["beta_start"], s["beta_end"]
    return SpacedDiffusion(
        range(steps),
        betas={
            "linear": lambda: np.linspace(first, last, steps),
            "scaled_linear": lambda: np.linspace(first**0.5, last**0.5, steps) ** 2,
            "squaredcos_cap_v2": lambda: get_named_beta_schedule("cosine", steps),
        }[s["beta_schedule"]](),
        model_mean_type=ModelMeanType.START_X if s["prediction_type"] == "sample" else ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE if flags["learn_sigma"] else ModelVarType.FIXED_LARGE,
        loss_type=LossType.MSE,
    )


def read_weights(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """Return the state dict of `Network`, with current names, and its file. Errors as for `checkpoint.load`."""
    path = files_of(folder)[1]
    weights = checkpoint.load(path)
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{path}: got {type(weights).__name__}, expected a state dict; download it again")
    return {f"unet.{_today(name)}": value for name, value in weights.items()}, path


class Network(nn.Module):
    """A `UNet2DModel` with the call signature of our own U-Nets."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict from images x (N, 3, H, W), timesteps (N,) and labels y (N,) int64, None if unconditional.

        Returns (N, 3, H, W), or (N, 6, H, W) with a learned variance, in the dtype of x.
        """
        return self.unet(x.to(self.unet.dtype), timesteps, y, return_dict=False)[0].to(x.dtype)


def library() -> Any:
    """Return the module diffusers. Raises ValueError if it is not installed."""
    try:
        import diffusers
    except ImportError:
        raise ValueError("models in this format need the package diffusers; pip install diffusers") from None
    return diffusers


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no JSON ({str(error).splitlines()[0]:.80}); download it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: got {type(found).__name__}, expected names with values; download it again")
    return found


def _check(config: Mapping[str, Any], only: Mapping[str, tuple], path: Path) -> None:
    for name, known in only.items():
        value = config.get(name, known[0])
        if isinstance(value, list | dict) or value not in known:
            raise CheckpointError(
                f"{path}: got {name} {value!s:.40}, expected {' or '.join(map(str, known))}; give another model"
            )


def _check_value(name: str, value: Any, path: Path) -> None:
    """Raise CheckpointError for numbers and lists too large for any network: building it could take forever."""
    most = _MOST.get(name, _LARGEST)
    values = value if isinstance(value, list) else [value]
    sound = all(abs(v) <= most if isinstance(v, int | float) else v is None or isinstance(v, str) for v in values)
    if len(values) > _LONGEST or not sound:
        raise CheckpointError(f"{path}: got {name} {value!s:.40}, expected numbers up to {most}; give another model")


def _today(name: str) -> str:
    """Return the current name of a state dict entry."""
    parts = name.split(".")
    if "attentions" in parts and len(parts) > 1:
        parts[-2] = _OLD_NAMES.get(parts[-2], parts[-2])
    return ".".join(parts)
