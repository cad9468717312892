"""glyphs: a labelled image set that the program draws itself, reproducibly from a seed, with no download.

A class is a *stroke program*: two to four Bezier strokes at fixed places. An image is one writing of that program: the
control points shake (motor noise), the whole is moved, rotated, scaled and sheared, and pen width, the colours of ink
and paper, and the paper's texture vary. Only the shape identifies the class.

Images are drawn in float64, so that they are the same after rounding on every machine and with any number of threads.
"""

import math

import numpy as np
import torch

from datasets.folder import LabelledImages
from utils.seeding import numpy_generator

SPLIT_CLASSES = {"meta_train": 40, "meta_val": 10, "meta_test": 20}
POINTS = 112  # pen positions along one glyph: closer than its pen is wide
_CONTROLS = 4  # control points of a cubic Bezier stroke
_MAX_STROKES = 4
_UNIFORMS = 2 * _CONTROLS * _MAX_STROKES + 24  # random numbers per image


def make_split(split: str, per_class: int, *, seed: int = 0, size: int = 32) -> LabelledImages:
    """Draw `per_class` images of every class of a split.

    split: "meta_train" (40 base classes), "meta_val" (10) or "meta_test" (20 novel); no class is in two splits.
    seed: of the *images* only. Classes are fixed, so that the novel classes stay novel to the shipped pool.
    Returns images (N, 3, size, size) uint8 in [0, 255] and labels (N,) int64, class after class.
    Image i of a class does not depend on `per_class`.
    Raises ValueError for an unknown split or a count below 1.
    """
    if split not in SPLIT_CLASSES:
        raise ValueError(f"got glyphs split {split!r}, expected one of {', '.join(SPLIT_CLASSES)}")
    if per_class < 1:
        raise ValueError(f"got {per_class} images per class, expected 1 or more")
    first = _first_class(split)
    programs = stroke_programs()
    images, labels = [], []
    for label in range(SPLIT_CLASSES[split]):
        random = numpy_generator(seed, "glyphs", split, label).random((per_class, _UNIFORMS))
        images.append(_draw(programs[first + label], random, size))
        labels.append(torch.full((per_class,), label, dtype=torch.int64))
    names = [f"glyph{first + label:03d}" for label in range(SPLIT_CLASSES[split])]
    return LabelledImages(torch.cat(images), torch.cat(labels), names)


def stroke_programs(seed: int = 0) -> list[np.ndarray]:
    """Return the stroke programs of all classes: base, then validation, then novel.

    Each is a float32 array (strokes, 4, 2) of cubic Bezier control points (x, y) in [-1, 1]. A program whose blurred
    drawing is too similar to an earlier one is rejected, so that all classes can be told apart.
    """
    rng = numpy_generator(seed, "stroke programs")
    programs: list[np.ndarray] = []
    drawn: list[np.ndarray] = []
    while len(programs) < sum(SPLIT_CLASSES.values()):
        program = _random_program(rng)
        blurred = _blurred(program)
        if all(float(blurred @ other) < 0.80 for other in drawn):
            programs.append(program)
            drawn.append(blurred)
    return programs


def _first_class(split: str) -> int:
    """Return the index of a split's first class in `stroke_programs`."""
    names = list(SPLIT_CLASSES)
    return sum(SPLIT_CLASSES[name] for name in names[: names.index(split)])


def _random_program(rng: np.random.Generator) -> np.ndarray:
    """Draw two to four strokes, straight or bent, scaled to fill the square. Some start where the last one ended."""
    count = int(rng.integers(2, _MAX_STROKES + 1))
    strokes = []
    pen = rng.uniform(-0.9, 0.9, 2)
    while len(strokes) < count:
        if strokes and rng.random() < 0.5:
            pen = rng.uniform(-0.9, 0.9, 2)
        end = rng.uniform(-0.9, 0.9, 2)
        if np.linalg.norm(end - pen) < 0.8:
            continue
        bend = rng.normal(0, 0.55, 2) * (rng.random() < 0.6)
        thirds = np.linspace(0, 1, _CONTROLS)[:, None]
        stroke = pen + thirds * (end - pen)
        stroke[1:3] += bend
        strokes.append(np.clip(stroke, -1, 1))
        pen = end
    program = np.stack(strokes)
    flat = program.reshape(-1, 2)
    middle, reach = (flat.max(0) + flat.min(0)) / 2, (flat.max(0) - flat.min(0)).max() / 2
    return ((program - middle) / reach).astype(np.float32)


def _blurred(program: np.ndarray, size: int = 12) -> np.ndarray:
    """Return a program's ink density on a coarse grid, with zero mean and unit norm, to compare programs."""
    pen = _pen_path(program[None])[0]
    axis = np.linspace(-1, 1, size)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 1, 2)
    density = np.exp(-((grid - pen) ** 2).sum(-1) / (2 * 0.18**2)).sum(1)
    density -= density.mean()
    return density / np.linalg.norm(density)


