"""The tensors of a safetensors file in a memory map: rows are read where they are looked at, and no more."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .errors import one_line
from .folders import Damaged

# safetensors' names; numpy has no bfloat16, its bits travel as int16
STORED = {"F16": np.float16, "F32": np.float32, "BF16": np.int16, "I64": np.int64, "U8": np.uint8}


class MappedTensors:
    """The tensors of one safetensors file as arrays that lie in a memory map. Raises `Damaged` unless the header is as expected;
    a dimension of None may be any."""

    def __init__(self, path: Path, expected: Mapping[str, tuple[str, tuple[int | None, ...]]]) -> None:
        self.rows: dict[str, np.ndarray] = {}
        self._offsets: dict[str, int] = {}
        try:
            size = path.stat().st_size
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
                dtype = np.dtype(STORED[stored])
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
                f"{path} has a damaged header ({type(error).__name__}: {one_line(error)})"
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
