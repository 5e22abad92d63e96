"""Labelled images of one size, whatever they are read from, and how one picture becomes pixels.

Pictures are turned upright (EXIF), brought to 8-bit grey or RGB, shrunk by halving boxes, then bicubically, and cropped at the
centre: ADM's and U-ViT's preprocessing. A picture that cannot be read is noted by name, never an exception.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import UserError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
# What a cache notes about its pixels. Raise it with any change of `decode_picture` that changes a pixel.
PREPROCESSING = "upright, 8 bit, ADM centre crop, version 1"
CAPTION_FIELDS = ("text", "caption", "captions")  # where captions stand, if the user names no field
CLASS_NAMES = "class-names"  # in the place of a field: an image's caption is the name of its class
BAD_NAMED = 3  # broken files that an error names; the rest are counted
LOOKED_AT = 16  # pictures, spread over all, that are looked at for colour where grey is read
GREY_ENOUGH = 16  # levels between the channels of a grey picture: more than JPEG's rounding, less than any colour that is meant
LOOK_ON = 2000  # files still looked at after one too many was broken, so that one run finds them all in a small folder

Known = TypeVar("Known")

# Pillow raises SyntaxError for a broken PNG chunk, ValueError for some truncated headers, struct.error for damaged EXIF.
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    MemoryError,
    Image.DecompressionBombError,
    struct.error,
)
_STREAM = re.compile(r"'?<_io\.BytesIO object at \w+>'?")  # an address in memory would differ in every run


@dataclass(frozen=True)
class BadImage:
    path: str
    reason: str


class Images(ABC):
    """Labelled square images of one size, read when asked for.

    Attributes: `source`, `image_size`, `image_channels` (1 or 3), `labels` (N,) int64, `class_names` (empty when there are no
    classes: then every label is 0), `bad` (the pictures that could not be read so far), `max_bad`, `workers` (threads that
    decode), `edition` (names the content of a source whose images have neither names nor sizes).
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
        self.workers = min(8, os.cpu_count() or 1)
        self.edition = ""
        self._captions: Callable[[int], Sequence[str]] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def bad_allowed(self) -> int:
        """`max_bad` as a count: below 1 it is a share of all images."""
        return int(self.max_bad * len(self)) if self.max_bad < 1 else int(self.max_bad)

    # ------------------------------------------------------------------------------------------ one by one

    @abstractmethod
    def name(self, index: int) -> str:
        """What image `index` is called below `source`: the same wherever the source lies."""

    def place(self, index: int) -> str:
        """Where a person finds image `index`."""
        return os.path.join(self.source, self.name(index))

    def size(self, index: int) -> int:
        """Bytes of the file, to notice that it was replaced; 0 where there is none (any more)."""
        return 0

    def changed(self, index: int) -> int:
        """When the file was last written, in nanoseconds; 0 where there is none (any more)."""
        return 0

    def _bytes(self, index: int) -> bytes:
        """The content of the picture's file. May raise OSError or ValueError."""
        file = self._file(index)
        return file if isinstance(file, bytes) else Path(file).read_bytes()

    def content(self, index: int) -> bytes:
        """sha256 of the file; empty where it cannot be read."""
        try:
            return hashlib.sha256(self._bytes(index)).digest()
        except (OSError, ValueError):
            return b""

    def contents(self, indices: Sequence[int]) -> list[bytes]:
        """`content` of each of `indices`, on as many threads as decode."""
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            return list(pool.map(self.content, indices))

    def _file(self, index: int) -> str | bytes:
        """The path or the content of the picture. May raise OSError or ValueError."""
        raise NotImplementedError

    def _read(self, index: int) -> Tensor | BadImage:
        """Image `index` as uint8 (c, H, W), or why there is none."""
        try:
            return self._decoded(index, self._file(index))
        except UNREADABLE as error:
            return broken(self.place(index), error)

    def _decoded(self, index: int, file: str | bytes) -> Tensor | BadImage:
        path = self.place(index)
        if isinstance(file, bytes) and not file:
            return BadImage(path, "empty file")
        try:
            return decode_picture(
                io.BytesIO(file) if isinstance(file, bytes) else file, self.image_size, self.image_channels
            )
        except UNREADABLE as error:
            return broken(path, error)

    # ------------------------------------------------------------------------------------------ many

    def try_read(self, indices: Sequence[int]) -> list[Tensor | BadImage]:
        """Each of `indices` as uint8 (c, H, W), or why there is none. It is for the caller to count the bad ones."""
        with ThreadPoolExecutor(max(1, self.workers)) as pool:  # decoding leaves the interpreter lock
            return list(pool.map(self._read, indices))

    def read_with_content(
        self, indices: Sequence[int], known: Callable[[bytes], Known | None]
    ) -> tuple[list[bytes], list[Tensor | BadImage | Known]]:
        """`content` of each of `indices`, and the picture as of `try_read` or, where that is not None, what is `known` by the content.

        Both of the same bytes: a file may be replaced meanwhile.
        """

        def one(index: int) -> tuple[bytes, Tensor | BadImage | Known]:
            try:
                file = self._bytes(index)
            except UNREADABLE as error:
                return b"", broken(self.place(index), error)
            content = hashlib.sha256(file).digest()
            there = known(content)
            return content, self._decoded(index, file) if there is None else there

        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            both = list(pool.map(one, indices))
        return [content for content, _ in both], [picture for _, picture in both]

    def read(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """The readable ones of `indices` as uint8 (B', c, H, W), and their indices (B',) int64.

        Raises `UserError`, naming the first broken files, when more than `max_bad` were broken so far.
        """
        indices = [int(i) for i in indices]
        kept, pixels = [], []
        for index, result in zip(indices, self.try_read(indices), strict=True):
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

    def _look_on(self, start: int) -> None:
        rest = list(range(start, min(start + LOOK_ON, len(self))))
        for index, result in zip(rest, self.try_read(rest), strict=True):
            if isinstance(result, BadImage):
                self.bad[index] = result

    def _complaint(self) -> str:
        count = len(self.bad)
        return f"{complaint(self.bad, len(self), self.source)}, or allow {count} with data.max_bad={count}"

    def find_colour(self) -> str | None:
        """Where the first picture in colour lies, among `LOOKED_AT` of them; None where all are grey."""
        for index in range(0, len(self), max(1, -(-len(self) // LOOKED_AT))):
            try:
                file = self._file(index)
                with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as picture:
                    if _is_coloured(picture):
                        return self.place(index)
            except UNREADABLE:
                pass  # what reads it says so
        return None

    # ------------------------------------------------------------------------------------------ captions

    def use_captions(self, field: str | None = None) -> None:
        """Find the captions: in `field`, or in the first of `CAPTION_FIELDS` there is; "class-names" takes the class's name.

        Raises `UserError` where there are none.
        """
        if field == CLASS_NAMES:
            if not self.class_names:
                raise UserError(
                    f"{self.source} has no classes, so --captions {CLASS_NAMES} means nothing; leave it out"
                )
            self._captions = lambda index: [self.class_names[int(self.labels[index])]]
        else:
            self._captions = self._find_captions(field)

    def captions(self, index: int) -> list[str]:
        """The captions of image `index`, none or several, as `use_captions` found them."""
        assert self._captions is not None
        return list(self._captions(index))

    @property
    def has_captions(self) -> bool:
        return self._captions is not None

    def _find_captions(self, field: str | None) -> Callable[[int], Sequence[str]]:
        raise UserError(
            f"{self.source} has no captions; --captions {CLASS_NAMES} takes the names of the classes"
        )


def broken(path: str, error: BaseException) -> BadImage:
    """What is noted of the picture at `path`, whose reading raised `error`."""
    empty = os.path.exists(path) and not os.path.getsize(path)
    return BadImage(path, "empty file" if empty else _reason(error, path))


def _reason(error: BaseException, path: str) -> str:
    """Why the picture at `path` cannot be read; the path itself stands beside it."""
    if isinstance(error, UnidentifiedImageError):  # its text is the name of the file, or an address in memory
        return "not an image, or of a format that Pillow does not know"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).replace(path, "the file").split())
    return _STREAM.sub("the file", text) or type(error).__name__


def name_bad(bad: dict[int, BadImage]) -> str:
    """The first few of `bad` with their reasons, and how many more there are."""
    first = [bad[index] for index in sorted(bad)[:BAD_NAMED]]
    named = "; ".join(f"{one.path} ({one.reason})" for one in first)
    return named + (f"; and {len(bad) - len(first)} more" if len(bad) > len(first) else "")


def complaint(bad: dict[int, BadImage], count: int, source: str) -> str:
    """That so many of `count` images cannot be read, and the mend that there is always."""
    them = "it" if len(bad) == 1 else "them"
    return (
        f"{len(bad)} of {count} images of {source} cannot be read: {name_bad(bad)}; delete or repair {them}"
    )


def as_captions(value: object, where: str) -> list[str]:
    """A caption field's value: one string, a list of them, or null. Raises `UserError` for anything else."""
    if value is None:
        return []
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(one, str) for one in values):
        raise UserError(f"the caption of {where} is {value!r}; it takes a string or a list of strings")
    return [text for one in values if (text := " ".join(one.split()))]


def split_lines(text: str) -> list[str]:
    """The captions of a .txt file: one a line."""
    return [line for line in (" ".join(line.split()) for line in text.splitlines()) if line]


# Formats of which Pillow says mode "I" (32 bits) where they have 16.
OF_16_BITS = ("PNG", "PPM")


def to_float(pixels: Tensor) -> Tensor:
    """uint8 (..., H, W) to float32 in [-1, 1]: x / 127.5 - 1, which `to_uint8` undoes exactly."""
    return pixels.to(torch.float32) / 127.5 - 1


def decode_picture(file: str | io.BytesIO, image_size: int, image_channels: int) -> Tensor:
    """One picture as uint8 (c, image_size, image_size). Raises OSError or ValueError when it is broken."""
    with Image.open(file) as picture:
        _check_pixels(picture, max(1.0, image_size / max(1, min(picture.size))))
        if picture.mode == "I" and picture.format not in OF_16_BITS:
            raise ValueError("pixels of 32 bits, whose range is unknown; save it with 8 or 16 bits")
        picture.load()
        upright = ImageOps.exif_transpose(picture)
        square = centre_crop(_to_8_bit(upright, "L" if image_channels == 1 else "RGB"), image_size)
    array = np.array(square)
    return torch.from_numpy(array if array.ndim == 3 else array[:, :, None]).permute(2, 0, 1).contiguous()


def _check_pixels(picture: Image.Image, enlarged: float) -> None:
    """Raise ValueError for a picture that would fill the memory: a line of pixels does, `enlarged` before it is cropped."""
    width, height = picture.size
    if width * height * enlarged**2 > (Image.MAX_IMAGE_PIXELS or float("inf")):
        what = f", {enlarged:.0f} times as wide and as high to be cropped" if enlarged > 1 else " pixels"
        raise ValueError(f"{width}x{height}{what}, more than {Image.MAX_IMAGE_PIXELS:,}")


def _to_8_bit(picture: Image.Image, mode: str) -> Image.Image:
    """Any picture in 8-bit grey ("L") or "RGB": 16 bit is scaled, not clipped as Pillow does; transparency lies on white."""
    if picture.mode.startswith("I"):
        levels = np.asarray(picture).astype(np.int64)
        picture = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown; save it with 8 or 16 bits")
    if picture.mode in ("RGBA", "LA", "La", "RGBa", "PA") or "transparency" in picture.info:
        seen = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return picture.convert(mode)


def _is_coloured(picture: Image.Image) -> bool:
    if picture.mode[0] in "1LIF":
        return False
    _check_pixels(picture, 1.0)
    picture.draft("RGB", (64, 64))  # of a JPEG a fraction of the pixels is decoded
    levels = np.asarray(_to_8_bit(picture, "RGB")).astype(np.int16)
    return int((levels.max(2) - levels.min(2)).max()) > GREY_ENOUGH


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
