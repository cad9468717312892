"""Episodes: disjoint, distinct, uniform, and the same whatever the chunk."""

from dataclasses import astuple

import pytest
import torch

from datasets.episodes import EpisodeSampler
from utils.seeding import generator


def uneven_labels():
    counts = {3: 7, 10: 30, 11: 8, 20: 12, 42: 9, 77: 7}  # any integers, in any order
    labels = torch.cat([torch.full((count,), label) for label, count in counts.items()])
    return labels[torch.randperm(len(labels), generator=generator(0, "shuffle"))]


@pytest.mark.parametrize("indexed", [False, True])
def test_every_episode_is_sound(indexed):
    labels = uneven_labels()
    sampler = EpisodeSampler(labels, way=5, shot=3, query=4)
    episodes = sampler.sample_indexed(0, 200, 0, "x") if indexed else sampler.sample(200, generator(0, "x"))
    assert episodes.support.shape == (200, 15) and episodes.query.shape == (200, 20)
    assert episodes.support_labels.shape == (200, 15) and episodes.query_labels.shape == (200, 20)
    assert all(tensor.dtype == torch.int64 for tensor in (episodes.support, episodes.query, episodes.classes))
    assert torch.equal(labels[episodes.support], episodes.classes.gather(1, episodes.support_labels))
    assert torch.equal(labels[episodes.query], episodes.classes.gather(1, episodes.query_labels))
    for episode in torch.cat([episodes.support, episodes.query], 1):
        assert len(episode.unique()) == 35  # so support and query share no image
    for classes in episodes.classes:
        assert len(classes.unique()) == 5
    assert episodes.support_labels[0].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3


def test_classes_and_images_are_uniform():
    labels = uneven_labels()
    episodes = EpisodeSampler(labels, 2, 1, 1).sample(6000, generator(0, "x"))
    classes, counts = episodes.classes.unique(return_counts=True)
    assert len(classes) == 6
    assert ((counts - 2000).abs() < 5 * (6000 / 3 * 2 / 3) ** 0.5).all()
    of_ten = episodes.support[labels[episodes.support] == 10]
    _, counts = of_ten.unique(return_counts=True)
    expected = len(of_ten) / 30
    assert len(counts) == 30 and ((counts - expected).abs() < 5 * expected**0.5).all()


def test_an_episode_does_not_depend_on_its_chunk():
    sampler = EpisodeSampler(uneven_labels(), 5, 1, 5)
    whole = sampler.sample_indexed(0, 20, 3, "test")
    for a, b in ((0, 7), (7, 8), (8, 20)):
        part = sampler.sample_indexed(a, b - a, 3, "test")
        for left, right in zip(astuple(whole), astuple(part), strict=True):
            assert torch.equal(left[a:b], right)
    assert not torch.equal(whole.support, sampler.sample_indexed(0, 20, 4, "test").support)
    assert not torch.equal(whole.support, sampler.sample_indexed(0, 20, 3, "val").support)


def test_same_generator_same_episodes():
    sampler = EpisodeSampler(uneven_labels(), 5, 1, 5)
    assert torch.equal(sampler.sample(4, generator(1)).query, sampler.sample(4, generator(1)).query)


@pytest.mark.parametrize(
    ("way", "shot", "query", "words"),
    [
        (7, 1, 1, ["6 classes", "needs 7"]),
        (5, 5, 5, ["class 3 has 7 images", "needs 10", "add images"]),
        (5, 0, 5, ["shot 0"]),
    ],
)
def test_too_little(way, shot, query, words):
    with pytest.raises(ValueError) as caught:
        EpisodeSampler(uneven_labels(), way, shot, query)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
