"""--dry-run: print what a command would do and about how long it would take."""

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch

from config import Settings, flag_of, that_affect
from datasets.pseudo import PseudoDataset
from datasets.sources import embedded
from guided_diffusion.costs import TRIAL, image_flops
from guided_diffusion.dist_util import or_too_much, pick_device, smaller
from guided_diffusion.guidance import classifier_guidance
from guided_diffusion.pool import Pool, PoolModel
from utils import processes
from utils.progress import duration
from utils.seeding import generator


@dataclass(frozen=True)
class Work:
    """Forward passes of the pool's networks, one per image; their operations, 2 per multiply-add; estimated seconds."""

    forwards: int
    flops: float
    seconds: float


def of_training(training: Any) -> None:
    """Print what is left of a `main.Training`: the work of its rounds, seconds in all, settings that were given.

    It takes steps with the learners, which are of no use after that.
    """
    if not processes.is_first():
        return
    s, pool, classes, epoch = training.s, training.pool, training.per_model, training.books.epoch
    lines = [opening(training), *[f"{epoch} of {s.max_epoch} epochs are done; what is left:"] * (epoch > s.start_epoch)]
    left = training.phases[epoch - s.start_epoch :]
    first = {phase.round: phase for phase in reversed(left)}  # of each round its first epoch that is left
    there = {r for r in first if (s.run_folder / "pseudo" / f"round{r:02d}" / "manifest.json").exists()}
    rounds = [phase for r, phase in first.items() if r not in there]
    work, guiding = Work(0, 0.0, 0.0), 0.0
    if classes:
        guided = sum(phase.guided for phase in rounds)
        twice = guided if s.finds_classes else 0
        each = s.samples_per_class * s.sample_steps
        per_class = each * (len(rounds) + twice) + training.calibration * s.sample_steps
        work = measure(pool, [count * per_class for count in classes], s, training.precision)
        guiding = guided * sum(classes) * each * _guidance_seconds(training) / processes.count() if guided else 0.0
        images = len(rounds) * sum(classes) * s.samples_per_class
        lines += [
            f"{len(rounds)} rounds x {sum(classes)} classes x {s.samples_per_class} images x {s.sample_steps} steps"
            + "; guided rounds are drawn twice: unguided, then guided" * bool(twice)
            + f"; before, {training.calibration} images per class to calibrate" * bool(training.calibration),
            _work(work),
            f"disk: {_bytes(images * 3 * training.size**2)} of images in {s.run_folder / 'pseudo'}",
        ]
    else:
        lines.append(f"--source {s.source}: nothing is drawn")
    if training.phases:
        learning, last = len(left) * _epoch_seconds(training) if left else 0.0, s.max_epoch % s.refresh_every
        parts = f"{duration(work.seconds)} to draw, {duration(guiding)} to guide, {duration(learning)} to train"
        lines += [
            f"{len(left)} epochs of {s.epoch_steps} steps in rounds of {s.refresh_every}"
            + f", the last of {last}" * bool(last),
            f"about {duration(work.seconds + guiding + learning)} on {training.device}, estimated from trials: {parts}",
        ]
    print(*lines, _given(s, "training"), sep="\n")


def opening(training: Any) -> str:
    """Return a line that says what a `main.Training` is about to do."""
    s, pool, classes = training.s, training.pool, training.num_classes
    rounds = len({phase.round for phase in training.phases})
    place = "embedded images" if embedded(s.dataset, s.data_paths, "meta_val") else ",".join(map(str, s.data_paths))
    images = f"validation on {len(training.validation.class_names)} classes of meta_val ({place})"
    if s.draws:
        drawn = sum(training.per_model) * s.samples_per_class
        images = (
            f"{rounds} round{'s' * (rounds != 1)} of {drawn:,} images, {classes} classes, from {len(pool)} models "
            f"({s.pool_place}), {images}"
        )
    if training.real:
        images = f"{len(training.real.labels):,} real images of {classes} classes, {images}"
    if training.phases:
        mirrored = "mirrors images" if s.flip else "mirrors no images"
        epochs = f"{len(training.phases)} epochs of {s.epoch_steps} steps, {mirrored}"
    else:
        epochs = (f"weights of {s.resume}" if s.resume else "random weights") + ", nothing to train"
    device = f"{training.device}, {training.precision}" if s.draws else training.device
    return f"{s.dataset}, --source {s.source}: {images}; {epochs}, {device}, {s.run_folder}"


