"""Files that are whole or not there, and whether a place can be written to before hours of work go there."""

from __future__ import annotations

import json
import os
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .errors import UserError, explain


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that names no file, as those of writing and flushing do not, names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that takes the place of `path` when the block ends well; else nothing has changed.

    Folders on the way are made. A link stays one, and what it points to is replaced.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # of its own length: `path.name` may be as long as names may be
    temporary = path.with_name(f".tmp-{os.getpid()}-{zlib.crc32(os.fsencode(path.name)):08x}")
    try:
        with naming(path), temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


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
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Have the system write a file or a folder to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_file_place(path: Path, mend: str) -> None:
    """Raise `UserError`, ending with `mend`, unless a file can be written as `path`. Nothing is left behind."""
    mode = _mode(path, mend)
    if mode is not None and not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no ordinary file"
        raise UserError(f"{path} is {what}; {mend}")
    _check_writable(path.parent, path, mend)


def check_folder_place(path: Path, mend: str) -> None:
    """Raise `UserError`, ending with `mend`, unless `path` is a folder that can be written to, or can be made one."""
    mode = _mode(path, mend)
    if mode is not None and not stat.S_ISDIR(mode):
        raise UserError(f"{path} is a file, not a folder; {mend}")
    _check_writable(path, path, mend)


def only_variant(folder: Path, stem: str) -> str | None:
    """ "fp16" where a model's folder has the weights `stem` in half precision only: what `from_pretrained` takes as its variant."""
    names = {path.name for path in folder.glob(f"{stem}*.safetensors*")}
    whole = {f"{stem}.safetensors", f"{stem}.safetensors.index.json"}
    half = {f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"}
    return "fp16" if names & half and not names & whole else None


def existing_folder(path: Path) -> Path:
    """`path`, or the nearest of its parents that is there."""
    path = Path(os.path.abspath(path))
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def _mode(path: Path, mend: str) -> int | None:
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None
    except OSError as error:  # a file among its folders, a name too long
        raise UserError(f"{path}: {error.strerror}; {mend}") from None


def _check_writable(folder: Path, path: Path, mend: str) -> None:
    try:
        place = existing_folder(folder)
        for name in Path(os.path.abspath(path)).relative_to(place).parts:
            with suppress(FileNotFoundError):
                (place / name).lstat()  # is too long a name for this file system an error
        with tempfile.TemporaryFile(dir=place):  # os.access knows nothing of quotas and network file systems
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written: {explain(error).split(';')[0]}; {mend}") from None
