"""HTML and SVG as strings that cannot come out broken: elements close themselves, and text is escaped unless it is markup."""

from __future__ import annotations

import html


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def escaped(value: object) -> Markup:
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def joined(*parts: object) -> Markup:
    """`parts` one after the other; None is left out."""
    return Markup("".join(escaped(part) for part in parts if part is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element. `class_` is class, other underscores are hyphens; attributes that are None are left out.

    What it makes is XML too: attributes are quoted and empty elements closed.
    """
    texts = []
    for key, value in attributes.items():
        if value is not None:
            text = _number(value) if isinstance(value, float) else str(value)
            texts.append(f' {key.rstrip("_").replace("_", "-")}="{html.escape(text)}"')
    opening = f"<{name}{''.join(texts)}"
    if not children and name in _VOID:
        return Markup(f"{opening} />")
    return Markup(f"{opening}>{joined(*children)}</{name}>")


# Elements of HTML without an end tag, and shapes of SVG, for which both ways are right and this one is short.
_VOID = {"meta", "img", "br", "hr", "path", "line", "rect", "circle", "use", "image", "polyline", "wbr"}


def _number(value: float) -> str:
    """A coordinate: two decimals are finer than a screen shows."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
