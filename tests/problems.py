"""Random problems for the operator, and the one table of tolerances."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from functools import cached_property

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

    @cached_property
    def right(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the reference makes of it in fp64. Computed once: a problem that was asked for it stays as it is."""
        return by_the_reference(self)

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


# Where the official operator (OpenGVLab/DCNv4, commit 4b848f7) ends the process, raises an error or is silently wrong:
# ((N, H, W, C, G), settings). A number is that of an issue there.
OFFICIAL_FAILURES: dict[str, tuple[tuple[int, int, int, int, int], dict]] = {
    # Its blocks straddle two images, and their pixels of the second one are computed from the first.
    "sd_level_1_batch_3": ((3, 32, 32, 320, 10), {}),
    "sd_level_2_batch_6": ((6, 16, 16, 640, 20), {}),
    "sd_level_3_batch_3": ((3, 8, 8, 1280, 40), {}),
    "sd_level_4_batch_3": ((3, 4, 4, 1280, 40), {}),
    "odd_map_batch_2": ((2, 7, 7, 1024, 32), {}),
    "odd_map_batch_8": ((8, 7, 7, 512, 32), {}),
    "groups_of_16_batch_2": ((2, 28, 28, 128, 8), {}),
    "groups_of_16_batch_4": ((4, 14, 14, 256, 16), {}),
    "tiny_map_straddles_images": ((2, 5, 5, 64, 4), {}),
    "stride_2_straddles_images_batch_16": ((16, 20, 20, 256, 4), dict(stride=2)),
    "stride_2_straddles_images_batch_3": ((3, 32, 32, 320, 10), dict(stride=2)),
    "stride_2_straddles_images_wide": ((3, 8, 8, 1280, 40), dict(stride=2)),
    "stride_2_all_of_image_1": ((2, 10, 10, 64, 4), dict(stride=2)),
    "backward_straddles_images": ((4, 7, 7, 64, 4), {}),
    "backward_straddles_images_tiny": ((2, 5, 5, 16, 1), {}),
    "backward_straddles_images_one_group": ((8, 7, 7, 16, 1), {}),
    "backward_straddles_images_two_groups": ((8, 7, 7, 32, 2), {}),
    "backward_straddles_images_13x13": ((8, 13, 13, 32, 2), {}),
    "backward_straddles_images_13x13_batch_6": ((6, 13, 13, 64, 2), {}),
    # They do not divide the pixels: an assert ends the process.
    "no_power_of_two_divides": ((1, 14, 14, 256, 4), {}),
    "stride_2_14x14": ((1, 14, 14, 256, 4), dict(stride=2)),
    "stride_2_40x40": ((1, 40, 40, 128, 4), dict(stride=2)),
    "stride_2_56x56": ((1, 56, 56, 64, 4), dict(stride=2)),
    "stride_2_56x56_batch_2": ((2, 56, 56, 64, 4), dict(stride=2)),
    "stride_2_7x7": ((1, 7, 7, 512, 16), dict(stride=2)),
    "issue_25": ((1, 248, 456, 128, 4), dict(stride=2)),
    "issue_89": ((1, 336, 580, 64, 4), dict(stride=2)),
    # More outputs than inputs: it reads and writes past the ends of tensors.
    "padding_2": ((1, 8, 8, 64, 4), dict(padding=2)),
    # A block for all channels has too many threads, and the launch fails; so do three entries of its table in fp32.
    "backward_1280_channels": ((1, 8, 8, 1280, 40), {}),
    "forward_8224_channels": ((1, 3, 3, 8224, 257), {}),
    "its_table_7x7": ((64, 7, 7, 192, 6), {}),
    "its_table_50x80": ((1, 50, 80, 192, 6), {}),
    "its_table_50x80_wide": ((1, 50, 80, 384, 6), {}),
    # Backward reads weights that another warp has not written yet.
    "backward_race_width_48": ((1, 9, 9, 192, 4), {}),
    "backward_race_width_80": ((1, 9, 9, 320, 4), {}),
    "backward_race_width_128": ((1, 9, 9, 512, 4), {}),
    # An assert on the channels of a group, ends of batches, other kernels than 3x3.
    "width_4_groups": ((1, 6, 6, 20, 5), {}),
    "width_20_groups": ((2, 10, 10, 100, 5), {}),
    "batch_past_256": ((257, 3, 3, 16, 1), {}),
    "issue_20_batch_504": ((504, 3, 3, 16, 1), {}),
    "kernel_1": ((1, 6, 6, 64, 4), dict(kernel_size=1, padding=0)),
    "kernel_2": ((1, 6, 6, 64, 4), dict(kernel_size=2)),
    "kernel_5": ((1, 9, 9, 64, 4), dict(kernel_size=5, padding=2)),
    "kernel_7": ((1, 9, 9, 64, 4), dict(kernel_size=7, padding=3)),
}


