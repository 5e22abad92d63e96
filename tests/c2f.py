"""The C2f block of YOLOv8 with DCNv4Conv as the second convolution of its bottlenecks, written as that code base has it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dcnv4_ext import DCNv4Conv


class Conv(nn.Module):
    """Convolution, batch normalisation, SiLU, under the names that they have there."""

    def __init__(self, c1: int, c2: int, kernel: int = 1, convolution: type[nn.Module] = nn.Conv2d) -> None:
        super().__init__()
        self.conv = convolution(c1, c2, kernel, 1, kernel // 2, bias=False)
        self.bn, self.act = nn.BatchNorm2d(c2), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


def fuse(model: nn.Module) -> nn.Module:
    """What `model.fuse()` does there, in place; with `fuse_bn` for ours."""
    for block in model.modules():
        if isinstance(block, Conv) and hasattr(block, "bn"):
            ours = isinstance(block.conv, DCNv4Conv)
            block.conv = block.conv.fuse_bn(block.bn) if ours else fuse_conv_bn_eval(block.conv, block.bn)
            del block.bn
            block.forward = block.forward_fuse
    return model


class Bottleneck(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(c, c, 3), Conv(c, c, 3, DCNv4Conv)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class C2f(nn.Module):
    def __init__(self, c1: int, c2: int, n: int) -> None:
        super().__init__()
        self.c = c2 // 2
        self.cv1, self.cv2 = Conv(c1, 2 * self.c), Conv((2 + n) * self.c, c2)
        self.m = nn.ModuleList(Bottleneck(self.c) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            y.append(block(y[-1]))
        return self.cv2(torch.cat(y, 1))
