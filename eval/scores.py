"""Scores of images against a reference, as functions of features: Frechet and kernel distance, class accuracy, nearest neighbours.

Sums are in float64, whatever the extractor computes in. torchmetrics does the distances; it is kept from what kills it (a NaN
feature ends the process inside its eigenvalue routine).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from ldm_dcn.errors import UserError

from .extractors import FeatureExtractor

KID_SUBSETS = 50
KID_SUBSET_SIZE = (
    500  # at most; the estimate is unbiased whatever the size, and the cost goes with its square
)


@dataclass(frozen=True)
class Features:
    """What an extractor made of N images: values (N, d) float64, and logits (N, classes) where it classifies."""

    values: Tensor
    logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, chosen: Tensor | slice) -> Features:
        return Features(self.values[chosen], None if self.logits is None else self.logits[chosen])


@torch.no_grad()
def extract(
    extractor: FeatureExtractor, batches: Iterable[Tensor], device: str | torch.device = "cpu"
) -> Features:
    """Features of batches of uint8 images (B, c, H, W).

    Raises `ValueError` for images that are not uint8 and for features that are not finite, naming the images.
    """
    values, logits, seen = [], [], 0
    for images in batches:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"images are {images.dtype} {tuple(images.shape)}; give uint8 (N, c, H, W), made by "
                "ldm_dcn.autoencoder.to_uint8"
            )
        features = extractor(images.to(device))
        _check_finite(features, f"features of extractor {extractor.name}", seen)
        values.append(features.to("cpu", torch.float64))
        batch_logits = extractor.logits(features)
        if batch_logits is not None:
            logits.append(batch_logits.cpu())
        seen += len(images)
    if not values:
        raise ValueError("there are no images to score")
    return Features(torch.cat(values), torch.cat(logits) if logits else None)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to features a (N, d) and b (M, d); 0 where rounding makes it negative.

    |mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), S with N - 1 (Heusel et al. 2017, equation 6).
    """
    _check_pair(a, b)
    fid = _torchmetrics("fid").FrechetInceptionDistance(feature=_Passthrough(a.shape[1]))
    fid.update(a.double(), real=True)
    fid.update(b.double(), real=False)
    return max(0.0, fid.compute().item())


def kernel_distance(a: Tensor, b: Tensor, seed: int = 0) -> tuple[float, float]:
    """KID between features a (N, d) and b (M, d): mean and standard deviation over random subsets.

    The unbiased estimate of the squared MMD under (x.y / d + 1)^3 (Binkowski et al. 2018). Subsets are drawn from `seed`.
    """
    _check_pair(a, b)
    size = min(KID_SUBSET_SIZE, len(a), len(b))
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*will save all extracted features"
        )  # we have them in memory already
        kid = _torchmetrics("kid").KernelInceptionDistance(
            feature=_Passthrough(a.shape[1]), subsets=KID_SUBSETS, subset_size=size
        )
    kid.update(a.double(), real=True)
    kid.update(b.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # torchmetrics draws its subsets from the global generator
        mean, std = kid.compute()
    return mean.item(), std.item()


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images (logits (N, classes)) that the extractor puts into the class they were asked to be, labels (N,)."""
    if len(logits) != len(labels):
        raise ValueError(f"{len(logits)} logits came with {len(labels)} labels")
    return (logits.argmax(dim=1) == labels).double().mean().item()


def nearest_neighbour_distance(points: Tensor, reference: Tensor) -> float:
    """Median over points (N, d) of the root-mean-square difference to the nearest of reference (M, d).

    Far below what unseen real images have to the same reference, it means that training images are being copied.
    """
    points, reference = points.flatten(1).double(), reference.flatten(1).double()
    if points.shape[1] != reference.shape[1]:
        raise ValueError(f"points have {points.shape[1]} values, the reference has {reference.shape[1]}")
    nearest = [torch.cdist(part, reference).amin(dim=1) for part in points.split(256)]
    return (torch.cat(nearest) / points.shape[1] ** 0.5).median().item()


class _Passthrough(nn.Module):
    """Lets torchmetrics sum features that are computed already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _check_pair(a: Tensor, b: Tensor) -> None:
    for features in (a, b):
        if features.ndim != 2:
            raise ValueError(f"features have shape {tuple(features.shape)}; give (N, d)")
        if len(features) < 2:
            raise ValueError(
                f"a distance between distributions needs at least 2 images on each side, got {len(features)}"
            )
        _check_finite(features, "features", 0)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features have {a.shape[1]} and {b.shape[1]} values; use one extractor for both")


def _check_finite(features: Tensor, what: str, first: int) -> None:
    finite = torch.isfinite(features).flatten(1).all(dim=1)
    if not bool(finite.all()):
        indices = [first + i for i in (~finite).nonzero().flatten().tolist()]
        raise ValueError(
            f"{what} of {len(indices)} images are NaN or infinite, first of images {indices[:8]}; "
            "look at those images"
        )


def _torchmetrics(name: str) -> ModuleType:
    """torchmetrics.image.NAME. A torch-fidelity without torchvision, or a torchvision of another torch, breaks its import."""
    try:
        from importlib import import_module

        return import_module(f"torchmetrics.image.{name}")
    except Exception as error:  # RuntimeError and AttributeError too, from operators that are not there
        text = " ".join(str(error).split())[:160]
        if isinstance(error, ModuleNotFoundError) and error.name == "torchmetrics":
            mend = "pip install torchmetrics"
        elif "torchvision" in text:
            mend = "pip uninstall torchvision torch-fidelity (neither is needed here)"
        else:
            mend = "pip install --force-reinstall --no-deps torchmetrics"
        raise UserError(f"torchmetrics cannot be imported ({text}); {mend}") from error
