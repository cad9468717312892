"""Bare checkpoints: what their tensors do not tell can be said by flags, all of it."""

import pytest
import torch

from config import BARE, Settings, parse
from few_shot import FewShotClassifier
from guided_diffusion.pool import Pool
from guided_diffusion.script_util import create_model_and_diffusion, infer_model_flags, model_and_diffusion_defaults
from guided_diffusion.synthesis import Synthesis, synthesise
from utils import checkpoint

CPU = torch.device("cpu")
NETWORK = dict(
    image_size=16, num_channels=16, num_res_blocks=1, channel_mult="1,2", attention_resolutions="8", learn_sigma=True,
    noise_schedule="cosine",
)  # fmt: skip
# what changes no image: losses and memory of the training, its precision, its dropout
ONLY_TRAINING = {"dropout", "use_checkpoint", "use_fp16", "use_kl", "rescale_learned_sigmas", "loss_weighting"}
OTHERS = {  # of every flag of a bare pool, a value that is not its default
    "image_size": 32, "num_heads": 2, "num_heads_upsample": 1, "num_head_channels": 4,
    "use_new_attention_order": True, "noise_schedule": "linear", "diffusion_steps": 400, "timestep_respacing": "10",
    "predict_xstart": True, "rescale_timesteps": True,
}  # fmt: skip


def test_every_flag_of_a_network_is_told_or_can_be_said():
    with torch.device("meta"):
        state = create_model_and_diffusion(**NETWORK, class_cond=True, num_classes=3)[0].state_dict()
    told = set(infer_model_flags(state, 16))
    every = set(model_and_diffusion_defaults())
    assert told | set(BARE) | ONLY_TRAINING == every
    assert not (told - {"image_size"}) & set(BARE) and not ONLY_TRAINING & (told | set(BARE))
    assert set(OTHERS) == set(BARE) and all(getattr(Settings(), name) != value for name, value in OTHERS.items())


def drawn(pool):
    plan = Synthesis(classes=[1], per_class=2, steps=2, size=16, seed=1, stream=0, precision="float32")
    return synthesise(pool, plan, CPU)[0]


@pytest.mark.usefixtures("enough_memory")
@pytest.mark.parametrize("name", OTHERS)
def test_a_flag_draws_what_the_stored_setting_draws(fill, tmp_path, name):
    flags = {**model_and_diffusion_defaults(), **NETWORK, name: OTHERS[name]}
    if name == "image_size":
        flags["attention_resolutions"] = "16"
    if name == "rescale_timesteps":  # which changes nothing of 1000
        flags["diffusion_steps"] = 400
    weights = fill(create_model_and_diffusion(**flags)[0]).state_dict()
    checkpoint.save(tmp_path / "stored.pt", {"model": weights, "flags": flags, "num_classes": 1})
    checkpoint.save(tmp_path / "bare.pt", weights)
    common = [] if name == "image_size" else ["--image-size", "16"]
    common += ["--diffusion-steps", "400"] if name == "rescale_timesteps" else []
    more = [f"--{name.replace('_', '-')}", str(OTHERS[name])]
    said, unsaid = (parse(argv, description="").bare_checkpoint_flags() for argv in (common + more, common))
    stored = drawn(Pool(tmp_path / "stored.pt"))
    assert torch.equal(drawn(Pool(tmp_path / "bare.pt", said)), stored)
    if name != "image_size":  # whose images would be of another size
        assert not torch.equal(drawn(Pool(tmp_path / "bare.pt", unsaid)), stored)


def test_the_classifier_takes_them_too():
    settings = FewShotClassifier("m.pt", "p.pt", pool_flags=OTHERS).settings()
    assert settings.bare_checkpoint_flags() == OTHERS


@pytest.mark.usefixtures("enough_memory")
def test_a_flag_that_every_model_contradicts_is_refused(fill, tmp_path):
    flags = {**model_and_diffusion_defaults(), **NETWORK, "num_heads": 2}
    weights = fill(create_model_and_diffusion(**flags)[0]).state_dict()
    stored = {"model": weights, "flags": flags, "num_classes": 1}
    paths = [tmp_path / f"subset{m}" / "ckpt" / "model.pt" for m in (1, 2)]
    for path in paths:
        path.parent.mkdir(parents=True)
        checkpoint.save(path, stored)
    common = ["--dataset", "custom", "--pool", str(tmp_path)]

    def pool(*more):
        return Pool.of(parse([*common, *more], description=""))

    assert len(pool()) == len(pool("--num-heads", "2", "--image-size", "16")) == 2  # unsaid, and the same
    for flag, value, cure in (("--num-heads", "8", "leave"), ("--image-size", "32", "--height 32")):
        with pytest.raises(ValueError, match=f"{flag} {value}.*{cure}"):
            pool(flag, value)
    checkpoint.save(paths[1], weights)  # a bare one, which takes what is said
    assert pool("--num-heads", "8", "--image-size", "16").load(1).flags["num_heads"] == 8
