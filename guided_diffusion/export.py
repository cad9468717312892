"""Write a model as a pipeline of the library diffusers: `UNet2DModel` and `DDPMScheduler`, with the same predictions.

    python -m guided_diffusion.export ckpt/pools/mine/subset1/ckpt/model.pt exported

`from_diffusers` reads what it writes, and so does `diffusers.DDPMPipeline.from_pretrained`.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from guided_diffusion.from_diffusers import library
from guided_diffusion.pool import Pool, PoolModel
from guided_diffusion.unet import AttentionBlock, ResBlock, Stage, UNetModel
from utils import checkpoint
from utils.cli import OneLineParser, run


def export(model: PoolModel, out: str | os.PathLike) -> None:
    """Write `model` to the folder `out`, whole or not at all.

    Raises ValueError if `out` exists, if diffusers is missing, or if its classes cannot express the model; the message
    says why.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out}: is there already; give another folder to write to")
    diffusers = library()
    network = diffusers.UNet2DModel(**unet_config(model))
    state = {name: tensor.float() for name, tensor in state_dict(model.network)}
    checkpoint.load_state(network, state, model.path)
    scheduler = diffusers.DDPMScheduler(**scheduler_config(model))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        diffusers.DDPMPipeline(network, scheduler).save_pretrained(Path(folder) / "model")
        os.replace(Path(folder) / "model", out)


