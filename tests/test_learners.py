"""The two learners: losses, epochs, and p(c | x_t, t)."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from config import Settings
from datasets.pseudo import PseudoDataset
from guided_diffusion.script_util import create_gaussian_diffusion
from models.class_learner import ClassLearner
from models.guides import calibrate, class_learner_guide, views_guide
from models.learners import ClusterLearners, Learners, PaperLearners, check_finite
from models.losses import class_learner_loss, meta_loss
from models.meta_model import MetaModel
from tests.conftest import ROOT
from utils.images import to_float

CLASSES = 6


@pytest.fixture
def parts():
    rng = torch.Generator().manual_seed(0)
    return MetaModel(CLASSES, generator=rng), ClassLearner(CLASSES, 64, generator=rng), rng


def coloured(rng, per_class=8):
    """Six classes of uint8 images that differ in colour."""
    colours = torch.tensor([[a, b, c] for a, b, c in torch.cartesian_prod(*[torch.tensor([40, 210])] * 3)])[1:7]
    labels = torch.arange(CLASSES).repeat_interleave(per_class)
    images = colours[labels][:, :, None, None] + torch.randint(-30, 30, (len(labels), 3, 16, 16), generator=rng)
    return images.clamp(0, 255).to(torch.uint8), labels


def test_meta_loss_by_its_formula(parts):
    model, _, rng = parts
    images = torch.rand(2, 5 + 10, 3, 16, 16, generator=rng) * 2 - 1
    support = torch.arange(5).repeat(2, 1)
    query = torch.arange(5).repeat_interleave(2).repeat(2, 1)
    classes = torch.randint(CLASSES, (2, 10), generator=rng)
    loss, right = meta_loss(model, images, support, query, classes, way=5, dense_weight=0.5)
    logits, scores = model(images[:, :5], support, images[:, 5:], 5)  # batch statistics: the same again
    base = -F.log_softmax(logits, 1)[torch.arange(20), classes.flatten()].mean()
    dense = -F.log_softmax(scores, 1)[torch.arange(20), query.flatten()].mean()
    torch.testing.assert_close(loss, base + 0.5 * dense)
    assert float(right) == float((logits.argmax(1) == classes.flatten()).float().mean())


@pytest.mark.parametrize("kl_weight", [0.0, 1.0, 3.0])
def test_class_learner_loss_by_its_formula(parts, kl_weight):
    model, learner, rng = parts
    model.eval()
    clean, noised = (torch.rand(8, 3, 16, 16, generator=rng) * 2 - 1 for _ in range(2))
    t, classes = torch.randint(1000, (8,), generator=rng), torch.randint(CLASSES, (8,), generator=rng)
    loss, right = class_learner_loss(model, learner, clean, noised, t, classes, kl_weight=kl_weight)
    with torch.no_grad():
        g, h = model.classifier(model.embed(clean)).softmax(1), learner(model.embed(noised), t).log_softmax(1)
    expected = -h[torch.arange(8), classes].mean() + kl_weight * (g * (g.log() - h)).sum(1).mean()
    torch.testing.assert_close(loss.detach(), expected)
    assert torch.equal(right, h.argmax(1) == classes)
    loss.backward()
    assert all(p.grad is None for p in model.parameters())  # f and g are frozen
    assert all(p.grad is not None for p in learner.parameters())


def test_log_probability_is_normalised_and_in_eval_mode(parts):
    model, learner, rng = parts
    model.train(), learner.train()
    function = class_learner_guide(model, learner)
    x, t = torch.randn(5, 3, 16, 16, generator=rng), torch.tensor([0, 10, 100, 500, 999])
    out = function(x, t)
    torch.testing.assert_close(out.exp().sum(1), torch.ones(5))
    torch.testing.assert_close(function(x[3:4], t[3:4]), out[3:4], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(function(x, t + 1), out)


@pytest.fixture
def paper(monkeypatch):
    """paper(process=None, **settings): the paper's learners of six classes, that see images as they are."""
    monkeypatch.setattr(Learners, "changed", lambda self, images, rng: to_float(images))

    def make(process=None, **changes):
        process = process or create_gaussian_diffusion(steps=1000, noise_schedule="cosine")
        settings = Settings(**{"nTestNovel": 10, "train_nTestNovel": 10, "train_batch": 4, **changes})
        return PaperLearners(settings, CLASSES, 16, torch.device("cpu"), process)

    return make


def test_both_learn_colours(paper):
    rng = torch.Generator().manual_seed(0)
    data, learners = PseudoDataset(*coloured(rng), CLASSES), paper(learner_rate=1.0)
    entries = []
    for epoch in range(4):
        out = learners.train_meta_model(data, (0.1,) * 3, rng, epoch)
        entries.append(out | learners.train_class_learner(data, (0.1,) * 12, rng))
    first, last = entries[0], entries[-1]
    assert last["loss"] < first["loss"] - 0.3 and last["base_accuracy"] > 80
    assert last["class_learner_loss"] < first["class_learner_loss"]
    low, *_, high = last["class_learner_accuracy"]
    assert len(last["class_learner_accuracy"]) == 4 and low > 60 and low > high  # noise hides the class


def test_class_learner_epoch_leaves_the_meta_model_alone(paper):
    rng = torch.Generator().manual_seed(0)
    learners = paper(optim="adamw", weight_decay=0.0)
    before = {name: value.clone() for name, value in learners.model.state_dict().items()}
    learners.model.train()
    learners.train_class_learner(PseudoDataset(*coloured(rng), CLASSES), (0.1,) * 2, rng)
    assert all(torch.equal(value, before[name]) for name, value in learners.model.state_dict().items())


