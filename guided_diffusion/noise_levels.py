"""Noise levels shared by all processes: alpha-bar translates a timestep of one process into one of another.

"t of 1000" means the noise level at t in the cosine schedule of 1000 steps. The class-learner trains at these t, and
mixes are made at one of them. A pool model may have another schedule or number of steps.
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
    """Return the timesteps (K,) int64 of `among` whose alpha-bars are nearest to each of `wanted` (K,)."""
    return np.array([np.abs(among.alphas_cumprod - each).argmin() for each in wanted], dtype=np.int64)
