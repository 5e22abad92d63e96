"""Moving averages of a model's weights: an fp32 shadow of each floating-point parameter.

Two rules say how much of the past is kept at each step. Both are pure functions of the step, so that resuming,
accumulation and the number of processes leave them alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Constant:
    """`decay`, reached through a warm-up.

    During the warm-up, (1 + step) / (10 + step), the average spans the last tenth of the steps so far.
    """

    decay: float

    def at(self, step: int) -> float:
        """The decay of the update after optimiser step `step` (from 1)."""
        return min(self.decay, (1 + step) / (10 + step))

    def __str__(self) -> str:
        return f"EMA {self.decay}"


@dataclass(frozen=True)
class Power:
    """A weight proportional to step^gamma: however long the run, the average spans the same share of it.

    `width` is that share, the standard deviation of the weighting over the length of the run. (Karras et al. 2024,
    "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.1)
    """

    width: float

    def at(self, step: int) -> float:
        return (1 - 1 / step) ** (gamma_of(self.width) + 1)

    def __str__(self) -> str:
        return f"power EMA {self.width}"


@cache
def gamma_of(width: float) -> float:
    """The exponent whose profile has the relative standard deviation `width`, in (0, 0.28).

    width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), a cubic in gamma (Karras et al. 2024, eq. 126).
    """
    square = width**-2
    return float(np.roots([1, 7, 16 - square, 12 - square]).real.max())


def mixture(
    times: Sequence[float], widths: Sequence[float], time: float, width: float
) -> tuple[np.ndarray, float]:
    """Factors (n,) of n stored power averages whose sum comes nearest to the average of `width` at `time`; and how near.

    Average i was taken at step times[i] with widths[i]. Least squares between the weightings of the past, p(t) = (gamma + 1)
    t^gamma / T^(gamma + 1) on [0, T] (Karras et al. 2024, section 3.2), among factors that sum to one, as weights of an average
    must: others would shrink the network. What remains of the difference is the second result, in shares of the norm of p.
    """
    ends, exponents = np.asarray(times, float) / time, np.array([gamma_of(w) for w in widths])
    last, exponent = np.float64(1), np.float64(gamma_of(width))
    gram = _overlap(ends[:, None], exponents[:, None], ends[None], exponents[None])
    wanted = _overlap(ends, exponents, last, exponent)
    ones = np.ones((len(ends), 1))
    bordered = np.block([[gram, ones], [ones.T, np.zeros((1, 1))]])  # with Lagrange's multiplier of the sum
    factors = np.linalg.lstsq(bordered, np.append(wanted, 1), rcond=None)[0][:-1]
    norm = _overlap(last, exponent, last, exponent)
    rest = norm - 2 * factors @ wanted + factors @ gram @ factors
    return factors, float(np.sqrt(max(0.0, rest) / norm))


def _overlap(end_a: np.ndarray, gamma_a: np.ndarray, end_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """The integral of p_a p_b."""
    both = gamma_a + gamma_b + 1
    shorter = np.minimum(end_a, end_b)
    log = both * np.log(shorter) - (gamma_a + 1) * np.log(end_a) - (gamma_b + 1) * np.log(end_b)
    return (gamma_a + 1) * (gamma_b + 1) / both * np.exp(log)


def _point(parameters: Sequence[nn.Parameter], tensors: Sequence[torch.Tensor]) -> None:
    for p, tensor in zip(parameters, tensors, strict=True):
        p.data = tensor.to(p.dtype)


@torch.no_grad()
def _copy(parameters: Sequence[nn.Parameter], tensors: Sequence[torch.Tensor]) -> None:
    for p, tensor in zip(parameters, tensors, strict=True):
        p.copy_(tensor)


class EMA:
    """The averaged weights of `module` under `rule`. The module's own parameters stay where they are."""

    def __init__(self, module: nn.Module, rule: Constant | Power) -> None:
        self.rule = rule
        self._parameters = dict(module.named_parameters())
        self.shadow = {name: p.detach().clone().float() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """shadow = decay shadow + (1 - decay) weights, in a few fused passes, after optimiser step `step` (from 1)."""
        current = [p if p.dtype == torch.float32 else p.float() for p in self._parameters.values()]
        torch._foreach_lerp_(list(self.shadow.values()), current, 1 - self.rule.at(step))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Lend the averaged weights to the module, without a copy, and give it back its own afterwards.

        FSDP holds on to the memory of its shares, so that those are copied.
        """
        names, parameters = list(self._parameters), list(self._parameters.values())
        averaged = [self.shadow[name] for name in names]
        if any(isinstance(p, DTensor) for p in parameters):
            own = [p.detach().clone() for p in parameters]
            put = _copy
        else:
            own = [p.data for p in parameters]
            put = _point
        try:
            put(parameters, averaged)
            yield
        finally:
            put(parameters, own)
