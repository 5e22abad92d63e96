"""The export of a model: a folder in diffusers layout, written whole or not at all, and read again by `load_model`.

export/
  model_index.json                what lies where; id2label, what the data called each class, as in diffusers' DiTPipeline
  unet/                           averaged weights and config, with the swap plan in it
  class_embedding/                (classes + 1) x width; the last row is the null class; of a text model instead:
  text/                           the empty prompt's tokens, and which text encoder made them
  scheduler/scheduler_config.json the noise schedule, for diffusers
  autoencoder.json                which autoencoder, and its fingerprint: another one is refused
  run.json                        name, step, the run's config, and the tags that belong next to every number
  README.md                       the model card, for people: it may be edited, or stay behind
  manifest.json                   sizes and hashes of the above
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .autoencoder import Autoencoder, load_autoencoder
from .config import DiffusionConfig
from .denoiser import Denoiser
from .diffusion import Schedule
from .errors import UserError, shown
from .files import write_json
from .folders import MANIFEST, Damaged, committed_folder, verify
from .hub import HUB_ID, from_hub_or_cache
from .model import Model
from .places import check_folder_place
from .sampling import published_scheduler
from .swap import swap_table, swapped_sites
from .unet import load_verified_unet
from .weights import DTYPES

FORMAT = 2
EXPORT = "export"  # of a run: its newest
EXPORTS = "exports"  # those of single steps
INDEX = "model_index.json"
CLASS_NAME = "LatentDiffusion"  # in the index
CARD = "README.md"


def check_export_place(folder: Path, mend: str) -> None:
    """Raise `UserError`, ending with `mend`, unless `folder` is new, empty or an older export: `save_export` replaces it."""
    check_folder_place(folder, mend)
    if folder.is_dir() and not (folder / INDEX).exists() and (others := sorted(folder.iterdir())):
        raise UserError(f"{folder} is no export and holds other things ({others[0].name}, ...); {mend}")


def save_export(folder: Path, model: Model) -> None:
    """Write `model` to `folder`, replacing an older export in one go."""
    with committed_folder(folder) as new:
        _save_unet(model.unet, new / "unet")
        conditioning = _save_conditioning(model, new)
        scheduler = published_scheduler(model.schedule)
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
                "schedule": asdict(model.schedule),
                "image_channels": model.autoencoder.image_channels,
                "config": model.config,
                "tags": model.tags,
            },
        )
        write_json(
            new / INDEX,
            {
                "_class_name": CLASS_NAME,
                "_diffusers_version": diffusers.__version__,
                "unet": ["ldm_dcn" if swapped_sites(model.unet) else "diffusers", type(model.unet).__name__],
                "scheduler": ["diffusers", type(scheduler).__name__],
                **conditioning,
                **({"id2label": _id2label(model.class_names)} if model.class_names else {}),
            },
        )
        (new / CARD).write_text(model_card(model), encoding="utf-8")


def _id2label(class_names: Sequence[str]) -> dict[str, str]:
    """{"0": "cat", "1": "dog"}"""
    return {str(number): name for number, name in enumerate(class_names)}


def _read_class_names(index: Mapping[str, Any]) -> tuple[str, ...]:
    """What `_id2label` was made of; an export of before there was one, or of data without names, has none."""
    named = index.get("id2label", {})
    # By number: what writes JSON with sorted keys has "10" before "2".
    names = (
        tuple(named.get(str(number)) for number in range(len(named)))
        if isinstance(named, Mapping)
        else (None,)
    )
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{INDEX} has id2label {shown(named)}")
    return names


def _save_conditioning(model: Model, folder: Path) -> dict[str, list[str]]:
    """What turns a label or a prompt into tokens; returns its line of the index."""
    denoiser = model.denoiser
    if denoiser.class_embedding is None:
        (folder / "text").mkdir()
        save_file(
            {"empty": denoiser.empty_tokens.detach().cpu().contiguous()},
            folder / "text" / "tokens.safetensors",
        )
        write_json(folder / "text" / "encoder.json", model.text_encoder)
        return {}
    embedding = denoiser.class_embedding.weight.detach().cpu().contiguous()
    (folder / "class_embedding").mkdir()
    save_file({"weight": embedding}, folder / "class_embedding" / "model.safetensors")
    write_json(
        folder / "class_embedding" / "config.json",
        {"num_classes": model.num_classes, "width": embedding.shape[1]},
    )
    return {"class_embedding": ["torch.nn", "Embedding"]}


def model_card(model: Model) -> str:
    """README.md of an export: what it is, how to draw with it, what was swapped, and how it was trained."""
    text = model.text_encoder is not None
    draw = 'prompts=["a red fox"]' if text else "labels=[0, 1, 2]" if model.num_classes else "count=3"
    named = (
        "\nWhat the data called the class of each label stands in its `class_names`.\n"
        if model.class_names
        else ""
    )
    tags = "\n".join(f"| {key} | {value} |" for key, value in model.tags.items())
    sites = swapped_sites(model.unet)
    table = swap_table(model.unet, sites) if sites else "Nothing was swapped: this is diffusers' own U-Net."
    settings = yaml.safe_dump(model.config, sort_keys=False, default_flow_style=None, width=110)
    return f"""---
