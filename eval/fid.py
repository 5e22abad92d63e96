"""Scores of samples beside real images and noise, in one table: `python -m eval.fid RUN [RUN ...] [--guidance 1.0 1.5]`.

An input is a run or export (samples are drawn on the fly), a folder of images, or an npz as ADM writes it; the reference is a
folder, a data set, or an npz of images, of statistics, or of both. With the digits extractor, the default against the digits, the
distance is called FD-digits-v1 and compares within this project only: FID is the name of one protocol; against other images an
extractor must be named. Under torchrun, each process draws its share, and the numbers are those of one process:

    torchrun --standalone --nproc_per_node 8 -m eval.fid runs/NAME --extractor inception:WEIGHTS --reference ref.npz --samples 50000
    python -m eval.fid --reference IMAGES --extractor inception:WEIGHTS --save-statistics ref.npz
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ldm_dcn.arithmetic import ARITHMETIC
from ldm_dcn.cache_layout import is_cache
from ldm_dcn.compiling import add_compile_option
from ldm_dcn.config import Config
from ldm_dcn.data import rank_in_class, split_indices
from ldm_dcn.device import choose_device
from ldm_dcn.diffusion import Schedule
from ldm_dcn.errors import Parser, UserError, exit_on_user_error
from ldm_dcn.places import check_file_place, check_folder_place
from ldm_dcn.processes import Processes, joined_processes
from ldm_dcn.sampling import SAMPLERS, check_guidance, check_sampler, check_steps

from .columns import in_columns, warnings_of
from .environment import environment
from .extractors import KINDS, load_extractor
from .features import FeatureExtractor
from .measurement import Measured, measure
from .moments import Statistics
from .moments import save_statistics as write_statistics
from .results import write
from .score_files import folder_of, place_for
from .scores import (
    NEIGHBOURS,
    class_accuracy,
    inception_score,
    kernel_distance,
    nearest_neighbour_distance,
    precision_recall,
)
from .sources import (
    LABEL_RULES,
    NoiseSource,
    SampleSource,
    Source,
    choose_labels,
    classes_of,
    is_run,
    open_file_or_folder,
    open_reference,
)
from .stored_models import StoredModel, StoredModels

DEFAULT_EXTRACTOR = "digits"
MOST_VALUES = 4096  # values an image, up to which nearest neighbours are looked for among pixels, above it among features
MOST_IMAGES = 50_000  # drawn from a run when --num is not given and the reference is larger, or has no images
MOST_NOISE = 5_000  # images: what noise scores hardly depends on their number
FEWEST = 4 * (NEIGHBOURS + 1)  # images: the quarter that is held out must have that many neighbours


@dataclass(frozen=True)
class Column:
    """One set of images in the table: its scores, and the tags without which they mean nothing."""

    name: str
    scores: dict[str, float]
    tags: dict[str, Any]


@dataclass(frozen=True)
class Table:
    metric: str  # "FD-digits-v1"; "FID" for the standard Inception alone
    names: dict[str, str]  # what the other scores are called in the extractor's space
    columns: list[Column]
    reference: dict[str, Any]
    extractor: dict[str, Any]
    environment: dict[str, Any]

    def __str__(self) -> str:
        rows = [
            (self.metric, "fd", "{:.4g}"),
            (f"{self.metric}, share of noise's", "fd_of_noise", "{:.3%}"),
            (self.names["sfd"], "sfd", "{:.4g}"),
            (f"{self.names['kid_x1000']} x 1000", "kid_x1000", "{:.3g}"),
            ("   its spread over subsets", "kid_x1000_spread", "{:.2g}"),
            (f"precision, k={NEIGHBOURS}", "precision", "{:.4f}"),
            (f"recall, k={NEIGHBOURS}", "recall", "{:.4f}"),
            (self.names["inception_score"], "inception_score", "{:.4g}"),
            ("class accuracy", "class_accuracy", "{:.4f}"),
            (
                f"nearest neighbour, {self.reference.get('nearest_neighbour_in')}",
                "nearest_neighbour",
                "{:.4g}",
            ),
            ("images/s", "images_per_second", "{:.1f}"),
            ("images", "images", "{:.0f}"),
        ]
        cells = [["", *(column.name for column in self.columns)]]
        for title, key, form in rows:
            if any(key in column.scores for column in self.columns):
                cells.append([title, *(form.format(column.scores[key]) if key in column.scores else "-"
                                       for column in self.columns)])  # fmt: skip
        lines = in_columns(cells)
        lines.insert(1, "-" * len(lines[0]))
        lines += [
            "",
            f"reference  {_in_words(self.reference)}",
            f"extractor  {_in_words(self.extractor, but='warning')}",
        ]
        lines += [f"{column.name}  {_in_words(column.tags, but='warning')}" for column in self.columns]
        lines.append(
            f"Lower {self.metric} is better; it falls as images are added, so compare at equal numbers of images."
        )
        lines += [f"Warning: {warning}" for warning in warnings_of(self.columns, self.extractor)]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Opened:
    """What is compared with what, before the first image is drawn."""

    scorer: FeatureExtractor
    sources: list[Source]
    reference: Source | None
    statistics: Statistics | None
    warning: str | None = None  # of what the extractor was not made for

    @property
    def reference_size(self) -> int:
        """How many images the reference is of, as far as it says."""
        if self.statistics is not None:
            return self.statistics.moments.count or MOST_IMAGES
        return len(self.reference)

    def knows_classes_of(self, source: Source) -> bool:
        """Whether label k of `source` means class k of the extractor's: by the names, where both say them."""
        names = self.reference.classes if self.reference is not None else None
        if self.scorer.knows is not None:
            _, names = self.scorer.knows
        return source.classes is None or names is None or tuple(source.classes) == tuple(names)

    def check(self) -> None:
        """Raise `UserError` for too few images, and for statistics of other features than the extractor's."""
        for source in [*self.sources, *([self.reference] if self.reference is not None else [])]:
            if len(source) < FEWEST:
                raise UserError(
                    f"{source.name} has {len(source)} images, too few to score; give at least {FEWEST}"
                )
        if self.statistics is not None:
            self.statistics.check(self.scorer)


