"""Own and purity of the ladder, against numbers worked out by hand."""

import pytest
import torch

from benchmarks.ladder import purity


def test_own_and_purity():
    """Two models of two classes each; base classes 0 and 1 are of the first, 2 and 3 of the second."""
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 3])
    said = torch.tensor([1, 1, 0, 0, 0, 3, 2, 2, 2, 1])  # classes 0 and 1 are swapped: no harm
    own, pure = purity(said, labels, [2, 2], [2, 2])
    assert own == pytest.approx(80)  # one image of each model shows a class of the other
    assert pure == pytest.approx(70)  # 2 + 2 of the first model; 2 of class 2 and 1 of class 3, matched to 1
