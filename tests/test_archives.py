"""Tar shards, Hugging Face data sets on disk, and the captions of each kind of source."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldm_dcn.data import open_dataset
from ldm_dcn.errors import UserError
from ldm_dcn.images import Images


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (10, 8), (level,) * 3).save(file, format="PNG")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def shards(folder: Path, **notes: Any) -> Path:
    """Two shards of three samples; image i has level 10 i and class i % 2."""
    for shard in range(2):
        files: dict[str, bytes] = {}
        for i in range(3 * shard, 3 * shard + 3):
            files |= {f"{i:04d}.png": png(10 * i), f"{i:04d}.cls": str(i % 2).encode()}
            files |= {f"{i:04d}.{kind}": make(i).encode() for kind, make in notes.items()}
        write_tar(folder / f"train-{shard:03d}.tar", files)
    return folder


def levels(images: Images) -> list[int]:
    return (images.images(range(len(images)))[:, 0, 0, 0] * 127.5 + 127.5).round().int().tolist()


# ------------------------------------------------------------------------------------------- tar shards


def test_tars_are_read_in_place(tmp_path: Path) -> None:
    images = open_dataset(shards(tmp_path), image_size=4)
    assert levels(images) == [0, 10, 20, 30, 40, 50]
    assert images.labels.tolist() == [0, 1, 0, 1, 0, 1] and images.class_names == ("0", "1")
    assert images.name(4) == "train-001.tar/0004.png" and images.size(4) == len(png(40))
    assert images.place(4) == f"{tmp_path / 'train-001.tar'}: 0004.png"
    assert levels(open_dataset(tmp_path / "train-001.tar", image_size=4)) == [30, 40, 50]
    assert levels(open_dataset(tmp_path, image_size=4, split="train")) == levels(images)
    assert len(list(tmp_path.iterdir())) == 2


def test_names_of_classes_lie_beside_tars(tmp_path: Path) -> None:
    shards(tmp_path)
    names = tmp_path / "classnames.txt"
    names.write_text("cat\nred fox\ndog\n", encoding="utf-8")
    for source in (tmp_path, tmp_path / "train-001.tar"):
        assert open_dataset(source).class_names == ("cat", "red fox", "dog")
    above = tmp_path / "test"  # as CLIP_benchmark lays its sets out
    above.mkdir()
    for tar in tmp_path.glob("*.tar"):
        tar.rename(above / tar.name)
    assert open_dataset(above).class_names == ("cat", "red fox", "dog")
    for content, told in (("cat\n", "names 1 classes in 1 lines, and the images have 2"), ("cat\n\ndog", "names 2 classes in 3 lines")):  # fmt: skip
        names.write_text(content)
        with pytest.raises(UserError, match=rf"classnames.txt {told}"):
            open_dataset(above)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_kind(tmp_path: Path, format: int) -> None:
    long = "a" * (120 if format != tarfile.USTAR_FORMAT else 90)
    files = {
        f"./deep.er/{long}.PNG": png(10),
        "x.png": png(20),
        "x.seg.png": png(99),
        "._x.png": b"",
        "readme": b"",
    }
    images = open_dataset(write_tar(tmp_path / "a.tar", files, format), image_size=4)
    assert levels(images) == [10, 20] and images.num_classes == 0
    assert images.name(0) == f"a.tar/deep.er/{long}.png"


def test_labels_of_tars(tmp_path: Path) -> None:
    entry = json.dumps({"label": 3, "text": "x"}).encode()
    images = open_dataset(write_tar(tmp_path / "json.tar", {"0.png": png(0), "0.json": entry}))
    assert images.labels.tolist() == [3] and images.num_classes == 4
    with pytest.raises(UserError, match=r"1 of 2 images .* have no class"):
        open_dataset(write_tar(tmp_path / "some.tar", {"0.png": png(0), "0.cls": b"1", "1.png": png(1)}))
    with pytest.raises(UserError, match=r"some\.tar/0\.png: its class is no number"):
        open_dataset(write_tar(tmp_path / "some.tar", {"0.png": png(0), "0.cls": b"cat"}))


def test_broken_samples_are_noted(tmp_path: Path) -> None:
    files = {
        "0.png": png(0),
        "1.png": b"",
        "2.jpg": b"<html>",
        "3.png": png(30)[:45],
        "4.png": pickle.dumps(print),
    }
    images = open_dataset(write_tar(tmp_path / "a.tar", files), image_size=4, max_bad=4)
    _, kept = images.read(range(5))
    assert kept.tolist() == [0]
    assert images.bad[1].reason == "empty file" and images.bad[1].path == f"{tmp_path / 'a.tar'}: 1.png"
    assert images.bad[2].reason == "not an image, or of a format that Pillow does not know"
    assert "0x" not in images.bad[3].reason  # no address, which would differ in every run


def of_size(tar: bytes, size: int) -> bytes:
    """`tar` whose first file says to be of that size, in the notation for large ones and with a right checksum."""
    header = bytearray(tar[:512])
    header[124:136] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + tar[512:]


def test_damaged_tars_are_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{i}.png": png(i) for i in range(4)})
    whole = path.read_bytes()
    header = 3 * 2 * 512 * (1 if len(png(0)) <= 512 else 2)
    assert whole[header : header + 5] == b"3.png"
    cases = {
        "in a picture": whole[: header - 600],
        "in a header": whole[: header + 100],
        "between two": whole[:header],
        "in the last picture": whole[: header + 512 + 10],
        "a flipped byte in the first header": bytes([whole[0] ^ 1]) + whole[1:],
        "a flipped byte in a header": whole[: header + 3] + b"X" + whole[header + 4 :],
        "a size beyond 64 bits": of_size(whole, 2**80),
        "nothing": b"",
        "a web page": b"<html>" * 300,
    }
    for case, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=r"a\.tar .*(cannot be read|cut short|damaged header).*copy or download"
        ):
            open_dataset(path)
            pytest.fail(case)


def test_tars_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"compressed tar.*gunzip"):
        open_dataset(tmp_path)
    with pytest.raises(UserError, match="hold no images"):
        open_dataset(write_tar(tmp_path / "text.tar", {"0.txt": b"hello"}))
    with pytest.raises(UserError, match=r"sample 0 holds several images \(png, jpg\)"):
        open_dataset(write_tar(tmp_path / "two.tar", {"0.png": png(0), "0.jpg": png(0)}))
    with pytest.raises(UserError, match=r"holds 0\.png twice"):
        twice = write_tar(tmp_path / "twice.tar", {"0.png": png(0)})
        with tarfile.open(twice, "a") as tar:
            tar.addfile(tarfile.TarInfo("0.png"))
        open_dataset(twice)


# ------------------------------------------------------------------------------------------- data sets on disk


def saved(folder: Path, **columns: Any) -> Path:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict(columns)
    pictures = [name for name, values in columns.items() if isinstance(values[0], dict)]
    for name in pictures:
        rows = rows.cast_column(name, datasets.Image())
    if "label" in columns:
        rows = rows.cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
    datasets.disable_progress_bars()
    rows.save_to_disk(folder)
    return folder


def picture(level: int) -> dict[str, Any]:
    return {"bytes": png(level), "path": None}


def test_saved_data_sets(tmp_path: Path) -> None:
    folder = saved(
        tmp_path / "d",
        image=[picture(0), picture(10), {"bytes": b"torn", "path": None}, picture(30)],
        label=[1, 0, 1, 1],
        captions=[["one", "two"], ["three"], ["x"], []],
    )
    images = open_dataset(folder, image_size=4, max_bad=1)
    assert images.class_names == ("cat", "dog") and images.labels.tolist() == [1, 0, 1, 1]
    pixels, kept = images.read(range(4))
    assert kept.tolist() == [0, 1, 3] and pixels[:, 0, 0, 0].tolist() == [0, 10, 30]
    assert images.bad[2].path == f"{folder}, row 2"
    assert images.edition == open_dataset(folder).edition
    assert images.edition != open_dataset(saved(tmp_path / "other", image=[picture(9)] * 4)).edition
    images.use_captions()
    assert [images.captions(i) for i in range(4)] == [["one", "two"], ["three"], ["x"], []]
    with pytest.raises(UserError, match="name one of label, captions with --captions"):
        images.use_captions("prose")
    images.use_captions("class-names")
    assert images.captions(1) == ["cat"]


def test_saved_data_sets_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no column of images"):
        open_dataset(saved(tmp_path / "text", text=["a"]))
    folder = saved(tmp_path / "d", image=[picture(0)] * 40)
    arrow = next(folder.glob("*.arrow"))
    whole = arrow.read_bytes()
    for content in (whole[:300], b"<html>" * 100, b""):
        arrow.write_bytes(content)
        with pytest.raises(UserError, match=r"the data set .*/d cannot be read .*copy it again"):
            open_dataset(folder)
    arrow.write_bytes(whole)
    (folder / "state.json").write_bytes(pickle.dumps(print))
    with pytest.raises(UserError, match="cannot be read"):
        open_dataset(folder)
    (tmp_path / "splits" / "train").mkdir(parents=True)
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(
        UserError, match=r"several splits \(train\); give one of them, such as .*splits/train"
    ):
        open_dataset(tmp_path / "splits")


def test_without_the_package_the_mend_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"`pip install -c constraints\.txt datasets`"):
        open_dataset(tmp_path)


# ------------------------------------------------------------------------------------------- captions


def captions(source: Path, field: str | None = None) -> list[list[str]]:
    images = open_dataset(source, image_size=4)
    images.use_captions(field)
    return [images.captions(i) for i in range(len(images))]


def test_captions_of_tars(tmp_path: Path) -> None:
    assert captions(shards(tmp_path / "txt", txt=lambda i: f" number {i}\n\nalso {i}\n"))[4] == [
        "number 4",
        "also 4",
    ]
    entry = shards(
        tmp_path / "json", json=lambda i: json.dumps({"caption": f"number {i}", "alt": ["a", "b"]})
    )
    assert captions(entry)[5] == ["number 5"] and captions(entry, "alt")[5] == ["a", "b"]
    assert captions(entry, "class-names")[:2] == [["0"], ["1"]]
    with pytest.raises(UserError, match="have no captions"):
        captions(shards(tmp_path / "none"))
    with pytest.raises(UserError, match=r"0000\.png cannot be read"):
        captions(shards(tmp_path / "torn", json=lambda i: "{"))
    with pytest.raises(UserError, match="takes a string or a list of strings"):
        captions(shards(tmp_path / "odd", json=lambda i: '{"text": 7}'))


def test_captions_of_folders(tmp_path: Path) -> None:
    for name in ("a/0.png", "b/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(0))
    with pytest.raises(UserError, match=r"neither a metadata\.jsonl nor \.txt files"):
        captions(tmp_path)
    (tmp_path / "b" / "1.txt").write_text("eine Zahl\nun nombre\n", encoding="utf-8")
    assert captions(tmp_path) == [[], ["eine Zahl", "un nombre"], []]
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a/0.png", "text": "zero"}\n{"file_name": "a/0.png", "text": "nought"}\n'
    )
    (tmp_path / "b" / "metadata.jsonl").write_text('{"file_name": "2.png", "text": ["two", "deux"]}\n')
    assert captions(tmp_path) == [["zero", "nought"], [], ["two", "deux"]]
    assert captions(tmp_path, "class-names") == [["a"], ["b"], ["b"]]
    with pytest.raises(
        UserError, match=r"line 1 has no prose; name its field with --captions \(it has file_name, text"
    ):
        captions(tmp_path, "prose")
    (tmp_path / "b" / "metadata.jsonl").write_text('{"file_name": "2.png", "text"')
    with pytest.raises(UserError, match=r"b/metadata\.jsonl cannot be read"):
        captions(tmp_path)


def test_sources_without_captions(tmp_path: Path) -> None:
    digits = open_dataset("digits", image_size=8)
    with pytest.raises(UserError, match="--captions class-names"):
        digits.use_captions()
    digits.use_captions("class-names")
    assert digits.captions(5) == [str(int(digits.labels[5]))]
    (tmp_path / "0.png").write_bytes(png(0))
    with pytest.raises(UserError, match="no classes"):
        open_dataset(tmp_path).use_captions("class-names")
    assert torch.equal(open_dataset(tmp_path).labels, torch.zeros(1, dtype=torch.int64))
