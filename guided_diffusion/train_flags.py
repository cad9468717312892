"""The settings of pretraining. Each is declared once, here.

The flags with their defaults and help, the checks, what a network and its process are made with (`script_util`) and
what a resumed run must not change (`made_with`) all come from the fields of `TrainSettings`.
"""

import argparse
import math
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from guided_diffusion.dist_util import PRECISIONS
from guided_diffusion.resample import SAMPLERS
from utils.cli import OneLineParser

WEIGHTS, SPEED, PLACE = "weights", "speed", "place"  # what a setting affects; PLACE: files, and what is shown
NETWORK, PROCESS = "network", "diffusion process"
COUNT = (1, math.inf, "1 or more")
SHARE = (0, math.nextafter(1, 0), "a fraction from 0 to below 1")


def setting(default: Any, help: str, *, group: str, affects: str = WEIGHTS, within: tuple = (), choices: tuple = ()):
    """Declare a dataclass field that becomes a flag.

    within: least and greatest value of a number, and how to say that; outside of it the default is valid, too.
    """
    if len(within) == 2:
        within = (*within, f"{within[0]} to {within[1]}")
    if within and not within[0] <= default <= within[1]:
        within = (*within[:2], f"{default}, or {within[2]}")
    extra = dict(help=help, group=group, affects=affects, within=within, choices=choices)
    return field(default=default, metadata=extra)


files = partial(setting, group="images and files", affects=PLACE)
training = partial(setting, group="training")
running = partial(setting, group="saving, progress and machine", affects=PLACE)
network = partial(setting, group=NETWORK)
process = partial(setting, group=PROCESS)


