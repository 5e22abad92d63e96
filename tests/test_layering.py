"""The direction of imports: train.py, sample.py, eval -> ldm_dcn -> dcnv4_ext -> torch, never back."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["dcnv4_ext", "ldm_dcn", "eval"]
FORBIDDEN_BELOW = {"diffusers", "accelerate", "torchmetrics", "transformers"}  # what dcnv4_ext must not need


@cache
def nodes(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text())))


def imported(file: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, the relative ones by their package's name."""
    names = set()
    for node in nodes(file):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_imports_go_one_way() -> None:
    seen = 0
    for level, package in enumerate(LAYERS):
        above = {*LAYERS[level + 1 :], "train", "sample", "tests"}
        for file in (ROOT / package).rglob("*.py"):
            assert not imported(file) & above, f"{file.relative_to(ROOT)} imports {imported(file) & above}"
            seen += 1
    assert seen > 20
    for file in (ROOT / "dcnv4_ext").rglob("*.py"):
        assert not imported(file) & FORBIDDEN_BELOW, file


def of_package(file: Path) -> set[str]:
    """The files of `package` that one of them imports, anywhere and for whatever reason, by their dotted names."""
    base = file.relative_to(ROOT).parent.parts  # of a file and of its folder's __init__ alike
    found = set()
    for node in nodes(file):
        if isinstance(node, ast.ImportFrom):
            above = ".".join(base[: len(base) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("package", LAYERS)
def test_no_file_imports_itself_in_a_circle(package: str) -> None:
    """Also where the import stands in a function or is for type checkers alone: two nouns that need each other are one."""
    names = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): file
        for file in (ROOT / package).rglob("*.py")
        if file.name != "__init__.py"
    }
    graph = {name: of_package(file) & names.keys() for name, file in names.items()}
    assert sum(map(len, graph.values())) >= len(graph) // 2
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_only_train_and_the_loops_stopwatch_know_the_trainer() -> None:
    for file in [*(ROOT / "ldm_dcn").rglob("*.py"), *(ROOT / "eval").rglob("*.py"), ROOT / "sample.py"]:
        if file == ROOT / "eval" / "loop.py":  # times the trainer's own step
            continue
        for node in nodes(file):
            if isinstance(node, ast.ImportFrom):
                modules = {node.module or "", *(alias.name for alias in node.names)}
                assert not any(module.split(".")[-1] == "trainer" for module in modules), file


IMPORTS = """
import sys
import ldm_dcn
assert not {"torch", "diffusers", "dcnv4_ext"} & set(sys.modules)
import torch
before = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
import dcnv4_ext, ldm_dcn, dcnv4_ext.native
assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
assert dcnv4_ext.native.cpu.cache_info().currsize == 0
assert "diffusers" not in sys.modules
assert set(ldm_dcn.__all__) <= set(dir(ldm_dcn))
from ldm_dcn import *
assert build_unet is ldm_dcn.build_unet
assert not torch.cuda.is_initialized()
"""


def test_import_does_nothing() -> None:
    """No output, no change of torch's settings, no library loaded, by importing either package, or all names of ldm_dcn."""
    result = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
