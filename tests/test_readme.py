"""What the README says is what the files say."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from ldm_dcn.config import load_config, valid_keys
from tiny import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]


@pytest.fixture(scope="module")
def readme() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_json(readme: ModuleType) -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in readme.DOCUMENTS}
    for name in readme.TABLES:
        assert any(f"<!-- {name} -->" in text for text in texts.values()), name
    for path, text in texts.items():
        assert readme.with_tables(text) == text, f"{path.name}: run `python benchmarks/readme.py`"
    assert readme.with_tables(README.replace("| class accuracy | ", "| class accuracy | 9", 1)) == README


def test_results_say_what_made_them(readme: ModuleType) -> None:
    """Device, versions and command stand in every file of results; each is named in a text beside its command."""
    texts = "".join(path.read_text(encoding="utf-8") for path in TEXTS)
    for path in readme.RESULTS.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        made_with = content["environment"]
        assert (
            made_with["command"] and made_with["versions"]["torch"] and (made_with["gpu"] or made_with["cpu"])
        )
        assert path.name in texts, f"{path.name} is named in no text"


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
