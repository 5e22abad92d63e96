"""Charts as inline SVG: curves, points and bars, whose colours follow the page's scheme and whose shapes tell series apart too."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .markup import Markup, joined, tag
from .page import LIGHT

# Units of the drawing, which fills its column: 1.3 pixels each on a desktop, 0.75 on a phone, where letters are larger (page.py).
WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 26, 12, 42
LETTER = 6.3  # width of a letter, about
DASHES = (None, "7 4", "2 4", "10 3 2 3")
MOST_POINTS = 300  # of a curve: more than pixels that show them; means of equal stretches stand for the rest
LOGARITHMIC = 8  # largest over smallest value from which an axis is logarithmic
BAR, ROW = 11, 10  # height of a bar, and the gap between rows
NAMES = 225  # room for values and names beside bars, in a phone's letters
LONGEST_NAME = 18  # letters beside a bar; the legend has all of them


def colour(index: int) -> str:
    return f"var(--c{index % len(LIGHT)})"


def variety(index: int) -> int:
    """Which of four dashes or marks: another one each time that the colours begin again."""
    return (index + index // len(LIGHT)) % len(DASHES)


@dataclass(frozen=True)
class Series:
    """Points (x, y) in order; `labels` stand beside them where there is room to read them."""

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()
    faint: bool = False  # a background to the next series, with its colour and without a legend


@dataclass(frozen=True)
class Axis:
    """A range, its ticks, and the way from a value to a share of the length."""

    low: float
    high: float
    ticks: Sequence[float]
    logarithmic: bool

    def share(self, value: float) -> float:
        if self.logarithmic:
            return math.log(max(value, 1e-300) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def axis(values: Iterable[float], *, most_ticks: int = 6, may_be_logarithmic: bool = True) -> Axis:
    """A range around finite `values` that ends on round numbers."""
    known = list(values)
    low, high = min(known), max(known)
    if may_be_logarithmic and low > 0 and high / low > LOGARITHMIC:
        ticks = [
            m * 10.0**p
            for p in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for m in (1, 2, 5)
        ]
        first = max(i for i, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
        last = min((i for i, tick in enumerate(ticks) if tick >= high * (1 - 1e-9)), default=len(ticks) - 1)
        ticks = ticks[first : last + 1]
        shown = ticks if len(ticks) <= most_ticks + 2 else [t for t in ticks if _leading(t) == 1] or ticks
        return Axis(ticks[0], ticks[-1], shown, True)
    if high == low:
        low, high = low - max(abs(low) * 0.1, 0.5), high + max(abs(high) * 0.1, 0.5)
    raw = (high - low) / (most_ticks - 1)
    step = 10 ** math.floor(math.log10(raw))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if m * step >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], ticks, False)


def _leading(value: float) -> int:
    return round(value / 10 ** math.floor(math.log10(value) + 1e-9))


def lines(series: Sequence[Series], *, x: str, y: str, title: str) -> Markup:
    """Curves over steps."""
    return _chart(series, x, y, title, lines=True)


def points(series: Sequence[Series], *, x: str, y: str, title: str) -> Markup:
    """Points with their labels; those of one series are joined by a thin line."""
    return _chart(series, x, y, title, lines=False)


def _chart(series: Sequence[Series], x: str, y: str, title: str, *, lines: bool) -> Markup:
    shown = [s for s in series if s.points]
    across = axis([p[0] for s in shown for p in s.points], may_be_logarithmic=not lines)
    up = axis([p[1] for s in shown for p in s.points])
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    margin = 0.0 if lines else 0.06  # points stay off the frame

    def place(point: tuple[float, float]) -> tuple[float, float]:
        shares = across.share(point[0]), up.share(point[1])
        near, far = (margin + (1 - 2 * margin) * share for share in shares)
        return LEFT + inner_width * near, TOP + inner_height * (1 - far)

    parts: list[Markup] = [tag("title", title)]
    for tick in up.ticks:
        height = place((across.low, tick))[1]
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=height, y2=height, stroke="var(--line)"))
        parts.append(tag("text", _tick(tick), x=LEFT - 8, y=height + 4, text_anchor="end"))
    for tick in across.ticks:
        left = place((tick, up.low))[0]
        base = HEIGHT - BOTTOM
        parts.append(tag("line", x1=left, x2=left, y1=base, y2=base + 4, stroke="var(--faint)"))
        parts.append(tag("text", _tick(tick), x=left, y=base + 18, text_anchor="middle"))
    parts.append(
        tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, stroke="var(--faint)")
    )
    parts.append(tag("text", x, x=LEFT + inner_width / 2, y=HEIGHT - 6, text_anchor="middle"))
    drawn = _draw_lines if lines else _draw_points
    index = 0
    taken: list[tuple[float, float, float, float]] = []
    for s in shown:
        parts += drawn(s, index, place, taken)
        index += not s.faint
    note = ", logarithmic" if up.logarithmic else ""
    picture = tag(
        "svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", class_="chart", role="img", aria_label=title
    )
    return joined(_legend([s.name for s in shown if not s.faint], y + note, marks=not lines), picture)


def _draw_lines(series: Series, index: int, place: Callable, taken: list) -> list[Markup]:
    thinned = _thinned(series.points)
    text = " ".join(f"{a:.1f},{b:.1f}" for a, b in map(place, thinned))
    style = {"stroke": colour(index), "fill": "none", "stroke_linejoin": "round"}
    if series.faint:
        return [tag("polyline", points=text, stroke_width=1, stroke_opacity=0.3, **style)]
    shapes = [tag("polyline", points=text, stroke_width=2, stroke_dasharray=DASHES[variety(index)], **style)]
    if len(thinned) <= 25:  # few enough to be seen one by one
        shapes += [_mark(place(point), index) for point in thinned]
    return shapes


def _draw_points(series: Series, index: int, place: Callable, taken: list) -> list[Markup]:
    where = [place(point) for point in series.points]
    text = " ".join(f"{a:.1f},{b:.1f}" for a, b in where)
    shapes = [
        tag("polyline", points=text, stroke=colour(index), fill="none", stroke_width=1, stroke_opacity=0.5)
    ]
    for spot in where:
        shapes.append(_mark(spot, index))
        taken.append((spot[0] - 5, spot[1] - 5, spot[0] + 5, spot[1] + 5))
    for (left, height), label in zip(where, series.labels, strict=False):
        size = LETTER * len(label)
        # the first place beside the point where nothing stands yet
        for anchor, x, y in (("start", left + 9, height + 4), ("end", left - 9, height + 4),
                             ("middle", left, height - 10), ("middle", left, height + 20)):  # fmt: skip
            first = x - {"start": 0, "end": size, "middle": size / 2}[anchor]
            box = (first, y - 11, first + size, y + 3)
            inside = first >= LEFT and first + size <= WIDTH and box[1] >= TOP and box[3] <= HEIGHT - BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                shapes.append(tag("text", label, x=x, y=y, text_anchor=anchor, class_="label"))
                break
    return shapes


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _mark(spot: tuple[float, float], index: int) -> Markup:
    """A dot, square, triangle or diamond."""
    x, y = spot
    kind = variety(index)
    if kind == 0:
        return tag("circle", cx=x, cy=y, r=4, fill=colour(index))
    corners = {
        1: ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        2: ((0, -5), (5, 4), (-5, 4)),
        3: ((0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)),
    }[kind]
    outline = "M" + "L".join(f"{x + a:.1f} {y + b:.1f}" for a, b in corners) + "Z"
    return tag("path", d=outline, fill=colour(index))


def _legend(names: Sequence[str], about: str, *, marks: bool, bars: bool = False) -> Markup:
    entries = [tag("span", about, style="color: var(--faint)")] if about else []
    for index, name in enumerate(names):
        if bars:
            sign = tag("rect", x=0, y=2, width=12, height=10, fill=colour(index))
        elif marks:
            sign = _mark((12, 7), index)
        else:
            sign = tag("line", x1=0, x2=24, y1=7, y2=7, stroke=colour(index), stroke_width=2,
                       stroke_dasharray=DASHES[variety(index)])  # fmt: skip
        size = 12 if bars else 24
        entries.append(tag("span", tag("svg", sign, width=size, height=14, aria_hidden="true"), name))
    return tag("div", *entries, class_="legend")


def bars(
    rows: Sequence[tuple[str, Mapping[str, float]]],
    *,
    title: str,
    form: Callable[[float], str],
    about: str = "",
    reference: float | None = None,
    own_scale: bool = False,
) -> Markup:
    """Horizontal bars, a row of them for each label, with their values and names at their ends.

    reference  bars begin at this value instead of zero, on a logarithmic scale that all rows share
    own_scale  every row has its own scale, so that its longest bar fills the width; else all rows share one
    """
    names = list(dict.fromkeys(name for _, values in rows for name in values))
    everything = [value for _, values in rows for value in values.values()]
    room = WIDTH - NAMES
    if reference is None:
        low, high = 0.0, max(everything, default=0) or 1.0
    else:
        low, high = min([reference, *everything]), max([reference, *everything]) * 1.01
    parts: list[Markup] = [tag("title", title)]
    top = 2.0

    def across(value: float) -> float:
        if reference is None:
            return room * value / high
        return room * math.log(value / low) / math.log(high / low)

    for label, values in rows:
        if own_scale:
            high = max(values.values()) or 1.0
        parts.append(tag("text", label, x=0, y=top + 11, class_="strong"))
        top += 17
        begin = top
        for name, value in values.items():
            first, last = sorted((across(reference) if reference is not None else 0.0, across(value)))
            parts.append(
                tag(
                    "rect",
                    x=first,
                    y=top,
                    width=max(1.0, last - first),
                    height=float(BAR),
                    fill=colour(names.index(name)),
                )
            )
            short = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
            text = f"{form(value)}  {short}" if len(names) > 1 else form(value)
            parts.append(tag("text", text, x=max(last, first + 1) + 5, y=top + BAR - 1))
            top += BAR + 5
        if reference is not None:
            at = across(reference)
            parts.append(tag("line", x1=at, x2=at, y1=begin - 3, y2=top - 2, stroke="var(--ink)"))
        top += ROW
    picture = tag(
        "svg", *parts, viewBox=f"0 0 {WIDTH} {top:.0f}", class_="chart", role="img", aria_label=title
    )
    return joined(_legend(names if len(names) > 1 else [], about, marks=False, bars=True), picture)


def _thinned(series: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    count = len(series)
    if count <= MOST_POINTS:
        return list(series)
    means = []
    for i in range(MOST_POINTS):
        stretch = series[i * count // MOST_POINTS : (i + 1) * count // MOST_POINTS]
        means.append(tuple(sum(point[axis] for point in stretch) / len(stretch) for axis in (0, 1)))
    return means


def smoothed(series: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Means over `window` points around each, evenly to both sides: fewer near the ends, so that nothing is shifted."""
    sums = list(itertools.accumulate((y for _, y in series), initial=0.0))
    result = []
    for i, (x, _) in enumerate(series):
        reach = min(window // 2, i, len(series) - 1 - i)
        result.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return result


def _tick(value: float) -> str:
    if value and abs(value) >= 1e4:
        for unit, size in (("M", 1e6), ("k", 1e3)):
            if abs(value) >= size:
                return f"{value / size:g}{unit}"
    return f"{value:.4g}"
