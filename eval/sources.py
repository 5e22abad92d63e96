"""Where images to be scored come from: a run that draws them, a data set, an npz file, noise. All give uint8 by their numbers."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_dcn.archives import find_tars, is_saved_dataset
from ldm_dcn.arithmetic import check_precision
from ldm_dcn.cache_layout import is_cache, read_manifest
from ldm_dcn.data import list_pictures, open_dataset
from ldm_dcn.errors import UserError, one_line, shown
from ldm_dcn.images import UNREADABLE, BadImage, Images, broken, complaint
from ldm_dcn.sampling import check_guidance, check_sampler, check_steps, generate

from .moments import Statistics, read_statistics
from .npz import map_npz, npz_names, read_npz
from .stored_models import StoredModel

if TYPE_CHECKING:
    from ldm_dcn.config import Config
    from ldm_dcn.model import Model

# The classes of what is drawn: as many of each as the reference has; of each alike; at random. "auto" is the first where the
# reference has classes, else the second.
LABEL_RULES = ("auto", "reference", "balanced", "random")
AT_ONCE = 256  # images of a file that are looked at together
RUN_MARKS = ("config.yaml", "checkpoints", "model_index.json")  # as ldm_dcn.export.load_model


class Source(ABC):
    """N images of one shape.

    name      heads the column
    tags      what the images are, beside their number
    shape     (c, H, W)
    labels    (N,) int64, or None
    classes   their names; None where they have none
    seconds   how long drawing has taken so far in this process; None where nothing is drawn
    """

    name: str
    tags: dict[str, Any]
    shape: tuple[int, int, int]
    labels: Tensor | None
    classes: tuple[str, ...] | None = None
    seconds: float | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, start: int, stop: int, batch_size: int) -> Tensor:
        """Images start, ..., stop - 1 as uint8 (B, c, H, W); `batch_size` is how many are drawn at once, where any are."""


class DatasetSource(Source):
    """The images of a data set. Where it may have broken ones, all are read once to know them, and left out."""

    def __init__(self, images: Images, name: str) -> None:
        self.name = name
        self.tags = {"source": images.source}
        self.shape = (images.image_channels, images.image_size, images.image_size)
        self.classes = images.class_names or None
        self._images = images
        self._numbers = torch.arange(len(images))
        if images.bad_allowed:
            parts = [self._readable(some)[1] for some in self._numbers.split(AT_ONCE)]
            self._numbers = torch.cat(parts)
        if images.bad:
            self.tags["broken, left out"] = len(images.bad)
        self.labels = images.labels[self._numbers] if images.num_classes else None

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, start: int, stop: int, batch_size: int) -> Tensor:
        numbers = self._numbers[start:stop]
        pixels, kept = self._readable(numbers)
        # One that could be read before: a hole would pair images with others' labels.
        if len(kept) < len(numbers):
            raise UserError(complaint(self._images.bad, len(self._images), self._images.source))
        return pixels

    def _readable(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        images = self._images
        try:
            return images.read(numbers)
        except UserError:  # its way out is a setting of training
            if not images.bad:
                raise
            told, count = complaint(images.bad, len(images), images.source), len(images.bad)
            raise UserError(
                f"{told}, or leave out as many with --max-bad {count} (data.max_bad={count} of a run)"
            ) from None


class NpzSource(Source):
    """`arr_0`: uint8 (N, H, W, 3 or 1), and perhaps labels `arr_1` (N,): the layout of ADM's evaluator.

    as_grey   colours are read as `open_dataset` reads them where it makes grey images
    """

    def __init__(self, path: str, *, as_grey: bool = False) -> None:
        names = npz_names(path)
        if "arr_0" not in names:
            if "mu" in names:
                raise UserError(f"{path} holds statistics and no images; give it as --reference")
            raise UserError(
                f"{path} holds {', '.join(names) or 'nothing'} and no arr_0; "
                "give an npz with images (N, H, W, 3) as arr_0"
            )
        array, labels = map_npz(path, "arr_0"), read_npz(path, ("arr_1",)).get("arr_1")
        _check_pixels(path, array)
        self.name = Path(path).stem
        self.tags = {"source": path}
        self.shape = (1 if as_grey else array.shape[3], array.shape[1], array.shape[2])
        self.labels = (
            None if labels is None or labels.shape != array.shape[:1] else torch.from_numpy(labels).long()
        )
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    def read(self, start: int, stop: int, batch_size: int) -> Tensor:
        # a copy of its own: what is mapped must not be written to
        images = torch.from_numpy(np.array(self._array[start:stop])).permute(0, 3, 1, 2)
        return (_grey(images) if self.shape[0] < images.shape[1] else images).contiguous()


class NoiseSource(Source):
    """Independent uniform pixels: what the scores are for no image at all."""

    def __init__(self, count: int, shape: tuple[int, int, int], seed: int = 0) -> None:
        self.name = "noise"
        self.tags = {"source": "uniform pixels", "seed": seed}
        self.shape = shape
        self.labels = None
        self._count = count
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn = 0

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int, batch_size: int) -> Tensor:
        assert (
            start >= self._drawn
        )  # one stream of numbers, gone through once, with what others read left out
        self._draw(start - self._drawn)
        self._drawn = stop
        return self._draw(stop - start)

    def _draw(self, count: int) -> Tensor:
        return torch.randint(0, 256, (count, *self.shape), dtype=torch.uint8, generator=self._generator)


class SampleSource(Source):
    """Images that a model draws when asked: image i from seed + i and labels[i].

    precision  of `generate`
    """

    def __init__(
        self,
        model: Model | StoredModel,
        name: str,
        labels: Tensor | None,
        count: int,
        *,
        label_rule: str | None,
        guidance: float,
        sampler: str,
        steps: int,
        seed: int,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        precision: str | None = "fp32",
    ) -> None:
        if precision is not None:
            check_precision(precision)
        check_guidance(guidance, guidance_interval, guidance_rescale)
        check_sampler(sampler)
        check_steps(steps, model.schedule)
        if model.text_encoder is not None:
            raise UserError(
                f"{model.name} draws from prompts, and eval.fid knows classes; draw with sample.py --npz and score that file"
            )
        self.name = name
        self.labels = labels
        self.classes = model.class_names or None
        self.shape = (
            model.autoencoder.image_channels,
            *(side * model.autoencoder.factor for side in model.latent_shape[1:]),
        )
        # the run's own tags say "step" for its training step
        self.tags = {"guidance": guidance, "guidance_interval": list(guidance_interval), "sampler": sampler, "sampler_steps": steps, "seed": seed, "labels": label_rule,
                     "uint8": "round(127.5 x + 127.5)", "run": model.name, "step": model.step, **model.tags}  # fmt: skip
        if guidance_rescale:
            self.tags["guidance_rescale"] = guidance_rescale
        if precision is not None:
            self.tags["precision"] = precision
        self._model, self._count, self._seed = model, count, seed
        self._settings = {
            "guidance": guidance,
            "guidance_interval": guidance_interval,
            "guidance_rescale": guidance_rescale,
            "sampler": sampler,
            "steps": steps,
            "precision": precision,
        }

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int, batch_size: int) -> Tensor:
        labels = None if self.labels is None else self.labels[start:stop]
        model = self._model.load() if isinstance(self._model, StoredModel) else self._model
        began = time.perf_counter()
        try:
            images = generate(model, labels, range(self._seed + start, self._seed + stop), batch_size=batch_size,
                              **self._settings)  # fmt: skip
        except ValueError as error:  # pixels that are NaN or infinite
            raise UserError(f"{self.name}, images {start} to {stop - 1}: {one_line(error)}") from error
        # generate ends with the images on the CPU: nothing is left running
        self.seconds = (self.seconds or 0) + time.perf_counter() - began
        return images


def is_run(path: str) -> bool:
    """Whether `path` is for `load_model`: a run or export folder, or a hub id; not a file, a data set, nor a folder of images."""
    if os.path.isdir(path):
        return any(os.path.exists(os.path.join(path, mark)) for mark in RUN_MARKS)
    return not os.path.exists(path) and not path.endswith(".npz") and path != "digits"


def open_file_or_folder(
    path: str, *, image_channels: int, image_size: int | None = None, max_bad: float = 0
) -> Source:
    """An npz, or what `open_dataset` opens, in grey where `image_channels` is 1: the same images are the same in either.

    A folder's images must be square and of one size, unless `image_size` crops them; of broken ones, `max_bad` are left out.
    """
    if path.endswith(".npz"):
        return NpzSource(path, as_grey=image_channels == 1)
    size = image_size or (32 if path == "digits" else _common_size(path))
    # Whatever is compared with grey images is grey.
    images = open_dataset(
        path, image_size=size, image_channels=image_channels, max_bad=max_bad, say_grey=False
    )
    return DatasetSource(images, Path(path).name)


def open_reference(
    path: str, *, image_channels: int, image_size: int | None = None, max_bad: float = 0
) -> tuple[Source | None, Statistics | None]:
    """The images of a reference, its statistics, or both: ADM's npz holds 10,000 images beside statistics of all."""
    if not path.endswith(".npz"):
        images = open_file_or_folder(
            path, image_channels=image_channels, image_size=image_size, max_bad=max_bad
        )
        return images, None
    statistics = read_statistics(path)
    images = NpzSource(path) if statistics is None or "arr_0" in npz_names(path) else None
    return images, statistics


