"""The Inception v3 of the Frechet Inception Distance, 2048 features, from its well-known weights file.

The network of 2015-12-05 as TensorFlow ran it, which differs from torchvision's: average pooling leaves the padding out of its
count, the last block pools by maximum, there are 1008 classes, and images come to 299x299 by TensorFlow 1's bilinear rule.
Sources: Szegedy et al. 2015 (arXiv 1512.00567) for the blocks; pytorch-fid and torch-fidelity for the differences and names.

The file is `weights-inception-2015-12-05-6726825d.pth` (torch-fidelity) or `pt_inception-2015-12-05-6726825d.pth` (pytorch-fid):
the same bytes under two names. `tests/peers/inception_equality.py` compares the network with torch-fidelity's.

pytorch-fid, and U-ViT's protocol with it, brings images to the network by torch's rule and range instead: `Inception(by_torch=True)`.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_dcn.errors import UserError, one_line
from ldm_dcn.files import hash_file

from .features import FeatureExtractor

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIDE = 299
SPATIAL_CHANNELS = 7  # of 192, so that sFID has about as many features as FID (Nash et al. 2021, section 5)
SPATIAL_SIDE = 17


class Inception(FeatureExtractor):
    """uint8 (N, 1 or 3, H, W) to (N, 2048), the activations after global average pooling. Grey is repeated to RGB.

    Its spatial features, (N, 17 * 17 * 7), are the first seven channels of the 1x1 branch of Mixed_6d after its ReLU, channels
    fastest: ADM's `mixed_6/conv:0`, whose blocks count from `mixed` = Mixed_5b, laid out as TensorFlow lays it out.
    """

    name = "inception-2015-12-05"
    num_features = 2048
    num_spatial = SPATIAL_SIDE**2 * SPATIAL_CHANNELS
    at_once = 32  # 299x299 maps of a larger batch would take GBs

    def __init__(self, by_torch: bool = False) -> None:
        super().__init__()
        self.by_torch = by_torch
        self.resize = "torch bilinear to 299x299" if by_torch else "TF1 bilinear to 299x299"
        self.fingerprint = "untrained"
        self.Conv2d_1a_3x3 = _Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = _Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = _Unit(80, 192, 3)
        self.Mixed_5b = _BlockA(192, 32)
        self.Mixed_5c = _BlockA(256, 64)
        self.Mixed_5d = _BlockA(288, 64)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b = _BlockC(768, 128)
        self.Mixed_6c = _BlockC(768, 160)
        self.Mixed_6d = _BlockC(768, 160)
        self.Mixed_6e = _BlockC(768, 192)
        self.Mixed_7a = _BlockD(768)
        self.Mixed_7b = _BlockE(1280, _average_pool)
        self.Mixed_7c = _BlockE(2048, _maximum_pool)
        self.fc = nn.Linear(2048, 1008)

    @property
    def is_standard(self) -> bool:
        return self.fingerprint == SHA256[:16]

    def forward(self, images: Tensor) -> Tensor:
        return self.with_spatial(images)[0]

    def with_spatial(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.dtype != torch.uint8 or images.shape[1] not in (1, 3):
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; give uint8 (N, 1 or 3, H, W)")
        parts = [self._features(part) for part in images.split(self.at_once)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def logits(self, features: Tensor) -> Tensor:
        """(N, 1008), without the bias: TensorFlow's Inception score left it out, and so do ADM's and torch-fidelity's."""
        return F.linear(features, self.fc.weight.to(features.dtype))

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.to(self.fc.weight.dtype).expand(-1, 3, -1, -1)
        if self.by_torch:
            x = 2 * F.interpolate(x / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False) - 1
        else:
            x = (tf1_bilinear(x, SIDE) - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3)), spatial


