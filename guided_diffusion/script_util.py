"""From flags to a U-Net and its diffusion process, and from a checkpoint's tensors back to flags."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from guided_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from guided_diffusion.unet import UNetModel

DEFAULT_CHANNEL_MULT = {
    512: "0.5,1,1,2,2,4,4",
    256: "1,1,2,2,4,4",
    128: "1,1,2,3,4",
    64: "1,2,3,4",
    32: "1,2,2",
}


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Every flag of `create_model_and_diffusion` with its default."""
    return dict(
        image_size=64,
        num_channels=128,
        num_res_blocks=2,
        num_heads=4,
        num_heads_upsample=-1,
        num_head_channels=-1,
        attention_resolutions="16,8",
        channel_mult="",
        dropout=0.0,
        class_cond=False,
        num_classes=5,
        use_checkpoint=False,
        use_scale_shift_norm=True,
        resblock_updown=False,
        use_fp16=False,
        use_new_attention_order=False,
        learn_sigma=False,
        diffusion_steps=1000,
        noise_schedule="linear",
        timestep_respacing="",
        use_kl=False,
        predict_xstart=False,
        rescale_timesteps=False,
        rescale_learned_sigmas=False,
        loss_weighting="uniform",
    )


_DIFFUSION_FLAGS = (
    "learn_sigma",
    "noise_schedule",
    "timestep_respacing",
    "use_kl",
    "predict_xstart",
    "rescale_timesteps",
    "rescale_learned_sigmas",
    "loss_weighting",
)
MODEL_FLAGS = tuple(  # those that make the network, not the process
    name
    for name in model_and_diffusion_defaults()
    if name == "learn_sigma" or name not in (*_DIFFUSION_FLAGS, "diffusion_steps")
)


def network_of(flags: Mapping[str, Any]) -> UNetModel:
    """The network of flags among which are all of MODEL_FLAGS. Raises ValueError for a value that does not fit."""
    return create_model(**{name: flags[name] for name in MODEL_FLAGS})


def create_model_and_diffusion(**flags) -> tuple[UNetModel, SpacedDiffusion]:
    """The network and the process that `flags` describe; those not given have their defaults.

    Raises ValueError for an unknown flag or a value that does not fit.
    """
    defaults = model_and_diffusion_defaults()
    unknown = sorted(set(flags) - set(defaults))
    if unknown:
        raise ValueError(f"unknown model flags {', '.join(unknown)}; expected some of {', '.join(defaults)}")
    flags = {**defaults, **flags}
    model = network_of(flags)
    diffusion = create_gaussian_diffusion(
        steps=flags["diffusion_steps"], **{name: flags[name] for name in _DIFFUSION_FLAGS}
    )
    return model, diffusion


def create_model(
    *,
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str | Sequence[float] = "",
    learn_sigma: bool = False,
    class_cond: bool = False,
    num_classes: int = 5,
    use_checkpoint: bool = False,
    attention_resolutions: str | int | Sequence[int] = "16,8",
    num_heads: int = 4,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = True,
    dropout: float = 0.0,
    resblock_updown: bool = False,
    use_fp16: bool = False,
    use_new_attention_order: bool = False,
) -> UNetModel:
    """A U-Net on RGB images (N, 3, image_size, image_size) with 3 outputs, 6 where `learn_sigma`.

    channel_mult: factors of num_channels, one a level, as "1,2,2"; "" takes the default of the image size.
    attention_resolutions: pixels a side at which there is attention, as "16,8"; those that the network does
    not reach have no effect, and "" leaves only the attention in the middle.
    num_classes: of a conditional network; without `class_cond` it has no effect.
    """
    if channel_mult in ("", None):
        if image_size not in DEFAULT_CHANNEL_MULT:
            known = ", ".join(map(str, DEFAULT_CHANNEL_MULT))
            raise ValueError(
                f"image_size {image_size} has no default channel_mult (there is one for {known}); give channel_mult"
            )
        channel_mult = DEFAULT_CHANNEL_MULT[image_size]
    resolutions = [int(size) for size in _numbers(attention_resolutions, "attention_resolutions") if size >= 1]
    return UNetModel(
        image_size=image_size,
        in_channels=3,
        model_channels=num_channels,
        out_channels=6 if learn_sigma else 3,
        num_res_blocks=num_res_blocks,
        attention_resolutions={image_size // size for size in resolutions},
        dropout=dropout,
        channel_mult=_numbers(channel_mult, "channel_mult"),
        num_classes=num_classes if class_cond else None,
        use_checkpoint=use_checkpoint,
        use_fp16=use_fp16,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_new_attention_order=use_new_attention_order,
    )


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | int | Sequence[int] = "",
    loss_weighting: str = "uniform",
) -> SpacedDiffusion:
    """A process of `steps` noising steps, of which `timestep_respacing` ("" for all) are visited.

    learn_sigma: the network blends the two variance bounds, else `sigma_small` picks the lower or the upper.
    use_kl: train on the variational bound instead of the MSE. predict_xstart: predict x_0 instead of the noise.
    """
    if steps < 1:
        raise ValueError(f"diffusion_steps is {steps}; expected at least 1")
    if use_kl:
        loss_type = LossType.RESCALED_KL
    else:
        loss_type = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    fixed = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing),
        betas=get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE if learn_sigma else fixed,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
        loss_weighting=loss_weighting,
    )


