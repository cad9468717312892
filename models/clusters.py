"""Labels within each model: clusters of features, then the class that a network finds likeliest."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 1e-3  # least share of a cluster, so that its logarithm is finite


def find_clusters(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Assign each row of features (N, D) to one of `count` clusters: (N,) int64. A cluster may stay empty.

    Level the features, scale each row to length 1, and fit a mixture to the rows.
    Raises ValueError for fewer rows than clusters.
    """
    if len(features) < count:
        raise ValueError(f"got {len(features)} images for {count} clusters; draw more --samples-per-class")
    return fit_mixture(F.normalize(levelled(features, count), dim=1), count, generator)


def levelled(features: Tensor, count: int) -> Tensor:
    """Return the principal components of features (N, D) with their sizes made more alike: (N, K), K <= min(N, D).

    A few large components would hide the small ones, which tell similar classes apart. So return u s^(1/4), where
    u s v^T is the singular value decomposition of the centred features. Leave out noise: singular values up to 2.858
    times the median of those above 0 (Gavish and Donoho 2014, arXiv 1305.5870). Always keep the first count - 1
    components: as many as the means of `count` clusters span.
    """
    u, s, _ = torch.linalg.svd(features - features.mean(0), full_matrices=False)
    present = s[s > 1e-3 * s[0]]  # rounding leaves others a little above 0
    kept = s > 2.858 * (present.median() if len(present) else 0.0)
    kept[: max(1, count - 1)] = True
    return u[:, kept] * s[kept] ** 0.25


def fit_mixture(
    points: Tensor, count: int, generator: torch.Generator, *, rounds: int = 40, temperature: float = 0.1
) -> Tensor:
    """Return the likeliest component of each unit vector in points (N, D): (N,) int64, each below `count`.

    Fit a mixture of von Mises-Fisher distributions by EM (Banerjee et al. 2005, JMLR 6). All components have the
    concentration 1 / temperature. Each has its own share, as a model's classes differ in size. The first rounds keep
    the shares equal by Sinkhorn-Knopp (Asano et al. 2020, arXiv 1911.05371), so that fewer clusters cover two classes.
    Of five starts, keep the one with the highest likelihood.
    """
    best, best_fit = None, -float("inf")
    for _ in range(5):
        centres, shares = points[_spread_start(points, count, generator)], points.new_full((count,), 1 / count)
        for _ in range(rounds):
            centres = F.normalize(_sinkhorn(points @ centres.T / temperature).T @ points, dim=1)
        for _ in range(rounds):
            scores = points @ centres.T / temperature + shares.log()
            likely = scores.softmax(1)
            shares = likely.mean(0).clamp_min(SMALLEST)
            centres = F.normalize(likely.T @ points, dim=1)
        fit = float(scores.logsumexp(1).sum())
        if fit > best_fit:
            best, best_fit = scores.argmax(1), fit
    return best


def cluster_classes(features: Tensor, first: Tensor, counts: Sequence[int], generator: torch.Generator) -> Tensor:
    """Cluster each model's images into its classes. Return the class of each image, (N,) int64.

    features: (N, D); first: (N,) the first class of the model that drew each image; counts: classes per model.
    """
    labels = first.clone()
    for m, count in enumerate(counts):
        own = first == sum(counts[:m])
        labels[own] += find_clusters(features[own], count, generator)
    return labels


def likeliest_classes(scores: Tensor, first: Tensor, counts: Sequence[int]) -> Tensor:
    """Return each image's likeliest class of its model, (N,) int64. Some classes may get no image.

    scores: (N, C) log p(c | x); first: (N,) the first class of the model that drew each image; counts: classes per
    model.
    """
    labels = first.clone()
    for m, count in enumerate(counts):
        start = sum(counts[:m])
        own = first == start
        labels[own] += scores[own, start : start + count].argmax(1)
    return labels


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
