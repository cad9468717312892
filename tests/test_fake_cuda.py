"""The program on a GPU, as far as a machine without one can tell: where tensors are, and what the host waits for."""

import json
import shutil
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import diffusionmix
import main
from config import Settings
from datasets.pseudo import PseudoDataset
from few_shot import FewShotClassifier
from guided_diffusion import image_train
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.image_datasets import TrainingImages
from guided_diffusion.mix import diffusion_mixes
from guided_diffusion.noise_levels import shared_process
from guided_diffusion.pool import Pool
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from guided_diffusion.synthesis import Synthesis, synthesise
from guided_diffusion.train_flags import TrainSettings
from guided_diffusion.train_util import TrainLoop
from models import episode_head
from models.learners import ClusterLearners, PaperLearners
from tests.conftest import NO_IMAGES, TINY, UNET, same
from tests.fake_cuda import CPU, GPU, fake_cuda
from utils import checkpoint

pytestmark = pytest.mark.usefixtures("few_glyphs", "few_rounds", "enough_memory")

PAIR = ("cpu", "cuda")


@pytest.fixture(scope="module")
def labelled_models(make_pool, tmp_path_factory):
    """Two class-conditional models of four classes each. For reading only."""
    return make_pool(tmp_path_factory.mktemp("labelled") / "pool", [4] * 2, class_cond=True)


def there(device):
    return fake_cuda() if device == "cuda" else nullcontext()


# ---- whole commands: an operation that mixes devices raises, and no number may change


@pytest.mark.parametrize("recipe", ["paper", "clusters"])
def test_training_gives_what_it_gives_on_a_cpu(call, two_models, labelled_models, tmp_path, recipe):
    """Synthesis by both guidances and without, both learners of the paper's recipe, clusters, validation."""
    pool, more = labelled_models, ("--precision", "bf16")
    if recipe == "clusters":
        more = ("--precision", "float32", "--max-epoch", 3, "--refresh-every", 2, "--views", 2)
        pool = two_models
    flags = (*TINY, "--recipe", recipe, *more, "--pool", pool, "--data-root", NO_IMAGES)
    epochs, weights = [], []
    for device in PAIR:
        folder = tmp_path / device
        with there(device):
            status, _, err = call(main, *flags, "--device", device, "--save-dir", folder)
        assert status == 0, err
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        epochs.append([{name: value for name, value in line.items() if "seconds" not in name} for line in lines])
        weights.append(checkpoint.load(folder / "last.pt")["model"])
    assert epochs[0] == epochs[1] and len(epochs[0]) >= 2
    assert same(*weights)


def test_testing_gives_what_it_gives_on_a_cpu(call, trained, two_models, tmp_path):
    """Mixes, features of real images, and the head of three stages."""
    results = []
    for device in PAIR:
        shutil.copytree(trained, tmp_path / device)
        flags = ("--episodes", 4, "--nTestNovel", 10, "--mix-steps", 2, "--head-steps", 5, "--sample-batch", 7)
        place = ("--pool", two_models, "--data-root", NO_IMAGES, "--save-dir", tmp_path / device)
        with there(device):
            status, _, err = call(diffusionmix, *flags, *place, "--device", device, "--precision", "float32")
        assert status == 0, err
        results.append(json.loads((tmp_path / device / "results.json").read_text()))
    for name in ("by_episode", "by_episode_without_mix"):
        assert results[0][name] == results[1][name]


@pytest.mark.parametrize("init", ["prototypes", "random"])
def test_a_classifier_gives_what_it_gives_on_a_cpu(trained, two_models, init):
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = []
    for device in PAIR:
        with there(device):
            few = FewShotClassifier(
                trained / "best_model.pt", two_models, mix_steps=2, head_steps=5, head_init=init, device=device,
                precision="float32", sample_batch=7,
            )  # fmt: skip
            found.append(few.fit(images, list("aabbbc")).predict_proba(images).tolist())
    assert found[0] == found[1]


