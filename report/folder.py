"""Read a run folder with care: the run may be unfinished, old or killed, and its files may come from anyone."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from utils.run_log import read_json, read_metrics

DAMAGED = (  # what reading damaged files raises
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError, EOFError, RecursionError,
)  # fmt: skip
HERE = ""  # the place of results that lie in the run folder itself
SAME_EPISODES = ("dataset", "split", "way", "shot", "query", "episodes", "seed", "images")  # equal: the same
SAME_NETWORK = ("dataset", "seed", "backbone", "features")  # equal: as good with random weights, for one seed
SAME_NOISE = ("dataset", "seed", "recipe", "num_classes", "samples_per_class", "sample_steps", "renoise", "image_size")


@dataclass(frozen=True)
class Round:
    """The images of a round: its folder, the file of its labels (the clusters, if there are any), its manifest."""

    number: int
    folder: Path
    labels: Path
    manifest: dict[str, Any]

    @property
    def clustered(self) -> bool:
        """Whether the labels are clusters."""
        return self.labels.stem == "clusters"

    @property
    def hit_rate(self) -> float | None:
        """The share of images, 0 to 1, that the guide takes for the class asked for; None in an unguided round."""
        return number(self.manifest.get("hit_rate"))

    @property
    def hit_rates(self) -> list[float | None]:
        """The hit rate of each class, [] if it was not noted."""
        rates = self.manifest.get("hit_rate_by_class")
        return [number(rate) for rate in rates] if isinstance(rates, list) else []


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        folder: the folder.
        settings: config.json, or the settings of diffusionmix.py in a folder of tests; {} without either.
        epochs: the lines of metrics.jsonl, in order.
        results: of the tests here and in the folders in this one: (`HERE` or the folder's name, name in results/) ->
            result. The second name is "" if the folder has one test.
        starts: environment.json, the oldest start first, then the starts of the tests in the folders in this one.
        damaged: names of files that cannot be read.
    """

    folder: Path
    settings: dict[str, Any]
    epochs: list[dict[str, Any]]
    results: dict[tuple[str, str], dict[str, Any]]
    starts: list[dict[str, Any]]
    damaged: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a folder that main.py or diffusionmix.py made. Raise ValueError for any other."""
        if not is_run(folder):
            raise ValueError(f"{folder}: is not a run folder; give one that main.py or diffusionmix.py made")
        damaged: list[str] = []
        starts = _starts(folder, damaged)
        tested = next((each for each in reversed(starts) if each.get("program") == "diffusionmix.py"), {})
        settings = _json(folder / "config.json", dict, damaged) or tested.get("settings")
        results = _results(folder, HERE, damaged)
        for path in sorted(folder.glob("*/results.json")):
            starts += [each for each in _starts(path.parent, damaged) if each.get("program") == "diffusionmix.py"]
            results |= _results(path.parent, path.parent.name, damaged)
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
        """The last start of training, or of testing in a folder that has only tests; {} if it was not noted."""
        program = "main.py" if (self.folder / "config.json").exists() else "diffusionmix.py"
        return next((each for each in reversed(self.starts) if each.get("program") == program), {})

    @property
    def preset(self) -> dict[str, Any]:
        """The settings of the scenario and the recipe; {} if they were not noted."""
        preset = self.start.get("preset")
        return preset if isinstance(preset, dict) else {}

    def changed(self) -> dict[str, tuple[Any, Any]]:
        """Return the settings that differ from the preset: name -> (value, the preset's)."""
        given = self.start.get("settings")
        given = given if isinstance(given, dict) else {}
        return {name: (given[name], value) for name, value in self.preset.items() if given.get(name, value) != value}

    @property
    def last(self) -> dict[str, Any]:
        """The last epoch, {} before the first."""
        return self.epochs[-1] if self.epochs else {}

    @property
    def weights(self) -> str:
        """The checkpoint whose weights a run of --source none only validates; "" for random weights and other runs."""
        only = self.settings.get("source") == "none" and (self.folder / "config.json").is_file()
        return str(self.settings.get("resume") or "") if only else ""

    def best(self) -> dict[str, Any] | None:
        """Return the epoch that was best on meta_val, the first of equals; None without a validation."""
        seen = [each for each in self.epochs if number(each.get("val_accuracy")) is not None]
        return max(seen, key=lambda each: each["val_accuracy"], default=None)

    def rounds(self) -> list[Round]:
        """Return the rounds whose images are there, in order."""
        found = []
        for path in sorted((self.folder / "pseudo").glob("round*/manifest.json")):
            manifest, number_ = _json(path, dict, self.damaged), path.parent.name.removeprefix("round")
            if number_.isdigit():
                clusters = path.parent / "clusters.npy"
                labels = clusters if clusters.exists() else path.parent / "labels.npy"
                found.append(Round(int(number_), path.parent, labels, manifest))
        return sorted(found, key=lambda each: each.number)

    @property
    def finished(self) -> bool:
        """Whether every epoch is done."""
        return (number(self.last.get("epoch")) or 0) >= (number(self.settings.get("max_epoch")) or 0)

    @property
    def training(self) -> "Run":
        """The run whose model was tested: the folder above a folder of tests, else this one."""
        above = self.folder.resolve().parent
        alone = (self.folder / "config.json").is_file() or not (above / "config.json").is_file()
        return self if alone else Run.read(above)

    def beside(self, source: str, same: tuple[str, ...] = ()) -> "Run | None":
        """Return a run of `source` on the same data in the folder that this run's training is in; None without one.

        same: settings that must be equal, besides the data set, the seed and the network.
        """
        own = self.training
        for path in sorted(own.folder.resolve().parent.glob("*/config.json")):
            other = read_json(path, dict) or {}
            if source == "none" and other.get("resume"):
                continue  # the weights of another run, which are not random
            equal = all(other.get(name) == own.settings.get(name) for name in (*SAME_NETWORK, *same))
            if other.get("source") == source and equal:
                if _content(other, "meta_val") == _content(own.settings, "meta_val"):
                    return Run.read(path.parent)
        return None

    def same_noise(self, other: "Run") -> bool:
        """Whether image i of a round began with the same noise in both runs."""
        pools = {_content(each.settings, "pool") for each in (self, other)}
        same = all(self.settings.get(name) == other.settings.get(name) for name in SAME_NOISE)
        return same and len(pools) == 1 and None not in pools

    def test_like(self, result: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return this run's result on the same episodes as `result`; None without one."""
        return next((each for each in self.results.values() if same_episodes(each, result)), None)

    @property
    def pool_place(self) -> Path | None:
        """The folder of the pool, None if it is not on this machine."""
        place = self.start.get("pool") or self.settings.get("pool")
        return Path(place) if isinstance(place, str) and place and Path(place).is_dir() else None

    def pool_samples(self) -> list[tuple[str, Path]]:
        """Return (name, samples.png) of each pool model that has them beside its checkpoint, in order."""
        paths = self.pool_place.glob("subset*/ckpt/samples.png") if self.pool_place else ()
        names = [(path.parent.parent.name, path) for path in paths if path.is_file()]
        return sorted(names, key=lambda each: (len(each[0]), each[0]))  # subset10 after subset9

    def memorisation(self) -> dict[str, dict[str, Any]]:
        """Return what the pool's training noted about copying, by model; {} if nothing was noted."""
        index = read_json(self.pool_place / "pool.json", dict) if self.pool_place else None
        figures = (index or {}).get("memorisation")
        return {k: v for k, v in figures.items() if isinstance(v, dict)} if isinstance(figures, dict) else {}


def is_run(folder: Path) -> bool:
    """Whether main.py or diffusionmix.py made this folder."""
    return any((folder / name).is_file() for name in ("config.json", "metrics.jsonl", "results.json"))


def same_episodes(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two results were scored on the same episodes, one by one."""
    return all(a.get(name) == b.get(name) for name in SAME_EPISODES)


def scores(result: Mapping[str, Any], mixed: bool) -> list[float] | None:
    """Return the accuracy of each episode in percent, with mixes or without; None if it was not noted."""
    values = result.get("by_episode" if mixed else "by_episode_without_mix")
    good = isinstance(values, list) and len(values) > 1 and None not in map(number, values)
    return values if good else None


def number(value: Any) -> float | None:
    """Return `value` if it is a finite number, else None."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return value if abs(value) <= sys.float_info.max else None  # also false of NaN, and of integers beyond floats


def total(epochs: list[dict[str, Any]], name: str) -> float:
    """Return the sum of an entry over epochs."""
    return sum(number(each.get(name)) or 0 for each in epochs)


def _json(path: Path, kind: type, damaged: list[str]) -> Any:
    value = read_json(path, kind)
    if value is None and path.exists():
        damaged.append(path.name)
    return kind() if value is None else value


def _starts(folder: Path, damaged: list[str]) -> list[dict[str, Any]]:
    return [each for each in _json(folder / "environment.json", list, damaged) if isinstance(each, dict)]


def _content(settings: Mapping[str, Any], name: str) -> Any:
    """Return the digest of the pool or of a split, None if it was not noted."""
    contents = settings.get("contents")
    return contents.get(name) if isinstance(contents, dict) else None


def _results(folder: Path, place: str, damaged: list[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the results in results/, or of an older test results.json."""
    paths = sorted((folder / "results").glob("*.json")) or [folder / "results.json"]
    return {(place, path.stem if len(paths) > 1 else ""): _json(path, dict, damaged) for path in paths}


def _by_shot(item: tuple[tuple[str, str], dict]) -> tuple:
    return number(item[1].get("shot")) or 0, item[0]
