"""The folder of a run: what a run keeps there, and where another may not begin."""

from __future__ import annotations

from pathlib import Path

from . import export
from .config import load_config
from .errors import UserError
from .metrics import read

FILES = ("config.yaml", "provenance.jsonl", "metrics.jsonl")
FOLDERS = ("checkpoints", "averages", "samples", export.EXPORT)


def check_names(folder: Path) -> None:
    """Refuse a run folder in which something else has the name of what a run writes, before days of training."""
    mend = "move it away, or choose another run.name"
    for name in FILES:
        if (folder / name).exists() and not (folder / name).is_file():
            raise UserError(f"{folder / name} is a folder, and a run keeps a file there; {mend}")
    for name in FOLDERS:
        place = folder / name
        if place.exists() and not place.is_dir():
            raise UserError(f"{place} is a file, and a run keeps a folder there; {mend}")
    for place in (folder / "checkpoints", folder / "averages"):
        for path in place.glob("step-*"):
            if not path.is_dir():
                raise UserError(f"{path} is a file, and a run keeps a folder there; {mend}")


def check_past(folder: Path) -> None:
    """Refuse to start at step 0 where a run has been: it would drop the metrics and replace the export.

    A run that ended before its first save has lost nothing that the same command does not make again.
    """
    has = None
    if (folder / export.EXPORT).exists():
        has = f"an export of step {export.exported_step(folder)}"
    elif (folder / "metrics.jsonl").exists():
        step = max((line["step"] for line in read(folder / "metrics.jsonl")), default=0)
        has = f"{step} steps in metrics.jsonl" if step > _first_save(folder) else None
    if has is not None:
        raise UserError(
            f"{folder} has {has} and no checkpoint to go on from; bring {folder / 'checkpoints'} back, choose another "
            f"run.name, or delete {folder} to start again from step 0"
        )


def _first_save(folder: Path) -> int:
    """The step of a run's first checkpoint; 0 where its config does not tell."""
    try:
        settings = load_config(folder / "config.yaml").train
    except UserError:
        return 0
    return settings.save_every or settings.steps
