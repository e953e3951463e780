"""HTML as values: text is escaped unless it was made here, so that no section of the report can forget to.

    el("p", "a < b", el("b", "!"), cls="note", data_id=3)    ->    <p class="note" data-id="3">a &lt; b<b>!</b></p>

What models and documents say goes into the report as text, and may be anything, `<script>` included.
"""

from collections.abc import Iterable
from html import escape

_VOID = {"meta", "br", "hr", "input"}
_SELF_CLOSING = {"circle", "line", "path", "polyline", "rect"}
_CONTROL = (*range(9), 11, 12, *range(14, 32), *range(0x7F, 0xA0), *range(0xD800, 0xE000))
_REORDERING = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # marks that turn the order of the text around them
_INVISIBLE = dict.fromkeys((*_CONTROL, *_REORDERING), 0xFFFD)


class Markup(str):
    """A string that is HTML already."""

    __slots__ = ()


Child = str | int | float | None | Iterable["Child"]


def text(value: str) -> Markup:
    """Any text as HTML; characters that cannot be shown, or that reorder what is beside them, become U+FFFD."""
    return Markup(escape(value.translate(_INVISIBLE)))


def join(*children: Child) -> Markup:
    """Children one after another: markup as it is, everything else as text, `None` as nothing."""
    parts = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, str | int | float):
            parts.append(text(str(child)))
        else:
            parts.append(join(*child))
    return Markup("".join(parts))


def el(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """An element. `cls` is its class, `_` in an attribute's name a `-`; `None` and `False` leave an attribute out."""
    shown = []
    for key, value in attributes.items():
        key = "class" if key == "cls" else key.rstrip("_").replace("_", "-")
        if value is True:
            shown.append(f" {key}")
        elif value is not None and value is not False:
            shown.append(f' {key}="{text(str(value))}"')
    opening = f"<{name}{''.join(shown)}"
    if name in _VOID:
        return Markup(f"{opening}>")
    if name in _SELF_CLOSING and not children:
        return Markup(f"{opening}/>")
    return Markup(f"{opening}>{join(*children)}</{name}>")
