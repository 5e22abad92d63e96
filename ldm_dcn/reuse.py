"""Latents taken over from earlier caches, found again by the content of the pictures that they were made of.

Names, order, classes and captions may be others than they were: a data set that grows, shrinks, is sorted anew or packed into tar
files is another cache, but most of its latents are there already.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import folders
from .cache import allow_open_files, map_shard, map_tensors
from .cache_layout import (
    LATENTS,
    MEND,
    SHARDS,
    SOURCES,
    begun_plan,
    differences,
    digest,
    is_cache,
    making,
    meaning,
    moments_of,
    read_shard,
    shard_ranges,
)
from .errors import UserError
from .folders import Damaged
from .mapped import MappedTensors

HASH = 32  # bytes of a sha256


@dataclass(frozen=True)
class Place:
    """Where the latents of an image lie: row `row` of shard `shard`, counted over all earlier caches."""

    shard: int
    row: int


@dataclass
class _Shard:
    folder: Path
    images: int
    files: Mapping[str, Any]
    plan: Mapping[str, Any]
    same_text: bool  # whether its captions were encoded by the same text encoder
    map: MappedTensors | None = None

    @cached_property
    def sources(self) -> dict[str, np.ndarray]:
        """Hashes of the pictures and of their latents, as they were when this was first asked for."""
        try:
            folders.verify(self.folder, but=LATENTS)  # that one is checked image by image
        except Damaged as error:
            raise Damaged(f"{error}; delete {self.folder}, and {MEND}") from None
        names = ("content", "latents", *(("captions", "tokens") if self.plan["text"] else ()))
        path, expected = self.folder / SOURCES, dict.fromkeys(names, ("U8", (self.images, HASH)))
        return map_tensors(path, self.files[SOURCES]["size"], expected).rows

    def latents(self, row: int) -> dict[str, np.ndarray]:
        """Moments of an image, and of its mirror image where there are such."""
        rows = self._rows()
        found = {name: np.array(rows[name][row]) for name in moments_of(self.plan)}
        self._check("latents", row, found.values())
        return found

    def tokens(self, row: int) -> np.ndarray:
        rows = self._rows()
        first, last = rows["token_starts"][row : row + 2].tolist()
        found = np.array(rows["tokens"][first:last])
        self._check("tokens", row, [found])
        return found

    def _rows(self) -> dict[str, np.ndarray]:
        if self.map is None:
            self.map = map_shard(self.folder / LATENTS, self.files[LATENTS]["size"], self.images, self.plan)
        return self.map.rows

    def _check(self, what: str, row: int, found: Iterable[np.ndarray]) -> None:
        """What is taken over is written with new hashes: damage would go unseen for ever."""
        if self.sources[what][row].tobytes() != _hash(array.tobytes() for array in found):
            raise Damaged(
                f"{self.folder / LATENTS} does not hold what its hashes say: it was encoded again meanwhile, or is damaged; run the same "
                f"command again, after {self.folder} was deleted in the second case"
            )


class EarlierCaches:
    """What `folders`, finished caches or not, have of the latents that `plan` asks for; of one image in several, the first.

    Raises `UserError` naming the folder for one that is no cache, was made otherwise, or does not know what it was made of.
    """

    def __init__(self, folders: Sequence[str | Path], plan: Mapping[str, Any]) -> None:
        self._plan = plan
        self._shards: list[_Shard] = []
        for folder in map(Path, folders):
            found = _shards_of(folder, plan)
            if not found:
                raise UserError(
                    f"--reuse {folder}: it does not say which pictures its latents were made of (it was encoded before caches "
                    "did, from a source without files, or has no shard yet); leave it out"
                )
            self._shards += found
        allow_open_files(2 * len(self._shards))
        contents = [shard.sources["content"] for shard in self._shards]
        self._starts = np.cumsum([0, *(len(part) for part in contents)])
        self._contents = np.concatenate(contents)
        keys = _keys(self._contents)
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def find(self, content: bytes) -> Place | None:
        """Where the latents of the picture with this sha256 lie, or None."""
        if len(content) != HASH:
            return None
        wanted = np.frombuffer(content, np.uint8)
        key = _keys(wanted[None])[0]
        first = int(np.searchsorted(self._keys, key))
        for number in self._order[first : int(np.searchsorted(self._keys, key, side="right"))].tolist():
            if bool((self._contents[number] == wanted).all()):
                shard = int(np.searchsorted(self._starts, number, side="right")) - 1
                return Place(shard, number - int(self._starts[shard]))
        return None

    def moments(self, place: Place) -> dict[str, Tensor]:
        """Those of an image that the plan asks for (`moments_of`), each as stored, (2L, h, w)."""
        found = self._shards[place.shard].latents(place.row)
        return {name: self._tensor(found[name]) for name in moments_of(self._plan)}

    def tokens(self, place: Place, captions: Sequence[str]) -> Tensor | None:
        """The embeddings (n, T, D) of the image's n captions; None unless they are there, of the same captions and encoder."""
        shard = self._shards[place.shard]
        if not shard.same_text:
            return None
        if shard.sources["captions"][place.row].tobytes() != hash_captions(captions):
            return None
        return self._tensor(shard.tokens(place.row))

    def let_go(self) -> None:
        """Give the memory back that the maps have filled so far."""
        for shard in self._shards:
            if shard.map is not None:
                shard.map.let_go()

    def _tensor(self, stored: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(stored)
        return tensor.view(torch.bfloat16) if self._plan["dtype"] == "bfloat16" else tensor


def hash_captions(captions: Sequence[str]) -> bytes:
    return _hash([json.dumps(list(captions)).encode()])


def source_tensors(
    plan: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    contents: Sequence[bytes],
    captions: Sequence[Sequence[str]],
) -> dict[str, Tensor]:
    """What a shard of `tensors` keeps of its n pictures, each (n, 32) uint8; nothing where some have no file.

    contents, captions   sha256 of each picture's file, and its captions
    """
    if not all(contents):
        return {}
    kinds = [tensors[name] for name in moments_of(plan)]
    latents = [_hash(_bytes(kind[row]) for kind in kinds) for row in range(len(contents))]
    hashes = {"content": contents, "latents": latents}
    if plan["text"]:
        starts = tensors["token_starts"].tolist()
        hashes["captions"] = [*map(hash_captions, captions)]
        hashes["tokens"] = [
            _hash([_bytes(tensors["tokens"][first:last])]) for first, last in pairwise(starts)
        ]
    return {name: _hash_rows(rows) for name, rows in hashes.items()}


def _hash(parts: Iterable[bytes]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _hash_rows(hashes: Sequence[bytes]) -> Tensor:
    return torch.tensor(list(b"".join(hashes)), dtype=torch.uint8).reshape(len(hashes), HASH)


def _keys(contents: np.ndarray) -> np.ndarray:
    """The first 8 bytes of each hash as a number, to search for."""
    return np.ascontiguousarray(contents[:, :8]).view(">u8")[:, 0].astype(np.uint64)


def _shards_of(folder: Path, plan: Mapping[str, Any]) -> list[_Shard]:
    if not is_cache(folder):
        raise UserError(f"--reuse {folder}: it is no latent cache; name the OUT of an earlier encoding")
    earlier = begun_plan(folder)
    _check_made_alike(folder, earlier, plan)
    same_text = bool(plan["text"]) and meaning(earlier)["text"] == meaning(plan)["text"]
    own, shards = digest(meaning(earlier)), []
    for shard in shard_ranges(earlier["images"], earlier["shard_size"]):
        try:
            facts = read_shard(folder, shard)
        except Damaged:  # not written yet, or cut off: its images are encoded
            continue
        if facts["plan"] == own and SOURCES in facts["files"] and facts["images"]:
            place = folder / SHARDS / shard.name
            shards.append(_Shard(place, facts["images"], facts["files"], earlier, same_text))
    return shards


def _check_made_alike(folder: Path, earlier: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    if named := differences(making(earlier), making(plan)):
        raise UserError(
            f"--reuse {folder}: its latents were made otherwise than is asked for ({named}); give the settings that it was made "
            "with, or leave it out"
        )
    if plan["preprocessing"]["flips"] and not earlier["preprocessing"]["flips"]:
        raise UserError(
            f"--reuse {folder}: it holds no mirrored images; encode with --no-flip, or leave it out"
        )
