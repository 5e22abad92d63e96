"""The GPU part in one command: build, correctness, compute-sanitizer, benchmark of the operator, speed of whole networks.

    python benchmarks/gpu.py                    # on a machine with a GPU, its PyTorch and nvcc; `make gpu` is the same
    python benchmarks/gpu.py --dry-run          # print the commands
    python benchmarks/gpu.py --device cpu       # rehearse without a GPU: what needs one is reported as left out

It ends within --minutes. Each stage has a limit of its own, its failure is reported and stops no other stage; the same
command again skips what has passed with these sources on this device, and goes on with the benchmarks where they stopped.
Results and one file of logs go to the folder $OUT where that is set, else to benchmarks/results; earlier results are looked for
in both, so copy what came back in $OUT to benchmarks/results before the next run.

The networks (Stable Diffusion's U-Net and both swapped ones, training and sampling) need diffusers, pydantic and what these need
besides; where they are not importable that stage is left out and says so. It takes a run of its own:

    python benchmarks/gpu.py --stages build networks

The official operator is timed too where its sources lie in .peers/DCNv4 (its folder DCNv4_op, with setup.py in it; ignored by
git). benchmarks/build_official.sh builds a copy, with what a current PyTorch needs; a build.sh beside setup.py is run instead.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "benchmarks" / "results"
BUILD, REHEARSED = ROOT / "build" / "gpu", ROOT / "build" / "rehearsal"
LOGS, LOG_BYTES = ROOT / "build" / "logs", 200_000  # the end of each goes into the one file
INDUCTOR = ROOT / "build" / "inductor"  # what torch.compile has made is found again by the next run
OFFICIAL, OFFICIAL_BUILD = ROOT / ".peers" / "DCNv4", ROOT / "build" / "official"
CLOSING = 15  # seconds kept for the report
PASSED, FAILED, LEFT_OUT, UNFINISHED = "passed", "failed", "left out", "unfinished"


@dataclass
class Outcome:
    status: str
    note: str = ""
    seconds: float = 0.0
    environment: dict[str, object] | None = None  # of the run that it was taken over from; None: of this one


@dataclass
class Session:
    """One run of this command."""

    device: str
    out: Path
    ends: float  # time.monotonic
    dry: bool
    again: bool
    problems: int
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    background: dict[str, subprocess.Popen] = field(default_factory=dict)
    logs: set[str] = field(default_factory=set)  # begun in this run

    def remaining(self) -> float:
        return self.ends - time.monotonic() - CLOSING

    def environment(self, **extra: str) -> dict[str, str]:
        folders = [str(ROOT), *([str(OFFICIAL_BUILD)] if OFFICIAL_BUILD.exists() else [])]
        path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
        found = {"CUDACXX": find_program("nvcc"), "TORCHINDUCTOR_CACHE_DIR": str(INDUCTOR)}
        ours = {name: value for name, value in found.items() if value and name not in os.environ}
        return {**os.environ, **ours, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **extra}

    def start(self, command: list[str], log: str, **extra: str) -> subprocess.Popen:
        print(f"$ {shlex.join(command)}", flush=True)
        mode = "a" if log in self.logs else "w"  # logs of stages that are skipped stay
        self.logs.add(log)
        LOGS.mkdir(parents=True, exist_ok=True)
        with open(LOGS / log, mode, encoding="utf-8") as file:
            file.write(f"$ {shlex.join(command)}\n")
            file.flush()
            return subprocess.Popen(
                command, cwd=ROOT, env=self.environment(**extra), stdout=file, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def run(self, command: list[str], limit: float, log: str, **extra: str) -> int | None:
        """Exit code of a command, None when it ran past its limit and was stopped. Its output goes to the log."""
        if self.dry:
            variables = "".join(f"{key}={value} " for key, value in extra.items())
            print(f"  {variables}{shlex.join(command)}  [at most {limit:.0f} s, {log}]")
            return 0
        return finish(self.start(command, log, **extra), min(limit, self.remaining()))

    def run_all(self, commands: Iterable[list[str]], limit: float, log: str) -> int | None:
        """Like `run` for commands one after the other, up to the first that fails."""
        ends = time.monotonic() + limit
        for command in commands:
            code = self.run(command, ends - time.monotonic(), log)
            if code != 0:
                return code
        return 0


def finish(process: subprocess.Popen, limit: float) -> int | None:
    """Wait for a process and what it started; stop all of it at the limit."""
    try:
        return process.wait(timeout=max(0.1, limit))
    except subprocess.TimeoutExpired:
        # SIGTERM first: a benchmark in the middle of writing has nothing to lose, its file is replaced at once or not at all.
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, sign)
                process.wait(timeout=5)
                break
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        return None


def outcome(code: int | None, limit: float, note: str = "") -> Outcome:
    if code == 0:
        return Outcome(PASSED, note)
    if code is None:
        return Outcome(UNFINISHED, f"stopped after its {limit:.0f} s")
    return Outcome(FAILED, note or f"exit code {code}")


# ---- stages


def build(session: Session, limit: float) -> Outcome:
    """Both libraries, the CUDA one for this GPU's architecture alone; installed where the package looks."""
    cmake, ninja = find_program("cmake"), find_program("ninja")
    if not session.dry and (find_program("nvcc") is None or cmake is None):
        return Outcome(
            FAILED,
            f"no {'cmake' if find_program('nvcc') else 'nvcc'} on PATH, beside {sys.executable} or in CUDA's folder",
        )
    architecture = gpu_facts()[1] or "90"
    configure = [
        cmake or "cmake", "-S", ".", "-B", str(BUILD.relative_to(ROOT)), "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_CUDA_ARCHITECTURES={architecture}-real",
    ]  # fmt: skip
    if ninja:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    compile_ = [
        cmake or "cmake",
        "--build",
        str(BUILD.relative_to(ROOT)),
        "--parallel",
        str(os.cpu_count() or 1),
    ]
    commands = [configure, compile_]
    if session.device == "cuda" or session.dry:  # a rehearsal leaves the libraries of this machine alone
        commands.append([cmake or "cmake", "--install", str(BUILD.relative_to(ROOT)), "--prefix", "."])
        commands.append([sys.executable, "-m", "dcnv4_ext"])
    code = session.run_all(commands, limit, "build.log")
    return outcome(code, limit, f"sm_{architecture}" if code == 0 else "see build.log")


