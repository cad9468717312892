"""The parts of a run's report. Each is None if the run has nothing for it."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

from config import Settings, flag_of
from report import charts, pictures, verdict
from report.folder import DAMAGED, HERE, SAME_NOISE, Run, is_run, number, scores, total
from report.page import Content, Html, element, joined, section, table
from utils.metrics import paired_difference
from utils.progress import duration

NAME = "report.html"
_SOURCES = {
    "guided": "images guided towards their labels",
    "unguided": "unguided images",
    "by_model": "unguided images, labelled by the model that drew them",
    "real": "real images (the reference)",
    "none": "nothing (random weights)",
}
_HARD = "\N{NO-BREAK SPACE}"
_PLUS_MINUS = f"{_HARD}±{_HARD}"
_MAIN = ("dataset", "source", "recipe", "seed", "backbone", "num_classes", "samples_per_class", "data_root", "pool")
_MODELS = 30  # whose samples are shown


def title(run: Run) -> str:
    """Return what the run is, in a few words."""
    words = [run.settings.get(name) for name in ("source", "dataset", "seed")]
    if all(word is None for word in words):
        return f"Run {run.folder.resolve().name}"
    return f"{words[0]} on {words[1]}, seed {words[2]}"


def heading(run: Run, written: str, comparison: Path | None = None) -> Html:
    """Return title, folder, progress and links. comparison: the page that compares this run with others."""
    done, most = (number(value) or 0 for value in (run.last.get("epoch"), run.settings.get("max_epoch")))
    far = f"epoch {done} of {most}, {'finished' if run.finished else 'not finished yet'}"
    if run.settings.get("source") == "none":
        far = (f"weights of {run.weights}" if run.weights else "random weights") + ", nothing to train"
    elif not (run.folder / "config.json").exists():
        far = "a test"
    damaged = element("p", f"Cannot be read: {', '.join(sorted(set(run.damaged)))}", class_="warn")
    return element(
        "header",
        element("h1", title(run)),
        element("p", str(run.folder.resolve()), class_="path soft"),
        element("p", f"{far}. Page written {written}.", class_="soft"),
        _links(run, comparison),
        damaged if run.damaged else None,
    )


def _links(run: Run, comparison: Path | None) -> Html | None:
    """Return links from training to its tests and back, to the runs beside it, and to the comparison."""
    trained = run.training
    pages = [] if trained is run else [("training", trained.folder / NAME)]
    places = dict.fromkeys(place for place, _ in trained.results if place != HERE)
    pages += [(f"test {place}", trained.folder / place / NAME) for place in places]
    beside = {source: trained.beside(source) for source in _SOURCES if source != trained.settings.get("source")}
    pages += [(f"{source} run", other.folder / NAME) for source, other in beside.items() if other]
    above = [each / NAME for each in [*trained.folder.resolve().parents][:2] if not is_run(each)]
    pages += [("comparison", path) for path in ([comparison] if comparison else above)]
    links = [link(name, path, run.folder) for name, path in pages
             if path == comparison or path.is_file() and path.parent.resolve() != run.folder.resolve()]  # fmt: skip
    return element("nav", *links) if links else None


def link(name: str, path: Path, folder: Path) -> Html:
    """Return a link to the page `path` from a page in `folder`."""
    return element("a", name, href=quote(os.path.relpath(path.resolve(), folder.resolve())))


def result(run: Run) -> Html | None:
    """Return the verdict: what the tests came to, beside chance and the floor, and what is wrong."""
    parts: list[Content] = [_test_result(run, test, each) for test, each in run.results.items()]
    best = run.best()
    if best:
        known = verdict.levels(run)
        against = ", ".join(f"{name} {value:.1f} %" for name, value in known.items())
        text = f"Best on meta_val: {plus_minus(best, 'val_accuracy', 'val_ci95')} %, in epoch {best['epoch']}"
        parts.append(element("p", unbroken(f"{text}; {against}." if against else f"{text}.")))
        if not run.results:
            parts.append(element("p", "Not tested yet: run diffusionmix.py.", class_="soft"))
    outcomes = verdict.findings(run)
    parts.append(wrong([each for found in outcomes.values() for each in found]))
    if fine := [name for name, found in outcomes.items() if not found]:
        parts.append(element("p", f"No problem with {_listed(fine)}.", class_="soft"))
    return section("Verdict", None, *parts) if any(parts) else None


def wrong(found: Sequence[verdict.Finding]) -> Html | None:
    """Return a list of what is wrong, each with what to do about it."""
    items = [element("li", element("b", unbroken(each.what)), " ", unbroken(each.do)) for each in found]
    return element("ul", *items, class_="findings") if items else None


def _test_result(run: Run, test: tuple[str, str], each: Mapping[str, Any]) -> Html | None:
    """Return one test in a sentence and as bars, beside chance, random weights and the real reference."""
    mixed = _mixed(each)
    value, half = (number(each.get(name)) for name in ("accuracy", "ci95"))
    way = number(each.get("way"))
    if value is None:
        return None
    marks = [("chance", 100 / way)] if way else []
    told = []
    rows = [charts.Bar("with mixes" if mixed else "this run", value, half)]
    if mixed and (plain := number(each.get("accuracy_without_mix"))) is not None:
        rows.append(charts.Bar("without mixes", plain, number(each.get("ci95_without_mix"))))
    for source, name in (("none", "random weights"), ("real", "real images")):
        other = run.beside(source) if source != run.training.settings.get("source") else None
        score = other.test_like(each) if other else None
        level = number((score or {}).get("accuracy_without_mix"))
        if level is None:
            continue
        rows.append(charts.Bar(name, level, number(score.get("ci95_without_mix")), 2))
        mine, theirs = scores(each, mixed), scores(score, False)
        known = mine and theirs and len(mine) == len(theirs)
        gain, width = paired_difference(mine, theirs) if known else (value - level, None)
        far = f"{abs(gain):.2f}" + (f"{_PLUS_MINUS}{width:.2f}" if width is not None else "")
        told.append(f"{far} points {'above' if gain >= 0 else 'below'} {name}")
    if mixed:
        change = plus_minus(each, "paired_difference", "paired_ci95", sign=True)
        told.append(f"mixes change accuracy by {change} points")
    text = element("b", f"{value:.2f}", element("small", f"{_PLUS_MINUS}{half:.2f} %") if half is not None else " %")
    name = f"{each.get('way')}-way {each.get('shot')}-shot on {each.get('split')}"
    where = ", ".join(filter(None, (name, *(part for part in test if part != f"{each.get('shot')}-shot"))))
    at_chance = marks and half is not None and value - half <= marks[0][1]
    return element(
        "div",
        element("p", text, element("span", f"{where}, {'with' if mixed else 'without'} mixes"), class_="big"),
        element("p", "; ".join(told).capitalize() + ".", class_="told") if told else None,
        element("p", "Not above chance.", class_="warn") if at_chance else None,
        charts.bars(rows, marks),
        class_="test",
    )


def images(run: Run) -> Html | None:
    """Return the images: guided and unguided of the same noise, and the same classes round by round."""
    rounds = run.rounds()
    if not rounds:
        return None
    parts: list[Content] = []
    other = run.beside("unguided", SAME_NOISE) if rounds[-1].hit_rate is not None else None
    twins = {each.number: each for each in other.rounds()} if other and run.same_noise(other) else {}
    if rounds[-1].number in twins:
        parts += _pairs(rounds[-1], twins[rounds[-1].number])
    parts += _sheet(pictures.shown_rounds(rounds))
    return section("Images", "Each row is a class. Its images should show one thing, with variety.", *parts)


def _pairs(guided, unguided) -> list[Content]:
    told = (
        f"Round {guided.number}: unguided (top) and guided (bottom) images from the same noise. Each row is a "
        "requested class. The unguided images come from the unguided run in a sibling folder."
    )
    rates, rows = guided.hit_rates, []
    for c, both in pictures.pairs(guided, unguided):
        rate = f", hit rate {_percent(rates[c])}" if c < len(rates) else ""
        figures = [
            element(
                "div", image_tag(a, f"class {c}, unguided"), image_tag(b, f"class {c}, guided{rate}"), class_="pair"
            )
            for a, b in both
        ]
        rows.append(element("div", element("span", f"{c}", class_="soft"), *figures, class_="row"))
    return [element("h3", "What guidance changed"), element("p", told, class_="told"),
            element("div", *rows, class_="twins")]  # fmt: skip


def _sheet(rounds: Sequence) -> list[Content]:
    classes, strips = pictures.contact_sheet(rounds)
    rows = []
    for c, row in zip(classes, strips, strict=True):
        cells = []
        for each, picture in zip(rounds, row, strict=True):
            rate = each.hit_rates[c] if c < len(each.hit_rates) else None
            image = image_tag(picture, f"class {c}, round {each.number}") if picture else "–"
            cells.append(element("div", image, _percent(rate) if rate is not None else None, class_="strip"))
        rows.append((c, *cells))
    names = [f"round {each.number}" + (", by clusters" if each.clustered else "") for each in rounds]
    told = f"The first images of {len(classes)} classes, with the hit rate if known."
    return [element("h3", "Round by round"), element("p", told, class_="told"),
            table(("", *names), rows, class_="sheet")]  # fmt: skip


def curves(run: Run) -> Html | None:
    """Return accuracy and loss by epoch, and how well the guide knows the classes."""
    own = charts.levels(run) or charts.training_accuracy(run)
    drawn = [charts.accuracy({"": run}, verdict.levels(run)), charts.losses({"": run}), own]
    if not any(drawn):
        return None
    told = ["Dotted lines mark the start of each round, with new images.",
            "The band is the 95 % interval over validation episodes."]  # fmt: skip
    source, clusters = run.settings.get("source"), run.settings.get("recipe") == "clusters"
    if clusters and source in ("guided", "unguided", "by_model"):
        told.append("Each round trains one network from new weights (the first round two), so the curves restart.")
    if source == "guided" and clusters:
        told.append("There is no class-learner: the network of each round guides the images of the next, so it must "
                    "classify well.")  # fmt: skip
    elif source == "guided":
        told.append("The class-learner guides. It must be accurate at the lowest noise; at the highest noise it cannot "
                    "be.")  # fmt: skip
    return section("Learning", " ".join(told), element("div", *drawn, class_="charts"))


def hit_rates(run: Run) -> Html | None:
    """Return the share of guided images that the guide takes for the class they were asked for."""
    known = [each for each in run.rounds() if each.hit_rate is not None]
    if not known:
        return None
    last = known[-1]
    by_class = any(each.hit_rates for each in known)  # older runs noted only the rate over all classes
    rounds = [(f"round {each.number}", _percent(each.hit_rate), *(_least(each.hit_rates) if by_class else ()))
              for each in known]  # fmt: skip
    head = ("", "overall", *(("classes below 50 %", "lowest: class (rate)") if by_class else ()))
    told = "The share of a round's images that the guiding network assigns to the requested class."
    chart = charts.hit_rates(last.hit_rates, last.hit_rate, last.number) if any(last.hit_rates) else None
    return section("Did guidance hit?", told, table(head, rounds, class_="numbers"),
                   element("div", chart, class_="charts") if chart else None)  # fmt: skip


def pool(run: Run) -> Html | None:
    """Return unguided samples of the pool's models."""
    found = run.pool_samples()
    if not found or run.settings.get("source") in ("real", "none"):  # which draw nothing
        return None
    figures = [
        element("figure", image_tag(pictures.samples(path), f"samples of {name}"), element("figcaption", name))
        for name, path in found[:_MODELS]
    ]
    more = f" Only the first {_MODELS} of {len(found)} are shown." if len(found) > _MODELS else ""
    told = "Unguided samples of each model, drawn at the end of its training. Guidance cannot fix flaws that show here."
    return section("The pool", told + more, element("div", *figures, class_="grids"))


