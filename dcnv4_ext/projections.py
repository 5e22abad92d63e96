"""Two linear layers of one input as one matrix product.

A training step then reads the input once forward and once for the weights' gradients, and makes one gradient of the input instead
of two and their sum. The layers stay two in the module and in its checkpoints; their weights are put side by side in every call,
which only training makes good: without gradients the product that is saved costs no more than that.

That is for GPUs, where these products wait for memory; nobody has timed it there. On two cores with AVX-512 a training step of
the module took 0.97 to 1.02 of the time where the input has as many rows as the weights, and up to 1.12 below (fp32 and bf16, 4x4
to 32x32 pixels, 64 to 1280 channels): there the layers stay apart.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules import module as _module

from . import ops as _ops

_DEVICES = frozenset(("cuda",))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Where torch has them no longer under these names, as if there were some: the layers are called.
_GLOBAL_HOOKS = [getattr(_module, f"_global{hooks}", True) for hooks in _HOOKS]


def _parameters(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a layer that does what `nn.Linear` does and nothing else. Asked in every call, and so past `__getattr__`."""
    own = layer.__dict__
    if type(layer) is not nn.Linear or "forward" in own or any([own[hooks] for hooks in _HOOKS]):
        return None
    weight, bias = own["_parameters"].get("weight"), own["_parameters"].get("bias")
    return None if weight is None or bias is None else (weight, bias)


def untouched(*layers: nn.Module) -> bool:
    """Whether these do what `nn.Linear` does, and nobody waits for their calls."""
    return not any(_GLOBAL_HOOKS) and all([_parameters(layer) is not None for layer in layers])


def can_join(x: Tensor, first: nn.Module, second: nn.Module) -> bool:
    """Whether `join` gives what the two layers give, and sooner: in training on a GPU, where the input has rows enough to make good
    the copy of the weights.

    Not where anybody would miss the layers' calls (hooks, other classes, torch.compile), nor where others than autograd look on.
    """
    if (
        x.device.type not in _DEVICES
        or is_dynamo_compiling()
        or not torch.is_grad_enabled()
        or any(_GLOBAL_HOOKS)
    ):
        return False
    parameters = _parameters(first), _parameters(second)
    if None in parameters:
        return False
    (weight, bias), (other_weight, other_bias) = parameters
    return (
        _ops.plain(x, weight, bias, other_weight, other_bias)
        and weight.requires_grad and bias.requires_grad and other_weight.requires_grad and other_bias.requires_grad
        and weight.dtype == bias.dtype == other_weight.dtype == other_bias.dtype
        and x.numel() >= x.shape[-1] * (weight.shape[0] + other_weight.shape[0])
    )  # fmt: skip


class _Columns(torch.autograd.Function):
    """The first `count` columns and the others, whose gradients are one tensor again: without a copy where they lie side by side."""

    @staticmethod
    def forward(ctx, both: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return both[..., :count], both[..., count:]

    @staticmethod
    def backward(ctx, first: Tensor, second: Tensor) -> tuple[Tensor, None]:
        if not is_dynamo_compiling() and not torch.is_grad_enabled() and _ops.side_by_side(first, second):
            columns = first.shape[-1] + second.shape[-1]
            return first.as_strided((*first.shape[:-1], columns), first.stride()), None
        return torch.cat((first, second), -1), None


def join(x: Tensor, first: nn.Linear, second: nn.Linear) -> tuple[Tensor, Tensor]:
    """`first(x)` and `second(x)`, as columns of one tensor. x is (N, H, W, C); see `can_join`."""
    weight, bias = (torch.cat((getattr(first, name), getattr(second, name))) for name in ("weight", "bias"))
    return _Columns.apply(nn.functional.linear(x, weight, bias), first.out_features)
