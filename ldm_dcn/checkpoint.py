"""Checkpoints that survive a crash at any moment: a folder step-N each, complete and checked, or not there (`folders.py`).

A damaged one is named, and the one before it is used. Tensors are stored as safetensors and everything else as JSON, so that
loading never executes anything.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .errors import UserError
from .files import write_json
from .folders import Damaged, DiskFull, committed_folder, discard, recover, remove, verify
from .places import existing_folder

_STEP = re.compile(r"step-(\d+)")


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `root/step-N/`: groups of named tensors, a JSON-able state. Then drop all but the newest `keep`.

    Those beyond `keep` from before, when more were kept, go first: their room may be needed. Raises `DiskFull` before
    anything is written where the disk visibly lacks room.
    """
    final = root / f"step-{step}"
    root.mkdir(parents=True, exist_ok=True)
    keep_newest(root, keep)
    needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    if needed > shutil.disk_usage(root).free:
        raise DiskFull(_no_room(final, needed, keep))
    try:
        with committed_folder(final) as folder:
            _write_groups(folder, tensors)
            write_json(folder / "state.json", {"step": step, **state})
    except DiskFull as error:  # a quota, or somebody else's files
        raise DiskFull(f"{_no_room(final, needed, keep)} ({error.__cause__})") from error
    keep_newest(root, keep)
    return final


def keep_newest(root: Path, keep: int) -> None:
    """Drop all but the newest `keep`."""
    for old in saved_steps(root)[keep:]:
        discard(root / f"step-{old}")


def _no_room(final: Path, needed: int, keep: int) -> str:
    """What is missing to write `final`, and what would help."""
    free = shutil.disk_usage(final.parent).free
    room = f"it takes {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free"
    if needed > free:
        room += f", {(needed - free) / 1e6:.1f} MB too few"
    else:
        room += ": a quota, or a limit of the size of files (ulimit -f), stops it"
    older = [final.parent / f"step-{step}" for step in saved_steps(final.parent)[1:]]
    gained = sum(file.stat().st_size for folder in older for file in folder.glob("*"))
    mend = "free some space"
    if keep > 1 and older and free + gained >= needed:
        mend += f", or set train.keep_checkpoints=1, which gives {gained / 1e6:.1f} MB back"
    return f"no room to write {final}: {room}; what was saved before is kept; {mend}"


def check_room(root: Path, needed: int) -> None:
    """Raise `DiskFull` before days of training whose first checkpoint, of `needed` bytes, would not fit."""
    free = shutil.disk_usage(existing_folder(root)).free
    if needed > free:
        raise DiskFull(
            f"no room for the checkpoints of this run in {root}: one takes {needed / 1e6:.1f} MB with its export and "
            f"{free / 1e6:.1f} MB are free, {(needed - free) / 1e6:.1f} MB too few; free some space, or choose another "
            "run.dir"
        )


def save_tensors(final: Path, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Write a folder with one safetensors file for each group of named tensors, whole or not at all."""
    with committed_folder(final) as folder:
        _write_groups(folder, tensors)


def _write_groups(folder: Path, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    for group, named in tensors.items():
        # one group at a time: contiguous copies of channels_last weights are as large as the model
        save_file(
            {n: t.detach().cpu().contiguous() for n, t in named.items()}, folder / f"{group}.safetensors"
        )


def non_finite(tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> str | None:
    """group/name of the first tensor that holds NaN or infinity: no state to go on from."""
    for group, named in tensors.items():
        for name, tensor in named.items():
            if not bool(torch.isfinite(tensor).all()):
                return f"{group}/{name}"
    return None


def load(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """The groups of tensors (on the CPU) and the state of a checkpoint that `newest` has verified."""
    tensors = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    return tensors, json.loads((folder / "state.json").read_text(encoding="utf-8"))


def newest(root: Path, report: Callable[[str], None]) -> Path | None:
    """The newest good checkpoint below `root`, or None where none was ever completed.

    A damaged one is set aside under the name damaged-step-N, with a line to `report`: only for the
    process that owns the run. Raises `UserError` where there are checkpoints and all are damaged, because
    starting again from nothing must be the user's decision.
    """
    damaged: dict[Path, str] = {}
    for step in saved_steps(root):
        folder = root / f"step-{step}"
        try:
            verify(folder)
        except Damaged as error:
            damaged[folder] = str(error)
            continue
        for bad, reason in damaged.items():
            aside = bad.with_name(f"damaged-{bad.name}")
            remove(aside)
            bad.rename(aside)
            report(f"checkpoint passed over: {reason}; it is now {aside}, and training goes on from {folder}")
        return folder
    if damaged:
        raise UserError(
            f"every checkpoint in {root} is damaged ({'; '.join(damaged.values())}); "
            "bring one back from a backup, "
            "or delete the run's folder, or choose another run.name, to start again from step 0"
        )
    return None


def sweep(root: Path) -> None:
    """Remove what interrupted saves and removals left behind. Only for the process that owns the run."""
    if not root.is_dir():
        return
    for leftover in sorted(root.glob(".*step-*")):
        recover(root / leftover.name.split("-", 1)[1])


def saved_steps(root: Path) -> list[int]:
    """The steps of the folders step-N in `root`, the newest first."""
    if not root.is_dir():
        return []
    found = (_STEP.fullmatch(path.name) for path in root.iterdir() if path.is_dir())
    return sorted((int(match[1]) for match in found if match), reverse=True)
