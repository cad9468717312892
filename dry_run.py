"""--dry-run: what a command would do, and about how long that takes, before it is done."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from config import Settings
from guided_diffusion.dist_util import or_too_much, pick_device, smaller
from guided_diffusion.pool import Pool, PoolModel

TRIAL = 10.0  # seconds of forward passes that the estimate comes from


@dataclass(frozen=True)
class Work:
    """Forward passes of the pool's networks, an image each; their operations, 2 a multiply-add; seconds, estimated."""

    forwards: int
    flops: float
    seconds: float


def of_training(s: Settings, pool: Pool | None, classes: Sequence[int], size: int, epoch: int) -> str:
    """What is left of a run of `main.py`: settings, and the work of its rounds of synthesis.

    classes: of each pool model, none where nothing is drawn; size: pixels of the images; epoch: how many are done.
    """
    lines = _settings(s)
    if not classes:
        return "\n".join([*lines, "", f"--source {s.source}: nothing is drawn"])
    left = range(epoch // s.refresh_every, -(-s.max_epoch // s.refresh_every))
    rounds = [r for r in left if not (s.run_folder / "pseudo" / f"round{r:02d}" / "manifest.json").exists()]
    twice = sum(r > 0 or not s.clusters for r in rounds) if s.source == "guided" and s.ask == "likely" else 0
    passes = (len(rounds) + twice) * s.samples_per_class * s.sample_steps
    images = len(rounds) * sum(classes) * s.samples_per_class
    work = measure(pool, [count * passes for count in classes], s)
    return "\n".join([
        *lines, "", *[f"{epoch} of {s.max_epoch} epochs are done; what is left:"] * bool(epoch),
        f"{len(rounds)} rounds x {sum(classes)} classes x {s.samples_per_class} images x {s.sample_steps} steps"
        f"{f', {twice} of the rounds drawn twice (--ask likely)' if twice else ''}",
        *_work(work, s),
        "guidance and the learners' training come on top",
        f"{s.max_epoch - epoch} epochs of {s.train_epoch_size} episodes and as many images again for the class-learner",
        f"disk: {_bytes(images * 3 * size * size)} of images in {s.run_folder / 'pseudo'}",
    ])  # fmt: skip


def of_testing(s: Settings, pool: Pool | None, support: int) -> str:
    """What `diffusionmix.py` would do: settings, and the work of its mixes. support: images, of all episodes."""
    lines = _settings(s)
    if not pool:
        return "\n".join([*lines, "", "--mix False: no mixes"])
    work = measure(pool, [support * s.mix_steps] * len(pool), s)
    return "\n".join([
        *lines, "",
        f"{support} support images x {len(pool)} models x {s.mix_steps} step{'s' * (s.mix_steps > 1)}",
        *_work(work, s),
    ])  # fmt: skip


def measure(pool: Pool, forwards: Sequence[int], s: Settings) -> Work:
    """The work of that many forward passes of each model; its seconds from a trial with the first one.

    Memory that does not suffice for --sample-batch images halves them, as it would in the run.
    """
    device = pick_device(s.device_name)
    flops = [forward_flops(pool.load(m)) for m in range(len(pool))]
    rate = flops[0] / _seconds_of_one(pool.load(0, device, s.precision), device, s.sample_batch)
    total = sum(count * cost for count, cost in zip(forwards, flops, strict=True))
    return Work(sum(forwards), total, total / rate)


def forward_flops(model: PoolModel) -> int:
    """Operations of one image's forward pass in products and convolutions, 2 a multiply-add."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.network(*_inputs(model, 1, next(model.network.parameters()).device))
    return counter.get_total_flops()


def _seconds_of_one(model: PoolModel, device: torch.device, batch: int) -> float:
    """Seconds of an image's forward pass in full batches, after one that is not counted."""
    done = None
    while done is None:
        done = or_too_much(partial(_passes, model, device, batch, 0.0))
        batch = batch if done else smaller(batch)
    return _passes(model, device, batch, TRIAL)


@torch.no_grad()
def _passes(model: PoolModel, device: torch.device, batch: int, least: float) -> float:
    inputs, passed, started = _inputs(model, batch, device), 0, time.perf_counter()
    while not passed or time.perf_counter() - started < least:
        float(model.network(*inputs).sum())  # waits for the device
        passed += batch
    return (time.perf_counter() - started) / passed


def _inputs(model: PoolModel, batch: int, device: torch.device) -> list[torch.Tensor]:
    images = torch.zeros(batch, 3, model.image_size, model.image_size, device=device)
    labels = [torch.zeros(batch, dtype=torch.int64, device=device)] if model.class_cond else []
    return [images, torch.zeros(batch, dtype=torch.int64, device=device), *labels]


def _settings(s: Settings) -> list[str]:
    places = {"pool": s.pool_place, "data_root": ",".join(map(str, s.data_paths)), "save_dir": str(s.run_folder)}
    return [f"{name} = {value!r}" for name, value in {**s.as_dict(), **places}.items() if name != "dry_run"]


def _work(work: Work, s: Settings) -> list[str]:
    return [
        f"{work.forwards:,} forward passes, {work.flops / 1e12:,.1f} TFLOP",
        f"about {duration(work.seconds)} of them on {pick_device(s.device_name)}, after a trial of {TRIAL:.0f} s",
    ]


def duration(seconds: float) -> str:
    """90 s, 12 min or 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"
