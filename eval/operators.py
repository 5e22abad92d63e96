"""The operator's speed beside its peers: `python -m eval.operators`.

    python -m eval.operators --device cpu --json speed.json --chart speed.png
    python -m eval.operators --device cuda --rows sd --json gpu.json

Rows are the shapes of the published tables (Xiong et al., 2024, arXiv:2401.06197) and of Stable Diffusion's U-Net. Each row
is measured forward and backward, for each type and each spread of the offsets, for the operator alone and for the module
around it. Peers that do not look at the offsets are timed at one spread. All contenders of a measurement take turns within
the same rounds (eval/stopwatch.py); tables give medians over rounds with half the interquartile range, and peers as multiples
of dcnv4's time. The floor is the bytes that DCNv4 must move, each input read once and each output written once, over the
bandwidth of a copy measured in the same run. Types are torch's defaults: convolutions in fp32 may use TF32 on a GPU.

Results are written to --json after every measurement, and the same command again goes on where it was stopped. Measurements of
another machine, of other versions or kernels, or timed in another way, do not come into the same file: it is refused, or with
--replace measured anew.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcnv4_ext import dcnv4
from ldm_dcn.errors import Parser, UserError, exit_on_user_error
from ldm_dcn.places import check_file_place

from .contenders import CACHE_FACTOR, DIRECTIONS, LEVELS, buffer_sets, make_contender
from .environment import noted
from .operator_tables import chart, duration, machine, summary, tables
from .peers import MAIN_SIGMA, OURS, PEERS, Case, Peer, Shape
from .results import identity, open_results, write
from .stopwatch import (
    Contender,
    Stopwatch,
    Timing,
    cache_bytes,
    copy_bandwidth,
    describe,
    keep_freed_memory,
)

PUBLISHED = (
    "64x56x56x128", "64x28x28x256", "64x14x14x512", "64x7x7x1024", "64x14x14x768",
    "1x200x320x128", "1x100x160x256", "1x50x80x512", "1x25x40x1024", "1x64x64x768",
)  # fmt: skip
STABLE_DIFFUSION = ("64x32x32x320", "64x16x16x640", "64x8x8x1280", "64x4x4x1280")
ROWS = {"published": PUBLISHED, "sd": STABLE_DIFFUSION, "all": PUBLISHED + STABLE_DIFFUSION}
DTYPES = ("float32", "bfloat16", "float16", "float64")
DEFAULT_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float32", "float16")}
CPU_BATCH = 4
SECONDS = {"cpu": 0.5, "cuda": 0.03}  # of timed rounds of one contender
NOT_IMPORTABLE = "its package is not importable"


@dataclass(frozen=True)
class Plan:
    """One measurement: all its contenders take turns in the same rounds."""

    row: str  # before the batch is cut
    shape: Shape
    dtype: str
    sigma: float
    level: str
    direction: str
    peers: tuple[str, ...]

    def key(self) -> tuple:
        """What tells measurements apart in a file of results."""
        return (str(self.shape), self.dtype, self.sigma, self.level, self.direction)


def plans(
    rows: Sequence[str], batch: int | None, dtypes: Sequence[str], sigmas: Sequence[float], levels: Sequence[str],
    peers: Sequence[str],
) -> list[Plan]:  # fmt: skip
    """All measurements, the most telling first: the operator before the module, the main spread of offsets before others."""
    main = MAIN_SIGMA if MAIN_SIGMA in sigmas else sigmas[0]
    found = []
    for sigma in sorted(sigmas, key=lambda s: (s != main, s)):
        for level in levels:
            names = tuple(p for p in peers if sigma == main or PEERS[p].deformable)
            for dtype in dtypes:
                for row in rows:
                    shape = Shape.parse(row)
                    shape = Shape(min(shape.n, batch or shape.n), shape.h, shape.w, shape.c)
                    found += [Plan(row, shape, dtype, sigma, level, d, names) for d in DIRECTIONS]
    return sorted(found, key=lambda plan: (plan.sigma != main, levels.index(plan.level)))


def measure(plan: Plan, stopwatch: Stopwatch, device: str, bandwidth: float) -> dict[str, Any]:
    """Time one plan; the record that goes into the file. Seconds throughout."""
    dtype = getattr(torch, plan.dtype)
    element = torch.finfo(dtype).bits // 8
    backward = plan.direction == "backward"
    least = plan.shape.least_bytes(element)[backward]
    operands = plan.shape.pixels * element * (plan.shape.c + plan.shape.columns)
    sets = buffer_sets(operands, device)
    case = Case(plan.shape, dtype, plan.sigma, device, sets)
    skipped: dict[str, str] = {}
    contenders, outputs = [], {}
    with stopwatch.place():
        for name in plan.peers:
            importable = PEERS[name].importable()
            reason = PEERS[name].unavailable(case, backward) if importable else NOT_IMPORTABLE
            if reason is None:
                try:
                    peer, contender = make_contender(name, PEERS[name], case, plan.level, plan.direction)
                    contenders.append(contender)
                    if peer.twin and plan.level == "op" and not backward:
                        outputs[name] = _output(contender, peer)
                except Exception as error:  # a peer may fail in any way; ours is reported like one
                    reason = describe(error)
            if reason is not None:
                skipped[name] = reason
                contenders = [c for c in contenders if c.name != name]
                stopwatch.recover()
        differences = _differences(outputs)
        timings, failed = stopwatch.race(contenders)
    del contenders, outputs
    return {
        **{key: value for key, value in asdict(plan).items() if key != "peers"},
        "shape": str(plan.shape),
        "groups": plan.shape.groups,
        "buffer_sets": sets,
        "floor": least / bandwidth if plan.level == "op" else None,
        "floor_bytes": least if plan.level == "op" else None,
        "times": {name: _figures(timing, differences.get(name)) for name, timing in timings.items()},
        "skipped": skipped | failed,
    }


def _figures(timing: Timing, difference: float | None) -> dict[str, Any]:
    return {
        "median": timing.median,
        "spread": timing.spread,
        "rounds": len(timing.seconds),
        "calls": timing.calls,
        "timer": timing.timer,
        "host": timing.host,
        "difference": difference,
    }


def _output(contender: Contender, peer: Peer) -> Tensor:
    with contender.context():
        return peer.lay_back(contender.calls[0]())


def _differences(outputs: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference of each twin from dcnv4, relative to its largest output."""
    if OURS not in outputs:
        return {}
    ours = outputs[OURS].float()
    return {
        name: float((output.float() - ours).abs().max() / ours.abs().max())
        for name, output in outputs.items()
        if name != OURS
    }


