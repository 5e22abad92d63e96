"""What DCNv4 is timed against: every peer mixes an (N, H, W, C) map, whatever layout and operands it wants.

A `Case` makes the random maps, a `Peer` says which of them it takes (`takes`), lays them out (`lay_out`, not timed at the
operator level) and computes. `block` is the peer as a network has it: Linear maps around the operator.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import multiprocessing
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dcnv4_ext import DCNv4, dcnv4
from dcnv4_ext.module import default_groups

from .stopwatch import describe

OURS = "dcnv4"
MAIN_SIGMA = 2.0  # pixels; where the peers that do not look at offsets are timed
TAPS = 9  # 3x3 kernel
WINDOW = 7
# Past these a single call takes seconds: operations, and bytes of attention scores.
MOST_OPERATIONS = {"cpu": 3e11, "cuda": 1e13}
MOST_SCORES = {"cpu": 2**31, "cuda": 12 * 2**30}


@dataclass(frozen=True)
class Shape:
    """An N x H x W x C map, 32 channels a group."""

    n: int
    h: int
    w: int
    c: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        numbers = [int(number) for number in text.split("x")]
        if len(numbers) != 4 or min(numbers) < 1:
            raise ValueError(
                f"{text} is no shape; write N x H x W x C without spaces, for example 64x56x56x128"
            )
        return cls(*numbers)

    def __str__(self) -> str:
        return f"{self.n}x{self.h}x{self.w}x{self.c}"

    @property
    def groups(self) -> int:
        return default_groups(self.c)

    @property
    def columns(self) -> int:
        """P, the channels of offset_mask: rounded up to a multiple of 8, as the module does."""
        return -(-3 * TAPS * self.groups // 8) * 8

    @property
    def pixels(self) -> int:
        return self.n * self.h * self.w

    def least_bytes(self, element: int) -> tuple[int, int]:
        """Bytes that DCNv4 must move (forward, backward): each input read and each output written once."""
        maps = self.pixels * element
        return maps * (2 * self.c + self.columns), maps * (3 * self.c + 2 * self.columns)


class Case:
    """The random maps of one measurement, a set for each `index`: features of unit variance, offsets of `sigma` pixels."""

    def __init__(self, shape: Shape, dtype: torch.dtype, sigma: float, device: str, sets: int = 1) -> None:
        self.shape, self.dtype, self.sigma, self.device, self.sets = shape, dtype, sigma, device, sets
        self._maps: dict[tuple[str, int], Tensor] = {}

    def map(self, kind: str, index: int) -> Tensor:
        """(N, H, W, C) for the kind "value", (N, H, W, P) for "offset_mask"; sets repeat past `sets`."""
        key = (kind, index % self.sets)
        if key not in self._maps:
            self._maps[key] = getattr(self, f"_make_{kind}")(key[1]).to(self.dtype)
        return self._maps[key]

    def width(self, kind: str) -> int:
        return {"value": self.shape.c, "offset_mask": self.shape.columns}[kind]

    def _draw(self, kind: str, index: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(2 * index + (kind == "offset_mask"))
        size = (self.shape.n, self.shape.h, self.shape.w, self.width(kind))
        return torch.randn(size, generator=generator, device=self.device)

    def _make_value(self, index: int) -> Tensor:
        return self._draw("value", index)

    def _make_offset_mask(self, index: int) -> Tensor:
        columns = self._draw("offset_mask", index)
        groups = columns[..., : 3 * TAPS * self.shape.groups].unflatten(-1, (self.shape.groups, 3 * TAPS))
        groups[..., : 2 * TAPS].mul_(self.sigma)
        groups[..., 2 * TAPS :].mul_(0.1).add_(1 / TAPS)
        return columns


class Peer(nn.Module):
    """One way to mix a map. Its parameters are operands too: backward computes their gradients."""

    label = ""
    takes: tuple[str, ...] = ("value",)
    deformable = False  # its time depends on the offsets
    twin = False  # computes what dcnv4 computes
    package: str | None = None  # that it needs beside torch

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.shape = case.shape

    @classmethod
    def importable(cls) -> bool:
        return cls.package is None or importlib.util.find_spec(cls.package) is not None

    @staticmethod
    def unavailable(case: Case, backward: bool) -> str | None:
        """Why it cannot be measured on this case, in a few words, or None; it is importable."""
        return None

    def lay_out(self, *maps: Tensor) -> tuple[Tensor, ...]:
        """(N, H, W, channels) maps as the operands of `forward`."""
        return maps

    def lay_back(self, output: Tensor) -> Tensor:
        """The output of `forward` as (N, H, W, C)."""
        return output

    def context(self) -> AbstractContextManager:
        """Global settings around its calls."""
        return nullcontext()

    def block(self, case: Case) -> nn.Module:
        """(N, H, W, C) to (N, H, W, C), with the Linear maps a network puts around the operator."""
        return Projected(self, case)


class Projected(nn.Module):
    def __init__(self, peer: Peer, case: Case) -> None:
        super().__init__()
        c = case.shape.c
        self.peer, self.widths = peer, [case.width(kind) for kind in peer.takes]
        self.inward, self.outward = nn.Linear(c, sum(self.widths)), nn.Linear(c, c)
        if "offset_mask" in peer.takes:
            spread_offsets(self.inward, c, case)

    def forward(self, x: Tensor) -> Tensor:
        operands = self.peer.lay_out(*self.inward(x).split(self.widths, -1))
        return self.outward(self.peer.lay_back(self.peer(*operands)))


class _Bare(nn.Module):
    """A convolution stands alone in a network."""

    def __init__(self, peer: Peer) -> None:
        super().__init__()
        self.peer = peer

    def forward(self, x: Tensor) -> Tensor:
        return self.peer.lay_back(self.peer(*self.peer.lay_out(x)))


def spread_offsets(linear: nn.Linear, first: int, case: Case) -> None:
    """Set the rows of `linear` from `first` on so that features of unit variance give the offsets and weights of `case`."""
    with torch.no_grad():
        used = slice(first, first + 3 * TAPS * case.shape.groups)
        weight = linear.weight[used].view(case.shape.groups, 3 * TAPS, -1)
        bias = linear.bias[used].view(case.shape.groups, 3 * TAPS)
        weight.normal_(std=1 / math.sqrt(case.shape.c))
        bias.zero_()
        weight[:, : 2 * TAPS] *= case.sigma
        weight[:, 2 * TAPS :] *= 0.1
        bias[:, 2 * TAPS :] = 1 / TAPS


class Ours(Peer):
    """The operator and the module of this project."""

    label, takes, deformable, twin, softmax = "dcnv4", ("value", "offset_mask"), True, True, False

    def forward(self, value: Tensor, offset_mask: Tensor) -> Tensor:
        return dcnv4(value, offset_mask, groups=self.shape.groups, softmax=self.softmax)

    def block(self, case: Case) -> nn.Module:
        module = DCNv4(case.shape.c, groups=case.shape.groups, softmax=self.softmax, mask_init="uniform")
        spread_offsets(module.offset_mask, 0, case)
        return module


class DCNv3Rule(Ours):
    """DCNv3's rule, weights under a softmax, by our kernels."""

    label, twin, softmax = "DCNv3 rule", False, True


