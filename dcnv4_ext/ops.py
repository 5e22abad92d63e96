"""The operator in torch: schemas, shapes, gradients, autocast.

Path of a call: functional.dcnv4 (checks) -> ops (this file: torch.ops.dcnv4_ext.forward) -> native (pointers) -> csrc.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function

from . import native
from .geometry import Geometry

_ARGUMENTS = (
    "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups, float offset_scale, "
    "bool remove_center, bool softmax"
)
_library = torch.library.Library("dcnv4_ext", "DEF")
_library.define(f"forward(Tensor value, Tensor offset_mask, {_ARGUMENTS}) -> Tensor")
_library.define(
    f"backward(Tensor value, Tensor offset_mask, Tensor grad_output, {_ARGUMENTS}, bool[2] needed) -> (Tensor, Tensor)"
)


def output_shape(value, offset_mask, geometry: Geometry, groups: int) -> tuple[int, int, int, int]:
    """(N, Ho, Wo, C) of a valid pair of inputs, or an error that names the argument. Nothing unchecked reaches a kernel.

    `value` and `offset_mask` are tensors or anything with their shape, dtype and device.
    """
    if len(value.shape) != 4:
        raise ValueError(f"value must be (N, H, W, C), got shape {tuple(value.shape)}")
    if len(offset_mask.shape) != 4:
        raise ValueError(f"offset_mask must be (N, Ho, Wo, P), got shape {tuple(offset_mask.shape)}")
    if value.dtype != offset_mask.dtype:
        raise TypeError(
            f"value is {value.dtype} and offset_mask is {offset_mask.dtype}; cast one so that they agree, or use autocast"
        )
    if value.device != offset_mask.device:
        raise ValueError(
            f"value is on {value.device} and offset_mask is on {offset_mask.device}; move both to one device"
        )
    n, h, w, c = value.shape
    if h < 1 or w < 1 or c < 1:
        raise ValueError(f"value has shape {tuple(value.shape)}: an empty map; only the batch may be empty")
    if groups < 1 or c % groups != 0:
        raise ValueError(
            f"value has {c} channels, which groups={groups} does not divide; use a divisor of {c}"
        )
    ho, wo = geometry.output_size(h, w)
    if ho < 1 or wo < 1:
        raise ValueError(
            f"a {h}x{w} map is smaller than the kernel: kernel_size={geometry.kernel_size}, "
            f"dilation={geometry.dilation}, padding={geometry.padding} leave an output of {ho}x{wo}; enlarge padding"
        )
    if offset_mask.shape[0] != n or offset_mask.shape[1] != ho or offset_mask.shape[2] != wo:
        raise ValueError(
            f"offset_mask has shape {tuple(offset_mask.shape)}, expected ({n}, {ho}, {wo}, P): "
            "it is predicted at the output resolution"
        )
    least = 3 * groups * geometry.taps
    if offset_mask.shape[3] < least:
        raise ValueError(
            f"offset_mask has {offset_mask.shape[3]} channels, fewer than 3 * groups * taps = "
            f"3 * {groups} * {geometry.taps} = {least}"
        )
    return n, ho, wo, c


class _Description(NamedTuple):
    """What a call needs to know of a tensor, hashable."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: Tensor) -> _Description:
        return _Description(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


class _Call(NamedTuple):
    """A checked call: what the kernel is told, and the shape of the output."""

    problem: native.Problem
    output_shape: tuple[int, int, int, int]


# Calls repeat: a network makes the same few over and over. Checks and the struct are paid for once.
@lru_cache(maxsize=4096)
def _call(
    value, offset_mask, grad_output, kernel_size, stride, padding, dilation, groups, scale, remove_center, softmax,
    deterministic, threads,
) -> _Call:  # fmt: skip
    geometry = Geometry.of(kernel_size, stride, padding, dilation, remove_center)
    shape = output_shape(value, offset_mask, geometry, groups)
    if grad_output is not None and (tuple(grad_output.shape), *grad_output[2:]) != (
        shape,
        value.dtype,
        value.device,
    ):
        raise ValueError(
            f"grad_output must be {shape} {value.dtype} on {value.device}, got {tuple(grad_output.shape)} "
            f"{grad_output.dtype} on {grad_output.device}"
        )
    problem = native.problem(
        geometry, groups, scale, softmax, value.dtype, value.shape, offset_mask.shape, shape,
        value_stride=value.strides[2], offset_mask_stride=offset_mask.strides[2],
        output_stride=grad_output.strides[2] if grad_output is not None else shape[3],
        deterministic=deterministic, threads=threads, device=value.device.index or 0,
    )  # fmt: skip
    return _Call(problem, shape)


def _prepare(value, offset_mask, grad_output, settings) -> _Call:
    kernel_size, stride, padding, dilation, *others = settings
    return _call(
        _Description.of(value), _Description.of(offset_mask),
        None if grad_output is None else _Description.of(grad_output),
        tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), *others,
        torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(),
    )  # fmt: skip


def _forward_kernel(value, offset_mask, *settings):
    value, offset_mask = native.rows(value), native.rows(offset_mask)
    call = _prepare(value, offset_mask, None, settings)
    output = value.new_empty(call.output_shape)
    if call.output_shape[0] > 0:
        native.forward(call.problem, value, offset_mask, output)
    return output


