"""The report of a pool: a row per model with its loss, its samples, and whether it copies its training images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from report import pictures, verdict
from report.charts import Chart, points_of
from report.folder import number
from report.page import Html, element, page, section, table
from report.sections import careful, image_tag, unbroken, wrong
from report.verdict import Finding
from utils.run_log import read_json, read_metrics

FEW_STEPS = 1000  # fewer leave most images without a class (docs/decisions.md)
FEW_IMAGES = 20  # per class; classes of fewer spare none to tell copies by
FAR = 1.25  # samples that lie so many times as far from the training images as unseen ones need more training
_CLASSES = 12  # that are named, at most
_POINTS = 100  # of a curve, at most


def is_pool(folder: Path) -> bool:
    """Whether image_train.py made this folder, or it holds models as in its pools."""
    return (folder / "pool.json").is_file() or any(folder.glob("subset*/ckpt/model.pt"))


def render(folder: Path, written: str) -> Html:
    """Return the page. Read with care: the pool may be unfinished, and its files may come from anyone."""
    index = read_json(folder / "pool.json", dict) or {}
    models, figures = index.get("models"), index.get("memorisation")
    models = models if isinstance(models, list) else [{} for _ in folder.glob("subset*/ckpt/model.pt")]
    figures = figures if isinstance(figures, dict) else {}
    rows = []
    for m, model in enumerate(models, 1):
        name, place = f"subset{m}", folder / f"subset{m}" / "ckpt"
        copies = unbroken(memorisation(figures.get(name)))
        lines = read_metrics(place / "metrics.jsonl", by="step")
        drawn = (careful(loss, lines) or "–", careful(samples, place) or "–")
        rows.append((name, _classes(model), _steps(place, lines, index), copies, *drawn))
    size = number(index.get("image_size"))
    heading = element(
        "header",
        element("h1", f"Pool {folder.resolve().name}"),
        element("p", str(folder.resolve()), class_="path soft"),
        element("p", f"{len(rows)} models{f', {size} pixels' if size else ''}. Page written {written}.",
                class_="soft"),
    )  # fmt: skip
    found = wrong(findings(models, figures, number(index.get("steps"))))
    verdict_ = section("Verdict", None, found) if found else None
    told = (
        "Samples should show the classes, with variety. If they are blurred or far from the training images, train "
        "longer (--steps). If they copy, train on more images, or for fewer steps."
    )
    head = ("model", "classes", "steps", "does it copy?", "loss", "samples")
    models_ = section("Models", unbroken(told), table(head, rows, class_="pool"))
    return page(f"Pool {folder.resolve().name}", heading, verdict_, models_)


def findings(models: Sequence[Any], figures: Mapping[str, Any], steps: int | float | None) -> list[Finding]:
    """Find too few steps, and models trained on too few images per class."""
    found, few = [], []
    if steps is not None and steps < FEW_STEPS:
        found.append(Finding(
            f"Few training steps: {steps:,}.",
            "Later stages cannot fix poor pool images. Train further: run the same command with higher --steps.",
        ))  # fmt: skip
    for m, model in enumerate(models, 1):
        figure, classes = figures.get(f"subset{m}"), model.get("classes") if isinstance(model, dict) else None
        images = number(figure.get("images")) if isinstance(figure, dict) else None
        if images is not None and isinstance(classes, list) and images < FEW_IMAGES * len(classes):
            few.append(f"subset{m} ({images} of {len(classes)} classes)")
    if few:
        found.append(Finding(
            f"Few training images: {', '.join(few[:_CLASSES])}{' and more' if len(few) > _CLASSES else ''}.",
            f"With fewer than {FEW_IMAGES} images per class a model learns little beyond those images. Add images.",
        ))  # fmt: skip
    return found


def memorisation(figure: Any) -> str:
    """Return in words what the training noted about copying."""
    if not isinstance(figure, Mapping) or not figure:
        return "not measured yet"
    ratio, near = (number(figure.get(name)) for name in ("ratio", "too_near"))
    if near is None:
        return f"not known: needs classes of {FEW_IMAGES} images or more, or --held_out_dir"
    far = "" if ratio is None else f"samples lie {ratio:.2f} times as far from the training images as unseen images do"
    if verdict.copying(figure):
        share = f"{100 * near:.0f} % of the samples are nearer than 95 % of the unseen images"
        return "copies: " + "; ".join(filter(None, (far, share)))
    if ratio is not None and ratio > FAR:
        far = f"undertrained: {far}"
    return "; ".join(filter(None, ("no sign of copying", far)))


def loss(lines: Sequence[Mapping[str, Any]]) -> Html | None:
    """Return the curve of the training loss, thinned out to means. lines: of metrics.jsonl."""
    points = points_of(lines, "loss", by="step")
    if not points:
        return None
    parts = np.array_split(np.array(points, float), min(_POINTS, len(points)))
    chart = Chart("training loss", "step")
    chart.line("", [(float(part[-1, 0]), float(part[:, 1].mean())) for part in parts], 0)
    return chart.svg()


def samples(place: Path) -> Html | None:
    """Return the sheet of samples."""
    path = place / "samples.png"
    return image_tag(pictures.samples(path), f"samples of {place.parent.name}") if path.is_file() else None


def _classes(model: Any) -> str:
    names = model.get("classes") if isinstance(model, dict) else None
    names = [str(name) for name in names] if isinstance(names, list) else []
    more = f" and {len(names) - _CLASSES} more" if len(names) > _CLASSES else ""
    return ", ".join(names[:_CLASSES]) + more or "–"


def _steps(place: Path, lines: Sequence[Mapping[str, Any]], index: Mapping[str, Any]) -> str:
    wanted = number(index.get("steps"))
    whole = f"{wanted:,}" if wanted else "–"
    if lines and lines[-1]["step"] != wanted:
        return f"{lines[-1]['step']:,} of {whole}"
    return whole if (place / "model.pt").exists() else "not trained yet"