def mixes(run: Run) -> Html | None:
    """Return some diffusion mixes, and the accuracy of each episode with mixes against without."""
    parts: list[Content] = []
    for place, _ in run.results:
        path = run.folder / place / "mixes.npz"
        if path.is_file():
            parts.append(_gallery(place, pictures.mixes(path)))
            break
    drawn = []
    for test, each in run.results.items():
        without, with_ = scores(each, False), scores(each, True)
        if _mixed(each) and without and with_ and len(without) == len(with_):
            change = plus_minus(each, "paired_difference", "paired_ci95", sign=True)
            drawn.append(charts.pairs(f"{_test(test, each)}: {change} with mixes", without, with_))
    if drawn:
        parts.append(element("div", *drawn, class_="charts"))
    if not parts:
        return None
    told = (
        "A mix blends two noised real images, and a pool model denoises the blend. Each dot is an episode; a larger "
        "dot is several. Mixes helped in episodes above the line."
    )
    return section("Mixes", told, *parts)


def _gallery(place: str, models: Sequence[Sequence[tuple]]) -> Html:
    parts: list[Content] = [element("h3", f"Mixes of the first episodes{f' of {place}' if place else ''}")]
    for m, triples in enumerate(models):
        shown_ = [
            element(
                "div", image_tag(a, "first image"), "+", image_tag(b, "second image"), "→", image_tag(mix, "their mix"),
                f"λ{_HARD}{share:.2f}", class_="mix",
            )
            for a, b, mix, share in triples
        ]  # fmt: skip
        parts += [element("p", f"pool model {m + 1}", class_="told"), element("div", *shown_, class_="mixes")]
    told = "λ is the weight of the first image in the blend and in the label."
    return joined([*parts, element("p", told, class_="told")])


