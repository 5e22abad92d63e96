"""The number formats that networks compute in, by autocast: the weights stay in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from .errors import UserError

ARITHMETIC = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(name: object) -> None:
    """Raise `UserError` for what is no key of `ARITHMETIC`."""
    if not isinstance(name, str) or name not in ARITHMETIC:
        raise UserError(f"precision {name!r} is unknown; use one of {', '.join(ARITHMETIC)}")


def computing_in(precision: str | None, device: torch.device) -> AbstractContextManager[None]:
    """Networks on `device` compute in `precision` inside; None leaves it to whoever is outside."""
    if precision is None:
        return nullcontext()
    dtype = ARITHMETIC[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
