"""The Hugging Face hub: why a repository cannot be had, said in one line and at once."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import TypeVar

from .errors import first_line

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TIMEOUT = 10.0  # seconds for one question

T = TypeVar("T")


class Unavailable(Exception):
    """A hub repository cannot be had; the text says why."""


def from_hub_or_cache(hub_id: str, load: Callable[[bool], T]) -> T:
    """`load(False)` where the hub answers that it has `hub_id`; else `load(True)`, from what was downloaded before.

    The client's own way tries every file five times over before it gives up. Raises `Unavailable`, with the hub's reason,
    where neither can be had, and else what `load(False)` raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the client, about how its other callers call it
        try:
            ask(hub_id)
        except Unavailable:
            try:
                return load(True)
            except Exception:  # not downloaded, or in part
                pass
            raise
        return load(False)


def ask(hub_id: str) -> None:
    """Raise `Unavailable`, with the reason, unless the hub is there and has `hub_id`. One question, no second try."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    if constants.HF_HUB_OFFLINE:
        raise Unavailable("HF_HUB_OFFLINE is set, and it was not downloaded before")
    try:
        HfApi().model_info(hub_id, timeout=TIMEOUT)
    except GatedRepoError:
        raise Unavailable("access to it must be asked for on the hub, then run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise Unavailable("the hub has no such repository, or it is private") from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise Unavailable(first_line(error)) from None
    except Exception as error:  # of the HTTP library, which is another one in every second version
        raise Unavailable(f"offline: the hub does not answer, {first_line(error)}") from None
