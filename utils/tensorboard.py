"""Write a run's log for TensorBoard, with --tensorboard. Only the first process writes."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils import processes

FOLDER = "tensorboard"  # in the run folder; read it with tensorboard --logdir RUN


class Board:
    """A writer of event files in <folder>/tensorboard; does nothing if they are not wanted."""

    def __init__(self, folder: str | os.PathLike, *, wanted: bool = True, done: int | None = None) -> None:
        """Open the files if they are `wanted`. `config.Settings` checks that the package tensorboard is installed.

        done: number of finished epochs; entries that a killed run wrote for later ones are hidden. None hides nothing.
        """
        self._writer, self._images = None, set()
        if wanted and processes.is_first():
            from torch.utils.tensorboard import SummaryWriter  # imported here, as it is an optional package

            self._writer = SummaryWriter(Path(folder) / FOLDER, purge_step=None if done is None else done + 1)

    def scalars(self, entries: Mapping[str, Any], step: int) -> None:
        """Write the numbers in `entries`, and those in lists as name/0, name/1, ...; ignore other values."""
        if self._writer is None:
            return
        for name, value in entries.items():
            several = (
                {f"{name}/{i}": each for i, each in enumerate(value)} if isinstance(value, list) else {name: value}
            )
            for tag, each in several.items():
                if isinstance(each, int | float) and not isinstance(each, bool):
                    self._writer.add_scalar(tag, each, step)
        self._writer.flush()

    def image(self, name: str, path: str | os.PathLike, step: int) -> None:
        """Write the image at `path`, such as a contact sheet, once per name and step."""
        if self._writer is None or (name, step) in self._images:
            return
        self._images.add((name, step))
        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()
