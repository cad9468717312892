"""The networks of a run and how they train for an epoch, in the paper's recipe and in the clusters recipe."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import Settings
from datasets.augment import AugmentSettings, augment, augment_by, draw
from datasets.episodes import Episodes, EpisodeSampler
from datasets.pseudo import PseudoDataset
from models import guides
from models.class_learner import ClassLearner, load_statistics, statistics
from models.losses import class_learner_loss, class_loss, meta_loss
from models.meta_model import MetaModel, prototype_scores
from utils import checkpoint, stopping
from utils.images import to_float
from utils.metrics import accuracy, mean_confidence_interval
from utils.progress import progress
from utils.seeding import generator

AT_ONCE = 2**26  # numbers of the features of episodes that are scored at once in validation: 256 MiB
LEVELS = 1000  # timesteps; a guide gets t from 0 to 999
VIEW = AugmentSettings(flip=False, scale=(0.75, 1.0), rotate=8, aspect=1.2, erase=0.0)  # of guidance


class Learners:
    """What both recipes share: f and g, their optimiser, saving and loading.

    Attributes:
        model: f and g, with random weights that depend on the seed alone.
        networks: the trained networks, by their names in a checkpoint.
        optimizers: one per network, in the same order.
    """

    changes = AugmentSettings()  # augmentation of training images
    guide_on = "x_t"  # the image that the guide sees: "x_t", noised, or "x_0", the clean image predicted from it

    def __init__(self, settings: Settings, num_classes: int, image_size: int, device: torch.device):
        """num_classes: C; image_size: side in pixels."""
        s = self.s = settings
        self.device = device
        self.rng = generator(s.seed, "weights")
        model = MetaModel(
            num_classes, s.scale_cls, s.backbone, features=s.features, image_size=image_size, drop_rate=s.drop_rate,
            generator=self.rng,
        )  # fmt: skip
        self.model = model.to(device)
        self.networks: dict[str, torch.nn.Module] = {"model": self.model}
        self.optimizers = [self.optimizer_of(self.model)]

    def optimizer_of(self, network: torch.nn.Module) -> torch.optim.Optimizer:
        """Return the optimiser that --optim names for a network: SGD with Nesterov momentum 0.9, or AdamW."""
        decay = self.s.weight_decay
        if self.s.optim == "adamw":
            return torch.optim.AdamW(network.parameters(), weight_decay=decay)
        return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=decay)

    def train_meta_model(
        self, data: PseudoDataset, rates: Sequence[float], rng: torch.Generator, epoch: int
    ) -> dict[str, Any]:
        """Train f and g for an epoch.

        rates: learning rate of each step; rng: the epoch's generator, on the device; epoch: its number, from 0.
        Returns the mean `loss`, the `base_accuracy` of g in percent, and `lr`, the highest rate.
        """
        raise NotImplementedError

    def train_class_learner(self, data: PseudoDataset, rates: Sequence[float], rng: torch.Generator) -> dict[str, Any]:
        """Train the guide for an epoch. Does nothing here: g is the guide, and `train_meta_model` trains it."""
        return {}

    def guide(self) -> guides.LogProbability:
        """Return the guide: (x (N, 3, H, W), t (N,)) -> log-probabilities (N, C). Puts the networks in eval mode."""
        raise NotImplementedError

    def changed(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Augment training images (N, 3, H, W) uint8; return floats in [-1, 1] on the device."""
        return augment(images.to(self.device, non_blocking=True), rng, replace(self.changes, flip=self.s.flip))

    def state(self) -> dict[str, Any]:
        """Return the weights of all networks, with the statistics that their state dicts leave out."""
        parts = {}
        for name, network in self.networks.items():
            parts |= {name: network.state_dict(), f"{name}_statistics": statistics(network)}
        return parts

    def load(self, state: Mapping[str, Any], path: Path) -> None:
        """Load the weights in `state`, read from `path`. Raises CheckpointError if they do not fit the networks."""
        for name, network in self.networks.items():
            if state.get(name) is None or state.get(f"{name}_statistics") is None:
                raise checkpoint.CheckpointError(f"{path}: has no {name}; give a run of --recipe paper")
            checkpoint.load_state(network, state[name], path)
        for name, network in self.networks.items():
            load_statistics(network, state[f"{name}_statistics"], path)

    def load_optimizers(self, states: list[dict[str, Any]], path: Path) -> None:
        """Restore the optimisers' states, read from `path`. Raises CheckpointError if they do not fit."""
        if len(states) != len(self.optimizers):
            raise checkpoint.CheckpointError(f"{path}: has {len(states)} optimisers, expected {len(self.optimizers)}")
        for optimizer, saved in zip(self.optimizers, states, strict=True):
            checkpoint.load_optimizer(optimizer, saved, path)


