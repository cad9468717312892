"""The class-learner h: a small time-conditioned head that maps image features to class logits."""

import math
import os
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import checkpoint

_MAX_PERIOD = 10000.0
_STATISTICS = ("running_mean", "running_var", "updates")
_WINDOW = 10  # batches; running statistics are plain means up to this number, then move by 1 / 10 per batch


class InductiveBatchNorm(nn.Module):
    """Batch norm over (N, C) that keeps its running statistics out of the state dict.

    Train mode uses the batch's statistics. Eval mode uses the running ones, so an image's output does not depend on its
    batch. Published checkpoints have only `weight` and `bias`; `statistics` and `load_statistics` save and restore the
    running statistics beside the state dict. They start as mean 0, variance 1.

    The first 10 batches are averaged equally, later ones with momentum 0.1, so a few batches already give usable
    statistics.
    """

    running_mean: Tensor
    running_var: Tensor
    updates: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels), persistent=False)
        self.register_buffer("running_var", torch.ones(channels), persistent=False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if len(x) < 2:
            raise ValueError("got a batch of 1 in train mode, expected at least 2: call eval() or use more images")
        self._update(x)
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)

    @torch.no_grad()
    def _update(self, x: Tensor) -> None:
        var, mean = torch.var_mean(x, dim=0)
        self.updates += 1
        rate = 1 / self.updates.clamp(max=_WINDOW).to(x.dtype)
        self.running_mean.lerp_(mean, rate)
        self.running_var.lerp_(var, rate)


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the running statistics of every `InductiveBatchNorm` in a module, to save with its state dict.

    Returns:
        Tensors by names such as "classifier.batchnorm.running_mean": `running_mean` and `running_var` (C,), float32,
        and `updates` (), int64, the number of batches seen. With 0 updates, eval mode has no statistics to use yet.
    """
    return {name: buffer.detach().clone() for name, buffer in _buffers(module).items()}


def load_statistics(module: nn.Module, values: Mapping[str, Tensor], source: str | os.PathLike = "statistics") -> None:
    """Restore the values that `statistics` returned. source: their origin in error messages, usually the file.

    Raises:
        ValueError: names or shapes differ from the module's, or a value is not finite. The module is then unchanged.
    """
    buffers = _buffers(module)
    checkpoint.check_tensors(buffers, values, source, f"the statistics of {type(module).__name__}")
    if odd := [name for name in buffers if not bool(torch.isfinite(values[name].float()).all())]:
        raise ValueError(f"{source}: its statistics {odd[0]} are NaN or infinite; take an earlier checkpoint")
    for name, buffer in buffers.items():
        buffer.copy_(values[name])


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    norms = ((path, norm) for path, norm in module.named_modules() if isinstance(norm, InductiveBatchNorm))
    return {f"{path}.{name}".lstrip("."): getattr(norm, name) for path, norm in norms for name in _STATISTICS}


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Return the sinusoidal embedding of time (Ho et al. 2020, arXiv 2006.11239): cosines, then sines.

    Args:
        t: (N,) timesteps, int or float.
        dim: even width; frequency i is 10000 ** (-i / (dim / 2)).

    Returns:
        (N, dim), float32, in [-1, 1].
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(_MAX_PERIOD) / half))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def unit_means(maps: Tensor) -> Tensor:
    """Average maps (N, channels, H', W') over locations and scale to unit length: the input (N, channels) of h."""
    return F.normalize(maps.mean((-2, -1)), dim=-1)


class ClassLearner(nn.Module):
    """Logits = linear2(SiLU(norm(linear1(v + e(t))))), for features v and the time embedding e(t) after a small MLP.

    Without t, e(t) is left out; this is the head for clean images, and the meta-model's base-class head. Computes in
    float32, even under autocast.

    Args:
        num_classes: C, classes.
        feature_dim: D, width of the features.
        generator: CPU generator of the initial weights (uniform in +-1 / sqrt(fan in)); torch's global one if None.

    Raises:
        ValueError: num_classes is under 1.
    """

    def __init__(self, num_classes: int, feature_dim: int = 64, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}, expected at least 1: count the classes of the pool")
        self.num_classes = num_classes
        self.feature_dim = feature_dim
        self.linear1 = nn.Linear(feature_dim, num_classes)
        self.batchnorm = InductiveBatchNorm(num_classes)
        self.linear2 = nn.Linear(num_classes, num_classes)
        self.time_embed = nn.Sequential(
            nn.Linear(2 * num_classes, feature_dim), nn.SiLU(), nn.Linear(feature_dim, feature_dim)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)

    def forward(self, features: Tensor, t: Tensor | None = None) -> Tensor:
        """Return class logits.

        Args:
            features: (N, D), pooled and L2-normalised features of the images.
            t: (N,), the timestep of each image, int or float; None for clean images.

        Returns:
            (N, C), float32.

        Raises:
            ValueError: wrong shapes, or one image alone in train mode.
        """
        if features.ndim != 2 or features.shape[1] != self.feature_dim:
            got = tuple(features.shape)
            raise ValueError(
                f"features have shape {got}, expected (N, {self.feature_dim}): pool the feature maps first"
            )
        if t is not None and t.shape != features.shape[:1]:
            raise ValueError(f"t has shape {tuple(t.shape)}, expected ({len(features)},): give each image its step")
        with torch.autocast(features.device.type, enabled=False):
            h = features.float()
            if t is not None:
                h = h + self.time_embed(time_embedding(t, 2 * self.num_classes))
            return self.linear2(F.silu(self.batchnorm(self.linear1(h))))