def of_testing(s: Settings, fitter: Any, support: int) -> None:
    """Print what `diffusionmix.py` would do: the work of its mixes, and settings that were given.

    fitter: a `few_shot.HeadFitter`; support: images, of all episodes.
    """
    if not processes.is_first():
        return
    lines = ["--mix False: no mixes"]
    if pool := fitter.pool:
        work = measure(pool, [support * s.mix_steps] * len(pool), s, fitter.precision)
        lines = [
            f"{support} support images x {len(pool)} models x {s.mix_steps} step{'s' * (s.mix_steps > 1)}",
            _work(work),
            f"about {duration(work.seconds)} on {pick_device(s.device_name)}, estimated from a trial",
        ]
    print(*lines, _given(s, "testing"), sep="\n")


def measure(pool: Pool, forwards: Sequence[int], s: Settings, precision: str) -> Work:
    """Return the work of that many forward passes of each model, with seconds from a trial of the first.

    Several processes share it out; the trial is that of the first.
    """
    device = pick_device(s.device_name)
    every = [pool.load(m).flags for m in range(len(pool))]
    kinds = [repr(sorted(flags.items())) for flags in every]
    of_kind = {kind: image_flops(flags) for kind, flags in dict(zip(kinds, every, strict=True)).items()}
    flops = [of_kind[kind] for kind in kinds]
    rate = flops[0] / _seconds_of_one(pool.load(0, device, precision), s.sample_batch, device, sum(forwards))
    total = sum(count * cost for count, cost in zip(forwards, flops, strict=True))
    return Work(sum(forwards), total, total / rate / processes.count())


def _seconds_of_one(model: PoolModel, most: int, device: torch.device, enough: int) -> float:
    """Return the seconds of one image's pass, in batches of `most`; on a CPU smaller ones if a pass takes long.

    enough: passes after which the trial ends early, so that it never takes longer than what it estimates.
    Raises MemoryError, with a line to show, where one image is too much.
    """
    batch = most if device.type == "cuda" else 1  # where every other batch would be compiled, for long
    while (seconds := or_too_much(partial(_trial, partial(model.trial, batch)))) is None:
        batch = smaller(batch)
    while batch < most and device.type != "cuda" and seconds < TRIAL / 10:
        larger = min(2 * batch, most)
        seconds = or_too_much(partial(_trial, partial(model.trial, larger)))
        if seconds is None:
            break
        batch = larger
    passed, started = 0, time.perf_counter()
    while not passed or passed < enough and time.perf_counter() - started < TRIAL:
        model.trial(batch)
        passed += batch
    return (time.perf_counter() - started) / passed


def _given(s: Settings, command: str) -> str:
    """Return the flags that differ from the defaults of the data set and the recipe."""
    shown, preset = that_affect(command, "both", "nothing") - {"dry_run"}, s.preset()
    flags = [f"{flag_of(f)} {shlex.quote(str(getattr(s, f.name)))}" for f in fields(s)
             if f.name in shown and getattr(s, f.name) != preset[f.name]]  # fmt: skip
    return f"changed from the defaults of --dataset {s.dataset} --recipe {s.recipe}: {' '.join(flags) or 'nothing'}"


def _guidance_seconds(training: Any) -> float:
    """Return the seconds of the guiding gradient for one image."""
    s, size, device = training.s, training.size, training.device
    images = min(s.sample_batch, 32)
    x, zeros = torch.zeros(images, 3, size, size, device=device), torch.zeros(images, dtype=torch.int64, device=device)
    gradient = classifier_guidance(training.learners.guide(), zeros, 1.0)
    return _trial(lambda: float(gradient(x, zeros).sum())) / images


def _epoch_seconds(training: Any) -> float:
    """Return the seconds of an epoch of training, from one step of each network on images of noise."""
    s, phase = training.s, training.phases[-1]
    labels = torch.arange(training.num_classes).repeat_interleave(s.shot + s.train_nTestNovel // s.way)
    images = torch.randint(256, (len(labels), 3, training.size, training.size), dtype=torch.uint8)
    data, rng = PseudoDataset(images, labels, training.num_classes), generator(0, "trial", device=training.device)

    def one_step() -> None:
        training.learners.train_meta_model(data, phase.rates[:1], rng, 0)
        if phase.guided:
            training.learners.train_class_learner(data, phase.rates[:1], rng)

    return _trial(one_step) * len(phase.rates)


def _trial(work: Callable[[], object]) -> float:
    """Return the seconds of a second call of `work`, or of the first if it is slow."""
    seconds = 0.0
    for _ in range(2):
        if seconds > TRIAL:
            break
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
    return seconds


def _work(work: Work) -> str:
    return f"{work.forwards:,} forward passes of the pool's networks, {work.flops / 1e12:,.1f} TFLOP"


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"
