"""What a run will take, against what it takes, and the cost of the loop around the network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eval import loop, plan, throughput
from eval.plan import Counted, count
from ldm_dcn.config import Config, load_config
from ldm_dcn.denoiser import Denoiser
from ldm_dcn.unet import build_unet
from tiny import ROOT, tiny_config, write_config


def kept_in_truth(config: Config, images: int) -> int:
    """Bytes that autograd keeps in a real forward pass, each storage once."""
    denoiser = Denoiser(build_unet(config.model.unet, swap=config.model.swap), 10).train()
    if config.train.gradient_checkpointing:
        denoiser.unet.enable_gradient_checkpointing()
    own = {p.untyped_storage().data_ptr() for p in denoiser.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(images, 1, 8, 8).to(memory_format=torch.channels_last)
    times = torch.zeros(images, dtype=torch.int64)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        output = denoiser(x, times, times)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("swap", ["null", "{sites: [resnet, self_attention], group_channels: 4}"])
def test_what_is_kept_is_foreseen(tmp_path: Path, swap: str, checkpointing: bool, precision: str) -> None:
    config = tiny_config(
        tmp_path,
        f"model.swap={swap}",
        f"train.gradient_checkpointing={str(checkpointing).lower()}",
        f"train.precision={precision}",
        "data.num_classes=10",
    )
    counted = count(config)
    an_image, once = counted.kept_checkpointed if checkpointing else counted.kept
    for images in (1, 6):
        assert an_image * images + once == pytest.approx(kept_in_truth(config, images), rel=0.02)


def test_counts_are_those_of_the_network(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "data.num_classes=10")
    counted = count(config)
    denoiser = Denoiser(build_unet(config.model.unet), 10)
    assert counted.parameters == sum(p.numel() for p in denoiser.parameters())
    inputs = torch.randn(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    assert counted.forward_flops == 2 * throughput.count_macs(denoiser, *inputs)


def test_the_papers_networks_are_counted_without_their_weights() -> None:
    counted = count(load_config(ROOT / "configs" / "imagenet256_dcn_convs.yaml"))
    assert counted.parameters == 565_581_716 + 1001 * 768
    assert counted.kept[1] == pytest.approx(2 * 565_581_716, rel=0.02)  # bf16 copies of the weights
    assert counted.kept_checkpointed[0] < counted.kept[0] / 5


COUNTED = Counted("x", 1_000_000, 50_000, 10**9, (4_000_000, 2_000_000), (500_000, 0))


@pytest.mark.parametrize(
    ("overrides", "gpus", "images", "state", "activations", "seconds"),
    [
        ((), 1, 64, 20e6, 64 * 4e6 + 2e6, 3 * 64e9 / 1e14),
        ((), 8, 8, 20e6, 8 * 4e6 + 2e6, 3 * 64e9 / 8e14),
        (("train.parallel=fsdp",), 8, 8, 20e6 / 8 + 4 * 50e3, 8 * 4e6 + 2e6, 3 * 64e9 / 8e14),
        (("train.gradient_checkpointing=true",), 8, 8, 20e6, 8 * 5e5, 4 * 64e9 / 8e14),
        (("train.gradient_accumulation=4",), 8, 2, 20e6, 2 * 4e6 + 2e6, 3 * 64e9 / 8e14),
    ],
)
def test_the_formula(
    tmp_path: Path,
    overrides: tuple[str, ...],
    gpus: int,
    images: int,
    state: float,
    activations: float,
    seconds: float,
) -> None:
    config = tiny_config(tmp_path, "train.batch_size=64", "train.steps=86400", *overrides)
    got = plan.plan(COUNTED, config, gpus, tflops=100)
    assert (got.images, got.state_bytes, got.activation_bytes) == (images, state, activations)
    assert got.seconds_a_step == pytest.approx(seconds) and got.days == pytest.approx(seconds)
    assert plan.plan(COUNTED, config, gpus, tflops=None).days is None


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    plan.main([str(write_config(tmp_path)), "--gpus", "1", "2", "--tflops", "1", "--json", str(path)])
    assert "tiny" in capsys.readouterr().out
    assert [p["gpus"] for p in json.loads(path.read_text())["plans"]] == [1, 2]
    with pytest.raises(SystemExit) as stopped:
        plan.main([str(write_config(tmp_path)), "--gpus", "3"])
    assert stopped.value.code == 2
    assert "train.batch_size=8 cannot be shared by 3 GPUs" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the loop


def test_the_parts_of_a_step_add_up_to_it(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "train.log_every=2")
    cost = loop.measure_loop(config, 6, progress=False)
    assert set(cost.parts) == {"waiting for the batch", "forward", "backward", "optimiser", "average", "rest"}
    assert all(len(seconds) == 6 for seconds in cost.parts.values())
    for i, whole in enumerate(cost.step):
        assert sum(seconds[i] for seconds in cost.parts.values()) == pytest.approx(whole)
        assert all(seconds[i] > 0 for seconds in cost.parts.values())
    assert 0 < cost.overhead < 1 and cost.loader > 0
    assert not (config.folder / "checkpoints").exists()
    assert "outside forward, backward and optimiser" in loop.table(cost, config)
