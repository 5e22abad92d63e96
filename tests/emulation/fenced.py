"""Runs the CPU kernels on tensors that lie against pages nobody may touch; an access outside them kills the process.

    cd tests && python -m emulation.fenced [number of problems]

Sanitizers watch neither masked nor gathering vector instructions; the memory management unit watches everything. Ends with 77
where the system has no mprotect.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

from dcnv4_ext import native, ops
from problems import Problem, random_problem

_PAGE = mmap.PAGESIZE


class Fence:
    """Pages with a forbidden one at either end."""

    def __init__(self, tensor: Tensor, at_end: bool) -> None:
        """A copy of `tensor`, dense, that touches the forbidden page behind it (`at_end`) or before it."""
        size = tensor.numel() * tensor.itemsize
        pages = -(-max(size, 1) // _PAGE) + 2
        self.memory = mmap.mmap(-1, pages * _PAGE)
        start = (pages - 1) * _PAGE - size if at_end else _PAGE
        raw = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.tensor = raw[start : start + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        self.address, self.pages = raw.data_ptr(), pages
        self.protect(0)

    def protect(self, rights: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        for page in (0, self.pages - 1):
            if (
                libc.mprotect(ctypes.c_void_p(self.address + page * _PAGE), ctypes.c_size_t(_PAGE), rights)
                != 0
            ):
                raise OSError(ctypes.get_errno(), "mprotect")


def run(problem: Problem, at_end: bool) -> None:
    inputs = [problem.value, problem.offset_mask, problem.grad_output]
    fences = [Fence(t, at_end) for t in (*inputs, problem.grad_output, problem.value, problem.offset_mask)]
    value, offset_mask, grad_output, output, grad_value, grad_offset_mask = (fence.tensor for fence in fences)
    settings = {
        name: (size, size)
        if isinstance(size, int) and name in ("kernel_size", "stride", "padding", "dilation")
        else size
        for name, size in problem.settings.items()
    }
    order = (
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "offset_scale",
        "remove_center",
        "softmax",
    )
    arguments = [settings[name] for name in order]
    native.forward(ops._prepare(value, offset_mask, None, arguments).problem, value, offset_mask, output)
    call = ops._prepare(value, offset_mask, grad_output, arguments)
    native.backward(call.problem, value, offset_mask, grad_output, grad_value, grad_offset_mask)
    for fence in fences:
        fence.protect(mmap.PROT_READ | mmap.PROT_WRITE)


def main() -> int:
    if not hasattr(ctypes.CDLL(None), "mprotect"):
        print("no mprotect on this system")
        return 77
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    torch.set_num_threads(1)
    for isa in native.cpu().dcnv4_cpu_isas().decode().split():
        with native.forced_isa(isa):
            for seed in range(count):
                problem = random_problem(seed)
                if problem.value.shape[0] > 0:
                    for at_end in (True, False):
                        print(isa, problem, "before a fence" if at_end else "behind a fence", flush=True)
                        run(problem, at_end)
    return 0


if __name__ == "__main__":
    sys.exit(main())