def test_noise_levels_of_the_class_learner(paper):
    rng, seen = torch.Generator().manual_seed(0), []

    def q_sample(x, t, generator):
        assert generator is rng
        seen.append(t)
        return x

    learners = paper(SimpleNamespace(num_timesteps=100, q_sample=q_sample), kl_weight=0.0)
    learners.train_class_learner(PseudoDataset(*coloured(rng), CLASSES), (0.1,) * 12, rng)
    t = torch.cat(seen)
    assert len(t) == 12 * 4 * (5 + 10)  # steps, episodes per step, images per episode
    assert 0 <= int(t.min()) and int(t.max()) < 100 and abs(float(t.float().mean()) / 100 - 0.5) < 0.04


def test_linear_head_on_whole_maps():
    rng = torch.Generator().manual_seed(0)
    model = MetaModel(CLASSES, features="map", image_size=32, generator=rng).eval()
    images = torch.rand(3, 3, 32, 32, generator=rng) * 2 - 1
    maps = model.base(images).flatten(1)
    assert maps.shape == (3, 64 * 2 * 2) and model.feature_dim == 256
    expected = maps @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model.classify(images), expected)
    torch.testing.assert_close(model.embed(images), maps / maps.norm(dim=1, keepdim=True))


def test_classifier_learns_colours_at_the_rates_given(monkeypatch):
    monkeypatch.setattr(Learners, "changed", lambda self, images, rng: to_float(images))
    settings = Settings(recipe="clusters", features="map", optim="adamw", weight_decay=0.05, image_batch=24)
    rng, learners = torch.Generator().manual_seed(0), ClusterLearners(settings, CLASSES, 16, torch.device("cpu"))
    (optimizer,), rates = learners.optimizers, []
    step = optimizer.step
    optimizer.step = lambda: (rates.append(optimizer.param_groups[0]["lr"]), step())
    images, labels = coloured(rng)
    given = (0.002,) * 29 + (0.001,)
    out = learners.train_meta_model(PseudoDataset(images, labels, CLASSES), given, rng, 0)
    assert tuple(rates) == given and out["base_accuracy"] > 60 and out["lr"] == 0.002
    model = learners.model.eval()
    assert float((model.classify(to_float(images)).argmax(1) == labels).float().mean()) > 0.9
    assert learners.train_class_learner(None, given, rng) == {}  # g itself guides


@pytest.mark.parametrize("backbone", ["conv4", "resnet12"])
def test_calibration_gives_the_statistics_of_the_images(backbone):
    rng = torch.Generator().manual_seed(1)
    model = MetaModel(8, backbone=backbone, drop_rate=0.5 * (backbone == "resnet12"), generator=rng)
    learner = ClassLearner(8, model.channels, generator=rng)
    images = torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8, generator=rng)
    before = torch.get_rng_state()
    calibrate(model, learner, images)
    assert torch.equal(torch.get_rng_state(), before)  # nothing is dropped
    guide = class_learner_guide(model, learner)
    inputs = {}
    for layer in (layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)):
        assert layer.momentum == 0.1
        layer.register_forward_hook(lambda layer, args, out: inputs.setdefault(layer, out.detach()))
    guide(to_float(images), torch.zeros(40))
    for out in inputs.values():  # normalised by the statistics of these very images
        assert float(out.mean((0, 2, 3)).abs().max()) < 0.02
        assert float((out.var((0, 2, 3)) - 1).abs().max()) < 0.05  # epsilon counts where the variance is small
    assert len(inputs) >= 4


def test_views_are_averaged_and_change_with_t():
    rng = torch.Generator().manual_seed(0)
    model = MetaModel(CLASSES, features="map", image_size=16, generator=rng)
    x, seen = torch.rand(5, 3, 16, 16, generator=rng) * 2 - 1, []

    def view(images, number):
        seen.append(number)
        return images * (1 - 0.1 * (number % 7))

    function = views_guide(model, view, 3)
    out = function(x, torch.full((5,), 2))
    assert seen == [6, 7, 8]
    expected = [F.log_softmax(model.classify(x * scale), 1) for scale in (0.4, 1.0, 0.9)]
    torch.testing.assert_close(out, sum(expected) / 3)
    function(x, torch.full((5,), 3))
    assert len(set(seen)) == 6


def test_optimizers(paper):
    for optimizer in paper(weight_decay=5e-4).optimizers:
        group = optimizer.param_groups[0]
        assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 5e-4)
    assert all(isinstance(optimizer, torch.optim.AdamW) for optimizer in paper(optim="adamw").optimizers)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_diverged(loss):
    check_finite({"loss": 3.0, "lr": 0.1}, 0)
    with pytest.raises(ValueError, match="epoch 3 at rate 0.1.*what was saved before is whole"):
        check_finite({"loss": 1.0, "class_learner_loss": loss, "lr": 0.1}, 2)


def test_another_guidance_as_extending_md_shows():
    part = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8").split("## Another guidance")[1]
    code = part.split("```python\n")[1].split("```")[0]
    names = {"ClusterLearners": ClusterLearners}
    exec(code, names)
    settings = Settings(recipe="clusters", features="map", max_epoch=40)
    cpu = torch.device("cpu")
    sharper, plain = (of(settings, 3, 16, cpu) for of in (names["Sharper"], ClusterLearners))
    x, t = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(4)
    p, q = plain.guide()(x, t).detach().exp(), sharper.guide()(x, t).detach().exp()
    assert torch.allclose(q, p**2 / (p**2).sum(1, keepdim=True), atol=1e-5)
