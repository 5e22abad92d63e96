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


@dataclass(frozen=True)
class Processes:
    """This process among its peers.

    device   of this process where it has peers; None leaves it to the user
    group    theirs, for objects in main memory
    """

    rank: int = 0
    count: int = 1
    device: str | None = None
    group: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def together(self, make: Callable[[], T]) -> T:
        """make() on each process. What one raises all raise, so that none waits for it in vain."""
        result, error = None, None
        try:
            result = make()
        except Exception as caught:
            error = caught
        errors = self.everyones(None if error is None else _sent(error))
        if error is None:
            error = next((sent for sent in errors if sent is not None), None)
        if error is not None:
            raise error
        return result

    def everyones(self, value: T) -> list[T]:
        """`value` of each process, in their order, on all of them."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def in_order(self, make: Callable[[int], T], blocks: int) -> Iterator[T]:
        """On the first process make(0), ..., make(blocks - 1), each of them made by one process; on the others nothing."""
        for start in range(0, blocks, self.count):
            mine = start + self.rank
            result = self.together(lambda block=mine: make(block) if block < blocks else None)
            if self.count == 1:
                yield result
                continue
            results: list[Any] | None = [None] * self.count if self.is_first else None
            dist.gather_object(result, results, dst=0, group=self.group)
            yield from (results or [])[: blocks - start]


def peers_of(accelerator: Accelerator) -> Processes:
    """All processes of `accelerator`, which call this together."""
    if accelerator.num_processes == 1:
        return Processes()
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    return Processes(accelerator.process_index, accelerator.num_processes, str(accelerator.device), group)


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
