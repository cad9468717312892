"""What the parts are given: which weights, seeds, labels and settings reach what they are for. tests/mutants.py breaks
each of these lines and runs the test of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bookkeeping
import few_shot
import guided_diffusion.image_train as image_train
import main
from config import Settings, parse
from datasets.augment import augment_by, draw
from datasets.pseudo import PseudoDataset
from few_shot import HeadFitter
from guided_diffusion.guidance import sample
from guided_diffusion.image_datasets import TrainingImages
from guided_diffusion.pool import Pool
from guided_diffusion.respace import respaced
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.synthesis import synthesise
from models import guides, learners
from models.class_learner import statistics
from models.meta_model import MetaModel
from tests.conftest import NO_IMAGES, TINY
from tests.test_image_train import FLAGS, folder, loop_of, train  # noqa: F401
from tests.test_synthesis import plan
from utils import checkpoint
from utils.seeding import generator

CPU = torch.device("cpu")
CLUSTERS = "--recipe clusters --refresh-every 2 --max-epoch 3".split()


@pytest.fixture
def training(two_models, toy_pool, tmp_path, few_glyphs, few_rounds, monkeypatch):
    """training(*flags): a tiny run of main.py, ready to train; nothing is drawn for people."""
    report = SimpleNamespace(write=lambda: None, write_sometimes=lambda: None)
    monkeypatch.setattr(bookkeeping, "Report", lambda *_: report)

    def make(*flags):
        pool = toy_pool if "unguided" in flags else two_models  # without guidance, a model is a class of the five
        places = ("--save-dir", tmp_path / "run", "--pool", pool, "--data-root", NO_IMAGES)
        return main.Training(parse([*map(str, places), *TINY, *flags], description=""))

    return make


@pytest.fixture
def spy(monkeypatch):
    """spy(owner, name, look): call through, and list what look(*args, **kwargs) finds before each call."""

    def watch(owner, name, look):
        seen, original = [], getattr(owner, name)

        def through(*args, **kwargs):
            seen.append(look(*args, **kwargs))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, through)
        return seen

    return watch


# ---- synthesis


def test_hits(two_models):
    def always_five(x, t):
        return F.log_softmax(10 * F.one_hot(torch.full((len(x),), 5), 8).float() + 0 * x.mean((1, 2, 3))[:, None], 1)

    _, labels, hits = synthesise(Pool(two_models), plan(), CPU, always_five)
    assert torch.equal(hits, labels == 5) and int(hits.sum()) == 2


@pytest.mark.parametrize("level, strength", [(999, 1.0), (300, None)])
def test_strength_of_guidance_on_x_0(level, strength):
    whole = create_gaussian_diffusion(steps=1000, noise_schedule="cosine", predict_xstart=True)
    abar = float(whole.alphas_cumprod[level])
    strength = strength or (1 - abar) / abar
    images = sample(
        lambda x, t, **_: torch.full_like(x, 0.1), respaced(whole, [level]), torch.zeros(2, 3, 4, 4),
        cond_fn=lambda x, t: torch.full_like(x, 0.05), guide_on="x_0",
    )  # fmt: skip
    torch.testing.assert_close(images, torch.full_like(images, 0.1 + 0.05 * strength), rtol=0, atol=1e-5)


# ---- meta-training


def test_a_round_is_drawn_by_what_was_learnt(training, spy, tmp_path):
    run = training(*CLUSTERS)

    def look(pool, plan, device, function=None, wanted=None):
        if function is not None:
            last = checkpoint.load(tmp_path / "run" / "last.pt")
            model = MetaModel(8, features="map", image_size=16)
            model.load_state_dict(last["model"])
            x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
            t = torch.full((3,), 7)
            numbers = [generator(1, "view", 4 * 7 + i) for i in range(4)]
            views = [augment_by(x, draw(1, rng), learners.VIEW) for rng in numbers]
            learnt = sum(F.log_softmax(model.eval().classify(view), 1) for view in views) / 4
            return plan.stream, function(x, t), learnt

    seen = spy(main, "synthesise", look)
    run.train()
    ((stream, got, learnt),) = [each for each in seen if each]
    assert stream == 1
    torch.testing.assert_close(got, learnt)


def test_labels_are_read_anew_by_the_network_before(training, spy, tmp_path):
    run = training(*CLUSTERS, "--samples-per-class", "6")
    labels = spy(learners.ClusterLearners, "train_meta_model", lambda self, data, *_: data.labels)
    run.train()
    pseudo = tmp_path / "run" / "pseudo"
    drawn, asked = (PseudoDataset.load(pseudo / name).labels for name in ("round00", "round01"))
    found, anew = (torch.from_numpy(np.load(pseudo / "round00" / f"{name}.npy")) for name in ("clusters", "labels01"))
    assert torch.equal(labels[0], drawn) and torch.equal(labels[1], found) and not torch.equal(found, drawn)
    assert torch.equal(labels[2], torch.cat([asked, anew]))
    for each in (found, anew, asked):  # each model's images stay with its classes
        assert torch.equal(each // 4, drawn // 4)


def test_guided_images_are_asked_for_what_their_noise_shows(training, spy):
    run = training(*CLUSTERS)
    calls = spy(main, "synthesise", lambda pool, plan, device, function=None, wanted=None: (plan.stream, wanted))
    scored = spy(guides, "clean_scores", lambda function, images, device: len(images))
    scores = spy(main, "likeliest_classes", lambda scores, first, counts: scores)
    run.train()
    (zero, none), (first, plain), (second, wanted) = calls
    assert (zero, first, second) == (0, 1, 1) and none is None and plain is None
    assert scored == [32, 32]  # of round 1, then of round 0
    assert torch.equal(wanted, torch.cat([scores[0][:16, :4].argmax(1), 4 + scores[0][16:, 4:].argmax(1)]))


def test_each_epoch_has_its_own_draws(training, spy):
    run = training("--refresh-every", "2", "--source", "unguided")
    queries = spy(learners, "meta_loss", lambda model, images, support, query, classes, **_: classes)
    seeds = spy(learners, "augment", lambda images, rng, settings: rng.initial_seed())
    run.train()
    first, second = torch.cat(queries[:2]), torch.cat(queries[2:])  # two steps per epoch
    assert len(queries) == 4 and not torch.equal(first, second)
    assert len(set(seeds)) == 2 and seeds == sorted(seeds, key=seeds.index)


@pytest.mark.parametrize("flip", [True, False])
def test_flip_of_meta_training(training, spy, flip):
    run = training("--flip", str(flip), "--max-epoch", "1", "--source", "unguided")
    seen = spy(learners, "augment", lambda images, rng, settings: settings.flip)
    run.train()
    assert seen and set(seen) == {flip}


def test_how_the_class_learner_learns(training, spy):
    run = training("--max-epoch", "1")
    seen = spy(learners, "class_learner_loss", lambda model, learner, clean, noised, t, *_, **__: t)
    process = spy(run.learners.process, "q_sample", lambda clean, t, generator: len(clean))
    run.train()
    assert process == [2 * (5 + 10)] * 2 and run.learners.process.num_timesteps == 1000  # 4 episodes, 2 per step
    assert [len(t) for t in seen] == process and int(torch.cat(seen).max()) > 900
    assert (
        abs(float(torch.cat(seen).float().mean()) - 499.5) < 4 * 1000 / (12 * 60) ** 0.5
    )  # uniform: 4 standard errors


def test_how_the_clusters_recipe_learns(training, spy):
    run = training(*CLUSTERS, "--image-batch", "12")
    rates = spy(learners.ClusterLearners, "train_meta_model", lambda self, data, rates, *_: len(rates))
    batches = spy(learners, "augment", lambda images, rng, settings, **_: (len(images), settings.rotate))
    run.train()
    assert rates == [2] * 3 and [each for each in batches if each[1] == 12] == [(12, 12)] * 6


def test_how_images_are_drawn(training):
    for recipe, guide_on, renoise in (("paper", "x_t", 0.0), ("clusters", "x_0", 0.6)):
        plan = training("--recipe", recipe, "--max-epoch", "3", "--refresh-every", "2").plan(0)
        assert (plan.guide_on, plan.renoise) == (guide_on, renoise)


def test_rate_of_the_class_learner(training):
    run = training("--lr", "0.2", "--learner-rate", "0.25", "--max-epoch", "1")
    run.train()
    rates = [o.param_groups[0]["lr"] for o in run.learners.optimizers]
    assert rates == pytest.approx([0.2, 0.05])


def test_a_new_class_learner_is_calibrated(training, spy):
    run = training("--max-epoch", "1")

    def look(pool, plan, device, function=None, wanted=None):
        if function is not None:
            return [int(v) for name, v in statistics(run.learners.learner).items() if name.endswith("updates")]

    seen = spy(main, "synthesise", look)
    run.train()
    assert [updates for updates in seen if updates] == [[1]]


def test_training_prototypes_are_means_before_normalisation():
    rng = torch.Generator().manual_seed(0)
    model = MetaModel(6, generator=rng).eval()
    support, query = torch.rand(1, 10, 3, 16, 16, generator=rng), torch.rand(1, 4, 3, 16, 16, generator=rng)
    support[:, ::2] = support[:, ::2] * 0.1 - 1  # of other lengths
    labels = torch.arange(2).repeat_interleave(5)[None]
    _, scores = model(support, labels, query, 2)
    means = model.base(support[0]).mean((2, 3)).view(2, 5, -1).mean(1)
    maps = model.base(query[0])
    cosine = torch.einsum("qdhw,kd->qkhw", F.normalize(maps, dim=1), F.normalize(means, dim=1))
    torch.testing.assert_close(scores, 7 * cosine, rtol=0, atol=1e-4)


def test_validation_is_on_features_before_normalisation(monkeypatch):
    class Colours(torch.nn.Module):
        feature_dim = 3

        def forward(self, x):
            return x + 1

    model = MetaModel(2)
    model.base = Colours()
    # class 0: one long (1, 0, 0) and two short (0, 1, 0): its mean lies by (1, 0, 0), its mean direction by (0, 1, 0)
    pixels = torch.tensor([[250, 0, 0], *[[0, 10, 0]] * 2, *[[100, 130, 0]] * 3, [99, 6, 0]])
    images = pixels.to(torch.uint8)[:, :, None, None].expand(-1, -1, 4, 4).contiguous()
    episodes = SimpleNamespace(
        support=torch.arange(6)[None], support_labels=torch.tensor([[0, 0, 0, 1, 1, 1]]),
        query=torch.tensor([[6], [6]])[:1], query_labels=torch.tensor([[0]]),
    )  # fmt: skip
    two = SimpleNamespace(**{name: value.repeat(2, 1) for name, value in vars(episodes).items()})
    assert learners.validate(model, images, two, 2, 7.0)[0] == 100
    monkeypatch.setattr(learners, "AT_ONCE", 1)  # an episode at a time
    assert learners.validate(model, images, two, 2, 7.0)[0] == 100


# ---- meta-testing


def fitter_of(model, pool, **changes):
    return HeadFitter(Settings(resume=str(model), pool=str(pool), device="cpu", mix_steps=1, **changes))


def test_rates_of_heads(trained, toy_pool, spy):
    seen = spy(few_shot, "fit_heads", lambda support, targets, stages, **_: [(s.steps, s.rate) for s in stages])
    targets = torch.eye(5)[None]
    fitter = fitter_of(trained / "best_model.pt", toy_pool)
    fitter.fit(torch.rand(1, 5, 64), targets, (torch.rand(1, 5, 64), targets))
    fitter.fit(torch.rand(1, 5, 64), targets)
    assert seen == [[(50, 0.05), (50, 0.01), (50, 0.05)], [(50, 0.05), (50, 0.05)]]


def test_partners_and_shares(trained, toy_pool):
    one = fitter_of(trained / "best_model.pt", toy_pool)
    other = fitter_of(trained / "best_model.pt", toy_pool, seed=2)
    drawn = [one.partners(0, 200, 25), one.partners(1, 200, 25), other.partners(0, 200, 25)]
    for order, share in drawn:
        assert torch.equal(order.sort(1).values, torch.arange(25).expand(200, -1))
        assert float(share.mean()) == pytest.approx(0.5, abs=0.03)
        assert float(share.var()) == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.01)  # of Beta(a, a)
        assert not torch.equal(order[0], order[1]) and not torch.equal(share[0], share[1])
    for order, share in drawn[1:]:
        assert not torch.equal(order, drawn[0][0]) and not torch.equal(share, drawn[0][1])


# ---- pretraining


class Weighing:
    """A sampler with weights of its own that takes down the losses it is told."""

    def __init__(self):
        self.told = []

    def sample(self, count, device, rng):
        return torch.arange(count) % 4, torch.tensor([1.0, 0, 3, 0.5])[:count]

    def update_with_local_losses(self, t, losses):
        self.told.append((t, losses))


def test_losses_are_weighted_and_told_unweighted(folder, tmp_path, monkeypatch):  # noqa: F811
    loop = loop_of(folder, tmp_path)
    loop.sampler, given = Weighing(), []
    losses = loop.diffusion.training_losses

    def watched(*args):
        given.append(losses(*args)["loss"])
        return {"loss": given[-1]}

    monkeypatch.setattr(loop.diffusion, "training_losses", watched)
    monkeypatch.setattr(loop.optimizer, "step", lambda: None)
    total = loop.train_step()
    gradient = loop.model.out[2].bias.grad.clone()
    expected = (given[0].detach() * torch.tensor([1.0, 0, 3, 0.5])).mean()
    torch.testing.assert_close(total, expected)
    assert torch.equal(loop.sampler.told[0][1], given[0].detach())
    weights = loop.sampler.sample(4, CPU, None)[1]
    monkeypatch.setattr(loop.sampler, "sample", lambda *_: (torch.arange(4), torch.ones(4)))
    loop.step = 0
    each = []
    for i in range(4):  # the gradient of each image alone
        monkeypatch.setattr(loop.sampler, "sample", lambda *_, i=i: (torch.arange(4), 4.0 * (torch.arange(4) == i)))
        loop.step = 0
        loop.train_step()
        each.append(loop.model.out[2].bias.grad.clone())
    torch.testing.assert_close(gradient, sum(w * g for w, g in zip(weights, each, strict=True)) / 4)


@pytest.mark.parametrize("greatest", [0.0, 1e-3])
def test_gradients_are_clipped(folder, tmp_path, monkeypatch, greatest):  # noqa: F811
    loop, norms = loop_of(folder, tmp_path, grad_clip=greatest), []

    def note():
        norms.append(float(torch.cat([p.grad.flatten() for p in loop.model.parameters()]).norm()))

    monkeypatch.setattr(loop.optimizer, "step", note)
    loop.train_step()
    assert norms[0] == pytest.approx(greatest, rel=1e-2) if greatest else norms[0] > 1e-2


@pytest.mark.parametrize("flip", [True, False])
def test_flip_of_pretraining(call, folder, tmp_path, spy, flip):  # noqa: F811
    seen = spy(TrainingImages, "batch", lambda *_, flip, **__: flip)
    train(call, folder, tmp_path / "out", "--random_flip", str(flip), "--steps", "1")
    assert seen and set(seen) == {flip}


def test_each_model_of_a_pool_has_its_seed(call, picture_folder, tmp_path, spy):
    images = picture_folder(tmp_path / "alike", {name: [10, 200] for name in "ab"})
    seen = spy(image_train, "training", lambda settings, *_: settings.seed)
    pool = ("--pool", tmp_path / "pool", "--classes_per_model", 1, "--seed", 7, "--lr", 1e-6)
    status, _, err = call(image_train, "--data_dir", images, *FLAGS, *pool, "--steps", 1)
    assert status == 0, err
    assert len(set(seen)) == 2
    one, two = (checkpoint.load(tmp_path / "pool" / f"subset{m}" / "ckpt" / "model.pt")["model"] for m in (1, 2))
    assert not torch.allclose(one["time_embed.0.weight"], two["time_embed.0.weight"], atol=1e-2)
