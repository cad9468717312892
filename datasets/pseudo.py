"""The pseudo dataset of a round: images that the pool drew, with their pseudo classes.

python -m datasets.pseudo ckpt/runs/glyphs/1-shot --as-folders data/pseudo      # PNG files, a folder per class
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from utils import processes
from utils.atomic import atomic_file
from utils.cli import OneLineParser
from utils.cli import run as run_command
from utils.plots import contact_sheet
from utils.run_log import write_json

_OWN = ("num_classes", "num_images", "class_to_index")  # manifest entries that the caller may not set


@dataclass(frozen=True)
class PseudoDataset:
    """Labelled pseudo images. Class c is the integer c in every folder and round, never the place of a sorted name.

    Attributes:
        images: (N, 3, H, W) uint8, RGB.
        labels: (N,) int64, from 0 to num_classes - 1.
        num_classes: C, also counting classes without images.

    Raises:
        ValueError: shapes, dtypes or labels are not as above.
    """

    images: torch.Tensor
    labels: torch.Tensor
    num_classes: int

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(f"got {self.images.dtype} images {tuple(self.images.shape)}, expected uint8 (N, 3, H, W)")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"got {self.labels.dtype} labels {tuple(self.labels.shape)} for {len(self.images)} images, "
                "expected int64, one per image"
            )
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.num_classes:
            raise ValueError(
                f"got labels from {int(self.labels.min())} to {int(self.labels.max())}, "
                f"expected 0 to {self.num_classes - 1}"
            )

    def save(self, folder: str | os.PathLike, manifest: Mapping[str, Any]) -> None:
        """Write images.npy, labels.npy and then manifest.json, so that a folder with a manifest is complete.

        Args:
            folder: made if missing; a dataset in it is replaced.
            manifest: entries to add to the manifest, such as the round. The manifest also gets `num_classes`,
                `num_images` and `class_to_index`, a list of {class, index, images}.

        Raises:
            ValueError: `manifest` has an entry with one of these names.
        """
        taken = [name for name in _OWN if name in manifest]
        if taken:
            raise ValueError(f"got a manifest entry {taken[0]}, which the dataset writes itself; use another name")
        folder = Path(folder)
        (folder / "manifest.json").unlink(missing_ok=True)  # incomplete from here on
        for name, tensor in (("images", self.images), ("labels", self.labels)):
            with atomic_file(folder / f"{name}.npy") as file:
                np.save(file, tensor.cpu().numpy())
        counts = torch.bincount(self.labels.cpu(), minlength=self.num_classes).tolist()
        classes = [{"class": f"class{c}", "index": c, "images": counts[c]} for c in range(self.num_classes)]
        own = {"num_classes": self.num_classes, "num_images": len(self.labels), "class_to_index": classes}
        write_json(folder / "manifest.json", {**own, **manifest})

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Self:
        """Read what `save` wrote. Raises ValueError if the folder is incomplete or its files disagree."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        try:
            images, labels = (
                torch.from_numpy(np.load(folder / f"{name}.npy", allow_pickle=False)) for name in ("images", "labels")
            )
            dataset = cls(images, labels, int(manifest["num_classes"]))
        except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder}: damaged pseudo dataset ({error}); delete it and make it again") from error
        if len(labels) != manifest.get("num_images"):
            raise ValueError(
                f"{folder}: holds {len(labels)} images, its manifest says {manifest.get('num_images')}; "
                "delete the folder to make it again"
            )
        return dataset

    def joined(self, others: Sequence["PseudoDataset"]) -> "PseudoDataset":
        """Return this dataset joined with `others`, which have the same classes."""
        if not others:
            return self
        parts = [self, *others]
        images, labels = torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts])
        return PseudoDataset(images, labels, self.num_classes)

    def on(self, device: torch.device) -> "PseudoDataset":
        """Return the dataset for `device`: images on a GPU if they fit in half its free memory, else pinned memory."""
        if device.type != "cuda":
            return self
        free, _ = torch.cuda.mem_get_info(device)
        images = self.images.to(device) if self.images.nbytes < free // 2 else self.images.pin_memory()
        return PseudoDataset(images, self.labels, self.num_classes)

    def sheet(self, path: str | os.PathLike, per_class: int) -> None:
        """Write a PNG with a row per class: its first `per_class` images, and its number below the first one."""
        rows = torch.full((self.num_classes, per_class, *self.images.shape[1:]), 255, dtype=torch.uint8)
        for c in range(self.num_classes):
            first = self.images[self.labels == c][:per_class]
            rows[c, : len(first)] = first.cpu()  # white where the class has fewer
        captions = [c if column == 0 else "" for c in range(self.num_classes) for column in range(per_class)]
        contact_sheet(rows.flatten(0, 1), per_class, path, captions)


