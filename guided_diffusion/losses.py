"""Likelihood terms of the variational bound (DDPM, arXiv 2006.11239, eq. 5 and 13)."""

import math

import torch
from torch import Tensor


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """Return KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) elementwise, in nats. Shapes broadcast."""
    squared = (mean1 - mean2) ** 2
    return 0.5 * (logvar2 - logvar1 - 1.0 + (logvar1 - logvar2).exp() + squared * (-logvar2).exp())


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """Return Phi(x), in [0, 1] and in the shape of x, by Page's tanh formula; the error is below 4e-4."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """Return the log-probability of x's 8-bit bin under N(means, exp(log_scales)^2), in nats (DDPM, eq. 13).

    x: (N, C, H, W) float in [-1, 1], read as 256 levels; the outer bins extend to infinity.
    means, log_scales: in the shape of x. Returns (N, C, H, W), at least log(1e-12).
    """
    inverse_scale = torch.exp(-log_scales)
    upper = approx_standard_normal_cdf(inverse_scale * (x - means + 1.0 / 255.0))
    lower = approx_standard_normal_cdf(inverse_scale * (x - means - 1.0 / 255.0))
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    return (upper - lower).clamp(min=1e-12).log()
