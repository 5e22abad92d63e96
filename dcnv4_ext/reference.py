"""The oracle: DCNv4 in plain torch, written to be read. Tests compare kernels with it; product code never imports it.

`torch.nn.functional.grid_sample` is no oracle for this operator: its normalised coordinates move integer positions into
another cell at map sizes that are no power of two, and a NaN position spreads instead of contributing nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import Geometry, Pair, pair


def dcnv4_reference(
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
    """Compute what `dcnv4` computes, in the dtype of the inputs, differentiable to any order.

    Memory grows with N * Ho * Wo * K * C; use it for tests and small maps.
    """
    geometry = Geometry.of(
        pair("kernel_size", kernel_size, 1), pair("stride", stride, 1), pair("padding", padding, 0),
        pair("dilation", dilation, 1), remove_center,
    )  # fmt: skip
    n, h, w, c = value.shape
    g, d, k = groups, c // groups, geometry.taps
    ho, wo = geometry.output_size(h, w)
    (kernel_h, kernel_w), (dilation_h, dilation_w) = geometry.kernel_size, geometry.dilation
    (stride_h, stride_w), (pad_h, pad_w) = geometry.stride, geometry.padding
    center_x, center_y = dilation_w * (kernel_w - 1) // 2, dilation_h * (kernel_h - 1) // 2

    columns = offset_mask[..., : 3 * g * k].reshape(n, ho, wo, g, 3 * k)
    offsets = columns[..., : 2 * k].reshape(n, ho, wo, g, k, 2)
    weights = columns[..., 2 * k :]
    if softmax:
        weights = weights.softmax(-1)

    taps = [
        (i * dilation_w - center_x, j * dilation_h - center_y)
        for i in range(kernel_w)
        for j in range(kernel_h)
        if not (remove_center and (i, j) == (kernel_w // 2, kernel_h // 2))
    ]
    grid_x = value.new_tensor([tap[0] for tap in taps])
    grid_y = value.new_tensor([tap[1] for tap in taps])
    base_x = torch.arange(wo, device=value.device, dtype=value.dtype) * stride_w - pad_w + center_x
    base_y = torch.arange(ho, device=value.device, dtype=value.dtype) * stride_h - pad_h + center_y
    x = base_x[None, None, :, None, None] + (grid_x + offsets[..., 0]) * offset_scale  # (N, Ho, Wo, G, K)
    y = base_y[None, :, None, None, None] + (grid_y + offsets[..., 1]) * offset_scale

    used = (x > -1) & (y > -1) & (x < w) & (y < h)  # False for NaN
    x, y = torch.where(used, x, 0), torch.where(used, y, 0)
    weights = torch.where(used, weights, 0)
    x0, y0 = x.detach().floor(), y.detach().floor()
    lx, ly = x - x0, y - y0

    cells = value.reshape(n, h * w, g, d)
    image = torch.arange(n, device=value.device)[:, None, None, None, None]
    group = torch.arange(g, device=value.device)[None, None, None, :, None]
    output = value.new_zeros(n, ho, wo, g, d)
    for corner_y, weight_y in ((y0, 1 - ly), (y0 + 1, ly)):
        for corner_x, weight_x in ((x0, 1 - lx), (x0 + 1, lx)):
            inside = used & (corner_x >= 0) & (corner_x < w) & (corner_y >= 0) & (corner_y < h)
            index = torch.where(inside, corner_y * w + corner_x, 0).long()
            corner = torch.where(inside[..., None], cells[image, index, group], 0)  # (N, Ho, Wo, G, K, D)
            weight = torch.where(inside, weights * weight_y * weight_x, 0)
            output = output + (weight[..., None] * corner).sum(-2)
    return output.reshape(n, ho, wo, c)