def _named(names: Sequence[str]) -> Sequence[str]:
    """None where they are numbers, as data sets without names have them."""
    return () if all(name == str(number) for number, name in enumerate(names)) else names


OPTION = "use --labels balanced, or the reference that it was trained on"  # what --labels can mend


def choose_labels(
    rule: str,
    count: int,
    num_classes: int,
    reference: Source | None,
    seed: int,
    *,
    learned_from: str | None = None,
    class_names: Sequence[str] = (),
    mend: str = OPTION,
) -> tuple[str | None, Tensor | None]:
    """The rule that was used, "auto" being one of the others, and labels (count,) to draw for. None twice without classes.

    learned_from  the data set of the model's classes
    class_names   the model's: a reference that has names, too, has the same in the same order, but where `rule` asks for its labels
    mend          what to do about a reference of other classes

    Raises `UserError` for labels of a reference that has none, or other classes than the model's `num_classes`.
    """
    if num_classes == 0:
        return None, None
    asked = rule == "reference"
    labels = None if reference is None else reference.labels
    if rule == "auto":
        rule = "balanced" if labels is None else "reference"
    if rule == "balanced":
        return rule, torch.arange(count) % num_classes
    if rule == "random":
        return rule, torch.randint(num_classes, (count,), generator=torch.Generator().manual_seed(seed))
    if rule != "reference":
        raise UserError(f"label rule {rule!r} is unknown; use one of {', '.join(LABEL_RULES)}")
    if labels is None:
        raise UserError("the reference has no classes to take labels from; use --labels balanced")
    source = reference.tags["source"]
    # A folder's labels are the places of its class folders in their order: without all of them they mean other classes.
    if reference.classes is not None and len(reference.classes) != num_classes and source != learned_from:
        raise UserError(
            f"the reference {source} has {len(reference.classes)} classes, the model {num_classes}; {mend}"
        )
    if int(labels.max()) >= num_classes:
        raise UserError(
            f"the reference {source} has label {int(labels.max())}, the model {num_classes} classes; {mend}"
        )
    pairs = enumerate(zip(_named(class_names), _named(reference.classes or ()), strict=False))
    other = next(((number, own, its) for number, (own, its) in pairs if own != its), None)
    if other is not None and not asked and source != learned_from:
        number, own, its = other
        raise UserError(
            f"class {number} is {shown(own)} to the model and {shown(its)} in the reference {source}; {mend}"
            + (
                ", or --labels reference where the same classes have other names there"
                if mend is OPTION
                else ""
            )
        )
    # What is left beside the whole set, or there is of it, is every k-th of its labels in order: all classes have their share.
    whole, rest = divmod(count, len(labels))
    in_order = labels.sort().values
    return rule, torch.cat([labels.repeat(whole), in_order[torch.arange(rest) * len(labels) // max(rest, 1)]])


def classes_of(config: Config, opened: Source | None = None) -> tuple[int, Sequence[str]]:
    """How many classes a run of `config` will know, as `ldm_dcn.latents.condition_of` has it, and their names; `opened` may be its data."""
    data = config.data
    if data.condition == "text":
        return 0, ()
    if opened is not None and opened.tags["source"] == data.source:
        names = opened.classes or ()
    elif is_cache(data.source):
        names = read_manifest(Path(data.source))["plan"]["class_names"]
    else:
        names = open_dataset(
            data.source, image_size=data.image_size, image_channels=data.image_channels, say_grey=False
        ).class_names
    count = len(names) if data.num_classes is None else data.num_classes
    return count, names[:count]


def _grey(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) as (N, 1, H, W): Pillow's "L", the luma of ITU-R BT.601 in 16 bits of fraction."""
    shares = torch.tensor((19595, 38470, 7471), dtype=torch.int32)  # 0.299, 0.587 and 0.114 of 2^16
    levels = (images.int() * shares[:, None, None]).sum(1, keepdim=True)
    return (levels + 2**15 >> 16).to(torch.uint8)


def _check_pixels(path: str, array: np.ndarray) -> None:
    """Raise `UserError` for what are not uint8 images (N, H, W, 3 or 1) in 0..255."""
    if array.ndim != 4 or array.shape[3] not in (1, 3) or 0 in array.shape:
        raise UserError(f"{path}: arr_0 is {array.dtype} {array.shape}; it must be uint8 (N, H, W, 3)")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        broken = int((~np.isfinite(array)).reshape(len(array), -1).any(1).argmax())
        raise UserError(
            f"{path}: image {broken} of arr_0 holds NaN or infinity; draw it again, as uint8 (N, H, W, 3)"
        )
    if array.dtype != np.uint8:
        raise UserError(
            f"{path}: arr_0 is {array.dtype} in [{array.min():g}, {array.max():g}]; it must be uint8 (N, H, W, 3) in 0..255"
        )
    parts = (array[start : start + AT_ONCE] for start in range(0, len(array), AT_ONCE))
    if all(part.max() <= 1 for part in parts):  # where all is well, the first one says so
        raise UserError(
            f"{path}: no value of arr_0 is above 1, as of images in [0, 1] cast to bytes; write 0..255"
        )


def _common_size(folder: str) -> int:
    if is_saved_dataset(folder) or find_tars(folder):
        raise UserError(
            f"{folder} is no plain folder of images; give --image-size to crop all of its images alike"
        )
    files, _, _ = list_pictures(folder)
    first: tuple[str, tuple[int, int]] | None = None
    bad: dict[int, BadImage] = {}
    for number, file in enumerate(files):
        try:
            with Image.open(file) as picture:
                size = picture.size
        except UNREADABLE as error:  # what reads the images counts them
            bad[number] = broken(file, error)
            continue
        if size[0] != size[1]:
            raise UserError(
                f"{file} is {size[0]}x{size[1]}, not square; give --image-size to crop all images alike"
            )
        if first is None:
            first = (file, size)
        elif size != first[1]:
            raise UserError(
                f"{folder} holds images of different sizes ({os.path.basename(first[0])} "
                f"{first[1][0]}x{first[1][1]}, {os.path.basename(file)} {size[0]}x{size[1]}); "
                "score one size at a time, or give --image-size to crop them alike"
            )
    if first is None:
        raise UserError(complaint(bad, len(files), folder))
    return first[1][0]
