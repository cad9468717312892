"""Write a run's log_train.txt, metrics.jsonl, config.json and skipped_images.csv. Only the first process writes."""

import csv
import io
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from utils import processes
from utils.atomic import atomic_file, named
from utils.images import Skipped
from utils.progress import is_quiet, progress
from utils.tensorboard import Board

SKIPPED = "skipped_images.csv"


class RunLog:
    """The log of a run folder, which is made if it is missing. Opening it again appends."""

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        tensorboard: bool = False,
        done: int = 0,
        epochs: int = 0,
        by: str = "epoch",
    ) -> None:
        """Open the log of `folder`.

        tensorboard: also write for TensorBoard.
        done: epochs that a resumed run has already finished.
        epochs: total number of epochs, for a progress bar.
        by: the entry that numbers the lines of metrics.jsonl: "epoch", or "step" in pretraining.
        """
        self.folder, self.by = Path(folder), by
        self.folder.mkdir(parents=True, exist_ok=True)
        self.bar = progress(total=epochs, initial=done, desc="epochs", unit="epoch") if epochs > done else None
        self.board = Board(self.folder, wanted=tensorboard, done=done)
        _end_last_line(self.metrics_path)

    @property
    def metrics_path(self) -> Path:
        """The file that `record` writes: one JSON object per line."""
        return self.folder / "metrics.jsonl"

    def forget_after(self, epoch: int) -> None:
        """Drop the records after `epoch` (or step), which a resumed run repeats."""
        if self.metrics_path.exists() and processes.is_first():
            lines = _lines(self.metrics_path)
            if odd := [number for number, line in enumerate(lines[:-1], 1) if _number_of(line, self.by) == sys.maxsize]:
                say_damaged(self.metrics_path, f"{len(odd)} lines are no entries, the first line {odd[0]}; left out")
            kept = [line + "\n" for line in lines if _number_of(line, self.by) <= epoch]
            if len(kept) < len(lines):
                with atomic_file(self.metrics_path) as file:
                    file.write("".join(kept).encode())

    def line(self, text: str, *, closing: bool = False) -> None:
        """Print `text` above any progress bar and append it to log_train.txt. closing: print it even with --quiet."""
        if closing and self.bar is not None:
            self.bar.close()
        if processes.is_first() and (closing or not is_quiet()):
            tqdm.write(text)
        self._append("log_train.txt", text)

    def record(self, entries: Mapping[str, Any]) -> None:
        """Append `entries` as one line to metrics.jsonl, flushed to the system before returning."""
        entries = plain(entries)
        if self.bar is not None:
            seen = entries.get("val_accuracy")
            self.bar.set_postfix({} if seen is None else {"meta_val": f"{seen:.1f} %"}, refresh=False)
            self.bar.update()
        self._append(self.metrics_path.name, json.dumps(entries))
        self.board.scalars({k: v for k, v in entries.items() if k != self.by}, entries.get(self.by, 0))

    def settings(self, entries: Mapping[str, Any]) -> None:
        """Write `entries` as config.json, whole or not at all."""
        if processes.is_first():
            write_json(self.folder / "config.json", entries)

    def _append(self, name: str, text: str) -> None:
        if not processes.is_first():
            return
        path = self.folder / name
        with named(path, len(text) + 1), open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")


def read_metrics(path: str | os.PathLike, by: str = "epoch") -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl in order of the entry `by`; [] if the file is missing.

    If an epoch occurs twice, as after a resume, the later line counts. Half a line from a killed run is ignored.
    """
    path, found = Path(path), {}
    for line in _lines(path) if path.exists() else ():
        number = _number_of(line, by)
        if number != sys.maxsize:
            found[number] = json.loads(line)
    return [found[number] for number in sorted(found)]


def read_json(path: str | os.PathLike, kind: type, instead: str = "") -> Any | None:
    """Return the value of a JSON file; None if it is missing, damaged, or not of type `kind`.

    instead: what the run does without a damaged file, for a line on stderr; "" prints nothing.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        value, cause = None, f"is no JSON ({' '.join(str(error).split())[:100]})"
    else:
        cause = f"holds a {type(value).__name__}, expected a {kind.__name__}"
    if isinstance(value, kind):
        return value
    if instead:
        say_damaged(path, f"{cause}; {instead}")
    return None


def say_damaged(path: str | os.PathLike, text: str) -> None:
    """Print on stderr, in the first process, that a file is damaged and what the run does without it."""
    if processes.is_first():
        print(f"{path}: {text}", file=sys.stderr)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON at `path`, whole or not at all. value: as for `plain`."""
    with atomic_file(path) as file:
        file.write((json.dumps(plain(value), indent=2) + "\n").encode())


def write_skipped(folder: str | os.PathLike, *scans: Skipped) -> None:
    """Write the images that a run left out as skipped_images.csv in `folder`, whole or not at all.

    Its columns are path and reason. Rows of an older file stay, unless their folder was scanned again. If there are no
    rows, there is no file. If two programs write at the same time, rows may be lost, but nothing worse.
    """
    if not processes.is_first():
        return
    path = Path(folder) / SKIPPED
    rows: list[tuple[str, str]] = []
    if path.exists():
        try:
            with open(path, newline="", encoding="utf-8") as file:
                every = list(csv.reader(file))
            if every[:1] != [["path", "reason"]] or any(len(row) != 2 for row in every):
                raise ValueError("not two columns, path and reason")
            rows = [(row[0], row[1]) for row in every[1:]]
        except (ValueError, csv.Error) as error:
            say_damaged(path, f"is no such table ({' '.join(str(error).split())}); it is written again")
    for scan in scans:
        for scanned, left_out in scan.items():
            scanned = cell(scanned)
            rows = [row for row in rows if row[0] != scanned and not row[0].startswith(scanned + os.sep)]
            rows += [(cell(skipped), cell(reason)) for skipped, reason in left_out]
    if not rows:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("path", "reason"), *rows])
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def cell(text: str) -> str:
    """Return a text for a CSV, with a leading quote if a spreadsheet would read it as a formula."""
    return f"'{text}" if text.strip()[:1] in {*"=+-@＝＋－＠"} or text[:1] in {*"\t\r\n"} else text


def plain(value: Any) -> Any:
    """Convert `value` to types that JSON has.

    Tensors and arrays become numbers or lists, paths become strings, and numbers that are not finite become None, as
    JSON has no NaN. Raises TypeError for anything else.
    """
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"got a {type(value).__name__}, which JSON cannot hold")


def _lines(path: Path) -> list[str]:
    return path.read_bytes().decode("utf-8", "replace").splitlines()


def _number_of(line: str, by: str) -> int:
    """Return the epoch (or step) of a line of metrics.jsonl; sys.maxsize, which is never kept, for a damaged line."""
    try:
        number = json.loads(line)[by]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return sys.maxsize
    return number if type(number) is int else sys.maxsize


def _end_last_line(path: Path) -> None:
    # A run that was killed while writing leaves half a line. Without a line break the next line would be lost too.
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with named(path), open(path, "ab") as file:
            file.write(b"\n")
