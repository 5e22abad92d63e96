"""Draw images from a trained model: a grid, single PNGs, or ADM's npz.

python sample.py runs/digits_dcn                            grid.png: a row a class, a column a seed
python sample.py runs/digits_dcn --labels 3 7 --seeds 0-9   two rows of ten
python sample.py RUN --labels fox "polar bear"              classes by the names that the training data gave them
python sample.py RUN --n 50000 --npz samples.npz            50,000 images, classes in turn, seeds from 0
python sample.py RUN --prompts "a red fox" "a blue bird"    of a model trained on captions: a row a prompt
torchrun --standalone --nproc_per_node 8 sample.py RUN --count 50000 --npz samples.npz      the same images, on 8 GPUs

What the command leaves out of sampler, steps and guidance is as in the run's config, section `sample`; an export without one is drawn
with dpm++, 50 steps, guidance 1.5.

Every image is a PNG file as soon as it is drawn: in --png-dir, or in a folder beside the output that is removed at the end. The
same command again goes on where it was stopped, with any number of processes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_dcn.compiling import add_compile_option, compile_unet
from ldm_dcn.errors import Parser, UserError, exit_on_user_error, warn

if TYPE_CHECKING:
    from ldm_dcn.drawn import Drawn
    from ldm_dcn.model import Model
    from ldm_dcn.processes import Processes
    from ldm_dcn.signals import StopSignals

COLUMNS = 8  # seeds a class where neither --seeds nor --n says how many
ROWS = 20  # classes at most in a grid where --labels does not say which
MOST = 10**7  # images, labels or seeds in one command
LARGEST = 2**63 - 1  # seed
OTHER_PICTURES = (
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".pdf",
    ".svg",
    ".tif",
    ".tiff",
    ".webp",
)  # endings that grids do not have
NUMBERS = re.compile(r"\s*([0-9]+)(?:-([0-9]+))?\s*")  # a number, or a range
AT_ONCE = 256  # images in memory while an npz is written
PRECISIONS = ("fp32", "bf16", "fp16")  # those of ldm_dcn.arithmetic, which takes torch: --help does without


@dataclass(frozen=True)
class Task:
    """What is drawn: image i has labels[i] (a class, or a prompt's number) and seeds[i].

    columns   images that make a row of the grid
    prompts   of a model that takes text, else empty
    """

    labels: list[int]
    seeds: list[int]
    columns: int
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def names(self) -> list[str]:
        """The files that the images become."""
        pairs = zip(self.labels, self.seeds, strict=True)
        return [f"{number:06d}_label{label}_seed{seed}.png" for number, (label, seed) in enumerate(pairs)]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    seeds = _numbers(arguments.seeds, "seed")
    if arguments.n is not None and not 1 <= arguments.n <= MOST:
        raise UserError(f"--n {arguments.n}: ask for at least one image, and at most {MOST:,} at a time")
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size}: draw at least one image at once")
    arguments.size = _sides(arguments.size)
    _check_places(arguments)
    if arguments.prompts_file:
        arguments.prompts = _read_prompts(arguments.prompts_file)

    from ldm_dcn.device import choose_device
    from ldm_dcn.export import load_model
    from ldm_dcn.processes import joined_processes
    from ldm_dcn.sampling import DEFAULTS, check_guidance, check_labels, check_sampler, resolved

    given = {name: getattr(arguments, name) for name in DEFAULTS if getattr(arguments, name) is not None}
    known = {**DEFAULTS, **given}
    check_guidance(known["guidance"], known["guidance_interval"], known["guidance_rescale"])
    check_sampler(known["sampler"])
    with joined_processes() as processes:
        if processes.count > 1 and arguments.device:
            raise UserError(
                f"--device {arguments.device} is for one process; leave it out, each takes its own"
            )
        device = choose_device(processes.device or arguments.device)
        model = processes.together(
            lambda: load_model(arguments.model, device=device, autoencoder=arguments.autoencoder)
        )
        vars(arguments).update(resolved(model, given))
        if model.latent_shape_at(arguments.size) == model.latent_shape:
            arguments.size = None  # the size that is not given
        prompts = _checked_prompts(arguments, model)
        labels = _numbers(_by_number(arguments.labels, model), "label")
        if labels and not prompts:
            check_labels(model, labels)
            _warn_of_numbers(arguments.labels, labels, model)
        task = Task(*_plan(labels, seeds, arguments.n, len(prompts) or model.num_classes), prompts)
        if arguments.compile:
            compile_unet(model.denoiser.unet, arguments.compile)
        return _make(arguments, model, task, processes)


def _make(arguments: argparse.Namespace, model: Model, task: Task, processes: Processes) -> int:
    """Draw on all processes what is not there yet, then make grid and npz of it on the first; returns the exit code."""
    from ldm_dcn.drawn import Drawn
    from ldm_dcn.signals import REQUEUE, StopSignals

    names, made_with = task.names(), _made_with(arguments, model, task)
    mark = _mark(made_with, names)
    if not (arguments.npz or arguments.png_dir or arguments.grid):
        arguments.grid = Path("grid.png")
    output = arguments.npz or arguments.grid
    drawn = Drawn(arguments.png_dir or output.with_name(f"{output.name}.{mark[:8]}.drawn"), names, made_with)

    def begin() -> list[int]:
        _check_outputs(arguments, model, task, drawn.folder)
        made = arguments.npz and _is_made(arguments.npz, mark)
        missing = [] if made and not (arguments.grid or arguments.png_dir) else drawn.begin()
        if arguments.npz and not made and arguments.npz.exists():
            raise UserError(
                f"{arguments.npz} holds other images than this command's (of another model, number or settings), or something "
                "else; give another --npz, or delete it"
            )
        return missing

    missing = processes.everyones(processes.together(lambda: begin() if processes.is_first else []))[0]
    with StopSignals() as stop:
        drawing = processes.together(lambda: _draw(arguments, model, task, missing, drawn, processes, stop))
    stopped_by = max(processes.everyones(drawing))
    if processes.is_first and stopped_by:
        print(
            f"{len(task) - len(drawn.missing())} of {len(task)} images are in {drawn.folder}; the same command goes on"
        )
    if stopped_by:
        return 0 if stopped_by == REQUEUE else 128 + stopped_by
    kinds = len(task.prompts) or model.num_classes
    processes.together(
        lambda: _finish(arguments, task, drawn, mark, bool(kinds)) if processes.is_first else None
    )
    return 0


def _made_with(arguments: argparse.Namespace, model: Model, task: Task) -> dict[str, Any]:
    """All that decides what an image looks like, beside its label and seed.

    What came later than the first folders that images were drawn into is null where it is as it was then: they are gone on with.
    """
    from ldm_dcn.drawn import weights_hash

    return {
        "model": model.name,
        "step": model.step,
        "weights": weights_hash(model.denoiser),
        "autoencoder": model.autoencoder.fingerprint(),
        "sampler": arguments.sampler,
        "steps": arguments.steps,
        "guidance": float(arguments.guidance),
        "guidance_interval": [float(share) for share in arguments.guidance_interval],
        "precision": arguments.precision,
        "prompts": task.prompts,
        "guidance_rescale": float(arguments.guidance_rescale) or None,
        "size": arguments.size and list(arguments.size),
    }


def _mark(made_with: dict[str, Any], names: list[str]) -> str:
    """A hash of what an output is made of; null counts as not there, as in `_made_with`."""
    said = {key: value for key, value in made_with.items() if value is not None}
    return hashlib.sha256(json.dumps([said, names]).encode()).hexdigest()


def _draw(
    arguments: argparse.Namespace,
    model: Model,
    task: Task,
    missing: list[int],
    drawn: Drawn,
    processes: Processes,
    stop: StopSignals,
) -> int:
    """This process's share of the `missing` images, a batch at a time; returns the signal that stopped it, or 0."""
    from tqdm import tqdm

    from ldm_dcn.sampling import generate

    batches = [missing[i : i + arguments.batch_size] for i in range(0, len(missing), arguments.batch_size)]
    own = batches[processes.rank :: processes.count]
    others = f" (process 1 of {processes.count})" if processes.count > 1 else ""
    how = (
        f"{model.name}, {arguments.sampler}, {arguments.steps} steps, guidance {arguments.guidance:g}{others}"
    )
    with tqdm(total=sum(map(len, own)), desc=how, unit="image", disable=not processes.is_first) as bar:
        for batch in own:
            if stop.received:
                break
            conditions: Any = [task.labels[number] for number in batch] if model.num_classes else None
            if task.prompts:
                wanted = [task.prompts[task.labels[number]] for number in batch]
                conditions = model.encode_prompts(wanted, arguments.text_encoder)
            images = generate(
                model,
                conditions,
                [task.seeds[number] for number in batch],
                sampler=arguments.sampler,
                steps=arguments.steps,
                guidance=arguments.guidance,
                guidance_interval=tuple(arguments.guidance_interval),
                guidance_rescale=arguments.guidance_rescale,
                size=arguments.size,
                precision=arguments.precision,
                batch_size=arguments.batch_size,
            )
            drawn.save_batch(batch, images)
            bar.update(len(batch))
    return stop.received


def _finish(arguments: argparse.Namespace, task: Task, drawn: Drawn, mark: str, has_labels: bool) -> None:
    """Grid and npz of the images that were drawn."""
    import torch

    from eval.npz import AdmNpzWriter
    from ldm_dcn.pictures import save_grid

    if not drawn.folder.exists():
        print(f"{arguments.npz}: is there already, with these {len(task)} images")
        return
    if lost := drawn.lost():
        raise UserError(
            f"{len(lost)} images that other processes drew are not in {drawn.folder}; write to a file system that all of "
            "them share"
        )
    if arguments.grid:
        images = torch.stack([drawn.read(number) for number in range(len(task))])
        save_grid(images, task.columns, arguments.grid)
        print(f"{arguments.grid}: {len(task)} images, {task.columns} a row")
    if arguments.npz:
        height, width = drawn.read(0).shape[1:]
        with AdmNpzWriter(arguments.npz, len(task), height, width, comment=mark) as file:
            for first in range(0, len(task), AT_ONCE):
                numbers = range(first, min(first + AT_ONCE, len(task)))
                file.add(torch.stack([drawn.read(number) for number in numbers]))
            if has_labels:
                file.label(torch.tensor(task.labels))
        what = ", arr_1 their labels" if has_labels else ""
        print(f"{arguments.npz}: arr_0 {len(task)} RGB images{what}")
    if arguments.png_dir:
        beside = [name for name in drawn.others() if re.fullmatch(r"\d+_label\d+_seed\d+\.png", name)]
        print(
            f"{arguments.png_dir}: {len(task)} PNG files{f', beside {len(beside)} of other commands' if beside else ''}"
        )
    else:
        drawn.remove()


def _is_made(npz: Path, mark: str) -> bool:
    """Whether `npz` is what this command makes: `_finish` left `mark` in it."""
    from zipfile import BadZipFile, ZipFile

    try:
        with ZipFile(npz) as archive:
            return archive.comment == mark.encode()
    except (OSError, BadZipFile):
        return False


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("model", metavar="RUN", help="a run folder, an export folder, or a hub id")
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="L",
        help="classes: numbers, ranges such as 0-9, and names that the training data gave them; what is a number is never taken for "
        "a name (default: all; 20 at most without --n)",
    )
    parser.add_argument(
        "--seeds", nargs="+", metavar="S", help="numbers and ranges (default: 0-7 for each label)"
    )
    parser.add_argument(  # torchrun takes --n for an abbreviation of options of its own
        "--n",
        "--count",
        type=int,
        metavar="N",
        help="this many images in all: labels or prompts in turn, a new seed each; under torchrun write --count",
    )
    parser.add_argument(
        "--sampler", help="dpm++, ddim, euler, ddpm or heun (default: sample.sampler of the run)"
    )
    parser.add_argument("--steps", type=int, help="default: sample.steps of the run")
    parser.add_argument(
        "--guidance",
        type=float,
        help="s in u + s (c - u); 1 is none (default: sample.guidance of the run)",
    )
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="shares of the times, 0 being the data's end, between which guidance works (default: sample.guidance_interval of the "
        "run)",
    )
    parser.add_argument(
        "--guidance-rescale",
        type=float,
        metavar="SHARE",
        help="0 to 1: how much of the contrast that guidance adds is taken back (default: sample.guidance_rescale of the run, or 0)",
    )
    parser.add_argument(
        "--size",
        metavar="HEIGHTxWIDTH",
        help="in pixels, such as 320x256; one number for a square (default: the size it was trained at)",
    )
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompts", nargs="+", metavar="TEXT", help="of a model trained on captions")
    prompts.add_argument("--prompts-file", type=Path, metavar="FILE", help="the same, one a line")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="what the network computes in (default: fp32); not the autoencoder",
    )
    add_compile_option(parser, "draw")
    parser.add_argument("--batch-size", type=int, default=64, help="images at once; does not change them")
    parser.add_argument(
        "--grid", type=Path, metavar="PNG", help="default: grid.png, where no other output is asked for"
    )
    parser.add_argument(
        "--npz", type=Path, metavar="NPZ", help="for ADM's evaluator; grey images are repeated to RGB"
    )
    parser.add_argument("--png-dir", type=Path, metavar="DIR", help="one PNG an image")
    parser.add_argument(
        "--autoencoder", metavar="SPEC", help="where the autoencoder lies, when not where the run had it"
    )
    parser.add_argument("--text-encoder", metavar="SPEC", help="where the text encoder lies, likewise")
    parser.add_argument("--device", help="such as cuda:1 (default: a GPU where there is one)")
    return parser


