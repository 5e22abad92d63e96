"""Checkpoints that survive a crash at any moment: folders that are either complete and checked, or not there.

    write into a hidden temporary folder -> fsync each file -> manifest.json (size and sha256 of each), last
    -> rename to the final name -> fsync the parent

A folder without a manifest, or with a file that differs from it, is damaged: it is named, and the one before
it is used. Tensors are stored as safetensors and everything else as JSON, so that loading never executes
anything.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import UserError

MANIFEST = "manifest.json"
FORMAT = 1
_STEP = re.compile(r"step-(\d+)")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFull(UserError):
    """There was no room to write a folder. Nothing that was there before is lost."""


class Damaged(UserError):
    """A folder that its manifest says is not what was written."""


# --------------------------------------------------------------------------------------------------- folders


@contextmanager
def committed_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that takes the name `final` when the block ends well, replacing what was there.

    Raises `DiskFull` where the disk, a quota or a file size limit stopped the writing; the temporary folder
    is then removed.
    """
    temporary = final.parent / f".tmp-{final.name}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        temporary.mkdir()
        yield temporary
        _write_manifest(temporary)
        _fsync(temporary)
        _put_in_place(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _is_disk_full(error):
            raise DiskFull(
                f"no room to write {final}: {error}; what was saved before is kept; "
                "free some space, or keep fewer "
                "checkpoints with train.keep_checkpoints=1"
            ) from error
        raise


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename. Between the two renames of a replacement the old folder waits as `.old-`, for `recover`."""
    old = final.parent / f".old-{final.name}"
    if final.exists():
        _remove(old)
        final.rename(old)
    temporary.rename(final)
    _fsync(final.parent)
    _remove(old)


def recover(final: Path) -> None:
    """Clear up after a crash: an unfinished folder goes, a replacement cut in the middle is taken back."""
    _remove(final.parent / f".tmp-{final.name}")
    old = final.parent / f".old-{final.name}"
    if old.exists() and not final.exists():
        old.rename(final)
    _remove(old)


def verify(folder: Path) -> None:
    """Raise `Damaged`, naming the file and what is wrong, unless `folder` is what its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {
            str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()
        }
    except FileNotFoundError:
        raise Damaged(f"{folder} is incomplete: it has no {MANIFEST}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{folder / MANIFEST} cannot be read: {error}") from None
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{path} is missing")
        if path.stat().st_size != size:
            raise Damaged(f"{path} has {path.stat().st_size} bytes instead of {size}")
    for name, (_, sha256) in files.items():
        if _sha256(folder / name) != sha256:
            raise Damaged(f"{folder / name} was changed after it was written (its sha256 differs)")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def replace_file(path: Path, text: str) -> None:
    """Write a small text file so that a crash leaves the old or the new one, never a part."""
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _fsync(path.parent)


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _fsync(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    for subfolder in (p for p in folder.rglob("*") if p.is_dir()):
        _fsync(subfolder)
    write_json(folder / MANIFEST, {"format": FORMAT, "files": files})
    _fsync(folder / MANIFEST)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest(file)
        )


def _digest(file: Any) -> str:
    """`hashlib.file_digest` of Python 3.11, for 3.10."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _NO_SPACE
    # safetensors reports the operating system's error as text
    return isinstance(error, SafetensorError) and any(f"os error {code})" in str(error) for code in _NO_SPACE)


# ------------------------------------------------------------------------------------------------ checkpoints


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `root/step-N/`: groups of named tensors, a JSON-able state. Then drop all but the newest `keep`.

    Raises `DiskFull` before anything is written where the disk visibly lacks room.
    """
    final = root / f"step-{step}"
    root.mkdir(parents=True, exist_ok=True)
    needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    free = shutil.disk_usage(root).free
    if needed > free:
        raise DiskFull(
            f"no room to write {final}: it takes {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free; "
            "what was "
            "saved before is kept; free some space, or keep fewer checkpoints with "
            "train.keep_checkpoints=1"
        )
    with committed_folder(final) as folder:
        _write_groups(folder, tensors)
        write_json(folder / "state.json", {"step": step, **state})
    for old in _steps(root)[keep:]:
        discard(root / f"step-{old}")
    return final


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
    for step in _steps(root):
        folder = root / f"step-{step}"
        try:
            verify(folder)
        except Damaged as error:
            damaged[folder] = str(error)
            continue
        for bad, reason in damaged.items():
            aside = bad.with_name(f"damaged-{bad.name}")
            _remove(aside)
            bad.rename(aside)
            report(f"checkpoint passed over: {reason}; it is now {aside}, and training goes on from {folder}")
        return folder
    if damaged:
        raise UserError(
            f"every checkpoint in {root} is damaged ({'; '.join(damaged.values())}); "
            "bring one back from a backup, "
            f"or delete {root} to start again from step 0"
        )
    return None


def sweep(root: Path) -> None:
    """Remove what interrupted saves and removals left behind. Only for the process that owns the run."""
    if not root.is_dir():
        return
    for leftover in sorted(root.glob(".*step-*")):
        recover(root / leftover.name.split("-", 1)[1])


def discard(folder: Path) -> None:
    """Remove a folder so that a crash half way does not leave a damaged one under its name."""
    doomed = folder.parent / f".tmp-{folder.name}"
    _remove(doomed)
    folder.rename(doomed)
    _remove(doomed)


def _steps(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    found = (_STEP.fullmatch(path.name) for path in root.iterdir() if path.is_dir())
    return sorted((int(match[1]) for match in found if match), reverse=True)
