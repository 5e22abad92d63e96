"""What `model.pretrained` names: a U-Net to go on from, and what lies beside it, which a run reads or must agree with.

beside the U-Net            of a run, an export        of a pipeline           where the run has another
what is predicted           run.json                   scheduler_config.json   refused
noise levels                run.json                   scheduler_config.json   said
scale of the latents        autoencoder.json           vae/config.json         refused
weights of the autoencoder  autoencoder.json           -                       said
text encoder                text/encoder.json          -                       said
class embedding             class_embedding/           -                       said, where it cannot be read
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .autoencoder import Autoencoder
from .denoiser import Denoiser
from .errors import UserError
from .export import INDEX, check_widths, is_export, is_run, read_export
from .hub import HUB_ID, Unavailable, from_hub_or_cache
from .sampling import PREDICTION_TYPES
from .text import IGNORED_WHEN_COMPARED
from .unet import load_pretrained_unet

SCHEDULER, VAE = "scheduler/scheduler_config.json", "vae/config.json"
# Of our schedule, as diffusers calls them; the straight path has no betas.
NOISE_LEVELS = {
    "num_steps": "num_train_timesteps",
    "beta_schedule": "beta_schedule",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "zero_terminal_snr": "rescale_betas_zero_snr",
}
# Entries of an autoencoder's fingerprint that give other latents of the same image; `factor` stands in no config.json.
LATENT_SCALE = (
    "class",
    "latent_channels",
    "factor",
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
)


@dataclass(frozen=True)
class Pretrained:
    """A U-Net, and what is known of how it was trained; an entry that is not there is not known.

    source           as the user named it
    embedding        (classes + 1, D), the last row meaning none, of a network of classes
    schedule         entries of `diffusion.Schedule`
    autoencoder      entries of `Autoencoder.fingerprint`
    text_encoder     `TextEncoder.fingerprint`
    """

    source: str
    unet: nn.Module
    embedding: torch.Tensor | None = None
    schedule: Mapping[str, Any] = field(default_factory=dict)
    autoencoder: Mapping[str, Any] = field(default_factory=dict)
    text_encoder: Mapping[str, Any] | None = None


def load_pretrained(source: str) -> Pretrained:
    """The U-Net of a run, an export, a pipeline in diffusers layout, or alone; a folder or a hub id.

    Raises `UserError` for what is none of these or damaged.
    """
    if not Path(source).exists() and not HUB_ID.fullmatch(source):
        raise UserError(
            f"no such folder: {source}; model.pretrained names a run, an export, a pipeline, a U-Net's folder or a hub id, which "
            "has to be there at each start of the run"
        )
    beside = _files_beside(source)
    if is_run(Path(source)) or is_export(beside.get(INDEX, {})):
        export = read_export(source)
        unet = load_pretrained_unet(export.folder)
        check_widths(export, unet)
        return Pretrained(
            source,
            unet,
            export.embedding,
            asdict(export.schedule),
            export.autoencoder["fingerprint"],
            export.text_encoder,
        )
    unet = load_pretrained_unet(source)
    if not hasattr(unet.config, "cross_attention_dim"):
        raise UserError(
            f"{source} is a {type(unet).__name__}, which takes no condition; give a UNet2DConditionModel"
        )
    return Pretrained(source, unet, None, _schedule(beside.get(SCHEDULER, {})), beside.get(VAE, {}))


def check_pretrained(
    pretrained: Pretrained, schedule: Mapping[str, Any], autoencoder: Autoencoder
) -> list[str]:
    """What the network has to learn anew, a line each, under the run's `schedule` (entries of `diffusion.Schedule`) and `autoencoder`.

    Raises `UserError` for what makes its weights worthless: another quantity to predict, latents on another scale.
    """
    source = pretrained.source
    alone = "or name its unet folder alone, of which nothing else is known"
    predicts = pretrained.schedule.get("prediction", schedule["prediction"])
    if predicts != schedule["prediction"]:
        raise UserError(
            f"{source} predicts {predicts}, and diffusion.prediction={schedule['prediction']}; set "
            f"diffusion.prediction={predicts}, {alone}"
        )
    own, theirs = autoencoder.fingerprint(), pretrained.autoencoder
    scale = [key for key in LATENT_SCALE if key in theirs and theirs[key] != own.get(key)]
    if scale:
        was = f"autoencoder {theirs['spec']}" if "spec" in theirs else "its own autoencoder"
        raise UserError(
            f"{source} was trained on the latents of {was}, and autoencoder={autoencoder.spec} makes others "
            f"({_differences(scale[:1], theirs, own)}); set autoencoder={theirs.get('spec', source)}, {alone}"
        )
    said = []
    known = ["num_steps"] if predicts == "flow" else NOISE_LEVELS
    levels = [key for key in known if pretrained.schedule.get(key, schedule[key]) != schedule[key]]
    if levels:
        said.append(
            f"warning: {source} was trained under other noise levels ({_differences(levels, pretrained.schedule, schedule)}), and "
            "has to learn these"
        )
    if theirs.get("sha256", own.get("sha256")) != own.get("sha256"):
        said.append(
            f"warning: {source} was trained on the latents of other weights than those of autoencoder={autoencoder.spec}, and has "
            "to learn these"
        )
    return said


def check_text(pretrained: Pretrained, text_encoder: Mapping[str, Any]) -> list[str]:
    """The same for the text encoder that the captions were encoded with, by its fingerprint."""
    source, theirs = pretrained.source, pretrained.text_encoder
    if pretrained.embedding is not None:
        return [f"warning: {source} knows {_classes(len(pretrained.embedding) - 1)}, and has to learn text"]
    keys = [key for key in text_encoder if key not in IGNORED_WHEN_COMPARED]
    if theirs is not None and any(theirs.get(key) != text_encoder[key] for key in keys):
        return [
            f"warning: {source} was trained with the text encoder {theirs.get('spec')}, and has to learn the tokens of "
            f"{text_encoder['spec']}, another one"
        ]
    return []


@torch.no_grad()
def read_class_embedding(denoiser: Denoiser, pretrained: Pretrained) -> tuple[bool, str]:
    """Give `denoiser` the class embedding of `pretrained` as far as there is one; whether it is new, and the line that says so.

    With another number of classes, the row that means none is still the same.
    """
    weight, theirs, source = denoiser.class_embedding.weight, pretrained.embedding, pretrained.source
    classes = denoiser.num_classes
    if theirs is None:
        why = "knows text" if pretrained.text_encoder is not None else "has none"
        return True, f"the class embedding is new: {source} {why}"
    if theirs.shape == weight.shape:
        weight.copy_(theirs)
        return False, f"the class embedding is that of {source}: {_classes(classes)}"
    weight[-1] = theirs[-1]
    kept = "" if classes == 0 else ", but for its row that means none"
    knows = _classes(len(theirs) - 1)
    return (
        classes > 0,
        f"the class embedding is new{kept}: {source} knows {knows}, the run {_classes(classes)}",
    )


def _classes(count: int) -> str:
    return f"{count or 'no'} classes"


def _differences(keys: list[str], theirs: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {theirs[key]}, here {own.get(key)}" for key in keys)


def _schedule(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of our schedule out of the config of a diffusers scheduler."""
    entries = {own: scheduler[key] for own, key in NOISE_LEVELS.items() if key in scheduler}
    names = {published: own for own, published in PREDICTION_TYPES.items()}
    if str(scheduler.get("_class_name", "")).startswith("FlowMatch"):
        entries["prediction"] = "flow"
    elif scheduler.get("prediction_type") in names:
        entries["prediction"] = names[scheduler["prediction_type"]]
    return entries


def _files_beside(source: str) -> dict[str, dict[str, Any]]:
    """The JSON files that say what the U-Net of `source` belongs to, by name; those that there are."""
    names = (INDEX, SCHEDULER, VAE)
    if Path(source).exists():
        return _objects({name: Path(source, name) for name in names})

    def load(local_only: bool) -> dict[str, dict[str, Any]]:
        from huggingface_hub import hf_hub_download

        found = {}
        for name in names:
            try:
                found[name] = Path(hf_hub_download(source, name, local_files_only=local_only))
            except Exception:  # not there, which the client says in a dozen ways
                continue
        return _objects(found)

    try:
        return from_hub_or_cache(source, load)
    except Unavailable:  # loading the U-Net says so
        return {}


def _objects(paths: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, path in paths.items():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            found[name] = content
    return found
