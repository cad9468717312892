import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.class_learner import ClassLearner, load_statistics, statistics, time_embedding

STEPS = [0, 1, 10, 100, 250, 500, 750, 999]


def features(seed=0, n=8, shift=0.0):
    return F.normalize(torch.randn(n, 64, generator=torch.Generator().manual_seed(seed)) + shift, dim=1)


def trained(batches=3):
    learner = ClassLearner(20, generator=torch.Generator().manual_seed(0)).train()
    for seed in range(batches):
        learner(features(seed), torch.tensor(STEPS))
    return learner


def test_names(meta_keys):
    assert [[k, list(v.shape)] for k, v in ClassLearner(20).state_dict().items()] == meta_keys["class_learner"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@torch.no_grad()
def test_golden(meta_goldens, fill, arr, dtype):
    learner = fill(ClassLearner(20)).train()
    v, t = F.normalize(arr(14, 8, 64), dim=1), torch.tensor(STEPS, dtype=dtype)
    np.testing.assert_allclose(learner(v, t), meta_goldens["class_learner/noisy"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(learner(v), meta_goldens["class_learner/clean"], rtol=0, atol=1e-4)


def test_time_embedding_is_cosines_then_sines():
    t = torch.tensor([3.5, 700.0])
    frequencies = torch.tensor([1.0, 0.1, 0.01, 0.001])
    angles = t[:, None] * frequencies
    torch.testing.assert_close(time_embedding(t, 8), torch.cat([angles.cos(), angles.sin()], 1), rtol=0, atol=1e-4)


@torch.no_grad()
def test_in_eval_mode_an_image_does_not_depend_on_its_batch():
    learner = trained().eval()
    v, t = features(7), torch.tensor(STEPS)
    expected = learner(v, t)
    others = torch.cat([v[:1], features(8, 7, shift=3.0)])
    assert torch.equal(learner(others, t)[0], expected[0])
    for i in range(8):  # alone, a matrix product may round otherwise
        torch.testing.assert_close(learner(v[i : i + 1], t[i : i + 1])[0], expected[i], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_batch_of_one_class_at_one_step_keeps_its_signal_in_eval_mode():
    learner = trained().eval()
    v = features(1)[:1].repeat(8, 1)
    t = torch.full((8,), 500)
    torch.testing.assert_close(learner(v, t)[0], learner(v[:1], t[:1])[0], rtol=0, atol=1e-5)
    learner.train()
    assert (learner(v, t) - learner.linear2(F.silu(learner.batchnorm.bias))).abs().max() < 1e-2  # normalised away


@torch.no_grad()
def test_running_statistics_average_the_first_batches_equally():
    learner = trained(3)
    t = torch.tensor(STEPS)
    inputs = [learner.linear1(features(s) + learner.time_embed(time_embedding(t, 40))) for s in range(3)]
    norm = learner.batchnorm
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(0) for x in inputs]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var(0) for x in inputs]).mean(0))
    for _ in range(9):
        learner(features(0), t)
    before = norm.running_mean.clone()
    learner(features(1), t)
    torch.testing.assert_close(norm.running_mean, 0.9 * before + 0.1 * inputs[1].mean(0))


@torch.no_grad()
def test_statistics_travel_beside_the_state_dict():
    source = nn.ModuleDict({"head": trained()}).eval()
    target = nn.ModuleDict({"head": ClassLearner(20)}).eval()
    target.load_state_dict(source.state_dict())
    v, t = features(5), torch.tensor(STEPS)
    assert not torch.allclose(target["head"](v, t), source["head"](v, t))
    values = statistics(source)
    assert sorted(values) == [f"head.batchnorm.{n}" for n in ("running_mean", "running_var", "updates")]
    load_statistics(target, values)
    assert torch.equal(target["head"](v, t), source["head"](v, t))
    assert values["head.batchnorm.updates"] == 3
    source.train()["head"](v, t)
    assert values["head.batchnorm.updates"] == 3  # a copy
    assert sorted(statistics(source["head"].batchnorm)) == ["running_mean", "running_var", "updates"]


def test_other_statistics_are_refused():
    learner, values = ClassLearner(20), statistics(ClassLearner(20))
    with pytest.raises(ValueError, match="missing: batchnorm.updates"):
        load_statistics(learner, {k: v for k, v in values.items() if not k.endswith("updates")})
    with pytest.raises(ValueError, match="unexpected: extra"):
        load_statistics(learner, values | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"got \(30,\), expected \(20,\)"):
        load_statistics(learner, statistics(ClassLearner(30)))
    with pytest.raises(ValueError, match="a.pt: its statistics batchnorm.running_mean are NaN"):
        load_statistics(learner, values | {"batchnorm.running_mean": torch.full((20,), torch.nan)}, "a.pt")


def test_wrong_inputs_are_refused():
    learner = ClassLearner(20)
    with pytest.raises(ValueError, match=r"expected \(N, 64\)"):
        learner(torch.zeros(2, 64, 4, 4))
    with pytest.raises(ValueError, match=r"t has shape \(\), expected \(8,\)"):
        learner(features(), torch.tensor(3))
    with pytest.raises(ValueError, match="at least 2"):
        learner.train()(features(n=1))
    with pytest.raises(ValueError, match="num_classes"):
        ClassLearner(0)
