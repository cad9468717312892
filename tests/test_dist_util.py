"""Devices, precision, and batches that fit the memory."""

import pytest
import torch

from guided_diffusion import dist_util
from guided_diffusion import pool as pool_module
from guided_diffusion.dist_util import in_batches, inference_dtype, pick_device
from guided_diffusion.pool import Pool

CPU = torch.device("cpu")


def test_batches_in_order():
    parts = list(in_batches(lambda index: 2 * index, 7, 3))
    assert [index.tolist() for index, _ in parts] == [[0, 1, 2], [3, 4, 5], [6]]
    assert torch.equal(torch.cat([done for _, done in parts]), 2 * torch.arange(7))


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("x"), RuntimeError("CPU: can't allocate memory")])
def test_out_of_memory_halves_the_batch_and_loses_nothing(capsys, error):
    tried = []

    def work(index):
        tried.append(len(index))
        if len(index) > 3:
            raise error
        return index

    parts = list(in_batches(work, 10, 8))
    assert torch.equal(torch.cat([done for _, done in parts]), torch.arange(10))
    assert tried == [8, 4, 2, 2, 2, 2, 2]
    err = capsys.readouterr().err
    assert "batches of 4" in err and "batches of 2" in err


def test_out_of_memory_at_one_image_and_other_errors_end_it():
    def fails(index):
        raise RuntimeError("can't allocate memory" if len(index) else "")

    with pytest.raises(MemoryError, match="out of memory for a single image; use"):
        list(in_batches(fails, 4, 4))

    def broken(index):
        raise RuntimeError("sizes do not match")

    with pytest.raises(RuntimeError, match="sizes"):
        list(in_batches(broken, 4, 4))


@pytest.mark.parametrize("free, each, fits", [(8e9, 1e8, 40), (8e9, 1e6, 250), (1e6, 1e8, 1), (None, 1e8, 250)])
def test_how_many_images_fit(monkeypatch, capsys, free, each, fits):
    monkeypatch.setattr(dist_util, "_free_memory", lambda: free)
    monkeypatch.setattr(dist_util, "_growth", lambda work: work())
    assert dist_util.that_fit(lambda images: images * each, 250, CPU) == fits
    assert (f"memory for {fits} images" in capsys.readouterr().err) == (fits < 250)
    assert dist_util.that_fit(lambda images: 1 / 0, 250, torch.device("cuda")) == 250


def test_growth_is_that_of_the_work():
    if not dist_util._resident("VmHWM"):
        pytest.skip("this system does not tell how much memory a process has")
    size = 200_000_000
    grown = dist_util._growth(lambda: torch.ones(size // 4).sum())
    assert 0.5 * size < grown < 2 * size  # of what is there already less, as in a process that was larger before
    assert dist_util._free_memory() > 0


def test_room_is_tried_once_for_networks_alike(make_pool, tmp_path, monkeypatch):
    tried = []

    def few(trial, most, device):
        tried.append(most)
        return 5

    monkeypatch.setattr(pool_module, "that_fit", few)
    pool = Pool(make_pool(tmp_path / "pool", [4, 3, 4], lambda network, m: None))
    models = [pool.load(m) for m in range(3)]
    assert [pool.room(model, 9, CPU) for model in models] == [5, 5, 5] and tried == [9]
    assert pool.room(models[0], 3, CPU) == 3
    assert pool.room(models[0], 9, CPU, found=2) == 2 and pool.room(models[1], 9, CPU) == 2


def test_types_of_weights(monkeypatch):
    assert inference_dtype("float32", CPU, 128) == torch.float32 and inference_dtype("bf16", CPU, 8) == torch.bfloat16
    for amx, expected in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert inference_dtype("auto", CPU, 128) == expected and inference_dtype("auto", CPU, 16) == torch.float32
    with pytest.raises(ValueError, match="got precision 'half', expected one of auto, float32, bf16"):
        inference_dtype("half", CPU, 128)


def test_no_such_device():
    with pytest.raises(ValueError, match="which this machine lacks"):
        pick_device("cuda:77")
