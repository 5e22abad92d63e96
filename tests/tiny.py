"""A run so small that a step takes milliseconds: 8x8 grey digits, pixels as latents, a U-Net of 9,000
parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ldm_dcn.config import Config, load_config
from programs import ROOT

UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "mid_block_type": None,
    "up_block_types": ["UpBlock2D"],
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
# One with all that U-Nets have, of which a step, a checkpoint and an import take two to four times as long.
WHOLE = {
    **UNET,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"unet": UNET},
    "autoencoder": {"spec": "identity"},
    "data": {"source": "digits", "image_size": 8, "image_channels": 1, "encode_batch_size": 600},
    "train": {
        "steps": 8,
        "batch_size": 8,
        "lr": 1e-3,
        "warmup_steps": 2,
        "precision": "fp32",
        "log_every": 1,
        "save_every": 3,
        "sample_every": 0,
    },
    "sample": {"steps": 2, "images_per_class": 2, "batch_size": 20},
}


def write_config(folder: Path, name: str = "tiny") -> Path:
    """The tiny config as a file whose runs land in `folder`/runs."""
    path = folder / f"{name}.yaml"
    settings = {"base": str(ROOT / "configs" / "base.yaml"), **SETTINGS, "run": {"dir": str(folder / "runs")}}
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def setting(name: str, value: Any) -> str:
    """As an override on the command line, NAME=VALUE."""
    return f"{name}={yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()}"


def tiny_config(folder: Path, *overrides: str, name: str = "tiny") -> Config:
    return load_config(write_config(folder, name), overrides)
