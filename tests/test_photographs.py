"""The crops of photographs, out of small synthetic ones, and the extractor that is trained on them."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval import make_photographs_classifier
from eval.extractors import load_extractor
from eval.fid import evaluate
from ldm_dcn import make_photographs as photographs
from ldm_dcn.config import load_config
from ldm_dcn.data import open_dataset
from ldm_dcn.errors import UserError
from ldm_dcn.make_photographs import (
    CROP,
    SPLITS,
    Photograph,
    crops,
    make_photographs,
    read_photograph,
    shrink,
)
from tiny import ROOT


def numbered(width: int, height: int) -> Image.Image:
    """A picture in which every pixel has a colour of its own: its column, its row, and a wave of both."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, (7 * x + 11 * y) % 256], -1).astype(np.uint8))


def noisy(seed: int, width: int = 200, height: int = 170) -> Image.Image:
    """Noise in one colour."""
    generator = np.random.default_rng(seed)
    return Image.fromarray(
        (generator.integers(0, 256, (height, width, 3)) * np.eye(3)[seed % 3]).astype(np.uint8)
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("crops") / "made"
    make_photographs(out, {"red": noisy(0), "green": noisy(1), "blue": noisy(2)})
    return out


def test_no_pixel_is_in_both_splits(tmp_path):
    """Read back from the files, whose colours say where in the photograph they were."""
    picture = numbered(230, 170)  # no whole number of tiles; not shrunk
    counts = make_photographs(tmp_path / "out", {"numbered": picture})
    seen = {}
    for split in SPLITS:
        found = list((tmp_path / "out" / split).rglob("*.png"))
        assert len(found) == counts[split] > 40
        pixels = np.stack([np.array(Image.open(path)) for path in found])
        assert pixels.shape[1:] == (CROP, CROP, 3)
        for path, crop in zip(found, pixels, strict=True):
            top, left = map(int, path.stem.split("_"))
            assert np.array_equal(crop, np.asarray(picture)[top : top + CROP, left : left + CROP])
        seen[split] = {(x, y) for x, y, _ in pixels.reshape(-1, 3).tolist()}
    assert not seen["train"] & seen["held-out"]
    assert len(seen["train"]) + len(seen["held-out"]) > 0.85 * 230 * 170
    assert 0.15 < len(seen["held-out"]) / len(seen["train"] | seen["held-out"]) < 0.3


@pytest.mark.parametrize("height, width", [(170, 230), (150, 150), (171, 320), (40, 200)])
def test_crops_stay_inside_and_both_splits_have_some(height, width):
    found = list(crops(height, width))
    assert len(found) == len(set(found))
    assert all(0 <= y <= height - CROP and 0 <= x <= width - CROP for _, y, x in found)
    assert {split for split, _, _ in found} == set(SPLITS)


def test_photographs_are_shrunk_by_means_of_boxes():
    picture = noisy(0, 470, 330)
    small = shrink(picture)
    assert small.size == (235, 165)
    boxes = np.asarray(picture).reshape(165, 2, 235, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(small) - boxes).max() <= 0.5
    assert shrink(noisy(0, 299, 400)).size == (299, 400)


def test_the_same_photographs_give_the_same_files(made, tmp_path):
    make_photographs(tmp_path / "again", {"blue": noisy(2), "red": noisy(0), "green": noisy(1)})
    assert files(made) == files(tmp_path / "again") != {}


def test_flat_crops_are_left_out(tmp_path):
    pixels = np.array(noisy(0))
    pixels[:, 100:] = 90
    make_photographs(tmp_path / "half", {"half": Image.fromarray(pixels)})
    lefts = {int(name.split("_")[-1][:3]) for name in files(tmp_path / "half")}
    assert 80 < max(lefts) < 100
    with pytest.raises(UserError, match="photograph grey gives no crops for train"):
        make_photographs(tmp_path / "flat", {"grey": Image.new("RGB", (200, 200), (9, 9, 9))})
    with pytest.raises(UserError, match="held-out: it is too small"):
        make_photographs(tmp_path / "small", {"small": noisy(0, 60, 60)})


def test_nothing_is_written_over(made):
    before = files(made)
    with pytest.raises(UserError, match="not empty; name a new folder"):
        make_photographs(made, {"red": noisy(5)})
    assert files(made) == before


def test_crops_are_an_image_folder(made):
    images = {split: open_dataset(made / split, image_size=CROP) for split in SPLITS}
    for split in SPLITS:
        assert images[split].class_names == ("blue", "green", "red")
    assert len(images["train"]) > 2 * len(images["held-out"])
    first = sorted((made / "train" / "blue").iterdir())[0]
    as_stored = torch.from_numpy(np.array(Image.open(first))).permute(2, 0, 1)
    assert torch.equal(images["train"].read([0])[0][0], as_stored)  # neither resized nor cropped again


# ---- the packages


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scikit-image with one photograph, a.png, and a scikit-learn that is missing."""
    folder = tmp_path / "skimage"
    (folder / "data").mkdir(parents=True)
    numbered(20, 16).convert("L").save(folder / "data" / "a.png")

    def find_spec(name: str) -> importlib.machinery.ModuleSpec | None:
        if name != "skimage":
            return None
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        return spec

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return folder


def test_photographs_come_out_of_the_installed_package(package):
    content = (package / "data" / "a.png").read_bytes()
    known = Photograph("a", "skimage", "data/a.png", hashlib.sha256(content).hexdigest()[:16], "CC0")
    picture = read_photograph(known)
    assert picture.mode == "RGB" and picture.size == (20, 16)
    with pytest.raises(UserError, match=r"a\.png is not the picture.*pip install"):
        read_photograph(Photograph("a", "skimage", "data/a.png", "0" * 16, "CC0"))
    with pytest.raises(UserError, match=r"b\.png cannot be read.*pip install"):
        read_photograph(Photograph("b", "skimage", "data/b.png", "0" * 16, "CC0"))


def test_a_missing_package_is_named_with_the_mend(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as caught:
        photographs.main([str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1
    assert "scikit-image" in said and "pip install -c constraints.txt" in said
    assert not os.path.exists(tmp_path / "out")


def test_the_data_set_made_of_the_real_photographs(tmp_path, capsys):
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    photographs.main([str(tmp_path / "out")])
    assert "12 photographs, 4,762 crops train, 1,518 crops held-out" in capsys.readouterr().out
    assert "flower: CC BY 2.0, vultilion" in (tmp_path / "out" / "NOTICE.txt").read_text(encoding="utf-8")


# ---- the extractor


def test_the_extractor_is_trained_loaded_and_named(made, tmp_path, capsys):
    file = tmp_path / "made.safetensors"
    make_photographs_classifier.main([str(made), str(file), "--steps", "30"])
    assert "held out" in capsys.readouterr().out
    table = evaluate(
        [str(made / "held-out")],
        extractor=f"classifier:{file}",
        reference=str(made / "train"),
        progress=False,
    )
    assert table.metric == "FD-photographs-v1" and "FID" not in str(table.names)
    held_out, noise = table.columns[0], table.columns[-1]
    assert held_out.scores["class_accuracy"] > 0.9  # three colours
    assert held_out.scores["fd"] < 0.1 * noise.scores["fd"]
    extractor = load_extractor(f"classifier:{file}")
    grey = torch.randint(0, 256, (5, 1, 24, 24), dtype=torch.uint8)
    assert extractor(grey).shape == (5, 64)
    assert torch.equal(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)))


def test_what_is_no_extractor_is_refused(tmp_path):
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    digits = ROOT / "eval" / "assets" / "digits_classifier.safetensors"  # says nothing of itself
    for path in (tmp_path / "junk.safetensors", digits, tmp_path / "nowhere.safetensors"):
        with pytest.raises(UserError, match="make_photographs_classifier"):
            load_extractor(f"classifier:{path}")


def test_the_configs_differ_in_the_swap_alone():
    unet, dcn = (
        load_config(ROOT / "configs" / f"photographs_{name}.yaml").resolved() for name in ("unet", "dcn")
    )
    assert dcn["model"].pop("swap") != unet["model"].pop("swap")
    assert {**dcn, "run": None} == {**unet, "run": None}
