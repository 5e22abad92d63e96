"""The latent cache: moments, labels and captions' embeddings of a data set, on disk, in shards, read through memory maps.

    OUT/plan.json                             what is encoded, by what, and how; written first
    OUT/shards/000000000-000004095/           the images of one range of the source
        latents.safetensors                   moments (n, 2L, h, w), moments_flipped, labels (n,), indices (n,) in the source,
                                              tokens (m, T, D), token_starts (n + 1,)
        shard.json                            the broken images of the range, and what the shard was made of
        manifest.json                         size and sha256 of both (`checkpoint.committed_folder`)
    OUT/text/empty.safetensors                tokens (T, D) of the empty prompt
    OUT/bad.jsonl                             every broken image: index, path, reason
    OUT/manifest.json                         counts, hashes and the plan; written last: with it the cache is complete

Each of these appears whole or not at all. n counts the images that could be read; ids are their numbers over all shards, dense and
in the source's order. Everything is safetensors or JSON, so that reading never executes anything.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from . import checkpoint
from .checkpoint import Damaged, DiskFull, committed_folder, recover, replace_file, write_json
from .errors import UserError

FORMAT = 1
KIND = "ldm_dcn latent cache"
PLAN = "plan.json"
MANIFEST = "manifest.json"
BAD = "bad.jsonl"
SHARDS = "shards"
TEXT = "text"
LATENTS = "latents.safetensors"
EMPTY = "empty.safetensors"
SHARD = "shard.json"

_OWN = (PLAN, MANIFEST, BAD, SHARDS, TEXT)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SHARD_BYTES = 128 << 20  # a shard is lost by a kill in it, and one map is kept open for each when reading
MAPPED_BYTES = (
    64 << 20
)  # what a reader copies before it unmaps; the system maps up to some 8 times as much around it
# Elements that torch converts without its thread pool (at::internal::GRAIN_SIZE less one): waiting for threads on busy cores can
# take ten times as long as the conversion.
SERIAL = 32767
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WITHOUT_MEANING = ("spec", "source")  # of a plan: where things lie, not what they are
# safetensors' names; numpy has no bfloat16, its bits travel as int16
_STORED = {"F16": np.float16, "F32": np.float32, "BF16": np.int16, "I64": np.int64}
_NAME_OF = {"float16": "F16", "float32": "F32", "bfloat16": "BF16"}
_MEND = "run the same `python -m ldm_dcn.encode` command again: it makes anew what is missing, and only that"


# --------------------------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class Range:
    """Images `first` to `last` of the source, both included: one shard."""

    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.first:09d}-{self.last:09d}"

    def __len__(self) -> int:
        return self.last + 1 - self.first


def shard_ranges(images: int, shard_size: int) -> list[Range]:
    """How `images` are cut: a function of the two numbers, whoever encodes."""
    return [Range(first, min(first + shard_size, images) - 1) for first in range(0, images, shard_size)]


def bytes_per_image(plan: Mapping[str, Any], captions: float = 1) -> int:
    channels, height, width = plan["latent_shape"]
    size = DTYPES[plan["dtype"]].itemsize
    text = plan["text"]
    tokens = int(captions * text["length"] * text["width"]) if text else 0
    return size * ((2 if plan["preprocessing"]["flips"] else 1) * 2 * channels * height * width + tokens) + 24


def digest(value: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def meaning(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan without the places where its parts happen to lie."""
    return {
        key: meaning(value) if isinstance(value, Mapping) else value
        for key, value in plan.items()
        if key not in _WITHOUT_MEANING
    }


def is_cache(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a latent cache, be it unfinished or damaged."""
    folder = Path(path)
    return (folder / SHARDS).is_dir() and ((folder / PLAN).is_file() or (folder / MANIFEST).is_file())


# --------------------------------------------------------------------------------------------------- writing


def create(out: Path) -> None:
    """Make the folder, where it is not there. Raises `UserError` where it cannot be."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder for the cache")
    with _room(out):
        out.mkdir(parents=True, exist_ok=True)


