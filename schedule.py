"""The schedule of a run, as data: what each epoch trains on. `main.py` follows it; `dry_run.py` reports it.

The paper's recipe trains the same networks from round to round, on the newest images:

    round 0, 1, 2, ...     images guided by the class-learner, or unguided ones labelled by the model that drew them

The clusters recipe trains one network after another on all images so far, each from the initial weights:

    round 0, first half    unguided images, labelled by the model that drew them
    round 0, second half   the same images, labelled by clusters of the first network's features
    round 1, 2, ...        more images, guided by the previous network, which also relabels the unguided images
"""

import math
from dataclasses import dataclass

from config import Settings

WARM_UP = 20  # steps of linear warm-up, in the clusters recipe
STEPS = ((80, 0.0024), (70, 0.012), (60, 0.06))  # the paper's rates: (from epoch, of 90; share of the first rate)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What one epoch trains on, and how.

    Attributes:
        epoch: its number, from 0. The log counts from 1: it calls epoch 10 "epoch 11".
        labels: where the labels come from. "model": the model that drew the image. "asked": the class that guidance
            asked for, each class equally often. "clusters": clusters of features. "likeliest": the class
            of its model that the previous network finds likeliest; guidance asks for the same class. "real": the
            image folder.
        rates: the learning rate of each step.
        rounds: the rounds whose images it trains on; the last one is the newest.
        guided: whether the images of the newest round are guided.
        relabel: the earlier rounds that the previous network relabels: the unguided ones.
        fresh: whether training restarts from the initial weights.
    """

    epoch: int
    labels: str
    rates: tuple[float, ...]
    rounds: range = range(1)
    guided: bool = False
    relabel: range = range(0)
    fresh: bool = False

    @property
    def round(self) -> int:
        """The newest round of images."""
        return self.rounds[-1]


def phases(settings: Settings) -> list[Phase]:
    """Return the epochs of a run in order, from --start-epoch; an empty list if nothing is trained.

    Raises ValueError for weights of --resume that a later network would not start from.
    """
    if settings.source == "none":
        return []
    make = _paper if settings.recipe == "paper" else _clusters
    made = [make(settings, epoch) for epoch in range(settings.start_epoch, settings.max_epoch)]
    if settings.resume and any(phase.fresh for phase in made) and not (settings.run_folder / "last.pt").exists():
        raise ValueError(
            "got --resume with --recipe clusters, which trains each network from random weights; give --recipe paper, "
            f"or --start-epoch {max(phase.epoch for phase in made if phase.fresh)} or more"
        )
    return made


def _paper(s: Settings, epoch: int) -> Phase:
    number = epoch // s.refresh_every
    labels = {"guided": "asked", "real": "real"}.get(s.source, "model")
    progress = 90 * epoch / s.max_epoch
    rate = s.lr * next((factor for start, factor in STEPS if progress >= start), 1.0)
    return Phase(
        epoch=epoch, labels=labels, rates=(rate,) * s.epoch_steps, rounds=range(number, number + 1),
        guided=s.source == "guided",
    )  # fmt: skip


def _clusters(s: Settings, epoch: int) -> Phase:
    if s.source == "real":
        return Phase(epoch=epoch, labels="real", rates=_cosine(s, epoch, s.max_epoch))
    number = epoch // s.refresh_every
    start, stop = number * s.refresh_every, min((number + 1) * s.refresh_every, s.max_epoch)  # of this network
    labels = "model" if s.source == "by_model" else "likeliest"
    if number == 0 and labels == "likeliest":  # the first round trains two networks, for half of its epochs each
        half = stop // 2
        labels, start, stop = ("model", 0, half) if epoch < half else ("clusters", half, stop)
    relabel = {"guided": range(1) if number else range(0), "unguided": range(number)}
    return Phase(
        epoch=epoch,
        labels=labels,
        rates=_cosine(s, epoch - start, stop - start),
        rounds=range(s.start_epoch // s.refresh_every, number + 1),
        guided=s.source == "guided" and number > 0,
        relabel=relabel.get(s.source, range(0)),
        fresh=epoch == start and epoch > s.start_epoch,
    )


def _cosine(s: Settings, done: int, total: int) -> tuple[float, ...]:
    """Return the rates of the epoch after `done` of a network's `total` epochs: half a cosine, after a warm-up."""
    steps = range(done * s.epoch_steps, (done + 1) * s.epoch_steps)
    fall = [0.5 * (1 + math.cos(math.pi * step / (total * s.epoch_steps))) for step in steps]
    return tuple(s.lr * min(1.0, (step + 1) / WARM_UP) * each for step, each in zip(steps, fall, strict=True))
