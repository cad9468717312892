"""Random augmentation of a batch of images, on its device. Each image has its own random numbers."""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from utils.images import to_float

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: perceived brightness of red, green and blue
_COLOURS = ("brightness", "contrast", "saturation", "hue", "grayscale")
_CHUNK = 2**19  # pixel values processed at once on a CPU: 2 MiB
_DRAWS = 20  # uniform numbers per image, always all drawn, so that no setting changes the numbers of another


@dataclass(frozen=True)
class AugmentSettings:
    """Strengths of the changes in `augment`.

    Attributes:
        crop_padding: how far a crop may reach beyond the image, as a share of its side; reflected pixels fill the gap.
        scale: least and greatest area of a crop, as a share of the image's area.
        aspect: greatest ratio of a crop's sides, 1 or more; the ratio is log-uniform in [1 / aspect, aspect].
        rotate: greatest rotation in either direction, in degrees.
        flip: mirror half of the images left to right.
        brightness, contrast, saturation: the factor is uniform in [1 - value, 1 + value], and at least 0.
        hue: greatest rotation around the grey axis in either direction, as a share of a full turn, at most 0.5.
        grayscale: probability of removing all colour.
        erase: probability of covering a rectangle with one random colour.
        erase_area: least and greatest area of that rectangle, as a share of the image's area.

    Raises:
        ValueError: a value is out of range.
    """

    crop_padding: float = 0.125
    scale: tuple[float, float] = (0.5, 1.0)
    aspect: float = 4 / 3
    rotate: float = 0.0
    flip: bool = True
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grayscale: float = 0.1
    erase: float = 0.5
    erase_area: tuple[float, float] = (0.02, 0.2)

    def __post_init__(self) -> None:
        at_most = {"crop_padding": 1, "rotate": 180, "hue": 0.5, "grayscale": 1, "erase": 1}
        for name in ("crop_padding", "rotate", "brightness", "contrast", "saturation", *at_most):
            value, high = getattr(self, name), at_most.get(name, math.inf)
            if not 0 <= value <= high:
                raise ValueError(f"got {name} {value}, expected 0 to {high}; choose a value in that range")
        for name in ("scale", "erase_area"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"got {name} ({low}, {high}), expected 0 < least <= greatest <= 1; change them")
        if self.aspect < 1:
            raise ValueError(f"got aspect {self.aspect}, expected 1 or more; give the greater side over the smaller")


def draw(rows: int, generator: torch.Generator) -> torch.Tensor:
    """Return the random numbers to augment `rows` images, (rows, 20) in [0, 1), on the generator's device."""
    return torch.rand(rows, _DRAWS, generator=generator, device=generator.device)


def augment(images: torch.Tensor, generator: torch.Generator, settings: AugmentSettings) -> torch.Tensor:
    """Augment each image by its own random numbers, as in `augment_by`. Equally many are drawn under any settings."""
    return augment_by(images, draw(len(images), generator), settings)