def all_results(run: Run) -> Html | None:
    """Return all numbers of the tests in a table."""
    rows = [row for test, each in run.results.items() for row in _result_rows(test, each)]
    if not rows:
        return None
    head = ("test", "way, shot", "split", "with mixes", "without mixes", "difference", "episodes", "pool models",
            "mix steps", "seconds")  # fmt: skip
    told = "Accuracy in percent on real images of unseen classes, with 95 % intervals over episodes."
    return section("Results", told, table(head, rows, class_="numbers"))


def _result_rows(test: tuple[str, str], each: Mapping[str, Any]) -> list[tuple[Content, ...]]:
    """Return a row for a test, and one for each of its domains."""
    mixed, domains = _mixed(each), each.get("domains")
    rows = [(
        " ".join(filter(None, test)) or "this folder", f"{each.get('way')}-way {each.get('shot')}-shot",
        str(each.get("split")), *_figures(each, mixed), str(each.get("episodes")), each.get("pool_models"),
        each.get("mix_steps"), _number(each.get("seconds"), 0),
    )]  # fmt: skip
    for name, part in domains.items() if isinstance(domains, dict) else ():
        if isinstance(part, dict):
            rows.append((f"– {name}", "", "", *_figures(part, mixed), "", "", "", ""))
    return rows


