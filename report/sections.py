"""The parts of a run's report. Each is None where the run has nothing for it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from report import charts, pictures
from report.folder import HERE, Run, number, total
from report.page import Content, Html, element, joined, section, table

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


def title(run: Run) -> str:
    """What the run is, in a few words."""
    words = [run.settings.get(name) for name in ("source", "dataset", "seed")]
    if all(word is None for word in words):
        return f"Run {run.folder.resolve().name}"
    return f"{words[0]} on {words[1]}, seed {words[2]}"


def heading(run: Run, written: str) -> Html:
    """Title, folder, how far it is."""
    done, most = (number(value) or 0 for value in (run.last.get("epoch"), run.settings.get("max_epoch")))
    far = f"epoch {done} of {most}, {'finished' if done >= most else 'not finished yet'}"
    if run.settings.get("source") == "none":
        far = "random weights, nothing to train"
    elif not (run.folder / "config.json").exists():
        far = "a test"
    damaged = element("p", f"Cannot be read: {', '.join(sorted(set(run.damaged)))}", class_="warn")
    return element(
        "header",
        element("h1", title(run)),
        element("p", str(run.folder.resolve()), class_="path soft"),
        element("p", f"{far}. This page was written {written}.", class_="soft"),
        damaged if run.damaged else None,
    )


def tiles(run: Run) -> Html | None:
    """The few numbers that one looks for first."""
    found = []
    if best := run.best():
        found.append((plus_minus(best, "val_accuracy", "val_ci95"), f"% best on meta_val, in epoch {best['epoch']}"))
    for result in run.results.values():
        mixed, what = _mixed(result), f"% {result.get('shot')}-shot on {result.get('split')}"
        without = f"; {_accuracy(result, False)} without" if mixed else ""
        found.append((_accuracy(result, mixed), f"{what}, {'with' if mixed else 'without'} mixes{without}"))
    for each in run.rounds()[-1:]:
        if (rate := number(each.manifest.get("hit_rate"))) is not None:
            found.append((f"{100 * rate:.1f}", f"% guided hit rate, in round {each.number}"))
    boxes = []
    for value, what in found:
        middle, sign, half = value.partition(_PLUS_MINUS)
        first = element("b", middle, element("small", sign, half) if half else None)
        boxes.append(element("div", first, element("span", what), class_="tile"))
    return element("div", *boxes, class_="tiles") if boxes else None


def what_was_run(run: Run) -> Html | None:
    """Scenario and settings, those that are not the preset's marked."""
    if not run.settings:
        return None
    s, changed = run.settings, run.changed()
    rows = [(name, s[name]) for name in _MAIN if s.get(name) not in (None, "")]
    facts = [(name, f"{value}: {_SOURCES[value]}" if name == "source" and value in _SOURCES else value)
             for name, value in rows]  # fmt: skip
    parts: list[Content] = [
        element("dl", *(element("div", element("dt", a), element("dd", b)) for a, b in facts), class_="facts")
    ]
    if changed:
        parts += [
            element("h3", f"Given in place of the preset of {s.get('dataset')} with the recipe {s.get('recipe')}"),
            table(
                ("setting", "here", "preset"),
                [(name, element("span", shown(a), class_="changed"), shown(b)) for name, (a, b) in changed.items()],
                class_="pairs",
            ),
        ]
    elif run.preset:
        parts.append(element("p", "Every setting is that of the preset.", class_="soft"))
    else:
        parts.append(element("p", "What the preset was is not noted in this folder.", class_="soft"))
    every = [
        element("div", element("dt", name), element("dd", shown(value), class_="changed" if name in changed else None))
        for name, value in s.items()
    ]
    parts.append(
        element("details", element("summary", f"All {len(s)} settings"), element("dl", *every, class_="columns"))
    )
    return section("What was run", "The scenario, and what was asked for other than its preset.", *parts)


def results(run: Run) -> Html | None:
    """The tests of this run in a table."""
    rows = []
    for place, result in run.results.items():
        rows += result_rows(place, result)
    if not rows:
        return None
    told = "Accuracy in percent on real images of unseen classes, with 95 % intervals over episodes."
    return section("Results", told, table(RESULT_HEAD, rows, class_="numbers"))


RESULT_HEAD = ("test", "way, shot", "split", "with mixes", "without mixes", "difference", "episodes", "pool models",
               "mix steps", "seconds")  # fmt: skip


