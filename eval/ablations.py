"""What each choice in DCNv4 costs or saves: `python -m eval.ablations [--only softmax projections ...]`.

    python -m eval.ablations --device cpu --json ablations_speed.json

The publication's ablations of speed (Xiong et al., 2024, arXiv:2401.06197, section 4.4), and some of ours: the module with and
without each choice at Stable Diffusion's shapes, forward and backward, all in turns within the same rounds. What the choices do to
samples is a matter of training: `python -m eval.study configs/studies/ablations.yaml`.

Results are written to --json after every measurement, and the same command again goes on where it was stopped. Measurements of
another machine, of other versions or kernels, type or offsets, do not come into the same file: it is refused, or with --replace
measured anew.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcnv4_ext import DCNv4, dcnv4, native
from ldm_dcn.errors import Parser, UserError, exit_on_user_error
from ldm_dcn.places import check_file_place

from .columns import in_columns
from .contenders import DIRECTIONS, buffer_sets, make_contender
from .environment import environment, noted
from .operators import CPU_BATCH, SECONDS, parse_rows
from .peers import MAIN_SIGMA, TAPS, Case, DCNv3Rule, Ours, Peer, Projected, Shape, spread_offsets
from .results import identity, open_results, write
from .stopwatch import Stopwatch

BASE = "dcnv4"


@dataclass(frozen=True)
class WideShape(Shape):
    """A map with `width` channels a group."""

    width: int = 32

    @property
    def groups(self) -> int:
        return max(1, self.c // self.width)


class Depthwise(Ours):
    """A 3x3 depthwise convolution before the offsets are predicted, as in DCNv3."""

    label = "with a depthwise 3x3"

    def block(self, case: Case) -> nn.Module:
        module = DCNv4(case.shape.c, groups=case.shape.groups, dw_kernel_size=3, mask_init="uniform")
        spread_offsets(module.offset_mask, 0, case)
        return module


class OneProjection(Ours):
    """Value, offsets and weights by one Linear, whose slices go to the operator as they lie."""

    label = "value and offsets by one Linear"

    def block(self, case: Case) -> nn.Module:
        return Projected(self, case)


class Separate(Ours):
    """Offsets and weights by a Linear each, as in DCNv3, and put together."""

    label = "offsets and weights by two Linears"

    def block(self, case: Case) -> nn.Module:
        return _SeparateBlock(case, softmax=False, depthwise=False)


class WholeDCNv3(Ours):
    """DCNv3's block: softmax, two Linears, a depthwise convolution, by our kernels."""

    label = "all of DCNv3's"

    def block(self, case: Case) -> nn.Module:
        return _SeparateBlock(case, softmax=True, depthwise=True)


