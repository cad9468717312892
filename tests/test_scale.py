"""The estimate for GPUs: what is counted, and what follows from it."""

from functools import cache

import pytest

from benchmarks import scale
from config import parse
from tests.conftest import ROOT


@pytest.fixture
def counted(monkeypatch):
    """Learners of 2 (forward) and 5 (training) operations; returns a network of 7 and 20, with 1,000 weights."""
    monkeypatch.setattr(scale, "learner_flops", lambda *_: (2, 5))
    return scale.Network(forward=7, training=20, weights=1000)


def settings(*flags):
    return parse(["--samples-per-class", "10", "--train-episodes", "64", *flags], description="")


def test_clusters(counted):
    c = scale.cost(settings("--dataset", "un_cifarfs", "--max-epoch", "60"), counted, steps=100, batch=3)
    assert (c.models, c.pretraining) == (13, 13 * 100 * 3 * 20)
    images = 52 * 10  # three rounds of 20 epochs; the last two are drawn unguided, then guided
    assert c.drawing == 5 * images * 25 * 7 and c.guiding == 2 * images * 25 * 4 * 5
    assert c.learning == 60 * 2 * 96 * 5  # 64 episodes in steps of 32
    assert c.testing == (1 + 5) * 5 * 600 * 13 * 7
    assert c.disk == 13 * 4000 + 3 * images * 3 * 64 * 64


def test_paper(counted):
    c = scale.cost(settings("--dataset", "co_cifarfs", "--max-epoch", "20"), counted, steps=100, batch=3)
    images = 64 * 10  # two rounds of 10 epochs, both guided, through one view
    assert c.drawing == 2 * images * 25 * 7 and c.guiding == 2 * images * 25 * 5
    assert c.learning == 20 * 2 * 32 * (5 + 30) * (5 + 2 * 2)


def test_hours():
    c = scale.Cost(models=13, pretraining=13 * 3600e12, drawing=3600e12, guiding=0, learning=3600e12, testing=7200e12,
                   disk=0)  # fmt: skip
    found = scale.hours(c, gpus=8, card="a100", efficiency=1 / 312, learner_efficiency=1 / 156)  # 1 TFLOP/s each
    assert found == pytest.approx((2, 1 / 8 + 1, 2 / 8))  # 13 models on 8 cards: two rounds


@pytest.mark.parametrize("flags", [("--gpus", 0), ("--efficiency", 1.5), ("--card", "v100")])
def test_refused(call, flags):
    status, out, err = call(scale, *flags)
    assert status == 2 and not out and err.count("\n") == 1 and flags[0] in err


@pytest.mark.slow
def test_docs_show_what_it_prints(call, monkeypatch):
    monkeypatch.setattr(scale, "cost", cache(scale.cost))  # the same for any cards
    shown = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8").splitlines()
    for flags in ((), ("--gpus", 8, "--card", "a100")):
        status, out, _ = call(scale, *flags)
        assert status == 0 and {*out.splitlines()} <= {*shown}