def result_rows(place: str, result: Mapping[str, Any]) -> list[tuple[Content, ...]]:
    """A row of RESULT_HEAD for a test, and one for each of its domains."""
    mixed = _mixed(result)
    end = (result.get("pool_models"), result.get("mix_steps"), _number(result.get("seconds"), 0))
    first = (
        "this folder" if place == HERE else place,
        f"{result.get('way')}-way {result.get('shot')}-shot",
        str(result.get("split")),
        *_figures(result, mixed),
        str(result.get("episodes")),
        *end,
    )
    domains = result.get("domains")
    rows = [first]
    for name, part in domains.items() if isinstance(domains, dict) else ():
        if isinstance(part, dict):
            rows.append((f"– {name}", "", "", *_figures(part, mixed), "", "", "", ""))
    return rows


def curves(run: Run) -> Html | None:
    """Accuracy and loss by epoch, and the class-learner by noise level."""
    drawn = [chart for chart in (charts.accuracy({"": run}), charts.losses({"": run}), charts.levels(run)) if chart]
    if not drawn:
        return None
    told = (
        "Dotted lines are rounds: from there on the images are new. The band is the 95 % interval over the episodes of "
        "a validation. The class-learner can know little where there is most noise; it steers well when it knows much "
        "where there is least."
    )
    if run.settings.get("recipe") == "clusters" and run.settings.get("source") in ("guided", "unguided", "by_model"):
        told += " Each round trains a network from new weights (the first round two), so its curves start anew there."
    return section("Learning", told, element("div", *drawn, class_="charts"))


def hit_rates(run: Run) -> Html | None:
    """The share of guided images that the class-learner takes for what they were asked for."""
    known = [each for each in run.rounds() if number(each.manifest.get("hit_rate")) is not None]
    if not known:
        return None
    points = [(each.number, number(each.manifest.get("hit_rate")), _by_class(each)) for each in known]
    detailed = any(rates for *_, rates in points)  # older runs noted the rate over all classes alone
    rounds = [(f"round {n}", _percent(rate), *(_least(rates) if detailed else ())) for n, rate, rates in points]
    head = ("", "over all", *(("classes below 50 %", "lowest: class (rate)") if detailed else ()))
    told = "The share of a round's images to which the network that guided them gives the class asked for."
    chart = element("div", charts.hit_rates(points), class_="charts") if detailed else None
    return section("Did guidance hit?", told, table(head, rounds, class_="numbers"), chart)


def contact_sheets(run: Run) -> Html | None:
    """The same classes, round by round."""
    rounds = pictures.shown_rounds(run.rounds())
    if not rounds:
        return None
    classes, strips = pictures.contact_sheet(rounds)
    rates = [_by_class(each) for each in rounds]
    rows = []
    for c, row in zip(classes, strips, strict=True):
        cells = []
        for each, picture, known in zip(rounds, row, rates, strict=True):
            rate = known[c] if c < len(known) else None
            image = _image(picture, f"class {c}, round {each.number}") if picture else "–"
            cells.append(element("div", image, _percent(rate) if rate is not None else None, class_="strip"))
        rows.append((c, *cells))
    names = [f"round {each.number}" + (", by clusters" if each.clustered else "") for each in rounds]
    told = (
        f"The first images of {len(classes)} classes, a row a class, with the hit rate where it is known. From left "
        "to right a class should become one thing, and stay another than its neighbours."
    )
    return section("The images of each round", told, table(("", *names), rows, class_="sheet"))


def pool(run: Run) -> Html | None:
    """What the pool's models draw by themselves."""
    found = run.pool_samples()
    if not found:
        return None
    figures = [
        element("figure", _image(pictures.samples(path), f"samples of {name}"), element("figcaption", name))
        for name, path in found[:_MODELS]
    ]
    more = f" Shown are the first {_MODELS} of {len(found)}." if len(found) > _MODELS else ""
    told = "Unguided samples of each model, from the end of its training: what is wrong in these, guidance cannot mend."
    return section("The pool", told + more, element("div", *figures, class_="grids"))


_MODELS = 30  # whose samples are shown