def load_or_make(
    folder: str | os.PathLike, make: Callable[[], tuple[PseudoDataset, Mapping[str, Any]]]
) -> PseudoDataset:
    """Return the dataset in `folder`. If there is none, call `make` and save its dataset there, with notes and a sheet.

    All processes of a run call this together, and so `make` too; the first one writes.
    """
    if processes.broadcast(not (Path(folder) / "manifest.json").exists()):
        dataset, notes = make()
        if processes.is_first():
            dataset.sheet(Path(folder) / "sheet.png", 16)
            dataset.save(folder, notes)
        processes.meet()
    return PseudoDataset.load(folder)


def load_or_label(path: str | os.PathLike, data: PseudoDataset, make: Callable[[], torch.Tensor]) -> PseudoDataset:
    """Return `data` with the labels (N,) int64 in the file `path`. If it does not exist, save the labels from `make`.

    All processes of a run call this together. Raises ValueError for a damaged file.
    """
    path = Path(path)
    if processes.broadcast(not path.exists()):
        labels = make()
        if processes.is_first():
            with atomic_file(path) as file:
                np.save(file, labels.cpu().numpy())
        processes.meet()
    return PseudoDataset(data.images, _labels(path), data.num_classes)


def learnt(run: str | os.PathLike) -> PseudoDataset:
    """Return the images of all rounds of a run, with the labels that its last network was trained on.

    Raises ValueError if there are no rounds, or one is damaged.
    """
    rounds = sorted((Path(run) / "pseudo").glob("round*"))
    if not rounds:
        raise ValueError(f"{run}: has no pseudo images; give a run of main.py with --source guided or unguided")
    parts = []
    for folder in rounds:
        data = PseudoDataset.load(folder)
        newer = [*folder.glob("clusters.npy"), *sorted(folder.glob("labels[0-9]*.npy"), key=_number)]
        parts.append(PseudoDataset(data.images, _labels(newer[-1]), data.num_classes) if newer else data)
    return parts[0].joined(parts[1:])


def _number(path: Path) -> int:
    """Return the round in the name labelsNN.npy, which has more digits from round 100 on."""
    digits = path.stem.removeprefix("labels")
    return int(digits) if digits.isdecimal() else -1


def _labels(path: Path) -> torch.Tensor:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, EOFError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged labels ({error}); delete the run folder and start again") from error


def as_folders(data: PseudoDataset, out: str | os.PathLike) -> None:
    """Write images as <out>/class{c}/{i}.png. Raises ValueError if `out` exists and is not an empty folder."""
    out, width = Path(out), len(str(data.num_classes - 1))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is there already; give a new folder")
    for i, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
        with atomic_file(out / f"class{label:0{width}d}" / f"{i:06d}.png") as file:
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="PNG")


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """Read the manifest of a pseudo dataset. Raises ValueError if it is missing or not a JSON object."""
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: no complete pseudo dataset (no manifest.json); make it again") from error
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON; delete the folder to make it again") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path}: got a JSON {type(manifest).__name__}, expected an object; make it again")
    return manifest


def main() -> None:
    """Parse the flags and write the pseudo images of a run as class folders."""
    parser = OneLineParser(description="Write the pseudo images of a run as PNG files, a folder per class.")
    parser.add_argument("run", help="run folder of main.py")
    parser.add_argument("--as-folders", required=True, metavar="OUT", help="folder to write, made new")
    args = parser.parse_args()
    data = learnt(args.run)
    as_folders(data, args.as_folders)
    print(f"wrote {len(data.labels)} images of {len(data.labels.unique())} classes to {args.as_folders}")


if __name__ == "__main__":
    run_command(main)
