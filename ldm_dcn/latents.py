"""The latents that a run learns from: those of a cache, or of images that are encoded at the start and kept in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from .autoencoder import Autoencoder
from .cache import LatentCache
from .cache_layout import is_cache
from .config import Config, DataConfig
from .data import open_dataset, split_indices
from .errors import UserError
from .images import Images, to_float

Progress = Callable[[int], object]  # told how many images were just done, as tqdm's `update`


@dataclass(frozen=True)
class Latents:
    """A data set as the diffusion model sees it: moments (N, 2L, h, w) float32, labels (N,) int64, and what made them.

    It reads like a `cache.LatentCache`; there are no mirrored images and no captions in it.
    """

    moments: Tensor
    labels: Tensor
    num_classes: int
    fingerprint: dict
    class_names: tuple[str, ...] = ()
    has_flips: ClassVar[bool] = False
    text: ClassVar[None] = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(L, h, w)"""
        _, channels, height, width = self.moments.shape
        return channels // 2, height, width

    def read(self, ids: Tensor, flipped: Tensor | None = None) -> Tensor:
        """The moments of images `ids` (n,) int64: (n, 2L, h, w) float32. Nothing can be `flipped`."""
        if flipped is not None and bool(flipped.any()):
            raise ValueError(
                "these latents hold no mirrored images; ask for none, or encode a cache with --flip"
            )
        return self.moments[ids]


def encode_dataset(
    images: Images,
    autoencoder: Autoencoder,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Latents:
    """Encode all of `images` that can be read, in order. `progress(count)` is called after each batch.

    Raises `UserError` when more than `images.max_bad` pictures are broken, or the channels do not fit the autoencoder.
    """
    if images.image_channels != autoencoder.image_channels:
        raise UserError(
            f"the images have {images.image_channels} channels, the autoencoder {autoencoder.spec} takes "
            f"{autoencoder.image_channels}; set data.image_channels={autoencoder.image_channels}"
        )
    moments, labels = [], []
    for start in range(0, len(images), batch_size):
        indices = range(start, min(start + batch_size, len(images)))
        pixels, kept = images.read(indices)
        if len(kept):
            moments.append(autoencoder.encode(to_float(pixels)).cpu())
            labels.append(images.labels[kept])
        if progress is not None:
            progress(len(indices))
    if not moments:
        raise UserError(f"no image of {images.source} can be read; give a folder of images")
    return Latents(
        torch.cat(moments),
        torch.cat(labels),
        images.num_classes,
        autoencoder.fingerprint(),
        images.class_names,
    )


def open_latents(
    config: Config, autoencoder: Autoencoder, main: bool, *, say_grey: bool = True
) -> tuple[Latents | LatentCache, str | None]:
    """What the run learns from, and its identity; a latent cache where `data.source` is one, else encoded now, in memory.

    main      whether this process shows how far the encoding is
    say_grey  of `open_dataset`
    """
    data = config.data
    if is_cache(data.source):
        cache = LatentCache.open(data.source, lambda labels: split_indices(labels, data.split))
        autoencoder.check(cache.fingerprint)
        return _checked(config, cache, autoencoder), cache.identity
    if data.image_size % autoencoder.factor:
        below = data.image_size // autoencoder.factor * autoencoder.factor
        raise UserError(
            f"data.image_size={data.image_size} is no multiple of {autoencoder.factor}, the pixels that autoencoder "
            f"'{autoencoder.spec}' makes one latent of; set data.image_size={below or autoencoder.factor}"
        )
    images = open_dataset(
        data.source,
        image_size=data.image_size,
        image_channels=autoencoder.image_channels,
        split=data.split,
        max_bad=data.max_bad,
        say_grey=say_grey,
    )
    _check_not_empty(data, len(images))
    with tqdm(total=len(images), desc="encoding", unit="image", disable=not main, leave=False) as bar:
        latents = encode_dataset(images, autoencoder, data.encode_batch_size, bar.update)
    return _checked(config, latents, autoencoder), _identity(images)


def _identity(images: Images) -> str:
    """12 hex digits: the same files, by name and content, with the same labels, in the same order, have the same."""
    digest = hashlib.sha256()
    contents = images.contents(range(len(images)))
    for index, (label, content) in enumerate(zip(images.labels.tolist(), contents, strict=True)):
        digest.update(f"{images.name(index)}\0{content.hex()}\0{label}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:12]


def _check_not_empty(data: DataConfig, count: int) -> None:
    if not count:
        raise UserError(
            f"{data.source} has no images in data.split={data.split}, as every fourth of a class is held out; set data.split=all, "
            "and train.validate_every=0"
        )


def _checked(
    config: Config, latents: Latents | LatentCache, autoencoder: Autoencoder
) -> Latents | LatentCache:
    data = config.data
    _check_not_empty(data, len(latents))
    if data.flip and not latents.has_flips:
        raise UserError(
            f"data.flip=true and {data.source} holds no mirrored latents; encode it with --flip, or set data.flip=false"
        )
    if data.condition == "text" and latents.text is None:
        raise UserError(
            f"data.condition=text and {data.source} holds no text; encode it with --text-encoder, or set data.condition=labels"
        )
    side = latents.latent_shape[1] * autoencoder.factor
    if side != data.image_size:
        raise UserError(
            f"{data.source} holds images of {side} pixels and data.image_size={data.image_size}; set data.image_size={side}"
        )
    return latents


def condition_of(config: Config, latents: Latents | LatentCache) -> tuple[int, torch.Tensor | None]:
    """The number of classes, or the empty prompt's tokens."""
    if config.data.condition == "text":
        return 0, latents.empty_tokens
    wanted = config.data.num_classes
    if wanted is None or wanted == 0:
        return latents.num_classes if wanted is None else 0, None
    if not latents.num_classes:
        raise UserError(
            f"{config.data.source} has no classes and data.num_classes={wanted}; sort its images into a subfolder a class, "
            "or set data.num_classes=0"
        )
    if latents.num_classes > wanted:
        raise UserError(
            f"{config.data.source} has {latents.num_classes} classes and data.num_classes={wanted}; "
            f"use {latents.num_classes}, or null to take what there is"
        )
    return wanted, None
