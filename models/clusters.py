"""Balanced clusters of features: first labels for unlabelled images."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SHARPNESS = 2.0  # exponent of p(c | x) before balancing; 1 moves unsure images too far from their likeliest class


def balanced_clusters(
    features: Tensor, count: int, generator: torch.Generator, *, rounds: int = 30, temperature: float = 0.05
) -> Tensor:
    """Assign each row of features (N, D) to one of `count` clusters, whose sizes differ by at most 1: (N,) int64.

    Run spherical k-means on mean-centred features, balanced by Sinkhorn-Knopp (Asano et al. 2020, arXiv 1911.05371).
    Then assign rows as in `share_out`. Of five starts, keep the one with the highest total cosine.
    Raises ValueError for fewer rows than clusters.
    """
    if len(features) < count:
        raise ValueError(f"got {len(features)} images for {count} clusters; draw more --samples-per-class")
    points = F.normalize(features - features.mean(0), dim=1)
    best, best_fit = None, -float("inf")
    for _ in range(5):
        centres = points[_spread_start(points, count, generator)]
        for _ in range(rounds):
            shares = _sinkhorn(points @ centres.T / temperature)
            centres = F.normalize(shares.T @ points, dim=1)
        labels = _evenly(shares)
        fit = float((points * centres[labels]).sum())
        if fit > best_fit:
            best, best_fit = labels, fit
    return best


def cluster_classes(features: Tensor, first: Tensor, counts: Sequence[int], generator: torch.Generator) -> Tensor:
    """Cluster each model's images into its classes. Return the class of each image, (N,) int64.

    features: (N, D); first: (N,) the first class of the model that drew each image; counts: classes per model.
    """
    labels = first.clone()
    for m, count in enumerate(counts):
        own = first == sum(counts[:m])
        labels[own] += balanced_clusters(features[own], count, generator)
    return labels


def share_out(scores: Tensor, first: Tensor, counts: Sequence[int]) -> Tensor:
    """Return each image's likeliest class of its model, with equally many images per class: (N,) int64.

    Balance the probabilities as in `balanced_clusters`, then assign images greedily, the surest first.

    scores: (N, C) log p(c | x); first: (N,) the first class of the model that drew each image; counts: classes per
    model.
    """
    labels = first.clone()
    for m, count in enumerate(counts):
        start = sum(counts[:m])
        own = first == start
        labels[own] += _evenly(_sinkhorn(SHARPNESS * scores[own, start : start + count]))
    return labels


def _evenly(shares: Tensor) -> Tensor:
    """Assign each row of shares (N, K) to a column, largest shares first: (N,) int64.

    Each column gets N / K rows, rounded down or up.
    """
    count, ways = shares.shape
    least, larger = divmod(count, ways)  # `larger` columns get one row more
    labels, sizes = [-1] * count, [0] * ways
    for place in shares.flatten().argsort(descending=True, stable=True).tolist():
        row, column = divmod(place, ways)
        if labels[row] < 0 and sizes[column] < least + (larger > 0):
            larger -= sizes[column] == least
            labels[row], sizes[column] = column, sizes[column] + 1
    return torch.tensor(labels, dtype=torch.int64, device=shares.device)


def _spread_start(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return the indices (count,) of initial centres that are far from one another (k-means++)."""
    chosen = torch.randint(len(points), (1,), generator=generator)
    while len(chosen) < count:
        distance = (1 - points @ points[chosen].T).amin(1).clamp_min(0) + 1e-12
        chosen = torch.cat([chosen, torch.multinomial(distance.cpu(), 1, generator=generator)])
    return chosen


def _sinkhorn(scores: Tensor, iterations: int = 20) -> Tensor:
    """Turn scores (N, K) into soft assignments (N, K) with equal total weight in every column and in every row."""
    log_shares = scores
    for _ in range(iterations):
        log_shares = log_shares - log_shares.logsumexp(0, keepdim=True)
        log_shares = log_shares - log_shares.logsumexp(1, keepdim=True)
    return log_shares.exp()
