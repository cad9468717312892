"""Meta-training from a pool of diffusion models.

    python main.py                                  # glyphs, with the pool that ships
    python main.py --dataset custom --data-root data/mine --pool ckpt/pools/mine --nExemplars 1

`Training.train` is the algorithm: synthesise a pseudo dataset, train the meta-model on it, train the class-learner,
validate, save. `schedule.py` says what each epoch does. The class-learner is the paper's, `--recipe paper`; in the
clusters recipe, the default of most data sets, the meta-model guides sampling itself. The weights that score best on
meta_val are kept. To resume, run the same command again.
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

import dry_run
from bookkeeping import PRECISION, Bookkeeping, recorded_precision
from config import SCENARIOS, Settings, parse
from datasets.episodes import EpisodeSampler
from datasets.pseudo import PseudoDataset, load_or_label, load_or_make
from datasets.sources import load_real
from guided_diffusion.costs import free_memory
from guided_diffusion.dist_util import pick_device
from guided_diffusion.noise_levels import shared_process
from guided_diffusion.pool import Pool
from guided_diffusion.synthesis import Synthesis, synthesise
from models import guides
from models.clusters import cluster_classes, likeliest_classes
from models.learners import ClusterLearners, Learners, PaperLearners, check_finite, features, validate
from schedule import Phase, phases
from utils import processes
from utils.cli import run
from utils.lock import locked
from utils.metrics import rate_by_class
from utils.pieces import digest_of, discard
from utils.progress import hush
from utils.seeding import generator

CALIBRATION = 4  # unguided images per class that calibrate an untrained class-learner


class Training:
    """One training run: its settings, pool, validation images, learners and run folder."""

    def __init__(self, settings: Settings):
        """Load everything the run needs; write nothing. Raises ValueError for anything that would stop it later."""
        s = self.s = settings
        self.device = pick_device(s.device_name)
        self.phases = phases(s)
        needs_pool = s.draws or s.pool or Path(s.pool_place).exists()
        self.pool = Pool.of(s) if needs_pool else None
        self.size = size = s.height or (self.pool.load(0).image_size if self.pool else s.image_size)
        self.per_model = self.pool.share_classes(s.num_classes, SCENARIOS[s.dataset].per_model) if s.draws else []
        s.check_memory(sum(self.per_model) or s.num_classes or 1, size, free_memory())
        self.validation = load_real(s.dataset, s.data_paths, "meta_val", size, workers=s.workers)
        self.real = None
        if s.source == "real":  # only the real-data reference may see labelled base images
            self.real = load_real(s.dataset, s.data_paths, "meta_train", size, s.real_per_class, s.workers)
        self.num_classes = len(self.real.class_names) if self.real else sum(self.per_model) or s.num_classes or 1
        real = {"meta_val": self.validation} | ({"meta_train": self.real} if self.real else {})
        labels = len(self.per_model) if s.finds_classes or s.labels_by_model else self.num_classes
        s.check_suffices(size, labels, {split: images.counts() for split, images in real.items()})
        contents = {split: digest_of(found.images, found.labels) for split, found in real.items()}
        if self.per_model:
            contents["pool"] = processes.broadcast(self.pool.digest())
            self.pool.check(self.per_model, s.sample_steps, s.finds_classes)
            self.precision = recorded_precision(s) or self.pool.precision(s.precision, self.device)
        sampler = EpisodeSampler(self.validation.labels, s.way, s.shot, s.nTestNovel // s.way)
        self.val_episodes = sampler.sample_indexed(0, s.epoch_size, s.seed, "validation")
        self.data, self.data_key = None, None
        self.learners = self.new_learners()
        found = {"num_classes": self.num_classes, "image_size": size, "contents": contents}
        found |= {PRECISION: self.precision} if self.per_model else {}
        self.books = Bookkeeping(s, found)
        self.books.restore(self.learners, self.device)

    def train(self) -> None:
        """Train all epochs that the run folder does not have yet."""
        s, books = self.s, self.books
        skipped = self.real.skipped if self.real else {}
        books.begin(self.device, s.start_epoch + len(self.phases), self.validation.skipped, skipped)
        left = self.phases[books.epoch - s.start_epoch :]
        if left or not books.restored:
            books.log.line(dry_run.opening(self))
        if s.source == "none" and not books.restored:
            books.record({"epoch": 0, "round": 0, **self.accuracy()}, self.learners)
        if self.calibration:
            self.calibrate_guide()
        for phase in left:
            started = time.perf_counter()
            data = self.pseudo_dataset(phase)
            if phase.fresh:  # only now: the previous network had to guide and label these images
                self.learners = self.new_learners()
            made = time.perf_counter()
            rng = generator(s.seed, "epoch", phase.epoch, device=self.device)
            entries = self.learners.train_meta_model(data, phase.rates, rng, phase.epoch)
            if phase.guided:  # does nothing in the clusters recipe, which has no class-learner
                entries |= self.learners.train_class_learner(data, phase.rates, rng)
            check_finite(entries, phase.epoch)
            entries |= {"synthesis_seconds": made - started, "seconds": time.perf_counter() - made}
            if (phase.epoch + 1) % s.validate_every == 0 or phase.epoch + 1 == s.max_epoch:
                entries |= self.accuracy()
            books.record({"epoch": phase.epoch + 1, "round": phase.round, **entries}, self.learners)
        books.end()

    def new_learners(self) -> Learners:
        """Return the recipe's networks, with random weights, and their optimisers."""
        if self.s.recipe == "paper":
            return PaperLearners(self.s, self.num_classes, self.size, self.device, shared_process())
        return ClusterLearners(self.s, self.num_classes, self.size, self.device)

    @property
    def calibration(self) -> int:
        """How many unguided images per class to draw first; 0 unless an untrained class-learner guides round 0."""
        untrained = not self.books.restored and not self.s.resume
        return CALIBRATION * (untrained and self.s.recipe == "paper" and self.s.source == "guided")

    def calibrate_guide(self) -> None:
        """Set the running statistics of the untrained networks from a few unguided images, to guide round 0."""
        few = replace(self.plan("calibration"), per_class=self.calibration, folder=None)
        images, _, _ = synthesise(self.pool, few, self.device)
        guides.calibrate(self.learners.model, self.learners.learner, images)

    def accuracy(self) -> dict[str, float]:
        """Return the nearest-prototype accuracy on meta_val and half the width of its 95 % interval, in percent."""
        s = self.s
        mean, half = validate(self.learners.model, self.validation.images, self.val_episodes, s.way, s.scale_cls)
        return {"val_accuracy": mean, "val_ci95": half}

    def pseudo_dataset(self, phase: Phase) -> PseudoDataset:
        """Return the labelled images of an epoch. Draw and save those that do not exist yet."""
        if (phase.rounds, phase.labels) != self.data_key:
            self.data_key, self.data = (phase.rounds, phase.labels), None  # free the old data before loading the new
            if self.real:
                self.data = PseudoDataset(self.real.images, self.real.labels, self.num_classes).on(self.device)
            else:
                newest, *older = [self.round_of(number, phase) for number in reversed(phase.rounds)]
                self.data = newest.joined(older).on(self.device)
        return self.data

    def round_of(self, number: int, phase: Phase) -> PseudoDataset:
        """Return the images of round `number`, labelled as `phase` asks."""
        folder = self.s.run_folder / "pseudo" / f"round{number:02d}"
        if number < phase.round:
            data = PseudoDataset.load(folder)
        else:
            data = load_or_make(folder, partial(self.new_round, phase))
            self.books.log.board.image("images", folder / "sheet.png", phase.epoch)
            discard(self.plan(number).folder)  # the dataset holds these images now
        if phase.labels == "clusters":
            return load_or_label(folder / "clusters.npy", data, partial(self.clusters, data))
        if number in phase.relabel:
            return load_or_label(folder / f"labels{phase.round:02d}.npy", data, partial(self.likeliest, data))
        return data

    def new_round(self, phase: Phase) -> tuple[PseudoDataset, dict]:
        """Draw and label the newest round of `phase`. Return it, and notes to save with it.

        To guide each image towards its likeliest class, draw twice from the same noise: unguided, then guided.
        """
        processes.same_weights(*self.learners.networks.values())
        self.books.check_pool(processes.broadcast(self.pool.digest()))
        plan = self.plan(phase.round)
        notes = {"round": phase.round, "source": self.s.source, "hit_rate": None, "hit_rate_by_class": None}
        unguided = None if phase.labels == "asked" else self.draw_unguided(plan)
        if phase.labels == "likeliest":
            unguided = replace(unguided, labels=self.likeliest(unguided))
        if not phase.guided:
            return unguided, notes
        asked = None if unguided is None else unguided.labels  # None: class after class
        images, labels, hits = synthesise(self.pool, plan, self.device, self.learners.guide(), asked)
        rate = float(hits.float().mean())
        self.books.log.line(f"round {phase.round}: hit rate {100 * rate:.1f} %")
        notes |= {"hit_rate": rate, "hit_rate_by_class": rate_by_class(hits, labels, self.num_classes)}
        return PseudoDataset(images, labels, self.num_classes), notes

    def draw_unguided(self, plan: Synthesis) -> PseudoDataset:
        """Draw unguided images, labelled by model: each gets the first class of the model that drew it."""
        images, classes, _ = synthesise(self.pool, plan, self.device)
        return PseudoDataset(images, plan.first_of(classes), self.num_classes)

    def clusters(self, data: PseudoDataset) -> Tensor:
        """Return new labels (N,): clusters of features within each model. data: images labelled by model."""
        seen = features(self.learners.model, data.images)
        return cluster_classes(seen, data.labels, self.per_model, generator(self.s.seed, "clusters"))

    def likeliest(self, data: PseudoDataset) -> Tensor:
        """Return new labels (N,): each image's likeliest class of its model."""
        scores = guides.clean_scores(self.learners.guide(), data.images, self.device)
        by_model = self.plan(0).first_of(data.labels)
        return processes.broadcast(likeliest_classes(scores, by_model, self.per_model))

    def plan(self, stream: int | str) -> Synthesis:
        """Return the settings for drawing images. stream: the round, or a name; each has its own noise."""
        s = self.s
        return Synthesis(
            classes=self.per_model, per_class=s.samples_per_class, steps=s.sample_steps, size=self.size, seed=s.seed,
            stream=stream, batch=s.sample_batch, scale=s.guidance_scale, renoise=s.renoise, precision=self.precision,
            guide_on=self.learners.guide_on, folder=s.run_folder / "pseudo" / f"batches-{stream}",
        )  # fmt: skip


def main() -> None:
    """Parse the flags and train; with --dry-run, only print what the run would do."""
    settings = parse(description="Meta-train without data, from a pool of diffusion models.", command="training")
    hush(settings.quiet)
    training = Training(settings)  # raises for wrong settings before any folder is made
    if settings.dry_run:
        return dry_run.of_training(training)
    processes.meet()  # all must have read the run folder before the first process writes to it
    with locked(settings.run_folder):
        training.train()


if __name__ == "__main__":
    run(main)
