"""The operator as a citizen of torch: opcheck, compile, export, autocast, FLOP counting, vmap, DDP and FSDP."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dcnv4_ext import DCNv4, DCNv4Conv, dcnv4, dcnv4_reference
from programs import Program, environment, to_their_end

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
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_backward(needed: tuple[bool, bool], grad: bool) -> None:
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


@pytest.mark.parametrize("wrapper", ["module", "one_projection", "channels_last"])
def test_compile_adds_no_copies_around_the_operator(wrapper: str) -> None:
    """What inductor writes: matrix products and the operator, on views of each other's results; nothing that copies."""
    from torch._inductor.utils import run_and_get_code

    class OneProjection(torch.nn.Module):
        """value and offset_mask as slices of one product: rows wider than the tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.both = torch.nn.Linear(32, 32 + 56)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return dcnv4(*self.both(x).split([32, 56], -1), groups=2)

    x = torch.randn(2, 6, 5, 32)
    if wrapper == "channels_last":
        module, x = DCNv4Conv(32, 24), x.permute(0, 3, 1, 2)
    else:
        module = trained_module() if wrapper == "module" else OneProjection()
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        y, codes = run_and_get_code(torch.compile(module, fullgraph=True), x)
        torch.testing.assert_close(y, module(x), rtol=1e-4, atol=1e-5)
    (code,) = codes
    assert code.count("dcnv4_ext.forward.default(") == 1
    # Every loop nest of inductor's own, a copy among them, is a cpp_fused_ kernel.
    assert "cpp_fused" not in code and ".copy_(" not in code and ".clone(" not in code, code


@pytest.mark.slow(why="compiles for half a minute")
def test_ahead_of_time_inductor(tmp_path: Path) -> None:
    """A package for Python processes that import dcnv4_ext: the operator's kernels are registered from Python."""
    module, x = trained_module().eval(), torch.randn(2, 6, 5, 32)
    with torch.no_grad():
        program = torch.export.export(module, (x,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), module(x))


def test_data_parallel_and_sharded_gradients(tmp_path: Path) -> None:
    """DistributedDataParallel and FSDP2 over gloo, two processes."""
    if not torch.distributed.is_available():
        pytest.skip("torch is built without distributed")
    store = str(tmp_path / "store")
    to_their_end([Program("tests/distributed_worker.py", f"{rank}", store) for rank in range(2)])


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


