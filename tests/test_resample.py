"""Timestep samplers: frequencies, weights, seeding, resuming."""

import pytest
import torch

from guided_diffusion.resample import SAMPLERS, LossSecondMomentResampler


def warm_sampler(steps: int = 8) -> LossSecondMomentResampler:
    """A sampler that has seen enough losses, of 1 + t, at every timestep."""
    sampler = LossSecondMomentResampler(steps, history_per_term=3)
    for _ in range(3):
        sampler.update_with_local_losses(torch.arange(steps), 1.0 + torch.arange(steps))
    return sampler


@pytest.mark.parametrize("name", SAMPLERS)
def test_uniform_at_first(name):
    sampler = SAMPLERS[name](50)
    t, weights = sampler.sample(20000, "cpu", torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64 and weights.dtype == torch.float32
    assert (weights - 1).abs().max() < 1e-6
    assert (torch.bincount(t, minlength=50) / 400 - 1).abs().max() < 0.25


def test_probabilities_follow_the_root_mean_square_loss():
    p = warm_sampler().probabilities()
    terms = 1.0 + torch.arange(8, dtype=torch.float64)
    torch.testing.assert_close(p, 0.999 * terms / 36 + 0.001 / 8)


def test_the_oldest_loss_is_forgotten():
    sampler = warm_sampler()
    sampler.update_with_local_losses(torch.tensor([0, 0, 0]), torch.tensor([8.0, 8.0, 8.0]))
    p = sampler.probabilities()
    assert p[0] == p[7]


def test_weights_keep_the_mean_loss_unbiased():
    sampler = warm_sampler()
    p = sampler.probabilities()
    t, weights = sampler.sample(50000, "cpu", torch.Generator().manual_seed(0))
    torch.testing.assert_close(weights, (1 / (8 * p[t])).float())
    loss = (t.float() - 3) ** 2
    assert (weights * loss).mean().item() == pytest.approx(((torch.arange(8) - 3.0) ** 2).mean().item(), rel=0.03)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_generator_decides(name):
    sampler = SAMPLERS[name](1000)
    before = torch.get_rng_state()
    first, again, other = (sampler.sample(16, "cpu", torch.Generator().manual_seed(s))[0] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_state_resumes_the_probabilities():
    sampler, fresh = warm_sampler(), LossSecondMomentResampler(8, history_per_term=3)
    state = sampler.state_dict()
    fresh.load_state_dict(state)
    assert torch.equal(fresh.probabilities(), sampler.probabilities())
    fresh.update_with_local_losses(torch.tensor([0]), torch.tensor([9.0]))
    assert state["history"][0].max() == 1


def test_errors():
    with pytest.raises(ValueError, match="--schedule_sampler"):
        SAMPLERS["uniform"](8).load_state_dict(warm_sampler().state_dict())
    with pytest.raises(ValueError, match=r"\(9, 3\).*--diffusion_steps"):
        LossSecondMomentResampler(9, history_per_term=3).load_state_dict(warm_sampler().state_dict())
