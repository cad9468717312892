"""The device of a process, bf16 that is native there, and what several processes must agree on."""

import pytest
import torch

import main
from datasets.pseudo import PseudoDataset
from guided_diffusion.dist_util import autocast, inference_dtype, pick_device
from guided_diffusion.resample import LossSecondMomentResampler
from tests.conftest import NO_IMAGES, TINY
from tests.fake_cuda import fake_cuda

CARDS = {0: (9, 0), 1: (7, 0), 2: (7, 5), 3: (8, 0)}  # H100, V100, T4, A100


@pytest.fixture
def gpus():
    """A machine with these cards; returns those that were made current."""
    with fake_cuda(CARDS) as cuda:
        yield cuda.chosen


@pytest.mark.parametrize("card", CARDS)
def test_bf16_only_where_the_chosen_card_has_it(gpus, card):
    device, native = torch.device("cuda", card), CARDS[card][0] >= 8
    assert inference_dtype("auto", device) == (torch.bfloat16 if native else torch.float32)
    assert inference_dtype("bf16", device) == torch.bfloat16
    assert isinstance(autocast("auto", device), torch.autocast) == native


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_of_torchrun_has_its_own_card_and_makes_it_current(gpus, monkeypatch, name):
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert pick_device(name) == torch.device("cuda", 2) and gpus == [2]


def test_a_card_that_is_named_is_made_current(gpus):
    assert pick_device("cuda:3") == torch.device("cuda", 3) and gpus == [3]
    assert pick_device("cpu") == torch.device("cpu") and gpus == [3]


def test_the_resampler_stays_on_the_cpu_in_its_own_tables():
    sampler, other = (LossSecondMomentResampler(8, history_per_term=3) for _ in range(2))
    for _ in range(3):
        sampler.update_with_local_losses(torch.arange(8), 1.0 + torch.arange(8))
    places = [other.history.data_ptr(), other.seen.data_ptr()]
    other.load_state_dict(sampler.state_dict())
    assert places == [other.history.data_ptr(), other.seen.data_ptr()]  # copied into, so wherever the state lies
    assert torch.equal(other.probabilities(), sampler.probabilities())
    with fake_cuda():
        other.load_state_dict({name: value.cuda() for name, value in sampler.state_dict().items()})
        assert other.history.device.type == other.seen.device.type == "cpu"


def test_all_processes_ask_for_what_the_first_one_says(call, two_models, tmp_path, few_glyphs, few_rounds, monkeypatch):
    """Each computes it on its own device, where the last bits may differ, and draws its share of the images."""
    said = torch.arange(8).repeat_interleave(4).view(2, 16).flip(1).flatten()

    def broadcast(value):
        return said if isinstance(value, torch.Tensor) else value

    monkeypatch.setattr("utils.processes.broadcast", broadcast)
    flags = (*TINY, "--recipe", "clusters", "--max-epoch", 3, "--refresh-every", 2)
    flags += ("--pool", two_models, "--data-root", NO_IMAGES)
    status, _, err = call(main, *flags, "--save-dir", tmp_path / "run")
    assert status == 0, err
    assert torch.equal(PseudoDataset.load(tmp_path / "run" / "pseudo" / "round01").labels, said)
