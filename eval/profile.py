"""Where the time of a training pass goes, by kind of module: `python -m eval.throughput MODEL --profile`.

Forward: a module's own time is the time between its first and last instruction, less that of the modules that it calls. Backward:
every node of autograd's graph is timed, and belongs to the module in whose own code it was made. So no second goes missing and
none is counted twice: what belongs to no module of a known kind is the rest. Times are marks of the clock or, on a GPU, events
on its stream, which count the gaps between kernels too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from tqdm import tqdm

from dcnv4_ext import DCNv4, DCNv4Conv
from ldm_dcn.layers import DCNv4Mixer

from .columns import in_columns

DCN, PROJECTIONS, CONVOLUTIONS = "DCNv4", "DCNv4's projections", "convolutions"
ATTENTION, FEED_FORWARD, NORMS = "attention", "feed-forward", "norms"
EMBEDDINGS, REST = "time and class embedding", "rest"
KINDS = (DCN, PROJECTIONS, CONVOLUTIONS, ATTENTION, FEED_FORWARD, NORMS, EMBEDDINGS, REST)
WARM_UP = 2  # untimed passes


@dataclass
class Profile:
    """Seconds of forward and backward of one network: by kind, and of the whole pass with and without the marks.

    modules   how many of each kind there are; of nested ones the outermost counts
    seconds   direction -> kind -> seconds, one entry a round
    marked    direction -> seconds of the whole pass in which the kinds were timed
    plain     the same pass without marks: what they cost is the difference
    """

    name: str
    modules: dict[str, int]
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    marked: dict[str, list[float]] = field(default_factory=dict)
    plain: dict[str, list[float]] = field(default_factory=dict)

    def median(self, direction: str, kind: str) -> float:
        return statistics.median(self.seconds[direction][kind])

    def share(self, direction: str, kind: str) -> float:
        """Of the marked pass; all kinds together make 1, but for medians of different rounds."""
        return self.median(direction, kind) / statistics.median(self.marked[direction])


def kinds_of_modules(network: nn.Module) -> dict[nn.Module, str]:
    """The kind of every module: its own class decides or, for linear layers and containers, what it is a part of."""
    kinds: dict[nn.Module, str] = {}

    def visit(module: nn.Module, name: str, around: str) -> None:
        kind = _kind(module, name, around)
        kinds[module] = kind
        for child_name, child in module.named_children():
            visit(child, child_name, kind)

    visit(network, "", REST)
    return kinds


def _kind(module: nn.Module, name: str, around: str) -> str:
    if isinstance(module, (DCNv4, DCNv4Conv, DCNv4Mixer)):
        return DCN
    if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
        return NORMS
    if around == DCN:  # what DCNv4 is made of; a mixer's dropout belongs to it
        return PROJECTIONS if isinstance(module, (nn.Linear, nn.Conv2d)) else DCN
    if isinstance(module, nn.modules.conv._ConvNd):
        return CONVOLUTIONS
    if isinstance(module, Attention):
        return ATTENTION
    if isinstance(module, FeedForward):
        return FEED_FORWARD
    if isinstance(module, (TimestepEmbedding, Timesteps, nn.Embedding)) or name == "time_emb_proj":
        return EMBEDDINGS
    if isinstance(module, nn.Linear) and around == REST:  # a spatial transformer's way in and out
        return ATTENTION if name in ("proj_in", "proj_out") else REST
    if isinstance(module, Transformer2DModel):
        return REST
    return around


class _Marks:
    """Points in time: the clock's on a CPU, events on a GPU, which are read when all is done."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) * 1e-3 if self.cuda else end - start


@dataclass
class _Visit:
    """One call of one module, its parts among it."""

    kind: str
    start: Any
    end: Any = None
    parts: list[_Visit] = field(default_factory=list)


