"""Meta-testing: episodes -> heads -> results.

    python diffusionmix.py                            # the glyphs run of main.py, on its novel classes
    python diffusionmix.py --dataset custom --data-root data/mine --pool ckpt/pools/mine --split meta_val
    python diffusionmix.py --compare ckpt/runs/other                        # this run's last test minus that one's
    python diffusionmix.py --support data/few --query data/unlabelled       # labels your own images: predictions.csv

Each episode has a head of its own, fitted on its support set, on diffusion mixes of it from every pool model, and on
the support set again; and for comparison one fitted on the support alone. All heads are fitted together.
"""

import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dry_run
from config import Settings, parse, that_affect
from datasets.episodes import Episodes, EpisodeSampler
from datasets.folder import LabelledImages
from datasets.sources import load_real
from few_shot import HeadFitter
from guided_diffusion.costs import free_memory
from models.episode_head import predict
from own_images import OwnImages
from report import Report
from utils import processes, progress
from utils.atomic import atomic_file
from utils.cli import run
from utils.environment import note_start
from utils.images import to_float
from utils.lock import locked
from utils.metrics import accuracy, mean_confidence_interval, paired_difference
from utils.pieces import digest_of, discard
from utils.run_log import read_json, write_json, write_skipped
from utils.tensorboard import Board

SAME = ("dataset", "split", "way", "shot", "query", "episodes", "seed", "images")  # of two tests on the same episodes
METHOD = ("model", "mix_steps", "mix_level", "pool", "pool_models", "head_steps", "head_init", "head_scale")  # tested
TRAINED = ("source", "dataset", "recipe", "seed", "num_classes", "samples_per_class")  # told in results.json
SHOWN = 4  # support images whose mixes, and pool models whose mixes of them, mixes.npz keeps for the report