@dataclass(frozen=True)
class TrainSettings:
    """All settings of `image_train.py`. `parse` checks the values."""

    data_dir: str = files("", "folder of images, read recursively; --pool and --class_cond need one folder per class")
    save_dir: str = files("ckpt/diffusion", "output folder of one model: weights, samples, loss and memorisation")
    pool: str = files("", "train a pool in this folder instead of one model")
    classes_per_model: int = files(5, "classes per pool model", within=COUNT)
    subsets: str = files("", "train only these pool models, such as 1,3,5, to split the work; empty: all")
    hold_out: float = files(0.05, "fraction to hold out of each class of 20 or more images, at most 16 images, to "
                            "check whether the model copies; 0: none", within=SHARE, affects=WEIGHTS)  # fmt: skip
    held_out_dir: str = files("", "class folders of unseen images, to check for copies instead of --hold_out")
    steps: int = training(20_000, "optimiser steps; a higher number trains a finished model further", within=COUNT)
    keep_state: bool = running(False, "keep state.pt of a finished model: training it further then exactly matches one "
                               "longer run")  # fmt: skip
    lr: float = training(1e-4, "learning rate", within=(math.ulp(0), 1, "above 0, up to 1"))
    weight_decay: float = training(0.0, "weight decay of AdamW", within=(0, 10))
    lr_anneal_steps: int = training(0, "train for this many steps while the learning rate falls linearly to 0; 0: off",
                                    within=(0, math.inf, "0 or more"))  # fmt: skip
    batch_size: int = training(24, "images per step", within=(1, 2**16))
    microbatch: int = training(-1, "images per forward pass; -1 or 0: the whole batch", affects=SPEED,
                               within=(0, 2**16))  # fmt: skip
    ema_rate: float = training(0.9999, "decay of the moving average of the weights, with warm-up: "
                               "min(rate, (1 + step) / (10 + step))", within=SHARE)  # fmt: skip
    grad_clip: float = training(0.0, "maximum gradient norm; 0: no clipping", within=(0, 10**9))
    random_flip: bool = training(False, "mirror half of the images; use only if left and right are interchangeable")
    schedule_sampler: str = training("uniform", "how to sample timesteps in training", choices=tuple(SAMPLERS))
    log_interval: int = running(10, "steps between logged losses", within=COUNT)
    save_interval: int = running(2_000, "steps between saves, each with a sheet of EMA samples", within=COUNT)
    precision: str = training("auto", "number format in training", choices=PRECISIONS)
    half_weights: bool = training(False, "save the weights in float16, half the size")
    device: str = running("auto", "auto, cpu, cuda or cuda:N", affects=SPEED)
    quiet: bool = running(False, "show no progress bars")
    dry_run: bool = running(False, "print the steps left and an estimate of their time from a short trial, then stop")
    seed: int = training(0, "seed of all randomness; model m of a pool uses seed + m", within=(0, 2**32 - 1))

    image_size: int = network(64, "pixels per side", within=(1, 2048))
    num_channels: int = network(128, "channels of the first level; 128 for 64 pixels, 16 to 32 on a CPU",
                                within=(2, 4096))  # fmt: skip
    num_res_blocks: int = network(2, "residual blocks per level", within=(1, 64))
    num_heads: int = network(4, "attention heads", within=(1, 1024))
    num_heads_upsample: int = network(-1, "attention heads in the decoder; -1: as in the encoder", within=(1, 1024))
    num_head_channels: int = network(-1, "channels per head; -1: set by the number of heads", within=(1, 4096))
    attention_resolutions: str = network("16,8", "pixels per side of the levels that have attention")
    channel_mult: str = network("", "multiples of num_channels per level, as 1,2,4; empty: set by image size")
    dropout: float = network(0.0, "fraction of channels dropped in residual blocks", within=SHARE)
    class_cond: bool = network(False, "train a class-conditional model; each folder is a class")
    num_classes: int = network(5, "classes of a class-conditional model; ignored: the folders set it", affects=PLACE,
                               within=(1, 100_000))  # fmt: skip
    use_checkpoint: bool = network(False, "save memory by recomputing activations in the backward pass", affects=SPEED)
    use_scale_shift_norm: bool = network(True, "let time and class also scale the normalised maps")
    resblock_updown: bool = network(False, "let residual blocks change the resolution")
    use_fp16: bool = network(False, "float16, in old checkpoints; True is refused: give --precision bf16")
    use_new_attention_order: bool = network(False, "split queries, keys and values before the heads")
    learn_sigma: bool = process(False, "learn the variances")
    diffusion_steps: int = process(1000, "timesteps", within=(1, 100_000))
    noise_schedule: str = process("linear", "noise schedule", choices=("linear", "cosine"))
    timestep_respacing: str = process("", "train only on these timesteps, such as 250 or ddim25; empty: all")
    use_kl: bool = process(False, "train on the variational bound")
    predict_xstart: bool = process(False, "predict the image instead of the noise; better for small networks")
    rescale_timesteps: bool = process(False, "scale t to 1000 for the network, whatever --diffusion_steps")
    rescale_learned_sigmas: bool = process(False, "scale the loss of the variances to match that of the means")
    loss_weighting: str = process("uniform", "weight of timesteps in the loss: uniform, or min_snr (arXiv 2303.09556): "
                                  "signal-to-noise ratio, at most 5; gives good samples in fewer steps",
                                  choices=("uniform", "min_snr"))  # fmt: skip


RANGES = {f.name: f.metadata["within"] for f in fields(TrainSettings) if f.metadata["within"]}