class Deterministic(Ours):
    """The backward pass that `torch.use_deterministic_algorithms(True)` selects."""

    label = "deterministic"

    @staticmethod
    def unavailable(case: Case, backward: bool) -> str | None:
        if torch.device(case.device).type == "cpu":
            return "CUDA only: on the CPU every call is deterministic"
        return None if backward else "only backward has another kernel"

    @contextmanager
    def context(self) -> Iterator[None]:
        filled = torch.utils.deterministic.fill_uninitialized_memory
        before = torch.are_deterministic_algorithms_enabled()
        try:
            # Filling new tensors with NaN is for finding faults and would be timed.
            torch.utils.deterministic.fill_uninitialized_memory = False
            # Only warned about: at the module level cuBLAS wants an environment variable.
            torch.use_deterministic_algorithms(True, warn_only=True)
            yield
        finally:
            torch.use_deterministic_algorithms(before)
            torch.utils.deterministic.fill_uninitialized_memory = filled


class GridSample(Peer):
    """The operator by `torch.nn.functional.grid_sample`: a peer for speed, no oracle (see `dcnv4_ext.reference`).

    Positions need more than 8 or 11 bits, and grid_sample wants features in the type of the positions: low precision is
    computed in fp32.
    """

    label, takes, deformable, twin = "grid_sample", ("value", "offset_mask"), True, True

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.compute = torch.float64 if case.dtype == torch.float64 else torch.float32
        rows, columns, taps = (
            torch.arange(size, dtype=self.compute) for size in (self.shape.h, self.shape.w, 3)
        )
        x = columns[None, :, None, None] + taps[:, None] - 1  # column index outer
        y = rows[:, None, None, None] + taps - 1
        base = torch.stack(torch.broadcast_tensors(x, y), -1).flatten(2, 3)  # (H, W, K, 2)
        # Kept out of the state, so that a change of the module's dtype leaves it as it is.
        self.base = base[:, :, None].to(case.device)

    def forward(self, value: Tensor, offset_mask: Tensor) -> Tensor:
        n, h, w, c = value.shape
        g = self.shape.groups
        columns = offset_mask[..., : 3 * TAPS * g].to(self.compute).unflatten(-1, (g, 3 * TAPS))
        positions = self.base + columns[..., : 2 * TAPS].unflatten(-1, (TAPS, 2))
        grid = (2 * positions + 1) / positions.new_tensor([w, h]) - 1
        grid = grid.permute(0, 3, 1, 2, 4, 5).reshape(n * g, h * w, TAPS, 2)
        maps = value.to(self.compute).unflatten(-1, (g, c // g)).permute(0, 3, 4, 1, 2)
        sampled = F.grid_sample(maps.flatten(0, 1), grid, align_corners=False)  # (N G, D, H W, K)
        weights = columns[..., 2 * TAPS :].permute(0, 3, 1, 2, 4).reshape(n * g, 1, h * w, TAPS)
        output = (sampled * weights).sum(-1).view(n, c, h, w)
        return output.permute(0, 2, 3, 1).contiguous().to(value.dtype)


class Official(Peer):
    """OpenGVLab's DCNv4, where the package `DCNv4` is importable.

    A failed assertion in it ends the process, so every case is tried in another process first.
    """

    label, takes, deformable, twin = "official", ("value", "offset_mask"), True, True
    package = "DCNv4"

    @staticmethod
    def unavailable(case: Case, backward: bool) -> str | None:
        if torch.device(case.device).type != "cuda":
            return "CUDA only"
        return tried_elsewhere(case.shape, case.dtype, case.device, backward)

    def forward(self, value: Tensor, offset_mask: Tensor) -> Tensor:
        from DCNv4 import DCNv4Function

        g = self.shape.groups
        # kernel, stride, padding, dilation as (h, w); groups; channels a group; offset scale; batch chunk; remove_center
        return DCNv4Function.apply(
            value, offset_mask, 3, 3, 1, 1, 1, 1, 1, 1, g, value.shape[-1] // g, 1.0, 256, 0
        )

    def block(self, case: Case) -> nn.Module:
        return _OfficialBlock(case)


class _OfficialBlock(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        from DCNv4 import DCNv4 as Module

        self.module = Module(channels=case.shape.c, group=case.shape.groups)
        spread_offsets(self.module.offset_mask, 0, case)

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        return self.module(x.view(n, h * w, c), (h, w)).view(n, h, w, c)


def _try_official(shape: Shape, dtype: torch.dtype, device: str, backward: bool) -> str | None:
    """One call in this process; what went wrong, or None."""
    try:
        case = Case(shape, dtype, 1.0, device)
        operands = [case.map(kind, 0).requires_grad_(backward) for kind in Official.takes]
        output = Official(case)(*operands)
        if backward:
            torch.autograd.grad(output, operands, torch.ones_like(output))
        float(output.detach().flatten()[0])  # waits for the device
    except Exception as error:
        return describe(error)
    return None


_workers: list[ProcessPoolExecutor] = []


@functools.cache
def tried_elsewhere(shape: Shape, dtype: torch.dtype, device: str, backward: bool) -> str | None:
    """What the official operator does to a process that calls it on this case: None where it works."""
    if not _workers:
        _workers.append(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
    trial: Future[str | None] = _workers[0].submit(_try_official, shape, dtype, device, backward)
    try:
        found = trial.result(timeout=120)
    except BrokenProcessPool:
        _workers.clear()
        return "it aborts the process"
    if found and "CUDA error" in found:  # the worker's device context is lost
        _workers.pop().shutdown(wait=False)
    return found


class DeformConv2d(Peer):
    """torchvision's modulated deformable convolution (DCNv2): dense C x C weights, offsets of our groups."""

    label, takes, deformable = "deform_conv2d", ("value", "offset_mask"), True
    package = "torchvision"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        c = self.shape.c
        self.weight = nn.Parameter(torch.randn(c, c, 3, 3) / math.sqrt(c * TAPS))

    @staticmethod
    def unavailable(case: Case, backward: bool) -> str | None:
        return _too_much(case, 18 * case.shape.pixels * case.shape.c**2)

    def lay_out(self, value: Tensor, offset_mask: Tensor) -> tuple[Tensor, ...]:
        """Planes first; its taps are numbered rows outer, its pairs are (dy, dx)."""
        g = self.shape.groups
        columns = offset_mask[..., : 3 * TAPS * g].unflatten(-1, (g, 3 * TAPS))
        offsets = columns[..., : 2 * TAPS].unflatten(-1, (3, 3, 2)).transpose(-2, -3).flip(-1).flatten(-4)
        weights = columns[..., 2 * TAPS :].unflatten(-1, (3, 3)).transpose(-1, -2).flatten(-3)
        return tuple(planes(m).contiguous() for m in (value, offsets, weights))

    def forward(self, value: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        from torchvision.ops import deform_conv2d

        return deform_conv2d(value, offsets, self.weight, padding=1, mask=weights)

    def lay_back(self, output: Tensor) -> Tensor:
        return output.permute(0, 2, 3, 1)

    def block(self, case: Case) -> nn.Module:
        return _DeformConvBlock(self, case)


class _DeformConvBlock(nn.Module):
    """Offsets and weights by a 1x1 convolution of planes, in the layout the operator wants."""

    def __init__(self, peer: DeformConv2d, case: Case) -> None:
        super().__init__()
        self.peer, self.sizes = peer, [2 * TAPS * case.shape.groups, TAPS * case.shape.groups]
        self.offset_mask = nn.Conv2d(case.shape.c, sum(self.sizes), 1)
        with torch.no_grad():
            self.offset_mask.weight.normal_(std=1 / math.sqrt(case.shape.c))
            self.offset_mask.weight[: self.sizes[0]] *= case.sigma

    def forward(self, x: Tensor) -> Tensor:
        x = planes(x).contiguous()
        offsets, weights = self.offset_mask(x).split(self.sizes, 1)
        return self.peer.lay_back(self.peer(x, offsets.contiguous(), weights.contiguous()))


class Attention(Peer):
    """Global attention over all H * W positions, one head a group."""

    takes = ("value", "value", "value")
    backends: tuple[SDPBackend, ...] = ()

    @staticmethod
    def unavailable(case: Case, backward: bool) -> str | None:
        return _too_much(case, 4 * case.shape.pixels * case.shape.h * case.shape.w * case.shape.c)

    def context(self) -> AbstractContextManager:
        return sdpa_kernel(list(self.backends))

    def lay_out(self, *maps: Tensor) -> tuple[Tensor, ...]:
        return tuple(m.flatten(1, 2).unflatten(-1, (self.shape.groups, -1)).transpose(1, 2) for m in maps)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # (N, G, H W, D) each
        return F.scaled_dot_product_attention(query, key, value)

    def lay_back(self, output: Tensor) -> Tensor:
        return output.transpose(1, 2).flatten(2).unflatten(1, (self.shape.h, self.shape.w))


class AttentionMath(Attention):
    """With its score matrix in memory."""

    label, backends = "attention, math", (SDPBackend.MATH,)

    @staticmethod
    def unavailable(case: Case, backward: bool) -> str | None:
        s = case.shape
        scores = s.n * s.groups * (s.h * s.w) ** 2 * torch.finfo(case.dtype).bits // 8
        most = MOST_SCORES[torch.device(case.device).type]
        if scores > most:
            return f"its scores take {scores / 2**30:.0f} GiB"
        return Attention.unavailable(case, backward)


class AttentionFlash(Attention):
    """Without: the flash kernel, or for types it lacks the memory-efficient one."""

    label, backends = (
        "attention, flash",
        (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION),
    )


class WindowAttention(Attention):
    """Attention within 7 x 7 windows; maps are padded to whole windows."""

    label = "attention, 7x7"
    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)

    @staticmethod
    def unavailable(case: Case, backward: bool) -> str | None:
        return None

    def lay_out(self, *maps: Tensor) -> tuple[Tensor, ...]:
        return maps

    def lay_back(self, output: Tensor) -> Tensor:
        return output

    def forward(self, *maps: Tensor) -> Tensor:  # query, key, value: (N, H, W, C) each
        n, h, w, c = maps[0].shape
        rows, columns = -(-h // WINDOW), -(-w // WINDOW)

        def windows(m: Tensor) -> Tensor:  # (N * windows, G, 49, D)
            if h % WINDOW or w % WINDOW:
                m = F.pad(m, (0, 0, 0, columns * WINDOW - w, 0, rows * WINDOW - h))
            m = m.view(n, rows, WINDOW, columns, WINDOW, self.shape.groups, -1)
            return m.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(0, 2)

        mixed = F.scaled_dot_product_attention(*(windows(m) for m in maps))
        mixed = mixed.view(n, rows, columns, self.shape.groups, WINDOW, WINDOW, -1)
        mixed = mixed.permute(0, 1, 4, 2, 5, 3, 6).reshape(n, rows * WINDOW, columns * WINDOW, c)
        return mixed[:, :h, :w]


class _Convolution(Peer):
    """Channels-last planes."""

    def lay_out(self, value: Tensor) -> tuple[Tensor, ...]:
        return (planes(value),)

    def lay_back(self, output: Tensor) -> Tensor:
        return output.permute(0, 2, 3, 1)


class _Depthwise(_Convolution):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        weight = torch.randn(self.shape.c, 1, WINDOW, WINDOW) / WINDOW
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=WINDOW // 2, groups=self.shape.c)


class DepthwiseCudnn(_Depthwise):
    """Depthwise 7 x 7 by cuDNN, its fastest algorithm, channels last (which torch always hands to cuDNN)."""

    label = "depthwise 7x7, cuDNN"

    @staticmethod
    def unavailable(case: Case, backward: bool) -> str | None:
        return None if torch.device(case.device).type == "cuda" else "CUDA only"

    def context(self) -> AbstractContextManager:
        return torch.backends.cudnn.flags(enabled=True, benchmark=True)


class DepthwiseOneDnn(_Depthwise):
    """Depthwise 7 x 7 by oneDNN, channels last."""

    label = "depthwise 7x7, oneDNN"

    @staticmethod
    def unavailable(case: Case, backward: bool) -> str | None:
        if torch.device(case.device).type != "cpu":
            return "CPU only"
        return None if torch.backends.mkldnn.is_available() else "torch was built without oneDNN"


@contextmanager
def _without_onednn() -> Iterator[None]:
    with warnings.catch_warnings():
        # About TF32 on Intel GPUs, whatever the flags are.
        warnings.simplefilter("ignore", UserWarning)
        with torch.backends.mkldnn.flags(enabled=False):
            yield


class DepthwiseNative(_Depthwise):
    """Depthwise 7 x 7 by torch's own kernel, planes first."""

    label = "depthwise 7x7, native"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.weight = nn.Parameter(self.weight.detach().contiguous())
        self.on_cpu = torch.device(case.device).type == "cpu"

    def lay_out(self, value: Tensor) -> tuple[Tensor, ...]:
        return (planes(value).contiguous(),)

    def context(self) -> AbstractContextManager:
        if self.on_cpu:
            return _without_onednn()
        return torch.backends.cudnn.flags(enabled=False)


class Dense(_Convolution):
    """The 3 x 3 convolution that DCNv4 replaces in a U-Net, channels last."""

    label = "conv 3x3"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        c = self.shape.c
        weight = torch.randn(c, c, 3, 3) / math.sqrt(c * TAPS)
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))

    @staticmethod
    def unavailable(case: Case, backward: bool) -> str | None:
        return _too_much(case, 18 * case.shape.pixels * case.shape.c**2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1)

    def context(self) -> AbstractContextManager:
        return torch.backends.cudnn.flags(enabled=True, benchmark=True)

    def block(self, case: Case) -> nn.Module:
        return _Bare(self)


def planes(m: Tensor) -> Tensor:
    """(N, H, W, C) as (N, C, H, W), channels last in memory."""
    return m.permute(0, 3, 1, 2)


def _too_much(case: Case, operations: float) -> str | None:
    most = MOST_OPERATIONS[torch.device(case.device).type]
    return f"a call takes {operations / 1e12:.1f} TFLOP" if operations > most else None


# name on the command line -> peer; ours is the first
PEERS: dict[str, type[Peer]] = {
    "dcnv4": Ours,
    "official": Official,
    "dcnv3_rule": DCNv3Rule,
    "deterministic": Deterministic,
    "grid_sample": GridSample,
    "deform_conv2d": DeformConv2d,
    "attention_math": AttentionMath,
    "attention_flash": AttentionFlash,
    "attention_window": WindowAttention,
    "depthwise_cudnn": DepthwiseCudnn,
    "depthwise_onednn": DepthwiseOneDnn,
    "depthwise_native": DepthwiseNative,
    "conv3x3": Dense,
}