def load_inception(path: str | os.PathLike[str], sha256: str = SHA256, by_torch: bool = False) -> Inception:
    """The network with the weights of file `path`, whose sha256 must be `sha256` or start with it.

    Raises `UserError` for a file that is missing, damaged or another one; it is read as data only.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise UserError(
            f"extractor inception:{path}: no such file; give weights-inception-2015-12-05-6726825d.pth (from "
            "torch-fidelity's or pytorch-fid's releases)"
        )
    digest = hash_file(path)
    if not digest.startswith(sha256):
        raise UserError(
            f"{path} is not the FID Inception: its sha256 starts with {digest[:8]}, not {sha256[:8]}; "
            "download weights-inception-2015-12-05-6726825d.pth again"
        )
    network = Inception(by_torch)
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise UserError(
            f"{path} cannot be loaded as the FID Inception ({one_line(error)}); "
            "download weights-inception-2015-12-05-6726825d.pth again"
        ) from error
    network.fingerprint = digest[:16]
    return network.eval()


def tf1_bilinear(x: Tensor, side: int) -> Tensor:
    """(N, C, H, W) to (N, C, side, side) as TensorFlow 1's resize_bilinear: output i samples input i * H / side, no half pixel."""
    rows, row_share = _tf1_positions(x.shape[2], side, x)
    columns, column_share = _tf1_positions(x.shape[3], side, x)
    below, right = (rows + 1).clamp(max=x.shape[2] - 1), (columns + 1).clamp(max=x.shape[3] - 1)
    x = torch.lerp(x[:, :, rows], x[:, :, below], row_share[:, None])
    return torch.lerp(x[..., columns], x[..., right], column_share)


def _tf1_positions(size: int, side: int, like: Tensor) -> tuple[Tensor, Tensor]:
    position = torch.arange(side, device=like.device, dtype=like.dtype) * (size / side)
    lower = position.floor()
    return lower.long(), position - lower


def _average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


class _Unit(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1,
                 padding: int | tuple[int, int] = 0) -> None:  # fmt: skip
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _BlockA(nn.Module):
    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Unit(inputs, 64, 1)
        self.branch5x5_1 = _Unit(inputs, 48, 1)
        self.branch5x5_2 = _Unit(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Unit(inputs, 64, 1)
        self.branch3x3dbl_2 = _Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Unit(96, 96, 3, padding=1)
        self.branch_pool = _Unit(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average_pool(x))], 1)


class _BlockB(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Unit(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Unit(inputs, 64, 1)
        self.branch3x3dbl_2 = _Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Unit(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, 3, stride=2)], 1)


class _BlockC(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        across, down = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = _Unit(inputs, 192, 1)
        self.branch7x7_1 = _Unit(inputs, width, 1)
        self.branch7x7_2 = _Unit(width, width, **across)
        self.branch7x7_3 = _Unit(width, 192, **down)
        self.branch7x7dbl_1 = _Unit(inputs, width, 1)
        self.branch7x7dbl_2 = _Unit(width, width, **down)
        self.branch7x7dbl_3 = _Unit(width, width, **across)
        self.branch7x7dbl_4 = _Unit(width, width, **down)
        self.branch7x7dbl_5 = _Unit(width, 192, **across)
        self.branch_pool = _Unit(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average_pool(x))], 1)


class _BlockD(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Unit(inputs, 192, 1)
        self.branch3x3_2 = _Unit(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Unit(inputs, 192, 1)
        self.branch7x7x3_2 = _Unit(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Unit(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Unit(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], 1)


class _BlockE(nn.Module):
    def __init__(self, inputs: int, pool) -> None:
        super().__init__()
        across, down = {"kernel": (1, 3), "padding": (0, 1)}, {"kernel": (3, 1), "padding": (1, 0)}
        self.branch1x1 = _Unit(inputs, 320, 1)
        self.branch3x3_1 = _Unit(inputs, 384, 1)
        self.branch3x3_2a = _Unit(384, 384, **across)
        self.branch3x3_2b = _Unit(384, 384, **down)
        self.branch3x3dbl_1 = _Unit(inputs, 448, 1)
        self.branch3x3dbl_2 = _Unit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Unit(384, 384, **across)
        self.branch3x3dbl_3b = _Unit(384, 384, **down)
        self.branch_pool = _Unit(inputs, 192, 1)
        self._pool = pool

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three),
                          self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(self._pool(x))], 1)  # fmt: skip
