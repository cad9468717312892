"""The guidance gradient and the sampler."""

import pytest
import torch
import torch.nn.functional as F

from guided_diffusion.guidance import classifier_guidance, sample
from guided_diffusion.respace import respaced
from guided_diffusion.script_util import create_gaussian_diffusion
from models.class_learner import ClassLearner
from models.guides import class_learner_guide
from models.meta_model import MetaModel


def prior(diffusion, variance=0.25):
    """The exact noise predictor for images whose pixels are N(0, variance)."""
    abar = torch.from_numpy(create_gaussian_diffusion(steps=1000, noise_schedule="cosine").alphas_cumprod)

    def network(x, t, **_):
        a = abar[t].to(x.dtype).view(-1, 1, 1, 1)
        return (1 - a).sqrt() * x / (a * variance + 1 - a)

    return network


def by_brightness(x, t):
    """log p(c | x) of two classes, dark and bright: Gaussians at mean pixel -0.5 and 0.5."""
    mean = x.mean((1, 2, 3))
    return F.log_softmax(torch.stack([-((mean + 0.5) ** 2), -((mean - 0.5) ** 2)], 1) * 20, 1)


def test_gradient_is_that_of_finite_differences():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 3 * 4 * 4, generator=g, dtype=torch.float64)

    def log_p(x, t):
        return F.log_softmax(torch.tanh(x).flatten(1) @ weight.T / (1 + t[:, None] / 1000), 1)

    x = torch.randn(3, 3, 4, 4, generator=g, dtype=torch.float64)
    t, labels, scale = torch.tensor([0, 500, 999]), torch.tensor([6, 0, 3]), 2.5
    gradient = classifier_guidance(log_p, labels, scale)(x, t)
    rows = torch.arange(3)
    numeric = torch.zeros_like(x)
    for index in range(x[0].numel()):
        step = torch.zeros(x[0].numel(), dtype=torch.float64)
        step[index] = 1e-6
        step = step.view(1, 3, 4, 4)
        rise = log_p(x + step, t)[rows, labels] - log_p(x - step, t)[rows, labels]
        numeric.view(3, -1)[:, index] = scale * rise / 2e-6
    torch.testing.assert_close(gradient, numeric, atol=1e-8, rtol=1e-7)


def test_gradient_of_the_meta_model_is_a_rise():
    rng = torch.Generator().manual_seed(1)
    model, learner = MetaModel(6, generator=rng), ClassLearner(6, 64, generator=rng)
    log_p = class_learner_guide(model, learner)
    x, labels, t = torch.randn(4, 3, 16, 16, generator=rng), torch.tensor([0, 5, 2, 3]), torch.tensor([0, 9, 99, 999])
    with torch.no_grad():
        gradient = classifier_guidance(log_p, labels, 1.0)(x, t)
        step = 1e-3 / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        rise = (log_p(x + step * gradient, t) - log_p(x - step * gradient, t)).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(rise / 2e-3, gradient.flatten(1).norm(dim=1), rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_without_guidance_it_is_ddim(toy_pool, learn_sigma, make_pool, tmp_path):
    from guided_diffusion.pool import Pool

    pool = toy_pool if learn_sigma else make_pool(tmp_path, [1], learn_sigma=False)
    model = Pool(pool).load(0)
    diffusion, noise = model.diffusion("ddim8"), torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    expected = diffusion.ddim_sample_loop(model.network, noise.shape, noise=noise)
    got = sample(model.network, diffusion, noise)
    assert float((got - expected).abs().max()) < 1e-5
    zero = sample(model.network, diffusion, noise, cond_fn=lambda x, t: torch.zeros_like(x))
    assert float((zero - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("slope, expected", [(0.5, None), (50.0, 1.0)])
def test_guidance_on_x_t_shifts_x_0_by_the_score(slope, expected):
    """(1 - abar) / sqrt(abar) times the gradient (arXiv 2105.05233, alg. 2), clipped again."""
    whole = create_gaussian_diffusion(steps=1000, noise_schedule="cosine", predict_xstart=True)
    abar = float(whole.alphas_cumprod[200])
    images = sample(
        lambda x, t: torch.full_like(x, 0.1), respaced(whole, [200]), torch.zeros(2, 3, 4, 4),
        cond_fn=lambda x, t: torch.full_like(x, slope),
    )  # fmt: skip
    shifted = 0.1 + (1 - abar) / abar**0.5 * slope if expected is None else expected
    torch.testing.assert_close(images, torch.full_like(images, shifted), rtol=0, atol=1e-5)


@pytest.mark.parametrize("guide_on", ["x_t", "x_0"])
def test_samples_move_towards_the_class_asked_for(guide_on):
    diffusion = create_gaussian_diffusion(steps=1000, noise_schedule="cosine", timestep_respacing="ddim25")
    noise = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    labels = torch.tensor([0, 1]).repeat(8)
    network, seen = prior(diffusion), []

    def log_p(x, t):
        seen.append((x.detach(), t))
        return by_brightness(x, t)

    plain = sample(network, diffusion, noise).mean((1, 2, 3))
    cond_fn = classifier_guidance(log_p, labels, 4.0)
    guided = sample(network, diffusion, noise, cond_fn=cond_fn, guide_on=guide_on)
    moved = guided.mean((1, 2, 3)) - plain
    assert float(moved[labels == 1].min()) > 0.005 and float(moved[labels == 0].max()) < -0.005
    assert float(guided.abs().max()) <= 1
    assert [int(t[0]) for _, t in seen] == list(range(960, -1, -40))  # those of the long process
    first = seen[0][0]
    assert torch.equal(first, noise) if guide_on == "x_t" else float(first.abs().max()) <= 1


@pytest.mark.parametrize("renoise", [0.0, 0.36, 1.0])
def test_new_noise(renoise):
    """Equation 12 of arXiv 2010.02502 with sigma^2 = renoise * (1 - abar_t): as much noise as without."""
    whole = create_gaussian_diffusion(steps=1000, noise_schedule="cosine", predict_xstart=True)
    seen, new = [], torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def network(x, t, **_):
        seen.append(x)
        return torch.full_like(x, 0.1)

    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    images = sample(network, respaced(whole, [300, 500]), x, renoise=renoise, fresh=lambda index: new)
    now, before = (float(whole.alphas_cumprod[t]) for t in (500, 300))
    sigma = (renoise * (1 - before)) ** 0.5
    eps = (x - now**0.5 * 0.1) / (1 - now) ** 0.5
    expected = before**0.5 * 0.1 + max(0.0, 1 - before - sigma**2) ** 0.5 * eps + sigma * new
    torch.testing.assert_close(seen[1], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(images, torch.full_like(images, 0.1))  # no noise is left at the end
