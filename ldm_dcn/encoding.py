"""The encoding of images into a latent cache: its plan, and each process's part in it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import cache_layout, cache_writer, files, folders
from .autoencoder import Autoencoder
from .cache_layout import Range
from .errors import UserError
from .images import LOOK_ON, PREPROCESSING, BadImage, Images, name_bad, to_float
from .presence import Presence
from .reuse import HASH, EarlierCaches, Place, source_tensors
from .signals import StopSignals
from .text import EMPTY, TextEncoder
from .weights import DTYPES

PROMPTS_AT_ONCE = 64
WAIT = 0.2  # seconds between two looks at what the other processes have done


@dataclass
class _Made:
    """Of one shard, what `cache_writer.write_shard` takes."""

    stamp: dict[str, str]
    tensors: dict[str, Tensor]
    bad: list[dict[str, Any]]
    sources: dict[str, Tensor]
    reused: int


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
    earlier: EarlierCaches | None = None

    @property
    def ranges(self) -> list[Range]:
        return cache_layout.shard_ranges(len(self.images), self.plan["shard_size"])

    @property
    def own(self) -> list[Range]:
        """The shards of this process, and of no other."""
        return self.ranges[self.rank :: self.processes]

    @property
    def bad_allowed(self) -> int:
        return int(self.max_bad * len(self.images)) if self.max_bad < 1 else int(self.max_bad)


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
        "format": cache_layout.FORMAT,
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
    size = cache_layout.bytes_per_image(plan, _captions_per_image(images) if text else 0)
    plan["shard_size"] = shard_size or max(1, min(len(images), cache_layout.SHARD_BYTES // size))
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


def encode_shards(encoding: Encoding, stop: StopSignals, bar: tqdm | None = None) -> int:
    """Write the shards of this process that are not there yet. Returns the signal that stopped it, or 0.

    Raises `UserError` where this process alone has met more broken images than all together may.
    """
    bad: dict[int, BadImage] = {}
    for shard in encoding.own:
        if stop.received:
            return stop.received
        cache_writer.clear_up(encoding.out, shard)
        known = partial(is_current, images=encoding.images, shard=shard)
        if cache_writer.is_written(encoding.out, shard, encoding.plan, known):
            left_out = cache_layout.read_shard(encoding.out, shard)["bad"]
            bad |= {entry["index"]: BadImage(entry["path"], entry["reason"]) for entry in left_out}
            _advance(bar, len(shard))
            continue
        cache_writer.unseal(encoding.out)
        made = _encode_shard(encoding, shard, bad, stop, bar)
        if made is None:
            return stop.received
        cache_writer.write_shard(
            encoding.out, shard, encoding.plan, made.stamp, made.tensors, made.bad, made.sources, made.reused
        )
    return stop.received


def _encode_shard(
    encoding: Encoding, shard: Range, bad: dict[int, BadImage], stop: StopSignals, bar: tqdm | None
) -> _Made | None:
    """One shard; its broken images are put into `bad` too. None where a signal came."""
    images, plan = encoding.images, encoding.plan
    contents: list[bytes] = []
    before = _outside(images, shard)  # of a file that is replaced meanwhile, the next start sees another time
    indices: list[int] = []
    parts: dict[str, list[Tensor]] = {name: [] for name in cache_layout.moments_of(plan)}
    captions: list[list[str]] = []
    left_out: list[dict[str, Any]] = []
    reused = 0
    # The batches begin with the shard: they are the same with any number of processes, and so are the bits.
    for batch, hashes, results in _read_ahead(encoding, shard):
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
        found = [result for _, result in good]
        indices += [index for index, _ in good]
        reused += sum(isinstance(result, Place) for result in found)
        if good:
            for name, moments in _moments(encoding, found).items():
                parts[name].append(moments)
        if encoding.text_encoder is not None:
            prompts = [images.captions(index) or [EMPTY] for index, _ in good]
            captions += prompts
            parts.setdefault("tokens", []).extend(_tokens(encoding, encoding.text_encoder, found, prompts))
        if encoding.earlier is not None:
            encoding.earlier.let_go()
        _advance(bar, len(batch))
    channels, height, width = plan["latent_shape"]
    kind = DTYPES[plan["dtype"]]
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
        counts = [len(several) for several in captions]
        tensors["token_starts"] = torch.tensor([0, *counts], dtype=torch.int64).cumsum(0)
    sources = source_tensors(plan, tensors, [contents[index - shard.first] for index in indices], captions)
    return _Made({**before, "content": _digest(contents)}, tensors, left_out, sources, reused)


def _moments(encoding: Encoding, images: Sequence[Tensor | Place]) -> dict[str, Tensor]:
    """Of pictures' pixels, encoded all at once, and of places in earlier caches, in their order: each (n, 2L, h, w), as stored."""
    fresh = [pixels for pixels in images if isinstance(pixels, Tensor)]
    known = [encoding.earlier.moments(image) if isinstance(image, Place) else None for image in images]
    pixels = to_float(torch.stack(fresh).to(encoding.autoencoder.device)) if fresh else None
    result: dict[str, Tensor] = {}
    for name in cache_layout.moments_of(encoding.plan):
        encoded: Iterator[Tensor] = iter(())
        if pixels is not None:
            moments = encoding.autoencoder.encode(pixels if name == "moments" else pixels.flip(-1)).cpu()
            encoded = iter(_stored(moments, encoding.plan["dtype"], encoding.autoencoder.spec))
        result[name] = torch.stack([next(encoded) if there is None else there[name] for there in known])
    return result


