"""Find where a pool loses accuracy: images, labels or training. Needs labelled base images (meta_train) of the pool.

    python -m benchmarks.ladder                                            # glyphs
    python -m benchmarks.ladder --dataset custom --data-root data/mine --pool ckpt/pools/mine

Each rung is a run of `main.py` that is kept in --folder, so the ladder resumes; other flags go to `main.py`. Accuracy
is nearest-prototype accuracy on meta_val. A judge, trained on real base labels, measures the images:

    own       share of images that the judge assigns to a class of the model that drew them
    purity    share whose label agrees with the judge, under each model's best match of pseudo classes to base classes

The pool's models must have learned the base classes in order, as `image_train.py --classes_per_model` assigns them.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks import table
from config import SCENARIOS, Settings, parse
from datasets.episodes import EpisodeSampler
from datasets.pseudo import PseudoDataset, learnt
from datasets.sources import load_real
from few_shot import load_model
from guided_diffusion.dist_util import pick_device
from guided_diffusion.pool import Pool
from main import Training
from models.guides import clean_scores
from models.learners import validate
from models.meta_model import MetaModel
from schedule import Phase
from utils.cli import run as run_command
from utils.lock import locked

RUNGS = {  # run -> its name in the table
    "by_model": "unguided, by model",
    "unguided": "unguided, clusters, then relabelled",
    "guided": "guided",
    "judged": "unguided, the judge's labels",
    "real": "real images and labels",
}


class Judged(Training):
    """A run on the unguided images of another run, with labels from the judge, which no pool has."""

    def __init__(self, settings: Settings, images: Tensor, labels: Tensor):
        super().__init__(settings)
        self.data = PseudoDataset(images, labels, self.num_classes).on(self.device)

    def pseudo_dataset(self, phase: Phase) -> PseudoDataset:
        """Return the images with the judge's labels, whatever the phase."""
        return self.data


def classes(judge: MetaModel, images: Tensor, device: torch.device) -> Tensor:
    """Return the judge's class (N,) of each image (N, 3, H, W) uint8, on the CPU."""
    return clean_scores(lambda x, t: judge.classify(x), images, device).argmax(1)


def purity(said: Tensor, labels: Tensor, counts: list[int], real: list[int]) -> tuple[float, float]:
    """Return own and purity, in percent.

    said: (N,) int64, the judge's base class of each image; labels: (N,) int64, its pseudo class; counts, real: number
    of pseudo classes and of base classes of each model, in order.
    """
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[labels]
    truth = torch.arange(len(real)).repeat_interleave(torch.tensor(real))[said]
    agree = 0
    for m in range(len(counts)):
        seen = np.zeros((sum(counts), sum(real)))
        np.add.at(seen, (labels[owner == m].numpy(), said[owner == m].numpy()), 1)
        agree += seen[linear_sum_assignment(-seen)].sum()
    return 100 * float((truth == owner).float().mean()), 100 * float(agree) / len(labels)


def accuracy(s: Settings, path: Path) -> list[float]:
    """Return the accuracy of the checkpoint `path` on meta_val at 1 and at 5 shots, in percent."""
    model, size, _ = load_model(path, pick_device(s.device_name))
    real = load_real(s.dataset, s.data_paths, "meta_val", size, workers=s.workers)
    found = []
    for shot in (1, 5):
        sampler = EpisodeSampler(real.labels, s.way, shot, s.nTestNovel // s.way)
        episodes = sampler.sample_indexed(0, 600, s.seed, "ladder")
        found.append(validate(model, real.images, episodes, s.way, s.scale_cls)[0])
    return found


def main() -> None:
    """Run every missing rung, measure all, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--folder", type=Path, help="of the runs (default ckpt/runs/ladder/DATASET)")
    parser.add_argument("--rungs", nargs="+", default=list(RUNGS), choices=list(RUNGS), help="to measure (default all)")
    args, flags = parser.parse_known_args()
    s = parse(flags, description="ladder")
    if s.recipe != "clusters":
        raise ValueError(f"got --recipe {s.recipe}, expected clusters: the paper's recipe has no such rungs")
    folder = args.folder or table.ROOT / "ckpt" / "runs" / "ladder" / s.dataset
    lines = ["| rung | meta_val, 1 / 5 shots, % | own, % | purity, % |", "| --- | --- | --- | --- |"]
    _train(flags, folder / "judge", "real", s.seed + 1000)
    device, pool = pick_device(s.device_name), Pool.of(s)
    judge, _, trained = load_model(folder / "judge" / "last.pt", device)
    counts = pool.share_classes(s.num_classes, SCENARIOS[s.dataset].per_model)
    real = base_classes(pool, trained["num_classes"], counts)
    for name in args.rungs:
        place, extra = folder / name, ("", "")
        if name == "judged":
            _train(flags, folder / "by_model", "by_model", s.seed)
            images = learnt(folder / "by_model").images
            training = Judged(replace(s, source="real", save_dir=str(place)), images, classes(judge, images, device))
            with locked(place):
                training.train()
        else:
            _train(flags, place, name, s.seed)
        if name in ("by_model", "unguided", "guided"):
            data = learnt(place)
            found = purity(classes(judge, data.images, device), data.labels, counts, real)
            extra = (f"{found[0]:.1f}", f"{found[1]:.1f}" if name != "by_model" else "")
        one, five = accuracy(s, place / "last.pt")
        lines.append(f"| {RUNGS[name]} | {one:.1f} / {five:.1f} | {extra[0]} | {extra[1]} |")
    print("", *lines, sep="\n")


def base_classes(pool: Pool, total: int, counts: list[int]) -> list[int]:
    """Return the number of base classes of each pool model, in order: as its checkpoint says, or its pseudo classes.

    total: classes of the judge; counts: pseudo classes of each model. Raises ValueError if they are not `total` in all.
    """
    try:
        real = pool.share_classes()
    except ValueError:  # a public checkpoint does not say
        real = counts
    if sum(real) != total:
        raise ValueError(
            f"{pool.path}: its models were trained on {sum(real)} classes, meta_train has {total}; give the images "
            "that they were trained on"
        )
    return real


def _train(flags: list[str], folder: Path, source: str, seed: int) -> None:
    table.call("main.py", *flags, "--source", source, "--seed", str(seed), "--save-dir", str(folder), "--quiet")


if __name__ == "__main__":
    run_command(main)