def _checked_prompts(arguments: argparse.Namespace, model: Model) -> list[str]:
    """The prompts; [""] where a text model gets none."""
    if model.text_encoder is None and arguments.prompts:
        raise UserError(f"{model.name} takes no prompts; it knows {model.num_classes} classes, see --labels")
    if model.text_encoder is None and arguments.text_encoder:
        raise UserError(f"{model.name} takes no text, so --text-encoder means nothing; leave it out")
    if model.text_encoder is None:
        return []
    if arguments.labels:
        raise UserError(f"{model.name} takes prompts, not labels; give --prompts")
    return arguments.prompts or [""]


def _plan(
    labels: list[int] | None, seeds: list[int] | None, n: int | None, classes: int
) -> tuple[list[int], list[int], int]:
    """The label and the seed of every image, and how many make a row."""
    if labels is None:
        labels = list(range(classes if n else min(classes, ROWS))) or [0]
    if n is None:
        seeds = seeds if seeds is not None else list(range(COLUMNS))
        if len(labels) * len(seeds) > MOST:
            raise UserError(
                f"{len(labels):,} labels with {len(seeds):,} seeds each: draw at most {MOST:,} images"
            )
        return [label for label in labels for _ in seeds], seeds * len(labels), len(seeds)
    if seeds is None or len(seeds) == 1:
        first = seeds[0] if seeds else 0
        if first + n - 1 > LARGEST:
            raise UserError(f"--n {n} from seed {first} on: seeds end at {LARGEST}; begin lower")
        seeds = list(range(first, first + n))
    elif len(seeds) != n:
        raise UserError(f"--n {n} came with {len(seeds)} seeds; give the first seed only, or {n} of them")
    return list(islice(cycle(labels), n)), seeds, min(n, len(labels))


