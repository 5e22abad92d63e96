"""Pixels <-> latents: the only file that knows an autoencoder's scaling, shift and arithmetic.

    latents = (mean + std * noise - shift) * scaling        shift and scaling from the autoencoder's own config;
                                                            `latents_mean` and `latents_std` take their place where it has them

An autoencoder is named by a hub id, a folder in diffusers layout, one weights file (diffusers or original LDM layout), "digits"
(shipped) or "identity" (pixels are the latents). Weights are read as data: nothing pickled is ever run.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from .errors import UserError, one_line, quiet
from .files import only_variant
from .hub import HUB_ID, Unavailable, from_hub_or_cache
from .weights import DTYPES, hash_weights

ASSETS = Path(__file__).parent / "assets"
DIGITS_FOLDER = ASSETS / "digits_autoencoder"
SD_CONFIG_FOLDER = ASSETS / "sd_vae"  # Stable Diffusion 1.x, for single files that come without a config

FLOATS = (
    "F64",
    "F32",
    "BF16",
    "F16",
)  # as safetensors calls the formats of weights; all others are quantised
LOGVAR_RANGE = (-30.0, 20.0)  # as diffusers' DiagonalGaussianDistribution
NO_VARIANCE = -60.0  # log-variance of the identity: a std of 1e-13 vanishes in float32 pixels
IGNORED_WHEN_COMPARED = ("spec",)  # the same weights may lie elsewhere


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8: round(127.5 x + 127.5), clamped. The one formula of the project.

    Raises `ValueError` for NaN or infinity, naming the first such images.
    """
    levels = images.detach().to(torch.float32).mul(127.5).add(127.5)
    if not bool(torch.isfinite(levels).all()):
        broken = (
            (~torch.isfinite(levels)).flatten(1).any(1).nonzero().flatten().tolist()
            if levels.ndim > 1
            else [0]
        )
        raise ValueError(
            f"images {broken[:8]} of a batch of {len(levels)} hold NaN or infinity; "
            "look for the step that made them (training diverged, or float16 overflowed)"
        )
    return levels.round_().clamp_(0, 255).to(torch.uint8)


class Autoencoder(ABC):
    """Encodes images into Gaussian moments and decodes latents of unit scale.

    spec             as the user named it
    image_channels   c
    latent_channels  L
    factor           pixels per latent cell, along each side
    dtype            arithmetic of the network; moments, latents and images are float32 outside
    """

    spec: str
    image_channels: int
    latent_channels: int
    factor: int
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images (N, c, H, W) in [-1, 1] to moments (N, 2L, h, w) float32: mean, then log-variance, unscaled."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, L, h, w) of unit scale to images (N, c, H, W) float32, clamped to [-1, 1]."""

    @abstractmethod
    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A draw from the posterior, of unit scale: (mean + std * noise - shift) * scaling, (N, L, h, w)."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What a run must remember to be decoded rightly: JSON-able."""

    def check(self, fingerprint: dict[str, Any]) -> None:
        """Raise `UserError`, naming the entry that differs, unless this is the autoencoder of `fingerprint`."""
        own = self.fingerprint()
        for key in [*own, *(key for key in fingerprint if key not in own)]:
            if key not in IGNORED_WHEN_COMPARED and own.get(key) != fingerprint.get(key):
                mend = f"use autoencoder={fingerprint.get('spec')}"
                if own["class"] == fingerprint.get("class") == "identity" and key == "latent_channels":
                    mend = f"set data.image_channels={fingerprint.get(key)}"  # which is all that the identity knows
                raise UserError(
                    f"autoencoder {self.spec} is not the one these latents were made with: its {key} is "
                    f"{_short(own.get(key))}, theirs {_short(fingerprint.get(key))}; {mend}, or encode and train again"
                )

    def _check_images(self, images: Tensor) -> None:
        _, c, h, w = images.shape
        if c != self.image_channels:
            raise ValueError(f"images have {c} channels, autoencoder {self.spec} takes {self.image_channels}")
        if h % self.factor or w % self.factor:
            raise ValueError(
                f"images are {h}x{w}, which {self.factor} (pixels per latent) does not divide; "
                f"use multiples of {self.factor}"
            )