def test_pretraining_gives_what_it_gives_on_a_cpu(call, picture_folder, tmp_path, monkeypatch):
    """It is killed once, and resumes from a state that is read onto the GPU."""
    folder, weights = picture_folder(tmp_path / "images", {"a": [20, 40, 60], "b": [200, 220, 240]}), []
    monkeypatch.setattr("guided_diffusion.memorisation.SAMPLES", 4)
    monkeypatch.setattr("guided_diffusion.train_util.SHEET", 2)
    flags = UNET | dict(
        diffusion_steps=8, batch_size=4, microbatch=3, steps=4, save_interval=2, hold_out=0, class_cond=True,
        grad_clip=1.0, random_flip=True, lr_anneal_steps=4, precision="float32",
    )  # fmt: skip
    step = TrainLoop.train_step

    def killed(loop):
        if loop.step == 3:
            raise KeyboardInterrupt
        return step(loop)

    for device in PAIR:
        words = [word for name, value in (flags | {"device": device}).items() for word in (f"--{name}", value)]
        for expected, run in ((130, killed), (0, step)):
            with there(device):
                monkeypatch.setattr(TrainLoop, "train_step", run)
                status, _, err = call(image_train, "--data_dir", folder, "--save_dir", tmp_path / device, *words)
            assert status == expected, err
        weights.append(checkpoint.load(tmp_path / device / "model.pt")["model"])
    assert same(*weights)


# ---- what a step waits for: nothing


def synthesis(pool, steps, guide=None, **how):
    """Draw images of two classes of each of two models, in as many steps."""
    plan = Synthesis(classes=[2, 2], per_class=2, steps=steps, size=16, seed=1, stream=0, precision="float32", **how)
    synthesise(Pool(pool), plan, GPU, guide)


def mixes(pool, steps):
    """Denoise mixes in as many steps."""
    model, (a, b, noise) = Pool(pool).load(0, GPU, "float32"), torch.zeros(3, 2, 3, 16, 16, device=GPU)
    diffusion_mixes(model, a, b, torch.ones(2, device=GPU), noise, steps=steps)


def heads(steps):
    """Fit heads by as many steps per stage."""
    support, targets = torch.ones(2, 5, 8, device=GPU), torch.eye(5, device=GPU).expand(2, 5, 5)
    stages = episode_head.meta_test_stages(support, targets, (support, targets), steps=steps, rates=(0.1,) * 3)
    episode_head.fit_heads(support, targets, stages)


def paper(**changes):
    return PaperLearners(Settings(**SMALL | changes), 4, 16, GPU, shared_process())


def clusters(**changes):
    return ClusterLearners(Settings(**SMALL | dict(recipe="clusters", features="map", views=2) | changes), 4, 16, GPU)


