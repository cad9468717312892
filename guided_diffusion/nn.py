"""Small building blocks of the U-Net: group norm, zero initialisation, timestep embedding."""

import math

import torch
from torch import nn
from torch.nn import functional as F


def normalization(channels: int) -> nn.GroupNorm:
    """Return a group norm with 32 groups; with groups of 4 channels if 32 does not divide `channels`, else with one.

    Groups of one channel would remove an image's mean colour just before the output.
    """
    if channels % 32 == 0:
        return nn.GroupNorm(32, channels)
    return nn.GroupNorm(channels // 4 if channels % 4 == 0 else 1, channels)


def zero_module(module: nn.Module) -> nn.Module:
    """Set every parameter of `module` to zero and return it. A residual branch then starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def mean_flat(x: torch.Tensor) -> torch.Tensor:
    """Return the mean over all axes but the first: (N, ...) -> (N,)."""
    return x.flatten(1).mean(dim=1)


def timestep_embedding(timesteps: torch.Tensor, dim: int, max_period: float = 10000.0) -> torch.Tensor:
    """Return the sinusoidal embedding of timesteps (DDPM, arXiv 2006.11239, app. B): cosines, then sines.

    timesteps: (N,), whole or fractional, in steps of the training process.
    Returns (N, dim) float32 in [-1, 1]; an odd `dim` ends in a zero.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) / half * index)  # (N, half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


class PointwiseConv(nn.Conv1d):
    """A 1x1 convolution, stored as Conv1d (out, in, 1) but applied to tokens (N, T, in) -> (N, T, out)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(tokens, self.weight.squeeze(-1), self.bias)
