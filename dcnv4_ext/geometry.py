"""The shape arithmetic of a deformable kernel: taps, output size, and the checks on both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real

import torch

Pair = int | tuple[int, int]
# What the kernels count with: sizes and positions are 32-bit numbers in csrc/dcnv4.h.
MOST = 2**31 - 1
MOST_POINTS = 2**20  # of a kernel, as in csrc/check.h


def is_whole(value: object) -> bool:
    """Whether `value` counts as an int: those of numpy do, True and 2.0 do not."""
    return isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool)


def whole(name: str, value: int) -> int:
    """`value` as an int, or as the torch.SymInt that it is."""
    if not is_whole(value):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return value if isinstance(value, torch.SymInt) else int(value)


def pair(name: str, value: Pair, least: int) -> tuple[int, int]:
    """`value` as (height, width); both from `least` to `MOST`."""
    # The common cases, cheaply: this runs in every call.
    if type(value) is int and least <= value <= MOST:
        return value, value
    if type(value) is tuple and len(value) == 2:
        h, w = value
        if type(h) is type(w) is int and least <= h <= MOST and least <= w <= MOST:
            return value
    both = (value, value) if is_whole(value) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(both) != 2 or not all(map(is_whole, both)):
        raise TypeError(f"{name} must be an int or an (h, w) pair of ints, got {value!r}")
    both = int(both[0]), int(both[1])
    if min(both) < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    if max(both) > MOST:
        raise ValueError(f"{name} must be at most {MOST}, got {value!r}")
    return both


def flag(name: str, value: bool) -> bool:
    """`value` where it is a bool: a string or a tensor in its place is a mistake, whatever its truth."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def number(name: str, value: Real) -> float:
    """`value` as a float, which may still be NaN or infinite."""
    if not isinstance(value, (Real, torch.SymFloat)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got an int beyond the range of float") from None


@dataclass(frozen=True)
class Geometry:
    """Kernel, stride, padding and dilation as (h, w) pairs, and what follows from them."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    remove_center: bool

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, remove_center: bool) -> Geometry:
        """Check and normalise; every argument but `remove_center` is an int or an (h, w) pair."""
        geometry = Geometry(
            pair("kernel_size", kernel_size, 1),
            pair("stride", stride, 1),
            pair("padding", padding, 0),
            pair("dilation", dilation, 1),
            bool(remove_center),
        )
        if geometry.kernel_size[0] * geometry.kernel_size[1] > MOST_POINTS:
            raise ValueError(f"kernel_size={geometry.kernel_size} has more than {MOST_POINTS} points")
        for size, spread in zip(geometry.kernel_size, geometry.dilation, strict=True):
            if spread * (size - 1) > MOST:
                raise ValueError(
                    f"dilation={geometry.dilation} spreads kernel_size={geometry.kernel_size} over more than {MOST} pixels"
                )
        if remove_center:
            if geometry.kernel_size[0] % 2 == 0 or geometry.kernel_size[1] % 2 == 0:
                raise ValueError(
                    f"remove_center needs an odd kernel height and width, got {geometry.kernel_size}; "
                    "an even kernel has no centre tap"
                )
            if geometry.taps == 0:
                raise ValueError("remove_center leaves a 1x1 kernel without taps; use a larger kernel_size")
        return geometry

    @property
    def taps(self) -> int:
        """K, the number of taps of a group."""
        return self.kernel_size[0] * self.kernel_size[1] - int(self.remove_center)

    def output_size(self, h: int, w: int) -> tuple[int, int]:
        """(Ho, Wo) of an (h, w) map, as a convolution of the same geometry has it."""
        return tuple(
            (size + 2 * pad - (dilation * (kernel - 1) + 1)) // stride + 1
            for size, pad, dilation, kernel, stride in zip(
                (h, w), self.padding, self.dilation, self.kernel_size, self.stride, strict=True
            )
        )
