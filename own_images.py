"""Labelling your own images: `diffusionmix.py --support data/few --query data/unlabelled`."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from config import Settings
from datasets.folder import load_split
from few_shot import HeadFitter, probabilities, sharpness
from report import predictions, write
from utils.class_folders import find_images
from utils.images import extensions, read_images, shown, to_float
from utils.predictions import check_place, write_predictions
from utils.progress import say

SHEET = 100  # images on the sheet of answers


class OwnImages:
    """The images of --support, one folder per class, and those of --query, which they label."""

    def __init__(self, settings: Settings):
        """Read them. Raises ValueError for fewer than 2 classes, a class without an image, and nothing to label."""
        s, self.started = _with_a_model(settings), time.perf_counter()
        self.path = Path(s.out or s.run_folder / "predictions.csv")
        check_place(self.path, s.support, s.query)
        self.s, self.fitter = s, HeadFitter(s)
        self.support = load_split(s.support, "", self.fitter.size, every_class=True, workers=s.workers)
        if len(self.support.class_names) < 2:
            raise ValueError(f"{s.support}: got 1 class, expected 2 or more: one folder of images per class")
        names = [shown(name) for name in self.support.class_names]
        if same := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{s.support}: got two classes that are shown as {same[0]}; rename one of the folders")
        paths, left_out = find_images(s.query)
        images, unreadable = read_images(paths, self.fitter.size, workers=s.workers)
        left_out.add_unread(unreadable)
        if not images:
            what = left_out.line(Path(s.query)) or extensions()
            raise ValueError(f"{s.query}: has no readable image ({what}); expected some to label")
        left_out.say(Path(s.query))
        self.paths = sorted(set(paths) - {path for path, _ in unreadable})
        self.query = torch.from_numpy(np.stack(images))  # (N, 3, size, size) uint8
        self.skipped = {shown(s.query): left_out.rows()}

    def label(self) -> np.ndarray:
        """Learn from the support images. Return the probabilities (N, way) of the query images."""
        fitter, support = self.fitter, self.support
        pieces = fitter.pieces("own_mixes", support.images, support.labels)
        head, self.left_out = fitter.learn(support.images, support.labels, len(support.class_names), pieces)
        return probabilities(head, sharpness(*self.left_out), fitter.features(to_float(self.query)))

    def write(self, probabilities: np.ndarray) -> None:
        """Write predictions.csv and a sheet of the surest beside it, and say so."""
        on_sheet = write_predictions(self.path, self.paths, self.query, self.support.class_names, probabilities, SHEET)
        say(
            f"labelled {len(self.paths)} images with {len(self.support.class_names)} classes, learnt from "
            f"{len(self.support.labels)} images, {time.perf_counter() - self.started:.0f} s; {self.path}, "
            f"{self.path.with_suffix('.png')} (the {on_sheet} most confident, by label)"
        )

    def write_page(self, probabilities: np.ndarray) -> None:
        """Write predictions.html, the images class by class, and print its path."""
        path, support = self.path.with_suffix(".html"), self.support
        learnt = support.class_names, probabilities, support.images.numpy(), support.labels.numpy()
        write(predictions.render(self.paths, self.query.numpy(), *learnt), path)
        print(path)

    def say_what_to_expect(self) -> None:
        """Print how many support images the others label right."""
        logits, labels = self.left_out
        if len(labels):
            from scipy.stats import binomtest  # here, as it takes a second to import

            right = int((logits.argmax(1) == labels).sum())
            low, high = (100 * each for each in binomtest(right, len(labels)).proportion_ci(method="wilson"))
            say(
                f"leave-one-out: {right} of {len(labels)} support images are labelled right (chance "
                f"{100 / len(self.support.class_names):.0f} %); expect {low:.0f} to {high:.0f} % right on the others"
            )


def _with_a_model(s: Settings) -> Settings:
    """Return settings that name the meta-model that ships beside the pool, if the run has not trained one yet."""
    ships = Path(s.pool_place) / "meta_model.pt"
    if s.resume or (s.run_folder / "best_model.pt").exists() or not ships.exists():
        return s
    say(f"{s.run_folder} has no model yet; using {ships}, which ships with the pool")
    return replace(s, resume=str(ships))
