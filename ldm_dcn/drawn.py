"""Images on disk as they are drawn: a PNG each, whole or not there, so that a kill loses nothing that was drawn before it."""

from __future__ import annotations

import json
import os
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import files
from .denoiser import Denoiser
from .errors import UserError
from .files import replacing
from .pictures import save_png

NOTE = ".drawn.json"  # in the folder: what its images were drawn with
WRITERS = 8  # threads; compression, most of a PNG's time, runs outside Python's lock
WAIT = 1.0  # seconds between two looks
MOST_WORDS = 120  # letters of one setting in an error


class Drawn:
    """The images `names` in `folder`, drawn with `made_with` (plain JSON values). Several processes may fill it together."""

    def __init__(self, folder: Path, names: Sequence[str], made_with: Mapping[str, Any]) -> None:
        self.folder = folder
        self._names = names
        self._made_with = json.loads(json.dumps(made_with))
        self._has_note = False
        self._noting = Lock()

    def begin(self) -> list[int]:
        """The numbers of the images that are not there yet. Nothing is written before the first `save`.

        Raises `UserError` where images were drawn with something else there, or nobody knows with what, or other files lie there.
        """
        missing, note = self.missing(), self.folder / NOTE
        mend = "give another place, or delete that folder"
        if note.exists():
            before = self._read_note(note, mend)
            other = [key for key in self._made_with if before.get(key) != self._made_with[key]]
            if other:
                named = "; ".join(
                    f"{key}: {_difference(before.get(key), self._made_with[key])}" for key in other
                )
                raise UserError(
                    f"{self.folder} holds images that were drawn with other settings ({named}); {mend}"
                )
        elif len(missing) < len(self._names):
            there = sorted({*range(len(self._names))} - {*missing})
            raise UserError(
                f"{self.folder} holds {self._names[there[0]]}, and no {NOTE} that says what drew it; {mend}"
            )
        elif others := self.others():
            raise UserError(
                f"{self.folder} holds {others[0]}, which was not drawn here; give an empty folder, so that what is drawn can be "
                "told from what is not"
            )
        return missing

    def others(self) -> list[str]:
        """What else lies in the folder, hidden files aside: a grid, or images of other labels and seeds."""
        if not self.folder.is_dir():
            return []
        return sorted({name for name in os.listdir(self.folder) if not name.startswith(".")} - {*self._names})

    def missing(self) -> list[int]:
        """The numbers of the images that are not there. An empty file is what a power cut leaves of one."""
        there = set()
        if self.folder.is_dir():
            there = {entry.name for entry in os.scandir(self.folder) if entry.stat().st_size}
        return [number for number, name in enumerate(self._names) if name not in there]

    def lost(self) -> list[int]:
        """`missing`, after all processes have drawn: a network file system shows what others wrote only after a while."""
        until = time.monotonic() + files.UNSEEN
        while (missing := self.missing()) and time.monotonic() < until:
            time.sleep(WAIT)
        return missing

    def save_batch(self, numbers: Sequence[int], images: torch.Tensor) -> None:
        """Images `numbers`, uint8 (N, c, H, W). All of them are written, or an error is raised, when it returns."""
        with ThreadPoolExecutor(WRITERS) as writers:
            for _ in writers.map(self.save, numbers, images):  # raises what writing one of them raised
                pass

    def save(self, number: int, image: torch.Tensor) -> None:
        """Image `number`, uint8 (c, H, W)."""
        with self._noting:
            if not self._has_note:
                with replacing(self.folder / NOTE) as file:
                    file.write(json.dumps(self._made_with, indent=1).encode() + b"\n")
                self._has_note = True
        save_png(image, self.folder / self._names[number])

    def read(self, number: int) -> torch.Tensor:
        """Image `number`, uint8 (c, H, W)."""
        path = self.folder / self._names[number]
        try:
            with Image.open(path) as picture:
                array = np.array(picture)
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); delete it and run the same command again, which draws it anew"
            ) from None
        return torch.from_numpy(array if array.ndim == 3 else array[:, :, None]).permute(2, 0, 1)

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _read_note(self, note: Path, mend: str) -> dict[str, Any]:
        try:
            content = json.loads(note.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            raise UserError(f"{note} cannot be read ({error}); {mend} and it") from None
        return content


def _difference(before: Any, now: Any) -> str:
    """What changed, in a few words: of long lists, such as prompts, how many there are and the first that differ."""
    whole = f"{before} -> {now}"
    if len(whole) <= MOST_WORDS:
        return whole
    if isinstance(before, list) and isinstance(now, list):
        pairs = enumerate(zip_longest(before, now), start=1)
        number, (old, new) = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
        return f"{len(before)} -> {len(now)} of them, number {number} from {_cut(old)} to {_cut(new)}"
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return ", ".join(f"{key} from {_cut(before.get(key))} to {_cut(now.get(key))}" for key in keys)
    return f"{_cut(before)} -> {_cut(now)}"


def _cut(value: Any) -> str:
    text = "none" if value is None else repr(value)
    return text if len(text) <= MOST_WORDS // 2 else f"{text[: MOST_WORDS // 2 - 3]}..."


def weights_hash(denoiser: Denoiser) -> str:
    """8 hex digits that tell one set of weights from another, against mistakes, not malice."""
    value = 0
    for name, tensor in sorted(denoiser.state_dict().items()):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), value)
    return f"{value:08x}"
