"""Random problems for the kernels, and what their results are held to."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dcnv4_ext import dcnv4_reference

from .library import Operator

KERNELS = [  # (kernel_size, remove_center), by number of taps: 1, 4, 8, 9, 25, and shapes that are not square
    ((1, 1), False), ((2, 2), False), ((3, 3), True), ((3, 3), False), ((3, 3), False), ((5, 5), False), ((2, 4), False),
    ((9, 1), False), ((1, 3), False), ((3, 5), True),
]  # fmt: skip
DEPTHS = [1, 3, 4, 8, 12, 16, 24, 32, 40, 48, 64, 80, 128]
OFFSETS = ["zero", "lattice", "sixteenths", "normal", "wide", "wild"]
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
    offsets: str
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


def random_case(seed: int) -> Case:
    """Case number `seed`, the same everywhere."""
    rng = random.Random(seed)
    kernel_size, remove_center = rng.choice(KERNELS)
    dilation = rng.choice([(1, 1), (1, 1), (2, 2), (1, 2)])
    padding = rng.choice([(0, 0), (1, 1), (1, 1), (2, 2), (2, 0)])
    stride = rng.choice([(1, 1), (1, 1), (2, 2), (1, 2)])
    batch = rng.choice([0, 1, 1, 1, 3, 3, 6, 257])
    groups = rng.choice([1, 1, 2, 3, 5])
    depth = rng.choice(DEPTHS)
    edge = 2 if batch == 257 else rng.choice([3, 6, 9, 17])
    if batch == 257:
        groups, depth = 1, min(depth, 16)
        kernel_size, remove_center = rng.choice([item for item in KERNELS if math.prod(item[0]) <= 9])
    op = Operator(
        groups, kernel_size, stride, padding, dilation, rng.choice([1.0, 1.0, 1.0, 0.5, 2.0, -1.5]), remove_center,
        rng.random() < 0.25,
    )  # fmt: skip
    # Large enough for one output, small enough for the emulation.
    size = []
    for axis in (0, 1):
        least = max(1, dilation[axis] * (kernel_size[axis] - 1) + 1 - 2 * padding[axis])
        size.append(rng.randint(least, max(least, edge)))
    while batch * math.prod(op.output_size(*size)) * groups * depth * op.taps > 150_000:
        if groups > 1:
            groups -= 1
            op = replace(op, groups=groups)
        elif batch > 1 and batch != 257:
            batch = 1
        else:
            smaller = [max(least, s - 1) for s, least in zip(size, _least(op), strict=True)]
            if smaller == size:
                break
            size = smaller
    return Case(
        op, batch, tuple(size), depth, rng.choice([0, 0, 1, 5, 8]), rng.choice([0, 0, 0, 8, 3]), rng.choice(OFFSETS),
        rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]), seed,
    )  # fmt: skip


def _least(op: Operator) -> list[int]:
    return [max(1, op.dilation[a] * (op.kernel_size[a] - 1) + 1 - 2 * op.padding[a]) for a in (0, 1)]


def _rows(tensor: Tensor, gap: int) -> Tensor:
    """The same numbers with `gap` NaN behind every pixel."""
    if gap == 0:
        return tensor.contiguous()
    wide = tensor.new_full((*tensor.shape[:3], tensor.shape[3] + gap), math.nan)
    wide[..., : tensor.shape[3]] = tensor
    return wide[..., : tensor.shape[3]]


def tensors_of(case: Case) -> Tensors:
    """Random tensors for `case`. Offsets but the normal ones are multiples of 1/16 below 8, so that positions are exact in every
    type and kernels and reference agree on the cell."""
    random_numbers = torch.Generator().manual_seed(case.seed)
    op, k = case.op, case.op.taps
    ho, wo = op.output_size(*case.size)
    shape = (case.batch, ho, wo, op.groups)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random_numbers, dtype=torch.float64)

    scale = {"zero": 0.0, "lattice": 2.0, "sixteenths": 2.0, "normal": 1.5, "wide": 3.0, "wild": 2.0}[
        case.offsets
    ]
    offsets = normal(*shape, 2 * k) * scale
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
