"""Where images to be scored come from: a run that draws them, a data set, an npz file, noise. All give batches of uint8."""

from __future__ import annotations

import os
import time
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_dcn.data import Images, list_pictures, open_dataset
from ldm_dcn.errors import UserError
from ldm_dcn.sampling import generate

if TYPE_CHECKING:
    from ldm_dcn.export import Model

LABEL_RULES = ("reference", "balanced", "random")
RUN_MARKS = ("config.yaml", "checkpoints", "model_index.json")  # as ldm_dcn.export.load_model


class Source(ABC):
    """N images of one shape.

    name      heads the column
    tags      what the images are, beside their number
    shape     (c, H, W)
    labels    (N,) int64, or None
    seconds   how long drawing took, once `batches` has run; None where nothing is drawn
    """

    name: str
    tags: dict[str, Any]
    shape: tuple[int, int, int]
    labels: Tensor | None
    seconds: float | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """The images in order, uint8 (B, c, H, W)."""


class DatasetSource(Source):
    def __init__(self, images: Images, name: str) -> None:
        self.name = name
        self.tags = {"source": images.source}
        self.shape = (images.image_channels, images.image_size, images.image_size)
        self.labels = images.labels if images.num_classes else None
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        for start in range(0, len(self), batch_size):
            pixels, kept = self._images.read(range(start, min(start + batch_size, len(self))))
            if self._images.bad:
                # a set with holes would pair the wrong labels with the images
                bad = next(iter(self._images.bad.values()))
                raise UserError(f"{bad.path} cannot be read ({bad.reason}); delete or repair it")
            assert len(kept) == len(pixels)
            yield pixels


class NpzSource(Source):
    """`arr_0`: uint8 (N, H, W, 3 or 1), and perhaps labels `arr_1` (N,): the layout of ADM's evaluator."""

    def __init__(self, path: str) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                if "arr_0" not in file.files:
                    raise UserError(
                        f"{path} holds {', '.join(file.files) or 'nothing'} and no arr_0; "
                        "give an npz with images (N, H, W, 3) as arr_0"
                    )
                array = file["arr_0"]
                labels = file["arr_1"] if "arr_1" in file.files else None
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise UserError(f"{path} cannot be read as npz ({_one_line(error)}); write it again") from error
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3):
            raise UserError(f"{path}: arr_0 is {array.dtype} {array.shape}; it must be uint8 (N, H, W, 3)")
        self.name = Path(path).stem
        self.tags = {"source": path}
        self.shape = (array.shape[3], array.shape[1], array.shape[2])
        self.labels = (
            None if labels is None or labels.shape != array.shape[:1] else torch.from_numpy(labels).long()
        )
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        for start in range(0, len(self), batch_size):
            yield torch.from_numpy(self._array[start : start + batch_size]).permute(0, 3, 1, 2).contiguous()


class NoiseSource(Source):
    """Independent uniform pixels: what the scores are for no image at all."""

    def __init__(self, count: int, shape: tuple[int, int, int], seed: int = 0) -> None:
        self.name = "noise"
        self.tags = {"source": "uniform pixels", "seed": seed}
        self.shape = shape
        self.labels = None
        self._count = count
        self._seed = seed

    def __len__(self) -> int:
        return self._count

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self._seed)
        for start in range(0, self._count, batch_size):
            size = (min(batch_size, self._count - start), *self.shape)
            yield torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


class SampleSource(Source):
    """Images that a model draws when asked: image i from seed + i and labels[i]."""

    def __init__(
        self,
        model: Model,
        name: str,
        labels: Tensor | None,
        count: int,
        *,
        label_rule: str,
        guidance: float,
        sampler: str,
        steps: int,
        seed: int,
    ) -> None:
        self.name = name
        self.labels = labels
        self.shape = (
            model.autoencoder.image_channels,
            *(side * model.autoencoder.factor for side in model.latent_shape[1:]),
        )
        # the run's own tags say "step" for its training step
        self.tags = {"guidance": guidance, "sampler": sampler, "sampler_steps": steps, "seed": seed, "labels": label_rule,
                     "run": model.name, "step": model.step, **model.tags}  # fmt: skip
        self._model, self._count, self._seed = model, count, seed
        self._settings = {"guidance": guidance, "sampler": sampler, "steps": steps}

    def __len__(self) -> int:
        return self._count

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        self.seconds = 0.0
        for start in range(0, self._count, batch_size):
            stop = min(start + batch_size, self._count)
            labels = None if self.labels is None else self.labels[start:stop]
            began = time.perf_counter()
            images = generate(self._model, labels, range(self._seed + start, self._seed + stop), batch_size=batch_size,
                              **self._settings)  # fmt: skip
            self.seconds += (
                time.perf_counter() - began
            )  # generate ends with the images on the CPU: nothing is left running
            yield images


def is_run(path: str) -> bool:
    """Whether `path` is for `load_model`: a run or export folder, or a hub id; not a file, nor a folder of images."""
    if os.path.isdir(path):
        return any(os.path.exists(os.path.join(path, mark)) for mark in RUN_MARKS)
    return not os.path.exists(path) and not path.endswith(".npz")


def open_file_or_folder(path: str, *, image_channels: int, image_size: int | None = None) -> Source:
    """An npz, "digits", or a folder of images. A folder's images must be square and of one size, unless `image_size` crops them."""
    if path.endswith(".npz"):
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such file; give an npz, a folder of images, or a run")
        return NpzSource(path)
    own_size = 32 if path == "digits" else None
    size = image_size or own_size or _common_size(path)
    return DatasetSource(open_dataset(path, image_size=size, image_channels=image_channels), Path(path).name)


def choose_labels(
    rule: str, count: int, num_classes: int, reference: Tensor | None, seed: int
) -> Tensor | None:
    """Labels (count,) to draw for: the reference's own, repeated; each class alike; or random ones. None without classes.

    Raises `UserError` where the reference has classes that the model does not know, or none.
    """
    if num_classes == 0:
        return None
    if rule == "balanced":
        return torch.arange(count) % num_classes
    if rule == "random":
        return torch.randint(num_classes, (count,), generator=torch.Generator().manual_seed(seed))
    if rule != "reference":
        raise UserError(f"label rule {rule!r} is unknown; use one of {', '.join(LABEL_RULES)}")
    if reference is None:
        raise UserError("the reference has no classes to take labels from; use --labels balanced")
    if int(reference.max()) >= num_classes:
        raise UserError(
            f"the reference has label {int(reference.max())}, the model {num_classes} classes; "
            "use --labels balanced, or the reference it was trained on"
        )
    # for fewer images than the reference has: every k-th, so that sorted classes are all met
    return (
        reference[torch.arange(count) % len(reference)]
        if count >= len(reference)
        else reference[(torch.arange(count) * len(reference)) // count]
    )


def _common_size(folder: str) -> int:
    files, _, _ = list_pictures(folder)
    first: tuple[str, tuple[int, int]] | None = None
    for file in files:
        try:
            with Image.open(file) as picture:
                size = picture.size
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{file} cannot be read ({_one_line(error)}); delete or repair it") from error
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
    assert first is not None  # list_pictures refuses an empty folder
    return first[1][0]


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]
