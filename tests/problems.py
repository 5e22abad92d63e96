"""Random problems for the operator, and the one table of tolerances."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dcnv4_ext import dcnv4_reference
from dcnv4_ext.geometry import Geometry

KERNELS = [
    (1, 1),
    (2, 2),
    (3, 3),
    (3, 3),
    (2, 4),
    (5, 5),
    (3, 1),
    (1, 3),
]  # K in {1, 3, 4, 8, 9, 25}, 24 without centre
WIDTHS = [1, 3, 4, 8, 12, 16, 24, 32, 40, 48, 64, 80, 128]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Kernels round once, so an element may miss the fp64 result by its storage type's rounding (relative to itself) and by the
# rounding of the sums in the compute type (relative to the largest element).
TOLERANCES = {  # dtype: (relative to the element, relative to the largest)
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 2e-6),
    torch.bfloat16: (2**-8, 1e-5),
    torch.float16: (2**-10, 1e-5),
}


@dataclass
class Problem:
    """One call: inputs in the tested dtype and the keyword arguments."""

    seed: int
    value: Tensor
    offset_mask: Tensor
    grad_output: Tensor
    settings: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return f"seed {self.seed}: value {tuple(self.value.shape)} {self.value.dtype}, {self.settings}"


def between_cells(shape: tuple[int, ...], generator: torch.Generator, largest: float) -> Tensor:
    """Offsets that are odd sixteenths: exact in bf16, and at offset_scale 1/2, 1, 2 and -3/2 never on a cell's border, where the
    derivative jumps and the rounding of a position would decide."""
    steps = int(largest * 8)
    return (2 * torch.randint(-steps, steps, shape, generator=generator) + 1) / 16


def random_problem(seed: int, dtype: torch.dtype | None = None) -> Problem:
    """Odd, non-square, asymmetric: everything the contract allows, drawn from one seed."""
    draw = random.Random(seed)
    dtype = dtype or draw.choice(DTYPES)
    kernel = draw.choice(KERNELS)
    remove_center = kernel in ((3, 3), (5, 5)) and draw.random() < 0.3
    stride = (draw.choice([1, 1, 2]), draw.choice([1, 1, 2, 3]))
    padding = (draw.choice([0, 1, 1, 2]), draw.choice([0, 1, 1, 2]))
    dilation = (draw.choice([1, 1, 2]), draw.choice([1, 1, 2]))
    d, g = draw.choice(WIDTHS), draw.choice([1, 2, 3])
    n = draw.choice([0, 1, 1, 3, 6, 257]) if draw.random() < 0.4 else draw.choice([1, 2])
    largest = 4 if n > 6 else 13
    geometry = Geometry.of(kernel, stride, padding, dilation, remove_center)
    least = [max(1, dil * (k - 1) + 1 - 2 * p) for dil, k, p in zip(dilation, kernel, padding, strict=True)]
    h, w = (draw.randint(low, max(low, largest)) for low in least)
    if n > 6:
        d, g = min(d, 12), 1
    ho, wo = geometry.output_size(h, w)
    k = geometry.taps
    p = 3 * g * k + draw.choice([0, 5, 8])
    settings = dict(
        groups=g, kernel_size=kernel, stride=stride, padding=padding, dilation=dilation,
        offset_scale=draw.choice([1.0, 1.0, 1.0, 0.5, 2.0, -1.5]), remove_center=remove_center, softmax=draw.random() < 0.25,
    )  # fmt: skip

    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(n, h, w, g * d, generator=generator).to(dtype)
    grad_output = torch.randn(n, ho, wo, g * d, generator=generator).to(dtype)
    offset_mask = torch.randn(n, ho, wo, p, generator=generator)
    groups = offset_mask[..., : 3 * g * k].unflatten(-1, (g, 3 * k))
    offsets = groups[..., : 2 * k]
    spread = draw.choice(["lattice", "near", "near", "far"])
    offsets.copy_(
        # Exact in every type: all agree on the cell, and on the one-sided derivative.
        torch.randint(-2, 3, tuple(offsets.shape), generator=generator) * (seed % 3)
        if spread == "lattice"
        else between_cells(tuple(offsets.shape), generator, 1.5 if spread != "far" else 12)
    )
    if draw.random() < 0.3:
        wild = torch.rand(offsets.shape, generator=generator) < 0.05
        offsets[wild] = draw.choice([float("nan"), float("inf"), -float("inf"), 30000.0, -30000.0])
    offset_mask[..., 3 * g * k :] = float("nan")  # channels never to be read
    return Problem(seed, value, offset_mask.to(dtype), grad_output, settings)


def wide_problem(seed: int) -> Problem:
    """A 3x3 kernel on a map several vectors wide."""
    draw = random.Random(seed)
    stride, d, g = draw.choice([1, 1, 2]), draw.choice(WIDTHS), draw.choice([1, 2])
    h, w = draw.randint(3, 8), draw.randint(32, 80)
    settings = dict(
        groups=g, stride=stride, offset_scale=draw.choice([1.0, 1.0, 0.5]), softmax=draw.random() < 0.2
    )
    ho, wo = ((size - 1) // stride + 1 for size in (h, w))
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[seed % len(DTYPES)]
    value = torch.randn(2, h, w, g * d, generator=generator).to(dtype)
    grad_output = torch.randn(2, ho, wo, g * d, generator=generator).to(dtype)
    offset_mask = torch.randn(2, ho, wo, g, 27, generator=generator)
    offset_mask[..., :18] = between_cells((2, ho, wo, g, 18), generator, draw.choice([1.5, 6]))
    return Problem(seed, value, offset_mask.flatten(3).to(dtype), grad_output, settings)


def solve(operator, problem: Problem, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(output, gradient of value, gradient of offset_mask) of an operator on a problem, in `dtype` or the problem's own."""
    value = problem.value.to(dtype or problem.value.dtype).detach().requires_grad_()
    offset_mask = problem.offset_mask.to(dtype or problem.value.dtype).detach().requires_grad_()
    output = operator(value, offset_mask, **problem.settings)
    gradients = torch.autograd.grad(output, (value, offset_mask), problem.grad_output.to(output.dtype))
    return output.detach(), *gradients


def mismatches(problem: Problem, results: tuple[Tensor, Tensor, Tensor]) -> list[str]:
    """What differs from the fp64 reference by more than the tolerance of the dtype."""
    relative, absolute = TOLERANCES[problem.value.dtype]
    found = []
    for name, got, want in zip(
        ("output", "grad_value", "grad_offset_mask"),
        results,
        solve(dcnv4_reference, problem, torch.float64),
        strict=True,
    ):
        if got.dtype != problem.value.dtype or got.shape != want.shape:
            found.append(f"{name}: {tuple(got.shape)} {got.dtype} instead of {tuple(want.shape)} ({problem})")
            continue
        if want.numel() == 0:
            continue
        error = (got.double() - want).abs()
        # fp16 cannot hold less than its smallest subnormal.
        floor = 2.0**-24 if got.dtype == torch.float16 else 0.0
        allowed = relative * want.abs() + absolute * want.abs().max() + floor
        if not bool((error <= allowed).all()):
            worst = float((error - allowed).nan_to_num(float("inf")).max())
            found.append(
                f"{name}: {worst:.3g} past the tolerance, largest element {float(want.abs().max()):.3g} ({problem})"
            )
    return found
