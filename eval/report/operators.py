"""What eval.operators measured: the operator beside its peers."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean

from ..peers import MAIN_SIGMA, OURS, PEERS
from . import plots
from .inputs import Measurement, Operators, command_of, environments
from .markup import Markup, joined, tag
from .page import NOT_STATED, figure, missing, table


def operators(files: Sequence[Operators]) -> Markup:
    """The operator beside its peers."""
    parts = []
    for content in files:
        ours = [m for m in content.measurements if OURS in m.times]
        level = [m for m in ours if m.level == "op"] or ours
        shown = [m for m in level if m.sigma == MAIN_SIGMA] or [m for m in level if m.sigma == level[0].sigma]
        if shown:
            parts.append(_operator_bars(content, shown))
    return joined(*parts) if parts else missing(
        "The operator beside its peers", "Run `python -m eval.operators --json FILE` and give --operators FILE.")  # fmt: skip


def _operator_bars(content: Operators, shown: Sequence[Measurement]) -> Markup:
    sections: dict[tuple[str, str], list[Measurement]] = {}
    for m in shown:
        sections.setdefault((m.dtype, m.direction), []).append(m)
    peers = [name for name in dict.fromkeys([*PEERS, *(n for m in shown for n in m.times)])
             if name != OURS and any(name in m.times for m in shown)]  # fmt: skip
    rows = []
    for (dtype, direction), group in sections.items():
        found = {_label(name): _ratios(group, name) for name in peers}
        rows.append(
            (f"{dtype}, {direction}", {name: geometric_mean(known) for name, known in found.items() if known})
        )
    chart = plots.bars(rows, title="Peers as multiples of dcnv4's time", form=lambda v: f"{v:.2f}x", reference=1.0,
                       about="time as a multiple of dcnv4's, logarithmic: to the right of the line slower") if peers else None  # fmt: skip
    lines = []
    for (dtype, direction), group in sections.items():
        for m in group:
            own = m.times[OURS].median
            lines.append((m.shape, f"{dtype}, {direction}", f"{1e6 * own:,.1f}",
                          f"{own / m.floor:.2f}" if m.floor else "–",
                          *(f"{m.times[n].median / own:.2f}x" if n in m.times else "–" for n in peers)))  # fmt: skip
    detail = tag("details", tag("summary", f"All {len(lines)} measurements"),
                 table(("NxHxWxC", "", "dcnv4, us", "times the floor", *map(_label, peers)), lines))  # fmt: skip
    first, known = shown[0], content.identity
    threads = f", CPU threads: {known['threads']}" if known.get("threads") else ""
    caption = (
        f"Geometric means over {len({m.shape for m in shown})} shapes, at the {first.level} level, offsets of sigma {first.sigma:g} px; "
        f"{known.get('device', 'a device not stated')}{threads}, torch {known.get('torch', NOT_STATED)}. The floor is the time of a copy of the "
        "bytes that must be moved. A dash: that peer does not do that shape or type."
    )
    made_with = environments(content.environment, (m.environment for m in shown))
    return figure(joined(chart, detail), caption, command_of(*made_with))


def _ratios(group: Sequence[Measurement], name: str) -> list[float]:
    return [m.times[name].median / m.times[OURS].median for m in group if name in m.times]


def _label(name: str) -> str:
    return PEERS[name].label if name in PEERS else name
