"""A Python program of this folder in a process of its own, for what may crash it."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import warnings
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path


@dataclass
class Alone:
    """Such a process, forked from a server without threads where the system has that. It need not import what the server did: it
    is that of programs.py where the tests of those run too."""

    process: BaseProcess
    files: tuple[Path, Path]

    @classmethod
    def start(cls, folder: Path, *command: str) -> Alone:
        """`command` as for `python`, from a script on; stdout and stderr go by way of files in `folder`."""
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        files = folder / "stdout", folder / "stderr"
        process = multiprocessing.get_context(method).Process(target=_run, args=(command, *files))
        process.start()
        return cls(process, files)

    def end(self) -> tuple[int | None, str, str]:
        """Exit code, stdout and stderr."""
        self.process.join(250)
        if self.process.exitcode is None:
            self.process.kill()
        return self.process.exitcode, *(file.read_text() if file.exists() else "" for file in self.files)


def alone(folder: Path, *command: str) -> tuple[int | None, str, str]:
    """The same, to its end."""
    return Alone.start(folder, *command).end()


def _run(command: tuple[str, ...], *files: Path) -> None:
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    warnings.simplefilter("ignore")
    os.chdir(Path(__file__).parent)
    sys.argv = list(command)
    runpy.run_path(command[0], run_name="__main__")
