"""Flags: defaults, errors, and reading flags back from a state dict."""

import json

import pytest
import torch

from guided_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from guided_diffusion.script_util import (
    create_gaussian_diffusion,
    create_model,
    create_model_and_diffusion,
    infer_model_flags,
    model_and_diffusion_defaults,
)


def test_defaults_are_the_flags_of_the_goldens(goldens):
    config = json.loads((goldens / "guided_diffusion.json").read_text())["uncond64"]["config"]
    assert set(model_and_diffusion_defaults()) == set(config) | {"num_classes", "loss_weighting"}


def test_defaults_make_a_pair():
    with torch.device("meta"):
        model, diffusion = create_model_and_diffusion()
    assert model.out_channels == 3 and model.num_classes is None and diffusion.num_timesteps == 1000


@pytest.mark.parametrize(("size", "levels"), [(32, 3), (64, 4), (128, 5), (256, 6), (512, 7)])
def test_default_levels(size, levels):
    with torch.device("meta"):
        model = create_model(image_size=size, num_channels=64, num_res_blocks=1)
    assert model.downsampling == 2 ** (levels - 1)


ROUND_TRIPS = [
    dict(image_size=32),
    dict(image_size=64, num_res_blocks=2),
    dict(image_size=32, resblock_updown=True),
    dict(image_size=64, resblock_updown=True, num_res_blocks=3, attention_resolutions="32,16,8"),
    dict(image_size=32, attention_resolutions=""),
    dict(image_size=64, attention_resolutions="", resblock_updown=True),
    dict(image_size=32, class_cond=True, num_classes=5),
    dict(image_size=64, class_cond=True, num_classes=64, learn_sigma=True),
    dict(image_size=32, use_scale_shift_norm=False),
    dict(image_size=64, use_scale_shift_norm=False, resblock_updown=True, class_cond=True, num_classes=1),
    dict(image_size=32, channel_mult="1", attention_resolutions="32"),
    dict(image_size=32, channel_mult="1", attention_resolutions="", num_res_blocks=3),
    dict(image_size=64, channel_mult="0.5,1,1.5,2", attention_resolutions="64,8", num_channels=32),
    dict(image_size=32, channel_mult="1,1", attention_resolutions="16", num_res_blocks=2, learn_sigma=True),
    dict(image_size=48, channel_mult="2,1,2", attention_resolutions="24"),
]


@pytest.mark.parametrize("flags", ROUND_TRIPS, ids=lambda flags: ",".join(f"{k}={v}" for k, v in flags.items()))
def test_flags_are_read_back_from_the_state_dict(flags):
    wanted = dict(num_channels=16, num_res_blocks=1, attention_resolutions="16,8", class_cond=False, learn_sigma=False)
    wanted |= dict(use_scale_shift_norm=True, resblock_updown=False, channel_mult="") | flags
    with torch.device("meta"):
        state = create_model(**wanted).state_dict()
    read = infer_model_flags(state, image_size=flags["image_size"])
    defaults = {32: "1,2,2", 64: "1,2,3,4"}
    wanted["channel_mult"] = wanted["channel_mult"] or defaults[flags["image_size"]]
    if len(wanted["channel_mult"].split(",")) == 1:
        wanted["resblock_updown"] = False  # one level never resamples
    assert read == wanted
    with torch.device("meta"):
        again = create_model(**read).state_dict()
    assert [(k, v.shape) for k, v in again.items()] == [(k, v.shape) for k, v in state.items()]
    without_size = infer_model_flags(state)
    assert without_size == {k: v for k, v in read.items() if k not in ("image_size", "attention_resolutions")}


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"conv1.weight": torch.zeros(3, 3)},
        {"time_embed.0.weight": torch.zeros(4)},
        {"time_embed.0.weight": torch.zeros(4, 2), "output_blocks.0.0.weight": torch.zeros(1)},
    ],
)
def test_a_strange_state_dict_is_refused(state):
    with pytest.raises(ValueError, match="not the state dict of a guided-diffusion U-Net"):
        infer_model_flags(state)


def test_diffusion_flags():
    d = create_gaussian_diffusion(learn_sigma=True, rescale_learned_sigmas=True, timestep_respacing="ddim25")
    assert d.num_timesteps == 25 and d.loss_type is LossType.RESCALED_MSE
    assert d.model_var_type is ModelVarType.LEARNED_RANGE and d.model_mean_type is ModelMeanType.EPSILON
    d = create_gaussian_diffusion(predict_xstart=True, use_kl=True, diffusion_steps=400)
    assert d.model_mean_type is ModelMeanType.START_X and d.loss_type is LossType.RESCALED_KL
    assert d.model_var_type is ModelVarType.FIXED_LARGE and d.num_timesteps == 400


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(image_size=48), "image_size 48.*channel_mult"),
        (dict(image_size=32, channel_mult="1,1,1,1,1,1,1"), "channel_mult.*7 levels"),
        (dict(channel_mult="1,two"), "channel_mult '1,two'"),
        (dict(channel_mult="1,nan"), "channel_mult '1,nan'"),
        (dict(channel_mult="1e9"), "channel_mult '1e9'.*1024"),
        (dict(channel_mult="1,-2"), "channel_mult '1,-2'"),
        (dict(channel_mult="0.3,1"), "channel_mult.*num_channels"),
        (dict(channel_mult=","), "channel_mult"),
        (dict(num_res_blocks=0), "num_res_blocks 0"),
        (dict(attention_resolutions="x"), "attention_resolutions 'x'"),
        (dict(attention_resolutions="inf"), "attention_resolutions 'inf'"),
        (dict(noise_schedule="sqrt"), "noise_schedule 'sqrt'"),
        (dict(timestep_respacing="1001"), "1001 of the 1000 steps"),
        (dict(num_chanels=3), "num_chanels"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(ValueError, match=message) as error, torch.device("meta"):
        create_model_and_diffusion(**flags)
    assert "\n" not in str(error.value)
