"""The operator in torch: schemas, shapes, gradients, autocast.

Path of a call: functional.dcnv4 (checks) -> ops (this file: torch.ops.dcnv4_ext.forward) -> native (pointers) -> csrc.

AOTInductor packages hold a call of torch.ops.dcnv4_ext.forward. The kernels behind it are registered from Python, so a package
loads in Python processes that import dcnv4_ext, and not in a C++ program without Python ("Could not find schema").
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from . import native
from .geometry import MOST, Geometry

_ARGUMENTS = (
    "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups, float offset_scale, "
    "bool remove_center, bool softmax"
)
_library = torch.library.Library("dcnv4_ext", "DEF")
_library.define(f"forward(Tensor value, Tensor offset_mask, {_ARGUMENTS}) -> Tensor")
_library.define(
    f"backward(Tensor value, Tensor offset_mask, Tensor grad_output, {_ARGUMENTS}, bool[2] needed) -> (Tensor, Tensor)"
)


def output_shape(
    value, offset_mask, geometry: Geometry, groups: int, offset_scale: float
) -> tuple[int, int, int, int]:
    """(N, Ho, Wo, C) of a valid call, or an error that names the argument. Nothing unchecked reaches a kernel.

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
    if (h + 4) * (w + 2) > MOST:
        raise ValueError(
            f"value has a {h}x{w} map; kernels number its cells and a border in 32 bits: use smaller ones"
        )
    if not math.isfinite(offset_scale):
        raise ValueError(f"offset_scale must be finite, got {offset_scale}")
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


def check_grad_output(grad_output, shape: tuple[int, ...], value) -> None:
    """Backward's third tensor is what forward gave, or an error that says so."""
    if (
        tuple(grad_output.shape) != shape
        or grad_output.dtype != value.dtype
        or grad_output.device != value.device
    ):
        raise ValueError(
            f"grad_output must be {shape} {value.dtype} on {value.device}, got {tuple(grad_output.shape)} "
            f"{grad_output.dtype} on {grad_output.device}"
        )


def _check_needed(needed: list[bool]) -> None:
    if len(needed) != 2:
        raise ValueError(f"needed must be two bools, for value and offset_mask; got {needed}")


