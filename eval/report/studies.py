"""What eval.study found: tables with spreads and p values, what differs and what does not, curves, and quality against speed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..study import SIGNIFICANT, Study, comparisons_of, rows_of, verdicts
from . import plots
from .inputs import command_of, machine_of
from .markup import Markup, joined, tag
from .page import data_uri, figure, missing, table


def studies(files: Mapping[Path, dict[str, Any]]) -> Markup:
    """A part for each file."""
    if not files:
        return missing("Studies", "Run `python -m eval.study STUDY.yaml --json FILE` and give --study FILE.")
    return joined(*(_study(path, content) for path, content in files.items()))


def _study(path: Path, content: dict[str, Any]) -> Markup:
    study = Study.model_validate(content["study"])
    command = command_of(content["environment"])
    parts = [tag("h3", study.question)]
    sentences = verdicts(content)
    if sentences:
        parts.append(tag("ul", *(tag("li", sentence) for sentence in sentences)))
    protocol = _protocol(study, content)
    for title, names in comparisons_of(study).items():
        present = [name for name in names if any(run["variant"] == name for run in content["runs"])]
        for scale in study.scoring.guidance if present else ():
            header, *rows = rows_of(content, present, f"{scale:g}")
            caption = f"{path.name}, {title}, guidance {scale:g}. {protocol}"
            parts += [
                tag("h4", f"{title}, guidance {scale:g}"),
                figure(table(header, rows), caption, command),
            ]
    parts += [_pictures(path, study, content, command), _losses(study, content, command)]
    parts += [_distances(study, content, command), _quality(study, content, command)]
    return joined(*parts)


def _protocol(study: Study, content: dict[str, Any]) -> str:
    run, scoring = content["runs"][0], study.scoring
    return (
        f"Mean ± standard deviation over seeds; p: exact permutation test against the first column, * below {SIGNIFICANT}, not "
        f"corrected for the number of tests. {run['metric']}, extractor {run['extractor']['name']} (weights "
        f"{run['extractor']['weights']}, resize {run['extractor']['resize']}), N {run['tags']['N']}, reference "
        f"{run['reference'].get('source')}, {scoring.sampler} {scoring.steps} steps, sampling seed {scoring.seed}, "
        f"{run['tags']['weights']}, {run['tags']['step']} training steps; on {machine_of(content['environment'])}."
    )


def _runs(study: Study, content: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each variant that has some, by its label."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in content["runs"]:
        found.setdefault(study.variants[run["variant"]].label or run["variant"], []).append(run)
    return found


def _pictures(path: Path, study: Study, content: dict[str, Any], command: str | None) -> Markup | None:
    """Grids that the study drew, which lie in a folder beside its results."""
    shown = []
    for label, runs in _runs(study, content).items():
        file = path.with_suffix("") / f"{runs[0]['variant']}.png"
        if file.is_file():
            picture = tag("img", src=data_uri(file.read_bytes()), alt=f"samples of {label}", class_="pixels")
            shown.append(tag("div", tag("h4", label), picture, class_="grid"))
    if not shown:
        return None
    caption = "Samples of each variant's first seed, from the same starting noise: a row a class."
    return joined(tag("h4", "Samples"), figure(tag("div", *shown, class_="side"), caption, command))


def _losses(study: Study, content: dict[str, Any], command: str | None) -> Markup:
    series = [
        plots.Series(label, _mean_curve(runs, "losses")) for label, runs in _runs(study, content).items()
    ]
    chart = plots.lines(series, x="training step", y="loss", title="Loss over training steps")
    caption = "Training loss, mean over seeds. Variants of one seed see the same samples, noise and times."
    return joined(tag("h4", "Loss"), figure(chart, caption, command))


def _distances(study: Study, content: dict[str, Any], command: str | None) -> Markup | None:
    curves = {label: _mean_curve(runs, "distances") for label, runs in _runs(study, content).items()}
    curves = {label: curve for label, curve in curves.items() if curve}
    if not curves:
        return None
    tags = next(run["distance_tags"] for run in content["runs"] if run["distances"])
    metric = tags["metric"]
    series = [plots.Series(label, curve) for label, curve in curves.items()]
    chart = plots.lines(series, x="training step", y=metric, title=f"{metric} over training steps")
    told = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in tags.items() if key != "metric")
    caption = f"{metric} of few images, measured while training, mean over seeds: {told}."
    return joined(tag("h4", "Fréchet distance on the way"), figure(chart, caption, command))


def _mean_curve(runs: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, mean over the runs that have that step)."""
    values: dict[float, list[float]] = {}
    for run in runs:
        for step, value in run[key]:
            values.setdefault(step, []).append(value)
    return [(step, statistics.fmean(own)) for step, own in sorted(values.items()) if len(own) == len(runs)]


def _quality(study: Study, content: dict[str, Any], command: str | None) -> Markup | None:
    """Every run's distance over the time of a training step, as a multiple of the first variant's."""
    figures = {figure["name"]: figure for figure in content.get("speed", {}).get("figures", [])}
    known = {label: runs for label, runs in _runs(study, content).items() if runs[0]["variant"] in figures}
    if not known:
        return None
    first = next(iter(known.values()))[0]["variant"]
    base = statistics.median(figures[first]["timings"]["training"]["seconds"])
    scale = f"{study.scoring.guidance[0]:g}"
    series = []
    for label, runs in known.items():
        seconds = statistics.median(figures[runs[0]["variant"]]["timings"]["training"]["seconds"])
        series.append(
            plots.Series(label, sorted((seconds / base, run["scores"][scale]["fd"]) for run in runs))
        )
    metric = content["runs"][0]["metric"]
    chart = plots.points(series, x="time of a training step, to the left is faster", y=f"{metric}, lower is better",
                         title=f"{metric} against the time of a training step")  # fmt: skip
    caption = (
        f"A point a seed, at guidance {scale}; times as multiples of the first variant's, medians of rounds in which all took "
        f"turns, on {machine_of(content['speed']['environment'])}."
    )
    return joined(tag("h4", "Quality against speed"), figure(chart, caption, command))
