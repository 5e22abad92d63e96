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
import errno
import hashlib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import cache
from .autoencoder import Autoencoder, load_autoencoder
from .cache import LatentCache, Range
from .data import check_source, open_dataset
from .device import choose_device
from .errors import Parser, UserError, exit_on_user_error
from .images import LOOK_ON, PREPROCESSING, BadImage, Images, name_bad, to_float
from .launch import REQUEUE, StopSignals, start_accelerator
from .text import EMPTY, TextEncoder, load_text_encoder

BATCH_SIZE = {"cuda": 64, "cpu": 8}  # images; Stable Diffusion's autoencoder takes 0.1 GB for one of 256x256
PROMPTS_AT_ONCE = 64
WAIT = 0.2  # seconds between two looks at what the other processes have done


@dataclass
class Encoding:
    """One process's part in filling the cache `out`."""

    out: Path
    images: Images
    autoencoder: Autoencoder
    text_encoder: TextEncoder | None
    plan: dict[str, Any]
    max_bad: float
    batch_size: int
    rank: int = 0
    processes: int = 1

    @property
    def ranges(self) -> list[Range]:
        return cache.shard_ranges(len(self.images), self.plan["shard_size"])

    @property
    def own(self) -> list[Range]:
        """The shards of this process, and of no other."""
        return self.ranges[self.rank :: self.processes]

    @property
    def bad_allowed(self) -> int:
        return int(self.max_bad * len(self.images)) if self.max_bad < 1 else int(self.max_bad)


# --------------------------------------------------------------------------------------------------- the plan


