"""The CUDA kernels, run on the CPU from their own sources (tests/emulation), against the plain-torch reference in fp64.

DCNV4_PROBLEMS sets the number of random problems (80). DCNV4_SANITIZE=1 runs all of it under AddressSanitizer and
UndefinedBehaviorSanitizer; `python tests/emulation/sanitize.py` does that with what has to be preloaded.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import mmap
import os
import random
import sys
from pathlib import Path

import pytest
import torch

from emulation.build import NoCompiler, build
from emulation.cases import Case, Tensors, mismatch, random_case, reference, tensors_of
from emulation.library import FORCE, Emulation, KernelError, Operator
from hostile_arguments import hostile_problem
from problems import OFFICIAL_FAILURES, problem_of
from test_cuda_build import FAST, FAST_DEPTHS, WIDTHS

PROBLEMS = int(os.environ.get("DCNV4_PROBLEMS", "80"))
SANITIZE = os.environ.get("DCNV4_SANITIZE") == "1"
# How backward can be made to work; "auto" is what the shape chooses.
BACKWARD = {
    "auto": {},
    "direct": {"force": ("direct",)},
    "tiled": {"force": ("tiled",)},
    "ordered": {"deterministic": True},
    "scalar": {"force": ("scalar",)},
    "scalar ordered": {"force": ("scalar",), "deterministic": True},
    "general": {"force": ("general", "direct")},
    "no window": {"force": ("no_window",)},
    "window": {"force": ("window",)},
    "threads": {"force": ("threads",)},
    "window apart": {"force": ("window", "apart")},
}
LARGE = 0  # multiprocessors of a device for which every problem is a large one
FORWARD = {
    "auto": (), "scalar": ("scalar",), "general": ("general",), "no window": ("no_window",), "window": ("window",),
    "threads": ("threads",),
}  # fmt: skip


@pytest.fixture(scope="module")
def emulation() -> Emulation:
    try:
        return Emulation(build(SANITIZE))
    except NoCompiler as missing:
        pytest.skip(str(missing))


def case_of(op: Operator, batch: int, size: tuple[int, int], depth: int, **fields) -> Case:
    """A case with the usual rest: fp32, contiguous, offsets within a few pixels."""
    rest = {"padding_channels": 0, "row_gap": 0, "offsets": "sixteenths", "dtype": torch.float32, "seed": 1}
    return Case(op, batch, size, depth, **(rest | fields))


def assert_backward(
    emulation: Emulation, case: Case, tensors: Tensors, expected: tuple, variant: str
) -> None:
    grads = emulation.backward(
        case.op,
        tensors.value,
        tensors.offset_mask,
        tensors.grad_output,
        row_gap=case.row_gap,
        **BACKWARD[variant],
    )
    for name, grad, want in zip(("grad_value", "grad_offset_mask"), grads, expected[1:], strict=True):
        assert (wrong := mismatch(grad, want)) is None, f"{case}: {variant} {name}: {wrong}"


def assert_all(emulation: Emulation, case: Case, tensors: Tensors | None = None) -> None:
    """Every kernel variant, forward and backward, equals the reference."""
    tensors = tensors or tensors_of(case)
    expected = reference(case.op, tensors)
    for variant, force in FORWARD.items():
        output = emulation.forward(
            case.op, tensors.value, tensors.offset_mask, force=force, row_gap=case.row_gap
        )
        assert (wrong := mismatch(output, expected[0])) is None, f"{case}: forward {variant}: {wrong}"
    for variant in BACKWARD:
        assert_backward(emulation, case, tensors, expected, variant)


@pytest.mark.parametrize("seed", range(PROBLEMS))
def test_random_problem(emulation, seed):
    # A device of 132 multiprocessors gets smaller blocks; for one of none every problem is a large one, with larger blocks and two
    # vectors a thread. Threads run in another order each time.
    with emulation.multiprocessors((LARGE, 4, 132)[seed % 3]), emulation.order(seed):
        assert_all(emulation, *random_case(seed))


# Emulation takes some seconds for a hundred thousand numbers.
SMALL_FAILURES = [name for name, (shape, _) in OFFICIAL_FAILURES.items() if math.prod(shape[:4]) <= 120_000]


@pytest.mark.parametrize("name", SMALL_FAILURES)
def test_where_the_official_operator_fails(emulation, name):
    (n, h, w, c, groups), settings = OFFICIAL_FAILURES[name]
    dtype = (torch.float32, torch.bfloat16)[SMALL_FAILURES.index(name) % 2]
    problem = problem_of(n, h, w, c, groups, dtype, **settings)
    op = Operator(groups, **{key: (value, value) for key, value in settings.items()})
    case = case_of(op, n, (h, w), c // groups, dtype=dtype, offsets="drawn")
    tensors = Tensors(problem.value, problem.offset_mask, problem.grad_output)
    expected = reference(op, tensors)
    assert mismatch(emulation.forward(op, tensors.value, tensors.offset_mask), expected[0]) is None
    for variant in ("auto", "direct", "ordered"):
        assert_backward(emulation, case, tensors, expected, variant)


NAMES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "double"}


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("remove_center", [False, True])
@pytest.mark.parametrize("depth", FAST_DEPTHS)
def test_fast_sizes_run_the_fast_kernels(emulation, depth, remove_center, dtype):
    """For K 8 and 9 and the widths of the published networks: those that test_cuda_build.py reads the machine code of, and rightly."""
    op = Operator(2, padding=(1, 0), stride=(1, 2), remove_center=remove_center)
    case = case_of(op, 1, (4, 7), depth, dtype=dtype, padding_channels=2)
    tensors = tensors_of(case)
    expected = reference(op, tensors)
    for multiprocessors in (LARGE, 132):
        with emulation.multiprocessors(multiprocessors):
            emulation.launched()
            output = emulation.forward(op, tensors.value, tensors.offset_mask)
            assert mismatch(output, expected[0]) is None
            for variant in ("auto", "ordered", "direct") if depth < 160 else ("auto", "ordered"):
                assert_backward(emulation, case, tensors, expected, variant)
        ran = emulation.launched()
        names = {name for name, *_ in ran}
        assert names >= {"find_taps", "gather_taps"}
        if dtype == torch.float64:
            continue  # for checking, not for speed
        fast = set().union(*FAST.values())
        assert ran <= fast, sorted(ran - fast)
        # A window in shared memory and sorted taps where a group is a multiple of 32 bytes; its gradient so for 64 and 128.
        size = depth * tensors.value.itemsize
        gather = "gather_sorted" if dtype == torch.float32 else "gather_matrix"
        assert names >= ({"sample_window", gather} if size % 32 == 0 else {"sample", "merge_tiles"})
        dots = "dot_window" if dtype == torch.float32 else "dot_matrix"
        assert (dots in names) == (size in (64, 128))


@pytest.mark.parametrize(
    ("dtype", "depth"),
    [
        *((torch.float32, depth) for depth in (8, 16, 32)),
        *((torch.bfloat16, depth) for depth in (16, 32, 64)),
        (torch.float16, 32),
    ],
)
@pytest.mark.parametrize("offsets", ["normal", "wild"])
def test_windows_smaller_than_the_map(emulation, dtype, depth, offsets):
    """Many tiles with halos, taps that leave them, several groups; then one tile for the map."""
    for size, op in (
        ((27, 25), Operator(1)),
        ((9, 40), Operator(2, stride=(1, 2), dilation=(2, 1), remove_center=True)),
    ):
        case = case_of(
            op,
            2 if size[0] < 20 else 1,
            size,
            depth,
            dtype=dtype,
            padding_channels=-3 * op.groups * op.taps % 8,
            offsets=offsets,
        )
        tensors = tensors_of(case)
        expected = reference(op, tensors)
        with emulation.multiprocessors(132):  # smaller tiles
            output = emulation.forward(op, tensors.value, tensors.offset_mask, force=("window",))
            assert (wrong := mismatch(output, expected[0])) is None, wrong
            assert_backward(emulation, case, tensors, expected, "window")


@pytest.mark.parametrize("row_gap", [0, 8])
@pytest.mark.parametrize(
    ("dtype", "variant", "launches", "rounds"),
    [
        (torch.bfloat16, "auto", 2, False),  # too few blocks for two launches: rounded beside
        (torch.bfloat16, "window", 3, False),  # cleared beside the first half, rounded beside the second
        (torch.bfloat16, "window apart", 3, True),
        (torch.float16, "window", 3, False),
        (torch.float32, "window", 2, False),  # the sums are the result: cleared beside
        (torch.float32, "window apart", 2, False),
    ],
)
def test_sums_are_cleared_and_rounded_beside_the_other_gradient(
    emulation, dtype, variant, launches, rounds, row_gap
):
    case = case_of(Operator(2), 2, (27, 25), 32, dtype=dtype, padding_channels=2, row_gap=row_gap)
    tensors = tensors_of(case)
    with emulation.multiprocessors(132):
        emulation.launched()
        before = emulation.launches()
        assert_backward(emulation, case, tensors, reference(case.op, tensors), variant)
        assert emulation.launches() - before == launches
        assert ("round_sums" in {name for name, *_ in emulation.launched()}) == rounds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_block_has_a_whole_map_of_sixteen_by_sixteen(emulation, dtype):
    """As of Stable Diffusion's second level, in groups of 32: nothing to clear, to reduce or to round."""
    case = case_of(Operator(1), 1, (16, 16), 32, dtype=dtype, padding_channels=5, offsets="wild")
    tensors = tensors_of(case)
    expected = reference(case.op, tensors)
    name = "gather_sorted" if dtype == torch.float32 else "gather_matrix"
    for multiprocessors, whole in (
        (1, 1),
        (132, 0),
    ):  # with fewer blocks than multiprocessors tiles take less time
        with emulation.multiprocessors(multiprocessors):
            emulation.launched()
            assert_backward(emulation, case, tensors, expected, "auto")
        assert [kernel[4] for kernel in emulation.launched() if kernel[0] == name] == [whole]


