"""The operator as a citizen of torch: opcheck, compile, export, autocast, FLOP counting, vmap's refusal."""

from __future__ import annotations

import pytest
import torch

from dcnv4_ext import DCNv4, dcnv4

SETTINGS = ([3, 3], [1, 1], [1, 1], [1, 1], 2, 1.0, False, False)


def inputs(n: int = 2, h: int = 6, w: int = 5, grad: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(n, h, w, 32, generator=generator, requires_grad=grad)
    return value, torch.randn(n, h, w, 56, generator=generator, requires_grad=grad)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_forward(grad: bool) -> None:
    result = torch.library.opcheck(torch.ops.dcnv4_ext.forward, (*inputs(grad=grad), *SETTINGS))
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_opcheck_backward(needed: tuple[bool, bool]) -> None:
    grad_output = torch.randn(2, 6, 5, 32)
    result = torch.library.opcheck(
        torch.ops.dcnv4_ext.backward, (*inputs(), grad_output, *SETTINGS, list(needed))
    )
    assert set(result.values()) == {"SUCCESS"}, result


def test_opcheck_strided_and_asymmetric() -> None:
    value, offset_mask = inputs()
    settings = ([3, 3], [2, 1], [0, 2], [1, 2], 2, 0.5, True, True)
    ho, wo = 2, 5
    result = torch.library.opcheck(
        torch.ops.dcnv4_ext.forward,
        (value.transpose(1, 2).contiguous().transpose(1, 2), offset_mask[:, :ho, :wo], *settings),
    )
    assert set(result.values()) == {"SUCCESS"}, result


def trained_module() -> DCNv4:
    torch.manual_seed(0)
    module = DCNv4(32, groups=2, mask_init="uniform")
    torch.nn.init.normal_(module.offset_mask.weight, std=0.05)
    return module


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_gradients(backend: str) -> None:
    module, x = trained_module(), torch.randn(2, 6, 5, 32)
    module(x).square().sum().backward()
    expected = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    y = compiled(x)
    torch.testing.assert_close(y, module(x), rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    for p, want in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-4)


def test_compile_dynamic_makes_one_graph() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    module = trained_module()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for n, h, w in ((2, 6, 5), (3, 4, 9), (5, 7, 8)):
        x = torch.randn(n, h, w, 32)
        torch.testing.assert_close(compiled(x), module(x))
    assert counter.frame_count == 1


def test_export_with_dynamic_shapes() -> None:
    module = trained_module().eval()
    sizes = {0: torch.export.Dim("n"), 1: torch.export.Dim("h"), 2: torch.export.Dim("w")}
    program = torch.export.export(module, (torch.randn(2, 6, 5, 32),), dynamic_shapes={"x": sizes})
    assert any(node.target is torch.ops.dcnv4_ext.forward.default for node in program.graph.nodes)
    x = torch.randn(3, 9, 4, 32)
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    value, offset_mask = inputs(grad=True)
    with torch.autocast("cpu", dtype):
        mixed = dcnv4(value, offset_mask.to(dtype), groups=2)
        output = dcnv4(value, offset_mask, groups=2)
        assert trained_module()(torch.randn(1, 4, 4, 32)).dtype == dtype
    assert output.dtype == mixed.dtype == dtype
    output.float().sum().backward()
    assert value.grad.dtype == offset_mask.grad.dtype == torch.float32
    want = dcnv4(value.to(dtype), offset_mask.to(dtype), groups=2)
    assert torch.equal(output, want)


def test_training_in_bf16() -> None:
    """What the official operator cannot do: bf16 parameters, bf16 gradients."""
    module = trained_module().to(torch.bfloat16)
    module(torch.randn(2, 6, 5, 32, dtype=torch.bfloat16)).square().mean().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in module.parameters()
    )


def test_flop_counter_sees_the_operator() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    value, offset_mask = inputs(grad=True)
    with FlopCounterMode(display=False) as counter:
        output = dcnv4(value, offset_mask, groups=2)
    forward = 2 * 6 * 5 * 32 * 9 * 8
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 2 * forward


@pytest.mark.parametrize("dims", [(0, 0), (1, 2), (0, None), (None, 1)])
def test_vmap_folds_into_the_batch(dims: tuple[int | None, int | None]) -> None:
    generator = torch.Generator().manual_seed(0)
    value, offset_mask = (
        torch.randn(3, 2, 4, 5, 32, generator=generator),
        torch.randn(3, 2, 4, 5, 56, generator=generator),
    )
    expected = [
        dcnv4(value[0 if dims[0] is None else i], offset_mask[0 if dims[1] is None else i], groups=2)
        for i in range(3)
    ]
    batched = [
        t[0] if dim is None else t.movedim(0, dim) for t, dim in zip((value, offset_mask), dims, strict=True)
    ]
    got = torch.func.vmap(lambda v, a: dcnv4(v, a, groups=2), in_dims=dims)(*batched)
    torch.testing.assert_close(got, torch.stack(expected))


def test_per_sample_gradients() -> None:
    """torch.func.grad under vmap: one gradient a sample."""
    value, offset_mask = inputs(n=3)

    def loss(v: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return dcnv4(v[None], a[None], groups=2).square().sum()

    got = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(value, offset_mask)
    leaves = [t.clone().requires_grad_() for t in (value, offset_mask)]
    dcnv4(*leaves, groups=2).square().sum().backward()
    for gradient, leaf in zip(got, leaves, strict=True):
        torch.testing.assert_close(gradient, leaf.grad)


def test_meta_device() -> None:
    module = DCNv4(64, stride=2, out_channels=96).to("meta")
    assert module(torch.empty(2, 9, 7, 64, device="meta")).shape == (2, 5, 4, 96)


def test_no_double_backward_says_so() -> None:
    value, offset_mask = inputs(grad=True)
    (grad,) = torch.autograd.grad(
        dcnv4(value, offset_mask, groups=2).square().sum(), value, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
