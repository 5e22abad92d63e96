"""The launch of a process among its peers: the accelerator, and launches that do not start what they seem to."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from .errors import UserError

# What torchrun and the MPI launchers tell a process about the number of its peers; accelerate reads the same.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# How long processes wait for the one that checks, saves, draws or scores for all: NCCL's own ten minutes would end the
# run. One that died is noticed by the launcher at once.
PATIENCE = timedelta(hours=3)


def start_accelerator() -> Accelerator:
    """The accelerator of this process; on a machine without a GPU it joins its peers over gloo.

    It stands for the processes and the device; number formats, FSDP and ZeRO are the run's own, so that they work without a
    GPU too.

    `Accelerator()` alone would start as many independent runs as there are CPU processes, all writing to one
    folder. Raises `UserError`, with the right command, for launches that do not start what they seem to.
    """
    check_plugins(os.environ)
    if not can_join(os.environ):
        check_launch(1, os.environ, sys.argv)
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=[patience]
    )
    check_launch(accelerator.num_processes, os.environ, sys.argv)
    return accelerator


def check_plugins(environ: Mapping[str, str]) -> None:
    """Refuse what accelerate's launcher would put around the model behind the run's back."""
    mends = {
        "FSDP": "train.parallel=fsdp, which is FSDP2",
        "DeepSpeed": "train.parallel=zero or fsdp, which do by FSDP2 what its ZeRO stages 2 and 3 do",
    }
    for what, mend in mends.items():
        if environ.get(f"ACCELERATE_USE_{what.upper()}", "").lower() in ("true", "1"):
            raise UserError(
                f"accelerate was told to use {what}; leave that out of its command and config, and set {mend}: "
                "accelerate launch --multi_gpu train.py CONFIG train.parallel=..."
            )


def can_join(environ: Mapping[str, str]) -> bool:
    """Whether torchrun's variables say who this process is and where its peers meet; without, joining them fails."""
    told = environ.get("WORLD_SIZE", "")
    alone = not told.isdigit() or int(told) == 1
    return alone or all(environ.get(name) for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))


def check_launch(num_processes: int, environ: Mapping[str, str], argv: list[str]) -> None:
    """Raise `UserError` where the launcher meant another number of processes than the one that came up."""
    command = f"torchrun --standalone --nproc_per_node N {' '.join(argv)}"
    told = next((int(environ[name]) for name in WORLD_SIZES if environ.get(name, "").isdigit()), None)
    if told is None:
        # accelerate's launcher of one process always sets the first, and the second only if more were asked for
        if "ACCELERATE_USE_CPU" in environ and "MASTER_ADDR" in environ:
            raise UserError(
                "`accelerate launch` was asked for several processes and started one "
                "(with --cpu it always does); "
                f"for N processes run `{command}`, for one leave out --num_processes"
            )
    elif told != num_processes:
        raise UserError(
            f"the launcher started {told} processes and they did not join: "
            "each would be a run of its own in the "
            f"same folder; run `{command}`"
        )
