"""The data sets: the shipped digits, folders of pictures, archives.

A folder holds one subfolder a class, or pictures only; tar shards; or what Hugging Face `datasets` saved (`archives.py`). How a
picture becomes pixels stands in `images.py`, what of them is learnt from in `latents.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import archives
from .autoencoder import to_uint8
from .errors import UserError, warn
from .images import (
    CAPTION_FIELDS,
    SUFFIXES,
    BadImage,
    Images,
    Known,
    as_captions,
    split_lines,
)

DIGITS_FILE = Path(__file__).parent / "assets" / "digits.npz"
SPLITS = ("all", "train", "held-out")
HOLD_OUT_EVERY = 4
METADATA = (
    "metadata.jsonl"  # captions in Hugging Face's image folders: one {"file_name": ..., "text": ...} a line
)


def open_dataset(
    source: str | os.PathLike[str],
    *,
    image_size: int = 32,
    image_channels: int = 3,
    split: str = "all",
    max_bad: float = 0,
    say_grey: bool = True,
) -> Images:
    """Open `"digits"`, a folder of pictures, a tar shard or a folder of them, or a Hugging Face data set on disk.

    `split` is "all", "train" or "held-out": of each class every fourth image is held out. `max_bad` is how many broken pictures are left out
    before it is an error: a count, or a share of all when below 1. With `say_grey` a line on standard error names the first picture in
    colour, of a few, where grey is read.

    Raises `UserError` for a source that is none of these, holds no pictures, or mixes layouts.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; use one of {', '.join(SPLITS)}")
    if not max_bad >= 0:
        raise ValueError(f"max_bad is {max_bad}; use a count, or a share below 1")
    source = os.fspath(source)
    if source == "digits":
        return _Digits(image_size, image_channels, split)

    def choose(labels: Tensor) -> Tensor:
        return split_indices(labels, split)

    if archives.is_saved_dataset(source):
        images: Images = archives.SavedDataset(source, image_size, image_channels, choose, max_bad)
    elif tars := archives.find_tars(source):
        images = archives.Tars(source, tars, image_size, image_channels, choose, max_bad)
    else:
        images = _Folder(source, image_size, image_channels, split, max_bad)
    if say_grey and image_channels == 1 and (coloured := images.find_colour()) is not None:
        warn(
            f"{source} is read as grey, and {coloured} is in colour; an autoencoder of 3 channels would keep its colours"
        )
    return images


class _Digits(Images):
    """1,797 handwritten digits (UCI, see assets/NOTICE), 8x8 with 17 grey levels, enlarged bicubically, white on black."""

    def __init__(self, image_size: int, image_channels: int, split: str) -> None:
        with np.load(DIGITS_FILE, allow_pickle=False) as file:
            levels, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()
        self._chosen = split_indices(labels, split)
        super().__init__(
            "digits", image_size, image_channels, labels[self._chosen], [str(digit) for digit in range(10)]
        )
        small = levels[self._chosen, None].float() / 8 - 1  # 0..16 -> [-1, 1]
        large = F.interpolate(small, size=(image_size, image_size), mode="bicubic", align_corners=False)
        self._pixels = to_uint8(large).expand(-1, image_channels, -1, -1)

    def name(self, index: int) -> str:
        return str(int(self._chosen[index]))

    def content(self, index: int) -> bytes:
        return b""  # the package's own

    def contents(self, indices: Sequence[int]) -> list[bytes]:
        return [b""] * len(indices)

    def _read(self, index: int) -> Tensor:
        return self._pixels[index]

    def try_read(self, indices: Sequence[int]) -> list[Tensor | BadImage]:
        return [self._pixels[index] for index in indices]  # threads would only get into each other's way

    def read_with_content(
        self, indices: Sequence[int], known: Callable[[bytes], Known | None]
    ) -> tuple[list[bytes], list[Tensor | BadImage | Known]]:
        return self.contents(indices), self.try_read(indices)


