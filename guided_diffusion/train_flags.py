"""The flags of image_train.py: names, defaults, help, ranges, and what replaces those of guided-diffusion."""

import argparse
import math
from typing import Any

from guided_diffusion.script_util import add_dict_to_argparser, model_and_diffusion_defaults
from utils.cli import OneLineParser

HELP = {
    "data_dir": "folder of images, nested as you like; for a pool or with --class_cond one folder a class",
    "save_dir": "where one model goes: model.pt, samples.png, memorisation.json",
    "pool": "make a pool in this folder instead of one model",
    "classes_per_model": "classes that a model of the pool learns",
    "subsets": "train only these models of the pool, as 1,3,5 (several processes can share the work); empty: all",
    "hold_out": "share of each class of 20 images or more to keep back, at most 16, to see whether the model copies; "
    "0: none",
    "held_out_dir": "class folders of other images, that the pool never saw, to measure it against instead",
    "steps": "optimiser steps; more than a finished model has train it further",
    "lr_anneal_steps": "take this many steps and lower the rate linearly to 0 over them; 0: off",
    "keep_state": "keep state.pt beside a finished model, so that more --steps give exactly what one longer run would",
    "batch_size": "images a step",
    "microbatch": "images that pass the network at once; -1: the whole batch",
    "ema_rate": "decay of the weights' moving average, warmed up",
    "grad_clip": "greatest gradient norm; 0: no clipping",
    "random_flip": "mirror half of the images, where left and right are alike",
    "schedule_sampler": "uniform or loss-second-moment",
    "log_interval": "steps between losses shown",
    "save_interval": "steps between saves, each with a grid of EMA samples",
    "precision": "auto, float32 or bf16",
    "half_weights": "save the weights in float16, half the size",
    "device": "auto, cpu, cuda or cuda:N",
    "quiet": "show no progress bars",
    "dry_run": "say how many steps there are to take and about how long they take, by a trial, and stop",
    "lr": "learning rate",
    "weight_decay": "of AdamW",
    "seed": "of everything random; model m of a pool has this + m",
    "image_size": "pixels a side",
    "num_channels": "channels of the first level; 128 for 64 pixels, 16 to 32 for a CPU",
    "num_res_blocks": "residual blocks a level",
    "channel_mult": "channels of each level as multiples, as 1,2,4; empty: by the image size (64 or more)",
    "attention_resolutions": "sides in pixels of the levels with attention, as 16,8",
    "num_heads": "attention heads",
    "num_head_channels": "channels a head; -1: by the number of heads",
    "num_heads_upsample": "heads on the way up; -1: as on the way down",
    "class_cond": "take class labels; the folders are the classes",
    "num_classes": "set by the folders",
    "use_scale_shift_norm": "time and class scale the normalised maps, too",
    "resblock_updown": "residual blocks change the resolution",
    "use_new_attention_order": "queries, keys and values apart before the heads are",
    "use_checkpoint": "compute maps again on the way back, for less memory",
    "use_fp16": "of old checkpoints; see --precision",
    "dropout": "share of channels dropped in residual blocks",
    "learn_sigma": "learn the variances",
    "diffusion_steps": "timesteps",
    "noise_schedule": "linear or cosine",
    "timestep_respacing": "train on these timesteps alone, as 250 or ddim25; empty: all",
    "use_kl": "the variational bound as the loss",
    "predict_xstart": "predict the image in place of the noise; better for small networks",
    "rescale_timesteps": "give the network t of 1000 whatever --diffusion_steps",
    "rescale_learned_sigmas": "scale the loss of the variances to that of the means",
    "loss_weighting": "uniform, or min_snr (arXiv 2303.09556): good samples in fewer steps",
}

_CLASSIFIER = "no classifier is trained here; python main.py trains the class-learner that steers"
# flags of guided-diffusion's trainers (images, super-resolution, classifier) that this one lacks: what to give instead
REPLACED = {
    "resume_checkpoint": "the same command again resumes from its --save_dir or --pool; higher --steps train a "
    "finished model further",
    "fp16_scale_growth": "--precision bf16 needs no scaling of the loss",
    "sigma_small": "--learn_sigma True learns the variances",
    "large_size": "give --image_size; this trains no super-resolution",
    "small_size": "give --image_size; this trains no super-resolution",
    "iterations": "give --steps",
    "anneal_lr": "give --lr_anneal_steps with the number of steps",
    "val_data_dir": "give --held_out_dir",
    **dict.fromkeys(
        ("eval_interval", "noised", "classifier_use_fp16", "classifier_width", "classifier_depth", "classifier_pool",
         "classifier_attention_resolutions", "classifier_use_scale_shift_norm", "classifier_resblock_updown"),
        _CLASSIFIER,
    ),
}  # fmt: skip

