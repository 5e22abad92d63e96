"""The modules: official parameter names and start, strides, gates, the NCHW wrapper, bad arguments."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import textwrap
import weakref

import numpy as np
import pytest
import torch

from c2f import C2f, fuse
from dcnv4_ext import DCNv4, DCNv4Conv, dcnv4, dcnv4_reference


def test_parameter_names_and_sizes_are_the_official_ones() -> None:
    module = DCNv4(64, groups=4, dw_kernel_size=3, center_feature_scale=True)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {
        "center_feature_scale_proj_weight": (4, 64),
        "center_feature_scale_proj_bias": (4,),
        "offset_mask_dw.weight": (64, 1, 3, 3),
        "offset_mask_dw.bias": (64,),
        "offset_mask.weight": (112, 64),  # 27 * 4 = 108, rounded up to a multiple of 8
        "offset_mask.bias": (112,),
        "value_proj.weight": (64, 64),
        "value_proj.bias": (64,),
        "output_proj.weight": (64, 64),
        "output_proj.bias": (64,),
    }
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    module.load_state_dict(state, strict=True)
    assert torch.equal(module.state_dict()["offset_mask.weight"], state["offset_mask.weight"])


def official_forward(module: DCNv4, x: torch.Tensor) -> torch.Tensor:
    """The official module's forward at stride 1, written with the reference operator."""
    value = torch.nn.functional.linear(x, module.value_proj.weight, module.value_proj.bias)
    features = module.offset_mask_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    offset_mask = torch.nn.functional.linear(features, module.offset_mask.weight, module.offset_mask.bias)
    y = dcnv4_reference(value, offset_mask, groups=module.groups)
    gate = torch.sigmoid(
        y @ module.center_feature_scale_proj_weight.T + module.center_feature_scale_proj_bias
    ).repeat_interleave(module.channels // module.groups, dim=-1)
    y = y * (1 - gate) + value * gate
    return torch.nn.functional.linear(y, module.output_proj.weight, module.output_proj.bias)


def test_forward_is_the_official_rule() -> None:
    torch.manual_seed(0)
    module = DCNv4(48, groups=3, dw_kernel_size=3, center_feature_scale=True)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x = torch.randn(2, 5, 7, 48)
    torch.testing.assert_close(module(x), official_forward(module, x), rtol=1e-4, atol=1e-4)


def test_official_start_is_zero_and_the_others_are_not() -> None:
    x = torch.randn(1, 6, 6, 32)
    zero = DCNv4(32)
    assert torch.equal(zero(x), torch.zeros(1, 6, 6, 32))
    for start in ("uniform", "center"):
        for softmax in (False, True):
            assert DCNv4(32, mask_init=start, softmax=softmax)(x).abs().mean() > 0.01
    uniform, center = (DCNv4(32, without_pointwise=True, mask_init=start) for start in ("uniform", "center"))
    assert torch.equal(center(x), x)
    mean = torch.nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(uniform(x), mean)


def test_zero_start_passes_no_gradient_upstream_and_uniform_does() -> None:
    for start, flows in (("zero", False), ("uniform", True), ("center", True)):
        module, x = DCNv4(32, mask_init=start), torch.randn(1, 6, 6, 32, requires_grad=True)
        module(x).square().sum().add(module(x).sum()).backward()
        assert bool(x.grad.abs().sum() > 0) == flows, start
        assert bool(module.value_proj.weight.grad.abs().sum() > 0) == flows, start


@pytest.mark.parametrize(
    "stride, padding, kernel", [(2, 1, 3), (2, 0, 3), ((1, 2), (2, 1), 3), (3, 2, 5), (1, 0, 2), (2, 2, 3)]
)
def test_strides_predict_offsets_at_the_output_resolution(stride, padding, kernel) -> None:
    module = DCNv4(32, kernel, stride, padding, mask_init="uniform")
    conv = torch.nn.Conv2d(32, 32, kernel, stride, padding)
    x = torch.randn(2, 9, 12, 32)
    assert module(x).shape[1:3] == conv(x.permute(0, 3, 1, 2)).shape[2:]


def test_flat_input_with_its_shape() -> None:
    module, x = DCNv4(32, mask_init="uniform", out_channels=8), torch.randn(2, 4, 6, 32)
    flat = module(x.flatten(1, 2), shape=(4, 6))
    assert torch.equal(flat, module(x).flatten(1, 2))
    with pytest.raises(ValueError, match=r"needs shape=\(H, W\)"):
        module(x.flatten(1, 2))
    with pytest.raises(ValueError, match="has 25 positions, the input has 24"):
        module(x.flatten(1, 2), shape=(5, 5))


def test_conv_wrapper_stands_in_for_conv2d() -> None:
    for kernel, stride in ((3, 1), (3, 2), (5, 1)):
        ours = DCNv4Conv(32, 48, kernel, stride)
        conv = torch.nn.Conv2d(32, 48, kernel, stride, kernel // 2)
        x = torch.randn(2, 32, 11, 8).to(memory_format=torch.channels_last)
        y = ours(x)
        assert y.shape == conv(x).shape
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_ints_of_numpy_are_ints() -> None:
    """Widths come out of arrays, and nn.Conv2d takes them so."""
    n = np.int64
    plain = DCNv4Conv(32, 48, 3, 2, groups=2, dw_kernel_size=3)
    ours = DCNv4Conv(n(32), n(48), n(3), (n(2), n(2)), groups=n(2), dw_kernel_size=n(3))
    assert repr(ours) == repr(plain) and type(ours.out_channels) is int
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 32, 9, 8)
    assert torch.equal(ours(x), plain(x))
    flat = torch.randn(2, 12, 32)
    assert torch.equal(ours.dcn(flat, shape=(n(3), n(4))), ours.dcn(flat, shape=(3, 4)))
    value, offset_mask = torch.randn(1, 5, 5, 16), torch.randn(1, 5, 5, 56)
    there = dcnv4(value, offset_mask, groups=n(2), kernel_size=n(3), padding=(n(1), 1))
    assert torch.equal(there, dcnv4(value, offset_mask, groups=2))


def test_groups_of_32_where_they_divide() -> None:
    assert DCNv4(320).groups == 10
    assert DCNv4(48).groups == 2  # 24 channels a group
    assert DCNv4(20).groups == 1


@pytest.mark.parametrize(
    "arguments, text",
    [
        (dict(channels=0), "channels must be a positive int"),
        (dict(channels=32, groups=5), "not divisible by groups=5"),
        (dict(channels=32, dw_kernel_size=4), "dw_kernel_size must be odd"),
        (dict(channels=32, mask_init="ones"), "mask_init must be"),
        (dict(channels=32, mask_init="center", remove_center=True), "needs the centre tap"),
        (dict(channels=32, without_pointwise=True, out_channels=16), "needs output_proj"),
        (dict(channels=32, padding=-1), "padding must be at least 0"),
        (dict(channels=True), "channels must be a positive int"),
        (dict(channels=32, out_channels=0), "out_channels must be at least 1"),
        (dict(channels=32, offset_scale=float("nan")), "offset_scale must be finite"),
        (dict(channels=32, groups=2.0), "groups must be an int, got 2.0"),
        (dict(channels=32, dw_kernel_size=(3, 3)), "dw_kernel_size must be an int"),
        (dict(channels=32, out_channels="8"), "out_channels must be an int"),
        (dict(channels=32, offset_scale="1"), "offset_scale must be a number"),
        (dict(channels=32, padding="same"), "padding must be an int or"),
        (dict(channels=32, offset_scale=10**400), "offset_scale must be finite"),
        (dict(channels=32, offset_scale=True), "offset_scale must be a number"),
        (dict(channels=32, softmax="no"), "softmax must be True or False"),
        (dict(channels=32, remove_center=1), "remove_center must be True or False"),
        (dict(channels=32, output_bias=None), "output_bias must be True or False"),
        (dict(channels=32, without_pointwise="False"), "without_pointwise must be True or False"),
        (dict(channels=32, center_feature_scale=0), "center_feature_scale must be True or False"),
        (dict(channels=32, dtype=torch.int32), "dtype is torch.int32; use float32"),
    ],
)
def test_bad_arguments(arguments: dict, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        DCNv4(**arguments)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: DCNv4(16)([1.0]), "x must be a torch.Tensor, got list"),
        (lambda: DCNv4(16)(torch.zeros(1, 4, 4, 16, dtype=torch.int64)), "x is torch.int64"),
        (lambda: DCNv4(16)(torch.zeros(4, 16)), "expected .N, H, W, C. or .N, L, C."),
        (lambda: DCNv4(16)(torch.zeros(1, 16, 16), shape=(16,)), "shape must be two positive ints"),
        (lambda: DCNv4(16)(torch.zeros(1, 16, 16), shape=16), "shape must be two positive ints"),
        (lambda: DCNv4(16)(torch.zeros(1, 8, 8, 16), shape=8), "shape=8 is not the"),
        (lambda: DCNv4Conv(16, 16, output_bias=False), "has bias in place of output_bias"),
        (lambda: DCNv4Conv(16, None), "out_channels must be an int"),
        (lambda: DCNv4(16)(torch.zeros(1, 1, 16), shape=(True, True)), "shape must be two positive ints"),
        (lambda: DCNv4(16)(torch.zeros(1, 16, 16), shape=(-4, -4)), "shape must be two positive ints"),
        (lambda: DCNv4(16)(torch.zeros(1, 16, 16), shape=(4.0, 4.0)), "shape must be two positive ints"),
        (lambda: DCNv4(16, kernel_size=5, padding=0)(torch.zeros(1, 3, 3, 16)), "smaller than the kernel"),
        (lambda: DCNv4(16, 5, 2, 0, dw_kernel_size=3)(torch.zeros(1, 3, 9, 16)), "smaller than the kernel"),
        (lambda: DCNv4(16)(torch.zeros(1, 0, 4, 16)), "an empty map"),
        (lambda: DCNv4Conv(16, 16)([1.0]), "x must be a torch.Tensor, got list"),
        (lambda: DCNv4Conv(16, 16)(torch.zeros(16, 4, 4)), "expected .N, C, H, W."),
        (lambda: DCNv4Conv(16, 16)(torch.zeros(1, 8, 4, 4)), "in_channels = 16, got shape .1, 8, 4, 4."),
        (lambda: DCNv4Conv(0, 16), "in_channels must be"),
        (lambda: DCNv4Conv(30, 64, 3, groups=4), "in_channels=30 is not divisible by groups=4"),
        (lambda: DCNv4Conv(16, 16, bias="x"), "bias must be"),
        (lambda: DCNv4Conv(16, 16, padding="full"), "padding must be"),
        (lambda: DCNv4Conv(16, 16, padding_mode="reflect"), 'padding_mode must be "zeros"'),
        (lambda: DCNv4Conv(16, 16, 2, padding="same"), "spans an odd number"),
        (lambda: DCNv4Conv(16, 16, stride=2, padding="same"), "needs stride 1"),
        (lambda: DCNv4(16)(torch.zeros(1, 8, 8, 16), (4, 4)), "shape=.4, 4. is not"),
        (
            lambda: DCNv4(16)(torch.zeros(1, 8, 8, 16).double()),
            "x is torch.float64 and the parameters are torch.float32",
        ),
        (
            lambda: DCNv4Conv(16, 16, dtype=torch.bfloat16)(torch.zeros(1, 16, 4, 4)),
            "x is torch.float32 and the param",
        ),
    ],
)
def test_bad_calls(call, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        call()


def test_copies_and_pickles_compute_the_same() -> None:
    """deepcopy and pickle, before a call and after one."""
    module, x = DCNv4(32, stride=2, mask_init="uniform", dw_kernel_size=3), torch.randn(1, 5, 6, 32)
    early = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    want = module(x)
    for other in (*early, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), want)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, (3, 5)])
