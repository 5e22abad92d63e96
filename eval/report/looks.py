"""Where each DCNv4 layer of a run looks: maps of some layers, and a table of all."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from ldm_dcn.errors import UserError
from ldm_dcn.model import Model

from .. import offsets
from . import offset_maps
from .drawing import Drawing, Watching
from .inputs import Run
from .markup import Markup, joined, tag
from .page import figure, heat, table


def looks(
    run: Run, model: Model, drawing: Drawing, watching: Watching, folder: Path, key: str, command: str
) -> Markup:
    """Where each DCNv4 layer of one run looks, through the steps; `model` is the run's, loaded."""
    layers = offsets.find_layers(model.unet)
    if not layers:
        return tag("p", f"{run.name} has no DCNv4 layer: it looks where its convolutions do.")
    conditions = drawing.conditions(model)
    condition = model.denoiser.null_condition(1) if conditions is None else conditions[:1]
    _, moments = offsets.watch(
        model, condition, drawing.seeds[0], numbers=offsets.evenly(drawing.steps, watching.moments),
        positions=watching.positions, sampler=drawing.sampler, steps=drawing.steps, guidance=drawing.guidance,
    )  # fmt: skip
    chosen = _chosen(layers, watching)
    file = folder / f"offsets_{key}.png"
    offset_maps.save_maps(chosen, moments, file)
    pictures = [offset_maps.defined_images(f"x0-{key}", moments), offset_maps.spot_legend(watching.positions)]
    for layer in chosen:
        h, w = moments[0].looks[layer.name].size
        detail = f"{layer.kind}, map {w}x{h}, {layer.module.groups} groups of {layer.module.taps} taps"
        pictures += [
            tag("h4", _breakable(layer.name), tag("span", f" ({detail})")),
            offset_maps.maps(f"x0-{key}", layer, moments),
        ]
    what = "" if conditions is None else f"label {drawing.labels[0]}, "
    if model.denoiser.takes_text:
        what = f"prompt {drawing.prompts[0]!r}, "
    caption = (
        f"{run.name}, {what}seed {drawing.seeds[0]}, {drawing.in_words(model)}. Under the points lies the estimate of x_0 at that step, "
        "decoded, and below it the mean length of the layer's offsets in pixels of its map. A cross marks the pixel that the kernel "
        "stands on, the points of its colour are where the layer reads for it, all groups and taps: the larger, the larger the |weight| (within a layer), a ring for a negative weight. Points off the map "
        f"contribute nothing and are not drawn. The conditional half of guidance is shown. {len(chosen)} of {len(layers)} layers are "
        f"drawn (--layers); also {file.name}."
    )
    return joined(figure(joined(*pictures), caption, command), _summary(run, layers, moments, command))


def _chosen(layers: Sequence[offsets.Layer], watching: Watching) -> list[offsets.Layer]:
    if not watching.patterns:
        return offsets.choose_layers(layers, watching.layers)
    chosen = [
        layer for layer in layers if any(re.search(pattern, layer.name) for pattern in watching.patterns)
    ]
    if not chosen:
        raise UserError(
            f"--layers matches none of the {len(layers)} DCNv4 layers; there are {layers[0].name}, ..."
        )
    return chosen


def _summary(
    run: Run, layers: Sequence[offsets.Layer], moments: Sequence[offsets.Moment], command: str
) -> Markup:
    found = [[moment.looks[layer.name] for moment in moments] for layer in layers]
    most = (
        max((look.mean_length for row in found for look in row if math.isfinite(look.mean_length)), default=0)
        or 1
    )
    header = ["layer", "kind", "map", *(f"t = {moment.time}" for moment in moments),
              f"by |weight|, t = {moments[-1].time}", f"off the map, t = {moments[-1].time}"]  # fmt: skip
    rows = []
    for layer, row in zip(layers, found, strict=True):
        h, w = row[0].size
        weighted = row[-1].weighted_length
        rows.append((
            _breakable(layer.name), layer.kind, f"{w}x{h}",
            *(heat(f"{look.mean_length:.2f}", look.mean_length / most) for look in row),
            "all weights 0" if weighted is None else f"{weighted:.2f}", f"{row[-1].outside:.1%}",
        ))  # fmt: skip
    caption = (
        f"{run.name}: mean length of the offsets of every DCNv4 layer, in pixels of its own map, over all positions, groups and taps, "
        "at the steps of the maps above; the stronger the ground, the longer. Zero is a convolution's grid. The last two columns: "
        "the mean in which a point counts as its |weight|, and the share of points off the map, at the last of these steps."
    )
    return figure(table(header, rows), caption, command)


def _breakable(name: str) -> Markup:
    """A dotted name that may go on in the next line after a dot."""
    parts = name.split(".")
    return joined(*(joined(part, ".", tag("wbr")) for part in parts[:-1]), parts[-1])
