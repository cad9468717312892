"""Meta-training from a pool of diffusion models.

    python main.py                                  # glyphs, with the pool that ships
    python main.py --dataset custom --data-root data/mine --pool ckpt/pools/mine --nExemplars 1

`Training.train` is the algorithm: synthesise a pseudo dataset, train the meta-model on it, train the class-learner,
validate, save. `schedule.py` says what each epoch does. The best weights on meta_val are kept. To resume, run the same
command again.
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

import dry_run
from bookkeeping import Bookkeeping
from config import SCENARIOS, Settings, check_same, parse
from datasets.augment import AugmentSettings, augment
from datasets.episodes import EpisodeSampler
from datasets.pseudo import PseudoDataset, kept, kept_labels
from datasets.sources import load_real
from guided_diffusion.costs import free_memory
from guided_diffusion.dist_util import pick_device
from guided_diffusion.noise_levels import shared_process
from guided_diffusion.pool import Pool
from guided_diffusion.synthesis import Synthesis, synthesise
from models import learners
from models.clusters import cluster_classes, share_out
from models.pair import Pair
from schedule import Phase, phases
from utils import processes
from utils.cli import run
from utils.lock import locked
from utils.metrics import rate_by_class
from utils.pieces import discard
from utils.progress import hush
from utils.remote import local
from utils.seeding import generator

CALIBRATION = 4  # unguided images a class that a random class-learner is normalised by
CHANGES = {  # to training images, by recipe
    "paper": AugmentSettings(),
    "clusters": AugmentSettings(scale=(0.6, 1.0), rotate=12, aspect=1.5, erase=0.2),
}
VIEW = AugmentSettings(flip=False, scale=(0.75, 1.0), rotate=8, aspect=1.2, erase=0.0)  # what guidance looks through


class Training(Bookkeeping):
    """One run: its settings, parts and state."""

    def __init__(self, settings: Settings):
        s = self.s = settings
        self.device = pick_device(s.device_name)
        self.phases = phases(s)
        needs_pool = s.draws or Path(s.pool_place).exists()
        self.pool = Pool(local(s.pool_place), s.bare_checkpoint_flags()) if needs_pool else None
        self.size = size = s.height or (self.pool.load(0).image_size if self.pool else s.image_size)
        self.per_model = self.pool.share_classes(s.num_classes, SCENARIOS[s.dataset].per_model) if s.draws else []
        s.check_memory(sum(self.per_model) or s.num_classes or 1, size, free_memory())
        self.validation = load_real(s.dataset, s.data_paths, "meta_val", size, workers=s.workers)
        self.real = None
        if s.source == "real":  # only the reference may see labelled base images
            self.real = load_real(s.dataset, s.data_paths, "meta_train", size, s.real_per_class, s.workers)
        self.num_classes = len(self.real.class_names) if self.real else sum(self.per_model) or s.num_classes or 1
        self.check()
        sampler = EpisodeSampler(self.validation.labels, s.way, s.shot, s.nTestNovel // s.way)
        self.val_episodes = sampler.sample_indexed(0, s.epoch_size, s.seed, "validation")
        self.draw_weights()
        self.process = shared_process()  # that noises images for h
        self.epoch, self.best, self.data_key = s.start_epoch, -1.0, None
        self.restored = self.restore()

    def train(self) -> None:
        """Run all epochs, from where the run folder stands."""
        self.begin()
        if self.epoch == 0 and self.learner is not None and self.s.source == "guided" and not self.s.resume:
            few = replace(self.plan("calibration"), per_class=CALIBRATION, folder=None)
            learners.calibrate(self.model, self.learner, synthesise(self.pool, few, self.device)[0])
        for phase in self.phases[self.epoch - self.s.start_epoch :]:
            started = time.perf_counter()
            data = self.pseudo_dataset(phase)
            if phase.fresh:  # what was learnt from other labels is in the way
                self.draw_weights()
            made = time.perf_counter()
            entries = {"epoch": phase.epoch + 1, "round": phase.round}
            entries |= self.train_meta_model(phase, data)
            if phase.learner:
                entries |= self.train_class_learner(data)
            learners.check_finite(entries, phase.epoch)
            self.epoch = phase.epoch + 1
            entries |= {"synthesis_seconds": made - started, "seconds": time.perf_counter() - made}
            self.validate_and_save(entries)
        self.end()

    def draw_weights(self) -> None:
        """Make the networks with random weights, and their optimisers."""
        s = self.s
        self.pair = Pair(
            self.num_classes, scale_cls=s.scale_cls, backbone=s.backbone, features=s.features, image_size=self.size,
            drop_rate=s.drop_rate, optim=s.optim, weight_decay=s.weight_decay, learner=s.recipe == "paper",
            seed=s.seed, device=self.device,
        )  # fmt: skip
        self.model, self.learner = self.pair.model, self.pair.learner

    def pseudo_dataset(self, phase: Phase) -> PseudoDataset:
        """Return the labelled images of an epoch; what is not there yet is made and kept."""
        if (phase.rounds, phase.labels) != self.data_key:
            self.data_key, self.data = (phase.rounds, phase.labels), None  # frees the old before the new is there
            if self.real:
                self.data = PseudoDataset(self.real.images, self.real.labels, self.num_classes).on(self.device)
            else:
                newest, *older = [self.round_of(number, phase) for number in reversed(phase.rounds)]
                self.data = newest.joined(older).on(self.device)
        return self.data

    def round_of(self, number: int, phase: Phase) -> PseudoDataset:
        """Return the images of a round with the labels that `phase` gives them."""
        folder = self.log.folder / "pseudo" / f"round{number:02d}"
        if number < phase.round:
            data = PseudoDataset.load(folder)
        else:
            data = kept(folder, partial(self.synthesise, phase))
            self.log.board.picture("images", folder / "sheet.png", phase.epoch)
            discard(self.plan(number).folder)  # its images are in the data set now
        if phase.labels == "clusters":
            return kept_labels(folder / "clusters.npy", data, partial(self.clusters, data))
        if self.s.clusters and number < phase.round and (number == 0 or self.s.source == "unguided"):
            return kept_labels(folder / f"labels{phase.round:02d}.npy", data, partial(self.likeliest, data))
        return data

    def synthesise(self, phase: Phase) -> tuple[PseudoDataset, dict]:
        """Draw the images of the newest round of `phase`. Return them, and what to note of them."""
        processes.same_weights(*self.pair.networks)
        s, plan = self.s, self.plan(phase.round)
        here = {**self.resolved(), "contents": {**self.contents, "pool": processes.first_says(self.pool.digest())}}
        check_same(self.log.folder / "config.json", {"contents": self.contents}, here, set())  # the same pool as before
        notes = {"round": phase.round, "source": s.source, "hit_rate": None, "hit_rate_by_class": None}
        asked = None
        if not phase.guided or s.clusters:
            images, labels, _ = synthesise(self.pool, plan, self.device)
            data = PseudoDataset(images, plan.first_of(labels), self.num_classes)  # stands for all classes of a model
            if phase.labels != "asked":
                return data, notes
            asked = self.likeliest(data)  # what the same noise, unguided, comes closest to
        if not phase.guided:
            return PseudoDataset(images, asked, self.num_classes), notes
        images, labels, hits = synthesise(self.pool, plan, self.device, self.guide(), asked)
        rate = float(hits.float().mean())
        self.log.line(f"round {phase.round}: guided hit rate {100 * rate:.1f} %")
        notes |= {"hit_rate": rate, "hit_rate_by_class": rate_by_class(hits, labels, self.num_classes)}
        return PseudoDataset(images, labels, self.num_classes), notes

    def guide(self):
        """Return what guides: log p(c | x_t, t) of the class-learner, or log p(c | x) of g through views."""
        if self.learner is not None:
            return learners.log_probability(self.model, self.learner)

        def view(images: Tensor, number: int) -> Tensor:
            rng = generator(self.s.seed, "view", number, device=self.device)
            return augment(images, rng, VIEW, alike=True)

        return learners.log_probability_of_views(self.model, view, self.s.views)

    def clusters(self, data: PseudoDataset) -> Tensor:
        """Share out the images of each model over its classes, by balanced clusters of their features."""
        features = learners.features(self.model, data.images)
        return cluster_classes(features, data.labels, self.per_model, generator(self.s.seed, "clusters"))

    def likeliest(self, data: PseudoDataset) -> Tensor:
        """Share out the images of each model over its classes, to the likeliest, as many to one as to another."""
        scores = learners.clean_scores(self.guide(), data.images, self.device)
        return processes.first_says(share_out(scores, self.plan(0).first_of(data.labels), self.per_model))

    def plan(self, stream: int | str) -> Synthesis:
        """Return how this run draws images."""
        s = self.s
        return Synthesis(
            classes=self.per_model, per_class=s.samples_per_class, steps=s.sample_steps, size=self.size, seed=s.seed,
            stream=stream, batch=s.sample_batch, scale=s.guidance_scale, renoise=s.renoise, precision=s.precision,
            guide_on="x_t" if s.recipe == "paper" else "x_0", folder=s.run_folder / "pseudo" / f"batches-{stream}",
        )  # fmt: skip

    def train_meta_model(self, phase: Phase, data: PseudoDataset) -> dict[str, object]:
        """Train the meta-model for an epoch: on episodes, or in the clusters recipe on batches of images."""
        s, steps = self.s, self.steps()
        rates = [phase.rate(s, step, steps) for step in range(steps)]
        self.pair.set_rates(rates[0], s.learner_rate)
        self.rng = rng = generator(s.seed, "epoch", phase.epoch, device=self.device)
        self.model.base.generator = rng  # of DropBlock
        optimizer = self.pair.optimizers[0]
        if s.recipe == "clusters":
            entries = learners.train_classifier(
                self.model, optimizer, data.images, data.labels, rates=rates, batch=s.image_batch, rng=rng,
                augment=self.changed,
            )  # fmt: skip
        else:
            sampler = EpisodeSampler(data.labels, s.way, s.shot, s.train_nTestNovel // s.way)
            entries = learners.train_meta_model(
                self.model, optimizer, data.images, data.labels,
                sampler.sample(s.train_epoch_size, generator(s.seed, "episodes", phase.epoch)),
                batch=s.train_batch, dense_weight=s.dense_weight, augment=self.changed,
            )  # fmt: skip
        return entries | {"lr": rates[0]}

    def train_class_learner(self, data: PseudoDataset) -> dict[str, object]:
        """Train the class-learner for an epoch, on as many images as the meta-model has seen."""
        s, rng = self.s, self.rng
        return learners.train_class_learner(
            self.model, self.learner, self.pair.optimizers[1], data.images, data.labels,
            steps=self.steps(), batch=s.train_batch * (s.way * s.shot + s.train_nTestNovel),
            levels=self.process.num_timesteps, kl_weight=s.kl_weight, augment=self.changed, rng=rng,
            add_noise=lambda x, t: self.process.q_sample(x, t, generator=rng),
        )  # fmt: skip

    def steps(self) -> int:
        """Return the optimiser steps of an epoch."""
        return -(-self.s.train_epoch_size // self.s.train_batch)

    def changed(self, images: Tensor) -> Tensor:
        """Return training images (N, 3, H, W) uint8 changed at random, as float in [-1, 1] on the device."""
        return augment(images.to(self.device), self.rng, replace(CHANGES[self.s.recipe], flip=self.s.flip))


def main() -> None:
    """Parse and train, or say what that would be."""
    settings = parse(description="Meta-train without data, from a pool of diffusion models.")
    hush(settings.quiet)
    training = Training(settings)  # refuses what is wrong before it makes a folder
    if settings.dry_run:
        return dry_run.of_training(training)
    processes.meet()  # before the first one writes what the others have just read
    with locked(settings.run_folder):
        training.train()


if __name__ == "__main__":
    run(main)
