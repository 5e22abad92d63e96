"""What the README says is what the files say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from ldm_dcn.config import load_config, valid_keys
from tiny import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]


def test_the_tables_are_those_of_the_json() -> None:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    assert spec is not None and spec.loader is not None
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    assert all(f"<!-- {name} -->" in README for name in readme.TABLES)
    assert readme.with_tables(README) == README, "run `python benchmarks/readme.py`"
    assert readme.with_tables(README.replace("| class accuracy | ", "| class accuracy | 9", 1)) == README


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_files_that_are_named_are_there(text: Path) -> None:
    content = text.read_text(encoding="utf-8")
    named = set(
        re.findall(
            r"(?:configs|docs|benchmarks|tests|ldm_dcn|dcnv4_ext|eval)/[\w./-]*\w(?![\w./*-])", content
        )
    )
    named |= {target for target in re.findall(r"\]\(([\w./-]+)\)", content) if "://" not in target}
    missing = [name for name in named if not (ROOT / name).exists() and not (text.parent / name).exists()]
    assert not missing


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_settings_that_are_named_exist(text: Path) -> None:
    """Every `section.key=value` of the texts, with that value where it is one."""
    content = text.read_text(encoding="utf-8")
    found = set(re.findall(r"\b(?:train|data|diffusion|sample)\.[a-z_0-9]+=[\w.\[\]-]*\w\]?", content))
    for override in found:
        setting, _, value = override.partition("=")
        assert setting in valid_keys()
        if not value.isupper():  # a placeholder such as N
            load_config(ROOT / "configs" / "digits_unet.yaml", [override])


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_modules_that_are_run_exist(text: Path) -> None:
    for module in set(re.findall(r"python -m ([\w.]+)", text.read_text(encoding="utf-8"))):
        assert importlib.util.find_spec(module) is not None, module
