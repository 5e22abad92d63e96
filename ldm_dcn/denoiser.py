"""The network that is trained: a U-Net, and what it is conditioned on, as cross-attention tokens."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from .errors import UserError


class Denoiser(nn.Module):
    """Predicts what its schedule says, from noised latents, times and a condition.

    num_classes   a class is one learned token; the last row of the embedding means "none"
    empty_tokens  (T, D): conditions are text embeddings of that shape, and this is the empty prompt's, which means "none"
    """

    def __init__(
        self, unet: UNet2DConditionModel, num_classes: int = 0, empty_tokens: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.unet = unet
        width = unet.config.cross_attention_dim
        self.num_classes = num_classes
        self.class_embedding: nn.Embedding | None = None
        self.empty_tokens: torch.Tensor | None
        self.register_buffer("empty_tokens", empty_tokens, persistent=False)
        if empty_tokens is None:
            # starts as N(0, 1), as in U-ViT: the scale of the normalised text tokens that this U-Net was made for
            self.class_embedding = nn.Embedding(num_classes + 1, width)
        elif empty_tokens.shape[1] != width:
            raise UserError(
                f"the text encoder's tokens have {empty_tokens.shape[1]} channels, the U-Net's cross-attention takes {width}; "
                f"set model.unet.cross_attention_dim={empty_tokens.shape[1]}, or use another text encoder"
            )

    @property
    def takes_text(self) -> bool:
        return self.empty_tokens is not None

    @property
    def is_conditional(self) -> bool:
        return self.takes_text or self.num_classes > 0

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def null_condition(self, count: int) -> torch.Tensor:
        """`count` times "none": labels (N,) int64 or tokens (N, T, D)."""
        if self.empty_tokens is not None:
            return self.empty_tokens.expand(count, -1, -1)
        return torch.full((count,), self.num_classes, device=self.device)

    def forward(self, latents: torch.Tensor, times: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w) noised latents, (N,) times, labels (N,) or tokens (N, T, D) -> (N, C, h, w)."""
        return self.denoise(latents, times, self.tokens(condition))

    def tokens(self, condition: torch.Tensor) -> torch.Tensor:
        """What cross-attention reads of labels (N,) or tokens (N, T, D): (N, T, D), of labels with T = 1."""
        return condition if self.class_embedding is None else self.class_embedding(condition)[:, None]

    def denoise(self, latents: torch.Tensor, times: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.unet(latents, times, encoder_hidden_states=tokens, return_dict=False)[0]
