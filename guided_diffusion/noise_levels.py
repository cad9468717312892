"""Noise levels that processes share: alpha-bar carries a timestep of one process over to another.

"t of 1000" means the noise at t of the cosine schedule of 1000 steps. The class-learner is taught at these t, and mixes
are made at them. A pool model may have another schedule or another number of steps.
"""

from functools import lru_cache

import numpy as np

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.respace import SpacedDiffusion
from guided_diffusion.script_util import create_gaussian_diffusion


@lru_cache(maxsize=1)
def shared_process() -> SpacedDiffusion:
    """Return the cosine process of 1000 steps, the same object every time."""
    return create_gaussian_diffusion(steps=1000, noise_schedule="cosine")


def nearest_timesteps(wanted: np.ndarray, among: GaussianDiffusion) -> np.ndarray:
    """Return for each alpha-bar in `wanted` (K,) the timestep of `among` with the nearest alpha-bar: (K,) int64."""
    return np.array([np.abs(among.alphas_cumprod - each).argmin() for each in wanted], dtype=np.int64)
