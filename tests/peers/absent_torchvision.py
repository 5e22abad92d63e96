"""Imported, it makes a torchvision of empty classes: torch-fidelity and pytorch-fid import one for what is not compared here.

The peers stay out of the project's environment. To compare, make another one beside it (torch as constraints.txt has it):

    python3 -m venv /tmp/peers && /tmp/peers/bin/pip install -c constraints.txt -e ".[test]" scipy
    /tmp/peers/bin/pip install --no-deps torch-fidelity pytorch-fid
    /tmp/peers/bin/python -m pytest -s tests/peers/*_equality.py
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types

NAMES = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


class _Classes(type):
    """Has a class of every name that is asked for, and so has that."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Classes(name, (), {})


class _Anything(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        return getattr(_Classes("torchvision", (), {}), name)


if importlib.util.find_spec("torchvision") is None:
    for name in NAMES:
        module = _Anything(name)
        module.__spec__, module.__path__, module.__version__ = (
            importlib.machinery.ModuleSpec(name, None),
            [],
            "0.0",
        )
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
