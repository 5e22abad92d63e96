"""What the Makefile installs: releases that exist for every Python that is promised, and a reason where that fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from dcnv4_ext import native
from dcnv4_ext.__main__ import _fit, main
from tiny import ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
OLDEST = "3.10"


def pins(python: str) -> Iterator[Requirement]:
    """The lines of constraints.txt that hold for a Python."""
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                yield pin


def test_the_oldest_python_is_the_same_everywhere() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-python = ">={OLDEST}"' in project
    assert f'target-version = "py{OLDEST.replace(".", "")}"' in project
    assert f"({OLDEST.replace('.', ', ')})" in MAKEFILE
    assert f"Python {OLDEST} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("nvcc", "mend"),
    [(None, "put nvcc (of the CUDA toolkit) on PATH; run"), ("/cuda/nvcc", "nvcc is at /cuda/nvcc now; run")],
)
def test_why_there_is_no_cuda_library_is_told(
    nvcc: str | None, mend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = native.library_file
    monkeypatch.setattr(native, "library_file", lambda device: None if device == "cuda" else found(device))
    monkeypatch.setattr(shutil, "which", lambda _: nvcc)
    monkeypatch.setattr(sys, "argv", ["dcnv4_ext"])
    assert main() == 0
    printed = capsys.readouterr().out
    assert "not built: the build found no nvcc, or was given DCNV4_CUDA=OFF" in printed
    assert f"{mend} `{native.BUILD_COMMAND}` in the project's folder, without DCNV4_CUDA=OFF" in printed


CODE, PTX, NONE = "runs this build's code", "runs this build's PTX", "no code for it; rebuild with"


@pytest.mark.parametrize(
    ("built", "gpu", "told"),
    [
        ("sm_80 sm_90 compute_90", (8, 0), CODE),
        ("sm_80 sm_90 compute_90", (8, 9), CODE),
        ("sm_80 sm_90 compute_90", (9, 0), CODE),
        ("sm_80 sm_90 compute_90", (12, 0), PTX),
        ("sm_80 sm_90 compute_90", (7, 5), NONE),
        ("sm_90a", (9, 0), CODE),
        ("sm_100a compute_100a", (10, 0), CODE),
        ("sm_100a compute_100a", (10, 3), NONE),
        ("sm_100f compute_100f", (10, 3), CODE),
        ("sm_100f compute_100f", (12, 0), NONE),
        ("sm_89", (8, 6), NONE),
        ("compute_75", (8, 6), PTX),
        ("sm_native compute_native", (8, 6), "what the build chose"),
    ],
)
def test_which_gpus_a_build_has_code_for(built: str, gpu: tuple[int, int], told: str) -> None:
    assert _fit(built, *gpu).startswith(told)


def test_the_library_names_architectures_as_they_are_read() -> None:
    if native.library_file("cuda") is None:
        pytest.skip("no CUDA library is built here")
    built = native.cuda().dcnv4_cuda_architectures().decode()
    assert built
    for kind, major, minor in re.findall(r"(sm|compute)_(\d+)(\d)", built):
        assert _fit(built, int(major), int(minor)).startswith(CODE if kind == "sm" else (CODE, PTX)), built


@pytest.mark.parametrize("python", [OLDEST, "3.11", "3.12", "3.13"])
def test_each_package_has_one_release_and_it_takes_that_python(python: str) -> None:
    """As far as packages are installed here in that release: what they say of themselves."""
    found = list(pins(python))
    names = [pin.name for pin in found]
    assert len(names) == len(set(names)) and set(names) == {pin.name for pin in pins("3.11")}
    for pin in found:
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), pin
        try:
            about = metadata(pin.name)
        except PackageNotFoundError:
            continue
        if Version(about["Version"]).public == str(pin.specifier).removeprefix("=="):
            assert SpecifierSet(about["Requires-Python"] or "").contains(f"{python}.99"), pin


def make(*arguments: str) -> subprocess.CompletedProcess:
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=variables, text=True, capture_output=True, timeout=60
    )


def test_the_reason_of_a_failed_installation_is_seen(tmp_path: Path) -> None:
    """pip gives it as an ordinary line, not as an error: --quiet would hide it."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\ncase "$*" in *--quiet*) ;; *) echo "a 1 depends on b<2" ;; esac\n'
        'echo "ERROR: ResolutionImpossible" >&2; exit 1\n'
    )
    python.chmod(0o755)
    ended = make(f"VENV={python.parent.parent}", "CXX=true", str(python.parent.parent / "installed"))
    assert ended.returncode == 2
    assert "a 1 depends on b<2" in ended.stdout and "ResolutionImpossible" in ended.stdout
    assert not (python.parent.parent / "installed").exists()


@pytest.mark.parametrize("target", ["demo", "compare", "study", "ablations"])
def test_what_is_measured_again_leaves_the_committed_results_alone(target: str) -> None:
    """There everything is done already: nothing would be trained, and a record of this machine would be put in."""
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]
    assert "benchmarks/results" not in recipe
    places = re.findall(r"--json (\S+)", recipe)
    assert places and all(place.startswith("runs/") for place in places)
