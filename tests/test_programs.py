"""Programs that end with the command that runs them."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from eval import programs as run_by_commands
from ldm_dcn.errors import UserError
from programs import Program

CHILD = """
import os, signal, sys, time
open(sys.argv[1] + ".pid", "w").write(str(os.getpid()))
def stop(*_):
    open(sys.argv[1] + ".saved", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
time.sleep(60)
"""
# As a study: several at a time, and more to come.
COMMAND = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from eval import programs
child, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
def one(number):
    programs.call([child, str(folder / str(number))], folder / "log", {})
with programs.ending_together():
    if threads == 1:
        one(0)
        one(1)
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(one, number) for number in range(3)]
        for future in futures:
            future.result()
"""


@pytest.mark.parametrize(
    ("threads", "sent", "code"), [(1, "SIGTERM", 143), (2, "SIGINT", 130), (2, "SIGUSR1", 0)]
)
def test_what_is_stopped_has_its_programs_save_and_begins_no_more(
    tmp_path: Path, threads: int, sent: str, code: int
) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "command.py").write_text(COMMAND)
    command = Program(*map(str, (tmp_path / "command.py", tmp_path / "child.py", tmp_path, threads)))
    begun = [tmp_path / f"{number}.pid" for number in range(threads)]
    until = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in begun):
        assert time.monotonic() < until and command.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)  # for the handlers
    command.send_signal(getattr(signal, sent))
    assert command.wait() == code and f"{sent}: what runs saves and stops" in command.stderr
    assert sorted(file.name for file in tmp_path.glob("*.saved")) == [
        f"{number}.saved" for number in range(threads)
    ]
    assert len(list(tmp_path.glob("*.pid"))) == threads
    for file in begun:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_a_command_that_works_by_itself_stops_at_once(tmp_path: Path) -> None:
    program = tmp_path / "command.py"
    program.write_text(
        "import sys, time\nfrom eval import programs\nwith programs.ending_together():\n"
        "    print('begun', file=sys.stderr, flush=True)\n    time.sleep(60)\n"
    )
    command = Program(str(program))
    command.wait_for_line("begun")
    command.send_signal(signal.SIGTERM)
    assert command.wait(20) == 143


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("error: the reason\\rbar: 100%\\r", "the reason"),
        ("one\\nlast words\\n", "last words"),
        ("", "exit code 3"),
    ],
)
def test_what_fails_is_named_by_its_own_words(tmp_path: Path, said: str, expected: str) -> None:
    """Not by those of an earlier program of the same log, nor by a progress bar that another one draws there."""
    log, program = tmp_path / "log", tmp_path / "program.py"
    log.write_text("error: of before\n")
    program.write_text(f"import sys\nsys.stderr.write('{said}')\nsys.exit(3)\n")
    with pytest.raises(UserError, match=rf"failed: {re.escape(expected)}; the whole of it is in {log}"):
        run_by_commands.call([str(program)], log, {})
