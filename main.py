"""Meta-training from a pool of diffusion models: settings -> parts -> rounds.

    python main.py                                  # glyphs, with the pool that ships
    python main.py --dataset custom --data-root data/mine --pool ckpt/pools/mine --nExemplars 1

A round draws a pseudo dataset and trains both learners on it: the meta-model, and the class-learner that guides the
next round. The best weights on meta_val are kept. To resume, run the same command again.
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

import dry_run
from config import PLACES, SCENARIOS, TESTING, Settings, check_same, parse
from datasets.augment import AugmentSettings, augment
from datasets.episodes import EpisodeSampler
from datasets.pseudo import PseudoDataset, kept
from datasets.sources import load_real
from guided_diffusion.costs import free_memory
from guided_diffusion.dist_util import pick_device
from guided_diffusion.noise_levels import shared_process
from guided_diffusion.pool import Pool
from guided_diffusion.synthesis import Synthesis, synthesise
from models import learners
from models.clusters import cluster_classes, share_out
from models.pair import PAIR_ENTRIES, WHAT, Pair, run_entries
from utils import checkpoint, processes
from utils.cli import run
from utils.lock import locked
from utils.machine import note_start
from utils.metrics import rate_by_class
from utils.pieces import digest_of, discard
from utils.plots import curves
from utils.progress import hush
from utils.remote import local
from utils.report import Report
from utils.run_log import RunLog, read_json, write_skipped
from utils.seeding import generator

MAY_CHANGE = PLACES | TESTING | {"sample_batch"}
CALIBRATION = 4  # unguided images a class that a random class-learner is normalised by
FIRST_STEPS = 8  # epochs' worth of steps that a class-learner taught by clusters takes before it first steers


class Training:
    """One run: its settings, parts and state."""

    def __init__(self, settings: Settings):
        s = self.s = settings
        self.device = pick_device(s.device_name)
        needs_pool = s.source in ("guided", "unguided") or Path(s.pool_place).exists()
        self.pool = Pool(local(s.pool_place), s.bare_checkpoint_flags()) if needs_pool else None
        self.size = size = s.height or (self.pool.load(0).image_size if self.pool else s.image_size)
        self.per_model = []
        if s.source in ("guided", "unguided"):
            self.per_model = self.pool.share_classes(s.num_classes, SCENARIOS[s.dataset].per_model)
        s.check_memory(sum(self.per_model) or s.num_classes or 1, size, free_memory())
        self.validation = load_real(s.dataset, s.data_paths, "meta_val", size, workers=s.workers)
        self.real = None
        if s.source == "real":  # only the reference may see labelled base images
            self.real = load_real(s.dataset, s.data_paths, "meta_train", size, s.samples_per_class, s.workers)
        self.num_classes = len(self.real.class_names) if self.real else sum(self.per_model) or s.num_classes or 1
        self.check()
        sampler = EpisodeSampler(self.validation.labels, s.way, s.shot, s.nTestNovel // s.way)
        self.val_episodes = sampler.sample_indexed(0, s.epoch_size, s.seed, "validation")
        self.grouping = learners.Grouping.of(self.per_model, s.within_weight, self.device) if self.per_model else None
        self.draw_weights()
        self.process = shared_process()  # that noises images for h
        self.epoch, self.best, self.data_key = s.start_epoch, -1.0, None
        self.restored = self.restore()

    def draw_weights(self) -> None:
        """Both learners with random weights, and their optimisers."""
        s = self.s
        self.pair = Pair(
            self.num_classes, scale_cls=s.scale_cls, backbone=s.backbone, drop_rate=s.drop_rate, optim=s.optim,
            weight_decay=s.weight_decay, seed=s.seed, device=self.device,
        )  # fmt: skip
        self.model, self.learner = self.pair.model, self.pair.learner

    def check(self) -> None:
        """Refuse at once what would stop the run later."""
        s = self.s
        labels = len(self.per_model) if s.source == "unguided" or s.clusters else self.num_classes
        real = {"meta_val": self.validation} | ({"meta_train": self.real} if self.real else {})
        s.check_suffices(self.size, labels, {split: images.counts() for split, images in real.items()})
        self.contents = {split: digest_of(found.images, found.labels) for split, found in real.items()}
        if self.per_model:
            self.contents["pool"] = processes.first_says(self.pool.digest())
            self.pool.check(self.per_model, s.sample_steps, s.clusters or s.likely)

    def training_data(self, round_index: int) -> PseudoDataset:
        """The images of this epoch, those of earlier rounds too; read anew only where round or labels change."""
        key = (round_index, self.by_model())
        if key != self.data_key:
            self.data_key, self.data = key, None  # frees the old before the new is there
            self.data = self.pseudo_dataset(round_index).joined(self.earlier(round_index)).on(self.device)
        return self.data

    def pseudo_dataset(self, round_index: int) -> PseudoDataset:
        """The images of a round with the labels of this epoch: read if they are there, else made and kept."""
        if self.real:
            return PseudoDataset(self.real.images, self.real.labels, self.num_classes)
        folder = self.log.folder / "pseudo" / f"round{round_index:02d}"
        data = kept(folder, partial(self.synthesise, round_index))
        self.log.board.picture("images", folder / "sheet.png", round_index * self.s.refresh_every)
        discard(self.plan(round_index).folder)  # its images are in the data set now
        return self.clustered(data) if self.s.clusters and round_index == 0 and not self.by_model() else data

    def synthesise(self, round_index: int) -> tuple[PseudoDataset, dict]:
        """Draw a round's images. Returns them and what to note of them."""
        processes.same_weights(self.model, self.learner)
        s = self.s
        here = {**self.resolved(), "contents": {**self.contents, "pool": processes.first_says(self.pool.digest())}}
        check_same(self.log.folder / "config.json", {"contents": self.contents}, here, set())  # the same pool as before
        guided = s.source == "guided" and not (s.clusters and round_index == 0)
        function = learners.log_probability(self.model, self.learner) if guided else None
        plan = self.plan(round_index)
        wanted = None
        if guided and s.likely:  # what the same noise, unguided, comes closest to
            natural, own, _ = synthesise(self.pool, plan, self.device)
            scores = learners.clean_scores(function, natural, self.device)
            wanted = processes.first_says(share_out(scores, plan.first_of(own), self.per_model))
        images, labels, hits = synthesise(self.pool, plan, self.device, function, wanted)
        if not guided:
            labels = plan.first_of(labels)  # stands for all classes of its model
        rate = float(hits.float().mean()) if guided else None
        if guided:
            self.log.line(f"round {round_index}: guided hit rate {100 * rate:.1f} %")
        by_class = rate_by_class(hits, labels, self.num_classes) if guided else None
        notes = {"round": round_index, "source": s.source, "hit_rate": rate, "hit_rate_by_class": by_class}
        return PseudoDataset(images, labels, self.num_classes), notes

    def earlier(self, round_index: int) -> list[PseudoDataset]:
        """The images of earlier rounds that are trained on too, those of round 0 as clustered where they were."""
        oldest = max(self.s.start_epoch // self.s.refresh_every, round_index - self.s.replay)
        rounds = range(oldest, round_index) if not self.real else ()
        names = ["clusters" if self.s.clusters and r == 0 else f"round{r:02d}" for r in rounds]
        return [PseudoDataset.load(self.log.folder / "pseudo" / name) for name in names]

    def plan(self, stream: int | str) -> Synthesis:
        """How this run draws images."""
        s = self.s
        return Synthesis(
            classes=self.per_model, per_class=s.samples_per_class, steps=s.sample_steps, size=self.size, seed=s.seed,
            stream=stream, batch=s.sample_batch, scale=s.guidance_scale, guide_on=s.guide_on, precision=s.precision,
            folder=s.run_folder / "pseudo" / f"batches-{stream}")  # fmt: skip

    def by_model(self) -> bool:
        """Whether this epoch's images are labelled by their model only."""
        return self.s.source == "unguided" or (self.s.clusters and self.epoch < self.s.warm_up)

    def clustered(self, data: PseudoDataset) -> PseudoDataset:
        """The images of round 0, each model's shared out over its classes by balanced clusters of feature maps."""

        def make() -> tuple[PseudoDataset, dict]:
            maps = learners.features(self.model, data.images, maps=True)
            labels = cluster_classes(maps, data.labels, self.per_model, generator(self.s.seed, "clusters"))
            return PseudoDataset(data.images, labels, self.num_classes), {"round": 0}

        return kept(self.log.folder / "pseudo" / "clusters", make)

    def train_epoch(self, data: PseudoDataset) -> dict[str, object]:
        """One epoch of the meta-model, then, where there will be guidance, one of the class-learner."""
        s = self.s
        self.pair.set_rates(rate := s.lr * learners.learning_rate_factor(s.progress(self.epoch)), s.learner_rate)
        rng = generator(s.seed, "epoch", self.epoch, device=self.device)
        self.model.base.generator = rng  # of DropBlock
        sampler = EpisodeSampler(data.labels, s.way, s.shot, s.train_nTestNovel // s.way)

        def changed(pictures: Tensor) -> Tensor:
            return augment(pictures.to(self.device), rng, AugmentSettings(flip=s.flip))

        grouping = self.grouping if self.epoch >= (s.restart_epoch or 0) else None  # what steers learns all classes
        entries = learners.train_meta_model(
            self.model, self.pair.model_optimizer, data.images, data.labels,
            sampler.sample(s.train_epoch_size, generator(s.seed, "episodes", self.epoch)),
            batch=s.train_batch, dense_weight=s.dense_weight, grouping=grouping, augment=changed,
        )  # fmt: skip
        entries["lr"] = rate
        if s.source != "guided" or self.by_model():
            return entries
        first = s.clusters and self.epoch + 1 == s.refresh_every  # it is new, and will steer at once
        steps = -(-s.train_epoch_size // s.train_batch) * (FIRST_STEPS if first else 1)
        entries |= learners.train_class_learner(
            self.model, self.learner, self.pair.learner_optimizer, data.images, data.labels,
            steps=steps, batch=s.train_batch * (s.way * s.shot + s.train_nTestNovel),
            levels=self.process.num_timesteps, level_power=learners.LEVEL_POWER[s.guide_on], kl_weight=s.kl_weight,
            grouping=grouping, augment=changed, rng=rng,
            add_noise=lambda x, t: self.process.q_sample(x, t, generator=rng),
        )  # fmt: skip
        return entries

    def save(self, name: str, **extra) -> None:
        """Save the weights with all that is needed to use them; `extra` to go on from them."""
        if processes.is_first():
            contents = {
                **self.pair.state(), "num_classes": self.num_classes, "image_size": self.size,
                "settings": self.s.as_dict(), "contents": self.contents, "epoch": self.epoch,
                "val_accuracy": self.best, **extra,
            }  # fmt: skip
            checkpoint.save(self.log.folder / name, contents, keep_old=bool(extra))

    def restore(self) -> Path | None:
        """Go on from last.pt of this folder, which is returned, or start from the weights of --resume."""
        last = self.s.run_folder / "last.pt"
        state, config = checkpoint.load_newest(last, self.device), self.s.run_folder / "config.json"
        path = last if state is not None else local(self.s.resume) if self.s.resume else None
        made_with = read_json(config, dict, "it is written anew, and so are images that only it tells the settings of")
        self.unknown = made_with is None and path != last and config.exists()
        if path != last:  # of a run killed in its first epoch, whose pseudo images are there
            check_same(config, made_with or {}, self.resolved(), MAY_CHANGE - {"resume"})
        if path is None:
            return None
        state = checkpoint.load(path, self.device) if state is None else state
        checkpoint.entries(state, path, PAIR_ENTRIES, WHAT)
        if path == last:
            made_with = {**state["settings"], "contents": state.get("contents", {})}
            check_same(last, made_with, {**self.s.as_dict(), "contents": self.contents}, MAY_CHANGE)
            checkpoint.entries(state, last, run_entries(self.s.max_epoch), WHAT)
        self.pair.load(state, path)
        if path != last:
            return None
        self.epoch, self.best = state["epoch"], state["val_accuracy"]
        self.pair.load_optimizers(state["optimizers"], last)
        return last

    def resolved(self) -> dict[str, object]:
        """The settings with what the pool said, and digests of pool and images, for config.json."""
        return {**self.s.as_dict(), "num_classes": self.num_classes, "image_size": self.size, "contents": self.contents}

    def train(self) -> None:
        """All rounds and epochs, from where the folder stands."""
        s = self.s
        self.log = RunLog(s.run_folder, tensorboard=s.tensorboard, done=self.epoch, epochs=s.epochs)
        self.report = Report(s.run_folder)
        if self.unknown:
            discard(s.run_folder / "pseudo")
        if self.restored:
            self.log.line(f"resumes from {self.restored}, after epoch {self.epoch}")
        write_skipped(s.run_folder, self.validation.skipped, self.real.skipped if self.real else {})
        self.log.settings(self.resolved())
        self.log.forget_after(self.epoch)
        note_start(s.run_folder, "main.py", self.device, s.notes())
        self.report.write()
        if self.epoch == 0 and s.source == "guided" and not s.clusters and not s.resume:
            few = replace(self.plan("calibration"), per_class=CALIBRATION, folder=None)
            learners.calibrate(self.model, self.learner, synthesise(self.pool, few, self.device)[0])
        while self.epoch < s.epochs:
            started, round_index = time.perf_counter(), self.epoch // s.refresh_every
            data = self.training_data(round_index)
            if self.epoch == s.restart_epoch or (s.clusters and self.epoch == s.warm_up and not s.resume):
                self.draw_weights()  # what was learnt from fewer images, or other labels, is in the way of new ones
            made = time.perf_counter()
            entries = {"epoch": self.epoch + 1, "round": round_index, **self.train_epoch(data)}
            learners.check_finite(entries, self.epoch)
            self.epoch += 1
            entries |= {"synthesis_seconds": made - started, "seconds": time.perf_counter() - made}
            self.after_epoch(entries)
        if s.source == "none":
            self.after_epoch({"epoch": 0, "round": 0})
        if processes.is_first():
            curves(self.log.metrics_path, self.log.folder / "curves.png")
        self.report.write()
        self.log.line(f"best on meta_val {self.best:.2f} %; {self.log.folder}, see report.html", closing=True)

    def after_epoch(self, entries: dict) -> None:
        """Validate, keep the best, log, save."""
        text = f"epoch {entries['epoch']} round {entries['round']} loss {entries.get('loss', float('nan')):.3f}"
        if self.epoch % self.s.validate_every == 0 or self.epoch == self.s.max_epoch:
            images, episodes = self.validation.images, self.val_episodes
            mean, half = learners.validate(self.model, images, episodes, self.s.way, self.s.scale_cls)
            entries |= {"val_accuracy": mean, "val_ci95": half}
            text += f" meta_val {mean:.2f} +- {half:.2f}"
            if mean > self.best:
                self.best = mean
                self.save("best_model.pt")
        self.log.record(entries)
        self.log.line(text)
        self.save("last.pt", optimizers=self.pair.optimizer_states())
        self.report.write_sometimes()


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
