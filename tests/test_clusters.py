"""Balanced clusters."""

import pytest
import torch

from models.clusters import balanced_clusters, share_out
from tests.conftest import slow


def blobs(rng, sizes, spread=0.1, dim=16):
    centres = torch.randn(len(sizes), dim, generator=rng)
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(sizes)])
    return centres[labels] + spread * torch.randn(len(labels), dim, generator=rng), labels


def agreement(found, labels, count):
    """Share of rows whose cluster is mostly of their class."""
    table = torch.zeros(count, count)
    table.index_put_((found, labels), torch.ones(len(labels)), accumulate=True)
    return float(table.amax(1).sum() / len(labels))


@pytest.mark.parametrize("count", [2, 5, 8])
def test_finds_blobs(count):
    rng = torch.Generator().manual_seed(count)
    points, labels = blobs(rng, [20] * count)
    order = torch.randperm(len(points), generator=rng)
    found = balanced_clusters(points[order], count, rng)
    assert found.dtype == torch.int64 and agreement(found, labels[order], count) == 1.0
    assert torch.bincount(found).tolist() == [20] * count


@pytest.mark.parametrize("seed", [0, 1, *map(slow, range(2, 6))])
def test_sizes_are_nearly_equal_without_any_structure(seed):
    rng = torch.Generator().manual_seed(seed)
    sizes = torch.bincount(balanced_clusters(torch.randn(100, 8, generator=rng), 5, rng), minlength=5)
    assert 14 <= int(sizes.min()) and int(sizes.max()) <= 26


def test_sizes_are_nearly_equal_with_unequal_blobs():
    rng = torch.Generator().manual_seed(0)
    points, _ = blobs(rng, [70, 10, 10, 10])
    sizes = torch.bincount(balanced_clusters(points, 4, rng), minlength=4)
    assert 10 <= int(sizes.min())


def test_same_generator_same_clusters():
    points = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    first, second = (balanced_clusters(points, 4, torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(first, second)


def test_edge_cases():
    rng = torch.Generator().manual_seed(0)
    assert balanced_clusters(torch.randn(5, 8, generator=rng), 1, rng).tolist() == [0] * 5
    assert sorted(balanced_clusters(torch.randn(4, 8, generator=rng), 4, rng).tolist()) == [0, 1, 2, 3]
    same = balanced_clusters(torch.ones(6, 8), 3, rng)
    assert same.shape == (6,) and 0 <= int(same.min()) <= int(same.max()) < 3
    with pytest.raises(ValueError, match="got 3 images for 4 clusters"):
        balanced_clusters(torch.randn(3, 8), 4, rng)


def test_share_out_stays_within_the_model_and_is_even():
    scores = torch.randn(50, 7, generator=torch.Generator().manual_seed(3)).log_softmax(1)
    first = torch.tensor([0] * 20 + [4] * 30)  # four classes of the first model, three of the second
    labels = share_out(scores, first, [4, 3])
    assert torch.bincount(labels).tolist() == [5] * 4 + [10] * 3


def test_share_out_gives_each_image_its_likeliest_class_where_that_is_even():
    wanted = torch.cat([torch.tensor([0, 1]).repeat(10), torch.tensor([2, 3]).repeat(10)])
    scores = torch.full((40, 4), -9.0)
    scores[torch.arange(40), wanted] = 0.0
    scores[:, 3] += 5.0  # a class of the second model that all images look like
    first = torch.tensor([0] * 20 + [2] * 20)
    assert torch.equal(share_out(scores, first, [2, 2]), wanted)
