"""The eight tags of a score: what it depends on beside the images, and without which it means nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .markup import tag
from .page import NOT_STATED

TAGS = (
    "extractor's weights",
    "resize",
    "N",
    "reference",
    "guidance",
    "sampler and steps",
    "EMA",
    "seed",
)
DOES_NOT_APPLY = "–"  # the images were not drawn by a model


def tags_of_column(content: Mapping[str, Any], column: Mapping[str, Any]) -> dict[str, str | None]:
    """The tags of one column of a file of `eval.fid`; None where the file does not state one.

    A column without any tags of its own has none at all: what the file says of its extractor is no tag of that number.
    """
    own = column.get("tags")
    if not isinstance(own, Mapping) or not own:
        return dict.fromkeys(TAGS)
    extractor, reference = _mapping(content.get("extractor")), _mapping(content.get("reference"))
    name, weights = extractor.get("name"), extractor.get("weights")
    drawn = "sampler" in own or "run" in own
    real_or_noise = not drawn and ("reference" in own or own.get("source") == "uniform pixels")
    resize = [str(value) for value in (extractor.get("resize"), own.get("uint8")) if value is not None]
    found = {
        "extractor's weights": None if weights is None else f"{name} {weights}",
        "resize": ", ".join(resize) if extractor.get("resize") is not None else None,
        "N": own.get("N"),
        "reference": own.get("reference") or _reference(reference),
        "guidance": _guidance(own),
        "sampler and steps": _sampler(own),
        "EMA": own.get("weights") if drawn else None,
        "seed": own.get("seed"),
    }
    if real_or_noise:
        for key in ("guidance", "sampler and steps", "EMA", "seed"):
            found[key] = DOES_NOT_APPLY if found[key] is None else found[key]
    return {key: None if value is None else str(value) for key, value in found.items()}


def tags_of_line(line: Mapping[str, Any], extractor: str) -> dict[str, str | None]:
    """The tags of a Frechet distance that a run measured on the way, from its line of metrics.jsonl."""
    weights = line.get("extractor_weights")
    found = {
        "extractor's weights": None if weights is None else f"{extractor} {weights}",
        "resize": line.get("resize"),
        "N": line.get("N"),
        "reference": line.get("reference"),
        "guidance": _guidance(line),
        "sampler and steps": _sampler(line),
        "EMA": line.get("weights"),
        "seed": line.get("seed"),
    }
    return {key: None if value is None else str(value) for key, value in found.items()}


def tag_cells(tags: Mapping[str, str | None]) -> list[object]:
    """Cells of a table; long ones may wrap."""
    long = ("resize", "reference")
    return [
        tag("td", value, class_="words") if value and key in long else value or NOT_STATED
        for key, value in tags.items()
    ]


def _guidance(tags: Mapping[str, Any]) -> str | None:
    return None if tags.get("guidance") is None else f"{_short(tags['guidance'])}{beside_guidance(tags)}"


def beside_guidance(tags: Mapping[str, Any]) -> str:
    """Where guidance works and what is taken back of it, as far as that is not everywhere and nothing."""
    interval, rescale = tags.get("guidance_interval"), tags.get("guidance_rescale")
    partial = isinstance(interval, list) and len(interval) == 2 and interval != [0, 1]
    times = f", at {_short(interval[0])} to {_short(interval[1])} of the times" if partial else ""
    return f"{times}, rescaled by {_short(rescale)}" if rescale else times


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _sampler(tags: Mapping[str, Any]) -> str | None:
    if tags.get("sampler") is None or tags.get("sampler_steps") is None:
        return None
    return f"{tags['sampler']}, {tags['sampler_steps']} steps{in_precision(tags)}"


def in_precision(tags: Mapping[str, Any]) -> str:
    """What images were drawn in, where it is not fp32: files from before there was a choice do not state it."""
    precision = tags.get("precision") or "fp32"
    return "" if precision == "fp32" else f", {precision}"


def _reference(about: Mapping[str, Any]) -> str | None:
    source = about.get("source") or about.get("statistics")
    if source is None:
        return None
    return f"{source}, {about['images']} images" if about.get("images") is not None else str(source)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
