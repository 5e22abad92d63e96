"""The compiled libraries: find, load once, hand over pointers, turn a status into an exception."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .geometry import Geometry

ABI_VERSION = 1
BUILD_COMMAND = "pip install --force-reinstall --no-deps ."
_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_OK, _BAD_PROBLEM, _OUT_OF_MEMORY, _NO_KERNEL, _CUDA_ERROR = 0, 1, 2, 3, 1000


class Problem(ctypes.Structure):
    """`dcnv4_problem` of csrc/dcnv4.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("abi_version", "dtype")),
        *((name, ctypes.c_int64) for name in ("N", "H", "W", "G", "D", "Ho", "Wo", "P")),
        *((name, ctypes.c_int64) for name in ("value_stride", "offset_mask_stride", "output_stride")),
        *((name, ctypes.c_int64) for name in ("grad_value_stride", "grad_offset_mask_stride")),
        *((name, ctypes.c_int32) for name in ("kernel_h", "kernel_w", "stride_h", "stride_w")),
        *((name, ctypes.c_int32) for name in ("pad_h", "pad_w", "dilation_h", "dilation_w")),
        *((name, ctypes.c_int32) for name in ("remove_center", "softmax", "deterministic")),
        *((name, ctypes.c_int32) for name in ("threads", "device", "reserved")),
        ("offset_scale", ctypes.c_double),
    ]


class MissingLibrary(RuntimeError):
    """A compiled library that is not there or does not fit; the text gives the command that builds it."""


def library_file(device: str) -> Path | None:
    """Where the library of `device` ("cpu" or "cuda") lies, or None."""
    # CMake's MODULE libraries end so on macOS too.
    suffix = ".dll" if sys.platform == "win32" else ".so"
    # An editable install keeps the Python files and the compiled files in two folders of the package's search path.
    folders = [Path(entry) for entry in sys.modules[__package__].__path__]
    # In a clone Python finds the package of the clone, which has no libraries, before the installed one, which has.
    if any((folder.parent / "CMakeLists.txt").is_file() for folder in folders):
        folders += [Path(entry) / __package__ for entry in sys.path]
    candidates = [folder / "lib" / f"dcnv4_{device}{suffix}" for folder in folders]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


NO_ROCM = "dcnv4_ext has kernels for NVIDIA GPUs and CPUs; on AMD's, for which this torch is built (ROCm), torch's own operators take their place, more slowly"
NVCC_FROM = "nvcc in CUDA_HOME or on PATH, or a driver of CUDA 13 or newer, for which pip fetches nvcc"


def _open(device: str) -> ctypes.CDLL:
    if device == "cuda" and torch.version.hip:
        raise MissingLibrary(NO_ROCM)
    path = library_file(device)
    if path is None:
        need = "a C++ compiler" if device == "cpu" else NVCC_FROM
        raise MissingLibrary(
            f"dcnv4_ext has no compiled {device.upper()} library; with {need}, run `{BUILD_COMMAND}` in the project's folder "
            "(`python -m dcnv4_ext` tells what is built)"
        )
    try:
        # torch is imported above: its OpenMP runtime is loaded and the library binds to that one.
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise MissingLibrary(
            f"{path} cannot be loaded ({error}); rebuild it with `{BUILD_COMMAND}`"
        ) from error
    version = getattr(library, f"dcnv4_{device}_abi")()
    if version != ABI_VERSION:
        raise MissingLibrary(
            f"{path} has interface version {version}, the Python files expect {ABI_VERSION}; rebuild with `{BUILD_COMMAND}`"
        )
    return library


@lru_cache(maxsize=1)
def cpu() -> ctypes.CDLL:
    """The CPU library, loaded at the first call. DCNV4_CPU_ISA in the environment forces an instruction set."""
    library = _open("cpu")
    pointer, problem = ctypes.c_void_p, ctypes.POINTER(Problem)
    library.dcnv4_cpu_isas.restype = library.dcnv4_cpu_selected.restype = ctypes.c_char_p
    library.dcnv4_cpu_select.argtypes = [ctypes.c_char_p]
    library.dcnv4_cpu_forward.argtypes = [problem, pointer, pointer, pointer]
    library.dcnv4_cpu_backward.argtypes = [problem, pointer, pointer, pointer, pointer, pointer]
    wanted = os.environ.get("DCNV4_CPU_ISA", "")
    if library.dcnv4_cpu_select(wanted.encode()) != _OK:
        raise ValueError(
            f"DCNV4_CPU_ISA={wanted!r} is not available; this build on this processor has: "
            f"{library.dcnv4_cpu_isas().decode()}"
        )
    return library


