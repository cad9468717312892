"""Respacing: which steps are kept, and that the shorter process agrees with the long one."""

import numpy as np
import pytest
import torch

from guided_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from guided_diffusion.respace import SpacedDiffusion, space_timesteps


def spaced(use_timesteps, steps: int = 1000, **kwargs) -> SpacedDiffusion:
    return SpacedDiffusion(
        use_timesteps=use_timesteps,
        betas=get_named_beta_schedule("cosine", steps),
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_LARGE,
        loss_type=LossType.MSE,
        **kwargs,
    )


@pytest.mark.parametrize("key", ["ddim25@1000", "25@1000", "10,15,20@300"])
def test_golden_timesteps(key, goldens):
    spec, steps = key.split("@")
    expected = np.load(goldens / "guided_diffusion.npz")[f"timesteps/{key}"]
    assert sorted(space_timesteps(int(steps), spec)) == expected.tolist()


def test_kinds_of_spec():
    assert space_timesteps(10, "") == set(range(10)) == space_timesteps(10, 10) == space_timesteps(10, "ddim10")
    assert space_timesteps(10, "ddim5") == {0, 2, 4, 6, 8}
    assert space_timesteps(1000, 25) == space_timesteps(1000, "25") == space_timesteps(1000, [25])
    assert space_timesteps(10, "1,2") == {0, 5, 9}
    assert {0, 999} <= space_timesteps(1000, 7)


@pytest.mark.parametrize("steps", [7, 100, 301])
def test_every_count_is_met(steps):
    for count in range(1, steps + 1):
        kept = space_timesteps(steps, count)
        assert len(kept) == count and min(kept) == 0 and max(kept) == (steps - 1 if count > 1 else 0)


@pytest.mark.parametrize("spec", ["1001", "400,400,400", "0", "-3", "a,b", "ddim1001", "ddim999", "ddim0", "ddimx"])
def test_counts_that_cannot_be_met(spec):
    with pytest.raises(ValueError, match="timestep_respacing") as error:
        space_timesteps(1000, spec)
    assert "\n" not in str(error.value)


def test_alpha_bars_are_those_of_the_kept_steps():
    full, short = spaced(range(1000)), spaced(space_timesteps(1000, "ddim25"))
    np.testing.assert_allclose(full.betas, get_named_beta_schedule("cosine", 1000), rtol=1e-9)
    assert short.num_timesteps == 25 and short.original_num_steps == 1000
    np.testing.assert_allclose(short.alphas_cumprod, full.alphas_cumprod[short.timestep_map], rtol=1e-12)


def test_network_and_gradient_get_original_timesteps():
    diffusion, seen = spaced({0, 300, 999}), []

    def network(x, t):
        seen.append(("network", t.tolist()))
        return x

    def gradient(x, t):
        seen.append(("gradient", t.tolist()))
        return torch.zeros_like(x)

    for sampler in (diffusion.ddim_sample_loop, diffusion.p_sample_loop):
        seen.clear()
        sampler(network, (1, 3, 2, 2), noise=torch.zeros(1, 3, 2, 2), cond_fn=gradient)
        assert seen == [(who, [t]) for t in (999, 300, 0) for who in ("network", "gradient")]
    seen.clear()
    diffusion.training_losses(network, torch.zeros(1, 3, 2, 2), torch.tensor([1]), noise=torch.ones(1, 3, 2, 2))
    assert seen == [("network", [300])]


def test_rescaling_uses_the_long_process():
    diffusion = spaced({0, 10, 49}, steps=50, rescale_timesteps=True)
    t = diffusion.model_timesteps(torch.tensor([0, 1, 2]))
    assert t.dtype == torch.float32 and t.tolist() == [0, 200, 980]
    assert spaced({0, 10, 49}, steps=50).model_timesteps(torch.tensor([1])).tolist() == [10]


def test_the_map_is_copied_to_a_device_once():
    diffusion, t = spaced({0, 5}), torch.tensor([1])
    diffusion.model_timesteps(t)
    table = diffusion._cached("timestep_map", t.device)
    diffusion.model_timesteps(t)
    assert diffusion._cached("timestep_map", t.device) is table and table.dtype == torch.int64


@pytest.mark.parametrize("use_timesteps", [[], [1000], [-1, 3]])
def test_timesteps_outside_the_process(use_timesteps):
    with pytest.raises(ValueError, match="use_timesteps.* 0 to 999"):
        spaced(use_timesteps)
