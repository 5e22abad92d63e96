"""The provenance of a run: versions, command line, git state."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """What the run was made with: versions, command line and git state."""
    packages = ("dcnv4-diffusion", "torch", "diffusers", "accelerate", "safetensors", "numpy", "pydantic")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "git": _git_state(),
    }


def _git_state() -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            check=False,
            capture_output=True,
            text=True,
            timeout=10,
        )
        return run.stdout.strip() if run.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(git("status", "--porcelain"))} if commit else None
    except (OSError, subprocess.TimeoutExpired):
        return None
