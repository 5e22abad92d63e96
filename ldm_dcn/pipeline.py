"""An exported model in one line: `LatentDiffusion.from_pretrained(folder_or_hub_id)`, and calling it draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .device import choose_device
from .errors import UserError
from .export import Model, load_model
from .pictures import to_pil
from .sampling import generate


class LatentDiffusion:
    """Draws images with the averaged weights of a run (`runs/NAME`), an export folder or a hub repository."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: torch.device | str | None = None, autoencoder: str | None = None
    ) -> LatentDiffusion:
        """Load what train.py exported. `device` None takes a GPU where there is one; `autoencoder` says where that lies on
        this machine, when not where the run had it. Raises `UserError` for what is no such model, or damaged."""
        return cls(load_model(path, device=choose_device(device), autoencoder=autoencoder))

    def __call__(
        self,
        *,
        labels: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
        count: int | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> list[Image.Image]:
        """One picture for each label or prompt, from the seeds seed, seed + 1, ...; or `count` without a condition.

        settings   of `ldm_dcn.sampling.generate`: sampler, steps, guidance, guidance_interval, batch_size, progress
        """
        if [labels, prompts, count].count(None) != 2:
            raise UserError("give exactly one of labels, prompts and count")
        conditions = labels if prompts is None else self.model.encode_prompts(prompts)
        number = count if conditions is None else len(conditions)
        images = generate(self.model, conditions, range(seed, seed + number), **settings)
        return [to_pil(image) for image in images]
