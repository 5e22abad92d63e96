"""`python -m dcnv4_ext`: what is built, for which processors and architectures, and what is missing with its mend."""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import sys

import torch

from . import __version__, native


def _cpu_lines() -> tuple[list[str], bool]:
    try:
        library = native.cpu()
    except (native.MissingLibrary, ValueError) as error:
        return [f"CPU library    missing: {error}"], False
    available = library.dcnv4_cpu_isas().decode().split()
    chosen = library.dcnv4_cpu_selected().decode()
    lines = [
        f"CPU library    {native.library_file('cpu')}",
        f"  kernels      {', '.join(available)} run on this {platform.machine()} processor; {chosen} is used",
        f"  threads      {torch.get_num_threads()} (torch.set_num_threads changes it)",
    ]
    return lines, True


def _cuda_lines() -> list[str]:
    if torch.version.hip:
        return [f"CUDA library   not used: {native.NO_ROCM}"]
    if native.library_file("cuda") is None:
        nvcc = shutil.which("nvcc")
        here = f"nvcc is at {nvcc} now" if nvcc else f"with {native.NVCC_FROM}"
        return [
            "CUDA library   not built: the build found no nvcc and fetched none, or was given DCNV4_CUDA=OFF",
            f"  to build it  {here}: run `{native.BUILD_COMMAND}` in the project's folder, without DCNV4_CUDA=OFF",
        ]
    try:
        library = native.cuda()
    except native.MissingLibrary as error:
        return [f"CUDA library   broken: {error}"]
    built = library.dcnv4_cuda_architectures().decode()
    lines = [f"CUDA library   {native.library_file('cuda')}", f"  built for    {built}"]
    if torch.version.cuda is None:
        lines.append(
            f"  torch        {torch.__version__} has no CUDA: tensors stay on the CPU; install a CUDA build of torch"
        )
    elif not torch.cuda.is_available():
        lines.append(
            f"  GPU          none visible to torch {torch.__version__} (CUDA {torch.version.cuda}); check nvidia-smi"
        )
    else:
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            name = torch.cuda.get_device_name(index)
            lines.append(f"  GPU {index}        {name}, sm_{major}{minor}: {_fit(built, major, minor)}")
    return lines


def _fit(built: str, major: int, minor: int) -> str:
    """Whether code of the architectures in `built` ("sm_80 sm_90a compute_90") runs on a GPU of this capability."""
    entries = re.findall(r"(sm|compute)_(\d+)([af]?)", built)
    if len(entries) < len(built.split()):  # CMake's "native" or "all"
        return "what the build chose; a call tells whether it runs"
    wanted = 10 * major + minor
    fitting = {kind for kind, number, suffix in entries if _runs(kind, int(number), suffix, wanted)}
    if "sm" in fitting:
        return "runs this build's code"
    if "compute" in fitting:
        return "runs this build's PTX, compiled by the driver at first use"
    return f"no code for it; rebuild with `CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES={major}{minor} {native.BUILD_COMMAND}`"


def _runs(kind: str, number: int, suffix: str, wanted: int) -> bool:
    """Machine code runs on its own and later minor versions, PTX on later major ones too; "a" runs on its own alone, "f" as machine
    code does (CUDA C++ Programming Guide, compute capabilities)."""
    if suffix == "a" or number > wanted:
        return number == wanted
    return number // 10 == wanted // 10 or (kind, suffix) == ("compute", "")


def main() -> int:
    argparse.ArgumentParser("python -m dcnv4_ext", description=__doc__).parse_args()
    print(
        f"dcnv4_ext {__version__}, Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}"
    )
    cpu_lines, works = _cpu_lines()
    print("\n".join(cpu_lines + _cuda_lines()))
    return 0 if works else 1


if __name__ == "__main__":
    sys.exit(main())
