"""The data room: digits, every kind of picture a folder may hold, broken ones by name, and the encoding into latents."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from ldm_dcn.autoencoder import load_autoencoder, to_uint8
from ldm_dcn.data import open_dataset, rank_in_class, split_indices
from ldm_dcn.errors import UserError
from ldm_dcn.images import centre_crop, to_float
from ldm_dcn.latents import encode_dataset


def picture(width: int = 20, height: int = 16, mode: str = "RGB") -> Image.Image:
    """A smooth picture whose four corners differ."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    array = np.stack([255 * x, 255 * y, 255 * (1 - x) * y], -1).astype(np.uint8)
    return Image.fromarray(array).convert(mode)


def read(path: Path, size: int = 16, channels: int = 3) -> torch.Tensor:
    """The only picture in the folder of `path`."""
    pixels, kept = open_dataset(path.parent, image_size=size, image_channels=channels).read([0])
    assert kept.tolist() == [0]
    return pixels[0]


# --------------------------------------------------------------------------------------------------- digits


def test_digits_are_all_there():
    digits = open_dataset("digits", image_size=32, image_channels=1)
    assert len(digits) == 1797 and digits.num_classes == 10 and digits.class_names[3] == "3"
    assert torch.bincount(digits.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    images = digits.images([0, 5, 1796])
    assert images.shape == (3, 1, 32, 32) and images.dtype == torch.float32
    assert images.min() == -1 and images.max() <= 1
    assert torch.equal(
        to_float(to_uint8(images)), images
    )  # on the 8-bit grid, as whatever is compared with them
    colour = open_dataset("digits", image_size=16, image_channels=3).images([7])
    assert colour.shape == (1, 3, 16, 16) and torch.equal(colour[:, 0], colour[:, 2])


def test_splits_share_nothing_and_hold_every_class():
    digits = {
        split: open_dataset("digits", image_channels=1, split=split) for split in ("all", "train", "held-out")
    }
    labels = digits["all"].labels
    train, held_out = split_indices(labels, "train"), split_indices(labels, "held-out")
    assert torch.equal(torch.cat([train, held_out]).sort().values, torch.arange(1797))
    assert len(digits["held-out"]) == len(held_out) == 445
    assert torch.bincount(digits["held-out"].labels).min() >= 43
    assert torch.equal(digits["held-out"].images([10]), digits["all"].images([int(held_out[10])]))
    assert rank_in_class(torch.tensor([2, 0, 2, 2, 0, 5])).tolist() == [0, 0, 1, 2, 1, 0]
    with pytest.raises(ValueError, match="held-out"):
        open_dataset("digits", split="test")


# --------------------------------------------------------------------------------------------------- kinds of picture


def test_every_kind_of_picture_is_read_alike(tmp_path):
    """The same colours through each format: at most JPEG's rounding apart."""
    expected = torch.from_numpy(np.array(centre_crop(picture(), 16))).permute(2, 0, 1).float()

    def save(name: str, image: Image.Image, **options) -> Path:
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        image.save(folder / name, **options)
        return folder / name

    half = picture().convert("RGBA")
    half.putalpha(255)
    cases = {
        "rgb.png": (save("rgb.png", picture()), 0),
        "alpha.png": (save("alpha.png", half), 0),
        "upper.JPEG": (save("upper.JPEG", picture(), format="JPEG", quality=98, subsampling=0), 4),
        "cmyk.jpg": (save("cmyk.jpg", picture(mode="CMYK"), quality=98), 8),
        "first_frame.gif": (
            save("first_frame.gif", picture(), save_all=True, append_images=[Image.new("RGB", (20, 16))]),
            60,
        ),
        "lossless.webp": (save("lossless.webp", picture(), lossless=True), 0),
        "bmp.bmp": (save("bmp.bmp", picture()), 0),
    }
    turned = picture().transpose(
        Image.Transpose.ROTATE_90
    )  # as a camera held upright stores it, with a note to turn back
    exif = Image.Exif()
    exif[0x0112] = 6
    cases["exif.jpg"] = (save("exif.jpg", turned, exif=exif, quality=98, subsampling=0), 4)
    for name, (path, tolerance) in cases.items():
        pixels = read(path)
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, 16, 16), name
        assert (pixels.float() - expected).abs().max() <= tolerance, name


