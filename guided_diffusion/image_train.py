"""Pretrain diffusion models on a folder of images: one model, or at one stroke a whole pool.

    python guided_diffusion/image_train.py --data_dir path/to/data --save_dir ckpt/diffusion/mine
    python guided_diffusion/image_train.py --data_dir data/mine/meta_train --pool ckpt/pools/mine --classes_per_model 5

A pool takes the class folders of --data_dir in sorted order, trains one model for every --classes_per_model of them
into <pool>/subset{m}/ckpt/model.pt, and writes <pool>/pool.json, which says what is where. The same command again
goes on where it stopped; a subset that is done is not done again.

Images that cannot be read are left out; skipped_images.csv in the model's or the pool's folder says which and why.

A few images of each class are kept back (--hold_out): a line after the training, for a pool also pool.json, says how
near the model's samples lie to its training images, against how near those held-out images lie to them.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs as a script from anywhere

from guided_diffusion.dist_util import pick_device  # noqa: E402
from guided_diffusion.image_datasets import TrainingImages, check_classes, class_folders, load_images  # noqa: E402
from guided_diffusion.memorisation import measure, sentence, split  # noqa: E402
from guided_diffusion.pool import Pool, subset_path  # noqa: E402
from guided_diffusion.script_util import (  # noqa: E402
    add_dict_to_argparser,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from guided_diffusion.train_util import MODEL_FILE, TrainLoop, TrainSettings  # noqa: E402
from utils import processes  # noqa: E402
from utils.cli import OneLineParser, run  # noqa: E402
from utils.images import Skipped  # noqa: E402
from utils.lock import locked  # noqa: E402
from utils.progress import duration, hush  # noqa: E402
from utils.run_log import read_json, say_damaged, write_json, write_skipped  # noqa: E402
from utils.seeding import seed_everything  # noqa: E402

POOL = 5  # models that the clusters recipe of main.py needs
TRIAL = 10.0  # seconds of steps that the estimate of --dry_run comes from
FIGURES = "memorisation"  # in pool.json, by model

HELP = {
    "data_dir": "folder of images, nested as you like; for a pool or with --class_cond one folder a class",
    "save_dir": "where one model goes: model.pt, samples.png",
    "pool": "make a pool in this folder instead of one model",
    "classes_per_model": "classes that a model of the pool learns",
    "subsets": "train only these models of the pool, as 1,3,5 (several processes can share the work); empty: all",
    "hold_out": "share of each class of 20 images or more to keep back, at most 16, to see whether the model copies; "
    "0: none",
    "held_out_dir": "class folders of other images, that the pool never saw, to measure it against instead",
    "steps": "optimiser steps",
    "lr_anneal_steps": "take this many steps and lower the rate linearly to 0 over them; 0: off",
    "batch_size": "images a step",
    "microbatch": "images that pass the network at once; -1: the whole batch",
    "ema_rate": "decay of the weights' moving average, warmed up",
    "grad_clip": "greatest gradient norm; 0: no clipping",
    "random_flip": "mirror half of the images; say False where left and right differ",
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
        "lr": 1e-4,
        "weight_decay": 0.0,
        "lr_anneal_steps": 0,
        "batch_size": 24,
        "microbatch": -1,
        "ema_rate": 0.9999,
        "grad_clip": 0.0,
        "random_flip": True,
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
    return parser


def main() -> None:
    """Parse, check, and train what was asked for."""
    args = create_argparser().parse_args()
    hush(args.quiet)
    if not args.data_dir:
        raise ValueError("got no --data_dir; give a folder of images to train on")
    if not 0 <= args.hold_out < 1:
        raise ValueError(f"got hold_out {args.hold_out}, expected a share from 0 to below 1, such as 0.05")
    device = pick_device(args.device)
    if args.pool:
        train_pool(args, device)
    else:
        train_one(args, device)


def train_one(args: argparse.Namespace, device) -> None:
    """Train one model on what is in --data_dir, and measure it; or say what that would be."""
    path = Path(args.save_dir) / MODEL_FILE
    if path.exists():
        raise ValueError(f"{path}: is there already; give another --save_dir or move it away")
    names = _classes(args) if args.class_cond else None
    data, held_out, skipped = _load(args, args.image_size, names, args.hold_out)
    loop = training(args, data, path.parent, args.seed, device)
    if args.dry_run:
        return say(_work(loop, 1))
    with locked(path.parent):  # now that flags and images are known to be good
        write_skipped(path.parent, skipped)
        say(f"saved {loop.run()}")
    if processes.is_first():
        _figure(args, path, data, held_out, args.seed, device)


def train_pool(args: argparse.Namespace, device) -> None:
    """Train the models of a pool that are not there yet, and measure those that are not; or say what that would be."""
    names = _classes(args)
    if args.classes_per_model < 1:
        raise ValueError(f"got classes_per_model {args.classes_per_model}, expected 1 or more")
    groups = [names[i : i + args.classes_per_model] for i in range(0, len(names), args.classes_per_model)]
    wanted = _subsets(args.subsets, len(groups))
    models = [
        {"path": str(subset_path(".", m)), "classes": group, "num_classes": len(group)}
        for m, group in enumerate(groups, 1)
    ]
    index = Path(args.pool) / "pool.json"
    known, hold_out = _read(index, "it is written anew"), args.hold_out
    if known:
        if known.get("models") != models:
            raise ValueError(f"{index}: is of other classes or --classes_per_model; give the same, or another --pool")
        hold_out = known.get("hold_out", 0.0)  # without an entry it is from before there was any
        if hold_out != args.hold_out:
            say(f"{index}: was made with --hold_out {hold_out:g}, which stays")
    contents = {"image_size": args.image_size, "steps": _steps(args), "hold_out": hold_out, "models": models}
    to_train = [m for m in wanted if not subset_path(args.pool, m).exists()]
    check_classes(args.data_dir, [name for m in to_train for name in groups[m - 1]])  # before hours of training
    if len(groups) < POOL:
        say(f"{len(groups)} models: main.py will need --recipe paper; its default learns to tell {POOL} or more apart")
    if args.dry_run and not to_train:
        return say(f"{args.pool}: all models are trained")
    for m in to_train if args.dry_run else wanted:
        path, seed, size = subset_path(args.pool, m), args.seed + m, args.image_size
        done = processes.first_says(path.exists())
        if done:
            say(f"{path} is done")
            measured = known.get(FIGURES, {}).get(f"subset{m}")
            if measured and not (args.held_out_dir and measured["held_out"] is None):
                continue
            size = Pool(path).load(0).image_size
        data, held_out, skipped = _load(args, size, groups[m - 1], hold_out)
        if not done:
            loop = training(args, data, path.parent, seed, device)
            if args.dry_run:
                return say(_work(loop, len(to_train)))
            with locked(path.parent):  # now that flags and images are known to be good
                if processes.is_first():
                    _write(index, contents, m, None)
                write_skipped(args.pool, skipped)
                say(f"saved {loop.run()}")
        if not processes.is_first():
            continue
        _write(index, {**contents, **known} if done else contents, m, _figure(args, path, data, held_out, seed, device))


def _load(
    args: argparse.Namespace, size: int, names: list[str] | None, hold_out: float
) -> tuple[TrainingImages, Tensor, Skipped]:
    """What to train on, the held-out images (H, 3, size, size) uint8, and what was left out of both."""
    data, held_out = split(load_images(args.data_dir, size, names), hold_out)
    if not args.held_out_dir:
        return data, held_out, data.skipped
    others = load_images(args.held_out_dir, size, names)
    return data, others.images, data.skipped | others.skipped


def training(args: argparse.Namespace, data: TrainingImages, folder: Path, seed: int, device) -> TrainLoop:
    """The training of one model on `data`, ready to run."""
    flags = args_to_dict(args, list(model_and_diffusion_defaults()))
    if args.class_cond:
        flags["num_classes"] = len(data.class_names)
    seed_everything(seed)
    model, diffusion = create_model_and_diffusion(**flags)
    settings = TrainSettings(
        steps=_steps(args),
        lr=args.lr,
        weight_decay=args.weight_decay,
        anneal=args.lr_anneal_steps > 0,
        batch_size=args.batch_size,
        microbatch=args.microbatch,
        ema_rate=args.ema_rate,
        grad_clip=args.grad_clip,
        flip=args.random_flip,
        schedule_sampler=args.schedule_sampler,
        log_interval=args.log_interval,
        save_interval=args.save_interval,
        precision=args.precision,
        half_weights=args.half_weights,
        seed=seed,
    )
    say(f"{folder}: {len(data.images)} images of {len(data.class_names)} classes, "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {device}")  # fmt: skip
    return TrainLoop(
        model=model, diffusion=diffusion, data=data, settings=settings, flags=flags, folder=folder, device=device
    )


def _work(loop: TrainLoop, models: int) -> str:
    """What there is to do for `models` like that of `loop`, the only one that may have begun, and about how long."""
    left, flops, seconds = loop.measure(TRIAL)
    s = loop.settings
    steps = left + (models - 1) * s.steps
    begun = f", {s.steps - left:,} of which are done" if left < s.steps else ""
    return (
        f"{models} model{'s' * (models > 1)} x {s.steps:,} steps{begun} x {s.batch_size} images: "
        f"{steps * flops / 1e12:,.1f} TFLOP, about {duration(steps * seconds)} on {loop.device}, after a trial of "
        f"{TRIAL:.0f} s; samples and saves come on top"
    )


def _figure(args: argparse.Namespace, path: Path, data: TrainingImages, held_out, seed: int, device) -> dict[str, Any]:
    """Measure and print how near the samples of a finished model lie to its training images."""
    figure = measure(
        Pool(path).load(0, device),
        data.images,
        held_out,
        mirrored=args.random_flip,
        seed=seed,
        precision=args.precision,
        device=device,
    )
    print(f"{path}: {sentence(figure)}")
    return figure


def say(text: str) -> None:
    """Print, where this is the process that speaks for all."""
    if processes.is_first():
        print(text)


def _read(index: Path, instead: str = "") -> dict[str, Any]:
    """What pool.json says, {} without one. instead: what is done without what is damaged in it; "" says nothing."""
    known = read_json(index, dict, instead) or {}
    for name, sound in _SOUND.items():
        if name in known and not sound(known[name]):
            if instead:
                say_damaged(index, f"its {name} is damaged; {instead}")
            del known[name]
    return known if "models" in known else {}


_SOUND = {  # entries of pool.json that are looked at
    "models": lambda value: isinstance(value, list) and all(isinstance(each, dict) for each in value),
    "hold_out": lambda value: isinstance(value, int | float) and 0 <= value < 1,
    FIGURES: lambda value: isinstance(value, dict)
    and all(isinstance(each, dict) and "held_out" in each for each in value.values()),
}


def _write(index: Path, contents: dict[str, Any], m: int, figure: dict[str, Any] | None) -> None:
    """Write pool.json with model m's figure, or without one; those that other processes wrote meanwhile stay.

    Should two write in the same instant, a figure is lost at worst, and the same command again makes it.
    """
    figures = _read(index).get(FIGURES, {}) | {f"subset{m}": figure}
    write_json(index, {**contents, FIGURES: {name: each for name, each in figures.items() if each}})


def _classes(args: argparse.Namespace) -> list[str]:
    names = class_folders(args.data_dir)
    if not names:
        raise ValueError(
            f"{args.data_dir}: got no class folders; a pool, or --class_cond, needs one folder of images a class"
        )
    return names


def _steps(args: argparse.Namespace) -> int:
    return args.lr_anneal_steps or args.steps


def _subsets(text: str, count: int) -> list[int]:
    try:
        wanted = [int(part) for part in text.split(",") if part.strip()] or list(range(1, count + 1))
    except ValueError:
        raise ValueError(f"got --subsets {text!r}, expected numbers with commas between, as in 1,3,5") from None
    wrong = [m for m in wanted if not 1 <= m <= count]
    if wrong:
        raise ValueError(f"got --subsets {text!r}, but this pool has models 1 to {count}")
    return wanted


if __name__ == "__main__":
    run(main)