class _Description(NamedTuple):
    """What a call needs to know of a tensor, hashable."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def bytes(self) -> int:
        return native.extent(self.shape, self.strides, self.dtype.itemsize)

    def pixel_stride(self) -> int:
        return native.pixel_stride(self.shape, self.strides)


class _Call(NamedTuple):
    """A checked call: what the kernel is told, the shape of the output, and the bytes that each input must have behind it."""

    problem: native.Problem
    output_shape: tuple[int, int, int, int]
    bytes: tuple[int, ...]


# Calls repeat: a network makes the same few over and over. Checks and the struct are paid for once. Tensors come as the fields of
# a _Description: a plain tuple is made in half the time.
@lru_cache(maxsize=4096)
def _call(
    value, offset_mask, grad_output, kernel_size, stride, padding, dilation, groups, scale, remove_center, softmax,
    deterministic, threads,
) -> _Call:  # fmt: skip
    value, offset_mask = _Description(*value), _Description(*offset_mask)
    geometry = Geometry.of(kernel_size, stride, padding, dilation, remove_center)
    shape = output_shape(value, offset_mask, geometry, groups, scale)
    sizes = [value.bytes(), offset_mask.bytes()]
    output_stride = shape[3]
    if grad_output is not None:
        grad_output = _Description(*grad_output)
        check_grad_output(grad_output, shape, value)
        sizes.append(grad_output.bytes())
        output_stride = grad_output.pixel_stride()
    problem = native.problem(
        geometry, groups, scale, softmax, value.dtype, value.shape, offset_mask.shape, shape,
        value_stride=value.pixel_stride(), offset_mask_stride=offset_mask.pixel_stride(), output_stride=output_stride,
        deterministic=deterministic, threads=threads, device=value.device.index or 0,
    )  # fmt: skip
    return _Call(problem, shape, tuple(sizes))


def _prepare(value, offset_mask, grad_output, settings) -> _Call:
    kernel_size, stride, padding, dilation, *others = settings
    call = _call(
        (value.shape, value.stride(), value.dtype, value.device),
        (offset_mask.shape, offset_mask.stride(), offset_mask.dtype, offset_mask.device),
        None if grad_output is None
        else (grad_output.shape, grad_output.stride(), grad_output.dtype, grad_output.device),
        tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), *others,
        torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(),
    )  # fmt: skip
    native.check_memory("value", value, call.bytes[0])
    native.check_memory("offset_mask", offset_mask, call.bytes[1])
    if grad_output is not None:
        native.check_memory("grad_output", grad_output, call.bytes[2])
    return call


def _forward_kernel(value, offset_mask, *settings):
    value, offset_mask = native.rows(value), native.rows(offset_mask, "offset_mask")
    call = _prepare(value, offset_mask, None, settings)
    output = value.new_empty(*call.output_shape)
    if call.output_shape[0] > 0:
        native.forward(call.problem, value, offset_mask, output)
    return output


def _backward_kernel(value, offset_mask, grad_output, *settings):
    *settings, needed = settings
    _check_needed(needed)
    value, offset_mask = native.rows(value), native.rows(offset_mask, "offset_mask")
    grad_output = native.rows(grad_output, "grad_output")
    call = _prepare(value, offset_mask, grad_output, settings)
    grad_value = value.new_empty(*value.shape) if needed[0] else value.new_empty(0)
    grad_offset_mask = offset_mask.new_empty(*offset_mask.shape) if needed[1] else offset_mask.new_empty(0)
    if call.output_shape[0] > 0:
        native.backward(
            call.problem, value, offset_mask, grad_output,
            grad_value if needed[0] else None, grad_offset_mask if needed[1] else None,
        )  # fmt: skip
    return grad_value, grad_offset_mask


for _device in ("CPU", "CUDA"):
    _library.impl("forward", _forward_kernel, _device)
    _library.impl("backward", _backward_kernel, _device)


def _shape(value, offset_mask, settings) -> tuple[int, int, int, int]:
    kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, _ = settings
    geometry = Geometry.of(tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), remove_center)
    return output_shape(value, offset_mask, geometry, groups, offset_scale)


@torch.library.register_fake("dcnv4_ext::forward", lib=_library)
def _forward_shape(value, offset_mask, *settings):
    return value.new_empty(_shape(value, offset_mask, settings))


# Checks as the kernel does: torch calls this one too where one tensor of several is on the meta device.
@torch.library.register_fake("dcnv4_ext::backward", lib=_library)
def _backward_shape(value, offset_mask, grad_output, *settings):
    *settings, needed = settings
    _check_needed(needed)
    check_grad_output(grad_output, _shape(value, offset_mask, settings), value)
    return (
        value.new_empty(value.shape if needed[0] else (0,)),
        offset_mask.new_empty(offset_mask.shape if needed[1] else (0,)),
    )


forward = torch.ops.dcnv4_ext.forward.default
_backward = torch.ops.dcnv4_ext.backward.default


def _keys(*names: str) -> int:
    """The set of these dispatch keys, as torch writes it in one number."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return keys.raw_repr()


# The state in which nothing stands between the Autograd key and the kernels: ordinary dense tensors, no mode, no transform, no
# tracing. The dispatcher's second round, which would find just that, is then left out: it is a quarter of a small call.
_ORDINARY_STATE = _keys("BackendSelect", "ADInplaceOrView")
_ORDINARY_TENSORS = frozenset(
    _keys(device, "ADInplaceOrView", f"Autograd{device}", f"Autocast{device}") for device in ("CPU", "CUDA")
)


def _ordinary(*tensors: Tensor) -> bool:
    if torch._C._dispatch_tls_local_include_set().raw_repr() != _ORDINARY_STATE:
        return False
    return all(torch._C._dispatch_keys(tensor).raw_repr() in _ORDINARY_TENSORS for tensor in tensors)


def _below_autograd(value, offset_mask, settings):
    with torch._C._AutoDispatchBelowAutograd():
        if _ordinary(value, offset_mask):
            return _forward_kernel(value, offset_mask, *settings)
        return forward(value, offset_mask, *settings)