def test_transparent_parts_lie_on_white_whatever_colour_hides_there(tmp_path):
    for name, image in {
        "rgba": Image.new("RGBA", (16, 16), (200, 0, 0, 0)),
        "la": Image.new("LA", (16, 16), (3, 0)),
        "palette": Image.new("P", (16, 16), 0),
    }.items():
        (tmp_path / name).mkdir()
        options = {"transparency": 0} if name == "palette" else {}
        image.save(tmp_path / name / "clear.png", **options)
        assert read(tmp_path / name / "clear.png").eq(255).all(), name


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    ramp = np.linspace(150, 65400, 16 * 16).reshape(16, 16).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    for channels in (1, 3):
        pixels = read(tmp_path / "ramp.png", channels=channels)
        assert pixels.shape[0] == channels
        assert np.abs(pixels[0].numpy() - ramp / 257).max() <= 0.51
    Image.fromarray(ramp).save(tmp_path / "ramp.ppm")  # of which Pillow says 32 bits
    assert torch.equal(read(tmp_path / "ramp.ppm"), read(tmp_path / "ramp.png"))
    Image.fromarray(ramp.astype(np.int32) // 257).save(tmp_path / "wide.tiff")
    (refused,) = open_dataset(tmp_path).try_read([2])
    assert "wide.tiff" in refused.path and "32 bits, whose range is unknown" in refused.reason


def test_grey_and_colour_come_as_asked(tmp_path):
    picture(mode="L").save(tmp_path / "grey.png")
    colour = read(tmp_path / "grey.png", channels=3)
    assert torch.equal(colour[0], colour[1]) and torch.equal(
        colour[0], read(tmp_path / "grey.png", channels=1)[0]
    )


def test_colour_that_turns_grey_is_told(tmp_path, capsys):
    grey = picture(mode="L")
    grey.save(tmp_path / "0.png")
    for number, mode in enumerate(("RGB", "RGBA", "P", "LA", "1"), start=1):
        grey.convert(mode).save(tmp_path / f"{number}.png")
    grey.convert("RGB").save(tmp_path / "6.jpg")
    (tmp_path / "7.png").write_text("no picture")
    open_dataset(tmp_path, image_channels=1)
    assert capsys.readouterr().err == ""
    for kind in ("jpg", "png"):
        picture().save(tmp_path / f"8.{kind}")
        open_dataset(tmp_path, image_channels=3)
        assert capsys.readouterr().err == ""
        images = open_dataset(tmp_path, image_channels=1)
        assert images.find_colour() == str(tmp_path / f"8.{kind}")
        told = f"warning: {tmp_path} is read as grey, and {tmp_path / f'8.{kind}'} is in colour; "
        assert capsys.readouterr().err == f"{told}an autoencoder of 3 channels would keep its colours\n"
        (tmp_path / f"8.{kind}").unlink()
    for number in range(100):
        picture(4, 4).save(tmp_path / f"many-{number}.png")
    looked: list[int] = []
    images = open_dataset(tmp_path, image_channels=1)
    images._file = lambda index: looked.append(index) or str(tmp_path / "0.png")  # type: ignore[method-assign]
    assert images.find_colour() is None and len(looked) <= 16 and max(looked) > 90


def test_crop_is_central_and_keeps_proportions():
    image = Image.new("L", (90, 30))
    ImageDraw.Draw(image).rectangle([30, 0, 59, 29], fill=255)  # the middle third
    assert np.array(centre_crop(image, 30)).min() == 255
    small = np.array(centre_crop(image, 10))  # one halving, then bicubic by 2/3
    assert small.shape == (10, 10) and small[:, 1:-1].min() >= 250
    halved = picture(64, 64).resize((32, 32), Image.Resampling.BOX)
    assert centre_crop(picture(64, 64), 32).tobytes() == halved.tobytes()  # at just twice the size too
    checks = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    assert set(np.unique(np.array(centre_crop(checks, 16))).tolist()) <= {
        127,
        128,
    }  # boxes average; bicubic alone would alias
    assert centre_crop(picture(7, 5), 16).size == (16, 16)  # smaller ones are enlarged
    assert centre_crop(picture(500, 333), 48).size == (48, 48)


# --------------------------------------------------------------------------------------------------- folders


def test_class_folders_give_labels_in_name_order(tmp_path):
    for name, count in (("b_dog", 2), ("a_cat", 3)):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for i in range(count):
            picture().save(tmp_path / name / ("deeper" if i == 0 else ".") / f"{i}.png")
    (tmp_path / "a_cat" / "notes.txt").write_text("no picture")
    (tmp_path / "a_cat" / "._0.png").write_bytes(b"a Macintosh's shadow of 0.png")
    (tmp_path / ".hidden").mkdir()
    images = open_dataset(tmp_path, image_size=8)
    assert images.class_names == ("a_cat", "b_dog") and images.labels.tolist() == [0, 0, 0, 1, 1]
    assert images.images(range(5)).shape == (5, 3, 8, 8)


def test_flat_folders_have_no_classes(tmp_path):
    for name in ("2.png", "10.png", "1.png"):
        picture().save(tmp_path / name)
    images = open_dataset(tmp_path, image_size=8, image_channels=1)
    assert (len(images), images.num_classes, images.labels.tolist()) == (3, 0, [0, 0, 0])


def test_folders_that_cannot_be_meant_are_refused(tmp_path):
    with pytest.raises(UserError, match="neither a folder"):
        open_dataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images"):
        open_dataset(tmp_path / "empty")
    (tmp_path / "mixed" / "class").mkdir(parents=True)
    picture().save(tmp_path / "mixed" / "a.png")
    picture().save(tmp_path / "mixed" / "class" / "b.png")
    with pytest.raises(UserError, match=r"a\.png.*beside class folders"):
        open_dataset(tmp_path / "mixed")
    (tmp_path / "hole" / "x").mkdir(parents=True)
    (tmp_path / "hole" / "y").mkdir(parents=True)
    picture().save(tmp_path / "hole" / "x" / "a.png")
    with pytest.raises(UserError, match="hole/y holds no images"):
        open_dataset(tmp_path / "hole")


# --------------------------------------------------------------------------------------------------- broken pictures


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Two classes, twelve pictures, six of them broken, each in its own way."""
    good, jpeg = io.BytesIO(), io.BytesIO()
    picture(200, 200).save(good, format="PNG")
    picture(200, 200).save(jpeg, format="JPEG")
    flipped = bytearray(good.getvalue())
    flipped[len(flipped) // 2] ^= 0xFF
    broken = {"zero.png": b"", "page.jpg": b"<html>not found</html>", "cut.jpg": jpeg.getvalue()[:900],
              "cut.png": good.getvalue()[:400], "crc.png": bytes(flipped), "head.png": good.getvalue()[:20]}  # fmt: skip
    for label, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (12, 12), (100 * label + 10 * i,) * 3).save(tmp_path / name / f"good{i}.png")
        for file in list(broken)[3 * label : 3 * label + 3]:
            (tmp_path / name / file).write_bytes(broken[file])
    return tmp_path


def test_broken_pictures_are_named_with_the_mend(damaged):
    images = open_dataset(damaged, image_size=8)
    with pytest.raises(UserError) as caught:
        encode_dataset(images, load_autoencoder("identity"), batch_size=2)
    text = str(caught.value)
    assert "6 of 12 images" in text and "cut.jpg" in text and "and 3 more" in text  # found in one go
    assert "delete or repair" in text and "data.max_bad=6" in text and "\n" not in text
    assert {Path(bad.path).name for bad in images.bad.values()} == {
        "zero.png", "page.jpg", "cut.jpg", "cut.png", "crc.png", "head.png"}  # fmt: skip
    assert "empty file" in next(bad.reason for bad in images.bad.values() if bad.path.endswith("zero.png"))
    with pytest.raises(UserError, match=r"zero\.png"):
        images.images(range(len(images)))


@pytest.mark.parametrize("limit", [6, 0.5])
def test_so_many_may_be_left_out_and_labels_stay_right(damaged, limit):
    images = open_dataset(damaged, image_size=8, max_bad=limit)
    latents = encode_dataset(images, load_autoencoder("identity"), batch_size=4)
    assert latents.labels.tolist() == [0, 0, 0, 1, 1, 1] and latents.num_classes == 2
    grey = (latents.moments[:, 0, 0, 0] * 127.5 + 127.5).round().int().tolist()
    assert grey == [0, 10, 20, 100, 110, 120]


def test_one_too_many_is_refused(damaged):
    with pytest.raises(UserError, match=r"data\.max_bad=6"):
        encode_dataset(open_dataset(damaged, image_size=8, max_bad=5), load_autoencoder("identity"))


def test_a_picture_of_too_many_pixels_is_broken(tmp_path, monkeypatch):
    picture(40, 40).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(UserError, match=r"bomb\.png.*more than 1,000"),
    ):
        open_dataset(tmp_path, image_size=8).images([0])


def test_damaged_exif_is_a_broken_picture(tmp_path, monkeypatch):
    """Pillow fails in this way on one damaged JPEG in some hundred; which depends on its version."""
    picture(12, 12).save(tmp_path / "exif.jpg")

    def fail(_):
        raise struct.error("required argument is not an integer")

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    (bad,) = open_dataset(tmp_path, image_size=8).try_read([0])
    assert bad.path.endswith("exif.jpg") and bad.reason == "required argument is not an integer"


def test_a_line_of_pixels_does_not_fill_the_memory(tmp_path):
    """Its short side would become 256 pixels, its long side 10 million, before the crop: 8 GB."""
    Image.new("1", (1, 40_000)).save(tmp_path / "line.png")
    Image.new("L", (3, 300), 7).save(tmp_path / "thin.png")
    line, thin = open_dataset(tmp_path, image_size=256).try_read([0, 1])
    assert "1x40000, 256 times as wide and as high to be cropped, more than 89," in line.reason
    assert thin.shape == (3, 256, 256) and bool((thin == 7).all())


# --------------------------------------------------------------------------------------------------- latents


def test_encoding_keeps_order_and_reports_progress():
    digits = open_dataset("digits", image_size=32, image_channels=1, split="held-out")
    autoencoder = load_autoencoder("digits")
    done: list[int] = []
    latents = encode_dataset(digits, autoencoder, batch_size=100, progress=done.append)
    assert done == [100, 100, 100, 100, 45]
    assert latents.moments.shape == (445, 8, 8, 8) and latents.moments.dtype == torch.float32
    assert torch.equal(latents.labels, digits.labels) and len(latents) == 445
    assert latents.fingerprint == autoencoder.fingerprint()
    torch.testing.assert_close(
        latents.moments[101:103], autoencoder.encode(digits.images([101, 102])), rtol=1e-4, atol=1e-5
    )


def test_channels_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"data\.image_channels=1"):
        encode_dataset(open_dataset("digits", image_channels=3), load_autoencoder("digits"))


def test_the_script_that_made_the_digits_makes_them_again(tmp_path):
    pytest.importorskip("sklearn")
    from ldm_dcn import data, make_digits

    made = np.load(make_digits.make_digits(tmp_path / "digits.npz"))
    shipped = np.load(data.DIGITS_FILE)
    assert all(np.array_equal(made[name], shipped[name]) for name in ("images", "labels"))
