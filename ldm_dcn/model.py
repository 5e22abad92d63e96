"""A model for use: all that drawing images takes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from dcnv4_ext.geometry import is_whole

from .autoencoder import Autoencoder
from .denoiser import Denoiser
from .diffusion import Schedule
from .errors import UserError, shown
from .text import TextEncoder, load_text_encoder

MOST_ALIKE = 3  # names of classes in an error
LARGEST_SIDE = 2**14  # pixels, as of data.image_size


@dataclass
class Model:
    """All that drawing images takes (`ldm_dcn.sampling.generate`).

    latent_shape    (C, h, w)
    config          the run's resolved settings, as plain values
    tags            what must stand beside every number measured with this model
    text_encoder    fingerprint of the text encoder of a model that takes text
    class_names     what its data called the classes, in the order of their numbers; fewer where it named the first alone, or none
    between_batches called by `generate`; what it raises ends the drawing
    """

    denoiser: Denoiser
    autoencoder: Autoencoder
    schedule: Schedule
    latent_shape: tuple[int, int, int]
    name: str
    step: int
    config: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, Any] = field(default_factory=dict)
    text_encoder: dict[str, Any] | None = None
    class_names: tuple[str, ...] = ()
    between_batches: Callable[[], object] | None = field(default=None, repr=False)
    _encoder: TextEncoder | None = field(default=None, repr=False)

    @property
    def unet(self) -> UNet2DConditionModel:
        return self.denoiser.unet

    @property
    def num_classes(self) -> int:
        return self.denoiser.num_classes

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images it learned from."""
        _, height, width = self.latent_shape
        return height * self.autoencoder.factor, width * self.autoencoder.factor

    def latent_shape_at(self, size: Sequence[int] | None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of images of `size`, (height, width) in pixels; None is the size it was trained at.

        Raises `UserError` for a size that autoencoder and U-Net cannot halve as often as they do.
        """
        if size is None:
            return self.latent_shape
        if not isinstance(size, (tuple, list)) or len(size) != 2 or not all(map(_is_side, size)):
            raise UserError(
                f"size {size!r}: give height and width in pixels, such as (320, 256), {LARGEST_SIDE} at most"
            )
        size = (int(size[0]), int(size[1]))
        if size == self.image_size:  # which need not be a multiple
            return self.latent_shape
        factor, halvings = self.autoencoder.factor, self.unet.num_upsamplers
        unit = factor * 2**halvings
        if any(side % unit for side in size):
            near = "x".join(str(max(1, round(side / unit)) * unit) for side in size)
            raise UserError(
                f"size {size[0]}x{size[1]}: {self.name} draws multiples of {unit} pixels, {factor} of the autoencoder times "
                f"{2**halvings} of the U-Net; give such as {near}"
            )
        return self.latent_shape[0], size[0] // factor, size[1] // factor

    def class_named(self, name: str) -> int:
        """The number of the class of that name. Raises `UserError` where several have it, and with the names that are like it where
        none has."""
        if not self.num_classes:
            raise UserError(
                f"label {shown(name)} does not exist: {self.name} knows no classes (leave the labels out)"
            )
        if numbers := [number for number, own in enumerate(self.class_names) if own == name]:
            if len(numbers) > 1:
                raise UserError(
                    f"label {shown(name)} is the name of {len(numbers)} classes of {self.name}; give the number, one of "
                    f"{', '.join(map(str, numbers))}"
                )
            return numbers[0]
        if not self.class_names:
            raise UserError(
                f"label {shown(name)} is no number and no range, and {self.name} knows no names of its classes; write such as 3 or 0-9"
            )
        holding = [own for own in self.class_names if name and name.lower() in own.lower()]
        lowered = {own.lower(): own for own in reversed(self.class_names)}
        alike = [lowered[own] for own in difflib.get_close_matches(name.lower(), lowered)]
        if near := list(dict.fromkeys([*alike, *holding]))[:MOST_ALIKE]:
            hint = f"did you mean {' or '.join(map(repr, near))}?"
        else:
            hint = f"names are such as {', '.join(map(repr, self.class_names[:MOST_ALIKE]))}"
        raise UserError(
            f"label {shown(name)} is no number, no range and no name of a class of {self.name}; {hint}"
        )

    def encode_prompts(self, prompts: Sequence[str], spec: str | None = None) -> torch.Tensor:
        """(len(prompts), T, D) tokens for `generate`; `spec` says where the text encoder lies on this machine."""
        if self.text_encoder is None:
            raise UserError(f"{self.name} takes no prompts; it knows {self.num_classes} classes")
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise UserError(f"prompts are {prompts!r}; give texts in a list")
        prompts = list(prompts)
        for prompt in prompts:
            if not isinstance(prompt, str) or not _is_unicode(prompt):
                raise UserError(f"prompt {prompt!r} is no text; give a string")
        if self._encoder is None:
            self._encoder = load_text_encoder(spec or self.text_encoder["spec"], device=self.denoiser.device)
            self._encoder.check(self.text_encoder)
        return self._encoder.encode(prompts)


def _is_side(value: object) -> bool:
    return is_whole(value) and 1 <= value <= LARGEST_SIDE


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half a character, as of a file name that is no UTF-8
        return False
    return True
