"""Drawing the images of a round from every model of the pool, guided or not."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from guided_diffusion.dist_util import in_batches
from guided_diffusion.guidance import LogProbability, classifier_guidance, sample
from guided_diffusion.pool import Pool, PoolModel
from utils.images import to_uint8
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
    """Draw the images of all classes, model by model.

    log_probability: (x (N, 3, H, W), t (N,)) -> (N, C), to guide by; None draws without guidance.
    wanted: (N,) the class to ask for in place of class after class, one of the same model's.
    Returns images (N, 3, size, size) uint8; the global class asked for of each (N,) int64, N = C * per_class; and with
    guidance which of them `log_probability` gives that class at t = 0 (N,) bool, else None.
    """
    if wanted is None:
        wanted = torch.arange(sum(plan.classes)).repeat_interleave(plan.per_class)
    images, hits = [], []
    with tqdm(total=len(wanted), desc="synthesis", unit="image", leave=False) as bar:
        for m, model in enumerate(pool.each(device, plan.precision)):
            first = plan.first_class(m)
            own = wanted[first * plan.per_class :][: plan.classes[m] * plan.per_class].to(device)
            draw = partial(_draw, model, m, plan, own, log_probability)
            for index, drawn in in_batches(draw, len(own), plan.batch):
                if log_probability is not None:
                    with torch.no_grad():
                        guess = log_probability(drawn, torch.zeros(len(drawn), device=device)).argmax(1)
                    hits.append((guess == own[index]).cpu())
                images.append(to_uint8(_resized(drawn, plan.size)).cpu())
                bar.update(len(index))
    return torch.cat(images), wanted, torch.cat(hits) if hits else None


def _draw(
    model: PoolModel, m: int, plan: Synthesis, own: Tensor, log_probability: LogProbability | None, index: Tensor
) -> Tensor:
    """Images number `index` of model m, whose classes asked for are `own`: float (N, 3, H, W) in [-1, 1], its size."""
    size, wanted = model.image_size, own[index]
    x_t = noise((3, size, size), index.tolist(), plan.seed, "synthesis", plan.stream, m).to(wanted.device)
    cond_fn = classifier_guidance(log_probability, wanted, plan.scale) if log_probability is not None else None
    return sample(
        model.network,
        model.diffusion(f"ddim{plan.steps}"),
        x_t,
        cond_fn=cond_fn,
        guide_on=plan.guide_on,
        local_labels=wanted - plan.first_class(m) if model.class_cond else None,
        sampler=plan.sampler,
    )


def _resized(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
