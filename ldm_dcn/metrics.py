"""What a run measures: one line of JSON each time, and TensorBoard or Weights & Biases when asked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpoint import replace_file
from .errors import UserError


class MetricsLog:
    """Appends to `folder/metrics.jsonl`; each line is flushed: a crash loses at most the one it cuts."""

    def __init__(
        self,
        folder: Path,
        step: int,
        trackers: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """`step` is where training goes on; later lines, from before a crash, are dropped."""
        path = folder / "metrics.jsonl"
        if path.exists():
            replace_file(
                path, "".join(json.dumps(line) + "\n" for line in read(path) if line["step"] <= step)
            )
        self._trackers = [_open_tracker(name, folder, step, settings or {}) for name in trackers]
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, **values: Any) -> None:
        """Values that JSON has no number for (NaN, infinity) are written as null."""
        known = {name: None if _is_no_number(value) else value for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **known}) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(values, step=step)

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.finish()


def _is_no_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that a crash cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def _open_tracker(name: str, folder: Path, step: int, settings: Mapping[str, Any]) -> Any:
    from accelerate.tracking import TensorBoardTracker, WandBTracker
    from accelerate.utils import is_tensorboard_available, is_wandb_available

    here = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}[name]()
    if not here:
        raise UserError(
            f"train.trackers names {name}, which is not installed; run `pip install {name}`, or leave it out"
        )
    if name == "tensorboard":
        tracker = TensorBoardTracker("tensorboard", logging_dir=folder, purge_step=step + 1)
    else:
        own = {"name": folder.name, "dir": str(folder), "id": _wandb_id(folder), "resume": "allow"}
        tracker = WandBTracker("ldm-dcn", **own)
    if hasattr(tracker, "start"):  # accelerate 1.8 and later; before, the constructor does it
        tracker.start()
    if name == "wandb":
        tracker.store_init_configuration(dict(settings))
    return tracker


def _wandb_id(folder: Path) -> str:
    """The same for every start of a run, so that its curves go on."""
    import uuid

    path = folder / "wandb_id"
    if not path.exists():
        replace_file(path, uuid.uuid4().hex[:8])
    return path.read_text(encoding="utf-8")
