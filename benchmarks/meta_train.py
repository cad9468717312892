"""Measure the training of both learners, an epoch as in `main.py --recipe paper`, in episodes per second.

    python -m benchmarks.meta_train --size small

Each episode counts once, although the class-learner then sees as many images again. The learners train in float32 on
every device. The plain baseline has Conv4 in the default memory format with ReLU before the pool, keeps images on the
CPU, and augments them one by one.
"""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from config import Settings
from datasets.pseudo import PseudoDataset
from guided_diffusion.dist_util import pick_device
from guided_diffusion.noise_levels import shared_process
from models.learners import PaperLearners
from utils.cli import run
from utils.seeding import generator

_COMMON = dict(way=5, shot=1, query=6)
SIZES = {  # episodes: timed ones, of method_episodes per epoch; per_class: images; plain_episodes: of the baseline
    "paper": dict(episodes=96, method_episodes=1200, batch=32, image_size=64, classes=64, per_class=600,
                  dense_weight=0.5, flip=True, plain_episodes=32, **_COMMON),
    "small": dict(episodes=100, method_episodes=100, batch=4, image_size=32, classes=40, per_class=40,
                  dense_weight=0.5, flip=False, plain_episodes=20, **_COMMON),
}  # fmt: skip
ON_GPU = {"paper": dict(episodes=1200)}


class PlainConv4(nn.Module):
    """Conv4 as usually written: four blocks of convolution, batch norm, ReLU and 2x2 max pool."""

    feature_dim = 64

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 64, 64, 64, 64)
        self.layers = nn.Sequential(*(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
            for a, b in zip(widths, widths[1:], strict=False)
        ))  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class Training:
    """An epoch of the paper's learners, with random weights and random images."""

    def __init__(self, s: dict[str, Any], device: torch.device, base: nn.Module | None = None, on: str = "") -> None:
        """base: replaces the meta-model's own backbone; on: device of the images, by default `device`."""
        settings = Settings(
            nKnovel=s["way"], nExemplars=s["shot"], train_nTestNovel=s["way"] * s["query"], train_batch=s["batch"],
            train_epoch_size=s["episodes"], dense_weight=s["dense_weight"], flip=s["flip"], seed=measure.SEED,
        )  # fmt: skip
        rng, self.device, self.rates = generator(measure.SEED, "images"), device, (0.1,) * settings.epoch_steps
        self.learners = PaperLearners(settings, s["classes"], s["image_size"], device, shared_process())
        if base is not None:
            self.learners.model.base = base.to(device)
            self.learners.optimizers[0] = self.learners.optimizer_of(self.learners.model)
        labels = torch.arange(s["classes"]).repeat_interleave(s["per_class"])
        images = torch.randint(256, (len(labels), 3, *[s["image_size"]] * 2), dtype=torch.uint8, generator=rng)
        self.data = PseudoDataset(images.to(on or device), labels, s["classes"])

    def epoch(self) -> dict[str, object]:
        """Run one epoch of the meta-model and one of the class-learner."""
        rng = generator(measure.SEED, "epoch", device=self.device)
        entries = self.learners.train_meta_model(self.data, self.rates, rng, 0)
        return entries | self.learners.train_class_learner(self.data, self.rates, rng)


def one_by_one(learners: PaperLearners) -> None:
    """Make `learners` augment images one by one. The generator is drawn from for each image in turn."""
    batch = learners.changed
    learners.changed = lambda images, rng: torch.cat([batch(image[None], rng) for image in images])


def main() -> None:
    """Parse the flags, measure, and print the result."""
    args = measure.parse("Episodes a second of an epoch of both learners.")
    device = pick_device(args.device)
    if args.precision == "bf16":
        raise ValueError("got --precision bf16, but main.py trains the learners in float32 on every device; leave it")
    s = measure.settings(args, device, SIZES, ON_GPU)
    s["steps"] = -(-s["episodes"] // s["batch"])  # of each learner
    few = {**s, "episodes": s["plain_episodes"]}

    def plain():
        training = Training(few, device, PlainConv4(), "cpu")
        one_by_one(training.learners)
        return training.epoch

    measure.report(
        "meta_train", args, device, {**s, "backbone": "conv4"},
        dtype=torch.float32, unit="episodes",
        work=measure.Timed(s["episodes"], lambda: Training(s, device).epoch),
        plain=measure.Timed(s["plain_episodes"], plain),
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
