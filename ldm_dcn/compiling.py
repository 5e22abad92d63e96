"""torch.compile of a U-Net: the ways of it that settings and options name, and a look at whether it computes the same.

Inductor has mixed up the order of a gradient's parts before, without a word: on a CPU, torch 2.13 reads the gradient of a nearest
upsampling, which it makes by `index_put`, before it is put together, so that all below learns nothing. `compile_unet` has such maps
widened in another way, and `wrong_gradients` is what training looks at before it trusts a compiled network.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # options are explained without torch
    from torch import Tensor, nn

# As `torch.compile` explains them: "reduce-overhead" replays CUDA graphs, for networks that wait for the processor that launches
# their kernels; "max-autotune" tries several kernels besides, and takes longer to begin.
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
WITH_GRAPHS = ("reduce-overhead", "max-autotune")
# How far norms of gradients may be apart: all together, and that of one parameter, of itself and of the whole gradient. In three batches
# each of the digits' networks, and of one with Stable Diffusion's layout, with DCNv4 and without, those computed in bf16 were 0.008 apart
# from fp32's at the most, those of parameters with more than a ten-thousandth of the whole 0.34; what a compiler leaves out is 1 of itself.
TOLERANCE, OF_ONE, OF_ALL = 0.05, 0.6, 2e-4


def compile_unet(unet: nn.Module, mode: str = "default") -> None:
    """Have `unet` compiled at its next call, and again for inputs of another kind; its parameters keep their names."""
    from diffusers.models.upsampling import Upsample2D

    for module in unet.modules():
        if isinstance(module, Upsample2D) and module.interpolate:
            module.interpolate = False
            module.register_forward_pre_hook(_upsample, with_kwargs=True)
    unet.compile(mode=mode)


def let_ddp_recompute() -> None:
    """Before a network that recomputes its blocks is compiled in DDP: older torch divides what it compiles where DDP's buckets end, and
    knows no way to where blocks are recomputed (issue 104674 of pytorch; 2.13 does). Undivided, gradients are exchanged at the end.
    """
    import torch._dynamo

    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        torch._dynamo.config.optimize_ddp = False


def _upsample(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of diffusers' upsampling: what it does itself where `interpolate` is set, without an index."""
    from torch.nn.functional import interpolate

    kwargs = dict(kwargs)
    x: Tensor = args[0] if args else kwargs.pop("hidden_states")
    size = args[1] if len(args) > 1 else kwargs.get("output_size")
    if size is not None:
        return (interpolate(x, size=size, mode="nearest"), *args[1:]), kwargs
    n, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(n, h, 2, w, 2, c).reshape(n, 2 * h, 2 * w, c)
    return (x.permute(0, 3, 1, 2), *args[1:]), kwargs


@contextmanager
def uncompiled(unet: nn.Module) -> Iterator[None]:
    """`unet` computes as it is written inside, whether `compile_unet` was asked or not."""
    compiled, unet._compiled_call_impl = unet._compiled_call_impl, None
    try:
        yield
    finally:
        unet._compiled_call_impl = compiled


@contextmanager
def without_dropout(unet: nn.Module) -> Iterator[None]:
    """Nothing is left out inside: a compiler draws other random numbers."""
    from torch.nn.modules.dropout import _DropoutNd

    drawing = [m for m in unet.modules() if isinstance(m, _DropoutNd) and m.training and m.p > 0]
    for module in drawing:
        module.eval()
    try:
        yield
    finally:
        for module in drawing:
            module.train()


def wrong_gradients(plain: Tensor, compiled: Tensor) -> list[int]:
    """Which parameters' gradients are not what they should be, the worst first, by the norms (parameters,) of theirs; the worst alone
    where all of them together are not, and each for itself might be.

    No list can say that where `plain` itself is not finite: it is empty then.
    """
    import torch

    whole = plain.norm()
    if not bool(torch.isfinite(whole)):
        return []
    apart = (plain - compiled).abs().nan_to_num(torch.inf, torch.inf)
    worst = apart.argsort(descending=True).tolist()
    wrong = (apart > OF_ONE * plain + OF_ALL * whole).tolist()
    found = [number for number in worst if wrong[number]]
    return found or (worst[:1] if bool(apart.norm() > TOLERANCE * whole) else [])


def add_compile_option(parser: ArgumentParser, what: str) -> None:
    """`--compile [MODE]`; None where it is not given."""
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=MODES,
        metavar="MODE",
        help=f"{what} with torch.compile, which takes a minute or more to begin; modes: {', '.join(MODES)}",
    )
