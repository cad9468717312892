"""Measure the pretraining of a diffusion model, `TrainLoop.train_step`, in images per second.

    python -m benchmarks.pretrain --size small

The plain baseline runs in eager float32, updates AdamW and the moving average of the weights tensor by tensor, and
converts images one by one.
"""

from copy import deepcopy
from typing import Any

import torch

from benchmarks import measure
from guided_diffusion.dist_util import autocast, pick_device
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.image_datasets import TrainingImages
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.train_util import TrainLoop, TrainSettings
from utils.cli import run
from utils.images import to_float
from utils.seeding import generator, seed_everything

SIZES = {  # steps: timed steps; batch: images per step; method_batch: images per step in the real method
    "paper": dict(batch=4, method_batch=24, steps=1, lr=1e-4, ema_rate=0.9999, flip=True, images=3000),
    "small": dict(batch=32, method_batch=32, steps=5, lr=1e-3, ema_rate=0.995, flip=False, images=4000),
}
ON_GPU = {"paper": dict(batch=24, steps=20), "small": dict(steps=50)}


def random_images(count: int, size: int) -> TrainingImages:
    """Return `count` images of random pixels, in five classes."""
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator(measure.SEED, "images"))
    return TrainingImages(pixels, torch.arange(count) % 5, [f"class{c}" for c in range(5)])


def model_of(flags: dict[str, Any]) -> tuple[torch.nn.Module, GaussianDiffusion]:
    """Return a new network and its diffusion process, with the same weights at every call."""
    seed_everything(measure.SEED)
    return create_model_and_diffusion(**flags)


class Plain:
    """The same training without `TrainLoop`."""

    def __init__(self, flags: dict[str, Any], data: TrainingImages, settings: TrainSettings, device: torch.device):
        model, self.diffusion = model_of(flags)
        self.model, self.data, self.settings, self.device = model.to(device).train(), data, settings, device
        self.ema = deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, foreach=False, fused=False
        )
        self.step = 0

    def train_step(self) -> torch.Tensor:
        """Take a step on the images, timesteps and noise that `TrainLoop` would use. Return the loss."""
        s = self.settings
        rng = generator(s.seed, "batch", self.step)
        index = torch.randint(len(self.data.images), (s.batch_size,), generator=rng)
        images = torch.stack([to_float(self.data.images[i]) for i in index])
        if s.random_flip:
            for i in (torch.rand(s.batch_size, generator=rng) < 0.5).nonzero():
                images[i] = images[i].flip(-1)
        rng = generator(s.seed, "noise", self.step)
        share = torch.full((self.diffusion.num_timesteps,), 1 / self.diffusion.num_timesteps, dtype=torch.float64)
        t = torch.multinomial(share, s.batch_size, replacement=True, generator=rng)
        noise = torch.randn(images.shape, generator=rng).to(self.device)
        terms = self.diffusion.training_losses(self.model, images.to(self.device), t.to(self.device), {}, noise)
        loss = terms["loss"].mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        decay = min(s.ema_rate, (1 + self.step) / (10 + self.step))
        for average, weight in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            average.mul_(decay).add_(weight.detach(), alpha=1 - decay)
        return loss.detach()


def main() -> None:
    """Parse the flags, measure, and print the result."""
    args = measure.parse("Images a second of pretraining a diffusion model.")
    device = pick_device(args.device)
    s = measure.settings(args, device, SIZES, ON_GPU)
    flags = measure.unet_flags(args.size)
    data = random_images(s["images"], flags["image_size"])
    settings = TrainSettings(
        lr=s["lr"], batch_size=s["batch"], ema_rate=s["ema_rate"], random_flip=s["flip"], precision=args.precision
    )

    def steps(one) -> float:
        return float(torch.stack([one.train_step() for _ in range(s["steps"])]).mean())

    def work():
        model, diffusion = model_of(flags)
        loop = TrainLoop(
            model=model, diffusion=diffusion, data=data, settings=settings, flags=flags, folder="", device=device
        )
        return lambda: steps(loop)

    def plain():
        one = Plain(flags, data, settings, device)
        return lambda: steps(one)

    with autocast(args.precision, device):
        bf16 = torch.is_autocast_enabled(device.type)
    images = s["batch"] * s["steps"]
    measure.report(
        "pretrain", args, device, {**s, "models": 1, "unet": measure.unet_settings(args.size)},
        dtype=torch.bfloat16 if bf16 else torch.float32, unit="images",
        work=measure.Timed(images, work), plain=measure.Timed(images, plain),
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
