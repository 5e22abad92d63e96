"""Images packed in archives: tar shards in webdataset's layout, and what Hugging Face's `datasets` saved to disk.

In a tar the files of one sample share everything up to the first dot of their name: `0001.jpg`, `0001.cls` (a class number),
`0001.txt` (captions, one a line) or `0001.json` ({"text": ..., "label": ...}). Tars are read in place, never unpacked. What the
classes are called may stand in `classnames.txt` beside them or in the folder above, a line a class in the order of their numbers, as in
CLIP_benchmark's sets.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import UserError, one_line
from .images import CAPTION_FIELDS, SUFFIXES, Images, as_captions, split_lines

Choose = Callable[[Tensor], Tensor]  # labels (N,) to the indices wanted, ascending

LABEL_FIELDS = ("label", "cls", "labels")
CLASS_NAMES = "classnames.txt"
BLOCK = 512  # bytes; tar's unit
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


# --------------------------------------------------------------------------------------------------- tar shards


def find_tars(source: str) -> list[str]:
    """The tar shards that `source` names, in name order: itself, or those in the folder. Empty where there are none.

    Raises `UserError` for compressed ones, out of which single images cannot be read.
    """
    if os.path.isfile(source):
        names, folder = [os.path.basename(source)], os.path.dirname(source)
    elif os.path.isdir(source):
        names, folder = sorted(name for name in os.listdir(source) if not name.startswith(".")), source
    else:
        return []
    packed = [name for name in names if name.lower().endswith(COMPRESSED)]
    tars = [os.path.join(folder, name) for name in names if name.lower().endswith(".tar")]
    if packed:
        raise UserError(
            f"{os.path.join(folder, packed[0])} is a compressed tar, out of which single images cannot be read; "
            "decompress it (gunzip, unxz, ...) to a .tar"
        )
    return tars


class Tars(Images):
    """The samples of tar shards that hold a picture. Opening reads every header, and every .cls."""

    def __init__(
        self,
        source: str,
        tars: list[str],
        image_size: int,
        image_channels: int,
        choose: Choose,
        max_bad: float = 0,
    ) -> None:
        self._tars = tars
        names: list[str] = []
        places: list[tuple[int, int, int]] = []  # tar, offset, bytes
        notes: list[dict[str, tuple[int, int]]] = []  # .cls, .txt, .json: offset, bytes
        for number, tar in enumerate(tars):
            for key, files in _samples(tar).items():
                pictures = [suffix for suffix in files if f".{suffix}" in SUFFIXES]
                if len(pictures) > 1:
                    raise UserError(
                        f"{tar}: sample {key} holds several images ({', '.join(pictures)}); give each its own name"
                    )
                if pictures:
                    names.append(f"{os.path.basename(tar)}/{key}.{pictures[0]}")
                    places.append((number, *files[pictures[0]]))
                    notes.append({kind: files[kind] for kind in ("cls", "txt", "json") if kind in files})
        if not names:
            raise UserError(f"the tars of {source} hold no images ({', '.join(sorted(SUFFIXES))})")
        self._all_places = np.array(places, dtype=np.int64)
        self._all_notes = notes
        labels, numbers = _as_classes(self._read_labels(names), source)
        class_names = _read_class_names(os.path.dirname(tars[0]), numbers)
        chosen = choose(labels)
        super().__init__(source, image_size, image_channels, labels[chosen], class_names, max_bad)
        self._names = [names[i] for i in chosen.tolist()]
        self._places = self._all_places[chosen.numpy()]
        self._notes = [notes[i] for i in chosen.tolist()]

    def name(self, index: int) -> str:
        return self._names[index]

    def place(self, index: int) -> str:
        tar = self._tars[self._places[index, 0]]
        return f"{tar}: {self._names[index].split('/', 1)[1]}"

    def size(self, index: int) -> int:
        return int(self._places[index, 2])

    def changed(self, index: int) -> int:
        try:
            return os.stat(self._tars[self._places[index, 0]]).st_mtime_ns
        except OSError:
            return 0

    def _file(self, index: int) -> bytes:
        tar, offset, size = (int(number) for number in self._places[index])
        return _read_at(self._tars[tar], offset, size)

    def _read_labels(self, names: list[str]) -> list[int | None]:
        labels: list[int | None] = []
        for name, (tar, _, _), notes in zip(names, self._all_places.tolist(), self._all_notes, strict=True):
            label: Any = None
            if "cls" in notes:
                label = _read_at(self._tars[tar], *notes["cls"]).decode("utf-8", "replace").strip()
            elif "json" in notes:
                entry = _read_json(self._tars[tar], notes["json"], name)
                label = next((entry[field] for field in LABEL_FIELDS if field in entry), None)
            if label is not None:
                try:
                    label = int(label)
                except (TypeError, ValueError):
                    label = -1
                if label < 0:
                    raise UserError(
                        f"{name}: its class is no number; write 0, 1, 2, ... into its .cls (or json label)"
                    )
            labels.append(label)
        return labels

    def _find_captions(self, field: str | None) -> Callable[[int], Sequence[str]]:
        def read(index: int) -> list[str]:
            tar, notes = self._tars[self._places[index, 0]], self._notes[index]
            if "txt" in notes and field is None:
                return split_lines(_read_at(tar, *notes["txt"]).decode("utf-8", "replace"))
            if "json" in notes:
                entry = _read_json(tar, notes["json"], self._names[index])
                return as_captions(_first(entry, [field] if field else CAPTION_FIELDS), self.place(index))
            return []

        if not any(read(index) for index in range(min(len(self), 1000))):
            raise UserError(
                f"the tars of {self.source} have no captions ({f'json field {field}' if field else '.txt or .json'} beside "
                "the images); add them, name the json field with --captions, or leave out --text-encoder"
            )
        return read


def _samples(path: str) -> dict[str, dict[str, tuple[int, int]]]:
    """{sample: {suffix: (offset, bytes)}} of one tar, in its order. Raises `UserError` where it is damaged or cut short."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    mend = "copy or download it again"
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # tarfile would keep every header: gigabytes for a million images
                folder, slash, base = member.name.removeprefix("./").rpartition("/")
                stem, dot, suffix = base.partition(".")
                if not member.isfile() or not stem or not dot:
                    continue
                files = samples.setdefault(f"{folder}{slash}{stem}", {})
                if suffix.lower() in files:
                    raise UserError(f"{path} holds {member.name} twice; give every sample a name of its own")
                files[suffix.lower()] = (member.offset_data, member.size)
            end = tar.offset
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:  # the last: sizes beyond 64 bits
        raise UserError(f"{path} cannot be read as a tar ({error}); {mend}") from None
    # tarfile takes a damaged header for the end of the archive; a true end is a block of zeros
    mark = _read_at(path, end, BLOCK, exactly=False)
    if mark != bytes(BLOCK):
        what = f"has a damaged header at byte {end}" if mark else "is cut short: its end mark is missing"
        raise UserError(f"{path} {what}; {mend}")
    return samples


