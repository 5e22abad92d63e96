"""DCNv4 where a diffusers U-Net has a self-attention: a mixer that takes and returns its tensors.

(Where it has a convolution, `dcnv4_ext.DCNv4Conv` fits as it is.) This is the only file of the package that goes between
NCHW (torch, diffusers) and NHWC (`dcnv4_ext`). A tensor in torch's channels_last memory format already lies in memory as
NHWC: for it both ways are free, other strides and no copy.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dcnv4_ext import DCNv4

# The keyword by which a spatial transformer tells its attentions the height and width of their tokens' map.
SHAPE_KEYWORD = "spatial_shape"


def to_nhwc(x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, H, W, C)
    """Contiguous NHWC. Free for channels_last; else one copy, where DCNv4's projections would make two."""
    return x.permute(0, 2, 3, 1).contiguous()


def to_nchw(x: Tensor) -> Tensor:  # (N, H, W, C) -> (N, C, H, W)
    """NCHW in channels_last memory format. Always free."""
    return x.permute(0, 3, 1, 2)


class DCNv4Mixer(nn.Module):
    """DCNv4 where a diffusers self-attention was: the same call, the same shape out as in.

    Maps, as `UNet2DModel` passes them, are (N, C, H, W); the norm, the residual and the scale around the
    mixing are those of the attention replaced. Tokens, as a spatial transformer passes them, are (N, H W, C),
    and `spatial_shape=(H, W)` must come with them: H W alone does not tell a 16x4 map from an 8x8 one.
    `announce_shape`, a hook on the transformer, sees to it.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        group_norm: nn.Module | None = None,
        residual_connection: bool = False,
        rescale_output_factor: float = 1.0,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.group_norm = group_norm  # the attention's own: its name and its trained weights stay
        self.dcn = DCNv4(channels, out_channels=out_channels, **options)
        self.dropout = nn.Dropout(dropout)
        self.residual_connection = residual_connection
        self.rescale_output_factor = rescale_output_factor

    def forward(
        self,
        hidden_states: Tensor,  # (N, C, H, W) or (N, H W, C)
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        spatial_shape: tuple[int, int] | None = None,
        # The rest of diffusers' cross_attention_kwargs: settings of attention processors; here is none.
        **processor_options: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            raise ValueError("DCNv4 mixes a map with itself, and takes no encoder_hidden_states")
        if attention_mask is not None:
            raise ValueError("DCNv4 takes no attention mask: call without one, or do not swap self_attention")
        if hidden_states.ndim == 4:
            mixed = hidden_states if self.group_norm is None else self.group_norm(hidden_states)
            mixed = to_nchw(self.dcn(to_nhwc(mixed)))
        elif spatial_shape is None:
            raise ValueError(
                f"tokens of shape {tuple(hidden_states.shape)} came without spatial_shape=(H, W); "
                "call the whole spatial transformer"
            )
        else:
            mixed = self.dcn(hidden_states, spatial_shape)
        mixed = self.dropout(mixed)
        if self.residual_connection:
            mixed = mixed + hidden_states
        return mixed if self.rescale_output_factor == 1 else mixed / self.rescale_output_factor


def announce_shape(
    transformer: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of a spatial transformer: pass the map's (H, W) down to its attentions, as a keyword.

    It travels as an argument and is stored nowhere. So it is right when gradient checkpointing calls a block
    again after other maps went through, and `torch.compile` sees no side effect.
    """
    height, width = (args[0] if args else kwargs["hidden_states"]).shape[-2:]  # (N, C, H, W)
    keywords = {**(kwargs.get("cross_attention_kwargs") or {}), SHAPE_KEYWORD: (height, width)}
    return args, {**kwargs, "cross_attention_kwargs": keywords}


def drop_shape(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of the attentions left there: diffusers warns of keywords unknown to a processor."""
    return args, {key: value for key, value in kwargs.items() if key != SHAPE_KEYWORD}
