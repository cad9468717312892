"""Problems in a run, found by rules, each with a remedy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from report import pictures
from report.folder import DAMAGED, Run, number

_LOW = 0.5  # a hit rate below this is low
_HARDLY = 0.25  # of one class, at most: twice chance counts as low where that is less
_COPY_RATIO, _COPY_SHARE = 0.7, 0.25  # samples nearer to the training images than this are copies
_ALIKE = 0.1  # of the variance over all images: a class with less is one image over and over
_LOOKED_AT = 20  # images per class
_FEW = 10  # images per class in a round: fewer than these teach little


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, and what to do."""

    what: str
    do: str


Rule = Callable[[Run], list[Finding] | None]  # None: the run has nothing to look at


def findings(run: Run) -> dict[str, list[Finding]]:
    """Return what each rule finds, by its name, without the rules that have nothing to look at."""
    outcomes = {}
    for name, rule in RULES.items():
        try:
            outcomes[name] = rule(run)
        except DAMAGED:  # which the part of the page that shows these files says
            outcomes[name] = None
    return {name: found for name, found in outcomes.items() if found is not None}


def guide(run: Run) -> list[Finding] | None:
    """Find what guides at chance: the class-learner, or in the clusters recipe the network of the round before."""
    classes = number(run.settings.get("num_classes"))
    round_ = number(run.settings.get("refresh_every")) or 1
    if run.settings.get("source") != "guided" or not classes or (number(run.last.get("epoch")) or 0) < round_:
        return None  # nothing has been learnt to guide by
    if run.settings.get("recipe") == "clusters":
        newest = run.last.get("round")
        before = [each for each in run.epochs if each.get("round") != newest] or run.epochs
        name, value, where = "network", number(before[-1].get("base_accuracy")), "on the images it was trained on"
    else:
        levels = run.last.get("class_learner_accuracy")
        value = number(levels[0]) if isinstance(levels, list) and levels else None
        name, where = "class-learner", "at the lowest noise"
    if value is None:
        return None
    if value > 200 / classes:
        return []
    return [Finding(
        f"The {name} that guides is at chance: {value:.1f} % {where}, chance is {100 / classes:.1f} %.",
        "Guidance has no effect. Train longer before each round: raise --refresh-every or --train-epoch-size.",
    )]  # fmt: skip


def hit_rate(run: Run) -> list[Finding] | None:
    """Find a low hit rate in the last guided round, and classes that guidance hardly reached."""
    guided = [each for each in run.rounds() if each.hit_rate is not None]
    if not guided:
        return None
    last, found = guided[-1], []
    if last.hit_rate < _LOW:
        found.append(Finding(
            f"The hit rate is low: {100 * last.hit_rate:.0f} % in round {last.number}.",
            "Most labels of this round are wrong. Raise --guidance-scale, or train longer before each round.",
        ))  # fmt: skip
    least = min(2 / max(1, len(last.hit_rates)), _HARDLY)
    known = [(c, rate) for c, rate in enumerate(last.hit_rates) if rate is not None]  # None: a class without images
    if missed := [f"{c} ({100 * rate:.0f} %)" for c, rate in known if rate <= least]:
        found.append(Finding(
            f"Guidance almost never hit {len(missed)} of {len(last.hit_rates)} classes: {', '.join(missed[:10])}"
            f"{' and more' if len(missed) > 10 else ''}.",
            "Check their images below. If they look like other classes, lower --num-classes or raise "
            "--guidance-scale.",
        ))  # fmt: skip
    return found


def validation(run: Run) -> list[Finding] | None:
    """Find accuracy on meta_val that is at chance or at the floor, flat, or falling at the end."""
    seen = [each for each in run.epochs if number(each.get("val_accuracy")) is not None]
    if len(seen) < 2:
        return None
    first, last, best = seen[0], seen[-1], run.best()
    least = min(each["val_accuracy"] for each in seen)
    top, half = best["val_accuracy"], number(best.get("val_ci95")) or 0
    for name, level in levels(run).items():
        if top - half <= level:
            return [Finding(
                f"The best validation accuracy, {top:.1f} %, is not above {name}, {level:.1f} %.",
                "The network learnt nothing useful. Check the images below: if they show nothing, train the pool "
                "longer. Then check the loss: if it does not fall, change --lr.",
            )]  # fmt: skip
    flat = ""
    if best is first:
        end = last["val_accuracy"]
        flat = f"Validation never exceeded epoch {first['epoch']}: {top:.1f} % there, {end:.1f} % at the end."
    elif top - least <= (number(first.get("val_ci95")) or 0):
        flat = f"Validation is flat: {least:.1f} to {top:.1f} %."
    if flat:
        return [Finding(
            flat,
            "If the loss is also flat, more epochs will not help: compare with --source unguided and --source real. "
            "If the loss is still falling, train longer.",
        )]  # fmt: skip
    if run.finished and top - last["val_accuracy"] > max(half, number(last.get("val_ci95")) or 0):
        return [Finding(
            f"Validation fell from {top:.1f} % in epoch {best['epoch']} to {last['val_accuracy']:.1f} % at the end.",
            "The best epoch's weights were kept. To save time, lower --max-epoch. If the images got worse, lower "
            "--guidance-scale.",
        )]  # fmt: skip
    return []


