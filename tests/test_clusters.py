"""Clusters, whose sizes follow the data, and the likeliest class within a model."""

import pytest
import torch
import torch.nn.functional as F

from models import clusters
from models.clusters import cluster_classes, find_clusters, fit_mixture, levelled, likeliest_classes


def blobs(rng, sizes, spread=0.1, dim=16):
    centres = torch.randn(len(sizes), dim, generator=rng)
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(sizes)])
    return centres[labels] + spread * torch.randn(len(labels), dim, generator=rng), labels


def agreement(found, labels, count):
    """Share of rows whose cluster is mostly of their class."""
    table = torch.zeros(count, count)
    table.index_put_((found, labels), torch.ones(len(labels)), accumulate=True)
    return float(table.amax(1).sum() / len(labels))


@pytest.mark.parametrize("sizes", [[20] * 2, [20] * 8, [70, 10, 10, 10], [140, 20, 20, 20], [9, 5, 1]])
def test_finds_blobs(sizes):
    rng = torch.Generator().manual_seed(len(sizes))
    points, labels = blobs(rng, sizes)
    points = points + 5  # far from 0, so that all directions are alike until the mean is taken off
    order = torch.randperm(len(points), generator=rng)
    found = find_clusters(points[order], len(sizes), rng)
    assert found.dtype == torch.int64 and agreement(found, labels[order], len(sizes)) == 1.0
    assert sorted(torch.bincount(found).tolist()) == sorted(sizes)


def test_small_directions_tell_classes_apart_beside_large_ones():
    # The means of four classes span three directions. Two others are larger and say nothing about the class.
    rng = torch.Generator().manual_seed(3)
    points, labels = blobs(rng, [30] * 4, spread=0.5, dim=60)
    features = torch.cat([12 * torch.randn(120, 2, generator=rng), points], 1)
    assert agreement(find_clusters(features, 4, rng), labels, 4) > 0.95
    assert agreement(fit_mixture(F.normalize(features - features.mean(0)), 4, rng), labels, 4) < 0.6


def test_levelled_takes_fourth_roots_and_leaves_noise_out():
    rng = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 20, generator=rng)).Q for n in (60, 30))
    u = torch.linalg.qr(u - u.mean(0)).Q  # centred, as features are
    sizes = torch.tensor([81.0, 16.0, 2.9, 2.8] + [1.0] * 16)
    points = levelled(u * sizes @ v.T + 7, 2)
    torch.testing.assert_close(points.norm(dim=0), torch.tensor([81.0, 16.0, 2.9]) ** 0.25)
    torch.testing.assert_close((u[:, :3].T @ points).abs().diag(), points.norm(dim=0))
    assert levelled(u * sizes @ v.T, 9).shape == (60, 8)  # the means of 9 clusters span 8 directions


def test_the_shares_decide_where_two_clusters_meet():
    # Two blobs on a circle touch: 900 and 100 points. Mirror images make the mean 0.
    rng = torch.Generator().manual_seed(0)
    angle = torch.cat([0.0 + 0.25 * torch.randn(900, generator=rng), 0.8 + 0.25 * torch.randn(100, generator=rng)])
    points = torch.stack([angle.cos(), angle.sin()], 1)
    found = fit_mixture(torch.cat([points, -points]), 4, rng)
    sizes = sorted(torch.bincount(found, minlength=4).tolist())
    assert max(sizes[:2]) < 150 and min(sizes[2:]) > 850


def test_the_first_rounds_keep_the_shares_equal(monkeypatch):
    scores = 3 * torch.randn(30, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([4.0, 0, 0])
    likely = clusters._sinkhorn(scores)
    torch.testing.assert_close(likely.sum(0), torch.full((3,), 10.0), rtol=0, atol=0.1)
    torch.testing.assert_close(likely.sum(1), torch.ones(30))
    seen, real = [], clusters._sinkhorn
    monkeypatch.setattr(clusters, "_sinkhorn", lambda scores: seen.append(scores.shape) or real(scores))
    points = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    fit_mixture(points, 3, torch.Generator(), rounds=4)
    assert seen == [(30, 3)] * 4 * 5  # rounds of each start


def test_same_generator_same_clusters():
    points = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    first, second = (find_clusters(points, 4, torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(first, second)


def test_edge_cases():
    rng = torch.Generator().manual_seed(0)
    assert find_clusters(torch.randn(5, 8, generator=rng), 1, rng).tolist() == [0] * 5
    assert sorted(find_clusters(torch.randn(4, 8, generator=rng), 4, rng).tolist()) == [0, 1, 2, 3]
    for points in (torch.ones(6, 8), torch.zeros(6, 8), torch.full((6, 8), 0.1) + 1e-7):
        same = find_clusters(points, 3, rng)
        assert same.shape == (6,) and 0 <= int(same.min()) <= int(same.max()) < 3
    with pytest.raises(ValueError, match="got 3 images for 4 clusters"):
        find_clusters(torch.randn(3, 8), 4, rng)


def test_a_collapsed_model_of_a_pool():
    rng = torch.Generator().manual_seed(1)
    features = torch.cat([torch.full((40, 8), 0.3), blobs(rng, [16, 12, 6, 6], dim=8)[0]])
    labels = cluster_classes(features, torch.tensor([0] * 40 + [5] * 40), [5, 4], rng)
    sizes = torch.bincount(labels, minlength=9).tolist()
    assert sum(sizes[:5]) == 40 and sorted(sizes[5:]) == [6, 6, 12, 16]


def test_likeliest_classes():
    scores = torch.tensor([[0.1, 0.5, 0.2, 9.0], [9.0, 8.0, -2.0, -1.0], [0.0, 1.0, 3.0, 2.0]])
    assert likeliest_classes(scores, torch.tensor([0, 2, 2]), [2, 2]).tolist() == [1, 3, 2]
