"""Latent diffusion with DCNv4 in the U-Net.

    from ldm_dcn import build_unet, plan_swap, apply_swap, swap_table, load_unet, LatentDiffusion

Importing this package imports nothing else: each name comes with its file, when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm_dcn.pipeline import LatentDiffusion
    from ldm_dcn.swap import DCNUNet2DConditionModel, DCNUNet2DModel, Site, apply_swap, plan_swap, swap_table
    from ldm_dcn.unet import build_unet, load_unet

_HOME = {
    "DCNUNet2DConditionModel": "swap",
    "DCNUNet2DModel": "swap",
    "LatentDiffusion": "pipeline",
    "Site": "swap",
    "apply_swap": "swap",
    "build_unet": "unet",
    "load_unet": "unet",
    "plan_swap": "swap",
    "swap_table": "swap",
}

__all__ = [
    "DCNUNet2DConditionModel",
    "DCNUNet2DModel",
    "LatentDiffusion",
    "Site",
    "apply_swap",
    "build_unet",
    "load_unet",
    "plan_swap",
    "swap_table",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
