"""Test whether a model copies: are its samples nearer to its training images than unseen images are?"""

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from guided_diffusion.dist_util import autocast
from guided_diffusion.guidance import sample
from guided_diffusion.image_datasets import TrainingImages
from guided_diffusion.pool import PoolModel
from guided_diffusion.respace import space_timesteps
from utils.images import to_float
from utils.seeding import noise

SAMPLES = 64  # samples drawn, and the most held-out images to compare them with
STEPS = 25  # DDIM steps
BATCH = 32  # samples per batch
LEAST_IMAGES = 20  # a class with fewer images holds none out
MOST_HELD_OUT = 16  # images per class
CHUNK = 2**24  # pixel values of training images converted to float at a time: 64 MiB


def split(data: TrainingImages, share: float) -> tuple[TrainingImages, Tensor]:
    """Return the images to train on, and the images held out (H, 3, h, w) uint8, sorted by class.

    share: share of each class to hold out, from 0 to below 1. If it is above 0, 1 to MOST_HELD_OUT images are held out
    of each class of LEAST_IMAGES or more.
    The choice depends on pixels alone, not on names, order or seed, and changes little when images are added.
    """
    held_out = []
    for label in range(len(data.class_names)) if share else ():
        own = (data.labels == label).nonzero().flatten().tolist()
        if len(own) >= LEAST_IMAGES:
            count = min(max(1, round(share * len(own))), MOST_HELD_OUT)
            held_out += sorted(own, key=lambda index: hashlib.sha256(data.images[index].numpy()).digest())[:count]
    kept = torch.ones(len(data.images), dtype=torch.bool)
    kept[held_out] = False
    return replace(data, images=data.images[kept], labels=data.labels[kept]), data.images[held_out]


def measure(
    model: PoolModel, training: Tensor, held_out: Tensor, *, mirrored: bool, seed: int, precision: str,
    device: torch.device,
) -> dict[str, float | None]:  # fmt: skip
    """Draw SAMPLES images from `model`, which is on `device`, and return their `figure`."""
    return figure(draw(model, seed, precision, device), held_out, training, mirrored=mirrored)


def draw(model: PoolModel, seed: int, precision: str, device: torch.device) -> Tensor:
    """Draw SAMPLES unguided images (S, 3, h, w) in [-1, 1], cycling through the classes of a conditional model."""
    size, total = model.image_size, model.diffusion().num_timesteps
    process = model.diffusion(sorted(space_timesteps(total, str(min(STEPS, total)))))
    drawn = []
    for index in torch.arange(SAMPLES).split(BATCH):
        x_t = noise((3, size, size), index.tolist(), seed, "memorisation").to(device)
        labels = (index % model.flags["num_classes"]).to(device) if model.class_cond else None
        with autocast(precision, device):
            drawn.append(sample(model.network, process, x_t, local_labels=labels).float())
    return torch.cat(drawn)


def figure(samples: Tensor, held_out: Tensor, training: Tensor, *, mirrored: bool = False) -> dict[str, float | None]:
    """Return how near samples and held-out images are to the training images.

    samples: (S, 3, h, w) float in [-1, 1]; held_out: (H, 3, h, w) uint8, of which at most SAMPLES, evenly spread, are
    used; training: (N, 3, h, w) uint8; mirrored: as for `nearest`.
    `samples` and `held_out` are the medians of `nearest`. `ratio` is samples / held_out: 1 for samples as new as unseen
    images, near 0 for copies. `too_near` is the share of samples nearer than the 5th percentile of the held-out images:
    about 0.05 for samples as new as unseen images. Without held-out images the last three are None. `ratio` is also
    None if half of the held-out images are in `training`.
    """
    near = nearest(samples, training, mirrored=mirrored)
    result = {"samples": round(float(near.median()), 4), "held_out": None, "ratio": None, "too_near": None}
    if len(held_out):
        chosen = torch.linspace(0, len(held_out) - 1, min(SAMPLES, len(held_out))).round().long()
        unseen = nearest(to_float(held_out[chosen]).to(samples.device), training, mirrored=mirrored)
        middle = float(unseen.median())
        result["held_out"] = round(middle, 4)
        result["ratio"] = round(float(near.median()) / middle, 4) if middle else None
        result["too_near"] = round(float((near < unseen.quantile(0.05)).float().mean()), 4)
    return result


def nearest(images: Tensor, training: Tensor, *, mirrored: bool = False) -> Tensor:
    """Return the root mean squared difference per pixel value to the nearest training image: (Q,) float32.

    images: (Q, 3, h, w) float in [-1, 1]; training: (N, 3, h, w) uint8, N >= 1, on any device.
    mirrored: also compare mirror images, for a model that was trained on them.
    """
    if mirrored:
        return torch.minimum(nearest(images, training), nearest(images.flip(-1), training))
    flat = images.flatten(1)  # (Q, D)
    least = torch.full((len(flat),), torch.inf, device=flat.device)
    found = torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
    rows = max(1, CHUNK // flat.shape[1])
    for start in range(0, len(training), rows):
        chunk = to_float(training[start : start + rows].to(flat.device)).flatten(1)  # (rows, D)
        # |q - x|^2 without |q|^2, which is the same for all x
        value, index = (chunk.square().sum(1) - 2 * flat @ chunk.T).min(1)  # (Q,)
        found = torch.where(value < least, index + start, found)
        least = torch.minimum(value, least)
    # The expanded square finds the image but is inexact near 0: compute the distance again.
    chosen = to_float(training[found.to(training.device)].to(flat.device)).flatten(1)
    return (flat - chosen).square().mean(1).sqrt()


def sentence(figure: dict[str, float | None]) -> str:
    """Return `figure` as one line of text."""
    if figure["held_out"] is None:
        return "no images were held out, so copying was not measured; give classes of 20 images, or --held_out_dir"
    text = f"its samples lie {figure['samples']:.3f} from the nearest training image"
    ratio = "none" if figure["ratio"] is None else f"{figure['ratio']:.2f}"
    return (
        f"{text}, held-out images {figure['held_out']:.3f}: ratio {ratio}; "
        f"{figure['too_near']:.0%} of samples nearer than 95 % of the held-out images"
    )
