"""Feature extractors: uint8 images to the vectors that Frechet and kernel distances compare.

    digits                        the shipped classifier of handwritten digits, 64 features
    classifier:FILE               a classifier that `eval.make_photographs_classifier` wrote, 64 features
    inception:WEIGHTS             the standard FID Inception, 2048 features, from its well-known weights file
    import:PACKAGE.MODULE:FACTORY what FACTORY() returns: a module, or a callable, from uint8 (N, c, H, W) to (N, d)
    torchscript:FILE              a TorchScript module, the same contract

Distances compare within one extractor only, so each carries a name and a fingerprint of its weights.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm_dcn.errors import UserError

DIGITS_FILE = Path(__file__).parent / "assets" / "digits_classifier.safetensors"
KINDS = "digits, classifier:FILE, inception:WEIGHTS, import:PACKAGE.MODULE:FACTORY or torchscript:FILE"


class FeatureExtractor(nn.Module):
    """Images uint8 (N, c, H, W) to features (N, num_features).

    name           what a distance in this space is called: "FD-" + name, or "FID" for the standard Inception alone
    fingerprint    sha256 of the weights, first 16 hex digits, or "unknown"
    resize         how images come to the network's size, in words
    num_spatial    values of the spatial features, for sFID; 0 where there are none
    names_classes  whether logit k means class k of the data that it is used on
    knows          what data it learned from, by its name, and the names of its classes; None where it does not say
    at_once        images in one pass
    """

    name: str
    num_features: int
    fingerprint: str
    resize: str = "none"
    num_spatial: int = 0
    names_classes: bool = False
    knows: tuple[str, tuple[str, ...]] | None = None
    at_once: int = 64

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stays in evaluation mode: torchmetrics' `metric.train()` would turn an extractor over otherwise."""
        return super().train(False)

    def with_spatial(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (N, num_features) and, where there are any, spatial features (N, num_spatial) from one pass."""
        return self(images), None

    def logits(self, features: Tensor) -> Tensor | None:
        """Class logits (N, classes) from features, where the extractor is a classifier."""
        return None

    @property
    def is_standard(self) -> bool:
        """Whether distances have the names of the literature: FID, sFID, KID."""
        return False

    def named(self, metric: str) -> str:
        """What `metric` ("FID", "sFID", "KID", "IS") is called in this space: "FD-digits-v1" unless it is the standard one."""
        return metric if self.is_standard else f"{metric.replace('FID', 'FD')}-{self.name}"


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


class ForeignExtractor(FeatureExtractor):
    """Any module or callable from uint8 (N, c, H, W) to (N, d)."""

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        name: str,
        fingerprint: str,
        num_features: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.name = name
        self.fingerprint = fingerprint
        self.resize = str(getattr(network, "resize", "by the extractor"))
        known = num_features if num_features is not None else getattr(network, "num_features", None)
        self.num_features = int(known) if known is not None else 0  # 0: known after the first batch

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        features = self.network(images)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            got = (
                f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
            )
            raise UserError(
                f"extractor {self.name} gave {got} for {len(images)} images; "
                "it must return a tensor (N, features)"
            )
        self.num_features = features.shape[1]
        return features


def load_extractor(spec: str, device: str | torch.device = "cpu") -> FeatureExtractor:
    """Load the extractor that `spec` names (see the top of this file).

    `import:` runs the user's own code, and so does a TorchScript file; weights files are read as data only.
    Raises `UserError` naming what could not be had.
    """
    kind, _, rest = spec.partition(":")
    if spec == "digits":
        extractor = _load_digits(DIGITS_FILE)
    elif kind == "classifier" and rest:
        extractor = _load_classifier(rest)
    elif kind == "inception" and rest:
        from .inception import load_inception

        extractor = load_inception(rest)
    elif kind == "import" and rest.count(":") == 1:
        extractor = _load_import(*rest.split(":"))
    elif kind == "torchscript" and rest:
        extractor = _load_torchscript(rest)
    else:
        raise UserError(f"extractor {spec!r} is unknown; use {KINDS}")
    return extractor.requires_grad_(False).eval().to(device)


def hash_file(path: str | os.PathLike[str]) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )


def _load_digits(path: Path) -> DigitsClassifier:
    extractor = DigitsClassifier()
    try:
        weights = load_file(path)
        extractor.load_state_dict(
            {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
        )
    except Exception as error:
        raise UserError(
            f"{path} cannot be read ({' '.join(str(error).split())[:160]}); make it again with "
            "python -m eval.make_digits_classifier"
        ) from error
    extractor.fingerprint = hash_file(path)[:16]
    return extractor


def _load_classifier(path: str) -> SmallClassifier:
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
        sizes = {key: int(said[key]) for key in ("channels", "side", "num_classes")}
        extractor = SmallClassifier(said["name"], **sizes)
        extractor.load_state_dict(load_file(path))
    except Exception as error:
        raise UserError(
            f"extractor classifier:{path} cannot be read ({' '.join(str(error).split())[:160]}); make it with "
            "python -m eval.make_photographs_classifier"
        ) from error
    extractor.fingerprint = hash_file(path)[:16]
    return extractor


def _load_import(module: str, factory: str) -> FeatureExtractor:
    name = f"{module}:{factory}"
    try:
        made = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"extractor import:{name} cannot be had ({error}); check the module (is it on PYTHONPATH?) "
            "and the name of the factory"
        ) from error
    if isinstance(made, FeatureExtractor):
        return made
    if not callable(made):
        raise UserError(
            f"extractor import:{name} made a {type(made).__name__}; it must make a module or callable"
        )
    return ForeignExtractor(made, getattr(made, "name", name), _hash_module(made))


def _load_torchscript(path: str) -> FeatureExtractor:
    if not os.path.isfile(path):
        raise UserError(f"extractor torchscript:{path}: no such file; give a file that torch.jit.save wrote")
    try:
        network = torch.jit.load(path, map_location="cpu")
    except Exception as error:
        raise UserError(
            f"extractor torchscript:{path} cannot be read ({' '.join(str(error).split())[:160]}); "
            "give a file that torch.jit.save wrote"
        ) from error
    return ForeignExtractor(network.eval(), Path(path).stem, hash_file(path)[:16])


def _hash_module(module: object) -> str:
    if not isinstance(module, nn.Module):
        return "unknown"
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
