"""What nvcc makes of the CUDA kernels: registers, spills, the width of their loads. No GPU is needed; without nvcc it is skipped."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[1] / "dcnv4_ext" / "csrc" / "cuda"
ARCHITECTURE = 90
TYPES = {"f": "float", "d": "double", "NS_4bf16E": "bf16", "NS_3f16E": "f16"}
MOST_REGISTERS = 80  # so that 6 blocks of 128 threads fit the 65,536 registers of a multiprocessor


def _tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, beside CUDA_HOME, or in torch's compiler."""
    places = [Path(os.environ[key]) / "bin" for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which(name) or next((str(p / name) for p in places if os.access(p / name, os.X_OK)), None)


def _nvcc(*arguments: str) -> str:
    nvcc = _tool("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc: the CUDA kernels cannot be compiled here")
    done = subprocess.run([nvcc, "-std=c++17", "-O3", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


class Kernels:
    """The kernels of one file: name and template arguments -> what ptxas says."""

    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.DOTALL,
    )
    mangled = re.compile(rf"\d+([a-z_]+)I({'|'.join(TYPES)})((?:L[ib]\d+E)*)E")

    def __init__(self, source: str, folder: Path) -> None:
        self.cubin = folder / f"{source}.cubin"
        self.log = _nvcc(
            *("-gencode", f"arch=compute_{ARCHITECTURE},code=sm_{ARCHITECTURE}", "-cubin", "-Xptxas", "-v"),
            *("-o", str(self.cubin), str(CUDA / f"{source}.cu")),
        )
        self.usage: dict[tuple, dict[str, int]] = {}
        self.symbols: dict[str, tuple] = {}
        for symbol, *numbers in self.pattern.findall(self.log):
            self.symbols[symbol] = self.name_of(symbol)
            self.usage[self.name_of(symbol)] = dict(
                zip(("stack", "stores", "loads", "registers"), map(int, numbers), strict=True)
            )

    @classmethod
    def name_of(cls, symbol: str) -> tuple:
        match = cls.mangled.search(symbol)
        assert match, symbol
        return match[1], TYPES[match[2]], *map(int, re.findall(r"L[ib](\d+)E", match[3]))

    def instructions(self) -> dict[tuple, list[str]]:
        """The machine instructions of every kernel."""
        disassembler = _tool("cuobjdump")
        if disassembler is None:
            pytest.skip("no cuobjdump: the machine code cannot be read here")
        text = subprocess.run(
            [disassembler, "-sass", str(self.cubin)], capture_output=True, text=True, check=True
        ).stdout
        return {
            self.symbols[part.split("\n", 1)[0].strip()]: re.findall(
                r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]+)", part
            )
            for part in text.split("Function : ")[1:]
        }


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Compiles a file once."""
    folder, made = tmp_path_factory.mktemp("cubin"), {}
    return lambda source: made.get(source) or made.setdefault(source, Kernels(source, folder))


# N elements a vector and the kernels for 8 and 9 taps, by file.
WIDTHS = {"float": 4, "bf16": 8, "f16": 8}
FAST = {
    "forward": [("sample", t, n, v, k) for t, n in WIDTHS.items() for v in (1, 2) for k in (8, 9)],
    "backward": [
        ("differentiate", t, n, v, k, scatter)
        for t, n in WIDTHS.items()
        for v, scatter in ((1, 0), (2, 0), (1, 1))
        for k in (8, 9)
    ],
    "scatter_tiled": [("merge_tiles", t) for t in WIDTHS],
    "scatter_ordered": [("gather_taps", t, 4) for t in WIDTHS] + [("find_taps", t) for t in WIDTHS],
}


@pytest.mark.parametrize("source", FAST)
def test_fast_kernels_keep_everything_in_registers(kernels, source):
    made = kernels(source)
    assert "warning" not in made.log, made.log
    for kernel in FAST[source]:
        usage = made.usage[kernel]
        assert usage["stack"] == usage["stores"] == usage["loads"] == 0, (kernel, usage)
        assert usage["registers"] <= MOST_REGISTERS, (kernel, usage)


def _wide_loads(kernel: tuple) -> int:
    """16-byte loads in a fast kernel: one a tap, corner and vector, and in backward one a vector of the output's gradient."""
    vectors, taps = kernel[3:5]
    return 4 * taps * vectors + (vectors if kernel[0] == "differentiate" else 0)


def test_fast_kernels_load_16_bytes_at_a_time(kernels, tmp_path):
    """As the compiler hands it to the assembler; the next test reads what the assembler made of it."""
    for source in ("forward", "backward"):
        target = f"arch=compute_{ARCHITECTURE},code=compute_{ARCHITECTURE}"
        _nvcc("-gencode", target, "-ptx", "-o", str(tmp_path / "out.ptx"), str(CUDA / f"{source}.cu"))
        entries = [part.split("(", 1) for part in (tmp_path / "out.ptx").read_text().split(".entry ")[1:]]
        loads = {
            Kernels.name_of(symbol): len(re.findall(r"ld\.global\.nc\.v4\.\w32", body))
            for symbol, body in entries
        }
        assert {kernel: loads[kernel] for kernel in FAST[source]} == {
            kernel: _wide_loads(kernel) for kernel in FAST[source]
        }


def test_machine_code_of_the_fast_kernels(kernels):
    """The loads are still there, each with one instruction for its address, and nothing lives in local memory."""
    for source in ("forward", "backward"):
        instructions = kernels(source).instructions()
        for kernel in FAST[source]:
            operations = instructions[kernel]
            assert sum(name.startswith("LDG.E.128") for name in operations) == _wide_loads(kernel), kernel
            assert not any(name.startswith(("LDL", "STL")) for name in operations), kernel
            if source == "forward":
                addresses = sum(name.startswith("IMAD.WIDE") for name in operations)
                assert addresses < _wide_loads(kernel) + 16, kernel


def test_gradients_are_added_four_at_a_time(kernels):
    for kernel, operations in kernels("scatter_tiled").instructions().items():
        reductions = [name for name in operations if name.startswith("RED")]
        assert reductions and all(".F32x4" in name for name in reductions), kernel


@pytest.mark.parametrize("architecture", [75, 120])
def test_old_and_new_architectures_compile(tmp_path, architecture):
    """The build's other architectures, by the file with the most that depends on them."""
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    if f"sm_{architecture}" not in _nvcc("--list-gpu-code"):
        pytest.skip(f"this nvcc has no sm_{architecture}")
    log = _nvcc(
        "-gencode", target, "-cubin", "-o", str(tmp_path / "out.cubin"), str(CUDA / "scatter_tiled.cu")
    )
    assert "warning" not in log.replace("nvcc warning : Support for offline compilation", "")