class Testing:
    """One evaluation: a trained meta-model, the real images of unseen classes in `root`, and the pool for the mixes."""

    def __init__(self, settings: Settings, root: Path):
        s = self.s = settings
        self.fitter = HeadFitter(s)
        s.check_episodes(len(self.fitter.pool or ()), self.fitter.model.feature_dim, free_memory())
        self.images: LabelledImages = load_real(s.dataset, [root], s.test_split, self.fitter.size, workers=s.workers)
        s.check_images(f"{root}/{s.test_split}", self.images.counts())
        sampler = EpisodeSampler(self.images.labels, s.way, s.shot, s.nTestNovel // s.way)
        self.episodes: Episodes = sampler.sample_indexed(0, s.episodes, s.seed, f"test {s.test_split}")
        found = self.images
        self.pieces = self.fitter.pieces("mixes", found.images, found.labels, torch.tensor(SHOWN))
        self.chosen = [self.to_show(m) for m in range(min(SHOWN, len(self.fitter.pool or ())))]

    def run(self) -> tuple[Tensor, Tensor]:
        """Return the accuracy in percent of every episode, with mixes and without: (E,), (E,)."""
        features = self.fitter.features(to_float(self.images.images))
        e = self.episodes
        support, query = features[e.support], features[e.query]  # (E, S, D), (E, Q, D)
        targets = torch.nn.functional.one_hot(e.support_labels, self.s.way).float()
        plain = self.score(support, targets, None, query)
        mixed = self.score(support, targets, self.mixes(targets), query) if self.fitter.pool else plain
        return mixed, plain

    def mixes(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (E, M * S, D) and soft labels (E, M * S, way) of the mixes of every pool model."""
        *mixes, self.pictures = self.fitter.mixes(
            self.images.images, self.episodes.support, targets, self.pieces, self.shown
        )
        return mixes

    def score(self, support: Tensor, targets: Tensor, mixes: tuple[Tensor, Tensor] | None, query: Tensor) -> Tensor:
        """Return the accuracy (E,) in percent of heads fitted on the support, `mixes` if any, and the support again."""
        return accuracy(predict(self.fitter.fit(support, targets, mixes), query), self.episodes.query_labels)

    def shown(self, m: int, item: int) -> bool:
        """Whether mix number `item` of pool model m is one of the few that the report shows."""
        return m < len(self.chosen) and item in self.chosen[m]

    def to_show(self, m: int) -> list[int]:
        """Choose the mixes of pool model m to show: of the first episodes, of several classes, of two images."""
        order, _ = self.first_partners(m)
        with_itself = (order == torch.arange(order.shape[1])).flatten().long()
        among = with_itself.argsort(stable=True)[: order.shape[1]].sort().values
        return sorted({int(among[k * len(among) // SHOWN]) for k in range(SHOWN)})

    def first_partners(self, m: int) -> tuple[Tensor, Tensor]:
        """Return partners and shares, of the first episodes alone."""
        return self.fitter.partners(m, min(SHOWN, self.s.episodes), self.episodes.support.shape[1])

    def save_mixes(self) -> None:
        """Write the mixes that the report shows as mixes.npz, once `run` has made them; without mixes, none.

        x_a, x_b and mix: (M, K, 3, H, W) uint8, of the first M pool models; share: (M, K), of x_a.
        """
        path, images = self.s.run_folder / "mixes.npz", self.images.images
        if not self.chosen:
            path.unlink(missing_ok=True)  # of an earlier test
            return
        first, x_b, share = self.episodes.support[:SHOWN], [], []
        for m, items in enumerate(self.chosen):
            order, weight = self.first_partners(m)
            x_b.append(images[first.gather(1, order).flatten()[items]])
            share.append(weight.flatten()[items])
        with atomic_file(path) as file:
            np.savez(
                file,
                x_a=images[first.flatten()[torch.tensor(self.chosen)]].numpy(),
                x_b=torch.stack(x_b).numpy(),
                mix=self.pictures.unflatten(0, (len(self.chosen), -1)).numpy(),
                share=torch.stack(share).numpy(),
            )


def evaluate(settings: Settings, tests: list[Testing]) -> dict:
    """Test on every domain; what results.json holds. Accuracies in percent, over the episodes of all domains."""
    s, started = settings, time.perf_counter()
    outcomes = [test.run() for test in tests]
    write_skipped(s.run_folder, *(test.images.skipped for test in tests))
    mixed, plain = (torch.cat(part) for part in zip(*outcomes, strict=True))
    pool, device = tests[0].fitter.pool, tests[0].fitter.device
    results = {
        "dataset": s.dataset,
        "split": s.test_split,
        "way": s.way,
        "shot": s.shot,
        "query": s.nTestNovel // s.way,
        "episodes": len(mixed),
        "seed": s.seed,
        **figures(mixed, plain),
        "seconds": time.perf_counter() - started,
        **{f"trained_{name}": tests[0].fitter.trained.get(name) for name in TRAINED},
        "images": digest_of(*(part for test in tests for part in (test.images.images, test.images.labels))),
        "model": str(tests[0].fitter.path),
        "head_steps": s.head_steps,
        "head_init": s.head_init,
        "head_scale": s.head_scale,
        "mix_level": s.mix_level if pool else 0,
        "mix_steps": s.mix_steps if pool else 0,
        "pool": pool.digest() if pool else "",
        "pool_models": len(pool) if pool else 0,
        "precision": tests[0].fitter.precision,
        "device": str(device),
        "torch": torch.__version__,
    }
    if len(tests) > 1:
        results["domains"] = {
            root.name: figures(*outcome) for root, outcome in zip(s.data_paths, outcomes, strict=True)
        }
    return results | {"by_episode": mixed.tolist(), "by_episode_without_mix": plain.tolist()}


def notes_of(fitter: HeadFitter) -> dict:
    """Return what to note of a test: `Settings.notes`, with the training settings of its checkpoint."""
    s = fitter.s
    told = {name: fitter.trained[name] for name in that_affect("training") & fitter.trained.keys()}
    preset = replace(s, recipe=told.get("recipe", s.recipe)).preset() | {"num_classes": told["num_classes"]}
    trained = {"model": str(fitter.path), **fitter.trained}
    return s.notes() | {"settings": s.as_dict() | told, "preset": preset, "trained": trained}


def figures(mixed: Tensor, plain: Tensor) -> dict[str, float]:
    """Return means of accuracies (E,) with mixes and without, and their paired difference, with 95 % half-widths."""
    accuracy_, ci95 = mean_confidence_interval(mixed)
    without, without_ci95 = mean_confidence_interval(plain)
    difference, difference_ci95 = paired_difference(mixed, plain)
    return {
        "accuracy": accuracy_,
        "ci95": ci95,
        "accuracy_without_mix": without,
        "ci95_without_mix": without_ci95,
        "paired_difference": difference,
        "paired_ci95": difference_ci95,
    }


def main() -> None:
    """Parse; test and report, or label one's own pictures."""
    settings = parse(description="Meta-test with diffusion mixes, or label your own images.", command="testing")
    progress.hush(settings.quiet)
    if settings.compare:
        return compare(settings)
    if settings.support:
        own = OwnImages(settings)
        if settings.dry_run:
            return dry_run.of_testing(settings, own.fitter, len(own.support.labels))
        with locked(settings.run_folder):
            write_skipped(own.path.parent, own.support.skipped, own.skipped)
            probabilities = own.label()
            if processes.is_first():
                own.write(probabilities)
                own.say_what_to_expect()
                own.write_page(probabilities)
            discard(settings.run_folder / "own_mixes")
        return None
    tests = [Testing(settings, root) for root in settings.data_paths]  # refuses what is wrong before it makes a folder
    if settings.dry_run:
        support = sum(test.episodes.support.numel() for test in tests)
        return dry_run.of_testing(settings, tests[0].fitter, support)
    with locked(settings.run_folder):
        progress.say(opening(settings, tests))
        note_start(settings.run_folder, "diffusionmix.py", tests[0].fitter.device, notes_of(tests[0].fitter))
        results = evaluate(settings, tests)
        if processes.is_first():
            tests[0].save_mixes()
            say(settings, results)
            save_episodes(settings.run_folder / "episodes.npz", tests)
        discard(settings.run_folder / "mixes")
        Report(settings.run_folder).write()
    trained = settings.run_folder.parent
    if (trained / "metrics.jsonl").exists():  # the test lies in the folder of its training, whose report shows it too
        Report(trained).write()


def opening(s: Settings, tests: list[Testing]) -> str:
    """Return a line that says what is about to happen."""
    images, classes = (sum(len(getattr(test.images, part)) for test in tests) for part in ("labels", "class_names"))
    fitter = tests[0].fitter
    mixes = f"mixes from {len(fitter.pool)} models ({s.pool_place})" if fitter.pool else "no mixes"
    return (
        f"{s.dataset}: {s.episodes} episodes, {s.way}-way {s.shot}-shot, on {images:,} images of {classes} classes of "
        f"{s.test_split}, {mixes}; {fitter.path}, {fitter.device}"
    )


def say(settings: Settings, results: dict) -> None:
    """Write results/NAME.json, which no other test overwrites, and results.json, the last test; say what came out."""
    path, kept = settings.run_folder / "results.json", place_of(settings.run_folder / "results", results)
    for file in (kept, path):
        write_json(file, results)
    names = ("accuracy", "accuracy_without_mix", "paired_difference")
    Board(settings.run_folder, wanted=settings.tensorboard).scalars(
        {f"test/{name}": results[name] for name in names}, 0
    )
    mixed = results["pool_models"] > 0
    for name, part in results.get("domains", {}).items():
        progress.say(f"{name}: {accuracies(part, mixed)}")
    print(
        f"{results['way']}-way {results['shot']}-shot on {results['split']}: {accuracies(results, mixed)}, "
        f"{results['episodes']} episodes, {results['seconds']:.0f} s; {kept}"
    )


def accuracies(part: dict, mixed: bool) -> str:
    """Return the accuracies of a test, or of one of its domains, in words. mixed: whether there were mixes."""
    plain = f"{part['accuracy_without_mix']:.2f} +- {part['ci95_without_mix']:.2f} % without"
    if not mixed:
        return f"{plain} mixes"
    return (
        f"{part['accuracy']:.2f} +- {part['ci95']:.2f} % with mixes, {plain}, "
        f"{part['paired_difference']:+.2f} +- {part['paired_ci95']:.2f} paired"
    )


def save_episodes(path: Path, tests: list[Testing]) -> None:
    """Write the images of every episode, for another method to be tested on the same.

    support (E, way * shot), query (E, way * query), classes (E, way): int64, per domain after its name if there are
    several. Images are numbered class by class, the classes by name, and the images of a class by path.
    """
    arrays = {}
    for test, root in zip(tests, tests[0].s.data_paths, strict=True):
        prefix = f"{root.name}_" if len(tests) > 1 else ""
        for name in ("support", "query", "classes"):
            arrays[prefix + name] = getattr(test.episodes, name).numpy()
    with atomic_file(path) as file:
        np.savez_compressed(file, **arrays)


def place_of(folder: Path, results: dict) -> Path:
    """Return where in `folder` a test belongs: the file of the same test, or the first free name."""
    name = f"{results['split']}-{results['way']}way-{results['shot']}shot"
    for number in count(1):
        path = folder / (f"{name}.json" if number == 1 else f"{name}-{number}.json")
        old = read_json(path, dict)
        if old is None or all({"pool": results["pool"], **old}.get(key) == results[key] for key in (*SAME, *METHOD)):
            return path  # older files do not name the pool


def compare(settings: Settings) -> None:
    """Print the paired difference between two tests on the same episodes: this run's and that of --compare.

    Raises ValueError if one is missing, or their episodes differ.
    """
    paths, found = [settings.run_folder, Path(settings.compare)], []
    files = [path / "results.json" if path.is_dir() else path for path in paths]
    for file in files:
        results = read_json(file, dict)
        if results is None or not {"by_episode", *SAME} <= results.keys():
            raise ValueError(f"{file}: no results of a test; run diffusionmix.py there, or name another file")
        found.append(results)
    one, other = found
    if files[0].resolve() == files[1].resolve():
        raise ValueError(f"got --compare {paths[1]}, which is this run; name another, or give this one --save-dir")
    if differ := [f"{name} {one[name]!r} and {other[name]!r}" for name in SAME if one[name] != other[name]]:
        raise ValueError(f"got tests of other episodes: {', '.join(differ)}; test both with the same settings")
    difference, half = paired_difference(one["by_episode"], other["by_episode"])
    for path, results in zip(paths, found, strict=True):
        progress.say(f"{path}: {results['accuracy']:.2f} +- {results['ci95']:.2f} %")
    if processes.is_first():
        print(f"first minus second: {difference:+.2f} +- {half:.2f}, paired over {one['episodes']} episodes")


if __name__ == "__main__":
    run(main)
