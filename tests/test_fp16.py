"""float16: of no use for training here, and no hindrance in a pool that was trained in it."""

import pytest
import torch

import diffusionmix
import main
from few_shot import FewShotClassifier
from guided_diffusion import costs, image_train
from guided_diffusion.pool import Pool
from guided_diffusion.script_util import model_and_diffusion_defaults
from guided_diffusion.synthesis import Synthesis, synthesise
from tests.conftest import NO_IMAGES, TINY, UNET

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def half_pool(make_pool, tmp_path_factory):
    return make_pool(tmp_path_factory.mktemp("half") / "pool", [4] * 5, use_fp16=True)


def test_training_in_fp16_is_refused_before_anything_is_read(call, tmp_path, picture_folder):
    command = ("--save_dir", tmp_path / "out", "--device", "cpu", "--use_fp16", "True")
    data = picture_folder(tmp_path / "data", {"a": [1, 2]})
    for more in ((), ("--pool", tmp_path / "pool"), ("--dry_run",)):
        status, _, err = call(image_train, "--data_dir", data, *command, *more)
        assert status == 2 and err.count("\n") == 1 and "use_fp16" in err and "--precision bf16" in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "pool").exists()


@pytest.mark.parametrize("training", [False, True])
def test_counting_memory_and_operations(training):
    flags = {**model_and_diffusion_defaults(), **UNET}
    for count in (costs.image_bytes, costs.image_flops):
        assert count(flags | {"use_fp16": True}, training=training) == count(flags, training=training)


def test_a_pool_trained_in_fp16_draws_what_another_draws(half_pool, toy_pool):
    plan = Synthesis(classes=[4] * 5, per_class=1, steps=2, size=16, seed=1, stream=0, precision="float32")
    assert torch.equal(synthesise(Pool(half_pool), plan, CPU)[0], synthesise(Pool(toy_pool), plan, CPU)[0])


@pytest.mark.slow
def test_such_a_pool_in_every_command(call, half_pool, tmp_path, few_glyphs, picture_folder):
    place = ("--pool", half_pool, "--data-root", NO_IMAGES, "--save-dir", tmp_path / "out")
    for more in (("--dry-run",), ()):
        status, _, err = call(main, *place, *TINY, "--max-epoch", 1, *more)
        assert status == 0, err
    test = ("--episodes", 2, "--nTestNovel", 10, "--device", "cpu")
    status, _, err = call(diffusionmix, *place, *test)
    assert status == 0, err
    data = picture_folder(tmp_path / "few", {"a": [1, 2], "b": [200, 220]})
    status, _, err = call(diffusionmix, *place, "--support", data, "--query", data / "a", "--device", "cpu")
    assert status == 0, err
    images, labels = torch.zeros(2, 3, 16, 16), ["a", "b"]
    classifier = FewShotClassifier(tmp_path / "out" / "best_model.pt", half_pool, device="cpu").fit(
        images - 0.5, labels
    )
    assert classifier.predict_proba(images - 0.5).shape == (2, 2)
