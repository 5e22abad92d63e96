"""Several processes on one model: DDP, or FSDP2's shares of every tensor; and the whole tensors back."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from .errors import UserError

# What FSDP gathers and frees as one: large enough to hide the exchange, small enough to save memory.
_SHARDED_TOGETHER = ("resnets", "attentions")


def check_sharding(parallel: str) -> None:
    """Raises `UserError` where torch has no FSDP2 and `parallel` needs it."""
    from torch.distributed import fsdp

    if parallel != "ddp" and not hasattr(fsdp, "fully_shard"):
        raise UserError(
            f"train.parallel={parallel} needs torch 2.6 or newer, and this is {torch.__version__}; use train.parallel=ddp"
        )


def shard(denoiser: nn.Module, parallel: str, device: torch.device, dtype: torch.dtype | None) -> None:
    """Share out the parameters of `denoiser` between all processes, block by block (FSDP2).

    With "fsdp" a block is gathered when it is needed, twice a step, and freed after it: ZeRO-3. With "zero" what the forward pass has
    gathered stays until the backward pass is through: the exchange of ZeRO-2.

    `dtype` is what the parameters are gathered and computed in; None keeps theirs. Gradients are summed in fp32. The
    parameters become `DTensor`s: make the optimiser and the averages afterwards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options = {
        "mesh": init_device_mesh(device.type, (torch.distributed.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
    }
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in _SHARDED_TOGETHER:
            for block in module:
                fully_shard(block, reshard_after_forward=parallel == "fsdp", **options)
    fully_shard(denoiser, reshard_after_forward=False, **options)  # its backward pass follows at once


def replicate(denoiser: nn.Module, device: torch.device) -> nn.Module:
    """DDP around those parameters of `denoiser` that learn now. Gradients lie in its buckets alone, not there and beside."""
    ids = [device.index or 0] if device.type == "cuda" else None
    # The one buffer, tokens of the empty prompt, is the same everywhere and never changes. torch 2.13 has another name for that.
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(denoiser, device_ids=ids, gradient_as_bucket_view=True, **{buffers: False})


@contextmanager
def gradients_exchanged(model: nn.Module, parallel: str, last: bool) -> Iterator[None]:
    """The backward pass inside sums the gradients over the processes where it is the `last` of an accumulation."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last or parallel == "fsdp")  # "zero" gathers once a step
        yield
        return
    with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
        yield


def gradients(parameters: Sequence[nn.Parameter]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Those of this process, to be scaled in place, and the norm of the whole gradient."""
    own = [p.grad for p in parameters if p.grad is not None]
    return own, whole(_norm(own))


def gradient_norms(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Of the whole gradient of each of n parameters, (n,); zero where there is none."""
    there = torch.tensor([p.grad is not None for p in parameters])
    norms = torch.zeros(len(parameters), device=parameters[0].device)
    with torch.no_grad():
        found = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
        norms[there.to(norms.device)] = whole(torch.stack(found)).to(norms)
    return norms


def _norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of all elements together. torch.nn.utils.get_total_norm does the same, from torch 2.6 on."""
    with torch.no_grad():
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))


def reshard(denoiser: nn.Module) -> None:
    """Back to shares, before they are read or written: after a forward pass without a backward one, FSDP keeps gathered what the
    backward pass would need."""
    for module in denoiser.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be shared out. All processes must call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def collected(tensors: Iterable[tuple[str, torch.Tensor]], keep: bool) -> dict[str, torch.Tensor]:
    """The whole of named `tensors` in those processes that `keep` them; all must call it together.

    What is shared out is gathered one tensor at a time and put into main memory, so that no GPU holds the whole model for it.
    """
    found = {}
    for name, tensor in tensors:
        gathered = whole(tensor)
        if keep:
            found[name] = gathered if gathered is tensor else gathered.cpu()
        del gathered
    return found


def in_shares_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole `tensor`, the same in every process, on the device and in the shares of `like`."""
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor.to(like.device)
