"""--dry-run: counts what a run then does, makes nothing."""

import re

import pytest
import torch

import diffusionmix
import dry_run
import main
from guided_diffusion.pool import Pool
from guided_diffusion.unet import UNetModel
from tests.conftest import TINY, slow

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_trial(monkeypatch):
    monkeypatch.setattr(dry_run, "TRIAL", 0.0)


@pytest.fixture
def passes(monkeypatch):
    """Images that pass the networks: a list of batch sizes. Those that pass to count bytes and operations do not."""
    seen, forward = [], UNetModel.forward

    def counted(network, x, *rest, **options):
        seen.extend([len(x)] * (x.device.type != "meta"))
        return forward(network, x, *rest, **options)

    monkeypatch.setattr(UNetModel, "forward", counted)
    return seen


@pytest.fixture
def flags(tmp_path, toy_pool, picture_folder):
    for split in ("meta_train", "meta_val", "meta_test"):
        picture_folder(tmp_path / "data" / split, {f"c{i}": [40 * i + j for j in range(12)] for i in range(5)})
    return ("--dataset", "custom", "--data-root", tmp_path / "data", "--pool", toy_pool)


OTHERS = [slow("--recipe clusters --refresh-every 2 --max-epoch 3"), slow("--source unguided")]


@pytest.mark.parametrize("more", ["--recipe paper", *OTHERS])
def test_training_makes_as_many_passes_as_were_said(call, flags, passes, two_models, tmp_path, more):
    pool = ("--pool", two_models, "--samples-per-class", 8) if "paper" in more else ()
    command = (*flags, *TINY, *more.split(), *pool, "--save-dir", tmp_path / "out")
    status, out, err = call(main, *command, "--dry-run")
    assert status == 0, err
    assert not (tmp_path / "out").exists()
    said = int(re.search(r"([\d,]+) forward passes", out)[1].replace(",", ""))
    passes.clear()
    assert call(main, *command)[0] == 0
    assert sum(passes) == said
    assert "disk: 0.1 MB" in out and f"--save-dir {tmp_path / 'out'}" in out.splitlines()[-1]
    assert "--seed" not in out and "--dry-run" not in out.splitlines()[-1]  # only what was given
    assert ("3 epochs of 2 steps in rounds of 2, the last of 1" if "clusters" in more else "2 epochs of 2 steps") in out
    assert re.search(r"about \d+ s on cpu, .*: \d+ s to draw, \d+ s to guide, \d+ s to train\n", out)


def test_testing_makes_as_many_passes_as_were_said(call, flags, passes, tmp_path):
    command = (*flags, "--save-dir", tmp_path / "out", "--episodes", 3, "--nTestNovel", 10, "--mix-steps", 2)
    assert call(main, *flags, *TINY, "--source", "none", "--save-dir", tmp_path / "out")[0] == 0
    status, out, err = call(diffusionmix, *command, "--dry-run")
    assert status == 0, err
    assert "15 support images x 5 models x 2 steps\n150 forward passes" in out
    passes.clear()
    assert call(diffusionmix, *command)[0] == 0 and sum(passes) == 150


def test_own_pictures(call, flags, trained, tmp_path, passes):
    data = tmp_path / "data" / "meta_val"
    command = (
        *flags,
        "--resume",
        trained / "best_model.pt",
        "--support",
        data,
        "--query",
        data / "c0",
        "--mix-steps",
        2,
    )
    status, out, err = call(diffusionmix, *command, "--save-dir", tmp_path / "out", "--dry-run")
    assert status == 0 and "60 support images x 5 models x 2 steps\n600 forward passes" in out, err
    assert not (tmp_path / "out").exists()


def test_what_is_left(call, flags, two_models, tmp_path):
    command = (*flags, *TINY, "--recipe", "paper", "--pool", two_models, "--save-dir", tmp_path / "out")
    assert call(main, *command)[0] == 0
    out = call(main, *command, "--dry-run")[1]
    assert "2 of 2 epochs are done; what is left:\n0 rounds x" in out and "\n0 forward passes" in out


def test_nothing_to_draw(call, flags, trained, tmp_path):
    few = (*flags, "--nTestNovel", 10, "--save-dir", tmp_path / "out")
    assert call(main, *few, "--source", "none", "--dry-run")[1].splitlines()[1] == "--source none: nothing is drawn"
    real = (*TINY, "--source", "real", "--save-dir", tmp_path / "out", "--samples-per-class", 12)
    out = call(main, *flags[:4], *real, "--dry-run")[1]
    assert "--source real: nothing is drawn\n2 epochs of 2 steps in rounds of 1\nabout" in out
    command = (*few, "--resume", trained / "best_model.pt", "--mix", "False", "--dry-run")
    assert call(diffusionmix, *command)[1].startswith("--mix False: no mixes\n")


def test_what_the_run_would_refuse(call, flags, tmp_path):
    status, _, err = call(main, *flags, *TINY, "--nTestNovel", 60, "--save-dir", tmp_path / "out", "--dry-run")
    assert status == 2 and "or give --queries 55" in err


@pytest.mark.parametrize("most, passed", [(8, [1, 2, 4, 8, 8]), (3, [1, 2, 3, 3]), (1, [1, 1])])
def test_batches_of_the_trial(toy_pool, passes, monkeypatch, most, passed):
    monkeypatch.setattr(dry_run, "TRIAL", 1e-9)
    monkeypatch.setattr(dry_run, "_trial", lambda work: work() or 0.0)
    assert dry_run._seconds_of_one(Pool(toy_pool).load(0), most, CPU, 100) > 0
    assert passes == passed


@pytest.mark.parametrize("enough, passed", [(20, [1, 2, 4, 8, 8, 8, 8]), (3, [1, 2, 4, 8, 8])])
def test_a_trial_is_no_longer_than_the_work(toy_pool, passes, monkeypatch, enough, passed):
    monkeypatch.setattr(dry_run, "TRIAL", 1e9)
    monkeypatch.setattr(dry_run, "_trial", lambda work: work() or 0.0)
    assert dry_run._seconds_of_one(Pool(toy_pool).load(0), 8, CPU, enough) > 0
    assert passes == passed


def test_short_of_memory(toy_pool, monkeypatch):
    forward, passes = UNetModel.forward, []

    def small_machine(network, x, *rest, **options):
        if len(x) > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        passes.append(len(x))
        return forward(network, x, *rest, **options)

    monkeypatch.setattr(UNetModel, "forward", small_machine)
    monkeypatch.setattr(dry_run, "TRIAL", 1e-9)
    monkeypatch.setattr(dry_run, "_trial", lambda work: work() or 0.0)
    assert dry_run._seconds_of_one(Pool(toy_pool).load(0), 8, CPU, 100) > 0
    assert passes[-1] == 2 and max(passes) == 2
    passes.clear()
    assert dry_run._seconds_of_one(Pool(toy_pool).load(0), 8, torch.device("cuda"), 100) > 0 and passes == [2, 2]
