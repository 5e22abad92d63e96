"""What a run measures: one line of JSON each time, and TensorBoard or Weights & Biases when asked."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .errors import UserError
from .files import naming, replace_file

PROJECT = "ldm-dcn"  # at Weights & Biases, where WANDB_PROJECT names no other: what `wandb.init` is told would win over it
LAYOUT = {"tensorboard": {"dataformats": "NHWC"}}  # of pictures, where a tracker has to be told


class MetricsLog:
    """Appends to `folder/metrics.jsonl`; each line is written at once: a crash loses at most the one it cuts.

    Lines for which there was no room wait for the next that can be written.
    """

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
            kept = "".join(json.dumps(line) + "\n" for line in read(path) if line["step"] <= step)
            if (
                kept.encode() != path.read_bytes()
            ):  # on a full disk a run that has ended can still be asked for
                replace_file(path, kept)
        self._trackers = [_open_tracker(name, folder, step, settings or {}) for name in trackers]
        self._file = path.open(
            "ab", buffering=0
        )  # a buffer would keep half a line, and fail again when closed
        self._waiting = b""

    def write(self, step: int, **values: Any) -> None:
        """Values that JSON has no number for (NaN, infinity) are written as null. Raises OSError or `UserError` where they cannot be."""
        known = {name: None if _is_no_number(value) else value for name, value in values.items()}
        self._waiting += json.dumps({"step": step, **known}).encode() + b"\n"
        failed = self._tell("values", lambda tracker: tracker.log(values, step=step))
        self._append()
        if failed is not None:
            raise failed

    def show(self, step: int, name: str, picture: Path) -> None:
        """Give the trackers a picture file, grey or RGB. Raises `UserError` where one does not take it."""
        if not self._trackers:
            return
        with Image.open(picture) as opened:
            pixels = np.array(opened.convert("RGB"))[None]
        failed = self._tell(
            "picture",
            lambda tracker: tracker.log_images({name: pixels}, step=step, **LAYOUT.get(tracker.name, {})),
        )
        if failed is not None:
            raise failed

    def _tell(self, what: str, tell: Callable[[Any], None]) -> UserError | None:
        """`tell` each tracker; the last failure, which keeps nothing from the others."""
        failed = None
        for tracker in self._trackers:
            try:
                tell(tracker)
            except Exception as error:  # of a program that is not ours: its network, its disk
                failed = UserError(f"{tracker.name} took no {what}: {error}")
        return failed

    def _append(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        try:
            with naming(Path(self._file.name)):
                written = self._file.write(self._waiting)
            if written != len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
        except OSError:
            with suppress(OSError):
                self._file.truncate(size)
            raise
        self._waiting = b""

    def close(self) -> None:
        with suppress(OSError):
            if self._waiting:
                self._append()
        self._file.close()
        for tracker in self._trackers:
            with suppress(OSError):  # the run is over and saved
                tracker.finish()


def _is_no_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that a crash cut short, or that is no such line, is left out."""
    lines = []
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
    return lines


def check_trackers(names: Sequence[str]) -> None:
    """Raise `UserError` for a tracker whose package is missing."""
    from accelerate.utils import is_tensorboard_available, is_wandb_available

    here = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    for name in names:
        if not here[name]():
            raise UserError(
                f"train.trackers names {name}, which is not installed; run `pip install -c constraints.txt {name}`, or leave it out"
            )


def _open_tracker(name: str, folder: Path, step: int, settings: Mapping[str, Any]) -> Any:
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    check_trackers([name])
    if name == "tensorboard":
        tracker = TensorBoardTracker("tensorboard", logging_dir=folder, purge_step=step + 1)
    else:
        own = {"name": folder.name, "dir": str(folder), "id": _wandb_id(folder), "resume": "allow"}
        tracker = WandBTracker(os.environ.get("WANDB_PROJECT") or PROJECT, **own)
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
