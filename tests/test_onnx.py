"""ONNX export in standard operators, run by onnxruntime on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dcnv4_ext
from c2f import C2f, fuse
from dcnv4_ext import DCNv4

onnxruntime = pytest.importorskip(
    "onnxruntime", reason="onnxruntime is not installed (pip install '.[onnx]')"
)
pytest.importorskip("onnxscript", reason="onnxscript is not installed (pip install '.[onnx]')")


@pytest.mark.parametrize(
    "options",
    [
        dict(groups=2),
        dict(groups=1, kernel_size=5, stride=2, padding=2, dilation=1, offset_scale=0.5, remove_center=True),
        dict(
            groups=2,
            kernel_size=(3, 1),
            padding=(1, 0),
            softmax=True,
            dw_kernel_size=3,
            center_feature_scale=True,
        ),
    ],
    ids=["plain", "stride_2_without_centre", "softmax_asymmetric"],
)
@pytest.mark.parametrize(
    ("opset", "fixed"), [(None, False), (16, False), (17, True), (20, False)],
    ids=["dynamo", "torchscript_16", "torchscript_fixed_17", "torchscript_20"],
)  # fmt: skip
def test_a_module_runs_the_same_in_onnxruntime(
    options: dict, opset: int | None, fixed: bool, tmp_path: Path
) -> None:
    """By either exporter of torch; that of fixed shapes folds what is constant then."""
    torch.manual_seed(0)
    module = DCNv4(32, out_channels=24, mask_init="uniform", **options).eval()
    torch.nn.init.normal_(module.offset_mask.weight, std=0.1)
    file = tmp_path / "layer.onnx"
    if opset is None:
        n, h, w = (torch.export.Dim(name, min=2, max=64) for name in ("n", "h", "w"))
        torch.onnx.export(
            module, (torch.randn(2, 9, 8, 32),), file, dynamo=True, opset_version=20, verbose=False,
            dynamic_shapes={"x": {0: n, 1: h, 2: w}}, custom_translation_table=dcnv4_ext.onnx.translation_table(),
        )  # fmt: skip
    else:
        dcnv4_ext.onnx.register_symbolic()
        torch.onnx.export(
            module, (torch.randn(2, 9, 8, 32),), file, dynamo=False, opset_version=opset, input_names=["x"],
            dynamic_axes={} if fixed else {"x": {0: "n", 1: "h", 2: "w"}},
        )  # fmt: skip
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    domains = {opset.domain for opset in __import__("onnx").load(file).opset_import}
    assert domains <= {"", "ai.onnx"}, f"operators that are not standard: {domains}"
    for shape in ((2, 9, 8, 32),) if fixed else ((2, 9, 8, 32), (3, 12, 7, 32)):
        x = torch.randn(shape)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), module(x).detach(), rtol=1e-4, atol=1e-4)


def test_a_trained_c2f_block_runs_the_same_in_onnxruntime(tmp_path: Path) -> None:
    """A YOLO-style block with DCNv4Conv in it: some steps of training lower the loss, and what was learned is what is exported."""
    torch.manual_seed(0)
    block, x = C2f(16, 16, 1), torch.randn(4, 16, 8, 10)
    target = x.roll((1, 2), (2, 3))
    optimiser = torch.optim.AdamW(block.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        loss = (block(x) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(bottleneck.cv2.conv.dcn.offset_mask.weight.abs().max() > 0.01 for bottleneck in block.m)
    block.eval()
    n, h, w = (torch.export.Dim(name, min=2, max=64) for name in ("n", "h", "w"))
    file = tmp_path / "c2f.onnx"
    torch.onnx.export(
        block, (x,), file, dynamo=True, opset_version=20, verbose=False,
        dynamic_shapes={"x": {0: n, 2: h, 3: w}}, custom_translation_table=dcnv4_ext.onnx.translation_table(),
    )  # fmt: skip
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for shape in ((4, 16, 8, 10), (2, 16, 13, 7)):
        x = torch.randn(shape)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), block(x).detach(), rtol=1e-3, atol=1e-3)


def test_a_fused_c2f_block_is_exported_as_ultralytics_does(tmp_path: Path) -> None:
    """Through TorchScript, in eval mode, at one shape."""
    torch.manual_seed(0)
    block, x = fuse(C2f(16, 16, 1).eval()), torch.randn(1, 16, 8, 10)
    dcnv4_ext.onnx.register_symbolic()
    torch.onnx.export(
        block, (x,), tmp_path / "c2f.onnx", dynamo=False, opset_version=17, input_names=["images"]
    )
    session = onnxruntime.InferenceSession(tmp_path / "c2f.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), block(x).detach(), rtol=1e-3, atol=1e-4)
