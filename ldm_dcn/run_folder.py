"""The folder of a run: what is kept there, where another may not begin, who holds it."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from . import export
from .config import load_config
from .errors import UserError, explain
from .metrics import read
from .places import existing_folder

FILES = ("config.yaml", "provenance.jsonl", "metrics.jsonl")
STEPS = ("checkpoints", "averages", export.EXPORTS)  # folders of folders step-N
FOLDERS = (*STEPS, "samples", export.EXPORT)
# What file systems without locks answer: Lustre, unless mounted with flock, and some of NFS.
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


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
    for place in STEPS:
        for path in (folder / place).glob("step-*"):
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


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; the operating system lets go of it however the process ends.

    A folder that was made for this and in which nothing else came to lie is removed again.
    """
    first_made = existing_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(folder / ".lock")
    except OSError as error:
        raise UserError(f"cannot train in {folder}: {explain(error)}, with run.dir or run.name") from None
    with file:
        try:
            yield
        finally:
            if first_made != existing_folder(folder):
                _remove_empty(folder, first_made)


def _locked(path: Path) -> IO[str]:
    try:
        import fcntl
    except ImportError:  # Windows: no lock, and no launcher that starts independent runs either
        return path.open("w")
    while True:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError:
            file.close()
            raise UserError(
                f"another process is training in {path.parent}; wait for it, or choose another run.name"
            ) from None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            _say_unlocked(path.parent)
            return file
        file.close()  # a refused start took its lock away as we opened it


def _say_unlocked(folder: Path) -> None:
    print(
        f"warning: the file system of {folder} has no locks; see to it that nothing else trains there",
        file=sys.stderr,
        flush=True,
    )


def _remove_empty(folder: Path, until: Path) -> None:
    """Remove `folder` where there is nothing but the lock in it, and then its parents below `until`."""
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink()
        place = Path(os.path.abspath(folder))
        while place != until:
            place.rmdir()  # refuses a folder that is not empty
            place = place.parent
