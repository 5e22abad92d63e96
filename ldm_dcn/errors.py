"""What a user can mend: one error type and the one way entry points report it."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NoReturn

MISTAKE = 2  # exit code
INTERRUPTED = 130  # exit code: 128 + SIGINT, as a shell has it
SHOWN = 80  # characters of a wrong value in its error
TOLD = 240  # characters of what a library says in one of ours
PATIENCE = 3.0  # seconds; a launcher looks after its processes ten times a second

# What the state of a machine can bring about, and the mend. Every other number is a mistake of ours, and keeps its traceback.
_MENDS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or ask for a larger quota",
    errno.EFBIG: "the file size limit (ulimit -f) or the file system stops it; write to another place",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "mend its permissions, or choose another place",
    errno.EPERM: "mend its permissions, or choose another place",
    errno.ENOTDIR: "a file stands where a folder should be; move it away, or choose another name",
    errno.EEXIST: "something else has that name; move it away, or choose another name",
    errno.EISDIR: "a folder stands where a file should be; move it away, or choose another name",
    errno.ENOENT: "check the path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle; mend them",
    errno.EIO: "the disk or the network behind it fails; look at it",
    errno.ESTALE: "the network file system lost it; try again",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close some programs: the machine has no more files to open",
    errno.EBUSY: "something else is using it; try again",
}


class UserError(Exception):
    """A mistake the user can mend. The text names what was wrong and what to do, in one line."""


class Parser(argparse.ArgumentParser):
    """Command lines of programs whose mistakes are one line like any other. Its description is shown as it stands."""

    def __init__(self, **options: object) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        report(f"{message}; see --help")
        raise SystemExit(MISTAKE)


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print a mistake that the user can mend as one line on standard error and leave with exit code 2; Ctrl-C: 130.

    That is a `UserError`, and what the operating system refuses: a full disk, a folder that cannot be written to.
    """
    try:
        yield
    except UserError as error:
        report(str(error))
        raise SystemExit(MISTAKE) from None
    except OSError as error:
        if error.errno not in _MENDS:
            raise
        report(explain(error))
        raise SystemExit(MISTAKE) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def shown(value: object) -> str:
    """A wrong value in its error."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def one_line(error: BaseException) -> str:
    """What a library says is wrong, for an error of ours; the error's type where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= TOLD else f"{text[: TOLD - 3]}..."


def first_line(error: BaseException) -> str:
    """The same of libraries that go on with addresses and advice: the hub's client, CUDA."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def quiet(log: ModuleType) -> Iterator[None]:
    """Keep diffusers or transformers (`log` is its `utils.logging`) from telling at length what we raise, and from drawing bars."""
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(logging.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def explain(error: OSError) -> str:
    """What the operating system refused, where, and what to do about it."""
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    if error.strerror is None:  # a library's, which has words of its own
        return f"{where}{one_line(error)}"
    return f"{where}{error.strerror}; {_MENDS.get(error.errno, 'look at it')}"


def warn(text: str) -> None:
    """One line `warning: ...` on standard error, from the main one of the processes that a launcher started."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr, flush=True)


def report(text: str) -> None:
    """One line `error: ...` on standard error, from one of the processes that a launcher started.

    All of them make the same mistake: the main one tells it, and its end is the end of the others. They speak up only
    where that does not come about, because it was theirs alone.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(PATIENCE)
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
