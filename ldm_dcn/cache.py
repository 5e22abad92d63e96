"""The latent cache, read: moments, labels and captions' embeddings of a data set, out of memory maps of its shards.

`cache_layout.py` says what lies where, `cache_writer.py` writes it.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import folders
from .cache_layout import (
    BAD,
    DTYPES,
    EMPTY,
    LATENTS,
    MEND,
    SHARDS,
    TEXT,
    check_size,
    files_of,
    read_manifest,
    read_plan,
)
from .errors import UserError
from .folders import Damaged
from .mapped import STORED, MappedTensors

# What a reader copies before it unmaps; the system maps up to some 8 times as much around it.
MAPPED_BYTES = 64 << 20
# Elements that torch converts without its thread pool (at::internal::GRAIN_SIZE less one): waiting for threads on busy cores can
# take ten times as long as the conversion.
SERIAL = 32767
_NAME_OF = {"float16": "F16", "float32": "F32", "bfloat16": "BF16"}

Choose = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class CachedText:
    """The captions of a cache: embeddings of `length` T tokens and `width` D, `captions` (N,) int64 of them for each image (at
    least one: an image without has the empty prompt), made by `encoder` (`TextEncoder.fingerprint()`)."""

    length: int
    width: int
    captions: Tensor
    encoder: dict[str, Any]


class LatentCache:
    """A finished cache. It keeps a memory map for each shard and, of everything else, a few numbers for each image.

    labels         (N,) int64                       num_classes    0 when there are no classes
    class_names    tuple of str                     fingerprint    of the autoencoder (`Autoencoder.fingerprint()`)
    latent_shape   (L, h, w)                        has_flips      whether the mirrored images are in it
    text           `CachedText` or None             empty_tokens   (T, D) float32, or None
    identity       12 hex digits: the same latents in the same order have the same
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], choose: Choose | None = None) -> None:
        plan = manifest["plan"]
        self.folder = folder
        self.identity: str = manifest["identity"]
        self.fingerprint: dict[str, Any] = plan["autoencoder"]
        self.latent_shape: tuple[int, int, int] = tuple(plan["latent_shape"])
        self.has_flips: bool = plan["preprocessing"]["flips"]
        self.image_size: int = plan["preprocessing"]["image_size"]
        self.class_names: tuple[str, ...] = tuple(plan["class_names"])
        self.num_classes = len(self.class_names)
        self.dtype: str = plan["dtype"]
        self._touched = 0
        allow_open_files(len(manifest["shards"]))
        self._shards = [
            map_shard(
                self.folder / SHARDS / entry["name"] / LATENTS,
                entry["files"][LATENTS]["size"],
                entry["images"],
                plan,
            )
            for entry in manifest["shards"]
        ]
        counts = [entry["images"] for entry in manifest["shards"]]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.labels = torch.from_numpy(np.concatenate([shard.rows["labels"] for shard in self._shards]))
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < max(
            1, self.num_classes
        ):
            raise Damaged(
                f"{folder} holds labels from {int(self.labels.min())} to {int(self.labels.max())}, and has {self.num_classes} classes: "
                f"a shard was changed after it was written; `python -m ldm_dcn.encode --verify {folder}` finds it"
            )
        # where the images lie that there are, by their ids
        self._chosen = np.arange(manifest["images"]) if choose is None else choose(self.labels).numpy()
        self.labels = self.labels[self._chosen]
        self.text: CachedText | None = None
        self.empty_tokens: Tensor | None = None
        if plan["text"]:
            self._open_text(plan["text"], manifest["text"])

    @classmethod
    def open(cls, folder: str | os.PathLike[str], choose: Choose | None = None) -> LatentCache:
        """Open a finished cache; every file's size and header are checked, not its hash (`verify` does that).

        choose   labels (N,) int64 of all images -> which of them are wanted, (n,) int64: nothing else is seen of it

        Raises `UserError` naming the file and the mend where the cache is unfinished or damaged.
        """
        folder = Path(folder)
        return cls(folder, read_manifest(folder), choose)

    def __len__(self) -> int:
        return len(self._chosen)

    def read(self, ids: Tensor, flipped: Tensor | None = None) -> Tensor:
        """The moments of images `ids` (n,) int64, or of their mirror images where `flipped` (n,) bool: (n, 2L, h, w) float32."""
        ids = self._chosen[self._check(ids)]
        names = np.zeros(len(ids), dtype=np.int64)
        if flipped is not None and bool(flipped.any()):
            if not self.has_flips:
                raise ValueError(
                    f"{self.folder} holds no mirrored images; ask for none, or encode with --flip"
                )
            names = flipped.numpy().astype(np.int64)
        shards, rows = self._locate(ids)
        channels, height, width = self.latent_shape
        return self._gather(
            (2 * channels, height, width), shards, rows, [("moments", "moments_flipped")[i] for i in names]
        )

    def read_tokens(self, ids: Tensor, which: Tensor) -> Tensor:
        """The embeddings (n, T, D) float32 of caption `which` (n,) int64, below `text.captions[ids]`, of images `ids` (n,)."""
        if self.text is None:
            raise ValueError(f"{self.folder} holds no captions; encode with --text-encoder")
        which = which.numpy()
        ids = self._check(ids)
        if bool((which < 0).any()) or bool((which >= self.text.captions.numpy()[ids]).any()):
            raise IndexError(f"which reaches {int(which.max())}; it counts the captions of each image from 0")
        shards, _ = self._locate(self._chosen[ids])
        rows = self._token_starts[ids] + which
        return self._gather((self.text.length, self.text.width), shards, rows, ["tokens"] * len(ids))

    def _check(self, ids: Tensor) -> np.ndarray:
        ids = ids.numpy().astype(np.int64, copy=False)
        if len(ids) and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"ids reach from {ids.min()} to {ids.max()}; {self.folder} has {len(self)}")
        return ids

    def _locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shards = np.searchsorted(self._starts, ids, side="right") - 1
        return shards, ids - self._starts[shards]

    def _gather(
        self, shape: tuple[int, ...], shards: np.ndarray, rows: np.ndarray, names: Sequence[str]
    ) -> Tensor:
        """A few rows at a time are copied out of the maps and, still in the processor's cache, widened to float32."""
        elements = math.prod(shape)
        at_once = max(1, SERIAL // elements)
        stored = np.empty((at_once, *shape), dtype=STORED[_NAME_OF[self.dtype]])
        chunk = torch.from_numpy(stored).view(-1)
        chunk = chunk.view(torch.bfloat16) if self.dtype == "bfloat16" else chunk
        row_bytes = elements * stored.itemsize
        if self._touched + len(rows) * row_bytes > MAPPED_BYTES:
            for shard in self._shards:
                shard.let_go()
            self._touched = 0
        self._touched += len(rows) * row_bytes
        places = list(zip(names, shards.tolist(), rows.tolist(), strict=True))
        for i in np.lexsort((rows, shards)).tolist():  # all are asked for before the first is waited for
            name, shard, row = places[i]
            self._shards[shard].announce(name, row, row_bytes)
        out = torch.empty(len(rows), *shape)
        flat = out.view(-1)
        for first in range(0, len(rows), at_once):
            some = places[first : first + at_once]
            for i, (name, shard, row) in enumerate(some):
                stored[i] = self._shards[shard].rows[name][row]
            count = len(some) * elements
            for piece in range(0, count, SERIAL):
                end, begin = min(piece + SERIAL, count), first * elements
                flat[begin + piece : begin + end] = chunk[piece:end]
        return out

    def _open_text(self, text: Mapping[str, Any], files: Mapping[str, Any]) -> None:
        starts = [shard.rows["token_starts"] for shard in self._shards]
        self._token_starts = np.concatenate([start[:-1] for start in starts])[
            self._chosen
        ]  # within the shard
        self.text = CachedText(
            length=text["length"],
            width=text["width"],
            captions=torch.from_numpy(np.concatenate([np.diff(start) for start in starts])[self._chosen]),
            encoder=dict(text["encoder"]),
        )
        path = self.folder / TEXT / EMPTY
        expected = {"tokens": (_NAME_OF[self.dtype], (text["length"], text["width"]))}
        empty = torch.from_numpy(np.array(map_tensors(path, files[EMPTY]["size"], expected).rows["tokens"]))
        self.empty_tokens = (empty.view(torch.bfloat16) if self.dtype == "bfloat16" else empty).float()


def map_shard(path: Path, size: int, images: int, plan: Mapping[str, Any]) -> MappedTensors:
    """The tensors of a shard of `images` in the file `path` of `size` bytes. Raises `Damaged` where they are not `plan`'s."""
    stored = _NAME_OF[plan["dtype"]]
    channels, height, width = plan["latent_shape"]
    moments = (stored, (images, 2 * channels, height, width))
    expected: dict[str, tuple[str, tuple[int | None, ...]]] = {
        "moments": moments,
        "labels": ("I64", (images,)),
        "indices": ("I64", (images,)),
    }
    if plan["preprocessing"]["flips"]:
        expected["moments_flipped"] = moments
    if text := plan["text"]:
        expected["tokens"] = (stored, (None, text["length"], text["width"]))
        expected["token_starts"] = ("I64", (images + 1,))
    return map_tensors(path, size, expected)


def map_tensors(
    path: Path, size: int, expected: Mapping[str, tuple[str, tuple[int | None, ...]]]
) -> MappedTensors:
    """The file `path` of a cache in memory. Raises `Damaged`, with the mend, unless it has `size` bytes and is as expected."""
    check_size(path, size)
    try:
        return MappedTensors(path, expected)
    except Damaged as error:
        raise Damaged(f"{error}; delete {path.parent}, and {MEND}") from None


def verify(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Hash every file of a finished cache, and return its manifest. Raises `Damaged` naming the first wrong file and the mend."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    read_plan(folder)
    parts = [(folder / SHARDS / shard["name"], shard["files"]) for shard in manifest["shards"]]
    if manifest["text"]:
        parts.append((folder / TEXT, manifest["text"]))
    for part, files in parts:
        for name, entry in files.items():
            check_size(part / name, entry["size"])
        if files_of(part) != files:
            raise Damaged(
                f"{part / folders.MANIFEST} was changed after it was written; delete {part}, and {MEND}"
            )
        try:
            folders.verify(part)
        except Damaged as error:
            raise Damaged(f"{error}; delete {part}, and {MEND}") from None
    try:
        bad = (folder / BAD).read_bytes()
    except OSError:
        raise Damaged(f"{folder / BAD} is missing; {MEND}") from None
    if hashlib.sha256(bad).hexdigest() != manifest["bad_sha256"]:
        raise Damaged(
            f"{folder / BAD} was changed after it was written (its sha256 differs); delete it, and {MEND}"
        )
    LatentCache(folder, manifest)
    return manifest


def allow_open_files(count: int) -> None:
    """Each map holds a file open; the usual soft limit of 1,024 is the shell's, not the system's."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        if most < wanted:
            raise UserError(
                f"a cache of {count} shards keeps as many files open, and the limit is {hard}; raise it with `ulimit -n`, "
                "or encode with a larger --shard-size"
            )


def reading_speed(cache: LatentCache, batch_size: int = 256, seconds: float = 2.0, seed: int = 0) -> float:
    """Latents a second that `cache.read` gives for random ids, a mirrored half of them where there are any.

    The ids come from a window of at most 1 GB that is read once before, so that it is the system's page cache that is read.
    """
    channels, height, width = cache.latent_shape
    row = 2 * channels * height * width * DTYPES[cache.dtype].itemsize * (2 if cache.has_flips else 1)
    window = min(len(cache), max(batch_size, (1 << 30) // row))
    generator = torch.Generator().manual_seed(seed)

    def read(ids: Tensor) -> None:
        flipped = torch.rand(len(ids), generator=generator) < 0.5 if cache.has_flips else None
        cache.read(ids, flipped)

    for flip in (False, True)[: 1 + cache.has_flips]:
        for ids in torch.arange(window).split(batch_size):
            cache.read(ids, torch.full((len(ids),), flip))
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds or not count:
        read(torch.randint(window, (batch_size,), generator=generator))
        count += batch_size
    return count / elapsed
