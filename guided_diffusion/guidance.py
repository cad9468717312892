"""Sampling from a pool model, steered by a classifier or not.

Papers: DDIM (arXiv 2010.02502), classifier guidance (Dhariwal & Nichol 2021, arXiv 2105.05233, alg. 2),
DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095, alg. 2).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.noise_levels import nearest_timesteps, shared_process
from utils import stopping

LogProbability = Callable[[Tensor, Tensor], Tensor]
SAMPLERS = ("ddim", "dpmpp2m")
GREATEST_STEP = 1.0  # of guidance on x_0: (1 - abar) / abar grows without bound towards pure noise


def classifier_guidance(log_probability: LogProbability, labels: Tensor, scale: float) -> Callable[..., Tensor]:
    """The gradient function s * grad_x log p(c | x, t) that shifts a score towards `labels`.

    log_probability: (x (N, 3, H, W), t (N,)) -> (N, C) log p(. | x, t), row by row.
    labels: (N,) int64, the *global* class of each image. The labels that a conditional U-Net takes are others and
    travel apart, so that this function cannot be given them by mistake; keyword arguments are not looked at.
    Returns cond_fn(x, t, **_) -> (N, 3, H, W). An image's gradient depends on no other image, provided that its
    log-probabilities do not.
    """

    def cond_fn(x: Tensor, t: Tensor, **_) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            chosen = log_probability(x, t).gather(1, labels[:, None])
            return scale * torch.autograd.grad(chosen.sum(), x)[0]

    return cond_fn


@torch.no_grad()
def sample(
    network: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    noise: Tensor,
    *,
    cond_fn: Callable[..., Tensor] | None = None,
    guide_on: str = "x_t",
    local_labels: Tensor | None = None,
    sampler: str = "ddim",
) -> Tensor:
    """Solve the diffusion's ODE from `noise` down to x_0, over all timesteps that `diffusion` keeps.

    noise: (N, 3, H, W) float, x_T, or an image at the noise level of the highest timestep kept.
    cond_fn: from `classifier_guidance`; None for no guidance. It is asked at the t of the cosine process of 1000 steps
    whose alpha-bar is nearest to that of the image it is given; the network is called with its own timesteps.
    guide_on: "x_t", the gradient at the noisy image as published; or "x_0", at the clean image predicted from it
    (its noise held fixed), where a classifier of clean images is at home.
    local_labels: (N,) int64 for a class-conditional network.
    sampler: "ddim", of first order (arXiv 2010.02502, eq. 12 with sigma = 0); or "dpmpp2m", of second order at the
    same cost: DPM-Solver++(2M), whose x_0 is extrapolated from this prediction and the one before.
    Returns (N, 3, H, W) float in [-1, 1]. Raises ValueError for another sampler.

    With alpha^2 = abar, sigma^2 = 1 - abar and h the step in lambda = log(alpha / sigma), a step from s to t is
    x_t = sigma_t / sigma_s x_s - alpha_t (exp(-h) - 1) D = alpha_t D + sigma_t (x_s - alpha_s D) / sigma_s;
    DDIM has D = x_0, DPM-Solver++(2M) D = x_0 + (x_0 - the x_0 before) / (2r), r = h before / h (2211.01095, alg. 2).

    A guided x_0 is clipped to [-1, 1] again: near pure noise a shift of the score by g moves x_0 by
    g * (1 - abar) / sqrt(abar), thousands of times g, and a denoiser has never seen what follows from that.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"got sampler {sampler!r}, expected {' or '.join(SAMPLERS)}")
    kwargs = {} if local_labels is None else {"y": local_labels}
    weights = _extrapolation(diffusion) if sampler == "dpmpp2m" else [0.0] * diffusion.num_timesteps
    taught_at = nearest_timesteps(diffusion.alphas_cumprod, shared_process()).tolist()
    x, previous = noise, None
    for index in range(diffusion.num_timesteps - 1, -1, -1):
        stopping.check()
        t = torch.full((len(x),), index, device=x.device, dtype=torch.int64)
        out = diffusion.p_mean_variance(network, x, t, clip_denoised=True, model_kwargs=kwargs)
        x_0 = out["pred_xstart"].float()
        if cond_fn is not None:
            abar = diffusion.at("alphas_cumprod", t, x)
            if guide_on == "x_0":
                strength = ((1 - abar) / abar).clamp(max=GREATEST_STEP)
                shift = strength * cond_fn(x_0, torch.zeros_like(t))  # a clean image, as far as the classifier knows
            else:
                shift = (1 - abar) / abar.sqrt() * cond_fn(x, torch.full_like(t, taught_at[index]))
            x_0 = (x_0 + shift).clamp(-1, 1)
        # D may leave [-1, 1], as in the paper; what is returned may not, as the last step takes x_0 itself.
        ahead = x_0 + weights[index] * (x_0 - previous) if weights[index] else x_0
        previous = x_0
        eps = diffusion.eps_from_xstart(x, t, ahead)
        before = diffusion.at("alphas_cumprod_prev", t, x)
        x = before.sqrt() * ahead + (1 - before).sqrt() * eps
    return x


def _extrapolation(diffusion: GaussianDiffusion) -> list[float]:
    """1 / (2r) of the step down from each timestep kept; 0, first order, where there is none.

    That is at the first step, which has none before it, and at the last, where lambda becomes infinite and x_0 itself
    is the result. Numbers of the host, as a batch shares its timestep: nothing waits for the device.
    """
    abar = diffusion.alphas_cumprod
    h = -np.diff(np.log(abar / (1 - abar)) / 2)  # h[i] from timestep i + 1 to i
    return [0.0, *(h[:-1] / (2 * h[1:])).tolist(), 0.0][: diffusion.num_timesteps]
