"""What a run folder holds, read with care: a run may be half-way, old or killed, and its files may be anyone's."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from utils.run_log import read_json, read_metrics

HERE = ""  # the place of results that lie in the run folder itself


@dataclass(frozen=True)
class Round:
    """The images of a round: its folder, the file of its labels (of clusters, where it has them), its manifest."""

    number: int
    folder: Path
    labels: Path
    manifest: dict[str, Any]

    @property
    def clustered(self) -> bool:
        """Whether the labels are those of clusters."""
        return self.labels.stem == "clusters"


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        folder: the folder.
        settings: config.json, or of a folder of tests the settings of diffusionmix.py; {} where neither is there.
        epochs: the lines of metrics.jsonl, in order.
        results: results.json of the folder itself (`HERE`) and of the folders in it, by their names.
        starts: environment.json, the oldest start first, then those of the tests in folders in this one.
        damaged: names of files that are there and cannot be read.
    """

    folder: Path
    settings: dict[str, Any]
    epochs: list[dict[str, Any]]
    results: dict[str, dict[str, Any]]
    starts: list[dict[str, Any]]
    damaged: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a folder of main.py or diffusionmix.py. Raises ValueError where it is neither."""
        if not any((folder / name).is_file() for name in ("config.json", "metrics.jsonl", "results.json")):
            raise ValueError(f"{folder}: is no run folder; expected one that main.py or diffusionmix.py made")
        damaged: list[str] = []
        starts = _starts(folder, damaged)
        tested = next((each for each in reversed(starts) if each.get("program") == "diffusionmix.py"), {})
        settings = _json(folder / "config.json", dict, damaged) or tested.get("settings")
        paths = [folder / "results.json", *sorted(folder.glob("*/results.json"))]
        for path in paths[1:]:
            starts += [each for each in _starts(path.parent, damaged) if each.get("program") == "diffusionmix.py"]
        results = {_place(path, folder): _json(path, dict, damaged) for path in paths}
        return cls(
            folder=folder,
            settings=settings if isinstance(settings, dict) else {},
            epochs=[each for each in read_metrics(folder / "metrics.jsonl") if isinstance(each, dict)],
            results={name: each for name, each in sorted(results.items(), key=_by_shot) if each},
            starts=starts,
            damaged=damaged,
        )

    @property
    def start(self) -> dict[str, Any]:
        """The last start of training, or of testing in a folder of tests alone; {} where it was not noted."""
        program = "main.py" if (self.folder / "config.json").exists() else "diffusionmix.py"
        return next((each for each in reversed(self.starts) if each.get("program") == program), {})

    @property
    def preset(self) -> dict[str, Any]:
        """The settings of the scenario and the recipe, {} where they were not noted."""
        preset = self.start.get("preset")
        return preset if isinstance(preset, dict) else {}

    def changed(self) -> dict[str, tuple[Any, Any]]:
        """Settings that were given: name -> (value, that of the preset)."""
        given = self.start.get("settings")
        given = given if isinstance(given, dict) else {}
        return {name: (given[name], value) for name, value in self.preset.items() if given.get(name, value) != value}

    @property
    def last(self) -> dict[str, Any]:
        """The last epoch, {} before the first."""
        return self.epochs[-1] if self.epochs else {}

    def best(self) -> dict[str, Any] | None:
        """The epoch that was best on meta_val, the first of equals; None where none was validated."""
        seen = [each for each in self.epochs if number(each.get("val_accuracy")) is not None]
        return max(seen, key=lambda each: each["val_accuracy"], default=None)

    def rounds(self) -> list[Round]:
        """The rounds whose images are there, in order. Of round 0 the labels of its clusters, where it has them."""
        found = []
        for path in sorted((self.folder / "pseudo").glob("round*/manifest.json")):
            manifest, number_ = _json(path, dict, self.damaged), path.parent.name.removeprefix("round")
            if number_.isdigit():
                clusters = path.parent / "clusters.npy"
                labels = clusters if clusters.exists() else path.parent / "labels.npy"
                found.append(Round(int(number_), path.parent, labels, manifest))
        return sorted(found, key=lambda each: each.number)

    def pool_samples(self) -> list[tuple[str, Path]]:
        """(name, samples.png) of the pool's models, in order, as far as they lie beside their checkpoints."""
        place = self.start.get("pool") or self.settings.get("pool")
        if not isinstance(place, str) or not place or not Path(place).is_dir():
            return []
        paths = [path for path in Path(place).glob("subset*/ckpt/samples.png") if path.is_file()]
        names = [(path.parent.parent.name, path) for path in paths]
        return sorted(names, key=lambda each: (len(each[0]), each[0]))  # subset10 after subset9


def number(value: Any) -> float | None:
    """`value` if it is a finite number, else None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else None


def total(epochs: list[dict[str, Any]], name: str) -> float:
    """The sum of an entry over epochs."""
    return sum(number(each.get(name)) or 0 for each in epochs)


def _json(path: Path, kind: type, damaged: list[str]) -> Any:
    value = read_json(path, kind)
    if value is None and path.exists():
        damaged.append(path.name)
    return kind() if value is None else value


def _starts(folder: Path, damaged: list[str]) -> list[dict[str, Any]]:
    return [each for each in _json(folder / "environment.json", list, damaged) if isinstance(each, dict)]


def _place(path: Path, folder: Path) -> str:
    return HERE if path.parent == folder else path.parent.name


def _by_shot(item: tuple[str, dict]) -> tuple:
    return number(item[1].get("shot")) or 0, item[0]
