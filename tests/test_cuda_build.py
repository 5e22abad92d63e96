"""What nvcc makes of the CUDA kernels: registers, spills, the width of their loads. No GPU is needed.

`pip install` has compiled the same sources: where the installed library has code for an architecture and is younger than all it
was made of, its machine code is read, which says what ptxas says (`test_the_library_says_what_ptxas_says`). Else a file is
compiled here, for up to half a minute, and ptxas tells; without nvcc that is skipped.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dcnv4_ext import native
from emulation.library import kernel_name

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "dcnv4_ext" / "csrc" / "cuda"
MAIN = 90
# Compiling takes one or two minutes an architecture: the one whose machine code was measured always, the others on request.
ARCHITECTURES = [
    MAIN,
    *(
        pytest.param(n, marks=pytest.mark.slow(why="compiles for minutes"))
        for n in (75, 80, 86, 89, 100, 120)
    ),
]
# So that 6 blocks of 128 threads fit the 65,536 registers of a multiprocessor; a block of merge_tiles is one warp, and one of
# dot_matrix with cells of 128 bytes at most eight.
MOST_REGISTERS = {"merge_tiles": 128, "dot_matrix": 128}
OTHERWISE = 80


def _tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, below CUDA_HOME, beside a package's libraries, or in torch's compiler."""
    places = [Path(os.environ[key]) / "bin" for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    packages = importlib.util.find_spec("nvidia")
    places += sorted(
        bin
        for f in (packages.submodule_search_locations if packages else [])
        for bin in Path(f).glob("*/bin")
    )
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


def _cuobjdump(*arguments: str, folder: Path | None = None) -> str:
    """With `folder` what it extracts comes there."""
    disassembler = _tool("cuobjdump")
    if disassembler is None:
        pytest.skip("no cuobjdump: the machine code cannot be read here")
    return subprocess.run(
        [disassembler, *arguments], capture_output=True, text=True, check=True, cwd=folder
    ).stdout


class Kernels:
    """The kernels of one file in machine code: name and template arguments -> what is read of them."""

    def __init__(self, cubin: Path) -> None:
        self.cubin = cubin

    @functools.cached_property
    def usage(self) -> dict[tuple, dict[str, int]]:
        """What ptxas says of them (`Compiled`), from the code alone: it has the numbers, and spills are where local memory is touched."""
        found = {}
        pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
        for symbol, registers, stack, local in re.findall(pattern, _cuobjdump("-res-usage", str(self.cubin))):
            if kernel := kernel_name(symbol):
                touched = [name[:3] for name in self.instructions[kernel]]
                found[kernel] = {
                    "stack": int(stack) + int(local), "stores": touched.count("STL"), "loads": touched.count("LDL"),
                    "registers": int(registers),
                }  # fmt: skip
        return found

    @functools.cached_property
    def instructions(self) -> dict[tuple, list[str]]:
        """The machine instructions of every kernel."""
        parts = _cuobjdump("-sass", str(self.cubin)).split("Function : ")[1:]
        return {
            kernel: re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]+)", part)
            for part in parts
            if (kernel := kernel_name(part.split("\n", 1)[0].strip()))
        }


class Compiled(Kernels):
    """Those of a file that is compiled here."""

    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.DOTALL,
    )

    def __init__(self, source: str, architecture: int, folder: Path) -> None:
        if f"sm_{architecture}" not in _nvcc("--list-gpu-code").split():
            pytest.skip(f"this nvcc has no sm_{architecture}")
        super().__init__(folder / f"{source}.{architecture}.cubin")
        self.log = _nvcc(
            *("-gencode", f"arch=compute_{architecture},code=sm_{architecture}", "-cubin", "-Xptxas", "-v"),
            *("-o", str(self.cubin), str(CUDA / f"{source}.cu")),
        )
        assert "warning" not in self.log.replace("nvcc warning : Support for offline compilation", ""), (
            self.log
        )

    @functools.cached_property
    def usage(self) -> dict[tuple, dict[str, int]]:
        """What ptxas says of them."""
        return {
            # One is launched by none, but asked what it was compiled for.
            kernel: dict(zip(("stack", "stores", "loads", "registers"), map(int, numbers), strict=True))
            for symbol, *numbers in self.pattern.findall(self.log)
            if (kernel := kernel_name(symbol))
        }