def correctness(session: Session, limit: float) -> Outcome:
    """tests/test_cuda_device.py, with more random problems than the ordinary test run has."""
    command = [sys.executable, "-m", "pytest", "tests/test_cuda_device.py", "-rs", "--maxfail=20", "-p", "no:cacheprovider"]  # fmt: skip
    # Small problems, and other stages compile meanwhile: sixteen threads that wait for each other took five times as long as four.
    variables = {"DCNV4_PROBLEMS": str(session.problems), "OMP_NUM_THREADS": str(min(4, os.cpu_count() or 1))}
    code = session.run(command, limit, "correctness.log", **variables)
    text = last_line(LOGS / "correctness.log", r"passed|failed|skipped|error")
    if code == 0 and " skipped" in text and " passed" not in text:
        # With a GPU at hand nothing is skipped for a good reason.
        return Outcome(LEFT_OUT if session.device == "cpu" else FAILED, text)
    return outcome(code, limit, text)


def sanitizer(session: Session, limit: float, tool: str, summary: str) -> Outcome:
    """compute-sanitizer over every kernel; passed when its summary counts no error."""
    program = find_program("compute-sanitizer")
    if session.device != "cuda":
        return Outcome(LEFT_OUT, "needs a GPU")
    if program is None and not session.dry:
        return Outcome(LEFT_OUT, "no compute-sanitizer on PATH")
    command = [
        program or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no",
        sys.executable, "benchmarks/sanitized.py",
    ]  # fmt: skip
    code = session.run(command, limit, "sanitizer.log", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if session.dry:
        return Outcome(PASSED)
    text = last_line(LOGS / "sanitizer.log", "SUMMARY|not supported|Error:")
    if "not supported" in text:
        return Outcome(LEFT_OUT, f"compute-sanitizer does not run on this machine: {text}")
    if code == 0 and not re.search(summary, text):
        return Outcome(FAILED, text or "no summary in sanitizer.log")
    return outcome(code, limit, text if code == 0 else f"{text} (exit code {code})")


def memcheck(session: Session, limit: float) -> Outcome:
    return sanitizer(session, limit, "memcheck", r"ERROR SUMMARY: 0 errors")


def racecheck(session: Session, limit: float) -> Outcome:
    return sanitizer(session, limit, "racecheck", r"RACECHECK SUMMARY: 0 hazards")


def official_sources() -> Path | None:
    return next((f for f in (OFFICIAL, OFFICIAL / "DCNv4_op") if (f / "setup.py").exists()), None)


def official_mark(source: Path) -> str:
    """What the official operator's build depends on: its sources, what builds it, this PyTorch and this GPU."""
    digest = hashlib.sha256((ROOT / "benchmarks" / "build_official.sh").read_bytes())
    for file in sorted(file for file in source.rglob("*") if file.is_file()):
        digest.update(file.read_bytes())
    torch = query([sys.executable, "-c", "import torch; print(torch.__version__)"])
    return f"{digest.hexdigest()[:12]} {sys.version.split()[0]} {torch} {gpu_facts()[1]}"


def start_official(session: Session) -> None:
    """The official operator's build, beside the other stages. One that was begun on this machine goes on."""
    source = official_sources()
    if source is None or session.device != "cuda":
        return
    if session.dry:
        print(
            f"  copy {source.relative_to(ROOT)} to {OFFICIAL_BUILD.relative_to(ROOT)}, build it there in the background"
        )
        return
    mark, wanted = OFFICIAL_BUILD / "built_from", official_mark(source)
    if not (mark.exists() and mark.read_text(encoding="utf-8") == wanted):
        shutil.rmtree(OFFICIAL_BUILD, ignore_errors=True)
        shutil.copytree(source, OFFICIAL_BUILD)
        mark.write_text(wanted, encoding="utf-8")
    own = OFFICIAL_BUILD / "build.sh"
    command = ["bash", str(own if own.exists() else ROOT / "benchmarks" / "build_official.sh")]
    architecture = gpu_facts()[1] or "90"
    session.background["official"] = session.start(
        ["env", "-C", str(OFFICIAL_BUILD), *command], "official.log", PYTHON=sys.executable, MAX_JOBS="4",
        TORCH_CUDA_ARCH_LIST=f"{architecture[:-1]}.{architecture[-1]}",
    )  # fmt: skip


def official(session: Session, limit: float) -> Outcome:
    """Wait for that build."""
    if session.dry:
        return Outcome(PASSED)
    if "official" not in session.background:
        return Outcome(LEFT_OUT, f"no sources in {OFFICIAL.relative_to(ROOT)}")
    code = finish(session.background["official"], min(limit, session.remaining()))
    if code == 0:
        # As the benchmark imports it: torch first, whose libraries the extension needs.
        code = session.run([sys.executable, "-c", "import torch, DCNv4"], 60, "official.log")
    return outcome(code, limit, "" if code == 0 else "see official.log")


def benchmark(session: Session, limit: float) -> Outcome:
    """eval.operators, as far as time allows; the next run goes on."""
    results, drawing = (
        session.out / results_name(session.device),
        session.out / results_name(session.device, ".png"),
    )
    stored = STORED / results.name
    if session.again and not session.dry:
        results.unlink(missing_ok=True)
    elif stored.exists() and not results.exists() and not session.dry:
        shutil.copy(stored, results)
    ends = time.monotonic() + limit
    code = 0
    for selection in SELECTIONS if session.device == "cuda" else REHEARSED_SELECTIONS:
        left = min(ends - time.monotonic(), session.remaining())
        if left < 30 and not session.dry:
            code = 3
            break
        command = [sys.executable, "-m", "eval.operators", "--device", session.device, "--json", str(results)]
        # With other kernels than those of the file at hand, it is begun anew.
        command += ["--chart", str(drawing), "--limit", f"{max(1.0, left - 30):.0f}", "--replace", *selection]
        code = session.run(command, left, "benchmark.log")
        if code:
            break
    results.with_name(results.name + ".part").unlink(missing_ok=True)  # of a write that was stopped
    if code == 3:
        return Outcome(UNFINISHED, last_line(LOGS / "benchmark.log", "were left"))
    return outcome(code, limit, "" if code == 0 else last_line(LOGS / "benchmark.log", "."))


# What eval.operators measures in a process of its own, the most telling first. One process for all would not do: on an H200 peers
# whose calls cannot be captured left memory behind, until after some sixty measurements there was none.
TYPES = ("bfloat16", "float32", "float16")
SELECTIONS = tuple(
    ["--dtype", dtype, *rest] for rest in (["--sigma", "2", "--level", "op"], []) for dtype in TYPES
)
REHEARSED_SELECTIONS = (
    ["--rows", "2x8x8x64", "1x7x7x64", "--dtype", "float32", "--seconds", "0.1", "--rounds", "5", "--threads", "1"],
)  # fmt: skip


CONVS, FULL, UNET = (f"configs/imagenet256_{name}.yaml" for name in ("dcn_convs", "dcn_full", "unet"))


@dataclass(frozen=True)
class Networks:
    """One measurement of swapped networks beside the U-Net: settings of eval.throughput, and the seconds it needs at least."""

    batch: int
    swapped: tuple[str, ...] = (CONVS, FULL)
    compile: str | None = None  # torch.compile's mode
    least: float = 60
    profile: bool = False  # instead: where forward and backward go, by kind of module

    def __str__(self) -> str:
        parts = [
            f"batch {self.batch}",
            *([f"compiled ({self.compile})"] if self.compile else []),
            *(["profile"] if self.profile else []),
            *(Path(p).stem for p in self.swapped),
        ]
        return ", ".join(parts)

    def command(self, device: str, file: Path) -> list[str]:
        command = [sys.executable, "-m", "eval.throughput", "--device", device, "--json", str(file)]
        command += ["--batch-size", str(self.batch)]
        if device == "cpu":  # a rehearsal
            return [*command, "configs/digits_dcn.yaml", "--baseline", "configs/digits_unet.yaml", "--rounds", "1", "--steps", "1"]  # fmt: skip
        command += [
            *self.swapped,
            "--baseline",
            UNET,
            "--precision",
            "bf16",
            "--rounds",
            "5",
            "--steps",
            "10",
        ]
        if self.compile:
            return [*command, "--compile", self.compile, "--only", "training", "sampling"]
        return [*command, "--profile"] if self.profile else command


# At batch 128, an eighth of the recipe's 1,024, kernels are what a step waits for; at 32 the processor that launches them, unless CUDA
# graphs replay them. Compiling takes minutes a network: two of them at a time, and nothing that another activity tells already.
NETWORKS = (
    Networks(128), Networks(128, profile=True), Networks(32, (CONVS,), compile="reduce-overhead", least=300), Networks(32), Networks(64),
    Networks(128, (CONVS,), compile="default", least=300), Networks(32, (FULL,), compile="reduce-overhead", least=300),
)  # fmt: skip
REHEARSED_NETWORKS = (Networks(2, ("configs/digits_dcn.yaml",), least=5),)


def networks(session: Session, limit: float) -> Outcome:
    """Training step, forward, sampling and memory of the presets, bf16, compiled and not; what is measured already is kept."""
    file = session.out / results_name(session.device, kind="networks")
    ends = time.monotonic() + limit
    if not session.dry and (missing := why_not("eval.throughput", "diffusers")):
        return Outcome(LEFT_OUT, f"needs packages that are not there: {missing}")
    known = {} if session.again else read_networks((file, STORED / file.name))
    failed, left = [], 0
    for one in NETWORKS if session.device == "cuda" else REHEARSED_NETWORKS:
        name = str(one)
        if name in known and not session.dry:
            continue
        if not session.dry and min(ends - time.monotonic(), session.remaining()) < one.least:
            left += 1
            continue
        part = LOGS / "networks.json"
        part.unlink(missing_ok=True)
        code = session.run(one.command(session.device, part), ends - time.monotonic(), "networks.log")
        if session.dry:
            continue
        if code == 0:
            known[name] = json.loads(part.read_text(encoding="utf-8"))
            content = {"environment": made_with(), "sources": networks_hash(), "measurements": known}
            file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        elif code is None:
            left += 1
        else:
            failed.append(f"{name}: {last_line(LOGS / 'networks.log', '.')}")
    if failed:
        return Outcome(FAILED, "; ".join(failed))
    if left:
        return Outcome(
            UNFINISHED, f"{left} measurements were left; the same command again, or --stages build networks"
        )
    return Outcome(PASSED, ", ".join(known))


def read_networks(files: Iterable[Path]) -> dict[str, dict]:
    """Measurements of earlier runs with the same sources."""
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["sources"] == networks_hash():
                return dict(content["measurements"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}


@dataclass(frozen=True)
class Stage:
    name: str
    limit: float  # seconds
    work: Callable[[Session, float], Outcome]
    repeats: bool = (
        False  # also when it has passed before: its product may be missing, or costs nothing to check
    )


STAGES = (
    Stage("build", 150, build, repeats=True),
    Stage("correctness", 150, correctness),
    Stage("memcheck", 90, memcheck),
    Stage("racecheck", 100, racecheck),
    # Waited for: a benchmark without it says less than one that is not done.
    Stage("official", 240, official, repeats=True),
    Stage("benchmark", 520, benchmark, repeats=True),
    Stage("networks", 520, networks, repeats=True),
)


# ---- what the stages share


@functools.cache
def find_program(name: str) -> str | None:
    """A program: on PATH, beside this Python, or in CUDA's folder."""
    cuda = [Path(os.environ[key]) for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    folders = [Path(sys.executable).parent]
    for root in (*cuda, Path("/usr/local/cuda")):
        folders += [root / "bin", root / "compute-sanitizer"]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))


def why_not(*modules: str) -> str:
    """The last line of what importing them says; nothing where it works."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {', '.join(modules)}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["?"])[-1]


def last_line(log: Path, pattern: str) -> str:
    """The last line of a log that a pattern is found in."""
    if not log.exists():
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip(" =") for line in reversed(lines) if re.search(pattern, line)), "")


def query(command: list[str]) -> str:
    """What a short command prints, or nothing."""
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@functools.cache
def gpu_facts() -> tuple[str, str]:
    """(name, architecture) of the first GPU, such as ("NVIDIA H200", "90"); empty where torch sees none."""
    code = "import torch; print(torch.cuda.get_device_name(), *torch.cuda.get_device_capability(), sep='\\n')"
    name, major, minor = (query([sys.executable, "-c", code]).splitlines() or ["", "", ""])[-3:]
    return name, major + minor


@functools.cache
def made_with() -> dict[str, object]:
    """Versions, processor and GPU, as in every file of results."""
    code = "import json; from eval.environment import environment; print(json.dumps(environment()))"
    try:
        found = json.loads((query([sys.executable, "-c", code]).splitlines() or ["{}"])[-1])
    except ValueError:
        found = {}
    return {**found, "command": shlex.join(["gpu.py", *sys.argv[1:]])}


def results_name(device: str, suffix: str = ".json", kind: str = "operators") -> str:
    slug = (
        re.sub(r"[^a-z0-9]+", "_", ("cpu" if device == "cpu" else gpu_facts()[0]).lower()).strip("_") or "gpu"
    )
    return f"{kind}_{slug}{suffix}"


def networks_hash() -> str:
    """Of what the stage `networks` depends on besides: networks, their configs, the stopwatch, and the packages below them."""
    folders = (ROOT / name for name in ("ldm_dcn", "eval", "configs"))
    files = [file for folder in folders for kind in ("*.py", "*.yaml") for file in sorted(folder.rglob(kind))]
    return sources_hash(files, "".join(f"{name} {version(name)}" for name in ("torch", "diffusers")))


def sources_hash(more: Iterable[Path] = (), known: str = "") -> str:
    """Of everything the other stages depend on, and of `more`."""
    files = [
        ROOT / "CMakeLists.txt",
        *sorted((ROOT / "dcnv4_ext").rglob("*.py")),
        *sorted((ROOT / "dcnv4_ext" / "csrc").rglob("*.*")),
        *(ROOT / "tests" / name for name in ("problems.py", "test_operator.py", "test_cuda_device.py")),
        ROOT / "tests" / "emulation" / "library.py",
        ROOT / "benchmarks" / "sanitized.py",
        *more,
    ]
    digest = hashlib.sha256(known.encode())
    for file in files:
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def read_state(folders: Iterable[Path], known: dict[str, str]) -> dict[str, Outcome]:
    """Outcomes of earlier runs with the same sources on the same device."""
    for folder in folders:
        try:
            content = json.loads((folder / "gpu.json").read_text(encoding="utf-8"))
            if content["known"] == known:
                own = {"environment": content["environment"]}
                return {name: Outcome(**(own | entry)) for name, entry in content["stages"].items()}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}


def write_state(session: Session, known: dict[str, str]) -> None:
    stages = {
        name: {key: value for key, value in vars(entry).items() if value is not None}
        for name, entry in session.outcomes.items()
    }
    content = {"environment": made_with(), "known": known, "stages": stages}
    (session.out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    # One file: whoever runs this may get only a few back.
    with open(session.out / "gpu.log", "w", encoding="utf-8") as file:
        for log in sorted(session.logs):
            text = (LOGS / log).read_text(encoding="utf-8", errors="replace")
            file.write(f"===== {log}\n{text[-LOG_BYTES:]}\n")


def report(session: Session) -> None:
    print("\nstage         outcome      seconds")
    for name, entry in session.outcomes.items():
        print(f"{name:<13} {entry.status:<12} {entry.seconds:7.1f}  {entry.note}")
    print(f"results and logs: {session.out}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=8.7, help="end within so many minutes (default: 8.7)"
    )
    parser.add_argument("--stages", nargs="+", choices=[s.name for s in STAGES], help="only these")
    parser.add_argument(
        "--problems", type=int, default=1000, help="random problems of the correctness stage (default: 1000)"
    )
    parser.add_argument(
        "--again", action="store_true", help="run what has passed before, measure everything anew"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    options = parser.parse_args(arguments)

    if options.device == "cuda" and not options.dry_run and not gpu_facts()[0]:
        print("error: torch sees no GPU; rehearse with --device cpu", file=sys.stderr)
        return 2
    rehearsal = options.device == "cpu" or options.dry_run
    out = Path(os.environ.get("OUT") or (REHEARSED if rehearsal else STORED)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    session = Session(
        options.device, out, time.monotonic() + 60 * options.minutes, options.dry_run, options.again, options.problems
    )  # fmt: skip
    known = {"device": "cpu" if rehearsal else gpu_facts()[0], "sources": sources_hash()}
    before = {} if options.again else read_state((out, STORED), known)
    if not options.stages or {"official", "benchmark"} & set(options.stages):
        start_official(session)
    for stage in STAGES:
        earlier = before.get(stage.name)
        if options.stages and stage.name not in options.stages:
            if earlier:
                session.outcomes[stage.name] = earlier
            continue
        if earlier and earlier.status == PASSED and not stage.repeats:
            session.outcomes[stage.name] = earlier
            print(f"{stage.name}: passed before", flush=True)
            continue
        print(f"== {stage.name}", flush=True)
        began = time.monotonic()
        if session.remaining() < 5 and not session.dry:
            entry = Outcome(UNFINISHED, "no time was left; run the same command again")
        else:
            try:
                entry = stage.work(
                    session, min(stage.limit, session.remaining()) if not session.dry else stage.limit
                )
            except (OSError, subprocess.SubprocessError) as error:
                entry = Outcome(FAILED, f"{type(error).__name__}: {error}")
        entry.seconds = round(time.monotonic() - began, 1)
        session.outcomes[stage.name] = entry
        if not session.dry:
            print(f"{stage.name}: {entry.status} {entry.note}", flush=True)
            write_state(session, known)
    for process in session.background.values():
        finish(process, 0.1)
    if session.dry:
        return 0
    show_tail(LOGS / "benchmark.log")
    report(session)
    return 0 if all(entry.status in (PASSED, LEFT_OUT) for entry in session.outcomes.values()) else 1


def show_tail(log: Path) -> None:
    """The tables of the benchmark's log, for the end of the output."""
    if log.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        print("\n".join(line for line in lines if not line.startswith("["))[-9000:])


if __name__ == "__main__":
    sys.exit(main())
