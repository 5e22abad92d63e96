"""The network that is trained: a U-Net with the class embedding it is conditioned on."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import nn


class Denoiser(nn.Module):
    """Predicts the noise in latents. A class is one cross-attention token; the last row means "none"."""

    def __init__(self, unet: UNet2DConditionModel, num_classes: int) -> None:
        super().__init__()
        self.unet = unet
        # starts as N(0, 1), as in U-ViT: the scale of the normalised text tokens that this U-Net was made for
        self.class_embedding = nn.Embedding(num_classes + 1, unet.config.cross_attention_dim)

    @property
    def num_classes(self) -> int:
        return self.class_embedding.num_embeddings - 1

    @property
    def null_label(self) -> int:
        return self.num_classes

    @property
    def device(self) -> torch.device:
        return self.class_embedding.weight.device

    def forward(self, latents: torch.Tensor, times: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w) noised latents, (N,) times, (N,) labels -> (N, C, h, w) predicted noise."""
        tokens = self.class_embedding(labels)[:, None]
        return self.unet(latents, times, encoder_hidden_states=tokens, return_dict=False)[0]
