"""Meta-testing: episodes -> heads -> results.json.

    python diffusionmix.py                            # the glyphs run of main.py, on its novel classes
    python diffusionmix.py --dataset custom --data-root data/mine --pool ckpt/pools/mine --split meta_val

Each episode has a head of its own, fitted on its support set, on diffusion mixes of it from every pool model, and on
the support set again; and for comparison one fitted on the support alone. All heads are fitted together.
"""

import hashlib
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import Settings, parse
from datasets.episodes import Episodes, EpisodeSampler
from datasets.folder import LabelledImages
from datasets.sources import load_real
from guided_diffusion.dist_util import pick_device
from guided_diffusion.mix import diffusion_mixes, mix_labels, mix_timesteps
from guided_diffusion.pool import Pool, PoolModel
from guided_diffusion.pool_work import work_through
from models.class_learner import load_statistics
from models.episode_head import Heads, Stage, fit_heads, predict
from models.meta_model import MetaModel
from utils import checkpoint, processes
from utils.atomic import atomic_file
from utils.cli import run
from utils.images import to_float, to_uint8
from utils.lock import locked
from utils.machine import note_start
from utils.metrics import accuracy, mean_confidence_interval, paired_difference
from utils.pieces import Pieces, discard
from utils.remote import local
from utils.report import Report
from utils.run_log import write_json, write_skipped
from utils.seeding import generator, noise, numpy_generator

RATES = (0.05, 0.01, 0.05)  # of the head's three stages
MIX_BETA = 0.4  # lambda ~ Beta(0.4, 0.4)
SHOWN = 4  # support images whose mixes, and pool models whose mixes of them, mixes.npz keeps for the report
MAY_CHANGE = ("save_dir", "resume", "workers", "device", "gpu_devices")  # between a stopped test and its going on