_COUNT = (1, math.inf, "1 or more")
_SHARE = (0, math.nextafter(1, 0), "a share from 0 to below 1")
# least and greatest value of every number, and how that reads
RANGES = {
    "classes_per_model": _COUNT,
    "hold_out": (*_SHARE[:2], "a share from 0 to below 1, such as 0.05"),
    "steps": _COUNT,
    "lr": (math.ulp(0), 1, "a rate above 0, up to 1, such as 1e-4"),
    "weight_decay": (0, 10, "0 to 10"),
    "lr_anneal_steps": (0, math.inf, "0 or more"),
    "batch_size": (1, 2**16, f"1 to {2**16}"),
    "microbatch": (-1, 2**16, f"-1, or up to {2**16}"),
    "ema_rate": (*_SHARE[:2], "a decay from 0 to below 1, such as 0.9999"),
    "grad_clip": (0, 1e9, "0 to 1e9"),
    "log_interval": _COUNT,
    "save_interval": _COUNT,
    "seed": (0, 2**32 - 1, f"0 to {2**32 - 1}"),
    "image_size": (1, 2048, "1 to 2048"),
    "num_channels": (1, 4096, "1 to 4096"),
    "num_res_blocks": (1, 64, "1 to 64"),
    "num_heads": (1, 1024, "1 to 1024"),
    "num_heads_upsample": (-1, 1024, "-1, or 1 to 1024"),
    "num_head_channels": (-1, 4096, "-1, or 1 to 4096"),
    "num_classes": (1, 100_000, "1 to 100000"),
    "dropout": _SHARE,
    "diffusion_steps": (1, 100_000, "1 to 100000"),
}
_NOT_ZERO = ("num_heads_upsample", "num_head_channels")
_LISTS = {"channel_mult": 1024, "attention_resolutions": 4096}  # numbers with commas between: greatest value


def defaults() -> dict[str, Any]:
    """Every flag with its default; those of guided-diffusion's trainer keep their names."""
    return {
        "data_dir": "",
        "save_dir": "ckpt/diffusion",
        "pool": "",
        "classes_per_model": 5,
        "subsets": "",
        "hold_out": 0.05,
        "held_out_dir": "",
        "steps": 20_000,
        "keep_state": False,
        "lr": 1e-4,
        "weight_decay": 0.0,
        "lr_anneal_steps": 0,
        "batch_size": 24,
        "microbatch": -1,
        "ema_rate": 0.9999,
        "grad_clip": 0.0,
        "random_flip": False,
        "schedule_sampler": "uniform",
        "log_interval": 10,
        "save_interval": 2_000,
        "precision": "auto",
        "half_weights": False,
        "device": "auto",
        "quiet": False,
        "dry_run": False,
        "seed": 0,
        **model_and_diffusion_defaults(),
    }


def create_argparser() -> argparse.ArgumentParser:
    """The flags, with their help and defaults."""
    parser = OneLineParser(
        description="Pretrain an unconditional or class-conditional diffusion model, or a pool of them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_dict_to_argparser(parser, defaults(), HELP)
    for name in REPLACED:
        parser.add_argument(f"--{name}", nargs="?", const="True", default="", help=argparse.SUPPRESS)
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command line, checked: ValueError for one that is replaced, and for a number out of range."""
    parser = create_argparser()
    # of a list of rates, which guided-diffusion takes, argparse would only say that it is no number
    parser._option_string_actions["--ema_rate"].type = _one_rate
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Refuse flags that are replaced, and numbers out of range: ValueError."""
    for name, instead in REPLACED.items():
        if getattr(args, name).lower() not in ("", "false"):
            raise ValueError(f"got --{name}, which is a flag of guided-diffusion that this program lacks: {instead}")
    if args.use_fp16:
        raise ValueError("got --use_fp16 True, which this program does not train with; give --precision bf16")
    for name, (low, high, words) in RANGES.items():
        value = getattr(args, name)
        whole = isinstance(value, int) or math.isfinite(value)
        if not (whole and low <= value <= high) or (value == 0 and name in _NOT_ZERO):
            raise ValueError(f"got {name} {value}, expected {words}")
    for name, most in _LISTS.items():
        for part in filter(None, map(str.strip, getattr(args, name).split(","))):
            try:
                fits = 0 < float(part) <= most or (float(part) == 0 and name == "attention_resolutions")
            except ValueError:
                fits = False
            if not fits:
                raise ValueError(f"got {name} {getattr(args, name)!r}, expected numbers up to {most}, as in 1,2,2")


def _one_rate(text: str) -> float:
    if "," in text:
        raise argparse.ArgumentTypeError(
            f"got {text}, expected one rate: a model keeps one average; give --ema_rate {text.rpartition(',')[2]}"
        )
    return float(text)
