"""One regression test or more for each trap of published code of this method, in their order."""

import json
import shutil
import types

import pytest
import torch
import torch.nn.functional as F

import diffusionmix
import few_shot
import main
from config import SCENARIOS
from datasets.folder import load_split
from datasets.pseudo import PseudoDataset
from guided_diffusion import synthesis
from guided_diffusion.guidance import classifier_guidance
from guided_diffusion.image_datasets import load_images
from guided_diffusion.pool import Pool, subset_path
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.synthesis import Synthesis, synthesise
from guided_diffusion.unet import UNetModel
from models import learners
from models.class_learner import ClassLearner
from models.conv4 import Conv4
from models.episode_head import Stage, fit_heads, predict
from models.guides import class_learner_guide
from models.meta_model import MetaModel, prototype_scores
from tests.conftest import TINY, slow
from tests.test_augment import IDENTITY
from utils import checkpoint

CPU = torch.device("cpu")
QUICK = "--episodes 4 --nTestNovel 10 --mix-steps 2 --head-steps 5 --device cpu".split()


@pytest.fixture
def custom(picture_folder, tmp_path):
    """custom(*splits): a data root of only these splits, five classes of 12 grey images: one black, one white."""

    def make(*splits):
        for split in splits:
            picture_folder(tmp_path / "data" / split, {f"c{i}": [level] * 12 for i, level in enumerate(GREY)})
        return tmp_path / "data"

    return make


GREY = (0, 60, 128, 200, 255)


@pytest.fixture
def command(call, tmp_path, two_models):
    """command(module, root, *flags): run it on a custom data root in the run folder tmp_path / "run"."""

    def go(module, root, *flags, pool=two_models):
        fixed = TINY if module is main else QUICK
        shared = ("--dataset", "custom", "--data-root", root, "--pool", pool, "--save-dir", tmp_path / "run")
        status, out, err = call(module, *shared, *fixed, *flags)
        assert status == 0, err
        return out

    return go


@pytest.fixture
def ready(trained, tmp_path):
    """The run folder of `command`, with a trained meta-model in it."""
    return shutil.copytree(trained, tmp_path / "run")


# ---- 1. labels of the guidance


def pixel_of_its_class(x, t):
    """log p(c | x) whose gradient lights pixel c of the first channel."""
    return x[:, 0].flatten(1)[:, :20]


@pytest.mark.parametrize("class_cond", [False, True])
def test_guidance_gets_the_global_class_and_the_network_the_local_one(make_pool, tmp_path, monkeypatch, class_cond):
    counts, steered, local = [4, 5, 3, 5, 3], [], []

    def watched(log_probability, labels, scale):
        cond_fn = classifier_guidance(log_probability, labels, scale)

        def watching(x, t, **kwargs):
            gradient = cond_fn(x, t, **kwargs)
            if int(t[0]) == 0:  # the last step: a label changed on the way shows, too
                steered.append(gradient[:, 0].flatten(1).argmax(1))
            return gradient

        return watching

    forward = UNetModel.forward

    def spy(network, x, timesteps, y=None):
        if x.device.type != "meta" and int(timesteps[0]) == 0:
            local.append(y)
        return forward(network, x, timesteps, y)

    monkeypatch.setattr(synthesis, "classifier_guidance", watched)
    monkeypatch.setattr(UNetModel, "forward", spy)
    pool = Pool(make_pool(tmp_path, counts, class_cond=class_cond))
    plan = Synthesis(classes=counts, per_class=2, steps=3, size=16, seed=0, stream=0, batch=3)
    _, labels, _ = synthesise(pool, plan, CPU, pixel_of_its_class)
    asked = torch.arange(20).repeat_interleave(2)
    assert torch.equal(torch.cat(steered[2:]), asked)  # after a trial of its memory with one and with two images
    assert torch.equal(labels, asked)
    if class_cond:
        first = torch.tensor([0, 4, 9, 12, 17])
        assert torch.equal(torch.cat(local), asked - first[torch.bucketize(asked, first, right=True) - 1])
    else:
        assert local and all(y is None for y in local)


# ---- 2. classes keep their numbers