def _read_at(path: str, offset: int, size: int, exactly: bool = True) -> bytes:
    with open(
        path, "rb", buffering=0
    ) as file:  # opened anew: thousands of shards need no thousands of handles
        file.seek(offset)
        content = file.read(size)
        while exactly and len(content) < size and (more := file.read(size - len(content))):
            content += more
    if exactly and len(content) < size:
        raise OSError(f"{path} was cut short after it was opened")
    return content


def _read_json(tar: str, place: tuple[int, int], name: str) -> dict[str, Any]:
    try:
        entry = json.loads(_read_at(tar, *place))
    except ValueError as error:
        raise UserError(f"{tar}: the .json of {name} cannot be read ({error}); write it again") from None
    return entry if isinstance(entry, dict) else {}


def _first(entry: dict[str, Any], fields: Sequence[str]) -> Any:
    return next((entry[field] for field in fields if field in entry), None)


def _read_class_names(folder: str, numbers: list[str]) -> list[str]:
    """The lines of classnames.txt in `folder`, or above it; the classes' own `numbers`, which there are none of without classes, where
    there is no such file."""
    places = (
        os.path.join(place, CLASS_NAMES) for place in (folder, os.path.dirname(os.path.abspath(folder)))
    )
    path = next(filter(os.path.exists, places), None)
    if not numbers or path is None:
        return numbers
    try:
        with open(path, encoding="utf-8") as file:
            names = [line.strip() for line in file.read().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the names of the classes, {path}, cannot be read ({error}); repair it, as UTF-8 text"
        ) from None
    if len(names) < len(numbers) or "" in names:
        raise UserError(
            f"{path} names {len([*filter(None, names)])} classes in {len(names)} lines, and the images have {len(numbers)}; write a "
            "name for each, one a line"
        )
    return names


