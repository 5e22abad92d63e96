"""torchmetrics, which does the sums: imported with care, and fed with features that are computed already."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from ldm_dcn.errors import UserError, one_line


def image_metric(name: str, num_features: int, **options: Any) -> Any:
    """torchmetrics.image's metric NAME over features (N, num_features).

    Raises `UserError` where torchmetrics cannot be imported: a torch-fidelity without torchvision, or a torchvision made for
    another torch, breaks its import.
    """
    module = {
        "FrechetInceptionDistance": "fid",
        "KernelInceptionDistance": "kid",
        "InceptionScore": "inception",
    }[name]
    try:
        metric = getattr(import_module(f"torchmetrics.image.{module}"), name)
    except Exception as error:  # RuntimeError and AttributeError too, from operators that are not there
        text = one_line(error)
        if isinstance(error, ModuleNotFoundError) and error.name == "torchmetrics":
            mend = "pip install torchmetrics"
        elif "torchvision" in text:
            mend = "pip uninstall torchvision torch-fidelity (neither is needed here)"
        else:
            mend = "pip install --force-reinstall --no-deps torchmetrics"
        raise UserError(f"torchmetrics cannot be imported ({text}); {mend}") from error
    with warnings.catch_warnings():
        # we have the features in memory already
        warnings.filterwarnings("ignore", message=".*will save all extracted features")
        # Features are gathered before they get here; with its own synchronisation the first process would wait for the others.
        return metric(feature=_Passthrough(num_features), sync_on_compute=False, **options)


class _Passthrough(nn.Module):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