def test_code_of_an_older_architecture(emulation):
    """A build for sm_80 alone runs on a newer GPU, from PTX: what its kernels were compiled without must not be asked of them."""
    case = case_of(Operator(2), 1, (9, 11), 32, dtype=torch.bfloat16, padding_channels=2)
    tensors = tensors_of(case)
    expected = reference(case.op, tensors)
    ran = []
    for device in (0, 1):  # the emulation's second device is such a one
        emulation.launched()
        output = emulation.forward(case.op, tensors.value, tensors.offset_mask, device=device)
        gradients = emulation.backward(
            case.op, tensors.value, tensors.offset_mask, tensors.grad_output, device=device
        )
        for result, right in zip((output, *gradients), expected, strict=True):
            assert mismatch(result, right) is None
        ran.append({(kernel[0], kernel[-1]) for kernel in emulation.launched()})
    windows = {"sample_window", "dot_matrix", "gather_matrix"}
    assert ran == [{(name, boxes) for name in windows} for boxes in (1, 0)]


def test_every_kernel_runs(emulation):
    """Each instance that the compiler made of a kernel, compared with the reference: none is left to the GPU alone."""
    emulation.launched()
    with emulation.multiprocessors(LARGE):
        for dtype in NAMES:
            for kernel, remove_center in (((3, 3), False), ((3, 3), True), ((2, 3), False)):
                for depth in (5, WIDTHS.get(NAMES[dtype], 2), 8, 16, 32, 64):
                    op = Operator(1, kernel_size=kernel, remove_center=remove_center, softmax=depth == 5)
                    # Runs come as boxes where rows of offset_mask lie in step with 16 bytes.
                    padding = -3 * op.taps % 8
                    assert_all(
                        emulation, case_of(op, 1, (3, 4), depth, dtype=dtype, padding_channels=padding)
                    )
                    if depth < 8 or kernel != (3, 3):
                        continue
                    # A whole map without boxes, tiles of a larger one with them and without.
                    for size, more in (((3, 4), 1), ((1, 80), 0), ((1, 80), 1)):
                        case = case_of(op, 1, size, depth, dtype=dtype, padding_channels=padding + more)
                        tensors = tensors_of(case)
                        expected = reference(op, tensors)
                        for variant in ("window", "threads"):
                            assert_backward(emulation, case, tensors, expected, variant)
    ran, compiled = emulation.launched(), set(emulation.kernels.values())
    assert len(compiled) > 70 and ran == compiled, sorted(compiled - ran)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("depth", [4, 8, 16, 40, 80, 160])
