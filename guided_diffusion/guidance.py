"""Sampling from a pool model, steered by a classifier or not.

Papers: DDIM (arXiv 2010.02502), classifier guidance (Dhariwal & Nichol 2021, arXiv 2105.05233, alg. 2).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.noise_levels import nearest_timesteps, shared_process
from utils import stopping

LogProbability = Callable[[Tensor, Tensor], Tensor]
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
    renoise: float = 0.0,
    fresh: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Sample from `noise` down to x_0 by DDIM, over all timesteps that `diffusion` keeps.

    noise: (N, 3, H, W) float, x_T, or an image at the noise level of the highest timestep kept.
    cond_fn: from `classifier_guidance`; None for no guidance. It is asked at the t of the cosine process of 1000 steps
    whose alpha-bar is nearest to that of the image it is given; the network is called with its own timesteps.
    guide_on: "x_t", the gradient at the noisy image, as in the paper; or "x_0", at the clean image predicted from it
    (its noise held fixed), where a classifier of clean images is at home.
    local_labels: (N,) int64 for a class-conditional network.
    renoise: share of the noise, by variance, that is drawn anew in each step, 0 to 1; 0 solves the diffusion's ODE.
    fresh: index of a step -> its new noise (N, 3, H, W); needed where renoise is above 0.
    Returns (N, 3, H, W) float in [-1, 1].

    A step from s to t is x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t - sigma^2) eps + sigma z, with x_0 as predicted at s,
    eps the noise that x_s then holds, and z new noise (2010.02502, eq. 12), where sigma^2 = renoise * (1 - abar_t).

    A guided x_0 is clipped to [-1, 1] again: near pure noise a shift of the score by g moves x_0 by
    g * (1 - abar) / sqrt(abar), thousands of times g, and a denoiser has never seen what follows from that.
    """
    kwargs = {} if local_labels is None else {"y": local_labels}
    taught_at = nearest_timesteps(diffusion.alphas_cumprod, shared_process()).tolist()
    x = noise
    for index in range(diffusion.num_timesteps - 1, -1, -1):
        stopping.check()
        t = torch.full((len(x),), index, device=x.device, dtype=torch.int64)
        out = diffusion.p_mean_variance(network, x, t, clip_denoised=True, model_kwargs=kwargs)
        x_0 = out["pred_xstart"].float()
        if cond_fn is not None:
            abar = diffusion.at("alphas_cumprod", t, x)
            if guide_on == "x_0":
                strength = ((1 - abar) / abar).clamp(max=GREATEST_STEP)
                shift = strength * cond_fn(x_0, torch.full_like(t, taught_at[index]))
            else:
                shift = (1 - abar) / abar.sqrt() * cond_fn(x, torch.full_like(t, taught_at[index]))
            x_0 = (x_0 + shift).clamp(-1, 1)
        eps = diffusion.eps_from_xstart(x, t, x_0)
        before = diffusion.at("alphas_cumprod_prev", t, x)
        if renoise and index:
            eps = (1 - renoise) ** 0.5 * eps + renoise**0.5 * fresh(index)
        x = before.sqrt() * x_0 + (1 - before).sqrt() * eps
    return x
