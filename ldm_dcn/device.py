"""The device that a model is used on."""

from __future__ import annotations

import torch

from .errors import UserError, first_line


def choose_device(name: torch.device | str | None) -> torch.device:
    """The device of that name; None takes a GPU where there is one. Raises `UserError` for one that cannot compute here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).cpu()  # a meta tensor has nothing to bring back
    except (RuntimeError, NotImplementedError, AssertionError, ImportError) as error:
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise UserError(
            f"device '{name}' cannot be used ({first_line(error)}); there are {', '.join(here)}"
        ) from None
    return device
