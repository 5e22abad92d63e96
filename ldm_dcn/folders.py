"""Folders that are either complete and checked, or not there, after a crash at any moment too.

    write into a hidden temporary folder -> fsync each file -> manifest.json (size and sha256 of each), last
    -> rename to the final name -> fsync the parent

A folder without a manifest, or with a file that differs from it, is damaged.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from .errors import UserError
from .files import fsync, hash_file, write_json

MANIFEST = "manifest.json"
FORMAT = 1
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFull(UserError):
    """There was no room to write a folder. Nothing that was there before is lost."""


class OtherFormat(UserError):
    """A folder that another version of this program wrote."""


class Damaged(UserError):
    """A folder that its manifest says is not what was written."""


@contextmanager
def committed_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that takes the name `final` when the block ends well, replacing what was there.

    Raises `DiskFull` where the disk, a quota or a file size limit stopped the writing, and OSError for all else that the
    operating system refuses; the temporary folder is then removed.
    """
    temporary = final.parent / f".tmp-{final.name}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        temporary.mkdir()
        yield temporary
        _write_manifest(temporary)
        fsync(temporary)
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
        remove(old)
        final.rename(old)
    temporary.rename(final)
    fsync(final.parent)
    remove(old)


def recover(final: Path) -> None:
    """Clear up after a crash: an unfinished folder goes, a replacement cut in the middle is taken back."""
    remove(final.parent / f".tmp-{final.name}")
    old = final.parent / f".old-{final.name}"
    if old.exists() and not final.exists():
        old.rename(final)
    remove(old)


def discard(folder: Path) -> None:
    """Remove a folder so that a crash half way does not leave a damaged one under its name."""
    doomed = folder.parent / f".tmp-{folder.name}"
    remove(doomed)
    folder.rename(doomed)
    remove(doomed)


def verify(folder: Path, but: str | None = None, below: str = "") -> None:
    """Raise `Damaged`, naming the file and what is wrong, unless `folder` is what its manifest says.

    The file `but` may be another, or not there; with `below` only files whose names begin so are looked at.
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
            if name != but and name.startswith(below)
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
        if hash_file(folder / name) != sha256:
            raise Damaged(f"{folder / name} was changed after it was written (its sha256 differs)")


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        fsync(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": hash_file(path)}
    for subfolder in (p for p in folder.rglob("*") if p.is_dir()):
        fsync(subfolder)
    write_json(folder / MANIFEST, {"format": FORMAT, "files": files})
    fsync(folder / MANIFEST)


def remove(folder: Path) -> None:
    """Remove a folder, if it is there."""
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
