"""An exported model in one line: `LatentDiffusion.from_pretrained(folder_or_hub_id)`, and calling it draws."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dcnv4_ext.geometry import is_whole

from .device import choose_device
from .errors import UserError
from .export import load_model
from .model import Model
from .pictures import to_pil
from .sampling import check_labels, generate, resolved
from .swap import nearest

MOST = 10**6  # images of one call, which lie in memory together
SETTINGS = [name for name, p in inspect.signature(generate).parameters.items() if p.kind is p.KEYWORD_ONLY]


class LatentDiffusion:
    """Draws images with the averaged weights of a run (`runs/NAME`), an export folder or a hub repository."""

    def __init__(self, model: Model) -> None:
        if not isinstance(model, Model):
            raise UserError(
                f"LatentDiffusion takes a loaded model, not {model!r}; write LatentDiffusion.from_pretrained({str(model)!r})"
            )
        self.model = model

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the training data called the classes, in the order of their numbers. Empty where it had no names, or the export is from
        before they were kept."""
        return self.model.class_names

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
        labels: int | str | Iterable[int | str] | torch.Tensor | None = None,
        prompts: str | Sequence[str] | None = None,
        count: int | None = None,
        seed: int | Sequence[int] = 0,
        **settings: Any,
    ) -> list[Image.Image]:
        """One picture for each label or prompt, or `count` without a condition.

        seed       of the first picture, the next being seed + 1; or a list of one for each
        labels     classes by number or, as texts, by name ("7" is a name too); one alone needs no list, nor does a prompt
        settings   of `ldm_dcn.sampling.generate`: sampler, steps, guidance, guidance_interval and guidance_rescale, by default the
                   run's own (its `sample` section), size, precision, batch_size, progress

        Raises `UserError` for what the model does not know, and for arguments that mean nothing.
        """
        for name in settings.keys() - set(SETTINGS):
            hint = nearest(name, (*SETTINGS, "labels", "prompts", "count", "seed"))
            raise UserError(f"unknown setting {name!r}{hint}; there are {', '.join(SETTINGS)}")
        if [value is None for value in (labels, prompts, count)].count(True) != 2:
            raise UserError("give exactly one of labels, prompts and count")
        if not (is_whole(seed) or (isinstance(seed, (list, tuple, range)) and all(map(is_whole, seed)))):
            raise UserError(
                f"seed {seed!r} is no whole number; give the first picture's seed, 0 or more, or a list of one for each"
            )
        conditions = self._labels(labels) if labels is not None else None
        if prompts is not None:
            conditions = self.model.encode_prompts([prompts] if isinstance(prompts, str) else prompts)
        if count is not None and not (is_whole(count) and 1 <= count <= MOST):
            raise UserError(f"count {count!r}: ask for 1 to {MOST:,} pictures, a whole number")
        number = count if conditions is None else len(conditions)
        seeds = range(seed, seed + number) if is_whole(seed) else seed
        if len(seeds) != number:
            raise UserError(
                f"{number} pictures came with {len(seeds)} seeds; give one for each, or the first one's"
            )
        settings = resolved(self.model, settings)
        images = generate(self.model, conditions, seeds, **settings)
        return [to_pil(image) for image in images]

    def _labels(self, labels: int | str | Iterable[int | str] | torch.Tensor) -> torch.Tensor:
        if self.model.text_encoder is not None:
            raise UserError(f"{self.model.name} takes prompts, not labels; give prompts=[...]")
        if isinstance(labels, str):
            labels = [labels]
        if isinstance(labels, (list, tuple)):
            labels = [self.model.class_named(label) if isinstance(label, str) else label for label in labels]
        return check_labels(self.model, labels)
