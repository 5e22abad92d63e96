"""Slow tests run where they are asked for, `pytest -m slow`; elsewhere they are skipped and say why."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" in config.getoption("markexpr"):
        return
    for item in items:
        for mark in item.iter_markers("slow"):
            item.add_marker(pytest.mark.skip(reason=f"{mark.kwargs['why']}: run it with -m slow"))