class IdentityAutoencoder(Autoencoder):
    """Pixels are the latents: diffusion in pixel space through the same code."""

    def __init__(self, image_channels: int, device: str | torch.device = "cpu") -> None:
        self.spec = "identity"
        self.image_channels = self.latent_channels = image_channels
        self.factor = 1
        self.dtype = torch.float32
        self.device = torch.device(device)

    def encode(self, images: Tensor) -> Tensor:
        self._check_images(images)
        mean = images.to(self.device, torch.float32)
        return torch.cat([mean, torch.full_like(mean, NO_VARIANCE)], dim=1)

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        mean, logvar = moments.chunk(2, dim=1)
        return mean + torch.exp(0.5 * logvar) * noise

    def decode(self, latents: Tensor) -> Tensor:
        return latents.to(torch.float32).clamp(-1, 1)

    def fingerprint(self) -> dict[str, Any]:
        return {"spec": self.spec, "class": "identity", "latent_channels": self.latent_channels, "factor": 1}


class KLAutoencoder(Autoencoder):
    """A diffusers `AutoencoderKL`, frozen, with what its config says about latents."""

    def __init__(
        self, model: torch.nn.Module, spec: str, dtype: str = "auto", device: str | torch.device = "cpu"
    ) -> None:
        config = model.config
        shift, scaling = _checked_affine(spec, config)
        self.spec = spec
        self.image_channels = int(config.in_channels)
        self.latent_channels = int(config.latent_channels)
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.dtype = _choose_dtype(spec, config, dtype)
        self.device = torch.device(device)
        self._config = config
        self._sha256 = hash_weights(model)
        self._model = model.requires_grad_(False).eval()
        _cast(self._model, device=self.device, dtype=self.dtype, memory_format=torch.channels_last)
        # Where latents are, too: a copy in each training step would wait for all of a GPU's work before it.
        self._shift = torch.tensor(shift, dtype=torch.float32, device=self.device).view(1, -1, 1, 1)
        self._scaling = torch.tensor(scaling, dtype=torch.float32, device=self.device).view(1, -1, 1, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        self._check_images(images)
        mean, logvar = self._run(self._encoder, images).chunk(2, dim=1)
        return torch.cat([mean, logvar.clamp(*LOGVAR_RANGE)], dim=1)

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        mean, logvar = moments.chunk(2, dim=1)
        shift, scaling = self._shift.to(moments.device), self._scaling.to(moments.device)
        return (mean + torch.exp(0.5 * logvar) * noise - shift) * scaling

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        shift, scaling = self._shift.to(latents.device), self._scaling.to(latents.device)
        return self._run(self._decoder, latents.to(torch.float32) / scaling + shift).clamp(-1, 1)

    def fingerprint(self) -> dict[str, Any]:
        config = self._config
        return {
            "spec": self.spec,
            "class": type(self._model).__name__,
            "scaling_factor": config.scaling_factor,
            "shift_factor": config.get("shift_factor"),
            "latents_mean": _as_list(config.get("latents_mean")),
            "latents_std": _as_list(config.get("latents_std")),
            "latent_channels": self.latent_channels,
            "factor": self.factor,
            "dtype": str(self.dtype).removeprefix("torch."),
            "sha256": self._sha256,
        }

    def _encoder(self, images: Tensor) -> Tensor:
        return self._model.encode(images).latent_dist.parameters

    def _decoder(self, latents: Tensor) -> Tensor:
        return self._model.decode(latents).sample

    def _run(self, network: Any, x: Tensor) -> Tensor:
        x = x.to(device=self.device, dtype=self.dtype, memory_format=torch.channels_last)
        with torch.autocast(
            self.device.type, enabled=False
        ):  # autocast overflows SD's autoencoder in float16
            y = network(x).to(torch.float32)
        if not bool(torch.isfinite(y).all()):
            raise UserError(
                f"autoencoder {self.spec} gives NaN or infinity in {str(self.dtype).removeprefix('torch.')}; "
                "use float32 or bfloat16, or look at its weights and at what it was given"
            )
        return y


def load_autoencoder(
    spec: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    image_channels: int = 3,
) -> Autoencoder:
    """Load the autoencoder that `spec` names.

    spec             hub id | folder | weights file (.safetensors, .ckpt, .pth, .pt, .bin) | "digits" | "identity"
    dtype            "float32", "bfloat16", "float16", or "auto": what its config says, else float32
    image_channels   for "identity" alone

    A weights file is read with the `config.json` beside it, or else as Stable Diffusion 1.x's. Raises `UserError` naming the file
    and the mend when something is missing, truncated, of another kind, or would have to be unpickled.
    """
    spec = os.fspath(spec)
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"autoencoder dtype is {dtype!r}; use one of auto, {', '.join(DTYPES)}")
    if spec == "identity":
        return IdentityAutoencoder(image_channels, device)
    if spec == "digits":
        model = _from_folder(str(DIGITS_FOLDER))
    elif os.path.isdir(spec):
        model = _from_folder(spec)
    elif os.path.isfile(spec):
        model = _from_file(spec)
    elif HUB_ID.fullmatch(spec) and not spec.startswith("."):
        model = _from_hub(spec)
    else:
        raise UserError(
            f"autoencoder {spec!r} does not exist; give a folder, a weights file, a hub id (owner/name), "
            "'digits' or 'identity'"
        )
    return KLAutoencoder(model, spec, dtype, device)


