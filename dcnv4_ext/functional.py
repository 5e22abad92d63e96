"""The public function of the operator."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import ops as _ops
from .geometry import MOST, Pair, flag, number, pair, whole
from .native import check_dtype


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    check_dtype(name, tensor.dtype)
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"a tensor of layout {tensor.layout}"
        raise TypeError(f"{name} is {kind}; use a dense one")


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
    contribute nothing. What infinite or NaN values and weights reach is not finite; whether it is infinite or NaN depends on the
    order of sums, which differs between kernels and from `dcnv4_reference`.

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
        inputs; sums are kept in fp32 (fp64 for fp64). It can be differentiated once, in reverse mode; asking for more is an
        error. `dcnv4_reference` has derivatives of every kind.

    Raises:
        TypeError: no dense tensor of one of the four dtypes, two dtypes outside autocast, a setting of another type.
        ValueError: a rank, size, device or setting that does not fit, or a tensor whose storage was freed. Either text names
            the argument.
    """
    # Most calls are like one before, with nobody to tell of them: at a tenth of a microsecond a question, this part is kept short.
    # Settings of just these types are equal where they are the same (True is not 1), so that `direct` can look up what it checked.
    if (
        not is_dynamo_compiling()
        and type(groups) is int
        and groups <= MOST
        and type(offset_scale) is float
        and type(remove_center) is type(softmax) is bool
        and _ops.unwatched(value, offset_mask)
    ):
        if not type(kernel_size) is type(stride) is type(padding) is type(dilation) is int:
            kernel_size, stride = pair("kernel_size", kernel_size, 1), pair("stride", stride, 1)
            padding, dilation = pair("padding", padding, 0), pair("dilation", dilation, 1)
        settings = kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, softmax
        return _ops.direct(value, offset_mask, settings)
    _check_tensor("value", value)
    _check_tensor("offset_mask", offset_mask)
    # What torch's dispatcher would refuse with a RuntimeError of its own.
    groups = whole("groups", groups)
    if groups > MOST:
        raise ValueError(f"groups must be at most {MOST}, got {groups}")
    return _ops.forward(
        value,
        offset_mask,
        pair("kernel_size", kernel_size, 1),
        pair("stride", stride, 1),
        pair("padding", padding, 0),
        pair("dilation", dilation, 1),
        groups,
        offset_scale if type(offset_scale) is float else number("offset_scale", offset_scale),
        flag("remove_center", remove_center),
        flag("softmax", softmax),
    )
