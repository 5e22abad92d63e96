"""The direction of imports: train.py, sample.py, eval -> ldm_dcn -> dcnv4_ext -> torch, never back."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = ["dcnv4_ext", "ldm_dcn", "eval"]
FORBIDDEN_BELOW = {"diffusers", "accelerate", "torchmetrics", "transformers"}  # what dcnv4_ext must not need


def imported(file: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, the relative ones by their package's name."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
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


def test_only_train_and_the_loops_stopwatch_know_the_trainer() -> None:
    for file in [*(ROOT / "ldm_dcn").rglob("*.py"), *(ROOT / "eval").rglob("*.py"), ROOT / "sample.py"]:
        if file == ROOT / "eval" / "loop.py":  # times the trainer's own step
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                modules = {node.module or "", *(alias.name for alias in node.names)}
                assert not any(module.split(".")[-1] == "trainer" for module in modules), file


def test_import_does_nothing() -> None:
    """No output, no change of torch's settings, no library loaded, by importing either package."""
    program = (
        "import torch; before = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled());"
        "import dcnv4_ext, ldm_dcn, dcnv4_ext.native;"
        "assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled());"
        "assert dcnv4_ext.native.cpu.cache_info().currsize == 0;"
        "import sys; assert 'diffusers' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