class Installed:
    """The installed library, taken apart, where it was made of the sources as they are."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.library = folder, native.library_file("cuda")
        sources = [ROOT / "CMakeLists.txt", *CUDA.parent.glob("*.h"), *CUDA.iterdir()]
        made = self.library.stat().st_mtime if self.library and _tool("cuobjdump") else 0
        self.is_current = all(file.stat().st_mtime < made for file in sources)  # as make judges
        self.parts, self.kernels = map(functools.cache, (self._parts, self._kernels))

    def _parts(self, architecture: int) -> dict[tuple, Path]:
        """Files of machine code and of PTX by (kernel, suffix) for each kernel in them; none where the library lacks the architecture."""
        if not self.is_current:
            return {}
        folder = self.folder / str(architecture)
        folder.mkdir()
        for kind in ("elf", "ptx"):
            _cuobjdump("-arch", f"sm_{architecture}", f"-x{kind}", "all", str(self.library), folder=folder)
        found = {}
        for file in folder.iterdir():
            text = file.read_text() if file.suffix == ".ptx" else _cuobjdump("-symbols", str(file))
            for symbol in re.findall(r"\b_Z\w+", text):
                if kernel := kernel_name(symbol):
                    found[kernel, file.suffix] = file
        return found

    def _kernels(self, source: str, architecture: int) -> Kernels | None:
        """Those of a file. Where a fast one has a stack frame ptxas alone knows whether for spills: then, too, it is compiled."""
        cubin = self.parts(architecture).get((FAST[source][0], ".cubin"))
        made = Kernels(cubin) if cubin else None
        return made if made and not any(made.usage[kernel]["stack"] for kernel in FAST[source]) else None

    def ptx(self, source: str, architecture: int) -> str | None:
        file = self.parts(architecture).get((FAST[source][0], ".ptx"))
        return file.read_text() if file else None


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compiles a file once for an architecture."""
    folder = tmp_path_factory.mktemp("cubin")
    return functools.cache(lambda source, architecture: Compiled(source, architecture, folder))


@pytest.fixture(scope="module")
def kernels(installed, compiled):
    """A file's kernels for an architecture, from the installed library where they are there."""
    return functools.cache(
        lambda source, architecture: installed.kernels(source, architecture) or compiled(source, architecture)
    )


FAST_DEPTHS = (16, 32, 40, 64, 80, 128, 160)
# What 8 and 9 taps with these channels a group run, by file: N elements a vector, or pieces of 16 bytes a cell, and taps. That
# they run nothing else is a test in test_cuda_emulated.py.
WIDTHS = {"float": 4, "bf16": 8, "f16": 8}
FAST = {
    "forward": [("sample", t, n, k) for t, n in WIDTHS.items() for k in (8, 9)],
    "forward_window": [
        ("sample_window", t, units, k, runs)
        for t in WIDTHS
        for units in (2, 4, 8)
        for k in (8, 9)
        for runs in (0, 1)
        if units < 8 or t == "float" or runs
    ],
    "backward": [
        ("differentiate", t, n, k, scatter) for t, n in WIDTHS.items() for scatter in (0, 1) for k in (8, 9)
    ]
    + [("round_sums", t, 8) for t in ("bf16", "f16")],
    "backward_window": [
        (*kernel, k, runs)
        for kernel in (
            *(("dot_window", "float", units) for units in (4, 8)),
            *(("dot_matrix", t, halves) for t in ("bf16", "f16") for halves in (1, 2)),
        )
        for k in (8, 9)
        for runs in (0, 1)
    ],
    "scatter_sorted": [
        ("gather_sorted", t, units, k, whole, runs)
        for t in WIDTHS
        for units in (2, 4, 8)
        for k in (8, 9)
        for whole in (0, 1)
        for runs in ((0, 1) if t == "float" else (0,))
    ],
    "scatter_matrix": [
        ("gather_matrix", t, units, k, whole, runs)
        for t in ("bf16", "f16")
        for units in (2, 4, 8)
        for k in (8, 9)
        for whole in (0, 1)
        for runs in (0, 1)
    ],
    "scatter_tiled": [("merge_tiles", t) for t in WIDTHS],
    "scatter_ordered": [("gather_taps", t, 4) for t in WIDTHS] + [("find_taps", t) for t in WIDTHS],
}


