"""Few-shot episodes as indices into a labelled set."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from utils.seeding import uniform


@dataclass(frozen=True)
class Episodes:
    """E episodes of `way` classes, as int64 tensors. Images are ordered by class: all of class 0, then of 1, ...

    Attributes:
        support: (E, way * shot) indices of the support images.
        query: (E, way * query) indices of the query images; none is in `support`.
        support_labels: (E, way * shot) episode labels from 0 to way - 1.
        query_labels: (E, way * query) episode labels.
        classes: (E, way) the base class of each episode label.
    """

    support: torch.Tensor
    query: torch.Tensor
    support_labels: torch.Tensor
    query_labels: torch.Tensor
    classes: torch.Tensor


class EpisodeSampler:
    """Draws episodes uniformly: `way` different classes, then `shot` + `query` different images of each."""

    def __init__(self, labels: torch.Tensor, way: int, shot: int, query: int) -> None:
        """Sort the images by class.

        Args:
            labels: (N,) int64, the base class of each image, any integer.
            way: classes per episode.
            shot: support images per class.
            query: query images per class.

        Raises:
            ValueError: a number is below 1, there are fewer than `way` classes, or a class has too few images.
        """
        for name, number in (("way", way), ("shot", shot), ("query", query)):
            if number < 1:
                raise ValueError(f"got {name} {number}, expected at least 1; ask for 1 or more")
        self.way, self.shot, self.query = way, shot, query
        self.classes, counts = labels.unique(return_counts=True)  # (C,), (C,)
        if len(self.classes) < way:
            raise ValueError(
                f"got {len(self.classes)} classes, a {way}-way episode needs {way}; add classes or lower the way"
            )
        fewest = int(counts.argmin())
        if counts[fewest] < shot + query:
            raise ValueError(
                f"class {int(self.classes[fewest])} has {int(counts[fewest])} images, an episode needs {shot + query} "
                f"per class ({shot} support + {query} query); add images or ask for fewer"
            )
        largest = int(counts.max())
        self._there = torch.arange(largest, device=labels.device) < counts[:, None]  # (C, largest) bool
        self._table = torch.zeros(self._there.shape, dtype=torch.int64, device=labels.device)
        self._table[self._there] = labels.argsort(stable=True)  # row c: the images of class c, then padding

    def sample(self, num_episodes: int, generator: torch.Generator) -> Episodes:
        """Draw `num_episodes` episodes from `generator`."""
        count, largest = self._table.shape
        keys = torch.rand(
            num_episodes, count + self.way * largest, generator=generator, device=generator.device, dtype=torch.float64
        )
        return self._choose(keys)

    def sample_indexed(self, start: int, count: int, seed: int, stream: int | str) -> Episodes:
        """Draw episodes start .. start + count - 1. Each depends on (seed, stream, its index) alone."""
        classes, largest = self._table.shape
        return self._choose(uniform((classes + self.way * largest,), range(start, start + count), seed, stream))

    def _choose(self, keys: torch.Tensor) -> Episodes:
        # Picking the items with the highest uniform keys is a uniform draw without replacement.
        keys = keys.to(self._table.device)  # (E, C + way * largest)
        count, largest = self._table.shape
        rows = keys[:, :count].topk(self.way).indices  # (E, way)
        image_keys = keys[:, count:].unflatten(1, (self.way, largest))
        image_keys = image_keys.masked_fill(~self._there[rows], -1.0)  # (E, way, largest), padding never wins
        columns = image_keys.topk(self.shot + self.query).indices  # (E, way, shot + query)
        images = self._table[rows].gather(2, columns)
        ways = torch.arange(self.way, device=rows.device)
        return Episodes(
            support=images[:, :, : self.shot].flatten(1),
            query=images[:, :, self.shot :].flatten(1),
            support_labels=ways.repeat_interleave(self.shot).repeat(len(rows), 1),
            query_labels=ways.repeat_interleave(self.query).repeat(len(rows), 1),
            classes=self.classes[rows],
        )


def too_few(counts: Mapping[str, int], way: int, shot: int, query: int) -> str:
    """Return why no episode can be drawn, or "" if one can. counts: class -> number of images."""
    short = [name for name, count in counts.items() if count < shot + query]
    fewest = min(counts, key=counts.__getitem__)
    got = [f"{len(counts)} class{'es' * (len(counts) > 1)}"] if len(counts) < way else []
    got += [f"{counts[fewest]} images in class {fewest}"] if short else []
    others = f" ({len(short) - 1} other{'s have' if len(short) > 2 else ' has'} too few)" if len(short) > 1 else ""
    if not got:
        return ""
    return (
        f"got {', '.join(got)}{others}; an episode needs {way} classes of {shot + query} images "
        f"({shot} to learn from, {query} to label)"
    )