@contextmanager
def _other_levels_differentiate():
    """Nested transforms of torch.func dispatch to the next one from within autograd.Function.forward, where autograd has switched
    gradients off, for that next level too: its derivative would silently be zero."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


# The plain class below autograd.Function: Function.apply would start the dispatch of torch.func's transforms anew, which has
# happened already when a kernel under the Autograd key runs.
_Function = torch.autograd.function._SingleLevelFunction


class _NoTangents(_Function):
    """Asks autograd whether a tensor carries a tangent: nobody else can tell under every transform."""

    @staticmethod
    def forward(ctx, *tensors):
        return tensors[0].view_as(tensors[0])

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(
            "dcnv4 has no forward-mode derivative (torch.func.jvp, jacfwd, hessian); use reverse mode: torch.func.vjp, jacrev"
        )


def _refuse_tangents(*tensors: Tensor) -> None:
    """Kernels below autograd would drop them, and the derivative would be zero."""
    with enable_single_level_autograd_function():
        _NoTangents.apply(*tensors)


class _Differentiable(_Function):
    @staticmethod
    def forward(ctx, value, offset_mask, settings):
        ctx.settings = settings
        ctx.save_for_backward(value, offset_mask)
        if not torch._C._are_functorch_transforms_active():
            return _below_autograd(value, offset_mask, settings)
        with _other_levels_differentiate():
            return _below_autograd(value, offset_mask, settings)

    @staticmethod
    def backward(ctx, grad_output):
        value, offset_mask = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        # Only with create_graph=True does autograd run backward with gradients enabled.
        plain = not torch.is_grad_enabled() and forward_ad._current_level < 0
        run = _backward_kernel if plain and _ordinary(value, offset_mask, grad_output) else _backward
        grad_value, grad_offset_mask = run(value, offset_mask, grad_output, *ctx.settings, needed)
        return grad_value if needed[0] else None, grad_offset_mask if needed[1] else None, None


class _DifferentiableOnce(_Function):
    """The gradients, whose own gradients are an error where somebody asks for them."""

    @staticmethod
    def forward(ctx, value, offset_mask, grad_output, settings):
        with _other_levels_differentiate(), torch._C._AutoDispatchBelowAutograd():
            return _backward(value, offset_mask, grad_output, *settings)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(
            "dcnv4 can be differentiated once: there are no gradients of its gradients (dcnv4_reference has them)"
        )


# A kernel under the Autograd key costs half of what torch.library.register_autograd does in a call with gradients.
def _autograd_kernel(value, offset_mask, *settings):
    if forward_ad._current_level >= 0:
        _refuse_tangents(value, offset_mask)
    if torch.is_grad_enabled() and (value.requires_grad or offset_mask.requires_grad):
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return _Differentiable.apply(value, offset_mask, settings)
        return _Differentiable.apply(value, offset_mask, settings)
    return _below_autograd(value, offset_mask, settings)


def _backward_autograd_kernel(value, offset_mask, grad_output, *settings):
    tensors = value, offset_mask, grad_output
    if forward_ad._current_level >= 0:
        _refuse_tangents(*tensors)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        with enable_single_level_autograd_function():
            return _DifferentiableOnce.apply(*tensors, settings)
    with torch._C._AutoDispatchBelowAutograd():
        return _backward(*tensors, *settings)


_library.impl("forward", _autograd_kernel, "Autograd")
_library.impl("backward", _backward_autograd_kernel, "Autograd")


def _fold(name: str, tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dimension of `tensor` folded into its batch."""
    if tensor.dim() != 4 + (dim is not None):
        shape = [length for axis, length in enumerate(tensor.shape) if axis != dim]
        raise ValueError(f"{name} must have 4 dimensions, got shape {tuple(shape)}")
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


@torch.library.register_vmap("dcnv4_ext::forward", lib=_library)
def _forward_vmap(info, dims, value, offset_mask, *settings):
    size = info.batch_size
    value, offset_mask = (
        _fold("value", value, dims[0], size),
        _fold("offset_mask", offset_mask, dims[1], size),
    )
    output = forward(value, offset_mask, *settings)
    return output.unflatten(0, (size, -1)), 0


@torch.library.register_vmap("dcnv4_ext::backward", lib=_library)
def _backward_vmap(info, dims, value, offset_mask, grad_output, *settings):
    size = info.batch_size
    tensors = {"value": value, "offset_mask": offset_mask, "grad_output": grad_output}
    folded = [_fold(*named, dim, size) for named, dim in zip(tensors.items(), dims, strict=False)]
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
        if (value.dtype == torch.float64) != (offset_mask.dtype == torch.float64):
            raise TypeError(
                f"value is {value.dtype} and offset_mask is {offset_mask.dtype}; autocast leaves float64 alone: cast one"
            )
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return forward(cast(value, dtype), cast(offset_mask, dtype), *settings)

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
