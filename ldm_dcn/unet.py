"""U-Nets by name, by config or from a folder: the presets, `build_unet` and `load_unet`.

Saving is diffusers' own: `unet.save_pretrained(folder)` writes config.json, the swap plan in it, and
safetensors.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from diffusers.utils import logging as diffusers_logging
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm_dcn.errors import UserError, explain, one_line, quiet
from ldm_dcn.files import only_variant
from ldm_dcn.folders import MANIFEST, Damaged, verify
from ldm_dcn.hub import HUB_ID, from_hub_or_cache
from ldm_dcn.swap import DCNUNet2DConditionModel, DCNUNet2DModel, apply_swap, nearest, plan_swap

# Stable Diffusion 1.x, as its differences from `UNet2DConditionModel`'s defaults.
STABLE_DIFFUSION = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}

# The paper's three networks: (config, swap). The published count, 860 M -> 566 M, is that of "sd_dcn_convs";
# the published text says that attention is replaced too, which is "sd_dcn_full".
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "sd_unet": (STABLE_DIFFUSION, None),  # 859.52 M
    "sd_dcn_convs": (STABLE_DIFFUSION, {"sites": ("resnet",), "group_channels": 32}),  # 565.58 M
    "sd_dcn_full": (
        STABLE_DIFFUSION,
        {"sites": ("resnet", "self_attention"), "group_channels": 32},
    ),  # 551.29 M
}

WEIGHTS = SAFETENSORS_WEIGHTS_NAME.removesuffix(".safetensors")

_CLASSES = (UNet2DConditionModel, UNet2DModel, DCNUNet2DConditionModel, DCNUNet2DModel)
# The autoencoder computes in fp32, and its one head is wider than FlashAttention takes.
ANY_ATTENTION = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]
LOADABLE = {cls.__name__: cls for cls in _CLASSES}


def build_unet(
    preset_or_config: str | Mapping[str, Any],
    *,
    swap: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
) -> UNet2DConditionModel:
    """A freshly initialised U-Net.

    Args:
        preset_or_config: "sd_unet", "sd_dcn_convs", "sd_dcn_full", or a mapping of keyword arguments of
            `UNet2DConditionModel`.
        swap: keyword arguments of `plan_swap`; None for a plain network, or for a preset's own swap.
        device: where to build it; "meta" costs nothing and counts parameters.

    Raises:
        UserError: an unknown preset or key (it names the nearest), values that do not go together, a swap
            rule that matches nothing.
    """
    if isinstance(preset_or_config, str):
        config, swap = _preset(preset_or_config, swap)
    else:
        config = dict(preset_or_config)
        _check_keys("U-Net config", config, UNet2DConditionModel.__init__)
    if swap is not None:
        swap_options(swap)

    with nullcontext() if device is None else torch.device(device):
        try:
            unet = UNet2DConditionModel(**config)
        except Exception as error:  # diffusers checks little: a bad value may surface as any kind of error
            raise UserError(f"no U-Net can be built from this config: {one_line(error)}") from error
        return unet if swap is None else apply_swap(unet, plan_swap(unet, **swap))


def _preset(name: str, swap: Mapping[str, Any] | None) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    if name not in PRESETS:
        what = f"unknown U-Net preset {name!r}{nearest(name, PRESETS)}"
        raise UserError(f"{what}; there are {', '.join(PRESETS)}")
    config, own_swap = PRESETS[name]
    if swap is not None and own_swap is not None:
        raise UserError(f"the preset {name} brings its own swap; use sd_unet to choose another")
    return config, own_swap if swap is None else swap


def empty_twin(unet: nn.Module) -> UNet2DConditionModel | UNet2DModel:
    """A U-Net of the same config, swap included, on the meta device: FSDP gives `unet` itself a class of its own."""
    own = next(cls for cls in type(unet).__mro__ if cls in _CLASSES)
    with torch.device("meta"):
        return own.from_config(dict(unet.config))


def swap_options(swap: Mapping[str, Any]) -> Mapping[str, Any]:
    """`swap`, if all its keys are options of `plan_swap`; else `UserError`, naming the nearest."""
    _check_keys("swap", swap, plan_swap)
    return swap


@contextmanager
def set_attention(unet: nn.Module, backend: str) -> Iterator[None]:
    """Let the attention of `unet` run on `backend` inside the block.

    sdpa      PyTorch's scaled-dot-product attention, which chooses among its kernels
    flash     its FlashAttention kernel, or an error: needs a CUDA GPU, and fp16 or bf16
    xformers  memory-efficient attention of that package
    """
    if backend == "xformers":
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError) as error:
            raise UserError(
                f"train.attention=xformers: {one_line(error)}; run `pip install -c constraints.txt xformers`, or use train.attention=sdpa"
            ) from None
    if backend != "flash":
        yield
        return
    if not torch.backends.cuda.is_flash_attention_available():
        raise UserError("train.attention=flash: this PyTorch was built without it; use train.attention=sdpa")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield


def any_attention(backend: str) -> AbstractContextManager[None]:
    """Lift, inside `set_attention`, what `backend` asks for: for whatever is not training."""
    return sdpa_kernel(ANY_ATTENTION) if backend == "flash" else nullcontext()


def _check_keys(what: str, given: Mapping[str, Any], function: Callable[..., Any]) -> None:
    _, *known = inspect.signature(function).parameters  # without self, or the U-Net
    for key in given:
        if key not in known:
            hint = nearest(key, known) or f"; there are {', '.join(known)}"
            raise UserError(f"unknown {what} key {key!r}{hint}")


def load_unet(
    folder_or_hub_id: str | Path, subfolder: str | None = None, dtype: torch.dtype | None = None
) -> UNet2DConditionModel | UNet2DModel:
    """Load a U-Net, plain or swapped, from a folder in diffusers layout or from the hub, in evaluation mode.

    Args:
        folder_or_hub_id: a folder with config.json and safetensors weights, or "owner/name" on the hub.
        subfolder: where in it the U-Net lies, such as "unet" in a pipeline's folder.
        dtype: of the parameters; None takes torch's default.

    Raises:
        UserError: no such folder or hub id, no weights, a file that is damaged or does not fit the config. What lies in an
            export must be what its manifest says.
    """
    if not isinstance(folder_or_hub_id, (str, os.PathLike)):
        raise UserError(f"{folder_or_hub_id!r} is no folder or hub id; give a path, or owner/name")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise UserError(f"dtype={dtype!r}; give a torch.dtype, such as torch.float16")
    here = Path(folder_or_hub_id, subfolder or "")
    try:
        in_export = here.is_dir() and (here.parent / MANIFEST).is_file()
    except OSError as error:  # not to be read, too long a name
        raise UserError(f"cannot load a U-Net from {explain(error)}") from None
    if in_export:
        try:
            verify(here.parent, below=f"{here.resolve().name}/")
        except Damaged as error:
            raise Damaged(f"{error}; copy or download it again") from None
    return load_verified_unet(folder_or_hub_id, subfolder, dtype)


def load_verified_unet(
    folder_or_hub_id: str | Path, subfolder: str | None = None, dtype: torch.dtype | None = None
) -> UNet2DConditionModel | UNet2DModel:
    """`load_unet` of what has been compared with its manifest, or has none."""
    source, here = str(folder_or_hub_id), Path(folder_or_hub_id, subfolder or "")
    try:
        local = Path(source).exists()
        if local:
            _check_folder(here)
    except OSError as error:
        raise UserError(f"cannot load a U-Net from {explain(error)}") from None
    if not local and not HUB_ID.fullmatch(source):
        raise UserError(f"no such folder: {source}")

    def load(local_only: bool) -> tuple[nn.Module, dict[str, Any]]:
        config = UNet2DConditionModel.load_config(source, subfolder=subfolder, local_files_only=local_only)
        name = config.get("_class_name")
        if name not in LOADABLE:
            raise UserError(f"{here / 'config.json'} describes a {name}, none of {', '.join(LOADABLE)}")
        with quiet(diffusers_logging):
            return LOADABLE[name].from_pretrained(
                source,
                subfolder=subfolder,
                torch_dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                local_files_only=local_only,
                variant=only_variant(here, WEIGHTS) if local else None,
            )

    try:
        unet, info = load(True) if local else from_hub_or_cache(source, load)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # diffusers checks little: a bad value in config.json may surface as any kind of error
        hint = "" if local else " (no such folder here, and not to be had from the hub)"
        raise UserError(f"cannot load a U-Net from {here}{hint}: {one_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info[kind])):
            problem = f"{len(keys)} {kind.replace('_', ' ')}, such as {keys[0]}"
            raise UserError(f"the weights in {here} do not fit their config.json: {problem}")
    return unet


def load_pretrained_unet(folder_or_hub_id: str | Path) -> UNet2DConditionModel | UNet2DModel:
    """`load_unet` of a U-Net, or of the one that a pipeline keeps in unet/. Raises `UserError` likewise."""
    if Path(folder_or_hub_id).is_dir():
        inside = (Path(folder_or_hub_id) / "unet").is_dir()
        return load_unet(folder_or_hub_id, subfolder="unet" if inside else None)
    try:
        return load_unet(folder_or_hub_id, subfolder="unet")
    except UserError:
        return load_unet(folder_or_hub_id)


def _check_folder(folder: Path) -> None:
    """Say what a local folder lacks, before diffusers looks for it elsewhere."""
    if folder.is_file():
        raise UserError(
            f"{folder} is a single file; give a folder in diffusers layout, which "
            f"diffusers.StableDiffusionPipeline.from_single_file({folder.name!r}).save_pretrained(FOLDER) makes of it"
        )
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} holds no config.json; give a folder that unet.save_pretrained wrote")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {one_line(error)}; save the U-Net again") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} is damaged: it holds no JSON object; save the U-Net again")
    names = (SAFETENSORS_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    if not any((folder / name).is_file() for name in names) and only_variant(folder, WEIGHTS) is None:
        raise UserError(
            f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}; only safetensors are loaded, never a pickle"
        )
