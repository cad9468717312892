"""Drawing the images of a round from every model of the pool, guided or not."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from guided_diffusion.dist_util import in_batches
from guided_diffusion.guidance import LogProbability, classifier_guidance, sample
from guided_diffusion.pool import Pool, PoolModel
from utils.images import to_uint8
from utils.pieces import Pieces
from utils.seeding import noise


@dataclass(frozen=True)
class Synthesis:
    """How to draw a round's images.

    Attributes:
        classes: pseudo classes of each pool model, in order; class c belongs to one model and stays with it.
        per_class: images a class.
        steps: of the sampler.
        size: side in pixels of what comes out; models of another size are resampled.
        seed, stream: image i of a model starts from noise that depends on these, the model and i alone, so that it
            does not change with the batch.
        batch: images that pass the networks at once.
        scale: s in s * grad log p(c | x_t, t).
        guide_on: "x_t" or "x_0", as in `guidance.sample`.
        precision: of the diffusion models: auto, float32 or bf16.
        sampler: "ddim" or "dpmpp2m", as in `guidance.sample`.
        folder: where batches are kept until all are there, for a stopped run to go on from; the caller deletes it.
            None: in memory, for one process.
    """

    classes: Sequence[int]
    per_class: int
    steps: int
    size: int
    seed: int
    stream: int | str
    batch: int = 250
    scale: float = 1.0
    guide_on: str = "x_t"
    precision: str = "auto"
    sampler: str = "ddim"
    folder: Path | None = None

    def first_class(self, m: int) -> int:
        """The first pseudo class of pool model m (from 0)."""
        return sum(self.classes[:m])

    def first_of(self, labels: Tensor) -> Tensor:
        """Of each pseudo class (N,), the first class of its pool model (N,)."""
        return torch.tensor([self.first_class(m) for m, n in enumerate(self.classes) for _ in range(n)])[labels]


def synthesise(
    pool: Pool, plan: Synthesis, device: torch.device, log_probability: LogProbability | None = None,
    wanted: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Draw the images of all classes, model by model; several processes share the batches out.

    log_probability: (x (N, 3, H, W), t (N,)) -> (N, C), to guide by; None draws without guidance.
    wanted: (N,) the class to ask for in place of class after class, one of the same model's.
    Returns images (N, 3, size, size) uint8; the global class asked for of each (N,) int64, N = C * per_class; and with
    guidance which of them `log_probability` gives that class at t = 0 (N,) bool, else None.
    """
    if wanted is None:
        wanted = torch.arange(sum(plan.classes)).repeat_interleave(plan.per_class)
    own = [part.to(device) for part in wanted.split([count * plan.per_class for count in plan.classes])]
    batches = {
        f"model{m:03d}-images{start:06d}-{min(start + plan.batch, len(asked)):06d}": (m, start)
        for m, asked in enumerate(own)
        for start in range(0, len(asked), plan.batch)
    }
    guided = log_probability is not None
    pieces = Pieces(plan.folder and plan.folder / ("guided" if guided else "unguided"))
    mine = [(m, list(names)) for m, names in groupby(pieces.mine(list(batches)), key=lambda name: batches[name][0])]
    models, room = pool.each(device, plan.precision, [m for m, _ in mine]), plan.batch
    with tqdm(total=sum(len(names) for _, names in mine), desc="synthesis", unit="batch", leave=False) as bar:
        for (m, names), model in zip(mine, models, strict=True):
            for name in names:
                start = batches[name][1]
                asked = own[m][start : start + plan.batch]
                drawn, parts = partial(_draw, model, m, plan, asked, start, log_probability), []
                for index, images in in_batches(drawn, len(asked), room):
                    parts.append({"images": to_uint8(_resized(images, plan.size)).cpu()})
                    if guided:
                        with torch.no_grad():
                            guess = log_probability(images, torch.zeros(len(images), device=device)).argmax(1)
                        parts[-1]["hits"] = (guess == asked[index]).cpu()
                if len(parts) > 1:  # memory was short, and will be again
                    room = len(parts[0]["images"])
                pieces.keep(name, {key: torch.cat([part[key] for part in parts]) for key in parts[0]})
                bar.update()
    parts = pieces.collect(list(batches))
    hits = torch.cat([part["hits"] for part in parts]) if guided else None
    return torch.cat([part["images"] for part in parts]), wanted, hits


def _draw(
    model: PoolModel, m: int, plan: Synthesis, asked: Tensor, start: int, log_probability: LogProbability | None,
    index: Tensor,
) -> Tensor:  # fmt: skip
    """Images number `start + index` of model m, asked for classes `asked[index]`, at the model's size.

    Returns float (N, 3, H, W) in [-1, 1]. Raises ValueError where they are not finite.
    """
    size, wanted = model.image_size, asked[index]
    x_t = noise((3, size, size), (start + index).tolist(), plan.seed, "synthesis", plan.stream, m).to(wanted.device)
    cond_fn = classifier_guidance(log_probability, wanted, plan.scale) if log_probability is not None else None
    images = sample(
        model.network,
        model.diffusion(f"ddim{plan.steps}"),
        x_t,
        cond_fn=cond_fn,
        guide_on=plan.guide_on,
        local_labels=wanted - plan.first_class(m) if model.class_cond else None,
        sampler=plan.sampler,
    )
    if not bool(torch.isfinite(images).all()):
        raise ValueError(f"{model.path}: drew images that are not finite; try --precision float32, or a lower scale")
    return images


def _resized(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
