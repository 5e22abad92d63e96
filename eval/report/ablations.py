"""What eval.ablations measured: the time with each choice, as a multiple of plain DCNv4's."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean

from . import plots
from .inputs import Ablations, command_of, environments, machine_of
from .markup import Markup, joined, tag
from .page import figure, table

BASE = "dcnv4"
LEVELS = {"op": "the operator", "module": "the module"}
DIRECTIONS = ("forward", "backward")


def ablations(files: Sequence[Ablations]) -> Markup:
    """A figure for each file."""
    return joined(*(_figure(content) for content in files))


def _figure(content: Ablations) -> Markup:
    ratios: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for record in content.records:
        for label, seconds in record.seconds.items():
            if label != BASE and BASE in record.seconds:
                by_direction = ratios.setdefault((label, record.level), {})
                by_direction.setdefault(record.direction, {})[record.shape] = seconds / record.seconds[BASE]
    means = {
        choice: {
            direction: geometric_mean(found[direction].values())
            for direction in DIRECTIONS
            if direction in found
        }
        for choice, found in ratios.items()
    }
    chart = plots.bars([(label, mean) for (label, _), mean in means.items()], title="Time of each choice",
                       form=lambda v: f"{v:.2f}x", reference=1.0,
                       about="time as a multiple of dcnv4's, logarithmic: to the right of the line slower")  # fmt: skip
    shapes = list(dict.fromkeys(record.shape for record in content.records))
    rows = [
        (
            label,
            LEVELS.get(level, level),
            direction,
            f"{mean:.2f}",
            *(f"{own[s]:.2f}" if (s in (own := ratios[label, level][direction])) else None for s in shapes),
        )
        for (label, level), by_direction in means.items()
        for direction, mean in by_direction.items()
    ]
    detail = table(("changed", "of", "", "geometric mean", *shapes), rows)
    first = content.records[0]
    made_with = environments(content.environment, (record.environment for record in content.records))
    caption = (
        f"Times with each choice, medians of rounds in turns, as multiples of plain dcnv4's, geometric means over {len(shapes)} shapes "
        f"(NxHxWxC); {first.dtype} where a row does not say another type, offsets of sigma {first.sigma:g} px; on "
        f"{machine_of(*made_with)}."
    )
    return figure(
        joined(chart, tag("details", tag("summary", "All shapes"), detail)), caption, command_of(*made_with)
    )
