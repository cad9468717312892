"""Sampling from a pool model, guided by a classifier or not (Dhariwal & Nichol 2021, arXiv 2105.05233, alg. 2)."""

from collections.abc import Callable

import torch
from torch import Tensor

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.noise_levels import nearest_timesteps, shared_process
from guided_diffusion.sampling import ddim
from utils import stopping

LogProbability = Callable[[Tensor, Tensor], Tensor]
Gradient = Callable[..., Tensor]
GREATEST_FACTOR = 1.0  # cap on (1 - abar) / abar in guidance on x_0, which grows without bound towards pure noise


def classifier_guidance(log_probability: LogProbability, labels: Tensor, scale: float) -> Gradient:
    """Return the gradient function s * grad_x log p(c | x, t) that shifts a score towards `labels`.

    log_probability: (x (N, 3, H, W), t (N,)) -> (N, C) log p(. | x, t), row by row.
    labels: (N,) int64, the *global* class of each image. A conditional U-Net uses local labels instead. Those go to the
    U-Net separately, and cond_fn ignores keyword arguments, so the two cannot be confused.
    Returns cond_fn(x, t, **_) -> (N, 3, H, W). An image's gradient depends on no other image if its log-probabilities
    do not.
    """

    def cond_fn(x: Tensor, t: Tensor, **_) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            chosen = log_probability(x, t).gather(1, labels[:, None])
            return scale * torch.autograd.grad(chosen.sum(), x)[0]

    return cond_fn


def guide_on_x_t(process: GaussianDiffusion, gradient: Gradient, out: dict, x: Tensor, t: Tensor) -> Tensor:
    """Return x_0 shifted by the gradient at the noised image x, as in the paper: (N, 3, H, W) in [-1, 1].

    A gradient g moves x_0 by g * (1 - abar) / sqrt(abar), which near pure noise is thousands of times g. x_0 is clipped
    again, as no denoiser was trained on such values.
    """
    return process.condition_score(gradient, out, x, t)["pred_xstart"].clamp(-1, 1)


def guide_on_x_0(process: GaussianDiffusion, gradient: Gradient, out: dict, x: Tensor, t: Tensor) -> Tensor:
    """Return x_0 shifted by (1 - abar) / abar times the gradient at the predicted x_0: (N, 3, H, W) in [-1, 1].

    This is `guide_on_x_t` with the predicted noise held fixed in the chain rule, and the factor capped.
    """
    abar, x_0 = process.at("alphas_cumprod", t, x), out["pred_xstart"]
    strength = ((1 - abar) / abar).clamp(max=GREATEST_FACTOR)
    return (x_0 + strength * gradient(x_0, t)).clamp(-1, 1)


def sample(
    network: Callable[..., Tensor], diffusion: GaussianDiffusion, noise: Tensor, *, cond_fn: Gradient | None = None,
    guide_on: str = "x_t", local_labels: Tensor | None = None, renoise: float = 0.0,
    fresh: Callable[[int], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Sample from `noise` down to x_0 by `ddim`. Raises Stopped between two steps if the run was asked to stop.

    noise, renoise, fresh: as for `ddim`, for images (N, 3, H, W).
    cond_fn: from `classifier_guidance`; None for no guidance. Its t is a timestep of the cosine process of 1000 steps,
    the one whose alpha-bar is nearest to the image's. The network gets its own timesteps.
    guide_on: "x_t" takes the gradient at the noised image; "x_0" at the clean image predicted from it, which suits a
    classifier of clean images.
    local_labels: (N,) int64, for a class-conditional network.
    Returns (N, 3, H, W) float in [-1, 1].
    """
    kwargs = {} if local_labels is None else {"y": local_labels}
    taught_at = torch.from_numpy(nearest_timesteps(diffusion.alphas_cumprod, shared_process())).to(noise.device)
    guide = {"x_t": guide_on_x_t, "x_0": guide_on_x_0}[guide_on]

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        stopping.check()
        out = diffusion.p_mean_variance(network, x, t, model_kwargs=kwargs)
        if cond_fn is None:
            return out["pred_xstart"]
        return guide(diffusion, lambda image, _: cond_fn(image, taught_at[t]), out, x, t)

    return ddim(denoise, diffusion, noise, renoise=renoise, fresh=fresh)
