"""Every CUDA kernel once, on small problems: what compute-sanitizer watches.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitized.py

Only the operator's own kernels are launched (inputs are made on the CPU and copied), and without torch's cache every tensor
is an allocation of its own, so that an access one element past its end is seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from dcnv4_ext import native
from dcnv4_ext.geometry import Geometry

# Bits of dcnv4_problem.reserved (csrc/cuda/launch.h), alone and together: 1 scalar, 2 general, 4 direct, 8 tiled, 16 no window,
# 32 a window wherever one fits, 64 windows fetched by threads. A deterministic backward has two kernels, with vectors and without.
FORCED, FORCED_DETERMINISTIC = (0, 1, 2, 4, 6, 8, 16, 32), (0, 1)
# (N, H, W, G, D): widths that vectors divide and that they do not.
SHAPES = ((2, 7, 5, 2, 32), (1, 9, 11, 1, 40), (1, 5, 6, 3, 12), (1, 18, 17, 2, 16))
# Windows by cells of 32, 64 and 128 bytes, whole maps and tiles of larger ones; as the shape chooses alone.
WINDOWS = (
    (1, 60, 6, 1, 32),
    (1, 6, 5, 1, 64),
    (1, 60, 6, 1, 64),
    (1, 6, 5, 1, 16),
    (1, 60, 6, 1, 16),
    (1, 6, 5, 1, 8),
    (1, 60, 6, 1, 8),
)
# (kernel, stride, padding, dilation, remove_center)
GEOMETRIES = (
    ((3, 3), (1, 1), (1, 1), (1, 1), False),
    ((3, 3), (1, 1), (1, 1), (1, 1), True),
    ((3, 3), (2, 1), (0, 2), (1, 2), True),
    ((5, 2), (1, 1), (2, 1), (1, 1), False),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Problem(NamedTuple):
    shape: tuple[int, int, int, int, int]
    geometry: Geometry
    dtype: torch.dtype
    softmax: bool
    deterministic: bool
    forced: tuple[int, ...]
    in_step: bool = False  # rows of offset_mask with 16 bytes, which modules see to and boxes need

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """value, offset_mask, grad_output, on the CPU."""
        n, h, w, g, d = self.shape
        ho, wo = self.geometry.output_size(h, w)
        generator = torch.Generator().manual_seed(h * w + d)
        value = torch.randn(n, h, w, g * d, generator=generator)
        used = 3 * g * self.geometry.taps
        offset_mask = torch.randn(n, ho, wo, used + (-used % 8 if self.in_step else 1), generator=generator)
        offset_mask *= 3
        offset_mask.view(-1)[::101] = float("nan")
        grad_output = torch.randn(n, ho, wo, g * d, generator=generator)
        return tuple(tensor.to(self.dtype) for tensor in (value, offset_mask, grad_output))


def problems() -> Iterator[Problem]:
    for index, (shape, settings, dtype) in enumerate(itertools.product(SHAPES, GEOMETRIES, DTYPES)):
        for deterministic, forced in ((False, FORCED), (True, FORCED_DETERMINISTIC)):
            yield Problem(shape, Geometry.of(*settings), dtype, index % 3 == 0, deterministic, forced)
    for shape, settings, dtype in itertools.product(WINDOWS + SHAPES[:1], GEOMETRIES[:2], DTYPES[:3]):
        yield Problem(shape, Geometry.of(*settings), dtype, False, False, (0, 32, 64), in_step=True)
        yield Problem(shape, Geometry.of(*settings), dtype, False, False, (0,))


ordinary = native.forward, native.backward


def force(bits: int) -> None:
    """Have every further call use kernels that the shape would not choose."""

    def changed(call: Callable[..., None]) -> Callable[..., None]:
        def with_bits(problem: native.Problem, *tensors: torch.Tensor | None) -> None:
            copy = native.Problem.from_buffer_copy(problem)
            copy.reserved = bits
            call(copy, *tensors)

        return with_bits

    native.forward, native.backward = map(changed, ordinary)


def run(problem: Problem) -> int:
    """Forward and backward under every forced variant; how many there were."""
    value, offset_mask, grad_output = (tensor.cuda() for tensor in problem.tensors())
    geometry = problem.geometry
    arguments = (
        geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation, problem.shape[3], 1.0,
        geometry.remove_center, problem.softmax,
    )  # fmt: skip
    torch.use_deterministic_algorithms(problem.deterministic)
    for bits in problem.forced:
        force(bits)
        torch.ops.dcnv4_ext.forward(value, offset_mask, *arguments)
        torch.ops.dcnv4_ext.backward(value, offset_mask, grad_output, *arguments, [True, True])
    torch.cuda.synchronize()
    return len(problem.forced)


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit(
            f"torch {torch.__version__} sees no GPU; the kernels run on the CPU under tests/emulation"
        )
    torch.utils.deterministic.fill_uninitialized_memory = False
    count = sum(map(run, problems()))
    print(f"{count} problems forward and backward on {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    main()
