"""Every CUDA kernel once, on small problems: what compute-sanitizer watches.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitized.py

Only the operator's own kernels are launched (inputs are made on the CPU and copied), and without torch's cache every tensor
is an allocation of its own, so that an access one element past its end is seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from dcnv4_ext import native
from dcnv4_ext.geometry import Geometry

# Bits of dcnv4_problem.reserved (csrc/cuda/launch.h): scalar, general, direct, tiled, one vector a thread.
FORCED = (0, 1, 2, 4, 8, 16)
# (N, H, W, G, D): widths that vectors divide and that they do not, maps smaller and larger than a tile
SHAPES = ((2, 7, 5, 2, 32), (1, 9, 11, 1, 40), (1, 5, 6, 3, 12), (3, 4, 4, 2, 64), (1, 18, 17, 2, 16))
# (kernel, stride, padding, dilation, remove_center)
GEOMETRIES = (
    ((3, 3), (1, 1), (1, 1), (1, 1), False),
    ((3, 3), (2, 1), (0, 2), (1, 2), True),
    ((5, 2), (1, 1), (2, 1), (1, 1), False),
)


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


def run(
    shape: tuple[int, ...], settings: tuple, dtype: torch.dtype, softmax: bool, deterministic: bool
) -> int:
    """Forward and backward of one problem under every forced variant; the number of problems."""
    n, h, w, g, d = shape
    geometry = Geometry.of(*settings)
    ho, wo = geometry.output_size(h, w)
    generator = torch.Generator().manual_seed(h * w + d)
    value = torch.randn(n, h, w, g * d, generator=generator).to(dtype)
    offset_mask = torch.randn(n, ho, wo, 3 * g * geometry.taps + 1, generator=generator)
    offset_mask *= 3
    offset_mask.view(-1)[::101] = float("nan")
    offset_mask = offset_mask.to(dtype)
    grad_output = torch.randn(n, ho, wo, g * d, generator=generator).to(dtype)
    value, offset_mask, grad_output = (t.cuda() for t in (value, offset_mask, grad_output))
    arguments = (*settings[:4], g, 1.0, settings[4], softmax)
    torch.use_deterministic_algorithms(deterministic)
    for bits in (0,) if deterministic else FORCED:
        force(bits)
        torch.ops.dcnv4_ext.forward(value, offset_mask, *arguments)
        torch.ops.dcnv4_ext.backward(value, offset_mask, grad_output, *arguments, [True, True])
    torch.cuda.synchronize()
    return 1 if deterministic else len(FORCED)


def main() -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    count = 0
    for index, (shape, settings, deterministic) in enumerate(
        itertools.product(SHAPES, GEOMETRIES, (False, True))
    ):
        # Types and the softmax take turns rather than multiply.
        for dtype in dtypes[:2] if index % 2 else dtypes[2:]:
            count += run(shape, settings, dtype, softmax=index % 3 == 0, deterministic=deterministic)
    print(f"{count} problems forward and backward on {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    main()
