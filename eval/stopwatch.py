"""Times of calls that take turns: the median over rounds, on the CPU's clock or on a GPU's own.

In a round every contender has one turn, so that whatever else the machine does hits all alike. A contender brings one call a
buffer set; a turn walks through the sets, which together are larger than the cache, so that no call finds its inputs there.
On a GPU the calls of all sets are captured as one CUDA graph and its replay is timed by events: kernel time, without the
host. What a call costs the host is timed apart.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .environment import without_here

MEBIBYTE = 2**20
CPU_TURN = 0.02  # seconds: well above the clock's resolution and a scheduler's slice of 4 ms
CUDA_TURN = 0.001
LONGEST_GRAPH = 0.2  # seconds: slower contenders walk through fewer of their sets in a turn
FEWEST_ROUNDS, FEWEST_SLOW_ROUNDS = 5, 2
SLOW_TURN = 0.3  # seconds
SLEEP_CYCLES = 200_000  # about 0.1 ms in which the host queues the work to be timed
UNKNOWN_CACHE = 64 * MEBIBYTE


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed, as the allocators of training programs do; whether it agreed.

    By its defaults it may give a result of some MB back to the system when it is freed, and the next call then waits for the
    kernel to clear the same pages again: up to the call's own time, for one contender and not for another, by where their
    results happened to lie.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    most_mmap_threshold = 32 * MEBIBYTE  # glibc takes no more (HEAP_MAX_SIZE / 2 on 64 bits)
    return mallopt(mmap_threshold, most_mmap_threshold) == 1 and mallopt(trim_threshold, 2**31 - 1) == 1


@dataclass(frozen=True)
class Contender:
    """What takes turns: one call a buffer set, and a context entered around its turns, not timed."""

    name: str
    calls: Sequence[Callable[[], Any]]
    context: Callable[[], AbstractContextManager] = nullcontext


@dataclass
class Rounds:
    """Seconds of one activity, one entry a round."""

    seconds: list[float] = field(default_factory=list, kw_only=True)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the interquartile range."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2


@dataclass
class Timing(Rounds):
    """Seconds a call. `timer` is "clock", "graph" or "events"; `host` is None on the CPU."""

    timer: str
    calls: int  # in a turn
    host: float | None = None


class _CpuLane:
    def __init__(self, contender: Contender) -> None:
        self.contender, self.position = contender, 0
        with contender.context():
            estimate = self._walk(1)
            if (
                estimate < SLOW_TURN
            ):  # the first call is no measure: memory, kernels and threads are got ready in it
                estimate = min(self._walk(1), self._walk(1))
        self.timing = Timing("clock", max(1, math.ceil(CPU_TURN / max(estimate, 1e-9))))
        self.turn_seconds = estimate * self.timing.calls

    def _walk(self, count: int) -> float:
        calls, start = self.contender.calls, self.position
        began = time.perf_counter()
        for i in range(start, start + count):
            calls[i % len(calls)]()
        elapsed = time.perf_counter() - began
        self.position += count
        return elapsed

    def turn(self) -> None:
        with self.contender.context():
            self.timing.seconds.append(self._walk(self.timing.calls) / self.timing.calls)

    def settle(self) -> None:
        """The clock has been read already."""


class _CudaLane:
    """Replays of a graph of the contender's calls or, where it cannot be captured, the calls themselves between events."""

    def __init__(self, contender: Contender, stream: torch.cuda.Stream, pool: Any, graphs: bool) -> None:
        self.contender = contender
        calls = contender.calls
        with contender.context():
            calls[0]()  # kernels are loaded and chosen here
            torch.cuda.synchronize()
            first = _elapsed(calls[0], 1)
            count = max(1, min(10, int(LONGEST_GRAPH / first)))
            began = time.perf_counter()
            for i in range(count):
                calls[i % len(calls)]()
            host = (time.perf_counter() - began) / count
            torch.cuda.synchronize()
            one = (time.perf_counter() - began) / count
            self.calls = calls[: max(1, int(LONGEST_GRAPH / one))]
            self.graph = self._capture(stream, pool) if graphs else None
        # Without a graph the host may be what takes the time; with one, only the replay tells how long a turn is.
        one = _elapsed(self.graph.replay, 1) if self.graph else one * len(self.calls)
        self.repeats = max(1, math.ceil(CUDA_TURN / one))
        self.turn_seconds = one * self.repeats + 2e-4
        self.timing = Timing("graph" if self.graph else "events", self.repeats * len(self.calls), host)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def _capture(self, stream: torch.cuda.Stream, pool: Any) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                # Held until the end, so that each call writes to memory of its own.
                kept = [call() for call in self.calls]
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        del kept
        graph.replay()
        torch.cuda.synchronize()
        return graph

    def turn(self) -> None:
        with self.contender.context() if self.graph is None else nullcontext():
            # The GPU is kept busy until everything that is timed has been queued.
            torch.cuda._sleep(SLEEP_CYCLES)
            self.start.record()
            for _ in range(self.repeats):
                if self.graph is not None:
                    self.graph.replay()
                else:
                    for call in self.calls:
                        call()
            self.end.record()

    def settle(self) -> None:
        self.timing.seconds.append(self.start.elapsed_time(self.end) * 1e-3 / self.timing.calls)


