"""python -m ldm_dcn.encode IMAGES OUT: fill a latent cache, with one process or many; the same command again resumes.

IMAGES is what `data.open_dataset` opens: a folder, tar shards, a Hugging Face data set on disk, or "digits". Under a launcher every
process takes each n-th shard, and the main one writes the manifest when all are there:

    torchrun --standalone --nproc_per_node N -m ldm_dcn.encode IMAGES OUT
    accelerate launch -m ldm_dcn.encode IMAGES OUT

A kill loses the shards being written, nothing else; SIGTERM and Ctrl-C stop after the batch, with exit code 143 and 130, and
SIGUSR1 with 0, for batch systems that will start the same command again.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import cache, cache_layout, cache_writer
from .autoencoder import load_autoencoder
from .cache import LatentCache
from .data import check_source, open_dataset
from .device import choose_device
from .encoding import Encoding, bytes_missing, encode_shards, finish, make_plan, wait_for_others
from .errors import Parser, UserError, exit_on_user_error, shown
from .launch import start_accelerator
from .presence import Presence
from .reuse import EarlierCaches
from .signals import REQUEUE, StopSignals
from .text import load_text_encoder
from .weights import DTYPES

BATCH_SIZE = {"cuda": 64, "cpu": 8}  # images; Stable Diffusion's autoencoder takes 0.1 GB for one of 256x256


@contextmanager
def _agreed(accelerator: Any, facts: list[str]) -> Iterator[None]:
    """Whatever a process finds wrong in the block, all stop with; `errors.report` has the main one say it.

    `facts` must be alike everywhere.
    """
    problem = ""
    try:
        yield
    except UserError as error:
        problem = str(error)
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        answers = gather_object([(problem, tuple(facts))])
        problem = next((text for text, _ in answers if text), "")
        if not problem and len({alike for _, alike in answers}) > 1:
            problem = (
                "the processes do not see the same images or models; give all the same files and versions"
            )
    if problem:
        raise UserError(problem)


def run(options: argparse.Namespace) -> int:
    """Encode; returns the exit code."""
    accelerator = start_accelerator()
    device = choose_device(options.device) if options.device else accelerator.device
    main = accelerator.is_main_process
    out, presence, facts = Path(options.out), None, []
    with StopSignals() as stop, warnings.catch_warnings():
        # Pillow warns of what we note as broken
        warnings.filterwarnings("ignore", message=".*decompression bomb", category=Warning)
        with _agreed(accelerator, facts):
            encoding = _prepare(options, device, accelerator.process_index, accelerator.num_processes)
            _check_place(out, options.images)
            facts.append(cache_layout.digest(cache_layout.meaning(encoding.plan)))
            cache_writer.create(out)
            presence = Presence(out, accelerator.process_index, accelerator.num_processes if main else None)
            if main:
                cache_writer.begin(out, encoding.plan)
                cache_writer.check_room(out, bytes_missing(encoding))
        try:
            with _bar(encoding, main) as bar:
                stopped_by = encode_shards(encoding, stop, bar)
            if main and not stopped_by:
                wait_for_others(encoding, presence, stop)
                stopped_by = stop.received
            if main and not stopped_by:
                _report(out, finish(encoding))
        finally:
            # A process that failed stays present until it has said why: the main one's end would be its end too.
            if main or sys.exc_info()[0] is None:
                presence.leave()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return 128 + stopped_by if stopped_by not in (0, REQUEUE) else 0


def _prepare(options: argparse.Namespace, device: torch.device, rank: int, processes: int) -> Encoding:
    check_source(options.images, "IMAGES")
    autoencoder = load_autoencoder(
        options.autoencoder,
        dtype=options.autoencoder_dtype,
        device=device,
        image_channels=options.image_channels or 3,
    )
    images = open_dataset(
        options.images,
        image_size=options.image_size,
        image_channels=options.image_channels or autoencoder.image_channels,
    )
    if options.workers:
        images.workers = options.workers
    text_encoder = None
    if options.text_encoder:
        images.use_captions(options.captions)
        text_encoder = load_text_encoder(options.text_encoder, device=device)
    elif options.captions:
        raise UserError("--captions says what to encode, and --text-encoder by what is missing; give both")
    plan = make_plan(
        images,
        autoencoder,
        text_encoder,
        flips=options.flip,
        dtype=options.dtype,
        # what the first start chose stands, even if another caption in the sample would now move it
        shard_size=options.shard_size or cache_writer.begun_shard_size(Path(options.out)),
    )
    for folder in options.reuse:
        if os.path.realpath(folder) == os.path.realpath(options.out):
            raise UserError(
                f"--reuse {folder} is OUT itself, which is gone on with anyhow; name another OUT, or leave --reuse out"
            )
    return Encoding(
        Path(options.out),
        images,
        autoencoder,
        text_encoder,
        plan,
        options.max_bad,
        options.batch_size or BATCH_SIZE.get(device.type, 64),
        rank,
        processes,
        EarlierCaches(options.reuse, plan) if options.reuse else None,
    )


def _check_place(out: Path, images: str) -> None:
    if not os.path.isdir(images):
        return
    inside = os.path.commonpath([os.path.realpath(out), os.path.realpath(images)]) == os.path.realpath(images)
    if inside:
        raise UserError(
            f"the cache {out} would lie in the images' own folder {images}; name a folder elsewhere"
        )


@contextmanager
def _bar(encoding: Encoding, main: bool) -> Iterator[tqdm]:
    interval = 0.5 if sys.stderr.isatty() else 10.0  # seconds; a log file needs fewer lines
    total = sum(len(shard) for shard in encoding.own)
    others = f" (process 1 of {encoding.processes})" if encoding.processes > 1 else ""
    with tqdm(
        total=total, desc=f"encoding{others}", unit="image", disable=not main, mininterval=interval
    ) as bar:
        yield bar


def _report(out: Path, manifest: dict[str, Any]) -> None:
    plan = manifest["plan"]
    size = sum(shard["files"][cache_layout.LATENTS]["size"] for shard in manifest["shards"])
    shape = "x".join(str(side) for side in plan["latent_shape"])
    extras = ["their mirror images"] if plan["preprocessing"]["flips"] else []
    extras += ["captions"] if plan["text"] else []
    classes = f" of {len(plan['class_names'])} classes" if plan["class_names"] else ""
    beside = f", and {' and '.join(extras)}," if extras else ""
    reused = f"; taken over from earlier caches: {manifest['reused']}" if manifest["reused"] else ""
    broken = f"; broken, and named in {out / cache_layout.BAD}: {manifest['bad']}" if manifest["bad"] else ""
    print(
        f"{out}: {manifest['images']} images{classes}{beside} as {shape} latents, {_in_words(size)} in "
        f"{len(manifest['shards'])} shards, fingerprint {manifest['identity']}{reused}{broken}"
    )


def _in_words(size: int) -> str:
    """Bytes."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _verify(folder: str) -> int:
    manifest = cache.verify(folder)
    print(
        f"{folder}: {manifest['images']} images in {len(manifest['shards'])} shards, every file as it was written"
    )
    return 0


