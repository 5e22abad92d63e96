"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: those of the CPU, every instruction set, and the CUDA ones
under emulation. The first finding ends the run with status 1.

    python tests/emulation/sanitize.py [cpu | cuda] [arguments of pytest]

Without a name both run. Needs g++ (or $CXX) with its sanitizer libraries; cmake for the CPU kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys

from build import CACHE, HERE, NoCompiler, compiler

TESTS = HERE.parent
FILES = {"cpu": TESTS / "test_operator.py", "cuda": TESTS / "test_cuda_emulated.py"}
CPU_BUILD = CACHE / "cpu_sanitized"


def build_cpu() -> None:
    """The CPU library by the project's own CMakeLists.txt; only what has changed is compiled again."""
    options = ["-DDCNV4_SANITIZE=ON", "-DDCNV4_CUDA=OFF", f"-DCMAKE_CXX_COMPILER={compiler()[0]}"]
    for command in (
        ["cmake", "-S", str(TESTS.parent), "-B", str(CPU_BUILD), *options],
        ["cmake", "--build", str(CPU_BUILD), "--parallel"],
    ):
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            raise NoCompiler("no cmake on PATH; install it (pip install cmake)") from None


def pytest_configure() -> None:
    """This file is the pytest plugin of its CPU run too: dcnv4_ext is to load the library built here."""
    from dcnv4_ext import native

    native.library_file = {"cpu": CPU_BUILD / "dcnv4_cpu.so"}.get


def run(kind: str, arguments: list[str]) -> int:
    libraries = [
        subprocess.run(
            [*compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),  # Python itself is not built with them
        # Sizes beyond all memory are refused, as they are without it.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "DCNV4_SANITIZE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    plugin = ["-p", "sanitize"] if kind == "cpu" else []
    # Output unbuffered: a finding ends the process at once.
    return subprocess.call(
        # Sanitized, a test takes some twenty times as long.
        [
            sys.executable,
            "-m",
            "pytest",
            *plugin,
            "--timeout",
            "3600",
            "-s",
            "-x",
            str(FILES[kind]),
            *arguments,
        ],
        env=environment,
    )


def main() -> int:
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    kinds = [arguments.pop(0)] if arguments and arguments[0] in FILES else list(FILES)
    if "cpu" in kinds:
        build_cpu()
    return max(run(kind, arguments) for kind in kinds)


if __name__ == "__main__":
    sys.exit(main())