def _pen_path(controls: np.ndarray) -> np.ndarray:
    """Return pen positions (N, POINTS, 2) along strokes (N, strokes, 4, 2), shared evenly among the strokes."""
    strokes = controls.shape[1]
    shares = [POINTS // strokes + (s < POINTS % strokes) for s in range(strokes)]
    paths = []
    for s, share in enumerate(shares):
        t = np.linspace(0, 1, share)
        basis = np.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], 1)  # (share, 4)
        paths.append(np.einsum("pc,ncd->npd", basis, controls[:, s]))
    return np.concatenate(paths, 1)


def _draw(program: np.ndarray, u: np.ndarray, size: int) -> torch.Tensor:
    """Draw one image per row of uniforms u (N, _UNIFORMS): uint8 (N, 3, size, size)."""
    count, strokes = len(u), len(program)
    shake, u = u[:, : 2 * _CONTROLS * _MAX_STROKES], u[:, 2 * _CONTROLS * _MAX_STROKES :]
    shake = (shake[:, : strokes * _CONTROLS * 2].reshape(count, strokes, _CONTROLS, 2) - 0.5) * 0.36
    path = _pen_path(program[None] + shake)  # (N, P, 2)

    def between(column: int, low: float, high: float) -> np.ndarray:
        return low + (high - low) * u[:, column]

    angle, shear = between(0, -0.28, 0.28), between(1, -0.2, 0.2)
    width, height = between(2, 0.54, 0.78), between(3, 0.54, 0.78)
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = path[..., 0] * width[:, None], path[..., 1] * height[:, None]
    x = x + shear[:, None] * y
    x, y = cos[:, None] * x - sin[:, None] * y, sin[:, None] * x + cos[:, None] * y
    path = np.stack([x + between(4, -0.2, 0.2)[:, None], y + between(5, -0.2, 0.2)[:, None]], -1)

    pen = torch.from_numpy(path)
    axis = (torch.arange(size, dtype=torch.float64) + 0.5) * (2 / size) - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)  # (H * W, 2), x then y
    radius = torch.from_numpy(between(6, 0.055, 0.105))[:, None]
    # eight at once: the distances of more would not fit in the cache
    ink = torch.cat([_coverage(grid, p, r, 1 / size) for p, r in zip(pen.split(8), radius.split(8), strict=True)])
    ink = ink.view(count, 1, size, size)

    paper_colour, ink_colour = _colours(u[:, 7:14])
    paper = paper_colour[:, :, None, None] + _texture(u[:, 14:24], axis)
    image = paper * (1 - ink) + ink_colour[:, :, None, None] * ink
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def _coverage(grid: torch.Tensor, pen: torch.Tensor, radius: torch.Tensor, softness: float) -> torch.Tensor:
    """Return how much ink the pen positions (N, P, 2) leave on each pixel (H * W, 2): (N, H * W) in [0, 1]."""
    squared = torch.baddbmm((pen**2).sum(-1)[:, None], -2 * grid.expand(len(pen), -1, -1), pen.transpose(1, 2))
    distance = (squared.amin(-1) + (grid**2).sum(-1)).clamp_min(0).sqrt()
    return torch.sigmoid((radius - distance) / (0.5 * softness))


def _colours(u: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw paper and ink colours (N, 3) in [0, 1]: dark paper and light ink, each of any hue."""
    paper_light, ink_light = 0.08 + 0.20 * u[:, 0], 0.70 + 0.22 * u[:, 1]
    return _hue(paper_light, u[:, 3], 0.14 * u[:, 4]), _hue(ink_light, u[:, 5], 0.28 * u[:, 6])


def _hue(lightness: np.ndarray, hue: np.ndarray, chroma: np.ndarray) -> torch.Tensor:
    """Return RGB (N, 3) with mean `lightness`, tinted by `chroma` towards `hue` (in turns)."""
    phases = 2 * math.pi * (hue[:, None] + np.array([0, 1 / 3, 2 / 3]))
    return torch.from_numpy(lightness[:, None] + chroma[:, None] * np.cos(phases))


def _texture(u: np.ndarray, axis: torch.Tensor) -> torch.Tensor:
    """Draw paper texture (N, 3, H, W): a brightness gradient and one soft grating, tinted."""
    u = torch.from_numpy(u)[:, :, None, None]
    y, x = axis[None, :, None], axis[None, None, :]
    turn = 2 * math.pi
    slope = 0.08 * (torch.cos(turn * u[:, 0]) * x + torch.sin(turn * u[:, 0]) * y)
    frequency = 1.5 + 3.5 * u[:, 1]
    wave = torch.cos(turn * u[:, 2]) * x + torch.sin(turn * u[:, 2]) * y
    grating = 0.06 * u[:, 3] * torch.sin(turn * (frequency * wave / 2 + u[:, 4]))
    tint = 0.5 + torch.cat([u[:, 5:6], u[:, 6:7], u[:, 7:8]], 1)  # (N, 3, 1, 1)
    return (slope + grating)[:, None] * tint