def unwrapped(payload: Mapping[str, Any], depth: int = 3) -> Mapping[str, torch.Tensor] | None:
    """The state dict of the U-Net in `payload`, None where there is none.

    It may be under a prefix that all of its names have (module., of several processes), or in an entry, to `depth`
    levels (state_dict, model). Of several the one whose name says ema counts, else the first.
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


_FIRST = "time_embed.0.weight"  # of every U-Net


def contents(payload: Mapping[str, Any]) -> str:
    """What a mapping that is not the state dict of a U-Net holds, in a few words."""
    if {"state", "param_groups"} <= set(payload):
        return "an optimiser's state, not the state dict of a guided-diffusion U-Net"
    if {"class_learner", "settings"} <= set(payload):
        return "a meta-model of main.py, not the state dict of a guided-diffusion U-Net"
    names = [f"{name!s:.30}" for name in list(payload)[:4]]
    more = f" and {len(payload) - len(names)} more" if len(payload) > len(names) else ""
    return f"{', '.join(names) or 'nothing'}{more}, not the state dict of a guided-diffusion U-Net"


def infer_model_flags(state_dict: Mapping[str, torch.Tensor], image_size: int | None = None) -> dict[str, Any]:
    """The flags that the names and shapes of a U-Net's state dict tell.

    image_size: pixels a side, which no tensor tells; with it the answer has `image_size` and
    `attention_resolutions`, which are in pixels. Heads, attention order, dropout, schedule and steps are not
    in the tensors and not in the answer. Raises ValueError for a state dict of another kind of network.
    """
    try:
        return _infer(state_dict, image_size)
    except (KeyError, IndexError, ZeroDivisionError, StopIteration, AttributeError) as error:
        raise ValueError(f"not the state dict of a guided-diffusion U-Net: {error} is missing or misshapen") from None


def _infer(state_dict: Mapping[str, torch.Tensor], image_size: int | None) -> dict[str, Any]:
    shapes = {name: tuple(value.shape) for name, value in state_dict.items()}
    num_channels = shapes["time_embed.0.weight"][1]
    stages = len({name.split(".")[1] for name in shapes if name.startswith("output_blocks.")})
    # The first decoder stage that ends in upsampling closes the coarsest level of num_res_blocks + 1 stages.
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


def add_dict_to_argparser(
    parser: argparse.ArgumentParser, defaults: Mapping[str, Any], help: Mapping[str, str] | None = None
) -> None:
    """Give `parser` a flag --name for each default, of the default's type; None means a string."""
    for name, value in defaults.items():
        kind = str2bool if isinstance(value, bool) else str if value is None else type(value)
        alone = dict(nargs="?", const=True) if isinstance(value, bool) else {}  # --name is --name True
        parser.add_argument(f"--{name}", default=value, type=kind, help=(help or {}).get(name), **alone)


def args_to_dict(args: argparse.Namespace, keys: Sequence[str]) -> dict[str, Any]:
    """The values of `keys` among parsed arguments."""
    return {key: getattr(args, key) for key in keys}


def str2bool(text: str | bool) -> bool:
    """A yes-or-no word as bool; raises argparse.ArgumentTypeError for any other."""
    if isinstance(text, bool):
        return text
    words = {"yes": True, "true": True, "t": True, "y": True, "1": True}
    words |= {"no": False, "false": False, "f": False, "n": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} given; expected true or false")
    return words[text.lower()]


def _numbers(spec: str | float | Sequence[float], name: str) -> tuple[float, ...]:
    """Comma-separated or listed numbers, whole ones as int."""
    if isinstance(spec, str):
        parts: Sequence = [part for part in spec.split(",") if part.strip()]
    else:
        parts = [spec] if isinstance(spec, int | float) else spec
    try:
        values = [float(part) for part in parts]
    except (TypeError, ValueError):
        raise ValueError(f"{name} {spec!r} given; expected numbers with commas between, as in 1,2,2") from None
    return tuple(int(value) if value == int(value) else value for value in values)