class Testing:
    """One evaluation: a trained meta-model, the real images of unseen classes in `root`, and the pool for the mixes."""

    def __init__(self, settings: Settings, root: Path):
        s = self.s = settings
        self.device = pick_device(s.device_name)
        path = local(s.resume) if s.resume else s.run_folder / "best_model.pt"
        self.model, self.size = load_model(path, self.device)
        same = {k: v for k, v in s.as_dict().items() if k not in MAY_CHANGE} | {"root": str(root), "shown": SHOWN}
        made_with = hashlib.sha256(path.read_bytes() + json.dumps(same).encode()).hexdigest()
        self.pieces = Pieces(s.run_folder / "mixes" / made_with[:16])  # of this model and these settings alone
        self.images: LabelledImages = load_real(s.dataset, [root], s.test_split, self.size)
        sampler = EpisodeSampler(self.images.labels, s.way, s.shot, s.nTestNovel // s.way)
        self.episodes: Episodes = sampler.sample_indexed(0, s.episodes, s.seed, f"test {s.test_split}")
        self.pool = Pool(local(s.pool_place), s.bare_checkpoint_flags()) if s.mix else None
        for m in range(len(self.pool) if self.pool else 0):  # what is wrong with one is said before others are at work
            mix_timesteps(s.mix_level, s.mix_steps, self.pool.load(m).flags["diffusion_steps"])

    def run(self) -> tuple[Tensor, Tensor]:
        """Accuracy in percent of every episode, with mixes and without: (E,), (E,)."""
        s = self.s
        features = self.features(to_float(self.images.images))
        e = self.episodes
        support, query = features[e.support], features[e.query]  # (E, S, D), (E, Q, D)
        targets = torch.nn.functional.one_hot(e.support_labels, s.way).float()
        plain = self.score(support, targets, [(support, targets), (support, targets)], (RATES[0], RATES[2]), query)
        mixed = plain
        if self.pool:
            mixes, mix_targets = self.mixes(targets)
            sets = [(support, targets), (mixes, mix_targets), (support, targets)]
            mixed = self.score(support, targets, sets, RATES, query)
        return mixed, plain

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Unit-length features (N, D) of images (N, 3, H, W), on the CPU."""
        return torch.cat([self.model.embed(part.to(self.device)).cpu() for part in images.split(500)])

    def score(self, support: Tensor, targets: Tensor, sets: list, rates: tuple, query: Tensor) -> Tensor:
        """Accuracy (E,) in percent of heads fitted on `sets` one after the other."""
        s = self.s
        stages = [Stage(x, y, s.head_steps, rate) for (x, y), rate in zip(sets, rates, strict=True)]
        rngs = [generator(s.seed, "head", i) for i in range(len(support))] if s.head_init == "random" else None
        heads: Heads = fit_heads(support, targets, stages, scale=s.head_scale, init=s.head_init, generators=rngs)
        return accuracy(predict(heads, query), self.episodes.query_labels)

    def mixes(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Features (E, M * S, D) and soft labels (E, M * S, way) of the mixes of every pool model.

        One pool model after the other, so that each checkpoint is read once; its mixes in full batches, which are kept
        until the test is done. Several processes share them out.
        """
        s, (count, shots) = self.s, self.episodes.support.shape
        partners = [self.partners(m) for m in range(len(self.pool))]
        made = work_through(
            self.pool,
            [count * shots] * len(self.pool),
            partial(self.mix_part, partners),
            self.pieces,
            batch=s.sample_batch,
            device=self.device,
            precision=s.precision,
            desc="mixes",
        )
        features, self.pictures = made["features"].unflatten(0, (len(self.pool), count, shots)), made["pictures"]
        labels = [
            mix_labels(targets, targets.gather(1, order[..., None].expand_as(targets)), weight)
            for order, weight in partners
        ]
        return features.transpose(0, 1).flatten(1, 2), torch.cat(labels, 1)

    def partners(self, m: int) -> tuple[Tensor, Tensor]:
        """Of each support image its partner in the mixes of model m (E, S), and its own share of them (E, S)."""
        episodes, shots = self.episodes.support.shape
        rngs = [numpy_generator(self.s.seed, "mix", m, i) for i in range(episodes)]
        order = torch.stack([torch.from_numpy(rng.permutation(shots)) for rng in rngs])
        weight = torch.stack([torch.from_numpy(rng.beta(MIX_BETA, MIX_BETA, shots)) for rng in rngs])
        return order, weight.float()

    def mix_part(
        self, partners: list[tuple[Tensor, Tensor]], member: PoolModel, m: int, part: Tensor
    ) -> dict[str, Tensor]:
        """The `features` of mixes number `part` of pool model m, and `pictures` of those of them that are shown."""
        s, size, support, (order, weight) = self.s, member.image_size, self.episodes.support, partners[m]
        pairs = (support.flatten()[part], support.gather(1, order).flatten()[part])
        x_a, x_b = (self.resized(self.images.images[index], size) for index in pairs)
        eps = noise((3, size, size), part.tolist(), s.seed, "mix noise", m).to(self.device)
        local = part.to(self.device) % member.flags["num_classes"] if member.class_cond else None
        mixed = diffusion_mixes(
            member, x_a, x_b, weight.flatten()[part].to(self.device), eps,
            level=s.mix_level, steps=s.mix_steps, local_labels=local,
        )  # fmt: skip
        if size != self.size:
            mixed = torch.nn.functional.interpolate(mixed, (self.size, self.size), mode="bilinear", antialias=True)
        kept = [i for i, item in enumerate(part.tolist()) if self.shown(m, item)]
        return {"features": self.features(mixed), "pictures": to_uint8(mixed[kept]).cpu()}

    def shown(self, m: int, item: int) -> bool:
        """Whether mix number `item` of pool model m is one of the few that the report shows."""
        shots = self.episodes.support.shape[1]
        return m < SHOWN and item in {i * shots // SHOWN for i in range(SHOWN)}  # of the first episode, several classes

    def save_mixes(self) -> None:
        """Write the mixes that the report shows as mixes.npz, once `run` has made them; without mixes, none.

        x_a, x_b and mix: (M, K, 3, H, W) uint8, of the first M pool models; share: (M, K), of x_a.
        """
        path, support = self.s.run_folder / "mixes.npz", self.episodes.support[0]
        items = [i for i in range(len(support)) if self.shown(0, i)]
        models = range(min(SHOWN, len(self.pool)) if self.pool else 0)
        if not models:
            path.unlink(missing_ok=True)  # of an earlier test
            return
        partners = [self.partners(m) for m in models]
        with atomic_file(path) as file:
            np.savez(
                file,
                x_a=self.images.images[support[items]].expand(len(models), -1, -1, -1, -1).numpy(),
                x_b=torch.stack([self.images.images[support[order[0][items]]] for order, _ in partners]).numpy(),
                mix=self.pictures.unflatten(0, (len(models), len(items))).numpy(),
                share=torch.stack([weight[0][items] for _, weight in partners]).numpy(),
            )

    def resized(self, images: Tensor, size: int) -> Tensor:
        """uint8 images as floats on the device, at a pool model's size."""
        pictures = to_float(images.to(self.device))
        if size == self.size:
            return pictures
        return torch.nn.functional.interpolate(pictures, (size, size), mode="bilinear", antialias=True)


def evaluate(settings: Settings, tests: list[Testing]) -> dict:
    """Test on every domain; what results.json holds. Accuracies in percent, over the episodes of all domains."""
    s, started = settings, time.perf_counter()
    outcomes = [test.run() for test in tests]
    write_skipped(s.run_folder, *(test.images.skipped for test in tests))
    mixed, plain = (torch.cat(part) for part in zip(*outcomes, strict=True))
    pool, device = tests[0].pool, tests[0].device
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
        "mix_steps": s.mix_steps if pool else 0,
        "pool_models": len(pool) if pool else 0,
        "precision": s.precision,
        "device": str(device),
        "torch": torch.__version__,
    }
    if len(tests) > 1:
        results["domains"] = {
            root.name: figures(*outcome) for root, outcome in zip(s.data_paths, outcomes, strict=True)
        }
    return results | {"by_episode": mixed.tolist(), "by_episode_without_mix": plain.tolist()}


def figures(mixed: Tensor, plain: Tensor) -> dict[str, float]:
    """Means with their 95 % half-widths, and the paired difference, of accuracies (E,) with mixes and without."""
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


def load_model(path: Path, device: torch.device) -> tuple[MetaModel, int]:
    """The meta-model of a run in eval mode, and the size of the images that it was trained on."""
    if not path.exists():
        raise ValueError(f"{path}: no such checkpoint; make it with python main.py, or name one with --resume")
    state = checkpoint.load(path, device)
    wanted = ("model", "model_statistics", "num_classes", "image_size", "settings")
    if not isinstance(state, dict) or any(name not in state for name in wanted):
        raise ValueError(f"{path}: is no checkpoint of main.py; give best_model.pt or last.pt of a run")
    settings = state["settings"]
    model = MetaModel(state["num_classes"], settings["scale_cls"], settings["backbone"]).to(device)
    checkpoint.load_state(model, state["model"], path)
    load_statistics(model, state["model_statistics"])
    return model.eval(), state["image_size"]


def main() -> None:
    """Parse, test, report."""
    settings = parse(description="Meta-test with diffusion mixes.")
    tests = [Testing(settings, root) for root in settings.data_paths]  # refuses what is wrong before it makes a folder
    with locked(settings.run_folder):
        note_start(settings.run_folder, "diffusionmix.py", tests[0].device, settings.notes())
        results = evaluate(settings, tests)
        if processes.is_first():
            tests[0].save_mixes()
            say(settings, results)
        discard(settings.run_folder / "mixes")
        Report(settings.run_folder).write()
    trained = settings.run_folder.parent
    if (trained / "metrics.jsonl").exists():  # the test lies in the folder of its training, whose report shows it too
        Report(trained).write()


def say(settings: Settings, results: dict) -> None:
    """Write results.json and say what came out."""
    path = settings.run_folder / "results.json"
    write_json(path, results)
    for name, part in results.get("domains", {}).items():
        print(f"{name}: {part['accuracy']:.2f} +- {part['ci95']:.2f} % with mixes, {part['paired_difference']:+.2f}")
    print(
        f"{results['way']}-way {results['shot']}-shot on {results['split']}: {results['accuracy']:.2f} +- "
        f"{results['ci95']:.2f} % with mixes, {results['accuracy_without_mix']:.2f} +- "
        f"{results['ci95_without_mix']:.2f} % without, {results['paired_difference']:+.2f} +- "
        f"{results['paired_ci95']:.2f} paired, {results['episodes']} episodes, {results['seconds']:.0f} s; {path}"
    )


if __name__ == "__main__":
    run(main)
