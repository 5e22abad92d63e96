"""A bar chart of times relative to a baseline, on a logarithmic axis: drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = (
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#999999",
    "#5D3A9B",
    "#40B0A6",
    "#8B4513",
    "#000000",
)
BAR, GAP, LABEL, PLOT, MARGIN, HEAD = 11, 12, 230, 560, 24, 30  # pixels


@dataclass(frozen=True)
class Panel:
    """One block of bars: for each row, series -> how many times the baseline's time it takes."""

    title: str
    rows: Sequence[tuple[str, Mapping[str, float]]]


def draw(path: Path, title: str, note: str, panels: Sequence[Panel]) -> None:
    """Write the panels side by side to a PNG. A bar to the right of the line at 1 is slower than the baseline, to the left faster."""
    series = list(dict.fromkeys(name for panel in panels for _, bars in panel.rows for name in bars))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(series)}
    values = [value for panel in panels for _, bars in panel.rows for value in bars.values()]
    first = math.floor(math.log2(max(1e-3, min([0.7, *values]))))
    last = math.ceil(math.log2(max([1.5, *values])))
    ticks = [2.0**power for power in range(first, last + 1)]
    low, high = ticks[0], ticks[-1]
    font, bold = ImageFont.load_default(13), ImageFont.load_default(16)

    row_height = BAR * max(1, len(series)) + GAP
    body = HEAD + row_height * max(len(panel.rows) for panel in panels)
    width = MARGIN + len(panels) * (LABEL + PLOT + MARGIN)
    per_line = max(1, (width - 2 * MARGIN) // 190)
    legend = 20 * math.ceil(max(1, len(series)) / per_line)
    image = Image.new("RGB", (width, 76 + legend + body + 3 * MARGIN), "white")
    pen = ImageDraw.Draw(image)
    pen.text((MARGIN, 16), title, "black", bold)
    pen.text((MARGIN, 40), note, "#555555", font)
    for i, name in enumerate(series):
        x, y = MARGIN + 190 * (i % per_line), 70 + 20 * (i // per_line)
        pen.rectangle((x, y, x + 12, y + 12), colours[name])
        pen.text((x + 18, y - 2), name, "black", font)

    def across(value: float) -> float:
        """Pixels from the left edge of a plot."""
        return PLOT * math.log(min(max(value, low), high) / low) / math.log(high / low)

    top = 76 + legend + MARGIN
    for index, panel in enumerate(panels):
        left = MARGIN + LABEL + index * (LABEL + PLOT + MARGIN)
        bottom = top + HEAD + row_height * len(panel.rows)
        pen.text((left, top - 14), panel.title, "black", bold)
        for tick in ticks:
            x = left + across(tick)
            pen.line(
                (x, top + HEAD - 8, x, bottom), "black" if tick == 1 else "#DDDDDD", 2 if tick == 1 else 1
            )
            pen.text((x, bottom + 4), f"{tick:g}x", "#555555", font, anchor="ma")
        for r, (label, bars) in enumerate(panel.rows):
            y = top + HEAD + r * row_height
            pen.text((left - 10, y + BAR * len(series) / 2), label, "black", font, anchor="rm")
            for s, name in enumerate(series):
                if name in bars:
                    ends = sorted((across(1), across(bars[name])))
                    pen.rectangle(
                        (
                            left + ends[0],
                            y + BAR * s,
                            left + max(ends[1], ends[0] + 1),
                            y + BAR * (s + 1) - 3,
                        ),
                        colours[name],
                    )
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
