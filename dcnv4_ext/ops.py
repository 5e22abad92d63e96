"""The operator in torch: schemas, shapes, gradients, autocast.

Path of a call: functional.dcnv4 (checks) -> ops (this file: torch.ops.dcnv4_ext.forward) -> native (pointers) -> csrc, or where
there are no kernels for a device, fallback (torch's own operators).
Where nobody but autograd would see the operator go by, `direct` takes the place of torch.ops.dcnv4_ext.forward.

AOTInductor packages hold a call of torch.ops.dcnv4_ext.forward. The kernels behind it are registered from Python, so a package
loads in Python processes that import dcnv4_ext, and not in a C++ program without Python ("Could not find schema").
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler
from torch.compiler import is_dynamo_compiling

from . import fallback, native
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


class _Call(NamedTuple):
    """A checked call: what the kernel is told, the shape of the output, the bytes that each input must have behind it, whether
    an input must be copied first, because its pixels do not stand a constant number of elements apart, and for inputs that may be
    the columns of one tensor what the kernel is told to leave gradients so."""

    problem: native.Problem
    output_shape: tuple[int, int, int, int]
    bytes: tuple[int, ...]
    scattered: bool
    columns: native.Problem | None


# Calls repeat: a network makes the same few over and over. Checks and the struct are paid for once. A dict that forgets all when
# it is full costs less to ask than lru_cache, and a new call is checked with its tensors at hand.
_calls: dict[tuple, _Call] = {}
_MOST_CALLS = 4096
# Bound here, as others below, because every call asks them.
_deterministic = getattr(
    torch._C, "_get_deterministic_algorithms", torch.are_deterministic_algorithms_enabled
)
_threads = torch.get_num_threads


def _check(value, offset_mask, grad_output, settings, deterministic: bool, threads: int) -> _Call:
    kernel_size, stride, padding, dilation, groups, scale, remove_center, softmax = settings
    native.check_dtype("value", value.dtype)
    native.check_dtype("offset_mask", offset_mask.dtype)
    geometry = Geometry.of(kernel_size, stride, padding, dilation, remove_center)
    shape = output_shape(value, offset_mask, geometry, groups, scale)
    tensors = [value, offset_mask]
    if grad_output is not None:
        check_grad_output(grad_output, shape, value)
        tensors.append(grad_output)
    strides = [native.pixel_stride(tensor.shape, tensor.stride()) for tensor in tensors]
    problem = native.problem(
        geometry, groups, scale, softmax, value.dtype, value.shape, offset_mask.shape, shape,
        value_stride=strides[0], offset_mask_stride=strides[1],
        output_stride=shape[3] if grad_output is None else strides[2],
        deterministic=deterministic, threads=threads, device=value.device.index or 0,
    )  # fmt: skip
    sizes = [native.extent(tensor.shape, tensor.stride(), tensor.itemsize) for tensor in tensors]
    columns = None
    if (
        strides[0] == strides[1] == value.shape[3] + offset_mask.shape[3]
        and value.shape[:3] == offset_mask.shape[:3]
    ):
        columns = native.Problem.from_buffer_copy(problem)
        columns.grad_value_stride = columns.grad_offset_mask_stride = strides[0]
    return _Call(problem, shape, tuple(sizes), not all(map(native.has_rows, tensors)), columns)


def _prepare(value, offset_mask, grad_output, settings) -> _Call:
    """The checked call; there are no lists among the settings. Also checks the memory, which may go from under a tensor at any time."""
    deterministic, threads = _deterministic(), _threads()
    key = (
        value.shape, value.stride(), value.dtype, value.device,
        offset_mask.shape, offset_mask.stride(), offset_mask.dtype, offset_mask.device,
        tuple(settings), deterministic, threads,
    )  # fmt: skip
    if grad_output is not None:
        key += (grad_output.shape, grad_output.stride(), grad_output.dtype, grad_output.device)
    call = _calls.get(key)
    if call is None:
        call = _check(value, offset_mask, grad_output, settings, deterministic, threads)
        if len(_calls) >= _MOST_CALLS:
            _calls.clear()
        _calls[key] = call
    native.check_memory("value", value, call.bytes[0])
    native.check_memory("offset_mask", offset_mask, call.bytes[1])
    if grad_output is not None:
        native.check_memory("grad_output", grad_output, call.bytes[2])
    return call


def _forward(value, offset_mask, settings):
    problem, shape, _, scattered, _ = _prepare(value, offset_mask, None, settings)
    if scattered:
        return _forward(native.rows(value), native.rows(offset_mask), settings)
    output = value.new_empty(*shape)
    if shape[0] > 0:
        native.forward(problem, value, offset_mask, output)
    return output


def _backward(value, offset_mask, grad_output, settings, needed, *, as_columns=False):
    """The gradients that are needed, contiguous. With `as_columns` those of inputs that are columns of one tensor may be so too."""
    problem, shape, _, scattered, columns = _prepare(value, offset_mask, grad_output, settings)
    if scattered:
        return _backward(*map(native.rows, (value, offset_mask, grad_output)), settings, needed)
    if as_columns and columns is not None and all(needed):
        problem = columns
        both = value.new_empty(*value.shape[:3], columns.grad_value_stride)
        grad_value, grad_offset_mask = both.split((value.shape[3], offset_mask.shape[3]), 3)
    else:
        dense = torch.contiguous_format
        grad_value = torch.empty_like(value, memory_format=dense) if needed[0] else None
        grad_offset_mask = torch.empty_like(offset_mask, memory_format=dense) if needed[1] else None
    if shape[0] > 0:
        native.backward(problem, value, offset_mask, grad_output, grad_value, grad_offset_mask)
    return grad_value, grad_offset_mask


def side_by_side(first, second) -> bool:
    """Whether two tensors with four dimensions are the columns of one, as `_backward` leaves the gradients of such."""
    return (
        first.shape[:3] == second.shape[:3]
        and first.stride() == second.stride()
        and first.stride(2) == first.shape[3] + second.shape[3]
        and native.has_rows(first)
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.storage_offset() + first.shape[3] == second.storage_offset()
    )


def _without_lists(settings) -> tuple:
    """The settings as torch's dispatcher hands them over, so that they can be looked up."""
    kernel_size, stride, padding, dilation, *others = settings
    return tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), *others