def chosen_epoch(run: Run) -> list[Finding] | None:
    """Find that the weights kept are from before any guided image."""
    guided = {each.number for each in run.rounds() if each.hit_rate is not None}
    best = run.best()
    tried = {number(each.get("round")) for each in run.epochs if number(each.get("val_accuracy")) is not None}
    if best is None or not guided & tried:
        return None
    if (number(best.get("round")) or 0) >= min(guided):
        return []
    return [Finding(
        f"The best epoch, {best['epoch']}, came before any guided round.",
        "best_model.pt was trained without guided images. Try another --guidance-scale, or use --source unguided, "
        "which is faster.",
    )]  # fmt: skip


def copies(run: Run) -> list[Finding] | None:
    """Find pool models whose samples copy their training images."""
    figures, found = run.memorisation(), []
    for name, each in figures.items():
        ratio, near = number(each.get("ratio")), number(each.get("too_near"))
        if copying(each):
            parts = [f"{ratio:.2f} times as far away as unseen images"] if ratio is not None else []
            parts += [f"{100 * near:.0f} % nearer than 95 % of unseen images"] if near is not None else []
            found.append(f"{name} ({', '.join(parts)})")
    if not any(number(each.get("too_near")) is not None for each in figures.values()):
        return None
    if not found:
        return []
    return [Finding(
        f"Pool samples copy training images: {'; '.join(found)}.",
        "They reveal private images and lack variety. Train these models on more images, or for fewer steps.",
    )]  # fmt: skip


def copying(figure: Mapping[str, Any]) -> bool:
    """Whether samples with this figure of memorisation copy training images."""
    ratio, near = number(figure.get("ratio")), number(figure.get("too_near"))
    return (ratio is not None and ratio < _COPY_RATIO) or (near or 0) > _COPY_SHARE


def variety(run: Run) -> list[Finding] | None:
    """Find classes of the newest round whose images are all alike."""
    rounds = run.rounds()
    if not rounds:
        return None
    images, labels = pictures.arrays(rounds[-1])
    inner, means = [], []
    for c in np.unique(labels):
        some = images[np.flatnonzero(labels == c)[:_LOOKED_AT]].astype(np.float32)
        if len(some) > 1:
            inner.append((int(c), float(some.var(0).mean())))
            means.append(some.mean(0))
    if len(inner) < 2:
        return None
    whole = float(np.var(means, 0).mean()) + sum(v for _, v in inner) / len(inner)  # between and within classes
    alike = [str(c) for c, v in inner if v <= _ALIKE * whole]
    if not alike:
        return []
    return [Finding(
        f"In {len(alike)} of {len(inner)} classes the images are all alike: {', '.join(alike[:10])}"
        f"{' and more' if len(alike) > 10 else ''}.",
        "Training needs variety within a class. Lower --guidance-scale, raise --renoise, or train the pool on more "
        "images.",
    )]  # fmt: skip


def number_of_images(run: Run) -> list[Finding] | None:
    """Find rounds of few images per class."""
    each = number(run.settings.get("samples_per_class"))
    if each is None or not run.rounds():
        return None
    if each >= _FEW:
        return []
    return [Finding(
        f"Each round has few images: {each} per class.",
        "This is too few to learn from. Raise --samples-per-class; the small scenarios use 40.",
    )]  # fmt: skip


def mixes(run: Run) -> list[Finding] | None:
    """Find tests in which the mixes made things worse."""
    mixed = [each for each in run.results.values() if each.get("pool_models")]
    pairs = [(number(each.get("paired_difference")), number(each.get("paired_ci95")), each) for each in mixed]
    pairs = [each for each in pairs if each[0] is not None and each[1] is not None]
    if not pairs:
        return None
    return [
        Finding(
            f"Mixes lowered {each.get('shot')}-shot accuracy by {-change:.2f} ± {half:.2f} points.",
            "Test with --mix False, or lower --mix-level so that each mix keeps more of its two images.",
        )
        for change, half, each in pairs
        if change + half < 0
    ]


RULES: dict[str, Rule] = {
    "the guide": guide,
    "the hit rate": hit_rate,
    "validation": validation,
    "the epoch that was kept": chosen_epoch,
    "copies in the pool": copies,
    "the number of images": number_of_images,
    "variety within a class": variety,
    "mixes": mixes,
}


def levels(run: Run) -> dict[str, float]:
    """Return what validation is held against, in percent: chance, and random weights if a run of them is near."""
    found, way = {}, number(run.settings.get("nKnovel"))
    if way:
        found["chance"] = 100 / way
    same = ("nKnovel", "nExemplars", "nTestNovel", "epoch_size", "image_size")
    floor = run.beside("none", same) if run.settings.get("source") != "none" else None
    value = number((floor.best() or {}).get("val_accuracy")) if floor else None
    return found | ({"random weights": value} if value is not None else {})
