"""Two linear layers as one product: the same results, one gradient of the input, and two layers wherever somebody may look."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dcnv4_ext import DCNv4, module, projections


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs that were joined; on the CPU, as it is on a GPU."""
    seen: list[Tensor] = []
    monkeypatch.setattr(projections, "_DEVICES", {"cpu"})

    def watched(x: Tensor, first: nn.Linear, second: nn.Linear) -> tuple[Tensor, Tensor]:
        seen.append(x)
        return projections.join(x, first, second)

    monkeypatch.setattr(module, "join", watched)
    return seen


def layer(channels: int = 32, dtype: torch.dtype = torch.float32, **settings) -> DCNv4:
    torch.manual_seed(0)
    made = DCNv4(channels, groups=2, mask_init="uniform", **settings)
    nn.init.normal_(made.offset_mask.weight, std=0.1)
    return made.to(dtype)


def solve(layer: DCNv4, x: Tensor, *, autocast: bool = False) -> tuple[Tensor, ...]:
    """Output, gradient of the input, gradients of the parameters."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.float().square().sum().backward()
    gradients = [parameter.grad for parameter in layer.parameters()]
    layer.zero_grad()
    return y.detach(), x.grad, *gradients


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_results_are_those_of_two_layers(dtype, autocast, joins, monkeypatch):
    if autocast and dtype != torch.float32:
        pytest.skip("autocast is for fp32 parameters")
    x, trained = torch.randn(2, 9, 11, 32).to(dtype), layer(dtype=dtype)
    joined = solve(trained, x, autocast=autocast)
    assert len(joins) == 1
    monkeypatch.setattr(module, "can_join", lambda *_: False)
    separate = solve(trained, x, autocast=autocast)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 and not autocast else 3e-2
    for a, b in zip(joined, separate, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("shape", [(2, 9, 11, 32), (1, 1, 128, 32), (2, 99, 32)], ids=str)
def test_gradients_come_back_without_a_copy(shape, joins, monkeypatch):
    """Weights and biases are put side by side, the gradients of value and offset_mask never."""
    calls = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda *arguments: calls.append(1) or cat(*arguments))
    made, x = layer(), torch.randn(shape, requires_grad=True)
    y = made(x, shape=(9, 11)) if len(shape) == 3 else made(x)
    assert len(joins) == 1 and len(calls) == 2
    y.sum().backward()
    assert len(calls) == 2


def test_gradients_add_up(joins):
    """Those of two layers share memory; adding to one must not change the other."""
    made, x = layer(), torch.randn(2, 9, 11, 32)
    made(x).square().sum().backward()
    once = [parameter.grad.clone() for parameter in made.parameters()]
    for factor in (2, 3):
        made(x).square().sum().backward()
        for parameter, first in zip(made.parameters(), once, strict=True):
            torch.testing.assert_close(parameter.grad, factor * first)
    assert len(joins) == 3


def test_gradients_that_lie_elsewhere_are_put_together(joins):
    """A hook hands on another tensor."""
    made, x = layer(), torch.randn(2, 9, 11, 32)
    value, offset_mask = projections.join(x, made.value_proj, made.offset_mask)
    value.register_hook(lambda gradient: 2 * gradient)
    (value.sum() + offset_mask.sum()).backward()
    rows = x.numel() / x.shape[-1]
    assert torch.equal(made.value_proj.bias.grad, torch.full((32,), 2 * rows))
    assert torch.equal(made.offset_mask.bias.grad, torch.full_like(made.offset_mask.bias, rows))


class Other(nn.Linear):
    pass


def _hooked(made: DCNv4) -> None:
    made.offset_mask.register_forward_hook(lambda *_: None)


def _hooked_before(made: DCNv4) -> None:
    made.value_proj.register_forward_pre_hook(lambda *_: None)


def _another_class(made: DCNv4) -> None:
    made.value_proj.__class__ = Other


def _own_forward(made: DCNv4) -> None:
    """As accelerate's hooks do."""
    forward = made.value_proj.forward
    made.value_proj.forward = lambda x: forward(x)


def _frozen(made: DCNv4) -> None:
    made.value_proj.requires_grad_(False)


def _normalised(made: DCNv4) -> None:
    nn.utils.parametrizations.weight_norm(made.value_proj)


def _without_bias(made: DCNv4) -> None:
    made.value_proj.bias = None


@pytest.mark.parametrize(
    "change", [_hooked, _hooked_before, _another_class, _own_forward, _frozen, _normalised, _without_bias]
)
def test_layers_that_do_more_are_called(change: Callable[[DCNv4], None], joins):
    made = layer()
    change(made)
    made(torch.randn(2, 9, 11, 32)).sum().backward()
    assert not joins


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        (dict(stride=2), (9, 11)),
        (dict(padding=0), (9, 11)),
        (dict(dw_kernel_size=3), (9, 11)),
        (dict(without_pointwise=True), (9, 11)),
        ({}, (3, 4)),  # few rows
    ],
    ids=str,
)
def test_other_inputs_are_projected_twice(settings, size, joins):
    layer(**settings)(torch.randn(2, *size, 32)).sum().backward()
    assert not joins


def test_on_a_cpu_layers_stay_apart(joins, monkeypatch):
    monkeypatch.undo()
    made, x = layer(), torch.randn(2, 9, 11, 32)
    assert not projections.can_join(x, made.value_proj, made.offset_mask)


def test_where_others_look_on_layers_are_called(joins):
    made, x = layer(), torch.randn(2, 9, 11, 32)
    with torch.no_grad():
        made(x)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        made(x)
    finally:
        handle.remove()
    names = dict(made.named_parameters())
    torch.func.grad(lambda p: torch.func.functional_call(made, p, (x,)).sum())(names)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        made(torch.randn(2, 9, 11, 32))
    torch.export.export(made, (x,))
    assert not joins
    made(x)
    assert len(joins) == 1


def test_checkpointing_recomputes_the_same(joins):
    made, x = layer(), torch.randn(2, 9, 11, 32, requires_grad=True)
    plain = solve(made, x)
    y = torch.utils.checkpoint.checkpoint(made, x, use_reentrant=False)
    y.square().sum().backward()
    assert torch.equal(y, plain[0]) and torch.equal(x.grad, plain[1])
    assert len(joins) == 3


def test_compiled_autograd_takes_over_backward(joins):
    from torch._dynamo import compiled_autograd

    enabled = getattr(compiled_autograd, "enable", None) or compiled_autograd._enable
    made, x = layer(), torch.randn(2, 9, 11, 32)
    made(x).square().sum().backward()
    expected = [parameter.grad for parameter in made.parameters()]
    made.zero_grad()
    torch._dynamo.reset()
    loss = made(x).square().sum()
    with enabled(lambda graph: torch.compile(graph, backend="eager", fullgraph=True)):
        loss.backward()
    for parameter, want in zip(made.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, want)
    assert len(joins) == 2