def host_cost(device: str) -> dict[str, float]:
    """Seconds that a call of dcnv4 on a single pixel takes the host: the least of several turns."""
    value, offset_mask = torch.randn(1, 1, 1, 32, device=device), torch.randn(1, 1, 1, 32, device=device)
    leaves = [value.clone().requires_grad_(), offset_mask.clone().requires_grad_()]
    gradient = torch.ones_like(value)

    def both() -> None:
        torch.autograd.grad(dcnv4(*leaves, groups=1), leaves, gradient)

    calls = {
        "forward, no_grad": partial(dcnv4, value, offset_mask, groups=1),
        "forward with gradients": partial(dcnv4, *leaves, groups=1),
        "forward and backward": both,
    }
    costs = {}
    for name, call in calls.items():
        least = math.inf
        # Entered once, as whoever samples does: entering costs some microseconds by itself.
        with torch.no_grad() if name.endswith("no_grad") else nullcontext():
            for _ in range(9):
                began = time.perf_counter()
                for _ in range(200):
                    call()
                least = min(least, (time.perf_counter() - began) / 200)
                if torch.device(device).type == "cuda":
                    torch.cuda.synchronize()
        costs[name] = least
    return costs


# ---- what is measured already


def _complete(record: dict[str, Any] | None, plan: Plan) -> bool:
    """Whether a record holds all peers of a plan; one whose package has come since is missing."""
    if record is None:
        return False
    come = {
        n for n, reason in record["skipped"].items() if reason == NOT_IMPORTABLE and PEERS[n].importable()
    }
    return set(plan.peers) <= (record["times"].keys() | record["skipped"].keys()) - come


def key_of(record: dict[str, Any]) -> tuple:
    return tuple(record[key] for key in ("shape", "dtype", "sigma", "level", "direction"))


# ---- command line


def parse_rows(names: Sequence[str]) -> list[str]:
    """Names of row sets and shapes as a list of shapes, each once."""
    rows = [row for name in names for row in ROWS.get(name, (name,))]
    for row in rows:
        try:
            Shape.parse(row)
        except ValueError:
            raise UserError(
                f"--rows {row}: neither a set ({', '.join(ROWS)}) nor a shape such as 64x56x56x128"
            ) from None
    return list(dict.fromkeys(rows))