class _Folder(Images):
    def __init__(self, source: str, image_size: int, image_channels: int, split: str, max_bad: float) -> None:
        files, labels, class_names = list_pictures(source)
        labels = torch.tensor(labels)
        chosen = split_indices(labels, split)
        super().__init__(source, image_size, image_channels, labels[chosen], class_names, max_bad)
        self.files = [files[i] for i in chosen.tolist()]

    def name(self, index: int) -> str:
        return self.files[index][len(self.source) :].lstrip(os.sep).replace(os.sep, "/")

    def place(self, index: int) -> str:
        return self.files[index]

    def size(self, index: int) -> int:
        try:
            return os.path.getsize(self.files[index])
        except OSError:
            return 0

    def changed(self, index: int) -> int:
        try:
            return os.stat(self.files[index]).st_mtime_ns
        except OSError:
            return 0

    def _file(self, index: int) -> str:
        return self.files[index]

    def _find_captions(self, field: str | None) -> Callable[[int], Sequence[str]]:
        """From metadata.jsonl files, which win where there are any, or else from .txt files beside the pictures.

        A `field` that is a JSON file is MS-COCO's list of captions.
        """
        if field is not None and field.endswith(".json"):
            named = _coco_captions(field)
            if not any(os.path.basename(path) in named for path in self.files):
                raise UserError(
                    f"--captions {field} names none of the images of {self.source}; give the list of these"
                )
            return lambda index: named.get(os.path.basename(self.files[index]), [])
        table = self._read_metadata(field)
        if table is not None:
            return lambda index: table.get(self.files[index], [])

        def beside(index: int) -> list[str]:
            path = os.path.splitext(self.files[index])[0] + ".txt"
            try:
                with open(path, encoding="utf-8") as file:
                    return split_lines(file.read())
            except FileNotFoundError:
                return []
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"the caption {path} cannot be read ({error}); repair it, as UTF-8 text"
                ) from None

        if not any(beside(index) for index in range(min(len(self), 1000))):
            raise UserError(
                f"{self.source} has no captions: neither a {METADATA} nor .txt files beside the images; add them, "
                "or leave out --text-encoder"
            )
        return beside

    def _read_metadata(self, field: str | None) -> dict[str, list[str]] | None:
        """Captions by path, from every metadata.jsonl in `source` and its subfolders."""
        table: dict[str, list[str]] = {}
        found = False
        for folder, subfolders, names in os.walk(self.source, followlinks=True):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            if METADATA in names:
                found = True
                table.update(_captions_of(folder, field))
        return table if found else None


def _coco_captions(path: str) -> dict[str, list[str]]:
    """Captions by file name, of MS-COCO's annotations/captions_*.json."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        names = {image["id"]: image["file_name"] for image in content["images"]}
        table: dict[str, list[str]] = {name: [] for name in names.values()}
        for entry in content["annotations"]:
            table[names[entry["image_id"]]] += as_captions(
                entry["caption"], f"{path}, image {entry['image_id']}"
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--captions {path} cannot be read as MS-COCO's captions ({type(error).__name__}: {error}); give "
            "annotations/captions_train2014.json or one like it"
        ) from None
    return table


def _captions_of(folder: str, field: str | None) -> dict[str, list[str]]:
    path = os.path.join(folder, METADATA)
    table: dict[str, list[str]] = {}
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                entry = json.loads(line)
                name = entry["file_name"]
                key = field or next((key for key in CAPTION_FIELDS if key in entry), None)
                if key is None or key not in entry:
                    raise UserError(
                        f"{path}, line {number} has no {field or ' or '.join(CAPTION_FIELDS)}; name its field "
                        f"with --captions (it has {', '.join(entry)})"
                    )
                where = os.path.join(folder, os.path.normpath(name))
                table.setdefault(where, []).extend(as_captions(entry[key], f"{path}, line {number}"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}); "
            'each line takes {"file_name": ..., "text": ...}'
        ) from None
    return table


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


def check_source(source: str, name: str = "data.source") -> None:
    """Raise `UserError` where nothing is: before models are loaded, or fetched, for it. `name` is what the user calls it."""
    if source != "digits" and not os.path.exists(source):
        raise UserError(
            f"{name} {source!r} is neither a folder nor 'digits'; give 'digits', a folder of images, a .tar or a folder of "
            "them, a Hugging Face data set on disk, or a latent cache, which `python -m ldm_dcn.encode IMAGES OUT` makes"
        )


def list_pictures(source: str) -> tuple[list[str], list[int], list[str]]:
    """Files, labels and class names of a folder, in name order. Hidden files and folders do not count."""
    check_source(source)
    if not os.path.isdir(source):
        raise UserError(
            f"data.source {source!r} is a file; give 'digits', a folder of images, a .tar or a folder of them, or a "
            "Hugging Face data set on disk"
        )
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


def _refuse(error: OSError) -> None:
    raise UserError(
        f"folder {error.filename} cannot be listed ({error.strerror}); mend that, or its images would be missing"
    ) from error


def _pictures_below(folder: str) -> list[str]:
    found = []
    for place, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (os.path.join(place, name) for name in sorted(files) if not name.startswith("."))
        found += [path for path in paths if _is_picture(path)]
    return found