def evaluate(inputs: Sequence[str], *, extractor: str | None = None, reference: str | None = None,
             guidance: Sequence[float] = (1.0,), guidance_interval: tuple[float, float] = (0.0, 1.0),
             guidance_rescale: float = 0.0, sampler: str = "dpm++", steps: int = 50, precision: str = "fp32", seed: int = 0,
             num: int | None = None, labels: str = "auto", image_size: int | None = None, max_bad: float | None = None,
             batch_size: int = 128, compile: str | None = None, device: str = "cpu", save_statistics: Path | None = None, save_npz: Path | None = None,
             processes: Processes | None = None, progress: bool = True) -> Table | None:  # fmt: skip
    """Score `inputs` (runs, exports, folders, npz files) against `reference`; a run gives one column for each guidance.

    Without `reference` it is what the first run was trained on; without `extractor` it is the digits classifier, and the reference
    must be the digits. Beside the inputs stand real images against real ones (held out against the rest, half against half) and noise.

    max_bad          broken images that are left out of a set before it is an error: a count, or a share below 1; None takes what
                     the first run was trained with for the reference, 0 for others
    compile          draw with torch.compile in this mode (`ldm_dcn.compiling.MODES`)
    save_statistics  file for mean and covariance of the reference's features; with it, `inputs` may be empty
    save_npz         folder for the images of each column, as ADM's evaluator reads them
    processes        that share the work; the table is on the first of them, the others get None

    Raises `UserError` for what cannot be scored.
    """
    processes = processes or Processes()
    device = str(choose_device(processes.device or device))
    if not inputs and save_statistics is None:
        raise UserError("there is nothing to score; give a run, a folder of images or an npz file")
    if save_statistics is not None and not save_statistics.name.endswith(".npz"):
        raise UserError(
            f"--save-statistics {save_statistics} does not end in .npz, by which --reference knows statistics from folders; give "
            f"{save_statistics}.npz"
        )
    _check_counts(num, batch_size, max_bad)

    stored = StoredModels(device, compile)

    def open_all() -> _Opened:
        scorer = load_extractor(extractor or DEFAULT_EXTRACTOR, device)
        models = {path: stored.open(path) for path in inputs if is_run(path)}
        real, statistics = _open_reference(
            reference, next(iter(models.values()), None), extractor, image_size, max_bad
        )
        warning = _check_extractor(scorer, real, statistics, chosen=extractor is not None)
        opened = _Opened(scorer, [], real, statistics, warning)
        names = _names(models)
        for path in inputs:
            if path not in models:
                channels = real.shape[0] if real is not None else _channels(statistics.said.get("source"))
                opened.sources.append(
                    open_file_or_folder(
                        path, image_channels=channels, image_size=image_size, max_bad=max_bad or 0
                    )
                )
                continue
            count, model = num or min(opened.reference_size, MOST_IMAGES), models[path]
            learned_from = model.config.get("data", {}).get("source")
            rule, chosen = choose_labels(
                labels,
                count,
                model.num_classes,
                real,
                seed,
                learned_from=learned_from,
                class_names=model.class_names,
            )
            opened.sources.extend(
                SampleSource(model, f"{names[path]} g={scale:g}", chosen, count, label_rule=rule, guidance=scale,
                             guidance_interval=tuple(guidance_interval), guidance_rescale=guidance_rescale, sampler=sampler,
                             steps=steps, seed=seed, precision=precision) for scale in guidance)  # fmt: skip
        opened.check()
        for file in _file_names(save_npz, opened.sources) if processes.is_first else ():
            if file is not None:
                check_file_place(file, "choose another folder with --save-npz")
        return opened

    opened = processes.together(open_all)
    if save_statistics is not None and opened.reference is None:
        raise UserError(f"{reference} has no images to make statistics of; give a folder or an npz of images")
    nearest_in_pixels = opened.reference is not None and math.prod(opened.reference.shape) <= MOST_VALUES
    keep_shape = opened.reference.shape if nearest_in_pixels else None

    def measured(source: Source, file: Path | None = None) -> Measured | None:
        return measure(source, opened.scorer, keep_shape=keep_shape, batch_size=batch_size, device=device,
                       processes=processes, save_npz=file, progress=progress)  # fmt: skip

    real = None if opened.reference is None else measured(opened.reference)
    if save_statistics is not None and real is not None:
        source, hashed = opened.reference.tags["source"], real.dataset_hash
        said = {"n": real.count, **_made_with(opened.scorer), "source": source, "dataset_hash": hashed}
        write_statistics(save_statistics, real.moments, real.spatial, said)
    if opened.statistics is not None:
        known = {"moments": opened.statistics.moments, "spatial": opened.statistics.spatial}
        real = replace(real, **known) if real is not None else Measured(count=None, **known)

    columns = []
    for source, file in zip(opened.sources, _file_names(save_npz, opened.sources), strict=True):
        images = measured(source, file)
        if images is not None:  # the first process scores while the others draw on
            if not opened.knows_classes_of(source):
                images = replace(images, labels=None)
            columns.append(_column(source.name, images, real, opened.scorer, source.tags, device))
    stored.release()
    if opened.sources:
        source = NoiseSource(
            min(opened.reference_size, MOST_NOISE), (opened.reference or opened.sources[0]).shape
        )
        images = measured(source)
        if images is not None:
            columns += _real_columns(real, opened.scorer, device)
            noise = _column(source.name, images, real, opened.scorer, source.tags, device)
            columns.append(noise)
            for column in columns if noise.scores["fd"] else []:  # 0 where the reference is noise itself
                column.scores["fd_of_noise"] = column.scores["fd"] / noise.scores["fd"]
    return _table(columns, opened, real, nearest_in_pixels, processes) if processes.is_first else None


