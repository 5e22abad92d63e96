"""The comparisons of a study in numbers and words: means and spreads over seeds, an exact permutation test, tables."""

from __future__ import annotations

import functools
import itertools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .columns import in_columns
from .protocol import Study, comparisons_of

SIGNIFICANT = 0.05
MOST_HANDS = 10**6
# score -> (title, form, whether more is better; None where neither is, or where another row says the same)
SCORES: dict[str, tuple[str, str, bool | None]] = {
    "fd": ("FD", "{:.4f}", False),
    "fd_of_noise": ("share of noise's FD", "{:.3%}", None),
    "kid_x1000": ("KID x 1000", "{:.2f}", False),
    "class_accuracy": ("class accuracy", "{:.4f}", True),
    "precision": ("precision", "{:.3f}", True),
    "recall": ("recall", "{:.3f}", True),
    "nearest_neighbour": ("nearest neighbour", "{:.2f}", None),
}


@dataclass(frozen=True)
class Summary:
    """One score of one variant over its seeds, and how it stands to the comparison's first variant."""

    values: tuple[float, ...]
    difference: float | None = None  # of the means
    p: float | None = None
    least: float | None = None  # that p could be, with so many seeds

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds (n - 1); NaN of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan


@functools.cache
def permutation_test(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Two-sided p value of the difference of means: the share of all ways to deal the values into two hands of these sizes that
    differ at least as much (Fisher, 1935; exact). It cannot be below `least_p`. Of more than `MOST_HANDS` ways so many are drawn."""
    pool = [*a, *b]
    total, count = math.fsum(pool), len(a)

    def gap(hand: Sequence[float]) -> float:
        part = math.fsum(hand)
        return abs(part / count - (total - part) / (len(pool) - count))

    observed = gap(a) * (1 - 1e-12)
    ways = math.comb(len(pool), count)
    if ways <= MOST_HANDS:
        return sum(gap(hand) >= observed for hand in itertools.combinations(pool, count)) / ways
    dice = random.Random(0)
    drawn = sum(gap(dice.sample(pool, count)) >= observed for _ in range(MOST_HANDS - 1))
    return (1 + drawn) / MOST_HANDS  # the hand that was dealt is one of them


def least_p(a: int, b: int) -> float:
    """The smallest p value that hands of these sizes can have: equal ones can be exchanged, to the same difference."""
    return (2 if a == b else 1) / math.comb(a + b, a)


def summaries(
    records: Sequence[dict[str, Any]], names: Sequence[str], guidance: str, score: str
) -> dict[str, Summary]:
    """One score of every variant of a comparison that has runs."""
    values = {
        name: tuple(
            record["scores"][guidance][score]
            for record in sorted(records, key=lambda record: record["seed"])
            if record["variant"] == name and score in record["scores"].get(guidance, {})
        )
        for name in names
    }
    first = values[names[0]]
    result = {}
    for name, own in values.items():
        if own and name != names[0] and len(first) > 1 and len(own) > 1:
            difference = statistics.fmean(own) - statistics.fmean(first)
            result[name] = Summary(
                own, difference, permutation_test(first, own), least_p(len(first), len(own))
            )
        elif own:
            result[name] = Summary(own)
    return result


def tables(content: dict[str, Any]) -> str:
    """Every comparison, at every guidance scale: a row a score, a column a variant."""
    study, records = Study.model_validate(content["study"]), content["runs"]
    texts = [study.question]
    for title, names in comparisons_of(study).items():
        present = [name for name in names if any(record["variant"] == name for record in records)]
        for scale in study.scoring.guidance if present else ():
            texts.append(
                f"\n{title}, guidance {scale:g}:\n"
                + "\n".join(in_columns(rows_of(content, present, f"{scale:g}")))
            )
    texts += ["", *verdicts(content)]
    seconds = sum(r["training_cpu_seconds"] + r["scoring_cpu_seconds"] for r in records)
    texts.append(
        f"\nMean ± standard deviation over seeds; p: exact permutation test against the first column, * below {SIGNIFICANT}, not "
        f"corrected for the number of tests: {in_all(content)}. {len(records)} runs, {seconds / 60:.0f} processor minutes in "
        "all, without what trainings took before they were interrupted."
    )
    return "\n".join(texts)


def rows_of(content: dict[str, Any], names: Sequence[str], guidance: str) -> list[list[str]]:
    """The table of one comparison, its header first."""
    study, records = Study.model_validate(content["study"]), content["runs"]
    figures = {figure["name"]: figure for figure in content.get("speed", {}).get("figures", [])}
    first = names[0]
    rows = [["", *(study.variants[name].label or name for name in names)]]
    runs = {name: [r for r in records if r["variant"] == name] for name in names}
    rows.append(["seeds", *(str(len(runs[name])) for name in names)])
    rows.append(["parameters", *(f"{runs[name][0]['parameters'] / 1e6:.3f} M" for name in names)])
    if all(name in figures for name in names):
        rows.append(
            ["MACs of a forward, one image", *(f"{figures[name]['macs'] / 1e6:.1f} M" for name in names)]
        )
        for activity in ("forward", "training"):
            ratios = (time_ratio(figures[name], figures[first], activity) for name in names)
            rows.append(
                [f"{activity} time / {study.variants[first].label or first}'s", *(f"{r:.2f}" for r in ratios)]
            )
    for score, (title, form, _) in SCORES.items():
        found = summaries(records, names, guidance, score)
        if len(found) == len(names):
            rows.append([title, *(in_words(found[name], form) for name in names)])
    return rows


def in_words(summary: Summary, form: str) -> str:
    text = form.format(summary.mean)
    if len(summary.values) > 1:
        text += f" ± {form.format(summary.spread)}"
    if summary.p is not None:
        text += f" (p {summary.p:.3f}{'*' if summary.p < SIGNIFICANT else ''})"
    return text


def time_ratio(figure: dict[str, Any], first: dict[str, Any], activity: str) -> float:
    """Median over rounds of this time over the first variant's in the same round."""
    pairs = zip(figure["timings"][activity]["seconds"], first["timings"][activity]["seconds"], strict=True)
    return statistics.median(own / other for own, other in pairs)


def verdicts(content: dict[str, Any]) -> list[str]:
    """One sentence a comparison, guidance scale and variant: which scores differ from the first variant's, and which do not."""
    study, records = Study.model_validate(content["study"]), content["runs"]
    sentences = []
    for title, names in comparisons_of(study).items():
        for scale in study.scoring.guidance:
            words: dict[str, dict[str, list[str]]] = {}
            for score, (label, _, more_is_better) in SCORES.items():
                if more_is_better is None:
                    continue
                for name, summary in summaries(records, names, f"{scale:g}", score).items():
                    if summary.p is None:
                        continue
                    better = (summary.difference > 0) == more_is_better
                    kind = (
                        "too few seeds to tell in"
                        if summary.least >= SIGNIFICANT
                        else "no difference shown in"
                        if summary.p >= SIGNIFICANT
                        else "better in"
                        if better
                        else "worse in"
                    )
                    words.setdefault(name, {}).setdefault(kind, []).append(label)
            for name, kinds in words.items():
                said = "; ".join(f"{kind} {', '.join(kinds[kind])}" for kind in sorted(kinds))
                own, first = (study.variants[n].label or n for n in (name, names[0]))
                sentences.append(f"{title}, guidance {scale:g}: {own} against {first}: {said}")
    return sentences


def in_all(content: dict[str, Any]) -> str:
    """How many tests the study makes, and what remains of its stars by Holm's rule (1979), which asks for them all together."""
    study, records = Study.model_validate(content["study"]), content["runs"]
    scores = [score for score in SCORES if score != "fd_of_noise"]  # the same test as of FD
    found = [
        summary
        for names in comparisons_of(study).values()
        for scale in study.scoring.guidance
        for score in scores
        for summary in summaries(records, names, f"{scale:g}", score).values()
        if summary.p is not None
    ]
    ps = sorted(summary.p for summary in found)
    starred = sum(p < SIGNIFICANT for p in ps)
    remaining = next((i for i, p in enumerate(ps) if p * (len(ps) - i) >= SIGNIFICANT), len(ps))
    said = f"{len(ps)} tests, {starred} below {SIGNIFICANT}, {remaining} by Holm's rule over all"
    asked, least = SIGNIFICANT / max(1, len(ps)), min((summary.least for summary in found), default=0.0)
    if least < asked:
        return said
    return f"{said}, as there must be with so few seeds: it asks for p below {asked:.2g}, and the least there can be is {least:.3f}"
