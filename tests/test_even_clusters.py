"""Clusters and shares are even: no class is larger than another by more than one image."""

import pytest
import torch

from models.clusters import balanced_clusters, cluster_classes, share_out
from tests.test_clusters import agreement, blobs


def spread(labels, count):
    sizes = torch.bincount(labels, minlength=count)
    assert len(sizes) == count and int(sizes.sum()) == len(labels)
    return int(sizes.max() - sizes.min())


@pytest.mark.parametrize("sizes", [[70, 10, 10, 10], [97, 1, 1, 1], [140, 20, 20, 20], [23, 4, 4, 4]])
def test_unequal_blobs(sizes):
    rng = torch.Generator().manual_seed(0)
    points, _ = blobs(rng, sizes)
    assert spread(balanced_clusters(points, 4, rng), 4) == (1 if sum(sizes) % 4 else 0)


@pytest.mark.parametrize("count", [2, 3, 4, 7])
@pytest.mark.parametrize("rows", [7, 10, 40])
def test_any_number_of_rows(rows, count):
    rng = torch.Generator().manual_seed(rows)
    for points in (torch.randn(rows, 8, generator=rng), torch.ones(rows, 8), torch.zeros(rows, 8),
                   torch.eye(8)[:2].repeat(rows, 1)[:rows], torch.full((rows, 8), 0.1) + 1e-7):  # fmt: skip
        assert spread(balanced_clusters(points, count, rng, rounds=5), count) == (1 if rows % count else 0)


def test_a_collapsed_model_of_a_pool():
    rng = torch.Generator().manual_seed(1)
    features = torch.cat([torch.full((40, 8), 0.3), torch.randn(40, 8, generator=rng)])
    labels = cluster_classes(features, torch.tensor([0] * 40 + [5] * 40), [5, 4], rng)
    assert torch.bincount(labels).tolist() == [8] * 5 + [10] * 4


def test_what_is_alike_stays_together_where_it_can():
    rng = torch.Generator().manual_seed(2)
    points, labels = blobs(rng, [12, 10, 10, 8])
    found = balanced_clusters(points, 4, rng)
    assert spread(found, 4) == 0 and round(40 * agreement(found, labels, 4)) == 38  # two must move, no more


@pytest.mark.parametrize("rows, count", [(5, 4), (10, 4), (11, 4), (13, 5)])
def test_share_out_of_numbers_that_do_not_divide(rows, count):
    scores = torch.randn(rows, count, generator=torch.Generator().manual_seed(3)).log_softmax(1)
    assert spread(share_out(scores, torch.zeros(rows, dtype=torch.int64), [count]), count) == 1