def begin(out: Path, plan: Mapping[str, Any]) -> None:
    """Make the folder `out` ready for the shards of `plan`: an empty one, or one that was begun by the same plan.

    Raises `UserError` for a folder of other things, and naming what differs for one of another plan.
    """
    with _room(out):
        others = sorted(
            entry.name for entry in out.iterdir() if entry.name not in _OWN and not entry.name.startswith(".")
        )
        if others:
            raise UserError(f"{out} holds other things ({others[0]}, ...); name a new folder for the cache")
        if (out / PLAN).exists():
            _check_same(out, read_plan(out), plan)
        elif (out / MANIFEST).exists():
            _check_same(out, _read_sealed(out / MANIFEST, f"delete it, and {_MEND}")["plan"], plan)
        (out / SHARDS).mkdir(exist_ok=True)
        if not (out / PLAN).exists():
            _write_sealed(out / PLAN, dict(plan))


def read_plan(out: Path) -> dict[str, Any]:
    return _read_sealed(out / PLAN, f"delete it, and {_MEND}")


def begun_shard_size(out: Path) -> int | None:
    """The shard size of the cache that was begun in `out`, or None where there is none."""
    return read_plan(out)["shard_size"] if (out / PLAN).exists() else None


def _check_same(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    before, after = _flat(meaning(old)), _flat(meaning(new))
    different = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    if different:
        named = "; ".join(
            f"{key}: {_short(before.get(key))} -> {_short(after.get(key))}" for key in different[:4]
        )
        more = f"; and {len(different) - 4} more" if len(different) > 4 else ""
        raise UserError(
            f"{out} was encoded otherwise ({named}{more}); name another folder, or delete {out} to encode anew"
        )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            result.update(_flat(entry, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = entry
    return result


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:14]}..."


def clear_up(out: Path, shard: Range) -> None:
    """Remove what a kill left of the writing of `shard`. Only for the process that owns it."""
    recover(out / SHARDS / shard.name)


def is_written(
    out: Path, shard: Range, plan: Mapping[str, Any], is_current: Callable[[Any], bool] = lambda _: True
) -> bool:
    """Whether `shard` is there, whole by its sizes, of this plan, and of images whose stamp `is_current`."""
    try:
        facts = read_shard(out, shard)
    except Damaged:
        return False
    return facts["plan"] == digest(meaning(plan)) and is_current(facts["stamp"])


def write_shard(
    out: Path,
    shard: Range,
    plan: Mapping[str, Any],
    stamp: Any,
    tensors: Mapping[str, Tensor],
    bad: Sequence[Mapping[str, Any]],
) -> None:
    """Put one shard into its place, atomically.

    `stamp` tells, as JSON, what the images were; `bad` lists {"index", "path", "reason"} of what is left out.
    """
    plan_hash = digest(meaning(plan))
    with _room(out), committed_folder(out / SHARDS / shard.name) as folder:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / LATENTS,
            metadata={KIND: plan_hash},  # safetensors writes several keys in random order
        )
        facts = {"plan": plan_hash, "stamp": stamp, "images": len(tensors["labels"]), "bad": list(bad)}
        write_json(folder / SHARD, facts)


def read_shard(out: Path, shard: Range) -> dict[str, Any]:
    """What shard.json says, with the "files" of the shard's manifest. Raises `Damaged` where the shard is not whole."""
    folder = out / SHARDS / shard.name
    files = _files_of(folder)
    try:
        facts = json.loads((folder / SHARD).read_text(encoding="utf-8"))
        if facts["images"] + len(facts["bad"]) != len(shard):
            raise ValueError(
                f"{facts['images']} images and {len(facts['bad'])} broken ones are not {len(shard)}"
            )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Damaged(f"{folder / SHARD} cannot be read: {error}; delete {folder}, and {_MEND}") from None
    return {**facts, "files": files}


