"""Variants of one model over several seeds, trained, scored and compared: `python -m eval.study STUDY.yaml`.

    python -m eval.study configs/studies/digits.yaml --json study.json
    python -m eval.study configs/studies/ablations.yaml --only softmax --json ablations.json

A study names variants (a config and settings over it), seeds, how to score, and comparisons: lists of variants, each held
against its first. Every variant is trained with every seed, by `train.py`, and scored, by `eval.fid`, on the CPU one process a
core; then a grid is drawn of each variant's first seed, and the networks are timed in turns (`eval.throughput`). Results are
written after every run; the same command goes on where it was stopped. The tables give mean and standard deviation over seeds,
and the p value of an exact permutation test.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from tqdm import tqdm

from ldm_dcn import metrics
from ldm_dcn.changes import FREE
from ldm_dcn.config import Config, config_hash, flat, load_config
from ldm_dcn.errors import Parser, UserError, exit_on_user_error
from ldm_dcn.files import check_file_place, replacing

from .environment import environment, noted

ROOT = Path(__file__).resolve().parent.parent
SIGNIFICANT = 0.05
CURVE_POINTS = 60  # of a training curve, kept in the results

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


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Variant(_Strict):
    """A config and settings over it. `label` is what tables call it."""

    config: str
    set: tuple[str, ...] = ()
    label: str | None = None
    seeds: tuple[int, ...] | None = None  # others than the study's


class Scoring(_Strict):
    """How `eval.fid` scores a run."""

    extractor: str = "digits"
    reference: str | None = None
    guidance: tuple[float, ...] = (1.0,)
    sampler: str = "dpm++"
    steps: int = 20
    seed: int = 0
    num: int | None = None


class Study(_Strict):
    """What a study's file says. Paths of configs are relative to it; those of data to where the command runs."""

    question: str
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    set: tuple[str, ...] = ()  # settings over all configs
    variants: Annotated[dict[str, Variant], Field(min_length=1)]
    comparisons: dict[str, Annotated[tuple[str, ...], Field(min_length=2)]] = {}
    scoring: Scoring = Scoring()

    @model_validator(mode="after")
    def _names_are_known(self) -> Study:
        for title, names in self.comparisons.items():
            unknown = [name for name in names if name not in self.variants]
            if unknown:
                raise ValueError(
                    f"comparisons.{title} names {unknown[0]}, which is no variant; there are {', '.join(self.variants)}"
                )
        return self


@dataclass(frozen=True)
class Job:
    """One run: a variant with a seed."""

    variant: str
    seed: int
    config: Config
    arguments: tuple[str, ...]  # of train.py

    @property
    def settings(self) -> str:
        """Names what was trained, whatever the run is called and wherever it lies."""
        return settings_of(self.config)


def settings_of(config: Config) -> str:
    """Without what leaves the weights as they are: where the run lies, what is drawn and saved on the way."""
    return config_hash({k: v for k, v in flat(config.resolved()).items() if not k.startswith(FREE)})


