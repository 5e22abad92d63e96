"""The networks side by side: parameters, MACs, and what they were trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dcnv4_ext import DCNv4
from ldm_dcn.model import Model
from ldm_dcn.swap import swapped_sites

from ..throughput import count_macs
from .inputs import Run
from .markup import Markup, tag
from .page import NOT_STATED, figure, large, table

COLUMNS = ("run", "network", "parameters", "in DCNv4", "MACs of one forward", "training steps", "EMA", "data", "commit", "torch")  # fmt: skip


def row(run: Run, model: Model) -> tuple[object, ...]:
    """One of `runs_table`; `model` is the run's, loaded."""
    sites = swapped_sites(model.unet)
    kinds = [site.kind for site in sites]
    swapped = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    inside = sum(
        p.numel() for module in model.unet.modules() if isinstance(module, DCNv4) for p in module.parameters()
    )
    started = run.provenance[-1] if run.provenance else {}
    git, versions = started.get("git"), started.get("versions")
    commit = str(git["commit"])[:10] + (" and changes" if git.get("dirty") else "") if isinstance(git, dict) and git.get("commit") else NOT_STATED  # fmt: skip
    return (
        run.name,
        tag("td", f"DCNv4 at {swapped}" if sites else "plain U-Net", class_="words"),
        f"{sum(p.numel() for p in model.denoiser.parameters()) / 1e6:,.3f} M",
        f"{inside / 1e6:,.3f} M" if inside else "none",
        large(_macs(model)),
        f"{model.step:,}",
        str(model.tags.get("weights", NOT_STATED)),
        str(model.tags.get("data", NOT_STATED)),
        commit,
        str(versions.get("torch", NOT_STATED)) if isinstance(versions, dict) else NOT_STATED,
    )  # fmt: skip


def runs_table(rows: Sequence[Sequence[object]], command: str) -> Markup:
    """Parameters, MACs, and what was trained; a `row` each run."""
    caption = (
        "Networks side by side. Parameters and multiply-accumulates were counted by this report, of one image, on the exported weights, the "
        "conditioning included, the autoencoder not; commit and torch are those of the last start of the run."
    )
    return figure(table(COLUMNS, rows), caption, command)


def _macs(model: Model) -> int:
    device = model.denoiser.device
    x = torch.zeros(1, *model.latent_shape, device=device)
    return count_macs(model.denoiser, x, torch.zeros(1, dtype=torch.int64, device=device),
                      model.denoiser.null_condition(1))  # fmt: skip