@lru_cache(maxsize=1)
def cuda() -> ctypes.CDLL:
    """The CUDA library, loaded at the first call."""
    library = _open("cuda")
    pointer, problem, integer = ctypes.c_void_p, ctypes.POINTER(Problem), ctypes.c_int32
    library.dcnv4_cuda_architectures.restype = library.dcnv4_cuda_error_string.restype = ctypes.c_char_p
    library.dcnv4_cuda_error_string.argtypes = [integer]
    library.dcnv4_cuda_forward.argtypes = [problem, pointer, pointer, pointer, pointer]
    library.dcnv4_cuda_backward_workspace.argtypes = [problem, integer, integer]
    library.dcnv4_cuda_backward_workspace.restype = ctypes.c_int64
    library.dcnv4_cuda_backward.argtypes = [
        problem,
        pointer,
        pointer,
        pointer,
        pointer,
        pointer,
        pointer,
        pointer,
    ]
    return library


def check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in _DTYPE_CODES:
        raise TypeError(f"{name} is {dtype}; use float32, float64, bfloat16 or float16")


def extent(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> int:
    """Bytes from the first to the last element of a tensor, both included; 0 for an empty one."""
    if 0 in shape:
        return 0
    return (1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))) * itemsize


def pixel_stride(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements between neighbouring pixels of a tensor with uniform rows (see `has_rows`). The stride of a dimension of size 1 is
    whatever the tensor's history left there, also in what torch calls contiguous."""
    return next((strides[axis] for axis in (2, 1, 0) if shape[axis] > 1), shape[3])


def check_memory(name: str, tensor: Tensor, size: int) -> None:
    """`tensor` has `size` bytes behind its first element. With a storage that was freed or cut (`resize_`) it has not."""
    held, offset = tensor.untyped_storage().nbytes(), tensor.storage_offset()
    if held < size or (offset and held < size + offset * tensor.itemsize):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} but a storage of {held} bytes; it was freed or resized"
        )


def has_rows(tensor: Tensor) -> bool:
    """Whether the pixels of an (N, H, W, C) tensor stand a constant number of elements apart (in a slice of a wider Linear's output
    they do), each with its channels side by side."""
    if tensor.is_contiguous():
        return True
    _, h, w, c = tensor.shape
    by_image, by_row, by_pixel, by_channel = tensor.stride()
    return by_channel == 1 and by_pixel >= c and by_row == w * by_pixel and by_image == h * by_row


def rows(tensor: Tensor) -> Tensor:
    """`tensor` itself where it has uniform rows, else a contiguous copy. Its memory must have been checked: torch's copy reads a
    freed storage without asking, and the process ends."""
    return tensor if has_rows(tensor) else tensor.contiguous()


def problem(
    geometry: Geometry, groups: int, scale: float, softmax: bool, dtype: torch.dtype,
    value_shape: tuple[int, ...], offset_mask_shape: tuple[int, ...], output_shape: tuple[int, ...], *,
    value_stride: int, offset_mask_stride: int, output_stride: int, deterministic: bool, threads: int, device: int,
) -> Problem:  # fmt: skip
    """The struct of a checked call. Gradients are written to contiguous tensors."""
    n, h, w, c = value_shape
    return Problem(
        abi_version=ABI_VERSION, dtype=_DTYPE_CODES[dtype], N=n, H=h, W=w, G=groups, D=c // groups,
        Ho=output_shape[1], Wo=output_shape[2], P=offset_mask_shape[3],
        value_stride=value_stride, offset_mask_stride=offset_mask_stride, output_stride=output_stride,
        grad_value_stride=c, grad_offset_mask_stride=offset_mask_shape[3],
        kernel_h=geometry.kernel_size[0], kernel_w=geometry.kernel_size[1],
        stride_h=geometry.stride[0], stride_w=geometry.stride[1],
        pad_h=geometry.padding[0], pad_w=geometry.padding[1],
        dilation_h=geometry.dilation[0], dilation_w=geometry.dilation[1],
        remove_center=int(geometry.remove_center), softmax=int(softmax), deterministic=int(deterministic),
        threads=threads, device=device, offset_scale=scale,
    )  # fmt: skip