def _backward_kernel(value, offset_mask, grad_output, *settings):
    *settings, needed = settings
    value, offset_mask, grad_output = native.rows(value), native.rows(offset_mask), native.rows(grad_output)
    call = _prepare(value, offset_mask, grad_output, settings)
    grad_value = value.new_empty(value.shape if needed[0] else (0,))
    grad_offset_mask = offset_mask.new_empty(offset_mask.shape if needed[1] else (0,))
    if call.output_shape[0] > 0:
        native.backward(
            call.problem, value, offset_mask, grad_output,
            grad_value if needed[0] else None, grad_offset_mask if needed[1] else None,
        )  # fmt: skip
    return grad_value, grad_offset_mask


for _device in ("CPU", "CUDA"):
    _library.impl("forward", _forward_kernel, _device)
    _library.impl("backward", _backward_kernel, _device)


@torch.library.register_fake("dcnv4_ext::forward", lib=_library)
def _forward_shape(value, offset_mask, *settings):
    kernel_size, stride, padding, dilation, groups, _, remove_center, _ = settings
    geometry = Geometry.of(tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), remove_center)
    return value.new_empty(output_shape(value, offset_mask, geometry, groups))


@torch.library.register_fake("dcnv4_ext::backward", lib=_library)
def _backward_shape(value, offset_mask, grad_output, *settings):
    needed = settings[-1]
    return (
        value.new_empty(value.shape if needed[0] else (0,)),
        offset_mask.new_empty(offset_mask.shape if needed[1] else (0,)),
    )


_forward = torch.ops.dcnv4_ext.forward.default
_backward = torch.ops.dcnv4_ext.backward.default


# The plain class below autograd.Function: Function.apply would start the dispatch of torch.func's transforms anew, which has
# happened already when a kernel under the Autograd key runs.
class _Differentiable(torch.autograd.function._SingleLevelFunction):
    @staticmethod
    def forward(ctx, value, offset_mask, *settings):
        ctx.settings = settings
        ctx.save_for_backward(value, offset_mask)
        with torch._C._AutoDispatchBelowAutograd():
            return _forward(value, offset_mask, *settings)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        value, offset_mask = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        gradients = _backward(value, offset_mask, grad_output, *ctx.settings, needed)
        return (
            *(g if n else None for g, n in zip(gradients, needed, strict=True)),
            *(None for _ in ctx.settings),
        )


# A kernel under the Autograd key costs half of what torch.library.register_autograd does in a call with gradients.
def _autograd_kernel(value, offset_mask, *settings):
    if torch.is_grad_enabled() and (value.requires_grad or offset_mask.requires_grad):
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return _Differentiable.apply(value, offset_mask, *settings)
        return _Differentiable.apply(value, offset_mask, *settings)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(value, offset_mask, *settings)


_library.impl("forward", _autograd_kernel, "Autograd")


def _fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dimension of `tensor` folded into its batch."""
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


@torch.library.register_vmap("dcnv4_ext::forward", lib=_library)
def _forward_vmap(info, dims, value, offset_mask, *settings):
    size = info.batch_size
    output = _forward(_fold(value, dims[0], size), _fold(offset_mask, dims[1], size), *settings)
    return output.unflatten(0, (size, -1)), 0


@torch.library.register_vmap("dcnv4_ext::backward", lib=_library)
def _backward_vmap(info, dims, value, offset_mask, grad_output, *settings):
    size = info.batch_size
    folded = [_fold(t, dim, size) for t, dim in zip((value, offset_mask, grad_output), dims, strict=False)]
    gradients = _backward(*folded, *settings)
    # A gradient nobody needs is an empty tensor and has no batch to unfold.
    needed = settings[-1]
    unfolded = tuple(g.unflatten(0, (size, -1)) if n else g for g, n in zip(gradients, needed, strict=True))
    return unfolded, tuple(0 if n else None for n in needed)


def _register_autocast(device: str) -> None:
    """Both inputs go to the autocast dtype; sums stay in fp32 inside the kernels."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))
    device_type = device.lower()

    def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    def kernel(value, offset_mask, *settings):
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return _forward(cast(value, dtype), cast(offset_mask, dtype), *settings)

    _library.impl("forward", kernel, f"Autocast{device}")


_register_autocast("CPU")
_register_autocast("CUDA")


def operations(output_elements: int, taps: int) -> tuple[int, int]:
    """Floating-point operations of (forward, backward) for so many output elements: a multiply-add counts as two.

    Forward: 4 corners a tap. Backward: 4 dot products and 4 scattered products a tap. The position arithmetic is done once
    a group and left out.
    """
    return 8 * taps * output_elements, 16 * taps * output_elements


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    @register_flop_formula(torch.ops.dcnv4_ext.forward)
    def _(value, offset_mask, kernel_size, *settings, out_shape=None, **_):
        n, ho, wo, c = out_shape
        return operations(n * ho * wo * c, kernel_size[0] * kernel_size[1] - int(settings[5]))[0]

    @register_flop_formula(torch.ops.dcnv4_ext.backward)
    def _(value, offset_mask, grad_output, kernel_size, *settings, out_shape=None, **_):
        n, ho, wo, c = grad_output
        return operations(n * ho * wo * c, kernel_size[0] * kernel_size[1] - int(settings[5]))[1]


_register_flops()