def train(learners, steps, part="train_meta_model"):
    """Train a part of the learners for an epoch of as many steps, on images of noise."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8, generator=rng)
    data = PseudoDataset(images, torch.arange(4).repeat_interleave(10), 4).on(GPU)
    more = (0,) if part == "train_meta_model" else ()
    getattr(learners, part)(data, (0.1,) * steps, torch.Generator(device=GPU), *more)


def pretrain(folder, steps, **changes):
    """Train a diffusion model for as many steps."""
    flags = model_and_diffusion_defaults() | UNET | dict(diffusion_steps=8, class_cond=True, num_classes=2)
    network, diffusion = create_model_and_diffusion(**flags)
    data = TrainingImages(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]), ["a", "b"])
    settings = TrainSettings(batch_size=4, microbatch=3, grad_clip=1.0, random_flip=True, precision="float32")
    settings = replace(settings, **changes)
    loop = TrainLoop(
        model=network, diffusion=diffusion, data=data, settings=settings, flags=flags, folder=folder, device=GPU
    )
    for _ in range(steps):
        loop.train_step()


SMALL = dict(nKnovel=4, nTestNovel=8, train_nTestNovel=8, train_batch=2, image_batch=4)
LOOPS = {
    "unguided synthesis": lambda at, steps: synthesis(at.pool, steps),
    "synthesis with labels": lambda at, steps: synthesis(at.labelled, steps),
    "synthesis with new noise": lambda at, steps: synthesis(at.pool, steps, renoise=0.5),
    "guidance on x_t": lambda at, steps: synthesis(at.pool, steps, paper().guide(), guide_on="x_t"),
    "guidance on x_0": lambda at, steps: synthesis(at.pool, steps, clusters().guide(), guide_on="x_0"),
    "mixes": lambda at, steps: mixes(at.pool, steps),
    "heads": lambda at, steps: heads(steps),
    "meta-model": lambda at, steps: train(paper(), steps),
    "meta-model by AdamW": lambda at, steps: train(paper(optim="adamw"), steps),
    "class-learner": lambda at, steps: train(paper(), steps, "train_class_learner"),
    "meta-model of clusters": lambda at, steps: train(clusters(), steps),
    "DropBlock": lambda at, steps: train(clusters(backbone="resnet12", drop_rate=0.1), steps),
    "pretraining": lambda at, steps: pretrain(at.folder, steps),
}


@pytest.fixture
def at(two_models, labelled_models, tmp_path):
    """Where pools and runs are."""
    return SimpleNamespace(pool=two_models, labelled=labelled_models, folder=tmp_path)


def waits(loop, at, steps):
    """What the host waits for in a loop of as many steps, how often, and where."""
    with fake_cuda() as cuda:
        LOOPS[loop](at, steps)
    return Counter(cuda.waits)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_step_waits_for_nothing(at, loop):
    assert waits(loop, at, 6) == waits(loop, at, 3)


def test_importance_sampling_waits_for_the_losses(tmp_path):
    """The next timesteps depend on them. Nothing else is waited for."""
    counts = []
    for steps in (3, 6):
        with fake_cuda() as cuda:
            pretrain(tmp_path, steps, schedule_sampler="loss-second-moment")
        counts.append(Counter(cuda.waits))
    assert counts[1] - counts[0] and all("resample.py" in where for where in counts[1] - counts[0])


def test_episodes_of_more_images_than_the_gpu_holds_are_sent_ahead():
    counts = []
    for steps in (3, 6):
        with fake_cuda(memory=1000) as cuda:
            train(paper(), steps)
        counts.append(Counter(cuda.waits))
    assert counts[0] == counts[1]


# ---- what the fake GPU sees


def test_a_planted_copy_to_the_cpu_is_seen(at, monkeypatch):
    step = GaussianDiffusion.step_back
    monkeypatch.setattr(
        GaussianDiffusion, "step_back", lambda self, x_0, eps, t: step(self, x_0.cpu().to(eps.device), eps, t)
    )
    with pytest.raises(AssertionError, match="from the GPU"):
        test_a_step_waits_for_nothing(at, "mixes")


def test_a_planted_index_on_the_cpu_is_seen(at, monkeypatch):
    def planted(self, name, t, like):
        return self._cached(name, t.device)[torch.zeros(len(t), dtype=torch.int64)].view(-1, 1, 1, 1)

    monkeypatch.setattr(GaussianDiffusion, "at", planted)
    with pytest.raises(RuntimeError, match="same device"):
        test_a_step_waits_for_nothing(at, "mixes")


def test_tensors_are_where_a_gpu_has_them():
    with fake_cuda() as cuda:
        x = torch.zeros(3, 4, device="cuda", requires_grad=True)
        made = (x[1:], x.sum(), x.detach().T, torch.zeros_like(x), x.new_zeros(2), x.to(torch.float16))
        assert {each.device for each in made} == {GPU} and x.is_cuda and not cuda.waits
        (x**2).sum().backward()
        assert x.grad.device == GPU and x.cpu().device == CPU and torch.zeros(2).device == CPU
        for mixed in (lambda: x + torch.zeros(3, 4), lambda: x.sum() + torch.zeros(3), lambda: x[torch.tensor([0])]):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        assert (x * torch.tensor(2.0)).device == GPU  # a number on the CPU, which a GPU takes
        for device, generator in (("cuda", torch.Generator()), ("cpu", torch.Generator(device="cuda"))):
            with pytest.raises(RuntimeError, match="generator"):
                torch.rand(3, device=device, generator=generator)
        with pytest.raises(TypeError, match="cuda"):
            x.detach().numpy()
    assert not torch.zeros(2).is_cuda and not torch.cuda.is_available()


def test_what_makes_the_host_wait_is_seen():
    with fake_cuda() as cuda:
        x, host = torch.ones(3, device="cuda"), torch.zeros(3)
        mask = x > 0

        def seen(work):
            cuda.waits.clear()
            work()
            return len(cuda.waits)

        reads = (x.tolist, x[0].item, lambda: float(x.sum()), lambda: bool(mask.any()), mask.nonzero, lambda: x[mask])
        assert [seen(each) for each in reads] == [1] * 6
        copies = (x.cpu, lambda: host.copy_(x), lambda: host.to(GPU), lambda: x.copy_(host), lambda: x.new_tensor([1]))
        assert [seen(each) for each in copies] == [1] * 5
        free = (lambda: host.to(GPU, non_blocking=True), lambda: x.to(GPU), lambda: x + 1, lambda: x[x.long() % 3])
        assert [seen(each) for each in free] == [0] * 4
