"""Slow tests run where they are asked for, `pytest -m slow`; elsewhere they are skipped and say why. The longest files come first."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

# Those that take longest, in that order: of the files shared out among processes (`make test`), one that comes last would have
# the others wait for it.
LONGEST = (
    "faults",
    "run",
    "operator",
    "trainer",
    "plan",
    "cuda_emulated",
    "fid",
    "cuda_build",
    "framework",
    "study",
    "operators_benchmark",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=_place)  # stable: the rest stays as it is
    if "slow" in config.getoption("markexpr"):
        return
    for item in items:
        for mark in item.iter_markers("slow"):
            item.add_marker(pytest.mark.skip(reason=f"{mark.kwargs['why']}: run it with -m slow"))


def pytest_collection_finish() -> None:
    """What was imported is there to stay, and takes half a second to look through at each collection: `eval.operators`, for one, asks
    for one after each measurement."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_power_cuts() -> Iterator[None]:
    """Nothing waits for the disk in the tests' own processes: thousands of small files would, and programs that are killed do not need it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def one_thread_and_a_fresh_accelerator() -> Iterator[None]:
    """For tests that open runs: threads would wait for those of other processes, and accelerate keeps what the last run made it."""
    import torch
    from accelerate.state import AcceleratorState  # which the operator's tests do without

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    torch.set_num_threads(threads)


def _place(item: pytest.Item) -> int:
    name = item.path.stem.removeprefix("test_")
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)
