"""The road past torch's dispatcher: ordinary calls alone take it, so that whoever watches or changes operators meets ours, and it
gives and refuses the same."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.autograd.profiler_legacy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dcnv4_ext import DCNv4, dcnv4, dcnv4_reference, native, ops

FORWARD, BACKWARD = torch.ops.dcnv4_ext.forward.default, torch.ops.dcnv4_ext.backward.default


def inputs(grad: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 6, 5, 32, generator=generator, requires_grad=grad)
    return value, torch.randn(2, 6, 5, 56, generator=generator, requires_grad=grad)


@pytest.fixture
def roads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The roads that calls took: "direct" or "dispatcher"."""
    taken: list[str] = []

    def noting(name: str, call: Callable) -> Callable:
        def noted(*arguments):
            taken.append(name)
            return call(*arguments)

        return noted

    monkeypatch.setattr(ops, "direct", noting("direct", ops.direct))
    monkeypatch.setattr(ops, "forward", noting("dispatcher", ops.forward))
    return taken


@contextlib.contextmanager
def autocast_to_another_device() -> Iterator[None]:
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


ORDINARY = {
    "tensors": lambda v, a: dcnv4(v, a, groups=2),
    "pairs": lambda v, a: dcnv4(v, a, groups=2, kernel_size=(3, 3), stride=(1, 1), padding=[1, 1]),
    "a parameter": lambda v, a: dcnv4(torch.nn.Parameter(v), a, groups=2),
    "slices": lambda v, a: dcnv4(v[..., :16], a[..., 2:], groups=2),
    "transposed": lambda v, a: dcnv4(v.transpose(1, 2), a.transpose(1, 2), groups=2),
    "no_grad": lambda v, a: torch.no_grad()(dcnv4)(v, a, groups=2),
    "low precision": lambda v, a: dcnv4(v.bfloat16(), a.bfloat16(), groups=2),
    "saved-tensor hooks": lambda v, a: with_hooks(v, a),
    "inference mode": lambda v, a: torch.inference_mode()(dcnv4)(v, a, groups=2),
    "tensors of inference mode": lambda v, a: torch.inference_mode()(lambda: dcnv4(v + 0, a + 0, groups=2))(),
    "autocast with nothing to cast": lambda v, a: torch.autocast("cpu", torch.bfloat16)(dcnv4)(
        v.bfloat16(), a.bfloat16(), groups=2
    ),
    "autocast with float64": lambda v, a: torch.autocast("cpu", torch.bfloat16)(dcnv4)(
        v.double(), a.double(), groups=2
    ),
    "autocast to another device": lambda v, a: autocast_to_another_device()(dcnv4)(v, a, groups=2),
}
WITHOUT_GRADIENTS = ("a parameter", "no_grad", "inference mode", "tensors of inference mode")


def with_hooks(value: torch.Tensor, offset_mask: torch.Tensor) -> torch.Tensor:
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        output = dcnv4(value, offset_mask, groups=2)
    assert len(packed) == (2 if output.requires_grad else 0)
    return output