def check_run(config: Config, name: str, *, extractor: str | None = None, reference: str | None = None,
              guidance: Sequence[float] = (1.0,), guidance_interval: tuple[float, float] = (0.0, 1.0),
              guidance_rescale: float = 0.0, sampler: str = "dpm++", steps: int = 50, num: int | None = None,
              labels: str = "auto", image_size: int | None = None, max_bad: float | None = None,
              batch_size: int = 128) -> None:  # fmt: skip
    """Raise `UserError` for what `evaluate`, asked the same, would refuse of a run of `config`, called `name`: before it is trained."""
    if config.data.condition == "text":
        raise UserError(
            f"{name} draws from prompts, and eval.fid knows classes; train it alone, draw with sample.py --npz and score that file"
        )
    _check_counts(num, batch_size, max_bad)
    for scale in guidance:
        check_guidance(scale, guidance_interval, guidance_rescale)
    check_sampler(sampler)
    check_steps(steps, Schedule(**config.diffusion.model_dump()))
    scorer = load_extractor(extractor or DEFAULT_EXTRACTOR)
    data = config.data.model_dump()
    real, statistics = _reference_of(name, data, config.data.image_channels, reference, image_size, max_bad)
    _check_extractor(scorer, real, statistics, chosen=extractor is not None)
    opened = _Opened(scorer, [], real, statistics)
    opened.check()
    count = num or min(opened.reference_size, MOST_IMAGES)
    classes, names = classes_of(config, real)
    choose_labels(labels, count, classes, real, 0, learned_from=config.data.source, class_names=names)


