"""The schedule of a run: what each epoch trains on, told without training."""

import pytest

from config import parse
from schedule import phases


def of(text):
    return phases(parse(text.split(), description=""))


def rates(text, steps):
    """The rates of all epochs, of `steps` steps each."""
    return [rate for phase in of(f"{text} --train-batch 1 --train-episodes {steps}") for rate in phase.rates]


def test_rates_of_the_paper():
    found = rates("--recipe paper", 1)
    paper = rates("-d co_miniimagenet", 1)
    assert len(found) == 40 and len(paper) == 90
    assert paper[:60] == [0.1] * 60
    assert paper[60:70] == pytest.approx([0.006] * 10) and paper[70:80] == pytest.approx([0.0012] * 10)
    assert paper[80:] == pytest.approx([0.00024] * 10)
    twelve = rates("-d co_miniimagenet --max-epoch 12", 1)
    assert [twelve[epoch] for epoch in (7, 8, 10, 11)] == pytest.approx([0.1, 0.006, 0.0012, 0.00024])


def test_the_paper_goes_on_learning():
    found = of("-d co_miniimagenet")
    assert [p.round for p in found] == [epoch // 10 for epoch in range(90)]
    assert all(list(p.rounds) == [p.round] and p.guided and not p.fresh for p in found)
    assert {p.labels for p in found} == {"asked"}
    unguided = of("-d co_miniimagenet --source unguided")
    assert {(p.labels, p.guided) for p in unguided} == {("model", False)}


@pytest.mark.parametrize("source", ["guided", "unguided", "by_model"])
def test_networks_of_the_clusters_recipe(source):
    found = of(f"--source {source} --max-epoch 11 --refresh-every 4")
    halves = ["model"] * 4 if source == "by_model" else ["model"] * 2 + ["clusters"] * 2
    later = "model" if source == "by_model" else "likeliest"
    assert [p.labels for p in found] == halves + [later] * 7
    assert [list(p.rounds) for p in found] == [[0]] * 4 + [[0, 1]] * 4 + [[0, 1, 2]] * 3
    new = [4, 8] if source == "by_model" else [2, 4, 8]
    assert [p.epoch for p in found if p.fresh] == new
    again = {"guided": [[0], [0]], "unguided": [[0], [0, 1]], "by_model": [[], []]}[source]
    assert [list(p.relabel) for p in found] == [[]] * 4 + [again[0]] * 4 + [again[1]] * 3
    assert [p.guided for p in found] == [source == "guided" and epoch >= 4 for epoch in range(11)]


@pytest.mark.parametrize("epochs, halves", [(8, (4, 4)), (5, (2, 3)), (20, (10, 10)), (30, (10, 10))])
def test_a_short_first_round_has_two_networks_too(epochs, halves):
    found = of(f"--source unguided --max-epoch {epochs} --refresh-every 20")
    assert [p.labels for p in found][:20] == ["model"] * halves[0] + ["clusters"] * halves[1]
    ends = [p.rates[-1] for p in found]
    assert ends[halves[0] - 1] < 1e-5 and ends[sum(halves) - 1] < 1e-5  # both rates fall to the end


def test_each_network_has_a_cosine_of_its_own():
    found = rates("--max-epoch 6 --refresh-every 4 --lr 0.01", 50)
    first, second, third = found[:100], found[100:200], found[200:]
    assert first == second == third and len(first) == 100
    assert first[0] == pytest.approx(0.01 / 20) and first[9] == pytest.approx(0.5 * 0.01, rel=0.03)  # 20 steps to rise
    assert first[50] == pytest.approx(0.005) and max(first) < 0.01 and first[-1] < 1e-5


def test_real_images_are_learnt_by_one_network():
    found = of("--source real")
    assert len(found) == 40 and {(p.labels, p.guided, p.fresh) for p in found} == {("real", False, False)}
    falling = [rate for p in found for rate in p.rates][20:]
    assert falling == sorted(falling, reverse=True) and falling[-1] < 1e-8  # one cosine
    assert of("--source none") == []


def test_weights_that_the_next_network_would_not_start_from_are_refused():
    with pytest.raises(ValueError, match="--resume.*--start-epoch"):
        of("--resume some.pt")
    assert len(of("--resume some.pt --recipe paper")) == 40 and of("--resume some.pt --source none") == []


def test_a_later_start_has_no_earlier_rounds():
    found = of("--start-epoch 25 --resume some.pt")
    assert [p.epoch for p in found] == list(range(25, 40)) and not any(p.fresh for p in found)
    assert all(list(p.rounds) == [1] for p in found)