SORTED = ("scatter_sorted", "scatter_matrix")  # kernel[4] tells those for a whole map


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", FAST)
def test_fast_kernels_keep_everything_in_registers(kernels, source, architecture):
    usages = kernels(source, architecture).usage
    for kernel in FAST[source]:
        if kernel[0] in ("dot_matrix", "gather_matrix") and architecture < 80:
            continue  # there are no matrix units for it, and it is not launched
        usage = usages[kernel]
        assert usage["stores"] == usage["loads"] == 0, (kernel, usage)
        assert usage["stack"] == 0 or _stores_for_boxes(kernel, architecture), (kernel, usage)
        assert usage["registers"] <= MOST_REGISTERS.get(kernel[0], OTHERWISE), (kernel, usage)


def _stores_for_boxes(kernel: tuple, architecture: int) -> bool:
    """For sm_120 ptxas writes zeros to local memory, which nothing reads, before each box that it has fetched: once a block."""
    boxes = (
        kernel[0] in ("sample_window", "dot_window", "dot_matrix", "gather_sorted", "gather_matrix")
        and kernel[-1] == 1
    )
    return architecture == 120 and boxes


def _wide_loads(kernel: tuple) -> int:
    """16-byte loads in a fast kernel: one a tap and corner, and in backward one of the output's gradient."""
    if kernel[0] == "round_sums":
        return 2  # eight floats
    return 4 * kernel[3] + (kernel[0] == "differentiate")


SOONEST = "scatter_tiled"  # of all files it is compiled


@pytest.mark.parametrize(
    "source", [SOONEST, *(pytest.param(n, marks=pytest.mark.slow(why="compiles for minutes")) for n in FAST if n != SOONEST)]
)  # fmt: skip
def test_the_library_says_what_ptxas_says(installed, compiled, source):
    """Registers, stack frame and spills of every kernel; and its instructions are those of the file compiled alone."""
    said = compiled(source, MAIN)
    read = installed.kernels(source, MAIN) or Kernels(said.cubin)
    assert read.usage.keys() == said.usage.keys() >= set(FAST[source])
    for kernel, usage in said.usage.items():
        compared = (
            ("registers", "stack") if usage["stack"] else usage
        )  # in a frame local memory may be an array
        assert all(read.usage[kernel][name] == usage[name] for name in compared), kernel
    assert read.instructions == said.instructions


@pytest.mark.parametrize("source", FAST)
def test_the_compiler_has_no_warnings(source, tmp_path):
    """Those of its front end; what is compiled in other tests is read for those of ptxas too."""
    known = "--fdevice-syntax-only" in _nvcc("--help")
    log = _nvcc(
        *("-gencode", f"arch=compute_{MAIN},code=sm_{MAIN}", "-cubin", "-o", str(tmp_path / "out.cubin")),
        *(["-fdevice-syntax-only"] if known else []),
        str(CUDA / f"{source}.cu"),
    )
    assert "warning" not in log, log


