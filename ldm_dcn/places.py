"""Places on disk that will be written to: whether they can be, before hours of work go there."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from .errors import UserError, explain


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
