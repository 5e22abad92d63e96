"""Small classifiers of small images, as feature extractors."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from .features import FeatureExtractor

DIGITS_FILE = Path(__file__).parent / "assets" / "digits_classifier.safetensors"


class SmallClassifier(FeatureExtractor):
    """A convolutional classifier of small images. Any other size is resized; colour is averaged where it takes grey.

    Features are the last 64 activations, after their non-linearity, as the Inception's of FID are.
    """

    num_features = 64
    names_classes = True
    fingerprint = "untrained"

    def __init__(self, name: str, channels: int, side: int, num_classes: int) -> None:
        super().__init__()
        self.name, self.channels, self.side, self.num_classes = name, channels, side, num_classes
        self.resize = f"area or bilinear to {side}x{side}"
        widths = (channels, 16, 32, 64)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(widths)
        )
        self.project = nn.Linear(widths[-1] * (side // 8) ** 2, self.num_features)
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(self.prepare(images))

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 (N, c, H, W) to float32 (N, channels, side, side) in [-1, 1]."""
        x = images.to(self.project.weight.dtype)
        if x.shape[1] != self.channels:
            x = x.mean(dim=1, keepdim=True).expand(-1, self.channels, -1, -1)
        x = x / 127.5 - 1
        if x.shape[-2:] != (self.side, self.side):
            shrink = min(x.shape[-2:]) > self.side
            x = F.interpolate(x, (self.side, self.side), mode="area" if shrink else "bilinear")
        return x

    def features(self, x: Tensor) -> Tensor:
        """(N, channels, side, side) in [-1, 1] to (N, 64), not negative."""
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        return F.relu(self.project(x.flatten(1)))

    def logits(self, features: Tensor) -> Tensor:
        return self.head(features.to(self.head.weight.dtype))

    def about(self) -> dict[str, str] | None:
        """What a file of these weights says of their network."""
        return {key: str(getattr(self, key)) for key in ("name", "channels", "side", "num_classes")}

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in self.state_dict().items()}, path, self.about()
        )
        path.chmod(0o644)  # safetensors writes for the owner only, and a wheel would keep that


class DigitsClassifier(SmallClassifier):
    """Of 32x32 grey digits, "digits-v1". Made by `python -m eval.make_digits_classifier`."""

    knows = ("digits", tuple("0123456789"))

    def __init__(self) -> None:
        super().__init__("digits-v1", channels=1, side=32, num_classes=10)

    def about(self) -> None:
        """Nothing: the shipped file is known by its bytes."""
