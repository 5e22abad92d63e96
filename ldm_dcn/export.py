"""A model for use: the `export/` folder in diffusers layout, written whole or not at all, and `load_model`.

export/
  model_index.json                what lies where
  unet/                           averaged weights and config, with the swap plan in it
  class_embedding/                (classes + 1) x width; the last row is the null class
  scheduler/scheduler_config.json the noise schedule
  autoencoder.json                which autoencoder, and its fingerprint: another one is refused
  run.json                        name, step, the run's config, and the tags that belong next to every number
  manifest.json                   sizes and hashes of the above
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .autoencoder import Autoencoder, load_autoencoder
from .checkpoint import MANIFEST, committed_folder, verify, write_json
from .denoiser import Denoiser
from .diffusion import Schedule
from .errors import UserError
from .sampling import build_scheduler
from .unet import load_unet

FORMAT = 1
EXPORT = "export"
_SCHEDULE_KEYS = {"num_train_timesteps": "num_steps"} | {
    k: k for k in ("beta_schedule", "beta_start", "beta_end")
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Model:
    """All that drawing images takes (`ldm_dcn.sampling.generate`).

    latent_shape    (C, h, w)
    config          the run's resolved settings, as plain values
    tags            what must stand beside every number measured with this model
    """

    denoiser: Denoiser
    autoencoder: Autoencoder
    schedule: Schedule
    latent_shape: tuple[int, int, int]
    name: str
    step: int
    config: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, Any] = field(default_factory=dict)

    @property
    def unet(self) -> UNet2DConditionModel:
        return self.denoiser.unet

    @property
    def class_embedding(self) -> nn.Embedding:
        return self.denoiser.class_embedding

    @property
    def num_classes(self) -> int:
        return self.denoiser.num_classes


def save_export(folder: Path, model: Model) -> None:
    """Write `model` to `folder`, replacing an older export in one go."""
    with committed_folder(folder) as new:
        _save_unet(model.unet, new / "unet")
        embedding = model.class_embedding.weight.detach().cpu().contiguous()
        (new / "class_embedding").mkdir()
        save_file({"weight": embedding}, new / "class_embedding" / "model.safetensors")
        write_json(
            new / "class_embedding" / "config.json",
            {"num_classes": model.num_classes, "width": embedding.shape[1]},
        )
        scheduler = build_scheduler("dpm++", model.schedule)
        scheduler.save_pretrained(new / "scheduler")
        fingerprint = model.autoencoder.fingerprint()
        write_json(new / "autoencoder.json", {"spec": model.autoencoder.spec, "fingerprint": fingerprint})
        write_json(
            new / "run.json",
            {
                "format": FORMAT,
                "name": model.name,
                "step": model.step,
                "latent_shape": list(model.latent_shape),
                "prediction": model.schedule.prediction,
                "image_channels": model.autoencoder.image_channels,
                "config": model.config,
                "tags": model.tags,
            },
        )
        write_json(
            new / "model_index.json",
            {
                "_class_name": "LatentDiffusion",
                "_diffusers_version": diffusers.__version__,
                "unet": ["diffusers", type(model.unet).__name__],
                "scheduler": ["diffusers", type(scheduler).__name__],
                "class_embedding": ["torch.nn", "Embedding"],
            },
        )


def load_model(
    path: str | Path, *, device: torch.device | str = "cpu", autoencoder: str | None = None
) -> Model:
    """The model of a run folder, an export folder or a hub id ("owner/name"), ready to draw on `device`.

    `autoencoder` says where it lies on this machine, when not where the run had it. Raises `UserError` for
    anything that is no model, is damaged, or comes with another autoencoder than it was trained with.
    """
    folder = _find(path)
    if (folder / MANIFEST).exists():
        verify(folder)
    try:
        run = _read_json(folder / "run.json")
        if run["format"] != FORMAT:
            raise UserError(
                f"{folder} has export format {run['format']}, this program reads {FORMAT}; "
                "use the version that wrote it"
            )
        reference = _read_json(folder / "autoencoder.json")
        scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
        schedule = Schedule(
            prediction=run["prediction"], **{ours: scheduler[k] for k, ours in _SCHEDULE_KEYS.items()}
        )
        weight = load_file(folder / "class_embedding" / "model.safetensors")["weight"]
        latent_shape = tuple(run["latent_shape"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{folder} is not a whole export: {type(error).__name__} {error}; export it again"
        ) from None
    unet = load_unet(folder / "unet")
    denoiser = Denoiser(unet, len(weight) - 1)
    denoiser.class_embedding.weight.data.copy_(weight)
    denoiser.to(device=device, memory_format=torch.channels_last).eval().requires_grad_(False)
    settings = run["config"].get("autoencoder", {})
    own = load_autoencoder(
        autoencoder or reference["spec"],
        dtype=settings.get("dtype", "auto"),
        device=device,
        image_channels=run["image_channels"],
    )
    own.check(reference["fingerprint"])
    return Model(denoiser, own, schedule, latent_shape, run["name"], run["step"], run["config"], run["tags"])


def exported_step(run_folder: Path) -> int | None:
    """The step of the export in a run folder; None where there is none."""
    try:
        return int(_read_json(run_folder / EXPORT / "run.json")["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _save_unet(unet: UNet2DConditionModel, folder: Path) -> None:
    """`unet.save_pretrained`, for parameters in channels_last too, which safetensors refuses."""
    own = {p: p.data for p in unet.parameters()}
    try:
        for p in own:
            p.data = p.data.contiguous()
        unet.save_pretrained(folder)
    finally:
        for p, data in own.items():
            p.data = data


def _find(path: str | Path) -> Path:
    folder = Path(path)
    if folder.is_dir():
        if (folder / "model_index.json").exists():
            return folder
        if (folder / "config.yaml").exists() or (folder / "checkpoints").is_dir():
            old = folder / f".old-{EXPORT}"  # a run killed between the two renames of a replacement
            if not (folder / EXPORT).exists() and old.exists():
                return old
            if (folder / EXPORT / "model_index.json").exists():
                return folder / EXPORT
            raise UserError(
                f"the run {folder} has not saved a model yet; it writes {folder / EXPORT} at its first save"
            )
        raise UserError(
            f"{folder} is neither a run folder (config.yaml, checkpoints/) nor an export (model_index.json); "
            "give the folder that train.py wrote, such as runs/digits_dcn"
        )
    if folder.exists():
        raise UserError(f"{folder} is a file; give a run folder, an export folder or a hub id")
    if _HUB_ID.fullmatch(str(path)) and not str(path).startswith((".", "runs/")):
        return _download(str(path))
    raise UserError(f"{path} does not exist; give a run folder, an export folder or a hub id (owner/name)")


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download  # only this way needs it

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub client has a dozen kinds: offline, unknown, private, ...
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{hub_id} is no folder here, and it could not be had from the hub ({reason}); "
            "check the name and the "
            "network, or give a folder"
        ) from None
    if not (folder / "model_index.json").exists():
        raise UserError(
            f"the hub repository {hub_id} holds no model_index.json; it is not an export of train.py"
        )
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, Mapping):
        raise ValueError(f"{path.name} holds no JSON object")
    return dict(value)
