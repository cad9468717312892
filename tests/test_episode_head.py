import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.episode_head import Stage, fit_heads, meta_test_stages, predict

E, S, X, Q, D, WAY = 4, 5, 12, 15, 64, 5
HOW = dict(steps=50, rates=(0.05, 0.01, 0.05))


def embeddings(seed, *shape):
    return F.normalize(torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def episodes():
    """Support, its targets, mixes, their soft targets, queries."""
    labels = F.one_hot(torch.arange(WAY), WAY).float().repeat(E, 1, 1)
    soft = torch.rand(E, X, WAY, generator=torch.Generator().manual_seed(9))
    return embeddings(0, E, S), labels, embeddings(1, E, X), soft / soft.sum(-1, keepdim=True), embeddings(2, E, Q)


def generators(n=E):
    return [torch.Generator().manual_seed(100 + i) for i in range(n)]


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_equals_sgd_on_nn_linear_episode_by_episode(episodes, scale):
    support, targets, mixes, soft, queries = episodes
    stages = meta_test_stages(support, targets, (mixes, soft), **HOW)
    start = fit_heads(support, targets, [], init="random", generators=generators())
    heads = fit_heads(support, targets, stages, init="random", generators=generators(), scale=scale)
    logits = predict(heads, queries)
    for e in range(E):
        linear = nn.Linear(D, WAY)
        with torch.no_grad():
            linear.weight.copy_(start.weight[e])
            linear.bias.copy_(start.bias[e])
        for stage in stages:
            optimiser = torch.optim.SGD(linear.parameters(), lr=stage.rate, momentum=0.9, weight_decay=5e-4)
            for _ in range(stage.steps):
                optimiser.zero_grad()
                F.cross_entropy(linear(scale * stage.inputs[e]), stage.targets[e]).backward()
                optimiser.step()
        torch.testing.assert_close(heads.weight[e], linear.weight.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(heads.bias[e], linear.bias.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(logits[e], linear(scale * queries[e]).detach(), rtol=0, atol=1e-5 * (1 + 4 * scale))


def test_stages_of_meta_testing(episodes):
    stages = meta_test_stages(*episodes[:2], episodes[2:4], **HOW)
    assert [(s.steps, s.rate, s.inputs.shape[1]) for s in stages] == [(50, 0.05, S), (50, 0.01, X), (50, 0.05, S)]


@pytest.mark.parametrize("init", ["zeros", "random", "prototypes"])
def test_an_episode_does_not_depend_on_others(episodes, init):
    support, targets, mixes, soft, _ = episodes

    def fit(support, mixes, n=E):
        stages = meta_test_stages(support, targets[:n], (mixes, soft[:n]), **HOW)
        return fit_heads(support, targets[:n], stages, init=init, generators=generators(n))

    heads = fit(support, mixes)
    other_support, other_mixes = support.clone(), mixes.clone()
    other_support[1:], other_mixes[1:] = 5, -5
    changed, alone = fit(other_support, other_mixes), fit(support[:1], mixes[:1], 1)
    assert torch.equal(changed.weight[0], heads.weight[0]) and torch.equal(changed.bias[0], heads.bias[0])
    torch.testing.assert_close(alone.weight[0], heads.weight[0], rtol=0, atol=1e-6)


def test_a_query_does_not_depend_on_others(episodes):
    support, targets, _, _, queries = episodes
    heads = fit_heads(support, targets)
    expected = predict(heads, queries)
    changed = queries.clone()
    changed[:, 1:] = 9
    assert torch.equal(predict(heads, changed)[:, 0], expected[:, 0])
    torch.testing.assert_close(predict(heads, queries[:, 3:4]), expected[:, 3:4], rtol=0, atol=1e-6)


def test_initial_heads(episodes):
    support, targets, *_ = episodes
    zeros = fit_heads(support, targets, [])
    assert not zeros.weight.any() and not zeros.bias.any()
    torch.testing.assert_close(fit_heads(3 * support, targets, [], init="prototypes").weight, support)
    random = fit_heads(support, targets, [], init="random", generators=generators())
    assert random.weight.abs().max() <= 1 / 8 and random.weight.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)
    assert not torch.equal(random.weight[0], random.weight[1])


def test_the_inputs_are_left_alone_and_half_precision_is_fitted_in_float32(episodes):
    support, targets, *_ = episodes
    before = support.clone()
    fit_heads(support, targets, init="prototypes")
    assert torch.equal(support, before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = fit_heads(support, targets)
    assert torch.equal(autocast.weight, fit_heads(support, targets).weight)
    heads = fit_heads(support.bfloat16(), targets)
    assert heads.weight.dtype == torch.float32 and predict(heads, support.bfloat16()).dtype == torch.float32


def test_wrong_inputs_are_refused(episodes):
    support, targets, mixes, soft, queries = episodes
    heads = fit_heads(support, targets, [])
    cases = [
        (lambda: fit_heads(support, targets[..., 0]), "give each sample a soft label"),
        (lambda: fit_heads(support, targets * 2), "do not sum to 1"),
        (lambda: fit_heads(support, targets, [Stage(mixes[:2], soft[:2])]), r"stage 1 .* expected \(4, S, 64\)"),
        (lambda: fit_heads(support, targets, init="ones"), "'ones', expected one of zeros, random, prototypes"),
        (lambda: fit_heads(support, targets, init="random"), "got none generators, expected 4"),
        (lambda: fit_heads(support[:, :1], targets[:, :1], init="prototypes"), "no support sample"),
        (lambda: predict(heads, queries[:1]), r"expected \(4, Q, 64\)"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
