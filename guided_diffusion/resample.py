"""Samplers of training timesteps, with the weights that keep the loss unbiased (IDDPM, sec. 3.3)."""

from typing import Any

import torch

from utils import processes


class UniformSampler:
    """Draws timesteps t with probability p(t) = 1 / T and weights their losses by 1 / (T p(t))."""

    def __init__(self, num_timesteps: int):
        self.num_timesteps = num_timesteps

    def probabilities(self) -> torch.Tensor:
        """Return p(t), (T,) float64 on the CPU, summing to 1."""
        return torch.full((self.num_timesteps,), 1.0 / self.num_timesteps, dtype=torch.float64)

    def sample(
        self, batch_size: int, device: torch.device | str, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw timesteps (N,) int64 in [0, T) and loss weights (N,) float32, on `device`. generator: on the CPU."""
        p = self.probabilities()
        t = torch.multinomial(p, batch_size, replacement=True, generator=generator)
        weights = 1.0 / (self.num_timesteps * p[t])
        return t.to(device, non_blocking=True), weights.float().to(device, non_blocking=True)

    def update_with_local_losses(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        """Learn from the unweighted losses (N,) seen at timesteps (N,); uniform sampling ignores them."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state needed to resume with the same probabilities: a dict of CPU tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. Raises ValueError if it is of another sampler or another T."""
        if state:
            raise ValueError(f"got a sampler state with {sorted(state)}, expected none; give its --schedule_sampler")


class LossSecondMomentResampler(UniformSampler):
    """p(t) proportional to sqrt(E[loss(t)^2]) over the last losses of each t (IDDPM, eq. 18).

    Uniform until every t has `history_per_term` losses. After that, `uniform_prob` of the mass stays uniform, so that
    no timestep is forgotten. With several processes, each learns from the losses of all, so they stay identical.
    """

    def __init__(self, num_timesteps: int, history_per_term: int = 10, uniform_prob: float = 0.001):
        super().__init__(num_timesteps)
        self.uniform_prob = uniform_prob
        self.history = torch.zeros(num_timesteps, history_per_term, dtype=torch.float64)
        self.seen = torch.zeros(num_timesteps, dtype=torch.int64)

    def probabilities(self) -> torch.Tensor:
        terms = self.history.square().mean(dim=1).sqrt()
        uniform = super().probabilities()
        if bool((self.seen < self.history.shape[1]).any()) or not bool(terms.sum() > 0):
            return uniform
        return (1.0 - self.uniform_prob) * terms / terms.sum() + self.uniform_prob * uniform

    def update_with_local_losses(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        timesteps, losses = map(processes.all_of, (timesteps, losses.detach()))
        length = self.history.shape[1]
        for t, loss in zip(timesteps.tolist(), losses.tolist(), strict=True):
            self.history[t, int(self.seen[t]) % length] = loss  # overwrites the oldest
            self.seen[t] += 1

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history.clone(), "seen": self.seen.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        shape = tuple(state["history"].shape) if set(state) == {"history", "seen"} else None
        if shape != tuple(self.history.shape):
            raise ValueError(
                f"got a sampler state with a history of shape {shape}, expected {tuple(self.history.shape)}; "
                "give its --schedule_sampler and --diffusion_steps"
            )
        self.history.copy_(state["history"])  # stays on the CPU, even if the state was loaded onto a GPU
        self.seen.copy_(state["seen"])


SAMPLERS = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}
