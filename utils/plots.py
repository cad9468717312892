"""Draw contact sheets of images, and training curves, as PNG."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from utils.atomic import atomic_file
from utils.run_log import read_metrics

MADE_BY = "diffusion-meta-learning"  # written into each sheet, to recognise it
_GAP = 2  # pixels between images
_TEXT = 12  # pixels of height per label


def contact_sheet(
    images: torch.Tensor, columns: int, path: str | os.PathLike, labels: Sequence[object] | None = None
) -> None:
    """Write images in rows as one PNG at `path`, whole or not at all.

    Args:
        images: (N, 3, H, W) uint8, RGB, placed row by row.
        columns: images per row.
        path: the PNG to write.
        labels: N texts or numbers to write below the images.

    Raises:
        ValueError: wrong shape or dtype, fewer than 1 column, or not one label per image.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"got {images.dtype} images {tuple(images.shape)}, expected uint8 (N, 3, H, W)")
    if columns < 1:
        raise ValueError(f"got {columns} columns, expected at least 1")
    count, _, height, width = images.shape
    if labels is not None and len(labels) != count:
        raise ValueError(f"got {len(labels)} labels for {count} images; give one per image, or none")
    cell_height = height + _GAP + (_TEXT if labels is not None else 0)
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, max(rows, 1) * cell_height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        left = _GAP + index % columns * (width + _GAP)
        top = _GAP + index // columns * cell_height
        sheet.paste(Image.fromarray(np.ascontiguousarray(image)), (left, top))
        if labels is not None:
            draw.text((left, top + height), str(labels[index]), fill="black")
    made_by = PngInfo()
    made_by.add_text("Software", MADE_BY)
    with atomic_file(path) as file:
        sheet.save(file, format="PNG", pnginfo=made_by)


def curves(metrics_path: str | os.PathLike, path: str | os.PathLike) -> None:
    """Plot training loss and validation accuracy by epoch as a PNG, with a line at the start of each round.

    A failure is reported on stderr and does not stop the run.

    Args:
        metrics_path: a metrics.jsonl, whose lines have "epoch" and any of "round", "loss" and "val_accuracy" (percent).
        path: the PNG to write.
    """
    try:
        _draw(read_metrics(metrics_path), path)
    except Exception as error:
        print(f"{path}: is not drawn ({type(error).__name__}: {' '.join(str(error).split())})", file=sys.stderr)


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure. width, height: in inches."""
    from matplotlib.figure import Figure  # imported here, as it is slow; Figure needs no display

    return Figure(figsize=(width, height), layout="constrained")


def _draw(entries: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    figure = new_figure(8, 4)
    axes = figure.subplots(1, 2)
    shown = {"loss": "training loss", "val_accuracy": "validation accuracy (%)"}
    for axis, (name, title) in zip(axes, shown.items(), strict=True):
        points = [(entry["epoch"], entry[name]) for entry in entries if isinstance(entry.get(name), int | float)]
        axis.plot([epoch for epoch, _ in points], [value for _, value in points], marker=".")
        for epoch in round_starts(entries):
            axis.axvline(epoch, color="grey", linestyle=":", linewidth=0.8)
        axis.set(xlabel="epoch", title=title)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def round_starts(entries: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the first epoch of each round. entries: of metrics.jsonl, ordered by epoch."""
    known = [entry for entry in entries if entry.get("round") is not None]
    return [
        entry["epoch"] for index, entry in enumerate(known) if index == 0 or entry["round"] != known[index - 1]["round"]
    ]