def test_head_widths_of_diffusion_models(emulation, dtype, depth):
    assert_all(
        emulation, case_of(Operator(2, stride=(1, 2)), 1, (5, 6), depth, dtype=dtype, padding_channels=2)
    )


def test_maps_of_many_tiles(emulation):
    """More tiles than a block of the ordered kernel has threads, offsets that cross them all."""
    assert_all(emulation, case_of(Operator(1), 1, (47, 51), 4, offsets="wild"))


def test_wide_maps_in_the_ordered_kernel(emulation):
    """Cells past 2^16 do not fit the packed form exactly."""
    case = case_of(Operator(1, kernel_size=(1, 3), stride=(1, 997), padding=(0, 1)), 1, (1, 70_000), 4)
    tensors = tensors_of(case)
    assert_backward(emulation, case, tensors, reference(case.op, tensors), "ordered")


def test_misaligned_tensors(emulation):
    """A tensor that starts between two vectors takes the path of single elements."""
    case = case_of(Operator(2), 2, (4, 5), 8)
    tensors = tensors_of(case)
    shifted = torch.empty(tensors.value.numel() + 1)[1:].view(tensors.value.shape).copy_(tensors.value)
    tensors = Tensors(shifted, tensors.offset_mask, tensors.grad_output)
    expected = reference(case.op, tensors)
    assert mismatch(emulation.forward(case.op, shifted, tensors.offset_mask), expected[0]) is None
    for variant in ("auto", "ordered"):
        assert_backward(emulation, case, tensors, expected, variant)


