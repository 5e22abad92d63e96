"""Where `eval.fid` keeps its tables by itself, and `eval.report` finds them: fid-EXTRACTOR-IMAGES.json in the folder of the run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from ldm_dcn.export import EXPORTS, is_run

MACHINE = ("cpu", "gpu", "threads", "processes")  # of a table's environment: what its speeds are of


def folder_of(path: str) -> Path | None:
    """The folder for tables about a run or an export: of an export in a run the run's, which stays when the export is replaced.

    None for what is no folder here, such as a hub id.
    """
    folder = Path(os.path.abspath(path))
    if not folder.is_dir():
        return None
    around = folder.parent.parent if folder.parent.name == EXPORTS else folder.parent
    if is_run(folder) or not is_run(around):
        return Path(path)
    return around if os.path.isabs(path) else Path(os.path.relpath(around))


def files_of(path: str) -> list[Path]:
    """The tables about a run or an export that lie in its folder; fid.json is what they were called once."""
    folder = folder_of(path)
    return sorted([*folder.glob("fid.json"), *folder.glob("fid-*.json")]) if folder else []


def place_for(table: Mapping[str, Any], folder: Path) -> Path:
    """Where in `folder` a `table`, as plain values, replaces none but the same one measured before."""
    extractor = re.sub(r"[^\w.=-]+", "_", table["extractor"]["name"])
    stem = f"fid-{extractor}-{table['columns'][0]['tags']['N']}"
    for number in count(1):
        file = folder / f"{stem}.json" if number == 1 else folder / f"{stem}-{number}.json"
        if not file.exists() or _same(file, table):
            return file
    raise AssertionError


def _same(file: Path, table: Mapping[str, Any]) -> bool:
    try:
        return _measured(json.loads(file.read_text(encoding="utf-8"))) == _measured(table)
    except (ValueError, KeyError, TypeError, AttributeError):  # another program's, or damaged: it stays
        return False


def _measured(table: Mapping[str, Any]) -> str:
    """All of a table but its numbers."""
    columns = [(column["name"], column["tags"]) for column in table["columns"]]
    machine = [table["environment"].get(key) for key in MACHINE]
    return json.dumps(
        [table["metric"], table["extractor"], table["reference"], columns, machine],
        sort_keys=True,
        default=str,
    )
