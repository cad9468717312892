"""Own and purity of the ladder, against numbers worked out by hand."""

import pytest
import torch

from benchmarks.ladder import base_classes, purity
from guided_diffusion.pool import Pool


def test_base_classes_are_those_of_the_checkpoints(make_pool, tmp_path):
    pool = Pool(make_pool(tmp_path / "pool", [5, 2, 4], lambda network, m: None))
    assert base_classes(pool, 11, [3, 3, 3]) == [5, 2, 4]
    with pytest.raises(ValueError, match="11 classes.*has 12"):
        base_classes(pool, 12, [4, 4, 4])


def test_own_and_purity():
    """Two models of two classes each; base classes 0 and 1 are of the first, 2 and 3 of the second."""
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 3])
    said = torch.tensor([1, 1, 0, 0, 0, 3, 2, 2, 2, 1])  # classes 0 and 1 are swapped: no harm
    own, pure = purity(said, labels, [2, 2], [2, 2])
    assert own == pytest.approx(80)  # one image of each model shows a class of the other
    assert pure == pytest.approx(70)  # 2 + 2 of the first model; 2 of class 2 and 1 of class 3, matched to 1
