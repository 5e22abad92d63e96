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
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcnv4_ext import dcnv4
from ldm_dcn.errors import Parser, UserError, exit_on_user_error
from ldm_dcn.files import check_file_place

from .chart import Panel, draw
from .environment import noted
from .peers import PEERS, Case, Peer, Shape
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
LEVELS, DIRECTIONS = ("op", "module"), ("forward", "backward")
MAIN_SIGMA = 2.0  # pixels; where the peers that do not look at offsets are timed
CPU_BATCH = 4
SECONDS = {"cpu": 0.5, "cuda": 0.03}  # of timed rounds of one contender
CACHE_FACTOR = 3  # the buffer sets of a contender are this many times the last cache, together
FEWEST_SETS, MOST_SETS = 3, 128
SAVED_BYTES = {
    "cpu": 2**29,
    "cuda": 6 * 2**30,
}  # that the forward passes of one contender may keep for its backward
OURS = "dcnv4"
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


def buffer_sets(operands: int, device: str) -> int:
    """How many sets of `operands` bytes are larger than the cache together."""
    return min(MOST_SETS, max(FEWEST_SETS, math.ceil(CACHE_FACTOR * cache_bytes(device) / operands)))


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


def make_contender(
    name: str, kind: type[Peer], case: Case, level: str, direction: str
) -> tuple[Peer, Contender]:
    """A peer with one call a buffer set; for backward the forward passes have been done."""
    torch.manual_seed(0)
    peer = kind(case)
    body: nn.Module = peer if level == "op" else peer.block(case)
    body.to(device=case.device, dtype=case.dtype)

    def inputs(index: int) -> tuple[Tensor, ...]:
        if level == "module":
            return (case.map("value", index),)
        # A peer that takes several maps of one kind gets different ones.
        counts = {kind: peer.takes.count(kind) for kind in peer.takes}
        seen = dict.fromkeys(counts, 0)
        maps = []
        for kind in peer.takes:
            maps.append(case.map(kind, index * counts[kind] + seen[kind]))
            seen[kind] += 1
        return peer.lay_out(*maps)

    if direction == "forward":
        calls = [partial(_without_gradients, body, inputs(i)) for i in range(case.sets)]
    else:
        with peer.context():
            calls = list(_backward_calls(body, inputs, case))
    return peer, Contender(name, calls, peer.context)


