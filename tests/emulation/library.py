"""The emulated CUDA library through ctypes, on CPU tensors."""

from __future__ import annotations

import ctypes
import re
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dcnv4_ext.native import ABI_VERSION, Problem

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Bits of Problem.reserved, `Force` of csrc/cuda/launch.h.
FORCE = {
    "scalar": 1,
    "general": 2,
    "direct": 4,
    "tiled": 8,
    "no_window": 16,
    "window": 32,
    "threads": 64,
    "in_turn": 128,
    "apart": 256,
}
_GUARD = 64  # elements before and behind every buffer a kernel writes


@dataclass(frozen=True)
class Operator:
    """What `dcnv4` takes beside the tensors, all pairs (h, w)."""

    groups: int
    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    offset_scale: float = 1.0
    remove_center: bool = False
    softmax: bool = False

    @property
    def taps(self) -> int:
        return self.kernel_size[0] * self.kernel_size[1] - int(self.remove_center)

    def output_size(self, h: int, w: int) -> tuple[int, int]:
        return tuple(
            (size + 2 * pad - (dilation * (kernel - 1) + 1)) // stride + 1
            for size, kernel, stride, pad, dilation in zip(
                (h, w), self.kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        )


_TYPES = {"f": "float", "d": "double", "NS_4bf16E": "bf16", "NS_3f16E": "f16"}
_KERNEL = re.compile(
    rf"(sample|sample_window|differentiate|round_sums|merge_tiles|gather_sorted|gather_matrix|dot_window|dot_matrix|find_taps|gather_taps)I({'|'.join(_TYPES)})((?:L[ib]\d+E)*)E"
)


def kernel_name(symbol: str) -> tuple | None:
    """A kernel's symbol, as g++ or nvcc mangle it, as its name and template arguments; None for anything else."""
    match = _KERNEL.search(symbol)
    # Nor are a lambda inside one (_ZZ) or a part that the compiler has split off (with a dot) kernels.
    if match is None or symbol.startswith("_ZZ") or "." in symbol[match.end() :]:
        return None
    return match[1], _TYPES[match[2]], *map(int, re.findall(r"L[ib](\d+)E", match[3]))


class KernelError(RuntimeError):
    """A status other than 0; `status` is its number."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"status {status} {text}")
        self.status = status


class GuardedRows:
    """A (N, H, W, C) tensor inside a larger buffer of a sentinel value: `row_gap` elements behind every pixel and a guard at both
    ends, which no kernel may write."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, row_gap: int = 0) -> None:
        n, h, w, c = shape
        self.stride = c + row_gap
        # Kept aligned to 16 bytes: the guard is a multiple of that.
        self.buffer = torch.full((n * h * w * self.stride + 2 * _GUARD,), -77.0, dtype=dtype)
        rows = self.buffer[_GUARD : _GUARD + n * h * w * self.stride].view(n, h, w, self.stride)
        self.tensor = rows[..., :c]
        self.untouched = torch.ones_like(self.buffer, dtype=torch.bool)
        self.untouched[_GUARD : _GUARD + n * h * w * self.stride].view(n, h, w, self.stride)[..., :c] = False

    def check(self) -> None:
        assert bool((self.buffer[self.untouched] == -77.0).all()), "a kernel wrote outside its tensor"


def pixel_stride(tensor: Tensor) -> int:
    """Elements between neighbouring pixels; torch gives anything for a map of one pixel."""
    n, h, w, c = tensor.shape
    return tensor.stride(2) if w > 1 else tensor.stride(1) if h > 1 else tensor.stride(0) if n > 1 else c


class Emulation:
    """The library, with the device functions' names and without their pointers."""

    def __init__(self, path: Path) -> None:
        self.path, self.library = path, ctypes.CDLL(str(path))
        library = self.library
        pointer, problem, integer = ctypes.c_void_p, ctypes.POINTER(Problem), ctypes.c_int32
        library.dcnv4_cuda_error_string.restype = library.dcnv4_cuda_architectures.restype = ctypes.c_char_p
        library.dcnv4_cuda_forward.argtypes = [problem, pointer, pointer, pointer, pointer]
        library.dcnv4_cuda_backward_workspace.argtypes = [problem, integer, integer]
        library.dcnv4_cuda_backward_workspace.restype = ctypes.c_int64
        library.dcnv4_cuda_backward.argtypes = [problem, *[pointer] * 7]
        library.emulation_order.argtypes = [ctypes.c_uint64]
        library.emulation_launches.restype = ctypes.c_int64
        assert library.dcnv4_cuda_abi() == ABI_VERSION

    @contextmanager
    def order(self, seed: int):
        """Blocks and threads run in another order within the context."""
        self.library.emulation_order(seed)
        try:
            yield
        finally:
            self.library.emulation_order(0)

    @contextmanager
    def multiprocessors(self, count: int):
        """The device has `count` multiprocessors within the context; kernels choose block sizes by it."""
        self.library.emulation_multiprocessors(count)
        try:
            yield
        finally:
            self.library.emulation_multiprocessors(4)

    @cached_property
    def kernels(self) -> dict[int, tuple]:
        """Every kernel compiled into the library: address -> name and template arguments, such as ("sample", "bf16", 8, 2, 9)."""
        listed = subprocess.run(["nm", str(self.path)], capture_output=True, text=True, check=True).stdout
        symbols = {
            name: int(place, 16)
            for place, kind, name in (line.split() for line in listed.splitlines() if line[:1].isalnum())
            if kind in "tTwW"
        }
        own = ctypes.cast(self.library.emulation_launches, ctypes.c_void_p).value
        base = own - symbols["emulation_launches"]
        found = {base + place: kernel_name(symbol) for symbol, place in symbols.items()}
        return {address: name for address, name in found.items() if name}

    def launched(self) -> set[tuple]:
        """The kernels launched since this was last asked."""
        addresses = (ctypes.c_void_p * len(self.kernels))()
        count = self.library.emulation_kernels(addresses, len(addresses))
        # The emulation's own kernels (wrong_kernels.cpp) are none of the operator's.
        return {self.kernels[a] for a in addresses[:count] if a in self.kernels}

    def launches(self) -> int:
        return self.library.emulation_launches()

    def problem(
        self, op: Operator, value: Tensor, offset_mask: Tensor, *, output_stride: int, force: tuple[str, ...] = (),
        deterministic: bool = False, grad_strides: tuple[int, int] = (0, 0), device: int = 0,
    ) -> Problem:  # fmt: skip
        n, h, w, c = value.shape
        ho, wo = op.output_size(h, w)
        return Problem(
            abi_version=ABI_VERSION, dtype=DTYPES[value.dtype], N=n, H=h, W=w, G=op.groups, D=c // op.groups, Ho=ho, Wo=wo,
            P=offset_mask.shape[3], value_stride=pixel_stride(value), offset_mask_stride=pixel_stride(offset_mask),
            output_stride=output_stride, grad_value_stride=grad_strides[0], grad_offset_mask_stride=grad_strides[1],
            kernel_h=op.kernel_size[0], kernel_w=op.kernel_size[1], stride_h=op.stride[0], stride_w=op.stride[1],
            pad_h=op.padding[0], pad_w=op.padding[1], dilation_h=op.dilation[0], dilation_w=op.dilation[1],
            remove_center=int(op.remove_center), softmax=int(op.softmax), deterministic=int(deterministic), threads=1,
            device=device, reserved=sum(FORCE[name] for name in force), offset_scale=op.offset_scale,
        )  # fmt: skip

    def check(self, status: int) -> None:
        if status != 0:
            raise KernelError(status, self.library.dcnv4_cuda_error_string(status).decode())

    def forward(
        self,
        op: Operator,
        value: Tensor,
        offset_mask: Tensor,
        *,
        force: tuple[str, ...] = (),
        row_gap: int = 0,
        device: int = 0,
    ) -> Tensor:
        """The output, (N, Ho, Wo, C)."""
        ho, wo = op.output_size(*value.shape[1:3])
        output = GuardedRows((value.shape[0], ho, wo, value.shape[3]), value.dtype, row_gap)
        problem = self.problem(
            op, value, offset_mask, output_stride=output.stride, force=force, device=device
        )
        self.check(
            self.library.dcnv4_cuda_forward(
                problem, value.data_ptr(), offset_mask.data_ptr(), output.tensor.data_ptr(), None
            )
        )
        output.check()
        return output.tensor

    def backward(
        self, op: Operator, value: Tensor, offset_mask: Tensor, grad_output: Tensor, *, force: tuple[str, ...] = (),
        deterministic: bool = False, row_gap: int = 0, need: tuple[bool, bool] = (True, True), device: int = 0,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """The gradients of value and offset_mask; None where `need` says so."""
        grads = [
            GuardedRows(tensor.shape, tensor.dtype, row_gap) if needed else None
            for tensor, needed in zip((value, offset_mask), need, strict=True)
        ]
        problem = self.problem(
            op, value, offset_mask, output_stride=pixel_stride(grad_output), force=force, deterministic=deterministic,
            grad_strides=tuple(grad.stride if grad else 0 for grad in grads), device=device,
        )  # fmt: skip
        size = self.library.dcnv4_cuda_backward_workspace(problem, *map(int, need))
        if size < 0:
            self.check(-size)
        workspace = GuardedRows((1, 1, 1, size), torch.int8)
        pointers = [grad.tensor.data_ptr() if grad else None for grad in grads]
        self.check(
            self.library.dcnv4_cuda_backward(
                problem,
                value.data_ptr(),
                offset_mask.data_ptr(),
                grad_output.data_ptr(),
                *pointers,
                workspace.tensor.data_ptr() if size else None,
                None,
            )
        )
        for buffer in (*grads, workspace):
            if buffer:
                buffer.check()
        return tuple(grad.tensor if grad else None for grad in grads)
