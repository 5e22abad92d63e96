"""Python programs, the project's among them, as processes of their own that begin at once: forked from a server without threads,
which has imported torch and diffusers (nine seconds on a slow core)."""

from __future__ import annotations

import faulthandler
import importlib.util
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
# A fork of the tests' own process would inherit an OpenMP pool whose threads are gone, and wait for them for ever. One server
# serves all files of tests that a process runs, whichever comes first: what it imports stands here alone. The operator's tests
# run without diffusers too.
PRELOADED = ["torch", "pytest"]  # a function of a test file brings its file's imports along
if importlib.util.find_spec("diffusers"):
    PRELOADED += ["ldm_dcn.trainer", "ldm_dcn.encoding", "eval.columns", "eval.fid", "torchmetrics.image"]
FORKS = hasattr(os, "fork")  # elsewhere a program imports everything itself
server = multiprocessing.get_context("forkserver" if FORKS else "spawn")
if FORKS:
    server.set_forkserver_preload(PRELOADED)


def environment(**extra: str) -> dict[str, str]:
    """For subprocesses: one thread, and the package importable wherever they run."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **extra}


class Program:
    """Such a process, started in `folder` with the arguments of `python`: ("train.py", "tiny.yaml"), ("-m", "eval.fid", "run")."""

    def __init__(self, *command: str, folder: Path = ROOT, **environ: str) -> None:
        self.command = command
        self._folder = tempfile.TemporaryDirectory(prefix="program-")
        self._texts = Path(self._folder.name, "stdout"), Path(self._folder.name, "stderr")
        for path in self._texts:
            path.touch()
        self._process = server.Process(
            target=_run, args=(command, folder, environment(**environ), *self._texts), daemon=True
        )
        self._process.start()

    @property
    def stdout(self) -> str:
        return self._texts[0].read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self._texts[1].read_text(encoding="utf-8")

    def poll(self) -> int | None:
        """The exit code, -number where a signal ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float = 120) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise AssertionError(f"{self.command} did not end within {timeout} s: {self.abort()}")
        return self._process.exitcode

    def abort(self) -> str:
        """End it where it hangs; the last of what it said, and where it was."""
        self.send_signal(signal.SIGABRT)  # faulthandler tells what each thread does
        self._process.join(10)
        self.kill()
        return self.stderr[-6000:]

    def wait_for_line(self, text: str, timeout: float = 60) -> str:
        """The first whole line of stderr that holds `text`."""
        deadline = time.monotonic() + timeout
        while True:
            ended = self.poll() is not None
            for line in self.stderr.splitlines(keepends=True):
                if text in line and line.endswith("\n"):
                    return line
            assert not ended and time.monotonic() < deadline, self.stderr[-3000:]
            time.sleep(0.01)

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()


def run(*command: str, folder: Path = ROOT) -> Program:
    """A program, to its end."""
    program = Program(*command, folder=folder)
    program.wait()
    return program


def run_together(*command: str, processes: int = 2, folder: Path = ROOT) -> list[Program]:
    """The same program in processes that find each other, as torchrun would start them, to their end without an error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": f"{processes}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    started = [
        Program(*command, folder=folder, RANK=f"{rank}", LOCAL_RANK=f"{rank}", **meeting)
        for rank in range(processes)
    ]
    return to_their_end(started)


def to_their_end(started: list[Program]) -> list[Program]:
    """Waits for programs that wait for each other: where one fails the others are ended too."""
    try:
        for program in started:
            assert program.wait(250) == 0, program.stderr
    except AssertionError:
        for program in started:
            if program.poll() is None:
                print(f"{program.command} waited for it: {program.abort()}")
        raise
    finally:
        for program in started:
            program.kill()
    return started


def torchrun(*command: str, processes: int = 2) -> Program:
    """By the real launcher, whose processes import everything anew; to its end without an error."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", f"{processes}")
    launched = Program(*launcher, *command)
    assert launched.wait(250) == 0, launched.stderr[-3000:]
    return launched


def _run(command: tuple[str, ...], folder: Path, environ: dict[str, str], stdout: Path, stderr: Path) -> None:
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    missing = [name for name in PRELOADED if FORKS and name not in sys.modules]
    assert not missing, f"the server could not import {missing}"
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    torch.set_num_threads(int(environ["OMP_NUM_THREADS"]))
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")
