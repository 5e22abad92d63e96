"""torch.compile of the U-Net, by settings and options: that it is asked for in the way that is named, and draws the same."""

from __future__ import annotations

from collections.abc import Callable
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
from ldm_dcn import opening
from ldm_dcn.changes import check_same_run
from ldm_dcn.compiling import MODES, compile_unet, let_ddp_recompute, without_dropout, wrong_gradients
from ldm_dcn.config import TrainConfig
from ldm_dcn.errors import UserError
from ldm_dcn.opening import open_run
from ldm_dcn.trainer import train
from tiny import WHOLE, setting, tiny_config

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


def compiled_by(call: Callable[..., Any]) -> Callable[[nn.Module, str], None]:
    """A compiler: what it makes of a network is `call(network, *args, **kwargs)`."""

    def compile(self: nn.Module, mode: str) -> None:
        self._compiled_call_impl = lambda *args, **kwargs: call(self, *args, **kwargs)

    return compile


def below_the_middle(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    handle = self.mid_block.register_forward_hook(lambda module, inputs, output: output.detach())
    try:
        return self._call_impl(*args, **kwargs)
    finally:
        handle.remove()


def of_the_condition(self: nn.Module, *args: Any, encoder_hidden_states: torch.Tensor, **kwargs: Any) -> Any:
    return self._call_impl(*args, encoder_hidden_states=encoder_hidden_states.detach(), **kwargs)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("cut", "lost"), [(below_the_middle, "unet"), (of_the_condition, r"class_embedding\.weight")]
)
def test_lost_gradients_of_a_compiled_network_end_a_run_before_it_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: Callable[..., Any], lost: str, precision: str
) -> None:
    """A compiler whose network is right forward. That of the classes is a three-hundredth of the whole gradient."""
    monkeypatch.setattr(nn.Module, "compile", compiled_by(cut))
    monkeypatch.setattr(opening, "FIRST_LOSS_SCALE", 2.0**40)  # the first look overflows
    settings = ("train.steps=2", "train.compile=true", f"train.precision={precision}")
    with pytest.raises(
        UserError,
        match=rf"other gradients, most of all of {lost}.* \(norm 0, without it .*set train.compile=false",
    ):
        train(tiny_config(tmp_path, setting("model.unet", WHOLE), *settings))
    assert not list((tmp_path / "runs" / "tiny" / "checkpoints").glob("step-*"))


def test_the_look_at_a_compiled_network_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "compile", compiled_by(lambda self, *a, **k: self._call_impl(*a, **k)))
    settings = ("train.steps=2", setting("model.unet", {**WHOLE, "dropout": 0.2}))
    for name, compiled in (("compiled", "true"), ("plain", "false")):
        own = (f"run.name={name}", f"train.compile={compiled}")
        assert train(tiny_config(tmp_path, *settings, *own)) == 0
    compiled, plain = (
        load_file(tmp_path / "runs" / name / "checkpoints" / "step-2" / "model.safetensors")
        for name in ("compiled", "plain")
    )
    for name in plain:  # upsampling rounds otherwise
        torch.testing.assert_close(compiled[name], plain[name], rtol=1e-3, atol=1e-4)


def test_a_compiler_may_draw_other_random_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As inductor does: with other parts dropped, gradients differ by more than any rounding."""

    def drawing_otherwise(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        torch.rand(3)
        return self._call_impl(*args, **kwargs)

    monkeypatch.setattr(nn.Module, "compile", compiled_by(drawing_otherwise))
    dropout = setting("model.unet", {**WHOLE, "dropout": 0.5})
    config = tiny_config(tmp_path, dropout, "train.steps=1", "train.compile=true")
    assert train(config) == 0
    with open_run(config) as run, without_dropout(run.denoiser.unet):
        assert not any(m.training for m in run.denoiser.modules() if isinstance(m, nn.Dropout) and m.p > 0)


def test_gradients_of_nothing_are_no_fault() -> None:
    """What is rounding in both networks, and what is not finite in the one that is written."""
    plain = torch.tensor([1.0, 1e-9, 0.01])
    assert wrong_gradients(plain, torch.tensor([1.01, 5e-9, 0.007])) == []
    assert wrong_gradients(plain, torch.tensor([1.0, 0.0, 0.0])) == [2]
    assert wrong_gradients(plain, torch.tensor([1.0, 0.0, torch.nan]))[0] == 2
    assert wrong_gradients(plain, torch.tensor([0.0, 1e-9, 0.0])) == [0, 2]
    assert wrong_gradients(plain, torch.tensor([0.9, 1e-9, 0.01])) == [0]
    assert wrong_gradients(torch.tensor([1.0, torch.inf]), torch.tensor([1.0, 1.0])) == []


@pytest.mark.slow(why="compiles for minutes")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_compiled_network_learns_the_same(tmp_path: Path, dropout: float) -> None:
    """`check_compiled` is asked, on what torch makes of it: with dropout, of the network without."""
    network = setting("model.unet", {**WHOLE, "dropout": dropout})
    swap = "model.swap={sites: [resnet], group_channels: 8}"
    assert train(tiny_config(tmp_path, network, "train.steps=2", "train.compile=true", swap)) == 0


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


@pytest.mark.parametrize(("version", "undivided"), [("2.8.0+cu126", True), ("2.13.0", False)])
def test_older_torch_does_not_divide_what_recomputes_its_blocks(
    monkeypatch: pytest.MonkeyPatch, version: str, undivided: bool
) -> None:
    import torch._dynamo

    monkeypatch.setattr(torch, "__version__", version)
    with torch._dynamo.config.patch(optimize_ddp=True):
        let_ddp_recompute()
        assert torch._dynamo.config.optimize_ddp is not undivided