def _from_folder(folder: str) -> torch.nn.Module:
    from diffusers import AutoencoderKL

    if not os.path.isfile(os.path.join(folder, "config.json")):
        inner = os.path.join(folder, "vae")
        if not os.path.isfile(os.path.join(inner, "config.json")):
            raise UserError(
                f"autoencoder folder {folder} has no config.json (nor vae/config.json); give a folder that "
                "AutoencoderKL.save_pretrained wrote, or a weights file"
            )
        folder = inner
    _read_config(folder)
    files = [name for name in sorted(os.listdir(folder)) if name.endswith(".safetensors")]
    if not files:
        raise UserError(
            f"autoencoder folder {folder} has a config.json and no .safetensors weights; copy "
            "diffusion_pytorch_model.safetensors into it, or name a weights file itself"
        )
    for name in files:
        _check_floats(os.path.join(folder, name))
    return _load_pretrained(
        AutoencoderKL,
        folder,
        f"autoencoder folder {folder}",
        "copy diffusion_pytorch_model.safetensors there again",
        local_files_only=True,
        variant=only_variant(Path(folder), "diffusion_pytorch_model"),
    )


def _check_floats(path: str) -> None:
    """Refuse whole numbers for weights, which diffusers would take at face value. Reads the header only."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):  # loading says what is wrong with it
        return
    for name, kind in kinds.items():
        if kind not in FLOATS:
            _refuse_quantised(path, name, kind)


def _refuse_quantised(path: str, name: str, kind: str) -> NoReturn:
    raise UserError(
        f"autoencoder file {path} holds quantised weights ({name} is {kind}); give them in float32, bfloat16 or float16"
    )


def _from_hub(spec: str) -> torch.nn.Module:
    from diffusers import AutoencoderKL

    mend = "check the name and the network, or download it elsewhere and give the folder or the weights file"
    what = f"autoencoder {spec} (neither a folder nor a file here, so a hub id)"

    def load(local_only: bool) -> torch.nn.Module:
        try:
            config, _ = AutoencoderKL.load_config(
                spec, return_unused_kwargs=True, local_files_only=local_only
            )
            subfolder = None
        except Exception:  # a pipeline keeps its autoencoder in vae/; whatever else it is shows itself below
            config, subfolder = None, "vae"
        if config is not None and config.get("_class_name") != "AutoencoderKL":
            raise UserError(f"{what} is a {config.get('_class_name')}; give an AutoencoderKL")
        return _load_pretrained(
            AutoencoderKL, spec, what, mend, subfolder=subfolder, local_files_only=local_only
        )

    try:
        return from_hub_or_cache(spec, load)
    except Unavailable as error:
        raise UserError(f"{what} cannot be had ({error}); {mend}") from error


def _load_pretrained(cls: Any, path: str, what: str, mend: str, **options: Any) -> torch.nn.Module:
    from diffusers.utils import logging

    with quiet(logging):
        try:
            model, report = cls.from_pretrained(
                path, use_safetensors=True, output_loading_info=True, **options
            )
        except (
            Exception
        ) as error:  # OSError, ValueError, SafetensorError, hub errors: all mean it cannot be had
            raise UserError(f"{what} cannot be loaded ({one_line(error)}); {mend}") from error
    missing = report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]
    if missing:
        raise UserError(f"{what}: weights and config.json do not fit, first at {missing[0]}; {mend}")
    return _cast(model, dtype=torch.float32)


def _from_file(path: str) -> torch.nn.Module:
    from diffusers import AutoencoderKL
    from diffusers.utils import logging

    folder = os.path.dirname(os.path.abspath(path))
    own_config = _config_class(folder) == "AutoencoderKL"
    config_folder = folder if own_config else str(SD_CONFIG_FOLDER)
    weights = _read_weights(path)
    mend = (
        "give an autoencoder's weights, or put the config.json it was made with beside it"
        if not own_config
        else "give the weights that belong to the config.json beside it"
    )
    with quiet(logging):
        try:
            model = AutoencoderKL.from_single_file(weights, config=config_folder, local_files_only=True)
        except Exception as error:  # KeyError, ValueError, RuntimeError, by what does not fit
            raise UserError(
                f"autoencoder file {path} does not fit {_config_name(own_config)} ({one_line(error)}); {mend}"
            ) from error
    lacking = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if lacking:
        raise UserError(
            f"autoencoder file {path} does not fit {_config_name(own_config)}: it lacks {lacking[0]} and "
            f"{len(lacking) - 1} others; {mend}"
        )
    return _cast(model, dtype=torch.float32)


def _read_weights(path: str) -> dict[str, Tensor]:
    """A flat state dict out of a safetensors file or a checkpoint, read as data only."""
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            weights = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # torch remarks on the pickle protocol of what it is about to refuse
                weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"autoencoder file {path} is no checkpoint of tensors alone, and nothing else is unpickled here; "
            "copy it again if it should be one, or save its state dict as .safetensors"
        ) from error
    except Exception as error:
        raise UserError(
            f"autoencoder file {path} cannot be read ({one_line(error)}); copy or download it again"
        ) from error
    while isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    if not isinstance(weights, dict) or not any(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"autoencoder file {path} holds no weights; give a state dict")
    for name, value in weights.items():
        if isinstance(value, Tensor) and value.ndim > 1 and value.element_size() == 1:
            _refuse_quantised(path, name, str(value.dtype).removeprefix("torch."))
    return {name: value for name, value in weights.items() if isinstance(value, Tensor)}


def _config_name(own_config: bool) -> str:
    return "the config.json beside it" if own_config else "Stable Diffusion's autoencoder"


def _config_class(folder: str) -> str | None:
    try:
        return json.loads(Path(folder, "config.json").read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return None


def _read_config(folder: str) -> None:
    path = os.path.join(folder, "config.json")
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no readable JSON ({one_line(error)}); copy it again") from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name != "AutoencoderKL":
        raise UserError(f"{path} describes a {name}; give an AutoencoderKL")


def _cast(model: torch.nn.Module, **to: Any) -> torch.nn.Module:
    return torch.nn.Module.to(model, **to)  # diffusers' own `to` warns about an empty list of modules


def _choose_dtype(spec: str, config: Any, dtype: str) -> torch.dtype:
    if dtype == "auto":
        own = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
        dtype = own if own in DTYPES and not config.get("force_upcast") else "float32"
    elif dtype == "float16" and config.get("force_upcast"):
        raise UserError(
            f"autoencoder {spec} overflows in float16 (its config says force_upcast); use float32 or bfloat16"
        )
    return DTYPES[dtype]


def _checked_affine(spec: str, config: Any) -> tuple[list[float], list[float]]:
    """`_affine`, or `UserError` naming the entry of config.json that is no such number."""
    channels = int(config.latent_channels)
    for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        value, many = config.get(key), key.startswith("latents_")
        if value is None and key != "scaling_factor":
            continue
        values = value if many and isinstance(value, (list, tuple)) else [value]
        numbers = all(type(v) in (int, float) and math.isfinite(v) for v in values)
        positive = key in ("scaling_factor", "latents_std")
        if not numbers or (positive and min(values) <= 0) or len(values) != (channels if many else 1):
            wanted = f"{channels} numbers" if many else "a number"
            raise UserError(
                f"autoencoder {spec}: its config.json has {key} {_short(value)}; it takes {wanted}"
                f"{' above 0' if positive else ''}; copy the config.json that it was published with"
            )
    return _affine(config)


def _affine(config: Any) -> tuple[list[float], list[float]]:
    """Per-channel shift and scaling. With `latents_mean` and `latents_std` it is diffusers' SDXL rule:
    (z - mean) * scaling / std; otherwise (z - shift) * scaling."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    scaling, channels = float(config.scaling_factor), int(config.latent_channels)
    shift = (
        [float(m) for m in mean] if mean is not None else [float(config.get("shift_factor") or 0)] * channels
    )
    return shift, [scaling / float(s) for s in std] if std is not None else [scaling] * channels


def _as_list(values: Any) -> list[float] | None:
    return None if values is None else [float(value) for value in values]


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 40 else repr(value)
