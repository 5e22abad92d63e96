"""What eval.study found: tables with spreads and p values, what differs and what does not, curves, and quality against speed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..comparison import SIGNIFICANT, in_all, rows_of, time_ratio, verdicts
from ..protocol import Study, comparisons_of
from . import plots
from .inputs import command_of, environments, machine_of
from .markup import Markup, joined, tag
from .page import LIGHT, data_uri, figure, missing, table
from .tags import beside_guidance, in_precision

Runs = dict[str, list[dict[str, Any]]]  # of variants, by their labels


def studies(files: Mapping[Path, dict[str, Any]]) -> Markup:
    """A part for each file."""
    if not files:
        return missing("Studies", "Run `python -m eval.study STUDY.yaml --json FILE` and give --study FILE.")
    return joined(*(_study(path, content) for path, content in files.items()))


def _study(path: Path, content: dict[str, Any]) -> Markup:
    study = Study.model_validate(content["study"])
    command = command_of(*_made_with(content))
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
    parts.append(_pictures(path, study, content, command))
    for part in (_losses, _distances, _quality):
        parts += [part(study, title, runs, content, command) for title, runs in _groups(study, content)]
    if not any(run["distances"] for run in content["runs"]):
        parts.append(missing("Fréchet distance on the way", "The study trains without train.score_every=N."))
    return joined(*parts)


def _protocol(study: Study, content: dict[str, Any]) -> str:
    run = content["runs"][0]
    return (
        f"Mean ± standard deviation over seeds; p: exact permutation test against the first column, * below {SIGNIFICANT}, not "
        f"corrected for the number of tests: {in_all(content)}. {_tags(study, content)}, {run['tags']['step']} training steps; on "
        f"{machine_of(*_made_with(content))}.{_speed_settings(content)}"
    )


def _made_with(content: dict[str, Any]) -> list[dict[str, Any]]:
    return environments(content["environment"], (run.get("environment") for run in content["runs"]))


def _speed_settings(content: dict[str, Any]) -> str:
    speed = content.get("speed", {})
    settings = speed.get("settings")
    if not settings:
        return ""
    return (
        f" Times: medians over {settings['rounds']} rounds in which all took turns, batch {settings['batch_size']}, "
        f"{settings['precision']}, on {machine_of(speed['environment'])}."
    )


def _tags(study: Study, content: dict[str, Any]) -> str:
    """What all distances of the study depend on, beside the scale of guidance."""
    run, scoring = content["runs"][0], study.scoring
    guidance = beside_guidance(run["tags"])
    return (
        f"{run['metric']}, extractor {run['extractor']['name']} (weights {run['extractor']['weights']}, resize "
        f"{run['extractor']['resize']}), N {run['tags']['N']}, reference {run['reference'].get('source')}, {scoring.sampler} "
        f"{scoring.steps} steps{in_precision(run['tags'])}, sampling seed {scoring.seed}, {run['tags']['weights']}"
        f"{f', guidance{guidance[1:]}' if guidance else ''}"
    )


def _runs(study: Study, content: dict[str, Any], names: Sequence[str] | None = None) -> Runs:
    """The runs of each variant that has some, by its label; of `names`, in their order, or of all."""
    found: Runs = {}
    for name in names or study.variants:
        own = [run for run in content["runs"] if run["variant"] == name]
        if own:
            found[study.variants[name].label or name] = own
    return found


def _groups(study: Study, content: dict[str, Any]) -> list[tuple[str, Runs]]:
    """What stands in one chart, under a title: all variants, or where colours do not suffice a comparison's."""
    everything = _runs(study, content)
    if len(everything) <= len(LIGHT):
        return [("", everything)]
    groups = ((f", {title}", _runs(study, content, names)) for title, names in comparisons_of(study).items())
    return [(title, runs) for title, runs in groups if len(runs) > 1]


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


def _losses(study: Study, title: str, runs: Runs, content: dict[str, Any], command: str | None) -> Markup:
    series = [plots.Series(label, _mean_curve(own, "losses")) for label, own in runs.items()]
    chart = plots.lines(series, x="training step", y="loss", title=f"Loss over training steps{title}")
    caption = "Training loss, mean over seeds. Variants of one seed see the same samples, noise and times."
    return joined(tag("h4", f"Loss{title}"), figure(chart, caption, command))


def _distances(
    study: Study, title: str, runs: Runs, content: dict[str, Any], command: str | None
) -> Markup | None:
    curves = {label: _mean_curve(own, "distances") for label, own in runs.items()}
    curves = {label: curve for label, curve in curves.items() if curve}
    if not curves:
        return None
    tags = next(run["distance_tags"] for own in runs.values() for run in own if run["distances"])
    metric = tags["metric"]
    series = [plots.Series(label, curve) for label, curve in curves.items()]
    chart = plots.lines(series, x="training step", y=metric, title=f"{metric} over training steps{title}")
    told = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in tags.items() if key != "metric")
    caption = f"{metric} of few images, measured while training, mean over seeds: {told}."
    return joined(tag("h4", f"Fréchet distance on the way{title}"), figure(chart, caption, command))


def _mean_curve(runs: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, mean over the runs that have that step)."""
    values: dict[float, list[float]] = {}
    for run in runs:
        for step, value in run[key]:
            values.setdefault(step, []).append(value)
    return [(step, statistics.fmean(own)) for step, own in sorted(values.items()) if len(own) == len(runs)]


def _quality(
    study: Study, title: str, runs: Runs, content: dict[str, Any], command: str | None
) -> Markup | None:
    """Every run's distance over the time of a training step, as a multiple of the first variant's."""
    figures = {figure["name"]: figure for figure in content.get("speed", {}).get("figures", [])}
    known = {label: own for label, own in runs.items() if own[0]["variant"] in figures}
    if not known:
        return None
    first = next(iter(known.values()))[0]["variant"]
    scale = f"{study.scoring.guidance[0]:g}"
    series = []
    for label, own in known.items():
        ratio = time_ratio(figures[own[0]["variant"]], figures[first], "training")
        points = sorted((ratio, run["scores"][scale]["fd"]) for run in own)
        series.append(plots.Series(label, points))
    metric = content["runs"][0]["metric"]
    chart = plots.points(series, x="time of a training step, to the left is faster", y=f"{metric}, lower is better",
                         title=f"{metric} against the time of a training step{title}")  # fmt: skip
    caption = (
        f"A point a seed; times as multiples of {next(iter(known))}'s in the same rounds. Guidance {scale}, {_tags(study, content)}."
        f"{_speed_settings(content)}"
    )
    return joined(tag("h4", f"Quality against speed{title}"), figure(chart, caption, command))
