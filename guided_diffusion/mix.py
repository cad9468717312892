"""Diffusion mixes: two images blended at a noise level and denoised by a pool model."""

import torch
from torch import Tensor

from guided_diffusion.guidance import sample
from guided_diffusion.noise_levels import nearest_timesteps, shared_process
from guided_diffusion.pool import PoolModel


def mix_timesteps(level: int, steps: int, total: int) -> list[int]:
    """Return `steps` timesteps, evenly spaced from 0 to `level` - 1, that denoise an image at noise level `level`.

    Raises ValueError unless 1 <= steps <= level <= total.
    """
    if not 1 <= steps <= level <= total:
        raise ValueError(
            f"got {steps} mix steps from level {level} of {total}; expected 1 <= steps <= level <= {total}"
        )
    if steps == 1:
        return [level - 1]
    return [round(i * (level - 1) / (steps - 1)) for i in range(steps)]


def timesteps_of(model: PoolModel, level: int, steps: int) -> list[int]:
    """Return `steps` timesteps of `model`, evenly spaced from its first, that denoise an image at noise level `level`.

    level: t of the cosine process of 1000 steps, from 1 to 1000. The highest timestep returned is the one whose
    alpha-bar is nearest. Timesteps are numbered as the model was trained, as in `PoolModel.diffusion`.
    Raises ValueError if the model has fewer than `steps` timesteps up to that level.
    """
    own = model.diffusion()
    has = 1 + int(nearest_timesteps(shared_process().alphas_cumprod[level - 1 : level], own)[0])
    if steps > has:
        raise ValueError(
            f"{model.path}: has {has} timesteps up to the noise of --mix-level {level}, got --mix-steps {steps}; "
            f"give --mix-steps {has} or fewer"
        )
    return mix_timesteps(has, steps, own.num_timesteps)


def diffusion_mixes(
    model: PoolModel, x_a: Tensor, x_b: Tensor, weight: Tensor, noise: Tensor, *, level: int = 200, steps: int = 10,
    local_labels: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Blend pairs of images at noise level t = `level` and denoise them.

    x_t = sqrt(abar_t) (w x_a + (1 - w) x_b) + sqrt(1 - abar_t) eps. Both images get the *same* noise, so that the blend
    has the noise level that the denoiser expects. Blending two independent noises would give less noise.

    x_a, x_b: (N, 3, H, W) float in [-1, 1]; noise: (N, 3, H, W) standard normal.
    weight: (N,) in [0, 1], the share of x_a in the image and of its label in the mix's label (`mix_labels`).
    level, steps: as for `timesteps_of`; local_labels: (N,) int64, for a class-conditional network.
    Returns (N, 3, H, W) float in [-1, 1].
    """
    diffusion = model.diffusion(timesteps_of(model, level, steps))
    share = weight.view(-1, 1, 1, 1)
    start = torch.full((len(x_a),), diffusion.num_timesteps - 1, device=x_a.device, dtype=torch.int64)
    x_t = diffusion.q_sample(share * x_a + (1 - share) * x_b, start, noise)
    return sample(model.network, diffusion, x_t, local_labels=local_labels)


def mix_labels(targets_a: Tensor, targets_b: Tensor, weight: Tensor) -> Tensor:
    """Return the soft labels of mixes, w y_a + (1 - w) y_b, for targets (..., way) and weights (...)."""
    share = weight[..., None]
    return share * targets_a + (1 - share) * targets_b
