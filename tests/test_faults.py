"""What goes wrong in the life of a run: kills, signals, NaN, wrong launches, two at once, folders that are
none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from ldm_dcn import hub, metrics, trainer
from ldm_dcn.checkpoint import verify
from ldm_dcn.config import Config, load_config
from ldm_dcn.errors import UserError
from ldm_dcn.export import load_model
from ldm_dcn.launch import StopSignals, check_launch, run_lock
from ldm_dcn.run import Run, open_run
from ldm_dcn.trainer import NonFinite, train
from tiny import ROOT, environment, start, tiny_config, write_config

LONG = ("train.steps=400", "train.save_every=5", "train.keep_checkpoints=3")


@pytest.fixture(autouse=True)
def one_thread_and_a_fresh_accelerator() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    torch.set_num_threads(threads)


def losses(config: Config) -> list[float]:
    return [line["loss"] for line in metrics.read(config.folder / "metrics.jsonl")]


def wait_for_step(config: Config, step: int, process: subprocess.Popen[str]) -> None:
    path = config.folder / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (path.exists() and len(metrics.read(path)) >= step):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------ kills and signals


def test_kill_9_while_training_then_sigterm_then_the_same_command(tmp_path: Path) -> None:
    """Three lives of one run, each started with the same command, against the same steps undisturbed."""
    path = write_config(tmp_path)
    config = load_config(path, LONG)
    command = ("train.py", str(path), *LONG)

    first = start(*command)
    wait_for_step(config, 12, first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    killed_at = len(losses(config))

    second = start(*command)
    deadline = time.monotonic() + 60
    while "going on from" not in (line := second.stderr.readline()):
        assert time.monotonic() < deadline and second.poll() is None
    resumed_at = int(line.split("step-")[1])
    assert 10 <= resumed_at <= killed_at and resumed_at % 5 == 0
    wait_for_step(config, resumed_at + 3, second)
    second.send_signal(signal.SIGTERM)
    _, text = second.communicate(timeout=60)
    assert second.returncode == 143, text
    steps = [line["step"] for line in metrics.read(config.folder / "metrics.jsonl")]
    assert steps == list(range(1, steps[-1] + 1))
    verify(config.folder / "checkpoints" / f"step-{steps[-1]}")  # saved where it was told to stop

    end = steps[-1] + 4
    with open_run(config) as run:
        assert run.state.step == steps[-1]
        while run.state.step < end:
            run.record(trainer.training_step(run, StopSignals()))
            run.log()
    undisturbed = tiny_config(tmp_path, *LONG, name="undisturbed")
    with open_run(undisturbed) as run:
        while run.state.step < end:
            run.record(trainer.training_step(run, StopSignals()))
            run.log()
    assert losses(config) == losses(undisturbed)


SUICIDE = """
import os, signal, sys
from ldm_dcn import checkpoint, config, trainer
real, count = checkpoint.{function}, 0
def counted(*arguments):
    global count
    count += 1
    if count == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
