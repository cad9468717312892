"""What guides the pool: log p(c | x_t, t) by the class-learner h, or log p(c | x) by g through augmented views."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.class_learner import ClassLearner, unit_means
from models.meta_model import MetaModel
from utils.images import to_float

LogProbability = Callable[[Tensor, Tensor], Tensor]


def log_probability(model: MetaModel, learner: ClassLearner) -> LogProbability:
    """Return log p(c | x_t, t) = log softmax h(f(x_t), t), a function (x (N, 3, H, W), t (N,)) -> (N, C).

    Both networks are put into eval mode: an image's row then depends on no other image of the batch.
    """
    model.eval()
    learner.eval()

    def function(x: Tensor, t: Tensor) -> Tensor:
        return F.log_softmax(learner(unit_means(model.maps(x)), t), dim=1)

    return function


def log_probability_of_views(model: MetaModel, view: Callable[[Tensor, Tensor], Tensor], views: int) -> LogProbability:
    """Return log p(c | x), the mean of log softmax g(f(v(x))) over views v: (x (N, 3, H, W), t (N,)) -> (N, C).

    Guided by one look at an image, sampling draws marks that only this classifier sees; averaged over views, it does
    not.

    view: (images, number (1,) int64) -> the images changed at random, all in one way, another for each number. View i
    at t is number views * t + i; the first t, which all images of a batch share in sampling, picks them. It stays on
    the device: to read it, every step would wait for a GPU. The model is put into eval mode.
    """
    model.eval()

    def function(x: Tensor, t: Tensor) -> Tensor:
        first = views * t[:1].long()
        seen = [F.log_softmax(model.classify(view(x, first + i)), dim=1) for i in range(views)]
        return torch.stack(seen).mean(0)

    return function


@torch.no_grad()
def clean_scores(guide: LogProbability, images: Tensor, device: torch.device) -> Tensor:
    """Return log p(c | x, t = 0) (N, C), on the CPU, of clean images (N, 3, H, W) uint8."""
    parts = (to_float(part.to(device)) for part in images.split(500))
    return torch.cat([guide(part, torch.zeros(len(part), device=device)).cpu() for part in parts])


@torch.no_grad()
def calibrate(model: MetaModel, learner: ClassLearner, images: Tensor) -> None:
    """Give networks that were never trained the running statistics of images (N, 3, H, W) uint8.

    Without them a random network in eval mode is not normalised: its outputs hardly differ between images, and its
    gradient steers nothing. Published code normalises by the batch, where an image depends on the others.
    """
    device = next(model.parameters()).device
    clean = to_float(images).to(device)
    t = torch.zeros(len(clean), device=device)  # one t, as in guidance: e(t) of many would drown the images
    model.train()
    learner.train()
    for _ in range(10):
        maps = model.maps(clean)
        model.base_logits(maps)
        learner(unit_means(maps), t)
