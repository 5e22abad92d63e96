"""The layout of a latent cache: what lies where, what each part says of itself, and whether it is whole.

    OUT/plan.json                             what is encoded, by what, and how; written first
    OUT/shards/000000000-000004095/           the images of one range of the source
        latents.safetensors                   moments (n, 2L, h, w), moments_flipped, labels (n,), indices (n,) in the source,
                                              tokens (m, T, D), token_starts (n + 1,)
        sources.safetensors                   sha256 for each image, (n, 32) uint8: content, of the picture; latents, of its moments and
                                              its mirror image's; captions and tokens
        shard.json                            the broken images of the range, and what the shard was made of
        manifest.json                         size and sha256 of them (`folders.committed_folder`)
    OUT/text/empty.safetensors                tokens (T, D) of the empty prompt
    OUT/bad.jsonl                             every broken image: index, path, reason
    OUT/manifest.json                         counts, hashes and the plan; written last: with it the cache is complete

Each of these appears whole or not at all. Shards of sources without files, and those of earlier versions, have no
sources.safetensors: `reuse.py` alone reads it. n counts the images that could be read; ids are their numbers over all shards, dense and
in the source's order. Everything is safetensors or JSON, so that reading never executes anything.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import folders
from .config import flat
from .errors import UserError, one_line
from .files import replace_file
from .folders import Damaged
from .weights import DTYPES

FORMAT = 1
KIND = "ldm_dcn latent cache"
PLAN = "plan.json"
MANIFEST = "manifest.json"
BAD = "bad.jsonl"
SHARDS = "shards"
TEXT = "text"
LATENTS = "latents.safetensors"
EMPTY = "empty.safetensors"
SOURCES = "sources.safetensors"
SHARD = "shard.json"
OWN = (PLAN, MANIFEST, BAD, SHARDS, TEXT)

SHARD_BYTES = 128 << 20  # a shard is lost by a kill in it, and one map is kept open for each when reading
_WITHOUT_MEANING = ("spec", "source")  # of a plan: where things lie, not what they are
MEND = "run the same `python -m ldm_dcn.encode` command again: it makes anew what is missing, and only that"


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


def moments_of(plan: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of an image's moments in a shard."""
    return ("moments", "moments_flipped") if plan["preprocessing"]["flips"] else ("moments",)


def making(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Of a plan, what makes an image's latents what they are: not which images there are, nor whether mirrored ones are kept."""
    pixels = {key: value for key, value in plan["preprocessing"].items() if key != "flips"}
    return meaning(
        {key: plan[key] for key in ("format", "autoencoder", "latent_shape", "dtype")}
        | {"preprocessing": pixels}
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two meanings, for an error; empty where nothing does."""
    before, after = flat(old), flat(new)
    different = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    named = "; ".join(
        f"{key}: {_short(before.get(key))} -> {_short(after.get(key))}" for key in different[:4]
    )
    return named + (f"; and {len(different) - 4} more" if len(different) > 4 else "")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:14]}..."


def is_cache(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a latent cache, be it unfinished or damaged."""
    folder = Path(path)
    return (folder / SHARDS).is_dir() and ((folder / PLAN).is_file() or (folder / MANIFEST).is_file())


def read_plan(out: Path) -> dict[str, Any]:
    return read_sealed(out / PLAN, f"delete it, and {MEND}")


def begun_plan(out: Path) -> dict[str, Any]:
    """The plan of a cache, finished or not: plan.json's or, where a copy lacks that, the manifest's."""
    if (out / PLAN).exists() or not (out / MANIFEST).exists():
        return read_plan(out)
    return read_sealed(out / MANIFEST, f"delete it, and {MEND}")["plan"]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished cache. Raises `UserError` where there is none, or it is not what was written."""
    if not (folder / MANIFEST).exists():
        if not is_cache(folder):
            raise UserError(
                f"{folder} is no latent cache; make one with `python -m ldm_dcn.encode IMAGES {'OUT' if folder.exists() else folder}`"
            )
        plan = read_plan(folder)
        ranges = shard_ranges(plan["images"], plan["shard_size"])
        done = sum((folder / SHARDS / shard.name).is_dir() for shard in ranges)
        raise UserError(
            f"the latent cache {folder} is unfinished ({done} of {len(ranges)} shards); run the same "
            "`python -m ldm_dcn.encode` command again"
        )
    manifest = read_sealed(folder / MANIFEST, f"delete it, and {MEND}")
    if manifest.get("kind") != KIND or manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder / MANIFEST} is of {manifest.get('kind')}, format {manifest.get('format')}, not {KIND}, format "
            f"{FORMAT}; encode anew with this version"
        )
    return manifest


def read_shard(out: Path, shard: Range) -> dict[str, Any]:
    """What shard.json says, with the "files" of the shard's manifest. Raises `Damaged` where the shard is not whole."""
    folder = out / SHARDS / shard.name
    files = files_of(folder)
    try:
        facts = json.loads((folder / SHARD).read_text(encoding="utf-8"))
        if facts["images"] + len(facts["bad"]) != len(shard):
            raise ValueError(
                f"{facts['images']} images and {len(facts['bad'])} broken ones are not {len(shard)}"
            )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Damaged(f"{folder / SHARD} cannot be read: {error}; delete {folder}, and {MEND}") from None
    return {**facts, "files": files}


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """{name: {"size", "sha256"}} of a committed folder, whose sizes are checked."""
    try:
        manifest = json.loads((folder / folders.MANIFEST).read_text(encoding="utf-8"))
        files = {
            str(name): {"size": int(entry["size"]), "sha256": str(entry["sha256"])}
            for name, entry in manifest["files"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(
            f"{folder / folders.MANIFEST} cannot be read: {error}; delete {folder}, and {MEND}"
        ) from None
    for name, entry in files.items():
        check_size(folder / name, entry["size"])
    return files


def check_size(path: Path, size: int) -> None:
    try:
        there = path.stat().st_size
    except OSError:
        raise Damaged(f"{path} is missing; delete {path.parent}, and {MEND}") from None
    if there != size:
        raise Damaged(f"{path} has {there} bytes instead of {size}; delete {path.parent}, and {MEND}")


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """JSON that bears its own hash."""
    replace_file(path, json.dumps({**content, "sha256": digest(content)}, indent=1) + "\n")


def read_sealed(path: Path, mend: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        seal = content.pop("sha256")
    except FileNotFoundError:
        raise Damaged(f"{path} is missing; {MEND}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path} cannot be read ({one_line(error)}); {mend}") from None
    if seal != digest(content):
        raise Damaged(f"{path} was changed after it was written (its sha256 differs); {mend}")
    return content