class _Watch:
    """Hooks on all modules of a network: visits with their times, and the owner of every node of the graph."""

    def __init__(self, kinds: dict[nn.Module, str], marks: _Marks) -> None:
        self.kinds, self.marks = kinds, marks
        self.root = _Visit(REST, None)
        self.stack = [self.root]
        # Nodes are kept: autograd makes their Python faces anew, under another id, where nobody holds them.
        self.owner: dict[Any, str] = {}

    @contextmanager
    def on(self) -> Iterator[None]:
        handles = []
        for module in self.kinds:
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.claim((args, kwargs), self.stack[-1].kind)  # made before, by the code around
        visit = _Visit(self.kinds[module], None)
        self.stack[-1].parts.append(visit)
        self.stack.append(visit)
        visit.start = self.marks.now()

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        visit = self.stack.pop()
        visit.end = self.marks.now()
        self.claim(output, visit.kind)

    def claim(self, values: Any, kind: str) -> None:
        """All nodes behind `values` that nobody owns are of `kind`: parts have claimed theirs before."""
        waiting = [tensor.grad_fn for tensor in _tensors(values)]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in self.owner:
                self.owner[node] = kind
                waiting.extend(following for following, _ in node.next_functions)

    def own_seconds(self) -> dict[str, float]:
        """Of the visits, by kind."""
        seconds = dict.fromkeys(KINDS, 0.0)
        waiting = list(self.root.parts)
        while waiting:
            visit = waiting.pop()
            inside = sum(self.marks.between(part.start, part.end) for part in visit.parts)
            seconds[visit.kind] += self.marks.between(visit.start, visit.end) - inside
            waiting.extend(visit.parts)
        return seconds


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def profile(
    name: str,
    network: nn.Module,
    loss: Callable[[], Tensor],
    *,
    rounds: int,
    device: str = "cpu",
    progress: bool = True,
) -> Profile:
    """Time `rounds` passes of `loss()`, which runs `network`, and of its backward; with and without marks in turns."""
    kinds = kinds_of_modules(network)
    result = Profile(name, _outermost(network, kinds))
    marks = _Marks(torch.device(device).type == "cuda")
    for direction in ("forward", "backward"):
        result.seconds[direction] = {kind: [] for kind in KINDS}
        result.marked[direction], result.plain[direction] = [], []
    for number in tqdm(range(WARM_UP + rounds), desc=name, disable=not progress, leave=False):
        plain = _plain_pass(loss, marks)
        marked, seconds = _marked_pass(loss, kinds, marks)
        network.zero_grad(set_to_none=True)
        if number < WARM_UP:
            continue
        for direction in ("forward", "backward"):
            result.plain[direction].append(plain[direction])
            result.marked[direction].append(marked[direction])
            own = seconds[direction]
            own[REST] += marked[direction] - sum(own.values())
            for kind in KINDS:
                result.seconds[direction][kind].append(own[kind])
    return result


def _plain_pass(loss: Callable[[], Tensor], marks: _Marks) -> dict[str, float]:
    marks.settle()
    points = [marks.now()]
    value = loss()
    points.append(marks.now())
    value.backward()
    points.append(marks.now())
    marks.settle()
    return {"forward": marks.between(*points[:2]), "backward": marks.between(*points[1:])}


def _marked_pass(
    loss: Callable[[], Tensor], kinds: dict[nn.Module, str], marks: _Marks
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Seconds of both directions whole, and by kind."""
    watch = _Watch(kinds, marks)
    marks.settle()
    with watch.on():
        start = marks.now()
        value = loss()
        end = marks.now()
    watch.claim(value, REST)
    began: dict[Any, Any] = {}
    spans: list[tuple[str, Any, Any]] = []
    handles = []
    for node, kind in watch.owner.items():
        handles.append(node.register_prehook(_starts(node, began, marks)))
        handles.append(node.register_hook(_ends(node, kind, began, spans, marks)))
    backward_start = marks.now()
    value.backward()
    backward_end = marks.now()
    marks.settle()
    for handle in handles:
        handle.remove()
    backward = dict.fromkeys(KINDS, 0.0)
    for kind, first, last in spans:
        backward[kind] += marks.between(first, last)
    whole = {
        "forward": marks.between(start, end),
        "backward": marks.between(backward_start, backward_end),
    }
    return whole, {"forward": watch.own_seconds(), "backward": backward}


# Made by functions, so that each hook holds its own node.
def _starts(node: Any, began: dict[Any, Any], marks: _Marks) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        began[node] = marks.now()

    return hook


def _ends(
    node: Any, kind: str, began: dict[Any, Any], spans: list[tuple[str, Any, Any]], marks: _Marks
) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        spans.append((kind, began[node], marks.now()))

    return hook


def _outermost(network: nn.Module, kinds: dict[nn.Module, str]) -> dict[str, int]:
    counts = dict.fromkeys(KINDS, 0)

    def visit(module: nn.Module, around: str) -> None:
        if kinds[module] != around:
            counts[kinds[module]] += 1
        for child in module.children():
            visit(child, kinds[module])

    visit(network, REST)
    return {kind: count for kind, count in counts.items() if kind != REST}


def table(profiles: list[Profile]) -> str:
    """One row a kind; for each network its forward and backward in milliseconds, with the share of the pass."""
    header = ["ms, share of the pass"]
    for each in profiles:
        header += [f"{each.name} modules", "forward", "", "backward", ""]
    rows = [header]
    for kind in KINDS:
        row = [kind]
        for each in profiles:
            row.append(str(each.modules.get(kind, "")))
            for direction in ("forward", "backward"):
                row += [
                    f"{1e3 * each.median(direction, kind):,.2f}",
                    f"{each.share(direction, kind):.1%}",
                ]
        rows.append(row)
    for title, which in (("whole pass, with marks", "marked"), ("whole pass, without", "plain")):
        row = [title]
        for each in profiles:
            row.append("")
            for direction in ("forward", "backward"):
                row += [f"{1e3 * statistics.median(getattr(each, which)[direction]):,.2f}", ""]
        rows.append(row)
    lines = in_columns(rows)
    lines.insert(1, "-" * len(lines[0]))
    lines.insert(len(lines) - 2, "-" * len(lines[0]))
    return "\n".join(lines)
