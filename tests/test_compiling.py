"""torch.compile of the U-Net, by settings and options: that it is asked for in the way that is named, and draws the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sample
from eval import fid
from ldm_dcn.changes import check_same_run
from ldm_dcn.compiling import MODES
from ldm_dcn.config import TrainConfig
from ldm_dcn.trainer import train
from tiny import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread_and_a_fresh_accelerator")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[type, str]]:
    """What is compiled and how, in place of the minutes that it would take; "reset" where torch is to forget."""
    calls: list[Any] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode: calls.append((type(self).__name__, mode)))
    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append("reset"))
    return calls


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = tiny_config(tmp_path_factory.mktemp("compiling"), "train.steps=2")
    assert train(config) == 0
    return str(config.folder)


def test_settings_and_options_know_the_same_modes() -> None:
    assert get_args(TrainConfig.model_fields["compile_mode"].annotation) == MODES


def test_a_run_compiles_its_network_and_may_go_on_otherwise(asked: list[Any], tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "train.steps=1")
    assert train(config) == 0 and not asked
    settings = ("train.compile=true", "train.compile_mode=reduce-overhead")
    assert train(tiny_config(tmp_path, "train.steps=2", *settings)) == 0
    assert asked == [("UNet2DConditionModel", "reduce-overhead")]
    before = config.resolved()
    del before["train"]["compile_mode"]  # as before there were modes
    assert check_same_run(before, config, "the run") == []


def test_images_are_drawn_by_a_compiled_network_where_that_is_asked_for(
    asked: list[Any], run: str, tmp_path: Path
) -> None:
    few = ["--labels", "3", "--seeds", "0", "--grid"]
    assert sample.main([run, *few, str(tmp_path / "plain.png")]) == 0 and not asked
    assert sample.main([run, *few, str(tmp_path / "compiled.png"), "--compile"]) == 0
    assert sample.main([run, *few, str(tmp_path / "graphs.png"), "--compile", "reduce-overhead"]) == 0
    assert asked == [("UNet2DConditionModel", "default"), ("UNet2DConditionModel", "reduce-overhead")]
    with pytest.raises(SystemExit):
        sample.main([run, *few, str(tmp_path / "wrong.png"), "--compile", "fast"])


def test_each_network_that_is_scored_is_compiled_and_torch_forgets_the_one_before(
    asked: list[Any], run: str
) -> None:
    scored = fid.evaluate([run, f"{run}/export"], num=16, steps=1, compile="max-autotune", progress=False)
    assert scored is not None and len(scored.columns) > 2
    compiled = [("UNet2DConditionModel", "max-autotune")]
    assert [entry for entry in asked if entry != "reset"] == 2 * compiled
    assert asked.index("reset", asked.index(compiled[0])) < len(asked) - asked[::-1].index(compiled[0])


def test_images_that_are_there_are_not_compiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit):
        fid.main([str(tmp_path), "--compile"])
    assert "--compile says how a run is drawn" in capsys.readouterr().err


@pytest.mark.slow(why="compiles for a minute")
@pytest.mark.parametrize(
    "mode", ["default", "reduce-overhead"]
)  # without a GPU there are no graphs to replay
def test_a_compiled_network_draws_the_same(run: str, tmp_path: Path, mode: str) -> None:
    pictures = []
    for name, options in (("plain.png", []), ("compiled.png", ["--compile", mode])):
        assert (
            sample.main([run, "--n", "6", "--batch-size", "4", "--grid", str(tmp_path / name), *options]) == 0
        )
        pictures.append(np.asarray(Image.open(tmp_path / name)).astype(int))
    assert pictures[0].std() > 0 and abs(pictures[0] - pictures[1]).max() <= 1