@pytest.mark.parametrize("source", ["forward", "backward"])
def test_fast_kernels_load_16_bytes_at_a_time(installed, source, tmp_path):
    """As the compiler hands it to the assembler; the next test reads what the assembler made of it."""
    code = installed.ptx(source, MAIN)
    if code is None:
        target = f"arch=compute_{MAIN},code=compute_{MAIN}"
        _nvcc("-gencode", target, "-ptx", "-o", str(tmp_path / "out.ptx"), str(CUDA / f"{source}.cu"))
        code = (tmp_path / "out.ptx").read_text()
    entries = [part.split("(", 1) for part in code.split(".entry ")[1:]]
    loads = {
        kernel_name(symbol): len(re.findall(r"ld\.global(?:\.nc)?\.v4\.\w32", body))
        for symbol, body in entries
    }
    assert {kernel: loads[kernel] for kernel in FAST[source]} == {
        kernel: _wide_loads(kernel) for kernel in FAST[source]
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", ["forward", "backward"])
def test_machine_code_of_the_fast_kernels(kernels, source, architecture):
    """The loads are still there, on sm_90 each with one instruction for its address, and nothing lives in local memory."""
    instructions = kernels(source, architecture).instructions
    for kernel in FAST[source]:
        operations = instructions[kernel]
        assert sum(name.startswith("LDG.E.128") for name in operations) == _wide_loads(kernel), kernel
        assert not any(name.startswith(("LDL", "STL")) for name in operations), kernel
        if kernel[0] == "sample" and architecture == MAIN:
            addresses = sum(name.startswith("IMAD.WIDE") for name in operations)
            assert addresses < _wide_loads(kernel) + 16, kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_windows_are_read_16_bytes_at_a_time(kernels, architecture):
    """Corners come from shared memory, 16 bytes a thread or as matrices, and get there past the registers where that is possible."""
    for source in ("forward_window", "backward_window"):
        for kernel, operations in kernels(source, architecture).instructions.items():
            if kernel[0] == "dot_matrix" and architecture < 80:
                continue  # not launched there
            count = {
                name: sum(op.startswith(name) for op in operations)
                for name in ("LDSM", "LDGSTS", "UTMALDG", "HMMA")
            }
            wide = sum(op.startswith("LDS") and ".128" in op for op in operations)
            if kernel[0] == "dot_matrix":
                assert count["LDSM"] >= 4 and count["HMMA"] >= 4, (kernel, count)
            else:
                # Of one tap at least, where the loop is not unrolled; a thread may have two corners and their weights.
                assert wide >= 3, (kernel, wide)
            boxes = kernel[-1] == 1 and architecture >= 90  # before, a kernel with runs is not launched
            # The window and the numbers of offset_mask; beside matrices grad_output too.
            expected = (3 if kernel[0] == "dot_matrix" else 2) if boxes else 0
            assert count["UTMALDG"] == expected, (kernel, count)
            assert architecture < 80 or kernel[-1] == 1 or count["LDGSTS"] > 0, (kernel, count)
            local = [op for op in operations if op.startswith(("LDL", "STL"))]
            most = expected if _stores_for_boxes(kernel, architecture) else 0
            assert len(local) <= most and not any(op.startswith("LDL") for op in local), kernel


# Launched so that they may begin while what writes their tensors still runs; before sm_90 they are not.
EARLY = {"sample", "sample_window", "round_sums"}
# These may have inputs that are there already, where what runs before them is of the same call: they wait later then.
LATE = {"dot_window", "dot_matrix", "gather_sorted", "gather_matrix"}


@pytest.mark.parametrize(
    "source",
    ["forward", "forward_window", "backward", "backward_window", "scatter_sorted", "scatter_matrix"],
)
def test_kernels_that_start_early_wait_before_they_touch_memory(kernels, source):
    """The compiler may move a read of what it takes for constant past anything."""
    memory = ("LD.", "LDG", "ST.", "STG", "RED", "ATOM.", "ATOMG", "UTMALDG")
    for kernel, operations in kernels(source, MAIN).instructions.items():
        first = next(i for i, name in enumerate(operations) if name.startswith(memory))
        waits = [i for i, name in enumerate(operations) if name == "ACQBULK"]
        assert len(waits) == (2 if kernel[0] in LATE else kernel[0] in EARLY), kernel
        assert all(i < first for i in waits[:1]), kernel
        if kernel[0].startswith("gather"):  # what it adds to has been cleared by then
            assert not any(name.startswith(("ST.", "STG", "RED")) for name in operations[: waits[1]]), kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "source", ["forward", "forward_window", "backward", "scatter_sorted", "scatter_matrix"]
)
def test_results_are_stored_in_one_piece(kernels, source, architecture):
    """16 bytes a thread, 8 where two threads share them: the compiler made four stores of one where it did not see through."""
    instructions = kernels(source, architecture).instructions
    for kernel in FAST[source]:
        if kernel[0] == "differentiate" or (source in SORTED and kernel[4] == 0):
            continue  # offsets are stored one by one, tiles are reduced
        stores = [name for name in instructions[kernel] if name.startswith("STG")]
        halved = kernel[0] == "gather_matrix" or kernel[::2][:2] == ("sample_window", 2)
        width = ".64" if halved else ".128"
        assert stores and all(width in name for name in stores), (kernel, stores)


@pytest.mark.parametrize("source", ["scatter_tiled", *SORTED])
def test_gradients_are_added_four_at_a_time(kernels, source):
    for kernel, operations in kernels(source, MAIN).instructions.items():
        if source in SORTED and kernel[4] == 1:
            continue  # a whole map's are stored
        reductions = [name for name in operations if name.startswith("RED")]
        assert reductions and all(".F32x4" in name for name in reductions), kernel
