"""What a run of `main.py` keeps in its folder: its log, a checkpoint of each epoch, and what it resumes from."""

from pathlib import Path

from config import PLACES, TESTING, check_same
from models import learners
from models.pair import PAIR_ENTRIES, WHAT, run_entries
from utils import checkpoint, processes
from utils.machine import note_start
from utils.pieces import digest_of, discard
from utils.plots import curves
from utils.remote import local
from utils.report import Report
from utils.run_log import RunLog, read_json, write_skipped

MAY_CHANGE = PLACES | TESTING | {"sample_batch"}  # between a stopped run and its resumption


class Bookkeeping:
    """The part of `main.Training` that is no algorithm. It reads the settings and parts that `Training` has."""

    def check(self) -> None:
        """Refuse at once what would stop the run later."""
        s = self.s
        labels = len(self.per_model) if s.clusters or s.by_model else self.num_classes
        real = {"meta_val": self.validation} | ({"meta_train": self.real} if self.real else {})
        s.check_suffices(self.size, labels, {split: images.counts() for split, images in real.items()})
        self.contents = {split: digest_of(found.images, found.labels) for split, found in real.items()}
        if self.per_model:
            self.contents["pool"] = processes.first_says(self.pool.digest())
            self.pool.check(self.per_model, s.sample_steps, s.clusters)

    def begin(self) -> None:
        """Open the run folder, and say how the run starts."""
        s, epochs = self.s, self.s.start_epoch + len(self.phases)
        self.log = RunLog(s.run_folder, tensorboard=s.tensorboard, done=self.epoch, epochs=epochs)
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

    def end(self) -> None:
        """Write what is only there at the end."""
        if self.s.source == "none":
            self.validate_and_save({"epoch": 0, "round": 0})
        if processes.is_first():
            curves(self.log.metrics_path, self.log.folder / "curves.png")
        self.report.write()
        self.log.line(f"best on meta_val {self.best:.2f} %; {self.log.folder}, see report.html", closing=True)

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
        """Resume from last.pt of this folder, which is returned, or start from the weights of --resume."""
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

    def validate_and_save(self, entries: dict) -> None:
        """Validate, keep the best, log, save what a killed run resumes from."""
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
