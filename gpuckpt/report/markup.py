"""HTML, element by element: whatever isn't markup already is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Html(str):
    """Text that is markup: `el` puts it in as it is."""

    __slots__ = ()


def el(name: str, *inside: str | int, **attributes: object) -> Html:
    """An element; `class_` and `aria_label` stand for `class` and `aria-label`.

    Attributes that are None are left out.
    """
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{told}>{join(inside)}</{name}>")


def join(parts: Iterable[str | int]) -> Html:
    """One after the other, escaped unless they are markup."""
    return Html("".join(part if isinstance(part, Html) else text(part) for part in parts))


def text(value: object) -> str:
    r"""Any text as HTML shows it: names and errors may be a stranger's.

    What can't be seen, or would turn the text around, is written as `\x1b`.
    """
    found = "".join(
        one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode("ascii")
        for one in str(value)
    )
    return html.escape(found, quote=True)


def shorten(name: str, most: int = 80) -> str:
    """A name that isn't endless: its beginning and its end."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"


def table(caption: str, titles: Sequence[str], rows: Iterable[Sequence[str | int]]) -> Html:
    """A table, whose first column names the row."""
    head = el("tr", *(el("th", title, scope="col") for title in titles))
    body = join(
        el("tr", el("th", row[0], scope="row"), *(el("td", cell) for cell in row[1:]))
        for row in rows
    )
    return scrolled(caption, join([el("thead", head), el("tbody", body)]))


def scrolled(caption: str, inside: Html, class_: str = "scroll") -> Html:
    """A table that scrolls by itself if it is too wide, below its caption, which doesn't."""
    drawn = el("table", inside, aria_label=caption)
    box = el("div", drawn, class_=class_, tabindex="0", role="region", aria_label=caption)
    return join([el("p", caption, class_="about", aria_hidden="true"), box])


def details(summary: str, *inside: str) -> Html:
    """What is seen once its summary is chosen."""
    return el("details", el("summary", summary), *inside)
