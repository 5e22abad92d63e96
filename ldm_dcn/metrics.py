"""What a run measures: one line of JSON each time, and TensorBoard when asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .checkpoint import replace_file
from .errors import UserError


class MetricsLog:
    """Appends to `folder/metrics.jsonl`; each line is flushed: a crash loses at most the one it cuts."""

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        """`step` is where training goes on; later lines, from before a crash, are dropped."""
        path = folder / "metrics.jsonl"
        if path.exists():
            replace_file(
                path, "".join(json.dumps(line) + "\n" for line in read(path) if line["step"] <= step)
            )
        self._file = path.open("a", encoding="utf-8")
        self._board = _open_tensorboard(folder, step) if tensorboard else None

    def write(self, step: int, **values: Any) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


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


def _open_tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "train.tensorboard is on and TensorBoard is not installed; run `pip install tensorboard`, or set "
            "train.tensorboard=false"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
