"""Gaussian diffusion: goldens, schedule identities, the posterior against Bayes, samplers on Gaussian data."""

import json
import math

import numpy as np
import pytest
import torch

from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from guided_diffusion.losses import approx_standard_normal_cdf, discretized_gaussian_log_likelihood, normal_kl
from guided_diffusion.script_util import create_gaussian_diffusion, create_model_and_diffusion


def process(steps: int = 1000, schedule: str = "cosine", **kwargs) -> GaussianDiffusion:
    settings = dict(model_mean_type=ModelMeanType.EPSILON, model_var_type=ModelVarType.FIXED_LARGE)
    settings |= dict(loss_type=LossType.MSE)
    return GaussianDiffusion(betas=get_named_beta_schedule(schedule, steps), **settings | kwargs)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def guidance(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.3 - x


# ---- goldens


@pytest.fixture(scope="module")
def golden(goldens):
    with np.load(goldens / "guided_diffusion.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def uncond64(goldens, fill):
    config = json.loads((goldens / "guided_diffusion.json").read_text())["uncond64"]["config"]
    model, diffusion = create_model_and_diffusion(**config)
    _, spaced = create_model_and_diffusion(**config | dict(timestep_respacing="ddim25"))
    return fill(model).eval(), diffusion, spaced


@pytest.fixture(scope="module")
def batch(arr):
    x = arr(2, 4, 3, 64, 64)
    return x, x.clamp(-1, 1), arr(3, 4, 3, 64, 64), torch.tensor([0, 1, 500, 999])


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_golden_betas(name, golden):
    np.testing.assert_allclose(get_named_beta_schedule(name, 1000), golden[f"betas/{name}1000"], rtol=0, atol=1e-12)


def test_golden_q_sample(uncond64, batch, golden):
    _, x_start, noise, t = batch
    x_t = uncond64[1].q_sample(x_start, t, noise)
    np.testing.assert_allclose(x_t.numpy(), golden["q_sample"], rtol=0, atol=1e-6)


def test_golden_p_mean_variance_and_condition_mean(uncond64, batch, golden):
    model, diffusion, _ = uncond64
    x, _, _, t = batch
    with torch.no_grad():
        out = diffusion.p_mean_variance(model, x, t)
        out["condition_mean"] = diffusion.condition_mean(guidance, out, x, t)
    for key in ("mean", "log_variance", "pred_xstart"):
        np.testing.assert_allclose(out[key].numpy(), golden[f"p_mean_variance/{key}"], rtol=0, atol=1e-4)
    torch.testing.assert_close(out["variance"], out["log_variance"].exp())
    np.testing.assert_allclose(out["condition_mean"].numpy(), golden["condition_mean"], rtol=0, atol=1e-4)


def test_golden_training_losses(uncond64, batch, golden):
    model, diffusion, _ = uncond64
    _, x_start, noise, t = batch
    with torch.no_grad():
        terms = diffusion.training_losses(model, x_start, t, noise=noise)
    assert set(terms) == {"loss", "mse", "vb"}
    # The bound at t = 999 is 1047, where float32 steps by 1.2e-4: float64 gives 1047.12520, the golden is the float32
    # below it and the nearer one is above, so rtol lets one step pass.
    for key, value in terms.items():
        np.testing.assert_allclose(value.numpy(), golden[f"training_losses/{key}"], rtol=1.2e-7, atol=1e-4)


def test_golden_ddim(uncond64, arr, golden):
    model, _, spaced = uncond64
    sample = spaced.ddim_sample_loop(model, (2, 3, 64, 64), noise=arr(4, 2, 3, 64, 64))
    np.testing.assert_allclose(sample.numpy(), golden["ddim25/plain"], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_golden_guided_ddim(uncond64, arr, golden):
    """Not to 1e-4: guidance leaves x_0 unclipped, so rounding grows over the 25 steps.

    In float64, noise of 4.5e-7 on the network's output (its float32 rounding) moves single pixels by 3e-4 to 4e-4;
    in float32, other threads or convolutions do by 4e-4 to 6e-4. Float64 ends 1.4e-3 (mean 7e-5) from the golden.
    """
    model, _, spaced = uncond64
    sample = spaced.ddim_sample_loop(model, (2, 3, 64, 64), noise=arr(4, 2, 3, 64, 64), cond_fn=guidance)
    error = np.abs(sample.numpy() - golden["ddim25/guided"])
    assert error.max() < 2e-3 and error.mean() < 8e-5


# ---- schedules and tables


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [50, 1000])
def test_schedule_identities(schedule, steps):
    d = process(steps, schedule)
    assert d.betas.dtype == np.float64 and ((d.betas > 0) & (d.betas < 1)).all()
    np.testing.assert_allclose(d.alphas_cumprod, np.exp(np.cumsum(np.log1p(-d.betas))), rtol=1e-9)
    np.testing.assert_allclose(d.sqrt_alphas_cumprod**2 + d.sqrt_one_minus_alphas_cumprod**2, 1, rtol=1e-12)
    assert (np.diff(d.alphas_cumprod) < 0).all() and d.alphas_cumprod[-1] < 1e-3
    assert d.alphas_cumprod_prev[0] == 1 and d.posterior_variance[0] == 0
    assert (d.posterior_variance[1:] < d.betas[1:]).all()
    assert d.posterior_log_variance_clipped[0] == d.posterior_log_variance_clipped[1]


def test_cosine_schedule_follows_its_alpha_bar():
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(process().alphas_cumprod[:-1], f[1:-1] / f[0], rtol=1e-9)  # the last beta is capped
    assert process().betas[-1] == 0.999


@pytest.mark.parametrize("t", [1, 30, 99])
def test_posterior_against_bayes(t):
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0), here on a grid."""
    d = process(100, "linear")
    x_start, x_t = 0.4, -0.7
    grid = np.linspace(-12, 12, 400001)
    alpha, prev = 1 - d.betas[t], d.alphas_cumprod_prev[t]
    log_density = -((x_t - np.sqrt(alpha) * grid) ** 2) / (2 * d.betas[t])
    log_density -= (grid - np.sqrt(prev) * x_start) ** 2 / (2 * (1 - prev))
    density = np.exp(log_density - log_density.max())
    density /= density.sum()
    mean = (grid * density).sum()
    variance = ((grid - mean) ** 2 * density).sum()
    shape = (1, 1, 1, 1)
    actual = d.q_posterior_mean_variance(torch.full(shape, x_start), torch.full(shape, x_t), torch.tensor([t]))
    assert actual[0].item() == pytest.approx(mean, abs=1e-6)
    assert actual[1].item() == pytest.approx(variance, rel=1e-5)
    assert actual[2].item() == pytest.approx(math.log(variance), abs=1e-5)


def test_noised_images_have_the_mean_and_variance_of_the_schedule():
    d, t = process(100), torch.full((1,), 40)
    sample = d.q_sample(torch.full((1, 1, 200, 500), 0.5), t, generator=seeded())
    alpha_bar = np.prod(1 - d.betas[:41])
    assert sample.mean().item() == pytest.approx(0.5 * alpha_bar**0.5, abs=0.01)
    assert sample.var().item() == pytest.approx(1 - alpha_bar, rel=0.02)


def test_tables_are_float32_copied_once_and_usable_after_inference():
    d, t = process(10), torch.tensor([3])
    with torch.inference_mode():
        first = d._cached("betas", t.device)
    assert first.dtype == torch.float32 and not first.is_inference()
    assert d._cached("betas", t.device) is first
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    d.q_sample(x, t, torch.ones(1, 1, 2, 2)).sum().backward()
    torch.testing.assert_close(x.grad.mean().item(), d.sqrt_alphas_cumprod[3], atol=1e-6, rtol=0)


# ---- what the network predicts


@pytest.mark.parametrize("mean_type", list(ModelMeanType))
def test_a_perfect_network_gives_x_start_and_the_posterior(mean_type):
    d = process(50, model_mean_type=mean_type)
    t = torch.tensor([0, 20, 40])
    x_start, noise = torch.rand(3, 3, 4, 4, generator=seeded()) * 2 - 1, torch.randn(3, 3, 4, 4, generator=seeded(1))
    x_t = d.q_sample(x_start, t, noise)
    mean = d.q_posterior_mean_variance(x_start, x_t, t)[0]
    answer = {ModelMeanType.EPSILON: noise, ModelMeanType.START_X: x_start}[mean_type]
    out = d.p_mean_variance(lambda x, t: answer, x_t, t)
    torch.testing.assert_close(out["pred_xstart"], x_start, atol=1e-4, rtol=0)
    torch.testing.assert_close(out["mean"], mean, atol=1e-4, rtol=0)
    losses = d.training_losses(lambda x, t: answer, x_start, t, noise=noise)
    assert losses["loss"].shape == (3,) and losses["loss"].max() < 1e-8


@pytest.mark.parametrize("clip, expected", [(True, 1), (False, 3)])
def test_clipping(clip, expected):
    d, x = process(50, model_mean_type=ModelMeanType.START_X), torch.zeros(1, 3, 2, 2)
    out = d.p_mean_variance(lambda x, t: x + 3, x, torch.tensor([9]), clip)
    assert (out["pred_xstart"] == expected).all()


@pytest.mark.parametrize("var_type", list(ModelVarType))
def test_variances(var_type):
    d, t = process(50, model_var_type=var_type), torch.tensor([0, 30])
    x = torch.zeros(2, 3, 2, 2)
    output = torch.cat([x, torch.full_like(x, 0.5)], dim=1) if var_type is ModelVarType.LEARNED_RANGE else x
    log_variance = d.p_mean_variance(lambda x, t: output, x, t)["log_variance"][:, 0, 0, 0].numpy()
    low, high = d.posterior_log_variance_clipped[[0, 30]], np.log(d.betas[[0, 30]])
    expected = {ModelVarType.LEARNED_RANGE: 0.75 * high + 0.25 * low, ModelVarType.FIXED_LARGE: [low[0], high[1]]}
    np.testing.assert_allclose(log_variance, expected[var_type], rtol=1e-5)


def test_condition_score_moves_along_the_gradient():
    """ADM, alg. 2: eps - sqrt(1 - alpha-bar) g, that is x_0 + (1 - alpha-bar) / sqrt(alpha-bar) g."""
    d, t = process(100), torch.tensor([5, 60])
    x, eps = torch.randn(2, 3, 4, 4, generator=seeded()), torch.randn(2, 3, 4, 4, generator=seeded(1))
    gradient = torch.randn(2, 3, 4, 4, generator=seeded(2))
    out = d.p_mean_variance(lambda x, t: eps, x, t, clip_denoised=False)
    guided = d.condition_score(lambda x, t: gradient, out, x, t)
    alpha_bar = torch.from_numpy(d.alphas_cumprod)[t].view(-1, 1, 1, 1)
    expected = out["pred_xstart"] + (1 - alpha_bar) / alpha_bar.sqrt() * gradient
    torch.testing.assert_close(guided["pred_xstart"], expected.float(), atol=1e-4, rtol=1e-4)
    mean = d.q_posterior_mean_variance(expected, x, t)[0]
    torch.testing.assert_close(guided["mean"], mean.float(), atol=1e-4, rtol=0)
    assert ((guided["mean"] - out["mean"]) * gradient).sum() > 0


def test_condition_mean_is_variance_times_gradient():
    d, t = process(100), torch.tensor([5, 60])
    x = torch.randn(2, 3, 4, 4, generator=seeded())
    out = d.p_mean_variance(lambda x, t: x, x, t)
    shifted = d.condition_mean(lambda x, t, scale: scale * torch.ones_like(x), out, x, t, dict(scale=2.0))
    torch.testing.assert_close(shifted - out["mean"], 2 * out["variance"], atol=1e-6, rtol=1e-4)


# ---- samplers, on data whose best network is known


def gaussian_network(d: GaussianDiffusion, std: float):
    """The exact E[noise | x_t] for images of independent N(0, std^2) pixels."""

    def network(x, t):
        alpha_bar = torch.from_numpy(d.alphas_cumprod)[t].view(-1, 1, 1, 1)
        return ((1 - alpha_bar).sqrt() * x / (alpha_bar * std**2 + 1 - alpha_bar)).float()

    return network


SHAPE = (8, 3, 40, 40)


def test_ddim_samples_the_data():
    d, noise = process(400), torch.randn(SHAPE, generator=seeded())
    sample = d.ddim_sample_loop(gaussian_network(d, 0.25), SHAPE, noise, clip_denoised=False)
    assert sample.std().item() == pytest.approx(0.25, rel=0.02)
    assert sample.mean().abs() < 0.01


def test_ancestral_samples_the_data():
    d = process(400)
    sample = d.p_sample_loop(gaussian_network(d, 0.25), SHAPE, clip_denoised=False, generator=seeded())
    assert sample.std().item() == pytest.approx(0.25, rel=0.03)


@pytest.mark.parametrize("sampler, more", [("ddim_sample_loop", {}), ("p_sample_loop", {"generator": seeded(1)})])
def test_guidance_samples_the_class(sampler, more):
    """N(0, 1) pixels guided by the exact grad log p(y | x_t) of a class whose pixels are N(0.5, 0.3^2)."""
    d = process(400)
    mean, std = 0.5, 0.3

    def classifier(x, t):
        alpha_bar = torch.from_numpy(d.alphas_cumprod)[t].view(-1, 1, 1, 1)
        return (x - (x - alpha_bar.sqrt() * mean) / (alpha_bar * std**2 + 1 - alpha_bar)).float()

    options = dict(noise=torch.randn(SHAPE, generator=seeded()), clip_denoised=False, cond_fn=classifier, **more)
    sample = getattr(d, sampler)(gaussian_network(d, 1.0), SHAPE, **options)
    assert sample.mean().item() == pytest.approx(mean, abs=0.02)
    assert sample.std().item() == pytest.approx(std, rel=0.05)


def test_ancestral_sampling_is_seeded_by_its_generator_only():
    d = process(10)
    network = gaussian_network(d, 0.5)
    before = torch.get_rng_state()
    first, again, other = (d.p_sample_loop(network, (2, 3, 4, 4), generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("sampler", ["ddim_sample_loop", "p_sample_loop"])
def test_loops_run_every_step_without_gradients(sampler):
    d, seen = process(10), []
    weight = torch.ones(1, requires_grad=True)

    def network(x, t):
        seen.append(t.tolist())
        return x * weight

    loop = getattr(d, sampler)
    assert not loop(network, (2, 3, 4, 4), noise=torch.ones(2, 3, 4, 4)).requires_grad
    assert seen == [[t, t] for t in range(9, -1, -1)]
    with pytest.raises(ValueError, match="noise of shape"):
        loop(network, (2, 3, 4, 4), noise=torch.ones(1, 3, 4, 4))


def test_rescaled_timesteps():
    t = torch.tensor([0, 1, 49])
    assert process(50, rescale_timesteps=True).model_timesteps(t).tolist() == [0, 20, 980]
    assert process(50).model_timesteps(t).tolist() == [0, 1, 49]


# ---- losses


def test_min_snr_weights():
    """2303.09556, sec. 3.4: min(snr, 5) / snr on the noise, min(snr, 5) on x_0; the bound keeps its weight."""
    snr = process().alphas_cumprod / (1 - process().alphas_cumprod)
    weighted = process(loss_weighting="min_snr")
    np.testing.assert_allclose(weighted.mse_weight, np.minimum(snr, 5) / snr, rtol=1e-12)
    start = process(loss_weighting="min_snr", model_mean_type=ModelMeanType.START_X)
    np.testing.assert_allclose(start.mse_weight, np.minimum(snr, 5), rtol=1e-12)
    assert (process().mse_weight == 1).all()

    d = process(loss_weighting="min_snr", model_var_type=ModelVarType.LEARNED_RANGE)
    t, x = torch.tensor([10, 900]), torch.rand(2, 3, 4, 4, generator=seeded())
    terms = d.training_losses(lambda x, t: torch.cat([x, x], dim=1), x, t, noise=torch.ones_like(x))
    expected = torch.from_numpy(d.mse_weight).float()[t] * terms["mse"] + terms["vb"]
    torch.testing.assert_close(terms["loss"], expected)
    assert d.mse_weight[10] < 0.1 and d.mse_weight[900] == 1


def test_the_bound_trains_only_the_variance():
    d, t = process(100, model_var_type=ModelVarType.LEARNED_RANGE), torch.tensor([0, 50])
    output = torch.zeros(2, 6, 4, 4, requires_grad=True)
    x = torch.rand(2, 3, 4, 4, generator=seeded())
    d.training_losses(lambda x, t: output, x, t, noise=torch.ones_like(x))["vb"].sum().backward()
    assert output.grad[:, :3].abs().max() == 0 and output.grad[:, 3:].abs().min() > 0


def test_rescaled_losses():
    t, x, noise = torch.tensor([0, 50]), torch.rand(2, 3, 4, 4, generator=seeded()), torch.randn(2, 3, 4, 4)
    losses = {
        loss_type: process(100, model_var_type=ModelVarType.LEARNED_RANGE, loss_type=loss_type).training_losses(
            lambda x, t: 0.1 * torch.cat([x, x], dim=1), x, t, noise=noise
        )
        for loss_type in LossType
    }
    torch.testing.assert_close(losses[LossType.RESCALED_MSE]["vb"], losses[LossType.MSE]["vb"] * 0.1)
    torch.testing.assert_close(losses[LossType.RESCALED_KL]["loss"], losses[LossType.MSE]["vb"] * 100)


def test_normal_kl_against_torch():
    mean1, mean2, logvar1, logvar2 = torch.randn(4, 100, generator=seeded())
    normal = torch.distributions.Normal
    p, q = normal(mean1, (0.5 * logvar1).exp()), normal(mean2, (0.5 * logvar2).exp())
    torch.testing.assert_close(normal_kl(mean1, logvar1, mean2, logvar2), torch.distributions.kl_divergence(p, q))


def test_approximate_cdf_is_close():
    x = torch.linspace(-5, 5, 1001)
    assert (approx_standard_normal_cdf(x) - torch.special.ndtr(x)).abs().max() < 4e-4


def test_discretized_likelihood_sums_to_one():
    levels = torch.linspace(-1, 1, 256)
    for mean, log_scale in ((0.1, -2.0), (-0.99, -1.0), (3.0, 0.0)):
        log_mass = discretized_gaussian_log_likelihood(
            levels, means=torch.full((256,), mean), log_scales=torch.full((256,), log_scale)
        )
        assert log_mass.exp().sum().item() == pytest.approx(1, abs=1e-4)


# ---- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(noise_schedule="quadratic"), "noise_schedule 'quadratic'"),
        (dict(steps=20), "more than 20 steps"),
        (dict(steps=0), "diffusion_steps 0"),
        (dict(loss_weighting="snr"), "loss_weighting 'snr'"),
        (dict(loss_weighting="min_snr", use_kl=True), "min_snr with use_kl"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        create_gaussian_diffusion(**settings)
    assert "\n" not in str(error.value)


def test_a_network_without_the_variance_is_refused():
    d, x = create_gaussian_diffusion(learn_sigma=True), torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="learn_sigma"):
        d.p_mean_variance(lambda x, t: x, x, torch.tensor([3]))
    with pytest.raises(ValueError, match="learn_sigma"):
        d.training_losses(lambda x, t: x, x, torch.tensor([3]))
