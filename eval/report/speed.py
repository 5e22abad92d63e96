"""What eval.throughput measured: times, memory, and where the time goes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..profile import KINDS
from ..throughput import ACTIVITIES
from . import plots
from .inputs import ProfileRecord, Throughput, command_of, machine_of
from .markup import Markup, joined, tag
from .page import NOT_STATED, figure, large, missing, table


def speed(files: Sequence[Throughput]) -> Markup:
    """Times, memory, and where the time goes."""
    timed = [content for content in files if content.figures]
    profiled = [content for content in files if content.profiles]
    parts = [tag("h3", "Forward, training step, sampling")]
    if not timed:
        parts.append(
            missing(
                "Throughput", "Run `python -m eval.throughput RUN --json FILE` and give --throughput FILE."
            )
        )
    parts += [_times(content) for content in timed]
    parts.append(tag("h3", "Where the time goes"))
    if not profiled:
        parts.append(missing("The profile by kind of module",
                             "Run `python -m eval.throughput RUN --profile --json FILE` and give --throughput FILE."))  # fmt: skip
    parts += [_profile(content) for content in profiled]
    return joined(*parts)


def _settings(content: Throughput) -> str:
    s, versions = content.settings, content.environment.get("versions")
    torch = versions.get("torch", NOT_STATED) if isinstance(versions, dict) else NOT_STATED
    return (
        f"Batch {s.get('batch_size', NOT_STATED)}, {s.get('precision', NOT_STATED)}, {s.get('rounds', NOT_STATED)} rounds, on "
        f"{machine_of(content.environment)}, torch {torch}"
    )


def _times(content: Throughput) -> Markup:
    batch = content.settings.get("batch_size")
    rows, bars = [], []
    for name, title in ACTIVITIES.items():
        own = {
            f.name: statistics.median(f.timings[name].seconds) for f in content.figures if name in f.timings
        }
        if not own:
            continue
        rows.append(
            (
                f"{title}, ms",
                *(f"{1e3 * own[f.name]:,.1f}" if f.name in own else None for f in content.figures),
            )
        )
        if isinstance(batch, int) and batch > 0:
            rows.append(
                (
                    f"{title}, images/s",
                    *(f"{batch / own[f.name]:,.1f}" if f.name in own else None for f in content.figures),
                )
            )
            bars.append((title, {name: 1e3 * seconds / batch for name, seconds in own.items()}))
    counted = (
        ("parameters", lambda f: f"{f.parameters:,}"),
        ("MACs of a forward, one image", lambda f: large(f.macs)),
        ("weights, gradients, AdamW, EMA", lambda f: _mebibytes(f.state_bytes)),
        ("activations kept for backward", lambda f: _mebibytes(f.activation_bytes)),
        ("peak memory of a training step", lambda f: _mebibytes(f.peak_bytes)),
    )
    rows += [(title, *(form(f) for f in content.figures)) for title, form in counted]
    chart = plots.bars(bars, title="Milliseconds an image", form=lambda v: f"{v:.3g} ms", about="ms an image, lower is better",
                       own_scale=True) if bars else None  # fmt: skip
    caption = (
        f"Medians over rounds in which all models took turns, each group of bars on a scale of its own. {_settings(content)}; "
        f"sampling with {content.settings.get('sampler', NOT_STATED)}, {content.settings.get('sampler_steps', NOT_STATED)} steps, guidance "
        f"{content.settings.get('guidance', NOT_STATED)}."
    )
    return figure(
        joined(chart, table(("", *(f.name for f in content.figures)), rows)),
        caption,
        command_of(content.environment),
    )


def _mebibytes(count: int | None) -> str | None:
    return None if count is None else f"{count / 2**20:,.1f} MiB"


def _profile(content: Throughput) -> Markup:
    charts = []
    kinds = [
        *KINDS,
        *(kind for p in content.profiles for kind in p.seconds.get("forward", {}) if kind not in KINDS),
    ]
    for direction in ("forward", "backward"):
        rows = []
        for kind in dict.fromkeys(kinds):
            values = {p.name: _kind_ms(p, direction, kind) for p in content.profiles}
            if any(values.values()):
                rows.append((kind, values))
        charts.append(tag("div", tag("h4", direction),
                          plots.bars(rows, title=f"{direction} by kind of module", form=lambda v: f"{v:.3g} ms")))  # fmt: skip
    header = ["ms"]
    for p in content.profiles:
        header += [f"{p.name}: modules", "forward", "backward"]
    rows = []
    for kind in dict.fromkeys(kinds):
        row = [kind]
        for p in content.profiles:
            row.append(str(p.modules[kind]) if kind in p.modules else "–")
            row += [f"{_kind_ms(p, direction, kind):,.2f}" for direction in ("forward", "backward")]
        rows.append(row)
    for title, which in (("whole pass, with marks", "marked"), ("whole pass, without", "plain")):
        row = [title]
        for p in content.profiles:
            whole = getattr(p, which)
            row += [
                "–",
                *(
                    f"{1e3 * statistics.median(whole[d]):,.2f}" if whole.get(d) else None
                    for d in ("forward", "backward")
                ),
            ]
        rows.append(row)
    caption = (
        f"Milliseconds of one pass as in training, by kind of module; a module's time is its own, without that of the modules it "
        f"calls. The rest is sums, concatenations, activations and Python. What the marks cost is the difference of the last two "
        f"rows. {_settings(content)}."
    )
    return figure(
        joined(tag("div", *charts, class_="side"), table(header, rows)),
        caption,
        command_of(content.environment),
    )


def _kind_ms(profile: ProfileRecord, direction: str, kind: str) -> float:
    seconds = profile.seconds.get(direction, {}).get(kind)
    return 1e3 * statistics.median(seconds) if seconds else 0.0
