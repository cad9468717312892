"""What a run of `main.py` keeps in its folder: its log, a checkpoint of each epoch, and what it resumes from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from config import Settings, check_same, that_affect
from models.learners import Learners
from models.saved import PAIR_ENTRIES, WHAT, run_entries
from report import Report
from utils import checkpoint, processes
from utils.environment import note_start
from utils.pieces import discard
from utils.plots import curves
from utils.remote import local
from utils.run_log import RunLog, read_json, read_metrics, write_skipped

PRECISION = "drawn_in"  # entry of config.json: what --precision auto came to when the run began


def kept_precision(s: Settings) -> str | None:
    """Return the number format in which a run that resumes has drawn its images so far; None for a new run."""
    kept = (read_json(s.run_folder / "config.json", dict) or {}).get(PRECISION) if s.precision == "auto" else None
    return kept if kept in ("float32", "bf16") else None


class Bookkeeping:
    """The run folder of a training.

    Attributes:
        epoch: epochs that are done.
        best: the highest accuracy on meta_val so far, in percent; -1 before the first.
        log: open from `begin` on.
    """

    may_change = that_affect("nothing", "testing")  # settings, between a stopped run and its resumption

    def __init__(self, settings: Settings, found: Mapping[str, Any]):
        """found: what the pool and the images said: num_classes, image_size, and contents, their digests by name."""
        self.s, self.found = settings, found
        self.folder = settings.run_folder
        self.epoch, self.best = settings.start_epoch, -1.0
        self.restored: Path | None = None

    def restore(self, learners: Learners, device: torch.device) -> None:
        """Resume from last.pt of this folder if it is there, or start from the weights of --resume."""
        last, config = self.folder / "last.pt", self.folder / "config.json"
        state = checkpoint.load_newest(last, device)
        if state is not None:
            path = last
        else:
            path = local(self.s.resume) if self.s.resume else None
        made_with = read_json(config, dict, "rewriting it and drawing the pseudo images again")
        self.images_of_unknown_settings = made_with is None and path != last and config.exists()
        if path != last:  # of a run killed in its first epoch, whose pseudo images are there
            check_same(config, made_with or {}, self.resolved(), self.may_change - {"resume"})
        if path is None:
            return
        state = checkpoint.load(path, device) if state is None else state
        checkpoint.entries(state, path, PAIR_ENTRIES, WHAT)
        if path == last:
            made_with = {**state["settings"], "contents": state.get("contents", {})}
            here = {**self.s.as_dict(), "contents": self.found["contents"]}
            check_same(last, made_with, here, self.may_change)
            checkpoint.entries(state, last, run_entries(self.s.max_epoch), WHAT)
        learners.load(state, path)
        if path == last:
            learners.load_optimizers(state["optimizers"], last)
            self.epoch, self.best, self.restored = state["epoch"], state["val_accuracy"], last

    def begin(self, device: torch.device, epochs: int, *skipped: Mapping) -> None:
        """Open the run folder, and say how the run starts. epochs: in all; skipped: images that could not be read."""
        self.log = RunLog(self.folder, tensorboard=self.s.tensorboard, done=self.epoch, epochs=epochs)
        self.report = Report(self.folder)
        if self.images_of_unknown_settings:
            discard(self.folder / "pseudo")
        if self.restored:
            where = f" after epoch {self.epoch} of {epochs}" if epochs else ""
            self.log.line(f"{'is finished' if self.epoch == epochs else 'resumes'}{where}: {self.restored}")
        write_skipped(self.folder, *skipped)
        self.log.settings(self.resolved())
        self.log.forget_after(self.epoch)
        note_start(self.folder, "main.py", device, self.s.notes())
        self.report.write()

    def record(self, entries: dict[str, Any], learners: Learners) -> None:
        """Log an epoch, keep its weights if they are the best, and save what a killed run resumes from.

        entries: what is noted of the epoch, with `epoch`, `round`, and `val_accuracy` if it was validated.
        """
        text = "random weights:"  # of --source none
        if "loss" in entries:
            text = f"epoch {entries['epoch']} round {entries['round']} loss {entries['loss']:.3f}"
        self.epoch = entries["epoch"]
        if "val_accuracy" in entries:
            text += f" meta_val {entries['val_accuracy']:.2f} +- {entries['val_ci95']:.2f}"
            if entries["val_accuracy"] > self.best:
                self.best = entries["val_accuracy"]
                self.save("best_model.pt", learners)
        self.log.record(entries)
        self.log.line(text)
        self.save("last.pt", learners, optimizers=[optimizer.state_dict() for optimizer in learners.optimizers])
        self.report.write_sometimes()

    def save(self, name: str, learners: Learners, **extra) -> None:
        """Save the weights with all that is needed to use them.

        extra: entries that only a resumed run needs. With them the file before is kept too, should this one be damaged.
        """
        if processes.is_first():
            contents = {
                **learners.state(), **self.found, "settings": self.s.as_dict(), "epoch": self.epoch,
                "val_accuracy": self.best, **extra,
            }  # fmt: skip
            checkpoint.save(self.folder / name, contents, keep_old=bool(extra))

    def end(self) -> None:
        """Write what is only there at the end, and say how the run ended."""
        if processes.is_first():
            curves(self.log.metrics_path, self.folder / "curves.png")
        self.report.write()
        seen = [each for each in read_metrics(self.log.metrics_path) if each.get("val_accuracy") == self.best]
        epoch = f" in epoch {seen[0]['epoch']}" if seen and self.s.source != "none" else ""
        self.log.line(
            f"best on meta_val {self.best:.2f} %{epoch}, chance is {100 / self.s.way:.0f} %; {self.folder}, "
            "see report.html", closing=True,
        )  # fmt: skip

    def resolved(self) -> dict[str, Any]:
        """Return the settings with what pool and images said, for config.json."""
        return {**self.s.as_dict(), **self.found}

    def check_pool(self, digest: str) -> None:
        """Refuse a pool that changed since the run began: ValueError."""
        here = {**self.resolved(), "contents": {**self.found["contents"], "pool": digest}}
        check_same(self.folder / "config.json", {"contents": self.found["contents"]}, here, set())
