"""Problems for the emulated kernels, drawn or made by hand, and what their results are held to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dcnv4_ext import dcnv4_reference
from problems import random_problem

from .library import Operator

# Standard deviation of the offsets by their kind, in pixels.
SPREAD = {"zero": 0.0, "lattice": 2.0, "sixteenths": 2.0, "normal": 1.5, "wide": 3.0, "wild": 2.0}
# Rounding of one result to the storage type, and of the sums behind it, relative to the largest of them.
ROUNDING = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
SUMMING = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}
# Below this fp16 has no finer numbers.
SMALLEST = {torch.float16: 2.0**-25}


@dataclass(frozen=True)
class Case:
    op: Operator
    batch: int
    size: tuple[int, int]
    depth: int
    padding_channels: int  # of offset_mask
    row_gap: int  # elements between the rows of every tensor
    offsets: str  # a key of SPREAD, or "drawn"
    dtype: torch.dtype
    seed: int

    @property
    def channels(self) -> int:
        return self.op.groups * self.depth

    def __str__(self) -> str:
        op = self.op
        return (
            f"{self.batch}x{self.size[0]}x{self.size[1]}x{op.groups}x{self.depth} k{op.kernel_size} s{op.stride} p{op.padding} "
            f"d{op.dilation} scale{op.offset_scale} rc{int(op.remove_center)} softmax{int(op.softmax)} +P{self.padding_channels} "
            f"gap{self.row_gap} {self.offsets} {str(self.dtype)[6:]} seed{self.seed}"
        )


@dataclass(frozen=True)
class Tensors:
    value: Tensor  # (N, H, W, C)
    offset_mask: Tensor  # (N, Ho, Wo, P)
    grad_output: Tensor  # (N, Ho, Wo, C)


def random_case(seed: int) -> tuple[Case, Tensors]:
    """Problem number `seed` of tests/problems.py, two in five with a gap behind every pixel."""
    problem = random_problem(seed)
    op, gap = Operator(**problem.settings), (0, 0, 0, 8, 3)[seed % 5]
    n, h, w, c = problem.value.shape
    padding_channels = problem.offset_mask.shape[3] - 3 * op.groups * op.taps
    case = Case(
        op, n, (h, w), c // op.groups, padding_channels, gap, "drawn", problem.value.dtype, seed
    )  # fmt: skip
    # Rows of offset_mask that lie in step with 16 bytes, as modules make them, for half of the problems.
    mask_gap = gap if seed % 2 else -problem.offset_mask.shape[3] % 8
    return case, Tensors(
        _rows(problem.value, gap), _rows(problem.offset_mask, mask_gap), _rows(problem.grad_output, gap)
    )


def _rows(tensor: Tensor, gap: int) -> Tensor:
    """The same numbers with `gap` NaN behind every pixel."""
    if gap == 0:
        return tensor.contiguous()
    wide = tensor.new_full((*tensor.shape[:3], tensor.shape[3] + gap), math.nan)
    wide[..., : tensor.shape[3]] = tensor
    return wide[..., : tensor.shape[3]]


def tensors_of(case: Case) -> Tensors:
    """Random tensors for a case made by hand. Offsets but the normal ones are multiples of 1/16 below 8, so that positions are exact in every
    type and kernels and reference agree on the cell."""
    random_numbers = torch.Generator().manual_seed(case.seed)
    op, k = case.op, case.op.taps
    ho, wo = op.output_size(*case.size)
    shape = (case.batch, ho, wo, op.groups)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random_numbers, dtype=torch.float64)

    offsets = normal(*shape, 2 * k) * SPREAD[case.offsets]
    if case.offsets != "normal":
        step = 1.0 if case.offsets == "lattice" else 16.0
        offsets = (offsets * step).round().clamp(-7.9 * step, 7.9 * step).trunc() / step
    if case.offsets == "wild":
        for odd_number in (math.nan, math.inf, -math.inf, 6e4, -6e4):
            offsets[torch.rand(offsets.shape, generator=random_numbers) < 0.05] = odd_number
    weights = normal(*shape, k)
    runs = torch.cat([offsets, weights], -1).flatten(3)
    padding = torch.full(
        (case.batch, ho, wo, case.padding_channels), math.nan, dtype=torch.float64
    )  # never to be read
    return Tensors(
        _rows(normal(case.batch, *case.size, case.channels).to(case.dtype), case.row_gap),
        _rows(torch.cat([runs, padding], -1).to(case.dtype), case.row_gap),
        _rows(normal(case.batch, ho, wo, case.channels).to(case.dtype), case.row_gap),
    )


def reference(op: Operator, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """Output and both gradients in fp64. Channels of offset_mask behind the last group's have a zero gradient."""
    value = tensors.value.double().requires_grad_()
    used = 3 * op.groups * op.taps
    runs = tensors.offset_mask.double()[..., :used].requires_grad_()
    output = dcnv4_reference(
        value, runs, groups=op.groups, kernel_size=op.kernel_size, stride=op.stride, padding=op.padding, dilation=op.dilation,
        offset_scale=op.offset_scale, remove_center=op.remove_center, softmax=op.softmax,
    )  # fmt: skip
    grad_value, grad_runs = torch.autograd.grad(output, (value, runs), tensors.grad_output.double())
    grad_offset_mask = torch.zeros_like(tensors.offset_mask, dtype=torch.float64)
    grad_offset_mask[..., :used] = grad_runs
    return output.detach(), grad_value, grad_offset_mask


def mismatch(actual: Tensor, expected: Tensor) -> str | None:
    """Where `actual` is farther from the fp64 `expected` than one rounding and the rounding of its sums, in words; else None."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if actual.numel() == 0:
        return None
    finite = expected.isfinite()
    if not torch.equal(actual.isnan(), expected.isnan()):
        return f"NaN at {int(actual.isnan().sum())} places, expected at {int(expected.isnan().sum())}"
    if not torch.equal(actual[expected.isinf()].double(), expected[expected.isinf()]):
        return "infinities differ"
    if not finite.any():
        return None
    dtype = actual.dtype
    actual, expected = actual[finite].double(), expected[finite]
    allowed = (
        ROUNDING[dtype] * expected.abs() + SUMMING[dtype] * expected.abs().max() + SMALLEST.get(dtype, 0.0)
    )
    error = (actual - expected).abs()
    worst = int((error - allowed).argmax())
    if error[worst] <= allowed[worst]:
        return None
    return f"{float(actual[worst])} instead of {float(expected[worst])} at {worst} of {error.numel()}"