# flags of guided-diffusion's trainers (images, super-resolution, classifier) that this one lacks: what to give instead
REPLACED = {
    "resume_checkpoint": "to resume, run the same command again, with its --save_dir or --pool",
    "fp16_scale_growth": "give --precision bf16, which needs no scaling of the loss",
    "sigma_small": "give --learn_sigma True, which learns the variances",
    "large_size": "give --image_size; this trains no super-resolution",
    "small_size": "give --image_size; this trains no super-resolution",
    "iterations": "give --steps",
    "anneal_lr": "give --lr_anneal_steps with the number of steps",
    "val_data_dir": "give --held_out_dir",
} | dict.fromkeys(
    ("eval_interval", "noised", "classifier_use_fp16", "classifier_width", "classifier_depth", "classifier_pool",
     "classifier_attention_resolutions", "classifier_use_scale_shift_norm", "classifier_resblock_updown"),
    "run python main.py, which trains the class-learner that guides; no classifier is trained here",
)  # fmt: skip
EXAMPLES = """examples:
  one model, on a GPU:
    python guided_diffusion/image_train.py --data_dir data/mine --save_dir ckpt/mine --learn_sigma True
  a pool, one model for every five class folders:
    python guided_diffusion/image_train.py --data_dir data/mine/meta_train --pool ckpt/pools/mine
  a pool of small models, on a CPU:
    python guided_diffusion/image_train.py --data_dir data/mine/meta_train --pool ckpt/pools/mine --image_size 32 \\
        --num_channels 16 --channel_mult 1,2,4 --num_res_blocks 1 --num_heads 2 --attention_resolutions 8 \\
        --predict_xstart True --noise_schedule cosine --loss_weighting min_snr --lr 1e-3 --steps 1500 --batch_size 32
"""


def defaults() -> dict[str, Any]:
    """Return every flag with its default; those of guided-diffusion's trainer keep their names."""
    return {f.name: f.default for f in fields(TrainSettings)}


def create_argparser() -> argparse.ArgumentParser:
    """Return the parser of all flags, by group."""
    parser = OneLineParser(
        description="Pretrain an unconditional or class-conditional diffusion model, or a pool of them.",
        usage="%(prog)s --data_dir FOLDER [--FLAG VALUE ...]", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    groups: dict[str, Any] = {}
    for f in fields(TrainSettings):
        title, choices, yes_or_no = f.metadata["group"], f.metadata["choices"], isinstance(f.default, bool)
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        notes = [*f.metadata["within"][2:], f"default {f.default!r}"]
        groups[title].add_argument(
            f"--{f.name}", default=f.default, help=f"{f.metadata['help']} ({'; '.join(notes)})",
            choices=choices or None, metavar="|".join(choices) or ("True|False" if yes_or_no else "VALUE"),
            type=str2bool if yes_or_no else {"ema_rate": _one_rate}.get(f.name, type(f.default)),
            **(dict(nargs="?", const=True) if yes_or_no else {}),  # --name is --name True
        )  # fmt: skip
    for name in REPLACED:
        parser.add_argument(f"--{name}", nargs="?", const="True", default="", help=argparse.SUPPRESS)
    return parser


def parse(argv: list[str] | None = None) -> TrainSettings:
    """Return the settings of a command line; `steps` are those of --lr_anneal_steps if given.

    Raises ValueError for a flag that is replaced and for a value that is not valid.
    """
    given = vars(create_argparser().parse_args(argv))
    for name, instead in REPLACED.items():
        if given.pop(name).lower() not in ("", "false"):
            raise ValueError(f"got --{name}, which is a flag of guided-diffusion that this program lacks: {instead}")
    if given["use_fp16"]:
        raise ValueError("got --use_fp16 True, which this program does not train with; give --precision bf16")
    settings = TrainSettings(**given)
    for name, (low, high, words) in RANGES.items():
        if not low <= given[name] <= high and given[name] != getattr(TrainSettings, name):  # refuses NaN, too
            raise ValueError(f"got --{name} {given[name]}, expected {words}")
    return replace(settings, steps=settings.lr_anneal_steps or settings.steps)


def str2bool(text: str) -> bool:
    """Return a yes-or-no word as bool. Raises argparse.ArgumentTypeError for any other."""
    words = dict.fromkeys(("yes", "true", "t", "y", "1"), True) | dict.fromkeys(("no", "false", "f", "n", "0"), False)
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected True or False")
    return words[text.lower()]


def _one_rate(text: str) -> float:
    """Return the rate that --ema_rate got. guided-diffusion takes a list here."""
    *several, last = text.split(",")
    if several:
        raise argparse.ArgumentTypeError(
            f"got {text}, expected one rate: a model has one average; give --ema_rate {last}"
        )
    return float(last)
