"""How much faster the CPU operator is with all threads than with one: `python benchmarks/cpu_scaling.py [--json FILE]`.

The rows of `eval.operators` whose maps have 16x16 pixels or more, batch at most 4, offsets of sigma 2, forward and backward. One
thread and all of them take turns within the same rounds, on buffer sets that are larger than the cache together; a speedup is the
median over rounds. Name the number of threads with OMP_NUM_THREADS; no other program should run.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval.contenders import DIRECTIONS, buffer_sets, make_contender  # noqa: E402
from eval.environment import environment  # noqa: E402
from eval.operators import CPU_BATCH, DEFAULT_DTYPES, DTYPES, MAIN_SIGMA, parse_rows  # noqa: E402
from eval.peers import OURS, PEERS, Case, Shape  # noqa: E402
from eval.results import identity, write  # noqa: E402
from eval.stopwatch import Contender, Stopwatch, keep_freed_memory  # noqa: E402
from ldm_dcn.errors import Parser, UserError, exit_on_user_error  # noqa: E402
from ldm_dcn.places import check_file_place  # noqa: E402

FEWEST_PIXELS = 16 * 16
SECONDS, MOST_ROUNDS = 1.5, 60  # of one contender


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(shape: Shape, dtype_name: str, direction: str, threads: int) -> dict[str, Any]:
    """One row: seconds a call with one thread and with `threads`, and how many times as fast the latter is."""
    dtype = getattr(torch, dtype_name)
    operands = shape.pixels * torch.finfo(dtype).bits // 8 * (shape.c + shape.columns)
    case = Case(shape, dtype, MAIN_SIGMA, "cpu", buffer_sets(operands, "cpu"))
    _, ready = make_contender(OURS, PEERS[OURS], case, "op", direction)
    contenders = [Contender(str(n), ready.calls, partial(on_threads, n)) for n in (1, threads)]
    timings, failed = Stopwatch("cpu", SECONDS, MOST_ROUNDS).race(contenders)
    if failed:
        raise UserError(f"{shape} {dtype_name} {direction} cannot be timed: {next(iter(failed.values()))}")
    one, all_of_them = (timings[str(n)] for n in (1, threads))
    speedups = [a / b for a, b in zip(one.seconds, all_of_them.seconds, strict=False)]
    return {
        "shape": str(shape),
        "dtype": dtype_name,
        "direction": direction,
        "one_thread": one.median,
        "all_threads": all_of_them.median,
        "speedup": statistics.median(speedups),
        "rounds": len(speedups),
    }


def main() -> None:
    parser = Parser(prog="python benchmarks/cpu_scaling.py", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=["all"], help="as eval.operators takes them")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DEFAULT_DTYPES["cpu"])
    parser.add_argument(
        "--json", type=Path, help="file to write the figures to; one that is there is replaced"
    )
    options = parser.parse_args()
    threads = torch.get_num_threads()
    if threads < 2:
        raise UserError(
            "torch has one thread here: set OMP_NUM_THREADS to 2 or more, where there are cores for it"
        )
    if options.json:
        check_file_place(options.json, "name another file with --json")
    shapes = [Shape.parse(row) for row in parse_rows(options.rows)]
    shapes = [Shape(min(s.n, CPU_BATCH), s.h, s.w, s.c) for s in shapes if s.h * s.w >= FEWEST_PIXELS]
    if not shapes:
        raise UserError(f"--rows: none of them has {FEWEST_PIXELS} pixels or more; name one that has")
    content: dict[str, Any] = {
        "identity": identity("cpu", freed_memory_kept=keep_freed_memory(), seconds=SECONDS),
        "environment": environment(),
        "measurements": [],
    }
    for shape, dtype, direction in itertools.product(shapes, options.dtype, DIRECTIONS):
        record = measure(shape, dtype, direction, threads)
        content["measurements"].append(record)
        print(
            f"{direction:8} {dtype:8} {shape!s:14} {record['one_thread'] * 1e6:9.0f} us "
            f"{record['all_threads'] * 1e6:9.0f} us {record['speedup']:6.2f}",
            flush=True,
        )
        if options.json:
            write(content, options.json)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
