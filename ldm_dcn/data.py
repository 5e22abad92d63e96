"""Images: the shipped digits, folders of pictures, and their encoding into latents.

A folder holds one subfolder a class, or pictures only. Pictures are turned upright (EXIF), brought to 8-bit grey or RGB,
shrunk by halving boxes, then bicubically, and cropped at the centre: ADM's and U-ViT's preprocessing. A picture that cannot be
read is noted by name and left out; more than `max_bad` of them is an error.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from .autoencoder import Autoencoder, to_uint8
from .errors import UserError

DIGITS_FILE = Path(__file__).parent / "assets" / "digits.npz"
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
SPLITS = ("all", "train", "held-out")
HOLD_OUT_EVERY = 4
BAD_NAMED = 3  # broken files that an error names; the rest are counted
LOOK_ON = 2000  # files still looked at after one too many was broken, so that one run finds them all in a small folder

Progress = Callable[[int], object]  # told how many images were just done, as tqdm's `update`


@dataclass(frozen=True)
class BadImage:
    path: str
    reason: str


class Images(ABC):
    """Labelled square images of one size, read when asked for.

    Attributes: `source`, `image_size`, `image_channels` (1 or 3), `labels` (N,) int64, `class_names` (empty when there are no
    classes: then every label is 0), `bad` (the pictures that could not be read so far), `max_bad`.
    """

    def __init__(
        self,
        source: str,
        image_size: int,
        image_channels: int,
        labels: Tensor,
        class_names: Sequence[str],
        max_bad: float = 0,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}; use 1 or more")
        if image_channels not in (1, 3):
            raise ValueError(f"image_channels is {image_channels}; use 1 (grey) or 3 (RGB)")
        self.source = source
        self.image_size = image_size
        self.image_channels = image_channels
        self.labels = labels
        self.class_names = tuple(class_names)
        self.max_bad = max_bad
        self.bad: dict[int, BadImage] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def bad_allowed(self) -> int:
        """`max_bad` as a count: below 1 it is a share of all images."""
        return int(self.max_bad * len(self)) if self.max_bad < 1 else int(self.max_bad)

    @abstractmethod
    def _read(self, index: int) -> Tensor | BadImage:
        """Image `index` as uint8 (c, H, W), or why there is none."""

    def read(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """The readable ones of `indices` as uint8 (B', c, H, W), and their indices (B',) int64.

        Raises `UserError`, naming the first broken files, when more than `max_bad` were broken so far.
        """
        indices = [int(i) for i in indices]
        kept, pixels = [], []
        for index, result in zip(indices, self._read_all(indices), strict=True):
            if isinstance(result, BadImage):
                self.bad[index] = result
            else:
                kept.append(index)
                pixels.append(result)
        if len(self.bad) > self.bad_allowed:
            self._look_on(max(indices) + 1)
            raise UserError(self._complaint())
        shape = (0, self.image_channels, self.image_size, self.image_size)
        stacked = torch.stack(pixels) if pixels else torch.empty(shape, dtype=torch.uint8)
        return stacked, torch.tensor(kept, dtype=torch.int64)

    def images(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Images as float32 (B, c, H, W) in [-1, 1]. Raises `UserError` where one of them is broken."""
        pixels, kept = self.read(indices)
        if len(kept) < len(indices):
            raise UserError(self._complaint())
        return to_float(pixels)

    def _read_all(self, indices: list[int]) -> list[Tensor | BadImage]:
        return [self._read(index) for index in indices]

    def _look_on(self, start: int) -> None:
        rest = list(range(start, min(start + LOOK_ON, len(self))))
        for index, result in zip(rest, self._read_all(rest), strict=True):
            if isinstance(result, BadImage):
                self.bad[index] = result

    def _complaint(self) -> str:
        first = [self.bad[index] for index in sorted(self.bad)[:BAD_NAMED]]
        named = "; ".join(f"{bad.path} ({bad.reason})" for bad in first)
        more = f"; and {len(self.bad) - len(first)} more" if len(self.bad) > len(first) else ""
        count = len(self.bad)
        return (
            f"{count} of {len(self)} images of {self.source} cannot be read: {named}{more}; delete or repair "
            f"{'it' if count == 1 else 'them'}, or allow {count} with data.max_bad={count}"
        )


