"""Pretrain diffusion models on a folder of images: one model, or at one stroke a whole pool.

    python guided_diffusion/image_train.py --data_dir path/to/data --save_dir ckpt/diffusion/mine
    python guided_diffusion/image_train.py --data_dir data/mine/meta_train --pool ckpt/pools/mine --classes_per_model 5

A pool takes the class folders of --data_dir in sorted order, trains one model for every --classes_per_model of them
into <pool>/subset{m}/ckpt/model.pt, and writes <pool>/pool.json, which says what is where. The same command again
goes on where it stopped; a subset that is done is not done again.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs as a script from anywhere

from guided_diffusion.dist_util import pick_device  # noqa: E402
from guided_diffusion.image_datasets import class_folders, load_images  # noqa: E402
from guided_diffusion.pool import subset_path  # noqa: E402
from guided_diffusion.script_util import (  # noqa: E402
    add_dict_to_argparser,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from guided_diffusion.train_util import MODEL_FILE, TrainLoop, TrainSettings  # noqa: E402
from utils.cli import OneLineParser, run  # noqa: E402
from utils.run_log import write_json  # noqa: E402
from utils.seeding import seed_everything  # noqa: E402

HELP = {
    "data_dir": "folder of images, nested as you like; for a pool or with --class_cond one folder a class",
    "save_dir": "where one model goes: model.pt, samples.png",
    "pool": "make a pool in this folder instead of one model",
    "classes_per_model": "classes that a model of the pool learns",
    "subsets": "train only these models of the pool, as 1,3,5 (several processes can share the work); empty: all",
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
        "seed": 0,
        **model_and_diffusion_defaults(),
    }


def main() -> None:
    """Parse, check, and train what was asked for."""
    parser = OneLineParser(
        description="Pretrain an unconditional or class-conditional diffusion model, or a pool of them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_dict_to_argparser(parser, defaults(), HELP)
    args = parser.parse_args()
    if not args.data_dir:
        raise ValueError("got no --data_dir; give a folder of images to train on")
    device = pick_device(args.device)
    if args.pool:
        train_pool(args, device)
    else:
        names = _classes(args) if args.class_cond else None
        print(f"saved {training(args, names, Path(args.save_dir), args.seed, device).run()}")


def train_pool(args: argparse.Namespace, device) -> None:
    """Train the models of a pool that are not there yet."""
    names = _classes(args)
    if args.classes_per_model < 1:
        raise ValueError(f"got classes_per_model {args.classes_per_model}, expected 1 or more")
    groups = [names[i : i + args.classes_per_model] for i in range(0, len(names), args.classes_per_model)]
    wanted = _subsets(args.subsets, len(groups))
    models = [
        {"path": str(subset_path(".", m)), "classes": group, "num_classes": len(group)}
        for m, group in enumerate(groups, 1)
    ]
    contents = {"image_size": args.image_size, "steps": _steps(args), "models": models}
    index = Path(args.pool) / "pool.json"
    if index.exists() and json.loads(index.read_text()).get("models") != models:
        raise ValueError(f"{index}: is of other classes or --classes_per_model; give the same, or another --pool")
    for m in wanted:
        path = subset_path(args.pool, m)
        if path.exists():
            print(f"{path} is done")
            continue
        loop = training(args, groups[m - 1], path.parent, args.seed + m, device)
        write_json(index, contents)  # now that flags and images are known to be good
        print(f"saved {loop.run()}")


def training(args: argparse.Namespace, classes: list[str] | None, folder: Path, seed: int, device) -> TrainLoop:
    """The training of one model on the images of `classes` (None: all), ready to run."""
    if (folder / MODEL_FILE).exists():
        raise ValueError(f"{folder / MODEL_FILE}: is there already; give another --save_dir or move it away")
    flags = args_to_dict(args, list(model_and_diffusion_defaults()))
    data = load_images(args.data_dir, args.image_size, classes)
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
    print(f"{folder}: {len(data.images)} images of {len(data.class_names)} classes, "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {device}")  # fmt: skip
    return TrainLoop(
        model=model, diffusion=diffusion, data=data, settings=settings, flags=flags, folder=folder, device=device
    )


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
