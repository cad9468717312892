"""Compute accuracies and their 95 % intervals."""

import math
from collections.abc import Sequence

import numpy as np
import torch


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the share of queries whose label has the highest score.

    Args:
        logits: (..., queries, way) scores; the leading axes, if any, are episodes.
        labels: (..., queries) integers from 0 to way - 1.

    Returns:
        (...) float64 accuracies in percent, one per episode.

    Raises:
        ValueError: the shapes do not match.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"got logits {tuple(logits.shape)} and labels {tuple(labels.shape)}; "
            "expected (..., queries, way) and (..., queries): give one label per query"
        )
    return 100.0 * (logits.argmax(-1) == labels).double().mean(-1)


def mean_confidence_interval(values: Sequence[float] | np.ndarray | torch.Tensor) -> tuple[float, float]:
    """Return the mean of `values` and half the width of its 95 % Student-t interval.

    The half-width is t(0.975; n - 1) * s / sqrt(n), with s the sample standard deviation.

    Args:
        values: n >= 2 numbers, such as the accuracies of n episodes.

    Returns:
        (mean, half_width) in the unit of `values`.

    Raises:
        ValueError: fewer than two values, as one value has no spread.
    """
    numbers = _flat(values)
    if len(numbers) < 2:
        raise ValueError(f"got {len(numbers)} value(s), an interval needs at least 2; run more episodes")
    half_width = student_t_quantile(len(numbers) - 1) * numbers.std(ddof=1) / math.sqrt(len(numbers))
    return float(numbers.mean()), float(half_width)


def paired_difference(
    a: Sequence[float] | np.ndarray | torch.Tensor, b: Sequence[float] | np.ndarray | torch.Tensor
) -> tuple[float, float]:
    """Return the mean of a - b over the same episodes, and half the width of its 95 % interval.

    Args:
        a, b: n >= 2 numbers each; a[i] and b[i] are from the same episode.

    Returns:
        (mean, half_width) of a - b, in the unit of the values.

    Raises:
        ValueError: the lengths differ, or there are fewer than two pairs.
    """
    left, right = _flat(a), _flat(b)
    if len(left) != len(right):
        raise ValueError(f"got {len(left)} and {len(right)} values, expected pairs; score both on the same episodes")
    return mean_confidence_interval(left - right)


def over_seeds(
    values: Sequence[Sequence[float]] | np.ndarray, same_episodes: bool = False
) -> tuple[float, float, float | str]:
    """Return the mean over training seeds, with its 95 % intervals over episodes and over seeds.

    The interval over episodes holds for these trained networks only. A claim about a method needs the interval over
    seeds, which also covers the differences between trainings.

    Args:
        values: (seeds, episodes).
        same_episodes: whether all seeds were tested on the same episodes. Then the interval over episodes is that of
            the means over seeds, as an easy episode is easy for all networks; and the interval over seeds is for these
            episodes only.

    Returns:
        (mean, half_width over all episodes, half_width over the seeds' means). The last is "" with one seed; the one
        over episodes is 0 with one episode per seed.
    """
    table = np.asarray(values, dtype=np.float64)
    means = table.mean(1)
    drawn = table.mean(0) if same_episodes else table
    episodes = mean_confidence_interval(drawn)[1] if table.shape[1] > 1 else 0.0
    return float(table.mean()), episodes, mean_confidence_interval(means)[1] if len(means) > 1 else ""


def gap_closed(gained: np.ndarray, gap: np.ndarray, same_episodes: bool = False) -> tuple[float, float, float | str]:
    """Return how much of the gap between two methods a third one closes, in percent, with 95 % intervals.

    The interval over episodes is for a ratio of means: that of (gained - share * gap) / mean gap. The interval over
    seeds is that of the seeds' own shares.

    Args:
        gained: (seeds, episodes), accuracy of the third method minus the lower one's, on the same episodes.
        gap: (seeds, episodes), accuracy of the upper method minus the lower one's; its mean is above 0.
        same_episodes: as for `over_seeds`.

    Returns:
        (share, half_width over episodes, half_width over seeds); the last is "" with one seed.
    """
    share = gained.mean() / gap.mean()
    _, ci95, _ = over_seeds((gained - share * gap) / gap.mean(), same_episodes)
    _, _, seeds_ci95 = over_seeds(gained.mean(1, keepdims=True) / gap.mean(1, keepdims=True))
    return 100 * share, 100 * ci95, "" if seeds_ci95 == "" else 100 * seeds_ci95


def rate_by_class(hits: torch.Tensor, labels: torch.Tensor, num_classes: int) -> list[float | None]:
    """Return the share of `hits` (N,) bool in each class of `labels` (N,) int64; None for a class without items."""
    right = torch.bincount(labels, weights=hits.double(), minlength=num_classes).tolist()
    count = torch.bincount(labels, minlength=num_classes).tolist()
    return [r / n if n else None for r, n in zip(right, count, strict=True)]


def student_t_quantile(df: int, level: float = 0.95) -> float:
    """Return the two-sided Student-t quantile: the t with P(-t < T < t) = level, for `df` >= 1 degrees of freedom.

    Bisects the exact finite series of Abramowitz & Stegun 26.7.3 and 26.7.4 in theta = atan(t / sqrt(df)).
    """
    odd = df % 2
    steps = np.arange(1 + odd, df - 1, 2, dtype=np.float64)
    # 1, 2/3, 2*4/(3*5), ... for odd df; 1, 1/2, 1*3/(2*4), ... for even df; they multiply powers of cos^2
    coefficients = np.cumprod(np.concatenate([np.ones(1), steps / (steps + 1)]))
    powers = np.arange(len(coefficients))

    def probability(theta: float) -> float:
        series = math.sin(theta) * float(coefficients @ math.cos(theta) ** (2.0 * powers))
        if not odd:
            return series
        return 2 / math.pi * (theta + (math.cos(theta) * series if df > 1 else 0.0))

    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        if probability(middle) < level:
            low = middle
        else:
            high = middle
    return math.sqrt(df) * math.tan(low)


def _flat(values: Sequence[float] | np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
    return np.asarray(values, dtype=np.float64).reshape(-1)
