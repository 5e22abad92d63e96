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
from .files import existing_folder, naming

MANIFEST = "manifest.json"
FORMAT = 1
_STEP = re.compile(r"step-(\d+)")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFull(UserError):
    """There was no room to write a folder. Nothing that was there before is lost."""


class OtherFormat(UserError):
    """A folder that another version of this program wrote."""


class Damaged(UserError):
    """A folder that its manifest says is not what was written."""


# --------------------------------------------------------------------------------------------------- folders


@contextmanager
def committed_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that takes the name `final` when the block ends well, replacing what was there.

    Raises `DiskFull` where the disk, a quota or a file size limit stopped the writing, and OSError for all else that the
    operating system refuses; the temporary folder is then removed.
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
        refused = _refused(error, temporary)
        if refused is None:
            raise
        if refused.errno in _NO_SPACE:
            raise DiskFull(
                f"no room to write {final}: {refused.strerror}; what was saved before is kept; free some space"
            ) from error
        raise refused from error


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


def verify(folder: Path, but: str | None = None) -> None:
    """Raise `Damaged`, naming the file and what is wrong, unless `folder` is what its manifest says.

    The file `but` may be another, or not there.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise OtherFormat(
                f"{folder / MANIFEST} has format {manifest['format']!r}, this program reads {FORMAT}; use the version "
                "that wrote it"
            )
        files = {
            str(name): (int(entry["size"]), str(entry["sha256"]))
            for name, entry in manifest["files"].items()
            if name != but
        }
    except FileNotFoundError:
        raise Damaged(f"{folder} is incomplete: it has no {MANIFEST}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
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
    try:
        with naming(path), temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
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


def _refused(error: BaseException, folder: Path) -> OSError | None:
    """`error` as the operating system's; None where it is none."""
    if isinstance(error, OSError):
        named = error.filename is not None or error.errno is None
        return error if named else OSError(error.errno, error.strerror, str(folder))
    # safetensors reports the operating system's error as text
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) if found else None


# ------------------------------------------------------------------------------------------------ checkpoints


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
    _discard_all_but(root, keep)
    needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    if needed > shutil.disk_usage(root).free:
        raise DiskFull(_no_room(final, needed, keep))
    try:
        with committed_folder(final) as folder:
            _write_groups(folder, tensors)
            write_json(folder / "state.json", {"step": step, **state})
    except DiskFull as error:  # a quota, or somebody else's files
        raise DiskFull(f"{_no_room(final, needed, keep)} ({error.__cause__})") from error
    _discard_all_but(root, keep)
    return final


def _discard_all_but(root: Path, keep: int) -> None:
    for old in saved_steps(root)[keep:]:
        discard(root / f"step-{old}")


def _no_room(final: Path, needed: int, keep: int) -> str:
    """What is missing to write `final`, and what would help."""
    free = shutil.disk_usage(final.parent).free
    room = f"it takes {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free"
    if needed > free:
        room += f", {(needed - free) / 1e6:.1f} MB too few"
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
            _remove(aside)
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


def discard(folder: Path) -> None:
    """Remove a folder so that a crash half way does not leave a damaged one under its name."""
    doomed = folder.parent / f".tmp-{folder.name}"
    _remove(doomed)
    folder.rename(doomed)
    _remove(doomed)


def saved_steps(root: Path) -> list[int]:
    """The steps of the folders step-N in `root`, the newest first."""
    if not root.is_dir():
        return []
    found = (_STEP.fullmatch(path.name) for path in root.iterdir() if path.is_dir())
    return sorted((int(match[1]) for match in found if match), reverse=True)
