"""Contenders: peers made ready to be timed, with more operands than the cache holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from .peers import Case, Peer
from .stopwatch import Contender, cache_bytes

LEVELS, DIRECTIONS = ("op", "module"), ("forward", "backward")
CACHE_FACTOR = 3  # the buffer sets of a contender are this many times the last cache, together
FEWEST_SETS, MOST_SETS = 3, 128
# What the forward passes of one contender may keep for its backward, in bytes.
SAVED_BYTES = {"cpu": 2**29, "cuda": 6 * 2**30}


def buffer_sets(operands: int, device: str) -> int:
    """How many sets of `operands` bytes are larger than the cache together."""
    return min(MOST_SETS, max(FEWEST_SETS, math.ceil(CACHE_FACTOR * cache_bytes(device) / operands)))


def make_contender(
    name: str, kind: type[Peer], case: Case, level: str, direction: str
) -> tuple[Peer, Contender]:
    """A peer with one call a buffer set; for backward the forward passes have been done."""
    torch.manual_seed(0)
    peer = kind(case)
    body: nn.Module = peer if level == "op" else peer.block(case)
    body.to(device=case.device, dtype=case.dtype)

    def inputs(index: int) -> tuple[Tensor, ...]:
        if level == "module":
            return (case.map("value", index),)
        # A peer that takes several maps of one kind gets different ones.
        counts = {kind: peer.takes.count(kind) for kind in peer.takes}
        seen = dict.fromkeys(counts, 0)
        maps = []
        for kind in peer.takes:
            maps.append(case.map(kind, index * counts[kind] + seen[kind]))
            seen[kind] += 1
        return peer.lay_out(*maps)

    if direction == "forward":
        calls = [partial(_without_gradients, body, inputs(i)) for i in range(case.sets)]
    else:
        with peer.context():
            calls = list(_backward_calls(body, inputs, case))
    return peer, Contender(name, calls, peer.context)


def _without_gradients(body: nn.Module, operands: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return body(*operands)


def _backward_calls(
    body: nn.Module, inputs: Callable[[int], tuple[Tensor, ...]], case: Case
) -> Iterator[Callable]:
    """Gradients of the operands and of the parameters, for as many sets as memory allows."""
    parameters = list(body.parameters())
    kept: dict[int, int] = {}  # storage address -> bytes

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    most = SAVED_BYTES[torch.device(case.device).type]
    for index in range(case.sets):
        leaves = [operand.detach().requires_grad_() for operand in inputs(index)]
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = body(*leaves)
        gradient = torch.randn_like(output)
        yield partial(torch.autograd.grad, output, (*leaves, *parameters), gradient, retain_graph=True)
        if sum(kept.values()) * (index + 2) / (index + 1) > most:
            return
