"""The README's tables, made from the JSON under benchmarks/results: `python benchmarks/readme.py` writes them in.

A table stands between `<!-- NAME -->` and `<!-- end -->`; tests/test_readme.py fails where one is not what the JSON says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = Path(__file__).resolve().parent / "results"

SCORES = [
    ("FD-digits-v1", "fd", "{:.3f}"),
    ("share of noise's", "fd_of_noise", "{:.3%}"),
    ("KID-digits-v1 x 1000", "kid_x1000", "{:.1f}"),
    ("precision, k=3", "precision", "{:.3f}"),
    ("recall, k=3", "recall", "{:.3f}"),
    ("class accuracy", "class_accuracy", "{:.3f}"),
    ("nearest neighbour, rms grey levels", "nearest_neighbour", "{:.1f}"),
    ("images/s", "images_per_second", "{:.0f}"),
]


def scores(results: dict[str, Any]) -> str:
    """The table of `eval.fid`: a column each set of images."""
    columns = results["columns"]
    rows = [["", *(column["name"] for column in columns)]]
    for title, key, form in SCORES:
        cells = (form.format(c["scores"][key]) if key in c["scores"] else "-" for c in columns)
        rows.append([title, *cells])
    return markdown(rows)


def throughput(results: dict[str, Any]) -> str:
    """The table of `eval.throughput`: a column each network, times as multiples of the last one's."""
    from statistics import median

    figures = results["figures"]
    base = figures[-1]
    rows = [["", *(figure["name"] for figure in figures)]]
    rows.append(["parameters", *(f"{figure['parameters'] / 1e6:.3f} M" for figure in figures)])
    rows.append(["MACs of a forward, one image", *(f"{figure['macs'] / 1e6:.1f} M" for figure in figures)])
    for key, title in (
        ("forward", "forward"),
        ("training", "training step"),
        ("drawing", "sampling with autoencoder"),
    ):
        times = [figure["timings"][key]["seconds"] for figure in figures]
        ratios = [median(a / b for a, b in zip(own, times[-1], strict=True)) for own in times]
        rows.append([f"{title}, time / {base['name']}'s", *(f"{ratio:.2f}" for ratio in ratios)])
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "digits_compare": scores,
    "digits_throughput": throughput,
}


def with_tables(text: str) -> str:
    """`text` with every table replaced by what its JSON says."""

    def table(match: re.Match[str]) -> str:
        results = json.loads((RESULTS / f"{match[1]}.json").read_text(encoding="utf-8"))
        return f"<!-- {match[1]} -->\n{TABLES[match[1]](results)}\n<!-- end -->"

    return re.sub(rf"<!-- ({'|'.join(TABLES)}) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
