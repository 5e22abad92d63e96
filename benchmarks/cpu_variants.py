"""Variants of the CPU library beside each other: what a change to a kernel is worth, row by row.

    python benchmarks/cpu_variants.py before.so after.so --isa avx2 --rows sd 64x56x56x128 --dtype float32 bfloat16

A variant is a library built from dcnv4_ext/csrc, with `@ISA` behind its name for another instruction set than --isa. Calls go to
the C interface without torch's dispatcher, walk through buffer sets that are larger than the cache together, and take turns. What
is timed is the process's time on all cores, so that other programs do little harm; with several --threads,
`OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0` keeps waiting out of it. Printed are medians in microseconds and how many times as long
the first variant takes: the median over rounds. Results that differ from the first's by more than rounding are told. For tuning:
what the texts claim comes from eval.operators.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dcnv4_ext import native  # noqa: E402
from dcnv4_ext.geometry import Geometry  # noqa: E402
from eval.operators import CPU_BATCH, DTYPES, MAIN_SIGMA, buffer_sets, parse_rows  # noqa: E402
from eval.peers import Case, Shape  # noqa: E402
from eval.stopwatch import CPU_TURN, keep_freed_memory  # noqa: E402

MOST_SETS = 24
FEWEST_ROUNDS = 5
ALLOWED = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 3e-2,
    torch.float16: 5e-3,
}  # of the largest


def open_library(text: str, isa: str) -> ctypes.CDLL:
    """A library's own copy, so that each keeps its own choice of an instruction set."""
    path, _, own = text.partition("@")
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.CDLL(str(shutil.copy(path, Path(folder) / "variant.so")))
    problem, pointer = ctypes.POINTER(native.Problem), ctypes.c_void_p
    library.dcnv4_cpu_forward.argtypes = [problem, *[pointer] * 3]
    library.dcnv4_cpu_backward.argtypes = [problem, *[pointer] * 5]
    if library.dcnv4_cpu_select((own or isa).encode()):
        raise SystemExit(f"{text} has no kernels for {own or isa} on this processor")
    return library


def call_of(
    library: ctypes.CDLL, kind: str, problem: native.Problem, operands: list[Tensor], results: list[Tensor]
) -> Callable[[], None]:
    """One call; it holds the tensors whose memory it works on."""

    def call() -> None:
        inputs, outputs = ([tensor.data_ptr() for tensor in tensors] for tensors in (operands, results))
        if kind == "forward":
            status = library.dcnv4_cpu_forward(problem, *inputs[:2], outputs[0])
        else:
            status = library.dcnv4_cpu_backward(problem, *inputs, *outputs[1:])
        if status:
            raise SystemExit(f"status {status}")

    return call


def compare(
    libraries: dict[str, ctypes.CDLL], kind: str, shape: Shape, dtype_name: str, options: argparse.Namespace
) -> list[float]:
    """One row; returns how many times as long as each variant the first takes."""
    names, dtype = list(libraries), getattr(torch, dtype_name)
    operand_bytes = shape.pixels * (shape.c + shape.columns) * torch.finfo(dtype).bits // 8
    sets = min(MOST_SETS, buffer_sets(operand_bytes, "cpu"))
    case = Case(shape, dtype, options.sigma, "cpu", sets)
    problem = native.problem(
        Geometry(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), remove_center=False),
        shape.groups, 1.0, options.softmax, dtype, case.map("value", 0).shape, case.map("offset_mask", 0).shape,
        case.map("value", 0).shape, value_stride=shape.c, offset_mask_stride=shape.columns, output_stride=shape.c,
        deterministic=False, threads=options.threads, device=0,
    )  # fmt: skip
    calls, firsts = [], []
    for library in libraries.values():
        results = [torch.empty_like(case.map(kind, 0)) for kind in ("value", "value", "offset_mask")]
        operands = (
            [case.map("value", i), case.map("offset_mask", i), case.map("value", i + 1)] for i in range(sets)
        )
        calls.append([call_of(library, kind, problem, tensors, results) for tensors in operands])
        calls[-1][0]()
        firsts.append([r.clone() for r in (results[:1] if kind == "forward" else results[1:])])
    for name, others in zip(names[1:], firsts[1:], strict=True):
        for ours, other in zip(firsts[0], others, strict=True):
            difference = float((ours.double() - other.double()).abs().max() / ours.double().abs().max())
            if not difference <= ALLOWED[dtype]:
                print(f"{name} differs from {names[0]} by {difference:.2g} of the largest")
    began = time.process_time()
    for call in calls[0][1:]:
        call()
    turn = max(1, math.ceil(CPU_TURN * (sets - 1) / max(time.process_time() - began, 1e-9)))
    times: list[list[float]] = [[] for _ in calls]
    until, position = time.perf_counter() + options.seconds * len(calls), 0
    while time.perf_counter() < until or len(times[0]) < FEWEST_ROUNDS:
        order = range(len(calls)) if len(times[0]) % 2 == 0 else reversed(range(len(calls)))
        for index in order:
            began = time.process_time()
            for i in range(position, position + turn):
                calls[index][i % sets]()
            times[index].append((time.process_time() - began) / turn)
        position += turn
    ratios = [statistics.median(a / b for a, b in zip(times[0], other, strict=True)) for other in times]
    cells = (f"{statistics.median(t) * 1e6:9.1f} ({r:.3f})" for t, r in zip(times, ratios, strict=True))
    print(f"{kind:8} {dtype_name:8} {shape!s:14}", *cells, flush=True)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="+", metavar="LIBRARY[@ISA]")
    parser.add_argument("--isa", default="avx2")
    parser.add_argument("--rows", nargs="+", default=["sd"])
    parser.add_argument("--batch", type=int, default=CPU_BATCH, help="largest batch")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument(
        "--kinds", nargs="+", choices=("forward", "backward"), default=["forward", "backward"]
    )
    parser.add_argument("--sigma", type=float, default=MAIN_SIGMA)
    parser.add_argument("--softmax", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.4, help="of one variant in one row")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    libraries = {text: open_library(text, options.isa) for text in options.variants}
    print(*libraries)
    for kind, dtype_name in itertools.product(options.kinds, options.dtype):
        found = []
        for row in parse_rows(options.rows):
            shape = Shape.parse(row)
            cut = Shape(min(shape.n, options.batch), shape.h, shape.w, shape.c)
            found.append(compare(libraries, kind, cut, dtype_name, options))
        means = (f"{statistics.geometric_mean(column):.3f}" for column in zip(*found, strict=True))
        print(f"{kind:8} {dtype_name:8} geometric mean", *means, flush=True)


if __name__ == "__main__":
    main()
