"""Offset maps as drawings: the points where DCNv4 looks over the picture as it comes about, in SVG for the page and in one PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from ldm_dcn.files import replacing
from ldm_dcn.pictures import to_pil

from ..offsets import Layer, Look, Moment, Spot
from .markup import Markup, joined, tag
from .page import data_uri

COLOURS = (
    "#ff9f1c",
    "#3fc1ff",
    "#ff5fa8",
    "#5ce65c",
)  # one a position; on black and on white, with a black rim
SIDE = 100.0  # width of a map in units of its drawing
LARGEST, SMALLEST = 2.6, 0.5  # radius of a point with the largest and with no weight, likewise
PANEL, GAP, LABEL = 240, 8, 22  # pixels of the PNG


def png_bytes(image: torch.Tensor) -> bytes:
    """uint8 (c, H, W) as a PNG file's content."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG")
    return buffer.getvalue()


def defined_images(key: str, moments: Sequence[Moment]) -> Markup:
    """The x_0 estimates, once each, for the maps to use."""
    images = []
    for moment in moments:
        _, height, width = moment.estimate.shape
        images.append(
            tag("image", id=f"{key}-{moment.number}", href=data_uri(png_bytes(moment.estimate)), width=SIDE,
                height=SIDE * height / width, preserveAspectRatio="none", class_="pixels")
        )  # fmt: skip
    return tag("svg", tag("defs", *images), width=0, height=0, style="position: absolute", aria_hidden="true")


def maps(key: str, layer: Layer, moments: Sequence[Moment]) -> Markup:
    """One layer through the steps: a map for each moment."""
    most = largest_weight(layer, moments)
    cells = []
    for moment in moments:
        look = moment.looks[layer.name]
        _, height, width = moment.estimate.shape
        tall = SIDE * height / width
        shapes = [tag("use", href=f"#{key}-{moment.number}")]
        for index, spot in enumerate(look.spots):
            shapes += _points(spot, look, most, tall, COLOURS[index % len(COLOURS)])
        title = f"{layer.name} at step {moment.number}, t = {moment.time}"
        drawing = tag("svg", tag("title", title), *shapes, viewBox=f"0 0 {SIDE:g} {tall:g}", role="img",
                      aria_label=title)  # fmt: skip
        label = f"step {moment.number}, t = {moment.time}: {look.mean_length:.2f} px"
        cells.append(tag("div", drawing, label))
    return tag("div", *cells, class_="maps")


def _points(spot: Spot, look: Look, most: float, tall: float, colour: str) -> list[Markup]:
    """Filled for a positive weight, a ring for a negative one; then a cross where the kernel stands."""
    filled, rings = [], []
    for x, y, weight in _in_units(spot, look, tall):
        radius = (
            SMALLEST + (LARGEST - SMALLEST) * math.sqrt(min(1.0, abs(weight) / most)) if most else SMALLEST
        )
        if _off(x, y, radius, tall):
            continue
        (filled if weight >= 0 else rings).append(tag("circle", cx=x, cy=y, r=radius))
    x, y = _place(*spot.center, look, tall)
    cross = f"M{x - 3:.1f} {y:.1f}H{x + 3:.1f}M{x:.1f} {y - 3:.1f}V{y + 3:.1f}"
    return [
        tag("g", *filled, fill=colour, fill_opacity=0.85, stroke="#000", stroke_width=0.35),
        tag("g", *rings, fill="none", stroke=colour, stroke_width=0.8),
        tag("path", d=cross, stroke="#000", stroke_width=1.6, fill="none"),
        tag("path", d=cross, stroke=colour, stroke_width=0.8, fill="none"),
    ]


def _in_units(spot: Spot, look: Look, tall: float) -> list[tuple[float, float, float]]:
    points = zip(
        spot.x.flatten().tolist(), spot.y.flatten().tolist(), spot.weight.flatten().tolist(), strict=True
    )
    return [
        (*_place(x, y, look, tall), weight)
        for x, y, weight in points
        if all(map(math.isfinite, (x, y, weight)))
    ]