def main(arguments: Iterable[str] | None = None) -> int:
    parser = Parser(prog="python -m eval.operators", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        default=["all"],
        metavar="ROWS",
        help=f"{', '.join(ROWS)} or shapes NxHxWxC (default: all)",
    )
    parser.add_argument(
        "--batch", type=int, help=f"largest batch (default: the rows' own, {CPU_BATCH} on the CPU)"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="default: float32 bfloat16, on a GPU float16 too"
    )
    parser.add_argument(
        "--sigma",
        nargs="+",
        type=float,
        default=[0.5, 2.0, 8.0],
        help="spread of the offsets in pixels (default: 0.5 2 8)",
    )
    parser.add_argument("--level", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=tuple(PEERS),
        default=list(PEERS),
        help="default: all that are importable",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="timed rounds of one contender take about so long (default: 0.5, on a GPU 0.03)",
    )
    parser.add_argument("--rounds", type=int, default=25, help="most rounds of one measurement (default: 25)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--no-graphs", action="store_true", help="time calls by events instead of CUDA graphs"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=math.inf,
        help="seconds after which no measurement is begun; the same command again goes on",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="file of results, kept, and gone on with (default: none)"
    )
    parser.add_argument("--chart", type=Path, help="PNG to draw")
    parser.add_argument(
        "--replace",
        action="store_true",
        help="measure anew where --json is of another device, kernels, versions or timing (default: an error)",
    )
    options = parser.parse_args(None if arguments is None else list(arguments))  # fmt: skip
    with exit_on_user_error():
        return run(options)


def run(options: argparse.Namespace) -> int:
    """Measure what is missing, write, print; 0 when all is measured, 1 when dcnv4 itself failed somewhere, 3 when time ran out."""
    began = time.monotonic()
    if options.replace and options.json is None:
        raise UserError("--replace needs the file to replace; give --json FILE")
    if (options.batch is not None and options.batch < 1) or min(options.sigma) < 0:
        raise UserError("--batch must be at least 1 and --sigma at least 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"torch {torch.__version__} sees no GPU; use --device cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    batch = options.batch or (CPU_BATCH if options.device == "cpu" else None)
    peers = [name for name in PEERS if name == OURS or name in options.peers]
    dtypes = options.dtype or DEFAULT_DTYPES[options.device]
    todo = plans(parse_rows(options.rows), batch, dtypes, options.sigma, options.level, peers)

    if options.json:
        check_file_place(options.json, "give another --json")
    timing = {
        "seconds": options.seconds or SECONDS[options.device],
        "rounds": options.rounds,
        "graphs": options.device == "cuda" and not options.no_graphs,
    }
    own = identity(options.device, **timing)
    content = open_results(options.json, own, "measurements", replace=options.replace)
    known = {key_of(record): record for record in content["measurements"]}
    missing = [plan for plan in todo if not _complete(known.get(plan.key()), plan)]
    if known:
        print(f"{len(todo) - len(missing)} of {len(todo)} measurements are in {options.json} already", flush=True)  # fmt: skip
    left_over = 0
    if missing:
        device = "cuda:0" if options.device == "cuda" else "cpu"
        content["freed_memory_kept"] = device == "cpu" and keep_freed_memory()
        if "copy_bandwidth" not in content:  # else floors of one file would be of different copies
            content["copy_bandwidth"] = copy_bandwidth(device)
            content["cache_bytes"] = cache_bytes(device)
            content["host_cost"] = host_cost(device)
        stopwatch = Stopwatch(device, timing["seconds"], options.rounds, not options.no_graphs)
        for index, plan in enumerate(missing):
            if time.monotonic() - began > options.limit:
                left_over = len(missing) - index
                break
            record = noted(measure(plan, stopwatch, device, content["copy_bandwidth"]), content)
            if stopwatch.cuda:
                stopwatch.recover()  # what graphs and failed captures held, before it adds up
            known[plan.key()] = record
            content["measurements"] = list(known.values())
            if options.json:
                write(content, options.json)
            print(f"[{index + 1}/{len(missing)}] {_line(record)}", file=sys.stderr, flush=True)
    print(_heading(content))
    print(tables(content))
    print("\n" + summary(content), flush=True)
    if options.chart:
        chart(content, options.chart)
    if left_over:
        print(f"\n{left_over} measurements were left for another run: the same command again")
    failed = any(OURS in record["skipped"] for record in content["measurements"])
    return 1 if failed else 3 if left_over else 0


def _line(record: dict[str, Any]) -> str:
    ours = record["times"].get(OURS)
    text = duration(ours["median"]) if ours else record["skipped"].get(OURS, "")
    return f"{record['level']} {record['shape']} {record['dtype']} sigma {record['sigma']:g} {record['direction']}: {text}"


def _heading(content: dict[str, Any]) -> str:
    known = content["identity"]
    lines = [f"{machine(known)}, dcnv4_ext {known['dcnv4_ext']} (kernels {known['kernels']})"]
    if "copy_bandwidth" in content:
        lines.append(
            f"copy {content['copy_bandwidth'] / 1e9:.1f} GB/s read and written; buffer sets of {CACHE_FACTOR} times the "
            f"{content['cache_bytes'] / 2**20:.0f} MiB cache; host cost of a call "
            + ", ".join(f"{name} {cost * 1e6:.1f} us" for name, cost in content["host_cost"].items())
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
