"""Write HTML: text is escaped unless it is markup already, and a page needs no other file."""

import html
from collections.abc import Iterable, Sequence
from importlib import resources

from utils.plots import MADE_BY


class Html(str):
    """Markup, which is not escaped again."""

    __slots__ = ()


Content = object  # Html, or anything whose text is escaped, or None for nothing
_VOID = {"img", "meta", "br"}
_NOTHING_FROM_OUTSIDE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def element(name: str, /, *children: Content, **attributes: object) -> Html:
    """Return <name attributes>children</name>. An attribute may end in _ if Python has the word; None is left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>") if name in _VOID else Html(f"<{name}{given}>{joined(children)}</{name}>")


def joined(children: Iterable[Content]) -> Html:
    """Return contents one after the other."""
    return Html("".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children if c is not None))


def table(head: Sequence[Content], rows: Iterable[Sequence[Content]], *, class_: str | None = None) -> Html:
    """Return a table in a box that scrolls sideways. The first cell of a row is its heading."""
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    ]
    top = element("thead", element("tr", *(element("th", cell, scope="col") for cell in head)))
    inner = element("table", top, element("tbody", *body), class_=class_)
    return element("div", inner, class_="scroll", tabindex="0")


def section(title: str, told: Content, *content: Content) -> Html:
    """Return a part of the page. told: a sentence that says how to read it, or None."""
    return element("section", element("h2", title), element("p", told, class_="told") if told else None, *content)


def page(title: str, *content: Content, made_by: str = MADE_BY) -> Html:
    """Return the whole document, for narrow and wide screens, light and dark. made_by: the note that marks it."""
    style = resources.files("report").joinpath("style.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="generator", content=made_by),
        element("meta", http_equiv="Content-Security-Policy", content=_NOTHING_FROM_OUTSIDE),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(style)),
    )
    body = element("body", element("main", *content))
    return Html(f"<!doctype html>\n{element('html', head, body, lang='en')}\n")
