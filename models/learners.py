"""What the two learners do: their losses, an epoch of each, and p(c | x_t, t) for guidance."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.class_learner import ClassLearner
from models.meta_model import MetaModel, dense_cross_entropy, prototype_scores
from utils import stopping
from utils.images import to_float
from utils.metrics import accuracy, mean_confidence_interval
from utils.progress import progress

LEVEL_POWER = {"x_t": 1.0, "x_0": 3.0}  # what guides on x_0 is asked about clean images only: low noise counts more


@dataclass(frozen=True)
class Grouping:
    """Classes in groups, those of a pool model each, and how much they count there.

    Which model drew an image is known; which of its classes it shows is guessed. The cross-entropy of class c of group
    m is -log p(m) - log p(c | m); `within` is the weight of the second term, 0 to 1.
    group: (C,) int64, the group of each class, from 0 on; member: (M, C) bool, which classes are of each group.
    """

    group: Tensor
    member: Tensor
    within: float

    @classmethod
    def of(cls, sizes: Sequence[int], within: float, device: torch.device) -> "Grouping":
        """Groups of `sizes` classes, one after the other."""
        groups = torch.arange(len(sizes), device=device)
        group = groups.repeat_interleave(torch.tensor(sizes, device=device))
        return cls(group, group == groups[:, None], within)

    def log_shares(self, logits: Tensor) -> Tensor:
        """log p(m) (N, M), the log of the summed softmax of each group, of logits (N, C)."""
        return F.log_softmax(logits, dim=1)[:, None].masked_fill(~self.member, -torch.inf).logsumexp(2)


def meta_loss(
    model: MetaModel, images: Tensor, support_labels: Tensor, query_labels: Tensor, query_classes: Tensor,
    *, way: int, dense_weight: float, grouping: Grouping | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cross-entropy of g(f(query)) over the C classes + dense_weight * dense prototype cross-entropy.

    images: (E, S + Q, 3, H, W), support first; support_labels (E, S) and query_labels (E, Q) in [0, way);
    query_classes: (E, Q) in [0, C). grouping: how much a class counts within its group; None: fully.
    Returns the loss () and the share of queries that g gets right ().
    """
    shots = support_labels.shape[1]
    if dense_weight:
        logits, scores = model(images[:, :shots], support_labels, images[:, shots:], way)
    else:  # the support is there for the batch statistics alone
        features = model.embed(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        logits = model.classifier(features[:, shots:].flatten(0, 1))
    classes = query_classes.flatten()
    loss = F.cross_entropy(logits, classes)
    if grouping is not None and grouping.within < 1:
        of_group = F.nll_loss(grouping.log_shares(logits), grouping.group[classes])
        loss = grouping.within * loss + (1 - grouping.within) * of_group
    if dense_weight:
        loss = loss + dense_weight * dense_cross_entropy(scores, query_labels)
    return loss, (logits.detach().argmax(1) == classes).float().mean()


def class_learner_loss(
    model: MetaModel, learner: ClassLearner, clean: Tensor, noised: Tensor, t: Tensor, classes: Tensor,
    *, kl_weight: float, grouping: Grouping | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cross-entropy of h(f(x_t), t) with c + kl_weight * KL(softmax g(f(x_0)) || softmax h(f(x_t), t)).

    clean, noised: (N, 3, H, W) in [-1, 1] and at noise level t (N,); classes: (N,). f and g are frozen: `model` must
    be in eval mode. grouping: the KL counts as much within a group as g was taught there; h is taught fully, it steers.
    Returns the loss () and which images h gets right (N,) bool.
    """
    with torch.no_grad():
        features = model.embed(torch.cat([clean, noised]))
        taught = model.classifier(features[: len(clean)])
    logits = learner(features[len(clean) :], t)
    loss = F.cross_entropy(logits, classes)
    if kl_weight:
        divergence = _kl(F.log_softmax(taught, dim=1), F.log_softmax(logits, dim=1))
        if grouping is not None and grouping.within < 1:
            of_group = _kl(grouping.log_shares(taught), grouping.log_shares(logits))
            divergence = grouping.within * divergence + (1 - grouping.within) * of_group
        loss = loss + kl_weight * divergence
    return loss, logits.detach().argmax(1) == classes


def log_probability(model: MetaModel, learner: ClassLearner) -> Callable[[Tensor, Tensor], Tensor]:
    """log p(c | x_t, t) = log softmax h(f(x_t), t), a function (x (N, 3, H, W), t (N,)) -> (N, C) for guidance.

    Both networks are put into eval mode: an image's row then depends on no other image of the batch.
    """
    model.eval()
    learner.eval()

    def function(x: Tensor, t: Tensor) -> Tensor:
        return F.log_softmax(learner(model.embed(x), t), dim=1)

    return function


@torch.no_grad()
def features(model: MetaModel, images: Tensor, maps: bool = False) -> Tensor:
    """Pooled features (N, D) of images (N, 3, H, W) uint8, or their flattened maps, in eval mode, on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    look = (lambda x: model.base(x).flatten(1)) if maps else model.pooled
    return torch.cat([look(to_float(part.to(device))).cpu() for part in images.split(500)])


def validate(model: MetaModel, images: Tensor, episodes, way: int, scale: float) -> tuple[float, float]:
    """Accuracy in percent of nearest prototypes, and its 95 % half-width, the features computed once.

    images: (N, 3, H, W) uint8; episodes: indices into them, as for `train_meta_model`; scale: of the cosines.
    """
    known = features(model, images)
    scores = prototype_scores(known[episodes.support], episodes.support_labels, known[episodes.query], way, scale)
    return mean_confidence_interval(accuracy(scores, episodes.query_labels))


@torch.no_grad()
def clean_scores(log_probability: Callable[[Tensor, Tensor], Tensor], images: Tensor, device: torch.device) -> Tensor:
    """log p(c | x, t = 0) (N, C) of clean images (N, 3, H, W) uint8, on the CPU."""
    parts = (to_float(part.to(device)) for part in images.split(500))
    return torch.cat([log_probability(part, torch.zeros(len(part), device=device)).cpu() for part in parts])


@torch.no_grad()
def calibrate(model: MetaModel, learner: ClassLearner, images: Tensor) -> None:
    """Give networks that were never trained the running statistics of images (N, 3, H, W) uint8.

    Without, a random network in eval mode is normalised by nothing: its outputs hardly vary from image to image, and
    neither does a gradient of theirs steer. Published code normalises by the batch, which tells on its other images.
    """
    device = next(model.parameters()).device
    clean = to_float(images).to(device)
    t = torch.zeros(len(clean), device=device)  # one t, as in guidance: e(t) of many would drown the images
    model.train()
    learner.train()
    for _ in range(10):
        features = model.embed(clean)
        model.classifier(features)
        learner(features, t)


def train_meta_model(
    model: MetaModel,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    episodes,
    *,
    batch: int,
    dense_weight: float,
    grouping: Grouping | None = None,
    augment: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """One epoch of the meta-model.

    images: (N, 3, H, W) uint8 and labels (N,) of the pseudo dataset; episodes: indices into it, as tensors support
    (E, S), query (E, Q), support_labels, query_labels, and classes (E, way).
    batch: episodes a step; augment: uint8 images -> float images in [-1, 1] on the model's device;
    Returns the mean `loss` and the `base_accuracy` of g in percent.
    """
    model.train()
    device, way = next(model.parameters()).device, episodes.classes.shape[1]
    index = torch.cat([episodes.support, episodes.query], 1).to(images.device)  # (E, S + Q)
    support_labels, query_labels = episodes.support_labels.to(device), episodes.query_labels.to(device)
    classes = labels[episodes.query].to(device)
    seen = []
    for start in progress(range(0, len(index), batch), desc="meta-model", unit="step"):
        stopping.check()
        chosen = slice(start, start + batch)
        loss, right = meta_loss(
            model,
            augment(images[index[chosen].flatten()]).unflatten(0, index[chosen].shape),
            support_labels[chosen],
            query_labels[chosen],
            classes[chosen],
            way=way,
            dense_weight=dense_weight,
            grouping=grouping,
        )
        _step(optimizer, loss)
        seen.append(torch.stack([loss.detach(), right]))
    loss, right = torch.stack(seen).mean(0).tolist()
    return {"loss": loss, "base_accuracy": 100 * right}


def train_class_learner(
    model: MetaModel,
    learner: ClassLearner,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    batch: int,
    levels: int,
    level_power: float = 1.0,
    kl_weight: float,
    grouping: Grouping | None = None,
    augment: Callable[[Tensor], Tensor],
    add_noise: Callable[[Tensor, Tensor], Tensor],
    rng: torch.Generator,
) -> dict[str, object]:
    """One epoch of the class-learner on noised images, t = levels * u^level_power with u uniform in [0, 1).

    level_power 1 is the paper's uniform t; a higher one favours low noise, for guidance that looks at x_0.
    images, labels, augment: as for `train_meta_model`; steps of `batch` images; add_noise: (x_0, t) -> x_t.
    Returns the mean `class_learner_loss`, and `class_learner_accuracy` in percent in each quarter of the noise levels.
    """
    model.eval()
    learner.train()
    losses, right, quarter = [], [], []
    labels = labels.to(rng.device)
    for _ in progress(range(steps), desc="class-learner", unit="step"):
        stopping.check()
        index = torch.randint(len(images), (batch,), generator=rng, device=rng.device)
        clean = augment(images[index.to(images.device)])
        t = (levels * torch.rand(batch, generator=rng, device=rng.device) ** level_power).long().clamp_max(levels - 1)
        loss, hit = class_learner_loss(
            model, learner, clean, add_noise(clean, t), t, labels[index], kl_weight=kl_weight,
            grouping=grouping,
        )  # fmt: skip
        _step(optimizer, loss)
        losses.append(loss.detach())
        right.append(hit)
        quarter.append(4 * t // levels)
    hits, quarters = torch.cat(right).float().cpu(), torch.cat(quarter).cpu()
    by_level = [100 * float(hits[quarters == q].mean()) for q in range(4)]
    return {"class_learner_loss": float(torch.stack(losses).mean()), "class_learner_accuracy": by_level}


def make_optimizer(name: str, module: torch.nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """The optimiser of a learner, "sgd" (Nesterov momentum 0.9) or "adamw"; each epoch sets its rate."""
    if name == "adamw":
        return torch.optim.AdamW(module.parameters(), weight_decay=weight_decay)
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=weight_decay)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all parameters of an optimiser the learning rate `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def learning_rate_factor(progress: float) -> float:
    """The published steps at epochs 60, 70 and 80 of 90, for any number of epochs; progress in [0, 1)."""
    return next((factor for start, factor in ((80, 0.0024), (70, 0.012), (60, 0.06)) if progress >= start / 90), 1.0)


def check_finite(entries: Mapping[str, object], epoch: int) -> None:
    """Stop before the numbers of a diverged epoch overwrite good ones.

    entries: of epoch number `epoch` (from 0), with the mean `loss`, perhaps `class_learner_loss`, and the rate `lr`.
    Raises ValueError where a loss is NaN or infinite.
    """
    for name in ("loss", "class_learner_loss"):
        loss = entries.get(name, 0.0)
        if not math.isfinite(loss):
            raise ValueError(
                f"got {name} {loss} in epoch {epoch + 1} at rate {entries['lr']}; "
                "lower --lr; what was saved before is whole"
            )


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats, averaged over rows, of log-probabilities (N, K)."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
