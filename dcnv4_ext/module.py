"""The modules: DCNv4 with the official parameter names, and a drop-in for `torch.nn.Conv2d`."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.fusion import fuse_linear_bn_weights

from .functional import dcnv4
from .geometry import Geometry, Pair, flag, is_whole, number, pair, whole
from .native import check_dtype
from .ops import autocast_dtype, plain
from .projections import can_join, join, untouched

MaskInit = Literal["zero", "uniform", "center"]


def default_groups(channels: int) -> int:
    """Groups of 32 channels, or of the widest width below 32 that divides `channels`."""
    width = next(width for width in range(min(32, channels), 0, -1) if channels % width == 0)
    return channels // width


# A layer's own parameters are started by its own `reset_parameters`, as tools want that start what lay on the meta device (FSDP,
# `for m in model.modules()`). These take its place in a layer that stays an nn.Linear: torch.ao's quantize_dynamic and torch.fx ask
# for just that type. They hold the layer's dict of parameters, which copies and pickles share with it as well, and not the layer:
# no cycle keeps its memory. A parameter that a parametrization has taken away is left alone.
def _start_mask(own: dict[str, Tensor | None], groups: int, weights: tuple[float, ...]) -> None:
    """The start of `offset_mask`: every group's offsets zero, its K weights `weights`."""
    if (weight := own.get("weight")) is not None:
        nn.init.zeros_(weight)
    if (bias := own.get("bias")) is None:
        return
    group = torch.tensor((0.0,) * (2 * len(weights)) + weights, dtype=bias.dtype, device=bias.device)
    start = nn.functional.pad(group.repeat(groups), (0, bias.shape[0] - groups * len(group)))
    if hasattr(bias, "placements"):  # a DTensor, of which FSDP's are: views and slices would be copies
        from torch.distributed.tensor import distribute_tensor

        start = distribute_tensor(start, bias.device_mesh, bias.placements)
    with torch.no_grad():
        bias.copy_(start)


def _start_projection(own: dict[str, Tensor | None]) -> None:
    """The start of `value_proj` and `output_proj`, the official one."""
    if (weight := own.get("weight")) is not None:
        nn.init.xavier_uniform_(weight)
    if (bias := own.get("bias")) is not None:
        nn.init.zeros_(bias)