@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("grad", [False, True])
def test_both_roads_give_the_same(
    name: str, grad: bool, roads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for road in ("direct", "dispatcher"):
        monkeypatch.setattr(ops, "_answers", road == "direct")
        leaves = inputs(grad)
        output = ORDINARY[name](*leaves)
        if name == "a parameter":
            output = output.detach()
        gradients = torch.autograd.grad(output.sum(), leaves) if output.requires_grad else ()
        assert output.requires_grad == (grad and name not in WITHOUT_GRADIENTS)
        assert output.is_inference() == ("inference" in name)
        results.append((output, *gradients))
        assert set(roads) == {road}
        roads.clear()
    for direct, dispatched in zip(*results, strict=True):
        assert type(direct) is torch.Tensor
        assert torch.equal(direct, dispatched) and direct.stride() == dispatched.stride()


@pytest.mark.skipif(
    not torch.cuda.is_available() or native.library_file("cuda") is None, reason="needs a GPU and its library"
)
def test_cuda_tensors_take_the_short_road(roads: list[str]) -> None:
    value, offset_mask = inputs()
    leaves = [tensor.detach().cuda().requires_grad_() for tensor in (value, offset_mask)]
    output = dcnv4(*leaves, groups=2)
    gradients = torch.autograd.grad(output.square().sum(), leaves)
    assert roads == ["direct"]
    on_cpu = [tensor.requires_grad_() for tensor in (value, offset_mask)]
    want = dcnv4(*on_cpu, groups=2)
    torch.testing.assert_close(output.cpu(), want, rtol=1e-4, atol=1e-5)
    for got, expected in zip(gradients, torch.autograd.grad(want.square().sum(), on_cpu), strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-4)


class Labelled(torch.Tensor):
    """A subclass without a dispatch of its own."""


class Operators(TorchDispatchMode):
    """Notes the operators that it sees, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.seen[function] = arguments
        return function(*arguments, **(options or {}))


class Functions(TorchFunctionMode):
    """Notes the functions that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        self.seen.append(function)
        return function(*arguments, **(options or {}))


@contextlib.contextmanager
def profile_of_all_threads() -> Iterator[None]:
    """Calls in a thread that is not the one which started the profiler."""
    torch.autograd.profiler._set_is_profiler_enabled(True)
    try:
        yield
    finally:
        torch.autograd.profiler._set_is_profiler_enabled(False)


def fake_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def flop_counter():
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


def python_dispatcher():
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher()


WATCHED = {
    "dispatch mode": Operators,
    "function mode": Functions,
    "default device": lambda: torch.device("cpu"),
    "fake tensors": fake_mode,
    "flop counter": flop_counter,
    "python dispatcher": python_dispatcher,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "profiler": torch.profiler.profile,
    "profiler of autograd": torch.autograd.profiler.profile,
    "profiler of old": torch.autograd.profiler_legacy.profile,
    "profiler of all threads": profile_of_all_threads,
    "forward-mode level": torch.autograd.forward_ad.dual_level,
}


@pytest.mark.parametrize("name", WATCHED)
@pytest.mark.parametrize("grad", [False, True])
def test_whoever_watches_or_changes_operators_meets_ours(name: str, grad: bool, roads: list[str]) -> None:
    tensors = inputs(grad)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with WATCHED[name]():
            output = dcnv4(*tensors, groups=2)
    assert roads[0] == "dispatcher" and "direct" not in roads
    assert output.shape == (2, 6, 5, 32)
    assert output.dtype == (torch.bfloat16 if name == "autocast" else torch.float32)
    roads.clear()
    dcnv4(*inputs(grad), groups=2)
    assert roads == ["direct"]  # what was watched is over


STRANGE_TENSORS = {
    "subclass": lambda t: t.as_subclass(Labelled),
    "of a transform that is over": lambda t: leaked(t),
    "functional": lambda t: torch._to_functional_tensor(t),
    "zero": lambda t: torch._efficientzerotensor(t.shape),
    "negated": lambda t: torch._neg_view(t),
    "meta": lambda t: t.to("meta"),
    "made in inference mode": lambda t: torch.inference_mode()(t.clone)(),
}


def leaked(tensor: torch.Tensor) -> torch.Tensor:
    kept = []
    torch.func.vmap(lambda t: kept.append(t) or t)(tensor[None])
    return kept[0]


@pytest.mark.parametrize("name", STRANGE_TENSORS)
@pytest.mark.parametrize("which", [0, 1])
def test_tensors_that_are_not_what_they_look_like_go_by_the_dispatcher(
    name: str, which: int, roads: list[str]
) -> None:
    tensors = list(inputs())
    tensors[which] = STRANGE_TENSORS[name](tensors[which])
    assert not ops.unwatched(*tensors)
    with contextlib.suppress(Exception):  # an error of the dispatcher's is as good
        dcnv4(*tensors, groups=2)
    assert "direct" not in roads


def test_subclasses_see_the_operator_and_get_their_kind_back() -> None:
    value, offset_mask = inputs()
    assert type(dcnv4(value, offset_mask.as_subclass(Labelled), groups=2)) is Labelled

    seen = []

    class Noting(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), options=None):
            seen.append(function)
            return super().__torch_function__(function, types, arguments, options or {})

    dcnv4(value.as_subclass(Noting), offset_mask, groups=2)
    assert FORWARD in seen