def _is_png(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8) in (b"\x89PNG\r\n\x1a\n", b"")


def _check_places(arguments: argparse.Namespace) -> None:
    """Refuse outputs without a name, or one name for two of them: the second would replace the first."""
    taken: dict[str, str] = {}
    for option in ("grid", "npz", "png_dir"):
        path, name = getattr(arguments, option), f"--{option.replace('_', '-')}"
        if path is None:
            continue
        if not path.name and option != "png_dir":
            raise UserError(f"{name} {path} is a folder; give another {name}")
        if option == "grid" and path.suffix.lower() in OTHER_PICTURES:
            raise UserError(f"--grid {path}: grids are PNG files; give {path.with_suffix('.png')}")
        if option == "grid" and path.is_file() and not _is_png(path):
            raise UserError(f"--grid {path}: there is a file that is no PNG; remove it, or give another name")
        place = os.path.realpath(path)
        if place in taken:
            raise UserError(f"{taken[place]} and {name} are both {path}; give each a place of its own")
        taken[place] = name


def _check_outputs(arguments: argparse.Namespace, model: Model, task: Task, folder: Path) -> None:
    """Refuse, before hours of drawing, what could not be written then or afterwards; `folder` is for the single images."""
    from ldm_dcn.places import check_file_place, check_folder_place, existing_folder

    if arguments.grid:
        check_file_place(arguments.grid, "give another --grid")
    if arguments.npz:
        check_file_place(arguments.npz, "give another --npz")
    option = "--png-dir" if arguments.png_dir else "--npz" if arguments.npz else "--grid"
    check_folder_place(folder, f"give another {option}")
    height, width = arguments.size or model.image_size
    pixels = len(task) * height * width
    places = {existing_folder(folder): pixels * model.autoencoder.image_channels}  # and seldom more
    if arguments.npz:
        place = existing_folder(arguments.npz.parent)
        places[place] = places.get(place, 0) + 3 * pixels
    for place, size in places.items():
        free = shutil.disk_usage(place).free
        if size > free and not folder.exists():
            raise UserError(
                f"{len(task)} images take {_size(size)} in {place} and {_size(free)} are free; free some space, or give another "
                f"{option}"
            )


