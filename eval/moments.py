"""Mean and covariance of features: summed as images come, compared, kept in npz files as the field does.

    mu, sigma                    pytorch-fid, U-ViT
    and mu_s, sigma_s            ADM: of the spatial features too
    and n, extractor, weights, resize, source, dataset_hash    ours: what made them, so that a mismatch is refused

Sums are torchmetrics' and in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_dcn.errors import UserError
from ldm_dcn.files import replacing

from .features import FeatureExtractor
from .metrics import image_metric
from .npz import read_npz

SAID = ("n", "extractor", "weights", "resize", "source", "dataset_hash")  # beside the arrays, in our files
ASYMMETRY = 1e-4  # of a covariance's largest entry; files in float32 have 1e-7 of it


class Moments:
    """The first two moments of features (N, d), summed in float64.

    count   N; None for those of a file that does not say
    """

    def __init__(self, num_features: int) -> None:
        self._metric = image_metric("FrechetInceptionDistance", num_features)
        self.num_features = num_features
        self.count: int | None = 0

    def add(self, features: Tensor) -> Moments:
        """Sum (B, d) more. They must be finite: torchmetrics' eigenvalue routine ends the process on NaN."""
        assert bool(torch.isfinite(features).all())
        self._metric.update(features.double(), real=True)
        self.count += len(features)
        return self

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        return cls(features.shape[1]).add(features)

    @classmethod
    def known(cls, mean: Tensor, covariance: Tensor, count: int | None) -> Moments:
        """Moments from mean (d,) and covariance (d, d; divided by N - 1)."""
        moments = cls(len(mean))
        mean, covariance = mean.double(), covariance.double()
        n = count or 2  # any number above 1 gives the same mean and covariance back
        moments._metric.real_features_sum = n * mean
        moments._metric.real_features_cov_sum = (n - 1) * covariance + n * torch.outer(mean, mean)
        moments._metric.real_features_num_samples = torch.tensor(n)
        moments.count = count
        return moments

    @property
    def mean(self) -> Tensor:
        """(d,) float64."""
        return self._metric.real_features_sum / self._metric.real_features_num_samples

    @property
    def covariance(self) -> Tensor:
        """(d, d) float64, divided by N - 1."""
        n = self._metric.real_features_num_samples
        return (self._metric.real_features_cov_sum - n * torch.outer(self.mean, self.mean)) / (n - 1)

    def frechet_distance(self, other: Moments) -> float:
        """Frechet distance between Gaussians of these moments and the other's; 0 where rounding makes it negative.

        |mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), S with N - 1 (Heusel et al. 2017, equation 6).
        """
        if self.num_features != other.num_features:
            raise UserError(
                f"features have {self.num_features} and {other.num_features} values; use one extractor for both"
            )
        for moments in (self, other):
            if moments.count is not None and moments.count < 2:
                raise UserError(
                    f"a distance between distributions needs at least 2 images on each side, got {moments.count}"
                )
        both = image_metric("FrechetInceptionDistance", self.num_features)
        nothing = torch.empty(0, self.num_features, dtype=torch.float64)
        for moments, real in ((self, True), (other, False)):
            both.update(nothing, real=real)  # tells the metric that its sums are of float64
            for name in ("sum", "cov_sum", "num_samples"):
                setattr(both, f"{'real' if real else 'fake'}_features_{name}",
                        getattr(moments._metric, f"real_features_{name}"))  # fmt: skip
        return max(0.0, both.compute().item())


@dataclass(frozen=True)
class Statistics:
    """A reference without its images: moments of features, of spatial features where known, and what made them.

    said   `SAID` as far as the file says it
    """

    moments: Moments
    spatial: Moments | None = None
    said: dict[str, Any] = field(default_factory=dict)
    path: str = ""

    def check(self, extractor: FeatureExtractor) -> None:
        """Raise `UserError` where these are not of `extractor`'s features."""
        own = {"extractor": extractor.name, "weights": extractor.fingerprint, "resize": extractor.resize}
        for key, value in own.items():
            if self.said.get(key, value) != value:
                raise UserError(
                    f"{self.path} holds statistics of {key} {self.said[key]}, and the images are scored with {value}; "
                    "give the extractor that made them, or make them again with --save-statistics"
                )
        if extractor.num_features not in (0, self.moments.num_features):  # 0: known after the first batch
            raise UserError(
                f"{self.path} holds statistics of {self.moments.num_features} features, the extractor {extractor.name} gives "
                f"{extractor.num_features}; give the --extractor that made them"
            )
        if self.spatial is not None and extractor.num_spatial not in (0, self.spatial.num_features):
            raise UserError(
                f"{self.path} holds statistics of {self.spatial.num_features} spatial features, the extractor {extractor.name} "
                f"gives {extractor.num_spatial}; give the --extractor that made them"
            )


def save_statistics(path: Path, moments: Moments, spatial: Moments | None, said: Mapping[str, Any]) -> None:
    """Write the npz that `read_statistics` reads, and pytorch-fid and ADM (their arrays come first, under their names)."""
    if moments.count is None or moments.count < 2:
        raise UserError(f"{path}: statistics need at least 2 images, got {moments.count or 'none'}")
    arrays = {"mu": moments.mean.numpy(), "sigma": moments.covariance.numpy()}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean.numpy(), "sigma_s": spatial.covariance.numpy()}
    arrays |= {key: np.asarray(said[key]) for key in SAID if said.get(key) is not None}
    with replacing(path) as file:
        np.savez(file, **arrays)


def read_statistics(path: str) -> Statistics | None:
    """The statistics in an npz; None where it has no `mu`. Raises `UserError` for a file or values that are damaged."""
    arrays = read_npz(path, ("mu", "sigma", "mu_s", "sigma_s", *SAID))
    if "mu" not in arrays:
        return None
    said = {key: arrays[key].item() for key in SAID if key in arrays and arrays[key].ndim == 0}
    moments = _moments(path, arrays, "", said.get("n"))
    spatial = _moments(path, arrays, "_s", said.get("n")) if "mu_s" in arrays else None
    return Statistics(moments, spatial, said, path)


def _moments(path: str, arrays: Mapping[str, np.ndarray], suffix: str, count: int | None) -> Moments:
    names = f"mu{suffix}", f"sigma{suffix}"
    if names[1] not in arrays:
        raise UserError(f"{path} holds {names[0]} and no {names[1]}; write it again with both")
    mean, covariance = (arrays[name] for name in names)
    if (
        mean.ndim != 1
        or covariance.shape != 2 * mean.shape
        or {mean.dtype.kind, covariance.dtype.kind} != {"f"}
    ):
        raise UserError(
            f"{path}: {names[0]} is {mean.dtype} {mean.shape} and {names[1]} {covariance.dtype} {covariance.shape}; they must "
            "be float (d,) and (d, d)"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path}: {names[0]} or {names[1]} holds NaN or infinity; make the statistics again")
    if (
        np.abs(covariance - covariance.T).max() > ASYMMETRY * np.abs(covariance).max()
        or covariance.diagonal().min() < 0
    ):
        raise UserError(
            f"{path}: {names[1]} is no covariance (not symmetric, or negative); make the statistics again"
        )
    return Moments.known(torch.from_numpy(np.array(mean)), torch.from_numpy(np.array(covariance)), count)
