"""Compiles the CUDA kernels of dcnv4_ext for the CPU, with a C++ compiler alone.

    python tests/emulation/build.py [--sanitize]     prints where the library lies

The result is kept in tests/.cache under a name made of everything that goes into it.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "dcnv4_ext" / "csrc"
CACHE = HERE.parent / ".cache"
# Some distributions switch on checks of longjmp that know no fibers: -U_FORTIFY_SOURCE.
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
# No fused multiply-adds behind the source's back: a GPU and this CPU need not agree on them, two runs of one build must.
OPTIMISED = ["-O1", "-ffp-contract=off"]
LEVEL = ["-O2"]  # of the emulation's own files, where most of a run is spent, and little of the compiling
SANITIZED = [
    *OPTIMISED,
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
]


class NoCompiler(RuntimeError):
    """There is no C++ compiler to build the emulation with."""


def compiler() -> list[str]:
    """$CXX or g++, as a command."""
    command = shlex.split(os.environ.get("CXX", "g++"))
    if not command or shutil.which(command[0]) is None:
        raise NoCompiler(f"no C++ compiler {' '.join(command)!r} on PATH; install g++ or set CXX")
    return command


def build(sanitize: bool = False) -> Path:
    """The shared library with the dcnv4_cuda_* functions on host pointers, built where it is not there yet."""
    command = compiler()
    flags = [*FLAGS, *(SANITIZED if sanitize else OPTIMISED)]
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), *sorted(HERE.glob("*.cpp"))]
    ingredients = [
        *sources,
        *sorted(CSRC.glob("*.h")),
        *sorted((CSRC / "cuda").glob("*.h")),
        *sorted(HERE.glob("*.h")),
    ]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr((command, flags, LEVEL, version)).encode())
    for path in ingredients:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    library = CACHE / f"cuda_emulated-{'sanitized-' if sanitize else ''}{digest.hexdigest()[:16]}.so"
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two processes that want it one compiles, the other waits
        if not library.exists():
            _compile(command, flags, sources, library)
    return library


def _compile(command: list[str], flags: list[str], sources: list[Path], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:

        def compile_one(source: Path) -> Path:
            target = Path(folder) / f"{source.stem}.o"
            level = LEVEL if source.parent == HERE else []
            _run(
                [*command, *flags, *level, "-I", str(HERE), "-x", "c++", "-c", str(source), "-o", str(target)]
            )
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        linked = Path(folder) / "linked.so"
        _run([*command, *flags, "-shared", *map(str, objects), "-o", str(linked)])
        os.replace(linked, library)  # whole or not at all


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels for the CPU.")
    parser.add_argument(
        "--sanitize", action="store_true", help="with AddressSanitizer and UndefinedBehaviorSanitizer"
    )
    print(build(parser.parse_args().sanitize))
