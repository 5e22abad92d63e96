"""Whole tensors out of shares: on one process only, in main memory, one at a time; and the gradient's norm."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldm_dcn.errors import UserError
from ldm_dcn.parallel import (
    check_sharding,
    collected,
    gradients,
    gradients_exchanged,
    replicate,
    reshard,
    shard,
)
from programs import server

SIZES = (7, 6, 5)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(SIZES)))


def collect(rank: int, store: str, told: Connection) -> None:
    """Tell what this process was given, and how many whole tensors were there at once."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    sharded = network()
    for layer in sharded:
        fully_shard(layer)
    fully_shard(sharded)
    alive: list[weakref.ref] = []
    most = 0
    full_tensor = DTensor.full_tensor

    def watched(tensor: DTensor) -> torch.Tensor:
        nonlocal most
        result = full_tensor(tensor)
        alive.append(weakref.ref(result))
        most = max(most, sum(one() is not None for one in alive))
        return result

    DTensor.full_tensor = watched
    found = collected(sharded.state_dict().items(), keep=rank == 0)
    plain = torch.ones(3)
    same = collected([("plain", plain)], keep=True)["plain"] is plain
    told.send(({name: tensor.tolist() for name, tensor in found.items()}, most, len(alive), same))
    dist.destroy_process_group()


def keep_gradients(store: str, told: Connection) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    model = replicate(network(), torch.device("cpu"))
    for _ in range(2):
        model.zero_grad()
        model(torch.ones(2, SIZES[0])).square().sum().backward()
    storages = {p.grad.untyped_storage().data_ptr() for p in model.parameters()}
    told.send((len(storages), len(list(model.parameters()))))


def test_ddp_keeps_gradients_once(tmp_path: Path) -> None:
    """In its buckets; by default they lie beside them too, 4 bytes a parameter that `eval.plan` does not count.

    In a process of its own that is killed: gloo's threads may wait for the interpreter that waits for them, when a group ends
    right after its last gradient.
    """
    end, told = server.Pipe()
    process = server.Process(target=keep_gradients, args=(str(tmp_path / "store"), told))
    process.start()
    try:
        answer = end.recv() if end.poll(120) else None
    finally:
        process.kill()
    assert answer is not None
    storages, parameters = answer
    assert storages < parameters


def from_two_processes(target: Callable, folder: Path) -> list:
    """What `target` tells in each."""
    ends = [server.Pipe() for _ in range(2)]
    processes = [
        server.Process(target=target, args=(rank, str(folder / "store"), ends[rank][1])) for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        return [end.recv() if end.poll(120) else None for end, _ in ends]
    finally:
        for process in processes:
            process.kill()


def test_only_the_process_that_keeps_them_has_the_whole_tensors(tmp_path: Path) -> None:
    answers = from_two_processes(collect, tmp_path)
    expected = {name: tensor.tolist() for name, tensor in network().state_dict().items()}
    assert answers[0] is not None and answers[1] is not None
    assert answers[0][0] == expected and answers[1][0] == {}
    assert answers[1][1:] == (1, len(expected), True)  # one at a time
    assert answers[0][2:] == (len(expected), True)


class Blocks(nn.Module):
    """As much of a U-Net as is shared out block by block."""

    def __init__(self) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.resnets:
            x = block(x)
        return self.head(x)


class Gathers(TorchDispatchMode):
    """Counts the calls in which processes put their shares together."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "allgather" in str(func)
        return func(*args, **kwargs or {})


def count_gathers(rank: int, store: str, told: Connection) -> None:
    """Of a step in two parts, and whether a forward pass alone leaves shares once `reshard` was called."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    answers = []
    for parallel in ("zero", "fsdp"):
        model = Blocks()
        shard(model, parallel, torch.device("cpu"), None)
        with Gathers() as a_step:
            for last in (False, True):
                with gradients_exchanged(model, parallel, last):
                    model(torch.ones(2, 4)).sum().backward()
        with torch.no_grad():
            model(torch.ones(2, 4))
        reshard(model)
        answers.append((a_step.count, all(isinstance(p, DTensor) for p in model.parameters())))
    told.send(answers)
    dist.destroy_process_group()


def test_zero_gathers_once_a_step_and_fsdp_twice_a_part(tmp_path: Path) -> None:
    # Two blocks and the rest, whose backward pass follows its forward pass at once.
    expected = [(3, True), (2 * (2 * 2 + 1), True)]
    assert from_two_processes(count_gathers, tmp_path) == [expected, expected]


def test_a_torch_without_fsdp2_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sharding("fsdp")
    monkeypatch.delattr("torch.distributed.fsdp.fully_shard")
    check_sharding("ddp")
    with pytest.raises(UserError, match=r"train\.parallel=zero needs torch 2\.6 or newer"):
        check_sharding("zero")


def test_the_norm_is_that_of_all_gradients_together() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,))]
    for p in parameters:
        p.grad = torch.randn_like(p)
    own, norm = gradients([*parameters, torch.nn.Parameter(torch.zeros(2))])
    assert [g.data_ptr() for g in own] == [p.grad.data_ptr() for p in parameters]
    assert norm == pytest.approx(float(torch.cat([p.grad.flatten() for p in parameters]).norm()), rel=1e-6)