def _place(x: float, y: float, look: Look, tall: float) -> tuple[float, float]:
    """From pixels of the map, whose first has its centre at 0, to units of the drawing."""
    h, w = look.size
    return (x + 0.5) / w * SIDE, (y + 0.5) / h * tall


def _off(x: float, y: float, radius: float, tall: float) -> bool:
    return not (-radius < x < SIDE + radius and -radius < y < tall + radius)


def largest_weight(layer: Layer, moments: Sequence[Moment]) -> float:
    """Of all points that are drawn of a layer, so that sizes compare between its steps."""
    weights = [spot.weight for moment in moments for spot in moment.looks[layer.name].spots]
    return max((float(weight.abs().nan_to_num(0, 0, 0).max()) for weight in weights), default=0.0)


def save_maps(layers: Sequence[Layer], moments: Sequence[Moment], path: Path) -> None:
    """All maps in one PNG: a row for each layer, a column for each moment."""
    _, height, width = moments[0].estimate.shape
    panel_height = max(1, round(PANEL * height / width))
    row = LABEL + panel_height + GAP
    image = Image.new("RGB", (GAP + len(moments) * (PANEL + GAP), LABEL + len(layers) * row + GAP), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for column, moment in enumerate(moments):
        pen.text((GAP + column * (PANEL + GAP), 4), f"step {moment.number}, t = {moment.time}", "black", font)
    for line, layer in enumerate(layers):
        top = LABEL + line * row
        pen.text((GAP, top + 4), f"{layer.name} ({layer.kind})", "black", font)
        most = largest_weight(layer, moments)
        for column, moment in enumerate(moments):
            panel = _panel(moment, moment.looks[layer.name], most, panel_height)
            image.paste(panel, (GAP + column * (PANEL + GAP), top + LABEL))
    with replacing(path) as file:
        image.save(file, format="PNG")


def _panel(moment: Moment, look: Look, most: float, height: int) -> Image.Image:
    fine = 2  # drawn larger, so that the edges come out smooth
    scale = fine * PANEL / SIDE
    panel = (
        to_pil(moment.estimate).convert("RGB").resize((fine * PANEL, fine * height), Image.Resampling.NEAREST)
    )
    pen = ImageDraw.Draw(panel)
    tall = SIDE * height / PANEL
    for index, spot in enumerate(look.spots):
        colour = COLOURS[index % len(COLOURS)]
        for x, y, weight in _in_units(spot, look, tall):
            radius = (
                SMALLEST + (LARGEST - SMALLEST) * math.sqrt(min(1.0, abs(weight) / most))
                if most
                else SMALLEST
            ) * scale
            box = (x * scale - radius, y * scale - radius, x * scale + radius, y * scale + radius)
            if weight >= 0:
                pen.ellipse(box, fill=colour, outline="black")
            else:
                pen.ellipse(box, outline=colour, width=3)
        x, y = (scale * value for value in _place(*spot.center, look, tall))
        for ink, thick in (("black", 7), (colour, 3)):
            pen.line((x - 14, y, x + 14, y), ink, thick)
            pen.line((x, y - 14, x, y + 14), ink, thick)
    return panel.resize((PANEL, height), Image.Resampling.LANCZOS)


def spot_legend(positions: Sequence[tuple[float, float]]) -> Markup:
    """Which colour is which position."""
    entries = []
    for index, (across, down) in enumerate(positions):
        dot = tag(
            "circle", cx=7, cy=7, r=5, fill=COLOURS[index % len(COLOURS)], stroke="#000", stroke_width=1
        )
        name = f"position {across:.0%} across, {down:.0%} down"
        entries.append(tag("span", tag("svg", dot, width=14, height=14, aria_hidden="true"), name))
    return joined(tag("div", *entries, class_="legend"))
