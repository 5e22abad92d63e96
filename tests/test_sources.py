"""Sources of images: which labels are drawn for, and ADM's npz."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from eval import npz, sources
from eval.npz import AdmNpzWriter
from ldm_dcn.errors import UserError

# --------------------------------------------------------------------------------------------------- labels


class Labelled(sources.Source):
    """What labels are chosen by: those of a reference, and the names of its classes."""

    tags: ClassVar[dict] = {"source": "photos"}

    def __init__(self, labels: list[int] | None, classes: str | None = None) -> None:
        self.labels = None if labels is None else torch.tensor(labels)
        self.classes = None if classes is None else tuple(classes)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, *_) -> torch.Tensor:
        raise AssertionError


def test_labels_follow_the_rule():
    reference = Labelled([0, 0, 0, 0, 1, 1, 2, 2], "abc")

    def choose(rule, count, classes=3, reference=reference, **more) -> tuple[str | None, list[int]]:
        used, labels = sources.choose_labels(rule, count, classes, reference, 4, **more)
        return used, None if labels is None else labels.tolist()

    for rule in ("reference", "auto"):
        assert choose(rule, 8) == ("reference", reference.labels.tolist())
        assert choose(rule, 16) == ("reference", 2 * reference.labels.tolist())
        assert choose(rule, 4) == ("reference", [0, 0, 1, 2])  # thinned out, all classes met
        in_turn = Labelled([0, 1, 2] * 4, "abc")
        assert choose(rule, 6, reference=in_turn)[1] == [0, 0, 1, 1, 2, 2]
        assert torch.tensor(choose(rule, 15, reference=in_turn)[1]).bincount().tolist() == [5, 5, 5]
        # as is what a whole number of references leaves
        assert choose(rule, 12) == ("reference", [*reference.labels.tolist(), 0, 0, 1, 2])
    assert choose("balanced", 5) == ("balanced", [0, 1, 2, 0, 1])
    assert choose("random", 50) == choose("random", 50) and choose("random", 50)[0] == "random"
    for without in (None, Labelled(None)):  # statistics; images without classes
        assert choose("auto", 5, 3, without) == ("balanced", [0, 1, 2, 0, 1])
        with pytest.raises(UserError, match="no classes to take labels from; use --labels balanced"):
            choose("reference", 8, 2, without)
    assert choose("auto", 5, 0) == choose("balanced", 5, 0) == (None, None)


def test_every_class_has_its_share_of_more_images_than_the_reference_has():
    labels = torch.arange(1000).repeat_interleave(30).tolist()  # sorted, as of class folders
    _, chosen = sources.choose_labels("auto", 50_000, 1000, Labelled(labels), 0)
    assert chosen.bincount().unique().tolist() == [50]


def test_labels_of_other_classes_are_refused():
    """Those of a folder are its places in the order of its class folders; of an npz they are the model's."""
    some = Labelled([0, 1, 1, 2], "abc")
    for rule in ("reference", "auto"):
        with pytest.raises(UserError, match=r"photos has 3 classes, the model 1000; use --labels balanced"):
            sources.choose_labels(rule, 4, 1000, some, 0)
        with pytest.raises(UserError, match=r"photos has 3 classes, the model 2; use --labels balanced"):
            sources.choose_labels(rule, 4, 2, some, 0)
        with pytest.raises(
            UserError, match=r"photos has label 2, the model 2 classes; use --labels balanced"
        ):
            sources.choose_labels(rule, 4, 2, Labelled([0, 1, 1, 2]), 0)
        assert sources.choose_labels(rule, 4, 1000, Labelled([0, 7, 7, 9]), 0)[1].tolist() == [0, 7, 7, 9]
        # Of the data set it learned from (data.num_classes may leave room for more) they mean the same.
        assert sources.choose_labels(rule, 4, 5, some, 0, learned_from="photos")[1].tolist() == [0, 1, 1, 2]
    assert sources.choose_labels("balanced", 4, 1000, some, 0)[1].tolist() == [0, 1, 2, 3]