def test_class_10_is_not_second(tmp_path):
    labels = torch.arange(64).repeat_interleave(2)
    images = labels.to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4).contiguous()
    PseudoDataset(images, labels, 64).save(tmp_path, {})
    again = PseudoDataset.load(tmp_path)
    assert torch.equal(again.labels, labels) and torch.equal(again.images[:, 0, 0, 0].long(), again.labels)


@pytest.mark.usefixtures("few_glyphs")
def test_class_c_comes_from_its_model_in_every_round(command, custom, paint_pool, tmp_path):
    command(main, custom("meta_val"), pool=paint_pool)
    for r in range(2):
        data = PseudoDataset.load(tmp_path / "run" / "pseudo" / f"round{r:02d}")
        grey = data.images.float().mean((1, 2, 3)) / 127.5 - 1
        torch.testing.assert_close(grey, -0.8 + 0.4 * (data.labels // 4).float(), atol=0.05, rtol=0)
        assert torch.equal(torch.bincount(data.labels), torch.full((20,), 4))


# ---- 3. mixes: see also test_mix.py and test_diffusionmix.py


def test_labels_weigh_as_images_and_noise_is_of_the_schedule(command, custom, ready, two_models, monkeypatch):
    """Black and white images: the grey of a noise-free blend tells its weights, the rest is noise."""
    seen, labels, weights = [], [], []
    forward, mix_labels = UNetModel.forward, few_shot.mix_labels

    def spy(network, x, timesteps, y=None):
        if x.device.type != "meta" and int(timesteps[0]) == 199:
            seen.append(x)
        return forward(network, x, timesteps, y)

    def noted(a, b, weight):
        labels.append(mix_labels(a, b, weight))
        weights.append(weight)
        return labels[-1]

    root = custom("meta_val", "meta_test")
    monkeypatch.setattr(UNetModel, "forward", spy)
    monkeypatch.setattr(few_shot, "mix_labels", noted)
    asked, noise = [], few_shot.noise
    monkeypatch.setattr(few_shot, "noise", lambda *a: asked.append(noise(*a)) or asked[-1])
    classes, sampler = [], diffusionmix.EpisodeSampler.sample_indexed

    def drawn(*args):
        classes.append(sampler(*args).classes)
        return sampler(*args)

    monkeypatch.setattr(diffusionmix.EpisodeSampler, "sample_indexed", drawn)
    command(diffusionmix, root)
    abar = float(Pool(two_models).load(0).diffusion().alphas_cumprod[199])
    x_t, eps = torch.cat(seen), torch.cat(asked)
    blend = (x_t - (1 - abar) ** 0.5 * eps) / abar**0.5
    assert float(blend.flatten(1).std(1).max()) < 1e-4  # all noise is that of the schedule, none is missing
    level = torch.tensor(GREY)[classes[0]].float() / 127.5 - 1  # (E, way): grey of each class
    expected = torch.stack([(part * level[:, None]).sum(-1) for part in labels])  # (M, E, S)
    torch.testing.assert_close(blend.mean((1, 2, 3)).view_as(expected), expected, atol=1e-4, rtol=0)
    scaled = x_t - abar**0.5 * blend.mean((1, 2, 3), keepdim=True)
    assert float(scaled.var()) == pytest.approx(1 - abar, rel=0.02)


# ---- 4. one pixel range


def extremes(images):
    return float(images.min()), float(images.max())


@pytest.mark.parametrize("source", ["guided", "real"])
def test_every_network_of_training_sees_minus_one_to_one(command, custom, monkeypatch, source):
    clean, validated = [], []
    meta_loss, class_learner_loss, look = learners.meta_loss, learners.class_learner_loss, MetaModel.look

    def spy_meta(model, images, *args, **kwargs):
        clean.append(images)
        return meta_loss(model, images, *args, **kwargs)

    def spy_learner(model, learner, images, noised, t, *args, **kwargs):
        clean.append(images)
        abar = create_gaussian_diffusion(noise_schedule="cosine").alphas_cumprod
        rest = noised - torch.from_numpy(abar).float()[t].sqrt().view(-1, 1, 1, 1) * images
        unit = rest / (1 - torch.from_numpy(abar).float()[t]).sqrt().view(-1, 1, 1, 1)
        assert abs(float(unit.std()) - 1) < 0.05
        return class_learner_loss(model, learner, images, noised, t, *args, **kwargs)

    def spy_look(model, images):
        assert not model.training  # trap 5: no statistics of the validation images
        validated.append(images)
        return look(model, images)

    monkeypatch.setattr(learners, "meta_loss", spy_meta)
    monkeypatch.setattr(learners, "class_learner_loss", spy_learner)
    monkeypatch.setattr(learners.Learners, "changes", IDENTITY)
    monkeypatch.setattr(learners, "features", watched_features(spy_look))
    command(main, custom("meta_val", "meta_train"), "--source", source, "--train_epoch_size", 20)
    assert clean and all(-1 <= low and high <= 1 for low, high in map(extremes, clean))
    if source == "real":
        assert extremes(torch.cat([images.flatten() for images in clean])) == (-1.0, 1.0)
    assert validated and all(extremes(images) == (-1.0, 1.0) for images in validated)


def watched_features(spy):
    """`learners.features` with the model's `look` watched."""
    features = learners.features

    def watched(model, images):
        model.look = types.MethodType(spy, model)
        try:
            return features(model, images)
        finally:
            del model.look

    return watched


def test_every_network_of_testing_sees_minus_one_to_one(command, custom, ready, toy_pool, monkeypatch):
    root, seen, mixed = custom("meta_val", "meta_test"), [], []
    forward, mixes = Conv4.forward, few_shot.diffusion_mixes

    def spy_mix(model, x_a, x_b, *args, **kwargs):
        mixed.append(torch.cat([x_a, x_b]))
        return mixes(model, x_a, x_b, *args, **kwargs)

    def spy_conv4(network, images):
        assert not network.training  # trap 5: no statistics of the test images
        seen.append(images)
        return forward(network, images)

    monkeypatch.setattr(Conv4, "forward", spy_conv4)
    monkeypatch.setattr(few_shot, "diffusion_mixes", spy_mix)
    command(diffusionmix, root, pool=toy_pool)
    assert extremes(seen[0]) == (-1.0, 1.0)  # the real images: black is -1, white is 1, nothing is taken away
    assert len(seen) > 5 and all(-1 <= low and high <= 1 for low, high in map(extremes, seen))
    assert extremes(torch.cat(mixed)) == (-1.0, 1.0)


def test_guidance_and_pool_networks_see_the_same_image(toy_pool):
    """At each step the class-learner gets what the pool network got; the image comes out in [-1, 1]."""
    pool, by_network, by_guide = Pool(toy_pool), [], []
    model = pool.load(0)
    model.network.register_forward_pre_hook(lambda module, args: by_network.append(args[0]))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def log_p(x, t):
        by_guide.append(x.detach())
        return F.log_softmax(x.flatten(1)[:, :3], 1)

    cond_fn = classifier_guidance(log_p, torch.tensor([0, 1]), 1.0)
    out = synthesis.sample(model.network, model.diffusion("ddim4"), x, cond_fn=cond_fn)
    assert all(torch.equal(a, b) for a, b in zip(by_network, by_guide, strict=True)) and len(by_guide) == 4
    assert -1 <= extremes(out)[0] and extremes(out)[1] <= 1


# ---- 5. no image depends on its batch


@pytest.fixture
def trained_pair():
    """A meta-model and a class-learner with running statistics that are not trivial, left in train mode."""
    rng = torch.Generator().manual_seed(3)
    model, learner = MetaModel(6, generator=rng), ClassLearner(6, 64, generator=rng)
    with torch.no_grad():
        for _ in range(3):
            images = torch.rand(2, 10, 3, 16, 16, generator=rng) * 2 - 1
            model(images[:, :5], torch.arange(5).repeat(2, 1), images[:, 5:], 5)
            learner(model.embed(images.flatten(0, 1)), torch.randint(1000, (20,), generator=rng))
    return model, learner


def test_guidance_of_an_image_is_its_own(trained_pair):
    log_p = class_learner_guide(*trained_pair)
    rng = torch.Generator().manual_seed(4)
    x, t, labels = torch.randn(6, 3, 16, 16, generator=rng), torch.full((6,), 300), torch.full((6,), 2)
    together = classifier_guidance(log_p, labels, 1.0)(x, t)
    alone = torch.cat([classifier_guidance(log_p, labels[:1], 1.0)(x[i : i + 1], t[:1]) for i in range(6)])
    assert float(together.abs().max()) > 1e-4  # one class at one t: the signal is there
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=1e-3)
    odd = torch.cat([x[:1], 100 * x[1:]])
    torch.testing.assert_close(classifier_guidance(log_p, labels, 1.0)(odd, t)[:1], together[:1], atol=1e-6, rtol=1e-3)


def test_embeddings_prototypes_and_heads_are_their_own(trained_pair):
    model = trained_pair[0].eval()
    rng = torch.Generator().manual_seed(5)
    images = torch.rand(2, 15, 3, 16, 16, generator=rng) * 2 - 1
    embedded = model.embed(images.flatten(0, 1)).detach().unflatten(0, (2, 15))
    torch.testing.assert_close(model.embed(images[1, 3:4]).detach()[0], embedded[1, 3], atol=1e-6, rtol=1e-5)
    support, query, labels = embedded[:, :5], embedded[:, 5:], torch.arange(5).repeat(2, 1)
    scores = prototype_scores(support, labels, query, 5, 7.0)
    one = prototype_scores(support[:1], labels[:1], query[:1, :1], 5, 7.0)
    torch.testing.assert_close(one, scores[:1, :1], atol=1e-5, rtol=1e-5)
    targets = F.one_hot(labels, 5).float()
    heads = fit_heads(support, targets, [Stage(support, targets, 10, 0.05)])
    own = fit_heads(support[:1], targets[:1], [Stage(support[:1], targets[:1], 10, 0.05)])
    torch.testing.assert_close(own.weight, heads.weight[:1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(predict(own, query[:1, :1]), predict(heads, query)[:1, :1], atol=1e-6, rtol=1e-5)


def test_an_episode_does_not_depend_on_how_many_there_are(command, custom, ready, tmp_path):
    import json

    root, read = custom("meta_val"), lambda: json.loads((tmp_path / "run" / "results.json").read_text())
    results = []
    for count in (3, 6):
        command(diffusionmix, root, "--split", "meta_val", "--episodes", count)
        results.append(read())
    for name in ("by_episode", "by_episode_without_mix"):
        assert results[0][name] == results[1][name][:3]


# ---- 6. model selection never sees the novel classes


@pytest.mark.parametrize("source, splits", [
    ("guided", ["meta_val"]), ("unguided", ["meta_val"]), ("none", ["meta_val"]), ("real", ["meta_val", "meta_train"]),
])  # fmt: skip
def test_training_opens_only_its_splits(command, custom, monkeypatch, toy_pool, source, splits):
    root = custom(*splits)  # the others are not there at all
    opened, load = [], main.load_real
    monkeypatch.setattr(main, "load_real", lambda *args, **more: opened.append(args[2]) or load(*args, **more))
    command(main, root, "--source", source, "--max-epoch", 1, pool=toy_pool)
    assert opened == splits


def test_testing_opens_only_its_split(command, custom, ready, monkeypatch):
    opened, load = [], diffusionmix.load_real
    monkeypatch.setattr(diffusionmix, "load_real", lambda *args, **more: opened.append(args[2]) or load(*args, **more))
    command(diffusionmix, custom("meta_test"), "--mix", "False")
    assert opened == ["meta_test"]


# ---- 7. strict loading, whole scenarios, one read a model, no endless retry


def renamed(weights, change):
    name = next(iter(weights))
    if change == "extra":
        return {**weights, "extra.weight": weights[name]}
    return {k: v for k, v in weights.items() if k != name}


@pytest.mark.parametrize("change, word", [("extra", "unexpected: extra.weight"), ("missing", "missing: ")])
def test_pool_weights_load_strictly(make_pool, tmp_path, change, word):
    path = subset_path(make_pool(tmp_path, [4]), 1)
    payload = checkpoint.load(path)
    checkpoint.save(path, {**payload, "model": renamed(payload["model"], change)})
    with pytest.raises(checkpoint.CheckpointError, match=word):
        Pool(tmp_path).load(0)


@pytest.mark.parametrize("change, word", [("extra", "unexpected: extra.weight"), ("missing", "missing: ")])
def test_run_weights_load_strictly(custom, call, ready, tmp_path, change, word):
    root = custom("meta_val")
    state = checkpoint.load(ready / "last.pt")
    flags = ("--dataset", "custom", "--data-root", root, "--source", "none", *TINY, "--save-dir", tmp_path / "new")
    for part in ("model", "class_learner"):
        checkpoint.save(tmp_path / "bad.pt", {**state, part: renamed(state[part], change)})
        status, _, err = call(main, *flags, "--resume", tmp_path / "bad.pt")
        assert status == 2 and word in err
    checkpoint.save(tmp_path / "bad.pt", {**state, "model": renamed(state["model"], change)})
    quick = ("--data-root", root, "--dataset", "custom", "--split", "meta_val", *QUICK, "--mix", "False")
    status, _, err = call(diffusionmix, *quick, "--resume", tmp_path / "bad.pt", "--save-dir", tmp_path / "new")
    assert status == 2 and word in err and not (tmp_path / "new").exists()


CONDITIONAL, UNCONDITIONAL = ([5] * 12 + [4], True), ([4] * 13, False)
POOLS = {
    "co_miniimagenet": CONDITIONAL,
    "un_miniimagenet": UNCONDITIONAL,
    "co_cifarfs": CONDITIONAL,
    "un_cifarfs": UNCONDITIONAL,
    "cifar_mini": ([4] * 26, False),
    "glyphs": ([5], False),
    "fontchars": ([5], False),
    "custom": ([6], False),
}


@pytest.mark.parametrize("name", [name if SCENARIOS[name].embedded else slow(name) for name in SCENARIOS])
def test_every_scenario_runs_and_says_what_is_missing(name, call, custom, make_pool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module, missing in ((main, "got no diffusion models"), (diffusionmix, "no such checkpoint")):
        status, _, err = call(module, "--dataset", name, "--device", "cpu")
        assert status == 2 and missing in err and err.startswith("error: ckpt/")
        assert not any(tmp_path.iterdir())
    counts, class_cond = POOLS[name]
    pool = make_pool(tmp_path / "pool", counts, class_cond=class_cond)
    root = custom("meta_val", "meta_test")
    roots = f"{root},{root}/../second" if name == "cifar_mini" else root
    shutil.copytree(root, root.parent / "second")
    shared = ("--dataset", name, "--pool", pool, "--data-root", roots, "--save-dir", "run")
    few = ("--max-epoch", 1, "--train_nTestNovel", 5, "--samples-per-class", 2, "--train_epoch_size", 2)
    status, _, err = call(main, *shared, *TINY, *few)
    assert status == 0, err
    data = PseudoDataset.load(tmp_path / "run" / "pseudo" / "round00")
    assert data.num_classes == sum(counts)
    status, _, err = call(diffusionmix, *shared, *QUICK, "--episodes", 2, "--mix-steps", 1)
    assert status == 0, err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    if name == "cifar_mini":
        each = [domain["accuracy"] for domain in results["domains"].values()]
        assert results["episodes"] == 4 and results["accuracy"] == pytest.approx(sum(each) / 2)
        assert list(results["domains"]) == [root.name, "second"]
    else:
        assert results["episodes"] == 2 and "domains" not in results


def test_each_checkpoint_is_checked_and_then_read_once(command, custom, ready, monkeypatch, two_models):
    root, read, load = custom("meta_val", "meta_test"), [], checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda path, *args: read.append(str(path)) or load(path, *args))
    command(diffusionmix, root, "--episodes", 12, "--sample-batch", 7)
    models = [str(subset_path(two_models, m)) for m in (1, 2)]
    assert read[1:3] == models  # before any mix
    assert [path for path in read[3:] if "mixes" not in path] == models  # however many episodes and batches
    assert read[0].endswith("best_model.pt")


def test_unreadable_images_are_left_out_once(custom, command, capsys):
    root = custom("meta_val")
    for path in sorted((root / "meta_val" / "c3").iterdir())[:2]:
        path.write_bytes(b"no image")
    assert len(load_split(root, "meta_val", 16).images) == 58
    assert "2 unreadable image(s)" in capsys.readouterr().err
    assert len(load_images(root / "meta_val", 16).images) == 58
    command(main, root, "--source", "none")
    for path in (root / "meta_val").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="no class with a readable image"):
        load_split(root, "meta_val", 16)
    with pytest.raises(ValueError, match="no readable image among 60"):
        load_images(root / "meta_val", 16)