def _files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """{name: {"size", "sha256"}} of a committed folder, whose sizes are checked."""
    try:
        manifest = json.loads((folder / checkpoint.MANIFEST).read_text(encoding="utf-8"))
        files = {
            str(name): {"size": int(entry["size"]), "sha256": str(entry["sha256"])}
            for name, entry in manifest["files"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(
            f"{folder / checkpoint.MANIFEST} cannot be read: {error}; delete {folder}, and {_MEND}"
        ) from None
    for name, entry in files.items():
        _check_size(folder / name, entry["size"])
    return files


def _check_size(path: Path, size: int) -> None:
    try:
        there = path.stat().st_size
    except OSError:
        raise Damaged(f"{path} is missing; delete {path.parent}, and {_MEND}") from None
    if there != size:
        raise Damaged(f"{path} has {there} bytes instead of {size}; delete {path.parent}, and {_MEND}")


def unseal(out: Path) -> None:
    """Take the manifest away before a shard of a finished cache is made anew."""
    (out / MANIFEST).unlink(missing_ok=True)


def finish(
    out: Path, plan: Mapping[str, Any], empty_tokens: Tensor | None, bad_allowed: int, max_bad: str
) -> dict[str, Any]:
    """Write text/, bad.jsonl and, last, the manifest, which is returned. All shards must be there.

    Raises `UserError` where more than `bad_allowed` images are broken, all are, or a shard is not whole.
    """
    shards, bad, images = [], [], 0
    for shard in shard_ranges(plan["images"], plan["shard_size"]):
        facts = read_shard(out, shard)
        shards.append({"name": shard.name, "images": facts["images"], "files": facts["files"]})
        bad += facts["bad"]
        images += facts["images"]
    if len(bad) > bad_allowed:
        named = "; ".join(f"{entry['path']} ({entry['reason']})" for entry in bad[:3])
        more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(
            f"{len(bad)} of {plan['images']} images cannot be read: {named}{more}; repair them under the same names, "
            f"or allow {len(bad)} with --max-bad {len(bad)} (now {max_bad}); all others are encoded and kept"
        )
    if not images:
        raise UserError("none of the images can be read; give others")
    assert images + len(bad) == plan["images"]
    lines = "".join(json.dumps(entry) + "\n" for entry in bad)
    with _room(out):
        text = None
        if empty_tokens is not None:
            recover(out / TEXT)
            if not (out / TEXT).exists():
                with committed_folder(out / TEXT) as folder:
                    save_file({"tokens": empty_tokens.contiguous()}, folder / EMPTY)
            text = _files_of(out / TEXT)
        replace_file(out / BAD, lines)
        content = {
            "kind": KIND,
            "format": FORMAT,
            "images": images,
            "bad": len(bad),
            "bad_sha256": hashlib.sha256(lines.encode()).hexdigest(),
            "identity": _identity(plan, shards),
            "plan": dict(plan),
            "text": text,
            "shards": shards,
        }
        _write_sealed(out / MANIFEST, content)
    return content


def _identity(plan: Mapping[str, Any], shards: Sequence[Mapping[str, Any]]) -> str:
    """12 hex digits that name the latents, their order and what made them; not where they lie."""
    return digest([meaning(plan), [shard["files"][LATENTS]["sha256"] for shard in shards]])[:12]


def check_room(out: Path, needed: int) -> None:
    """Raise `DiskFull` before hours of encoding whose result would not fit."""
    free = shutil.disk_usage(out).free
    if needed > free:
        raise DiskFull(
            f"no room for the cache {out}: it takes {needed / 1e9:.2f} GB more and {free / 1e9:.2f} GB are free; "
            "free some space, name a folder on another disk, or halve it with --no-flip"
        )


@contextmanager
def _room(out: Path) -> Iterator[None]:
    """Name a full disk, and say that nothing is lost."""
    try:
        yield
    except DiskFull as error:
        reason = error.__cause__ or error
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise UserError(
                f"{out} cannot be written ({error}); mend that, or name another folder"
            ) from error
        reason = error
    else:
        return
    raise DiskFull(
        f"no room to write in {out} ({' '.join(str(reason).split())}); the shards written before are kept; free some "
        "space and run the same command again"
    ) from reason


def _write_sealed(path: Path, content: dict[str, Any]) -> None:
    """JSON that bears its own hash."""
    replace_file(path, json.dumps({**content, "sha256": digest(content)}, indent=1) + "\n")


def _read_sealed(path: Path, mend: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        seal = content.pop("sha256")
    except FileNotFoundError:
        raise Damaged(f"{path} is missing; {_MEND}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path} cannot be read ({' '.join(str(error).split())}); {mend}") from None
    if seal != digest(content):
        raise Damaged(f"{path} was changed after it was written (its sha256 differs); {mend}")
    return content


# --------------------------------------------------------------------------------------------------- reading


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

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        plan = manifest["plan"]
        self.folder = folder
        self.identity: str = manifest["identity"]
        self.fingerprint: dict[str, Any] = plan["autoencoder"]
        self.latent_shape: tuple[int, int, int] = tuple(plan["latent_shape"])
        self.has_flips: bool = plan["preprocessing"]["flips"]
        self.image_size: int = plan["preprocessing"]["image_size"]
        self.class_names: tuple[str, ...] = tuple(plan["class_names"])
        self.num_classes = len(self.class_names)
        self.num_images: int = manifest["images"]
        self.bad: int = manifest["bad"]
        self.dtype: str = plan["dtype"]
        self._manifest = manifest
        self._touched = 0
        _allow_open_files(len(manifest["shards"]))
        self._shards = [self._open_shard(entry) for entry in manifest["shards"]]
        counts = [entry["images"] for entry in manifest["shards"]]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        labels = np.concatenate([shard.rows["labels"] for shard in self._shards])
        self.labels = torch.from_numpy(labels)
        self.text: CachedText | None = None
        self.empty_tokens: Tensor | None = None
        if plan["text"]:
            self._open_text(plan["text"], manifest["text"])

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> LatentCache:
        """Open a finished cache; every file's size and header are checked, not its hash (`verify` does that).

        Raises `UserError` naming the file and the mend where the cache is unfinished or damaged.
        """
        folder = Path(folder)
        return cls(folder, read_manifest(folder))

    def __len__(self) -> int:
        return self.num_images

    def read(self, ids: Tensor, flipped: Tensor | None = None) -> Tensor:
        """The moments of images `ids` (n,) int64, or of their mirror images where `flipped` (n,) bool: (n, 2L, h, w) float32."""
        ids = self._check(ids)
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
        shards, _ = self._locate(ids)
        rows = self._token_starts[ids] + which
        return self._gather((self.text.length, self.text.width), shards, rows, ["tokens"] * len(ids))

    def source_indices(self) -> Tensor:
        """Which image of the source each id is, (N,) int64: broken images leave gaps there, not here."""
        return torch.from_numpy(np.concatenate([shard.rows["indices"] for shard in self._shards]))

    def verify(self) -> None:
        """Hash every file. Raises `Damaged` naming the first that is not what was written, and the mend."""
        verify(self.folder)

    # ---------------------------------------------------------------------- gathering

    def _check(self, ids: Tensor) -> np.ndarray:
        ids = ids.numpy().astype(np.int64, copy=False)
        if len(ids) and (ids.min() < 0 or ids.max() >= self.num_images):
            raise IndexError(
                f"ids reach from {ids.min()} to {ids.max()}; {self.folder} has {self.num_images}"
            )
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
        stored = np.empty((at_once, *shape), dtype=_STORED[_NAME_OF[self.dtype]])
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

    # ---------------------------------------------------------------------- opening

    def _open_shard(self, entry: dict[str, Any]) -> _Map:
        path = self.folder / SHARDS / entry["name"] / LATENTS
        n, stored = entry["images"], _NAME_OF[self.dtype]
        channels, height, width = self.latent_shape
        moments = (stored, (n, 2 * channels, height, width))
        expected: dict[str, tuple[str, tuple[int | None, ...]]] = {
            "moments": moments,
            "labels": ("I64", (n,)),
            "indices": ("I64", (n,)),
        }
        if self.has_flips:
            expected["moments_flipped"] = moments
        if text := self._manifest["plan"]["text"]:
            expected["tokens"] = (stored, (None, text["length"], text["width"]))
            expected["token_starts"] = ("I64", (n + 1,))
        return _Map(path, entry["files"][LATENTS]["size"], expected)

    def _open_text(self, text: Mapping[str, Any], files: Mapping[str, Any]) -> None:
        starts = [shard.rows["token_starts"] for shard in self._shards]
        self._token_starts = np.concatenate([start[:-1] for start in starts])  # within the shard
        self.text = CachedText(
            length=text["length"],
            width=text["width"],
            captions=torch.from_numpy(np.concatenate([np.diff(start) for start in starts])),
            encoder=dict(text["encoder"]),
        )
        path = self.folder / TEXT / EMPTY
        expected = {"tokens": (_NAME_OF[self.dtype], (text["length"], text["width"]))}
        empty = torch.from_numpy(np.array(_Map(path, files[EMPTY]["size"], expected).rows["tokens"]))
        self.empty_tokens = (empty.view(torch.bfloat16) if self.dtype == "bfloat16" else empty).float()


class _Map:
    """The tensors of one safetensors file as arrays that lie in a memory map. Raises `Damaged` unless the header is as expected;
    a dimension of None may be any."""

    def __init__(
        self, path: Path, size: int, expected: Mapping[str, tuple[str, tuple[int | None, ...]]]
    ) -> None:
        _check_size(path, size)
        self.rows: dict[str, np.ndarray] = {}
        self._offsets: dict[str, int] = {}
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > size - 8:
                    raise ValueError(f"a header of {length} bytes")
                header = json.loads(file.read(length))
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            for name, (stored, shape) in expected.items():
                entry = header[name]
                there = tuple(int(n) for n in entry["shape"])
                begin, end = (int(n) for n in entry["data_offsets"])
                dtype = np.dtype(_STORED[stored])
                if (
                    entry["dtype"] != stored
                    or len(there) != len(shape)
                    or any(wanted not in (None, n) for n, wanted in zip(there, shape, strict=True))
                    or not 0 <= begin <= end <= size - 8 - length
                    or end - begin != int(np.prod(there, dtype=np.int64)) * dtype.itemsize
                ):
                    raise ValueError(f"{name} is {entry['dtype']} {there} at {begin}:{end}")
                self._offsets[name] = 8 + length + begin
                flat = np.frombuffer(self._map, dtype, (end - begin) // dtype.itemsize, 8 + length + begin)
                self.rows[name] = flat.reshape(there)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(
                f"{path} has a damaged header ({type(error).__name__}: {' '.join(str(error).split())}); "
                f"delete {path.parent}, and {_MEND}"
            ) from None
        if hasattr(mmap, "MADV_RANDOM"):  # or the system reads 128 KB around every row that is not in memory
            self._map.madvise(mmap.MADV_RANDOM)

    def announce(self, name: str, row: int, row_bytes: int) -> None:
        """Have the system start reading a row, without waiting for it."""
        if hasattr(mmap, "MADV_WILLNEED"):
            begin = self._offsets[name] + row * row_bytes
            start = begin - begin % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, start, begin + row_bytes - start)

    def let_go(self) -> None:
        """Unmap the pages read so far: they stay in the system's cache, and no longer count as this process's."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished cache. Raises `UserError` where there is none, or it is not what was written."""
    if not (folder / MANIFEST).exists():
        if not is_cache(folder):
            raise UserError(
                f"{folder} is no latent cache; make one with `python -m ldm_dcn.encode IMAGES {folder}`"
            )
        plan = read_plan(folder)
        ranges = shard_ranges(plan["images"], plan["shard_size"])
        done = sum((folder / SHARDS / shard.name).is_dir() for shard in ranges)
        raise UserError(
            f"the latent cache {folder} is unfinished ({done} of {len(ranges)} shards); run the same "
            "`python -m ldm_dcn.encode` command again"
        )
    manifest = _read_sealed(folder / MANIFEST, f"delete it, and {_MEND}")
    if manifest.get("kind") != KIND or manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder / MANIFEST} is of {manifest.get('kind')}, format {manifest.get('format')}, not {KIND}, format "
            f"{FORMAT}; encode anew with this version"
        )
    return manifest


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
            _check_size(part / name, entry["size"])
        if _files_of(part) != files:
            raise Damaged(
                f"{part / checkpoint.MANIFEST} was changed after it was written; delete {part}, and {_MEND}"
            )
        try:
            checkpoint.verify(part)
        except Damaged as error:
            raise Damaged(f"{error}; delete {part}, and {_MEND}") from None
    try:
        bad = (folder / BAD).read_bytes()
    except OSError:
        raise Damaged(f"{folder / BAD} is missing; {_MEND}") from None
    if hashlib.sha256(bad).hexdigest() != manifest["bad_sha256"]:
        raise Damaged(
            f"{folder / BAD} was changed after it was written (its sha256 differs); delete it, and {_MEND}"
        )
    LatentCache(folder, manifest)
    return manifest


def _allow_open_files(count: int) -> None:
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
