"""A head start for a swapped network: each new block first learns to give what the old one gave.

The network runs on its old blocks, whose outputs the new ones regress on the same inputs. So every block learns from
undisturbed features, all of them at once, and gradients stay within a block: no backward pass through the network.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Matching:
    """The old blocks of a swapped `unet`, by the names of their sites."""

    def __init__(self, unet: nn.Module, originals: Mapping[str, nn.Module]) -> None:
        self._pairs = [
            (unet.get_submodule(name), old.requires_grad_(False).eval()) for name, old in originals.items()
        ]
        self._errors: list[torch.Tensor] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The network inside runs on the old blocks, and `error` has what the new ones miss by."""
        handles = [
            new.register_forward_hook(self._compare(old), with_kwargs=True) for new, old in self._pairs
        ]
        self._errors.clear()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def error(self) -> torch.Tensor:
        """The mean over the blocks of (mean squared error / variance of the old output), a scalar: 1 at chance."""
        return torch.stack(self._errors).mean()

    def _compare(self, old: nn.Module) -> Any:
        known = inspect.signature(old.forward).parameters

        def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                wanted = old(*args, **{key: value for key, value in kwargs.items() if key in known})
            scale = wanted.float().var().clamp(min=1e-12)
            self._errors.append(F.mse_loss(output.float(), wanted.float()) / scale)
            return wanted

        return hook


def new_parameters(module: nn.Module, sites: Mapping[str, Any] | list[str]) -> set[str]:
    """The names of the parameters of `module` that lie in one of the swapped `sites`."""
    heads = tuple(f"{site}." for site in sites)
    return {name for name, _ in module.named_parameters() if name.startswith(heads)}