def make_plan(
    images: Images,
    autoencoder: Autoencoder,
    text_encoder: TextEncoder | None,
    *,
    flips: bool,
    dtype: str,
    shard_size: int | None,
) -> dict[str, Any]:
    """What the cache will be, as JSON: with the same plan the same bytes come out, whoever writes them.

    Raises `UserError` where images and autoencoder do not fit.
    """
    if images.image_channels != autoencoder.image_channels:
        raise UserError(
            f"the images are read with {images.image_channels} channels, the autoencoder {autoencoder.spec} takes "
            f"{autoencoder.image_channels}; use --image-channels {autoencoder.image_channels}"
        )
    side, rest = divmod(images.image_size, autoencoder.factor)
    if rest or not side:
        raise UserError(
            f"--image-size {images.image_size} is no multiple of {autoencoder.factor}, the pixels per latent of "
            f"{autoencoder.spec}; use {max(1, side) * autoencoder.factor}"
        )
    text = None
    if text_encoder is not None:
        text = {
            "length": text_encoder.length,
            "width": text_encoder.width,
            "encoder": text_encoder.fingerprint(),
        }
    plan = {
        "format": cache.FORMAT,
        "source": os.path.abspath(images.source) if os.path.exists(images.source) else images.source,
        "images": len(images),
        "image_list_sha256": _hash_list(images),
        "class_names": list(images.class_names),
        "preprocessing": {
            "pixels": PREPROCESSING,
            "image_size": images.image_size,
            "image_channels": images.image_channels,
            "flips": flips,
        },
        "autoencoder": autoencoder.fingerprint(),
        "latent_shape": [autoencoder.latent_channels, side, side],
        "dtype": dtype,
        "text": text,
    }
    size = cache.bytes_per_image(plan, _captions_per_image(images) if text else 0)
    plan["shard_size"] = shard_size or max(1, min(len(images), cache.SHARD_BYTES // size))
    return plan


def _hash_list(images: Images) -> str:
    """sha256 over names and labels, in order."""
    digest = hashlib.sha256(images.edition.encode())
    for index, label in enumerate(images.labels.tolist()):
        digest.update(f"{images.name(index)}\n{label}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _captions_per_image(images: Images) -> float:
    """The mean over the first few, to choose a shard's size by."""
    few = range(min(len(images), 100))
    return sum(max(1, len(images.captions(index))) for index in few) / len(few)


def is_current(stamp: Any, images: Images, shard: Range) -> bool:
    """Whether the files and captions of the range are those of `stamp`; else its shard is made anew.

    Files of the same sizes and times are taken for the same. Where the times differ, as in a copy, their content decides: they
    are read through, but not encoded.
    """
    now = _outside(images, shard)
    if not isinstance(stamp, dict) or any(stamp[key] != now[key] for key in ("sizes", "captions")):
        return False
    if stamp["times"] == now["times"]:
        return True
    return stamp["content"] == _digest(images.contents(range(shard.first, shard.last + 1)))


def _outside(images: Images, shard: Range) -> dict[str, str]:
    """Hashes of what is known of the range's files without reading them."""
    indices = range(shard.first, shard.last + 1)
    captions = [images.captions(index) if images.has_captions else None for index in indices]
    return {
        "sizes": _digest(str(images.size(index)).encode() for index in indices),
        "captions": _digest(json.dumps(several).encode() for several in captions),
        "times": _digest(str(images.changed(index)).encode() for index in indices),
    }


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part + b"\n")
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------- the loop


def encode_shards(encoding: Encoding, stop: StopSignals, bar: tqdm | None = None) -> int:
    """Write the shards of this process that are not there yet. Returns the signal that stopped it, or 0.

    Raises `UserError` where this process alone has met more broken images than all together may.
    """
    bad: dict[int, BadImage] = {}
    for shard in encoding.own:
        if stop.received:
            return stop.received
        cache.clear_up(encoding.out, shard)
        known = partial(is_current, images=encoding.images, shard=shard)
        if cache.is_written(encoding.out, shard, encoding.plan, known):
            left_out = cache.read_shard(encoding.out, shard)["bad"]
            bad |= {entry["index"]: BadImage(entry["path"], entry["reason"]) for entry in left_out}
            _advance(bar, len(shard))
            continue
        cache.unseal(encoding.out)
        made = _encode_shard(encoding, shard, bad, stop, bar)
        if made is None:
            return stop.received
        cache.write_shard(encoding.out, shard, encoding.plan, *made)
    return stop.received


def _encode_shard(
    encoding: Encoding, shard: Range, bad: dict[int, BadImage], stop: StopSignals, bar: tqdm | None
) -> tuple[dict[str, str], dict[str, Tensor], list[dict[str, Any]]] | None:
    """Stamp, tensors and broken images of one shard; the last are put into `bad` too. None where a signal came."""
    images, plan = encoding.images, encoding.plan
    contents: list[bytes] = []
    before = _outside(images, shard)  # of a file that is replaced meanwhile, the next start sees another time
    indices: list[int] = []
    parts: dict[str, list[Tensor]] = {"moments": []}
    if plan["preprocessing"]["flips"]:
        parts["moments_flipped"] = []
    token_counts: list[int] = []
    left_out: list[dict[str, Any]] = []
    # The batches begin with the shard: they are the same with any number of processes, and so are the bits.
    for batch, hashes, results in _read_ahead(images, shard, encoding.batch_size):
        if stop.received:
            return None
        contents += hashes
        good = [(index, r) for index, r in zip(batch, results, strict=True) if not isinstance(r, BadImage)]
        for index, result in zip(batch, results, strict=True):
            if isinstance(result, BadImage):
                bad[index] = result
                left_out.append({"index": index, "path": images.name(index), "reason": result.reason})
        if len(bad) > encoding.bad_allowed:
            raise UserError(_complaint(encoding, bad, batch[-1] + 1))
        if good:
            indices += [index for index, _ in good]
            pixels = to_float(torch.stack([result for _, result in good]).to(encoding.autoencoder.device))
            for name, seen in (("moments", pixels), ("moments_flipped", pixels.flip(-1))):
                if name in parts:
                    moments = encoding.autoencoder.encode(seen).cpu()
                    parts[name].append(_stored(moments, plan["dtype"], encoding.autoencoder.spec))
        if encoding.text_encoder is not None:
            prompts = [images.captions(index) or [EMPTY] for index, _ in good]
            token_counts += [len(several) for several in prompts]
            parts.setdefault("tokens", []).extend(
                _embed(
                    encoding.text_encoder,
                    [prompt for several in prompts for prompt in several],
                    plan["dtype"],
                )
            )
        _advance(bar, len(batch))
    channels, height, width = plan["latent_shape"]
    kind = cache.DTYPES[plan["dtype"]]
    empty = {"tokens": (0, plan["text"]["length"], plan["text"]["width"])} if plan["text"] else {}
    tensors = {
        name: torch.cat(rows)
        if rows
        else torch.empty(empty.get(name, (0, 2 * channels, height, width)), dtype=kind)
        for name, rows in parts.items()
    }
    tensors["indices"] = torch.tensor(indices, dtype=torch.int64)
    tensors["labels"] = images.labels[tensors["indices"]]
    if encoding.text_encoder is not None:
        tensors["token_starts"] = torch.tensor([0, *token_counts], dtype=torch.int64).cumsum(0)
    return {**before, "content": _digest(contents)}, tensors, left_out


def _read_ahead(
    images: Images, shard: Range, batch_size: int
) -> Iterator[tuple[range, list[bytes], list[Tensor | BadImage]]]:
    """The batches of a shard with the files' hashes, each being read and decoded while the one before is encoded."""

    def read(batch: range) -> tuple[list[bytes], list[Tensor | BadImage]]:
        return images.contents(batch), images.try_read(batch)

    batches = [
        range(first, min(first + batch_size, shard.last + 1))
        for first in range(shard.first, shard.last + 1, batch_size)
    ]
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read, batches[0])
        for number, batch in enumerate(batches):
            hashes, results = coming.result()
            if number + 1 < len(batches):
                coming = reader.submit(read, batches[number + 1])
            yield batch, hashes, results


def _embed(encoder: TextEncoder, prompts: list[str], dtype: str) -> list[Tensor]:
    return [
        _stored(encoder.encode(prompts[first : first + PROMPTS_AT_ONCE]), dtype, encoder.spec)
        for first in range(0, len(prompts), PROMPTS_AT_ONCE)
    ]


def _stored(values: Tensor, dtype: str, maker: str) -> Tensor:
    stored = values.to(cache.DTYPES[dtype])
    if not bool(torch.isfinite(stored).all()):
        raise UserError(
            f"what {maker} gives does not fit into {dtype} (its largest value is {float(values.abs().max()):.3g}); "
            "use --dtype float32 or bfloat16"
        )
    return stored


def _complaint(encoding: Encoding, bad: dict[int, BadImage], start: int) -> str:
    """One too many is broken: look at the next ones too, so that one run finds all of a small source."""
    images = encoding.images
    rest = range(start, min(start + LOOK_ON, len(images)))
    more = zip(rest, images.try_read(rest), strict=True)
    found = bad | {index: result for index, result in more if isinstance(result, BadImage)}
    count = len(found)
    return (
        f"{count} of {len(images)} images of {images.source} cannot be read: {name_bad(found)}; repair "
        f"{'it' if count == 1 else 'them'} under the same {'name' if count == 1 else 'names'}, or allow {count} with "
        f"--max-bad {count}; the shards written so far are kept"
    )


def _advance(bar: tqdm | None, count: int) -> None:
    if bar is not None:
        bar.update(count)


# --------------------------------------------------------------------------------------------------- several processes


class Presence:
    """A lock on `out` for each process: nobody else encodes into it, and the main process sees who is still there.

    The operating system lets go of it however the process ends.
    """

    def __init__(self, out: Path, rank: int, processes: int | None = None) -> None:
        """`processes` is how many there are, from the main one: it looks for those left of a start with more."""
        self._out = out
        self._held = self._take(rank, "a+")
        left = () if processes is None else self._ranks_from(processes)
        if self._held is False or any(self._take(other, "r") is False for other in left):
            self.leave()
            raise UserError(f"another process is encoding into {out}; wait for it, or name another folder")

    def _ranks_from(self, first: int) -> list[int]:
        found = (re.fullmatch(r"\.process-(\d+)\.lock", path.name) for path in self._out.iterdir())
        return [int(match[1]) for match in found if match and int(match[1]) >= first]

    def is_there(self, rank: int) -> bool:
        file = self._take(rank, "r")
        if file is False or file is None:
            return True
        file.close()
        return False

    def leave(self) -> None:
        if self._held:
            self._held.close()

    def _take(self, rank: int, mode: str) -> Any:
        """The locked file; False where another holds it; None where locks are not to be had."""
        try:
            import fcntl
        except ImportError:  # Windows
            return None
        try:
            file = (self._out / f".process-{rank}.lock").open(mode)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
        return file


def wait_for_others(encoding: Encoding, presence: Presence, stop: StopSignals) -> None:
    """Until all shards are there. No exchange between the processes: one that failed would make the others wait for ever."""
    waiting = [
        (rank, shard)
        for rank in range(encoding.processes)
        for shard in encoding.ranges[rank :: encoding.processes]
        if rank != encoding.rank
    ]
    outdated: dict[
        str, Any
    ] = {}  # stamps that were found so: their images are not read through again and again
    while waiting and not stop.received:
        present = {rank: presence.is_there(rank) for rank, _ in waiting}  # asked first: it may end just now
        waiting = [(rank, shard) for rank, shard in waiting if not _is_done(encoding, shard, outdated)]
        gone = sorted({rank for rank, _ in waiting if not present[rank]})
        if gone:
            raise UserError(
                f"process {gone[0]} ended before its shards were written (its own error says why); the others' are kept; "
                "run the same command again"
            )
        if waiting:
            time.sleep(WAIT)


def _is_done(encoding: Encoding, shard: Range, outdated: dict[str, Any]) -> bool:
    def known(stamp: Any) -> bool:
        if outdated.get(shard.name) == stamp:
            return False
        if is_current(stamp, encoding.images, shard):
            return True
        outdated[shard.name] = stamp
        return False

    folder = encoding.out / cache.SHARDS / shard.name
    if not (folder / cache.checkpoint.MANIFEST).exists():
        return False
    return cache.is_written(encoding.out, shard, encoding.plan, known)


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


# --------------------------------------------------------------------------------------------------- the command


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
            facts.append(cache.digest(cache.meaning(encoding.plan)))
            cache.create(out)
            presence = Presence(out, accelerator.process_index, accelerator.num_processes if main else None)
            if main:
                cache.begin(out, encoding.plan)
                cache.check_room(out, _needed(encoding))
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


def finish(encoding: Encoding) -> dict[str, Any]:
    """Write the manifest of a cache whose shards are all there."""
    empty = None
    if encoding.text_encoder is not None:
        empty = _embed(encoding.text_encoder, [EMPTY], encoding.plan["dtype"])[0][0]
    return cache.finish(encoding.out, encoding.plan, empty, encoding.bad_allowed, f"{encoding.max_bad:g}")


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
        shard_size=options.shard_size or cache.begun_shard_size(Path(options.out)),
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
    )


