"""torch.compile of the U-Net, by settings and options: that it is asked for in the way that is named, and draws the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import sample
from eval import fid
from ldm_dcn.changes import check_same_run
from ldm_dcn.compiling import MODES, compile_unet
from ldm_dcn.config import TrainConfig
from ldm_dcn.errors import UserError
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


@pytest.mark.parametrize("size", [None, (8, 10)])
def test_maps_are_widened_as_diffusers_does(asked: list[Any], size: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    layer = Upsample2D(6, use_conv=True, out_channels=6)
    x = torch.randn(2, 6, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    want = layer(x, size)
    want.square().sum().backward()
    gradient, x.grad = x.grad, None
    for _ in range(2):  # asked for twice it is done once
        compile_unet(layer)
    got = layer(x, output_size=size)
    got.square().sum().backward()
    assert torch.equal(got, want)
    torch.testing.assert_close(x.grad, gradient)
    assert torch.equal(layer(hidden_states=x), layer(x))


def test_other_gradients_of_a_compiled_network_end_a_run_before_it_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler whose network is right forward, and passes no gradient on below its middle."""

    def cut(self: nn.Module, mode: str) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            handle = self.mid_block.register_forward_hook(lambda module, inputs, output: output.detach())
            try:
                return self._call_impl(*args, **kwargs)
            finally:
                handle.remove()

        self._compiled_call_impl = call

    monkeypatch.setattr(nn.Module, "compile", cut)
    with pytest.raises(UserError, match=r"other gradients \(norm .*set train.compile=false"):
        train(tiny_config(tmp_path, "train.steps=2", "train.compile=true"))
    assert not list((tmp_path / "runs" / "tiny" / "checkpoints").glob("step-*"))

    def right(self: nn.Module, mode: str) -> None:
        self._compiled_call_impl = lambda *args, **kwargs: self._call_impl(*args, **kwargs)

    monkeypatch.setattr(nn.Module, "compile", right)
    for name, compiled in (("compiled", "true"), ("plain", "false")):
        settings = (
            "train.steps=2",
            "model.unet.dropout=0.2",
            f"run.name={name}",
            f"train.compile={compiled}",
        )
        assert train(tiny_config(tmp_path, *settings)) == 0
    compiled, plain = (
        load_file(tmp_path / "runs" / name / "checkpoints" / "step-2" / "model.safetensors")
        for name in ("compiled", "plain")
    )
    for name in plain:  # the look itself changes nothing; upsampling rounds otherwise
        torch.testing.assert_close(compiled[name], plain[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow(why="compiles for minutes")
def test_a_compiled_network_learns_the_same(tmp_path: Path) -> None:
    """`check_compiled` is asked, on what torch makes of it."""
    swap = "model.swap={sites: [resnet], group_channels: 8}"
    assert train(tiny_config(tmp_path, "train.steps=2", "train.compile=true", swap)) == 0


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
