"""Diffusion mixes: timesteps, noise level, weights and labels."""

from pathlib import Path

import pytest
import torch

from guided_diffusion.mix import diffusion_mixes, mix_labels, mix_timesteps
from guided_diffusion.pool import Pool, PoolModel
from guided_diffusion.script_util import model_and_diffusion_defaults


def spy(calls):
    """A pool model that notes what it is called with and predicts no noise."""

    def network(x, t, **kwargs):
        calls.append((x, t, kwargs))
        return torch.zeros_like(x)

    flags = {**model_and_diffusion_defaults(), "noise_schedule": "cosine"}
    return PoolModel(network, flags, None, Path("spy"))


def pictures(count=4):
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.rand(count, 3, 16, 16, generator=rng) * 2 - 1 for _ in range(2))
    return a, b, torch.randn(count, 3, 16, 16, generator=rng)


def test_timesteps():
    assert mix_timesteps(200, 10, 1000) == [0, 22, 44, 66, 88, 111, 133, 155, 177, 199]
    assert mix_timesteps(200, 1, 1000) == [199] and mix_timesteps(1, 1, 1000) == [0]
    assert mix_timesteps(7, 7, 7) == list(range(7)) and mix_timesteps(7, 2, 7) == [0, 6]
    for level in range(1, 40):
        for steps in range(1, level + 1):
            kept = mix_timesteps(level, steps, 1000)
            assert len(set(kept)) == steps and kept[-1] == level - 1 and kept[0] in (0, level - 1)


@pytest.mark.parametrize("level, steps, total", [(200, 0, 1000), (10, 11, 1000), (200, 10, 100), (0, 1, 1000)])
def test_refuses_steps_and_levels(level, steps, total):
    with pytest.raises(ValueError, match="expected 1 <= steps <= level"):
        mix_timesteps(level, steps, total)


def test_noised_blend_is_exactly_that_of_the_schedule():
    a, b, noise = pictures()
    weight, calls = torch.tensor([0.0, 0.25, 0.5, 1.0]), []
    model = spy(calls)
    out = diffusion_mixes(model, a, b, weight, noise, level=200, steps=4)
    x_t, t, _ = calls[0]
    abar = float(model.diffusion().alphas_cumprod[199])
    w = weight.view(-1, 1, 1, 1)
    torch.testing.assert_close(x_t, abar**0.5 * (w * a + (1 - w) * b) + (1 - abar) ** 0.5 * noise, atol=1e-5, rtol=1e-5)
    assert [int(t[0]) for _, t, _ in calls] == [199, 133, 66, 0]
    assert out.shape == a.shape and float(out.abs().max()) <= 1


def test_weight_one_is_the_first_image_denoised(toy_pool):
    a, b, noise = pictures()
    model, one = Pool(toy_pool).load(0), torch.ones(4)
    only_a = diffusion_mixes(model, a, a, torch.full((4,), 0.3), noise, level=100, steps=3)
    assert float((diffusion_mixes(model, a, b, one, noise, level=100, steps=3) - only_a).abs().max()) < 1e-5
    swapped = diffusion_mixes(model, b, a, 1 - one, noise, level=100, steps=3)
    assert float((swapped - only_a).abs().max()) < 1e-5


def test_little_noise_changes_little(toy_pool):
    a, b, noise = pictures()
    mixed = diffusion_mixes(Pool(toy_pool).load(0), a, b, torch.full((4,), 0.5), noise, level=1, steps=1)
    assert float((mixed - (a + b) / 2).abs().mean()) < 0.1


def test_local_labels_reach_a_conditional_network():
    a, b, noise = pictures()
    calls, y = [], torch.tensor([3, 1, 0, 2])
    diffusion_mixes(spy(calls), a, b, torch.ones(4), noise, level=10, steps=2, local_labels=y)
    assert all(torch.equal(kwargs["y"], y) for _, _, kwargs in calls)


def test_labels_weigh_as_the_images():
    eye = torch.eye(3)[None]  # (1, S = 3, way)
    weight = torch.tensor([[0.2, 1.0, 0.5]])
    got = mix_labels(eye, eye[:, [1, 2, 0]], weight)
    expected = torch.tensor([[[0.2, 0.8, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]])
    torch.testing.assert_close(got, expected)