def time_by_phase(run: Run) -> Html | None:
    """Return where the seconds went."""
    phases = [("drawing images", total(run.epochs, "synthesis_seconds")), ("training", total(run.epochs, "seconds"))]
    phases = [each for each in phases if each[1]]
    for test, each in run.results.items():
        name = f"test, {_test(test, each)}"
        phases += [(name, seconds)] if (seconds := number(each.get("seconds"))) else []
    if not phases:
        return None
    most = max(seconds for _, seconds in phases)
    cells = [
        cell
        for name, seconds in phases
        for cell in (
            element("span", name),
            element("i", style=f"width: {100 * seconds / most:.1f}%"),
            element("span", duration(seconds)),
        )
    ]
    told = "Sums of all rounds. Training excludes validation and saving."
    return section("Time", told, element("div", *cells, class_="bars"))


def environment(run: Run) -> Html | None:
    """Return what it ran on, for each start that differs."""
    names = ("command", "started", "commit", "hardware", "processes", "python", "torch", "system")
    rows = [tuple(shown(each.get(name, "")) for name in names) for each in run.starts]
    if not rows:
        return None
    tables = []
    for row in rows:
        facts = dict(zip(names, row, strict=True))
        facts["command"] = element("code", facts["command"])
        items = (
            element("div", element("dt", a), element("dd", b), class_="wide" if a == "command" else None)
            for a, b in facts.items()
        )
        tables.append(element("dl", *items, class_="facts"))
    told = "A start is listed only if it differs from earlier ones. Resuming with the same command adds no entry."
    return section("Environment", told, *tables)