checkpoint.{function} = counted
trainer.train(config.load_config(sys.argv[1]))
"""


def test_kill_9_in_a_save_then_the_same_command(tmp_path: Path) -> None:
    """Killed in the checkpoint of step 6: its tensors are written, its manifest is not (calls 1 and 2 are step 3's)."""
    path = write_config(tmp_path)
    config = load_config(path)
    process = start("-c", SUICIDE.format(function="_write_manifest", call=3), str(path))
    _, text = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, text
    assert (config.folder / "checkpoints" / ".tmp-step-6" / "optimizer.safetensors").exists()
    assert load_model(config.folder).step == 3  # the export of before is whole throughout
    with open_run(config) as run:
        assert run.state.step == 3
    assert not [p for p in config.folder.rglob(".*") if p.name != ".lock"]
    assert train(config) == 0
    undisturbed = tiny_config(tmp_path, name="undisturbed")
    train(undisturbed)
    assert losses(config) == losses(undisturbed)


def test_killed_between_checkpoint_and_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start brings the export up to the checkpoint; a replacement cut between its renames is found."""
    config = tiny_config(tmp_path)
    with open_run(config) as run:
        for step in (1, 2):
            run.record(trainer.training_step(run, StopSignals()))
            if step == 2:
                monkeypatch.setattr(run, "export", lambda averaged: None)
            run.save()
    assert load_model(config.folder).step == 1
    (config.folder / "export").rename(config.folder / ".old-export")
    assert load_model(config.folder).step == 1
    with open_run(config) as run:
        assert run.state.step == 2
    assert load_model(config.folder).step == 2
    assert not (config.folder / ".old-export").exists()


def test_a_signal_is_remembered_and_a_second_ctrl_c_stops() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        assert stop.received == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_saves_and_leaves_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path)
    real = trainer.training_step

    def interrupted(run: Run, stop: StopSignals) -> float:
        if run.state.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(run, stop)

    monkeypatch.setattr(trainer, "training_step", interrupted)
    assert train(config) == 130
    verify(config.folder / "checkpoints" / "step-4")
    monkeypatch.setattr(trainer, "training_step", real)
    assert train(config) == 0


# ------------------------------------------------------------------------------------------- NaN


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_nan_stops_before_the_weights_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: str
) -> None:
    config = tiny_config(tmp_path)
    with open_run(config) as run:
        for _ in range(3):
            run.record(trainer.training_step(run, StopSignals()))
        run.save()
        before = {name: p.detach().clone() for name, p in run.denoiser.named_parameters()}
        if poison == "loss":
            run.latents.moments[run.order[run.positions(3, 0)][2]] = float("nan")
        else:
            run.denoiser.class_embedding.weight.register_hook(lambda gradient: gradient * float("inf"))
        with pytest.raises(
            NonFinite, match=r"step 4: the loss is .*; the weights were not touched.*; lower train.lr"
        ):
            trainer.training_step(run, StopSignals())
        assert all(torch.equal(p, before[name]) for name, p in run.denoiser.named_parameters())
    facts = json.loads((config.folder / "nonfinite-step-4.json").read_text())
    assert len(facts["samples"]) == len(facts["times"]) == 8
    assert len(facts["recent_losses"]) == 3
    assert sorted(p.name for p in (config.folder / "checkpoints").iterdir()) == ["step-3"]
    assert train(config) == 0  # from the good checkpoint, with good data


def test_nan_has_its_own_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train as program

    def diverge(*_: object) -> int:
        raise NonFinite("step 4: the loss is nan")

    monkeypatch.setattr(trainer, "train", diverge)
    monkeypatch.setattr(sys, "argv", ["train.py", str(write_config(tmp_path))])
    assert program.main() == 3
    assert capsys.readouterr().err == "error: step 4: the loss is nan\n"


# ------------------------------------------------------------------------------------------- launches


ARGV = ["train.py", "configs/digits_dcn.yaml", "train.lr=1"]
COMMAND = "torchrun --standalone --nproc_per_node N train.py configs/digits_dcn.yaml train.lr=1"


@pytest.mark.parametrize(
    ("environ", "processes"),
    [
        ({}, 1),
        ({"MASTER_ADDR": "10.0.0.1"}, 1),  # a cluster's own habit, no launcher
        ({"ACCELERATE_USE_CPU": "True"}, 1),  # accelerate launch --cpu
        ({"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "False"}, 1),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, 2),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "False"}, 2),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 4),
    ],
)
def test_right_launches_pass(environ: dict[str, str], processes: int) -> None:
    check_launch(processes, environ, ARGV)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (
            {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"},
            "asked for several processes and started one",
        ),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "started 2 processes and they did not join"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "started 4 processes and they did not join"),
    ],
)
def test_wrong_launches_are_refused_with_the_right_command(environ: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        check_launch(1, environ, ARGV)
    assert COMMAND in str(caught.value)


def test_accelerates_single_process_for_two_is_refused_for_real(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--cpu",
            "--num_processes",
            "2",
            "train.py",
            str(path),
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode != 0
    assert "error: `accelerate launch` was asked for several processes and started one" in run.stderr
    assert f"torchrun --standalone --nproc_per_node N train.py {path}" in run.stderr
    assert not (tmp_path / "runs").exists()


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with (
        run_lock(config.folder),
        pytest.raises(UserError, match=r"another process is training in .*choose another run.name"),
    ):
        train(config)
    assert train(config) == 0


# -------------------------------------------------------------------------------------- folders that are none


def refusal(path: object) -> str:
    with pytest.raises(UserError) as caught:
        load_model(path)
    return str(caught.value)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(tmp_path_factory.mktemp("export"), "train.steps=1")
    AcceleratorState._reset_state(reset_partial_state=True)
    train(config)
    return config.folder / "export"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    assert "neither a run folder (config.yaml, checkpoints/) nor an export" in refusal(tmp_path)
    assert "does not exist; give a run folder" in refusal(tmp_path / "nowhere")
    assert "does not exist; give a run folder" in refusal("runs/nowhere")
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(tmp_path / "file")
    (tmp_path / "config.yaml").write_text("")
    assert "has not saved a model yet" in refusal(tmp_path)


def test_a_hub_id_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> str:
        raise OSError("no network\nand a long story")

    monkeypatch.setattr(hub, "ask", lambda _: None)  # it answers, and then does not
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert "somebody/model is no folder here, and it could not be had from the hub (no network)" in refusal(
        "somebody/model"
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert "holds no model_index.json" in refusal("somebody/model")


@pytest.mark.parametrize(
    ("file", "damage", "expected"),
    [
        (
            "unet/diffusion_pytorch_model.safetensors",
            "truncate",
            "diffusion_pytorch_model.safetensors has .* bytes instead of",
        ),
        ("class_embedding/model.safetensors", "flip", "model.safetensors was changed after it was written"),
        ("autoencoder.json", "flip", "autoencoder.json was changed"),
        ("run.json", "delete", "run.json is missing"),
        ("manifest.json", "truncate", "manifest.json cannot be read"),
    ],
)
def test_a_damaged_export_is_refused_by_name(
    export: Path, tmp_path: Path, file: str, damage: str, expected: str
) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(export), str(copy)], check=True)
    data = bytearray((copy / file).read_bytes())
    (copy / file).unlink()
    if damage == "truncate":
        (copy / file).write_bytes(data[:-9])
    elif damage == "flip":
        data[-4] ^= 2
        (copy / file).write_bytes(data)
    with pytest.raises(UserError, match=expected):
        load_model(copy)


def test_without_its_manifest_an_export_is_still_checked(export: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(export), str(copy)], check=True)
    (copy / "manifest.json").unlink()
    assert load_model(copy).step == 1
    (copy / "run.json").write_text("[]")
    assert "is not a whole export" in refusal(copy)


def test_another_autoencoder_is_refused(export: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(export), str(copy)], check=True)
    (copy / "manifest.json").unlink()
    reference = json.loads((copy / "autoencoder.json").read_text())
    reference["fingerprint"]["factor"] = 8
    (copy / "autoencoder.json").write_text(json.dumps(reference))
    assert "is not the one these latents were made with: its factor" in refusal(copy)


def test_a_damaged_checkpoint_is_passed_over_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, "train.steps=6")
    train(config)
    expected = losses(config)
    file = config.folder / "checkpoints" / "step-6" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert train(config) == 0
    text = capsys.readouterr().err
    assert "checkpoint passed over" in text and "model.safetensors has" in text and "going on from" in text
    assert losses(config) == expected
