"""npz files: read as data only, and written as ADM's evaluator reads them.

ADM's layout is `arr_0`: uint8 (N, H, W, 3), `arr_1`: labels (N,), uncompressed. The original reads the header of `arr_0.npy`
(version 1.0 or 2.0, C order, no objects) and then streams its bytes.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from torch import Tensor

from ldm_dcn.errors import UserError, one_line

CHUNK = 2**24  # bytes read at once
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npz(path: str, wanted: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Those of the `wanted` arrays that an npz holds, and no code. Raises `UserError` for what is not a whole npz."""
    with _opened(path) as file:
        return {name: file[name] for name in wanted if name in file.files}


def map_npz(path: str, name: str) -> np.ndarray:
    """The array `name` of an npz, which has it, for reading: in a memory map where it is stored as it is, as ADM's are; else in memory.

    Raises `UserError` as `read_npz` does: the file is read through once, so that its checksum is looked at.
    """
    with _opened(path) as file:
        member = file.zip.getinfo(f"{name}.npy" if f"{name}.npy" in file.zip.namelist() else name)
        if member.compress_type != zipfile.ZIP_STORED:
            return file[name]
        with file.zip.open(member) as bytes_:
            version = np.lib.format.read_magic(bytes_)
            if version not in HEADERS:
                return file[name]
            shape, fortran, dtype = HEADERS[version](bytes_)
            header = bytes_.tell()
            while bytes_.read(CHUNK):  # raises BadZipFile where the checksum differs
                pass
        if dtype.hasobject or header + math.prod(shape) * dtype.itemsize != member.file_size or 0 in shape:
            return file[name]  # or the error that it is
        start = _data_start(path, member) + header
        return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")


def _data_start(path: str, member: zipfile.ZipInfo) -> int:
    """Where in the file the bytes of `member` begin: after its local header, 30 bytes, a name and extra fields (APPNOTE 4.3.7)."""
    with open(path, "rb") as file:
        file.seek(member.header_offset + 26)
        lengths = struct.unpack("<HH", file.read(4))
    return member.header_offset + 30 + sum(lengths)


def npz_names(path: str) -> list[str]:
    """The names of the arrays in an npz. Raises `UserError` as `read_npz` does."""
    with _opened(path) as file:
        return list(file.files)


@contextmanager
def _opened(path: str) -> Iterator[np.lib.npyio.NpzFile]:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give an npz, a folder of images, or a run") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = one_line(error)
        raise UserError(f"{path} cannot be read as npz ({reason}); write it again") from error


class AdmNpzWriter:
    """Writes `count` images (H, W) to `path` as they come; it appears when all are there. Grey is repeated to RGB.

    `comment` is left in the archive, where readers of arrays do not see it.

    with AdmNpzWriter(path, 50_000, 256, 256) as file:
        file.add(images)       # uint8 (B, 1 or 3, H, W), until all are there
        file.label(labels)     # (N,), where there are any
    """

    def __init__(self, path: Path, count: int, height: int, width: int, comment: str = "") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._unfinished = path, path.with_name(f"{path.name}.unfinished")
        self._size, self._left = (height, width), count
        self._zip = zipfile.ZipFile(self._unfinished, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._zip.comment = comment.encode()
        self._array = self._zip.open("arr_0.npy", "w", force_zip64=True)
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, 3)}
        np.lib.format.write_array_header_1_0(self._array, header)

    def add(self, images: Tensor) -> None:
        assert images.shape[-2:] == self._size and len(images) <= self._left
        self._left -= len(images)
        self._array.write(images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy().data)

    def label(self, labels: Tensor) -> None:
        assert self._left == 0
        self._array.close()
        with self._zip.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, labels.numpy(), version=(1, 0), allow_pickle=False)

    def __enter__(self) -> AdmNpzWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._array.close()
        self._zip.close()
        if kind is None:
            assert self._left == 0
            os.replace(self._unfinished, self._path)
        else:
            self._unfinished.unlink()
