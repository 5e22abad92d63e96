"""The CUDA kernels on a GPU: the problems of the CPU tests, and what only a device can show.

Without a GPU everything here is skipped; tests/emulation runs the same kernels on the CPU.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from dcnv4_ext import DCNv4, dcnv4, module, native
from emulation.library import FORCE
from problems import DTYPES, OFFICIAL_FAILURES, Problem, mismatches, problem_of, random_problem, solve

PROBLEMS = int(os.environ.get("DCNV4_PROBLEMS", "500"))
GIBIBYTE = 2**30
FORCED = {"chosen": 0, **FORCE}
Result = TypeVar("Result")


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    if native.library_file("cuda") is None:
        return f"the CUDA library is not built: {native.BUILD_COMMAND}"
    return None


REASON = _missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")


@pytest.fixture(autouse=True)
def _ordinary_settings():
    """Deterministic mode off before and after each test, and the device alive after it."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.synchronize()


def on_gpu(problem: Problem) -> Problem:
    moved = {name: getattr(problem, name).cuda() for name in ("value", "offset_mask", "grad_output")}
    return replace(problem, **moved)


def solve_on_gpu(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(tensor.cpu() for tensor in solve(dcnv4, on_gpu(problem)))


def force(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """Have every call use kernels that the shape would not choose."""

    def changed(call):
        def with_bits(problem: native.Problem, *tensors: Tensor | None) -> None:
            copy = native.Problem.from_buffer_copy(problem)
            copy.reserved = bits
            call(copy, *tensors)

        return with_bits

    for name in ("forward", "backward"):
        monkeypatch.setattr(native, name, changed(getattr(native, name)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
def test_random_problems(dtype: torch.dtype, deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic)
    first = DTYPES.index(dtype)
    found = []
    for seed in range(first, PROBLEMS, len(DTYPES)):
        problem = random_problem(seed, dtype)
        found += mismatches(problem, solve_on_gpu(problem))
    assert not found, f"{len(found)} mismatches\n" + "\n".join(found[:5])


@pytest.mark.parametrize("name", FORCED)
def test_forced_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that large or odd shapes choose, on small ones."""
    force(monkeypatch, FORCED[name])
    found = []
    for seed in range(min(PROBLEMS, 80)):
        problem = random_problem(1000 + seed)
        found += mismatches(problem, solve_on_gpu(problem))
    assert not found, f"{len(found)} mismatches\n" + "\n".join(found[:5])


@pytest.mark.parametrize("name", OFFICIAL_FAILURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_where_the_official_operator_fails(name: str, dtype: torch.dtype) -> None:
    shape, settings = OFFICIAL_FAILURES[name]
    problem = problem_of(*shape, dtype, **settings)
    found = mismatches(problem, solve_on_gpu(problem))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("d", [8, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widths_on_maps_of_many_tiles(d: int, dtype: torch.dtype) -> None:
    """The kernels of the benchmark's shapes: whole blocks, tails in both directions, offsets that leave the tile's window."""
    problem = problem_of(2, 37, 29, 2 * d, 2, dtype, spread=9)
    found = mismatches(problem, solve_on_gpu(problem))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("size", [(28, 28), (24, 40), (7, 9)])
@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
def test_lattice_points_take_the_cell_of_floor(size: tuple[int, int], deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic)
    problem = problem_of(1, *size, 32, 1, torch.float32)
    problem.offset_mask[..., :18] = torch.randint(-2, 3, problem.offset_mask[..., :18].shape)
    found = mismatches(problem, solve_on_gpu(problem))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
def test_wild_offset_touches_nothing(bad: float, deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic)
    value = torch.full((2, 9, 9, 64), float("inf"))
    value[0, 0, 0] = float("nan")
    offset_mask = torch.ones(2, 9, 9, 54)
    offset_mask.view(2, 9, 9, 2, 27)[..., :18] = bad
    problem = Problem(0, value, offset_mask, torch.ones(2, 9, 9, 64), dict(groups=2))
    for tensor in solve_on_gpu(problem):
        assert torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [1.5, 12], ids=["near", "far"])
def test_deterministic_backward_gives_the_same_bits(dtype: torch.dtype, spread: float) -> None:
    torch.use_deterministic_algorithms(True)
    problem = on_gpu(problem_of(3, 33, 41, 96, 3, dtype, spread))
    first = solve(dcnv4, problem)
    for _ in range(10):
        # Other work on another stream moves blocks about.
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.randn(2048, 2048, device="cuda").square_()
        again = solve(dcnv4, problem)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.cuda.synchronize()


def test_every_element_is_written() -> None:
    """Outputs and gradients in memory full of NaN, as torch's deterministic mode hands it out."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    for shape in ((1, 5, 7, 20, 5), (2, 16, 16, 640, 20), (3, 4, 4, 1280, 40)):
        for tensor in solve(dcnv4, on_gpu(problem_of(*shape, torch.bfloat16))):
            assert tensor.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(dtype: torch.dtype) -> None:
    """Column slices of one Linear's output give what contiguous copies give: where vectors can read them the same bits, else the
    sums of another kernel."""
    for gap in (0, 3):
        both = torch.randn(2, 11, 13, 64 + gap + 56, device="cuda").to(dtype)
        value, offset_mask = both[..., :64], both[..., 64 + gap :]
        strided = dcnv4(value, offset_mask, groups=2)
        contiguous = dcnv4(value.contiguous(), offset_mask.contiguous(), groups=2)
        if gap == 0:
            assert torch.equal(strided, contiguous)
        else:
            rounding = torch.finfo(dtype).eps
            torch.testing.assert_close(
                strided, contiguous, rtol=2 * rounding, atol=20 * min(rounding, 2**-23)
            )


def test_empty_batch() -> None:
    value = torch.randn(0, 4, 4, 32, device="cuda", requires_grad=True)
    offset_mask = torch.randn(0, 4, 4, 32, device="cuda", requires_grad=True)
    dcnv4(value, offset_mask, groups=1).sum().backward()
    assert value.grad.shape == value.shape and offset_mask.grad.shape == offset_mask.shape


def test_needed_gradients_only() -> None:
    problem = on_gpu(problem_of(2, 9, 7, 64, 2, torch.float32))
    torch.use_deterministic_algorithms(True)
    _, *expected = solve(dcnv4, problem)
    for index in (0, 1):
        inputs = [problem.value, problem.offset_mask]
        inputs[index] = inputs[index].clone().requires_grad_()
        (got,) = torch.autograd.grad(dcnv4(*inputs, groups=2), inputs[index], problem.grad_output)
        assert torch.equal(got, expected[index])


def test_devices_are_not_mixed() -> None:
    with pytest.raises(ValueError, match="move both to one device"):
        dcnv4(torch.zeros(1, 4, 4, 32, device="cuda"), torch.zeros(1, 4, 4, 32), groups=1)


def test_another_device_is_used_and_left_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    problem = problem_of(2, 9, 7, 64, 2, torch.float32)
    with torch.cuda.device(0):
        moved = replace(
            problem, value=problem.value.to("cuda:1"), offset_mask=problem.offset_mask.to("cuda:1"),
            grad_output=problem.grad_output.to("cuda:1"),
        )  # fmt: skip
        results = tuple(tensor.cpu() for tensor in solve(dcnv4, moved))
        assert torch.cuda.current_device() == 0
    assert not mismatches(problem, results)


def test_work_goes_to_the_current_stream() -> None:
    """The operator waits for what its stream does before it, and for nothing else: inputs are written late on that stream."""
    problem = on_gpu(problem_of(4, 33, 31, 64, 2, torch.float32))
    torch.use_deterministic_algorithms(True)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        expected = solve(dcnv4, problem)  # allocates memory, which may wait
        stream.synchronize()
        value, offset_mask = torch.zeros_like(problem.value), torch.zeros_like(problem.offset_mask)
        torch.cuda._sleep(50_000_000)  # about 25 ms
        value.copy_(problem.value)
        offset_mask.copy_(problem.offset_mask)
        late = solve(dcnv4, replace(problem, value=value, offset_mask=offset_mask))
    assert not stream.query(), "the call waited for the GPU"
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, late, strict=True))


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
def test_cuda_graph(deterministic: bool) -> None:
    """Forward and backward in one graph; replays follow the inputs."""
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False
    problem = on_gpu(problem_of(2, 17, 19, 64, 2, torch.bfloat16))
    value, offset_mask = (t.clone().requires_grad_() for t in (problem.value, problem.offset_mask))

    def both() -> tuple[Tensor, ...]:
        output = dcnv4(value, offset_mask, groups=2)
        return output, *torch.autograd.grad(output, (value, offset_mask), problem.grad_output)

    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                both()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = both()
        for seed in (1, 2):
            generator = torch.Generator("cuda").manual_seed(seed)
            with torch.no_grad():
                value.copy_(torch.randn(value.shape, generator=generator, device="cuda"))
            graph.replay()
            moved = replace(problem, value=value.detach().cpu(), offset_mask=problem.offset_mask.cpu(),
                            grad_output=problem.grad_output.cpu())  # fmt: skip
            found = mismatches(moved, tuple(tensor.detach().cpu() for tensor in captured))
            assert not found, "\n".join(found)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


def test_windows_come_as_boxes_where_the_code_can() -> None:
    """The kernels are asked what they were compiled for; were the answer wrong, nothing but the speed would tell."""
    if (
        torch.cuda.get_device_capability() < (9, 0)
        or "90" not in native.cuda().dcnv4_cuda_architectures().decode()
    ):
        pytest.skip("no device of sm_90 or later, or no code for it")
    problem = on_gpu(problem_of(1, 9, 11, 256, 8, torch.bfloat16))
    dcnv4(problem.value, problem.offset_mask, groups=8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        dcnv4(problem.value, problem.offset_mask, groups=8)
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages() if "sample_window" in event.key]
    assert names and all(re.search(r"true>", name) for name in names), names


def replayed(chain: Callable[[], Result], graph: bool) -> Result:
    """What a chain of calls gives, with `graph` out of a replay of it."""
    result = chain()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            result = chain()
        captured.replay()
    torch.cuda.synchronize()
    return result


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("size", [(3, 5), (61, 67)], ids=str)
def test_calls_that_read_each_other(
    graph: bool, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From sm_90 on a kernel starts before the one ahead of it has ended: each of these reads what that one writes."""
    problem = on_gpu(problem_of(4, *size, 256, 8, torch.bfloat16))
    problem.offset_mask.unflatten(3, (8, 27))[..., 18:] *= 0.3  # so that values do not grow
    room = [torch.empty_like(problem.value) for _ in range(2)]

    @torch.no_grad()
    def chain() -> Tensor:
        room[0].copy_(problem.value)
        for i in range(40):
            # The same memory again and again, as a caching allocator hands it out.
            room[(i + 1) % 2].copy_(dcnv4(room[i % 2], problem.offset_mask, groups=8))
        y = room[0]
        for _ in range(40):
            y = dcnv4(y, problem.offset_mask, groups=8)
        return y

    early = replayed(chain, graph)
    force(monkeypatch, FORCE["in_turn"])
    assert torch.equal(early, chain())


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("size", [(9, 9), (16, 16), (61, 67)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_of_calls_that_read_each_other(
    graph: bool, size: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward's kernels start before those of the same call ahead of them have ended, and these before what they read is written
    by another call. Sums come in another order each time, so results are alike, not equal."""
    problem = on_gpu(problem_of(40, *size, 256, 8, dtype))
    value, offset_mask = problem.value.requires_grad_(), problem.offset_mask.requires_grad_()
    room = [torch.empty_like(value) for _ in range(2)]

    def chain() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            room[0].copy_(problem.grad_output)
        for i in range(12):
            output = dcnv4(value, offset_mask, groups=8)
            of_value, of_mask = torch.autograd.grad(output, (value, offset_mask), room[i % 2])
            with torch.no_grad():
                room[(i + 1) % 2].copy_(of_value)
        return room[0], of_mask

    # Copies: the next chain writes to the same room.
    early = [tensor.float().clone() for tensor in replayed(chain, graph)]
    force(monkeypatch, FORCE["in_turn"])
    for got, want in zip(early, chain(), strict=True):
        difference = (got - want.float()).norm() / want.float().norm()
        assert difference < (1e-5 if dtype == torch.float32 else 1e-2), float(difference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    problem = on_gpu(problem_of(2, 9, 7, 64, 2, torch.float32))
    value, offset_mask = problem.value.requires_grad_(), problem.offset_mask.requires_grad_()
    with torch.autocast("cuda", dtype):
        output = dcnv4(value, offset_mask, groups=2)
        mixed = dcnv4(value, offset_mask.to(dtype), groups=2)
    assert output.dtype == mixed.dtype == dtype
    assert torch.equal(output, dcnv4(value.to(dtype), offset_mask.to(dtype), groups=2))
    output.float().sum().backward()
    assert value.grad.dtype == offset_mask.grad.dtype == torch.float32


def trained_module(channels: int = 64) -> DCNv4:
    torch.manual_seed(0)
    module = DCNv4(channels, groups=2, mask_init="uniform")
    torch.nn.init.normal_(module.offset_mask.weight, std=0.05)
    return module.cuda()


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_projections_are_joined_in_training(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = trained_module(), torch.randn(4, 17, 19, 64, device="cuda", requires_grad=True)
    assert module.can_join(x, layer.value_proj, layer.offset_mask)

    def solve() -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            y = layer(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), (x, *layer.parameters()))]

    joined = solve()
    monkeypatch.setattr(module, "can_join", lambda *_: False)
    for a, b in zip(joined, solve(), strict=True):
        assert a.dtype == b.dtype and (a - b).norm() <= (3e-2 if autocast else 1e-3) * b.norm()


def test_compile_with_gradients() -> None:
    module, x = trained_module(), torch.randn(2, 11, 9, 64, device="cuda")
    y = module(x)
    y.square().sum().backward()
    expected = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True)
    torch.testing.assert_close(compiled(x), y, rtol=1e-4, atol=1e-4)
    compiled(x).square().sum().backward()
    for p, want in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-3, atol=1e-3)


def test_opcheck() -> None:
    problem = on_gpu(problem_of(2, 6, 5, 32, 2, torch.float32))
    value, offset_mask = problem.value.requires_grad_(), problem.offset_mask.requires_grad_()
    settings = ([3, 3], [1, 1], [1, 1], [1, 1], 2, 1.0, False, False)
    # In order-changing sums two runs differ in the last bit; opcheck compares them exactly enough for that.
    torch.use_deterministic_algorithms(True)
    result = torch.library.opcheck(torch.ops.dcnv4_ext.forward, (value, offset_mask, *settings))
    assert set(result.values()) == {"SUCCESS"}, result


def test_training_in_bf16_as_on_the_cpu() -> None:
    module = trained_module().to(torch.bfloat16)
    x = torch.randn(2, 11, 9, 64, device="cuda", dtype=torch.bfloat16)
    module(x).square().mean().backward()
    gradients = [p.grad.float().cpu() for p in module.parameters()]
    module.zero_grad()
    module.cpu()(x.cpu()).square().mean().backward()
    for p, got in zip(module.parameters(), gradients, strict=True):
        assert (p.grad.float() - got).norm() <= 0.1 * p.grad.float().norm()


def needs_memory(gibibytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gibibytes * GIBIBYTE:
        pytest.skip(f"needs {gibibytes} GiB of GPU memory, {free / GIBIBYTE:.0f} are free")


def _large(n: int, h: int, w: int, c: int, groups: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    value = torch.empty(n, h, w, c, device="cuda", dtype=torch.bfloat16)
    offset_mask = torch.empty(n, h, w, 27 * groups, device="cuda", dtype=torch.bfloat16)
    for tensor in (value, offset_mask):
        tensor.normal_(generator=generator)
    return value, offset_mask


def test_batch_past_2_to_the_31_elements() -> None:
    """The last image of a batch whose maps pass 2^31 elements each is what it is alone, and so are its gradients."""
    needs_memory(60)
    value, offset_mask = _large(21, 1024, 1024, 128, 4)
    assert value.numel() > 2**31 and offset_mask.numel() > 2**31
    for tensor in (value, offset_mask):
        tensor.requires_grad_()
    output = dcnv4(value, offset_mask, groups=4)
    last = [t.detach()[-1:].clone().requires_grad_() for t in (value, offset_mask)]
    alone = dcnv4(*last, groups=4)
    torch.testing.assert_close(output[-1:], alone, rtol=2**-7, atol=1e-3)
    gradient = torch.zeros_like(output)
    gradient[-1].normal_()
    got = torch.autograd.grad(output, (value, offset_mask), gradient)
    want = torch.autograd.grad(alone, last, gradient[-1:])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a[-1:], b, rtol=2**-7, atol=1e-3)
        assert not a[:-1].any()


def test_map_past_2_to_the_31_elements() -> None:
    """One image of more than 2^31 elements: its last rows are what they are in a strip of their own."""
    needs_memory(40)
    value, offset_mask = _large(1, 7400, 7400, 40, 1)
    assert value.numel() > 2**31
    offset_mask[..., :18].clamp_(-3, 3)
    rows, halo = 64, 8
    output = dcnv4(value, offset_mask, groups=1)
    strip = dcnv4(
        value[:, -rows - halo :].contiguous(), offset_mask[:, -rows - halo :].contiguous(), groups=1
    )
    # Positions near row 7400 have fewer bits behind the point than near row 64.
    torch.testing.assert_close(output[:, -rows:], strip[:, -rows:], rtol=2**-6, atol=5e-2)
