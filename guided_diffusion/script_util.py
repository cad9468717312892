"""Build a U-Net and its diffusion process from flags, and infer flags from a checkpoint's tensors."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from guided_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from guided_diffusion.train_flags import NETWORK, PROCESS, TrainSettings
from guided_diffusion.unet import UNetModel

DEFAULT_CHANNEL_MULT = {
    512: "0.5,1,1,2,2,4,4",
    256: "1,1,2,2,4,4",
    128: "1,1,2,3,4",
    64: "1,2,3,4",
    32: "1,2,2",
}


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Return every flag of a network and its diffusion process, with its default."""
    return {f.name: f.default for f in fields(TrainSettings) if f.metadata["group"] in (NETWORK, PROCESS)}


def create_model_and_diffusion(**flags) -> tuple[UNetModel, SpacedDiffusion]:
    """Return the network and the diffusion process of `flags`. Missing flags have their defaults.

    Raises ValueError for an unknown flag or an invalid value.
    """
    flags = _complete(flags)
    return create_model(**flags), create_gaussian_diffusion(**flags)


def create_model(**flags) -> UNetModel:
    """Return a U-Net on RGB images (N, 3, image_size, image_size) with 3 outputs, or 6 if `learn_sigma`.

    Flags, defaults and errors are as for `create_model_and_diffusion`; process flags have no effect.
    channel_mult: factors of num_channels, one per level, as in "1,2,2"; "" picks the default for the image size.
    attention_resolutions: sides in pixels of the feature maps with attention, as in "16,8". Sides that the network does
    not reach have no effect; "" leaves only the attention in the middle block.
    """
    flags = _complete(flags)
    size, channel_mult = flags["image_size"], flags["channel_mult"] or DEFAULT_CHANNEL_MULT.get(flags["image_size"])
    if channel_mult is None:
        known = ", ".join(map(str, DEFAULT_CHANNEL_MULT))
        raise ValueError(f"got image_size {size}, for which there is no default channel_mult ({known} have one); "
                         "give channel_mult")  # fmt: skip
    resolutions = _numbers(flags["attention_resolutions"], "attention_resolutions", most=4096)
    same = ("num_res_blocks", "dropout", "use_checkpoint", "num_heads", "num_head_channels", "num_heads_upsample",
            "use_scale_shift_norm", "resblock_updown", "use_new_attention_order")  # fmt: skip
    return UNetModel(
        image_size=size,
        in_channels=3,
        model_channels=flags["num_channels"],
        out_channels=6 if flags["learn_sigma"] else 3,
        attention_resolutions={size // int(each) for each in resolutions if each >= 1},
        channel_mult=_numbers(channel_mult, "channel_mult", most=1024),
        num_classes=flags["num_classes"] if flags["class_cond"] else None,
        **{name: flags[name] for name in same},
    )


def create_gaussian_diffusion(steps: int | None = None, **flags) -> SpacedDiffusion:
    """Return a process of `steps` noising steps (None: `diffusion_steps`) that visits those of `timestep_respacing`.

    Flags, defaults and errors are as for `create_model_and_diffusion`; network flags have no effect.
    """
    flags = _complete(flags)
    steps = flags["diffusion_steps"] if steps is None else steps
    if steps < 1:
        raise ValueError(f"got diffusion_steps {steps}, expected 1 or more")
    loss_type = LossType.RESCALED_MSE if flags["rescale_learned_sigmas"] else LossType.MSE
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, flags["timestep_respacing"]),
        betas=get_named_beta_schedule(flags["noise_schedule"], steps),
        model_mean_type=ModelMeanType.START_X if flags["predict_xstart"] else ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE if flags["learn_sigma"] else ModelVarType.FIXED_LARGE,
        loss_type=LossType.RESCALED_KL if flags["use_kl"] else loss_type,
        rescale_timesteps=flags["rescale_timesteps"],
        loss_weighting=flags["loss_weighting"],
    )


