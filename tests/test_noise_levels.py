"""A timestep of one process used on another is carried over by its noise: guidance on x_t, mixes, respaced models."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import diffusionmix
import few_shot
import main
from guided_diffusion.guidance import classifier_guidance, sample
from guided_diffusion.image_datasets import TrainingImages
from guided_diffusion.memorisation import draw
from guided_diffusion.mix import diffusion_mixes
from guided_diffusion.pool import Pool, PoolModel
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from guided_diffusion.synthesis import Synthesis, synthesise
from guided_diffusion.train_util import TrainLoop, TrainSettings
from guided_diffusion.unet import UNetModel
from tests.conftest import NO_IMAGES, TINY, UNET

pytestmark = pytest.mark.usefixtures("enough_memory")
CPU = torch.device("cpu")
PROCESSES = [
    dict(noise_schedule="linear"),
    dict(noise_schedule="linear", rescale_timesteps=True, diffusion_steps=500),
    dict(noise_schedule="cosine", diffusion_steps=4000),
    dict(noise_schedule="cosine", diffusion_steps=250, rescale_timesteps=True),
    dict(noise_schedule="cosine", diffusion_steps=100),
    dict(noise_schedule="linear", diffusion_steps=4000, timestep_respacing="500"),
]


def alpha_bars(noise_schedule, diffusion_steps=1000, **_):
    """Of every timestep, from the papers' formulas."""
    if noise_schedule == "linear":
        return np.cumprod(1 - np.linspace(0.1 / diffusion_steps, 20 / diffusion_steps, diffusion_steps))
    f = np.cos((np.arange(diffusion_steps + 1) / diffusion_steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(np.maximum(f[1:] / f[:-1], 0.001))


COSINE = alpha_bars("cosine")


def nearest(level, among):
    return int(np.abs(among - level).argmin())


def spy(**flags):
    """A pool model that predicts no noise, and the timesteps that its network is called with."""
    times = []

    def network(x, t, **_):
        times.append(float(t[0]))
        return torch.zeros_like(x)

    return PoolModel(network, {**model_and_diffusion_defaults(), **flags}, None, Path("pool/spy.pt")), times


@pytest.fixture
def timesteps(monkeypatch):
    """The timesteps that U-Nets are called with, but for the trials of a dry run."""
    seen, forward = [], UNetModel.forward

    def noting(network, x, t, *rest, **options):
        if x.device.type != "meta":
            seen.append(t.tolist())
        return forward(network, x, t, *rest, **options)

    monkeypatch.setattr(UNetModel, "forward", noting)
    return seen


# ---- guidance


def asked(model, spec, guide_on="x_t"):
    times = []

    def log_p(x, t):
        times.append(t.clone())
        return x.flatten(1)[:, :2].log_softmax(1)

    cond_fn = classifier_guidance(log_p, torch.tensor([0, 1]), 1.0)
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    sample(model.network, model.diffusion(spec), noise, cond_fn=cond_fn, guide_on=guide_on)
    assert all(bool((t == t[0]).all()) for t in times)
    return [float(t[0]) for t in times]


def test_linear_1000_at_step_13_of_25_is_asked_where_its_noise_was_taught():
    model, times = spy(noise_schedule="linear")
    assert asked(model, "ddim25")[12] == 798 == nearest(alpha_bars("linear")[480], COSINE)
    assert times[12] == 480  # the network itself keeps its own


@pytest.mark.parametrize("flags", PROCESSES, ids=str)
def test_guidance_on_x_t_asks_at_the_nearest_noise(flags):
    model, times = spy(**flags)
    levels, steps = alpha_bars(**flags), flags.get("diffusion_steps", 1000)
    own = np.round(np.array(times_of(model, times, "ddim25")) * (steps / 1000 if "rescale_timesteps" in flags else 1))
    expected = [nearest(levels[int(t)], COSINE) for t in own]
    assert asked(model, "ddim25") == expected and max(expected) <= 999 and len(set(expected)) > 20
    assert asked(model, "ddim25", "x_0") == expected  # tells the step


def times_of(model, times, spec):
    sample(model.network, model.diffusion(spec), torch.zeros(2, 3, 4, 4))
    found = times.copy()
    times.clear()
    return found


def test_a_pool_of_another_schedule_is_guided_where_its_noise_was_taught(make_pool, tmp_path, timesteps):
    pool, seen = Pool(make_pool(tmp_path, [2], noise_schedule="linear")), []

    def log_p(x, t):
        seen.extend(t.tolist())
        return x.flatten(1)[:, :2].log_softmax(1)

    synthesise(pool, Synthesis(classes=[2], per_class=1, steps=2, size=16, seed=1, stream=0), CPU, log_p)
    high, low = nearest(alpha_bars("linear")[500], COSINE), nearest(alpha_bars("linear")[0], COSINE)
    asked = seen[3:]  # after a trial with one and with two images, for the memory
    assert asked == [high, high, low, low, 0, 0] and high > 780  # the last ask whether the images were hit
    assert timesteps == [[500, 500], [0, 0]]


# ---- mixes


@pytest.mark.parametrize("level", [1, 50, 200, 600, 1000])
@pytest.mark.parametrize("flags", PROCESSES, ids=str)
def test_mixes_start_at_the_noise_of_the_level(flags, level):
    model, times = spy(**flags)
    x, noise = torch.full((1, 3, 16, 16), 0.5), torch.zeros(1, 3, 16, 16)
    seen, network = [], model.network
    object.__setattr__(model, "network", lambda x_t, t, **_: seen.append(x_t) or network(x_t, t))
    diffusion_mixes(model, x, x, torch.ones(1), noise, level=level, steps=1)
    every, steps = alpha_bars(**flags), flags.get("diffusion_steps", 1000)
    visited = np.arange(steps)
    if "timestep_respacing" in flags:
        visited = np.unique(np.round(np.arange(500) * (steps - 1) / 499).astype(int))
    own = visited[nearest(COSINE[level - 1], every[visited])]
    assert times == [pytest.approx(own * (1000 / steps if "rescale_timesteps" in flags else 1))]
    assert float(seen[0].mean()) == pytest.approx(0.5 * every[own] ** 0.5, rel=1e-4)


@pytest.mark.parametrize("steps, own", [(4000, 798), (100, 19)])
def test_level_200_is_that_of_1000_whatever_the_pool(call, make_pool, trained, tmp_path, timesteps, few_glyphs, steps,
                                                     own):  # fmt: skip
    pool = make_pool(tmp_path / "pool", [4] * 2, diffusion_steps=steps)
    levels = alpha_bars("cosine", steps)
    assert abs(own - nearest(COSINE[199], levels)) <= 1
    command = ("--save-dir", trained, "--resume", trained / "best_model.pt", "--pool", pool, "--data-root", NO_IMAGES,
               "--episodes", 2, "--nTestNovel", 10, "--device", "cpu", "--save-dir", tmp_path / "out")  # fmt: skip
    status, _, err = call(diffusionmix, *command)
    assert status == 0, err
    assert {t for batch in timesteps for t in batch} == {nearest(COSINE[199], levels)}


def test_more_mix_steps_than_the_model_has(call, make_pool, trained, tmp_path, timesteps, few_glyphs, monkeypatch):
    monkeypatch.setattr("dry_run.TRIAL", 0.0)
    pool = make_pool(tmp_path / "pool", [4] * 2, diffusion_steps=100)
    most = 1 + nearest(COSINE[199], alpha_bars("cosine", 100))
    command = ("--resume", trained / "best_model.pt", "--pool", pool, "--data-root", NO_IMAGES, "--episodes", 2,
               "--nTestNovel", 10, "--device", "cpu", "--save-dir", tmp_path / "out")  # fmt: skip
    status, _, err = call(diffusionmix, *command, "--mix-steps", most + 1)
    assert status == 2 and err.count("\n") == 1 and not (tmp_path / "out").exists() and not timesteps
    assert "subset1" in err and f"--mix-steps {most + 1}" in err and f"--mix-steps {most}" in err.split(";")[-1]
    status, out, err = call(diffusionmix, *command, "--mix-steps", most, "--dry-run")
    assert status == 0, err
    said = int(re.search(r"([\d,]+) forward passes", out)[1].replace(",", ""))
    timesteps.clear()
    assert call(diffusionmix, *command, "--mix-steps", most)[0] == 0
    assert sum(map(len, timesteps)) == said == 2 * 5 * 2 * most
    with pytest.raises(ValueError, match="subset1"):
        few_shot.FewShotClassifier(trained / "best_model.pt", pool, mix_steps=most + 1).fit(
            torch.zeros(2, 3, 16, 16), ["a", "b"]
        )


# ---- models that were trained on some timesteps alone


RESPACED = dict(timestep_respacing="10", diffusion_steps=1000)
KEPT = {0, 111, 222, 333, 444, 555, 666, 777, 888, 999}


def test_respacings_compose():
    model, _ = spy(**RESPACED, noise_schedule="cosine")
    assert set(model.diffusion().timestep_map.tolist()) == KEPT
    assert model.diffusion("ddim5").timestep_map.tolist() == [0, 222, 444, 666, 888]
    assert model.diffusion([1, 9]).timestep_map.tolist() == [111, 999]
    np.testing.assert_allclose(model.diffusion([1, 9]).alphas_cumprod, COSINE[[111, 999]], rtol=1e-6)
    with pytest.raises(ValueError, match="ddim25.*10"):
        model.diffusion("ddim25")
    scaled, _ = spy(timestep_respacing="4", diffusion_steps=40, noise_schedule="cosine", rescale_timesteps=True)
    assert scaled.diffusion([0, 3]).model_timesteps(torch.tensor([0, 1])).tolist() == [0, 975]


def test_a_pool_is_sampled_only_at_timesteps_that_it_was_trained_on(make_pool, tmp_path, timesteps):
    pool = Pool(make_pool(tmp_path, [2], **RESPACED))
    synthesise(pool, Synthesis(classes=[2], per_class=1, steps=5, size=16, seed=1, stream=0), CPU)
    assert timesteps == [[t, t] for t in (888, 666, 444, 222, 0)]
    timesteps.clear()
    draw(pool.load(0), 0, "float32", CPU)
    assert {t for batch in timesteps for t in batch} == KEPT


def test_more_steps_than_it_was_trained_on_are_refused(call, make_pool, tmp_path, few_glyphs):
    pool = make_pool(tmp_path / "pool", [4] * 5, **RESPACED)
    command = ("--pool", pool, "--data-root", NO_IMAGES, "--save-dir", tmp_path / "out", *TINY, "--sample-steps", 20)
    status, _, err = call(main, *command)
    assert status == 2 and err.count("\n") == 1 and "subset1" in err and "--sample-steps" in err
    assert not (tmp_path / "out").exists()


def test_samples_png_is_drawn_at_timesteps_of_the_training(tmp_path, timesteps):
    flags = {**model_and_diffusion_defaults(), **UNET, **RESPACED, "timestep_respacing": "ddim50"}
    model, diffusion = create_model_and_diffusion(**flags)
    data = TrainingImages(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), ["a"], {})
    settings = TrainSettings(steps=1, batch_size=2)
    loop = TrainLoop(model=model, diffusion=diffusion, data=data, settings=settings, flags=flags, folder=tmp_path,
                     device=CPU)  # fmt: skip
    loop.sample_sheet(count=2, steps=7)
    seen = {t for batch in timesteps for t in batch}
    assert len(seen) == 7 and seen <= set(range(0, 1000, 20)) and max(seen) == 980


@pytest.mark.parametrize("flags", [dict(timestep_respacing="1001"), dict(noise_schedule="linear", diffusion_steps=10)])
def test_a_process_that_cannot_be_is_refused_by_name(make_pool, tmp_path, flags):
    pool = make_pool(tmp_path, [2])
    payload = torch.load(pool / "subset1" / "ckpt" / "model.pt", weights_only=True)
    payload["flags"] |= flags
    torch.save(payload, pool / "subset1" / "ckpt" / "model.pt")
    with pytest.raises(ValueError, match="subset1"):
        Pool(pool).load(0)
