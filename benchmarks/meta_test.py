"""Measure a meta-test with diffusion mixes of one pool model, in episodes per second: mixes, features and heads.

    python -m benchmarks.meta_test --size small

Support images of all episodes are mixed in full batches, and all heads are fitted together, as in `diffusionmix.py`.
The plain baseline works in float32, episode by episode, and fits each head as an `nn.Linear` by `torch.optim.SGD`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from few_shot import MIX_BETA, RATES
from guided_diffusion.dist_util import inference_dtype, pick_device
from guided_diffusion.mix import diffusion_mixes, mix_labels
from guided_diffusion.pool import PoolModel
from models.episode_head import Heads, fit_heads, meta_test_stages
from models.meta_model import MetaModel
from utils.cli import run
from utils.images import to_float
from utils.seeding import generator, noise, numpy_generator

_COMMON = dict(way=5, shot=1, level=200, head_steps=50, classes=64)
SIZES = {  # steps: timed steps per mix; method_steps: steps in the real method
    "paper": dict(episodes=4, batch=250, steps=2, method_steps=200, plain_episodes=1, **_COMMON),
    "small": dict(episodes=40, batch=200, steps=3, method_steps=3, plain_episodes=20, **_COMMON),
}
ON_GPU = {"paper": dict(episodes=100, steps=200)}


@dataclass(frozen=True)
class Tasks:
    """E episodes: support images (E, S, 3, H, W) uint8, their partners (E, S), and their shares of the mixes (E, S)."""

    images: Tensor
    order: Tensor
    weight: Tensor
    targets: Tensor  # (E, S, way)

    @classmethod
    def random(cls, s: dict[str, Any], size: int) -> "Tasks":
        """Return episodes of random pixels, with partners and shares drawn as in `diffusionmix.py`."""
        count, shots = s["episodes"], s["way"] * s["shot"]
        rngs = [numpy_generator(measure.SEED, "mix", i) for i in range(count)]
        order = torch.stack([torch.from_numpy(rng.permutation(shots)) for rng in rngs])
        weight = torch.stack([torch.from_numpy(rng.beta(MIX_BETA, MIX_BETA, shots)) for rng in rngs]).float()
        rng = generator(measure.SEED, "images")
        images = torch.randint(256, (count, shots, 3, size, size), dtype=torch.uint8, generator=rng)
        targets = F.one_hot(torch.arange(s["way"]).repeat_interleave(s["shot"]), s["way"]).float()
        return cls(images, order, weight, targets.expand(count, -1, -1).contiguous())

    def features(self, member: PoolModel, model: MetaModel, index: Tensor, s: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return features (N, D), on the CPU, of the support images numbered `index` (of E * S), and of their mixes."""
        device = next(model.parameters()).device
        images, size = self.images.flatten(0, 1), self.images.shape[-1]
        partner = (self.order + self.order.shape[1] * torch.arange(len(self.order))[:, None]).flatten()
        x_a, x_b = (to_float(images[chosen].to(device)) for chosen in (index, partner[index]))
        eps = noise((3, size, size), index.tolist(), measure.SEED, "mix noise").to(device)
        weight = self.weight.flatten()[index].to(device)
        mixed = diffusion_mixes(member, x_a, x_b, weight, eps, level=s["level"], steps=s["steps"])
        with torch.no_grad():
            return model.embed(x_a).cpu(), model.embed(mixed).cpu()

    def stages(self, parts: list[tuple[Tensor, Tensor]], chosen: slice, steps: int) -> list:
        """Return the stages to fit the heads of the episodes `chosen`. parts: their features, batch by batch."""
        shape, targets = self.order[chosen].shape, self.targets[chosen]
        support, mixes = (torch.cat(one).unflatten(0, shape) for one in zip(*parts, strict=True))
        partner = targets.gather(1, self.order[chosen][..., None].expand_as(targets))
        mix_targets = mix_labels(targets, partner, self.weight[chosen])
        return meta_test_stages(support, targets, (mixes, mix_targets), steps=steps, rates=RATES)


def together(tasks: Tasks, member: PoolModel, model: MetaModel, s: dict[str, Any]) -> Heads:
    """Return the heads of all episodes, fitted together."""
    parts = torch.arange(tasks.order.numel()).split(s["batch"])
    found = [tasks.features(member, model, part, s) for part in parts]
    stages = tasks.stages(found, slice(None), s["head_steps"])
    return fit_heads(stages[0].inputs, tasks.targets, stages)


def one_by_one(tasks: Tasks, member: PoolModel, model: MetaModel, s: dict[str, Any]) -> list[torch.nn.Linear]:
    """Return the heads of the first `plain_episodes` episodes, fitted one by one."""
    heads = []
    for index in torch.arange(tasks.order.numel()).split(tasks.order.shape[1])[: s["plain_episodes"]]:
        chosen = slice(len(heads), len(heads) + 1)
        stages = tasks.stages([tasks.features(member, model, index, s)], chosen, s["head_steps"])
        head = torch.nn.Linear(model.feature_dim, s["way"])
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        for stage in stages:
            optimizer = torch.optim.SGD(head.parameters(), lr=stage.rate, momentum=0.9, weight_decay=5e-4)
            for _ in range(stage.steps):
                optimizer.zero_grad()
                F.cross_entropy(head(stage.inputs[0]), stage.targets[0]).backward()
                optimizer.step()
        heads.append(head)
    return heads


def main() -> None:
    """Parse the flags, measure, and print the result."""
    args = measure.parse("Episodes a second of a meta-test with diffusion mixes.")
    device = pick_device(args.device)
    measure.settle_precision(args, device)
    s = measure.settings(args, device, SIZES, ON_GPU)
    s["batch"] = min(s["batch"], s["episodes"] * s["way"] * s["shot"])
    unet = measure.unet_settings(args.size)
    tasks = Tasks.random(s, unet["image_size"])
    model = MetaModel(s["classes"], generator=generator(measure.SEED, "weights")).to(device).eval()

    def work():
        member = measure.pool_model(args.size, device, args.precision)
        return lambda: together(tasks, member, model, s)

    def plain():
        member = measure.plain_model(args.size, device)
        return lambda: one_by_one(tasks, member, model, s)

    measure.report(
        "meta_test", args, device, {**s, "models": 1, "unet": unet},
        dtype=inference_dtype(args.precision, device), unit="episodes",
        work=measure.Timed(s["episodes"], work), plain=measure.Timed(s["plain_episodes"], plain),
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