def _as_classes(labels: list[int | None], source: str) -> tuple[Tensor, list[str]]:
    """Labels (N,) and class names out of numbers. All samples have one, or none has."""
    missing = sum(label is None for label in labels)
    if missing == len(labels):
        return torch.zeros(len(labels), dtype=torch.int64), []
    if missing:
        raise UserError(
            f"{missing} of {len(labels)} images of {source} have no class; give every one a .cls, or none"
        )
    numbers = torch.tensor(labels, dtype=torch.int64)
    return numbers, [str(number) for number in range(int(numbers.max()) + 1)]


# --------------------------------------------------------------------------------------------------- saved data sets


def is_saved_dataset(source: str) -> bool:
    """Whether `datasets.Dataset.save_to_disk` wrote `source`. Raises `UserError` for a folder of several splits."""
    if os.path.isfile(os.path.join(source, "dataset_dict.json")):
        splits = sorted(entry.name for entry in os.scandir(source) if entry.is_dir())
        raise UserError(
            f"{source} holds several splits ({', '.join(splits)}); give one of them, such as "
            f"{os.path.join(source, splits[0] if splits else 'train')}"
        )
    return all(os.path.isfile(os.path.join(source, name)) for name in ("state.json", "dataset_info.json"))


class SavedDataset(Images):
    """A Hugging Face data set on disk: its first image column, its class column, and the captions asked for."""

    def __init__(
        self, source: str, image_size: int, image_channels: int, choose: Choose, max_bad: float = 0
    ) -> None:
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"{source} is a Hugging Face data set, which needs the package datasets; "
                "run `pip install -c constraints.txt datasets`"
            ) from None
        try:
            rows = datasets.load_from_disk(source)
        except Exception as error:  # pyarrow's, json's and datasets' own errors: all mean it cannot be had
            raise UserError(
                f"the data set {source} cannot be read ({one_line(error)}); save or copy it again"
            ) from error
        pictures = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        if not pictures:
            raise UserError(
                f"the data set {source} has no column of images (it has {', '.join(rows.features)}); cast one with "
                "`cast_column(name, datasets.Image())`"
            )
        self._column = pictures[0]
        # Undecoded: our own decoder applies, and what is broken is noted instead of raised.
        self._rows = rows.cast_column(self._column, datasets.Image(decode=False))
        labels, class_names = self._read_labels(datasets, source)
        chosen = choose(labels)
        super().__init__(source, image_size, image_channels, labels[chosen], class_names, max_bad)
        self._chosen = chosen.tolist()
        self.edition = str(rows._fingerprint)  # of state.json: rows have neither names nor sizes

    def name(self, index: int) -> str:
        return f"row {self._chosen[index]}"

    def place(self, index: int) -> str:
        return f"{self.source}, {self.name(index)}"

    def _file(self, index: int) -> str | bytes:
        picture = self._rows[self._chosen[index]][self._column]
        if not picture or (picture.get("bytes") is None and not picture.get("path")):
            raise ValueError("no image in this row")
        return picture["bytes"] if picture.get("bytes") is not None else picture["path"]

    def _read_labels(self, datasets: Any, source: str) -> tuple[Tensor, list[str]]:
        features = self._rows.features
        named = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        column = next(iter(named), None) or next((name for name in LABEL_FIELDS if name in features), None)
        if column is None:
            return torch.zeros(len(self._rows), dtype=torch.int64), []
        values = [None if v is None or v == -1 else v for v in self._rows[column]]
        if not all(value is None or isinstance(value, int) for value in values):
            return torch.zeros(len(self._rows), dtype=torch.int64), []
        labels, numbers = _as_classes(values, source)
        names = list(features[column].names) if named else numbers
        return labels, names if numbers else []

    def _find_captions(self, field: str | None) -> Callable[[int], Sequence[str]]:
        columns = self._rows.features
        wanted = [field] if field else CAPTION_FIELDS
        column = next((name for name in wanted if name in columns), None)
        if column is None:
            raise UserError(
                f"the data set {self.source} has no column {' or '.join(wanted)} of captions; name one of "
                f"{', '.join(name for name in columns if name != self._column)} with --captions"
            )
        texts = self._rows.select_columns([column])
        return lambda index: as_captions(texts[self._chosen[index]][column], self.place(index))
