"""predictions.html: the images that diffusionmix.py labelled, class by class, and those to check by hand."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from report import pictures
from report.page import Html, element, page, section
from report.sections import image_tag
from utils.images import shown
from utils.predictions import PAGE

SHOWN = 10  # images of a kind, at most
PAIRS = 10  # pairs of classes, at most
CLOSE = 0.5  # an image is between two classes if the second is at least so many times as likely as the first


def render(
    paths: Sequence[Path], images: np.ndarray, classes: Sequence[str], probabilities: np.ndarray,
    support: np.ndarray, support_labels: np.ndarray,
) -> Html:  # fmt: skip
    """Return the page.

    Args:
        paths: N files that were labelled.
        images: (N, 3, H, W) uint8, RGB, the images in them.
        classes: C names.
        probabilities: (N, C), each row summing to 1.
        support: (S, 3, H, W) uint8, RGB, the images that the classes were learnt from.
        support_labels: (S,) int64, 0 to C - 1.
    """
    names = [shown(name) for name in classes]
    order = (-probabilities).argsort(1, kind="stable")  # (N, C), the likeliest first

    def tiles(numbers: Iterable[int]) -> Html:
        return element("div", *(tile(i) for i in numbers), class_="tiles")

    def tile(i: int) -> Html:
        told = ", ".join(f"{names[c]} {100 * probabilities[i, c]:.1f} %" for c in order[i, :2])
        image = image_tag(pictures.picture(images[i]), f"{told}: {shown(paths[i])}")
        return element("figure", image, element("figcaption", shown(paths[i].name)))

    def of_class(c: int) -> Html:
        own, learnt = np.flatnonzero(order[:, 0] == c), np.flatnonzero(support_labels == c)
        own = own[(-probabilities[own, c]).argsort(kind="stable")]
        least = own[-(-len(own) // 2) :][::-1]  # of the less sure half, so that no image is shown twice
        examples = [image_tag(pictures.picture(support[i]), f"learnt from: {names[c]}") for i in learnt[:SHOWN]]
        parts = [element("h3", f"Learnt from {_images(len(learnt))}"), element("div", *examples, class_="tiles")]
        if len(own):
            parts += [element("h3", "Most confident"), tiles(own[: min(SHOWN, len(own) - len(least))])]
        if len(least):
            parts += [element("h3", "Least confident"), tiles(least[:SHOWN])]
        return section(names[c], f"{_images(len(own))} got this label.", *parts)

    told = f"{_images(len(paths))}, {len(names)} classes. Hover over an image to see its two likeliest classes."
    heading = element("header", element("h1", "Labels of your images"), element("p", told, class_="soft"))
    return page("Labels of your images", heading, *map(of_class, range(len(names))),
                _confusable(names, order, probabilities, tiles), made_by=PAGE)  # fmt: skip


def _confusable(names: Sequence[str], order: np.ndarray, probabilities: np.ndarray, tiles) -> Html:
    """Return the pairs of classes that most images lie between, each with the closest of these images."""
    rows = np.arange(len(order))
    ratio = probabilities[rows, order[:, 1]] / probabilities[rows, order[:, 0]]
    pairs = defaultdict(list)
    for i in (-ratio).argsort(kind="stable"):
        if ratio[i] >= CLOSE:
            pairs[tuple(sorted(order[i, :2]))].append(i)
    parts = [
        part
        for (a, b), found in sorted(pairs.items(), key=lambda pair: -len(pair[1]))[:PAIRS]
        for part in (element("h3", f"{names[a]} or {names[b]}: {_images(len(found))}"), tiles(found[:SHOWN]))
    ]
    told = (
        "Images whose second class is at least half as likely as the first, by pair of classes, closest first. Check "
        "these."
        if parts
        else "No image has a second class at least half as likely as the first."
    )
    return section("Between two classes", told, *parts)


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"