def load_study(path: Path) -> Study:
    """Raises `UserError` for what is no study."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Study.model_validate(content)
    except OSError as error:
        raise UserError(
            f"cannot read the study {path}: {error.strerror}; give one of configs/studies"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    except ValidationError as error:
        problems = (
            f"{'.'.join(map(str, problem['loc'])) or 'study'}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        )
        raise UserError(f"{path}: {'; '.join(problems)}") from None


def jobs_of(study: Study, path: Path, runs: Path, names: Sequence[str]) -> list[Job]:
    """All runs of the variants `names`, seed by seed, so that a study cut short has few seeds of every variant."""
    jobs = []
    for seed in sorted({seed for name in names for seed in study.variants[name].seeds or study.seeds}):
        for name in names:
            variant = study.variants[name]
            if seed not in (variant.seeds or study.seeds):
                continue
            overrides = [*study.set, *variant.set, f"train.seed={seed}", f"run.dir={runs}"]
            file = str(path.parent / variant.config)
            config = load_config(file, overrides)
            # Of other settings it is another run, in a folder of its own.
            run = config.run.model_copy(update={"name": f"{name}-{seed}-{settings_of(config)[:6]}"})
            arguments = (file, *overrides, f"run.name={run.name}")
            jobs.append(Job(name, seed, config.model_copy(update={"run": run}), arguments))
    return jobs


# ---- one run


def run_job(job: Job, scoring: Scoring, threads: int) -> dict[str, Any]:
    """Train and score; the record that goes into the results. Raises `UserError` with the last words of what failed."""
    log = job.config.folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    training = _call([str(ROOT / "train.py"), *job.arguments], log, threads)
    scored = job.config.folder / "study_scores.json"
    options = ["--extractor", scoring.extractor, "--sampler", scoring.sampler, "--steps", str(scoring.steps),
               "--seed", str(scoring.seed), "--guidance", *map(str, scoring.guidance)]  # fmt: skip
    options += ["--reference", scoring.reference] if scoring.reference else []
    options += ["--num", str(scoring.num)] if scoring.num else []
    scoring_seconds = _call(
        ["-m", "eval.fid", str(job.config.folder), *options, "--json", str(scored)], log, threads
    )
    table = json.loads(scored.read_text(encoding="utf-8"))
    drawn = [column for column in table["columns"] if "guidance" in column["tags"]]
    return {
        "variant": job.variant,
        "seed": job.seed,
        "settings": job.settings,
        "parameters": drawn[0]["tags"]["parameters"],
        "training_cpu_seconds": training,
        "scoring_cpu_seconds": scoring_seconds,
        "scores": {f"{column['tags']['guidance']:g}": column["scores"] for column in drawn},
        "tags": drawn[0]["tags"],
        "beside": {c["name"]: c["scores"] for c in table["columns"] if c not in drawn},
        "metric": table["metric"],
        "reference": table["reference"],
        "extractor": table["extractor"],
        **_curve(metrics.read(job.config.folder / "metrics.jsonl")),
    }


def _call(arguments: Sequence[str], log: Path, threads: int) -> float:
    """Run Python with `arguments`, its words going to the end of `log`; returns the processor's seconds of this call: of a training
    that goes on, those of the rest."""
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], env=variables, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )  # fmt: skip
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        words = log.read_text(encoding="utf-8", errors="replace").split("\r")[-1].strip().splitlines()
        said = words[-1].removeprefix("error: ") if words else f"exit code {process.returncode}"
        raise UserError(f"{' '.join(arguments[:2])} failed: {said}; the whole of it is in {log}")
    return usage.ru_utime + usage.ru_stime


def _curve(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The loss over the steps, thinned out; the distance measured on the way, and its tags."""
    losses = [(line["step"], round(line["loss"], 5)) for line in lines if line.get("loss") is not None]
    every = max(1, len(losses) // CURVE_POINTS)
    distances, tags = [], {}
    for line in lines:
        for key in line:
            if key.startswith("fd_"):
                distances.append((line["step"], line[key]))
                tags = {k: v for k, v in line.items() if k not in (key, "step", "loss")}
                tags["metric"] = key.replace("fd_", "FD-")
    return {"losses": losses[every - 1 :: every], "distances": distances, "distance_tags": tags}


def train_and_score(
    jobs: Sequence[Job], scoring: Scoring, workers: int, threads: int, keep: Callable[[dict[str, Any]], None]
) -> None:
    """All `jobs`, `workers` at a time; `keep` gets each record. What fails stops those that have not begun."""
    lock = Lock()
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(jobs), desc="runs", unit="run") as bar:

        def one(job: Job) -> None:
            record = run_job(job, scoring, threads)
            with lock:
                keep(record)
                bar.update()

        if workers == 1:
            for job in jobs:
                one(job)
            return
        futures = [pool.submit(one, job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        for future in futures:
            if not future.cancelled():
                future.result()


# ---- what the numbers say


@dataclass(frozen=True)
class Summary:
    """One score of one variant over its seeds, and how it stands to the comparison's first variant."""

    values: tuple[float, ...]
    difference: float | None = None  # of the means
    p: float | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds (n - 1); NaN of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan


def permutation_test(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p value of the difference of means: the share of all ways to deal the values into two hands of these sizes that
    differ at least as much (Fisher, 1935; exact). It cannot be below `least_p`."""
    pool = [*a, *b]
    total, count = math.fsum(pool), len(a)

    def gap(hand: Sequence[float]) -> float:
        part = math.fsum(hand)
        return abs(part / count - (total - part) / (len(pool) - count))

    observed = gap(a) * (1 - 1e-12)
    hands = [gap(hand) >= observed for hand in itertools.combinations(pool, count)]
    return sum(hands) / len(hands)


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
            result[name] = Summary(own, difference, permutation_test(first, own))
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
                f"\n{title}, guidance {scale:g}:\n" + _aligned(rows_of(content, present, f"{scale:g}"))
            )
    texts += ["", *verdicts(content)]
    seconds = sum(r["training_cpu_seconds"] + r["scoring_cpu_seconds"] for r in records)
    texts.append(
        f"\nMean ± standard deviation over seeds; p: exact permutation test against the first column, * below {SIGNIFICANT}, not "
        f"corrected for the number of tests: {in_all(content)}. {len(records)} runs, {seconds / 60:.0f} processor minutes in all."
    )
    return "\n".join(texts)


def comparisons_of(study: Study) -> dict[str, tuple[str, ...]]:
    return study.comparisons or {"all": tuple(study.variants)}


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
            ratios = (_time_ratio(figures[name], figures[first], activity) for name in names)
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


def _time_ratio(figure: dict[str, Any], first: dict[str, Any], activity: str) -> float:
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
                    base = summaries(records, names[:1], f"{scale:g}", score)[names[0]]
                    kind = (
                        "too few seeds to tell in"
                        if least_p(len(base.values), len(summary.values)) >= SIGNIFICANT
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
    found = (
        summary.p
        for names in comparisons_of(study).values()
        for scale in study.scoring.guidance
        for score in scores
        for summary in summaries(records, names, f"{scale:g}", score).values()
    )
    ps = sorted(p for p in found if p is not None)
    starred = sum(p < SIGNIFICANT for p in ps)
    remaining = next((i for i, p in enumerate(ps) if p * (len(ps) - i) >= SIGNIFICANT), len(ps))
    return f"{len(ps)} tests, {starred} below {SIGNIFICANT}, {remaining} by Holm's rule over all"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )  # fmt: skip


# ---- speed


def time_networks(study: Study, path: Path, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """All networks in turns, with fresh weights: `eval.throughput`'s figures without sampling."""
    from . import throughput

    device = "cuda" if torch.cuda.is_available() else "cpu"  # where train.py trains
    subjects = []
    for name in names:
        variant = study.variants[name]
        subject = throughput.open_subject(
            str(path.parent / variant.config), [*study.set, *variant.set], device
        )
        subjects.append(throughput.Subject(name, subject.model))
    train = subjects[0].model.config["train"]
    settings = throughput.Settings(
        batch_size=min(train["batch_size"], throughput.LARGEST_DEFAULT_BATCH), precision=train["precision"], device=device,
        rounds=rounds, sampler=study.scoring.sampler, sampler_steps=study.scoring.steps, guidance=1.0,
    )  # fmt: skip
    figures = throughput.compare(subjects, settings, wanted=("forward", "training"))
    return {
        "settings": asdict(settings),
        "figures": [asdict(figure) for figure in figures],
        "environment": environment(),
    }


# ---- command line


def open_results(path: Path, study: Study, jobs: Sequence[Job], threads: int = 1) -> dict[str, Any]:
    """The content of the results at `path`, or of new ones; `jobs` are all that the study has, `threads` those of each run.

    Raises `UserError` where the file holds runs that are not the study's, of other settings, or scored in another way: they would
    stand in one table with those of now.
    """
    content = {"study": study.model_dump(mode="json"), "runs": [], "environment": environment(threads)}
    if not path.exists():
        return content
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        scoring = known["study"]["scoring"]
        held = {(run["variant"], run["seed"]): run["settings"] for run in known["runs"]}
        content |= {
            "runs": known["runs"],
            "speed": known.get("speed", {}),
            "environment": known["environment"],
        }
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no file of eval.study; name another --json") from None
    if held and scoring != content["study"]["scoring"]:
        raise UserError(
            f"{path} holds runs that were scored in another way ({scoring}); name another --json, or score as there"
        )
    settings = {(job.variant, job.seed): job.settings for job in jobs}
    other = [f"{name} seed {seed}" for (name, seed), own in held.items() if settings.get((name, seed)) != own]
    if other:
        raise UserError(
            f"{path} holds runs that the study does not have, or has with other settings ({', '.join(other)}); "
            "name another --json for the study as it is now"
        )
    return content


def draw(job: Job, scoring: Scoring, file: Path, threads: int) -> None:
    """A grid of the run's samples, a row a class, with the last guidance scale."""
    file.parent.mkdir(parents=True, exist_ok=True)
    options = [
        "--guidance",
        str(scoring.guidance[-1]),
        "--sampler",
        scoring.sampler,
        "--steps",
        str(scoring.steps),
    ]
    _call(
        [str(ROOT / "sample.py"), str(job.config.folder), *options, "--grid", str(file.resolve())],
        job.config.folder.with_suffix(".log"),
        threads,
    )


def write(content: dict[str, Any], path: Path) -> None:
    with replacing(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = Parser(prog="python -m eval.study", description=__doc__)
    parser.add_argument("study", metavar="STUDY.yaml", type=Path, help="one of configs/studies")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="results (default: runs/NAME/study.json); kept, and gone on with"
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="COMPARISON", help="default: all comparisons")
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="of the study's seeds, those to run (default: all)"
    )
    parser.add_argument(
        "--runs", type=Path, metavar="DIR", help="folder of the runs (default: runs/NAME of the study)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1 if cuda else os.cpu_count(), help="runs at a time (default: one a core, 1 with a GPU)"
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="of each run (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=9, help="of timing the networks in turns; 0: not (default: %(default)s)"
    )  # fmt: skip
    parser.add_argument("--print", action="store_true", dest="only_print", help="print --json, run nothing")
    options = parser.parse_args(arguments)
    with exit_on_user_error():
        run(options)


def run(options: Any) -> None:
    study = load_study(options.study)
    runs = options.runs or Path("runs", options.study.stem)
    results = options.json or runs / "study.json"
    every = jobs_of(study, options.study, runs, list(study.variants))
    content = open_results(results, study, every, options.threads)
    if options.only_print:
        print(tables(content))
        return
    if min(options.jobs, options.threads) < 1 or options.rounds < 0:
        raise UserError("--jobs and --threads must be at least 1, --rounds at least 0")
    chosen = comparisons_of(study)
    for title in options.only or ():
        if title not in chosen:
            raise UserError(f"--only {title}: no comparison; there are {', '.join(chosen)}")
    names = list(dict.fromkeys(name for title in options.only or chosen for name in chosen[title]))
    check_file_place(results, "choose another --json")
    jobs = [job for job in every if job.variant in names]
    if options.seeds is not None:
        jobs = [job for job in jobs if job.seed in options.seeds]
    if not jobs:
        raise UserError(f"--seeds {options.seeds}: the study has {list(study.seeds)}")
    done = {(run["variant"], run["seed"]) for run in content["runs"]}
    todo = [job for job in jobs if (job.variant, job.seed) not in done]

    def keep(record: dict[str, Any]) -> None:
        content["runs"].append(noted(record, content, options.threads))
        content["runs"].sort(key=lambda r: (list(study.variants).index(r["variant"]), r["seed"]))
        write(content, results)
        tqdm.write(_line(record), file=sys.stderr)

    going = f"; {len(todo)} to go, {options.jobs} at a time" if todo else f" and stand in {results}"
    print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are done{going}")
    if todo:
        train_and_score(todo, study.scoring, options.jobs, options.threads, keep)
    for name in names:
        first = next((job for job in jobs if job.variant == name), None)
        picture = results.with_suffix("") / f"{name}.png"
        if first is not None and first.config.folder.exists() and (todo or not picture.exists()):
            draw(first, study.scoring, picture, options.threads)
    timed = {figure["name"] for figure in content.get("speed", {}).get("figures", [])}
    if options.rounds and not set(names) <= timed:
        all_timed = [name for name in study.variants if name in timed or name in names]
        content["speed"] = time_networks(study, options.study, all_timed, options.rounds)
        write(content, results)
    print(tables(content))


def _line(record: dict[str, Any]) -> str:
    scale, scores = next(iter(record["scores"].items()))
    known = (
        f"{title} {form.format(scores[key])}" for key, (title, form, _) in SCORES.items() if key in scores
    )
    return f"{record['variant']} seed {record['seed']}, guidance {scale}: {', '.join(known)}"


if __name__ == "__main__":
    main()
