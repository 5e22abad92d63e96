"""What a report is made from: runs, and the JSON files of the other commands, read and checked."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from ldm_dcn import metrics
from ldm_dcn.errors import UserError

from ..protocol import Study
from ..stored_models import StoredModel, StoredModels


@dataclass(frozen=True)
class Run:
    """A model to draw with, and what its run folder tells; an export or a hub id has neither lines nor provenance.

    model       what its small files tell; `model.load()` is the model itself, until another one is loaded
    lines       of metrics.jsonl
    provenance  one entry a start of the run
    """

    name: str
    path: str
    model: StoredModel
    lines: list[dict[str, Any]]
    provenance: list[dict[str, Any]]


def open_runs(paths: list[str], *, device: str, autoencoder: str | None = None) -> list[Run]:
    """Runs in the order given, none of them loaded yet. Those whose names agree are called by their paths."""
    stored = StoredModels(device)
    models = [stored.open(path, autoencoder) for path in paths]
    names = [model.name for model in models]
    runs = []
    for path, model in zip(paths, models, strict=True):
        twice = names.count(model.name) > 1
        log, provenance = Path(path, "metrics.jsonl"), Path(path, "provenance.jsonl")
        runs.append(
            Run(
                str(path) if twice else model.name,
                str(path),
                model,
                metrics.read(log) if log.is_file() else [],
                metrics.read(provenance) if provenance.is_file() else [],
            )
        )
    if len({run.name for run in runs}) < len(runs):
        raise UserError("the same run is given twice; give each once")
    return runs


class Column(BaseModel):
    name: str
    scores: dict[str, float]
    tags: dict[str, Any] = {}


class Scores(BaseModel):
    """What `eval.fid --json` writes."""

    metric: str
    columns: list[Column]
    names: dict[str, str] = {}
    reference: dict[str, Any] = {}
    extractor: dict[str, Any] = {}
    environment: dict[str, Any] = {}


class Times(BaseModel):
    seconds: list[float] = Field(min_length=1)


class Figures(BaseModel):
    name: str
    parameters: int
    macs: int
    state_bytes: int | None = None
    activation_bytes: int | None = None
    peak_bytes: int | None = None
    timings: dict[str, Times]


class ProfileRecord(BaseModel):
    name: str
    modules: dict[str, int] = {}
    seconds: dict[str, dict[str, list[float]]]
    marked: dict[str, list[float]]
    plain: dict[str, list[float]]


class Throughput(BaseModel):
    """What `eval.throughput --json` writes, with or without --profile."""

    settings: dict[str, Any]
    figures: list[Figures]
    profiles: list[ProfileRecord] = []
    environment: dict[str, Any] = {}

    @model_validator(mode="after")
    def _told_apart(self) -> Throughput:
        """A config and its run have one name: the second is numbered."""
        for records in (self.figures, self.profiles):
            seen: Counter[str] = Counter()
            for record in records:
                seen[record.name] += 1
                if seen[record.name] > 1:
                    record.name += f" ({seen[record.name]})"
        return self


class Time(BaseModel):
    median: float = Field(gt=0)
    spread: float | None = None


class Measurement(BaseModel):
    shape: str
    dtype: str
    sigma: float
    level: str
    direction: str
    times: dict[str, Time]
    floor: float | None = None
    environment: dict[str, Any] | None = None


class Operators(BaseModel):
    """What `eval.operators --json` writes."""

    identity: dict[str, Any]
    measurements: list[Measurement]
    environment: dict[str, Any] = {}


class AblationRecord(BaseModel):
    level: str
    shape: str
    direction: str
    dtype: str
    sigma: float
    seconds: dict[str, Annotated[float, Field(gt=0)]]
    environment: dict[str, Any] | None = None


class Ablations(BaseModel):
    """What `eval.ablations --json` writes."""

    records: list[AblationRecord] = Field(min_length=1)
    environment: dict[str, Any] = {}


class StudyRun(BaseModel):
    variant: str
    seed: int
    parameters: int
    scores: dict[str, dict[str, float]]
    losses: list[tuple[float, float]]
    distances: list[tuple[float, float]]
    distance_tags: dict[str, Any]
    tags: dict[str, Any]
    metric: str
    reference: dict[str, Any]
    extractor: dict[str, Any]


class StudyResults(BaseModel):
    """What `eval.study --json` writes."""

    study: Study
    runs: list[StudyRun] = Field(min_length=1)
    environment: dict[str, Any]


Content = TypeVar("Content", bound=BaseModel)
_MAKERS = {
    StudyResults: ("eval.study", "python -m eval.study STUDY.yaml --json"),
    Scores: ("eval.fid", "python -m eval.fid RUN --json"),
    Throughput: ("eval.throughput", "python -m eval.throughput MODEL --json"),
    Operators: ("eval.operators", "python -m eval.operators --json"),
    Ablations: ("eval.ablations", "python -m eval.ablations --json"),
}


def read_file(path: Path, kind: type[Content]) -> Content:
    """Raises `UserError` for a file that the command of this kind did not write."""
    maker, command = _MAKERS[kind]
    mend = f"make one with `{command} {path}`"
    if not path.exists():
        raise UserError(f"{path} does not exist; {mend}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}); {mend}") from None
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise UserError(f"{path} is no file of {maker} ({where}: {first['msg']}); {mend}") from None


@dataclass(frozen=True)
class Files:
    scores: dict[Path, Scores]
    throughput: list[Throughput]
    operators: list[Operators]
    studies: dict[Path, dict[str, Any]] = field(default_factory=dict)  # as eval.study reads them
    ablations: list[Ablations] = field(default_factory=list)


def read_files(
    scores: list[Path],
    throughput: list[Path],
    operators: list[Path],
    studies: Sequence[Path] = (),
    ablations: Sequence[Path] = (),
) -> Files:
    for path in studies:
        read_file(path, StudyResults)
    return Files(
        {path: read_file(path, Scores) for path in scores},
        [read_file(path, Throughput) for path in throughput],
        [read_file(path, Operators) for path in operators],
        {path: json.loads(path.read_text(encoding="utf-8")) for path in studies},
        [read_file(path, Ablations) for path in ablations],
    )


def environments(of_file: dict[str, Any], of_parts: Iterable[dict[str, Any] | None]) -> list[dict[str, Any]]:
    """What the parts of a file were made with, each once: their own, or the file's where they have none."""
    found: list[dict[str, Any]] = []
    for own in of_parts:
        found += [own or of_file] if (own or of_file) not in found else []
    return found


def command_of(*environments: dict[str, Any]) -> str | None:
    """The command lines in what a file says of its making, such as they can be typed again."""
    commands = dict.fromkeys(filter(None, map(_command, environments)))
    return "; ".join(commands) or None


def _command(environment: dict[str, Any]) -> str | None:
    command = environment.get("command")
    if not isinstance(command, str) or not command:
        return None
    program, _, arguments = command.partition(" ")
    if program in ("fid.py", "throughput.py", "operators.py", "study.py", "ablations.py"):
        program = f"python -m eval.{program.removesuffix('.py')}"
    return f"{program} {arguments}".rstrip()


def machine_of(*environments: dict[str, Any]) -> str:
    """What a file says of the machines it was made on."""
    return " and ".join(dict.fromkeys(map(_machine, environments)))


def _machine(environment: dict[str, Any]) -> str:
    if environment.get("gpu"):
        return str(environment["gpu"])
    if environment.get("cpu"):
        threads = environment.get("threads", "an unstated number of")
        return f"{environment['cpu']}, {threads} thread{'s' * (threads != 1)}"
    return "a machine that the file does not state"


def is_number(value: Any) -> bool:
    """Whether it can be drawn: NaN, infinity and true cannot."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
