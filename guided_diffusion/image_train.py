"""Pretrain diffusion models on a folder of images: one model, or a whole pool with one command.

    python guided_diffusion/image_train.py --data_dir path/to/data --save_dir ckpt/diffusion/mine
    python guided_diffusion/image_train.py --data_dir data/mine/meta_train --pool ckpt/pools/mine --classes_per_model 5

--pool splits the class folders of --data_dir, in sorted order, into groups of --classes_per_model. It trains one model
per group as <pool>/subset{m}/ckpt/model.pt and writes the index <pool>/pool.json. To resume, run the same command
again: it skips finished models, and higher --steps train them further. It refuses images or flags that would change
the weights.

Images that cannot be read are left out; skipped_images.csv in the folder of the model or the pool lists them.

A few images of each class are held out (--hold_out). After training, one line gives the distances of samples and of
held-out images to the nearest training image. They are saved in memorisation.json, or for a pool in pool.json.
The loss is in metrics.jsonl beside each model, and report.html in the pool shows all of its models.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs as a script from anywhere

from guided_diffusion import memorisation  # noqa: E402
from guided_diffusion.costs import TRIAL  # noqa: E402
from guided_diffusion.dist_util import pick_device  # noqa: E402
from guided_diffusion.image_datasets import TrainingImages, check_classes, class_folders, load_images  # noqa: E402
from guided_diffusion.made_with import ENTRY, IMAGES, Kept, check_same, digest, kept, record  # noqa: E402
from guided_diffusion.memorisation import measure, sentence, split  # noqa: E402
from guided_diffusion.pool import Pool, subset_path  # noqa: E402
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults  # noqa: E402
from guided_diffusion.train_flags import TrainSettings, create_argparser, parse  # noqa: E402, F401
from guided_diffusion.train_util import MODEL_FILE, SHEET, TrainLoop, drop_state  # noqa: E402
from report import Report  # noqa: E402
from utils import processes  # noqa: E402
from utils.cli import run  # noqa: E402
from utils.images import Skipped, shown  # noqa: E402
from utils.lock import locked  # noqa: E402
from utils.progress import duration, hush  # noqa: E402
from utils.run_log import read_json, say_damaged, write_json, write_skipped  # noqa: E402
from utils.seeding import seed_everything  # noqa: E402

POOL = 2  # fewest models for the clusters recipe of main.py
FIGURES = "memorisation"  # entry of pool.json: figures by model
FIGURE_FILE = "memorisation.json"  # figures of a model outside a pool
SPLITS = ("meta_train", "meta_val", "meta_test")  # in a data folder


class Loaded(NamedTuple):
    """Images to train on, held-out images (H, 3, size, size) uint8, files left out, and the hash of all images."""

    data: TrainingImages
    held_out: Tensor
    skipped: Skipped
    images: str


def main() -> None:
    """Parse and check the flags, then train a model or a pool."""
    s = parse()
    hush(s.quiet)
    if not s.data_dir:
        raise ValueError("got no --data_dir; give a folder of images to train on")
    for flag in ("data_dir", "held_out_dir"):
        if getattr(s, flag):
            _refuse_splits(flag, Path(getattr(s, flag)))
    place = Path(s.pool or s.save_dir)
    if Path(os.path.realpath(place)).is_relative_to(os.path.realpath(s.data_dir)):  # which survive a loop of links
        raise ValueError(
            f"{shown(place)}: is in --data_dir, where its samples would be training images; give another "
            f"--{'pool' if s.pool else 'save_dir'}"
        )
    device = pick_device(s.device)
    say("mirrors half of the images (--random_flip True)" if s.random_flip else "mirrors no images; give "
        "--random_flip True if left and right are interchangeable")  # fmt: skip
    (train_pool if s.pool else train_one)(s, device)


def train_one(s: TrainSettings, device: torch.device) -> None:
    """Train one model on --data_dir, or train it further, and measure memorisation; with --dry_run, only estimate."""
    path = Path(s.save_dir) / MODEL_FILE
    place = path.with_name(FIGURE_FILE)
    loaded = _load(s, _classes(s) if s.class_cond else None)
    here = record(s) | {IMAGES: loaded.images}
    if processes.broadcast(kept(path.parent, here).done):
        say(f"{path} is done")
        if s.dry_run:
            return
    else:
        loop = training(s, loaded.data, path.parent, device, here)
        if s.dry_run:
            return say(_work(loop, 1))
        with locked(path.parent):  # now that flags and images are known to be good
            loop.restore()
            if processes.is_first():
                place.unlink(missing_ok=True)
            write_skipped(path.parent, loaded.skipped)
            say(f"saved {loop.run()}")
    if processes.is_first():
        with locked(path.parent):
            if kept(path.parent, here).leftover:
                drop_state(path.parent)
            if not _measured(s, read_json(place, dict)):
                write_json(place, _figure(s, path, loaded, device))


def train_pool(s: TrainSettings, device: torch.device) -> None:
    """Train and measure the models of a pool, skipping what is done; with --dry_run, only estimate."""
    names = _classes(s)
    groups = [names[i : i + s.classes_per_model] for i in range(0, len(names), s.classes_per_model)]
    wanted = _subsets(s.subsets, len(groups))
    models = [
        {"path": str(subset_path(".", m)), "classes": group, "num_classes": len(group)}
        for m, group in enumerate(groups, 1)
    ]
    index = Path(s.pool) / "pool.json"
    known = processes.broadcast(_read(index, "rewriting it"))
    if known:
        if known.get("models") != models:
            raise ValueError(f"{index}: is of other classes or --classes_per_model; give the same, or another --pool")
        hold_out = known.get("hold_out", 0.0)  # older pools, without this entry, held out none
        if hold_out != s.hold_out:
            say(f"{index}: was made with --hold_out {hold_out:g}, which stays")
        s = replace(s, hold_out=hold_out)
        _check_pool(index, known, record(s), wanted, len(groups))
    contents = {
        "image_size": s.image_size, "steps": s.steps, "hold_out": s.hold_out, "models": models, ENTRY: record(s),
    }  # fmt: skip
    missing = [m for m in wanted if not subset_path(s.pool, m).exists()]
    for place in filter(None, (s.data_dir, s.held_out_dir)):  # before hours of training
        check_classes(place, [name for m in missing for name in groups[m - 1]])
    own = {m: replace(s, seed=s.seed + m) for m in wanted}
    standing = {m: _standing(own[m], subset_path(s.pool, m).parent, groups[m - 1]) for m in wanted}
    to_train = [m for m in wanted if not standing[m].done]
    if len(groups) < POOL:
        say(f"{len(groups)} models: main.py will need --recipe paper; its default recipe needs {POOL} or more")
    if s.dry_run and not to_train:
        return say(f"{s.pool}: all models are trained")
    for m in to_train if s.dry_run else wanted:
        path = subset_path(s.pool, m)
        done = processes.broadcast(standing[m].done)
        if done:
            say(f"{path} is done")
            if standing[m].leftover and processes.is_first():
                with locked(path.parent):
                    drop_state(path.parent)
            if _measured(s, known.get(FIGURES, {}).get(f"subset{m}")):
                continue
        loaded = _load(s, groups[m - 1])
        if not done:
            here = record(own[m]) | {IMAGES: loaded.images}
            loop = training(own[m], loaded.data, path.parent, device, here)
            if s.dry_run:
                left = sum(s.steps - standing[other].step for other in to_train)
                return say(_work(loop, len(to_train), left))
            with locked(path.parent):  # now that flags and images are known to be good
                loop.restore()
                if processes.is_first():
                    _write(index, contents, m, None)
                    with locked(s.pool, wait=True):
                        write_skipped(s.pool, loaded.skipped)
                say(f"saved {loop.run()}")
        if processes.is_first():
            figure = _figure(own[m], path, loaded, device)
            _write(index, {**contents, **known} if done else contents, m, figure)
            Report(s.pool).write()
    if to_train:
        trained = sum(subset_path(s.pool, m).exists() for m in range(1, len(groups) + 1))
        say(f"{s.pool}: {trained} of {len(groups)} models are trained; see report.html")


def _standing(s: TrainSettings, folder: Path, names: list[str]) -> Kept:
    """Return what `folder` holds of a pool model of these classes. Raises ValueError if it was made otherwise."""
    found = kept(folder, record(s))
    if found.step:  # refuse other images before any model trains
        found = kept(folder, record(s) | {IMAGES: _load(s, names).images})
    return replace(found, state=None, model=None)  # the weights of a whole pool take too much memory


def _measured(s: TrainSettings, figure: Any) -> bool:
    """Return whether `figure` is complete: measured, and against the images of --held_out_dir if it is given."""
    return bool(isinstance(figure, dict) and figure) and s.held_out_dir in ("", figure.get("held_out_dir"))


def _check_pool(index: Path, known: dict[str, Any], here: dict[str, Any], wanted: list[int], count: int) -> None:
    """Raise ValueError if the pool was made with other settings than `here`."""
    then = known.get(ENTRY)
    if not isinstance(then, Mapping):
        then = {name: known[name] for name in ("image_size", "steps") if name in known}
        say(f"{index}: is from an older version that did not record its flags; assuming the same flags")
    check_same(index, then, here, longer=True)
    others = [subset_path(index.parent, m) for m in range(1, count + 1) if m not in wanted]
    behind = [path for path in others if path.exists()]
    if behind and here["steps"] != then.get("steps", here["steps"]):
        raise ValueError(
            f"{behind[0]}: has {then['steps']} steps (got {here['steps']}); leave --subsets out to train every "
            "model further, or give the same --steps"
        )


def _refuse_splits(flag: str, folder: Path) -> None:
    """Raise ValueError for a folder that holds the splits of a data set instead of images of one split."""
    for place, folders, _ in os.walk(folder):
        found = sorted(name for name in {*folders} & {*SPLITS} if any(Path(place, name).iterdir()))
        if found:
            unseen = [name for name in found if name != SPLITS[0]]
            part, use = (unseen[0], "measure against") if flag == "held_out_dir" and unseen else (SPLITS[0], "train on")
            raise ValueError(
                f"{shown(place)}: holds {', '.join(found)}, expected only images to {use}; "
                f"give --{flag} {shown(Path(place, part))}"
            )


def _load(s: TrainSettings, names: list[str] | None) -> Loaded:
    """Read the images of the classes `names` (None: all), and of --held_out_dir if it is given."""
    every = load_images(s.data_dir, s.image_size, names)
    data, held_out = split(every, s.hold_out)
    skipped = data.skipped
    if s.held_out_dir:
        others = load_images(s.held_out_dir, s.image_size, names)
        held_out, skipped = others.images, skipped | others.skipped
    return Loaded(data, held_out, skipped, digest(every))


def training(
    s: TrainSettings, data: TrainingImages, folder: Path, device: torch.device, made_with: Mapping[str, Any]
) -> TrainLoop:
    """Return the training loop of one model on `data`, ready to run."""
    flags = {name: getattr(s, name) for name in model_and_diffusion_defaults()}
    if s.class_cond:
        flags["num_classes"] = len(data.class_names)
    seed_everything(s.seed)
    model, diffusion = create_model_and_diffusion(**flags)
    say(f"{folder}: {len(data.images)} images of {len(data.class_names)} classes, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {device}")  # fmt: skip
    return TrainLoop(
        model=model, diffusion=diffusion, data=data, settings=s, flags=flags, folder=folder, device=device,
        made_with=made_with,
    )  # fmt: skip


def _work(loop: TrainLoop, models: int, left: int | None = None) -> str:
    """Return a line on the operations and the time to train `models` models like the one of `loop`.

    left: steps left for all of them; None: those of `loop`.
    """
    say(f"running a trial of about {TRIAL:.0f} s ...")
    own, flops, seconds, sheet = loop.measure(TRIAL)
    s = loop.settings
    steps = own if left is None else left
    done = models * s.steps - steps
    begun = f", {done:,} of which are done" if done else ""
    sheets = models * -(-s.steps // s.save_interval) - done // s.save_interval
    drawing = (sheets + models * memorisation.SAMPLES / SHEET) * sheet
    return (
        f"{models} model{'s' * (models > 1)} x {s.steps:,} steps{begun} x {s.batch_size} images: "
        f"{steps * flops / 1e12:,.1f} TFLOP, about {duration(steps * seconds + drawing)} on {loop.device} "
        f"({duration(drawing)} to draw samples), estimated from a trial of {TRIAL:.0f} s; saving is extra"
    )


def _figure(s: TrainSettings, path: Path, loaded: Loaded, device: torch.device) -> dict[str, Any]:
    """Measure and print how near the samples of a finished model are to its training images."""
    say(f"{path}: drawing {memorisation.SAMPLES} images to check whether it copies ...")
    figure = measure(
        Pool(path).load(0, device), loaded.data.images, loaded.held_out, mirrored=s.random_flip, seed=s.seed,
        precision=s.precision, device=device,
    )  # fmt: skip
    say(f"{path}: {sentence(figure)}")
    against = {"held_out_dir": s.held_out_dir} if s.held_out_dir else {}
    return figure | {"images": len(loaded.data.images)} | against


def say(text: str) -> None:
    """Print in the first process only."""
    if processes.is_first():
        print(text)


def _read(index: Path, instead: str = "") -> dict[str, Any]:
    """Return the contents of pool.json; {} if there is none. instead: how to report damage; "" keeps quiet about it."""
    known = read_json(index, dict, instead) or {}
    for name, sound in _SOUND.items():
        if name in known and not sound(known[name]):
            if instead:
                say_damaged(index, f"its {name} is damaged; {instead}")
            del known[name]
    return known if "models" in known else {}


_SOUND = {  # checks of the entries in pool.json
    "models": lambda value: isinstance(value, list) and all(isinstance(each, dict) for each in value),
    "hold_out": lambda value: isinstance(value, int | float) and 0 <= value < 1,
    FIGURES: lambda value: (
        isinstance(value, dict) and all(isinstance(each, dict) and "held_out" in each for each in value.values())
    ),
}


def _write(index: Path, contents: dict[str, Any], m: int, figure: dict[str, Any] | None) -> None:
    """Write pool.json with model m's figure, or without one. Keep the figures that other processes wrote meanwhile."""
    with locked(index.parent, wait=True):
        figures = _read(index).get(FIGURES, {}) | {f"subset{m}": figure}
        write_json(index, {**contents, FIGURES: {name: each for name, each in figures.items() if each}})


def _classes(s: TrainSettings) -> list[str]:
    names = class_folders(s.data_dir)
    if not names:
        raise ValueError(
            f"{s.data_dir}: got no class folders; a pool, or --class_cond, needs one folder of images per class"
        )
    return names


def _subsets(text: str, count: int) -> list[int]:
    try:
        wanted = [int(part) for part in text.split(",") if part.strip()] or list(range(1, count + 1))
    except ValueError:
        raise ValueError(f"got --subsets {text!r}, expected numbers with commas between, as in 1,3,5") from None
    if not all(1 <= m <= count for m in wanted):
        raise ValueError(f"got --subsets {text!r}, expected some of 1 to {count}, the models of this pool")
    return sorted(set(wanted))


if __name__ == "__main__":
    run(main)
