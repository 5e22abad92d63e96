"""The presence of the processes that encode into one folder: a lock for each."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

from .errors import UserError


class Presence:
    """A lock on `out` for each process: nobody else encodes into it, and the main process sees who is still there.

    The operating system lets go of it however the process ends.
    """

    def __init__(self, out: Path, rank: int, processes: int | None = None) -> None:
        """`processes` is how many there are, from the main one: it looks for those left of a start with more."""
        self._out = out
        self._held = self._take(rank, "a+")
        left = () if processes is None else self._ranks_from(processes)
        if self._held is False or any(self._take(other, "r+") is False for other in left):
            self.leave()
            raise UserError(f"another process is encoding into {out}; wait for it, or name another folder")

    def _ranks_from(self, first: int) -> list[int]:
        found = (re.fullmatch(r"\.process-(\d+)\.lock", path.name) for path in self._out.iterdir())
        return [int(match[1]) for match in found if match and int(match[1]) >= first]

    def is_there(self, rank: int) -> bool:
        file = self._take(rank, "r+")
        if file is False or file is None:
            return True
        file.close()
        return False

    def leave(self) -> None:
        if self._held:
            self._held.close()

    def _take(self, rank: int, mode: str) -> Any:
        """The locked file; False where another holds it; None where locks are not to be had.

        `mode` must write, even if nothing is: NFS makes fcntl locks of flock's, and refuses exclusive ones on what is open for reading.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            return None
        try:
            file = (self._out / f".process-{rank}.lock").open(mode)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
        return file