library_name: diffusers
pipeline_tag: {"text-to-image" if text else "unconditional-image-generation"}
tags: [ldm-dcn, latent-diffusion{", dcnv4" if sites else ""}]
---

# {model.name}

A latent diffusion model trained with `ldm_dcn`, after {model.step} steps: averaged weights, ready to draw.

```python
from ldm_dcn import LatentDiffusion

images = LatentDiffusion.from_pretrained("THIS FOLDER OR HUB ID")({draw}, seed=0)
```
{named}
| | |
|---|---|
{tags}

## What was swapped

```text
{table}
```

## Training

```yaml
{settings.rstrip()}
```
"""


@dataclass(frozen=True)
class Export:
    """What an export folder holds beside its U-Net.

    run            run.json
    autoencoder    autoencoder.json: spec and fingerprint
    class_names    as of `Model`
    embedding      (classes + 1, D), the last row meaning none; or of a text model
    empty_tokens   (T, D), and
    text_encoder   its fingerprint
    """

    folder: Path
    run: dict[str, Any]
    schedule: Schedule
    latent_shape: tuple[int, int, int]
    autoencoder: dict[str, Any]
    embedding: torch.Tensor | None
    empty_tokens: torch.Tensor | None
    text_encoder: dict[str, Any] | None
    class_names: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return 0 if self.embedding is None else len(self.embedding) - 1

    def model(self, denoiser: Denoiser, autoencoder: Autoencoder) -> Model:
        """What is drawn with, made of its networks."""
        name, step, config, tags = (self.run[key] for key in ("name", "step", "config", "tags"))
        return Model(
            denoiser,
            autoencoder,
            self.schedule,
            self.latent_shape,
            name,
            step,
            config,
            tags,
            self.text_encoder,
            self.class_names,
        )


def read_export(path: str | Path) -> Export:
    """The export of a run folder, an export folder or a hub id. Raises `UserError` for anything else, or damaged."""
    folder = _find(path)
    if (folder / MANIFEST).exists():
        try:
            verify(folder, but=CARD)
        except Damaged as error:
            raise Damaged(
                f"{error}; copy or download it again, or delete {folder} and start its run again, which makes it anew"
            ) from None
    elif is_run(folder.parent):  # where every export has one; a copy may have been stripped of it
        raise UserError(f"{folder} is not a whole export: it has no {MANIFEST}; export it again")
    try:
        run = _read_json(folder / "run.json")
        if run["format"] != FORMAT:
            raise UserError(
                f"{folder} has export format {run['format']}, this program reads {FORMAT}; "
                "use the version that wrote it"
            )
        autoencoder = _read_json(folder / "autoencoder.json")
        _check_facts(run, autoencoder)
        schedule = Schedule(**DiffusionConfig.model_validate(run["schedule"]).model_dump())
        embedding, empty, text_encoder = _read_conditioning(folder)
        latent_shape = tuple(run["latent_shape"])
        class_names = _read_class_names(_read_json(folder / INDEX))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise UserError(
            f"{folder} is not a whole export: {type(error).__name__} {error}; export it again"
        ) from None
    return Export(
        folder, run, schedule, latent_shape, autoencoder, embedding, empty, text_encoder, class_names
    )


def load_model(
    path: str | Path, *, device: torch.device | str = "cpu", autoencoder: str | None = None
) -> Model:
    """The model of a run folder, an export folder or a hub id ("owner/name"), ready to draw on `device`.

    `autoencoder` says where it lies on this machine, when not where the run had it. Raises `UserError` for
    anything that is no model, is damaged, or comes with another autoencoder than it was trained with.
    """
    export = read_export(path)
    return export.model(load_denoiser(export, device), load_autoencoder_of(export, device, autoencoder))


def load_denoiser(export: Export, device: torch.device | str) -> Denoiser:
    """The network of an export, to draw with on `device`. Raises `UserError` where it does not belong to the rest."""
    unet = load_verified_unet(export.folder / "unet")
    check_widths(export, unet)
    denoiser = Denoiser(unet, export.num_classes, export.empty_tokens)
    if export.embedding is not None:
        denoiser.class_embedding.weight.data.copy_(export.embedding)
    return denoiser.to(device=device, memory_format=torch.channels_last).eval().requires_grad_(False)


def load_autoencoder_of(export: Export, device: torch.device | str, spec: str | None = None) -> Autoencoder:
    """The autoencoder that an export was trained with, from `spec` or where it was then; another one is a `UserError`."""
    own = load_autoencoder(
        spec or export.autoencoder["spec"],
        dtype=export.run["config"].get("autoencoder", {}).get("dtype", "auto"),
        device=device,
        image_channels=export.run["image_channels"],
    )
    own.check(export.autoencoder["fingerprint"])
    if own.latent_channels != export.latent_shape[0]:
        raise UserError(
            f"{export.folder} is not a whole export: its latent_shape is {export.latent_shape} and its autoencoder's latents have "
            f"{own.latent_channels} channels; export it again"
        )
    return own


def _check_facts(run: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
    """Raise ValueError for entries of run.json and autoencoder.json that cannot be what `save_export` wrote."""
    kinds = {"name": str, "step": int, "config": dict, "tags": dict, "schedule": dict, "latent_shape": list}
    for key, kind in kinds.items():
        if not isinstance(run[key], kind):
            raise ValueError(f"run.json has {key} {run[key]!r}")
    for key, kind in {"spec": str, "fingerprint": dict}.items():
        if not isinstance(reference[key], kind):
            raise ValueError(f"autoencoder.json has {key} {reference[key]!r}")
    shape = run["latent_shape"]
    if len(shape) != 3 or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"run.json has latent_shape {shape!r}")
    if run["image_channels"] not in (1, 3):
        raise ValueError(f"run.json has image_channels {run['image_channels']!r}")
    settings = run["config"].get("autoencoder", {})
    if not isinstance(settings, dict) or settings.get("dtype", "auto") not in ("auto", *DTYPES):
        raise ValueError(f"run.json has config.autoencoder {settings!r}")


def check_widths(export: Export, unet: UNet2DConditionModel) -> None:
    """Raise `UserError` where the U-Net of an export is not the one that the rest of it belongs to, or it names more classes than it
    has."""
    folder, latent_shape, embedding, what = export.folder, export.latent_shape, export.embedding, None
    if len(export.class_names) > export.num_classes:
        what = f"it has names of {len(export.class_names)} classes and is of {export.num_classes}"
    if unet.config.in_channels != latent_shape[0]:
        what = f"its latent_shape is {latent_shape} and its U-Net takes {unet.config.in_channels} channels"
    width = unet.config.cross_attention_dim
    if embedding is not None and (embedding.ndim != 2 or embedding.shape[1] != width or not len(embedding)):
        what = f"its class embedding is {tuple(embedding.shape)} and its U-Net's tokens have {width} channels"
    if what is not None:
        raise UserError(f"{folder} is not a whole export: {what}; export it again")


def _read_conditioning(
    folder: Path,
) -> tuple[torch.Tensor | None, torch.Tensor | None, dict[str, Any] | None]:
    """The class embedding; or the empty prompt's tokens and the text encoder's fingerprint."""
    if (folder / "text").is_dir():
        empty = load_file(folder / "text" / "tokens.safetensors")["empty"]
        return None, empty, _read_json(folder / "text" / "encoder.json")
    return load_file(folder / "class_embedding" / "model.safetensors")["weight"], None, None


def is_export(index: Mapping[str, Any]) -> bool:
    """Whether the content of a model_index.json is an export's; else it is a pipeline's."""
    return index.get("_class_name") == CLASS_NAME


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
        if (folder / INDEX).exists():
            return folder
        if is_run(folder):
            old = folder / f".old-{EXPORT}"  # a run killed between the two renames of a replacement
            if not (folder / EXPORT).exists() and old.exists():
                return old
            if (folder / EXPORT / INDEX).exists():
                return folder / EXPORT
            if (folder / EXPORT).is_dir():
                raise UserError(
                    f"{folder / EXPORT} is not a whole export: it has no {INDEX}; export it again"
                )
            raise UserError(
                f"the run {folder} has not saved a model yet; it writes {folder / EXPORT} at its first save"
            )
        raise UserError(
            f"{folder} is neither a run folder (config.yaml, checkpoints/) nor an export (model_index.json); "
            "give the folder that train.py wrote, such as runs/digits_dcn"
        )
    if folder.exists():
        raise UserError(f"{folder} is a file; give a run folder, an export folder or a hub id")
    if HUB_ID.fullmatch(str(path)) and not str(path).startswith((".", "runs/")):
        return _download(str(path))
    raise UserError(f"{path} does not exist; give a run folder, an export folder or a hub id (owner/name)")


def is_run(folder: Path) -> bool:
    """Whether `folder` is one of train.py's."""
    return (folder / "config.yaml").exists() or (folder / "checkpoints").is_dir()


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download  # only this way needs it

    def load(local_only: bool) -> str:
        return snapshot_download(
            hub_id, allow_patterns=["*.json", "*.safetensors"], local_files_only=local_only
        )

    try:
        folder = Path(from_hub_or_cache(hub_id, load))
    except Exception as error:  # the hub client has a dozen kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{hub_id} is no folder here, and it could not be had from the hub ({reason}); "
            "check the name and the "
            "network, or give a folder"
        ) from None
    if not (folder / INDEX).exists():
        raise UserError(
            f"the hub repository {hub_id} holds no model_index.json; it is not an export of train.py"
        )
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, Mapping):
        raise ValueError(f"{path.name} holds no JSON object")
    return dict(value)
