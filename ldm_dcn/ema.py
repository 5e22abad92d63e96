"""Exponential moving average of a model's weights: an fp32 shadow of each floating-point parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


def decay_at(step: int, decay: float) -> float:
    """The decay of the update after optimiser step `step` (from 1): `decay`, reached through a warm-up.

    During the warm-up, (1 + step) / (10 + step), the average spans the last tenth of the steps so far. A pure
    function of the step, so that resuming, accumulation and the number of processes leave it alone.
    """
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """The averaged weights of `module`. The module's own parameters stay where they are."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = dict(module.named_parameters())
        self.shadow = {name: p.detach().clone().float() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """shadow = decay shadow + (1 - decay) weights, in a few fused passes."""
        current = [p.detach() for p in self._parameters.values()]
        current = [p if p.dtype == torch.float32 else p.float() for p in current]
        torch._foreach_lerp_(list(self.shadow.values()), current, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Lend the averaged weights to the module, without a copy, and give it back its own afterwards."""
        own = {name: p.data for name, p in self._parameters.items()}
        try:
            for name, p in self._parameters.items():
                p.data = self.shadow[name].to(p.dtype)
            yield
        finally:
            for name, p in self._parameters.items():
                p.data = own[name]

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over a shadow of the same names and shapes."""
        if tensors.keys() != self.shadow.keys():
            odd = sorted(tensors.keys() ^ self.shadow.keys())
            raise ValueError(f"averaged weights and model differ in {len(odd)} names, first '{odd[0]}'")
        for name, shadow in self.shadow.items():
            shadow.copy_(tensors[name])
