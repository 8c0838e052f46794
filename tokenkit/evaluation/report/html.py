"""HTML that cannot be broken by what it holds: every text is escaped, and nothing loads or runs anything."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any


class Safe(str):
    """HTML as it is written."""

    __slots__ = ()


Child = str | int | Safe | None | Iterable["Child"]
_VOID = {"meta", "link", "br", "circle", "line", "path"}


def text(value: Any) -> Safe:
    """Return a text escaped; what cannot be seen or is no character becomes a mark."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(value))
    return Safe(html.escape(shown, quote=True))


def joined(children: Child) -> Safe:
    """Return children one after the other."""
    if children is None:
        return Safe("")
    if isinstance(children, Safe):
        return children
    if isinstance(children, str | int):
        return text(children)
    return Safe("".join(map(joined, children)))


def el(name: str, /, *children: Child, **attributes: Any) -> Safe:
    """Return an element. `class_` is class, `stroke_width` is stroke-width; None leaves an attribute out."""
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{text(value)}"')
    if name in _VOID:
        return Safe(f"<{' '.join(words)}/>")
    return Safe(f"<{' '.join(words)}>{joined(children)}</{name}>")


def table(caption: str, head: Iterable[Child], rows: Iterable[Iterable[Child]], **attributes: Any) -> Safe:
    """Return a table whose first column names its rows; a wide one scrolls within itself, by keyboard too.

    A cell that is an element stands as it is, every other becomes one.
    """
    titles = [el("th", one, scope="col") for one in head]
    body = [el("tr", (_cell(one, number) for number, one in enumerate(row))) for row in rows]
    made = el("table", el("caption", caption), el("thead", el("tr", titles)), el("tbody", body), **attributes)
    return el("div", made, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _cell(value: Child, number: int) -> Safe:
    if isinstance(value, Safe) and value.startswith("<td"):
        return value
    return el("th", value, scope="row") if number == 0 else el("td", value)
