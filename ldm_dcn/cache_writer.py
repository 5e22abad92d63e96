"""The writing of a latent cache: shard by shard, by any number of processes, each part whole or not there.

`create` and `begin` make the folder ready, `write_shard` puts the shards into it, `finish` the manifest. What lies where, `cache.py` says.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from .cache_layout import (
    BAD,
    EMPTY,
    FORMAT,
    KIND,
    LATENTS,
    MANIFEST,
    OWN,
    PLAN,
    SHARD,
    SHARDS,
    SOURCES,
    TEXT,
    Range,
    begun_plan,
    differences,
    digest,
    files_of,
    making,
    meaning,
    read_plan,
    read_shard,
    shard_ranges,
    write_sealed,
)
from .errors import UserError
from .files import replace_file, write_json
from .folders import Damaged, DiskFull, committed_folder, recover

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
            entry.name for entry in out.iterdir() if entry.name not in OWN and not entry.name.startswith(".")
        )
        if others:
            raise UserError(f"{out} holds other things ({others[0]}, ...); name a new folder for the cache")
        if (out / PLAN).exists() or (out / MANIFEST).exists():
            _check_same(out, begun_plan(out), plan)
        (out / SHARDS).mkdir(exist_ok=True)
        if not (out / PLAN).exists():
            write_sealed(out / PLAN, dict(plan))


def begun_shard_size(out: Path) -> int | None:
    """The shard size of the cache that was begun in `out`, or None where there is none."""
    return read_plan(out)["shard_size"] if (out / PLAN).exists() else None


def _check_same(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    named = differences(meaning(old), meaning(new))
    if not named:
        return
    mend = f"name another folder, or delete {out} to encode anew"
    if making(old) == making(new):
        mend = f"name another folder, and give --reuse {out} to take over what is made of pictures that are the same"
    raise UserError(f"{out} was encoded otherwise ({named}); {mend}")


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
    sources: Mapping[str, Tensor] | None = None,
    reused: int = 0,
) -> None:
    """Put one shard into its place, atomically.

    `stamp` tells, as JSON, what the images were; `bad` lists {"index", "path", "reason"} of what is left out; `sources` are the
    tensors that earlier caches are searched by, `reused` is how many images came from such.
    """
    plan_hash = digest(meaning(plan))
    with _room(out), committed_folder(out / SHARDS / shard.name) as folder:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / LATENTS,
            metadata={KIND: plan_hash},  # safetensors writes several keys in random order
        )
        if sources:
            save_file(dict(sources), folder / SOURCES)
        facts = {
            "plan": plan_hash,
            "stamp": stamp,
            "images": len(tensors["labels"]),
            "bad": list(bad),
            "reused": reused,
        }
        write_json(folder / SHARD, facts)


def unseal(out: Path) -> None:
    """Take the manifest away before a shard of a finished cache is made anew."""
    (out / MANIFEST).unlink(missing_ok=True)


def finish(
    out: Path, plan: Mapping[str, Any], empty_tokens: Tensor | None, bad_allowed: int, max_bad: str
) -> dict[str, Any]:
    """Write text/, bad.jsonl and, last, the manifest, which is returned. All shards must be there.

    Raises `UserError` where more than `bad_allowed` images are broken, all are, or a shard is not whole.
    """
    shards, bad, images, reused = [], [], 0, 0
    for shard in shard_ranges(plan["images"], plan["shard_size"]):
        facts = read_shard(out, shard)
        shards.append({"name": shard.name, "images": facts["images"], "files": facts["files"]})
        bad += facts["bad"]
        images += facts["images"]
        reused += facts.get("reused", 0)  # shards of earlier versions do not say
    if len(bad) > bad_allowed:
        named = "; ".join(f"{entry['path']} ({entry['reason']})" for entry in bad[:3])
        more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(
            f"{len(bad)} of {plan['images']} images cannot be read: {named}{more}; repair them under the same names, "
            f"allow {len(bad)} with --max-bad {len(bad)} (now {max_bad}), or take them away and encode into another folder with "
            f"--reuse {out}; all others are encoded and kept"
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
            text = files_of(out / TEXT)
        replace_file(out / BAD, lines)
        content = {
            "kind": KIND,
            "format": FORMAT,
            "images": images,
            "reused": reused,
            "bad": len(bad),
            "bad_sha256": hashlib.sha256(lines.encode()).hexdigest(),
            "identity": _identity(plan, shards),
            "plan": dict(plan),
            "text": text,
            "shards": shards,
        }
        write_sealed(out / MANIFEST, content)
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
