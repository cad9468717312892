"""DDIM (arXiv 2010.02502), the sampler of pool images, mixes, sample sheets and the memorisation figure."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]  # x_t (N, C, H, W) and t (N,) -> x_0 (N, C, H, W)


class Process(Protocol):
    """What `ddim` needs of a diffusion process. `GaussianDiffusion` implements it."""

    num_timesteps: int

    def eps_from_xstart(self, x_t: Tensor, t: Tensor, x_0: Tensor) -> Tensor: ...

    def step_back(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...


@torch.no_grad()
def ddim(
    denoise: Denoiser, process: Process, noise: Tensor, *, renoise: float = 0.0,
    fresh: Callable[[int], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Sample from `noise` down to x_0, over all timesteps that `process` visits.

    A step from s to t is x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t - sigma^2) eps + sigma z (eq. 12). x_0 is the
    prediction of `denoise` at s, eps the noise that this implies in x_s, z new noise, and
    sigma^2 = renoise * (1 - abar_t).

    noise: (N, C, H, W) float: x_T, or images at the noise level of the highest timestep visited.
    renoise: share of the noise variance that each step draws anew, 0 to 1; 0 solves the diffusion's ODE.
    fresh: index of a step -> its new noise (N, C, H, W); required if renoise is above 0.
    Returns (N, C, H, W) float.
    """
    x = noise
    for index in range(process.num_timesteps - 1, -1, -1):
        t = torch.full((len(x),), index, device=x.device, dtype=torch.int64)
        x_0 = denoise(x, t)
        eps = process.eps_from_xstart(x, t, x_0)
        if renoise and index:
            eps = (1 - renoise) ** 0.5 * eps + renoise**0.5 * fresh(index)
        x = process.step_back(x_0, eps, t)
    return x