def test_modes_see_both_directions() -> None:
    with Functions() as functions:
        dcnv4(*inputs(), groups=2)
    assert FORWARD in functions.seen
    with Operators() as operators:
        dcnv4(*inputs(grad=True), groups=2).sum().backward()
    assert {FORWARD, BACKWARD} <= operators.seen.keys()
    output = dcnv4(*inputs(grad=True), groups=2)  # before the mode: its settings are not yet lists
    with Operators() as operators:
        output.sum().backward()
    assert list(operators.seen[BACKWARD][3]) == [3, 3]
    with flop_counter() as counter:
        dcnv4(*inputs(grad=True), groups=2).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 6 * 5 * 32 * 9 * 8


def test_profiles_list_both_directions() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        dcnv4(*inputs(grad=True), groups=2).sum().backward()
    assert {"dcnv4_ext::forward", "dcnv4_ext::backward"} <= {event.key for event in profile.key_averages()}


def test_modes_of_another_thread_do_not_matter(roads: list[str]) -> None:
    tensors = inputs()
    with Operators() as operators:
        thread = threading.Thread(target=lambda: dcnv4(*tensors, groups=2))
        thread.start()
        thread.join()
    assert roads == ["direct"] and not operators.seen


def module() -> DCNv4:
    torch.manual_seed(0)
    return DCNv4(32, groups=2)


def test_compiled_graphs_hold_the_operator(roads: list[str]) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    layer, x = module(), torch.randn(1, 6, 5, 32)
    y = torch.compile(layer, fullgraph=True, backend=backend)(x)
    assert "direct" not in roads
    (graph,) = graphs
    assert [node.target for node in graph.graph.nodes].count(FORWARD) == 1
    torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_traced_graphs_hold_the_operator(tracing_mode: str, pre_dispatch: bool, roads: list[str]) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    trace = make_fx(lambda v, a: dcnv4(v, a, groups=2), tracing_mode=tracing_mode, pre_dispatch=pre_dispatch)
    graph = trace(*inputs())
    assert [node.target for node in graph.graph.nodes].count(FORWARD) == 1
    assert "direct" not in roads


@pytest.mark.filterwarnings("ignore")  # torch.jit is old
def test_torchscript_traces_hold_the_operator(roads: list[str]) -> None:
    value, offset_mask = inputs()
    traced = torch.jit.trace(lambda v, a: dcnv4(v, a, groups=2), (value, offset_mask), check_trace=False)
    assert "dcnv4_ext::forward" in str(traced.graph) and "direct" not in roads
    assert torch.equal(traced(2 * value, offset_mask), dcnv4(2 * value, offset_mask, groups=2))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_hold_the_operator(strict: bool, roads: list[str]) -> None:
    program = torch.export.export(module().eval(), (torch.randn(1, 6, 5, 32),), strict=strict)
    assert [node.target for node in program.graph.nodes].count(FORWARD) == 1
    assert "direct" not in roads


