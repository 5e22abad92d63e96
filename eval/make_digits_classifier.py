"""Trains the shipped extractor "digits-v1": `python -m eval.make_digits_classifier [--out FILE] [--steps N]`.

About a minute on two cores. It learns from three quarters of the digits, jittered, and is judged on the fourth quarter.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm_dcn.data import open_dataset
from ldm_dcn.images import Images
from ldm_dcn.make_digits_autoencoder import jitter, schedule

from .classifiers import DIGITS_FILE, DigitsClassifier, SmallClassifier

STEPS = 2000
BATCH = 128
PEAK_LR = 2e-3
WEIGHT_DECAY = 0.01
JITTER = 0.5  # of `jitter`'s turns, shifts and scalings: enough to be right on unseen writers, and still to see small faults
SEED = 0

Classifier = TypeVar("Classifier", bound=SmallClassifier)


def train(steps: int = STEPS, seed: int = SEED, progress: bool = True) -> DigitsClassifier:
    """Train on the digits' "train" split with small turns, shifts and scalings."""
    torch.manual_seed(seed)
    return fit(
        DigitsClassifier(),
        open_split("train"),
        lambda images: jitter(images, JITTER),
        steps,
        progress=progress,
    )


def open_split(split: str) -> Images:
    return open_dataset("digits", image_size=32, image_channels=1, split=split)


def fit(
    model: Classifier, dataset: Images, vary: Callable[[Tensor], Tensor], steps: int, progress: bool = True
) -> Classifier:
    """Train `model` on a data set's images, each varied anew whenever it is seen. Random numbers are torch's global ones."""
    images, labels = dataset.images(range(len(dataset))), dataset.labels
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    for step in tqdm(range(steps), desc="classifier", disable=not progress):
        for group in optimiser.param_groups:
            group["lr"] = PEAK_LR * schedule(step / steps)
        chosen = torch.randint(len(images), (BATCH,))
        features = model.features(vary(images[chosen]))
        loss = F.cross_entropy(model.logits(features), labels[chosen])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    normalise(model, images)
    return model


@torch.no_grad()
def normalise(model: SmallClassifier, images: Tensor) -> None:
    """Scale the features of `images` (N, c, H, W) to a mean square of 1, and the head by the inverse.

    The classifier stays the same function, because what is rectified may be scaled before or after; but distances, which grow
    with the square of the features' scale (the cubic kernel of KID with its sixth power), become numbers one can read.
    """
    scale = torch.cat([model.features(part) for part in images.split(256)]).square().mean().sqrt()
    model.project.weight /= scale
    model.project.bias /= scale
    model.head.weight *= scale


@torch.no_grad()
def accuracy(model: SmallClassifier, dataset: Images) -> float:
    """Share of a data set's images that the classifier names rightly."""
    pixels, _ = dataset.read(range(len(dataset)))
    return (model.logits(model(pixels)).argmax(1) == dataset.labels).float().mean().item()


def report(path: Path, model: SmallClassifier, train: Images, held_out: Images) -> str:
    return (
        f"{path}: {path.stat().st_size:,} bytes, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"accuracy {accuracy(model, train):.4f} on the train split, {accuracy(model, held_out):.4f} held out"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DIGITS_FILE, help="file to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(arguments)
    model = train(options.steps, options.seed)
    model.save(options.out)
    print(report(options.out, model, open_split("train"), open_split("held-out")))


if __name__ == "__main__":
    main()
