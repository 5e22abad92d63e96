"""Models that stay on disk until their images are drawn: of the exports that are scored or reported together one at a time is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ldm_dcn.autoencoder import Autoencoder
from ldm_dcn.compiling import compile_unet
from ldm_dcn.diffusion import Schedule
from ldm_dcn.errors import UserError
from ldm_dcn.export import Export, load_autoencoder_of, load_denoiser, read_export
from ldm_dcn.folders import MANIFEST
from ldm_dcn.model import Model


class StoredModels:
    """The models of exports, of which one at a time is on `device`: loading one lets go of the one before.

    compile_mode   of `compile_unet`; None leaves them as they are
    """

    def __init__(self, device: torch.device | str, compile_mode: str | None = None) -> None:
        self._device, self._compile_mode = device, compile_mode
        self._autoencoders: dict[tuple[str, ...], Autoencoder] = {}  # the exports of a run share theirs
        self._at: StoredModel | None = None
        self._model: Model | None = None

    def open(self, path: str, autoencoder: str | None = None) -> StoredModel:
        """The model of a run folder, an export folder or a hub id; `autoencoder` as of `load_model`.

        Raises `UserError` for all that `load_model` does.
        """
        export = read_export(path)
        if not (export.folder / MANIFEST).exists():
            load_denoiser(export, "cpu")  # else nothing says that the weights are whole
        facts = (*sorted(export.autoencoder["fingerprint"].items()), export.latent_shape[0])
        key = (autoencoder or export.autoencoder["spec"], *map(str, facts))
        if key not in self._autoencoders:
            self._autoencoders[key] = load_autoencoder_of(export, self._device, autoencoder)
        return StoredModel(export, self._autoencoders[key], self)

    def load(self, stored: StoredModel) -> Model:
        """The model itself. Raises `UserError` where the export has been replaced since it was opened."""
        if self._at is not stored:
            self.release()  # before the next one takes its room
            export = read_export(stored.export.folder)
            if export.run != stored.export.run:
                raise UserError(
                    f"{export.folder} was written again while others were drawn (step {stored.step}, now {export.run['step']}); "
                    "give an export that stays, such as one of train.export_every"
                )
            self._model = export.model(load_denoiser(export, self._device), stored.autoencoder)
            if self._compile_mode:
                compile_unet(self._model.denoiser.unet, self._compile_mode)
            self._at = stored
        return self._model

    def release(self) -> None:
        """Let go of the model that was loaded last."""
        self._at = self._model = None
        if self._compile_mode:  # which counts what it compiled, and gives up after some
            torch.compiler.reset()


@dataclass(frozen=True, eq=False)
class StoredModel:
    """What the small files of an export tell of its model, under the names of `Model`."""

    export: Export
    autoencoder: Autoencoder
    _among: StoredModels

    def load(self) -> Model:
        """The model itself, until another one is loaded."""
        return self._among.load(self)

    @property
    def name(self) -> str:
        return self.export.run["name"]

    @property
    def step(self) -> int:
        return self.export.run["step"]

    @property
    def config(self) -> dict[str, Any]:
        return self.export.run["config"]

    @property
    def tags(self) -> dict[str, Any]:
        return self.export.run["tags"]

    @property
    def schedule(self) -> Schedule:
        return self.export.schedule

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.export.latent_shape

    @property
    def num_classes(self) -> int:
        return self.export.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.export.class_names

    @property
    def text_encoder(self) -> dict[str, Any] | None:
        return self.export.text_encoder
