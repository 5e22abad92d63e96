"""The tables and the chart of what `eval.operators` measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ldm_dcn.errors import UserError

from .chart import Panel, draw
from .columns import in_columns
from .contenders import DIRECTIONS
from .peers import MAIN_SIGMA, OURS, PEERS


def tables(content: dict[str, Any]) -> str:
    """One table for each level, type, spread and direction that was measured."""
    records = content["measurements"]
    sections: dict[tuple, list[dict]] = {}
    for record in records:
        key = tuple(record[key] for key in ("level", "dtype", "sigma", "direction"))
        sections.setdefault(key, []).append(record)
    everywhere = {
        (name, reason)
        for name, reason in (records[0]["skipped"] if records else {}).items()
        if all(
            record["skipped"].get(name, reason) == reason and name not in record["times"]
            for record in records
        )
    }
    left_out = [f"without {PEERS[name].label}: {reason}" for name, reason in sorted(everywhere)]
    texts = [_table(key, group, everywhere) for key, group in sections.items()]
    return "\n\n".join(["\n".join(left_out), *texts] if left_out else texts)


def _table(section: tuple, records: list[dict], known: set[tuple[str, str]]) -> str:
    level, dtype, sigma, direction = section
    names = [name for name in PEERS if name != OURS and any(name in record["times"] for record in records)]
    titles = ["row", "floor us", "dcnv4 us", "x floor", *(PEERS[name].label for name in names)]
    lines = []
    for record in records:
        ours = record["times"].get(OURS)
        floor = record["floor"]
        cells = [
            record["shape"],
            f"{floor * 1e6:.1f}" if floor else "-",
            f"{ours['median'] * 1e6:.1f} ±{ours['spread'] * 1e6:.1f}" if ours else "failed",
            f"{ours['median'] / floor:.2f}" if ours and floor else "-",
        ]
        for name in names:
            peer = record["times"].get(name)
            cells.append("-" if not peer else _multiple(peer, ours))
        lines.append(cells)
    found = [ratios(records, name) for name in names]
    means = (f"{statistics.geometric_mean(known):.2f}x" if known else "-" for known in found)
    lines.append(["geometric mean", "", "", "", *means])
    title = f"{level}, {dtype}, sigma {sigma:g}, {direction}: peers as multiples of dcnv4's time"
    return "\n".join([title, *in_columns([titles, *lines]), *_remarks(records, known)])


def _multiple(peer: dict, ours: dict | None) -> str:
    if ours is None:
        return f"{peer['median'] * 1e6:.1f} us"
    return f"{peer['median'] / ours['median']:.2f}x"


def _remarks(records: list[dict], known: set[tuple[str, str]]) -> list[str]:
    """Why a peer is missing, where its results differ, which times are not of a graph; without what is `known` already."""
    remarks: dict[tuple[str, str], list[str]] = {}
    for record in records:
        for name, reason in record["skipped"].items():
            remarks.setdefault((name, reason), []).append(record["shape"])
        for name, figures in record["times"].items():
            if figures["difference"] is not None and figures["difference"] > 0.02:
                remarks.setdefault((name, "its output differs from dcnv4's"), []).append(record["shape"])
            if figures["timer"] == "events":
                remarks.setdefault((name, "timed without a CUDA graph"), []).append(record["shape"])
    return [
        f"  {PEERS[name].label}: {reason} ({'every row' if len(rows) == len(records) else ', '.join(rows)})"
        for (name, reason), rows in remarks.items()
        if (name, reason) not in known
    ]


def ratios(records: Iterable[dict], name: str) -> list[float]:
    """A peer's time over dcnv4's, for the rows that have both."""
    return [
        record["times"][name]["median"] / record["times"][OURS]["median"]
        for record in records
        if name in record["times"] and OURS in record["times"]
    ]


def summary(content: dict[str, Any]) -> str:
    """Geometric means over rows, a line a table, and where a peer is faster at the operator level."""
    sections: dict[tuple, list[dict]] = {}
    faster = []
    for record in content["measurements"]:
        key = tuple(record[key] for key in ("level", "direction", "dtype", "sigma"))
        sections.setdefault(key, []).append(record)
        for name in record["times"] if record["level"] == "op" else ():
            (ratio,) = ratios([record], name) or (1.0,)
            if ratio < 1 and name != OURS:
                faster.append(f"{PEERS[name].label} at {record['shape']} {record['dtype']} sigma {record['sigma']:g} {record['direction']} ({ratio:.2f}x)")  # fmt: skip
    lines = ["geometric means over rows, as multiples of dcnv4's time (rows)"]
    for (level, direction, dtype, sigma), records in sections.items():
        means = []
        for name in PEERS:
            found = ratios(records, name)
            if name != OURS and found:
                means.append(f"{PEERS[name].label} {statistics.geometric_mean(found):.2f} ({len(found)})")
        lines.append(f"{level} {direction} {dtype} sigma {sigma:g}: {'; '.join(means) or 'no peer'}")
    for direction in DIRECTIONS:
        costs = _host_costs(content["measurements"], direction)
        if costs:
            lines.append(f"host cost of an op {direction} call, median over rows: {costs}")
    lines.append("faster than dcnv4 at the operator level: " + ("; ".join(faster) or "none"))
    return "\n".join(lines)


def _host_costs(records: Iterable[dict], direction: str) -> str:
    """What launching costs, where it was measured: on a GPU."""
    costs: dict[str, list[float]] = {}
    for record in records:
        for name, figures in record["times"].items() if record["level"] == "op" else ():
            if record["direction"] == direction and figures["host"] is not None:
                costs.setdefault(name, []).append(figures["host"])
    return "; ".join(
        f"{PEERS[name].label} {statistics.median(costs[name]) * 1e6:.0f} us"
        for name in PEERS
        if name in costs
    )


def chart(content: dict[str, Any], path: Path) -> None:
    """The operator level at one type and spread, forward and backward side by side."""
    records = content["measurements"]
    levels = [record for record in records if record["level"] == "op"] or records
    spreads = [record for record in levels if record["sigma"] == MAIN_SIGMA] or levels
    if not spreads:
        raise UserError("nothing has been measured, so there is nothing to draw")
    first = spreads[0]
    shown = [r for r in spreads if all(r[k] == first[k] for k in ("level", "dtype", "sigma"))]
    panels = []
    for direction in DIRECTIONS:
        rows = []
        for record in shown:
            ours = record["times"].get(OURS)
            if record["direction"] != direction or ours is None:
                continue
            bars = {
                PEERS[name].label: record["times"][name]["median"] / ours["median"]
                for name in PEERS
                if name != OURS and name in record["times"]
            }
            rows.append((f"{record['shape']}  {duration(ours['median'])}", bars))
        if rows:
            panels.append(Panel(direction, rows))
    if not panels:
        raise UserError("dcnv4 itself has no times, so there is nothing to draw")
    known = content["identity"]
    title = f"Times as multiples of dcnv4's: {first['level']} level, {first['dtype']}, offsets of sigma {first['sigma']:g} px"
    note = f"{machine(known)}; a bar to the left of 1x is faster; beside a shape stands dcnv4's time"
    draw(path, title, note, panels)


def machine(known: dict[str, Any]) -> str:
    threads = f", {known['threads']} CPU thread{'s' * (known['threads'] > 1)}" if known["threads"] else ""
    return f"{known['device']}{threads}, torch {known['torch']}"


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
