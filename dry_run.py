"""--dry-run: what a command would do, and about how long that takes, before it is done."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch.utils.flop_counter import FlopCounterMode

from config import Settings
from guided_diffusion.dist_util import or_too_much, pick_device
from guided_diffusion.pool import Pool, PoolModel
from utils.progress import duration

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
    twice = sum(r > 0 or not s.clusters for r in rounds) if s.likely else 0
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
    """The work of that many forward passes of each model; its seconds from a trial with the first one."""
    device = pick_device(s.device_name)
    flops = [forward_flops(pool.load(m)) for m in range(len(pool))]
    rate = flops[0] / _seconds_of_one(pool.load(0, device, s.precision), s.sample_batch)
    total = sum(count * cost for count, cost in zip(forwards, flops, strict=True))
    return Work(sum(forwards), total, total / rate)


def forward_flops(model: PoolModel) -> int:
    """Operations of one image's forward pass in products and convolutions, 2 a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        model.trial(1)
    return counter.get_total_flops()


def _seconds_of_one(model: PoolModel, most: int) -> float:
    """Seconds of an image's forward pass in batches of `most`, or of so many that a pass is a tenth of the trial."""
    batch, seconds = 1, 0.0
    while seconds < TRIAL / 10 and batch < most:
        larger = min(2 * batch, most)
        seconds = or_too_much(partial(_seconds, model, larger))
        if seconds is None:
            break
        batch = larger
    passed, started = 0, time.perf_counter()
    while not passed or time.perf_counter() - started < TRIAL:
        model.trial(batch)
        passed += batch
    return (time.perf_counter() - started) / passed


def _seconds(model: PoolModel, batch: int) -> float:
    """Seconds of a pass, after one that is not counted."""
    model.trial(batch)
    started = time.perf_counter()
    model.trial(batch)
    return time.perf_counter() - started


def _settings(s: Settings) -> list[str]:
    places = {"pool": s.pool_place, "data_root": ",".join(map(str, s.data_paths)), "save_dir": str(s.run_folder)}
    return [f"{name} = {value!r}" for name, value in {**s.as_dict(), **places}.items() if name != "dry_run"]


def _work(work: Work, s: Settings) -> list[str]:
    return [
        f"{work.forwards:,} forward passes, {work.flops / 1e12:,.1f} TFLOP",
        f"about {duration(work.seconds)} of them on {pick_device(s.device_name)}, after a trial of {TRIAL:.0f} s",
    ]


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"
