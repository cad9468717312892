"""Properties that hold whatever the numbers: episodes, respacing, labels, checkpoints."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets.episodes import EpisodeSampler
from guided_diffusion.gaussian_diffusion import get_named_beta_schedule
from guided_diffusion.mix import mix_labels, mix_timesteps
from guided_diffusion.pool import Pool, subset_path
from guided_diffusion.respace import respaced, space_timesteps
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.synthesis import Synthesis
from models.clusters import likeliest_classes
from tests.conftest import same
from utils import checkpoint

settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")
small = st.integers(1, 6)
seeds = st.integers(0, 2**31)

# ---- episodes


@given(st.lists(st.integers(6, 12), min_size=2, max_size=9), st.data(), seeds, st.integers(0, 10**6))
def test_episodes(counts, data, seed, start):
    way = data.draw(st.integers(1, len(counts)))
    shot = data.draw(st.integers(1, 5))
    query = data.draw(st.integers(1, min(counts) - shot))
    names = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))[: len(counts)] - 500
    labels = names.repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    sampler = EpisodeSampler(labels, way, shot, query)
    drawn = sampler.sample_indexed(start, 7, seed, "test")
    for support, query_, classes, s_labels, q_labels in zip(
        drawn.support, drawn.query, drawn.classes, drawn.support_labels, drawn.query_labels, strict=True
    ):
        used = torch.cat([support, query_])
        assert len(used.unique()) == way * (shot + query)  # no image twice, none on both sides
        assert len(classes.unique()) == way
        assert torch.equal(labels[support], classes[s_labels]) and torch.equal(labels[query_], classes[q_labels])
        assert s_labels.bincount().tolist() == [shot] * way and q_labels.bincount().tolist() == [query] * way
    cut = data.draw(st.integers(1, 6))
    parts = (
        sampler.sample_indexed(start, cut, seed, "test"),
        sampler.sample_indexed(start + cut, 7 - cut, seed, "test"),
    )
    assert torch.equal(torch.cat([part.query for part in parts]), drawn.query)


# ---- respacing


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.data())
def test_sections(sizes, data):
    total = data.draw(st.integers(60 * len(sizes), 1000))
    kept = sorted(space_timesteps(total, sizes))
    assert kept == sorted(space_timesteps(total, ",".join(map(str, sizes))))
    assert len(kept) == sum(sizes) and kept[0] == 0 and kept[-1] < total
    bounds = np.cumsum([0, *(total // len(sizes) + (i < total % len(sizes)) for i in range(len(sizes)))])
    for count, low, high in zip(sizes, bounds, bounds[1:], strict=False):
        own = [t for t in kept if low <= t < high]
        assert len(own) == count and (count == 1 or own[-1] == high - 1)
        assert count == 1 or max(np.diff(own)) - min(np.diff(own)) <= 1


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_whole_strides(total, count):
    try:
        kept = sorted(space_timesteps(total, f"ddim{count}"))
    except ValueError as error:
        assert all(len(range(0, total, stride)) != count for stride in range(1, max(total, 2))) or count > total, error
        return
    assert len(kept) == count and kept[0] == 0 and len(set(np.diff(kept))) <= 1


@given(st.sampled_from(["linear", "cosine"]), st.sets(st.integers(0, 999), min_size=1, max_size=40))
def test_a_shorter_process_has_the_noise_of_the_longer_one(schedule, kept):
    betas = get_named_beta_schedule(schedule, 1000)
    short = respaced(create_gaussian_diffusion(steps=1000, noise_schedule=schedule), sorted(kept))
    expected = np.cumprod(1 - betas)[sorted(kept)]
    np.testing.assert_allclose(short.alphas_cumprod, expected, rtol=1e-9, atol=1e-15)
    assert (short.betas > 0).all() and (short.betas <= 1).all()


@given(st.integers(1, 1000), st.data())
def test_timesteps_of_a_mix(level, data):
    steps = data.draw(st.integers(1, level))
    kept = mix_timesteps(level, steps, 1000)
    assert len(kept) == steps == len(set(kept)) and kept == sorted(kept)
    assert kept[-1] == level - 1 and (steps == 1 or kept[0] == 0)


# ---- labels


@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 6))
def test_classes_are_shared_out(models, classes, per_model):
    with tempfile.TemporaryDirectory() as folder:
        for m in range(models):
            subset_path(folder, m + 1).parent.mkdir(parents=True)
            subset_path(folder, m + 1).touch()
        pool = Pool(folder)
    try:
        counts = pool.share_classes(classes, per_model)
    except ValueError as error:
        assert classes < models or -(-classes // (per_model or 1)) != models and per_model, error
        return
    assert len(counts) == models and sum(counts) == classes and min(counts) >= 1
    if per_model:
        assert counts[:-1] == [per_model] * (models - 1) and counts[-1] <= per_model
    else:
        assert max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True)


@given(st.lists(small, min_size=1, max_size=6), small, seeds)
def test_every_image_is_asked_for_a_class_of_its_model(counts, per_class, seed):
    plan = Synthesis(counts, per_class, steps=2, size=16, seed=0, stream=0)
    asked = torch.arange(sum(counts)).repeat_interleave(per_class)
    first = plan.first_of(asked)
    model_of = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    assert torch.equal(model_of[first], model_of[asked])
    assert first.tolist() == [plan.first_class(int(m)) for m in model_of[asked]]
    scores = torch.randn(len(asked), sum(counts), generator=torch.Generator().manual_seed(seed))
    likely = likeliest_classes(scores, first, counts)
    assert torch.equal(model_of[likely], model_of[asked])
    own = model_of[None] == model_of[asked][:, None]
    assert bool((scores.gather(1, likely[:, None]) >= scores.masked_fill(~own, -9.0)).all())


@given(st.integers(1, 7), st.integers(1, 9), seeds)
def test_labels_of_mixes_are_probabilities(way, count, seed):
    rng = torch.Generator().manual_seed(seed)
    a, b = (torch.nn.functional.one_hot(torch.randint(way, (count,), generator=rng), way).float() for _ in range(2))
    weight = torch.rand(count, generator=rng)
    mixed = mix_labels(a, b, weight)
    torch.testing.assert_close(mixed.sum(1), torch.ones(count))
    torch.testing.assert_close((mixed * a).sum(1), torch.where((a == b).all(1), 1.0, weight))


# ---- checkpoints

plain = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=8)
types = st.sampled_from(
    [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
)


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    rng = torch.Generator().manual_seed(draw(seeds))
    values = torch.randint(0, 100, shape, generator=rng).to(draw(types))
    return values.transpose(0, -1) if draw(st.booleans()) and values.dim() > 1 else values


nests = st.recursive(
    plain | tensors(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=4),
    max_leaves=12,
)


@given(nests)
def test_what_is_saved_is_loaded(payload):
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder, "a.pt"), payload)
        assert same(checkpoint.load(Path(folder, "a.pt")), payload)
        assert [path.name for path in Path(folder).iterdir()] == ["a.pt"]


@given(st.data())
def test_a_damaged_file_is_refused_or_loads_the_same(data):
    payload = {"w": torch.arange(40.0), "settings": {"lr": 0.1, "name": "run"}, "epoch": 3}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.pt")
        checkpoint.save(path, payload)
        content = bytearray(path.read_bytes())
        if data.draw(st.booleans()):
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        else:
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        try:
            loaded = checkpoint.load(path)
        except checkpoint.CheckpointError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert same(loaded, payload)  # the damage was in what nobody reads, such as padding or dates


@given(st.dictionaries(st.text("abc.", min_size=1, max_size=5), tensors(), min_size=1, max_size=4), st.data())
def test_weights_fit_or_are_named(state, data):
    module = torch.nn.Module()
    module.state_dict = lambda: {name: torch.zeros(4) for name in ("a", "b")}
    fits = set(state) == {"a", "b"} and all(value.shape == (4,) for value in state.values())
    if fits:
        checkpoint.check_state(module, state, "f")
        return
    with pytest.raises(checkpoint.CheckpointError, match="f: does not fit Module"):
        checkpoint.check_state(module, state, "f")
