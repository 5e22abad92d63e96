"""An average of any width, made after training from the snapshots of a run with train.ema=power.

python -m ldm_dcn.posthoc_ema runs/NAME --width 0.075 --out runs/NAME/export-0.075
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from .checkpoint import saved_steps
from .ema import mixture
from .errors import Parser, UserError, exit_on_user_error
from .export import check_export_place, load_model, save_export
from .folders import Damaged, verify

LARGEST_ERROR = 0.05  # of the weighting of the past, as a share of its norm


def synthesise(run: Path, width: float, step: int | None = None) -> tuple[dict[str, torch.Tensor], int]:
    """Weights averaged with `width`, as a share of the run's length, at `step` (None: the last snapshot), fp32.

    Sums over all snapshots up to `step`, in the proportions of `ldm_dcn.ema.mixture`. Raises `UserError` where there are
    none, or one is damaged.
    """
    folders = {at: run / "averages" / f"step-{at}" for at in saved_steps(run / "averages")}
    step = max(folders, default=0) if step is None else step
    files = [
        (at, float(file.stem.removeprefix("width-")), file)
        for at, folder in sorted(folders.items())
        if at <= step
        for file in sorted(folder.glob("width-*.safetensors"))
    ]
    if not folders:
        raise UserError(
            f"{run} has no snapshots of its averages; train with train.ema=power train.ema_snapshot_every=N"
        )
    if step not in folders:
        known = ", ".join(map(str, sorted(folders)))
        raise UserError(f"{run} has no snapshot of step {step}; there are those of {known}")
    for folder in {file.parent for _, _, file in files}:
        try:
            verify(folder)
        except Damaged as error:
            raise Damaged(
                f"{error}; delete {folder}: the other snapshots will do, a little less closely"
            ) from None
    factors, error = mixture([at for at, _, _ in files], [own for _, own, _ in files], step, width)
    if error > LARGEST_ERROR:
        steps, widths = len({at for at, _, _ in files}), sorted({own for _, own, _ in files})
        raise UserError(
            f"no mixture of the averages of {run}, of {steps} steps and widths {' and '.join(map(str, widths))}, comes near width {width} at "
            f"step {step}: its weighting of the past would be {error:.0%} off; ask for a width nearer to those, or for one of "
            "a run with more snapshots (train.ema_snapshot_every)"
        )
    total: dict[str, torch.Tensor] = {}
    for factor, (_, _, file) in zip(factors, files, strict=True):
        for name, tensor in load_file(file).items():
            total[name] = (
                tensor.float().mul_(factor) if name not in total else total[name].add_(tensor, alpha=factor)
            )
    return total, step


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder with averages/")
    parser.add_argument(
        "--width", type=float, required=True, help="share of the run, such as 0.075; below 0.28"
    )
    parser.add_argument("--step", type=int, help="default: the last snapshot")
    parser.add_argument("--out", type=Path, required=True, help="the export to write")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.width < 0.28:
        raise UserError(
            f"--width {arguments.width}: no power of the step is that wide; use more than 0, less than 0.28"
        )
    check_export_place(arguments.out, "give another --out")
    weights, step = synthesise(arguments.run, arguments.width, arguments.step)
    model = load_model(arguments.run)
    model.denoiser.load_state_dict(weights)
    tags = {**model.tags, "step": step, "weights": f"power EMA {arguments.width}, post hoc"}
    save_export(arguments.out, replace(model, step=step, tags=tags))
    print(f"{arguments.out}: {tags['weights']}, step {step}")
    return 0


if __name__ == "__main__":
    with exit_on_user_error():
        raise SystemExit(main())
