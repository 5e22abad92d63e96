"""The operator against the reference: random problems, smooth gradients, kinks, identities, bad input."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from functools import cache, lru_cache
from pathlib import Path

import pytest
import torch

from dcnv4_ext import dcnv4, dcnv4_reference, native
from problems import (
    DTYPES,
    OFFICIAL_FAILURES,
    TOLERANCES,
    Problem,
    between_cells,
    mismatches,
    of_groups,
    problem_of,
    random_problem,
    solve,
    wide_problem,
)
from programs import run

PROBLEMS = int(os.environ.get("DCNV4_PROBLEMS", "500"))
ISAS = native.cpu().dcnv4_cpu_isas().decode().split()


@pytest.mark.parametrize("isa", ISAS)
def test_random_problems(isa: str) -> None:
    """Each instruction set solves its share of the problems: forward and both gradients, every dtype."""
    with native.forced_isa(isa):
        found = [
            text
            for problem in map(random_problem, range(ISAS.index(isa), PROBLEMS, len(ISAS)))
            for text in mismatches(problem, solve(dcnv4, problem))
        ]
    assert not found, "\n".join(found[:5])


@pytest.mark.parametrize("name", OFFICIAL_FAILURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_the_official_operator_fails(name: str, dtype: torch.dtype) -> None:
    shape, settings = OFFICIAL_FAILURES[name]
    large = math.prod(shape[:4]) > 10**7
    if large and dtype is not torch.float32:
        pytest.skip("the reference takes seconds; once is enough for a large map")
    problem = problem_of(*shape, dtype, **settings)
    results = solve(dcnv4, problem)
    if large:  # of its first and its last group
        problem, results = of_groups(problem, results, [0, shape[4] - 1])
    found = mismatches(problem, results)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "settings",
    [
        dict(groups=2),
        dict(groups=1, kernel_size=(2, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2), offset_scale=0.5),
        dict(groups=2, softmax=True),
        dict(groups=1, remove_center=True, offset_scale=2.0),
    ],
    ids=["plain", "asymmetric", "softmax", "remove_center"],
)
def test_gradcheck(settings: dict) -> None:
    """fp64, fractional parts well inside their cells."""
    generator = torch.Generator().manual_seed(3)
    value = torch.randn(2, 5, 4, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    taps = settings.get("kernel_size", (3, 3))
    k = taps[0] * taps[1] - int(settings.get("remove_center", False))
    output = dcnv4_shape(value, settings)
    offset_mask = torch.randn(*output, settings["groups"], 3 * k, dtype=torch.float64, generator=generator)
    offset_mask[..., : 2 * k] = between_cells((*output, settings["groups"], 2 * k), generator, 2)
    offset_mask = offset_mask.flatten(3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, a: dcnv4(v, a, **settings), (value, offset_mask), fast_mode=True
    )


def dcnv4_shape(value: torch.Tensor, settings: dict) -> tuple[int, ...]:
    from dcnv4_ext.geometry import Geometry

    keys = dict(kernel_size=3, stride=1, padding=1, dilation=1, remove_center=False)
    geometry = Geometry.of(*(settings.get(key, default) for key, default in keys.items()))
    return (value.shape[0], *geometry.output_size(*value.shape[1:3]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [(28, 28), (24, 40), (7, 9)])
def test_lattice_points_take_the_cell_of_floor(isa: str, size: tuple[int, int]) -> None:
    """At integer positions, where every run starts, the derivative is the one-sided one of floor's cell, in every kernel."""
    problem = random_problem(0, torch.float32)
    generator = torch.Generator().manual_seed(2)
    problem.settings = dict(groups=1)
    problem.value = torch.randn(1, *size, 16, generator=generator)
    problem.grad_output = torch.randn(1, *size, 16, generator=generator)
    offset_mask = torch.randn(1, *size, 27, generator=generator)
    offset_mask[..., :18] = torch.randint(-2, 3, (1, *size, 18), generator=generator)
    problem.offset_mask = offset_mask
    with native.forced_isa(isa):
        found = mismatches(problem, solve(dcnv4, problem))
    assert not found, "\n".join(found)