def _elapsed(call: Callable[[], Any], count: int) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


class Stopwatch:
    """Times contenders on one device. `seconds` is about what the timed rounds of one contender may take; slow ones leave a
    race early."""

    def __init__(self, device: str, seconds: float, most_rounds: int, graphs: bool = True) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.seconds, self.most_rounds, self.graphs = seconds, most_rounds, graphs
        self.stream = torch.cuda.Stream() if self.cuda else None

    @contextmanager
    def place(self) -> Iterator[None]:
        """Where contenders are made and raced: a backward pass runs on the stream of its forward pass, which must be the one
        that is captured."""
        with torch.cuda.stream(self.stream) if self.cuda else nullcontext():
            yield

    def race(self, contenders: Sequence[Contender]) -> tuple[dict[str, Timing], dict[str, str]]:
        """Timings by name, and for contenders that raised an exception its text."""
        lanes, failed = {}, {}
        pool = torch.cuda.graph_pool_handle() if self.cuda else None
        for contender in contenders:
            try:
                lanes[contender.name] = (
                    _CudaLane(contender, self.stream, pool, self.graphs) if self.cuda else _CpuLane(contender)
                )
            except Exception as error:  # a peer may fail in any way; ours is reported like one
                failed[contender.name] = describe(error)
            # Not in the handler, where the exception still holds the failed call's tensors.
            if contender.name in failed:
                self.recover()
        rounds = {name: self._rounds(lane.turn_seconds) for name, lane in lanes.items()}
        for index in range(max(rounds.values(), default=0)):
            running = [lane for name, lane in lanes.items() if rounds[name] > index]
            for lane in running if index % 2 == 0 else reversed(running):
                lane.turn()
            if self.cuda:
                torch.cuda.synchronize()
            for lane in running:
                lane.settle()
        return {name: lane.timing for name, lane in lanes.items()}, failed

    def _rounds(self, turn_seconds: float) -> int:
        fewest = FEWEST_ROUNDS if turn_seconds < SLOW_TURN else FEWEST_SLOW_ROUNDS
        return min(self.most_rounds, max(fewest, int(self.seconds / max(turn_seconds, 1e-9))))

    def recover(self) -> None:
        """After a failure: raises if the device is lost, frees what the failed call held otherwise."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def describe(error: BaseException) -> str:
    """An exception in one line."""
    lines = without_here(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def copy_bandwidth(device: str) -> float:
    """Bytes a second of a large copy, bytes read and bytes written both counted."""
    cuda = torch.device(device).type == "cuda"
    count = (2048 if cuda else 256) * MEBIBYTE // 4
    source, target = (torch.rand(count, device=device) for _ in range(2))
    times = []
    for _ in range(12):
        if cuda:
            times.append(_elapsed(lambda: target.copy_(source), 8) / 8)
        else:
            began = time.perf_counter()
            target.copy_(source)
            times.append(time.perf_counter() - began)
    return 2 * source.nbytes / statistics.median(times[2:])


def cache_bytes(device: str) -> int:
    """The last cache before memory: L2 of a GPU, L3 of a processor; 64 MiB where the system does not say."""
    if torch.device(device).type == "cuda":
        return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or UNKNOWN_CACHE
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        unit = {"K": 2**10, "M": 2**20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes, default=UNKNOWN_CACHE)