class _SeparateBlock(nn.Module):
    def __init__(self, case: Case, *, softmax: bool, depthwise: bool) -> None:
        super().__init__()
        c, self.groups, self.softmax = case.shape.c, case.shape.groups, softmax
        joint = nn.Linear(c, 3 * TAPS * self.groups)
        spread_offsets(joint, 0, case)
        self.value_proj, self.output_proj = nn.Linear(c, c), nn.Linear(c, c)
        self.depthwise = nn.Conv2d(c, c, 3, padding=1, groups=c) if depthwise else None
        self.offset, self.mask = (nn.Linear(c, taps * self.groups) for taps in (2 * TAPS, TAPS))
        with torch.no_grad():
            for old, offset, mask in zip(
                joint.parameters(), self.offset.parameters(), self.mask.parameters(), strict=True
            ):
                rows = old.unflatten(0, (self.groups, 3 * TAPS))
                offset.copy_(rows[:, : 2 * TAPS].flatten(0, 1))
                mask.copy_(rows[:, 2 * TAPS :].flatten(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        source = x
        if self.depthwise is not None:
            source = self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        by_group = [linear(source).unflatten(-1, (self.groups, -1)) for linear in (self.offset, self.mask)]
        offset_mask = torch.cat(by_group, -1).flatten(-2)
        y = dcnv4(self.value_proj(x), offset_mask, groups=self.groups, softmax=self.softmax)
        return self.output_proj(y)


class Scalar(Ours):
    """Without vector loads: on a CPU the portable kernels, on a GPU a value map that is not aligned to 16 bytes."""

    label = "without vector instructions (CPU) or loads (GPU)"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.cpu = torch.device(case.device).type == "cpu"

    def lay_out(self, value: Tensor, offset_mask: Tensor) -> tuple[Tensor, ...]:
        if self.cpu:
            return value, offset_mask
        moved = value.new_empty(value.numel() + 1)[1:].view(value.shape)
        return moved.copy_(value), offset_mask

    def context(self) -> AbstractContextManager:
        return native.forced_isa("portable") if self.cpu else nullcontext()


@dataclass(frozen=True)
class Ablation:
    """Contenders beside `dcnv4`: (peer, channels a group or None for 32, dtype or None for the run's)."""

    level: str
    contenders: Sequence[tuple[str, type[Peer], int | None, str | None]]


ABLATIONS = {
    "softmax": Ablation("module", [("with softmax", DCNv3Rule, None, None)]),
    "projections": Ablation("module", [(Separate.label, Separate, None, None), (OneProjection.label, OneProjection, None, None)]),
    "depthwise": Ablation("module", [(Depthwise.label, Depthwise, None, None)]),
    "dcnv3": Ablation("module", [(WholeDCNv3.label, WholeDCNv3, None, None)]),
    "vectors": Ablation("op", [(Scalar.label, Scalar, None, None)]),
    "groups": Ablation("module", [("16 channels a group", Ours, 16, None), ("64 channels a group", Ours, 64, None)]),
    "dtype": Ablation("module", [("bfloat16", Ours, None, "bfloat16"), ("float64", Ours, None, "float64")]),
}  # fmt: skip


def measure(
    name: str, shape: Shape, direction: str, stopwatch: Stopwatch, *, device: str, dtype: str, sigma: float
) -> dict[str, Any]:
    """One ablation at one shape in one direction. Seconds throughout."""
    ablation = ABLATIONS[name]
    contenders = []
    with stopwatch.place():
        for label, kind, width, own_dtype in [(BASE, Ours, None, None), *ablation.contenders]:
            own = shape if width is None else WideShape(shape.n, shape.h, shape.w, shape.c, width)
            number = getattr(torch, own_dtype or dtype)
            operands = own.pixels * (own.c + own.columns) * torch.finfo(number).bits // 8
            case = Case(own, number, sigma, device, buffer_sets(operands, device))
            contenders.append(make_contender(label, kind, case, ablation.level, direction)[1])
        timings, failed = stopwatch.race(contenders)
    return {
        "ablation": name,
        "level": ablation.level,
        "shape": str(shape),
        "direction": direction,
        "dtype": dtype,
        "sigma": sigma,
        "seconds": {label: timing.median for label, timing in timings.items()},
        "spread": {label: timing.spread for label, timing in timings.items()},
        "failed": failed,
    }


def key_of(record: dict[str, Any]) -> tuple[str, str, str]:
    """What tells measurements of one file apart."""
    return record["ablation"], record["shape"], record["direction"]


def table(records: Sequence[dict[str, Any]]) -> str:
    """One table: medians as multiples of dcnv4's, of rounds in turns; a column a shape, and their geometric mean."""
    shapes = list(dict.fromkeys(record["shape"] for record in records))
    rows = [["time / dcnv4's", *shapes, "geometric mean"]]
    for name in dict.fromkeys(record["ablation"] for record in records):
        for label in dict.fromkeys(label for label, *_ in ABLATIONS[name].contenders):
            for direction in DIRECTIONS:
                ratios = dict(_ratios(records, name, label, direction))
                if ratios:
                    mean = statistics.geometric_mean(ratios.values())
                    level = ABLATIONS[name].level
                    rows.append([f"{name}: {label}, {level} {direction}",
                                 *(f"{ratios[s]:.2f}" if s in ratios else "-" for s in shapes), f"{mean:.2f}"])  # fmt: skip
    return "\n".join(in_columns(rows))


def _ratios(
    records: Sequence[dict[str, Any]], name: str, label: str, direction: str
) -> Iterator[tuple[str, float]]:
    for record in records:
        if (record["ablation"], record["direction"]) == (name, direction) and {label, BASE} <= record[
            "seconds"
        ].keys():
            yield record["shape"], record["seconds"][label] / record["seconds"][BASE]


def main(arguments: Iterable[str] | None = None) -> None:
    parser = Parser(prog="python -m eval.ablations", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=tuple(ABLATIONS), default=list(ABLATIONS), help="default: all"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--rows", nargs="+", default=["sd"], metavar="ROWS", help="as of eval.operators (default: sd)"
    )
    parser.add_argument(
        "--batch", type=int, help=f"largest batch (default: the rows' own, {CPU_BATCH} on the CPU)"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--sigma", type=float, default=MAIN_SIGMA, help="spread of the offsets (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, help="timed rounds of one contender take about so long")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="file of results, kept, and gone on with (default: none)"
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="measure anew where --json is of another device, kernels, versions or settings (default: an error)",
    )
    options = parser.parse_args(None if arguments is None else list(arguments))
    with exit_on_user_error():
        run(options)


def run(options: argparse.Namespace) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"torch {torch.__version__} sees no GPU; use --device cpu")
    if (options.batch is not None and options.batch < 1) or not (0 <= options.sigma < math.inf):
        raise UserError("--batch must be at least 1 and --sigma finite and at least 0")
    if options.replace and options.json is None:
        raise UserError("--replace needs the file to replace; give --json FILE")
    if options.json:
        check_file_place(options.json, "give another --json")
    most = options.batch or (CPU_BATCH if options.device == "cpu" else None)
    device = "cuda:0" if options.device == "cuda" else "cpu"
    seconds = options.seconds or SECONDS[options.device]
    settings = {"dtype": options.dtype, "sigma": options.sigma}
    own = identity(options.device, **settings, seconds=seconds)
    content = open_results(options.json, own, "records", replace=options.replace)
    known = {key_of(record): record for record in content["records"]}
    shapes = [Shape.parse(row) for row in parse_rows(options.rows)]
    shapes = [Shape(min(shape.n, most or shape.n), shape.h, shape.w, shape.c) for shape in shapes]
    todo = list(itertools.product(options.only, dict.fromkeys(shapes), DIRECTIONS))
    missing = [(name, shape, d) for name, shape, d in todo if (name, str(shape), d) not in known]
    if len(missing) < len(todo):
        print(f"{len(todo) - len(missing)} of {len(todo)} measurements are in {options.json} already", flush=True)  # fmt: skip
    stopwatch = Stopwatch(device, seconds, most_rounds=25)
    for index, (name, shape, direction) in enumerate(missing):
        record = measure(name, shape, direction, stopwatch, device=device, **settings)
        known[key_of(record)] = noted(record, content)
        content["records"] = list(known.values())
        if options.json:
            write(content, options.json)
        failed = "".join(f"; {label} failed: {why}" for label, why in record["failed"].items())
        print(f"[{index + 1}/{len(missing)}] {name} {shape} {direction}{failed}", file=sys.stderr, flush=True)
    text = table([known[name, str(shape), direction] for name, shape, direction in todo])
    about = environment()
    machine = about["gpu"] or f"{about['cpu']}, {about['threads']} threads"
    print(f"{text}\n\n{options.dtype}, offsets of sigma {options.sigma:g} px, medians of rounds in turns; {machine}, "
          f"torch {torch.__version__}")  # fmt: skip


if __name__ == "__main__":
    main()
