"""The public function of the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops as _ops  # noqa: F401  registers torch.ops.dcnv4_ext
from .geometry import Pair, pair

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dcnv4(
    value: Tensor,  # (N, H, W, C)
    offset_mask: Tensor,  # (N, Ho, Wo, P)
    *,
    groups: int,
    kernel_size: Pair = 3,
    stride: Pair = 1,
    padding: Pair = 1,
    dilation: Pair = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> Tensor:  # (N, Ho, Wo, C)
    """Aggregate `value` at learned positions with learned weights: DCNv4 (Xiong et al., 2024, arXiv:2401.06197, eq. 1).

    For the output position (ho, wo) and the tap (i, j), column index i outer and row index j inner, with
    cx = dilation_w * (Kw - 1) // 2, cy = dilation_h * (Kh - 1) // 2::

        x = wo * stride_w - pad_w + cx + (i * dilation_w - cx + dx) * offset_scale
        y = ho * stride_h - pad_h + cy + (j * dilation_h - cy + dy) * offset_scale
        output[n, ho, wo, g, :] = sum_k weight_k * bilinear(value[n, :, :, g, :], y, x)

    A corner outside the map counts as zero, and a tap counts where -1 < x < W and -1 < y < H: NaN and infinite offsets
    contribute nothing.

    Args:
        value: features, channels last, C = groups * D for any D >= 1. fp32, fp64, bf16 or fp16.
        offset_mask: offsets (pixels, before `offset_scale`) and weights at the output resolution, P >= 3 * groups * K. Group g
            owns channels [3 K g, 3 K (g + 1)): K pairs (dx, dy), then K weights. Channels past 3 * groups * K are padding.
        groups: G, the number of channel groups that share offsets.
        kernel_size, stride, padding, dilation: int or (h, w). K = Kh * Kw, less one with `remove_center`.
        offset_scale: factor on the grid and the offsets about the kernel's centre.
        remove_center: leave out the tap (Kw // 2, Kh // 2); needs odd Kh and Kw.
        softmax: normalise the K weights of a group (DCNv3's rule). DCNv4 leaves them unbounded.

    Returns:
        (N, Ho, Wo, C) with Ho = (H + 2 pad_h - (dilation_h * (Kh - 1) + 1)) // stride_h + 1, Wo alike, in the dtype of the
        inputs; sums are kept in fp32 (fp64 for fp64).

    Raises:
        TypeError: a dtype that is no floating dtype of the four, or two dtypes outside autocast.
        ValueError: a rank, size or device that does not fit; the text names the argument.
    """
    for name, tensor in (("value", value), ("offset_mask", offset_mask)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}; use float32, float64, bfloat16 or float16")
    return torch.ops.dcnv4_ext.forward(
        value,
        offset_mask,
        pair("kernel_size", kernel_size, 1),
        pair("stride", stride, 1),
        pair("padding", padding, 0),
        pair("dilation", dilation, 1),
        groups,
        float(offset_scale),
        bool(remove_center),
        bool(softmax),
    )
