"""Columns of a table of text, and what speaks against them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def in_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line a row: the first cell to the left, the others to the right, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def warnings_of(columns: Iterable[Any], extractor: Mapping[str, Any]) -> list[str]:
    """What `eval.fid` says against the numbers of a table, each once with the columns that it is about; they have `name` and `tags`."""
    said: dict[str, list[str]] = {}
    if warning := extractor.get("warning"):
        said[warning] = [f"extractor {extractor.get('name')}"]
    for column in columns:
        if warning := column.tags.get("warning"):
            said.setdefault(warning, []).append(column.name)
    return [f"{', '.join(names)}: {warning}" for warning, names in said.items()]