def test_what_compute_sanitizer_watches_is_every_kernel(emulation):
    """The problems of benchmarks/sanitized.py, which runs on a GPU: none of the kernels may be left out of it."""
    path = Path(__file__).parents[1] / "benchmarks" / "sanitized.py"
    spec = importlib.util.spec_from_file_location("sanitized", path)
    sanitized = importlib.util.module_from_spec(spec)
    sys.modules["sanitized"] = sanitized
    spec.loader.exec_module(sanitized)
    bits = {bit: name for name, bit in FORCE.items()}
    emulation.launched()
    with emulation.multiprocessors(132):
        for problem in sanitized.problems():
            geometry = problem.geometry
            op = Operator(
                problem.shape[3], geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation, 1.0,
                geometry.remove_center, problem.softmax,
            )  # fmt: skip
            value, offset_mask, grad_output = problem.tensors()
            for number in problem.forced:
                force = tuple(name for bit, name in bits.items() if number & bit)
                emulation.forward(op, value, offset_mask, force=force)
                emulation.backward(
                    op, value, offset_mask, grad_output, force=force, deterministic=problem.deterministic
                )
    ran, compiled = emulation.launched(), set(emulation.kernels.values())
    assert ran == compiled, sorted(compiled - ran)


# ---- What may and may not reach a result.


@pytest.mark.parametrize("force", FORWARD.values(), ids=FORWARD)
@pytest.mark.parametrize("kernel", [(3, 3), (2, 2)])
def test_nothing_outside_the_map_counts(emulation, force, kernel):
    """Infinities on the border: a corner beside one, outside the map, adds nothing, a corner on it adds infinity."""
    case = case_of(Operator(2, kernel_size=kernel, padding=(2, 2)), 2, (4, 5), 8)
    tensors = tensors_of(case)
    for border in (
        tensors.value[:, 0],
        tensors.value[:, -1],
        tensors.value[:, :, 0],
        tensors.value[:, :, -1],
    ):
        border.fill_(math.inf)
    tensors.offset_mask.abs_()  # no inf - inf
    expected = reference(case.op, tensors)[0]
    assert expected.isfinite().any() and expected.isinf().any()
    assert (
        mismatch(emulation.forward(case.op, tensors.value, tensors.offset_mask, force=force), expected)
        is None
    )


@pytest.mark.parametrize("force", FORWARD.values(), ids=FORWARD)
@pytest.mark.parametrize("depth", [8, 16, 32])
def test_nothing_outside_the_map_counts_with_infinite_weights(emulation, force, depth):
    """Taps across every edge: corners outside add nothing, zero times infinity would be NaN."""
    case = case_of(Operator(1), 1, (2, 2), depth)
    tensors = tensors_of(case)
    tensors.value.fill_(1)
    runs = tensors.offset_mask.view(1, 2, 2, 27)
    runs[..., :18] = 0.5
    runs[..., 18:] = 0
    for tap, offset in ((0, 0.5), (8, -0.5)):
        runs[..., 18 + tap] = math.inf
        runs[..., 2 * tap : 2 * tap + 2] = offset
    expected = reference(case.op, tensors)[0]
    assert expected.isinf().any()
    output = emulation.forward(case.op, tensors.value, tensors.offset_mask, force=force)
    assert mismatch(output, expected) is None


