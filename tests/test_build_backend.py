"""Where the build takes nvcc from: the machine, or PyPI."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from programs import ROOT

sys.path.insert(0, str(ROOT / "dcnv4_ext" / "packaging"))
import backend

sys.path.pop(0)
ON = {"cmake.define.DCNV4_CUDA": "ON"}
OFF = {"cmake.define.DCNV4_CUDA": "OFF"}
VARIABLES = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "CMAKE_ARGS", "SKBUILD_CMAKE_ARGS", "SKBUILD_CMAKE_DEFINE")


class Driver(SimpleNamespace):
    """libcuda, as far as it is asked."""

    def cuDriverGetVersion(self, version) -> int:
        ctypes.cast(version, ctypes.POINTER(ctypes.c_int))[0] = self.newest
        return self.status


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A Linux machine without a CUDA toolkit, and with the driver that a test gives it."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(backend, "DEFAULT_ROOT", str(tmp_path / "usr" / "local" / "cuda"))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages"), *sys.path])

    def with_driver(newest: int | None = None, status: int = 0) -> None:
        def load(name: str) -> Driver:
            if newest is None:
                raise OSError(f"{name}: cannot open shared object file")
            return Driver(newest=newest, status=status)

        monkeypatch.setattr(ctypes, "CDLL", load)

    with_driver()
    return with_driver


def put_nvcc(root: Path) -> Path:
    nvcc = root / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    return nvcc


def test_the_project_is_built_by_it() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'build-backend = "backend"\nbackend-path = ["dcnv4_ext/packaging"]\n' in text


def test_nvcc_comes_from_pypi_where_a_driver_could_use_it(machine) -> None:
    assert backend.nvcc_requirements(None) == []  # no driver: a machine without a GPU
    machine(13000)
    assert backend.nvcc_requirements({}) == backend.NVCC
    assert backend.nvcc_requirements(OFF) == []
    machine(12080)  # PyPI has no whole nvcc of that time, and a later one's programs do not start
    assert backend.nvcc_requirements(None) == backend.nvcc_requirements(ON) == []
    for broken in (dict(newest=13000, status=999), dict(newest=None)):
        machine(**broken)
        assert backend.nvcc_requirements(None) == []
        assert backend.nvcc_requirements(ON) == backend.NVCC  # to be carried to a machine with one


@pytest.mark.parametrize(
    ("environ", "settings"),
    [
        (dict(CMAKE_ARGS="-G Ninja -DDCNV4_CUDA=OFF"), None),
        (dict(CMAKE_ARGS="-DDCNV4_CUDA:STRING='off'"), ON),  # comes last on CMake's command line
        (dict(SKBUILD_CMAKE_ARGS="-DX=1;-DDCNV4_CUDA:STRING=No"), {}),
        (dict(SKBUILD_CMAKE_DEFINE="X=1;DCNV4_CUDA=0"), {}),
        (dict(SKBUILD_CMAKE_DEFINE="DCNV4_CUDA=ON"), OFF),
        ({}, {"cmake.args": ["-DX=1", "-DDCNV4_CUDA=FALSE"]}),
        ({}, {"skbuild.cmake.define.DCNV4_CUDA": "N"}),
        (dict(CMAKE_ARGS="-DCMAKE_CUDA_COMPILER=/theirs/nvcc"), ON),
        ({}, {"cmake.define.CMAKE_CUDA_COMPILER": "/theirs/nvcc"}),
    ],
)
def test_every_way_to_leave_cuda_out_or_to_name_a_compiler_is_understood(
    machine, monkeypatch, tmp_path: Path, environ, settings
) -> None:
    machine(13000)
    put_nvcc(tmp_path / "packages" / "nvidia" / "cu13")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert backend.nvcc_requirements(settings) == []
    assert built(monkeypatch, settings)[0] is None


def test_what_is_no_setting_of_ours_is_no_choice(machine, monkeypatch) -> None:
    machine(13000)
    monkeypatch.setenv("CMAKE_ARGS", "-DXDCNV4_CUDA=OFF -DDCNV4_CUDA=ON")
    assert backend.nvcc_requirements({"cmake.define.X": "DCNV4_CUDA=OFF"}) == backend.NVCC
    assert backend.nvcc_requirements(OFF) == backend.NVCC


def test_an_nvcc_on_path_may_lie_anywhere(machine, monkeypatch, tmp_path: Path) -> None:
    """Of ccache, for example, whose folder has its own name."""
    machine(13000)
    nvcc = put_nvcc(tmp_path / "toolkit").rename(tmp_path / "toolkit" / "nvcc")
    monkeypatch.setenv("PATH", str(nvcc.parent))
    assert backend.nvcc_requirements(None) == []
    assert built(monkeypatch)[0] == str(nvcc)


@pytest.mark.parametrize("place", ["CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH", "DEFAULT_ROOT"])
def test_a_toolkit_is_found_where_torch_finds_it(machine, monkeypatch, tmp_path: Path, place: str) -> None:
    machine(13000)
    nvcc = put_nvcc(tmp_path / "toolkit")
    if place == "DEFAULT_ROOT":
        monkeypatch.setattr(backend, place, str(nvcc.parent.parent))
    else:
        where = {"CUDACXX": nvcc, "PATH": nvcc.parent}.get(place, nvcc.parent.parent)
        monkeypatch.setenv(place, str(where))
    put_nvcc(tmp_path / "packages" / "nvidia" / "cu13")  # is not preferred to it
    assert backend.nvcc_requirements(None) == []
    assert built(monkeypatch)[0] == str(nvcc)


def built(monkeypatch: pytest.MonkeyPatch, settings: dict | None = None) -> tuple[str | None, str | None]:
    """CUDACXX and LIBRARY_PATH as a build finds them; whatever becomes of it, they are then as before."""
    seen = []

    def build_wheel(*arguments: object) -> str:
        seen.append((os.environ.get("CUDACXX"), os.environ.get("LIBRARY_PATH")))
        raise SystemExit(1)

    before = dict(os.environ)
    monkeypatch.setattr(backend, "_base", lambda: SimpleNamespace(build_wheel=build_wheel))
    with pytest.raises(SystemExit):
        backend.build_wheel("wheels", settings)
    assert dict(os.environ) == before
    return seen[0]


def test_the_build_finds_what_pip_installed_for_it(machine, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LIBRARY_PATH", raising=False)
    assert built(monkeypatch) == (None, None)
    nvcc = put_nvcc(tmp_path / "packages" / "nvidia" / "cu13")
    libraries = str(nvcc.parent.parent / "lib")
    assert built(monkeypatch) == (str(nvcc), libraries)
    assert built(monkeypatch, OFF) == (None, None)
    monkeypatch.setenv("LIBRARY_PATH", "/theirs")
    assert built(monkeypatch) == (str(nvcc), os.pathsep.join([libraries, "/theirs"]))


def test_what_scikit_build_core_needs_is_asked_for_too(machine, monkeypatch) -> None:
    machine(13000)
    base = SimpleNamespace(
        get_requires_for_build_wheel=lambda settings: ["cmake>=3.24"],
        get_requires_for_build_editable=lambda settings: ["ninja"],
    )
    monkeypatch.setattr(backend, "_base", lambda: base)
    assert backend.get_requires_for_build_wheel(ON) == ["cmake>=3.24", *backend.NVCC]
    assert backend.get_requires_for_build_editable(None) == ["ninja", *backend.NVCC]
