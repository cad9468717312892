"""The command line of pretraining: its help, its examples, and words that it takes for yes and no."""

import re
import shlex
from dataclasses import fields

import pytest

from guided_diffusion.train_flags import (
    EXAMPLES,
    NETWORK,
    PLACE,
    SPEED,
    WEIGHTS,
    TrainSettings,
    create_argparser,
    parse,
)


def test_help_shows_every_flag_in_its_group():
    text = create_argparser().format_help()
    group = {}
    for part in re.split(r"\n(?=\S.*:\n)", text):
        group |= dict.fromkeys(re.findall(r"^  --(\w+)", part, re.MULTILINE), part.partition(":")[0])
    assert group == {f.name: f.metadata["group"] for f in fields(TrainSettings)}
    assert group["num_heads"] == NETWORK and "sigma_small" not in text


def test_examples_are_valid():
    commands = re.findall(r"image_train\.py (.*)", EXAMPLES.replace("\\\n", " "))
    assert len(commands) == 3 and all(parse(shlex.split(command)).data_dir for command in commands)


def test_every_setting_says_what_it_affects():
    assert {f.metadata["affects"] for f in fields(TrainSettings)} == {WEIGHTS, SPEED, PLACE}


def test_defaults_and_types():
    assert parse([]) == TrainSettings()
    settings = parse("--image-size 32 --learn_sigma --class_cond=false --channel_mult 1,2 --dropout 0.1".split())
    assert settings == TrainSettings(image_size=32, learn_sigma=True, channel_mult="1,2", dropout=0.1)


@pytest.mark.parametrize("word, meant", [("yes", True), ("True", True), ("1", True), ("n", False), ("FALSE", False)])
def test_yes_and_no(word, meant):
    assert parse(["--random_flip", word]).random_flip is meant


@pytest.mark.parametrize(
    "flag, word", [("random_flip", "maybe"), ("noise_schedule", "sine"), ("num_heads_upsample", "0")]
)
def test_other_words_are_refused(flag, word):
    with pytest.raises(ValueError, match=f"--{flag}.*{word}"):
        parse([f"--{flag}", word])


def test_the_default_is_valid_outside_the_range():
    assert parse(["--microbatch", "-1"]).microbatch == -1
    with pytest.raises(ValueError, match="--microbatch -2, expected -1, or 0 to 65536"):
        parse(["--microbatch", "-2"])
