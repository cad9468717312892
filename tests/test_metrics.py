"""Accuracies and intervals against known numbers."""

import numpy as np
import pytest
import torch

from utils.metrics import (
    accuracy,
    gap_closed,
    mean_confidence_interval,
    over_seeds,
    paired_difference,
    student_t_quantile,
)


@pytest.mark.parametrize(
    ("df", "level", "quantile"),
    [
        (1, 0.95, 12.7062), (2, 0.95, 4.30265), (3, 0.95, 3.18245), (4, 0.95, 2.77645), (10, 0.95, 2.22814),
        (30, 0.95, 2.04227), (599, 0.95, 1.96393), (5, 0.99, 4.03214), (100_000, 0.95, 1.95999),
    ],
)  # fmt: skip
def test_student_t_quantile(df, level, quantile):
    assert student_t_quantile(df, level) == pytest.approx(quantile, rel=3e-6)


def test_interval_golden(goldens):
    with np.load(goldens / "meta_models.npz") as arrays:
        result = mean_confidence_interval(arrays["confidence/accuracies"])
        np.testing.assert_allclose(result, arrays["confidence/mean_halfwidth"], rtol=1e-9)


def test_interval_by_hand():
    mean, half_width = mean_confidence_interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half_width == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert mean_confidence_interval(torch.tensor([1.0, 2.0, 3.0])) == (mean, half_width)


def test_one_value_has_no_interval():
    with pytest.raises(ValueError, match="at least 2"):
        mean_confidence_interval([1.0])


def test_paired_difference_drops_what_the_pairs_share():
    rng = np.random.default_rng(0)
    difficulty = 20 * rng.standard_normal(50)
    a, b = difficulty + 1 + 0.1 * rng.standard_normal(50), difficulty
    mean, half_width = paired_difference(a, b)
    assert mean == pytest.approx((a - b).mean())
    assert half_width < 0.05 < mean_confidence_interval(a)[1]
    assert paired_difference(b, a) == pytest.approx((-mean, half_width))
    with pytest.raises(ValueError, match="50 and 49"):
        paired_difference(a, b[1:])


def test_accuracy_is_percent_an_episode():
    logits = torch.eye(4).repeat(2, 1, 1)  # each query i says i
    labels = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 0]])
    assert accuracy(logits, labels).tolist() == [100.0, 75.0]
    assert accuracy(logits[0], labels[1]).item() == 75.0
    with pytest.raises(ValueError, match="labels"):
        accuracy(logits, labels[0])


def test_both_intervals_over_seeds():
    mean, episodes, seeds = over_seeds([[1, 3], [4, 8], [6, 8]])
    assert mean == 5
    assert episodes == pytest.approx(2.968252, abs=1e-5)  # t(5) = 2.570582, s = sqrt(40 / 5), n = 6
    assert seeds == pytest.approx(6.572411, abs=1e-5)  # t(2) = 4.302653, means 2, 6, 7 with s = sqrt(7), n = 3


def test_a_difference_by_seed_and_one_seed():
    mean, _, seeds = over_seeds([[4.4], [3.4], [1.9]])
    assert (mean, seeds) == (pytest.approx(3.2333, abs=1e-4), pytest.approx(3.1258, abs=1e-4))
    assert over_seeds([[1, 3]])[2] == ""


def test_the_same_episodes_are_not_new_ones():
    """Three networks that agree say no more of the episodes than one."""
    one = over_seeds([[1, 3, 5, 3]])[1]
    assert over_seeds([[1, 3, 5, 3]] * 3, same_episodes=True)[1] == pytest.approx(one)
    assert over_seeds([[1, 3, 5, 3]] * 3)[1] < 0.6 * one
    low, high = np.zeros((3, 4)), np.array([[2, 6, 10, 6]] * 3) / 1.0
    same = gap_closed(high / 2 - low, high - low, same_episodes=True)
    assert same[0] == 50 and same[1] == pytest.approx(0, abs=1e-9)