@pytest.mark.parametrize("hostile", [math.nan, math.inf])
@pytest.mark.parametrize("offset", [math.nan, math.inf, -math.inf, 1e30, -1e30, 1e9])
def test_unused_taps_add_exactly_nothing(emulation, offset, hostile):
    case = case_of(Operator(2), 1, (3, 4), 8)
    tensors = tensors_of(case)
    tensors.value.fill_(hostile)
    runs = tensors.offset_mask.view(1, 3, 4, 2, 27)
    runs[..., :18] = offset
    runs[..., 18:] = hostile  # an unused weight is not looked at either
    for force in FORWARD.values():
        assert not emulation.forward(case.op, tensors.value, tensors.offset_mask, force=force).any()
    for variant in BACKWARD.values():
        for grad in emulation.backward(
            case.op, tensors.value, tensors.offset_mask, tensors.grad_output, **variant
        ):
            assert not grad.any()


def test_a_cell_no_tap_reads_may_hold_anything(emulation):
    """Backward reads the cells of used corners alone."""
    case = case_of(Operator(1, kernel_size=(1, 1), padding=(0, 0)), 1, (6, 6), 8, offsets="zero")
    tensors = tensors_of(case)
    tensors.offset_mask[..., 0] = -0.5  # every tap between its pixel and the one to the left
    tensors.offset_mask[:, :, -1] = math.nan  # but none in the last column
    tensors.value[:, :, -1] = math.nan
    expected = reference(case.op, tensors)
    for variant in BACKWARD:
        assert_backward(emulation, case, tensors, expected, variant)


# ---- Order.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offsets", ["normal", "wild"])
@pytest.mark.parametrize("force", [(), ("scalar",)], ids=["vectors", "scalar"])
def test_deterministic_backward_gives_the_same_bits_in_any_order(emulation, dtype, offsets, force):
    case = case_of(Operator(2), 2, (11, 9), 16, offsets=offsets, dtype=dtype)
    tensors = tensors_of(case)

    def bits(seed: int) -> list[bytes]:
        with emulation.order(seed):
            grads = emulation.backward(
                case.op,
                tensors.value,
                tensors.offset_mask,
                tensors.grad_output,
                deterministic=True,
                force=force,
            )
        return [grad.contiguous().view(torch.uint8).numpy().tobytes() for grad in grads]

    first = bits(0)
    assert all(bits(seed) == first for seed in range(1, 5))


def test_order_shows_only_in_sums_by_atomics(emulation):
    """Everything but the direct scatter is the same to the last bit in any order: no barrier is missing."""
    for seed in range(12):
        case, tensors = random_case(1000 + seed)
        results = []
        for order in (0, 1, 2):
            with emulation.order(order):
                output = emulation.forward(case.op, tensors.value, tensors.offset_mask)
                arguments = (case.op, tensors.value, tensors.offset_mask, tensors.grad_output)
                results.append(
                    (
                        output,
                        emulation.backward(*arguments)[1],
                        *emulation.backward(*arguments, deterministic=True),
                    )
                )
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num()), str(case)


# ---- Dispatch and the interface.


def test_shapes_choose_their_kernels(emulation):
    def launches(case: Case, **options) -> int:
        tensors = tensors_of(case)
        before = emulation.launches()
        emulation.backward(case.op, tensors.value, tensors.offset_mask, tensors.grad_output, **options)
        return emulation.launches() - before

    ordinary = case_of(Operator(2), 1, (8, 8), 16)
    assert launches(ordinary) == 2  # sorted taps; the offset_mask gradient
    assert launches(ordinary, force=("tiled",)) == 2  # merged tiles; the offset_mask gradient
    assert launches(ordinary, force=("direct",)) == 1
    assert launches(ordinary, deterministic=True) == 3  # find, gather; the offset_mask gradient
    assert launches(ordinary, need=(False, True)) == 1
    assert launches(ordinary, need=(True, False)) == 1
    assert launches(ordinary, need=(False, False)) == 0
    assert (
        launches(case_of(Operator(2), 1, (8, 8), 16, dtype=torch.bfloat16)) == 2
    )  # a block has the whole map
    large = case_of(Operator(2), 1, (40, 40), 16, dtype=torch.bfloat16)
    assert launches(large) == 3  # and rounding
    assert (
        launches(case_of(Operator(2, kernel_size=(1, 1), padding=(0, 0)), 1, (20, 20), 16)) == 1
    )  # little to merge
    assert launches(case_of(Operator(2), 1, (8, 8), 3)) == 1
    assert launches(case_of(Operator(2), 0, (8, 8), 16)) == 0