def test_labels_of_classes_with_other_names_are_taken_where_that_is_asked_for_alone():
    """Folders a_square, b_tri, c_disc number their classes otherwise than disc, square, triangle did."""
    some = Labelled([0, 1, 1, 2], "abc")

    def choose(rule: str, names: Sequence[str], **more: str) -> list[int]:
        return sources.choose_labels(rule, 4, 3, some, 0, class_names=names, **more)[1].tolist()

    told = "class 1 is 'x' to the model and 'b' in the reference photos; use --labels balanced, .* or --labels reference where"
    for names in ("axc", "ax"):
        with pytest.raises(UserError, match=told):
            choose("auto", names)
        assert choose("reference", names) == choose("auto", "abc") == choose("auto", "a") == [0, 1, 1, 2]
        assert choose("balanced", names) == [0, 1, 2, 0]
        assert choose("auto", names, learned_from="photos") == [0, 1, 1, 2]
    assert choose("auto", "012") == [0, 1, 1, 2]  # numbers are no names


# --------------------------------------------------------------------------------------------------- ADM's npz


def read_as_adm(path: Path, batch: int = 7) -> list[np.ndarray]:
    """arr_0 by the rules of guided-diffusion's evaluator: a zip member, its header, then its bytes in batches."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, fortran, dtype = read_header[np.lib.format.read_magic(file)](file)
        assert not fortran and not dtype.hasobject  # what it streams; anything else it reads into memory
        batches = []
        for start in range(0, shape[0], batch):
            size = min(batch, shape[0] - start)
            data = file.read(size * int(np.prod(shape[1:])) * dtype.itemsize)
            batches.append(np.frombuffer(data, dtype).reshape(size, *shape[1:]))
        assert file.read() == b""
    return batches


def test_written_npz_is_read_as_adm_reads(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 1, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (20,), generator=generator)
    path = tmp_path / "new" / "samples.npz"
    with AdmNpzWriter(path, 20, 32, 32) as file:
        for part in images.split(8):
            file.add(part)
        assert not path.exists()  # unfinished
        file.label(labels)
    read = np.concatenate(read_as_adm(path))
    assert read.dtype == np.uint8 and read.shape == (20, 32, 32, 3)
    assert np.array_equal(read[..., 1], images[:, 0].numpy()) and np.array_equal(
        np.load(path)["arr_1"], labels
    )
    assert sources.NpzSource(str(path)).labels.tolist() == labels.tolist()
    with pytest.raises(RuntimeError), AdmNpzWriter(tmp_path / "broken.npz", 20, 32, 32):
        raise RuntimeError("stopped")
    assert not list(tmp_path.glob("broken*"))


def test_images_that_are_stored_as_they_are_stay_on_disk(tmp_path):
    """50,000 images of 256x256 are 9.8 GB, for each process."""
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3), np.uint8)
    stored, compressed, turned = (
        str(tmp_path / f"{name}.npz") for name in ("stored", "compressed", "turned")
    )
    np.savez(stored, arr_0=images, arr_1=np.arange(300))
    np.savez_compressed(compressed, arr_0=images, arr_1=np.arange(300))
    np.savez(turned, arr_0=np.asfortranarray(images))
    for path, mapped in ((stored, True), (turned, True), (compressed, False)):
        array = npz.map_npz(path, "arr_0")
        assert isinstance(array, np.memmap) == mapped and np.array_equal(array, images), path
        source = sources.NpzSource(path)
        part = source.read(290, 300, 5)
        assert np.array_equal(part.permute(0, 2, 3, 1), images[290:])
        part.zero_()  # the reader's own
        assert np.array_equal(source.read(290, 300, 5).permute(0, 2, 3, 1), images[290:])
        whole = Path(path).read_bytes()
        for place in (2_000, len(whole) // 2):  # in what is read at once, and later
            Path(path).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(UserError, match=rf"{path} cannot be read as npz"):
                sources.NpzSource(path)
        Path(path).write_bytes(whole)
    assert sources.NpzSource(stored).labels.tolist() == list(range(300))
