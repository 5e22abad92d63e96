"""Trains the extractor "photographs-v1" of `ldm_dcn.make_photographs`' crops: `python -m eval.make_photographs_classifier CROPS FILE`.

It learns, from CROPS/train, which photograph a crop is of, and is judged on CROPS/held-out. Some seconds on one core. Distances
measured with it are called FD-photographs-v1, and are no FID. `--extractor classifier:FILE` uses it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ldm_dcn.data import open_dataset
from ldm_dcn.errors import Parser, exit_on_user_error
from ldm_dcn.images import Images
from ldm_dcn.make_photographs import CROP
from ldm_dcn.places import check_file_place

from .classifiers import SmallClassifier
from .make_digits_classifier import SEED, fit, report

NAME = "photographs-v1"
STEPS = 1000


def open_split(crops: Path, split: str) -> Images:
    return open_dataset(crops / split, image_size=CROP, image_channels=3)


def train(dataset: Images, steps: int = STEPS, seed: int = SEED, progress: bool = True) -> SmallClassifier:
    """Train on crops, half of them mirrored."""
    torch.manual_seed(seed)
    model = SmallClassifier(NAME, channels=3, side=CROP, num_classes=dataset.num_classes)
    return fit(model, dataset, mirror, steps, progress)


def mirror(images: Tensor) -> Tensor:
    """Every image (N, c, H, W) turned left to right, or not, at random."""
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images, images.flip(3))


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m eval.make_photographs_classifier", description=__doc__)
    parser.add_argument("crops", metavar="CROPS", type=Path, help="what ldm_dcn.make_photographs wrote")
    parser.add_argument(
        "out", metavar="FILE", type=Path, help="file to write, for instance photographs.safetensors"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(arguments)
    with exit_on_user_error():
        check_file_place(options.out, "name another file")
        splits = [open_split(options.crops, split) for split in ("train", "held-out")]
        model = train(splits[0], options.steps, options.seed)
        model.save(options.out)
        print(report(options.out, model, *splits))


if __name__ == "__main__":
    main()