@pytest.mark.parametrize("need", [(True, False), (False, True)])
@pytest.mark.parametrize("variant", ["auto", "direct", "ordered"])
def test_one_gradient_alone(emulation, need, variant):
    case = case_of(Operator(2), 1, (5, 4), 8)
    tensors = tensors_of(case)
    expected = reference(case.op, tensors)[1:]
    grads = emulation.backward(
        case.op, tensors.value, tensors.offset_mask, tensors.grad_output, need=need, **BACKWARD[variant]
    )
    for grad, want, needed in zip(grads, expected, need, strict=True):
        assert (mismatch(grad, want) is None) if needed else grad is None


def test_rows_past_four_gigabytes(emulation):
    """Byte offsets inside one image pass 2^32: pixels lie 1 GiB apart in memory that is never touched between them."""
    if SANITIZE:
        pytest.skip("AddressSanitizer has no room for maps of that size")
    case = case_of(Operator(1), 1, (3, 3), 4, padding_channels=1)
    tensors = tensors_of(case)
    stride = 2**28 - 4

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        size = (tensor.shape[0] * tensor.shape[1] * tensor.shape[2] * stride) * 4
        try:
            pages = mmap.mmap(
                -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
            )
        except OSError:
            pytest.skip("no address space for 10 GB")
        rows = torch.frombuffer(pages, dtype=torch.float32)
        return rows.as_strided(tensor.shape, (9 * stride, 3 * stride, stride, 1)).copy_(tensor)

    value, offset_mask, grad_output = (
        spread(tensors.value),
        spread(tensors.offset_mask),
        spread(tensors.grad_output),
    )
    outputs = [spread(torch.zeros_like(t)) for t in (tensors.grad_output, tensors.value, tensors.offset_mask)]
    expected = reference(case.op, tensors)
    for deterministic in (False, True):
        problem = emulation.problem(
            case.op, value, offset_mask, output_stride=stride, grad_strides=(stride, stride), deterministic=deterministic,
            force=("direct",),
        )  # fmt: skip
        library, pointer = emulation.library, torch.Tensor.data_ptr
        emulation.check(
            library.dcnv4_cuda_forward(
                problem, pointer(value), pointer(offset_mask), pointer(outputs[0]), None
            )
        )
        workspace = torch.empty(library.dcnv4_cuda_backward_workspace(problem, 1, 1), dtype=torch.uint8)
        emulation.check(
            library.dcnv4_cuda_backward(
                problem,
                pointer(value),
                pointer(offset_mask),
                pointer(grad_output),
                pointer(outputs[1]),
                pointer(outputs[2]),
                pointer(workspace),
                None,
            )
        )
        for got, want in zip(outputs, expected, strict=True):
            assert mismatch(got, want) is None


def test_the_current_device_is_left_as_it_was(emulation):
    case = case_of(Operator(1), 1, (3, 3), 4)
    tensors = tensors_of(case)
    emulation.forward(case.op, tensors.value, tensors.offset_mask, device=1)
    emulation.backward(case.op, tensors.value, tensors.offset_mask, tensors.grad_output, device=1)
    assert emulation.library.emulation_device() == 0
    with pytest.raises(KernelError) as failure:
        emulation.forward(case.op, tensors.value, tensors.offset_mask, device=7)
    assert failure.value.status == 1000 + 101  # cudaErrorInvalidDevice
    assert "cudaErrorInvalidDevice" in str(failure.value)
    assert emulation.library.emulation_device() == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"abi_version": 0}, {"dtype": 4}, {"dtype": -1}, {"N": -1}, {"H": 0}, {"W": 2**31}, {"H": 2**20, "W": 2**20}, {"G": 3},
        {"D": 0}, {"P": 26}, {"Ho": 0}, {"kernel_h": 0}, {"kernel_w": 2**30}, {"stride_h": 0}, {"pad_w": -1}, {"dilation_h": 0},
        {"dilation_w": 2**30, "kernel_w": 4}, {"value_stride": 3}, {"offset_mask_stride": 26}, {"output_stride": 3},
        {"value_stride": 2**30}, {"stride_w": 2**30, "Wo": 4},
    ],
    ids=lambda fields: " ".join(f"{name}={number}" for name, number in fields.items()),
)  # fmt: skip
def test_impossible_problems_are_refused(emulation, wrong):
    case = case_of(Operator(1), 1, (3, 3), 4)
    tensors = tensors_of(case)
    problem = emulation.problem(
        case.op, tensors.value, tensors.offset_mask, output_stride=4, grad_strides=(4, 27)
    )
    for name, number in wrong.items():
        setattr(problem, name, number)
    library = emulation.library
    assert library.dcnv4_cuda_forward(problem, None, None, None, None) == 1
    assert library.dcnv4_cuda_backward_workspace(problem, 1, 1) == -1
    assert library.dcnv4_cuda_backward(problem, None, None, None, 1, 1, None, None) == 1


