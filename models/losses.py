"""The losses of the meta-model (f and g), one per recipe, and of the paper's class-learner h."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.class_learner import ClassLearner, unit_means
from models.meta_model import MetaModel


def class_loss(model: MetaModel, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of the clusters recipe: the cross-entropy of g(f(image)) over the C classes.

    images: (N, 3, H, W) float in [-1, 1]; classes: (N,) int64 in [0, C).
    Returns the loss () in nats, and the accuracy of g (), 0 to 1.
    """
    logits = model.classify(images)
    return F.cross_entropy(logits, classes), (logits.detach().argmax(1) == classes).float().mean()


def meta_loss(
    model: MetaModel, images: Tensor, support_labels: Tensor, query_labels: Tensor, query_classes: Tensor,
    *, way: int, dense_weight: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the paper's loss: cross-entropy of g(f(query)) over C classes + dense_weight * `dense_cross_entropy`.

    Args:
        images: (E, S + Q, 3, H, W) float in [-1, 1], the support set first.
        support_labels: (E, S) int64 in [0, way).
        query_labels: (E, Q) int64 in [0, way).
        query_classes: (E, Q) int64 in [0, C).
        way: classes per episode.
        dense_weight: factor of the second term.

    Returns:
        The loss () in nats, and the accuracy of g on the queries (), 0 to 1.
    """
    shots = support_labels.shape[1]
    logits, scores = model(images[:, :shots], support_labels, images[:, shots:], way)
    classes = query_classes.flatten()
    loss = F.cross_entropy(logits, classes) + dense_weight * dense_cross_entropy(scores, query_labels)
    return loss, (logits.detach().argmax(1) == classes).float().mean()


def dense_cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each location's scores with its image's label, averaged over locations and images.

    Args:
        scores: (N, way, H, W) float.
        labels: (N,) or (E, Q) with E * Q = N, int64 in [0, way).

    Returns:
        () float, in nats (Hou et al. 2019, arXiv 1910.07677).

    Raises:
        ValueError: wrong shapes.
    """
    if scores.ndim != 4 or labels.numel() != len(scores):
        got = f"{tuple(scores.shape)} with {labels.numel()} labels"
        raise ValueError(f"dense scores are {got}, expected (N, way, H, W) with N labels: give each query a label")
    return F.cross_entropy(scores, labels.reshape(-1, 1, 1).expand(-1, *scores.shape[2:]))


def class_learner_loss(
    model: MetaModel, learner: ClassLearner, clean: Tensor, noised: Tensor, t: Tensor, classes: Tensor,
    *, kl_weight: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return cross-entropy of h(f(x_t), t) with c + kl_weight * KL(softmax g(f(x_0)) || softmax h(f(x_t), t)).

    f and g are frozen: `model` must be in eval mode. h sees pooled features of unit length, even if the meta-model uses
    whole maps.

    Args:
        clean: (N, 3, H, W) float in [-1, 1], x_0.
        noised: (N, 3, H, W) float, x_t.
        t: (N,) int64, timesteps.
        classes: (N,) int64 in [0, C).
        kl_weight: factor of the second term.

    Returns:
        The loss () in nats, and which images h gets right (N,) bool.
    """
    with torch.no_grad():
        maps = model.maps(torch.cat([clean, noised]))
        taught = model.base_logits(maps[: len(clean)])
        seen = unit_means(maps[len(clean) :])
    logits = learner(seen, t)
    loss = F.cross_entropy(logits, classes)
    if kl_weight:
        log_g, log_h = F.log_softmax(taught, dim=1), F.log_softmax(logits, dim=1)
        loss = loss + kl_weight * F.kl_div(log_h, log_g, reduction="batchmean", log_target=True)  # KL(g || h)
    return loss, logits.detach().argmax(1) == classes