def _check_counts(num: int | None, batch_size: int, max_bad: float | None) -> None:
    if max_bad is not None and not 0 <= max_bad < math.inf:
        raise UserError(f"--max-bad is {max_bad:g}; give a count of broken images, or a share below 1")
    for option, value, least in (("--samples", num, FEWEST), ("--batch-size", batch_size, 1)):
        if value is not None and value < least:
            raise UserError(f"{option} is {value}, too few; give at least {least}")


def _names(models: Mapping[str, StoredModel]) -> dict[str, str]:
    """What heads the columns of each: its name and, of those that have it in common, the step, how weights were averaged, the folder."""
    names = {path: model.name for path, model in models.items()}
    for tell in (
        lambda path, model: f" step {model.step}",
        lambda path, model: f" {model.tags.get('weights', '')}",
        lambda path, model: f" {Path(path).name}",
    ):
        times = Counter(names.values())
        names = {path: name if times[name] == 1 else f"{name}{tell(path, models[path])}".rstrip()
                 for path, name in names.items()}  # fmt: skip
    return names


def _check_extractor(
    scorer: FeatureExtractor, real: Source | None, statistics: Statistics | None, *, chosen: bool
) -> str | None:
    """A warning where the reference is of other images than the extractor learned from, or may be; without having been `chosen` for
    such images it is refused. Its classes mean nothing to images with others."""
    if scorer.knows is None or (real is None and statistics is None):
        return None
    data, classes = scorer.knows
    if statistics is not None:
        source = statistics.said.get("source")
        if source == data:
            return None
        scorer.names_classes = False
        return f"it learned from the {data}, and the reference's images are {source or 'not known'}"
    if real.tags["source"] == data:
        return None
    if not chosen:
        raise UserError(
            f"{real.tags['source']} is not the {data} that the default extractor learned from; give --extractor inception:FILE (FID) "
            f"or another, or --extractor {data} where these are {data} too"
        )
    scorer.names_classes = scorer.names_classes and real.classes in (None, classes)
    return f"it learned from the {data}, and the reference is {real.tags['source']}"


def _channels(source: str | None) -> int:
    """What images of `source` are read in where no run says it: in their colours. Only the digits are known to be grey."""
    return 1 if source == "digits" else 3


def _open_reference(
    reference: str | None,
    model: StoredModel | None,
    extractor: str | None,
    image_size: int | None,
    max_bad: float | None,
) -> tuple[Source | None, Statistics | None]:
    if model is not None:
        data = model.config.get("data", {})
        return _reference_of(
            model.name, data, model.autoencoder.image_channels, reference, image_size, max_bad
        )
    if reference is None and extractor not in (None, DEFAULT_EXTRACTOR):
        raise UserError("what to compare with? give --reference: a folder of images, an npz, or digits")
    reference = reference or "digits"
    return open_reference(
        reference, image_channels=_channels(reference), image_size=image_size, max_bad=max_bad or 0
    )


def _reference_of(name: str, data: Mapping[str, Any], image_channels: int, reference: str | None,
                  image_size: int | None, max_bad: float | None) -> tuple[Source | None, Statistics | None]:  # fmt: skip
    """What the run `name` is compared with, `data` being that section of its config."""
    reference = reference or data.get("source")
    if reference is None:
        raise UserError(f"{name} does not say what it was trained on; give --reference")
    if is_cache(reference):
        raise UserError(
            f"{name} learns from the latent cache {reference}, which holds no images to compare with; give "
            "--reference FOLDER, the images that it was made of, or statistics of theirs"
        )
    if max_bad is None:
        max_bad = data.get("max_bad", 0) if reference == data.get("source") else 0
    return open_reference(
        reference,
        image_channels=image_channels,
        image_size=image_size or data.get("image_size"),
        max_bad=max_bad,
    )


def _file_names(folder: Path | None, sources: list[Source]) -> list[Path | None]:
    if folder is None:
        return [None] * len(sources)
    names = [re.sub(r"[^\w.=-]+", "_", source.name) for source in sources]
    return [
        folder / (f"{name}.npz" if names.count(name) == 1 else f"{name}_{place}.npz")
        for place, name in enumerate(names)
    ]