def _tokens(
    encoding: Encoding, encoder: TextEncoder, images: Sequence[Tensor | Place], captions: Sequence[list[str]]
) -> list[Tensor]:
    """Of each image's captions, all in their order: embeddings (m, T, D), encoded together where no earlier cache has them."""
    known = [
        encoding.earlier.tokens(image, several) if isinstance(image, Place) else None
        for image, several in zip(images, captions, strict=True)
    ]
    asked = [several for several, there in zip(captions, known, strict=True) if there is None]
    made = _embed(encoder, [prompt for several in asked for prompt in several], encoding.plan["dtype"])
    if len(asked) == len(known):
        return made
    rows = iter(torch.cat(made).split([len(several) for several in asked]) if made else ())
    return [next(rows) if there is None else there for there in known]


def _read_ahead(
    encoding: Encoding, shard: Range
) -> Iterator[tuple[range, list[bytes], list[Tensor | Place | BadImage]]]:
    """The batches of a shard with the files' hashes, each being read and decoded while the one before is encoded.

    What earlier caches have is not decoded.
    """
    images, size = encoding.images, encoding.batch_size

    def read(batch: range) -> tuple[list[bytes], list[Tensor | Place | BadImage]]:
        return images.read_with_content(batch, encoding.earlier.find if encoding.earlier else lambda _: None)

    batches = [
        range(first, min(first + size, shard.last + 1)) for first in range(shard.first, shard.last + 1, size)
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
    stored = values.to(DTYPES[dtype])
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


def wait_for_others(encoding: Encoding, presence: Presence, stop: StopSignals) -> None:
    """Until all shards are there. No exchange between the processes: one that failed would make the others wait for ever."""
    # Of processes that are gone while shards of theirs are missing, which may be there and not be seen yet.
    free_since: dict[int, float] = {}
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
        now = time.monotonic()
        free_since = {rank: free_since.get(rank, now) for rank, _ in waiting if not present[rank]}
        gone = sorted(rank for rank, since in free_since.items() if now - since >= files.UNSEEN)
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

    folder = encoding.out / cache_layout.SHARDS / shard.name
    if not (folder / folders.MANIFEST).exists():
        return False
    return cache_writer.is_written(encoding.out, shard, encoding.plan, known)


def finish(encoding: Encoding) -> dict[str, Any]:
    """Write the manifest of a cache whose shards are all there."""
    empty = None
    if encoding.text_encoder is not None:
        empty = _embed(encoding.text_encoder, [EMPTY], encoding.plan["dtype"])[0][0]
    return cache_writer.finish(
        encoding.out, encoding.plan, empty, encoding.bad_allowed, f"{encoding.max_bad:g}"
    )


def bytes_missing(encoding: Encoding) -> int:
    """What the shards that are not there yet will take, about."""
    missing = sum(
        len(shard)
        for shard in encoding.ranges
        if not (encoding.out / cache_layout.SHARDS / shard.name).is_dir()
    )
    captions = _captions_per_image(encoding.images) if encoding.plan["text"] else 0
    return missing * (cache_layout.bytes_per_image(encoding.plan, captions) + 4 * HASH)