def gradients(loss: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> list[torch.Tensor | None]:
    """By backward(), which compiled autograd alone can take over."""
    loss.backward()
    found = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return found


@pytest.mark.parametrize("road", ["direct", "dispatcher"])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_compiled_autograd_traces_backward(
    road: str, wanted: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a forward that ran eagerly, before anybody compiled."""
    from torch._dynamo import compiled_autograd

    graphs = []

    def backend(graph: torch.fx.GraphModule, _) -> Callable:
        graphs.append([node.target for node in graph.graph.nodes])
        return graph.forward

    # torch 2.5 knows it by the first name.
    enabled = getattr(compiled_autograd, "enable", None) or compiled_autograd._enable
    monkeypatch.setattr(ops, "_answers", road == "direct")
    torch._dynamo.reset()
    leaves = tuple(tensor.requires_grad_(want) for tensor, want in zip(inputs(), wanted, strict=True))
    # The second has two nodes, the third the first one's graph and other settings, the fourth hooks.
    calls = [
        lambda: dcnv4(*leaves, groups=2),
        lambda: dcnv4(*leaves, groups=2) + dcnv4(*leaves, groups=2, kernel_size=(3, 3), offset_scale=2.0),
        lambda: dcnv4(*leaves, groups=1, offset_scale=0.5, softmax=True),
        lambda: with_hooks(*leaves),
    ]
    if not all(wanted):
        del calls[
            2:
        ]  # settings and hooks are the same whatever is wanted, and to compile takes most of a second
    for call in calls:
        want = gradients(call().square().sum(), leaves)
        loss = call().square().sum()
        with enabled(lambda graph: torch.compile(graph, backend=backend, fullgraph=True)):
            got = gradients(loss, leaves)
        for of_graph, eager in zip(got, want, strict=True):
            assert of_graph is eager is None or torch.equal(of_graph, eager)
    assert [graph.count(BACKWARD) for graph in graphs] == [1, 2, 1, 1][: len(calls)]


def test_compiled_autograd_meets_the_error_of_second_derivatives() -> None:
    from torch._dynamo import compiled_autograd

    enabled = getattr(compiled_autograd, "enable", None) or compiled_autograd._enable
    leaves = inputs(grad=True)
    (gradient,) = torch.autograd.grad(dcnv4(*leaves, groups=2).square().sum(), leaves[0], create_graph=True)
    with (
        enabled(lambda graph: graph),
        warnings.catch_warnings(),
        pytest.raises(RuntimeError, match="dcnv4 can be differentiated once"),
    ):
        warnings.simplefilter("ignore")  # compiled autograd tells of the line behind the error
        gradient.sum().backward()


def checkpointed(**options) -> Callable:
    from torch.utils.checkpoint import checkpoint

    def call(value: torch.Tensor, offset_mask: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda v, a: dcnv4(v.sin(), a.cos(), groups=2).exp(), value, offset_mask, **options)

    return call


def keeping_the_operator():
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    return create_selective_checkpoint_contexts([FORWARD])


def on_cpu(value: torch.Tensor, offset_mask: torch.Tensor) -> torch.Tensor:
    with torch.autograd.graph.save_on_cpu():
        return dcnv4(value.sin(), offset_mask.cos(), groups=2).exp()


# How often each computes forward.
SAVERS = {
    "checkpoint": (checkpointed(use_reentrant=False), 2),
    "reentrant checkpoint": (checkpointed(use_reentrant=True), 2),
    "selective checkpoint": (checkpointed(use_reentrant=False, context_fn=keeping_the_operator), 1),
    "saved on CPU": (on_cpu, 1),
}


@pytest.mark.parametrize("name", SAVERS)
def test_memory_savers_give_the_same_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, times = SAVERS[name]
    leaves = inputs(grad=True)
    want = gradients(dcnv4(leaves[0].sin(), leaves[1].cos(), groups=2).exp().sum(), leaves)
    kernel, runs = native.forward, []
    monkeypatch.setattr(native, "forward", lambda *arguments: runs.append(1) or kernel(*arguments))
    got = gradients(call(*leaves).sum(), leaves)
    assert len(runs) == times and all(map(torch.equal, got, want))


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x])),
    "grad": lambda f, x: torch.func.grad(lambda t: f(t).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[0],
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("closed_over", [False, True], ids=["wrapped", "closed over"])
def test_transforms_meet_the_operator(name: str, closed_over: bool, roads: list[str]) -> None:
    """Also where the tensors themselves are ordinary, and the transform knows of the call alone."""
    value, offset_mask = inputs()

    def call(t: torch.Tensor) -> torch.Tensor:
        return dcnv4(value if closed_over else t, offset_mask, groups=2) + t

    TRANSFORMS[name](call, value)
    assert "direct" not in roads


def test_no_graph_within_an_operator_that_has_its_own() -> None:
    """Autograd is left out there, though gradients are enabled and the tensors ask for them."""
    value, offset_mask = inputs(grad=True)
    with torch._C._AutoDispatchBelowAutograd():
        output = dcnv4(value, offset_mask, groups=2)
    assert not output.requires_grad and output.grad_fn is None


def test_a_torch_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch, roads: list[str]) -> None:
    monkeypatch.setattr(ops, "_answers", False)
    leaves = inputs(grad=True)
    output = dcnv4(*leaves, groups=2)
    assert set(roads) == {"dispatcher"}
    torch.testing.assert_close(output, dcnv4_reference(*leaves, groups=2), rtol=1e-4, atol=1e-5)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(output.sum(), leaves))


EQUAL_BUT_WRONG = {
    "groups must be an int, got True": dict(groups=True),
    "groups must be an int, got 1.0": dict(groups=1.0),
    "kernel_size must be an int": dict(kernel_size=(3, 3.0)),
    "stride must be an int": dict(stride=True),
    "padding must be an int": dict(padding=(1, True)),
    "dilation must be an int": dict(dilation=1.0),
    "offset_scale must be a number, got True": dict(offset_scale=True),
    "remove_center must be True or False, got 0": dict(remove_center=0),
    "softmax must be True or False, got 0.0": dict(softmax=0.0),
}


@pytest.mark.parametrize("text", EQUAL_BUT_WRONG)
def test_settings_equal_to_those_of_a_checked_call_are_checked(text: str) -> None:
    """True is 1 to a dict, and a call with 1 is known there."""
    value, offset_mask = torch.zeros(1, 4, 4, 16), torch.zeros(1, 4, 4, 32)
    good = dict(groups=1, kernel_size=3, stride=1, padding=1, dilation=1, offset_scale=1.0)
    dcnv4(value, offset_mask, **good)
    dcnv4(value, offset_mask, **good | dict(kernel_size=(3, 3), padding=(1, 1)))
    with pytest.raises(TypeError) as error:
        dcnv4(value, offset_mask, **good | EQUAL_BUT_WRONG[text])
    assert text in str(error.value)


def test_a_call_that_is_known_is_refused_when_its_memory_is_gone() -> None:
    for name in ("value", "offset_mask"):
        tensors = dict(zip(("value", "offset_mask"), inputs(), strict=True))
        dcnv4(**tensors, groups=2)
        tensors[name].untyped_storage().resize_(64)
        with pytest.raises(ValueError, match=f"{name} has shape .* a storage of 64 bytes"):
            dcnv4(**tensors, groups=2)


@pytest.mark.parametrize("name", ["value", "offset_mask", "grad_output"])
def test_backward_is_refused_when_memory_is_gone(name: str) -> None:
    leaves = inputs(grad=True)
    dcnv4(*leaves, groups=2).sum().backward()
    output = dcnv4(*leaves, groups=2)
    gradient = torch.ones_like(output)
    tensors = dict(value=leaves[0], offset_mask=leaves[1], grad_output=gradient)
    tensors[name].untyped_storage().resize_(64)
    with pytest.raises(ValueError, match=f"{name} has shape .* a storage of 64 bytes"):
        output.backward(gradient)


def test_calls_are_forgotten_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_calls", {})
    monkeypatch.setattr(ops, "_MOST_CALLS", 3)
    for width in range(1, 9):
        value, offset_mask = torch.randn(1, 2, width, 4), torch.randn(1, 2, width, 27)
        want = dcnv4_reference(value, offset_mask, groups=1)
        torch.testing.assert_close(dcnv4(value, offset_mask, groups=1), want, rtol=1e-4, atol=1e-5)
        assert len(ops._calls) <= 3