def _table(columns: list[Column], opened: _Opened, real: Measured, nearest_in_pixels: bool,
           processes: Processes) -> Table:  # fmt: skip
    scorer = opened.scorer
    titles = {"sfd": "sFID", "kid_x1000": "KID", "inception_score": "Inception score"}
    made_with = _made_with(scorer)
    return Table(scorer.named("FID"), {key: scorer.named(title) for key, title in titles.items()}, columns,
                 _about_reference(opened, real, nearest_in_pixels),
                 {"name": made_with.pop("extractor"), "features": scorer.num_features, **made_with,
                  **({"warning": opened.warning} if opened.warning else {})},
                 {**environment(), "processes": processes.count})  # fmt: skip


def _made_with(scorer: FeatureExtractor) -> dict[str, str]:
    return {"extractor": scorer.name, "weights": scorer.fingerprint, "resize": scorer.resize}


def _about_reference(opened: _Opened, real: Measured, nearest_in_pixels: bool) -> dict[str, Any]:
    about: dict[str, Any] = {}
    if opened.statistics is not None:
        said = opened.statistics.said
        about = {"statistics": opened.statistics.path, "of": said.get("source"), "images": said.get("n", "not stated"),
                 "made with": said.get("extractor", "an extractor that the file does not state"),
                 "resize": said.get("resize", "not stated"),
                 "dataset_hash": said.get("dataset_hash")}  # fmt: skip
    if opened.reference is not None:
        channels, height, width = opened.reference.shape
        own = {**opened.reference.tags, "images": real.count, "shape": f"{channels}x{height}x{width}",
               "dataset_hash": real.dataset_hash}  # fmt: skip
        about = {**{f"image_{key}": value for key, value in own.items()}, **about} if about else own
        about["nearest_neighbour_in"] = "rms grey levels" if nearest_in_pixels else "rms features"
    return about


def _column(name: str, images: Measured, real: Measured, scorer: FeatureExtractor, tags: dict[str, Any],
            device: str) -> Column:  # fmt: skip
    """The scores of `images` against `real`: those that its features allow, or its statistics alone."""
    scores = {"fd": images.moments.frechet_distance(real.moments), "images": images.count}
    features = images.features
    if images.spatial is not None and real.spatial is not None:
        scores["sfd"] = images.spatial.frechet_distance(real.spatial)
    if real.features is not None:
        kid, spread = kernel_distance(features.values, real.features.values)
        scores |= {"kid_x1000": 1000 * kid, "kid_x1000_spread": 1000 * spread}
        scores["precision"], scores["recall"] = precision_recall(
            features.values, real.features.values, device
        )
        if images.pixels is not None and real.pixels is not None:
            scores["nearest_neighbour"] = nearest_neighbour_distance(images.pixels, real.pixels, device)
        elif real.pixels is None:
            scores["nearest_neighbour"] = nearest_neighbour_distance(
                features.values, real.features.values, device
            )
    if features.logits is not None:
        scores["inception_score"] = inception_score(features.logits)
        known = images.labels is not None and int(images.labels.max()) < features.logits.shape[1]
        if scorer.names_classes and known:
            scores["class_accuracy"] = class_accuracy(features.logits, images.labels)
    if images.images_per_second is not None:
        scores["images_per_second"] = images.images_per_second
    few = {"warning": f"fewer images than {scorer.num_features} features: the distance means nothing"} \
        if images.count < scorer.num_features else {}  # fmt: skip
    return Column(name, scores, {"N": images.count, **tags, **few})


def _real_columns(real: Measured, scorer: FeatureExtractor, device: str) -> list[Column]:
    """Held-out images against the rest, and half against half: what a perfect model would reach with so few images on either side.
    Distances fall as images are added: a model that is drawn more often may score below them."""
    if real.features is None:
        return []
    labels = real.labels if real.labels is not None else torch.zeros(len(real.features), dtype=torch.int64)
    parts = {"held-out": (split_indices(labels, "held-out"), split_indices(labels, "train")),
             "half": tuple((rank_in_class(labels) % 2 == half).nonzero().flatten() for half in (0, 1))}  # fmt: skip
    return [_column(f"real {name}", real[some], real[rest], scorer, {"reference": f"the other {len(rest)}"}, device)
            for name, (some, rest) in parts.items() if min(len(some), len(rest)) > NEIGHBOURS]  # fmt: skip


def _in_words(tags: dict[str, Any], but: str | None = None) -> str:
    return ", ".join(f"{key} {value}" for key, value in tags.items() if value is not None and key != but)


def write_json(table: Table, path: Path) -> None:
    """Every number with its tags, readable by any program."""
    write(asdict(table), path)


