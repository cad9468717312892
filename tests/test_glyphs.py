"""The drawn image set."""

import hashlib
import time

import numpy as np
import pytest
import torch

from datasets.glyphs import SPLIT_CLASSES, make_split, stroke_programs


@pytest.fixture(scope="module")
def splits():
    return {split: make_split(split, 4) for split in SPLIT_CLASSES}


def test_counts_shapes_and_names(splits):
    assert {split: len(data.class_names) for split, data in splits.items()} == {
        "meta_train": 40, "meta_val": 10, "meta_test": 20,
    }  # fmt: skip
    for data in splits.values():
        classes = len(data.class_names)
        assert data.images.shape == (4 * classes, 3, 32, 32) and data.images.dtype == torch.uint8
        assert torch.equal(data.labels, torch.arange(classes).repeat_interleave(4)) and data.labels.dtype == torch.int64
    names = [name for data in splits.values() for name in data.class_names]
    assert len(set(names)) == 70 and names == sorted(names)


def test_same_seed_same_pixels(splits):
    again = make_split("meta_val", 4)
    assert torch.equal(again.images, splits["meta_val"].images)
    assert not torch.equal(make_split("meta_val", 4, seed=1).images, again.images)


def test_image_i_does_not_depend_on_per_class(splits):
    more = make_split("meta_val", 7).images.unflatten(0, (10, 7))
    assert torch.equal(more[:, :4], splits["meta_val"].images.unflatten(0, (10, 4)))


def test_programs_are_all_different():
    programs = stroke_programs()
    assert len(programs) == 70 and all(2 <= len(p) <= 4 and p.shape[1:] == (4, 2) for p in programs)
    assert len({p.tobytes() for p in programs}) == 70  # so no class is in two splits
    assert max(float(np.abs(p).max()) for p in programs) <= 1.0001
    assert all(np.array_equal(p, q) for p, q in zip(programs, stroke_programs(), strict=True))


def test_images_vary_and_have_ink(splits):
    images = splits["meta_test"].images.float()
    assert float(images.std((1, 2, 3)).min()) > 10
    assert len({image.numpy().tobytes() for image in splits["meta_test"].images}) == 80
    assert make_split("meta_val", 1, size=64).images.shape == (10, 3, 64, 64)


def test_refused():
    with pytest.raises(ValueError, match="meta_train, meta_val, meta_test"):
        make_split("train", 3)
    with pytest.raises(ValueError, match="1 or more"):
        make_split("meta_val", 0)


def test_fast_enough():
    make_split("meta_val", 2)
    started = time.process_time()  # of this process: the machine may be busy
    make_split("meta_val", 60)
    assert 600 / (time.process_time() - started) > 300


@pytest.mark.parametrize("threads", [1, 2])
def test_every_machine_draws_the_same_pixels(threads):
    """SSE, AVX2 and AVX-512 arithmetic gave this digest; so did another order of operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        images = make_split("meta_val", 4).images
    finally:
        torch.set_num_threads(before)
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16] == "0c6484eea6a4a9e5"
