"""Pools of files that hold a U-Net inside something else, and what is said of files that hold none."""

import shutil
from pathlib import Path

import pytest
import torch

import guided_diffusion.image_train as image_train
from guided_diffusion.pool import Pool, subset_path
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.train_util import TrainLoop
from tests.conftest import UNET, same
from utils import checkpoint


@pytest.fixture(scope="module")
def weights(fill):
    return fill(create_model_and_diffusion(**UNET)[0]).state_dict()


def under(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


def other(weights):
    return {name: value + 1 for name, value in weights.items()}


HOLDS = {
    "state_dict": lambda w: {"state_dict": w, "epoch": 3},
    "ema before model": lambda w: {"model": other(w), "ema": w, "optimizer": {"state": {}, "param_groups": []}},
    "an ema of another name": lambda w: {"net": other(w), "model_ema": w},
    "module.": lambda w: under("module.", w),
    "module. in state_dict": lambda w: {"state_dict": under("module.", w)},
    "two prefixes": lambda w: {**under("online_model.", other(w)), **under("ema_model.", w), "step": torch.tensor(3)},
    "deeper": lambda w: {"checkpoint": {"model": {"state_dict": under("module.unet.", w)}}},
    "ema of a training without flags": lambda w: {"ema": {"module": w}, "model": other(w)},
}


@pytest.mark.parametrize("wrap", HOLDS.values(), ids=HOLDS)
def test_a_model_inside_is_found(wrap, weights, tmp_path):
    checkpoint.save(tmp_path / "a.pt", wrap(weights))
    pool = Pool(tmp_path / "a.pt", {name: UNET[name] for name in ("image_size", "num_heads", "noise_schedule")})
    model = pool.load(0)
    assert same(dict(model.network.state_dict()), dict(weights)) and model.flags["num_channels"] == 8


OTHERS = {
    "an optimiser's state": lambda w: torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).state_dict(),
    "conv.weight": lambda w: torch.nn.ModuleDict({"conv": torch.nn.Conv2d(3, 3, 1)}).state_dict(),
    "config, version": lambda w: {"config": {"a": 1}, "version": 2},
    "meta-model": lambda w: {"model": {"base.x": torch.zeros(1)}, "class_learner": {}, "settings": {}},
    "nothing": lambda w: {},
}


@pytest.mark.parametrize("words", OTHERS)
def test_of_others_it_is_said_what_they_hold(words, weights, tmp_path):
    checkpoint.save(tmp_path / "a.pt", OTHERS[words](weights))
    with pytest.raises(checkpoint.CheckpointError, match=f"a.pt: .*{words}.*not the state dict"):
        Pool(tmp_path / "a.pt").load(0)


def test_a_model_that_lacks_a_weight_is_still_refused(weights, tmp_path):
    part = dict(list(weights.items())[:-1])
    checkpoint.save(tmp_path / "a.pt", {"state_dict": under("module.", part)})
    with pytest.raises(checkpoint.CheckpointError, match=f"missing: {list(weights)[-1]}"):
        Pool(tmp_path / "a.pt", {"image_size": 16, "num_heads": 1}).load(0)


def test_the_state_of_a_training_gives_its_ema(call, picture_folder, tmp_path, monkeypatch):
    picture_folder(tmp_path / "data", {"c0": [10, 200], "c1": [90, 60]})
    monkeypatch.setattr(TrainLoop, "finish", lambda loop: loop.folder)  # which takes the state away
    argv = (
        "--image_size 16 --num_channels 8 --num_res_blocks 1 --channel_mult 1 --num_heads 1 --steps 4 --batch_size 2 "
        "--save_interval 2 --diffusion_steps 4 --noise_schedule cosine --device cpu --lr 1e-2 --ema_rate 0.9"
    ).split()
    call(image_train, "--data_dir", tmp_path / "data", "--save_dir", tmp_path / "out", "--hold_out", 0, *argv)
    path = tmp_path / "out" / "state.pt"
    state = checkpoint.load(path)
    assert not same(state["ema"], state["model"])
    model = Pool(path).load(0)
    assert same(dict(model.network.state_dict()), dict(state["ema"]))
    assert model.flags["noise_schedule"] == "cosine" and model.image_size == 16


def test_a_folder_with_a_model_directly_in_it_is_a_pool_of_one(make_pool, tmp_path):
    pool = make_pool(tmp_path / "pool", [3, 4])
    (tmp_path / "alone").mkdir()
    shutil.copyfile(subset_path(pool, 2), tmp_path / "alone" / "model.pt")
    alone = Pool(tmp_path / "alone")
    assert len(alone) == 1 and alone.share_classes() == [4] and alone.load(0).path == tmp_path / "alone" / "model.pt"
    shutil.copyfile(subset_path(pool, 1), Path(pool, "model.pt"))
    assert Pool(pool).share_classes() == [3, 4]  # subsets count
