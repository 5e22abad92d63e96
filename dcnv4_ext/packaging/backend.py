"""The build backend of pyproject.toml (PEP 517): scikit-build-core, and nvcc from PyPI where the CUDA library is wanted and no
toolkit is there. pip installs it for the time of the build alone.

Wanted is what DCNV4_CUDA says: OFF never, ON always, AUTO (the default) where an NVIDIA driver is installed. Whether a GPU is
visible is not asked.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# PyPI has nvcc since CUDA 13. The first release of it: code of a later one's PTX would need a driver as late.
NVCC = [f"nvidia-{part}==13.0.*" for part in ("cuda-nvcc", "cuda-crt", "cuda-cccl", "cuda-runtime", "nvvm")]
DEFAULT_ROOT = "/usr/local/cuda"
LEAST_DRIVER = 13000  # what programs of CUDA 13 need, as cuDriverGetVersion counts
Settings = dict[str, "str | list[str]"] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*_base().get_requires_for_build_wheel(config_settings), *nvcc_requirements(config_settings)]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*_base().get_requires_for_build_editable(config_settings), *nvcc_requirements(config_settings)]


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    return _base().get_requires_for_build_sdist(config_settings)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    return _base().prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Settings = None) -> str:
    return _base().prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(folder: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    with _nvcc_named(config_settings):
        return _base().build_wheel(folder, config_settings, metadata_directory)


def build_editable(
    folder: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    with _nvcc_named(config_settings):
        return _base().build_editable(folder, config_settings, metadata_directory)


def build_sdist(folder: str, config_settings: Settings = None) -> str:
    return _base().build_sdist(folder, config_settings)


def _base():
    from scikit_build_core import build

    return build


def nvcc_requirements(config_settings: Settings) -> list[str]:
    """What pip installs for the build so that there is an nvcc; nothing where there is one, or none is wanted or would be of use."""
    definitions = _definitions(config_settings)
    choice = _choice(definitions)
    if choice == "OFF" or sys.platform != "linux" or _is_named(definitions) or _toolkit():
        return []
    driver = driver_version()
    of_use = choice == "ON" if driver is None else driver >= LEAST_DRIVER
    return NVCC if of_use else []


def _definitions(config_settings: Settings) -> dict[str, str]:
    """CMake's cache entries as scikit-build-core will hand them over: of its settings, by pip's options or the environment, and of
    CMAKE_ARGS, which comes last on the command line."""
    given: dict[str, list[str]] = {"cmake.define": [], "cmake.args": []}
    for name, variable in (("cmake.define", "SKBUILD_CMAKE_DEFINE"), ("cmake.args", "SKBUILD_CMAKE_ARGS")):
        given[name] += os.environ.get(variable, "").split(";")
    for name, value in (config_settings or {}).items():
        setting, values = name.removeprefix("skbuild."), [value] if isinstance(value, str) else value
        if setting.startswith("cmake.define."):
            given["cmake.define"] += [f"{setting.removeprefix('cmake.define.')}={one}" for one in values]
        elif setting in given:
            given[setting] += [part for one in values for part in one.split(";")]
    arguments = given["cmake.args"] + shlex.split(os.environ.get("CMAKE_ARGS", ""))
    entries = given["cmake.define"] + [one[2:] for one in arguments if one.startswith("-D")]
    pairs = (entry.partition("=") for entry in entries)
    return {name.partition(":")[0].strip(): value.strip() for name, _, value in pairs}


def _choice(definitions: dict[str, str]) -> str:
    """AUTO, ON or OFF, from what CMake takes for a truth."""
    text = definitions.get("DCNV4_CUDA", "AUTO").upper()
    if text in ("", "0", "OFF", "NO", "N", "FALSE", "IGNORE", "NOTFOUND"):
        return "OFF"
    return "AUTO" if text == "AUTO" else "ON"


def _is_named(definitions: dict[str, str]) -> bool:
    """Whether the user names the CUDA compiler."""
    return bool(os.environ.get("CUDACXX") or definitions.get("CMAKE_CUDA_COMPILER"))


def _toolkit() -> Path | None:
    """The nvcc of this machine, looked for where torch's extensions look: CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda."""
    roots = [*map(os.environ.get, ("CUDA_HOME", "CUDA_PATH"))]
    named = (Path(root, "bin", "nvcc") for root in roots if root)
    on_path = shutil.which("nvcc")
    nvccs = [*named, *([Path(on_path)] if on_path else []), Path(DEFAULT_ROOT, "bin", "nvcc")]
    return next((nvcc for nvcc in nvccs if nvcc.is_file()), None)


def driver_version() -> int | None:
    """The newest CUDA that the installed driver runs, 12040 for 12.4; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int()
        failed = driver.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else version.value


@contextmanager
def _nvcc_named(config_settings: Settings) -> Iterator[None]:
    """Tells CMake, which looks on PATH alone, of the machine's nvcc, or else of PyPI's."""
    definitions = _definitions(config_settings)
    if _is_named(definitions) or _choice(definitions) == "OFF":
        yield
        return
    nvcc, before = _toolkit(), dict(os.environ)
    if nvcc is None:
        packages = (Path(entry, "nvidia", "cu13") for entry in sys.path)
        root = next((folder for folder in packages if (folder / "bin" / "nvcc").is_file()), None)
        if root is not None:
            nvcc = root / "bin" / "nvcc"
            # This nvcc looks for the runtime in lib64; the packages have lib.
            folders = [str(root / "lib"), *filter(None, [before.get("LIBRARY_PATH")])]
            os.environ["LIBRARY_PATH"] = os.pathsep.join(folders)
    if nvcc is not None:
        os.environ["CUDACXX"] = str(nvcc)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