class PaperLearners(Learners):
    """The paper's recipe: f and g learn on episodes; the class-learner h learns on noised images and guides on x_t.

    Attributes:
        learner: h.
        process: the diffusion process that noises images for h.
    """

    def __init__(self, settings: Settings, num_classes: int, image_size: int, device: torch.device, process: Any):
        """process: has `num_timesteps` and `q_sample`; the rest as for `Learners`."""
        super().__init__(settings, num_classes, image_size, device)
        self.learner = ClassLearner(num_classes, self.model.channels, generator=self.rng).to(device)
        self.process = process
        self.networks["class_learner"] = self.learner
        self.optimizers.append(self.optimizer_of(self.learner))

    def train_meta_model(
        self, data: PseudoDataset, rates: Sequence[float], rng: torch.Generator, epoch: int
    ) -> dict[str, Any]:
        """Train f and g on --train-batch new episodes per step. Arguments and result as for `Learners`."""
        s, device = self.s, self.device
        sampler = EpisodeSampler(data.labels, s.way, s.shot, s.train_nTestNovel // s.way)
        count = min(s.train_epoch_size, len(rates) * s.train_batch)
        episodes = sampler.sample(count, generator(s.seed, "episodes", epoch))
        index = torch.cat([episodes.support, episodes.query], 1).to(data.images.device)  # (E, S + Q)
        support_labels, query_labels = episodes.support_labels.to(device), episodes.query_labels.to(device)
        classes = data.labels[episodes.query].to(device)
        self.model.train()
        self.model.base.generator = rng  # of DropBlock

        def loss_of(step: int) -> tuple[Tensor, Tensor]:
            chosen = slice(step * s.train_batch, (step + 1) * s.train_batch)
            images = self.changed(data.images[index[chosen].flatten()], rng).unflatten(0, index[chosen].shape)
            return meta_loss(
                self.model, images, support_labels[chosen], query_labels[chosen], classes[chosen],
                way=s.way, dense_weight=s.dense_weight,
            )  # fmt: skip

        loss, right = descend(self.optimizers[0], rates, loss_of, "meta-model").mean(0).tolist()
        return {"loss": loss, "base_accuracy": 100 * right, "lr": max(rates)}

    def train_class_learner(self, data: PseudoDataset, rates: Sequence[float], rng: torch.Generator) -> dict[str, Any]:
        """Train h on noised images, as many as f and g saw, with t uniform, at --learner-rate times their rates.

        Returns the mean `class_learner_loss`, and `class_learner_accuracy` in percent, for each quarter of t.
        """
        s, levels, labels = self.s, self.process.num_timesteps, data.labels.to(self.device)
        batch = s.train_batch * (s.way * s.shot + s.train_nTestNovel)
        hits, quarters = [], []
        self.model.eval()
        self.learner.train()

        def loss_of(step: int) -> tuple[Tensor, Tensor]:
            index = torch.randint(len(data.images), (batch,), generator=rng, device=rng.device)
            clean = self.changed(data.images[index.to(data.images.device)], rng)
            t = (levels * torch.rand(batch, generator=rng, device=rng.device)).long().clamp_max(levels - 1)
            noised = self.process.q_sample(clean, t, generator=rng)
            loss, hit = class_learner_loss(
                self.model, self.learner, clean, noised, t, labels[index], kl_weight=s.kl_weight
            )
            hits.append(hit)
            quarters.append(4 * t // levels)
            return loss, hit.float().mean()

        losses = descend(self.optimizers[1], [rate * s.learner_rate for rate in rates], loss_of, "class-learner")
        hit, quarter = torch.cat(hits).float().cpu(), torch.cat(quarters).cpu()
        by_level = [100 * float(hit[quarter == q].mean()) for q in range(4)]
        return {"class_learner_loss": float(losses[:, 0].mean()), "class_learner_accuracy": by_level}

    def guide(self) -> guides.LogProbability:
        """Return log p(c | x_t, t) from h."""
        return guides.class_learner_guide(self.model, self.learner)


class ClusterLearners(Learners):
    """The clusters recipe: f and g learn on batches of images, and guide on augmented views of x_0."""

    changes = AugmentSettings(scale=(0.6, 1.0), rotate=12, aspect=1.5, erase=0.2)
    guide_on = "x_0"

    def train_meta_model(
        self, data: PseudoDataset, rates: Sequence[float], rng: torch.Generator, epoch: int
    ) -> dict[str, Any]:
        """Train f and g on --image-batch random images per step, by the cross-entropy of g over the C classes.

        Arguments and result as for `Learners`.
        """
        labels = data.labels.to(self.device)
        self.model.train()
        self.model.base.generator = rng  # of DropBlock

        def loss_of(step: int) -> tuple[Tensor, Tensor]:
            index = torch.randint(len(data.images), (self.s.image_batch,), generator=rng, device=rng.device)
            images = self.changed(data.images[index.to(data.images.device)], rng)
            return class_loss(self.model, images, labels[index])

        loss, right = descend(self.optimizers[0], rates, loss_of, "meta-model").mean(0).tolist()
        return {"loss": loss, "base_accuracy": 100 * right, "lr": max(rates)}

    def guide(self) -> guides.LogProbability:
        """Return log p(c | x) from g, averaged over --views views that change with t, from 0 to 999."""
        draws = view_draws(self.s.seed, self.s.views * LEVELS, self.device)

        def view(images: Tensor, number: Tensor) -> Tensor:
            return augment_by(images, draws[number], VIEW)

        return guides.views_guide(self.model, view, self.s.views)


@lru_cache(maxsize=2)  # a run asks again every round
def view_draws(seed: int, count: int, device: torch.device) -> Tensor:
    """Return the random numbers of views 0 to count - 1 of a run, (count, 20), on the device."""
    return torch.cat([draw(1, generator(seed, "view", number, device=device)) for number in range(count)])


def descend(
    optimizer: torch.optim.Optimizer, rates: Sequence[float], loss_of: Callable[[int], tuple[Tensor, Tensor]], desc: str
) -> Tensor:
    """Take a step of `optimizer` at each rate. Return the loss and accuracy of each step, (steps, 2), on the device.

    loss_of: step, from 0 -> its loss () and accuracy (), 0 to 1.
    """
    seen = []
    for step, rate in enumerate(progress(rates, desc=desc, unit="step")):
        stopping.check()
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, right = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        seen.append(torch.stack([loss.detach(), right]))
    return torch.stack(seen)


@torch.no_grad()
def features(model: MetaModel, images: Tensor) -> Tensor:
    """Return the unnormalised features (N, D) of images (N, 3, H, W) uint8, on the CPU. Puts the model in eval mode."""
    model.eval()
    device = next(model.parameters()).device
    return torch.cat([model.look(to_float(part.to(device))).cpu() for part in images.split(500)])


def validate(model: MetaModel, images: Tensor, episodes: Episodes, way: int, scale: float) -> tuple[float, float]:
    """Return the nearest-prototype accuracy and half the width of its 95 % interval, in percent.

    images: (N, 3, H, W) uint8, indexed by the episodes; scale: factor of the cosines.
    """
    known, found = features(model, images), []
    per_episode = (episodes.support.shape[1] + episodes.query.shape[1]) * known.shape[1]
    for part in torch.arange(len(episodes.support)).split(max(1, AT_ONCE // per_episode)):
        support, query = known[episodes.support[part]], known[episodes.query[part]]
        scores = prototype_scores(support, episodes.support_labels[part], query, way, scale)
        found.append(accuracy(scores, episodes.query_labels[part]))
    return mean_confidence_interval(torch.cat(found))


def check_finite(entries: Mapping[str, Any], epoch: int) -> None:
    """Raise ValueError if a loss is NaN or infinite, before a diverged epoch is saved over a good one.

    entries: log entry of `epoch` (from 0): the mean `loss`, `class_learner_loss` if there is one, and the rate `lr`.
    """
    for name in ("loss", "class_learner_loss"):
        loss = entries.get(name, 0.0)
        if not math.isfinite(loss):
            raise ValueError(
                f"got {name} {loss} in epoch {epoch + 1} at rate {entries['lr']}; "
                "lower --lr; what was saved before is whole"
            )
