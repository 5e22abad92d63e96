"""What the Makefile installs: releases that exist for every Python that is promised, and a reason where that fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
import torch
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
    [(None, "for which pip fetches nvcc: run"), ("/cuda/nvcc", "nvcc is at /cuda/nvcc now: run")],
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
    assert "not built: the build found no nvcc and fetched none" in printed
    assert f"{mend} `{native.BUILD_COMMAND}` in the project's folder, without DCNV4_CUDA=OFF" in printed


def test_a_torch_for_amd_gpus_is_not_told_to_install_nvcc(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(sys, "argv", ["dcnv4_ext"])
    assert main() == 0
    printed = capsys.readouterr().out
    assert "ROCm" in printed and "nvcc" not in printed
    native.cuda.cache_clear()
    with pytest.raises(native.MissingLibrary, match="torch's own operators take their place"):
        native.cuda()


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
    assert places or target == "demo"  # whose scores lie in the run's folder
    assert all(place.startswith("runs/") for place in places)


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """CMake's first half, in one build folder, with the nvcc of a folder or with none."""
    if shutil.which("cmake") is None or shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no cmake or no C++ compiler")
    without = [f for f in os.environ["PATH"].split(os.pathsep) if not (Path(f) / "nvcc").exists()]
    if shutil.which("cmake", path=os.pathsep.join(without)) is None:
        pytest.skip("cmake lies beside nvcc")
    theirs = ("CUDACXX", "CUDA_PATH", "CUDAARCHS", "CUDAHOSTCXX", "TORCH_CUDA_ARCH_LIST", "CMAKE_GENERATOR")
    variables = {key: value for key, value in os.environ.items() if key not in theirs}

    def run(*arguments: str, nvcc: Path | None = None, **environ: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join([str(nvcc.parent), *without] if nvcc else without)
        return subprocess.run(
            ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), *arguments],
            env={**variables, "PATH": path, **environ}, text=True, capture_output=True, timeout=120,
        )  # fmt: skip

    return run


def test_cuda_is_left_out_where_there_is_no_nvcc_and_nobody_insists(configure, tmp_path: Path) -> None:
    ended = configure()
    assert ended.returncode == 0 and "No nvcc: the CPU library alone is built" in ended.stdout
    ended = configure("-DDCNV4_CUDA=ON")
    assert ended.returncode != 0 and "DCNV4_CUDA=ON needs nvcc" in " ".join(ended.stderr.split())
    # Kept in build folders of versions in which ON meant what AUTO means.
    assert configure("-DDCNV4_CUDA:BOOL=ON").returncode == 0


def test_a_cuda_compiler_that_fails_ends_the_build(configure, tmp_path: Path) -> None:
    nvcc = tmp_path / "cuda" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    assert configure().returncode == 0  # and leaves a note that there is none
    for place in (dict(nvcc=nvcc), dict(CUDACXX=str(nvcc))):
        ended = configure(**place)
        told = " ".join(ended.stderr.split())
        assert (
            ended.returncode != 0
            and str(nvcc) in told
            and "CMake Error at" in told.partition("and it fails:")[2]
        )
        assert "CMAKE_CUDA_HOST_COMPILER" in told and "DCNV4_CUDA=OFF" in told
    assert configure("-DDCNV4_CUDA=OFF", nvcc=nvcc).returncode == 0


def nvcc() -> Path:
    found = shutil.which("nvcc")
    return Path(found) if found else pytest.skip("no nvcc")


def test_what_nvcc_says_of_a_host_compiler_is_told(configure) -> None:
    ended = configure(nvcc=nvcc(), NVCC_PREPEND_FLAGS="-U__GNUC__ -D__GNUC__=99")
    assert ended.returncode != 0 and "unsupported GNU version" in ended.stderr


def test_architectures_are_those_of_the_environment(configure, tmp_path: Path) -> None:
    """At every build; what an earlier one was told is forgotten."""
    default = "80-real 90-real 90-virtual"
    for environ, built in (
        (dict(CUDAARCHS="90"), "90"),
        ({}, default),
        (dict(TORCH_CUDA_ARCH_LIST="5.2 7.5;8.0+PTX 9.0a"), "75-real 80-real 80-virtual 90a-real"),
        (dict(TORCH_CUDA_ARCH_LIST="7.0"), default),
        (dict(TORCH_CUDA_ARCH_LIST="9.0", CUDAARCHS="80;86-real"), "80 86-real"),
    ):
        ended = configure("-G", "Unix Makefiles", nvcc=nvcc(), **environ)
        assert ended.returncode == 0, ended.stderr
        flags = (tmp_path / "build" / "CMakeFiles" / "dcnv4_cuda.dir" / "flags.make").read_text()
        assert re.search(r'DCNV4_CUDA_ARCHITECTURES="?\\"([^"\\]*)', flags)[1] == built, environ
    ended = configure(nvcc=nvcc(), TORCH_CUDA_ARCH_LIST="Ampere")
    assert ended.returncode != 0 and 'TORCH_CUDA_ARCH_LIST has "Ampere": write numbers' in ended.stderr