def test_autocast_says_that_it_leaves_float64_alone() -> None:
    value, offset_mask = inputs()
    module = trained_module()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match=r"value is torch\.float64 .* autocast leaves"):
            dcnv4(value.double(), offset_mask, groups=2)
        with pytest.raises(TypeError, match=r"x is torch\.float64 .* autocast leaves"):
            module(torch.randn(1, 4, 4, 32, dtype=torch.float64))
        assert dcnv4(value.double(), offset_mask.double(), groups=2).dtype == torch.float64
        assert module(torch.randn(1, 4, 4, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


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


def test_vmap_over_nothing_gives_nothing() -> None:
    value, offset_mask = torch.randn(0, 2, 4, 5, 32), torch.randn(0, 2, 4, 5, 56)
    got = torch.func.vmap(lambda v, a: dcnv4(v, a, groups=2, stride=2))(value, offset_mask[:, :, :2, :3])
    assert got.shape == (0, 2, 2, 3, 32)

    def loss(v: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return dcnv4(v, a, groups=2).sum()

    gradients = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(value, offset_mask)
    assert [gradient.shape for gradient in gradients] == [value.shape, offset_mask.shape]


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


@pytest.mark.parametrize("which", ["value", "offset_mask"])
@pytest.mark.parametrize("missing", [(0, None), (None, None)], ids=["scalars", "rows"])
def test_vmap_names_what_has_the_wrong_rank(which: str, missing: tuple) -> None:
    tensors = dict(zip(("value", "offset_mask"), inputs(), strict=True))
    batch = {name: torch.stack([t, t]) for name, t in tensors.items()}
    batch[which] = batch[which][:, 0, 0, 0, 0] if missing[0] == 0 else batch[which][:, 0]
    with pytest.raises(ValueError, match=f"{which} must have 4 dimensions"):
        torch.func.vmap(lambda v, a: dcnv4(v, a, groups=2))(batch["value"], batch["offset_mask"])


@pytest.mark.parametrize("which", [0, 1])
def test_forward_mode_says_that_there_is_none(which: int) -> None:
    """Not a derivative of zero, which a kernel below autograd would give."""
    tensors = [t.double() for t in inputs()]

    def call(t: torch.Tensor) -> torch.Tensor:
        return dcnv4(*tensors[:which], t, *tensors[which + 1 :], groups=2)

    for transform in (torch.func.jacfwd(call), torch.func.hessian(lambda t: call(t).sum())):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            transform(tensors[which])
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        output, pull_back = torch.func.vjp(call, tensors[which])
        torch.func.jvp(pull_back, (torch.ones_like(output),), (torch.ones_like(output),))
    with torch.autograd.forward_ad.dual_level():  # others' tangents do not matter
        assert torch.equal(call(tensors[which]), dcnv4(*tensors, groups=2))


def test_only_ordinary_calls_skip_the_dispatcher() -> None:
    """What tracing, modes, transforms and lazy views must see still goes through torch's dispatcher."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    from dcnv4_ext.ops import _ordinary

    value, offset_mask = inputs()
    assert _ordinary(value, offset_mask) and _ordinary(torch.nn.Parameter(value), offset_mask[..., :54])
    complex_numbers = torch.view_as_complex(torch.randn(2, 2))
    assert not _ordinary(value, complex_numbers.conj().imag)
    assert not _ordinary(value, value.to("meta")) and not _ordinary(value.to_sparse())
    with FakeTensorMode() as mode:
        assert not _ordinary(mode.from_tensor(value))
        assert not _ordinary(value)
    with FlopCounterMode(display=False):
        assert not _ordinary(value)
    seen = []
    torch.func.vmap(lambda v: (seen.append(_ordinary(v)), v)[1])(value)
    torch.func.grad(lambda v: (seen.append(_ordinary(v)), v.sum())[1])(value)
    assert seen == [False, False]


def test_meta_device() -> None:
    module = DCNv4(64, stride=2, out_channels=96).to("meta")
    assert module(torch.empty(2, 9, 7, 64, device="meta")).shape == (2, 5, 4, 96)


NESTED = {
    "value of an inner gradient's function": lambda f, x: torch.func.grad(
        lambda v: torch.func.grad_and_value(lambda u: f(u).square().sum())(v)[1]
    )(x),
    "inner gradient by another argument": lambda f, x: torch.func.grad(
        lambda v: torch.func.grad(lambda w: (f(v) * w).sum())(torch.ones_like(f(x))).square().sum()
    )(x),
    "vmap of a gradient of a gradient": lambda f, x: torch.func.vmap(
        torch.func.grad(
            lambda v: torch.func.grad(lambda w: (f(v) * w).sum())(torch.full_like(f(x), 2.0)).square().sum()
        )
    )(torch.stack([x, 2 * x])),
}


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("which", [0, 1])
def test_nested_transforms_differentiate_at_every_level(name: str, which: int) -> None:
    tensors = [t.double() for t in inputs(1, 3, 4)]

    def with_operator(operator):
        return lambda t: operator(*tensors[:which], t, *tensors[which + 1 :], groups=2)

    got, want = (NESTED[name](with_operator(op), tensors[which]) for op in (dcnv4, dcnv4_reference))
    assert want.abs().max() > 0
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("which", [0, 1])
def test_no_double_backward_says_so(which: int) -> None:
    """By autograd and by torch.func; a gradient of zero, which is what dropping it would give, says nothing."""
    tensors = list(inputs(grad=True))
    loss = dcnv4(*tensors, groups=2).square().sum()
    (grad,) = torch.autograd.grad(loss, tensors[which], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()

    def inner(t: torch.Tensor) -> torch.Tensor:
        call = dcnv4(*tensors[:which], t, *tensors[which + 1 :], groups=2)
        return call.square().sum()

    tensors = [t.detach() for t in tensors]
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.func.grad(lambda t: torch.func.grad(inner)(t).sum())(tensors[which])


HIDDEN = [
    ("torch._functorch.utils", "enable_single_level_autograd_function"),
    ("torch.autograd.function", "_SingleLevelFunction"),
    ("torch._C.DispatchKeySet", "raw_repr"),
    ("torch._C", "_is_any_autocast_enabled"),
    ("torch._C", "_get_deterministic_algorithms"),
    ("torch.nn.modules.module", "_global_forward_hooks"),
]
IN_ANOTHER_TORCH = """
import torch, torch._functorch.utils
hidden = {owner}.{name}
del {owner}.{name}
from dcnv4_ext import DCNv4, dcnv4, dcnv4_reference, ops
{owner}.{name} = hidden  # torch itself wants it

tensors = [torch.randn(2, 4, 5, c, dtype=torch.float64, requires_grad=True) for c in (32, 56)]
results = []
for operator in (dcnv4, dcnv4_reference):
    output = operator(*tensors, groups=2)
    results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
for got, want in zip(*results):
    torch.testing.assert_close(got, want)
(once,) = torch.autograd.grad(dcnv4(*tensors, groups=2).square().sum(), tensors[1], create_graph=True)
try:
    once.sum().backward()
    raise AssertionError("differentiated twice")
except RuntimeError as error:
    assert "differentiated once" in str(error)
layer, x = DCNv4(32, groups=2, mask_init="uniform"), torch.randn(2, 4, 5, 32)
with torch.autocast("cpu", torch.bfloat16):
    output = layer(x)
assert output.dtype == torch.bfloat16
output.sum().backward()
assert layer.offset_mask.weight.grad.abs().sum() > 0
if "{name}" == "_SingleLevelFunction":  # compiling takes seconds
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
with torch.no_grad():
    got = torch.func.vmap(lambda v, a: dcnv4(v[None], a[None], groups=2)[0])(*tensors)
torch.testing.assert_close(got, results[0][0])
"""


IN_EACH = """
import os, sys, traceback, torch, torch.distributed.tensor  # which torch.testing takes a second to import
failed = 0
for owner, name in {hidden!r}:
    if not (child := os.fork()):  # torch is imported once, the operator in each
        try:
            exec({program!r}.format(owner=owner, name=name))
        except BaseException:
            print(owner, name, traceback.format_exc(), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    failed += os.waitpid(child, 0)[1] != 0
sys.exit(failed)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_everything_works_in_a_torch_without_what_it_does_not_promise() -> None:
    program = IN_EACH.format(hidden=HIDDEN, program=IN_ANOTHER_TORCH)
    ended = subprocess.run([sys.executable, "-c", program], env=environment(), text=True, capture_output=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