def _check_place(out: Path, images: str) -> None:
    if not os.path.isdir(images):
        return
    inside = os.path.commonpath([os.path.realpath(out), os.path.realpath(images)]) == os.path.realpath(images)
    if inside:
        raise UserError(
            f"the cache {out} would lie in the images' own folder {images}; name a folder elsewhere"
        )


def _needed(encoding: Encoding) -> int:
    missing = sum(
        len(shard) for shard in encoding.ranges if not (encoding.out / cache.SHARDS / shard.name).is_dir()
    )
    captions = _captions_per_image(encoding.images) if encoding.plan["text"] else 0
    return missing * cache.bytes_per_image(encoding.plan, captions)


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
    size = sum(shard["files"][cache.LATENTS]["size"] for shard in manifest["shards"])
    shape = "x".join(str(side) for side in plan["latent_shape"])
    extras = [f"{len(plan['class_names'])} classes"] if plan["class_names"] else []
    extras += ["and their mirror images"] if plan["preprocessing"]["flips"] else []
    extras += ["and captions"] if plan["text"] else []
    broken = f"; broken, and named in {out / cache.BAD}: {manifest['bad']}" if manifest["bad"] else ""
    print(
        f"{out}: {manifest['images']} images {' '.join(extras)} as {shape} latents, {size / 1e9:.2f} GB in "
        f"{len(manifest['shards'])} shards, fingerprint {manifest['identity']}{broken}"
    )


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
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _limit(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value


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
    add("--autoencoder-dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
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
        choices=tuple(cache.DTYPES),
        help="of what is stored (default %(default)s)",
    )
    add("--batch-size", type=_positive, help="images encoded at once (default 64, on a CPU 8)")
    add("--shard-size", type=_positive, metavar="N", help="images a shard (default: what makes 128 MB)")
    add("--max-bad", type=_limit, default=0, metavar="N",
        help="broken images to leave out before it is an error: a count, or a share below 1 (default 0)")  # fmt: skip
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
