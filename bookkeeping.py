"""The run folder of `main.py`: its log, its checkpoints, and how a stopped run resumes."""

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

PRECISION = "drawn_in"  # entry of config.json: the number format that the run draws in


def recorded_precision(s: Settings) -> str | None:
    """Return the format that --precision auto chose when the run began; None if new, or with another --precision."""
    if s.precision != "auto":
        return None
    config = read_json(s.run_folder / "config.json", dict)
    if config is None:  # damaged, or never written: last.pt holds the same entry
        state = checkpoint.load_newest(s.run_folder / "last.pt")
        config = state if isinstance(state, Mapping) else {}
    kept = config.get(PRECISION)
    return kept if kept in ("float32", "bf16") else None


class Bookkeeping:
    """The run folder of one training run.

    Attributes:
        epoch: number of finished epochs.
        best: highest accuracy on meta_val so far, in percent; -1 before the first validation.
        log: the run's log, open once `begin` was called.
    """

    may_change = that_affect("nothing", "testing")  # settings that may differ when a stopped run resumes

    def __init__(self, settings: Settings, found: Mapping[str, Any]):
        """found: what was read from pool and images: num_classes, image_size, and contents, their digests by name."""
        self.s, self.found = settings, found
        self.folder = settings.run_folder
        self.epoch, self.best = settings.start_epoch, -1.0
        self.restored: Path | None = None

    def restore(self, learners: Learners, device: torch.device) -> None:
        """Resume from last.pt in this folder; if there is none, start from the weights of --resume, if given."""
        last, config = self.folder / "last.pt", self.folder / "config.json"
        state = checkpoint.load_newest(last, device)
        if state is not None:
            path = last
        else:
            path = local(self.s.resume) if self.s.resume else None
        instead = "rewriting it" + " and drawing the pseudo images again" * (path != last)
        made_with = read_json(config, dict, instead)
        self.images_of_unknown_settings = made_with is None and path != last and config.exists()
        if path != last:  # a run killed in its first epoch leaves pseudo images but no last.pt
            check_same(config, made_with or {}, self.resolved(), self.may_change - {"resume"})
        if path is None:
            return
        state = checkpoint.load(path, device) if state is None else state
        checkpoint.entries(state, path, PAIR_ENTRIES, WHAT)
        if path == last:
            made_with = {**state["settings"], "contents": state.get("contents", {})}
            here = {**self.s.as_dict(), "contents": self.found["contents"]}
            began = str(made_with.get("resume") or "")
            same = {Path(each).resolve() for each in (began, last) if each}  # weights it started from, or its own
            other = Path(self.s.resume).resolve() not in same if self.s.resume else self.s.source == "none" and began
            check_same(last, made_with, here, self.may_change - ({"resume"} if other else set()))
            checkpoint.entries(state, last, run_entries(self.s.max_epoch), WHAT)
        learners.load(state, path)
        if path == last:
            learners.load_optimizers(state["optimizers"], last)
            self.epoch, self.best, self.restored = state["epoch"], state["val_accuracy"], last

    def begin(self, device: torch.device, epochs: int, *skipped: Mapping) -> None:
        """Open the run folder and log how the run starts. epochs: their total; skipped: images that cannot be read."""
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
        """Log an epoch, save its weights if they are the best so far, and save last.pt to resume from.

        entries: the epoch's log entry, with `epoch`, `round`, and `val_accuracy` if the epoch was validated.
        """
        text = f"weights of {self.s.resume}:" if self.s.resume else "random weights:"  # of --source none
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
        """Save the weights with everything needed to use them.

        extra: entries that only resuming needs. If given, the previous file is kept, in case this one is damaged.
        """
        if processes.is_first():
            contents = {
                **learners.state(), **self.found, "settings": self.s.as_dict(), "epoch": self.epoch,
                "val_accuracy": self.best, **extra,
            }  # fmt: skip
            checkpoint.save(self.folder / name, contents, keep_old=bool(extra))

    def end(self) -> None:
        """Draw the curves, write the report, and log how the run ended."""
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
        """Return the settings and what was read from pool and images, for config.json."""
        return {**self.s.as_dict(), **self.found}

    def check_pool(self, digest: str) -> None:
        """Raise ValueError if the pool has changed since the run began."""
        here = {**self.resolved(), "contents": {**self.found["contents"], "pool": digest}}
        check_same(self.folder / "config.json", {"contents": self.found["contents"]}, here, set())