def _forward_kernel(value, offset_mask, *settings):
    return _forward(value, offset_mask, _without_lists(settings))


def _backward_kernel(value, offset_mask, grad_output, *settings):
    *settings, needed = settings
    _check_needed(needed)
    gradients = _backward(value, offset_mask, grad_output, _without_lists(settings), needed)
    return tuple(value.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _fallback_arguments(value, offset_mask, grad_output, settings) -> tuple:
    """Of a checked call, what `fallback` is told."""
    native.check_dtype("value", value.dtype)
    shape = _shape(value, offset_mask, settings)
    if grad_output is not None:
        check_grad_output(grad_output, shape, value)
    *geometry, groups, scale, remove_center, softmax = _without_lists(settings)
    return Geometry.of(*geometry, remove_center), groups, scale, softmax


def _forward_fallback(value, offset_mask, *settings):
    return fallback.forward(value, offset_mask, *_fallback_arguments(value, offset_mask, None, settings))


def _backward_fallback(value, offset_mask, grad_output, *settings):
    *settings, needed = settings
    _check_needed(needed)
    arguments = _fallback_arguments(value, offset_mask, grad_output, settings)
    gradients = fallback.backward(value, offset_mask, grad_output, *arguments, needed)
    return tuple(value.new_empty(0) if gradient is None else gradient for gradient in gradients)


# torch's name of AMD's GPUs is "cuda" too.
_WITH_KERNELS = ("CPU",) if torch.version.hip else ("CPU", "CUDA")
_WITHOUT = ("MPS", "XPU", "PrivateUse1", *(("CUDA",) if torch.version.hip else ()))
for _devices, _kernels in (
    (_WITH_KERNELS, (_forward_kernel, _backward_kernel)),
    (_WITHOUT, (_forward_fallback, _backward_fallback)),
):
    for _device in _devices:
        _library.impl("forward", _kernels[0], _device)
        _library.impl("backward", _kernels[1], _device)


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
backward = torch.ops.dcnv4_ext.backward.default


# What torch may change without a word. Where one of these is missing, every call goes by its dispatcher, and gradients by
# torch.library.register_autograd: a call with gradients costs twice as much, and torch.func cannot differentiate it, and says so.
_QUESTIONS = (
    "_dispatch_tls_local_include_set", "_dispatch_tls_local_exclude_set", "_dispatch_keys", "_is_any_autocast_enabled",
    "_is_torch_function_mode_enabled", "_autograd._profiler_enabled",
)  # fmt: skip
_ASSUMED = (
    "_C.DispatchKey", "_C.DispatchKeySet.raw_repr", "_C._AutoDispatchBelowAutograd", "_C._ExcludeDispatchKeyGuard",
    "_C._are_functorch_transforms_active", "autograd.forward_ad._current_level", "autograd.forward_ad._set_fwd_grad_enabled",
    "autograd.profiler._is_profiler_enabled",
)  # fmt: skip
try:
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd.function import _SingleLevelFunction

    _included, _excluded, _keys_of, _autocast, _function_mode, _profiler_enabled = attrgetter(*_QUESTIONS)(
        torch._C
    )
    attrgetter(*_ASSUMED)(torch)
    _answers = True
except (ImportError, AttributeError):
    _SingleLevelFunction = torch.autograd.Function
    _answers = False
_FAMILIAR = _answers


def _keys(*names: str) -> int:
    """The set of these dispatch keys, as torch writes it in one number."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return keys.raw_repr()


# The state in which nothing stands between the Autograd key and the kernels: ordinary dense tensors, no mode, no transform, no
# tracing. The dispatcher's rounds, which would find just that, are then left out: they are more than half of a small call.
_ORDINARY_CLASSES = frozenset((Tensor, torch.nn.Parameter))
if _FAMILIAR:
    _ORDINARY_TENSORS = frozenset(
        _keys(device, "ADInplaceOrView", f"Autograd{device}", f"Autocast{device}") for device in _WITH_KERNELS
    )
    _INFERENCE_TENSORS = frozenset(_keys(device, f"Autocast{device}") for device in _WITH_KERNELS)
    # The tensors that are ordinary in a state: outside of inference mode, and in it, where nothing is recorded of either kind.
    _ORDINARY_STATES = {
        _keys("BackendSelect", "ADInplaceOrView"): _ORDINARY_TENSORS,
        _keys("BackendSelect"): _ORDINARY_TENSORS | _INFERENCE_TENSORS,
    }
    _AUTOGRAD = _keys("AutogradCPU") & ~_keys("CPU")  # whatever the device


def plain(*tensors: Tensor) -> bool:
    """Whether the dispatcher would find nothing between autograd and the kernels of these tensors; profilers and autocast aside."""
    ordinary = _ORDINARY_STATES.get(_included().raw_repr()) if _answers else None
    if ordinary is None:
        return False
    for tensor in tensors:
        if type(tensor) not in _ORDINARY_CLASSES or _keys_of(tensor).raw_repr() not in ordinary:
            return False
    return True


def _ordinary(*tensors: Tensor) -> bool:
    # Profilers list what the dispatcher calls: one of this thread, or one of all threads. Whether an ExecutionTraceObserver runs
    # without a profiler, nobody can tell.
    return plain(*tensors) and not (_profiler_enabled() or profiler._is_profiler_enabled)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """What autocast makes of a tensor that is `plain` where an operator of its list takes it."""
    if not _autocast() or tensor.dtype is torch.float64:
        return tensor.dtype
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def unwatched(value, offset_mask) -> bool:
    """Whether the dispatcher would find autograd and the kernels in a call's way and nothing else, or autocast with nothing to do:
    `direct` does the same then."""
    return (
        _ordinary(value, offset_mask)
        and (not _autocast() or autocast_dtype(value) is value.dtype is offset_mask.dtype)
        and not _function_mode()
        and forward_ad._current_level < 0
    )


def direct(value, offset_mask, settings):
    """What `forward` computes, for tensors that are `unwatched`."""
    wanted = torch.is_grad_enabled() and (value.requires_grad or offset_mask.requires_grad)
    # Within an operator that has its own gradients autograd is left out.
    if wanted and not _excluded().raw_repr() & _AUTOGRAD:
        return _Differentiable.apply(value, offset_mask, settings, _forward)
    return _forward(value, offset_mask, settings)


def _below_autograd(value, offset_mask, settings):
    with torch._C._AutoDispatchBelowAutograd():
        if _ordinary(value, offset_mask):
            return _forward(value, offset_mask, settings)
        return forward(value, offset_mask, *settings)


@contextmanager
def _other_levels_differentiate():
    """Nested transforms of torch.func dispatch to the next one from within autograd.Function.forward, where autograd has switched
    gradients off, for that next level too: its derivative would silently be zero."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


class _Function(_SingleLevelFunction):
    """The plain class below autograd.Function: Function.apply would start the dispatch of torch.func's transforms anew, which has
    happened already when a kernel under the Autograd key runs."""

    @staticmethod
    def _compiled_autograd_key(ctx):
        """autograd.Function's. What compiled autograd traces is looked up by it; torch.compile guards the settings and the rest."""
        return (ctx._autograd_function_id,)


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


def _below_autograd_of_one_level(value, offset_mask, settings):
    with _other_levels_differentiate():
        return _below_autograd(value, offset_mask, settings)


class _Differentiable(_Function):
    """`run(value, offset_mask, settings)`, which knows nothing of gradients, with gradients."""

    @staticmethod
    def forward(ctx, value, offset_mask, settings, run):
        ctx.settings = settings
        ctx.save_for_backward(value, offset_mask)
        return run(value, offset_mask, settings)

    @staticmethod
    def backward(ctx, grad_output):
        value, offset_mask = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        # Only with create_graph=True does autograd run backward with gradients enabled.
        only_once = not torch.is_grad_enabled() and forward_ad._current_level < 0
        if only_once and not is_dynamo_compiling() and _ordinary(value, offset_mask, grad_output):
            return (
                *_backward(value, offset_mask, grad_output, ctx.settings, needed, as_columns=True),
                None,
                None,
            )
        grad_value, grad_offset_mask = backward(value, offset_mask, grad_output, *ctx.settings, needed)
        return grad_value if needed[0] else None, grad_offset_mask if needed[1] else None, None, None


class _DifferentiableOnce(_Function):
    """The gradients, whose own gradients are an error where somebody asks for them."""

    @staticmethod
    def forward(ctx, value, offset_mask, grad_output, settings):
        with _other_levels_differentiate(), torch._C._AutoDispatchBelowAutograd():
            return backward(value, offset_mask, grad_output, *settings)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(
            "dcnv4 can be differentiated once: there are no gradients of its gradients (dcnv4_reference has them)"
        )


# A kernel under the Autograd key costs half of what torch.library.register_autograd does in a call with gradients.
def _autograd_kernel(value, offset_mask, *settings):
    settings = _without_lists(settings)
    if forward_ad._current_level >= 0:
        _refuse_tangents(value, offset_mask)
    if torch.is_grad_enabled() and (value.requires_grad or offset_mask.requires_grad):
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return _Differentiable.apply(value, offset_mask, settings, _below_autograd_of_one_level)
        return _Differentiable.apply(value, offset_mask, settings, _below_autograd)
    return _below_autograd(value, offset_mask, settings)


def _backward_autograd_kernel(value, offset_mask, grad_output, *settings):
    tensors = value, offset_mask, grad_output
    if forward_ad._current_level >= 0:
        _refuse_tangents(*tensors)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        with enable_single_level_autograd_function():
            return _DifferentiableOnce.apply(*tensors, settings)
    with torch._C._AutoDispatchBelowAutograd():
        return backward(*tensors, *settings)


def _keep(ctx, inputs, output):
    value, offset_mask, *ctx.settings = inputs
    ctx.save_for_backward(value, offset_mask)


def _gradients(ctx, grad_output):
    needed = ctx.needs_input_grad[:2]
    gradients = backward(*ctx.saved_tensors, grad_output, *ctx.settings, needed)
    return *(g if n else None for g, n in zip(gradients, needed, strict=True)), *[None] * len(ctx.settings)


if _FAMILIAR:
    _library.impl("forward", _autograd_kernel, "Autograd")
    _library.impl("backward", _backward_autograd_kernel, "Autograd")
else:
    torch.library.register_autograd("dcnv4_ext::forward", _gradients, setup_context=_keep, lib=_library)
    torch.library.register_autograd("dcnv4_ext::backward", _DifferentiableOnce.backward, lib=_library)


def _fold(name: str, tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dimension of `tensor` folded into its batch."""
    if tensor.dim() != 4 + (dim is not None):
        shape = [length for axis, length in enumerate(tensor.shape) if axis != dim]
        raise ValueError(f"{name} must have 4 dimensions, got shape {tuple(shape)}")
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


def _images(tensor: Tensor, dim: int | None) -> int:
    """N of one of the mapped calls, which does not follow from the folded batch where there are none of them."""
    return tensor.shape[1 if dim == 0 else 0]


@torch.library.register_vmap("dcnv4_ext::forward", lib=_library)
def _forward_vmap(info, dims, value, offset_mask, *settings):
    size = info.batch_size
    folded = _fold("value", value, dims[0], size), _fold("offset_mask", offset_mask, dims[1], size)
    return forward(*folded, *settings).unflatten(0, (size, _images(value, dims[0]))), 0


@torch.library.register_vmap("dcnv4_ext::backward", lib=_library)
def _backward_vmap(info, dims, value, offset_mask, grad_output, *settings):
    size = info.batch_size
    tensors = {"value": value, "offset_mask": offset_mask, "grad_output": grad_output}
    folded = [_fold(*named, dim, size) for named, dim in zip(tensors.items(), dims, strict=False)]
    gradients = backward(*folded, *settings)
    # A gradient nobody needs is an empty tensor and has no batch to unfold.
    needed, batch = settings[-1], (size, _images(value, dims[0]))
    unfolded = tuple(g.unflatten(0, batch) if n else g for g, n in zip(gradients, needed, strict=True))
    return unfolded, tuple(0 if n else None for n in needed)


def _register_autocast(device: str) -> None:
    """Both inputs go to the autocast dtype; sums stay in fp32 inside the kernels."""
    device_type = device.lower()
    if _FAMILIAR:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))
        done = partial(torch._C._ExcludeDispatchKeyGuard, keys)
    else:
        done = partial(torch.autocast, device_type, enabled=False)

    def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    def kernel(value, offset_mask, *settings):
        if (value.dtype == torch.float64) != (offset_mask.dtype == torch.float64):
            raise TypeError(
                f"value is {value.dtype} and offset_mask is {offset_mask.dtype}; autocast leaves float64 alone: cast one"
            )
        dtype = torch.get_autocast_dtype(device_type)
        with done():
            return forward(cast(value, dtype), cast(offset_mask, dtype), *settings)

    _library.impl("forward", kernel, f"Autocast{device}")


for _device in ("CPU", "CUDA", "MPS", "XPU"):
    _register_autocast(_device)


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
