"""How training went: the loss, and the Frechet distance that runs measure on the way."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence

from . import plots
from .inputs import Run, is_number
from .markup import Markup, joined, tag
from .page import figure, missing, table
from .tags import TAGS, tag_cells, tags_of_line

SMOOTH = 20  # logged losses that a smoothed one is the mean of


def curves(runs: Sequence[Run]) -> Markup:
    """Loss, and the Frechet distance that runs measured on the way."""
    return joined(
        tag("h3", "Loss"), _losses(runs), tag("h3", "Fréchet distance on the way"), *_distances(runs)
    )


def _losses(runs: Sequence[Run]) -> Markup:
    series, absent = [], []
    for run in runs:
        known = [(line["step"], float(line["loss"])) for line in run.lines if is_number(line.get("loss"))]
        if not known:
            absent.append(missing(f"Loss of {run.name}", "Its folder has no metrics.jsonl with losses: give the run folder, not the export."))  # fmt: skip
            continue
        window = max(1, min(SMOOTH, len(known) // 12))
        if window > 1:
            series.append(plots.Series(run.name, known, faint=True))
        series.append(plots.Series(run.name, plots.smoothed(known, window)))
        held_out = [
            (line["step"], float(line["validation_loss"]))
            for line in run.lines
            if is_number(line.get("validation_loss"))
        ]
        if held_out:
            series.append(plots.Series(f"{run.name}, held out", held_out))
    if not series:
        return joined(*absent)
    predictions = {run.model.schedule.prediction for run in runs}
    comparable = "" if len(predictions) == 1 else (
        f" The runs predict different things ({', '.join(sorted(predictions))}): their losses do not compare."
    )  # fmt: skip
    chart = plots.lines(series, x="training step", y="loss", title="Loss over training steps")
    caption = f"Training loss: means over up to {SMOOTH} logged values around each, fewer in short runs; the values stand faint behind them. Held out: the averaged weights' loss on images that were not trained on, where train.validate_every was on.{comparable}"
    return joined(figure(chart, caption, _training_commands(runs)), *absent)


def _distances(runs: Sequence[Run]) -> list[Markup]:
    by_extractor: dict[str, dict[tuple, list[tuple[float, float]]]] = {}
    untagged, measured = [], set()
    for run in runs:
        for line in run.lines:
            for key, value in line.items():
                if not key.startswith("fd_") or not is_number(value):
                    continue
                extractor = key.removeprefix("fd_")
                tags = tags_of_line(line, extractor)
                if not any(tags.values()):
                    untagged.append(run.name)
                    continue
                # A run that was gone on with under other settings makes two curves.
                which = (run.name, *tags.values())
                by_extractor.setdefault(extractor, {}).setdefault(which, []).append(
                    (line["step"], float(value))
                )
                measured.add(run.name)
    parts = []
    for extractor, found in by_extractor.items():
        seen: Counter[str] = Counter()
        series = []
        for which, points in found.items():
            seen[which[0]] += 1
            name = which[0] if seen[which[0]] == 1 else f"{which[0]}, line {seen[which[0]]} of the table"
            series.append(plots.Series(name, points))
        metric = f"FD-{extractor}"  # of few images, never the FID of the literature
        chart = plots.lines(series, x="training step", y=metric, title=f"{metric} over training steps")
        rows = [
            (which[0], f"{points[-1][1]:.4g}", *tag_cells(dict(zip(TAGS, which[1:], strict=True))))
            for which, points in found.items()
        ]
        caption = (
            f"{metric} of few images of the averaged weights, measured while training. It is for watching one run: it falls as "
            "images are added, and compares only between lines whose tags, in the table below the chart, agree."
        )
        body = joined(chart, table(("run", f"last {metric}", *TAGS), rows))
        parts.append(figure(body, caption, _training_commands([run for run in runs if run.name in measured])))
    for run in runs:
        if run.name not in measured:
            why = (
                "Its lines carry no tags."
                if run.name in untagged
                else "Train with train.score_every=N to have it."
            )
            parts.append(missing(f"Fréchet distance of {run.name} on the way", why))
    return parts


def _training_commands(runs: Sequence[Run]) -> str | None:
    commands = []
    for run in runs:
        own = run.provenance[-1].get("command") if run.provenance else None
        if isinstance(own, list) and own:
            commands.append(shlex.join(["python", *map(str, own)]))
    return "; ".join(dict.fromkeys(commands)) or None
