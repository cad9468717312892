"""Random numbers depend on (seed, stream, index) and on nothing else."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.seeding import generator, noise, numpy_generator, seed_everything, uniform

ROOT = Path(__file__).resolve().parents[1]


def first(*words):
    return torch.randint(2**62, (1,), generator=generator(*words)).item()


def test_streams_differ_wherever_a_word_differs():
    streams = [(0,), (1,), (0, 1), (0, "1"), (0, "ab"), (0, "a", "b"), (0, "b", "a"), (0, 1, 2), (0, 12), (-1,)]
    assert len({first(*stream) for stream in streams}) == len(streams)
    assert len({numpy_generator(*stream).integers(2**62) for stream in streams}) == len(streams)


def test_same_words_give_same_numbers_in_any_process():
    code = "import torch; from utils.seeding import generator; print(generator(3, 'x', 4).initial_seed())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(output.stdout) == generator(3, "x", np.int64(4)).initial_seed()


def test_a_float_is_no_stream():
    with pytest.raises(TypeError):
        generator(0, 0.5)


def test_global_state_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    noise((3,), [0, 1], 0, "x")
    torch.rand(1, generator=generator(0, "x"))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("make", [noise, uniform])
def test_an_item_does_not_depend_on_its_batch(make):
    whole = make((3, 4, 4), range(10), 7, "images", 2)
    assert torch.equal(whole[[8, 3]], make((3, 4, 4), torch.tensor([8, 3]), 7, "images", 2))
    assert not torch.equal(whole, make((3, 4, 4), range(10), 7, "images", 3))
    assert make((3, 4, 4), [], 7).shape == (0, 3, 4, 4)


def test_noise_is_standard_normal():
    sample = noise((3, 16, 16), range(100), 0, "x")  # 76,800 numbers
    assert sample.dtype == torch.float32
    assert abs(sample.mean().item()) < 4 / 76800**0.5
    assert abs(sample.var().item() - 1) < 4 * (2 / 76800) ** 0.5


def test_seed_everything_repeats_initial_weights():
    seed_everything(5)
    weights = torch.nn.Linear(4, 4).weight
    seed_everything(5)
    assert torch.equal(weights, torch.nn.Linear(4, 4).weight)
