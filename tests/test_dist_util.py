"""Devices, precision, and batches that fit the memory."""

import pytest
import torch

from guided_diffusion.dist_util import in_batches, inference_dtype, pick_device

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


def test_types_of_weights():
    assert inference_dtype("float32", CPU) == inference_dtype("auto", CPU) == torch.float32
    assert inference_dtype("bf16", CPU) == torch.bfloat16
    with pytest.raises(ValueError, match="got precision 'half', expected one of auto, float32, bf16"):
        inference_dtype("half", CPU)


def test_no_such_device():
    with pytest.raises(ValueError, match="which this machine lacks"):
        pick_device("cuda:77")