def unet_config(model: PoolModel) -> dict[str, Any]:
    """Return the settings of a `UNet2DModel` with the same predictions as `model`. Errors as for `export`."""
    network, flags = model.network, model.flags
    if not isinstance(network, UNetModel):
        raise ValueError(f"{model.path}: is in the format of diffusers already; give a model of image_train.py")
    groups = sorted({norm.num_groups for norm in network.modules() if isinstance(norm, nn.GroupNorm)})
    if len(groups) > 1:
        raise ValueError(
            f"{model.path}: its norms have {', '.join(map(str, groups))} groups, expected one number for all; "
            "UNet2DModel can express networks whose widths are all multiples of 32"
        )
    attentions = [block for block in network.modules() if isinstance(block, AttentionBlock)]
    head_dims = {block.norm.num_channels // block.num_heads for block in attentions}
    one_head = all(block.num_heads == 1 for block in attentions)
    if len(head_dims) > 1 and not one_head:
        raise ValueError(
            f"{model.path}: its heads have {', '.join(map(str, sorted(head_dims)))} channels, expected one number for "
            "all; UNet2DModel can express networks made with num_head_channels, or with num_heads 1"
        )
    firsts = [level[0] for level in _levels(network)]
    widths = [stage[0].out_layers[0].num_channels for stage in firsts]
    if widths[0] != network.model_channels:
        raise ValueError(
            f"{model.path}: its channel_mult starts with {widths[0] / network.model_channels:g}, expected 1: "
            "UNet2DModel makes the time embedding from its first width"
        )
    kinds = ["Attn" if len(stage) > 1 else "Resnet" if flags["resblock_updown"] else "" for stage in firsts]
    down, up = ({"Attn": f"Attn{way}Block2D", "": f"{way}Block2D", "Resnet": f"Resnet{way}sampleBlock2D"}
                for way in ("Down", "Up"))  # fmt: skip
    resample = "resnet" if flags["resblock_updown"] else "conv"
    return dict(
        sample_size=flags["image_size"], in_channels=3, out_channels=network.out_channels, block_out_channels=widths,
        down_block_types=[down[kind] for kind in kinds], up_block_types=[up[kind] for kind in reversed(kinds)],
        layers_per_block=flags["num_res_blocks"], downsample_type=resample, upsample_type=resample,
        resnet_time_scale_shift="scale_shift" if flags["use_scale_shift_norm"] else "default",
        attention_head_dim=None if one_head else head_dims.pop(), norm_num_groups=groups[0],
        attn_norm_num_groups=groups[0], dropout=flags["dropout"], num_class_embeds=network.num_classes,
    )  # fmt: skip


def scheduler_config(model: PoolModel) -> dict[str, Any]:
    """Return the settings of a `DDPMScheduler` with the diffusion process of `model`. Errors as for `export`."""
    flags = model.flags
    steps = flags["diffusion_steps"]
    if flags["timestep_respacing"] or (flags["rescale_timesteps"] and steps != 1000):
        raise ValueError(
            f"{model.path}: was trained on timesteps other than 0 to {steps - 1} (timestep_respacing, "
            "rescale_timesteps), which DDPMScheduler cannot express; give another model"
        )
    betas = model.diffusion().betas
    named = {"linear": dict(beta_schedule="linear", beta_start=float(betas[0]), beta_end=float(betas[-1])),
             "cosine": dict(beta_schedule="squaredcos_cap_v2")}  # fmt: skip
    return dict(
        num_train_timesteps=steps, prediction_type="sample" if flags["predict_xstart"] else "epsilon",
        variance_type="learned_range" if flags["learn_sigma"] else "fixed_large", **named[flags["noise_schedule"]],
    )  # fmt: skip


def state_dict(network: UNetModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of `network` by the names that they have in `UNet2DModel`."""
    yield from _same("time_embedding.linear_1", network.time_embed[0])
    yield from _same("time_embedding.linear_2", network.time_embed[2])
    if network.num_classes is not None:
        yield from _same("class_embedding", network.label_emb)
    yield from _same("conv_in", network.input_blocks[0][0])
    for level, stages in enumerate(_levels(network)):
        for number, (first, *attention) in enumerate(stages):
            if number == len(stages) - 1 and level < network.downsampling.bit_length() - 1:
                yield from _layer(f"down_blocks.{level}.downsamplers.0", first)
                continue
            yield from _layer(f"down_blocks.{level}.resnets.{number}", first)
            for layer in attention:
                yield from _layer(f"down_blocks.{level}.attentions.{number}", layer)
    before, attention, after = network.middle_block
    yield from _layer("mid_block.resnets.0", before)
    yield from _layer("mid_block.attentions.0", attention)
    yield from _layer("mid_block.resnets.1", after)
    per_level = len(network.output_blocks) // network.downsampling.bit_length()
    for index, (first, *others) in enumerate(network.output_blocks):
        block, number = divmod(index, per_level)
        yield from _layer(f"up_blocks.{block}.resnets.{number}", first)
        for layer in others:
            place = f"attentions.{number}" if isinstance(layer, AttentionBlock) else "upsamplers.0"
            yield from _layer(f"up_blocks.{block}.{place}", layer)
    yield from _same("conv_norm_out", network.out[0])
    yield from _same("conv_out", network.out[2])


def _levels(network: UNetModel) -> list[list[Stage]]:
    """Return the encoder's stages by level. The last stage of each level but the last halves the resolution."""
    stages, levels = list(network.input_blocks)[1:], network.downsampling.bit_length()
    per_level = (len(stages) + 1) // levels
    return [stages[level * per_level : (level + 1) * per_level] for level in range(levels)]


def _layer(name: str, layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if isinstance(layer, ResBlock):
        yield from _same(f"{name}.norm1", layer.in_layers[0])
        yield from _same(f"{name}.conv1", layer.in_layers[2])
        yield from _same(f"{name}.time_emb_proj", layer.emb_layers[1])
        yield from _same(f"{name}.norm2", layer.out_layers[0])
        yield from _same(f"{name}.conv2", layer.out_layers[3])
        yield from _same(f"{name}.conv_shortcut", layer.skip_connection)
    elif isinstance(layer, AttentionBlock):
        yield from _same(f"{name}.group_norm", layer.norm)
        for kind in ("weight", "bias"):
            qkv = getattr(layer.qkv, kind).flatten(1) if kind == "weight" else layer.qkv.bias
            by_head = qkv.unflatten(0, (layer.num_heads, 3, -1)).transpose(0, 1)
            qkv = qkv.unflatten(0, (3, layer.num_heads, -1)) if layer.new_order else by_head
            for letter, part in zip("qkv", qkv, strict=True):
                yield f"{name}.to_{letter}.{kind}", part.flatten(0, 1).contiguous()
        yield f"{name}.to_out.0.weight", layer.proj_out.weight.squeeze(-1)
        yield f"{name}.to_out.0.bias", layer.proj_out.bias
    else:  # the convolution of Downsample or Upsample
        yield from _same(f"{name}.conv", next(layer.children()))


def _same(name: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for kind, tensor in module.state_dict().items():
        yield f"{name}.{kind}", tensor


def main() -> None:
    """Parse the arguments, load the model and export it."""
    parser = OneLineParser(description="Write a model as a pipeline of the library diffusers.")
    parser.add_argument("model", help="checkpoint of image_train.py, or the folder with its model.pt")
    parser.add_argument("out", help="folder to write; it must not be there yet")
    args = parser.parse_args()
    pool = Pool(args.model)
    path = pool.files[0]
    if len(pool) > 1:
        raise ValueError(f"{args.model}: got {len(pool)} models, expected one; give one of them, as {path}")
    if path.is_file() and not {"model", "flags"} <= set(checkpoint.load(path)):
        raise ValueError(f"{path}: does not hold its image size, noise schedule and heads; give one of image_train.py")
    export(pool.load(0), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
