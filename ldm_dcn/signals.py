"""The signals that stop a process: remembered, so that what it does can be ended well."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REQUEUE = int(getattr(signal, "SIGUSR1", 0))  # what batch systems send to a job that they will start again


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