def _measure(folder: str) -> int:
    latents = LatentCache.open(folder)
    speed = cache.reading_speed(latents)
    channels, height, width = latents.latent_shape
    print(
        f"{folder}: {speed:,.0f} latents/s ({2 * channels}x{height}x{width} {latents.dtype}, random batches of 256 of "
        f"{len(latents)}, page cache, {torch.get_num_threads()} threads)"
    )
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no whole number above 0")
    return int(text)


def _limit(text: str) -> float:
    with suppress(ValueError):
        if 0 <= (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"{shown(text)} is no number from 0 on")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m ldm_dcn.encode",
        description="Fill the latent cache OUT with the images of IMAGES. The same command again resumes.",
    )
    add = parser.add_argument
    add("images", nargs="?", metavar="IMAGES", help="a folder of images (a subfolder a class, or flat), a .tar or a "
        "folder of them (webdataset layout), a Hugging Face data set on disk, or digits")  # fmt: skip
    add("out", nargs="?", metavar="OUT", help="the cache's folder")
    add("--autoencoder", default="stabilityai/sd-vae-ft-ema", metavar="SPEC",
        help="hub id, folder, weights file, digits or identity (default %(default)s)")  # fmt: skip
    add("--autoencoder-dtype", default="auto", choices=("auto", *DTYPES),
        help="what the autoencoder computes in (default: auto, what its config says, else float32)")  # fmt: skip
    add("--image-size", type=_positive, default=256, help="pixels (default %(default)s)")
    add(
        "--image-channels",
        type=int,
        choices=(1, 3),
        help="default: what the autoencoder takes; 3 for identity",
    )
    add("--flip", action=argparse.BooleanOptionalAction, default=True,
        help="store the mirrored images too (default: yes; twice the size)")  # fmt: skip
    add(
        "--dtype",
        default="float16",
        choices=tuple(DTYPES),
        help="of what is stored (default %(default)s)",
    )
    add("--batch-size", type=_positive, help="images encoded at once (default 64, on a CPU 8)")
    add("--shard-size", type=_positive, metavar="N", help="images a shard (default: what makes 128 MB)")
    add("--max-bad", type=_limit, default=0, metavar="N",
        help="broken images to leave out before it is an error: a count, or a share below 1 (default 0)")  # fmt: skip
    add("--reuse", action="append", default=[], metavar="CACHE",
        help="an earlier OUT, finished or not, whose latents are taken over where the picture is the same, whatever its name and "
        "class; several of it may be given")  # fmt: skip
    add("--workers", type=_positive, help="threads that decode images (default: the cores, at most 8)")
    add("--text-encoder", metavar="SPEC", help="encode captions too: hub id or folder of a CLIP text encoder")
    add("--captions", metavar="FIELD", help="where captions stand in metadata.jsonl, .json or the data set (default: text or "
        "caption); class-names takes the names of the classes, a FILE.json MS-COCO's captions")  # fmt: skip
    add(
        "--device", help="such as cpu or cuda:1 (default: a GPU of its own for each process, if there is one)"
    )
    add("--verify", metavar="OUT", help="instead: check every file of a cache against its hash")
    add("--measure", metavar="OUT", help="instead: measure how fast a cache is read")
    options = parser.parse_args(arguments)
    if not (options.verify or options.measure) and options.out is None:
        parser.error("IMAGES and OUT are needed")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    with exit_on_user_error():
        if options.verify:
            return _verify(options.verify)
        if options.measure:
            return _measure(options.measure)
        return run(options)


if __name__ == "__main__":
    # What `launch.check_launch` advises must be a command that works: this file is a module, not a script.
    sys.argv[0] = "-m ldm_dcn.encode"
    raise SystemExit(main())
