"""Does guidance steer? A class-learner trained on real glyph labels guides; an independent classifier judges.

    python -m benchmarks.steering --epochs 12 --scales 20 50

Prints one JSON line a setting: the share of images that the judge gives the class asked for, among all classes and
among those of the model that drew it, with guidance and (scale 0) without.
"""

import argparse
import json
import math

import torch

from config import Settings
from datasets.augment import AugmentSettings, augment
from datasets.episodes import EpisodeSampler
from datasets.sources import load_real
from guided_diffusion.dist_util import pick_device
from guided_diffusion.pool import Pool
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.synthesis import Synthesis, synthesise
from models.class_learner import ClassLearner
from models.learners import (
    LEVEL_POWER,
    log_probability,
    make_optimizer,
    set_rate,
    train_class_learner,
    train_meta_model,
)
from models.meta_model import MetaModel
from utils.cli import run
from utils.images import to_float
from utils.seeding import generator

EPISODES, BATCH = 100, 4  # an epoch, a step
SEEN, UNSEEN = 300, 100  # real images of a class, to train on and to try the judge on


def train(data, seed: int, epochs: int, guide_on: str = "") -> tuple[MetaModel, ClassLearner]:
    """A meta-model, and a class-learner where it will guide on x_t or x_0, on real labels."""
    rng = generator(seed, "steering")
    classes = len(data.class_names)
    model = MetaModel(classes, generator=rng)
    learner = ClassLearner(classes, model.feature_dim, generator=rng)
    optimizer, learner_optimizer = (make_optimizer("sgd", module, 5e-4) for module in (model, learner))
    process = create_gaussian_diffusion(steps=1000, noise_schedule="cosine")
    sampler = EpisodeSampler(data.labels, 5, 1, 6)
    settings = AugmentSettings(flip=False, scale=(0.7, 1.0), erase=0.2)
    for epoch in range(epochs):
        for each in (optimizer, learner_optimizer):
            set_rate(each, 0.05 * (1 + math.cos(math.pi * epoch / epochs)))
        shared = dict(augment=lambda x: augment(x, rng, settings))
        out = train_meta_model(
            model, optimizer, data.images, data.labels, sampler.sample(EPISODES, rng),
            batch=BATCH, dense_weight=0.0, **shared,
        )  # fmt: skip
        if guide_on:
            out |= train_class_learner(
                model, learner, learner_optimizer, data.images, data.labels, steps=50, batch=140, levels=1000,
                level_power=LEVEL_POWER[guide_on], kl_weight=1.0, rng=rng,
                add_noise=lambda x, t: process.q_sample(x, t, generator=rng), **shared,
            )  # fmt: skip
        print(json.dumps({"epoch": epoch + 1, **out}), flush=True)
    return model, learner


@torch.no_grad()
def scores(judge: MetaModel, images: torch.Tensor) -> torch.Tensor:
    """Logits (N, C) of images (N, 3, H, W) uint8."""
    return torch.cat([judge.classifier(judge.embed(to_float(part))) for part in images.split(250)])


def main() -> None:
    """Train guide and judge, draw, count."""
    parser = argparse.ArgumentParser(description="Measure how well guidance steers.")
    parser.add_argument("--pool", default=Settings().pool_place)
    parser.add_argument("--epochs", type=int, default=12, help="of guide and of judge")
    parser.add_argument("--scales", type=float, nargs="+", default=[20.0, 50.0])
    parser.add_argument("--guide-on", default="x_0", choices=("x_t", "x_0"))
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    device = pick_device("cpu")
    data = load_real("glyphs", Settings().data_paths, "meta_train", 32, SEEN)
    guide, learner = train(data, args.seed, args.epochs, args.guide_on)
    judge, _ = train(data, args.seed + 1000, args.epochs)
    judge.eval()
    unseen = load_real("glyphs", Settings().data_paths, "meta_train", 32, SEEN + UNSEEN)
    late = torch.arange(len(unseen.labels)) % (SEEN + UNSEEN) >= SEEN  # that neither saw
    right = scores(judge, unseen.images[late]).argmax(1) == unseen.labels[late]
    print(json.dumps({"judge_on_unseen_real_images": 100 * float(right.float().mean())}), flush=True)
    pool = Pool(args.pool)
    counts = pool.share_classes()
    function = log_probability(guide, learner)
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))  # of each class, its model
    for scale in (0.0, *args.scales):
        plan = Synthesis(
            classes=counts, per_class=args.per_class, steps=args.steps, size=32, seed=args.seed, stream="steering",
            scale=scale, guide_on=args.guide_on,
        )  # fmt: skip
        images, wanted, hits = synthesise(pool, plan, device, function)
        logits = scores(judge, images)
        own = owner[None, : logits.shape[1]] == owner[wanted][:, None]
        within = logits[:, : own.shape[1]].masked_fill(~own, -torch.inf)
        result = {
            "guide_on": args.guide_on, "scale": scale, "images": len(images),
            "judge_all_classes": 100 * float((logits.argmax(1) == wanted).float().mean()),
            "judge_own_classes": 100 * float((within.argmax(1) == wanted).float().mean()),
            "guide_itself": 100 * float(hits.float().mean()),
        }  # fmt: skip
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    run(main)
