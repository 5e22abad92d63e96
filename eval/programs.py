"""Programs that a command runs, and that end with it: what is asked to stop has them stop too, each in its own way, and waits; where it
is killed, they are asked to stop all the same, on Linux."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from types import FrameType

from ldm_dcn.errors import UserError
from ldm_dcn.signals import REQUEUE, STOPPING

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
# Loaded here: between fork and exec of a process with threads nothing may be waited for.
_system = ctypes.CDLL(None) if sys.platform == "linux" else None

_lock = RLock()  # of the two below; a signal may come while this thread holds it
_running: set[subprocess.Popen] = set()
_stopped_by = 0  # the signal's number


@contextmanager
def ending_together() -> Iterator[None]:
    """Inside, SIGTERM, Ctrl-C and SIGUSR1 reach what `call` runs as SIGTERM, and nothing more is begun: `call` raises SystemExit with
    128 + the signal, or 0 for SIGUSR1. So does the signal where none of them runs. A second Ctrl-C stops at once."""
    global _stopped_by

    def stop(number: int, _: FrameType | None) -> None:
        global _stopped_by
        said = f"{signal.Signals(number).name}: what runs saves and stops; the same command goes on\n"
        os.write(2, said.encode())  # sys.stderr may be in the middle of a word
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with _lock:
            _stopped_by = number
            for process in _running:
                process.terminate()
            if not _running:  # it is this process that works
                _leave_if_stopped()

    before = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        yield
    finally:
        _stopped_by = 0
        for number, handler in before.items():
            signal.signal(number, handler)


def call(arguments: Sequence[str], log: Path, variables: Mapping[str, str]) -> float:
    """Run Python with `arguments` and `variables` of the environment, its words going to the end of `log`; returns the processor's
    seconds of this call: of a training that goes on, those of the rest. Raises `UserError` with its last words where it fails."""
    with log.open("ab") as file:
        before = file.tell()
        with _lock:
            _leave_if_stopped()
            process = subprocess.Popen(
                [sys.executable, *arguments], env={**os.environ, **variables}, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                preexec_fn=_end_with_me if _system is not None else None,
            )  # fmt: skip
            _running.add(process)
            if _stopped_by:
                process.terminate()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            with _lock:
                _running.discard(process)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        _leave_if_stopped()
        said = _last_words(log, before) or f"exit code {process.returncode}"
        raise UserError(f"{' '.join(arguments[:2])} failed: {said}; the whole of it is in {log}")
    return usage.ru_utime + usage.ru_stime


def _end_with_me() -> None:
    """In a new process: to have SIGTERM when the one that began it is gone, killed with no time to say so. Linux alone has that."""
    _system.prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _leave_if_stopped() -> None:
    if _stopped_by:
        raise SystemExit(0 if _stopped_by == REQUEUE else 128 + _stopped_by)


def _last_words(log: Path, begin: int) -> str:
    """The last error in `log` from byte `begin` on, or else its last line: others may write to it, too, such as a progress bar."""
    with log.open("rb") as file:
        file.seek(begin)
        text = file.read().decode("utf-8", errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
    # behind a bar that another process left unfinished, too
    errors = [found[1] for line in lines if (found := re.search(r"(?:^|\])error: (.*)", line))]
    return (errors or lines or [""])[-1]
