"""Feature extractors: uint8 images to the vectors that Frechet and kernel distances compare.

    digits                        the shipped classifier of handwritten digits, 64 features
    classifier:FILE               a classifier that `eval.make_photographs_classifier` wrote, 64 features
    inception:WEIGHTS             the standard FID Inception, 2048 features, from its well-known weights file
    pytorch-fid:WEIGHTS           the same network, to which images come as in pytorch-fid and U-ViT: resized by torch's rule
    import:PACKAGE.MODULE:FACTORY what FACTORY() returns: a module, or a callable, from uint8 (N, c, H, W) to (N, d)
    torchscript:FILE              a TorchScript module, the same contract

Distances compare within one extractor only, so each carries a name and a fingerprint of its weights.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm_dcn.errors import UserError, one_line
from ldm_dcn.files import hash_file

from .classifiers import DIGITS_FILE, DigitsClassifier, SmallClassifier
from .features import FeatureExtractor

KINDS = "digits, classifier:FILE, inception:WEIGHTS, pytorch-fid:WEIGHTS, import:PACKAGE.MODULE:FACTORY or torchscript:FILE"


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
        try:
            features = self.network(images)
        except UserError:
            raise
        except Exception as error:  # of another's code
            raise UserError(
                f"extractor {self.name} failed on uint8 images {tuple(images.shape)}: {one_line(error)}; it takes uint8 (N, c, H, W) "
                "in 0..255 and returns (N, features): convert and scale them inside"
            ) from error
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
    elif kind in ("inception", "pytorch-fid") and rest:
        from .inception import load_inception

        extractor = load_inception(rest, by_torch=kind == "pytorch-fid")
    elif kind == "import" and rest.count(":") == 1:
        extractor = _load_import(*rest.split(":"))
    elif kind == "torchscript" and rest:
        extractor = _load_torchscript(rest)
    else:
        raise UserError(f"extractor {spec!r} is unknown; use {KINDS}")
    return extractor.requires_grad_(False).eval().to(device)


def _load_digits(path: Path) -> DigitsClassifier:
    extractor = DigitsClassifier()
    try:
        weights = load_file(path)
        extractor.load_state_dict(
            {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
        )
    except Exception as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error)}); make it again with "
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
            f"extractor classifier:{path} cannot be read ({one_line(error)}); make it with "
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
            f"extractor torchscript:{path} cannot be read ({one_line(error)}); "
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
