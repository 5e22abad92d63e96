"""The look of a report: a page that needs nothing but itself, with figures, tables and charts of one style."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from .markup import Markup, joined, tag

NOT_MEASURED = "not measured"
NOT_STATED = "not stated"

# Okabe and Ito's hues, which colour-blind readers tell apart, darkened on white and lightened on black where contrast asks
# for it. Yellow is left out: on white it cannot be seen.
LIGHT = ("#0072b2", "#d55e00", "#00795c", "#b14b87", "#a86e00", "#3a3a3a", "#2b8fc4", "#7a4fa3")
DARK = ("#56b4e9", "#ff8a3d", "#2fc79a", "#e79ac4", "#e69f00", "#d0d0d0", "#9ad4f5", "#bfa0e0")


def _variables(colours: Sequence[str], **others: str) -> str:
    named = {**{f"c{i}": colour for i, colour in enumerate(colours)}, **others}
    return " ".join(f"--{name}: {value};" for name, value in named.items())


STYLE = f"""
:root {{ color-scheme: light dark; {
    _variables(
        LIGHT,
        back="#ffffff",
        ink="#1b1b1b",
        faint="#5c5c5c",
        line="#d4d4d4",
        box="#f5f5f3",
        heat="0 114 178",
    )
} }}
@media (prefers-color-scheme: dark) {{ :root {{ {
    _variables(
        DARK, back="#131416", ink="#ececec", faint="#a8a8a8", line="#3c3e42", box="#1d1f22", heat="86 180 233"
    )
} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 1rem 1rem 4rem; max-width: 76rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; overflow-wrap: break-word; }}
h1 {{ font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0; }}
h2 {{ font-size: 1.25rem; margin: 2.75rem 0 0.5rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }}
h3 {{ font-size: 1.1rem; margin: 1.75rem 0 0.25rem; }}
h4 {{ font-size: 0.95rem; margin: 1rem 0 0.3rem; }}
h4 span {{ font-weight: 400; color: var(--faint); }}
p {{ margin: 0.4rem 0; max-width: 46rem; }}
a {{ color: var(--c0); }}
code {{ font: 0.85em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }}
nav {{ display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; margin: 0.75rem 0; }}
figure {{ margin: 1rem 0 1.5rem; }}
figcaption {{ color: var(--faint); font-size: 0.875rem; margin-top: 0.5rem; max-width: 46rem; }}
figcaption code {{ display: block; margin-top: 0.2rem; }}
.scroll {{ overflow-x: auto; width: fit-content; max-width: 100%; margin: 0.75rem 0; border: 1px solid var(--line); border-radius: 4px; }}
table {{ border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.35rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }}
th {{ color: var(--faint); font-weight: 600; background: var(--box); white-space: normal; vertical-align: bottom; min-width: 4.5rem; }}
th:first-child, td:first-child {{ text-align: left; position: sticky; left: 0; background: var(--box); color: var(--ink);
  font-weight: 600; min-width: 6.5rem; }}
tr:last-child td {{ border-bottom: 0; }}
td.words {{ text-align: left; white-space: normal; min-width: 9rem; }}
.missing {{ color: var(--faint); font-style: italic; }}
.side {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; align-items: start; }}
.side > * {{ margin: 0; min-width: 0; }}
.grid img {{ width: 100%; height: auto; image-rendering: pixelated; border: 1px solid var(--line); background: #000; }}
.maps {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(46%, 14rem), 1fr)); gap: 0.75rem; }}
.maps div {{ font-size: 0.8rem; color: var(--faint); }}
.maps svg {{ display: block; width: 100%; height: auto; border: 1px solid var(--line); background: #000; }}
.maps image, .pixels {{ image-rendering: pixelated; }}
.chart {{ display: block; width: 100%; height: auto; max-width: 40rem; }}
.chart text {{ fill: var(--faint); font: 11px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }}
.chart .label {{ paint-order: stroke; stroke: var(--back); stroke-width: 3px; stroke-linejoin: round; }}
.chart .strong {{ fill: var(--ink); }}
.legend {{ display: flex; flex-wrap: wrap; gap: 0.1rem 1.1rem; font-size: 0.875rem; margin: 0.25rem 0; }}
.legend span {{ display: inline-flex; align-items: center; gap: 0.4rem; }}
@media (max-width: 36rem) {{
  .chart text {{ font-size: 15px; }}
  td.words {{ min-width: 13rem; }}
  th:first-child, td:first-child {{ white-space: normal; max-width: 42vw; }}
}}
footer {{ margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 0.75rem; color: var(--faint); font-size: 0.875rem; }}
"""


def page(
    title: str, introduction: Markup, sections: Sequence[tuple[str, str, Markup]], footer: Markup
) -> str:
    """The whole document; a section is (anchor, heading, content)."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    links = tag("nav", *(tag("a", heading, href=f"#{anchor}") for anchor, heading, _ in sections))
    bodies = (tag("section", tag("h2", heading, id=anchor), content) for anchor, heading, content in sections)
    body = tag("body", tag("h1", title), introduction, links, *bodies, tag("footer", footer))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def figure(body: object, caption: str, command: str | None, *, class_: str | None = None) -> Markup:
    """What is seen, and the command that made it."""
    made = (
        joined("Made with ", tag("code", command))
        if command
        else f"Made with a command that is {NOT_STATED}."
    )
    return tag("figure", body, tag("figcaption", caption, " ", made), class_=class_)


def missing(what: str, how: str) -> Markup:
    """The place of something that is not there, and what would bring it."""
    return tag("p", tag("span", f"{what}: {NOT_MEASURED}.", class_="missing"), f" {how}")


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> Markup:
    """A table in a box of its own that scrolls. Cells are texts or elements `td`; None is shown as not measured."""

    def cell(value: object) -> Markup:
        if isinstance(value, Markup) and value.startswith("<td"):
            return value
        if value is None or value in (NOT_MEASURED, NOT_STATED):
            value = tag("span", value or NOT_MEASURED, class_="missing")
        return tag("td", value)

    head = tag("thead", tag("tr", *(tag("th", title) for title in header)))
    lines = (tag("tr", *map(cell, row)) for row in rows)
    # Reachable by keyboard, so that it can be scrolled without a mouse.
    return tag("div", tag("table", head, tag("tbody", *lines)), class_="scroll", tabindex="0")


def heat(text: str, share: float) -> Markup:
    """A table cell whose ground is the stronger, the nearer `share` comes to 1."""
    strength = 0.55 * min(1.0, max(0.0, share))
    return tag("td", text, style=f"background: rgb(var(--heat) / {strength:.2f})")


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def large(count: float) -> str:
    """A count in words of at most three digits and two decimals."""
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:,.0f}"
