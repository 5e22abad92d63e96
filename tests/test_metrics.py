"""What a run tells TensorBoard and Weights & Biases beside metrics.jsonl."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ldm_dcn.errors import UserError
from ldm_dcn.metrics import MetricsLog

COLOUR = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
GREY = COLOUR[:, :, 0].copy()


PICTURES = [(COLOUR, COLOUR), (GREY, np.repeat(GREY[:, :, None], 3, 2))]


def saved(pixels: np.ndarray, folder: Path) -> Path:
    Image.fromarray(pixels).save(folder / "step-3.png")
    return folder / "step-3.png"


@pytest.mark.parametrize(("pixels", "expected"), PICTURES)
def test_tensorboard_gets_pictures(tmp_path: Path, pixels: np.ndarray, expected: np.ndarray) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, 0, ["tensorboard"])
    log.write(3, loss=0.5)
    log.show(3, "samples", saved(pixels, tmp_path))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Images("samples")
    assert event.step == 3 and events.Scalars("loss")[0].value == 0.5
    (tmp_path / "sent.png").write_bytes(event.encoded_image_string)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "sent.png")), expected)


class Wandb(ModuleType):
    """As much of it as a run uses: what it was begun with, and what was logged."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, object]] = []
        self.logged: list[tuple[int, dict[str, object]]] = []
        self.config = SimpleNamespace(update=lambda *_, **__: None)

    def init(self, **options: object) -> Wandb:
        self.begun.append(options)
        return self

    def Image(self, pixels: np.ndarray) -> np.ndarray:
        assert pixels.ndim == 3
        return pixels

    def log(self, values: dict[str, object], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None: ...


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("accelerate.utils.is_wandb_available", lambda: True)
    return module


@pytest.mark.parametrize(("pixels", "expected"), PICTURES)
def test_weights_and_biases_gets_pictures(
    tmp_path: Path, wandb: Wandb, pixels: np.ndarray, expected: np.ndarray
) -> None:
    log = MetricsLog(tmp_path, 0, ["wandb"])
    log.show(3, "samples", saved(pixels, tmp_path))
    log.close()
    ((step, values),) = wandb.logged
    (sent,) = values["samples"]
    assert step == 3 and np.array_equal(sent, expected)


def test_the_environment_names_the_project(
    tmp_path: Path, wandb: Wandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, expected in ((None, "ldm-dcn"), ("", "ldm-dcn"), ("mine", "mine")):
        monkeypatch.delenv("WANDB_PROJECT", raising=False)
        if name is not None:
            monkeypatch.setenv("WANDB_PROJECT", name)
        MetricsLog(tmp_path, 0, ["wandb"]).close()
        assert wandb.begun[-1]["project"] == expected


def test_a_tracker_that_takes_no_picture_is_named(
    tmp_path: Path, wandb: Wandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no network")

    log = MetricsLog(tmp_path, 0, ["wandb"])
    monkeypatch.setattr(wandb, "log", fail)
    with pytest.raises(UserError, match="wandb took no picture: no network"):
        log.show(3, "samples", saved(COLOUR, tmp_path))
    log.close()
    MetricsLog(tmp_path, 0).show(3, "samples", tmp_path / "nowhere.png")  # nobody is there to be shown it
