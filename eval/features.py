"""The features of images: what every extractor gives, and says of itself."""

from __future__ import annotations

from torch import Tensor, nn


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
