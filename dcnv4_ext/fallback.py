"""The operator in torch's own operators, for devices that have no kernels here: Apple's MPS, Intel's XPU, AMD's GPUs, and those
that other packages add to torch under its key PrivateUse1.

The same results, slower than a kernel: each tap gathers four corners into tensors of the output's size. Sums are in
fp32 as in the kernels (fp64 for fp64), without those devices' fp64, which not all of them have.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import Geometry


class _Corner(NamedTuple):
    """One of a tap's four cells, for M = N * Ho * Wo * G places."""

    row: Tensor  # (M,) int64, into `_Call.rows`; the last one, of zeros, where the corner lies outside the map or the tap does not count
    share: Tensor  # (M,) of the value
    by_x: Tensor  # (M,) derivative of `share`
    by_y: Tensor


class _Call:
    """What forward and backward have in common: where the taps fall, and with what weights."""

    def __init__(
        self, value: Tensor, offset_mask: Tensor, geometry: Geometry, groups: int, scale: float, softmax: bool
    ) -> None:
        self.n, self.h, self.w, self.c = value.shape
        self.groups, self.geometry, self.scale = groups, geometry, scale
        self.ho, self.wo = offset_mask.shape[1:3]
        self.dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        taps = geometry.taps
        used = offset_mask[..., : 3 * groups * taps].to(self.dtype)
        used = used.reshape(self.n, self.ho, self.wo, groups, 3 * taps)
        self.offsets = used[..., : 2 * taps].unflatten(-1, (taps, 2))  # (N, Ho, Wo, G, K, 2)
        self.weights = used[..., 2 * taps :]  # (N, Ho, Wo, G, K)
        if softmax:
            self.weights = self.weights.softmax(-1)
        # Of each (image, row, column, group), then one of zeros.
        rows = value.reshape(-1, self.c // groups)
        self.rows = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))

    def _range(self, count: int) -> Tensor:
        return torch.arange(count, device=self.rows.device)

    def grid(self) -> list[tuple[int, int]]:
        """(column, row) of each tap about the kernel's centre, in the order of `offset_mask`: columns outside, rows within."""
        (kernel_h, kernel_w), (dilation_h, dilation_w) = self.geometry.kernel_size, self.geometry.dilation
        center = (kernel_w // 2, kernel_h // 2) if self.geometry.remove_center else None
        return [
            (i * dilation_w - self._center(1), j * dilation_h - self._center(0))
            for i in range(kernel_w)
            for j in range(kernel_h)
            if (i, j) != center
        ]

    def _center(self, axis: int) -> int:
        return self.geometry.dilation[axis] * (self.geometry.kernel_size[axis] - 1) // 2

    def _positions(self, tap: int, axis: int, place: int) -> Tensor:
        """(N, Ho, Wo, G): rows (0) or columns (1) of the map that a tap falls on."""
        length = (self.ho, self.wo)[axis]
        first = self._center(axis) - self.geometry.padding[axis]
        base = (self._range(length) * self.geometry.stride[axis] + first).to(self.dtype)
        base = base.view((-1, 1, 1) if axis == 0 else (-1, 1))
        return base + (place + self.offsets[..., tap, 1 - axis]) * self.scale

    def corners(self, tap: int, place: tuple[int, int]) -> tuple[Tensor, list[_Corner]]:
        """Whether the tap counts at each place, (M,) bool, and its corners there."""
        x, y = self._positions(tap, 1, place[0]), self._positions(tap, 0, place[1])
        counts = (x > -1) & (y > -1) & (x < self.w) & (y < self.h)  # not where it is NaN
        x, y = x.where(counts, 0), y.where(counts, 0)
        left, top = x.floor(), y.floor()
        right_share, bottom_share = x - left, y - top
        image = self._range(self.n).view(-1, 1, 1, 1)
        group = self._range(self.groups)
        corners = []
        for down in (0, 1):
            row = top.long() + down
            share_y = bottom_share if down else 1 - bottom_share
            for across in (0, 1):
                column = left.long() + across
                share_x = right_share if across else 1 - right_share
                inside = counts & (row >= 0) & (row < self.h) & (column >= 0) & (column < self.w)
                cell = ((image * self.h + row) * self.w + column) * self.groups + group
                corners.append(
                    _Corner(
                        cell.where(inside, len(self.rows) - 1).flatten(),
                        (share_x * share_y).flatten(),
                        (share_y if across else -share_y).flatten(),
                        (share_x if down else -share_x).flatten(),
                    )
                )
        return counts.flatten(), corners


def forward(
    value: Tensor,  # (N, H, W, C)
    offset_mask: Tensor,  # (N, Ho, Wo, P)
    geometry: Geometry,
    groups: int,
    offset_scale: float,
    softmax: bool,
) -> Tensor:  # (N, Ho, Wo, C)
    """What `dcnv4` gives, of arguments that were checked."""
    _warn(value.device.type)
    call = _Call(value, offset_mask, geometry, groups, offset_scale, softmax)
    output = call.rows.new_zeros(call.n * call.ho * call.wo * groups, call.rows.shape[1], dtype=call.dtype)
    for tap, place in enumerate(call.grid()):
        counts, corners = call.corners(tap, place)
        weight = call.weights[..., tap].flatten().where(counts, 0)
        for corner in corners:
            output += call.rows.index_select(0, corner.row) * (weight * corner.share)[:, None]
    return output.view(call.n, call.ho, call.wo, call.c).to(value.dtype)


def backward(
    value: Tensor,
    offset_mask: Tensor,
    grad_output: Tensor,  # (N, Ho, Wo, C)
    geometry: Geometry,
    groups: int,
    offset_scale: float,
    softmax: bool,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `value` and `offset_mask`, those that are needed, each of its tensor's shape and dtype."""
    call = _Call(value, offset_mask, geometry, groups, offset_scale, softmax)
    grad_output = grad_output.reshape(-1, call.rows.shape[1]).to(call.dtype)
    grad_rows = torch.zeros_like(call.rows, dtype=call.dtype) if needed[0] else None
    grad_offsets, grad_weights = [], []
    for tap, place in enumerate(call.grid()):
        counts, corners = call.corners(tap, place)
        weight = call.weights[..., tap].flatten().where(counts, 0)
        if grad_rows is not None:
            for corner in corners:
                grad_rows.index_add_(0, corner.row, grad_output * (weight * corner.share)[:, None])
        if needed[1]:
            products = [(call.rows.index_select(0, corner.row) * grad_output).sum(1) for corner in corners]
            by_weight, by_x, by_y = (
                sum(product * share for product, share in zip(products, shares, strict=True)).where(counts, 0)
                for shares in list(zip(*corners, strict=True))[1:]
            )
            grad_weights.append(by_weight)
            grad_offsets += [by_x * weight * offset_scale, by_y * weight * offset_scale]
    grad_value = grad_offset_mask = None
    if grad_rows is not None:
        grad_value = grad_rows[:-1].view(value.shape).to(value.dtype)
    if needed[1]:
        by_weights = torch.stack(grad_weights, -1)  # (M, K)
        if softmax:
            weights = call.weights.reshape(by_weights.shape)
            by_weights = weights * (by_weights - (weights * by_weights).sum(-1, keepdim=True))
        columns = torch.cat((torch.stack(grad_offsets, -1), by_weights), -1)
        columns = columns.view(call.n, call.ho, call.wo, groups * columns.shape[1]).to(value.dtype)
        grad_offset_mask = torch.nn.functional.pad(columns, (0, offset_mask.shape[3] - columns.shape[3]))
    return grad_value, grad_offset_mask


@lru_cache
def _warn(device: str) -> None:
    kind = "AMD's" if device == "cuda" else f"{device!r}"
    warnings.warn(
        f"dcnv4_ext has no kernels for {kind} devices: torch's own operators take their place, with the same results, "
        "more slowly",
        stacklevel=2,
    )