def _complete(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return `flags` completed by the defaults. Raises ValueError for an unknown flag."""
    defaults = model_and_diffusion_defaults()
    if unknown := sorted(set(flags) - set(defaults)):
        raise ValueError(f"got unknown flags {', '.join(unknown)}, expected some of {', '.join(defaults)}")
    return {**defaults, **flags}


def unwrapped(payload: Mapping[str, Any], depth: int = 3) -> Mapping[str, torch.Tensor] | None:
    """Return the state dict of the U-Net in `payload`, or None if there is none.

    Its names may have a prefix (such as module., from training with several processes), or it may be an entry (such as
    state_dict or model), up to `depth` levels deep. Of several, one with ema in its name is preferred, else the first.
    """
    names = [name for name in payload if isinstance(name, str)]
    prefixes = [name.removesuffix(_FIRST) for name in names if name == _FIRST or name.endswith(f".{_FIRST}")]
    if prefixes:
        prefix = min(prefixes, key=lambda each: "ema" not in each.lower())
        return {name.removeprefix(prefix): payload[name] for name in names if name.startswith(prefix)}
    for name in sorted(names, key=lambda each: "ema" not in each.lower()) if depth else ():
        if isinstance(payload[name], Mapping) and (found := unwrapped(payload[name], depth - 1)) is not None:
            return found
    return None


_FIRST = "time_embed.0.weight"  # an entry of every U-Net


def contents(payload: Mapping[str, Any]) -> str:
    """Return a few words on what a mapping holds if it is not the state dict of a U-Net."""
    if {"state", "param_groups"} <= set(payload):
        return "an optimiser's state, not the state dict of a guided-diffusion U-Net"
    if {"class_learner", "settings"} <= set(payload):
        return "a meta-model of main.py, not the state dict of a guided-diffusion U-Net"
    names = [f"{name!s:.30}" for name in list(payload)[:4]]
    more = f" and {len(payload) - len(names)} more" if len(payload) > len(names) else ""
    return f"{', '.join(names) or 'nothing'}{more}, not the state dict of a guided-diffusion U-Net"


def infer_model_flags(state_dict: Mapping[str, torch.Tensor], image_size: int | None = None) -> dict[str, Any]:
    """Return the flags that follow from the names and shapes in a U-Net's state dict.

    image_size: side in pixels, which tensors do not show. If given, the result also has `image_size` and
    `attention_resolutions`, which are in pixels. The result lacks heads, attention order, dropout, schedule and steps,
    because the tensors do not show them.
    Raises ValueError for a state dict of another kind of network.
    """
    try:
        return _infer(state_dict, image_size)
    except (KeyError, IndexError, ZeroDivisionError, StopIteration, AttributeError) as error:
        raise ValueError(f"not the state dict of a guided-diffusion U-Net: {error} is missing or misshapen") from None


def _infer(state_dict: Mapping[str, torch.Tensor], image_size: int | None) -> dict[str, Any]:
    shapes = {name: tuple(value.shape) for name, value in state_dict.items()}
    num_channels = shapes["time_embed.0.weight"][1]
    stages = len({name.split(".")[1] for name in shapes if name.startswith("output_blocks.")})
    # The first decoder stage that ends in upsampling is the last of num_res_blocks + 1 stages at the coarsest level.
    upsamplers = {"conv.weight": False, "in_layers.0.weight": True}
    found = {
        int(stage): updown
        for name in shapes
        if name.startswith("output_blocks.")
        for _, stage, position, leaf in [name.split(".", 3)]
        if position != "0" and (updown := upsamplers.get(leaf)) is not None
    }
    per_level = min(found, default=stages - 1) + 1
    firsts = [f"input_blocks.{1 + level * per_level}" for level in range(stages // per_level)]
    widths = [shapes[f"{first}.0.out_layers.3.weight"][0] for first in firsts]
    flags = dict(
        num_channels=num_channels,
        num_res_blocks=per_level - 1,
        channel_mult=",".join(f"{width / num_channels:.12g}" for width in widths),
        class_cond="label_emb.weight" in shapes,
        learn_sigma=shapes["out.2.weight"][0] == 2 * shapes["input_blocks.0.0.weight"][1],
        use_scale_shift_norm=shapes["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * widths[0],
        resblock_updown=any(found.values()),
    )
    if flags["class_cond"]:
        flags["num_classes"] = shapes["label_emb.weight"][0]
    if image_size is not None:
        attended = [level for level, first in enumerate(firsts) if f"{first}.1.qkv.weight" in shapes]
        flags["image_size"] = image_size
        flags["attention_resolutions"] = ",".join(str(image_size >> level) for level in attended)
    return flags


def _numbers(text: str | int, name: str, most: int) -> tuple[float, ...]:
    """Return the numbers in comma-separated `text`, whole ones as int. Raises ValueError for any outside [0, most]."""
    try:
        values = [float(part) for part in str(text).split(",") if part.strip()]
    except ValueError:
        values = [math.nan]
    if not all(0 <= value <= most for value in values):
        raise ValueError(f"got {name} {text!r}, expected numbers up to {most} with commas between, as in 1,2,2")
    return tuple(int(value) if value == int(value) else value for value in values)