def _size(count: int) -> str:
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def _read_prompts(path: Path) -> list[str]:
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--prompts-file {path} cannot be read ({error}); give a text file, one prompt a line"
        ) from None
    if not prompts:
        raise UserError(f"--prompts-file {path} is empty; write one prompt a line")
    return prompts


def _sides(text: str | None) -> tuple[int, int] | None:
    """ "320x256" -> (320, 256), "256" -> (256, 256)."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*([0-9]{1,9})(?:x([0-9]{1,9}))?\s*", text)
    if not match:
        raise UserError(f"--size '{text[:40]}': give HEIGHTxWIDTH in pixels, such as 320x256, or one number")
    return int(match[1]), int(match[2] or match[1])


def _by_number(texts: Sequence[str] | None, model: Model) -> list[str] | None:
    """`texts` with the number of each class in the place of its name: ["0-3", "fox,7"] -> ["0-3", "21", "7"].

    A text with commas is a list, unless it is a name. Raises `UserError` for what is neither number, range nor name.
    """
    if texts is None:
        return None
    found: list[str] = []
    for text in texts:
        parts = text.split(",")
        if text in model.class_names and not all(map(NUMBERS.fullmatch, parts)):
            parts = [text]
        found += [part if NUMBERS.fullmatch(part) else str(model.class_named(part.strip())) for part in parts]
    return found


def _warn_of_numbers(texts: Sequence[str], labels: Sequence[int], model: Model) -> None:
    """Of a label that is the number of one class and the name of another, such as 2 of folders 0, 1, 10, 2, say which was drawn."""
    named = {part.strip() for text in texts for part in text.split(",")} & {*model.class_names}
    for label in labels:
        if str(label) in named and label < len(model.class_names) and model.class_names[label] != str(label):
            other = model.class_names.index(str(label))
            warn(
                f"label {label} is the class of that number, which is called {model.class_names[label]!r}; the class called '{label}' "
                f"has number {other}"
            )
            return


def _numbers(texts: Sequence[str] | None, what: str) -> list[int] | None:
    """["0-3", "7,9"] -> [0, 1, 2, 3, 7, 9]."""
    if texts is None:
        return None
    numbers: list[int] = []
    for text in ",".join(texts).split(","):
        match = NUMBERS.fullmatch(text)
        if not match:
            raise UserError(f"{what} '{text}' is no number and no range; write such as 3 or 0-9")
        if any(
            len(digits or "") > len(str(LARGEST)) or int(digits or 0) > LARGEST for digits in match.groups()
        ):
            raise UserError(f"{what} '{text[:40]}' is too large; use at most {LARGEST}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"{what} range '{text}' runs backwards; write {last}-{first}")
        if len(numbers) + last - first >= MOST:
            raise UserError(
                f"{what} range '{text}' makes more than {MOST:,} numbers; ask for fewer at a time"
            )
        numbers.extend(range(first, last + 1))
    return numbers


if __name__ == "__main__":
    with exit_on_user_error():
        raise SystemExit(main())
