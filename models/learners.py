"""What the two learners do: their losses, an epoch of each, and p(c | x_t, t) for guidance."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.class_learner import ClassLearner
from models.meta_model import MetaModel, dense_cross_entropy, prototype_scores
from utils import stopping
from utils.images import to_float
from utils.metrics import accuracy, mean_confidence_interval
from utils.progress import progress


def meta_loss(
    model: MetaModel, images: Tensor, support_labels: Tensor, query_labels: Tensor, query_classes: Tensor,
    *, way: int, dense_weight: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cross-entropy of g(f(query)) over the C classes + dense_weight * dense prototype cross-entropy.

    images: (E, S + Q, 3, H, W), support first; support_labels (E, S) and query_labels (E, Q) in [0, way);
    query_classes: (E, Q) in [0, C).
    Returns the loss () and the share of queries that g gets right ().
    """
    shots = support_labels.shape[1]
    logits, scores = model(images[:, :shots], support_labels, images[:, shots:], way)
    classes = query_classes.flatten()
    loss = F.cross_entropy(logits, classes) + dense_weight * dense_cross_entropy(scores, query_labels)
    return loss, (logits.detach().argmax(1) == classes).float().mean()


def class_learner_loss(
    model: MetaModel, learner: ClassLearner, clean: Tensor, noised: Tensor, t: Tensor, classes: Tensor,
    *, kl_weight: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cross-entropy of h(f(x_t), t) with c + kl_weight * KL(softmax g(f(x_0)) || softmax h(f(x_t), t)).

    clean, noised: (N, 3, H, W) in [-1, 1] and at noise level t (N,); classes: (N,). f and g are frozen: `model` must
    be in eval mode. h sees pooled features of unit length, whatever those of the meta-model are.
    Returns the loss () and which images h gets right (N,) bool.
    """
    with torch.no_grad():
        maps = model.maps(torch.cat([clean, noised]))
        taught = model.base_logits(maps[: len(clean)])
        seen = _pooled(maps[len(clean) :])
    logits = learner(seen, t)
    loss = F.cross_entropy(logits, classes)
    if kl_weight:
        loss = loss + kl_weight * _kl(F.log_softmax(taught, dim=1), F.log_softmax(logits, dim=1))
    return loss, logits.detach().argmax(1) == classes


def _pooled(maps: Tensor) -> Tensor:
    """Return the features of unit length (N, channels) of maps, averaged over locations."""
    return F.normalize(maps.mean((-2, -1)), dim=-1)


def log_probability(model: MetaModel, learner: ClassLearner) -> Callable[[Tensor, Tensor], Tensor]:
    """Return log p(c | x_t, t) = log softmax h(f(x_t), t), a function (x (N, 3, H, W), t (N,)) -> (N, C).

    Both networks are put into eval mode: an image's row then depends on no other image of the batch.
    """
    model.eval()
    learner.eval()

    def function(x: Tensor, t: Tensor) -> Tensor:
        return F.log_softmax(learner(_pooled(model.maps(x)), t), dim=1)

    return function


def log_probability_of_views(
    model: MetaModel, view: Callable[[Tensor, int], Tensor], views: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return log p(c | x), the mean of log softmax g(f(v(x))) over views v: (x (N, 3, H, W), t (N,)) -> (N, C).

    A classifier that looks at one image alone paints marks on it that only itself can see; views take them away.
    view: (images, number) -> the images changed at random, all of them alike, differently for each number. The views
    change with t. The model is put into eval mode.
    """
    model.eval()

    def function(x: Tensor, t: Tensor) -> Tensor:
        first = views * int(t[0]) if len(t) else 0
        seen = [F.log_softmax(model.classify(view(x, first + i)), dim=1) for i in range(views)]
        return torch.stack(seen).mean(0)

    return function


@torch.no_grad()
def features(model: MetaModel, images: Tensor) -> Tensor:
    """Return the features (N, D), before normalisation, of images (N, 3, H, W) uint8, in eval mode, on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    return torch.cat([model.look(to_float(part.to(device))).cpu() for part in images.split(500)])


def validate(model: MetaModel, images: Tensor, episodes, way: int, scale: float) -> tuple[float, float]:
    """Accuracy in percent of nearest prototypes, and its 95 % half-width, the features computed once.

    images: (N, 3, H, W) uint8; episodes: indices into them, as for `train_meta_model`; scale: of the cosines.
    """
    known = features(model, images)
    scores = prototype_scores(known[episodes.support], episodes.support_labels, known[episodes.query], way, scale)
    return mean_confidence_interval(accuracy(scores, episodes.query_labels))


@torch.no_grad()
def clean_scores(log_probability: Callable[[Tensor, Tensor], Tensor], images: Tensor, device: torch.device) -> Tensor:
    """Return log p(c | x, t = 0) (N, C) of clean images (N, 3, H, W) uint8, on the CPU."""
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
        maps = model.maps(clean)
        model.base_logits(maps)
        learner(_pooled(maps), t)


def train_meta_model(
    model: MetaModel,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    episodes,
    *,
    batch: int,
    dense_weight: float,
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
        )
        _step(optimizer, loss)
        seen.append(torch.stack([loss.detach(), right]))
    loss, right = torch.stack(seen).mean(0).tolist()
    return {"loss": loss, "base_accuracy": 100 * right}


def train_classifier(
    model: MetaModel, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor,
    *, rates: Sequence[float], batch: int, augment: Callable[[Tensor], Tensor], rng: torch.Generator,
) -> dict[str, float]:  # fmt: skip
    """Train f and g for a step of `batch` images at each of the rates, by the cross-entropy of g over the C classes.

    images, labels, augment: as for `train_meta_model`.
    Returns the mean `loss` and the `base_accuracy` of g in percent.
    """
    model.train()
    labels, seen = labels.to(rng.device), []
    for rate in progress(rates, desc="meta-model", unit="step"):
        stopping.check()
        set_rate(optimizer, rate)
        index = torch.randint(len(images), (batch,), generator=rng, device=rng.device)
        logits, classes = model.classify(augment(images[index.to(images.device)])), labels[index]
        loss = F.cross_entropy(logits, classes)
        _step(optimizer, loss)
        seen.append(torch.stack([loss.detach(), (logits.detach().argmax(1) == classes).float().mean()]))
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
    kl_weight: float,
    augment: Callable[[Tensor], Tensor],
    add_noise: Callable[[Tensor, Tensor], Tensor],
    rng: torch.Generator,
) -> dict[str, object]:
    """One epoch of the class-learner on noised images, t uniform below `levels`.

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
        t = (levels * torch.rand(batch, generator=rng, device=rng.device)).long().clamp_max(levels - 1)
        loss, hit = class_learner_loss(
            model, learner, clean, add_noise(clean, t), t, labels[index], kl_weight=kl_weight
        )
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