class DCNv4(nn.Module):
    """Deformable convolution of the fourth version (Xiong et al., 2024, arXiv:2401.06197), channels last.

    value = value_proj(x); offset_mask = offset_mask(offset_mask_dw(x)); output = output_proj(dcnv4(value, offset_mask)).
    Parameter names and layouts are those of the official module, so that its state dicts load. In eager training on a
    GPU the first two projections are one matrix product (projections.py). A tap whose position is not finite counts nothing, as
    one outside the map does: where all of the input is NaN the output is not, nor where the weights of `offset_mask` are.

    Args:
        channels: C of the input and of the value map.
        kernel_size, stride, padding, dilation: int or (h, w).
        groups: G, channels that share offsets; None takes 32 channels a group where that divides C.
        offset_scale: factor on the grid and the offsets.
        dw_kernel_size: odd size of a depthwise convolution before the offset prediction, or None for none.
        center_feature_scale: blend the output with the value by a learned gate a group.
        remove_center: leave out the centre tap.
        output_bias: give output_proj a bias.
        without_pointwise: leave out value_proj and output_proj.
        out_channels: channels of the output, C where None; another number needs output_proj.
        softmax: DCNv3's rule, weights of a group sum to one.
        mask_init: what the K weights of a group are before training. "zero" is the official start: the output is zero, which
            suits a residual branch, but on a main path no gradient reaches anything upstream in the first step. "uniform"
            starts as the mean of the taps (1 / K each), "center" as the centre tap alone. The offsets start at zero always.
        device, dtype: of the parameters, as torch's own modules take them.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        padding: Pair = 1,
        dilation: Pair = 1,
        groups: int | None = None,
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        output_bias: bool = True,
        without_pointwise: bool = False,
        *,
        out_channels: int | None = None,
        softmax: bool = False,
        mask_init: MaskInit = "zero",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not is_whole(channels) or channels < 1:
            raise ValueError(f"channels must be a positive int, got {channels!r}")
        channels = int(channels)
        groups = default_groups(channels) if groups is None else whole("groups", groups)
        out_channels = channels if out_channels is None else whole("out_channels", out_channels)
        if dw_kernel_size is not None:
            dw_kernel_size = whole("dw_kernel_size", dw_kernel_size)
        for name, choice in (
            ("center_feature_scale", center_feature_scale), ("remove_center", remove_center), ("output_bias", output_bias),
            ("without_pointwise", without_pointwise), ("softmax", softmax),
        ):  # fmt: skip
            flag(name, choice)
        if dtype is not None:
            check_dtype("dtype", dtype)
        offset_scale = number("offset_scale", offset_scale)
        if not math.isfinite(offset_scale):
            raise ValueError(f"offset_scale must be finite, got {offset_scale}")
        if out_channels < 1:
            raise ValueError(f"out_channels must be at least 1, got {out_channels}")
        if groups < 1 or channels % groups != 0:
            raise ValueError(
                f"channels={channels} is not divisible by groups={groups}; use a divisor of {channels}"
            )
        if dw_kernel_size is not None and (dw_kernel_size < 1 or dw_kernel_size % 2 == 0):
            raise ValueError(
                f"dw_kernel_size must be odd, so that the map keeps its size; got {dw_kernel_size}"
            )
        if mask_init not in ("zero", "uniform", "center"):
            raise ValueError(f'mask_init must be "zero", "uniform" or "center", got {mask_init!r}')
        if mask_init == "center" and remove_center:
            raise ValueError(
                'mask_init="center" needs the centre tap that remove_center leaves out; use "uniform"'
            )
        if without_pointwise and out_channels != channels:
            raise ValueError(
                f"without_pointwise keeps {channels} channels; out_channels={out_channels} needs output_proj"
            )
        geometry = Geometry.of(
            pair("kernel_size", kernel_size, 1), pair("stride", stride, 1), pair("padding", padding, 0),
            pair("dilation", dilation, 1), remove_center,
        )  # fmt: skip

        self.channels, self.out_channels, self.groups = channels, out_channels, groups
        self.kernel_size, self.stride = geometry.kernel_size, geometry.stride
        self.padding, self.dilation = geometry.padding, geometry.dilation
        self.remove_center, self.offset_scale, self.softmax = (
            geometry.remove_center,
            offset_scale,
            softmax,
        )
        self.taps, self.mask_init = geometry.taps, mask_init
        self.center_feature_scale, self.without_pointwise = center_feature_scale, without_pointwise

        # A multiple of 8 keeps every row of offset_mask aligned to 16 bytes.
        rows = -(-3 * groups * self.taps // 8) * 8
        made = dict(device=device, dtype=dtype)
        if dw_kernel_size is not None:
            self.offset_mask_dw = nn.Conv2d(
                channels, channels, dw_kernel_size, padding=(dw_kernel_size - 1) // 2, groups=channels, **made
            )
        else:
            self.offset_mask_dw = None
        self.offset_mask = nn.Linear(channels, rows, **made)
        if not without_pointwise:
            self.value_proj = nn.Linear(channels, channels, **made)
            self.output_proj = nn.Linear(channels, out_channels, bias=output_bias, **made)
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(groups, channels, **made))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(groups, **made))
        self.offset_mask.reset_parameters = partial(
            _start_mask, self.offset_mask._parameters, groups, self._mask_start()
        )
        if not without_pointwise:
            for projection in (self.value_proj, self.output_proj):
                projection.reset_parameters = partial(_start_projection, projection._parameters)
        self.reset_parameters()

    def _mask_start(self) -> tuple[float, ...]:
        """The K weights of a group that `mask_init` names."""
        if self.mask_init == "uniform" and not self.softmax:
            return (1.0 / self.taps,) * self.taps
        weights = [0.0] * self.taps  # under softmax equal logits are the mean already
        if self.mask_init == "center":
            weights[(self.kernel_size[1] // 2) * self.kernel_size[0] + self.kernel_size[0] // 2] = 1.0
        return tuple(weights)

    def reset_parameters(self) -> None:
        """The official start, but for the mask, which follows `mask_init`. Layers put in the place of ours start themselves."""
        if self.center_feature_scale:
            nn.init.zeros_(self.center_feature_scale_proj_weight)
            nn.init.zeros_(self.center_feature_scale_proj_bias)
        for layer in self.children():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()

    # What FlashInternImage calls, the network of the official package, after an initialisation of its own.
    _reset_parameters = reset_parameters

    def forward(self, x: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """
        Args:
            x: (N, H, W, C), or (N, L, C) with `shape`.
            shape: (H, W) of an (N, L, C) input, H * W = L. It is never guessed.

        Returns:
            (N, Ho, Wo, out_channels), or (N, Ho * Wo, out_channels) for an (N, L, C) input.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        self._check_dtype(x)
        flat = x.dim() == 3
        if flat:
            if shape is None:
                raise ValueError(f"an (N, L, C) input, here {tuple(x.shape)}, needs shape=(H, W)")
            if (
                not isinstance(shape, (tuple, list))
                or len(shape) != 2
                or not all(map(is_whole, shape))
                or min(shape) < 1
            ):
                raise ValueError(f"shape must be two positive ints (H, W), got {shape!r}")
            if shape[0] * shape[1] != x.shape[1]:
                raise ValueError(
                    f"shape={tuple(shape)} has {shape[0] * shape[1]} positions, the input has {x.shape[1]}"
                )
            x = x.unflatten(1, (shape[0], shape[1]))
        elif x.dim() != 4:
            raise ValueError(f"expected (N, H, W, C) or (N, L, C), got shape {tuple(x.shape)}")
        elif shape is not None and not (
            isinstance(shape, (tuple, list)) and tuple(shape) == tuple(x.shape[1:3])
        ):
            raise ValueError(f"shape={shape!r} is not the (H, W) of x, which has shape {tuple(x.shape)}")
        if x.shape[-1] != self.channels:
            raise ValueError(
                f"expected {self.channels} channels in the last dimension, got shape {tuple(x.shape)}"
            )

        x = self._cast_once(x)
        features = self._offset_features(x)
        if not self.without_pointwise and features is x and can_join(x, self.value_proj, self.offset_mask):
            value, offset_mask = join(x, self.value_proj, self.offset_mask)
        else:
            value = x if self.without_pointwise else self.value_proj(x)
            offset_mask = self.offset_mask(features)
        y = dcnv4(
            value,
            offset_mask,
            groups=self.groups,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            offset_scale=self.offset_scale,
            remove_center=self.remove_center,
            softmax=self.softmax,
        )
        if self.center_feature_scale:
            y = self._blend_center(y, self._at_output(value))
        if not self.without_pointwise:
            y = self.output_proj(y)
        return y.flatten(1, 2) if flat else y

    def _check_dtype(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(f"x is {x.dtype}; use float32, float64, bfloat16 or float16")
        # A layer put in the place of ours, a quantised one say, knows by itself what it takes.
        if type(self.offset_mask) is not nn.Linear:
            return
        ours = self.offset_mask.weight.dtype
        if x.dtype == ours:
            return
        if torch.is_autocast_enabled(x.device.type):
            if torch.float64 not in (x.dtype, ours):
                return
            raise TypeError(
                f"x is {x.dtype} and the parameters are {ours}; autocast leaves float64 alone: cast one"
            )
        raise TypeError(
            f"x is {x.dtype} and the parameters are {ours}; cast one so that they agree, or use autocast"
        )

    def _cast_once(self, x: Tensor) -> Tensor:
        """What autocast would make of `x` for both projections of it: one copy, and one gradient to cast back. Compilers do that by
        themselves; hooks, and layers put in the place of ours, are given what they would get without us."""
        if is_dynamo_compiling() or self.without_pointwise or not plain(x):
            return x
        dtype = autocast_dtype(x)
        if (
            dtype is x.dtype
            or self.offset_mask_dw is not None
            or not untouched(self.value_proj, self.offset_mask)
        ):
            return x
        return x.to(dtype)

    def _offset_features(self, x: Tensor) -> Tensor:
        """What the offsets are predicted from, at the output resolution."""
        if self.offset_mask_dw is not None:
            x = self.offset_mask_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self._at_output(x)

    def _at_output(self, x: Tensor) -> Tensor:
        """`x` (N, H, W, C) at the input pixels that the kernel's centre stands on, one for each output pixel."""
        for axis in (1, 2):
            pad, dilation = self.padding[axis - 1], self.dilation[axis - 1]
            kernel, stride = self.kernel_size[axis - 1], self.stride[axis - 1]
            first = dilation * (kernel - 1) // 2 - pad
            if first == 0 and stride == 1 and dilation * (kernel - 1) % 2 == 0:
                continue
            size = x.shape[axis]
            out = (size + 2 * pad - (dilation * (kernel - 1) + 1)) // stride + 1
            if out < 1:
                continue  # a map smaller than the kernel: dcnv4 says so
            if first >= 0:
                x = x.narrow(axis, first, size - first)
                x = (x[:, ::stride] if axis == 1 else x[:, :, ::stride]).narrow(axis, 0, out)
            else:  # padding wider than half the kernel: centres in the padding take the nearest pixel
                centers = torch.arange(out, device=x.device) * stride + first
                x = x.index_select(axis, centers.clamp(0, size - 1))
        return x

    def _blend_center(self, y: Tensor, value: Tensor) -> Tensor:
        gate = torch.nn.functional.linear(
            y,
            self.center_feature_scale_proj_weight.to(y.dtype),
            self.center_feature_scale_proj_bias.to(y.dtype),
        ).sigmoid()  # (N, Ho, Wo, G)
        gate = gate[..., None]
        return torch.lerp(
            y.unflatten(-1, (self.groups, -1)), value.unflatten(-1, (self.groups, -1)).to(y.dtype), gate
        ).flatten(-2)

    def extra_repr(self) -> str:
        text = f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, groups={self.groups}"
        if self.out_channels != self.channels:
            text += f", out_channels={self.out_channels}"
        return text + f", mask_init={self.mask_init!r}"


def _padding(name: str | None, kernel_size: Pair, stride: Pair, dilation: Pair) -> tuple[int, int]:
    """What a padding without a number stands for."""
    spans = [
        d * (k - 1)
        for d, k in zip(pair("dilation", dilation, 1), pair("kernel_size", kernel_size, 1), strict=True)
    ]
    if name not in (None, "same", "valid"):
        raise ValueError(f'padding must be an int, an (h, w) pair, "same", "valid" or None, got {name!r}')
    if name == "valid":
        return 0, 0
    if name == "same" and pair("stride", stride, 1) != (1, 1):
        raise ValueError(f'padding="same" needs stride 1, got stride={stride!r}')
    if name == "same" and any(span % 2 for span in spans):
        raise ValueError(
            f'padding="same" needs a kernel that spans an odd number of pixels, got kernel_size={kernel_size!r}, '
            f"dilation={dilation!r}"
        )
    return (spans[0] + 1) // 2, (spans[1] + 1) // 2


class DCNv4Conv(nn.Module):
    """DCNv4 in the dress of `torch.nn.Conv2d`: (N, C_in, H, W) to (N, C_out, Ho, Wo), for YOLO-style blocks and the like.

    A channels_last input costs no copy on the way in or out. There is no `weight`: code that folds a normalisation into it
    (`fuse_conv_and_bn` of YOLO code bases) takes `fuse_bn` in its place. So `cv2` of a C2f bottleneck, convolution,
    normalisation and activation, becomes a block that is no subclass of theirs, whose `model.fuse()` leaves it as it is::

        class DCNv4Block(nn.Module):
            def __init__(self, c1, c2, k=3, s=1):
                super().__init__()
                self.conv, self.bn, self.act = DCNv4Conv(c1, c2, k, s, bias=False), nn.BatchNorm2d(c2), nn.SiLU()

            def forward(self, x):
                return self.act(self.bn(self.conv(x)))

            def forward_fuse(self, x):  # after conv = conv.fuse_bn(bn), in eval mode
                return self.act(self.conv(x))

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, bias, device, dtype: as of `nn.Conv2d`.
        padding: int or (h, w); "same" and "valid" as of `nn.Conv2d`, "same" for odd kernels alone; None takes half of what the
            kernel spans, rounded up, as the `autopad` of YOLO code bases does: an odd kernel keeps the size at stride 1.
        groups: channels that share offsets, see `DCNv4`; not the groups of a grouped convolution.
        padding_mode: "zeros" alone, as of `nn.Conv2d`.
        mask_init, options: see `DCNv4`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        padding: Pair | Literal["same", "valid"] | None = None,
        dilation: Pair = 1,
        groups: int | None = None,
        bias: bool = True,
        *,
        mask_init: MaskInit = "uniform",
        padding_mode: Literal["zeros"] = "zeros",
        **options,
    ) -> None:
        super().__init__()
        if padding_mode != "zeros":
            raise ValueError(
                f'padding_mode must be "zeros", got {padding_mode!r}: what lies outside the map is zero'
            )
        if not is_whole(in_channels) or in_channels < 1:
            raise ValueError(f"in_channels must be a positive int, got {in_channels!r}")
        if is_whole(groups) and groups > 0 and in_channels % groups != 0:
            raise ValueError(
                f"in_channels={in_channels} is not divisible by groups={groups}; use a divisor of {in_channels}"
            )
        if padding is None or isinstance(padding, str):
            padding = _padding(padding, kernel_size, stride, dilation)
        flag("bias", bias)
        if "output_bias" in options:
            raise TypeError("DCNv4Conv has bias in place of output_bias, as nn.Conv2d")
        self.dcn = DCNv4(
            in_channels, kernel_size, stride, padding, dilation, groups, output_bias=bias,
            out_channels=whole("out_channels", out_channels),
            mask_init=mask_init, **options,
        )  # fmt: skip
        dcn = self.dcn
        self.in_channels, self.out_channels, self.groups = dcn.channels, dcn.out_channels, dcn.groups
        self.kernel_size, self.stride, self.padding, self.dilation = (
            dcn.kernel_size, dcn.stride, dcn.padding, dcn.dilation,
        )  # fmt: skip
        self.padding_mode = padding_mode

    def fuse_bn(self, bn: nn.BatchNorm2d) -> DCNv4Conv:
        """A copy that gives what `bn` after this layer does, in its `output_proj`; both must be in eval mode.

        Raises:
            TypeError: no batch normalisation, or a layer in the place of `output_proj`, a quantised one say.
            ValueError: training mode, another number of channels, no running statistics, no `output_proj`.
        """
        projection = getattr(self.dcn, "output_proj", None)
        if not isinstance(bn, nn.modules.batchnorm._BatchNorm):
            raise TypeError(f"bn must be an nn.BatchNorm2d, got {type(bn).__name__}")
        if projection is None:
            raise ValueError("fuse_bn needs output_proj, which without_pointwise leaves out")
        if type(projection) is not nn.Linear:
            raise TypeError(f"output_proj is a {type(projection).__name__}; fuse before it is replaced")
        if self.training or bn.training:
            raise ValueError("fuse_bn takes running statistics: call eval() of the layer and of bn first")
        if bn.running_mean is None or bn.running_var is None:
            raise ValueError("bn has no running statistics (track_running_stats=False): it cannot be folded")
        if bn.num_features != self.out_channels:
            raise ValueError(f"bn has {bn.num_features} channels, this layer gives {self.out_channels}")
        fused = copy.deepcopy(self)
        layer = fused.dcn.output_proj
        scale = torch.ones_like(bn.running_var) if bn.weight is None else bn.weight
        shift = torch.zeros_like(bn.running_mean) if bn.bias is None else bn.bias
        layer.weight, layer.bias = fuse_linear_bn_weights(
            layer.weight, layer.bias, bn.running_mean, bn.running_var, bn.eps, scale, shift
        )
        return fused

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"expected (N, C, H, W), got shape {tuple(x.shape)}")
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"expected (N, C, H, W) with C = in_channels = {self.in_channels}, got shape {tuple(x.shape)}"
            )
        # One copy of a contiguous input here, where the two projections would make one each; none of a channels_last input.
        return self.dcn(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
