"""Cuts a small data set out of the photographs in scikit-image's and scikit-learn's packages: `python -m ldm_dcn.make_photographs OUT`.

OUT/train and OUT/held-out become image folders with one class a photograph and 16x16 RGB crops as PNG; OUT/NOTICE.txt says whose the
photographs are. Each photograph is shrunk by a whole number, box by box, until its shorter side is about 150 pixels, and divided into
tiles; of every four tiles on a diagonal one is held out. A crop never leaves its tile, so that no pixel is in both folders.
Needs the extra `[assets]`. docs/photographs.md says what this is good for, and what not.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import Parser, UserError, exit_on_user_error
from .places import check_folder_place

CROP = 16  # pixels a side
STRIDE = 6  # pixels between crops of a tile; smaller ones overlap more
TILE = 40  # pixels a side at least
SHORT_SIDE = 150  # pixels at least, of a photograph that was larger
HOLD_OUT_EVERY = 4  # tiles on a diagonal
FLATTEST = 4.0  # grey levels of standard deviation: flatter crops, of skies and black corners, are left out
SPLITS = ("train", "held-out")
INSTALL = "pip install -c constraints.txt scikit-image scikit-learn"


@dataclass(frozen=True)
class Photograph:
    """One file in an installed package. `sha256`: its first 16 hex digits; `rights`: licence and photographer, as the package says."""

    name: str
    package: str
    file: str
    sha256: str
    rights: str


PHOTOGRAPHS = tuple(
    Photograph(name, package, file, sha256, rights)
    for package, name, file, sha256, rights in (
        ("skimage", "astronaut", "data/astronaut.png", "88431cd9653ccd53", "public domain, NASA"),
        ("skimage", "brick", "data/brick.png", "7966caf324f6ba84", "CC0, CC0Textures"),
        ("skimage", "camera", "data/camera.png", "b0793d2adda0fa6a", "CC0, Lav Varshney"),
        ("skimage", "chelsea", "data/chelsea.png", "596aa1e7cb875eb7", "CC0, Stefan van der Walt"),
        ("sklearn", "china", "datasets/images/china.jpg", "8378025ad2519d64", "CC BY 2.0, danielbuechele"),
        ("skimage", "coffee", "data/coffee.png", "cc02f8ca188b167c", "CC0, Rachel Michetti"),
        ("sklearn", "flower", "datasets/images/flower.jpg", "a77f6ec41e353afd", "CC BY 2.0, vultilion"),
        ("skimage", "grass", "data/grass.png", "b6b6022426b38936", "CC0, linolafett"),
        ("skimage", "gravel", "data/gravel.png", "c48615b451bf1e60", "CC0, CC0Textures"),
        ("skimage", "hubble", "data/hubble_deep_field.jpg", "3a19c5dd8a927a93", "public domain, NASA"),
        ("skimage", "retina", "data/retina.jpg", "38a07f36f27f095e", "CC0, Mikael Häggström"),
        ("skimage", "rocket", "data/rocket.jpg", "c2dd0de7c538df8d", "public domain, SpaceX"),
    )
)


def read_photograph(photograph: Photograph) -> Image.Image:
    """Open a photograph, in RGB. Nothing of the package is imported, and nothing downloaded.

    Raises `UserError` where the package is not installed, or carries another picture under that name.
    """
    spec = importlib.util.find_spec(photograph.package)
    if spec is None or not spec.submodule_search_locations:
        project = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[photograph.package]
        raise UserError(
            f"{project}, which carries the photograph {photograph.name}, is not installed; {INSTALL}"
        )
    path = Path(spec.submodule_search_locations[0]) / photograph.file
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); take the tested version: {INSTALL}"
        ) from None
    if not hashlib.sha256(content).hexdigest().startswith(photograph.sha256):
        raise UserError(
            f"{path} is not the picture this data set is made of; take the tested version: {INSTALL}"
        )
    with Image.open(path) as picture:
        return picture.convert("RGB")


def shrink(picture: Image.Image) -> Image.Image:
    """The means of boxes of n x n pixels, n as large as leaves SHORT_SIDE."""
    return picture.reduce(max(1, min(picture.size) // SHORT_SIDE))


def crops(height: int, width: int) -> Iterator[tuple[str, int, int]]:
    """Split, top and left of every crop of a picture of this size."""
    rows, columns = (_edges(side) for side in (height, width))
    for i, (top, bottom) in enumerate(rows):
        for j, (left, right) in enumerate(columns):
            split = SPLITS[(i + j) % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1]
            for y in range(top, bottom - CROP + 1, STRIDE):
                for x in range(left, right - CROP + 1, STRIDE):
                    yield split, y, x


def _edges(side: int) -> list[tuple[int, int]]:
    """First pixel of each tile along a side, and the one behind its last."""
    count = max(1, side // TILE)
    return [(k * side // count, (k + 1) * side // count) for k in range(count)]


def make_photographs(out: Path, pictures: Mapping[str, Image.Image]) -> dict[str, int]:
    """Write the crops of `pictures` (RGB, by class name) to `out`; returns how many each split has.

    Raises `UserError` for a folder that holds something already, and for a picture that gives a split nothing.
    """
    check_folder_place(out, "name another folder")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; name a new folder, or remove it")
    counts = dict.fromkeys(SPLITS, 0)
    for name, picture in pictures.items():
        pixels = np.asarray(shrink(picture))
        written = dict.fromkeys(SPLITS, 0)
        for split in SPLITS:
            (out / split / name).mkdir(parents=True, exist_ok=True)
        for split, top, left in crops(*pixels.shape[:2]):
            crop = pixels[top : top + CROP, left : left + CROP]
            if crop.std(axis=(0, 1)).max() >= FLATTEST:
                Image.fromarray(crop).save(out / split / name / f"{top:03}_{left:03}.png")
                written[split] += 1
        for split in SPLITS:
            if not written[split]:
                raise UserError(
                    f"the photograph {name} gives no crops for {split}: it is too small or too flat"
                )
            counts[split] += written[split]
    return counts


def notice() -> str:
    """Whose the photographs are."""
    lines = [f"{p.name}: {p.rights}; {p.file} of {p.package}" for p in PHOTOGRAPHS]
    return "Crops, shrunk, of these photographs:\n" + "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m ldm_dcn.make_photographs", description=__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    options = parser.parse_args(arguments)
    with exit_on_user_error():
        pictures = {photograph.name: read_photograph(photograph) for photograph in PHOTOGRAPHS}
        counts = make_photographs(options.out, pictures)
        (options.out / "NOTICE.txt").write_text(notice(), encoding="utf-8")
        print(
            f"{options.out}: {len(pictures)} photographs, "
            + ", ".join(f"{count:,} crops {split}" for split, count in counts.items())
        )


if __name__ == "__main__":
    main()