def _parser() -> Parser:
    parser = Parser(prog="python -m eval.fid", description=__doc__.splitlines()[0])
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT", help="run or export folder, hub id, folder of images, or npz"
    )
    parser.add_argument(
        "--extractor", help=f"{KINDS} (default: {DEFAULT_EXTRACTOR}, where the reference is the digits)"
    )
    parser.add_argument(
        "--reference",
        help="folder of images, npz of images or statistics, or digits (default: what the first run learned from)",
    )
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[1.0], help="one column each (default: 1.0)"
    )
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="shares of the times, 0 being the data's end, between which guidance works (default: all)",
    )
    parser.add_argument(
        "--guidance-rescale",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="0 to 1: how much of the contrast that guidance adds is taken back (default: 0)",
    )
    parser.add_argument("--sampler", default="dpm++", help=f"{', '.join(SAMPLERS)} (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps (default: %(default)s)")
    parser.add_argument(
        "--precision",
        choices=tuple(ARITHMETIC),
        default="fp32",
        help="what the network draws in (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="image i is drawn from seed + i (default: %(default)s)"
    )
    parser.add_argument(  # torchrun takes --num for an abbreviation of options of its own
        "--num",
        "--samples",
        dest="num",
        type=int,
        metavar="N",
        help="images to draw (default: as many as the reference has, at most 50000); under torchrun write --samples",
    )
    parser.add_argument(
        "--labels",
        choices=LABEL_RULES,
        default="auto",
        help="classes to draw (default: the reference's, where it has some, else balanced)",
    )
    add_compile_option(parser, "draw")
    parser.add_argument("--image-size", type=int, help="crop and resize folders of images to this size")
    parser.add_argument(
        "--max-bad",
        type=float,
        metavar="N",
        help="broken images to leave out of a set before it is an error: a count, or a share below 1 (default: data.max_bad of the "
        "first run for what it learned from, else 0)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=128, help="images drawn at once, at most 256 (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="such as cuda:1 (default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        help="file to write (default: fid-EXTRACTOR-IMAGES.json in each run's folder, where eval.report finds it; with another "
        "number at its end, where that holds other scores)",
    )
    parser.add_argument(
        "--save-statistics",
        type=Path,
        metavar="NPZ",
        help="keep the reference's mean and covariance, to use as --reference",
    )
    parser.add_argument(
        "--save-npz", type=Path, metavar="DIR", help="keep each column's images, for ADM's evaluator"
    )
    return parser


def _check_drawing(options: Mapping[str, Any], usual: Callable[[str], Any]) -> None:
    """Raise `UserError` for options of drawing where nothing is drawn: images that are there were drawn in some way already."""
    if any(is_run(path) for path in options["inputs"]):
        return
    for name in (
        "guidance",
        "guidance_interval",
        "guidance_rescale",
        "sampler",
        "steps",
        "precision",
        "compile",
        "seed",
        "num",
        "labels",
    ):
        if options[name] != usual(name):
            option = "samples" if name == "num" else name.replace("_", "-")
            raise UserError(
                f"--{option} says how a run is drawn, and there is none among the inputs; leave it out, or give a run"
            )


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    found = (folder_of(path) for path in options["inputs"] if is_run(path))
    json_file, folders = options.pop("json"), list(dict.fromkeys(filter(None, found)))
    with exit_on_user_error(), joined_processes() as processes:
        try:
            _check_drawing(options, parser.get_default)
            if processes.is_first:  # before hours of drawing
                written = [json_file] if json_file else [folder / "fid.json" for folder in folders]
                for option, place in (
                    *(("--json", file) for file in written),
                    ("--save-statistics", options["save_statistics"]),
                ):
                    if place:
                        check_file_place(Path(place), f"choose another place with {option}")
                if options["save_npz"]:
                    check_folder_place(options["save_npz"], "choose another place with --save-npz")
            table = evaluate(**options, processes=processes)
        except UserError:
            if processes.is_first:
                raise
            raise SystemExit(2) from None  # the first process says it, once
        if table is None:
            return
        if options["save_statistics"]:
            print(
                f"{options['save_statistics']}: statistics of {table.reference['images']} images, {_in_words(table.extractor)}"
            )
        if not table.columns:
            return
        print(table)
        if json_file:
            write_json(table, json_file)
        for folder in [] if json_file else folders:
            kept = place_for(asdict(table), folder)
            write_json(table, kept)
            print(f"The table is kept in {kept}")


if __name__ == "__main__":
    main()
