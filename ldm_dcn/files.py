"""Files that are whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_ident
from typing import IO, Any

# Seconds that what another machine has written may not be seen: NFS shows an old listing of a folder for up to 60 (acdirmax).
UNSEEN = 75.0


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that names no file, as those of writing and flushing do not, names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that takes the place of `path` when the block ends well; else nothing has changed.

    Folders on the way are made. A link stays one, and what it points to is replaced.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # of its own length: `path.name` may be as long as names may be; threads may write files whose names hash alike
    writer = f"{os.getpid()}-{get_ident():x}"
    temporary = path.with_name(f".tmp-{writer}-{zlib.crc32(os.fsencode(path.name)):08x}")
    try:
        with naming(path), temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def replace_file(path: Path, text: str) -> None:
    """Write a small text file so that a crash leaves the old or the new one, never a part."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with naming(path), temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Have the system write a file or a folder to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: str | os.PathLike[str]) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()  # Python 3.10
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def only_variant(folder: Path, stem: str) -> str | None:
    """ "fp16" where a model's folder has the weights `stem` in half precision only: what `from_pretrained` takes as its variant."""
    names = {path.name for path in folder.glob(f"{stem}*.safetensors*")}
    whole = {f"{stem}.safetensors", f"{stem}.safetensors.index.json"}
    half = {f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"}
    return "fp16" if names & half and not names & whole else None
