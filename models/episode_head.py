"""The linear heads of meta-testing, one per episode, all fitted at once by batched matrix products.

Each head equals an `nn.Linear` trained by full-batch SGD with momentum on soft-label cross-entropy. The gradient has a
closed form, softmax minus target, so there is no autograd and no loop over episodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

INITS = ("zeros", "random", "prototypes")


@dataclass(frozen=True)
class Heads:
    """Heads of E episodes: logits = scale * x W^T + b, with `weight` W (E, way, D) and `bias` b (E, way), float32."""

    weight: Tensor
    bias: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class Stage:
    """SGD on one set of samples. Each stage has its own momentum buffer, like a fresh `torch.optim.SGD`.

    Attributes:
        inputs: (E, S, D), float features of the samples of each episode.
        targets: (E, S, way), float soft labels; each sums to 1.
        steps: number of full-batch steps.
        rate: learning rate.
        weights: (E, S), float, 0 or more: weight of each sample in the mean loss; None: all count the same.
    """

    inputs: Tensor
    targets: Tensor
    steps: int = 50
    rate: float = 0.01
    weights: Tensor | None = None


def meta_test_stages(
    support: Tensor, targets: Tensor, mixes: tuple[Tensor, Tensor] | None = None, *, steps: int, rates: Sequence[float]
) -> list[Stage]:
    """Return the stages: the support set, its diffusion mixes if given, then the support set again.

    Classes count the same even with unequal shots: the cross-entropy of class c is weighted by S / (way * images of c),
    on the mixes as on the support set.

    Args:
        support: (E, S, D), float.
        targets: (E, S, way), one-hot.
        mixes: features (E, X, D), float, of the mixes of all pool models, and their soft labels (E, X, way).
        steps: SGD steps per stage.
        rates: learning rates of the three stages; without mixes the second is not used.
    """
    counts = targets.sum(1, keepdim=True)  # (E, 1, way)
    equal = bool((counts == counts[..., :1]).all())
    class_weights = None if equal else targets.shape[1] / (targets.shape[2] * counts)
    first, second, last = rates
    sets = [(support, targets, first), *([(*mixes, second)] if mixes else []), (support, targets, last)]
    return [_stage(inputs, labels, class_weights, steps, rate) for inputs, labels, rate in sets]


def _stage(inputs: Tensor, targets: Tensor, class_weights: Tensor | None, steps: int, rate: float) -> Stage:
    """Return a stage that minimises -sum_c w_c y_c log p_c, with class weights w (E, 1, way); None: all 1."""
    if class_weights is None:
        return Stage(inputs, targets, steps, rate)
    weighted = class_weights * targets
    mass = weighted.sum(-1, keepdim=True)  # (E, S, 1)
    return Stage(inputs, weighted / mass, steps, rate, mass[..., 0])


@torch.no_grad()
def fit_heads(
    support: Tensor,
    targets: Tensor,
    stages: Sequence[Stage] | None = None,
    *,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    scale: float = 1.0,
    init: str = "zeros",
    generators: Sequence[torch.Generator] | None = None,
) -> Heads:
    """Fit the heads of E episodes. Each head depends on its own episode's samples only, never on a query.

    Args:
        support: (E, S, D), float; frozen features, usually L2-normalised.
        targets: (E, S, way), float soft labels; each sums to 1.
        stages: what to fit on, in order; by default `Stage(support, targets)`.
        momentum: of SGD.
        weight_decay: of SGD, on weights and biases.
        scale: factor of the features in the logits.
        init: "zeros"; "random", uniform in +-1 / sqrt(D) as in `nn.Linear`; or "prototypes", the mean of each class's
            L2-normalised support, weighted by the targets, with zero bias.
        generators: one CPU generator per episode, for init "random"; it draws the weights, then the biases.

    Returns:
        Heads with float32 weights on the device of `support`.

    Raises:
        ValueError: wrong shapes, targets that do not sum to 1, an unknown init, or missing generators.
    """
    _check_samples(support, targets, "support")
    stages = [Stage(support, targets)] if stages is None else stages
    for number, stage in enumerate(stages, 1):
        _check_samples(stage.inputs, stage.targets, f"stage {number}")
        if stage.inputs.shape[::2] != support.shape[::2] or stage.targets.shape[2] != targets.shape[2]:
            got, expected = tuple(stage.inputs.shape), f"({support.shape[0]}, S, {support.shape[2]})"
            raise ValueError(
                f"stage {number} has inputs {got}, expected {expected} and {targets.shape[2]} classes: "
                "use the same episodes throughout"
            )
    with torch.autocast(support.device.type, enabled=False):
        weight, bias = _initial(support.float(), targets.float(), init, generators)
        for stage in stages:
            _descend(weight, bias, stage, scale, momentum, weight_decay)
    return Heads(weight, bias, scale)


def predict(heads: Heads, queries: Tensor) -> Tensor:
    """Return the logits of each query under its episode's head. They depend on no other query.

    Args:
        heads: the heads of E episodes.
        queries: (E, Q, D), float features, embedded like the support set.

    Returns:
        (E, Q, way), float32.

    Raises:
        ValueError: number of episodes or feature width differs from the heads'.
    """
    if queries.ndim != 3 or queries.shape[::2] != heads.weight.shape[::2]:
        expected = f"({heads.weight.shape[0]}, Q, {heads.weight.shape[2]})"
        raise ValueError(f"queries are {tuple(queries.shape)}, expected {expected}: embed them as the support was")
    with torch.autocast(queries.device.type, enabled=False):
        return torch.baddbmm(heads.bias[:, None], heads.scale * queries.float(), heads.weight.transpose(1, 2))


def _descend(weight: Tensor, bias: Tensor, stage: Stage, scale: float, momentum: float, weight_decay: float) -> None:
    inputs, targets = scale * stage.inputs.float(), stage.targets.float()
    weight_step, bias_step = torch.zeros_like(weight), torch.zeros_like(bias)
    for _ in range(stage.steps):
        logits = torch.baddbmm(bias[:, None], inputs, weight.transpose(1, 2))  # (E, S, way)
        residual = (logits.softmax(-1) - targets) / inputs.shape[1]
        if stage.weights is not None:
            residual *= stage.weights[..., None]
        gradient = torch.baddbmm(weight, residual.transpose(1, 2), inputs, beta=weight_decay)  # (E, way, D)
        weight_step.mul_(momentum).add_(gradient)
        bias_step.mul_(momentum).add_(residual.sum(1)).add_(bias, alpha=weight_decay)
        weight.sub_(weight_step, alpha=stage.rate)
        bias.sub_(bias_step, alpha=stage.rate)


def _initial(
    support: Tensor, targets: Tensor, init: str, generators: Sequence[torch.Generator] | None
) -> tuple[Tensor, Tensor]:
    episodes, _, dim = support.shape
    way = targets.shape[2]
    bias = support.new_zeros(episodes, way)
    if init == "zeros":
        return support.new_zeros(episodes, way, dim), bias
    if init == "prototypes":
        mass = targets.sum(1)[..., None]  # (E, way, 1)
        if bool((mass <= 0).any()):
            raise ValueError("a class has no support sample, expected one at least: use another init")
        return targets.transpose(1, 2) @ F.normalize(support, dim=-1) / mass, bias
    if init != "random":
        raise ValueError(f"init is '{init}', expected one of {', '.join(INITS)}: choose one of these")
    if generators is None or len(generators) != episodes:
        got = "none" if generators is None else len(generators)
        raise ValueError(f"got {got} generators, expected {episodes}: init 'random' needs one per episode")
    bound = dim**-0.5
    draws = [torch.rand(way * dim + way, generator=generator) for generator in generators]
    flat = (torch.stack(draws) * 2 - 1).mul_(bound).to(support.device)
    return flat[:, : way * dim].reshape(episodes, way, dim).contiguous(), flat[:, way * dim :].contiguous()


def _check_samples(inputs: Tensor, targets: Tensor, name: str) -> None:
    if inputs.ndim != 3 or targets.ndim != 3 or inputs.shape[:2] != targets.shape[:2]:
        got = f"{tuple(inputs.shape)} with targets {tuple(targets.shape)}"
        raise ValueError(f"{name} has inputs {got}, expected (E, S, D) with (E, S, way): give each sample a soft label")
    if not bool(((targets.sum(-1) - 1).abs() < 1e-3).all()):
        raise ValueError(
            f"{name} has targets that do not sum to 1, expected soft labels: normalise them over the classes"
        )
