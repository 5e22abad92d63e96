"""How a process starts and stops: the accelerator, refused launches, the lock on a run folder, signals."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import IO

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from .errors import UserError, explain
from .files import existing_folder

REQUEUE = int(getattr(signal, "SIGUSR1", 0))  # what batch systems send to a job that they will start again
# What torchrun and the MPI launchers tell a process about the number of its peers; accelerate reads the same.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# How long processes wait for the one that checks, saves, draws or scores for all: NCCL's own ten minutes would end the
# run. One that died is noticed by the launcher at once.
PATIENCE = timedelta(hours=3)
# What file systems without locks answer: Lustre, unless mounted with flock, and some of NFS.
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def start_accelerator() -> Accelerator:
    """The accelerator of this process; on a machine without a GPU it joins its peers over gloo.

    It stands for the processes and the device; number formats, FSDP and ZeRO are the run's own, so that they work without a
    GPU too.

    `Accelerator()` alone would start as many independent runs as there are CPU processes, all writing to one
    folder. Raises `UserError`, with the right command, for launches that do not start what they seem to.
    """
    check_plugins(os.environ)
    if not can_join(os.environ):
        check_launch(1, os.environ, sys.argv)
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=[patience]
    )
    check_launch(accelerator.num_processes, os.environ, sys.argv)
    return accelerator


def check_plugins(environ: Mapping[str, str]) -> None:
    """Refuse what accelerate's launcher would put around the model behind the run's back."""
    mends = {
        "FSDP": "train.parallel=fsdp, which is FSDP2",
        "DeepSpeed": "train.parallel=zero, which is DeepSpeed's ZeRO stage 2, or fsdp, which does what its stage 3 does",
    }
    for what, mend in mends.items():
        if environ.get(f"ACCELERATE_USE_{what.upper()}", "").lower() in ("true", "1"):
            raise UserError(
                f"accelerate was told to use {what}; leave that out of its command and config, and set {mend}: "
                "accelerate launch --multi_gpu train.py CONFIG train.parallel=..."
            )


def can_join(environ: Mapping[str, str]) -> bool:
    """Whether torchrun's variables say who this process is and where its peers meet; without, joining them fails."""
    told = environ.get("WORLD_SIZE", "")
    alone = not told.isdigit() or int(told) == 1
    return alone or all(environ.get(name) for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))


def check_launch(num_processes: int, environ: Mapping[str, str], argv: list[str]) -> None:
    """Raise `UserError` where the launcher meant another number of processes than the one that came up."""
    command = f"torchrun --standalone --nproc_per_node N {' '.join(argv)}"
    told = next((int(environ[name]) for name in WORLD_SIZES if environ.get(name, "").isdigit()), None)
    if told is None:
        # accelerate's launcher of one process always sets the first, and the second only if more were asked for
        if "ACCELERATE_USE_CPU" in environ and "MASTER_ADDR" in environ:
            raise UserError(
                "`accelerate launch` was asked for several processes and started one "
                "(with --cpu it always does); "
                f"for N processes run `{command}`, for one leave out --num_processes"
            )
    elif told != num_processes:
        raise UserError(
            f"the launcher started {told} processes and they did not join: "
            "each would be a run of its own in the "
            f"same folder; run `{command}`"
        )


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


@contextmanager
def leaving_on_requeue() -> Iterator[None]:
    """Inside, SIGUSR1 ends the process with exit code 0: there is nothing to save yet, or all of it is saved."""
    if not REQUEUE:
        yield
        return
    before = signal.signal(REQUEUE, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(REQUEUE, before)


STOPPING = (signal.SIGTERM, signal.SIGINT, *((signal.SIGUSR1,) if REQUEUE else ()))


class StopSignals:
    """Remembers SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 instead of dying of them: the step can end and be saved.

    A second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        self.received = 0  # the signal's number

    def __enter__(self) -> StopSignals:
        self._before = {s: signal.signal(s, self._remember) for s in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
