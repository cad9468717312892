"""Pretrain diffusion models on a folder of images: one model, or at one stroke a whole pool.

    python guided_diffusion/image_train.py --data_dir path/to/data --save_dir ckpt/diffusion/mine
    python guided_diffusion/image_train.py --data_dir data/mine/meta_train --pool ckpt/pools/mine --classes_per_model 5

A pool takes the class folders of --data_dir in sorted order, trains one model for every --classes_per_model of them
into <pool>/subset{m}/ckpt/model.pt, and writes <pool>/pool.json, which says what is where. The same command again
resumes where it stopped; a model that is done is not done again, and higher --steps train it further. Images or flags
that would give other weights are refused.

Images that cannot be read are left out; skipped_images.csv in the model's or the pool's folder says which and why.

A few images of each class are kept back (--hold_out): a line after the training says how near the model's samples lie
to its training images, against how near those held-out images lie to them; memorisation.json, of a pool pool.json,
keeps it.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs as a script from anywhere

from guided_diffusion.dist_util import pick_device  # noqa: E402
from guided_diffusion.image_datasets import TrainingImages, check_classes, class_folders, load_images  # noqa: E402
from guided_diffusion.made_with import ENTRY, IMAGES, NO_EFFECT, Kept, check_same, digest, kept  # noqa: E402
from guided_diffusion.memorisation import measure, sentence, split  # noqa: E402
from guided_diffusion.pool import Pool, subset_path  # noqa: E402
from guided_diffusion.script_util import (  # noqa: E402
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from guided_diffusion.train_flags import create_argparser, defaults, parse  # noqa: E402, F401
from guided_diffusion.train_util import MODEL_FILE, TrainLoop, TrainSettings, drop_state  # noqa: E402
from utils import processes  # noqa: E402
from utils.cli import run  # noqa: E402
from utils.images import Skipped, shown  # noqa: E402
from utils.lock import locked  # noqa: E402
from utils.progress import duration, hush  # noqa: E402
from utils.run_log import read_json, say_damaged, write_json, write_skipped  # noqa: E402
from utils.seeding import seed_everything  # noqa: E402

POOL = 2  # models that the clusters recipe of main.py needs
TRIAL = 10.0  # seconds of steps that the estimate of --dry_run comes from
FIGURES = "memorisation"  # in pool.json, by model
FIGURE_FILE = "memorisation.json"  # of one model
SPLITS = ("meta_train", "meta_val", "meta_test")  # of a data folder


class Loaded(NamedTuple):
    """Images to train on, those held out (H, 3, size, size) uint8, what was left out, and the hash of all images."""

    data: TrainingImages
    held_out: Tensor
    skipped: Skipped
    images: str


def main() -> None:
    """Parse, check, and train what was asked for."""
    args = parse()
    hush(args.quiet)
    if not args.data_dir:
        raise ValueError("got no --data_dir; give a folder of images to train on")
    for flag in ("data_dir", "held_out_dir"):
        if getattr(args, flag):
            _refuse_splits(flag, Path(getattr(args, flag)))
    device = pick_device(args.device)
    say("mirrors half of the images (--random_flip True)" if args.random_flip else "mirrors no images; give "
        "--random_flip True where left and right are alike")  # fmt: skip
    if args.pool:
        train_pool(args, device)
    else:
        train_one(args, device)


def train_one(args: argparse.Namespace, device) -> None:
    """Train one model on what is in --data_dir, or train it further, and measure it; or say what that would be."""
    path = Path(args.save_dir) / MODEL_FILE
    place = path.with_name(FIGURE_FILE)
    names = _classes(args) if args.class_cond else None
    loaded = _load(args, args.image_size, names, args.hold_out)
    here = _made_with(args, args.seed, args.hold_out) | {IMAGES: loaded.images}
    if processes.first_says(_standing(path.parent, here).done):
        say(f"{path} is done")
        if args.dry_run:
            return
    else:
        loop = training(args, loaded.data, path.parent, args.seed, device, here)
        if args.dry_run:
            return say(_work(loop, 1))
        with locked(path.parent):  # now that flags and images are known to be good
            loop.restore()
            if processes.is_first():
                place.unlink(missing_ok=True)
            write_skipped(path.parent, loaded.skipped)
            say(f"saved {loop.run()}")
    if processes.is_first():
        with locked(path.parent):
            _tidy(path.parent, here)
            if not _measured(args, read_json(place, dict)):
                write_json(place, _figure(args, path, loaded.data, loaded.held_out, args.seed, device))


def train_pool(args: argparse.Namespace, device) -> None:
    """Train the models of a pool that are not there yet, and measure those that are not; or say what that would be."""
    names = _classes(args)
    groups = [names[i : i + args.classes_per_model] for i in range(0, len(names), args.classes_per_model)]
    wanted = _subsets(args.subsets, len(groups))
    models = [
        {"path": str(subset_path(".", m)), "classes": group, "num_classes": len(group)}
        for m, group in enumerate(groups, 1)
    ]
    index, steps = Path(args.pool) / "pool.json", _steps(args)
    known, hold_out = processes.first_says(_read(index, "it is written anew")), args.hold_out
    if known:
        if known.get("models") != models:
            raise ValueError(f"{index}: is of other classes or --classes_per_model; give the same, or another --pool")
        hold_out = known.get("hold_out", 0.0)  # without an entry it is from before there was any
        if hold_out != args.hold_out:
            say(f"{index}: was made with --hold_out {hold_out:g}, which stays")
    record = _made_with(args, args.seed, hold_out)
    if known:
        _check_pool(index, known, record, wanted, len(groups))
    contents = {
        "image_size": args.image_size, "steps": steps, "hold_out": hold_out, "models": models, ENTRY: record,
    }  # fmt: skip
    missing = [m for m in wanted if not subset_path(args.pool, m).exists()]
    check_classes(args.data_dir, [name for m in missing for name in groups[m - 1]])  # before hours of training
    standing = {m: _standing_of(args, m, groups[m - 1], hold_out, record) for m in wanted}
    to_train = [m for m in wanted if not standing[m].done]
    if len(groups) < POOL:
        say(f"{len(groups)} models: main.py will need --recipe paper; its default learns to tell {POOL} or more apart")
    if args.dry_run and not to_train:
        return say(f"{args.pool}: all models are trained")
    for m in to_train if args.dry_run else wanted:
        path, seed = subset_path(args.pool, m), args.seed + m
        done = processes.first_says(standing[m].done)
        if done:
            say(f"{path} is done")
            if standing[m].leftover and processes.is_first():
                with locked(path.parent):
                    drop_state(path.parent)
            if _measured(args, known.get(FIGURES, {}).get(f"subset{m}")):
                continue
        loaded = _load(args, args.image_size, groups[m - 1], hold_out)
        if not done:
            here = record | {"seed": seed, IMAGES: loaded.images}
            loop = training(args, loaded.data, path.parent, seed, device, here)
            if args.dry_run:
                left = sum(steps - standing[other].step for other in to_train)
                return say(_work(loop, len(to_train), left))
            with locked(path.parent):  # now that flags and images are known to be good
                loop.restore()
                if processes.is_first():
                    _write(index, contents, m, None)
                    with locked(args.pool, wait=True):
                        write_skipped(args.pool, loaded.skipped)
                say(f"saved {loop.run()}")
        if not processes.is_first():
            continue
        figure = _figure(args, path, loaded.data, loaded.held_out, seed, device)
        _write(index, {**contents, **known} if done else contents, m, figure)


def _standing(folder: Path, here: Mapping[str, Any]) -> Kept:
    """What there is of a model, without its weights. Raises ValueError where it was made with anything else."""
    found = kept(folder, here)
    return Kept(*({"step": each["step"]} if each else None for each in (found.state, found.model)), found.steps,
                found.notes, found.leftover)  # fmt: skip


def _standing_of(
    args: argparse.Namespace, m: int, names: list[str], hold_out: float, record: Mapping[str, Any]
) -> Kept:
    """What there is of model m of the pool, held against the images of its classes as they are now."""
    folder = subset_path(args.pool, m).parent
    here = {**record, "seed": args.seed + m}
    found = _standing(folder, here)
    if found.step:  # before any model trains, not when its turn comes
        found = _standing(folder, here | {IMAGES: _load(args, args.image_size, names, hold_out).images})
    return found


def _tidy(folder: Path, here: Mapping[str, Any]) -> None:
    """Take away what a run left that was stopped right after it saved its model."""
    if kept(folder, here).leftover:
        drop_state(folder)


def _measured(args: argparse.Namespace, figure: Any) -> bool:
    """Whether there is such a figure already, and nothing better to measure against."""
    return bool(isinstance(figure, dict) and figure) and not (args.held_out_dir and figure.get("held_out") is None)


def _made_with(args: argparse.Namespace, seed: int, hold_out: float) -> dict[str, Any]:
    """All flags that change the weights, with the steps that they come to."""
    flags = {name: value for name, value in vars(args).items() if name in defaults() and name not in NO_EFFECT}
    return flags | {"steps": _steps(args), "seed": seed, "hold_out": hold_out}


def _check_pool(index: Path, known: dict[str, Any], here: dict[str, Any], wanted: list[int], count: int) -> None:
    """Refuse a pool that was made otherwise: ValueError."""
    record = known.get(ENTRY)
    if not isinstance(record, Mapping):
        record = {name: known[name] for name in ("image_size", "steps") if name in known}
        say(f"{index}: is of an older version and does not say what it was made with; flags are taken to be the same")
    check_same(index, record, here, longer=True)
    others = [subset_path(index.parent, m) for m in range(1, count + 1) if m not in wanted]
    behind = [path for path in others if path.exists()]
    if behind and here["steps"] != record.get("steps", here["steps"]):
        raise ValueError(
            f"{behind[0]}: has {record['steps']} steps (got {here['steps']}); leave --subsets out to train every "
            "model further, or give the same --steps"
        )


def _refuse_splits(flag: str, folder: Path) -> None:
    """Refuse a folder that holds the splits of a data set, not the images of one: ValueError."""
    for place, folders, _ in os.walk(folder):
        found = sorted(name for name in {*folders} & {*SPLITS} if any(Path(place, name).iterdir()))
        if found:
            unseen = [name for name in found if name != SPLITS[0]]
            part, use = (unseen[0], "measure against") if flag == "held_out_dir" and unseen else (SPLITS[0], "train on")
            raise ValueError(
                f"{shown(place)}: holds {', '.join(found)}, expected only images to {use}; "
                f"give --{flag} {shown(Path(place, part))}"
            )


def _load(args: argparse.Namespace, size: int, names: list[str] | None, hold_out: float) -> Loaded:
    """Read the images of those classes, and of --held_out_dir where it is given."""
    every = load_images(args.data_dir, size, names)
    data, held_out = split(every, hold_out)
    skipped = data.skipped
    if args.held_out_dir:
        others = load_images(args.held_out_dir, size, names)
        held_out, skipped = others.images, skipped | others.skipped
    return Loaded(data, held_out, skipped, digest(every))


def training(
    args: argparse.Namespace, data: TrainingImages, folder: Path, seed: int, device, made_with: Mapping[str, Any]
) -> TrainLoop:
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
        keep_state=args.keep_state,
        seed=seed,
    )
    say(f"{folder}: {len(data.images)} images of {len(data.class_names)} classes, "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {device}")  # fmt: skip
    return TrainLoop(
        model=model, diffusion=diffusion, data=data, settings=settings, flags=flags, folder=folder, device=device,
        made_with=made_with,
    )  # fmt: skip


def _work(loop: TrainLoop, models: int, left: int | None = None) -> str:
    """What there is to do for `models` like that of `loop`, with `left` steps to take in all, and about how long."""
    own, flops, seconds = loop.measure(TRIAL)
    s = loop.settings
    steps = own if left is None else left
    done = models * s.steps - steps
    begun = f", {done:,} of which are done" if done else ""
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
    FIGURES: lambda value: (
        isinstance(value, dict) and all(isinstance(each, dict) and "held_out" in each for each in value.values())
    ),
}


def _write(index: Path, contents: dict[str, Any], m: int, figure: dict[str, Any] | None) -> None:
    """Write pool.json with model m's figure, or without one; those that other processes wrote meanwhile stay."""
    with locked(index.parent, wait=True):
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
