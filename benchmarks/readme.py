"""The tables of README.md and of docs, made from the JSON under benchmarks/results: `python benchmarks/readme.py` writes them in.

A table stands between `<!-- NAME -->` and `<!-- end -->`; tests/test_readme.py fails where one is not what the JSON says.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "evidence.md", ROOT / "docs" / "photographs.md")
RESULTS = Path(__file__).resolve().parent / "results"

SCORES = [
    ("{metric}", "fd", "{:.3f}"),
    ("share of noise's", "fd_of_noise", "{:.3%}"),
    ("{kid} x 1000", "kid_x1000", "{:.1f}"),
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
    rows.append(["images", *(f"{column['tags']['N']:,}" for column in columns)])
    for title, key, form in SCORES:
        cells = (form.format(c["scores"][key]) if key in c["scores"] else "-" for c in columns)
        rows.append([title.format(metric=results["metric"], kid=results["names"]["kid_x1000"]), *cells])
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


def study(results: dict[str, Any]) -> str:
    """Every comparison of an `eval.study` without guidance, and in words what differs."""
    from eval.comparison import rows_of, verdicts
    from eval.protocol import Study, comparisons_of

    read = Study.model_validate(results["study"])
    parts = []
    for title, names in comparisons_of(read).items():
        (_, *header), *rows = rows_of(results, names, "1")
        parts.append(markdown([[f"**{title}**", *header], *rows]))
    parts.append("\n".join(f"- {sentence}" for sentence in verdicts(results) if "guidance 1:" in sentence))
    return "\n\n".join(parts)


def ablations_speed(results: dict[str, Any]) -> str:
    """Geometric means over Stable Diffusion's shapes, as multiples of the plain module's or operator's time."""
    from statistics import geometric_mean

    times: dict[tuple[str, str], dict[str, list[float]]] = {}
    for record in results["records"]:
        for label, seconds in record["seconds"].items():
            if label != "dcnv4":
                ratio = seconds / record["seconds"]["dcnv4"]
                times.setdefault((label, record["level"]), {}).setdefault(record["direction"], []).append(
                    ratio
                )
    rows = [["changed", "of", "forward, time / dcnv4's", "backward, time / dcnv4's"]]
    for (label, level), found in times.items():
        means = (f"{geometric_mean(found[direction]):.2f}" for direction in ("forward", "backward"))
        rows.append([label, {"op": "the operator", "module": "the module"}[level], *means])
    return markdown(rows)


def operators(results: dict[str, Any], dtypes: Sequence[str] = (), leave_out: Sequence[str] = ()) -> str:
    """How many times as long as dcnv4 the peers take, at the operator level; a dash where one was not measured."""
    from statistics import geometric_mean

    from eval.peers import PEERS

    records = [r for r in results["measurements"] if r["level"] == "op" and r["sigma"] == 2]
    records = [r for r in records if not dtypes or r["dtype"] in dtypes]
    names = [name for name in PEERS if name != "dcnv4" and any(name in r["times"] for r in records)]
    names = [name for name in names if name not in leave_out]
    rows = [["", "", *(PEERS[name].label for name in names)]]
    for dtype, direction in operator_kinds(records):
        chosen = [r for r in records if (r["dtype"], r["direction"]) == (dtype, direction)]
        found = {name: [times_as_long(r, name) for r in chosen if name in r["times"]] for name in names}
        for r in chosen:
            ratios = (f"{times_as_long(r, n):.2f}" if n in r["times"] else "-" for n in names)
            rows.append([f"{direction}, {dtype}", r["shape"], *ratios])
        means = (f"**{geometric_mean(found[name]):.2f}**" if found[name] else "-" for name in names)
        rows.append([f"{direction}, {dtype}", "geometric mean", *means])
    return markdown(rows)


def full_size(results: dict[str, Any]) -> str:
    """The table of benchmarks/full_size.py: a row a network."""
    rows = [["", "whole run", "memory", "first loss", "last loss"]]
    for run in results["runs"]:
        losses = (f"{run['losses'][step]:.3f}" for step in (0, -1))
        rows.append([f"`{run['config']}`", f"{run['seconds']:.0f} s", f"{run['peak_gib']:.1f} GiB", *losses])
    return markdown(rows)


def networks(results: dict[str, Any]) -> str:
    """Times of `eval.throughput` at each batch: milliseconds of the last network, multiples of them of the others."""
    from statistics import median

    titles = {"forward": "forward", "training": "training step", "sampling": "sampling, 10 steps"}
    rows: list[list[str]] = []
    for name, measured in results["measurements"].items():
        *swapped, base = measured["figures"]
        if not rows:
            names = (f"`{f['name']}`, {f['parameters'] / 1e6:.0f} M" for f in measured["figures"])
            rows.append(["", "", *names])
        for key in (key for key in titles if key in base["timings"]):
            of_base = base["timings"][key]["seconds"]
            ratios = (
                median(a / b for a, b in zip(f["timings"][key]["seconds"], of_base, strict=True))
                for f in swapped
            )
            rows.append(
                [
                    name.split(",")[0],
                    titles[key],
                    *(f"{r:.2f}" for r in ratios),
                    f"{1e3 * median(of_base):.0f} ms",
                ]
            )
        peaks = (f"{f['peak_bytes'] / 2**30:.1f} GiB" for f in measured["figures"])
        rows.append([name.split(",")[0], "peak memory of a training step", *peaks])
    return markdown(rows)


def scaling(results: dict[str, Any]) -> str:
    """How many times as fast all threads are as one, of `benchmarks/cpu_scaling.py`: a row a shape."""
    records = results["measurements"]
    kinds = dict.fromkeys((r["direction"], r["dtype"]) for r in records)
    rows = [["", *(f"{direction}, {dtype}" for direction, dtype in kinds)]]
    for shape in dict.fromkeys(r["shape"] for r in records):
        found = {(r["direction"], r["dtype"]): r["speedup"] for r in records if r["shape"] == shape}
        rows.append([shape, *(f"{found[kind]:.2f}" for kind in kinds)])
    return markdown(rows)


def operator_kinds(records: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    dtypes = dict.fromkeys(r["dtype"] for r in records)
    return [(dtype, direction) for dtype in dtypes for direction in ("forward", "backward")]


def times_as_long(record: dict[str, Any], peer: str) -> float:
    return record["times"][peer]["median"] / record["times"]["dcnv4"]["median"]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "digits_compare": scores,
    "digits_throughput": throughput,
    "digits_study": study,
    "ablations": study,
    "ablations_speed": ablations_speed,
    "operators_cpu": operators,
    "operators_cpu_intel": operators,
    "cpu_scaling": scaling,
    "operators_cpu_avx2": operators,
    "operators_nvidia_h200": partial(
        operators,
        dtypes=("bfloat16", "float32"),
        leave_out=("attention_math", "depthwise_native", "dcnv3_rule"),
    ),
    "networks_nvidia_h200": networks,
    "photographs_compare": scores,
    "full_size_cpu": full_size,
}


def with_tables(text: str) -> str:
    """`text` with every table replaced by what its JSON says."""

    def table(match: re.Match[str]) -> str:
        results = json.loads((RESULTS / f"{match[1]}.json").read_text(encoding="utf-8"))
        return f"<!-- {match[1]} -->\n{TABLES[match[1]](results)}\n<!-- end -->"

    return re.sub(rf"<!-- ({'|'.join(TABLES)}) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for document in DOCUMENTS:
        document.write_text(with_tables(document.read_text(encoding="utf-8")), encoding="utf-8")
