"""A diffusion process that visits only some of the timesteps it was trained on (IDDPM, sec. 4)."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, repeat

import numpy as np
import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion


def space_timesteps(num_timesteps: int, section_counts: int | str | Sequence[int]) -> set[int]:
    """Return the timesteps to keep: a set of integers in [0, num_timesteps).

    section_counts: "ddimN" keeps N steps at a constant whole stride, from 0 (DDIM, arXiv 2010.02502). Counts (an
    integer, "10,15,20" or a list) split the process into equal sections, one per count, and keep that many evenly
    spread steps of each. "" keeps all. Raises ValueError for counts that cannot be met.
    """
    if isinstance(section_counts, str) and section_counts.startswith("ddim"):
        return _whole_stride(num_timesteps, section_counts)
    counts = _parse_counts(section_counts) or [num_timesteps]
    base, extra = divmod(num_timesteps, len(counts))
    start, kept = 0, set()
    for section, count in enumerate(counts):
        size = base + (section < extra)
        if not 1 <= count <= size:
            raise ValueError(
                f"got timestep_respacing {section_counts!r}, which asks for {count} of the {size} steps of a section; "
                f"give 1 to {size}"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Summed rather than multiplied, so that halves round as in public samplers.
        positions = accumulate(repeat(stride, count - 1), initial=0.0)
        kept.update(start + round(position) for position in positions)
        start += size
    return kept


def _whole_stride(num_timesteps: int, spec: str) -> set[int]:
    count = int(spec[4:]) if spec[4:].isdecimal() else 0
    if not 1 <= count <= num_timesteps:
        raise ValueError(f"got timestep_respacing {spec!r}, expected ddimN with N from 1 to {num_timesteps}")
    for stride in range(1, max(num_timesteps, 2)):
        if len(range(0, num_timesteps, stride)) == count:
            return set(range(0, num_timesteps, stride))
    raise ValueError(
        f"got timestep_respacing {spec!r}, but no whole stride takes {count} of {num_timesteps} steps; "
        f"give another N, or {count} without ddim"
    )


def _parse_counts(spec: int | str | Sequence[int]) -> list[int]:
    if isinstance(spec, int):
        return [spec]
    parts = [part for part in spec.split(",") if part.strip()] if isinstance(spec, str) else spec
    try:
        return [int(part) for part in parts]
    except ValueError:
        raise ValueError(f"got timestep_respacing {spec!r}, expected ddimN or counts such as 10,15,20") from None


class SpacedDiffusion(GaussianDiffusion):
    """A process that keeps only `use_timesteps` of a longer one, with the longer one's alpha-bars at these.

    use_timesteps: integers in [0, T). betas: (T,) float, of the longer process; other keywords: as for
    `GaussianDiffusion`. Methods accept t in [0, len(use_timesteps)). Networks and gradient functions are called with
    the timesteps of the longer process.
    """

    def __init__(self, use_timesteps: Iterable[int], *, betas: np.ndarray, **kwargs):
        betas = np.asarray(betas, dtype=np.float64)
        kept = np.array(sorted(set(use_timesteps)), dtype=np.int64)
        if not len(kept) or kept[0] < 0 or kept[-1] >= len(betas):
            raise ValueError(f"got use_timesteps {kept.tolist()[:8]}..., expected some of 0 to {len(betas) - 1}")
        alpha_bars = np.cumprod(1.0 - betas)[kept]
        super().__init__(betas=1.0 - alpha_bars / np.append(1.0, alpha_bars[:-1]), **kwargs)
        self.timestep_map = kept
        self.original_num_steps = len(betas)

    def model_timesteps(self, t: torch.Tensor) -> torch.Tensor:
        return super().model_timesteps(self._cached("timestep_map", t.device)[t])


def respaced(diffusion: GaussianDiffusion, timesteps: Iterable[int]) -> SpacedDiffusion:
    """Return the process that visits only `timesteps`, each in [0, num_timesteps) of `diffusion`.

    Networks are still called with the timesteps that they were trained on.
    """
    same = ("betas", "model_mean_type", "model_var_type", "loss_type", "rescale_timesteps", "loss_weighting")
    spaced = SpacedDiffusion(timesteps, **{name: getattr(diffusion, name) for name in same})
    if isinstance(diffusion, SpacedDiffusion):  # its own timesteps index a longer process
        spaced.timestep_map = diffusion.timestep_map[spaced.timestep_map]
        spaced.original_num_steps = diffusion.original_num_steps
    return spaced