def mixes(run: Run) -> Html | None:
    """Some diffusion mixes of the first test that kept them, and each test's accuracy with mixes against without."""
    parts: list[Content] = []
    for place in run.results:
        path = run.folder / place / "mixes.npz"
        if path.is_file():
            parts.append(_gallery(place, pictures.mixes(path)))
            break
    drawn = []
    for place, result in run.results.items():
        by_episode = [result.get("by_episode_without_mix"), result.get("by_episode")]
        if _mixed(result) and all(isinstance(values, list) for values in by_episode):
            both = [pair for pair in zip(*by_episode, strict=False) if None not in map(number, pair)]
            change = plus_minus(result, "paired_difference", "paired_ci95", sign=True)
            name = f"{_test(place, result)}: {change} with mixes"
            drawn += [charts.pairs(name, *zip(*both, strict=True))] if both else []
    if drawn:
        parts.append(element("div", *drawn, class_="charts"))
    if not parts:
        return None
    told = (
        "A mix blends two real images under noise and has a pool model denoise the blend. Each point of a chart is an "
        "episode, a larger one several: above the line the mixes helped."
    )
    return section("Mixes", told, *parts)


def _gallery(place: str, models: Sequence[Sequence[tuple]]) -> Html:
    parts: list[Content] = [element("h3", f"Mixes of the first episodes{f' of {place}' if place else ''}")]
    for m, triples in enumerate(models):
        shown_ = [
            element(
                "div", _image(a, "first image"), "+", _image(b, "second image"), "→", _image(mix, "their mix"),
                f"λ{_HARD}{share:.2f}", class_="mix",
            )
            for a, b, mix, share in triples
        ]  # fmt: skip
        parts += [element("p", f"pool model {m + 1}", class_="told"), element("div", *shown_, class_="mixes")]
    told = "λ is the share of the first image, in the blend and in the label."
    return joined([*parts, element("p", told, class_="told")])


def time_by_phase(run: Run) -> Html | None:
    """Where the seconds went."""
    phases = [("drawing images", total(run.epochs, "synthesis_seconds")), ("training", total(run.epochs, "seconds"))]
    phases = [each for each in phases if each[1]]
    for place, result in run.results.items():
        name = f"test, {_test(place, result)}"
        phases += [(name, seconds)] if (seconds := number(result.get("seconds"))) else []
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
    told = "Drawing images is that of all rounds; training is of both learners, without validation and saving."
    return section("Time", told, element("div", *cells, class_="bars"))


def environment(run: Run) -> Html | None:
    """What it ran on, of each start that differs."""
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
    told = "A start is noted when it differs from those before it; one that goes on after a stop is not."
    return section("Environment", told, *tables)


SECTIONS: list[Callable[[Run], Html | None]] = [
    what_was_run, results, curves, hit_rates, contact_sheets, mixes, pool, time_by_phase, environment,
]  # fmt: skip


def shown(value: Any) -> str:
    """A setting as text."""
    if value is None or value == "":
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Seconds as text."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _test(place: str, result: Mapping[str, Any]) -> str:
    name = f"{result.get('shot')}-shot"
    return name if place in (HERE, name) else f"{name} ({place})"


def _image(image, alt: str) -> Html:
    return element("img", src=pictures.data_uri(image), alt=alt, width=image.width, height=image.height)


def _mixed(result: Mapping[str, Any]) -> bool:
    return bool(result.get("pool_models"))  # --mix False has none


def _accuracy(result: Mapping[str, Any], mixed: bool) -> str:
    end = "" if mixed else "_without_mix"
    return plus_minus(result, f"accuracy{end}", f"ci95{end}")


def _figures(result: Mapping[str, Any], mixed: bool) -> tuple[str, str, str]:
    with_ = _accuracy(result, True) if mixed else "–"
    change = plus_minus(result, "paired_difference", "paired_ci95", sign=True) if mixed else "–"
    return with_, _accuracy(result, False), change


def plus_minus(entries: Mapping[str, Any], name: str, half: str, *, sign: bool = False) -> str:
    """Two entries as a value and the half-width of its interval."""
    value, width = number(entries.get(name)), number(entries.get(half))
    if value is None:
        return "–"
    text = f"{value:+.2f}" if sign else f"{value:.2f}"
    return text if width is None else f"{text}{_PLUS_MINUS}{width:.2f}"


def _number(value: Any, digits: int) -> str:
    return "–" if number(value) is None else f"{value:.{digits}f}"


def _percent(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.0f} %"


def _by_class(each) -> list[float | None]:
    rates = each.manifest.get("hit_rate_by_class")
    return [number(rate) for rate in rates] if isinstance(rates, list) else []


def _least(rates: Sequence[float | None]) -> tuple[str, str]:
    """How many classes are below a half, and the five lowest."""
    known = sorted((rate, c) for c, rate in enumerate(rates) if rate is not None)
    if not known:
        return "not noted", "–"
    low = sum(rate < 0.5 for rate, _ in known)
    return f"{low} of {len(known)}", ", ".join(f"{c} ({_percent(rate)})" for rate, c in known[:5])
