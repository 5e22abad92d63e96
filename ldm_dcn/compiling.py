"""torch.compile of a U-Net, and the ways of it that settings and options name."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # options are explained without torch
    from torch import nn

# As `torch.compile` explains them: "reduce-overhead" replays CUDA graphs, for networks that wait for the processor that launches
# their kernels; "max-autotune" tries several kernels besides, and takes longer to begin.
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def compile_unet(unet: nn.Module, mode: str = "default") -> None:
    """Have `unet` compiled at its next call, and again for inputs of another kind; its parameters keep their names."""
    unet.compile(mode=mode)


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