def test_border_positions() -> None:
    """Exactly -1 and exactly W contribute nothing; just inside they do."""
    value = torch.ones(1, 1, 4, 1)
    for x, expected in (
        (-1.0, 0.0),
        (-0.75, 0.25),
        (0.0, 1.0),
        (3.0, 1.0),
        (3.25, 0.75),
        (4.0, 0.0),
        (1e9, 0.0),
    ):
        offset_mask = torch.zeros(1, 1, 4, 3)
        offset_mask[..., 0] = x - torch.arange(4)
        offset_mask[..., 2] = 1
        got = dcnv4(value, offset_mask, groups=1, kernel_size=1, padding=0)
        torch.testing.assert_close(got, torch.full_like(got, expected), msg=f"x={x}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_wild_offset_touches_nothing(isa: str, bad: float) -> None:
    """A tap that looks nowhere adds zero even where the map holds inf and NaN, in the output and in every gradient."""
    value = torch.full((1, 3, 3, 8), float("inf"))
    value[0, 0, 0] = float("nan")
    value.requires_grad_()
    offset_mask = torch.ones(1, 3, 3, 27)
    offset_mask[..., :18] = bad
    offset_mask.requires_grad_()
    with native.forced_isa(isa):
        output = dcnv4(value, offset_mask, groups=1)
        gradients = torch.autograd.grad(output, (value, offset_mask), torch.ones_like(output))
    for tensor in (output, *gradients):
        assert torch.equal(tensor, torch.zeros_like(tensor))


def test_one_hot_mask_is_a_shift() -> None:
    value = torch.randn(2, 5, 6, 12)
    for i in range(3):
        for j in range(3):
            offset_mask = torch.zeros(2, 5, 6, 27)
            offset_mask[..., 18 + i * 3 + j] = 1
            shifted = torch.zeros_like(value)
            rows, columns = slice(max(0, 1 - j), 5 - max(0, j - 1)), slice(max(0, 1 - i), 6 - max(0, i - 1))
            from_rows = slice(max(0, j - 1), 5 - max(0, 1 - j))
            from_columns = slice(max(0, i - 1), 6 - max(0, 1 - i))
            shifted[:, rows, columns] = value[:, from_rows, from_columns]
            assert torch.equal(dcnv4(value, offset_mask, groups=1), shifted), f"column {i}, row {j}"


def test_transposing_everything_transposes_the_output() -> None:
    generator = torch.Generator().manual_seed(5)
    value = torch.randn(1, 6, 9, 8, generator=generator)
    taps = torch.randn(1, 6, 9, 1, 27, generator=generator)
    offsets, weights = taps[..., :18].unflatten(-1, (3, 3, 2)), taps[..., 18:].unflatten(-1, (3, 3))
    turned = torch.cat(
        (offsets.transpose(-3, -2).flip(-1).flatten(-3), weights.transpose(-2, -1).flatten(-2)), -1
    )
    expected = dcnv4(value, taps.flatten(3), groups=1).transpose(1, 2)
    got = dcnv4(value.transpose(1, 2), turned.flatten(3).transpose(1, 2), groups=1)
    torch.testing.assert_close(got, expected)


def test_constant_map_returns_the_sum_of_the_weights() -> None:
    value = torch.full((1, 9, 9, 4), 2.0)
    offset_mask = torch.rand(1, 9, 9, 27)
    offset_mask[..., :18] -= 0.5
    inner = dcnv4(value, offset_mask, groups=1)[:, 2:-2, 2:-2]
    weights = offset_mask[..., 18:].sum(-1, keepdim=True)[:, 2:-2, 2:-2]
    torch.testing.assert_close(inner, (2 * weights).expand_as(inner))


def test_softmax_is_a_convex_combination() -> None:
    value = torch.full((1, 5, 5, 4), 3.0)
    offset_mask = torch.randn(1, 3, 3, 27) * 5
    offset_mask[..., :18] = 0
    output = dcnv4(value, offset_mask, groups=1, padding=0, softmax=True)
    torch.testing.assert_close(output, torch.full_like(output, 3.0))


def test_padding_channels_are_not_read_and_get_zero_gradient() -> None:
    value = torch.randn(2, 4, 4, 32)
    offset_mask = torch.randn(2, 4, 4, 32)
    spoiled = offset_mask.clone()
    spoiled[..., 27:] = float("nan")
    spoiled.requires_grad_()
    output = dcnv4(value, spoiled, groups=1)
    assert torch.equal(output, dcnv4(value, offset_mask, groups=1))
    output.sum().backward()
    assert torch.equal(spoiled.grad[..., 27:], torch.zeros(2, 4, 4, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(dtype: torch.dtype) -> None:
    """Two column slices of one tensor, as one Linear makes them, and transposed maps: the same numbers as contiguous ones."""
    both = torch.randn(2, 5, 7, 64 + 56).to(dtype)
    value, offset_mask = both[..., :64], both[..., 64:]
    assert native.rows(value) is value
    expected = dcnv4(value.contiguous(), offset_mask.contiguous(), groups=2)
    assert torch.equal(dcnv4(value, offset_mask, groups=2), expected)
    turned = value.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(dcnv4(turned, offset_mask[:, :, :, :], groups=2), expected)
    grad = torch.randn(2, 5, 7, 64).to(dtype)
    gradients = []
    for v, a in ((value, offset_mask), (value.contiguous(), offset_mask.contiguous())):
        v, a = v.detach().requires_grad_(), a.detach().requires_grad_()
        gradients.append(torch.autograd.grad(dcnv4(v, a, groups=2), (v, a), grad.expand_as(grad)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_group_among_others_is_the_group_alone(dtype: torch.dtype) -> None:
    """Large results are written past the caches, and threads fetch one group's data while they compute another's; a group alone is
    small, and has neither."""
    generator = torch.Generator().manual_seed(5)
    value = torch.randn(2, 29, 31, 5 * 32, generator=generator).to(dtype)
    offset_mask = (2 * torch.randn(2, 29, 31, 5 * 27 + 1, generator=generator)).to(dtype)
    grad_output = torch.randn(value.shape, generator=generator).to(dtype)
    assert value.numel() * value.element_size() > 2**18
    relative, absolute = TOLERANCES[dtype]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            whole = _solve(value, offset_mask, grad_output, 5)
            for g in range(5):
                channels, taps = slice(32 * g, 32 * g + 32), slice(27 * g, 27 * g + 27)
                alone = _solve(
                    value[:1, ..., channels], offset_mask[:1, ..., taps], grad_output[:1, ..., channels], 1
                )
                for found, among, part in zip(alone, whole, (channels, channels, taps), strict=True):
                    want = among[:1, ..., part].double()
                    error = (found.double() - want).abs()
                    # Two roundings of one sum lie up to a unit of the last place apart, twice what one may miss.
                    allowed = 2 * relative * want.abs() + absolute * want.abs().max()
                    assert bool((error <= allowed).all()), (threads, g)
            assert not whole[2][..., 5 * 27 :].any()
    finally:
        torch.set_num_threads(before)


def _solve(
    value: torch.Tensor, offset_mask: torch.Tensor, grad_output: torch.Tensor, groups: int
) -> tuple[torch.Tensor, ...]:
    value, offset_mask = value.detach().requires_grad_(), offset_mask.detach().requires_grad_()
    output = dcnv4(value, offset_mask, groups=groups)
    return output.detach(), *torch.autograd.grad(output, (value, offset_mask), grad_output)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    problem = random_problem(11, torch.float32)
    problem.settings = dict(groups=4)
    problem.value, problem.grad_output = torch.randn(8, 12, 12, 64), torch.randn(8, 12, 12, 64)
    problem.offset_mask = torch.randn(8, 12, 12, 112)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(solve(dcnv4, problem))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_split_rows_of_a_single_group() -> None:
    """One image and one group over several threads: rows are split, and the sums stay within rounding."""
    problem = random_problem(13, torch.float32)
    generator = torch.Generator().manual_seed(13)
    problem.settings = dict(groups=1)
    problem.value, problem.grad_output = torch.randn(1, 90, 50, 32), torch.randn(1, 90, 50, 32)
    problem.offset_mask = torch.randn(1, 90, 50, 27)
    problem.offset_mask[..., :18] = between_cells((1, 90, 50, 18), generator, 15)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = mismatches(problem, solve(dcnv4, problem))
        first = solve(dcnv4, problem)
        assert all(torch.equal(a, b) for a, b in zip(first, solve(dcnv4, problem), strict=True))
    finally:
        torch.set_num_threads(before)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("isa", ISAS)
def test_maps_larger_than_a_tile(isa: str) -> None:
    """Maps that are cut into row tiles, with offsets that leave the tile's rows."""
    value, offset_mask, want = _more_than_a_tile()
    with native.forced_isa(isa):
        got = dcnv4(value, offset_mask, groups=2)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@cache
def _more_than_a_tile() -> tuple[torch.Tensor, ...]:
    """Value, offset_mask and the reference's output."""
    generator = torch.Generator().manual_seed(17)
    value = torch.randn(1, 150, 200, 64, generator=generator)
    offset_mask = torch.randn(1, 150, 200, 2, 27, generator=generator)
    offset_mask[..., :18] = between_cells((1, 150, 200, 2, 18), generator, 15)
    groups = [
        dcnv4_reference(value[..., part].double(), offset_mask[..., g, :].double(), groups=1)
        for g, part in enumerate((slice(0, 32), slice(32, 64)))
    ]
    return value, offset_mask.flatten(3), torch.cat(groups, -1)


@pytest.mark.parametrize("isa", ISAS)
def test_wide_maps(isa: str) -> None:
    """3x3 kernels over maps several vectors wide: they are taken in strips, of which the last is a narrow one."""
    problems = _wide_problems()
    assert {problem.settings["stride"] for problem in problems} == {1, 2}
    with native.forced_isa(isa):
        found = [text for problem in problems for text in mismatches(problem, solve(dcnv4, problem))]
    assert not found, "\n".join(found[:5])


# What is kept between tests is kept with what the reference made of it, which most of the time goes to.
@cache
def _wide_problems() -> list[Problem]:
    return [wide_problem(seed) for seed in range(24)]


def _problem(
    size: tuple[int, int], d: int, dtype: torch.dtype, largest: float, seed: int, groups: int = 1, **settings
) -> Problem:
    """One image, a 3x3 kernel."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(1, *size, groups * d, generator=generator)
    stride = settings.get("stride", 1)
    output = [(extent - 1) // stride + 1 for extent in size]
    offset_mask = torch.randn(1, *output, groups, 27, generator=generator)
    offset_mask[..., :18] = between_cells((1, *output, groups, 18), generator, largest)
    grad_output = torch.randn(1, *output, groups * d, generator=generator)
    tensors = (tensor.to(dtype) for tensor in (value, offset_mask.flatten(3), grad_output))
    return Problem(seed, *tensors, dict(groups=groups, **settings))


_kept_problem = lru_cache(maxsize=2)(_problem)  # instruction sets take turns


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("d", [16, 24, 32, 48, 64, 80, 160])
def test_more_pixels_than_are_sorted_at_once(isa: str, d: int) -> None:
    """Backward in blocks, of 2048 pixels where it goes by cells and of 256 where it does not: one visit or several, a last batch
    that is not full."""
    problems = [
        _kept_problem((61, 37), d, dtype, 2, seed, softmax=seed == 1)
        for seed, dtype in enumerate((torch.float32, torch.bfloat16))
    ]
    with native.forced_isa(isa):
        found = [text for problem in problems for text in mismatches(problem, solve(dcnv4, problem))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_wider_than_any_block(isa: str) -> None:
    """No vectors of columns divide it: by cells there are no blocks then, pixel by pixel they are of one row."""
    problem = _kept_problem((3, 8203), 32, torch.float32, 2, 7)
    with native.forced_isa(isa):
        found = mismatches(problem, solve(dcnv4, problem))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "stride"), [((96, 96), 24), ((3, 8200), 1)], ids=["far apart", "a wide row"]
)
def test_taps_that_are_not_worth_sorting(
    isa: str, dtype: torch.dtype, size: tuple[int, int], stride: int
) -> None:
    """Sixteen pixels that look all over a map of 9,216 cells, and rows past the longest that is sorted."""
    problem = _kept_problem(size, 40, dtype, 60 if stride > 1 else 2, 5, stride=stride)
    with native.forced_isa(isa):
        found = mismatches(problem, solve(dcnv4, problem))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("isa", ISAS)
def test_infinite_values_and_weights_stay_where_they_are_seen(isa: str) -> None:
    """A network that overflows says so, and only where it does: however the kernel splits a bf16 number."""
    for dtype in (torch.float32, torch.bfloat16):
        problem = _problem((12, 12), 32, dtype, 2, 6)
        problem.value[0, 4, 7, 3] = float("inf")
        problem.value[0, 9, 2, 30] = float("nan")
        weights = problem.offset_mask.clone()
        weights[0, 4, 7, 20] = float("inf")
        weights[0, 9, 2, 25] = float("nan")
        for value, offset_mask in (
            (problem.value, problem.offset_mask),
            (torch.randn_like(problem.value), weights),
        ):
            with native.forced_isa(isa):
                found = _differentiated(dcnv4, value, offset_mask, problem)
            want = _differentiated(dcnv4_reference, value.double(), offset_mask.double(), problem)
            assert not found[0].isfinite().all()
            for result, right in zip(found, want, strict=True):
                assert torch.equal(result.isfinite(), right.isfinite())


def _differentiated(function, value: torch.Tensor, offset_mask: torch.Tensor, problem: Problem) -> tuple:
    value, offset_mask = value.clone().requires_grad_(), offset_mask.clone().requires_grad_()
    output = function(value, offset_mask, **problem.settings)
    return output.detach(), *torch.autograd.grad(output.sum(), (value, offset_mask))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kernel_size", [3, (1, 3)], ids=["3x3", "others"])
def test_softmax_of_logits_far_apart(isa: str, kernel_size: int | tuple[int, int]) -> None:
    """Powers that fp32 cannot tell from zero, taps that are masked, and a logit that is not a number."""
    generator = torch.Generator().manual_seed(31)
    taps = 9 if kernel_size == 3 else 3
    value, grad_output = (torch.randn(1, 12, 13, 32, generator=generator) for _ in range(2))
    offset_mask = torch.randn(1, 12, 13, 3 * taps, generator=generator)
    offset_mask[..., : 2 * taps] = between_cells((1, 12, 13, 2 * taps), generator, 2)
    logits = offset_mask[..., 2 * taps :].mul_(100)
    logits[0, :, 3, 1] = float("-inf")
    padding = 1 if kernel_size == 3 else (0, 1)
    problem = Problem(
        31,
        value,
        offset_mask,
        grad_output,
        dict(groups=1, kernel_size=kernel_size, padding=padding, softmax=True),
    )
    with native.forced_isa(isa):
        found = mismatches(problem, solve(dcnv4, problem))
        assert not found, "\n".join(found)
        logits[0, 5, 6, 2] = float("nan")
        output = dcnv4(value, offset_mask, **problem.settings)
    finite = output.isfinite().all(-1)
    assert not finite[0, 5, 6] and int(finite.sum()) == 12 * 13 - 1


@pytest.mark.parametrize("isa", ISAS[:-1])
@pytest.mark.parametrize("size", [(2, 2**18 + 3), (70, 2**14)], ids=["columns", "elements"])
def test_maps_past_what_fp32_counts_exactly(isa: str, size: tuple[int, int]) -> None:
    """Wider, or with more elements, than whole numbers that fp32 holds: other kernels take over, with the same results."""
    assert ISAS[-1] == "portable"
    generator = torch.Generator().manual_seed(19)
    value = torch.randn(1, *size, 9, generator=generator)  # sixteen channels in a packed map
    offset_mask = torch.randn(1, *size, 27, generator=generator)
    offset_mask[..., :18] = between_cells((1, *size, 18), generator, 2)
    grad_output = torch.randn(value.shape, generator=generator)
    results = []
    for name in (isa, "portable"):
        with native.forced_isa(name):
            results.append(_solve(value, offset_mask, grad_output, 1))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS[:-1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2], ids=["one task a group", "several tasks a group"])
@pytest.mark.parametrize("offsets", ["near", "far", "few far"])
def test_maps_larger_than_a_cache(isa: str, dtype: torch.dtype, threads: int, offsets: str) -> None:
    """Backward packs and unpacks rows as it comes to them, in blocks of some columns or of few rows: taps may leave those, and
    return to rows that were done."""
    results = []
    before = torch.get_num_threads()
    for settings in (dict(groups=1), dict(groups=1, stride=2, softmax=True, offset_scale=0.5)):
        problem = _problem((64, 320), 64, dtype, 30 if offsets == "far" else 2, 23, **settings)
        if offsets == "few far":
            generator = torch.Generator().manual_seed(29)
            pairs = problem.offset_mask[..., :18]
            wild = between_cells(pairs.shape, generator, 60).to(dtype)
            problem.offset_mask[..., :18] = torch.where(
                torch.rand(pairs.shape, generator=generator) < 1e-3, wild, pairs
            )
        try:
            for name, count in ((isa, threads), ("portable", before)):
                torch.set_num_threads(count)
                with native.forced_isa(name):
                    results.append(solve(dcnv4, problem))
        finally:
            torch.set_num_threads(before)
        relative, absolute = TOLERANCES[dtype]
        for got, want in zip(*results[-2:], strict=True):
            got, want = got.double(), want.double()
            limit = 2 * (relative * want.abs() + absolute * want.abs().max())  # both are rounded
            assert bool(((got - want).abs() <= limit).all()), (settings, float((got - want).abs().max()))


def test_needed_gradients_only() -> None:
    value, offset_mask = torch.randn(1, 4, 4, 16), torch.randn(1, 4, 4, 32)
    full = [t.clone().requires_grad_() for t in (value, offset_mask)]
    expected = torch.autograd.grad(dcnv4(*full, groups=1).sum(), full)
    for index in (0, 1):
        inputs = [value, offset_mask]
        inputs[index] = inputs[index].clone().requires_grad_()
        (got,) = torch.autograd.grad(dcnv4(*inputs, groups=1).sum(), inputs[index])
        assert torch.equal(got, expected[index])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(dtype: torch.dtype) -> None:
    value = torch.randn(0, 4, 4, 16, dtype=dtype, requires_grad=True)
    offset_mask = torch.randn(0, 4, 4, 32, dtype=dtype, requires_grad=True)
    output = dcnv4(value, offset_mask, groups=1)
    assert output.shape == (0, 4, 4, 16)
    output.sum().backward()
    assert value.grad.shape == value.shape and offset_mask.grad.shape == offset_mask.shape


def test_low_precision_is_no_worse_than_the_reference_in_it() -> None:
    """STYLE: the error against fp64 stays within twice that of the plain reference run in the same precision."""
    for dtype in (torch.bfloat16, torch.float16):
        problem = random_problem(21, dtype)
        problem.settings = dict(groups=2)
        problem.value, problem.grad_output = (
            torch.randn(2, 9, 7, 64).to(dtype),
            torch.randn(2, 9, 7, 64).to(dtype),
        )
        problem.offset_mask = torch.randn(2, 9, 7, 54).to(dtype)
        want = solve(dcnv4_reference, problem, torch.float64)[0]
        ours = (solve(dcnv4, problem)[0].double() - want).norm()
        plain = (solve(dcnv4_reference, problem)[0].double() - want).norm()
        assert ours <= 2 * plain
        assert TOLERANCES[dtype][0] < 0.01


BAD_INPUT = {
    "value must be (N, H, W, C)": dict(value=torch.zeros(4, 4, 16)),
    "offset_mask must be (N, Ho, Wo, P)": dict(offset_mask=torch.zeros(4, 4, 32)),
    "fewer than 3 * groups * taps": dict(offset_mask=torch.zeros(1, 4, 4, 26)),
    "which groups=3 does not divide": dict(groups=3),
    "which groups=0 does not divide": dict(groups=0),
    "predicted at the output resolution": dict(offset_mask=torch.zeros(1, 5, 4, 32)),
    "expected (1, 2, 2, P)": dict(stride=2),
    "move both to one device": dict(offset_mask=torch.zeros(1, 4, 4, 32, device="meta")),
    "padding must be at least 0": dict(padding=-1),
    "stride must be at least 1": dict(stride=(0, 1)),
    "smaller than the kernel": dict(kernel_size=9),
    "odd kernel height and width": dict(kernel_size=2, remove_center=True),
    "without taps": dict(kernel_size=1, padding=0, remove_center=True),
    "empty map": dict(value=torch.zeros(1, 0, 4, 16)),
    "value has a 65536x65536 map": dict(value=torch.zeros(0, 2**16, 2**16, 16)),
    "groups must be at most": dict(groups=2**70),
    "kernel_size must be at most": dict(kernel_size=2**70),
    "stride must be at most": dict(stride=(2**32 + 1, 1)),
    # A C int of these is 1: the kernel would compute something else.
    "padding must be at most": dict(padding=2**32 + 1, dilation=2**32 + 1),
    "over more than 2147483647 pixels": dict(padding=2**30, dilation=2**30),
    "more than 1048576 points": dict(kernel_size=(1, 2**20 + 1), padding=(0, 2**19)),
    "offset_scale must be finite, got nan": dict(offset_scale=float("nan")),
    "offset_scale must be finite, got -inf": dict(offset_scale=-float("inf")),
    "offset_scale must be finite, got an int": dict(offset_scale=10**400),
}


@pytest.mark.parametrize("text", BAD_INPUT)
def test_bad_value(text: str) -> None:
    call = (
        dict(value=torch.zeros(1, 4, 4, 16), offset_mask=torch.zeros(1, 4, 4, 32), groups=1) | BAD_INPUT[text]
    )
    with pytest.raises(ValueError) as error:
        dcnv4(call.pop("value"), call.pop("offset_mask"), **call)
    assert text in str(error.value)


BAD_TYPE = {
    "value is torch.int64": dict(value=torch.zeros(1, 4, 4, 16, dtype=torch.int64)),
    "offset_mask is torch.complex64": dict(offset_mask=torch.zeros(1, 4, 4, 32, dtype=torch.complex64)),
    "cast one so that they agree": dict(offset_mask=torch.zeros(1, 4, 4, 32, dtype=torch.float64)),
    "value must be a torch.Tensor, got list": dict(value=[1.0]),
    "kernel_size must be an int or an (h, w) pair": dict(kernel_size=(3, 3, 3)),
    "dilation must be an int or an (h, w) pair": dict(dilation=1.5),
    "groups must be an int, got 1.0": dict(groups=1.0),
    "groups must be an int, got True": dict(groups=True),
    "groups must be an int, got None": dict(groups=None),
    "offset_scale must be a number, got 'a'": dict(offset_scale="a"),
    "offset_scale must be a number, got None": dict(offset_scale=None),
    "offset_scale must be a number, got True": dict(offset_scale=True),
    "softmax must be True or False, got 'no'": dict(softmax="no"),
    "softmax must be True or False, got tensor": dict(softmax=torch.ones(2)),
    "remove_center must be True or False, got 1": dict(remove_center=1),
    "value is a tensor of layout torch.sparse_coo": dict(value=lambda: torch.zeros(1, 4, 4, 16).to_sparse()),
    "offset_mask is a tensor of layout torch.sparse_csr": dict(
        offset_mask=lambda: torch.zeros(4, 4).to_sparse_csr()
    ),
    "value is a nested tensor": dict(
        value=lambda: torch.nested.nested_tensor([torch.zeros(4, 4, 16)], layout=torch.strided)
    ),
    "value is torch.quint8": dict(
        value=lambda: torch.quantize_per_tensor(torch.zeros(1, 4, 4, 16), 1.0, 0, torch.quint8)
    ),
}


@pytest.mark.filterwarnings("ignore")  # torch warns that some of these tensors are young or old
@pytest.mark.parametrize("text", BAD_TYPE)
def test_bad_type(text: str) -> None:
    call = dict(value=torch.zeros(1, 4, 4, 16), offset_mask=torch.zeros(1, 4, 4, 32), groups=1)
    call |= {name: made() if callable(made) else made for name, made in BAD_TYPE[text].items()}
    with pytest.raises(TypeError) as error:
        dcnv4(call.pop("value"), call.pop("offset_mask"), **call)
    assert text in str(error.value)


BAD_CALLS_OF_BACKWARD = {
    "grad_output must be (1, 4, 4, 16) torch.float32 on cpu": [
        dict(grad_output=torch.zeros(1, 4, 4, 15)), dict(grad_output=torch.zeros(4)), dict(grad_output=torch.tensor(1.0)),
        dict(grad_output=torch.zeros(1, 4, 4, 16, dtype=torch.int64)),
        # With one tensor on the meta device torch runs the function for shapes, whose result would be memory as it was found.
        dict(grad_output=torch.zeros(1, 4, 4, 16, device="meta")),
    ],
    "grad_output must be (1, 4, 4, 16) torch.float32 on meta": [
        dict(value=torch.zeros(1, 4, 4, 16, device="meta"), offset_mask=torch.zeros(1, 4, 4, 27, device="meta"))
    ],
    "value must be (N, H, W, C)": [dict(value=torch.zeros(4, 4, 16))],
    "fewer than 3 * groups * taps": [dict(offset_mask=torch.zeros(1, 4, 4, 5))],
    "needed must be two bools": [dict(needed=[]), dict(needed=[True]), dict(needed=[True, True, True])],
    "offset_scale must be finite": [dict(offset_scale=float("nan"))],
    "groups=0 does not divide": [dict(groups=0)],
}  # fmt: skip


@pytest.mark.parametrize("text", BAD_CALLS_OF_BACKWARD)
def test_bad_calls_of_the_registered_backward(text: str) -> None:
    """torch.ops.dcnv4_ext.backward is public too: autograd is not its only caller."""
    for change in BAD_CALLS_OF_BACKWARD[text]:
        arguments = dict(
            value=torch.zeros(1, 4, 4, 16), offset_mask=torch.zeros(1, 4, 4, 27), grad_output=torch.zeros(1, 4, 4, 16),
            kernel_size=[3, 3], stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=1, offset_scale=1.0,
            remove_center=False, softmax=False, needed=[True, True],
        )  # fmt: skip
        with pytest.raises(ValueError) as error:
            torch.ops.dcnv4_ext.backward(**arguments | change)
        assert text in str(error.value)


def test_a_freed_tensor_is_refused() -> None:
    """What FSDP does to the storage of parameters that it does not need now; reading it would crash the process."""
    for name, keep in (("value", 0), ("value", 64), ("offset_mask", 0)):
        for view in (torch.Tensor.contiguous, lambda tensor: tensor.transpose(1, 2)):
            tensors = dict(value=torch.zeros(2, 4, 4, 16)[1:], offset_mask=torch.zeros(2, 4, 4, 32)[1:])
            tensors[name] = view(tensors[name])
            tensors[name].untyped_storage().resize_(keep)
            with pytest.raises(ValueError, match=f"{name} has shape .* a storage of {keep} bytes"):
                dcnv4(**tensors, groups=1)


def test_the_c_interface_refuses_what_python_would_have_caught() -> None:
    """No caller reaches a kernel with sizes that contradict each other."""
    import ctypes

    library = native.cpu()
    good = dict(
        abi_version=1, dtype=0, N=1, H=4, W=4, G=1, D=8, Ho=4, Wo=4, P=27, value_stride=8, offset_mask_stride=27,
        output_stride=8, grad_value_stride=8, grad_offset_mask_stride=27, kernel_h=3, kernel_w=3, stride_h=1, stride_w=1,
        pad_h=1, pad_w=1, dilation_h=1, dilation_w=1, threads=1, offset_scale=1.0,
    )  # fmt: skip
    buffers = [(ctypes.c_float * 4096)() for _ in range(3)]
    for change in (
        {},
        dict(abi_version=0),
        dict(P=26),
        dict(D=0),
        dict(value_stride=7),
        dict(kernel_h=0),
        dict(kernel_h=2**16, kernel_w=2**16),
        dict(dilation_h=2**30),
        dict(G=2**40),
        dict(H=2**40, W=2**40),
        dict(threads=0),
        dict(offset_scale=float("nan")),
        dict(dtype=9),
    ):
        problem = native.Problem(**(good | change))
        status = library.dcnv4_cpu_forward(problem, *buffers)
        assert (status == 0) == (not change), change
    problem = native.Problem(**good)
    assert library.dcnv4_cpu_forward(problem, None, *buffers[1:]) == 1
    assert library.dcnv4_cpu_backward(problem, *buffers[:2], None, buffers[2], None) == 1
    assert library.dcnv4_cpu_backward(problem, None, None, None, None, None) == 0
    assert library.dcnv4_cpu_forward(None, *buffers) == 1
    assert library.dcnv4_cpu_backward(None, *buffers, None, None) == 1
    nothing = native.Problem(**good | dict(N=0, threads=4))
    assert library.dcnv4_cpu_forward(nothing, None, None, None) == 0
    assert library.dcnv4_cpu_backward(nothing, None, None, None, buffers[0], None) == 0


def test_no_argument_crashes_the_process() -> None:
    """Random wrong arguments by every door, in a process of its own: refused by name, or right."""
    ended = run("tests/hostile_arguments.py", "3000")
    assert ended.poll() == 0, f"{ended.poll()}\n{ended.stdout[-300:]}\n{ended.stderr[-3000:]}"
    outcomes = dict(line.rsplit(" ", 1) for line in ended.stdout.splitlines()[3000:])
    assert all(int(outcomes[name]) > 50 for name in ("by_function: right", "by_function: refused")), outcomes


@pytest.mark.skipif("DCNV4_SANITIZE" in os.environ, reason="the sanitizers' run names its own library")
@pytest.mark.parametrize(("platform", "suffix"), [("linux", ".so"), ("darwin", ".so"), ("win32", ".dll")])
def test_the_library_is_looked_for_as_cmake_names_it(
    platform: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A MODULE library ends in .so on macOS as on Linux; CMAKE_SHARED_MODULE_SUFFIX says so."""
    (tmp_path / "lib").mkdir()
    file = tmp_path / "lib" / f"dcnv4_cpu{suffix}"
    file.touch()
    monkeypatch.setattr(sys.modules["dcnv4_ext"], "__path__", [str(tmp_path)])
    monkeypatch.setattr(sys, "platform", platform)
    assert native.library_file("cpu") == file and native.library_file("cuda") is None


@pytest.mark.skipif("DCNV4_SANITIZE" in os.environ, reason="the sanitizers' run names its own library")
def test_in_a_clone_the_installed_library_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `pip install .` whoever stays in the clone imports the clone's package, whose libraries lie where pip put them."""
    clone, site = tmp_path / "clone" / "dcnv4_ext", tmp_path / "site-packages"
    file = site / "dcnv4_ext" / "lib" / native.library_file("cpu").name
    for folder in (clone, file.parent):
        folder.mkdir(parents=True)
    file.touch()
    monkeypatch.setattr(sys.modules["dcnv4_ext"], "__path__", [str(clone)])
    monkeypatch.setattr(sys, "path", ["", str(site)])
    assert native.library_file("cpu") is None
    (clone.parent / "CMakeLists.txt").touch()
    assert native.library_file("cpu") == file and native.library_file("cuda") is None


# ---- Odd tensors, threads and processes.


def test_any_view_gives_what_a_copy_gives() -> None:
    """Strides that kernels cannot read, and views that torch resolves first: forward and both gradients."""
    wide = torch.randn(2, 5, 8, 128)
    complex_numbers = torch.view_as_complex(torch.randn(2, 5, 4, 64, 2))
    views = {
        "flipped": wide[:, :, :4, :64].flip(1, 2),
        "every second column": wide[:, :, ::2, :64],
        "every second channel": wide[:, :, :4, ::2],
        "inner window": wide[:, :, 2:6, 32:96],
        "expanded": wide[:1, :1, :1, :64].expand(2, 5, 4, 64),
        "expanded channel": wide[:, :, :4, :1].expand(2, 5, 4, 64),
        "channels first": torch.randn(2, 64, 5, 4).permute(0, 2, 3, 1),
        "negative bit": complex_numbers.conj().imag,
        "real part": complex_numbers.real,
        "zero tensor": torch._efficientzerotensor(2, 5, 4, 64),
    }
    assert views["negative bit"].is_neg()
    generator = torch.Generator().manual_seed(0)
    others = torch.randn(2, 5, 4, 64, generator=generator), torch.randn(2, 5, 4, 27, generator=generator)

    def outcome(value: torch.Tensor, grad_output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = value.detach().requires_grad_(), others[1].detach().requires_grad_()
        output = dcnv4(*inputs, groups=1)
        return output, *torch.autograd.grad(output, inputs, grad_output)

    for name, view in views.items():
        copy = view.resolve_neg().clone(memory_format=torch.contiguous_format) + 0
        for arguments, plain in (
            ((view, others[0]), (copy, others[0])),
            ((others[0], view), (others[0], copy)),
        ):
            for got, want in zip(outcome(*arguments), outcome(*plain), strict=True):
                assert torch.equal(got, want), name


def test_the_stride_of_a_dimension_of_size_one_means_nothing() -> None:
    """A map of one column, or of one pixel, is contiguous to torch whatever that stride is; as a step it would leave the memory."""
    generator = torch.Generator().manual_seed(0)
    for n, h, w in ((2, 5, 1), (1, 5, 1), (3, 1, 1), (1, 1, 1), (2, 1, 4)):
        plain = [torch.randn(n, h, w, c, generator=generator) for c in (32, 27, 32)]
        for step in (0, 10**6):
            odd = [
                t.as_strided(t.shape, [s if size > 1 else step for s, size in zip(t.stride(), t.shape, strict=True)])
                for t in plain
            ]  # fmt: skip
            assert all(torch.equal(a, b) for a, b in zip(_solve(*odd, 1), _solve(*plain, 1), strict=True))
    rows = torch.randn(2, 1, 5, 32, generator=generator)
    turned = rows.transpose(1, 2)
    assert turned.is_contiguous() and turned.stride(2) == 5 * 32
    offset_mask = torch.randn(2, 5, 1, 27, generator=generator)
    want = dcnv4_reference(turned, offset_mask, groups=1)
    torch.testing.assert_close(dcnv4(turned, offset_mask, groups=1), want)


def test_mixed_needs_and_inference_mode() -> None:
    value, offset_mask = torch.randn(1, 4, 4, 16), torch.randn(1, 4, 4, 27)
    want = dcnv4(value, offset_mask, groups=1)
    with torch.inference_mode():
        inside = dcnv4(value, offset_mask, groups=1)
        made_there = value.clone()
    assert torch.equal(inside, want) and inside.is_inference() and not want.requires_grad
    assert torch.equal(dcnv4(made_there, offset_mask, groups=1), want)
    with torch.no_grad():
        assert not dcnv4(value.clone().requires_grad_(), offset_mask, groups=1).requires_grad
    assert dcnv4(value, offset_mask.clone().requires_grad_(), groups=1).requires_grad


def test_threads_call_at_once() -> None:
    """ctypes lets go of the interpreter lock: kernels of several threads run side by side, each with its own scratch."""
    problems = [random_problem(seed) for seed in range(100, 140)]
    expected = [solve(dcnv4, problem) for problem in problems]
    wrong: list[str] = []

    def work(first: int) -> None:
        for index in range(len(problems)):
            problem = problems[(index + first) % len(problems)]
            for got, want in zip(
                solve(dcnv4, problem), expected[(index + first) % len(problems)], strict=True
            ):
                if not torch.equal(got.nan_to_num(), want.nan_to_num()):
                    wrong.append(str(problem))

    threads = [threading.Thread(target=work, args=(11 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_with_one_thread_goes_on(tmp_path: Path) -> None:
    """As DataLoader's workers are: forked after use, then set to one thread. (With more, OpenMP itself hangs in a child, for
    torch's own operators as for this one.)"""
    program = tmp_path / "forks.py"
    program.write_text(
        "import os, torch\nfrom dcnv4_ext import dcnv4\ntorch.set_num_threads(2)\n"
        "v, a = torch.randn(2, 32, 32, 64), torch.randn(2, 32, 32, 54)\nwant = dcnv4(v, a, groups=2)\n"
        "child = os.fork()\n"
        "if child == 0:\n    torch.set_num_threads(1)\n    os._exit(not torch.equal(dcnv4(v, a, groups=2), want))\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    parent = run(str(program))
    assert parent.poll() == 0, parent.stderr


def test_fewer_threads_than_were_asked_for() -> None:
    """OpenMP may give a smaller team: here its limit is one thread, and torch asks for four."""
    program = (
        "import torch\nfrom dcnv4_ext import dcnv4\n"
        "v, a = torch.randn(2, 8, 8, 640).requires_grad_(), torch.randn(2, 8, 8, 540).requires_grad_()\n"
        "def solve():\n    y = dcnv4(v, a, groups=20)\n    return y, *torch.autograd.grad(y.sum(), (v, a))\n"
        "torch.set_num_threads(1)\nwant = solve()\ntorch.set_num_threads(4)\nassert torch.get_num_threads() == 4\n"
        "raise SystemExit(not all(map(torch.equal, solve(), want)))"
    )
    environment = os.environ | {"OMP_THREAD_LIMIT": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, timeout=120, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_nothing_outside_the_tensors_is_touched() -> None:
    """Tensors that end, or begin, at a page nobody may read: masked vector loads, which sanitizers do not watch, included."""
    ended = run("tests/emulation/fenced.py")
    if ended.poll() == 77:
        pytest.skip(ended.stdout)
    assert ended.poll() == 0, f"{ended.poll()}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"


# ---- Large.


@pytest.mark.parametrize("isa", ISAS)
def test_rows_that_fp32_cannot_tell_apart(isa: str) -> None:
    """Past 2^24 rows the bounds of a packed window round: a tap one row above it must still find its value."""
    height, row = 2**24 + 32, 2**24 + 10
    value = torch.zeros(1, height, 1, 1)
    value[0, -64:, 0, 0] = torch.arange(1.0, 65.0)
    for dy in (-6.0, -4.0, 2.0, 4.0, 6.0):
        offset_mask = torch.zeros(1, 2, 1, 3)
        offset_mask[..., 1], offset_mask[..., 2] = dy, 1
        with native.forced_isa(isa):
            got = dcnv4(value, offset_mask, groups=1, kernel_size=1, padding=0, stride=(row, 1))
        assert float(got[0, 1, 0, 0]) == float(value[0, row + int(dy), 0, 0]), dy


def available_memory() -> int:
    """Bytes; 0 where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


# One of the tensors passes 2^31 elements: 4.3 GB in bf16. (N, H, W, C, groups) and settings.
PAST_2_31 = {
    "value": ((2, 4100, 4100, 64, 4), dict(stride=41)),
    "offset_mask": ((1, 2230, 2230, 16, 16), dict()),
    "output": ((1, 6, 5, 64, 1), dict(kernel_size=1, padding=2900)),
}


@pytest.mark.slow(why="needs 8 GiB and a minute")
@pytest.mark.parametrize("tensor", PAST_2_31)
def test_past_2_31_elements(tensor: str) -> None:
    """bf16 on the CPU; the last rows, which lie beyond, against the reference on a crop that holds all they look at."""
    if available_memory() < 9 * 2**30:
        pytest.skip("less than 9 GiB of memory available")
    (n, h, w, c, groups), settings = PAST_2_31[tensor]
    taps = settings.get("kernel_size", 3) ** 2
    generator = torch.Generator().manual_seed(0)
    # Only what the last rows can see is random, the rest zero: drawing it all would take longer than the kernel.
    seen = min(h, 120)
    value = torch.zeros(n, h, w, c, dtype=torch.bfloat16)
    value[-1, -seen:] = torch.randn(seen, w, c, generator=generator).bfloat16()
    _, ho, wo, _ = shape = (*dcnv4_shape(value, settings), c)
    offset_mask = torch.zeros(n, ho, wo, 3 * groups * taps, dtype=torch.bfloat16)
    pad = settings.get("padding", 1)
    rows = range(pad, pad + h) if tensor == "output" else range(ho - 2, ho)  # that see the map
    last = torch.randn(len(rows), wo, groups, 3 * taps, generator=generator)
    last[..., : 2 * taps] = between_cells((len(rows), wo, groups, 2 * taps), generator, 2)
    offset_mask[-1, rows.start : rows.stop] = last.flatten(2).bfloat16()
    assert (
        dict(value=value, offset_mask=offset_mask).get(tensor, torch.empty(shape, device="meta")).numel()
        > 2**31
    )
    output = dcnv4(value, offset_mask, groups=groups, **settings)
    assert output.shape == shape

    # The crop starts where an output row stands, as the whole map does, and leaves room for the offsets above.
    stride = settings.get("stride", 1)
    first = 0 if tensor == "output" else stride * (rows.start - 1 - 8 // stride)
    crop = value[-1:, first:].double()
    outputs = dcnv4_shape(crop, settings)[1]
    weights = torch.zeros(1, outputs, wo, offset_mask.shape[3], dtype=torch.float64)
    kept = slice(rows.start, rows.stop) if tensor == "output" else slice(outputs - 2, outputs)
    columns = slice(pad - 2, pad + w + 2) if tensor == "output" else slice(wo - 40, wo)
    weights[:, kept, columns] = offset_mask[-1:, rows.start : rows.stop, columns].double()
    if (
        tensor == "output"
    ):  # the reference needs memory by the output: a narrow frame about the map tells as much
        frame = 4
        weights = weights[:, pad - frame : pad + h + frame, pad - frame : pad + w + frame]
        want = dcnv4_reference(crop, weights, groups=groups, kernel_size=1, padding=frame)
        got = output[-1:, pad - frame : pad + h + frame, pad - frame : pad + w + frame]
        kept, columns = slice(frame, frame + h), slice(frame - 2, frame + w + 2)
        assert not output[-1, -1].any() and got[:, kept, columns].any()
    else:
        want = dcnv4_reference(crop, weights, groups=groups, **settings)
        got = output[-1:, -outputs:]
    relative, absolute = TOLERANCES[torch.bfloat16]
    got, want = got[:, kept, columns].double(), want[:, kept, columns]
    assert want.abs().max() > 1
    torch.testing.assert_close(got, want, rtol=relative, atol=absolute * float(want.abs().max()))
