"""The CPU kernels on platforms that are not here: cross-compiled, and run by QEMU (arm64) or Wine (Windows), where these and the
compilers are found. On Debian: apt-get install g++-aarch64-linux-gnu qemu-user g++-mingw-w64-x86-64 wine."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dcnv4_ext import native
from dcnv4_ext.geometry import Geometry, pair
from problems import Problem, mismatches, random_problem, wide_problem

CSRC = Path(__file__).resolve().parent.parent / "dcnv4_ext" / "csrc" / "cpu"
DRIVER = Path(__file__).resolve().parent / "portability" / "driver.cpp"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"]
PROBLEMS = 150
DEFAULTS = dict(kernel_size=3, stride=1, padding=1, dilation=1, offset_scale=1.0, remove_center=False, softmax=False)  # fmt: skip


@dataclass(frozen=True)
class Platform:
    compiler: str
    runner: tuple[str, ...]
    options: tuple[str, ...]
    files: dict[str, list[str]]  # with the options each needs besides: CMakeLists.txt has the same


PORTABLE: dict[str, list[str]] = {"api.cpp": [], "portable.cpp": []}
PLATFORMS = {
    "arm64": Platform("aarch64-linux-gnu-g++", ("qemu-aarch64",), ("-static",), PORTABLE),
    "windows": Platform(
        "x86_64-w64-mingw32-g++",
        ("wine",),
        ("-static", "-DDCNV4_X86", "-DDCNV4_AVX512_BF16"),
        {
            **PORTABLE,
            "avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
            "avx512.cpp": AVX512,
            "avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
        },
    ),
}


@pytest.fixture(scope="module", params=PLATFORMS)
def driver(request, tmp_path_factory) -> tuple[list[str], str]:
    """What runs the driver of a platform, and the platform's name."""
    platform = PLATFORMS[request.param]
    for tool in (platform.compiler, *platform.runner):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on PATH")
    folder = tmp_path_factory.mktemp(request.param)
    common = [platform.compiler, "-std=c++17", "-O3", "-fopenmp", *platform.options]
    sources = {CSRC / name: options for name, options in platform.files.items()} | {DRIVER: []}
    objects = []
    for source, options in sources.items():
        objects.append(str(folder / f"{source.stem}.o"))
        _run([*common, *options, "-c", str(source), "-o", objects[-1]], folder)
    program = folder / "driver.exe"
    _run([*common, *objects, "-o", str(program)], folder)
    return [*platform.runner, str(program)], request.param


def _run(command: list[str], folder: Path) -> None:
    environment = os.environ | {"WINEDEBUG": "-all", "WINEPREFIX": str(folder / "wine")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stderr)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _written(problem: Problem, output_shape: torch.Size) -> list[bytes]:
    """What the driver reads of a problem."""
    settings = DEFAULTS | problem.settings
    pairs = [pair(name, settings[name], 0) for name in ("kernel_size", "stride", "padding", "dilation")]
    value, offset_mask = problem.value, problem.offset_mask
    described = native.problem(
        Geometry.of(*pairs, settings["remove_center"]), settings["groups"], settings["offset_scale"],
        settings["softmax"], value.dtype, value.shape, offset_mask.shape, output_shape, value_stride=value.shape[3],
        offset_mask_stride=offset_mask.shape[3], output_stride=output_shape[3], deterministic=False, threads=2, device=0,
    )  # fmt: skip
    return [bytes(described), _bytes(value), _bytes(offset_mask), _bytes(problem.grad_output)]


@pytest.mark.slow(why="compiles for minutes")
@pytest.mark.parametrize("isa", native.cpu().dcnv4_cpu_isas().decode().split())
def test_random_problems_elsewhere(driver, isa: str, tmp_path: Path) -> None:
    """Forward and both gradients, every dtype, against the fp64 reference computed here."""
    command, platform = driver
    if platform == "arm64" and isa != "portable":
        pytest.skip("arm64 has the portable kernels alone")
    problems = [random_problem(seed) if seed % 3 else wide_problem(seed) for seed in range(PROBLEMS)]
    with open(tmp_path / "problems", "wb") as file:
        for problem in problems:
            for piece in _written(problem, problem.grad_output.shape):
                file.write(struct.pack("q", len(piece)) + piece)
    _run([*command, isa, str(tmp_path / "problems"), str(tmp_path / "results")], tmp_path)
    with open(tmp_path / "results", "rb") as file:
        for problem in problems:
            results = []
            for like in (problem.grad_output, problem.value, problem.offset_mask):
                (length,) = struct.unpack("q", file.read(8))
                assert length == like.numel() * like.itemsize
                result = like.clone(memory_format=torch.contiguous_format)
                if length:
                    result = torch.frombuffer(bytearray(file.read(length)), dtype=like.dtype).view(like.shape)
                results.append(result)
            found = mismatches(problem, tuple(results))
            assert not found, "\n".join(found)
