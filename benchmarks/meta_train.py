"""How fast the two learners train: an epoch of both as `main.py --recipe paper` has it, in episodes a second.

    python -m benchmarks.meta_train --size small

Each episode counts once, though the class-learner sees as many images again. The learners train in float32 on every
device. Plainly: Conv4 in the default memory format with ReLU before the pool, images kept on the CPU and augmented one
by one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from datasets.augment import AugmentSettings, augment
from datasets.episodes import EpisodeSampler
from guided_diffusion.dist_util import pick_device
from guided_diffusion.script_util import create_gaussian_diffusion
from models.class_learner import ClassLearner
from models.learners import make_optimizer, train_class_learner, train_meta_model
from models.meta_model import MetaModel
from utils.cli import run
from utils.seeding import generator

_COMMON = dict(way=5, shot=1, query=6)
SIZES = {  # episodes: timed, of an epoch's method_episodes; per_class: images; plain_episodes: timed the plain way
    "paper": dict(episodes=96, method_episodes=1200, batch=32, image_size=64, classes=64, per_class=600,
                  dense_weight=0.5, flip=True, plain_episodes=32, **_COMMON),
    "small": dict(episodes=100, method_episodes=100, batch=4, image_size=32, classes=40, per_class=40,
                  dense_weight=0.5, flip=False, plain_episodes=20, **_COMMON),
}  # fmt: skip
ON_GPU = {"paper": dict(episodes=1200)}


class PlainConv4(nn.Module):
    """Conv4 as it is usually written: four times (convolution, batch norm, ReLU, 2x2 max pool)."""

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
    """Both learners with random weights, random images, and an epoch of them."""

    def __init__(self, s: dict[str, Any], device: torch.device, base: nn.Module | None = None, on: str = "") -> None:
        """base: in place of the meta-model's own backbone; on: where the images are, by default on the device."""
        self.s, self.device = s, device
        rng, size = generator(measure.SEED, "weights"), s["image_size"]
        self.model = MetaModel(s["classes"], generator=rng)
        self.model.base = base or self.model.base
        self.learner = ClassLearner(s["classes"], self.model.feature_dim, generator=rng).to(device)
        self.model.to(device)
        self.optimizers = [make_optimizer("sgd", module, 5e-4) for module in (self.model, self.learner)]
        self.labels = torch.arange(s["classes"]).repeat_interleave(s["per_class"])
        shape = (len(self.labels), 3, size, size)
        self.images = torch.randint(256, shape, dtype=torch.uint8, generator=rng).to(on or device)
        self.process = create_gaussian_diffusion(steps=1000, noise_schedule="cosine")

    def epoch(self, change: Callable[..., Tensor] = augment) -> dict[str, object]:
        """One epoch of the meta-model and one of the class-learner; `change` augments a batch."""
        s = self.s
        rng = generator(measure.SEED, "epoch", device=self.device)
        sampler = EpisodeSampler(self.labels, s["way"], s["shot"], s["query"])
        augmentation = AugmentSettings(flip=s["flip"])

        def changed(pictures: Tensor) -> Tensor:
            return change(pictures.to(self.device), rng, augmentation)

        entries = train_meta_model(
            self.model, self.optimizers[0], self.images, self.labels,
            sampler.sample(s["episodes"], generator(measure.SEED, "episodes")),
            batch=s["batch"], dense_weight=s["dense_weight"], augment=changed,
        )  # fmt: skip
        return entries | train_class_learner(
            self.model, self.learner, self.optimizers[1], self.images, self.labels,
            steps=-(-s["episodes"] // s["batch"]), batch=s["batch"] * s["way"] * (s["shot"] + s["query"]),
            levels=1000, kl_weight=1.0, augment=changed,
            add_noise=lambda x, t: self.process.q_sample(x, t, generator=rng), rng=rng,
        )  # fmt: skip


def one_by_one(images: Tensor, rng: torch.Generator, augmentation: AugmentSettings) -> Tensor:
    """Images augmented one after the other; those of a batch draw the same random numbers that way."""
    return torch.cat([augment(image[None], rng, augmentation) for image in images])


def main() -> None:
    """Parse, measure, print."""
    args = measure.parse("Episodes a second of an epoch of both learners.")
    device = pick_device(args.device)
    if args.precision == "bf16":
        raise ValueError("got --precision bf16, but main.py trains the learners in float32 on every device; leave it")
    s = measure.settings(args, device, SIZES, ON_GPU)
    s["steps"] = -(-s["episodes"] // s["batch"])  # of each learner
    few = {**s, "episodes": s["plain_episodes"]}

    def plain():
        training = Training(few, device, PlainConv4(), "cpu")
        return lambda: training.epoch(one_by_one)

    measure.report(
        "meta_train", args, device, {**s, "backbone": "conv4"},
        dtype=torch.float32, unit="episodes", units=s["episodes"], work=lambda: Training(s, device).epoch,
        plain_units=s["plain_episodes"], plain=plain,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
