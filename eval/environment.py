"""What a measurement was made with: versions, machine and command, for the JSON beside every table."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("dcnv4-diffusion", "torch", "diffusers", "torchmetrics", "numpy")


def environment(threads: int | None = None) -> dict[str, Any]:
    """Command line, package versions, processor, threads and GPU, as JSON-able values.

    threads  of the processes that do the work, where these are not this one
    """
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "command": " ".join([Path(sys.argv[0]).name, *map(_named, sys.argv[1:])]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: _version(package) for package in PACKAGES},
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "gpu": None
        if gpu is None
        else f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}",
    }


def without_here(text: str) -> str:
    """`text` with paths below the working directory as from there: where it lies is nobody else's business."""
    return text.replace(str(Path.cwd()) + os.sep, "")


def _named(argument: str) -> str:
    """An argument of the command line; of a file elsewhere its name alone."""
    argument = without_here(argument)
    return Path(argument).name if Path(argument).is_absolute() else argument


def noted(part: dict[str, Any], content: dict[str, Any], threads: int | None = None) -> dict[str, Any]:
    """`part` as it goes into the results `content`, whose `environment` is that of the call that began them.

    A part that another call adds, on another machine or by another command, carries its own; one without was made with the file's.
    """
    made_with = environment(threads)
    return part if made_with == content["environment"] else {**part, "environment": made_with}


def cpu_name() -> str:
    """The processor as the system calls it, with the widest vectors torch uses on it."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        name = names[0] if names else name
    except OSError:  # not Linux: the short name has to do
        pass
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