def to_float(pixels: Tensor) -> Tensor:
    """uint8 (..., H, W) to float32 in [-1, 1]: x / 127.5 - 1, which `to_uint8` undoes exactly."""
    return pixels.to(torch.float32) / 127.5 - 1


def open_dataset(
    source: str | os.PathLike[str],
    *,
    image_size: int = 32,
    image_channels: int = 3,
    split: str = "all",
    max_bad: float = 0,
) -> Images:
    """Open `"digits"` or a folder of pictures.

    `split` is "all", "train" or "held-out": of each class every fourth image is held out. `max_bad` is how many broken pictures are left out
    before it is an error: a count, or a share of all when below 1.

    Raises `UserError` for a source that is neither, holds no pictures, or mixes the two layouts.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; use one of {', '.join(SPLITS)}")
    if not max_bad >= 0:
        raise ValueError(f"max_bad is {max_bad}; use a count, or a share below 1")
    source = os.fspath(source)
    if source == "digits":
        return _Digits(image_size, image_channels, split)
    return _Folder(source, image_size, image_channels, split, max_bad)


class _Digits(Images):
    """1,797 handwritten digits (UCI, see assets/NOTICE), 8x8 with 17 grey levels, enlarged bicubically, white on black."""

    def __init__(self, image_size: int, image_channels: int, split: str) -> None:
        with np.load(DIGITS_FILE, allow_pickle=False) as file:
            levels, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()
        chosen = split_indices(labels, split)
        super().__init__(
            "digits", image_size, image_channels, labels[chosen], [str(digit) for digit in range(10)]
        )
        small = levels[chosen, None].float() / 8 - 1  # 0..16 -> [-1, 1]
        large = F.interpolate(small, size=(image_size, image_size), mode="bicubic", align_corners=False)
        self._pixels = to_uint8(large).expand(-1, image_channels, -1, -1)

    def _read(self, index: int) -> Tensor:
        return self._pixels[index]


class _Folder(Images):
    def __init__(self, source: str, image_size: int, image_channels: int, split: str, max_bad: float) -> None:
        files, labels, class_names = list_pictures(source)
        labels = torch.tensor(labels)
        chosen = split_indices(labels, split)
        super().__init__(source, image_size, image_channels, labels[chosen], class_names, max_bad)
        self.files = [files[i] for i in chosen.tolist()]

    def _read(self, index: int) -> Tensor | BadImage:
        path = self.files[index]
        try:
            return _load_picture(path, self.image_size, self.image_channels)
        except (
            OSError,
            ValueError,
            SyntaxError,
            EOFError,
            MemoryError,
            Image.DecompressionBombError,
        ) as error:
            # Pillow raises SyntaxError for a broken PNG chunk and ValueError for some truncated headers.
            reason = " ".join(str(error).replace(path, "the file").split()) or type(error).__name__
            return BadImage(
                path, "empty file" if os.path.exists(path) and not os.path.getsize(path) else reason
            )

    def _read_all(self, indices: list[int]) -> list[Tensor | BadImage]:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding leaves the interpreter lock
            return list(pool.map(self._read, indices))


def split_indices(labels: Tensor, split: str) -> Tensor:
    """Indices (ascending, int64) of "all", "train" or "held-out": of each class every fourth image is held out."""
    held_out = rank_in_class(labels) % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
    return (
        {"all": torch.ones_like(held_out), "train": ~held_out, "held-out": held_out}[split]
        .nonzero()
        .flatten()
    )


def rank_in_class(labels: Tensor) -> Tensor:
    """How many earlier images have the same label, (N,) int64."""
    order = torch.argsort(labels, stable=True)
    counts = torch.bincount(labels)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(labels)) - starts
    return ranks


def list_pictures(source: str) -> tuple[list[str], list[int], list[str]]:
    """Files, labels and class names of a folder, in name order. Hidden files and folders do not count."""
    if not os.path.isdir(source):
        what = "a file" if os.path.exists(source) else "neither a folder nor 'digits'"
        raise UserError(f"data.source {source!r} is {what}; give 'digits' or a folder of images")
    entries = sorted(entry.name for entry in os.scandir(source) if not entry.name.startswith("."))
    flat = [os.path.join(source, name) for name in entries if _is_picture(os.path.join(source, name))]
    classes = {
        name: _pictures_below(os.path.join(source, name))
        for name in entries
        if os.path.isdir(os.path.join(source, name))
    }
    filled = {name: files for name, files in classes.items() if files}
    if flat and filled:
        raise UserError(
            f"{source} holds images ({os.path.basename(flat[0])}, ...) beside class folders "
            f"({next(iter(filled))}, ...); move the images into class folders, or the folders away"
        )
    if not flat and not filled:
        raise UserError(f"{source} holds no images ({', '.join(sorted(SUFFIXES))}); give a folder that does")
    if filled and len(filled) < len(classes):
        empty = next(name for name in classes if name not in filled)
        raise UserError(f"class folder {os.path.join(source, empty)} holds no images; fill it or remove it")
    if flat:
        return flat, [0] * len(flat), []
    files = [path for group in filled.values() for path in group]
    labels = [label for label, group in enumerate(filled.values()) for _ in group]
    return files, labels, list(filled)


def _is_picture(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in SUFFIXES and os.path.isfile(path)


def _pictures_below(folder: str) -> list[str]:
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (os.path.join(place, name) for name in sorted(files) if not name.startswith("."))
        found += [path for path in paths if _is_picture(path)]
    return found


def _load_picture(path: str, image_size: int, image_channels: int) -> Tensor:
    """One picture as uint8 (c, image_size, image_size). Raises OSError or ValueError when it is broken."""
    with Image.open(path) as picture:
        if picture.width * picture.height > (Image.MAX_IMAGE_PIXELS or float("inf")):
            raise ValueError(f"{picture.width}x{picture.height} pixels, more than {Image.MAX_IMAGE_PIXELS:,}")
        picture.load()
        upright = ImageOps.exif_transpose(picture)
        square = centre_crop(_to_8_bit(upright, "L" if image_channels == 1 else "RGB"), image_size)
    array = np.array(square)
    return torch.from_numpy(array if array.ndim == 3 else array[:, :, None]).permute(2, 0, 1).contiguous()


def _to_8_bit(picture: Image.Image, mode: str) -> Image.Image:
    """Any picture in 8-bit grey ("L") or "RGB": 16 bit is scaled, not clipped as Pillow does; transparency lies on white."""
    if picture.mode.startswith("I"):
        levels = np.asarray(picture).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(
                "whole numbers outside 0..65535, whose range is unknown; save it with 8 or 16 bits"
            )
        picture = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown; save it with 8 or 16 bits")
    if picture.mode in ("RGBA", "LA", "La", "RGBa", "PA") or "transparency" in picture.info:
        seen = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return picture.convert(mode)


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """ADM's crop: halve with a box while the short side is at least 2 size, bicubic to size, cut at the centre.

    Source: guided-diffusion, `image_datasets.center_crop_arr`, as U-ViT and DiT use it.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize(
        (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


@dataclass(frozen=True)
class Latents:
    """A data set as the diffusion model sees it: moments (N, 2L, h, w) float32, labels (N,) int64, and what made them."""

    moments: Tensor
    labels: Tensor
    num_classes: int
    fingerprint: dict

    def __len__(self) -> int:
        return len(self.labels)


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
    return Latents(torch.cat(moments), torch.cat(labels), images.num_classes, autoencoder.fingerprint())
