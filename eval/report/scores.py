"""What eval.fid measured, with its tags: as tables, and quality against speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from ..columns import warnings_of
from . import plots
from .inputs import Column, Run, Scores, command_of, is_number, machine_of
from .markup import Markup, joined, tag
from .page import NOT_MEASURED, NOT_STATED, figure, missing, table
from .tags import DOES_NOT_APPLY, TAGS, in_precision, tag_cells, tags_of_column

# of a series in a chart: the run, what may differ within it, how its images were drawn
Which = tuple[str, ...]
SCORES = (
    ("sfd", "{:.4g}"),
    ("kid_x1000", "{:.3g}"),
    ("precision", "{:.4f}"),
    ("recall", "{:.4f}"),
    ("inception_score", "{:.4g}"),
    ("class_accuracy", "{:.4f}"),
    ("nearest_neighbour", "{:.4g}"),
    ("fd_of_noise", "{:.3%}"),
    ("images_per_second", "{:.1f}"),
)


def scores(runs: Sequence[Run], files: Mapping[Path, Scores]) -> Markup:
    """All numbers of all files, the eight tags beside each row."""
    parts = []
    if not files:
        parts.append(missing("Scores", "Run `python -m eval.fid RUN`, or give --scores FILE of it."))
    names = Counter(path.name for path in files)
    for path, content in files.items():
        name = path.name if names[path.name] == 1 else path
        parts += [tag("h3", f"{content.metric} ({name})"), _scores_of_a_file(content)]
    scored = {name for content in files.values() for column in content.columns for name in _names_of(column)}
    for run in runs if files else ():
        if run.name not in scored and run.model.name not in scored:
            parts.append(missing(f"Scores of {run.name}", "None of the files given has a column of it."))
    return joined(*parts, *_over_steps(files.values()))


def _scores_of_a_file(content: Scores) -> Markup:
    titles = {
        "sfd": content.names.get("sfd", "sFID"), "kid_x1000": f"{content.names.get('kid_x1000', 'KID')} x 1000",
        "precision": "precision", "recall": "recall",
        "inception_score": content.names.get("inception_score", "Inception score"), "class_accuracy": "class accuracy",
        "nearest_neighbour": f"nearest neighbour, {content.reference.get('nearest_neighbour_in', 'unit not stated')}",
        "fd_of_noise": f"share of noise's {content.metric}", "images_per_second": "images/s",
    }  # fmt: skip
    known = [(key, form) for key, form in SCORES if any(key in column.scores for column in content.columns)]
    rows, tag_rows = [], []
    for column in content.columns:
        tags = _tags(content, column)
        tag_rows.append((column.name, *tag_cells(tags)))
        if not any(tags.values()):  # a number without tags says nothing
            rows.append((column.name, *[NOT_MEASURED] * (1 + len(known))))
            continue
        values = [_formatted(column.scores.get("fd"), "{:.4g}")]
        values += [_formatted(column.scores.get(key), form) for key, form in known]
        if tags["sampler and steps"] == DOES_NOT_APPLY:  # nothing was drawn, so no speed is missing
            values = [
                DOES_NOT_APPLY if key == "images_per_second" else value
                for (key, _), value in zip([("fd", ""), *known], values, strict=True)
            ]
        rows.append((column.name, *values))
    body = joined(
        table(("", content.metric, *(titles[key] for key, _ in known)), rows),
        table(("tags of", *TAGS), tag_rows),
    )
    caption = (
        f"Lower {content.metric} is better; it falls as images are added, so compare at equal N. The second table holds the eight tags "
        "that all numbers of a row depend on; a dash stands where a tag does not apply: real images and noise are not drawn by a model."
    )
    warnings = warnings_of(content.columns, content.extractor)
    told = [tag("p", tag("strong", "Warning: "), text) for text in warnings]
    return joined(*told, figure(body, caption, command_of(content.environment)))


def _tags(content: Scores, column: Column) -> dict[str, str | None]:
    return tags_of_column(
        {"extractor": content.extractor, "reference": content.reference}, {"tags": column.tags}
    )


def _names_of(column: Column) -> tuple[str, ...]:
    return column.name, str(column.tags.get("run", "")), column.name.rpartition(" g=")[0]


def _formatted(value: float | None, form: str) -> str | None:
    return None if value is None else form.format(value)


def _over_steps(files: Iterable[Scores]) -> list[Markup]:
    """The distance over training steps, where several exports of a run were scored alike, one chart for each thing comparable."""
    charts: dict[tuple, dict[Which, dict[float, float]]] = {}
    commands: dict[tuple, list[str | None]] = {}
    for content in files:
        for column in content.columns:
            step, distance, tags = column.tags.get("step"), column.scores.get("fd"), _tags(content, column)
            if not (is_number(step) and is_number(distance) and "run" in column.tags):
                continue
            key = content.metric, *_comparable(tags)
            settings = f"guidance {tags['guidance'] or NOT_STATED}, {tags['sampler and steps'] or NOT_STATED}"
            series = str(column.tags["run"]), *_training_of(tags), settings
            charts.setdefault(key, {}).setdefault(series, {})[step] = distance
            commands.setdefault(key, []).append(command_of(content.environment))
    parts = []
    for key, found in charts.items():
        curves = {series: sorted(known.items()) for series, known in found.items() if len(known) > 1}
        if not curves:
            continue
        metric, weights, resize, number, reference = key
        names = _names_of_series(curves)
        chart = plots.lines([plots.Series(names[series], known) for series, known in curves.items()],
                            x="training step", y=f"{metric}, lower is better", title=f"{metric} of exports over training steps")  # fmt: skip
        caption = (
            f"Each line is one run, of which several exports were drawn from alike. Extractor {weights}; resize {resize}; "
            f"N {number}; reference {reference}."
        )
        parts.append(figure(chart, caption, _together(commands[key])))
    return [tag("h3", "Over training steps"), *parts] if parts else []


def _comparable(tags: Mapping[str, str | None]) -> tuple[str, ...]:
    return tuple(tags[key] or NOT_STATED for key in ("extractor's weights", "resize", "N", "reference"))


def _training_of(tags: Mapping[str, str | None]) -> tuple[str, ...]:
    """What tells series of one run apart, beside its steps."""
    return f"weights {tags['EMA'] or NOT_STATED}", f"seed {tags['seed'] or NOT_STATED}"


def _names_of_series(keys: Collection[Which]) -> dict[Which, str]:
    """The run, of what follows it that in which its series differ, and last how they were drawn."""
    names = {}
    for key in keys:
        own = [other for other in keys if other[0] == key[0]]
        told = [text for place, text in enumerate(key) if len({other[place] for other in own}) > 1]
        names[key] = ", ".join(dict.fromkeys([key[0], *told, key[-1]]))
    return names


def _together(commands: Iterable[str | None]) -> str | None:
    return "; ".join(dict.fromkeys(filter(None, commands))) or None


def quality(files: Sequence[Scores]) -> Markup:
    """The distance of each scored setting over how fast its images were drawn, one chart for each thing comparable."""
    charts: dict[tuple, dict[Which, list[tuple[float, float, str]]]] = {}
    commands: dict[tuple, list[str | None]] = {}
    for content in files:
        for column in content.columns:
            speed, distance = column.scores.get("images_per_second"), column.scores.get("fd")
            tags = _tags(content, column)
            if not (is_number(speed) and speed > 0 and is_number(distance) and any(tags.values())):
                continue
            key = (content.metric, *_comparable(tags), machine_of(content.environment))
            run = str(column.tags.get("run") or column.name)
            sampler = f"{column.tags.get('sampler', NOT_STATED)}{in_precision(column.tags)}"
            step = f"step {column.tags.get('step', NOT_STATED)}"
            name = run, step, *_training_of(tags), f"guidance {tags['guidance'] or NOT_STATED}, {sampler}"
            steps = column.tags.get("sampler_steps")
            about = NOT_STATED if steps is None else f"{steps} steps"
            charts.setdefault(key, {}).setdefault(name, []).append((speed, distance, about))
            commands.setdefault(key, []).append(command_of(content.environment))
    if not charts:
        return missing(
            "Quality against speed", "It needs --scores of runs, whose images eval.fid drew and timed."
        )
    parts = []
    for key, runs in charts.items():
        metric, weights, resize, number, reference, machine = key
        names = _names_of_series(runs)
        series = [
            plots.Series(
                names[which], [(x, y) for x, y, _ in sorted(known)], [about for _, _, about in sorted(known)]
            )
            for which, known in runs.items()
        ]
        chart = plots.points(series, x="images/s, to the right is faster", y=f"{metric}, lower is better",
                             title=f"{metric} against speed")  # fmt: skip
        caption = (
            f"Each point is one run drawn with the sampling steps beside it; down and right is better. Speed is that "
            f"of the same images, autoencoder included, on {machine}. Extractor {weights}; resize {resize}; N {number}; "
            f"reference {reference}."
        )
        parts.append(figure(chart, caption, _together(commands[key])))
    return joined(*parts)
