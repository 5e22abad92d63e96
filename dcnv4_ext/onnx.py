"""ONNX: the operator in standard operators, with GridSample in the middle.

    torch.onnx.export(module, (x,), "layer.onnx", dynamo=True, opset_version=20,
                      custom_translation_table=dcnv4_ext.onnx.translation_table())

    dcnv4_ext.onnx.register_symbolic()  # once, where dynamo=False is given to torch.onnx.export, as Ultralytics does; opset 16 or later

onnxruntime runs it without a plugin; no other runtime was tried. GridSample's normalised coordinates round positions, so results
equal the kernels' to about 1e-5, and a NaN offset, which the kernels leave out, gives NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .geometry import Geometry


def translation_table() -> dict[Any, Callable]:
    """For `torch.onnx.export(..., dynamo=True, custom_translation_table=...)`. Needs onnxscript."""
    from . import ops as _ops  # noqa: F401  registers torch.ops.dcnv4_ext

    try:
        from onnxscript import opset20
    except ImportError as error:
        raise ImportError("exporting to ONNX needs onnxscript: pip install onnxscript") from error
    return {torch.ops.dcnv4_ext.forward.default: _translation(opset20, "linear")}


def register_symbolic() -> None:
    """Teach the exporter through TorchScript (`torch.onnx.export(..., dynamo=False)`) the operator, for this process."""
    from torch.onnx import symbolic_helper

    @symbolic_helper.parse_args("v", "v", "is", "is", "is", "is", "i", "f", "b", "b")
    def forward(
        g, value, offset_mask, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, softmax
    ):  # fmt: skip
        translate = _translation(_TorchScript(g), "linear" if g.opset >= 20 else "bilinear")
        settings = kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, softmax
        return translate(value, offset_mask, *settings)

    torch.onnx.register_custom_op_symbolic("dcnv4_ext::forward", forward, 16)


class _TorchScript:
    """onnxscript's way of writing operators, for a graph of the exporter through TorchScript."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def Constant(self, **attribute: Any) -> Any:
        """`value_ints` or `value_floats`, which that exporter does not know of, as a tensor."""
        return self._graph.op("Constant", value_t=torch.tensor(*attribute.values()))

    def Shape(self, tensor: Any, start: int, end: int) -> Any:
        """That exporter takes a part of a shape for the whole, and the process may end for it."""
        places = [self.Constant(value_ints=[place]) for place in (start, end, 0)]
        return self._graph.op("Slice", self._graph.op("Shape", tensor), *places)

    def __getattr__(self, name: str) -> Callable:
        def operator(*inputs: Any, **attributes: Any) -> Any:
            # It wants types in the names: mode_s, axis_i, perm_i for a list.
            typed = {f"{key}_{'s' if type(a) is str else 'i'}": a for key, a in attributes.items()}
            return self._graph.op(name, *inputs, **typed)

        return operator


def _translation(op: Any, linear: str) -> Callable:
    """The operator written by `op`; `linear` is what its opset calls GridSample's mode."""

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    def floats(values: list[float]) -> Any:
        return op.Constant(value_floats=values)

    def forward(
        value,
        offset_mask,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        offset_scale,
        remove_center,
        softmax,
    ):  # (N, H, W, C), (N, Ho, Wo, P) -> (N, Ho, Wo, C)
        geometry = Geometry.of(
            tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), remove_center
        )
        g, k = groups, geometry.taps
        centers = [
            d * (size - 1) // 2 for d, size in zip(geometry.dilation, geometry.kernel_size, strict=True)
        ]
        taps = [
            (float(i * geometry.dilation[1] - centers[1]), float(j * geometry.dilation[0] - centers[0]))
            for i in range(geometry.kernel_size[1])
            for j in range(geometry.kernel_size[0])
            if not (remove_center and (i, j) == (geometry.kernel_size[1] // 2, geometry.kernel_size[0] // 2))
        ]
        zero, one = ints(0), ints(1)

        def size(tensor: Any, axis: int) -> Any:  # (1,) int64
            return op.Shape(tensor, start=axis, end=axis + 1)

        def join(*parts: Any) -> Any:
            return op.Concat(*parts, axis=0)

        n, h, w, c = (size(value, axis) for axis in range(4))
        ho, wo = size(offset_mask, 1), size(offset_mask, 2)
        positions = op.Mul(ho, wo)
        maps = op.Mul(n, ints(g))  # N * G

        used = op.Slice(offset_mask, zero, ints(3 * g * k), ints(3))
        used = op.Reshape(used, join(n, ho, wo, ints(g, 3 * k)))
        used = op.Cast(op.Transpose(used, perm=[0, 3, 1, 2, 4]), to=1)  # (N, G, Ho, Wo, 3K) float
        offsets = op.Reshape(op.Slice(used, zero, ints(2 * k), ints(4)), join(n, ints(g), ho, wo, ints(k, 2)))
        weights = op.Slice(used, ints(2 * k), ints(3 * k), ints(4))  # (N, G, Ho, Wo, K)
        if softmax:
            weights = op.Softmax(weights, axis=-1)

        def along(count: Any, axis: int) -> Any:
            """Positions of the kernel's centre along rows (0) or columns (1), as floats."""
            steps = op.Range(*(op.Squeeze(number, zero) for number in (zero, count, one)))
            first = float(centers[axis] - geometry.padding[axis])
            return op.Add(
                op.Mul(op.Cast(steps, to=1), floats([float(geometry.stride[axis])])), floats([first])
            )

        base_x = op.Reshape(along(wo, 1), join(ints(1, 1, 1), wo, ints(1)))
        base_y = op.Reshape(along(ho, 0), join(ints(1, 1), ho, ints(1, 1)))
        scale = floats([float(offset_scale)])

        def coordinate(base: Any, which: int, length: Any) -> Any:
            """Pixel positions as GridSample wants them: -1 and 1 are the outer edges of the map."""
            offset = op.Squeeze(op.Slice(offsets, ints(which), ints(which + 1), ints(5)), ints(5))
            grid = op.Reshape(floats([tap[which] for tap in taps]), ints(1, 1, 1, 1, k))
            pixels = op.Add(base, op.Mul(op.Add(offset, grid), scale))
            centered = op.Mul(op.Add(pixels, floats([0.5])), floats([2.0]))
            return op.Unsqueeze(op.Sub(op.Div(centered, op.Cast(length, to=1)), floats([1.0])), ints(5))

        grid = op.Concat(coordinate(base_x, 0, w), coordinate(base_y, 1, h), axis=5)
        grid = op.Reshape(grid, join(maps, positions, ints(k, 2)))
        width = op.Div(c, ints(g))  # D
        image = op.Reshape(op.Cast(value, to=1), join(n, h, w, ints(g), width))
        image = op.Reshape(op.Transpose(image, perm=[0, 3, 4, 1, 2]), join(maps, width, h, w))
        sampled = op.GridSample(image, grid, align_corners=0, mode=linear, padding_mode="zeros")
        weighted = op.Mul(sampled, op.Reshape(weights, join(maps, one, positions, ints(k))))
        summed = op.ReduceSum(weighted, ints(3), keepdims=0)  # (N G, D, Ho Wo)
        output = op.Transpose(op.Reshape(summed, join(n, ints(g), width, ho, wo)), perm=[0, 3, 4, 1, 2])
        return op.CastLike(op.Reshape(output, join(n, ho, wo, c)), value)

    return forward
