"""Trains the shipped extractor "digits-v1": `python -m eval.make_digits_classifier [--out FILE] [--steps N]`.

About a minute on two cores. It learns from three quarters of the digits, jittered, and is judged on the fourth quarter.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from ldm_dcn.data import open_dataset
from ldm_dcn.make_digits_autoencoder import jitter, schedule

from .extractors import DIGITS_FILE, DigitsClassifier

STEPS = 2000
BATCH = 128
PEAK_LR = 2e-3
WEIGHT_DECAY = 0.01
JITTER = 0.5  # of `jitter`'s turns, shifts and scalings: enough to be right on unseen writers, and still to see small faults
SEED = 0


def train(steps: int = STEPS, seed: int = SEED, progress: bool = True) -> DigitsClassifier:
    """Train on the digits' "train" split with small turns, shifts and scalings."""
    torch.manual_seed(seed)
    digits = open_dataset("digits", image_size=32, image_channels=1, split="train")
    images, labels = digits.images(range(len(digits))), digits.labels
    model = DigitsClassifier()
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    for step in tqdm(range(steps), desc="classifier", disable=not progress):
        for group in optimiser.param_groups:
            group["lr"] = PEAK_LR * schedule(step / steps)
        chosen = torch.randint(len(images), (BATCH,))
        features = model.features(jitter(images[chosen], JITTER))
        loss = F.cross_entropy(model.logits(features), labels[chosen])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    normalise(model, images)
    return model


@torch.no_grad()
def normalise(model: DigitsClassifier, images: torch.Tensor) -> None:
    """Scale the features of `images` (N, 1, 32, 32) to a mean square of 1, and the head by the inverse.

    The classifier stays the same function, because what is rectified may be scaled before or after; but distances, which grow
    with the square of the features' scale (the cubic kernel of KID with its sixth power), become numbers one can read.
    """
    scale = torch.cat([model.features(part) for part in images.split(256)]).square().mean().sqrt()
    model.project.weight /= scale
    model.project.bias /= scale
    model.head.weight *= scale


@torch.no_grad()
def accuracy(model: DigitsClassifier, split: str) -> float:
    """Share of a split's digits that the classifier names rightly."""
    digits = open_dataset("digits", image_size=32, image_channels=1, split=split)
    pixels, _ = digits.read(range(len(digits)))
    return (model.logits(model(pixels)).argmax(1) == digits.labels).float().mean().item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DIGITS_FILE, help="file to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(arguments)
    model = train(options.steps, options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, options.out)
    options.out.chmod(0o644)  # safetensors writes for the owner only, and a wheel would keep that
    print(
        f"{options.out}: {options.out.stat().st_size:,} bytes, {sum(p.numel() for p in model.parameters()):,} "
        f"parameters, accuracy {accuracy(model, 'train'):.4f} on the train split, "
        f"{accuracy(model, 'held-out'):.4f} held out"
    )


if __name__ == "__main__":
    main()
