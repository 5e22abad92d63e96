"""Sample grids: every run draws the same labels from the same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm_dcn.model import Model
from ldm_dcn.pictures import save_grid
from ldm_dcn.sampling import generate

from .drawing import Drawing
from .inputs import Run
from .markup import Markup, tag
from .page import NOT_STATED, data_uri, figure


def grid(run: Run, model: Model, drawing: Drawing, file: Path) -> Markup:
    """One of `samples`, which `file` keeps as a PNG too; `model` is the run's, loaded."""
    conditions = drawing.conditions(model)
    rows = 1 if conditions is None else len(conditions)
    repeated = None if conditions is None else conditions.repeat_interleave(len(drawing.seeds), 0)
    images = generate(model, repeated, list(drawing.seeds) * rows, sampler=drawing.sampler, steps=drawing.steps,
                      guidance=drawing.guidance)  # fmt: skip
    save_grid(images, len(drawing.seeds), file)
    if model.denoiser.takes_text:
        what = "rows: " + "; ".join(repr(prompt) for prompt in drawing.prompts)
    else:
        what = (
            "without a condition" if conditions is None else f"rows: labels {_named(drawing.labels, model)}"
        )
    picture = tag("img", src=data_uri(file.read_bytes()), alt=f"Samples of {run.name}, {what}")
    return tag("div", tag("h4", run.name, tag("span", f" ({what})")), picture, class_="grid")


def samples(
    runs: Sequence[Run], grids: Sequence[Markup], files: Sequence[Path], drawing: Drawing, command: str
) -> Markup:
    """The `grids` of all runs, from the same seeds and labels, one beside the other."""
    weights = (f"{run.name} {run.model.tags.get('weights', NOT_STATED)}" for run in runs)
    same = "The same seeds, labels and settings for all runs: an image differs from its neighbour's at the same place by the network alone. "
    caption = (
        f"{same if len(runs) > 1 else ''}Columns: seeds {_list(drawing.seeds)}; {drawing.sampler}, {drawing.steps} steps, guidance "
        f"{drawing.guidance:g}; weights: {', '.join(weights)}. Also {', '.join(file.name for file in files)}."
    )
    return figure(tag("div", *grids, class_="side"), caption, command)


def _named(labels: Sequence[int], model: Model) -> str:
    """The labels, with the names of their classes where these say more than the numbers."""
    names = dict(enumerate(model.class_names))
    if all(names.get(label, str(label)) == str(label) for label in labels):
        return _list(labels)
    # a folder's name may be no UTF-8, in which a page is written
    texts = (f"{label} {names.get(label, '')}".encode("utf-8", "replace").decode() for label in labels)
    return ", ".join(map(str.strip, texts))


def _list(numbers: Sequence[int]) -> str:
    whole = list(numbers)
    if len(whole) > 2 and whole == list(range(whole[0], whole[0] + len(whole))):
        return f"{whole[0]} to {whole[-1]}"
    return ", ".join(map(str, whole))