def augment_by(images: torch.Tensor, draws: torch.Tensor, settings: AugmentSettings) -> torch.Tensor:
    """Flip, crop, recolour and erase each image, in that order, by given random numbers.

    Args:
        images: (N, 3, H, W) uint8, or float in [-1, 1].
        draws: (N, 20) from `draw`; or (1, 20), which changes all images the same way.
        settings: strengths of the changes.

    Returns:
        (N, 3, H, W) float32 in [-1, 1], on the device of `images`.
    """
    draws = draws.to(images.device).expand(len(images), -1)
    if images.is_cuda or not len(images):
        return _augment(images, draws, settings)
    # On a CPU, a few images at a time fit into the cache. The chunks do not affect the result.
    step = max(1, _CHUNK // images[0].numel())
    if images.requires_grad and torch.is_grad_enabled():
        parts = zip(images.split(step), draws.split(step), strict=True)
        return torch.cat([_augment(*part, settings) for part in parts])
    out = torch.empty(images.shape, dtype=torch.float32)
    for start in range(0, len(images), step):
        chunk = slice(start, start + step)
        out[chunk] = _augment(images[chunk], draws[chunk], settings)
    return out


def _augment(images: torch.Tensor, draws: torch.Tensor, settings: AugmentSettings) -> torch.Tensor:
    if settings.flip:
        images = torch.where(draws[:, 0, None, None, None] < 0.5, images.flip(3), images)
    images = images.float() if images.is_floating_point() else to_float(images)
    if settings.crop_padding or settings.rotate or settings.scale != (1, 1) or settings.aspect != 1:
        images = _crop(images, draws[:, 1:6], settings)
    if any(getattr(settings, name) for name in _COLOURS):
        images = _recolour(images, draws[:, 6:12], settings)
    if settings.erase:
        images = _erase(images, draws[:, 12:20], settings)
    return images.clamp(-1, 1)


def _crop(images: torch.Tensor, draws: torch.Tensor, settings: AugmentSettings) -> torch.Tensor:
    # One affine map from the output's square [-1, 1]^2 into the image's, sampled bilinearly.
    area, ratio, across, down, angle = draws.unbind(1)  # (N,) each
    side = _between(area, *settings.scale).sqrt()
    stretch = settings.aspect ** (_between(ratio, -1, 1) / 2)
    half_width, half_height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    x = _between(across, -1, 1) * (1 - half_width + 2 * settings.crop_padding)
    y = _between(down, -1, 1) * (1 - half_height + 2 * settings.crop_padding)
    turn = _between(angle, -1, 1) * math.radians(settings.rotate)
    shape = images.shape[3] / images.shape[2]  # a rotation preserves angles in pixels, not in shares of the sides
    rows = [
        torch.stack([half_width * turn.cos(), -half_height * turn.sin() / shape, x], 1),
        torch.stack([half_width * turn.sin() * shape, half_height * turn.cos(), y], 1),
    ]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _recolour(images: torch.Tensor, draws: torch.Tensor, settings: AugmentSettings) -> torch.Tensor:
    # Brightness, contrast, hue and saturation (0 for grayscale), in that order and without clipping in between,
    # combine into one 3x3 matrix and one offset per image: one pass over the pixels instead of five.
    # On u = (x + 1) / 2, brightness is f * u and contrast c * u + (1 - c) * (the image's mean luma).
    luma = torch.stack([images.new_full((), each) for each in _LUMA])  # filled on the device, without a copy
    brightness = _factor(draws[:, 0], settings.brightness)
    contrast = _factor(draws[:, 1], settings.contrast)
    saturation = _factor(draws[:, 2], settings.saturation)
    turn = _between(draws[:, 3], -1, 1) * settings.hue * 2 * math.pi
    saturation = torch.where(draws[:, 4] < settings.grayscale, torch.zeros_like(saturation), saturation)

    mean = images.mean((2, 3)) @ luma  # (N,)
    eye = torch.eye(3, device=images.device)
    grey = luma.expand(3, 3)  # every row is the luma
    saturate = grey + saturation[:, None, None] * (eye - grey)
    matrix = (contrast * brightness)[:, None, None] * (saturate @ _hue_rotation(turn))
    offset = brightness - 1 + (1 - contrast) * brightness * mean  # these matrices leave grey unchanged
    return torch.baddbmm(offset[:, None, None], matrix, images.flatten(2)).view_as(images)


def _hue_rotation(turn: torch.Tensor) -> torch.Tensor:
    # Rodrigues' rotation of RGB around (1, 1, 1) / sqrt(3)
    eye = torch.eye(3, device=turn.device)
    mean = torch.full_like(eye, 1 / 3)
    cross = eye.roll(1, 0) - eye.roll(-1, 0)
    cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
    return mean + cos * (eye - mean) + sin / math.sqrt(3) * cross  # (N, 3, 3)


def _erase(images: torch.Tensor, draws: torch.Tensor, settings: AugmentSettings) -> torch.Tensor:
    chosen, area, ratio, across, down = draws[:, :5].unbind(1)
    side = _between(area, *settings.erase_area).sqrt()
    stretch = 3 ** (_between(ratio, -1, 1) / 2)  # sides from 1:3 to 3:1
    columns = _span(images.shape[3], side * stretch, across)  # (N, W)
    rows = _span(images.shape[2], side / stretch, down)  # (N, H)
    mask = (rows[:, :, None] & columns[:, None, :] & (chosen < settings.erase)[:, None, None])[:, None]
    return torch.where(mask, _between(draws[:, 5:8], -1, 1)[:, :, None, None], images)


def _span(pixels: int, share: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    # a mask (N, pixels) of a run of `share` of the side, placed at `position` of its possible places
    length = (share.clamp(max=1) * pixels).round().clamp(min=1)
    start = (position * (pixels - length + 1)).floor()
    index = torch.arange(pixels, device=share.device)
    return (index >= start[:, None]) & (index < (start + length)[:, None])


def _factor(draws: torch.Tensor, strength: float) -> torch.Tensor:
    return _between(draws, 1 - strength, 1 + strength).clamp(min=0)


def _between(draws: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return low + draws * (high - low)
