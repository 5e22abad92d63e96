"""Every random number as a function of (seed, stream, position).

A position is a global sample number: step x batch size + place in the batch, whatever the number of
processes. Nothing depends on what was drawn before, so a resumed run, a run on more processes and a larger
batch see the same numbers.

Two ways lead from a key to numbers: `normal` seeds one reused `torch.Generator` for each position (a
generator a sample costs ten times as much), `uniform` turns the key itself into a number.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from zlib import crc32

import numpy as np
import torch

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of SplitMix64
_MASK = (1 << 64) - 1


def _mix(z: int) -> int:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection of 64 bits."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _mix_array(z: np.ndarray) -> np.ndarray:
    """`_mix` of a uint64 array; numpy's products wrap modulo 2^64 as wanted."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _mix32_array(z: np.ndarray) -> np.ndarray:
    """`_mix32` of the low half of a uint64 array."""
    low = np.uint64(0xFFFFFFFF)
    z = ((z ^ (z >> np.uint64(16))) * np.uint64(0x85EBCA6B)) & low
    z = ((z ^ (z >> np.uint64(13))) * np.uint64(0xC2B2AE35)) & low
    return z ^ (z >> np.uint64(16))


def _mix32(z: int) -> int:
    """MurmurHash3's 32-bit finaliser: a bijection of 32 bits."""
    z = ((z ^ (z >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    z = ((z ^ (z >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return z ^ (z >> 16)


def _stream_key(seed: int, stream: str) -> int:
    return _mix((_mix((seed + _GOLDEN) & _MASK) + crc32(stream.encode()) * _GOLDEN) & _MASK)


def _positions(positions: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
    return np.asarray(positions, dtype=np.uint64).reshape(-1)


def keys(seed: int, stream: str, positions: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
    """(len(positions),) uint64 keys for non-negative integer `positions` of the named `stream`.

    torch's CPU generator looks at the low 32 bits of its seed only. Within a stream, those bits are a
    bijection of the position's low 32 bits, so the first 4.3 billion positions all get different numbers;
    hashing would repeat some noise among 50,000 images with a probability of a quarter.
    """
    p = _positions(positions)
    base = np.uint64(_stream_key(seed, stream))
    block = _mix_array(base + (p >> np.uint64(32)) * np.uint64(_GOLDEN))  # differs for every 2^32 positions
    low = _mix32_array((p + block) & np.uint64(0xFFFFFFFF))
    high = _mix_array(block ^ p) & np.uint64(0xFFFFFFFF00000000)
    return high | low


def key(seed: int, stream: str, position: int) -> int:
    """`keys` of one position, without numpy's twentyfold cost of a single number."""
    base = _stream_key(seed, stream)
    block = _mix((base + (position >> 32) * _GOLDEN) & _MASK)
    low = _mix32((position + block) & 0xFFFFFFFF)
    return (_mix(block ^ position) & 0xFFFFFFFF00000000) | low


def normal(
    shape: Sequence[int], seed: int, stream: str, positions: Sequence[int] | np.ndarray | torch.Tensor
) -> torch.Tensor:
    """(len(positions), *shape) fp32 standard normal numbers on the CPU, a row a position.

    Drawn on the CPU for every device, so that a GPU run and a CPU run start from the same noise.
    """
    rows = keys(seed, stream, positions).tolist()
    out = torch.empty((len(rows), *shape))
    generator = _generators.cpu
    for row, key in zip(out.unbind(0), rows, strict=True):
        generator.manual_seed(key)
        row.normal_(generator=generator)
    return out


def uniform(seed: int, stream: str, positions: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
    """(len(positions),) float64 in [0, 1)."""
    p = _positions(positions)
    bits = _mix_array(np.uint64(_stream_key(seed, stream)) + (p + np.uint64(1)) * np.uint64(_GOLDEN))
    return (bits >> np.uint64(11)) * 2.0**-53


def permutation(n: int, seed: int, stream: str, position: int) -> torch.Tensor:
    """A random order of 0..n-1, (n,) int64."""
    _generators.cpu.manual_seed(key(seed, stream, position))
    return torch.randperm(n, generator=_generators.cpu)


def fix_global(seed: int, stream: str, position: int) -> None:
    """Seed torch's global generators: for code that draws from them (dropout, weight initialisation).

    `torch.manual_seed` without its half millisecond of asking every kind of device.
    """
    seeded = key(seed, stream, position)
    torch.default_generator.manual_seed(seeded)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seeded)


class Order:
    """The endless order in which samples are seen: a new permutation for each epoch, keyed by (seed, epoch).

    `order[positions]` are the sample numbers at global `positions`, for any world size, from any start.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self.seed = seed
        self._epochs: dict[int, torch.Tensor] = {}

    def __getitem__(self, positions: Sequence[int] | range) -> torch.Tensor:
        """(len(positions),) int64 sample numbers in [0, n)."""
        if isinstance(positions, range) and len(positions) and positions.step == 1:
            epoch, place = divmod(positions.start, self.n)
            if place + len(positions) <= self.n:  # the rule: all in one epoch
                return self._known([epoch])[epoch][place : place + len(positions)]
        p = torch.as_tensor(
            positions if not isinstance(positions, range) else list(positions), dtype=torch.int64
        )
        epochs = torch.div(p, self.n, rounding_mode="floor")
        wanted = epochs.unique().tolist()
        orders = self._known(wanted)
        out = torch.empty_like(p)
        for epoch in wanted:
            here = epochs == epoch
            out[here] = orders[epoch][p[here] - epoch * self.n]
        return out

    def _known(self, epochs: Sequence[int]) -> dict[int, torch.Tensor]:
        """Their orders. Kept for the next question, which another thread may ask: it replaces what is kept, and changes none."""
        before = self._epochs
        orders = {epoch: before[epoch] if epoch in before else self._shuffled(epoch) for epoch in epochs}
        self._epochs = orders
        return orders

    def _shuffled(self, epoch: int) -> torch.Tensor:
        return permutation(self.n, self.seed, "order", epoch)


class _Generators(threading.local):
    """One generator a thread, reused for every position and seeded anew before each use: nothing leaks between uses."""

    def __init__(self) -> None:
        self.cpu = torch.Generator()


_generators = _Generators()
