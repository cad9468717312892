"""Draw the images of a round from every pool model, guided or not."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from guided_diffusion.costs import peak_bytes
from guided_diffusion.guidance import LogProbability, classifier_guidance, sample
from guided_diffusion.pool import Pool, PoolModel
from guided_diffusion.pool_work import work_through
from utils.images import resized, to_uint8
from utils.pieces import Pieces
from utils.seeding import noise


@dataclass(frozen=True)
class Synthesis:
    """How to draw a round's images.

    Attributes:
        classes: number of pseudo classes of each pool model, in order; each class belongs to one model in all rounds.
        per_class: images per class.
        steps: DDIM steps.
        size: side of the images in pixels; images drawn at another size are resized.
        seed, stream: the noise of image i of a model depends only on these, the model and i, so that an image does not
            change with the batch.
        batch: images per batch.
        scale: s in s * grad log p(c | x_t, t).
        guide_on, renoise: as for `guidance.sample`.
        precision: number format of the diffusion models: auto, float32 or bf16.
        folder: folder of finished batches, from which a stopped run resumes; the caller deletes it. None keeps them in
            memory, where each process makes all of them.
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
    renoise: float = 0.0
    precision: str = "auto"
    folder: Path | None = None

    def first_class(self, m: int) -> int:
        """Return the first pseudo class of pool model m (from 0)."""
        return sum(self.classes[:m])

    def first_of(self, labels: Tensor) -> Tensor:
        """Map pseudo classes (N,) to the first class (N,) of their pool models."""
        return torch.tensor([self.first_class(m) for m, n in enumerate(self.classes) for _ in range(n)])[labels]


def synthesise(
    pool: Pool, plan: Synthesis, device: torch.device, log_probability: LogProbability | None = None,
    asked: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Draw the images of all classes, model by model. Several processes share the batches.

    log_probability: the guide, (x (N, 3, H, W), t (N,)) -> (N, C); None draws unguided images.
    asked: (N,) the class to guide each image towards, one of its model's classes; None: class after class.
    Returns the images (N, 3, size, size) uint8 and the classes asked for (N,) int64, with N = C * per_class. With
    guidance also the hits (N,) bool, whether `log_probability` at t = 0 predicts that class; without, None.
    """
    if asked is None:
        asked = torch.arange(sum(plan.classes)).repeat_interleave(plan.per_class)
    by_model = asked.split([count * plan.per_class for count in plan.classes])
    guided = log_probability is not None
    drawn = work_through(
        pool,
        [len(part) for part in by_model],
        partial(_draw, plan, by_model, device, log_probability),
        Pieces(plan.folder and plan.folder / ("guided" if guided else "unguided")),
        batch=plan.batch,
        device=device,
        precision=plan.precision,
        desc="synthesis",
        other=_guide_bytes(log_probability, plan.size) if guided and device.type == "cpu" else 0,
    )
    return drawn["images"], asked, drawn.get("hits")


def _guide_bytes(log_probability: LogProbability, size: int) -> int:
    """Return the peak bytes per image of the guide's gradient, on the CPU."""

    def once(images: int) -> None:
        zeros = torch.zeros(images, dtype=torch.int64)
        classifier_guidance(log_probability, zeros, 1.0)(torch.zeros(images, 3, size, size), zeros)

    return peak_bytes(once, 1)


def _draw(
    plan: Synthesis, by_model: Sequence[Tensor], device: torch.device, log_probability: LogProbability | None,
    model: PoolModel, m: int, index: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """Draw the images numbered `index` of model m, for classes by_model[m][index].

    Returns `images` uint8, and with guidance `hits`. Raises ValueError if the images are not finite.
    """
    size, asked = model.image_size, by_model[m][index].to(device)
    rows = index.tolist()

    def noise_of_step(*step: int) -> Tensor:
        return noise((3, size, size), rows, plan.seed, "synthesis", plan.stream, m, *step).to(device, non_blocking=True)

    def guide(x: Tensor, t: Tensor) -> Tensor:  # it learns from images of the plan's size
        return log_probability(resized(x, plan.size), t)

    images = sample(
        model.network,
        model.diffusion(f"ddim{plan.steps}"),
        noise_of_step(),
        cond_fn=classifier_guidance(guide, asked, plan.scale) if log_probability is not None else None,
        guide_on=plan.guide_on,
        local_labels=asked - plan.first_class(m) if model.class_cond else None,
        renoise=plan.renoise,
        fresh=noise_of_step,
    )
    if not bool(torch.isfinite(images).all()):
        raise ValueError(f"{model.path}: drew images that are not finite; give --precision float32, or a lower scale")
    drawn = {"images": to_uint8(resized(images, plan.size)).cpu()}
    if log_probability is not None:
        with torch.no_grad():
            guess = guide(images, torch.zeros(len(images), device=images.device)).argmax(1)
        drawn["hits"] = (guess == asked).cpu()
    return drawn
