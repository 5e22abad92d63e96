"""A set of images as numbers: read or drawn in blocks, on as many processes as there are, and described by an extractor."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ldm_dcn.processes import Processes

from .features import FeatureExtractor
from .moments import Moments
from .npz import AdmNpzWriter
from .scores import Features, extract
from .sources import Source

BLOCK = 256  # images that one process reads or draws in one go; a multiple of every extractor's `at_once`
MOST_KEPT = 50_000  # images whose features are kept; moments are of all


@dataclass(frozen=True)
class Measured:
    """N images as numbers.

    count, moments, spatial  of all: N, and what Frechet distances compare
    features, labels         of all, or of `MOST_KEPT` chosen at random, the same ones each time; None where only statistics are known
    pixels                   (N, c*H*W) uint8, where they are small
    images_per_second        how fast they were drawn
    dataset_hash             of all pixels and their order
    """

    count: int | None
    moments: Moments
    spatial: Moments | None
    features: Features | None = None
    pixels: Tensor | None = None
    labels: Tensor | None = None
    images_per_second: float | None = None
    dataset_hash: str | None = None

    def __getitem__(self, chosen: Tensor) -> Measured:
        assert self.features is not None
        features = self.features[chosen]
        return Measured(len(features), Moments.of(features.values), None, features,
                        None if self.pixels is None else self.pixels[chosen],
                        None if self.labels is None else self.labels[chosen])  # fmt: skip


@dataclass(frozen=True)
class _Block:
    features: Features
    pixels: Tensor | None
    digest: bytes
    seconds: float | None


def measure(source: Source, extractor: FeatureExtractor, *, keep_shape: tuple[int, int, int] | None = None, batch_size: int = 128,
            device: str = "cpu", processes: Processes | None = None, save_npz: Path | None = None,
            progress: bool = False) -> Measured | None:  # fmt: skip
    """Read or draw all images of `source`; the result is on the first process, the others have None.

    keep_shape  keep pixels too, as values of images (c, H, W)
    batch_size  images drawn at once
    save_npz    file to write the images to, in ADM's layout
    """
    processes = processes or Processes()
    wants_pixels = keep_shape is not None or save_npz is not None

    def make(number: int) -> _Block:
        start, stop = number * BLOCK, min((number + 1) * BLOCK, len(source))
        before = source.seconds or 0
        images = source.read(start, stop, batch_size)
        seconds = None if source.seconds is None else source.seconds - before
        features = extract(extractor, images, device, start)
        digest = hashlib.sha256(images.numpy().tobytes()).digest()
        return _Block(features, images if wants_pixels else None, digest, seconds)

    blocks, is_kept = -(-len(source) // BLOCK), _chosen(len(source))
    kept_features, kept_pixels, kept = [], [], []
    moments, spatial = None, None
    seconds: dict[int, float] = {}
    digest = hashlib.sha256(repr((len(source), *source.shape)).encode())
    with ExitStack() as opened:
        writer = None
        if save_npz is not None and processes.is_first:
            writer = opened.enter_context(AdmNpzWriter(save_npz, len(source), *source.shape[1:]))
        shown = progress and processes.is_first
        bar = opened.enter_context(
            tqdm(total=len(source), desc=source.name, unit="img", disable=not shown, leave=False)
        )
        for number, block in enumerate(processes.in_order(make, blocks)):
            values = block.features.values
            moments = (moments or Moments(values.shape[1])).add(values)
            if block.features.spatial is not None:
                spatial = (spatial or Moments(block.features.spatial.shape[1])).add(block.features.spatial)
            chosen = is_kept[number * BLOCK :][: len(values)].nonzero().flatten()
            kept.append(number * BLOCK + chosen)
            kept_features.append(Features(values, None, block.features.logits)[chosen])
            if keep_shape is not None:
                kept_pixels.append(_as_reference(block.pixels[chosen], keep_shape))
            if writer is not None:
                writer.add(block.pixels)
            if block.seconds is not None:
                place = number % processes.at_once
                seconds[place] = seconds.get(place, 0) + block.seconds
            digest.update(block.digest)
            bar.update(len(values))
        if writer is not None and source.labels is not None:
            writer.label(source.labels)
    if moments is None:
        return None
    pixels = torch.cat(kept_pixels) if kept_pixels and all(part is not None for part in kept_pixels) else None
    return Measured(len(source), moments, spatial, Features.joined(kept_features), pixels,
                    None if source.labels is None else source.labels[torch.cat(kept)],
                    len(source) / max(seconds.values()) if seconds else None, digest.hexdigest()[:16])  # fmt: skip


def _chosen(total: int) -> Tensor:
    """(total,) bool: which images are kept. Every k-th would be those of some classes alone where classes come in turn."""
    is_kept = torch.zeros(total, dtype=torch.bool)
    is_kept[torch.randperm(total, generator=torch.Generator().manual_seed(0))[:MOST_KEPT]] = True
    return is_kept


def _as_reference(images: Tensor, shape: tuple[int, int, int]) -> Tensor | None:
    """Images (B, c, H, W) as rows of the reference's values (B, c'*H*W): grey where it is grey; None where sizes differ."""
    if images.shape[-2:] != shape[-2:]:
        return None
    if images.shape[1] != shape[0]:
        images = images.float().mean(1, keepdim=True).round().to(torch.uint8).expand(-1, shape[0], -1, -1)
    return images.flatten(1)
