"""Variants of one model over several seeds, trained, scored and compared: `python -m eval.study STUDY.yaml`.

    python -m eval.study configs/studies/digits.yaml --json study.json
    python -m eval.study configs/studies/ablations.yaml --only softmax --json ablations.json

A study names variants (a config and settings over it), seeds, how to score, and comparisons: lists of variants, each held
against its first. Every variant is trained with every seed, by `train.py`, and scored, by `eval.fid` (what could not be scored is an
error before the first is trained): one run a GPU at a time, of those that CUDA_VISIBLE_DEVICES names where it is set, or one a core
without GPUs. Then a grid is drawn of each variant's first seed, and the networks are timed in turns (`eval.throughput`). Results are
written after every run; the same command goes on where it was stopped. SIGTERM and Ctrl-C reach the runs, which save and stop; so they
do, on Linux, where the study is killed. The tables give mean and standard deviation over seeds, and the p value of an exact permutation test.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

import torch
from tqdm import tqdm

from ldm_dcn import metrics
from ldm_dcn.changes import FREE, settings_before
from ldm_dcn.config import Config, config_hash, load_config
from ldm_dcn.device import choose_device
from ldm_dcn.errors import Parser, UserError, exit_on_user_error
from ldm_dcn.places import check_file_place

from . import programs
from .comparison import SCORES, tables
from .environment import environment, noted
from .fid import check_run
from .gpus import VISIBLE, shared_out, visible_gpus
from .protocol import Scoring, Study, comparisons_of, load_study
from .results import in_turn, write

ROOT = Path(__file__).resolve().parent.parent
CURVE_POINTS = 60  # of a training curve, kept in the results


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
    """Without what leaves the weights as they are: where the run lies, what is drawn and saved on the way; and without later settings
    that mean what runs before them did."""
    return config_hash({k: v for k, v in settings_before(config).items() if not k.startswith(FREE)})


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
            try:
                config = load_config(file, overrides)
            except UserError as error:
                said = str(error).removeprefix("the command line: ")
                raise UserError(f"{path}, variant {name}: {said}") from None
            # Of other settings it is another run, in a folder of its own.
            run = config.run.model_copy(update={"name": f"{name}-{seed}-{settings_of(config)[:6]}"})
            arguments = (file, *overrides, f"run.name={run.name}")
            jobs.append(Job(name, seed, config.model_copy(update={"run": run}), arguments))
    return jobs


# ---- one run


def run_job(job: Job, scoring: Scoring, threads: int, gpus: Sequence[str] = ()) -> dict[str, Any]:
    """Train and score on the first of `gpus`, or what there is; the record that goes into the results.

    Raises `UserError` with the last words of what failed.
    """
    log = job.config.folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    training = _call([str(ROOT / "train.py"), *job.arguments], log, threads, gpus)
    scored = job.config.folder / "study_scores.json"
    command = ["-m", "eval.fid", str(job.config.folder), *_options(scoring), "--json", str(scored)]
    scoring_seconds = _call(command, log, threads, gpus)
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


def _options(scoring: Scoring) -> list[str]:
    """Those of `eval.fid`, which have the names of the fields."""
    options = []
    for field, value in scoring:
        if value is not None:
            values = value if isinstance(value, tuple) else (value,)
            options += [f"--{field.replace('_', '-')}", *map(str, values)]
    return options


def check_scoring(jobs: Sequence[Job], scoring: Scoring) -> None:
    """Raise `UserError` where the runs of `jobs` could not be scored: before they are trained.

    Without `scoring.extractor` the reference must be the digits, as for `eval.fid`.
    """
    asked = dict(scoring)
    for other in ("seed", "precision"):  # any will do
        del asked[other]
    if "extractor" not in scoring.model_fields_set:
        del asked["extractor"]
    try:
        choose_device(asked.pop("device"))
        kinds: dict[tuple[Any, Any], Job] = {}
        for job in jobs:
            kinds.setdefault((job.config.data, job.config.diffusion), job)
        for job in kinds.values():
            check_run(job.config, job.variant, **asked)
    except UserError as error:
        keys = {field.replace("_", "-"): field for field in Scoring.model_fields} | {"samples": "num"}
        told = re.sub(r"--([a-z-]+)", lambda found: f"scoring.{keys[found[1]]}" if found[1] in keys else found[0], str(error))  # fmt: skip
        raise UserError(f"the study could not score its runs: {told}") from None


def _call(arguments: Sequence[str], log: Path, threads: int, gpus: Sequence[str] = ()) -> float:
    """`programs.call` of what knows `gpus` alone; without, those that this process does."""
    return programs.call(
        arguments, log, {"OMP_NUM_THREADS": str(threads), **({VISIBLE: ",".join(gpus)} if gpus else {})}
    )


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
    jobs: Sequence[Job],
    scoring: Scoring,
    shares: Sequence[Sequence[str]],
    threads: int,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """All `jobs`, one at a time on each of `shares` of the GPUs; `keep` gets each record. What fails stops those that have not begun."""
    lock = Lock()
    free: SimpleQueue[Sequence[str]] = SimpleQueue()
    for share in shares:
        free.put(share)
    with ThreadPoolExecutor(len(shares)) as pool, tqdm(total=len(jobs), desc="runs", unit="run") as bar:

        def one(job: Job) -> None:
            share = free.get()  # as many as there are threads: nobody waits
            try:
                record = run_job(job, scoring, threads, share)
            finally:
                free.put(share)
            with lock:
                keep(record)
                bar.update()

        if len(shares) == 1:
            for job in jobs:
                one(job)
            return
        futures = [pool.submit(one, job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        failed = [
            error
            for future in futures
            if future.done() and not future.cancelled() and (error := future.exception())
        ]
        if failed and not all(future.done() for future in futures) and isinstance(failed[0], UserError):
            tqdm.write(f"error: {failed[0]}; the runs that have begun are waited for", file=sys.stderr)
        for future in futures:
            if not future.cancelled():
                future.result()


# ---- speed


def time_networks(study: Study, path: Path, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """All networks in turns, with fresh weights, each in its own precision: `eval.throughput`'s figures without sampling."""
    from . import throughput

    device = "cuda" if torch.cuda.is_available() else "cpu"  # where train.py trains
    subjects = []
    for name in names:
        variant = study.variants[name]
        subject = throughput.open_subject(
            str(path.parent / variant.config), [*study.set, *variant.set], device
        )
        precision = subject.model.config["train"]["precision"]
        subjects.append(throughput.Subject(name, subject.model, precision))
    train = subjects[0].model.config["train"]
    settings = throughput.Settings(
        batch_size=min(train["batch_size"], throughput.LARGEST_DEFAULT_BATCH), precision=train["precision"], device=device,
        rounds=rounds, sampler=study.scoring.sampler, sampler_steps=study.scoring.steps, guidance=1.0, tf32=train["tf32"],
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
        scoring = Scoring.model_validate(known["study"]["scoring"])
        held = {(run["variant"], run["seed"]): run["settings"] for run in known["runs"]}
        content |= {
            "runs": known["runs"],
            "speed": known.get("speed", {}),
            "environment": known["environment"],
        }
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no file of eval.study; name another --json") from None
    if held and not scoring.scores_as(study.scoring):
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
    """A grid of the run's samples, a row a class, with the last guidance scale; in fp32."""
    file.parent.mkdir(parents=True, exist_ok=True)
    options = [
        "--guidance",
        str(scoring.guidance[-1]),
        "--sampler",
        scoring.sampler,
        "--steps",
        str(scoring.steps),
        "--guidance-interval",
        *map(str, scoring.guidance_interval),
        "--guidance-rescale",
        str(scoring.guidance_rescale),
        *(("--device", scoring.device) if scoring.device else ()),
    ]
    _call(
        [str(ROOT / "sample.py"), str(job.config.folder), *options, "--grid", str(file.resolve())],
        job.config.folder.with_suffix(".log"),
        threads,
    )


def main(arguments: Sequence[str] | None = None) -> None:
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
        "--jobs", type=int, default=torch.cuda.device_count() or os.cpu_count(),
        help="runs at a time, each on GPUs of its own while there are enough, of which it takes the first (default: one a GPU, or "
        "one a core without)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="of each run (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=9, help="of timing the networks in turns; 0: not (default: %(default)s)"
    )  # fmt: skip
    parser.add_argument("--print", action="store_true", dest="only_print", help="print --json, run nothing")
    options = parser.parse_args(arguments)
    with exit_on_user_error(), programs.ending_together():
        run(options)


def run(options: Any) -> None:
    study = load_study(options.study)
    runs = options.runs or Path("runs", options.study.stem)
    results = options.json or runs / "study.json"
    every = jobs_of(study, options.study, runs, list(study.variants))
    content = open_results(results, study, every, options.threads)
    if options.only_print:
        if not results.exists():
            raise UserError(
                f"{results} does not exist: there is nothing to print; give the --json of the study's runs"
            )
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
        with in_turn(results):
            _gather(results, content, noted(record, content, options.threads))
            write(content, results)
        tqdm.write(_line(record), file=sys.stderr)

    gpus = visible_gpus(os.environ, torch.cuda.device_count())
    shares = shared_out(gpus, options.jobs)
    going = f"; {len(todo)} to go, {options.jobs} at a time{_where(gpus, shares)}"
    print(
        f"{len(jobs) - len(todo)} of {len(jobs)} runs are done{going if todo else f' and stand in {results}'}"
    )
    if todo:
        check_scoring(todo, study.scoring)
        _check_device(study.scoring.device, shares)
        train_and_score(todo, study.scoring, shares, options.threads, keep)
    for name in names:
        first = next((job for job in jobs if job.variant == name), None)
        picture = results.with_suffix("") / f"{name}.png"
        if first is not None and first.config.folder.exists() and (todo or not picture.exists()):
            draw(first, study.scoring, picture, options.threads)
    timed = {figure["name"] for figure in content.get("speed", {}).get("figures", [])}
    if options.rounds and not set(names) <= timed:
        all_timed = [name for name in study.variants if name in timed or name in names]
        speed = time_networks(study, options.study, all_timed, options.rounds)
        with in_turn(results):
            _gather(results, content)
            content["speed"] = speed
            write(content, results)
    print(tables(content))


def _gather(results: Path, content: dict[str, Any], *records: dict[str, Any]) -> None:
    """Into `content` come `records`, and what another command has written to `results` since: seeds may be shared out among several."""
    written = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {"runs": []}
    known = {(run["variant"], run["seed"]): run for run in [*written["runs"], *content["runs"], *records]}
    order = list(content["study"]["variants"])
    content["runs"] = sorted(known.values(), key=lambda run: (order.index(run["variant"]), run["seed"]))
    if written.get("speed"):
        content["speed"] = written["speed"]


def _where(gpus: Sequence[str], shares: Sequence[Sequence[str]]) -> str:
    """What is to be known of the GPUs that runs at a time have."""
    if not gpus:
        return ""
    if len(shares) > len(gpus):
        return f" on {len(gpus)} GPU{'s' * (len(gpus) > 1)} ({', '.join(gpus)}), which some share"
    return f" on GPU{'s' * (len(shares) > 1)} {', '.join(share[0] for share in shares)}"


def _check_device(device: str | None, shares: Sequence[Sequence[str]]) -> None:
    """Raise `UserError` for a `scoring.device` that a run would not find among its own GPUs."""
    fewest = min(map(len, shares))
    number = torch.device(device).index if device and fewest else None
    if number is not None and number >= fewest:
        raise UserError(
            f"scoring.device={device}: of {len(shares)} runs at a time each has {fewest} of the GPUs, which it knows from cuda:0 on; "
            "write cuda, or give --jobs 1"
        )


def _line(record: dict[str, Any]) -> str:
    scale, scores = next(iter(record["scores"].items()))
    known = (
        f"{title} {form.format(scores[key])}" for key, (title, form, _) in SCORES.items() if key in scores
    )
    return f"{record['variant']} seed {record['seed']}, guidance {scale}: {', '.join(known)}"


if __name__ == "__main__":
    main()
