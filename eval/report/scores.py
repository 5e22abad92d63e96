"""What eval.fid measured, with its tags: as tables, and quality against speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from . import plots
from .inputs import Column, Run, Scores, command_of, is_number, machine_of
from .markup import Markup, joined, tag
from .page import NOT_MEASURED, NOT_STATED, figure, missing, table
from .tags import DOES_NOT_APPLY, TAGS, in_precision, tag_cells, tags_of_column

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
        parts.append(missing("Scores", "Run `python -m eval.fid RUN --json FILE` and give --scores FILE."))
    for path, content in files.items():
        parts += [tag("h3", f"{content.metric} ({path.name})"), _scores_of_a_file(content)]
    scored = {name for content in files.values() for column in content.columns for name in _names_of(column)}
    for run in runs if files else ():
        if run.name not in scored and run.model.name not in scored:
            parts.append(missing(f"Scores of {run.name}", "None of the files given has a column of it."))
    return joined(*parts)


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
    return figure(body, caption, command_of(content.environment))


def _tags(content: Scores, column: Column) -> dict[str, str | None]:
    return tags_of_column(
        {"extractor": content.extractor, "reference": content.reference}, {"tags": column.tags}
    )


def _names_of(column: Column) -> tuple[str, ...]:
    return column.name, str(column.tags.get("run", "")), column.name.rpartition(" g=")[0]


def _formatted(value: float | None, form: str) -> str | None:
    return None if value is None else form.format(value)


def quality(files: Sequence[Scores]) -> Markup:
    """The distance of each scored setting over how fast its images were drawn, one chart for each thing comparable."""
    charts: dict[tuple, dict[str, list[tuple[float, float, str]]]] = {}
    commands: dict[tuple, list[str | None]] = {}
    for content in files:
        for column in content.columns:
            speed, distance = column.scores.get("images_per_second"), column.scores.get("fd")
            tags = _tags(content, column)
            if not (is_number(speed) and speed > 0 and is_number(distance) and any(tags.values())):
                continue
            same = tuple(
                tags[key] or NOT_STATED for key in ("extractor's weights", "resize", "N", "reference")
            )
            key = (content.metric, *same, machine_of(content.environment))
            run = str(column.tags.get("run") or column.name)
            sampler = f"{column.tags.get('sampler', NOT_STATED)}{in_precision(column.tags)}"
            name = f"{run}, guidance {tags['guidance'] or NOT_STATED}, {sampler}"
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
        series = [
            plots.Series(
                name, [(x, y) for x, y, _ in sorted(known)], [about for _, _, about in sorted(known)]
            )
            for name, known in runs.items()
        ]
        chart = plots.points(series, x="images/s, to the right is faster", y=f"{metric}, lower is better",
                             title=f"{metric} against speed")  # fmt: skip
        caption = (
            f"Each point is one run drawn with the sampling steps beside it; down and right is better. Speed is that "
            f"of the same images, autoencoder included, on {machine}. Extractor {weights}; resize {resize}; N {number}; "
            f"reference {reference}."
        )
        made = "; ".join(dict.fromkeys(command for command in commands[key] if command)) or None
        parts.append(figure(chart, caption, made))
    return joined(*parts)