def settings(run: Run) -> Html | None:
    """Return the scenario, and the settings that differ from its preset, in words."""
    if not run.settings:
        return None
    s, changed = run.settings, run.changed()
    rows = [(name, s[name]) for name in _MAIN if s.get(name) not in (None, "")]
    source = f"nothing (weights of {run.weights})" if run.weights else _SOURCES.get(s.get("source"))
    facts = [(name, f"{value}: {source}" if name == "source" and source else value) for name, value in rows]
    parts: list[Content] = [
        element("dl", *(element("div", element("dt", a), element("dd", b)) for a, b in facts), class_="facts")
    ]
    preset = f"the defaults of {s.get('dataset')} with recipe {s.get('recipe')}"
    if changed:
        parts.append(element("h3", f"Changes from {preset}"))
        parts.append(element("ul", *(_difference(name, a, b) for name, (a, b) in changed.items()), class_="differs"))
    elif run.preset:
        parts.append(element("p", f"All settings are {preset}.", class_="soft"))
    else:
        parts.append(element("p", "This folder does not record the defaults.", class_="soft"))
    every = [
        element("div", element("dt", name), element("dd", shown(value), class_="changed" if name in changed else None))
        for name, value in s.items()
    ]
    parts.append(
        element("details", element("summary", f"All {len(s)} settings"), element("dl", *every, class_="columns"))
    )
    return section("Settings", None, *parts)


_FIELDS = {f.name: f for f in fields(Settings)}


def _difference(name: str, here: Any, preset: Any) -> Html:
    """Return one setting in words: what it is, its value, the preset's."""
    known = _FIELDS.get(name)
    flag = element("code", flag_of(known) if known else name)
    what = element("span", f" ({known.metadata['help']})", class_="soft") if known else None
    return element(
        "li", flag, " is ", element("b", shown(here), class_="changed"), f" instead of {shown(preset)}", what
    )


SECTIONS: list[Callable[[Run], Html | None]] = [
    result, images, curves, hit_rates, mixes, pool, all_results, time_by_phase, environment, settings,
]  # fmt: skip


def careful(make: Callable[[Any], Html | None], given: Any) -> Html | None:
    """Return a part of a page, or a line that says that its files are damaged."""
    try:
        return make(given)
    except DAMAGED as error:
        what = make.__name__.replace("_", " ")
        return element("p", f"The part “{what}” cannot be shown: {type(error).__name__}: {error}", class_="warn")


def shown(value: Any) -> str:
    """Return a setting as text."""
    if value is None or value == "":
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def plus_minus(entries: Mapping[str, Any], name: str, half: str, *, sign: bool = False) -> str:
    """Return two entries as a value and the half-width of its interval."""
    value, width = number(entries.get(name)), number(entries.get(half))
    if value is None:
        return "–"
    text = f"{value:+.2f}" if sign else f"{value:.2f}"
    return text if width is None else f"{text}{_PLUS_MINUS}{width:.2f}"


def unbroken(text: str) -> Html:
    """Return a text whose flags and units are not broken across lines."""
    parts = re.split(r"(--[a-z][\w-]*)", text.replace(" %", f"{_HARD}%"))
    return joined(element("code", part) if part.startswith("--") else part for part in parts)


def _listed(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _test(test: tuple[str, str], each: Mapping[str, Any]) -> str:
    name = f"{each.get('shot')}-shot"
    other = " ".join(part for part in test if part not in ("", name))
    return f"{name} ({other})" if other else name


def image_tag(image, alt: str) -> Html:
    """Return an image in the page, with its text on hover."""
    return element("img", src=pictures.data_uri(image), alt=alt, title=alt, width=image.width, height=image.height)


def _mixed(each: Mapping[str, Any]) -> bool:
    return bool(each.get("pool_models"))  # --mix False has none


def _figures(each: Mapping[str, Any], mixed: bool) -> tuple[str, str, str]:
    with_ = plus_minus(each, "accuracy", "ci95") if mixed else "–"
    change = plus_minus(each, "paired_difference", "paired_ci95", sign=True) if mixed else "–"
    return with_, plus_minus(each, "accuracy_without_mix", "ci95_without_mix"), change


def _number(value: Any, digits: int) -> str:
    return "–" if number(value) is None else f"{value:.{digits}f}"


def _percent(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.0f}{_HARD}%"


def _least(rates: Sequence[float | None]) -> tuple[str, str]:
    """Return how many classes are below a half, and the five lowest."""
    known = sorted((rate, c) for c, rate in enumerate(rates) if rate is not None)
    if not known:
        return "not noted", "–"
    low = sum(rate < 0.5 for rate, _ in known)
    return f"{low} of {len(known)}", ", ".join(f"{c} ({_percent(rate)})" for rate, c in known[:5])