def problem_of(
    n: int, h: int, w: int, c: int, groups: int, dtype: torch.dtype, spread: float = 3, **settings
) -> Problem:
    """A problem of a given shape, 3x3 unless `settings` say otherwise; offsets up to `spread` pixels."""
    generator = torch.Generator().manual_seed(n * h * w + c)
    geometry = geometry_of(settings)
    ho, wo = geometry.output_size(h, w)
    k = geometry.taps
    offset_mask = torch.randn(n, ho, wo, groups, 3 * k, generator=generator)
    offset_mask[..., : 2 * k] = between_cells((n, ho, wo, groups, 2 * k), generator, spread)
    return Problem(
        0,
        torch.randn(n, h, w, c, generator=generator).to(dtype),
        offset_mask.flatten(3).to(dtype),
        torch.randn(n, ho, wo, c, generator=generator).to(dtype),
        dict(groups=groups, **settings),
    )


def of_groups(
    problem: Problem, results: tuple[Tensor, Tensor, Tensor], groups: list[int]
) -> tuple[Problem, tuple[Tensor, Tensor, Tensor]]:
    """Some groups of a problem and of its results: groups do not know of each other."""

    def some(tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (problem.settings["groups"], -1))[..., groups, :].flatten(-2)

    value, offset_mask, grad_output = map(some, (problem.value, problem.offset_mask, problem.grad_output))
    output, grad_value, grad_offset_mask = map(some, results)
    settings = problem.settings | dict(groups=len(groups))
    return Problem(problem.seed, value, offset_mask, grad_output, settings), (
        output,
        grad_value,
        grad_offset_mask,
    )


def solve(operator, problem: Problem, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(output, gradient of value, gradient of offset_mask) of an operator on a problem, in `dtype` or the problem's own."""
    value = problem.value.to(dtype or problem.value.dtype).detach().requires_grad_()
    offset_mask = problem.offset_mask.to(dtype or problem.value.dtype).detach().requires_grad_()
    output = operator(value, offset_mask, **problem.settings)
    gradients = torch.autograd.grad(output, (value, offset_mask), problem.grad_output.to(output.dtype))
    return output.detach(), *gradients


# Elements of (N, Ho, Wo, K, C), of which the reference makes dozens: a bit less than 32 MiB in fp64. Larger ones are memory that
# malloc asks of the system each time, page by page, which takes longer than the sums.
PART = 4_100_000


def by_the_reference(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """The reference in fp64, half of the channels at a time where a map is large: channels do not know of each other."""
    n, ho, wo, c = problem.grad_output.shape
    k, groups = geometry_of(problem.settings).taps, problem.settings["groups"]
    if n * ho * wo * k * c <= PART or c == 1:
        return solve(dcnv4_reference, problem, torch.float64)
    half = groups // 2 * (c // groups) if groups > 1 else c // 2
    taps = 3 * k * (groups // 2)
    halves = [
        by_the_reference(
            replace(
                problem,
                value=problem.value[..., channels],
                offset_mask=problem.offset_mask[..., columns],
                grad_output=problem.grad_output[..., channels],
                settings=problem.settings | dict(groups=max(1, share)),
            )
        )
        for channels, columns, share in (
            (slice(half), slice(taps or None), groups // 2),
            (slice(half, None), slice(taps, None), groups - groups // 2),
        )
    ]
    outputs, grads_value, grads_offset_mask = zip(*halves, strict=True)
    # Those of one group look where all of it looks.
    grad_offset_mask = torch.cat(grads_offset_mask, -1) if taps else sum(grads_offset_mask)
    return torch.cat(outputs, -1), torch.cat(grads_value, -1), grad_offset_mask


def geometry_of(settings: dict) -> Geometry:
    keys = dict(kernel_size=3, stride=1, padding=1, dilation=1, remove_center=False)
    return Geometry.of(*(settings.get(key, default) for key, default in keys.items()))


def mismatches(problem: Problem, results: tuple[Tensor, Tensor, Tensor]) -> list[str]:
    """What differs from the fp64 reference by more than the tolerance of the dtype."""
    relative, absolute = TOLERANCES[problem.value.dtype]
    found = []
    for name, got, want in zip(
        ("output", "grad_value", "grad_offset_mask"),
        results,
        problem.right,
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
