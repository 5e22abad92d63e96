"""What a user can mend: one error type and the one way entry points report it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake the user can mend. The text names what was wrong and what to do, in one line."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print a `UserError` as one line on standard error and leave with exit code 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
