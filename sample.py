"""Draw images from a trained model: a grid, single PNGs, or ADM's npz.

python sample.py runs/digits_dcn                            grid.png: a row a class, a column a seed
python sample.py runs/digits_dcn --labels 3 7 --seeds 0-9   two rows of ten
python sample.py RUN --n 50000 --npz samples.npz            50,000 images, classes in turn, seeds from 0
python sample.py RUN --prompts "a red fox" "a blue bird"    of a model trained on captions: a row a prompt
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_dcn.errors import Parser, UserError, exit_on_user_error

if TYPE_CHECKING:
    from ldm_dcn.export import Model

COLUMNS = 8  # seeds a class where neither --seeds nor --n says how many
ROWS = 20  # classes at most in a grid where --labels does not say which
MOST = 10**7  # images, labels or seeds in one command
LARGEST = 2**63 - 1  # seed


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    labels, seeds = _numbers(arguments.labels, "label"), _numbers(arguments.seeds, "seed")
    if arguments.n is not None and not 1 <= arguments.n <= MOST:
        raise UserError(f"--n {arguments.n}: ask for at least one image, and at most {MOST:,} at a time")
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size}: draw at least one image at once")

    import torch
    from tqdm import tqdm

    from ldm_dcn.device import choose_device
    from ldm_dcn.export import load_model
    from ldm_dcn.pictures import save_adm_npz, save_grid, save_png
    from ldm_dcn.sampling import check_guidance, generate

    check_guidance(arguments.guidance, tuple(arguments.guidance_interval))
    device = choose_device(arguments.device)
    model = load_model(arguments.model, device=device, autoencoder=arguments.autoencoder)
    prompts = _checked_prompts(arguments, model)
    kinds = len(prompts) if prompts else model.num_classes
    labels, seeds, columns = _plan(labels, seeds, arguments.n, kinds)
    conditions = labels if model.num_classes else None
    if prompts:
        conditions = model.encode_prompts(prompts, arguments.text_encoder)[torch.tensor(labels)]
    grid = arguments.grid or (None if arguments.npz or arguments.png_dir else Path("grid.png"))
    pixels = (model.latent_shape[1] * model.autoencoder.factor) * (
        model.latent_shape[2] * model.autoencoder.factor
    )
    _check_outputs(grid, arguments.npz, arguments.png_dir, 3 * pixels * len(seeds))

    with tqdm(total=len(seeds), desc=model.name, unit="image") as bar:
        images = generate(
            model,
            conditions,
            seeds,
            sampler=arguments.sampler,
            steps=arguments.steps,
            guidance=arguments.guidance,
            guidance_interval=tuple(arguments.guidance_interval),
            batch_size=arguments.batch_size,
            progress=bar.update,
        )
    if grid:
        save_grid(images, columns, grid)
        print(f"{grid}: {len(images)} images, {columns} a row")
    if arguments.npz:
        save_adm_npz(images, torch.tensor(labels) if kinds else None, arguments.npz)
        print(f"{arguments.npz}: arr_0 {len(images)} RGB images" + (", arr_1 their labels" if kinds else ""))
    if arguments.png_dir:
        for number, (image, label, seed) in enumerate(zip(images, labels, seeds, strict=True)):
            save_png(image, arguments.png_dir / f"{number:06d}_label{label}_seed{seed}.png")
        print(f"{arguments.png_dir}: {len(images)} PNG files")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("model", metavar="RUN", help="a run folder, an export folder, or a hub id")
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="L",
        help="classes: numbers and ranges such as 0-9 (default: all; 20 at most without --n)",
    )
    parser.add_argument(
        "--seeds", nargs="+", metavar="S", help="numbers and ranges (default: 0-7 for each label)"
    )
    parser.add_argument("--n", type=int, help="this many images in all: labels in turn, a new seed each")
    parser.add_argument("--sampler", default="dpm++", help="dpm++ (default), ddim or euler")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--guidance", type=float, default=1.5, help="s in u + s (c - u); 1 is none (default: 1.5)"
    )
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="shares of the times, 0 being the data's end, between which guidance works (default: 0 1)",
    )
    parser.add_argument("--prompts", nargs="+", metavar="TEXT", help="of a model trained on captions")
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


def _check_outputs(grid: Path | None, npz: Path | None, pngs: Path | None, size: int) -> None:
    """Refuse, before hours of drawing, what could not be written afterwards; `size` is that of the npz in bytes."""
    from ldm_dcn.files import check_file_place, check_folder_place, existing_folder

    if grid:
        check_file_place(grid, "give another --grid")
    if npz:
        check_file_place(npz, "give another --npz")
        free = shutil.disk_usage(existing_folder(npz.parent)).free
        if size > free:
            raise UserError(
                f"{npz} takes {size / 1e6:.0f} MB and {free / 1e6:.0f} MB are free; free some space, or give another --npz"
            )
    if pngs:
        check_folder_place(pngs, "give another --png-dir")


def _numbers(texts: Sequence[str] | None, what: str) -> list[int] | None:
    """["0-3", "7,9"] -> [0, 1, 2, 3, 7, 9]."""
    if texts is None:
        return None
    numbers: list[int] = []
    for text in ",".join(texts).split(","):
        match = re.fullmatch(r"\s*([0-9]+)(?:-([0-9]+))?\s*", text)
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
