"""Latents taken over from earlier caches, found again by the content of the pictures that they were made of.

Names, order, classes and captions may be others than they were: a data set that grows, shrinks, is sorted anew or packed into tar
files is another cache, but most of its latents are there already.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
    files_of,
    is_cache,
    making,
    meaning,
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
        names = ("content", "captions") if self.plan["text"] else ("content",)
        path, expected = self.folder / SOURCES, dict.fromkeys(names, ("U8", (self.images, HASH)))
        return map_tensors(path, self.files[SOURCES]["size"], expected).rows

    def rows(self) -> dict[str, np.ndarray]:
        """The latents, once every byte was checked: what is taken over is hashed anew, and damage would go unseen for ever."""
        if self.map is None:
            try:
                folders.verify(self.folder)
            except Damaged as error:
                raise Damaged(f"{error}; delete {self.folder}, and {MEND}") from None
            if files_of(self.folder) != self.files:  # what it was made of was looked up before
                raise UserError(
                    f"{self.folder} was encoded again while its latents were taken over; run the same command again"
                )
            self.map = map_shard(self.folder / LATENTS, self.files[LATENTS]["size"], self.images, self.plan)
        return self.map.rows


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

    def moments(self, place: Place, name: str) -> Tensor:
        """`name` ("moments" or "moments_flipped") of an image as stored, (2L, h, w)."""
        return self._tensor(self._shards[place.shard].rows()[name][place.row])

    def tokens(self, place: Place, captions: Sequence[str]) -> Tensor | None:
        """The embeddings (n, T, D) of the image's n captions; None unless they are there, of the same captions and encoder."""
        shard = self._shards[place.shard]
        if not shard.same_text:
            return None
        if shard.sources["captions"][place.row].tobytes() != hash_captions(captions):
            return None
        rows = shard.rows()
        first, last = rows["token_starts"][place.row : place.row + 2].tolist()
        return self._tensor(rows["tokens"][first:last])

    def let_go(self) -> None:
        """Give the memory back that the maps have filled so far."""
        for shard in self._shards:
            if shard.map is not None:
                shard.map.let_go()

    def _tensor(self, stored: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.array(stored))
        return tensor.view(torch.bfloat16) if self._plan["dtype"] == "bfloat16" else tensor


def hash_captions(captions: Sequence[str]) -> bytes:
    return hashlib.sha256(json.dumps(list(captions)).encode()).digest()


def source_tensors(contents: Sequence[bytes], captions: Sequence[bytes]) -> dict[str, Tensor]:
    """What a shard keeps of its n pictures: "content" (n, 32) uint8 and, with text, "captions"; nothing where some have no file."""
    if not all(contents):
        return {}
    tensors = {"content": _hash_rows(contents)}
    return tensors | {"captions": _hash_rows(captions)} if captions else tensors


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
    same_text = bool(plan["text"]) and digest(meaning({"text": earlier["text"]})) == digest(
        meaning({"text": plan["text"]})
    )
    shards = []
    for shard in shard_ranges(earlier["images"], earlier["shard_size"]):
        try:
            facts = read_shard(folder, shard)
        except Damaged:  # not written yet, or cut off: its images are encoded
            continue
        if facts["plan"] == digest(meaning(earlier)) and SOURCES in facts["files"] and facts["images"]:
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