def test_hostile_problems_are_refused_before_memory_is_looked_at(emulation):
    """Structs with any fields wrong, and no tensors behind them; under the sanitizer sums of sizes may not overflow either."""
    library, passed = emulation.library, 0
    for seed in range(4000):
        problem, changed = hostile_problem(random.Random(seed))
        status = library.dcnv4_cuda_forward(problem, None, None, None, None)
        assert status == 1 or (status == 0 and problem.N == 0), changed
        status = library.dcnv4_cuda_backward(problem, None, None, None, 16, 16, None, None)
        assert status == 1 or (status == 0 and problem.N == 0), changed
        for problem.deterministic in (0, 1):
            size = library.dcnv4_cuda_backward_workspace(problem, 1, 1)
            assert size >= -1, changed
            passed += size >= 0
    assert passed > 100  # what only lacks its tensors
    assert library.dcnv4_cuda_forward(None, None, None, None, None) == 1
    assert library.dcnv4_cuda_backward(None, None, None, None, None, None, None, None) == 1
    assert library.dcnv4_cuda_backward_workspace(None, 1, 1) == -1


def test_gradients_need_room_for_their_rows(emulation):
    case = case_of(Operator(1), 1, (3, 3), 4)
    tensors = tensors_of(case)
    problem = emulation.problem(
        case.op, tensors.value, tensors.offset_mask, output_stride=4, grad_strides=(3, 27)
    )
    assert emulation.library.dcnv4_cuda_backward(problem, None, None, None, 1, None, None, None) == 1
    problem.grad_value_stride, problem.grad_offset_mask_stride = 4, 26
    assert emulation.library.dcnv4_cuda_backward(problem, None, None, None, None, 1, None, None) == 1


# ---- The emulation itself.


def test_the_emulation_notices_a_barrier_not_all_reach(emulation):
    out = (ctypes.c_int32 * 32)()
    assert emulation.library.emulation_try(0, out) == 719  # cudaErrorLaunchFailure
    assert b"do not meet" in emulation.library.dcnv4_cuda_error_string(1719)
    # And goes on working.
    assert emulation.library.emulation_try(2, out) == 0
    assert list(out) == [(t + 1) % 32 + 1000 + 10000 * (t ^ 1) for t in range(32)]


def test_the_emulation_shows_a_missing_barrier(emulation):
    out = (ctypes.c_int32 * 32)()
    seen = set()
    for seed in range(3):
        with emulation.order(seed):
            assert emulation.library.emulation_try(1, out) == 0
        seen.add(tuple(out))
    assert len(seen) > 1
    assert any(-1 in result for result in seen)  # shared memory that nothing wrote


def test_the_emulation_notices_arrivals_that_never_come(emulation):
    out = (ctypes.c_int32 * 32)()
    for seed in range(3):
        with emulation.order(seed):
            assert emulation.library.emulation_try(4, out) == 0
            assert list(out) == [16 + t % 16 for t in range(32)]
            assert emulation.library.emulation_try(5, out) == 719
        assert b"for arrivals" in emulation.library.dcnv4_cuda_error_string(1719)


def test_the_emulation_notices_a_thread_that_does_not_wait_for_earlier_kernels(emulation):
    assert emulation.library.emulation_try(3, (ctypes.c_int32 * 32)()) == 719
    assert b"do not wait" in emulation.library.dcnv4_cuda_error_string(1719)
