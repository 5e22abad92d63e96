"""A file of results that grows measurement by measurement, and that the same command goes on with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

import dcnv4_ext
from dcnv4_ext import native
from ldm_dcn.errors import UserError
from ldm_dcn.files import replacing

from .environment import cpu_name, environment


def identity(device: str, **settings: Any) -> dict[str, Any]:
    """What measurements must have in common to stand in one file: machine, versions, kernels, and a command's settings of timing."""
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "threads": None if cuda else torch.get_num_threads(),
        "torch": torch.__version__,
        "dcnv4_ext": dcnv4_ext.__version__,
        "kernels": kernels_hash(torch.device(device).type),
        **settings,
    }


def kernels_hash(device: str) -> str:
    """Of the kernels' sources where they lie beside the package, else of the compiled library."""
    sources = sorted((Path(dcnv4_ext.__file__).parent / "csrc").rglob("*.*"))
    # Sources of the other device do not matter.
    other = {"cpu": "cuda", "cuda": "cpu"}[device]
    sources = [file for file in sources if file.is_file() and file.parent.name != other]
    library = native.library_file(device)
    digest = hashlib.sha256()
    for file in sources or ([library] if library else []):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def open_results(
    path: Path | None, own: dict[str, Any], held: str, *, replace: bool = False
) -> dict[str, Any]:
    """What the file at `path` holds, where it is of the same identity as `own`; a new file's content where there is none.

    held     the key under which the file lists its measurements
    replace  a new file's content, too, for one of another identity; else that is an error, and the file stays
    """
    fresh = {"identity": own, "environment": environment(), held: []}
    if path is None or not path.exists():
        return fresh
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content.get("identity", {})
        differing = [key for key in own if key not in known or known[key] != own[key]]
        is_ours = isinstance(content[held], list) and isinstance(content["environment"], dict)
    except (ValueError, KeyError, AttributeError, TypeError):
        is_ours = False
    if not is_ours:
        raise UserError(f"{path} is no file of this command; name another --json")
    if not content[held]:
        return fresh
    if not differing:
        return content
    texts = "; ".join(f"{key} {known.get(key, 'not stated')}, here {own[key]}" for key in differing)
    if not replace:
        raise UserError(
            f"{path} holds measurements that these cannot stand beside ({texts}); name another --json, or give --replace"
        )
    print(f"{path} is measured anew: {texts}", flush=True)
    return fresh


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Inside, no other process that does so too changes `path`, as far as its file system has locks: they are of its folder, so that
    none is left behind."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def write(content: dict[str, Any], path: Path) -> None:
    """The whole file or, where this is stopped, the one before. Folders on the way are made; what JSON does not know is written as text."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=1, default=str) + "\n").encode())
