"""Work shared among the processes that torchrun or accelerate started: blocks in turn, their results in order on the first.

A block is the same images whatever the number of processes, so that the numbers made of them are the same too.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import Accelerator

from .errors import UserError, one_line
from .launch import WORLD_SIZES, start_accelerator

T = TypeVar("T")
# The first process computes scores while the others wait for it at the next block: half an hour at 50,000 images on a CPU.
PATIENCE = timedelta(hours=24)
# Those who make a block together come out of it together, but for one that failed alone: it ends then, and its launcher the others,
# which wait for it in the midst of the block.
ALONE = timedelta(minutes=10)


@dataclass(frozen=True)
class Processes:
    """This process among its peers.

    device   of this process where it has peers; None leaves it to the user
    group    theirs, for objects in main memory
    in_step  the same, where each block needs all of them, as with a network in shares: none waits for long there
    """

    rank: int = 0
    count: int = 1
    device: str | None = None
    group: Any = None
    in_step: Any = None

    @property
    def at_once(self) -> int:
        """How many blocks are made at the same time."""
        return 1 if self.in_step is not None else self.count

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def together(self, make: Callable[[], T]) -> T:
        """make() on each process. What one raises all raise, so that none waits for it in vain."""
        return self._together(make, self.group)

    def _together(self, make: Callable[[], T], group: Any) -> T:
        result, error = None, None
        try:
            result = make()
        except Exception as caught:
            error = caught
        try:
            errors = self._gathered(None if error is None else _sent(error), group)
        except RuntimeError:  # of a group whose patience is over
            if error is None:
                raise
            raise RuntimeError(
                f"process {self.rank} failed where all go on together: {one_line(error)}; mend that, and give the same command again"
            ) from error
        if error is None:
            error = next((sent for sent in errors if sent is not None), None)
        if error is not None:
            raise error
        return result

    def everyones(self, value: T) -> list[T]:
        """`value` of each process, in their order, on all of them."""
        return self._gathered(value, self.group)

    def _gathered(self, value: T, group: Any) -> list[T]:
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value, group=group)
        return values

    def in_order(self, make: Callable[[int], T], blocks: int) -> Iterator[T]:
        """On the first process make(0), ..., make(blocks - 1), each of them made by one process, or by all; on the others nothing."""
        if self.in_step is not None:
            for block in range(blocks):
                result = self._together(lambda block=block: make(block), self.in_step)
                if self.is_first:
                    yield result
            return
        for start in range(0, blocks, self.count):
            mine = start + self.rank
            result = self.together(lambda block=mine: make(block) if block < blocks else None)
            if self.count == 1:
                yield result
                continue
            results: list[Any] | None = [None] * self.count if self.is_first else None
            dist.gather_object(result, results, dst=0, group=self.group)
            yield from (results or [])[: blocks - start]


def peers_of(accelerator: Accelerator, in_step: bool = False) -> Processes:
    """All processes of `accelerator`, which call this together; `in_step` where each block needs all of them."""
    if accelerator.num_processes == 1:
        return Processes()
    return Processes(
        accelerator.process_index,
        accelerator.num_processes,
        str(accelerator.device),
        dist.new_group(backend="gloo", timeout=PATIENCE),
        dist.new_group(backend="gloo", timeout=ALONE) if in_step else None,
    )


def _sent(error: Exception) -> Exception:
    """`error` as another process can have it: some exceptions cannot be put together again from their parts."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return UserError(one_line(error))


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """The processes of this launch. Raises `UserError` for launches that do not start what they seem to."""
    if not any(name in os.environ for name in (*WORLD_SIZES, "MASTER_ADDR")):
        yield Processes()  # plain `python -m`: nothing to join
        return
    peers = peers_of(start_accelerator())
    try:
        yield peers
    finally:
        if peers.count > 1:
            dist.destroy_process_group()
