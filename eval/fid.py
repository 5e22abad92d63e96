"""Scores of samples beside real images and noise, in one table: `python -m eval.fid RUN [RUN ...] [--guidance 1.0 1.5]`.

An input is a run or export (samples are drawn on the fly), a folder of images, or an npz as ADM writes it. With the digits
extractor the distance is called FD-digits-v1 and compares within this project only: FID is the name of one protocol.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm_dcn.data import rank_in_class, split_indices
from ldm_dcn.errors import UserError, exit_on_user_error
from ldm_dcn.export import Model, load_model

from .environment import environment
from .extractors import KINDS, FeatureExtractor, load_extractor
from .scores import (
    Features,
    class_accuracy,
    extract,
    frechet_distance,
    kernel_distance,
    nearest_neighbour_distance,
)
from .sources import (
    LABEL_RULES,
    NoiseSource,
    SampleSource,
    Source,
    choose_labels,
    is_run,
    open_file_or_folder,
)

MOST_VALUES = 4096  # values an image, up to which nearest neighbours are looked for among pixels, above it among features
MOST_IMAGES = 50_000  # drawn from a run when --num is not given and the reference is larger


@dataclass(frozen=True)
class Measured:
    """N images as numbers: features, pixels (N, c*H*W) uint8 where they are small, labels (N,), and how fast they came."""

    features: Features
    pixels: Tensor | None
    labels: Tensor | None
    images_per_second: float | None = None

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, chosen: Tensor) -> Measured:
        return Measured(self.features[chosen], None if self.pixels is None else self.pixels[chosen],
                        None if self.labels is None else self.labels[chosen])  # fmt: skip


@dataclass(frozen=True)
class Column:
    """One set of images in the table: its scores, and the tags without which they mean nothing."""

    name: str
    scores: dict[str, float]
    tags: dict[str, Any]


@dataclass(frozen=True)
class Table:
    metric: str  # "FD-digits-v1"; "FID" for the standard Inception alone
    columns: list[Column]
    reference: dict[str, Any]
    extractor: dict[str, Any]
    environment: dict[str, Any]

    def __str__(self) -> str:
        rows = [
            (self.metric, "fd", "{:.4g}"),
            (f"{self.metric}, share of noise's", "fd_of_noise", "{:.3%}"),
            (f"KID-{self.extractor['name']} x 1000", "kid_x1000", "{:.3g}"),
            ("   its spread over subsets", "kid_x1000_spread", "{:.2g}"),
            ("class accuracy", "class_accuracy", "{:.4f}"),
            (f"nearest neighbour, {self.reference['nearest_neighbour_in']}", "nearest_neighbour", "{:.4g}"),
            ("images/s", "images_per_second", "{:.1f}"),
            ("images", "images", "{:.0f}"),
        ]
        cells = [["", *(column.name for column in self.columns)]]
        for title, key, form in rows:
            if any(key in column.scores for column in self.columns):
                cells.append([title, *(form.format(column.scores[key]) if key in column.scores else "-"
                                       for column in self.columns)])  # fmt: skip
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines = ["  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in
                                                       zip(row[1:], widths[1:], strict=True))]) for row in cells]  # fmt: skip
        lines.insert(1, "-" * len(lines[0]))
        lines += ["", f"reference  {_in_words(self.reference)}", f"extractor  {_in_words(self.extractor)}"]
        lines += [f"{column.name}  {_in_words(column.tags)}" for column in self.columns]
        lines.append(
            f"Lower {self.metric} is better; it falls as images are added, so compare at equal numbers of images."
        )
        return "\n".join(lines)


def evaluate(inputs: Sequence[str], *, extractor: str = "digits", reference: str | None = None,
             guidance: Sequence[float] = (1.0,), sampler: str = "dpm++", steps: int = 50, seed: int = 0,
             num: int | None = None, labels: str = "reference", image_size: int | None = None, batch_size: int = 128,
             device: str = "cpu", progress: bool = True) -> Table:  # fmt: skip
    """Score `inputs` (runs, exports, folders, npz files) against `reference`; a run gives one column for each guidance.

    Without `reference` it is what the first run was trained on. Beside the inputs stand real images against real ones (held out
    against the rest, half against half) and noise. Raises `UserError` for what cannot be scored.
    """
    if not inputs:
        raise UserError("there is nothing to score; give a run, a folder of images or an npz file")
    scorer = load_extractor(extractor, device)
    models = {path: load_model(path, device=device) for path in inputs if is_run(path)}
    real_source = _open_reference(reference, next(iter(models.values()), None), extractor, image_size)
    nearest_in_pixels = torch.tensor(real_source.shape).prod() <= MOST_VALUES

    def measure(source: Source) -> Measured:
        return _measure(
            source, scorer, real_source.shape if nearest_in_pixels else None, batch_size, device, progress
        )

    sources: list[Source] = []
    for path in inputs:  # all doors are tried before the first image is drawn
        if path not in models:
            sources.append(
                open_file_or_folder(path, image_channels=real_source.shape[0], image_size=image_size)
            )
            continue
        count = num or min(len(real_source), MOST_IMAGES)
        chosen = choose_labels(labels, count, models[path].num_classes, real_source.labels, seed)
        sources += [SampleSource(models[path], f"{models[path].name} g={scale:g}", chosen, count, label_rule=labels,
                                 guidance=scale, sampler=sampler, steps=steps, seed=seed) for scale in guidance]  # fmt: skip
    real = measure(real_source)
    columns = [_column(source.name, measure(source), real, scorer, source.tags) for source in sources]
    columns += _real_columns(real, scorer)
    noise_source = NoiseSource(len(real), real_source.shape)
    noise = _column("noise", measure(noise_source), real, scorer, noise_source.tags)
    columns.append(noise)
    for column in columns:
        column.scores["fd_of_noise"] = column.scores["fd"] / noise.scores["fd"]
    channels, height, width = real_source.shape
    about_reference = {**real_source.tags, "images": len(real), "shape": f"{channels}x{height}x{width}",
                       "nearest_neighbour_in": "rms grey levels" if nearest_in_pixels else "rms features"}  # fmt: skip
    about_extractor = {"name": scorer.name, "features": scorer.num_features, "weights": scorer.fingerprint,
                       "resize": scorer.resize}  # fmt: skip
    return Table(scorer.metric_name, columns, about_reference, about_extractor, environment())


def _open_reference(
    reference: str | None, model: Model | None, extractor: str, image_size: int | None
) -> Source:
    if model is not None:
        data = model.config.get("data", {})
        reference = reference or data.get("source")
        if reference is None:
            raise UserError(f"{model.name} does not say what it was trained on; give --reference")
        return open_file_or_folder(reference, image_channels=model.autoencoder.image_channels,
                                   image_size=image_size or data.get("image_size"))  # fmt: skip
    if reference is None and extractor != "digits":
        raise UserError("what to compare with? give --reference: a folder of images, an npz, or digits")
    return open_file_or_folder(reference or "digits", image_channels=1 if extractor == "digits" else 3,
                               image_size=image_size)  # fmt: skip


def _measure(source: Source, scorer: FeatureExtractor, keep_shape: tuple[int, int, int] | None, batch_size: int, device: str,
             progress: bool) -> Measured:  # fmt: skip
    kept = []

    def watched():
        with tqdm(total=len(source), desc=source.name, unit="img", disable=not progress, leave=False) as bar:
            for images in source.batches(batch_size):
                if keep_shape is not None:
                    kept.append(_as_reference(images, keep_shape))
                yield images
                bar.update(len(images))

    features = extract(scorer, watched(), device)
    pixels = torch.cat(kept) if kept and all(part is not None for part in kept) else None
    speed = len(source) / source.seconds if source.seconds else None
    return Measured(features, pixels, source.labels, speed)


def _as_reference(images: Tensor, shape: tuple[int, int, int]) -> Tensor | None:
    """Images (B, c, H, W) as rows of the reference's values (B, c'*H*W): grey where it is grey; None where sizes differ."""
    if images.shape[-2:] != shape[-2:]:
        return None
    if images.shape[1] != shape[0]:
        images = images.float().mean(1, keepdim=True).round().to(torch.uint8).expand(-1, shape[0], -1, -1)
    return images.flatten(1)


def _column(
    name: str, images: Measured, real: Measured, scorer: FeatureExtractor, tags: dict[str, Any]
) -> Column:
    """The scores of `images` against `real`."""
    kid, spread = kernel_distance(images.features.values, real.features.values)
    scores = {
        "fd": frechet_distance(images.features.values, real.features.values),
        "kid_x1000": 1000 * kid,
        "kid_x1000_spread": 1000 * spread,
        "images": len(images),
    }
    logits = images.features.logits
    if logits is not None and images.labels is not None and int(images.labels.max()) < logits.shape[1]:
        scores["class_accuracy"] = class_accuracy(logits, images.labels)
    if images.pixels is not None and real.pixels is not None:
        scores["nearest_neighbour"] = nearest_neighbour_distance(images.pixels, real.pixels)
    elif real.pixels is None:
        scores["nearest_neighbour"] = nearest_neighbour_distance(images.features.values, real.features.values)
    if images.images_per_second is not None:
        scores["images_per_second"] = images.images_per_second
    few = {"warning": f"fewer images than {scorer.num_features} features: the distance means nothing"} \
        if len(images) < scorer.num_features else {}  # fmt: skip
    return Column(name, scores, {"N": len(images), **tags, **few})


def _real_columns(real: Measured, scorer: FeatureExtractor) -> list[Column]:
    """Held-out images against the rest, and half against half: what a perfect model of the same size could reach."""
    labels = real.labels if real.labels is not None else torch.zeros(len(real), dtype=torch.int64)
    if len(real) < 8:
        return []
    rest, held_out = real[split_indices(labels, "train")], real[split_indices(labels, "held-out")]
    halves = [real[(rank_in_class(labels) % 2 == half).nonzero().flatten()] for half in (0, 1)]
    return [_column("real held-out", held_out, rest, scorer, {"reference": f"the other {len(rest)}"}),
            _column("real half", halves[0], halves[1], scorer, {"reference": f"the other {len(halves[1])}"})]  # fmt: skip


def _in_words(tags: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in tags.items() if value is not None)


def write_json(table: Table, path: Path) -> None:
    """Every number with its tags, readable by any program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(table), indent=2, default=str) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.fid", description=__doc__.splitlines()[0])
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="run or export folder, hub id, folder of images, or npz"
    )
    parser.add_argument("--extractor", default="digits", help=f"{KINDS} (default: %(default)s)")
    parser.add_argument(
        "--reference", help="folder of images, npz, or digits (default: what the first run learned from)"
    )
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[1.0], help="one column each (default: 1.0)"
    )
    parser.add_argument("--sampler", default="dpm++", help="dpm++, ddim or euler (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="image i is drawn from seed + i (default: %(default)s)"
    )
    parser.add_argument(
        "--num", type=int, help="images to draw (default: as many as the reference has, at most 50000)"
    )
    parser.add_argument(
        "--labels", choices=LABEL_RULES, default="reference", help="classes to draw (default: %(default)s's)"
    )
    parser.add_argument("--image-size", type=int, help="crop and resize folders of images to this size")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to write (default: fid.json in the first run folder)")
    options = vars(parser.parse_args(arguments))
    json_file = options.pop("json")
    with exit_on_user_error():
        table = evaluate(**options)
        print(table)
        run = next((path for path in options["inputs"] if is_run(path) and os.path.isdir(path)), None)
        if json_file or run:
            write_json(table, json_file or Path(run, "fid.json"))


if __name__ == "__main__":
    main()