def _raise(status: int, problem: Problem, library: ctypes.CDLL) -> None:
    sizes = ", ".join(
        f"{name}={getattr(problem, name)}" for name in ("N", "H", "W", "G", "D", "Ho", "Wo", "P")
    )
    if status >= _CUDA_ERROR:
        text = library.dcnv4_cuda_error_string(status).decode()
        hint = ""
        if "no kernel image" in text or "unsupported toolchain" in text:
            built = library.dcnv4_cuda_architectures().decode()
            hint = f"; this build has {built}: rebuild on this machine with `{BUILD_COMMAND}`"
        elif "driver version is insufficient" in text:
            hint = "; the library was built by a newer CUDA toolkit than the driver supports: update the driver or rebuild"
        raise RuntimeError(f"dcnv4: CUDA reports {text} ({sizes}){hint}")
    if status == _OUT_OF_MEMORY:
        raise MemoryError(f"dcnv4: no memory for the scratch of a problem with {sizes}")
    if status == _BAD_PROBLEM:
        raise ValueError(
            f"value and offset_mask are too large for a kernel on this device, which numbers the pixels of a map and of the "
            f"output in 32 bits: {sizes}"
        )
    if status == _NO_KERNEL:
        raise RuntimeError(f"dcnv4: no kernel for this problem ({sizes}, dtype code {problem.dtype})")
    raise RuntimeError(f"dcnv4: unknown status {status} ({sizes})")


@contextlib.contextmanager
def forced_isa(name: str):
    """Run the CPU kernels of one instruction set ("avx512", "avx2", "portable") within the context; for tests and benchmarks."""
    library = cpu()
    before = library.dcnv4_cpu_selected()
    if library.dcnv4_cpu_select(name.encode()) != _OK:
        raise ValueError(f"{name!r} is not available here; there is: {library.dcnv4_cpu_isas().decode()}")
    try:
        yield
    finally:
        library.dcnv4_cpu_select(before)


def forward(problem: Problem, value: Tensor, offset_mask: Tensor, output: Tensor) -> None:
    """Fill `output`; the tensors have uniform rows, see `has_rows`."""
    if value.is_cpu:
        library = cpu()
        status = library.dcnv4_cpu_forward(
            problem, value.data_ptr(), offset_mask.data_ptr(), output.data_ptr()
        )
    else:
        library = cuda()
        stream = torch._C._cuda_getCurrentRawStream(problem.device)
        status = library.dcnv4_cuda_forward(
            problem, value.data_ptr(), offset_mask.data_ptr(), output.data_ptr(), stream
        )
    if status != _OK:
        _raise(status, problem, library)


def backward(
    problem: Problem,
    value: Tensor,
    offset_mask: Tensor,
    grad_output: Tensor,
    grad_value: Tensor | None,
    grad_offset_mask: Tensor | None,
) -> None:
    """Fill the gradients that are not None; they are contiguous."""
    pointers = [
        value.data_ptr(),
        offset_mask.data_ptr(),
        grad_output.data_ptr(),
        grad_value.data_ptr() if grad_value is not None else None,
        grad_offset_mask.data_ptr() if grad_offset_mask is not None else None,
    ]
    if value.is_cpu:
        library = cpu()
        status = library.dcnv4_cpu_backward(problem, *pointers)
    else:
        library = cuda()
        size = library.dcnv4_cuda_backward_workspace(
            problem, grad_value is not None, grad_offset_mask is not None
        )
        if size < 0:
            _raise(-size, problem, library)
        # From torch's caching allocator, so that CUDA graphs own it too.
        workspace = value.new_empty(size, dtype=torch.uint8) if size else None
        stream = torch._C._cuda_getCurrentRawStream(problem.device)
        status = library.dcnv4_cuda_backward(
            problem, *pointers, workspace.data_ptr() if size else None, stream
        )
    if status != _OK:
        _raise(status, problem, library)
