"""How the pictures of a report are drawn: the same for all runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ldm_dcn.model import Model

from ..offsets import Position
from .page import NOT_STATED

DEFAULT_LAYERS = 4  # whose offset maps are drawn


@dataclass(frozen=True)
class Drawing:
    """What is asked of every run.

    labels, seeds  rows and columns of a grid; labels are left out for a model without classes
    prompts        instead of labels, for models that take text
    """

    labels: Sequence[int]
    seeds: Sequence[int]
    prompts: Sequence[str]
    text_encoder: str | None
    sampler: str
    steps: int
    guidance: float

    def conditions(self, model: Model) -> torch.Tensor | None:
        """One for each row: labels (R,), tokens (R, T, D), or None for an unconditional model."""
        if model.denoiser.takes_text:
            return model.encode_prompts(self.prompts, self.text_encoder)
        return torch.tensor(self.labels) if model.num_classes else None

    def in_words(self, model: Model) -> str:
        return f"{self.sampler}, {self.steps} steps, guidance {self.guidance:g}, {model.tags.get('weights', NOT_STATED)}"


@dataclass(frozen=True)
class Watching:
    """Which offset maps are drawn."""

    layers: int  # at most so many; all stand in the table
    patterns: Sequence[str]  # regular expressions on their names, instead
    moments: int
    positions: Sequence[Position]