@pytest.mark.parametrize("padding", [None, "same", "valid", (2, 1)])
def test_conv_wrapper_gives_the_sizes_of_a_convolution(padding, kernel, dilation) -> None:
    """Without a padding: that of the function in YOLO code bases, half of what the kernel spans, rounded up."""
    spans = [dilation * (k - 1) + 1 for k in (kernel if isinstance(kernel, tuple) else (kernel, kernel))]
    if padding == "same" and any(span % 2 == 0 for span in spans):
        return  # refused: test_bad_calls
    theirs = tuple(span // 2 for span in spans) if padding is None else padding
    conv = torch.nn.Conv2d(8, 16, kernel, padding=theirs, dilation=dilation)
    ours = DCNv4Conv(8, 16, kernel, padding=padding, dilation=dilation)
    x = torch.randn(1, 8, 9, 11)
    assert ours(x).shape == conv(x).shape


@pytest.mark.parametrize("kind", [DCNv4, DCNv4Conv])
def test_parameters_are_made_where_and_as_asked(kind) -> None:
    channels = (16, 16) if kind is DCNv4Conv else (16,)
    module = kind(*channels, dw_kernel_size=3, center_feature_scale=True, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    x = torch.randn(1, 16, 16, 16, dtype=torch.float64)
    assert kind(*channels, dtype=torch.float64)(x).dtype == torch.float64


def test_conv_wrapper_in_a_c2f_block() -> None:
    """NCHW, bf16 and odd sizes too; tests/test_onnx.py exports the block."""
    for dtype, layout in ((torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last)):
        block = C2f(24, 32, 2).to(dtype).to(memory_format=layout)
        y = block(torch.randn(2, 24, 7, 9, dtype=dtype).to(memory_format=layout))
        assert y.shape == (2, 32, 7, 9)
        y.float().square().mean().backward()
        assert all(p.grad.isfinite().all() for p in block.parameters())
        assert all(b.cv2.conv.dcn.offset_mask.weight.grad.abs().sum() > 0 for b in block.m)


def _statistics(model: torch.nn.Module) -> torch.nn.Module:
    """With offsets, running statistics and affine parameters that are not those of the start."""
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.2, 3)
            if part.affine:
                torch.nn.init.uniform_(part.weight, 0.5, 2)
                torch.nn.init.normal_(part.bias)
        if isinstance(part, DCNv4):
            torch.nn.init.normal_(part.offset_mask.weight, std=0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("bias", "affine", "options"),
    [(False, True, {}), (True, True, dict(center_feature_scale=True)), (True, False, {})],
)
def test_batch_normalisation_is_folded_into_the_layer(bias: bool, affine: bool, options: dict) -> None:
    torch.manual_seed(0)
    conv, bn = (
        DCNv4Conv(12, 16, 3, 2, bias=bias, **options).double(),
        torch.nn.BatchNorm2d(16, affine=affine).double(),
    )
    both = _statistics(torch.nn.Sequential(conv, bn))
    x = torch.randn(2, 12, 9, 7, dtype=torch.float64)
    before, want = conv(x), both(x)
    torch.testing.assert_close(conv.fuse_bn(bn)(x), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(conv(x), before)  # it is a copy


def test_the_block_of_the_docstring_runs_and_is_folded() -> None:
    text = inspect.getdoc(DCNv4Conv).partition("::\n\n")[2].partition("\nArgs:")[0]
    names = {"nn": torch.nn, "DCNv4Conv": DCNv4Conv}
    exec(textwrap.dedent(text), names)
    block, x = _statistics(names["DCNv4Block"](8, 16, 3, 2)), torch.randn(2, 8, 9, 7)
    want = block(x)
    block.conv = block.conv.fuse_bn(block.bn)
    del block.bn
    torch.testing.assert_close(block.forward_fuse(x), want, rtol=1e-4, atol=1e-5)


def test_a_c2f_block_is_fused() -> None:
    torch.manual_seed(0)
    block, x = _statistics(C2f(24, 32, 2)), torch.randn(2, 24, 7, 9)
    want = block(x)
    fused = fuse(copy.deepcopy(block))
    assert not [m for m in fused.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    torch.testing.assert_close(fused(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("conv", "bn", "text"),
    [
        (DCNv4Conv(8, 8).eval(), torch.nn.BatchNorm2d(8), "call eval"),
        (DCNv4Conv(8, 8), torch.nn.BatchNorm2d(8).eval(), "call eval"),
        (DCNv4Conv(8, 8).eval(), torch.nn.BatchNorm2d(16).eval(), "bn has 16 channels, this layer gives 8"),
        (DCNv4Conv(8, 8).eval(), torch.nn.BatchNorm2d(8, track_running_stats=False).eval(), "no running stat"),
        (DCNv4Conv(8, 8, without_pointwise=True).eval(), torch.nn.BatchNorm2d(8).eval(), "needs output_proj"),
        (DCNv4Conv(8, 8).eval(), torch.nn.GroupNorm(2, 8).eval(), "must be an nn.BatchNorm2d, got GroupNorm"),
    ],
)  # fmt: skip
def test_what_cannot_be_folded_is_named(conv: DCNv4Conv, bn: torch.nn.Module, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        conv.fuse_bn(bn)


def test_conv_wrapper_tells_its_geometry_as_conv2d_does() -> None:
    for arguments in ((32, 48, 3, 2, 1), (32, 48, (3, 5), (1, 2), (1, 2), (2, 1))):
        ours, conv = DCNv4Conv(*arguments, groups=4), torch.nn.Conv2d(*arguments, groups=4)
        for name in (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        ):
            assert getattr(ours, name) == getattr(conv, name), name


def test_wrong_number_of_channels_is_named() -> None:
    with pytest.raises(ValueError, match="expected 32 channels"):
        DCNv4(32)(torch.zeros(1, 4, 4, 16))


class _Wrapped(torch.nn.Module):
    """Stands in the place of a layer, as LoRA's do, and notes what it is given; it has no weight of its own."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer, self.seen = layer, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.dtype)
        return self.layer(x)


@pytest.mark.parametrize("name", ["offset_mask", "value_proj", "output_proj", "offset_mask_dw"])
def test_layers_may_be_replaced(name: str) -> None:
    torch.manual_seed(0)
    layer, x = DCNv4(32, dw_kernel_size=3, mask_init="uniform"), torch.randn(2, 6, 5, 32)
    want = layer(x)
    setattr(layer, name, _Wrapped(getattr(layer, name)))
    assert torch.equal(layer(x), want)


def test_autocast_casts_the_input_once() -> None:
    """For both projections, and keeps one copy of it for their gradients."""
    torch.manual_seed(0)
    layer, x = DCNv4(32, mask_init="uniform"), torch.randn(2, 6, 5, 32, requires_grad=True)
    kept: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    want = x.bfloat16().flatten()
    copies = {t.data_ptr() for t in kept if t.numel() == want.numel() and torch.equal(t.flatten(), want)}
    assert len(copies) == 1
    (gradient,) = torch.autograd.grad(output.float().square().sum(), x)
    (exact,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert gradient.dtype == torch.float32 and (gradient - exact).norm() < 2e-2 * exact.norm()


def _replaced(layer: DCNv4, seen: list[torch.dtype]) -> None:
    layer.offset_mask = _Wrapped(layer.offset_mask)
    layer.offset_mask.seen = seen


def _hooked(layer: DCNv4, seen: list[torch.dtype]) -> None:
    layer.value_proj.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].dtype))


def _patched(layer: DCNv4, seen: list[torch.dtype]) -> None:
    forward = layer.value_proj.forward
    layer.value_proj.forward = lambda x: seen.append(x.dtype) or forward(x)


def _replaced_depthwise(layer: DCNv4, seen: list[torch.dtype]) -> None:
    layer.offset_mask_dw = _Wrapped(torch.nn.Identity())
    layer.offset_mask_dw.seen = seen


@pytest.mark.parametrize("change", [_replaced, _hooked, _patched, _replaced_depthwise])
def test_under_autocast_others_get_the_input_as_it_is(change) -> None:
    torch.manual_seed(0)
    layer, x = DCNv4(32, mask_init="uniform"), torch.randn(2, 6, 5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        want = layer(x)
        seen: list[torch.dtype] = []
        change(layer, seen)
        assert torch.equal(layer(x), want)
    assert seen == [torch.float32]


def test_exported_under_autocast_and_on_the_meta_device_under_it() -> None:
    torch.manual_seed(0)
    layer, x = DCNv4(32, mask_init="uniform").eval(), torch.randn(1, 4, 4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        program = torch.export.export(layer, (x,)).module()
        assert torch.equal(program(x), layer(x))
        meta = DCNv4(32, device="meta")(torch.empty(1, 4, 4, 32, device="meta"))
    assert meta.shape == (1, 4, 4, 32)
    assert torch.equal(program(x), layer(x))


def test_parameters_are_reset_all_of_them() -> None:
    """As tools do that make a module on the meta device first."""
    made = DCNv4(32, device="meta", dw_kernel_size=3, center_feature_scale=True).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(7)
    made.reset_parameters()
    assert not [name for name, parameter in made.named_parameters() if (parameter == 7).any()]


STARTS = [
    dict(mask_init="uniform"),
    dict(mask_init="center", softmax=True),
    dict(mask_init="zero", kernel_size=(3, 1)),
]


def _started(made: DCNv4, settings: dict) -> None:
    """`made` holds what a new layer does: the mask's start to the bit, projections drawn from Xavier's range, biases zero."""
    fresh = DCNv4(32, **settings)
    for name in ("offset_mask.weight", "offset_mask.bias", "value_proj.bias", "output_proj.bias"):
        assert torch.equal(made.get_parameter(name), fresh.get_parameter(name)), name
    for layer in (made.value_proj, made.output_proj):
        assert 0.9 < layer.weight.abs().max() / (6 / sum(layer.weight.shape)) ** 0.5 <= 1


@pytest.mark.parametrize("settings", STARTS, ids=str)
@pytest.mark.parametrize(
    "copied",
    [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["", "copy", "pickle"],
)
def test_each_layer_starts_its_own_parameters(settings: dict, copied) -> None:
    """As torch's tools ask of modules that come from the meta device, whichever they ask first."""
    original = DCNv4(32, device="meta", **settings)
    for order in (list, lambda modules: reversed(list(modules))):
        made = copied(original).to_empty(device="cpu")
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.fill_(7)
        for part in order(made.modules()):
            if any(True for _ in part.parameters(recurse=False)):
                part.reset_parameters()
        _started(made, settings)


def test_layers_stay_linear_layers_for_tools_that_ask_for_just_those() -> None:
    """And hold no cycle: a network's memory is free once it is gone."""
    made = DCNv4(32)
    assert all(
        type(made.get_submodule(n)) is torch.nn.Linear for n in ("offset_mask", "value_proj", "output_proj")
    )
    layer = weakref.ref(made.offset_mask)
    gc.disable()
    try:
        del made
        assert layer() is None
    finally:
        gc.enable()


def test_reset_leaves_layers_of_others_to_themselves() -> None:
    made = DCNv4(32, mask_init="uniform")
    made.offset_mask = _Wrapped(made.offset_mask)
    torch.nn.utils.parametrizations.weight_norm(made.value_proj)
    made.offset_mask.layer.bias.data.fill_(7)
    made.reset_parameters()
    assert (made.offset_mask.layer.bias == 7).all()


@pytest.mark.parametrize("settings", STARTS, ids=str)
def test_a_network_of_the_official_package_starts_as_it_does_there(settings: dict) -> None:
    """FlashInternImage initialises every nn.Linear, then calls `_reset_parameters` of every core operator."""
    network = torch.nn.Sequential(DCNv4(32, **settings), torch.nn.Linear(32, 32))

    def linear_layers(layer: torch.nn.Module) -> None:
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.trunc_normal_(layer.weight, std=0.02)
            torch.nn.init.zeros_(layer.bias)

    network.apply(linear_layers)
    network.apply(lambda part: part._reset_parameters() if isinstance(part, DCNv4) else None)
    _started(network[0], settings)