def _without_gradients(body: nn.Module, operands: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return body(*operands)


def _backward_calls(
    body: nn.Module, inputs: Callable[[int], tuple[Tensor, ...]], case: Case
) -> Iterator[Callable]:
    """Gradients of the operands and of the parameters, for as many sets as memory allows."""
    parameters = list(body.parameters())
    kept: dict[int, int] = {}  # storage address -> bytes

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    most = SAVED_BYTES[torch.device(case.device).type]
    for index in range(case.sets):
        leaves = [operand.detach().requires_grad_() for operand in inputs(index)]
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = body(*leaves)
        gradient = torch.randn_like(output)
        yield partial(torch.autograd.grad, output, (*leaves, *parameters), gradient, retain_graph=True)
        if sum(kept.values()) * (index + 2) / (index + 1) > most:
            return


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


# ---- tables and the chart


def tables(content: dict[str, Any]) -> str:
    """One table for each level, type, spread and direction that was measured."""
    records = content["measurements"]
    sections: dict[tuple, list[dict]] = {}
    for record in records:
        key = tuple(record[key] for key in ("level", "dtype", "sigma", "direction"))
        sections.setdefault(key, []).append(record)
    everywhere = {
        (name, reason)
        for name, reason in (records[0]["skipped"] if records else {}).items()
        if all(
            record["skipped"].get(name, reason) == reason and name not in record["times"]
            for record in records
        )
    }
    left_out = [f"without {PEERS[name].label}: {reason}" for name, reason in sorted(everywhere)]
    texts = [_table(key, group, everywhere) for key, group in sections.items()]
    return "\n\n".join(["\n".join(left_out), *texts] if left_out else texts)


def _table(section: tuple, records: list[dict], known: set[tuple[str, str]]) -> str:
    level, dtype, sigma, direction = section
    names = [name for name in PEERS if name != OURS and any(name in record["times"] for record in records)]
    titles = ["row", "floor us", "dcnv4 us", "x floor", *(PEERS[name].label for name in names)]
    lines = []
    for record in records:
        ours = record["times"].get(OURS)
        floor = record["floor"]
        cells = [
            record["shape"],
            f"{floor * 1e6:.1f}" if floor else "-",
            f"{ours['median'] * 1e6:.1f} ±{ours['spread'] * 1e6:.1f}" if ours else "failed",
            f"{ours['median'] / floor:.2f}" if ours and floor else "-",
        ]
        for name in names:
            peer = record["times"].get(name)
            cells.append("-" if not peer else _multiple(peer, ours))
        lines.append(cells)
    means = {name: geometric_mean(ratios(records, name)) for name in names}
    lines.append(["geometric mean", "", "", "", *(f"{means[n]:.2f}x" if means[n] else "-" for n in names)])
    widths = [max(len(line[i]) for line in [titles, *lines]) for i in range(len(titles))]
    text = [f"{level}, {dtype}, sigma {sigma:g}, {direction}: peers as multiples of dcnv4's time"]
    for line in [titles, *lines]:
        text.append("  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))))  # fmt: skip
    text += _remarks(records, known)
    return "\n".join(text)


def _multiple(peer: dict, ours: dict | None) -> str:
    if ours is None:
        return f"{peer['median'] * 1e6:.1f} us"
    return f"{peer['median'] / ours['median']:.2f}x"


def _remarks(records: list[dict], known: set[tuple[str, str]]) -> list[str]:
    """Why a peer is missing, where its results differ, which times are not of a graph; without what is `known` already."""
    remarks: dict[tuple[str, str], list[str]] = {}
    for record in records:
        for name, reason in record["skipped"].items():
            remarks.setdefault((name, reason), []).append(record["shape"])
        for name, figures in record["times"].items():
            if figures["difference"] is not None and figures["difference"] > 0.02:
                remarks.setdefault((name, "its output differs from dcnv4's"), []).append(record["shape"])
            if figures["timer"] == "events":
                remarks.setdefault((name, "timed without a CUDA graph"), []).append(record["shape"])
    return [
        f"  {PEERS[name].label}: {reason} ({'every row' if len(rows) == len(records) else ', '.join(rows)})"
        for (name, reason), rows in remarks.items()
        if (name, reason) not in known
    ]


def ratios(records: Iterable[dict], name: str) -> list[float]:
    """A peer's time over dcnv4's, for the rows that have both."""
    return [
        record["times"][name]["median"] / record["times"][OURS]["median"]
        for record in records
        if name in record["times"] and OURS in record["times"]
    ]


def geometric_mean(values: Sequence[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def summary(content: dict[str, Any]) -> str:
    """Geometric means over rows, a line a table, and where a peer is faster at the operator level."""
    sections: dict[tuple, list[dict]] = {}
    faster = []
    for record in content["measurements"]:
        key = tuple(record[key] for key in ("level", "direction", "dtype", "sigma"))
        sections.setdefault(key, []).append(record)
        for name in record["times"] if record["level"] == "op" else ():
            (ratio,) = ratios([record], name) or (1.0,)
            if ratio < 1 and name != OURS:
                faster.append(f"{PEERS[name].label} at {record['shape']} {record['dtype']} sigma {record['sigma']:g} {record['direction']} ({ratio:.2f}x)")  # fmt: skip
    lines = ["geometric means over rows, as multiples of dcnv4's time (rows)"]
    for (level, direction, dtype, sigma), records in sections.items():
        means = []
        for name in PEERS:
            found = ratios(records, name)
            if name != OURS and found:
                means.append(f"{PEERS[name].label} {geometric_mean(found):.2f} ({len(found)})")
        lines.append(f"{level} {direction} {dtype} sigma {sigma:g}: {'; '.join(means) or 'no peer'}")
    for direction in DIRECTIONS:
        costs = _host_costs(content["measurements"], direction)
        if costs:
            lines.append(f"host cost of an op {direction} call, median over rows: {costs}")
    lines.append("faster than dcnv4 at the operator level: " + ("; ".join(faster) or "none"))
    return "\n".join(lines)


def _host_costs(records: Iterable[dict], direction: str) -> str:
    """What launching costs, where it was measured: on a GPU."""
    costs: dict[str, list[float]] = {}
    for record in records:
        for name, figures in record["times"].items() if record["level"] == "op" else ():
            if record["direction"] == direction and figures["host"] is not None:
                costs.setdefault(name, []).append(figures["host"])
    return "; ".join(
        f"{PEERS[name].label} {statistics.median(costs[name]) * 1e6:.0f} us"
        for name in PEERS
        if name in costs
    )


def chart(content: dict[str, Any], path: Path) -> None:
    """The operator level at one type and spread, forward and backward side by side."""
    records = content["measurements"]
    levels = [record for record in records if record["level"] == "op"] or records
    spreads = [record for record in levels if record["sigma"] == MAIN_SIGMA] or levels
    if not spreads:
        raise UserError("nothing has been measured, so there is nothing to draw")
    first = spreads[0]
    shown = [r for r in spreads if all(r[k] == first[k] for k in ("level", "dtype", "sigma"))]
    panels = []
    for direction in DIRECTIONS:
        rows = []
        for record in shown:
            ours = record["times"].get(OURS)
            if record["direction"] != direction or ours is None:
                continue
            bars = {
                PEERS[name].label: record["times"][name]["median"] / ours["median"]
                for name in PEERS
                if name != OURS and name in record["times"]
            }
            rows.append((f"{record['shape']}  {_duration(ours['median'])}", bars))
        if rows:
            panels.append(Panel(direction, rows))
    if not panels:
        raise UserError("dcnv4 itself has no times, so there is nothing to draw")
    known = content["identity"]
    title = f"Times as multiples of dcnv4's: {first['level']} level, {first['dtype']}, offsets of sigma {first['sigma']:g} px"
    note = f"{_machine(known)}; a bar to the left of 1x is faster; beside a shape stands dcnv4's time"
    draw(path, title, note, panels)


def _machine(known: dict[str, Any]) -> str:
    threads = f", {known['threads']} CPU thread{'s' * (known['threads'] > 1)}" if known["threads"] else ""
    return f"{known['device']}{threads}, torch {known['torch']}"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


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
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
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
    text = _duration(ours["median"]) if ours else record["skipped"].get(OURS, "")
    return f"{record['level']} {record['shape']} {record['dtype']} sigma {record['sigma']:g} {record['direction']}: {text}"


def _heading(content: dict[str, Any]) -> str:
    known = content["identity"]
    lines = [f"{_machine(known)}, dcnv4_ext {known['dcnv4_ext']} (kernels {known['kernels']})"]
    if "copy_bandwidth" in content:
        lines.append(
            f"copy {content['copy_bandwidth'] / 1e9:.1f} GB/s read and written; buffer sets of {CACHE_FACTOR} times the "
            f"{content['cache_bytes'] / 2**20:.0f} MiB cache; host cost of a call "
            + ", ".join(f"{name} {cost * 1e6:.1f} us" for name, cost in content["host_cost"].items())
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
