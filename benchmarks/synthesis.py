"""Measure guided sampling from the pool, as in `main.py`, in images per second.

    python -m benchmarks.synthesis --size small

A Conv4 and a class-learner with random weights guide on the predicted x_0. The plain baseline runs in float32, one
image at a time on a CPU, in whole batches on a GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from guided_diffusion.dist_util import inference_dtype, pick_device
from guided_diffusion.guidance import LogProbability, classifier_guidance, sample
from guided_diffusion.pool import PoolModel
from models.class_learner import ClassLearner
from models.guides import class_learner_guide
from models.meta_model import MetaModel
from utils.cli import run
from utils.images import to_uint8
from utils.seeding import generator, noise

SIZES = {  # steps: timed steps per image; method_steps: steps in main.py; plain_images: of the baseline
    "paper": dict(batch=8, steps=2, method_steps=25, classes=64, guide_on="x_0", scale=8.0, plain_images=1),
    "small": dict(batch=200, steps=8, method_steps=8, classes=40, guide_on="x_0", scale=8.0, plain_images=20),
}
ON_GPU = {"paper": dict(batch=256, steps=25)}


def guide(classes: int, device: torch.device) -> LogProbability:
    """Return log p(c | x, t) from networks with random weights."""
    rng = generator(measure.SEED, "weights")
    model = MetaModel(classes, generator=rng)
    learner = ClassLearner(classes, model.feature_dim, generator=rng)
    return class_learner_guide(model.to(device), learner.to(device))


def draw(
    model: PoolModel, function: LogProbability, s: dict[str, Any], index: Sequence[int], device: torch.device
) -> Tensor:
    """Draw the images numbered `index` as one batch: (N, 3, H, W) uint8, on the CPU."""
    size = model.image_size
    x_t = noise((3, size, size), index, measure.SEED, "synthesis").to(device)
    wanted = torch.tensor(index, device=device) % s["classes"]
    drawn = sample(
        model.network,
        model.diffusion(f"ddim{s['steps']}"),
        x_t,
        cond_fn=classifier_guidance(function, wanted, s["scale"]),
        guide_on=s["guide_on"],
    )
    return to_uint8(drawn).cpu()


def main() -> None:
    """Parse the flags, measure, and print the result."""
    args = measure.parse("Images a second of guided sampling.")
    device = pick_device(args.device)
    measure.settle_precision(args, device)
    s = measure.settings(args, device, SIZES, ON_GPU)
    if device.type == "cuda":
        s["plain_images"] = s["batch"]
    s["plain_batch"] = s["batch"] if device.type == "cuda" else 1
    function, unet = guide(s["classes"], device), measure.unet_settings(args.size)

    def work():
        model = measure.pool_model(args.size, device, args.precision)
        return lambda: draw(model, function, s, list(range(s["batch"])), device)

    def plain():
        model = measure.plain_model(args.size, device)
        parts = torch.arange(s["plain_images"]).split(s["plain_batch"])
        return lambda: torch.cat([draw(model, function, s, part.tolist(), device) for part in parts])

    measure.report(
        "synthesis", args, device, {**s, "sampler": "ddim", "models": 1, "unet": unet},
        dtype=inference_dtype(args.precision, device),
        unit="images", work=measure.Timed(s["batch"], work), plain=measure.Timed(s["plain_images"], plain),
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
