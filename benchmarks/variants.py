"""Variants of the CUDA library beside each other: what a change to a kernel is worth, row by row.

    python benchmarks/variants.py before.so after.so after.so:16 --rows sd 64x56x56x128 --kinds forward value

A variant is a library built from dcnv4_ext/csrc (`cmake --build`, or nvcc by hand), with `:BITS` to force kernels (`Force` of
csrc/cuda/launch.h). Kinds: forward, backward (both gradients), value and mask (one gradient alone), ordered (deterministic).
Calls go to the C interface without torch's dispatcher; those of all buffer sets, together larger than the cache, are captured as
one CUDA graph, and the variants take turns replaying theirs. Printed are medians in microseconds; where a variant's result
differs from the first's by more than rounding, it says so. For tuning: what the texts claim comes from eval.operators.

`--device cpu` rehearses with the library that tests/emulation/build.py prints, which takes the CPU's memory.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dcnv4_ext import native  # noqa: E402
from dcnv4_ext.geometry import Geometry  # noqa: E402
from eval.contenders import buffer_sets  # noqa: E402
from eval.operators import parse_rows  # noqa: E402
from eval.peers import (  # noqa: E402
    MAIN_SIGMA,
    Case,
    Shape,
)

KINDS = {  # what of backward is asked for: (gradient of value, of offset_mask, deterministic)
    "forward": None,
    "backward": (True, True, False),
    "value": (True, False, False),
    "mask": (False, True, False),
    "ordered": (True, True, True),
}
MOST_SETS = 24
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}  # of the largest number


@dataclass(frozen=True)
class Variant:
    name: str
    library: ctypes.CDLL
    forced: int

    @classmethod
    def open(cls, text: str) -> Variant:
        path, _, bits = text.partition(":")
        library = ctypes.CDLL(str(Path(path).resolve()))
        problem, pointer, integer = ctypes.POINTER(native.Problem), ctypes.c_void_p, ctypes.c_int32
        library.dcnv4_cuda_forward.argtypes = [problem, *[pointer] * 4]
        library.dcnv4_cuda_backward.argtypes = [problem, *[pointer] * 7]
        library.dcnv4_cuda_backward_workspace.argtypes = [problem, integer, integer]
        library.dcnv4_cuda_backward_workspace.restype = ctypes.c_int64
        if library.dcnv4_cuda_abi() != native.ABI_VERSION:
            raise SystemExit(f"{path} has another interface version than the Python files")
        return cls(Path(path).stem + (f":{bits}" if bits else ""), library, int(bits or 0))


class Buffers:
    """Inputs of every set, and outputs that all sets write to."""

    def __init__(self, shape: Shape, dtype: torch.dtype, sigma: float, device: str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        size = torch.finfo(dtype).bits // 8
        self.sets = min(MOST_SETS, buffer_sets(shape.pixels * size * (shape.c + shape.columns), device))
        case = Case(shape, dtype, sigma, device, self.sets)
        self.values = [case.map("value", i) for i in range(self.sets)]
        self.masks = [case.map("offset_mask", i) for i in range(self.sets)]
        self.gradients = [torch.randn_like(value) for value in self.values]
        self.output, self.grad_value = (torch.empty_like(self.values[0]) for _ in range(2))
        self.grad_mask = torch.empty_like(self.masks[0])

    def calls(self, variant: Variant, kind: str, stream: int) -> tuple[Callable[[int], None], list[Tensor]]:
        """Runs set i, and the tensors that it fills."""
        shape, wanted = self.shape, KINDS[kind]
        problem = native.problem(
            Geometry.of((3, 3), (1, 1), (1, 1), (1, 1), False), shape.groups, 1.0, False, self.dtype,
            self.values[0].shape, self.masks[0].shape, self.values[0].shape, value_stride=shape.c,
            offset_mask_stride=shape.columns, output_stride=shape.c, deterministic=bool(wanted and wanted[2]), threads=1, device=0,
        )  # fmt: skip
        problem.reserved = variant.forced
        library = variant.library
        if wanted is None:

            def forward(i: int) -> None:
                inputs = self.values[i].data_ptr(), self.masks[i].data_ptr()
                _check(library.dcnv4_cuda_forward(problem, *inputs, self.output.data_ptr(), stream), variant)

            return forward, [self.output]
        size = library.dcnv4_cuda_backward_workspace(problem, *wanted[:2])
        _check(-size if size < 0 else 0, variant)
        workspace = torch.empty(max(1, size), dtype=torch.uint8, device=self.device)
        filled = [
            t if want else None for t, want in zip((self.grad_value, self.grad_mask), wanted, strict=False)
        ]

        def backward(i: int) -> None:
            inputs = self.values[i].data_ptr(), self.masks[i].data_ptr(), self.gradients[i].data_ptr()
            outputs = (None if t is None else t.data_ptr() for t in filled)
            _check(
                library.dcnv4_cuda_backward(problem, *inputs, *outputs, workspace.data_ptr(), stream), variant
            )

        return backward, [t for t in filled if t is not None]


def _check(status: int, variant: Variant) -> None:
    if status != 0:
        raise RuntimeError(f"{variant.name}: status {status}")


class Turn:
    """All sets once: on a GPU a graph between events, else the calls by the clock."""

    def __init__(self, call: Callable[[int], None], sets: int, cuda: bool) -> None:
        self.call, self.sets, self.graph = call, sets, torch.cuda.CUDAGraph() if cuda else None
        if self.graph is not None:
            self.graph.capture_begin()
            self.walk()
            self.graph.capture_end()
            self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def walk(self) -> None:
        for i in range(self.sets):
            self.call(i)

    def seconds(self) -> float:
        """Of one call."""
        if self.graph is None:
            began = time.perf_counter()
            self.walk()
            return (time.perf_counter() - began) / self.sets
        torch.cuda._sleep(100_000)  # until the rest is queued
        self.begin.record()
        self.graph.replay()
        self.end.record()
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) * 1e-3 / self.sets


def measure(variants: list[Variant], buffers: Buffers, kind: str, rounds: int) -> tuple[list[float], str]:
    """Seconds of each variant, NaN for one that fails, and remarks."""
    cuda = buffers.device == "cuda"
    stream = torch.cuda.Stream() if cuda else None
    turns: list[Turn | None] = []
    remarks, first = [], None
    with torch.cuda.stream(stream) if cuda else nullcontext():
        for variant in variants:
            try:
                call, filled = buffers.calls(variant, kind, stream.cuda_stream if stream else 0)
                for tensor in filled:
                    tensor.fill_(math.nan)
                call(0)
            except RuntimeError as error:
                remarks.append(str(error))
                turns.append(None)
                continue
            results = [tensor.float().clone() for tensor in filled]
            first = first or results
            for got, want in zip(results, first, strict=True):
                difference = float((got - want).abs().max() / want.abs().max())
                if not difference <= ALLOWED[buffers.dtype]:  # nor where it is NaN
                    remarks.append(f"{variant.name} differs by {difference:.1e}")
            if cuda:
                torch.cuda.synchronize()
            turns.append(Turn(call, buffers.sets, cuda))
        times: list[list[float]] = [[] for _ in variants]
        for _ in range(rounds + 1):  # the first warms up
            for turn, found in zip(turns, times, strict=True):
                if turn is not None:
                    found.append(turn.seconds())
    return [statistics.median(found[1:]) if found else math.nan for found in times], "; ".join(remarks)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="+", metavar="LIBRARY[:BITS]")
    parser.add_argument("--rows", nargs="+", default=["all"], help="as eval.operators takes them")
    parser.add_argument(
        "--dtype", nargs="+", choices=("bfloat16", "float32", "float16"), default=["bfloat16", "float32"]
    )
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=["forward", "value", "mask"])
    parser.add_argument("--sigma", type=float, default=MAIN_SIGMA)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU; rehearse with --device cpu", file=sys.stderr)
        return 2
    variants = [Variant.open(text) for text in options.variants]
    width = max(12, *(len(variant.name) + 1 for variant in variants))
    print(f"{'us':<16} {'':<9} {'':<9}" + "".join(f"{variant.name:>{width}}" for variant in variants))
    means: dict[tuple[str, str], list[list[float]]] = {}
    for dtype in options.dtype:
        for row in parse_rows(options.rows):
            buffers = Buffers(Shape.parse(row), getattr(torch, dtype), options.sigma, options.device)
            for kind in options.kinds:
                seconds, remarks = measure(variants, buffers, kind, options.rounds)
                figures = "".join(f"{1e6 * s:>{width}.1f}" for s in seconds)
                print(f"{row:<16} {dtype:<9} {kind:<9}{figures}  {remarks}", flush=True)
                means.setdefault((dtype, kind), []).append(seconds)
            del buffers
            if options.device == "cuda":
                torch.cuda.empty_cache()
    for (dtype, kind), rows in means.items():
        figures = (statistics.geometric_mean(column) if not any(map(math.isnan, column)) else math.nan for column in zip(*rows, strict=True))  # fmt: skip
        print(
            f"{'geometric mean':<16} {dtype:<9} {kind:<9}"
            + "".join(f"{1e6 * f:>{width}.1f}" for f in figures)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
