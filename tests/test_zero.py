"""train.parallel=zero: DeepSpeed's ZeRO stage 2 on two processes is the run of one. Without DeepSpeed only its error is tested."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from ldm_dcn import metrics
from ldm_dcn.config import Config, load_config
from ldm_dcn.errors import UserError
from ldm_dcn.export import load_model
from ldm_dcn.opening import open_run
from ldm_dcn.signals import StopSignals
from ldm_dcn.trainer import train, training_step
from programs import torchrun
from tiny import tiny_config, write_config

ZERO = "train.parallel=zero"


@pytest.fixture(autouse=True)
def one_thread_and_a_fresh_accelerator() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def deepspeed() -> None:
    pytest.importorskip("deepspeed", reason="pip install -c constraints.txt deepspeed")


def lines(config: Config) -> list[dict]:
    return metrics.read(config.folder / "metrics.jsonl")


def losses(config: Config) -> list[float]:
    return [line["loss"] for line in lines(config)]


def saved(config: Config, step: int, group: str) -> dict[str, torch.Tensor]:
    return load_file(config.folder / "checkpoints" / f"step-{step}" / f"{group}.safetensors")


def test_without_deepspeed_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(
        UserError, match=r"train.parallel=zero needs DeepSpeed .*`pip install -c constraints.txt deepspeed`"
    ):
        train(tiny_config(tmp_path, ZERO))


def test_zero_goes_on_from_one_process_and_one_process_from_zero(deepspeed: None, tmp_path: Path) -> None:
    """Steps 1 to 3 in one process, 4 to 6 shared out on two in two parts each, 7 and 8 in one again."""
    swap = "model.swap={sites: [resnet], group_channels: 4}"
    one = tiny_config(tmp_path, swap, "train.sample_every=6", name="one")
    assert train(one) == 0

    path = write_config(tmp_path, "shared")
    assert train(load_config(path, [swap, "train.steps=3"])) == 0
    parts = "train.gradient_accumulation=2"
    torchrun("train.py", str(path), swap, ZERO, parts, "train.steps=6", "train.sample_every=6")
    shared = load_config(path, [swap, "train.steps=6"])
    assert load_model(shared.folder).step == 6
    grids = [Image.open(config.folder / "samples" / "step-6.png") for config in (shared, one)]
    assert np.abs(np.array(grids[0]).astype(int) - np.array(grids[1])).max() <= 2  # the averaged weights
    assert train(load_config(path, [swap])) == 0
    assert losses(shared) == pytest.approx(losses(one), rel=1e-4)


def test_zero_goes_on_from_zero_with_the_same_files_as_one_process(deepspeed: None, tmp_path: Path) -> None:
    """Clipped gradients, two averages and their snapshots; the optimiser's state is compared too."""
    settings = ("train.gradient_clip=0.5", "train.ema=power", "train.ema_snapshot_every=4")
    one, two = (tiny_config(tmp_path, *settings, name=name) for name in ("one", "two"))
    assert train(one) == 0
    path = tmp_path / "two.yaml"
    torchrun("train.py", str(path), *settings, ZERO, "train.steps=4")
    torchrun("train.py", str(path), *settings, ZERO)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    for key in ("gradient_norm", "lr"):
        assert [x[key] for x in lines(two)] == pytest.approx([x[key] for x in lines(one)], rel=1e-3)
    ours, theirs = (
        {group: saved(config, 8, group) for group in ("model", "ema", "ema_2", "optimizer")}
        for config in (two, one)
    )
    for group, tensors in theirs.items():
        assert ours[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(ours[group][name], tensor, rtol=1e-2, atol=1e-3, msg=name)
    snapshots = [sorted(p.name for p in (c.folder / "averages").glob("*/*")) for c in (two, one)]
    assert snapshots[0] == snapshots[1] != []


def test_fp16_steps_that_overflow_are_taken_again_in_all_processes(deepspeed: None, tmp_path: Path) -> None:
    """And parameters that have been stepped more often than others keep their own count."""
    one, two = (tiny_config(tmp_path, "train.precision=fp16", name=name) for name in ("one", "two"))
    with open_run(one) as run:
        run.record(training_step(run, StopSignals()))
        run.state.loss_scale = 2.0**27
        for p in run.parameters[::3]:  # as after train.new_only_steps
            run.optimizer.state[p]["step"] += 5
        run.save()
    shutil.copytree(one.folder, two.folder)
    assert train(one) == 0
    torchrun("train.py", str(tmp_path / "two.yaml"), "train.precision=fp16", ZERO)
    assert lines(two)[-1]["overflows"] == lines(one)[-1]["overflows"] > 3
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    ours, theirs = (saved(config, 8, "optimizer") for config in (two, one))
    counts = {name: int(value) for name, value in theirs.items() if name.startswith("step/")}
    assert counts == {name: int(ours[name]) for name in counts} and set(counts.values()) == {8, 13}
