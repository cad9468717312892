"""Guides for sampling: log p(c | x_t, t) from the class-learner h, or log p(c | x) from g on augmented views."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.class_learner import ClassLearner, InductiveBatchNorm, unit_means
from models.meta_model import MetaModel
from utils.images import to_float

LogProbability = Callable[[Tensor, Tensor], Tensor]


def class_learner_guide(model: MetaModel, learner: ClassLearner) -> LogProbability:
    """Return log p(c | x_t, t) = log softmax h(f(x_t), t), as a function (x (N, 3, H, W), t (N,)) -> (N, C).

    Put both networks in eval mode, so that an image's row depends on no other image of the batch.
    """
    model.eval()
    learner.eval()

    def guide(x: Tensor, t: Tensor) -> Tensor:
        return F.log_softmax(learner(unit_means(model.maps(x)), t), dim=1)

    return guide


def views_guide(model: MetaModel, view: Callable[[Tensor, Tensor], Tensor], views: int) -> LogProbability:
    """Return log p(c | x), the mean of log softmax g(f(v(x))) over views v, as (x (N, 3, H, W), t (N,)) -> (N, C).

    With a single view, guidance paints marks that only this classifier sees; averaging over views prevents that. Puts
    the model in eval mode.

    view: (images, number (1,) int64) -> the images, all augmented the same way; each number is another way. View i at
    t has number views * t + i. The first t picks the views, as all images of a sampling batch share one t. The number
    stays on the device, since reading it would make every step wait for the GPU.
    """
    model.eval()

    def guide(x: Tensor, t: Tensor) -> Tensor:
        first = views * t[:1].long()
        seen = [F.log_softmax(model.classify(view(x, first + i)), dim=1) for i in range(views)]
        return torch.stack(seen).mean(0)

    return guide


@torch.no_grad()
def clean_scores(guide: LogProbability, images: Tensor, device: torch.device) -> Tensor:
    """Return log p(c | x, t = 0) (N, C), on the CPU, of clean images (N, 3, H, W) uint8."""
    parts = (to_float(part.to(device)) for part in images.split(500))
    return torch.cat([guide(part, torch.zeros(len(part), device=device)).cpu() for part in parts])


@torch.no_grad()
def calibrate(model: MetaModel, learner: ClassLearner, images: Tensor) -> None:
    """Set the running statistics of untrained networks to those of images (N, 3, H, W) uint8.

    Without them an untrained network in eval mode does not normalise: its outputs hardly differ between images, and its
    gradient steers nothing. Published code normalises by the batch, which makes an image depend on the rest of it.
    """
    device = next(model.parameters()).device
    clean = to_float(images).to(device)
    t = torch.zeros(len(clean), device=device)  # one t, as in guidance: with many, e(t) would drown the images
    model.eval()
    learner.eval()
    layers = [layer for network in (model, learner) for layer in network.modules()]
    batch_norms = {layer: layer.momentum for layer in layers if isinstance(layer, nn.BatchNorm2d)}
    for layer in batch_norms:
        layer.reset_running_stats()
        layer.momentum = None  # the statistics of the only batch, not a tenth of them
    for layer in layers:
        layer.train(isinstance(layer, nn.BatchNorm2d | InductiveBatchNorm))
    maps = model.maps(clean)
    model.base_logits(maps)
    learner(unit_means(maps), t)
    for layer, momentum in batch_norms.items():
        layer.momentum = momentum
