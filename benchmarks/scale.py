"""Estimate GPU hours, memory and disk of the paper's scenarios, from counted operations and an assumed efficiency.

    python -m benchmarks.scale                      # one H100
    python -m benchmarks.scale --gpus 8 --card a100

Operations, parameters, bytes and images are counted, on the meta device and from the settings of `main.py`. The share
of its peak that a card reaches is assumed: give --efficiency and --learner-efficiency if you have measured them. None
of this was run on a GPU. docs/scale.md has the tables.
"""

import argparse
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import unet_flags, unet_settings
from benchmarks.paper import NAMES, SHOTS
from config import SCENARIOS, Settings, parse
from guided_diffusion.costs import image_bytes, image_flops
from guided_diffusion.train_flags import TrainSettings
from models.meta_model import MetaModel
from schedule import phases
from utils.cli import OneLineParser, run

PEAK = {  # dense TFLOP/s in the maker's data sheet: bf16, TF32
    "h100": (989.0, 494.0),  # H100 SXM
    "a100": (312.0, 156.0),  # A100 SXM
}


class Network(NamedTuple):
    """A pool model: operations per image, forward and with the backward pass, and its number of weights.

    The labels of a class-conditional model add no operations and almost no weights.
    """

    forward: int
    training: int
    weights: int


@dataclass(frozen=True)
class Cost:
    """The cost of a scenario with one training seed.

    pretraining, drawing, guiding, learning, testing: operations, 2 per multiply-add; testing covers 1 and 5 shots.
    models: number of pool models; disk: bytes of their checkpoints and of the pseudo images.
    """

    models: int
    pretraining: float
    drawing: float
    guiding: float
    learning: float
    testing: float
    disk: float


@cache
def learner_flops(features: str, backbone: str, size: int) -> tuple[int, int]:
    """Return the meta-model's operations per image: forward, and with the backward pass."""
    found, model = [], MetaModel(64, backbone=backbone, features=features, image_size=size)
    for training in (False, True):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
            out = model.classify(torch.zeros(2, 3, size, size))
            if training:
                out.sum().backward()
        found.append(counter.get_total_flops() // 2)
    return found[0], found[1]


def cost(s: Settings, network: Network, steps: int, batch: int) -> Cost:
    """Return the cost of a scenario. network: every pool model; steps, batch: of pretraining each of them."""
    scenario, plan = SCENARIOS[s.dataset], phases(s)
    models, images = -(-s.num_classes // scenario.per_model), s.num_classes * s.samples_per_class
    look, learn = learner_flops(s.features, s.backbone, s.image_size)
    rounds = {phase.round: phase.guided for phase in plan}
    guided = sum(rounds.values())
    drawn = len(rounds) + (guided if s.finds_classes else 0)  # guided rounds are drawn unguided first
    views = s.views if s.recipe == "clusters" else 1
    per_step = s.image_batch * learn
    if s.recipe == "paper":  # f and g learn on episodes; h sees as many images, clean and noised
        per_step = s.train_batch * (s.way * s.shot + s.train_nTestNovel) * (learn + 2 * look)
    return Cost(
        models=models,
        pretraining=models * steps * batch * network.training,
        drawing=drawn * images * s.sample_steps * network.forward,
        guiding=guided * images * s.sample_steps * views * learn,
        learning=len(plan) * s.epoch_steps * per_step,
        testing=sum(SHOTS) * s.way * s.episodes * models * s.mix_steps * network.forward,
        disk=4 * models * network.weights + len(rounds) * images * 3 * s.image_size**2,
    )


def hours(c: Cost, gpus: int, card: str, efficiency: float, learner_efficiency: float) -> tuple[float, float, float]:
    """Return the hours of pretraining, of one training and of its tests, on `gpus` cards.

    The cards share the pool models (as in the jobs of `paper.sbatch`), the images of a round and the mixes. Learning is
    not shared: each card repeats it.
    """
    bf16, tf32 = (3600e12 * peak for peak in PEAK[card])
    pretraining = c.pretraining / c.models * -(-c.models // gpus) / (bf16 * efficiency)
    drawing = c.drawing / (bf16 * efficiency) + c.guiding / (tf32 * learner_efficiency)
    return (
        pretraining,
        drawing / gpus + c.learning / (tf32 * learner_efficiency),
        c.testing / (bf16 * efficiency) / gpus,
    )


def main() -> None:
    """Print the tables."""
    own = TrainSettings()
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--gpus", type=int, default=1, help="cards that share the work (default 1)")
    parser.add_argument("--card", choices=list(PEAK), default="h100", help="its peak is that of its data sheet")
    parser.add_argument("--steps", type=int, default=own.steps, help=f"of each pool model (default {own.steps})")
    parser.add_argument("--batch", type=int, default=own.batch_size, help=f"of those (default {own.batch_size})")
    parser.add_argument("--efficiency", type=float, default=0.3, help="share of the bf16 peak (default 0.3)")
    parser.add_argument("--learner-efficiency", type=float, default=0.1, help="share of the TF32 peak (default 0.1)")
    args = parser.parse_args()
    for name in ("gpus", "steps", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"got --{name} {getattr(args, name)}, expected 1 or more")
    for name in ("efficiency", "learner_efficiency"):
        if not 0 < getattr(args, name) <= 1:
            flag = name.replace("_", "-")
            raise ValueError(f"got --{flag} {getattr(args, name)}, expected a share above 0, up to 1")
    print(*tables(args), sep="\n")


def tables(args: argparse.Namespace) -> list[str]:
    """Return the lines of both tables."""
    flags, weights = unet_flags("paper"), unet_settings("paper")["parameters"]
    network = Network(image_flops(flags), image_flops(flags, training=True), weights)
    costs = {name: cost(parse(["--dataset", name], description=""), network, args.steps, args.batch) for name in NAMES}
    lines = [
        "| scenario | models | pretraining, PFLOP | drawing | guiding | learning | tests | disk, GB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, c in costs.items():
        work = (c.pretraining, c.drawing, c.guiding, c.learning, c.testing)
        lines.append(f"| {name} | {c.models} | " + " | ".join(f"{each / 1e15:,.0f}" for each in work)
                     + f" | {c.disk / 1e9:.1f} |")  # fmt: skip
    lines += [
        "",
        f"GPU memory: {(20 * weights + args.batch * image_bytes(flags, training=True)) / 1e9:.0f} GB to pretrain with "
        f"batches of {args.batch} images, {(2 * weights + 250 * image_bytes(flags)) / 1e9:.0f} GB to draw 250 images "
        "at once.",
        "",
        f"| scenario | pretraining, h on {args.gpus} {args.card} | one training | tests | GPU hours in all |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, c in costs.items():
        found = hours(c, args.gpus, args.card, args.efficiency, args.learner_efficiency)
        lines.append(f"| {name} | " + " | ".join(f"{each:.1f}" for each in found)
                     + f" | {args.gpus * sum(found):.0f} |")  # fmt: skip
    return lines


if __name__ == "__main__":
    run(main)
