"""What goes wrong in the life of a run: kills, signals, NaN, wrong launches, two at once, folders that are
none."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from ldm_dcn import checkpoint, folders, hub, launch, metrics, opening, posthoc_ema, trainer
from ldm_dcn.config import Config, load_config
from ldm_dcn.errors import UserError
from ldm_dcn.export import CARD, load_model
from ldm_dcn.folders import verify
from ldm_dcn.launch import check_launch, start_accelerator
from ldm_dcn.opening import open_run
from ldm_dcn.run import Run
from ldm_dcn.run_folder import run_lock
from ldm_dcn.signals import StopSignals
from ldm_dcn.trainer import NonFinite, train
from ldm_dcn.unet import load_unet
from programs import Program, run, server
from tiny import tiny_config, write_config

LONG = ("train.steps=400", "train.save_every=5", "train.keep_checkpoints=3")


pytestmark = pytest.mark.usefixtures("one_thread_and_a_fresh_accelerator")


def losses(config: Config) -> list[float]:
    return [line["loss"] for line in metrics.read(config.folder / "metrics.jsonl")]


def wait_for_step(config: Config, step: int, process: Program) -> None:
    path = config.folder / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (path.exists() and len(metrics.read(path)) >= step):
        assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------ kills and signals


def test_kill_9_while_training_then_sigterm_then_the_same_command(tmp_path: Path) -> None:
    """Three lives of one run, each started with the same command, against the same steps undisturbed."""
    path = write_config(tmp_path)
    config = load_config(path, LONG)
    command = ("train.py", str(path), *LONG)

    first = Program(*command)
    wait_for_step(config, 12, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    killed_at = len(losses(config))

    second = Program(*command)
    resumed_at = int(second.wait_for_line("going on from").split("step-")[1])
    assert 10 <= resumed_at <= killed_at and resumed_at % 5 == 0
    wait_for_step(config, resumed_at + 3, second)
    second.send_signal(signal.SIGTERM)
    assert second.wait(60) == 143, second.stderr
    steps = [line["step"] for line in metrics.read(config.folder / "metrics.jsonl")]
    assert f"SIGTERM: step {steps[-1]} is saved; the same command goes on from there" in second.stderr
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


Fault = tuple[str, int]  # what goes wrong, and at which step or call


def live(path: Path, overrides: tuple[str, ...], fault: Fault | None, environ: dict[str, str]) -> None:
    """One process's life in the run of `path`, to its end or until `fault`; leaves with train.py's exit code."""
    torch.set_num_threads(1)
    os.environ.update(environ)
    config = load_config(path, overrides)
    home = next((module for module in (checkpoint, folders) if fault and hasattr(module, fault[0])), None)
    if home is not None:
        _die_at_call(home, *fault)
    elif fault is not None:
        _hurt_at_step(*fault)
    try:
        code = train(config)
    except NonFinite:
        code = trainer.NON_FINITE
    os._exit(code)


def _die_at_call(home: ModuleType, function: str, call: int) -> None:
    """SIGKILL at the `call`-th use of a function as the module `home` knows it."""
    real, count = getattr(home, function), 0

    def counted(*arguments: object, **options: object) -> object:
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(home, function, counted)


def _hurt_at_step(what: str, step: int) -> None:
    """A signal, a NaN in one of this process's samples, or for three steps a disk that takes 20 kB a file."""
    real = trainer.training_step

    def hurt(run: Run, stop: StopSignals) -> float | None:
        if what == "full disk" and run.state.step in (step, step + 3):
            limit = 20_000 if run.state.step == step else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        if run.state.step == step and what == "NaN":
            run.latents.moments[run.batches.order[run.batches.positions(step, 0)][0]] = math.nan
        if run.state.step == step and what == "SIGTERM":
            signal.raise_signal(signal.SIGTERM)
        return real(run, stop)

    trainer.training_step = hurt


def begin(path: Path, *overrides: str, fault: Fault | None = None, **environ: str) -> BaseProcess:
    process = server.Process(target=live, args=(path, overrides, fault, environ), daemon=True)
    process.start()
    return process


def exit_code(process: BaseProcess) -> int | None:
    process.join(120)
    return process.exitcode


def saved_step(config: Config) -> int:
    """The step of the newest checkpoint, which must be whole without anything being set aside; 0 where there is none."""
    found = checkpoint.newest(config.folder / "checkpoints", pytest.fail)
    return 0 if found is None else int(found.name.removeprefix("step-"))


def test_ten_kills_at_any_moment_lose_nothing(tmp_path: Path) -> None:
    """Every step is saved; half of the lives are killed as they start, half as they train and save."""
    overrides = ("train.steps=100000", "train.save_every=1")
    path, dice, saved = write_config(tmp_path), random.Random(0), 0
    config = load_config(path, overrides)
    for life in range(10):
        process, deadline = begin(path, *overrides), time.monotonic() + 60
        while life % 2 == 0 and saved_step(config) <= saved:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.05)  # to look is to read a whole checkpoint
        time.sleep(dice.uniform(0, 0.5))
        process.kill()
        assert exit_code(process) == -signal.SIGKILL
        before, saved = saved, saved_step(config)
        assert saved >= before
    assert saved >= 5
    rest = load_config(path, ("train.save_every=1", f"train.steps={saved + 2}"))
    assert train(rest) == 0
    undisturbed = tiny_config(tmp_path, "train.save_every=0", f"train.steps={saved + 2}", name="undisturbed")
    assert train(undisturbed) == 0
    assert losses(rest) == losses(undisturbed)
    assert not [p for p in rest.folder.rglob(".*") if p.name != ".lock"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run that nothing happened to."""
    config = tiny_config(tmp_path_factory.mktemp("undisturbed"))
    assert train(config) == 0
    return losses(config)


# (function, call): steps 3, 6 and 8 are saved; of each the checkpoint first, then the export.
SAVES = {
    "its tensors are not written": ("_write_groups", 2, 3),
    "its manifest is not written": ("_write_manifest", 3, 3),
    "it is not yet in its place": ("_put_in_place", 3, 3),
    "the export's manifest is not written": ("_write_manifest", 4, 6),
    "the export is not yet in its place": ("_put_in_place", 4, 6),
    "the oldest is not yet removed": ("discard", 1, 8),
}


@pytest.mark.parametrize("moment", SAVES)
def test_kill_9_in_a_save_then_the_same_command(
    tmp_path: Path, undisturbed: list[float], moment: str
) -> None:
    function, call, expected = SAVES[moment]
    path = write_config(tmp_path)
    config = load_config(path)
    assert exit_code(begin(path, fault=(function, call))) == -signal.SIGKILL
    assert saved_step(config) == expected
    assert load_model(config.folder).step == (6 if function == "discard" else 3)  # whole throughout
    assert exit_code(begin(path)) == 0
    assert load_model(config.folder).step == 8
    assert not [p for p in config.folder.rglob(".*") if p.name != ".lock"]
    assert losses(config) == undisturbed


def test_training_outlives_a_disk_that_is_full_for_a_while(tmp_path: Path) -> None:
    """The operating system refuses the saves of steps 5 to 7; nothing of them stays, and the next one is made."""
    path, overrides = write_config(tmp_path), ("train.save_every=1", "train.keep_checkpoints=9")
    assert exit_code(begin(path, *overrides, fault=("full disk", 4))) == 0
    config = load_config(path)
    kept = sorted(p.name for p in (config.folder / "checkpoints").iterdir())
    assert kept == [f"step-{step}" for step in (1, 2, 3, 4, 8)] and saved_step(config) == 8
    assert [line["step"] for line in metrics.read(config.folder / "metrics.jsonl")] == list(range(1, 9))
    assert load_model(config.folder).step == 8


def test_processes_wait_for_the_one_that_saves_or_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the ten minutes after which NCCL ends a run."""
    told: list[object] = []

    def accelerator(kwargs_handlers: list[object], **_: object) -> SimpleNamespace:
        told.extend(kwargs_handlers)
        return SimpleNamespace(num_processes=1)

    monkeypatch.setattr(launch, "Accelerator", accelerator)
    start_accelerator()
    assert [handler.to_kwargs() for handler in told] == [{"timeout": launch.PATIENCE}]
    assert launch.PATIENCE.total_seconds() >= 3600


def on_both(
    path: Path, *overrides: str, second: Fault | None = None, of_second: tuple[str, ...] = ()
) -> list[int | None]:
    """The exit codes of two processes that share a run; `second` befalls the second one, which has overrides `of_second` too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        begin(path, *overrides, *own, fault=fault, RANK=str(rank), LOCAL_RANK=str(rank), **meeting)
        for rank, (fault, own) in enumerate(((None, ()), (second, of_second)))
    ]
    return [exit_code(process) for process in processes]


def test_two_processes_stop_together_and_go_on_to_the_bit(tmp_path: Path) -> None:
    """What happens to one of them, a NaN in a sample of its own or a signal, all act on, before the weights change."""
    path = write_config(tmp_path)
    config = load_config(path)
    assert on_both(path, second=("NaN", 4)) == [trainer.NON_FINITE] * 2
    assert saved_step(config) == 3
    facts = json.loads((config.folder / "nonfinite-step-5.json").read_text())
    assert len(facts["samples"]) == 8
    assert on_both(path, second=("SIGTERM", 4)) == [143, 143]
    assert saved_step(config) == 5
    assert on_both(path) == [0, 0]
    undisturbed = write_config(tmp_path, "undisturbed")
    assert on_both(undisturbed) == [0, 0]
    assert losses(config) == losses(load_config(undisturbed))


def test_a_network_without_cross_attention_trains_on_two_processes_without_classes(tmp_path: Path) -> None:
    """Its embedding of "none" never has a gradient, for which DDP would wait."""
    blocks = (
        "model.unet.down_block_types=[DownBlock2D]",
        "model.unet.up_block_types=[UpBlock2D]",
    )
    path = write_config(tmp_path)
    with pytest.raises(
        UserError, match=r"no cross-attention, so it cannot learn 10 classes; .*data.num_classes=0"
    ):
        train(load_config(path, blocks))
    without = (*blocks, "data.num_classes=0", "train.steps=2")
    assert on_both(path, *without) == [0, 0]
    assert load_model(load_config(path, without).folder).step == 2


def test_processes_of_other_settings_do_not_train_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path)
    assert on_both(path, of_second=("train.lr=2.0",)) == [1, 1]
    assert saved_step(load_config(path)) == 0

    def of_both(own: list[dict[str, object]]) -> list[dict[str, object]]:
        return [*own, {**own[0], "train.lr": 2.0}]

    monkeypatch.setattr(opening, "gather_object", of_both)
    with open_run(load_config(path)) as run:
        monkeypatch.setattr(type(run.accelerator), "num_processes", 2)
        with pytest.raises(
            UserError, match=r"process 1 was started with other .* \(train.lr: 0.001 there, 2.0 here\)"
        ):
            opening._check_alike(run)
        monkeypatch.undo()


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


def test_nan_before_the_first_save_claims_no_checkpoint(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "train.lr=1e30", "train.warmup_steps=0", "train.save_every=0")
    with pytest.raises(
        NonFinite, match=r"step \d: .*not touched by it, and there is no checkpoint to go on from yet"
    ):
        train(config)
    assert not (config.folder / "checkpoints").exists()
    assert train(tiny_config(tmp_path)) == 0  # with a sane rate, from step 0


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
            run.latents.moments[run.batches.order[run.batches.positions(3, 0)][2]] = float("nan")
        else:
            run.denoiser.class_embedding.weight.register_hook(lambda gradient: gradient * float("inf"))
        with pytest.raises(
            NonFinite,
            match=r"step 4: the loss is .*; the weights were not touched.*checkpoint is step-3, the only one; .*; lower train.lr",
        ):
            trainer.training_step(run, StopSignals())
        assert all(torch.equal(p, before[name]) for name, p in run.denoiser.named_parameters())
    facts = json.loads((config.folder / "nonfinite-step-4.json").read_text())
    assert len(facts["samples"]) == len(facts["times"]) == 8
    assert len(facts["recent_losses"]) == 3
    assert sorted(p.name for p in (config.folder / "checkpoints").iterdir()) == ["step-3"]
    assert train(config) == 0  # from the good checkpoint, with good data


def saved(config: Config) -> list[str]:
    return sorted(path.name for path in (config.folder / "checkpoints").iterdir())


def test_nan_right_after_a_save_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights saved last may be what went wrong: nobody has computed with them yet."""
    settings = ("train.keep_checkpoints=1", "train.ema=power", "train.ema_snapshot_every=2")
    config = tiny_config(tmp_path, *settings)
    real = trainer.training_step

    def diverging(run: Run, stop: StopSignals) -> float | None:
        if run.state.step == 5:
            assert saved(config) == ["step-3"]  # the older go when a step was taken from the newest
        loss = real(run, stop)
        if run.state.step == 5:  # the sixth step was one too many
            for p in run.denoiser.parameters():
                p.data.mul_(1e30)
        return loss

    for _ in range(2):  # the same command comes to the same
        monkeypatch.setattr(trainer, "training_step", diverging)
        with pytest.raises(NonFinite) as caught:
            train(config)
        monkeypatch.setattr(trainer, "training_step", real)
        text = str(caught.value)
        newest = config.folder / "checkpoints" / "step-6"
        assert (
            f"the last checkpoint is step-6 (should it come to the same from there, move {newest} away"
            in text
        )
        assert "then the same command goes on from step-3)" in text
        assert saved(config) == ["step-3", "step-6"]
        assert sorted(path.name for path in (config.folder / "averages").iterdir())[-1] == "step-6"
    newest.rename(newest.with_name("diverged"))

    def looking(run: Run, stop: StopSignals) -> float | None:
        if run.state.step == 3:
            assert load_model(config.folder).step == 3
            assert [path.name for path in (config.folder / "averages").iterdir()] == ["step-2"]
        return real(run, stop)

    monkeypatch.setattr(trainer, "training_step", looking)
    assert train(config) == 0
    monkeypatch.setattr(trainer, "training_step", real)
    undisturbed = tiny_config(tmp_path, *settings, name="undisturbed")
    assert train(undisturbed) == 0
    assert losses(config) == losses(undisturbed)
    assert saved(config) == ["diverged", "step-8"]


@pytest.mark.parametrize("group", ["model", "optimizer", "ema"])
def test_a_state_with_nan_is_not_saved(tmp_path: Path, group: str) -> None:
    config = tiny_config(tmp_path, "train.keep_checkpoints=1")
    with open_run(config) as run:
        for _ in range(3):
            run.record(trainer.training_step(run, StopSignals()))
        run.save()
        name, p = next(iter(run.denoiser.named_parameters()))
        run.record(trainer.training_step(run, StopSignals()))
        held = {
            "model": p.data,
            "optimizer": run.optimizer.state[p]["exp_avg"],
            "ema": run.averages[0].shadow[name],
        }
        held[group].view(-1)[0] = math.inf
        with pytest.raises(
            NonFinite, match=rf"step 4: {group}/.*{name} holds NaN or infinity and is not saved; .*step-3"
        ):
            run.save()
    assert saved(config) == ["step-3"] and load_model(config.folder).step == 3
    verify(config.folder / "checkpoints" / "step-3")


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
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    launched = run(*launcher, "train.py", str(path))
    assert launched.poll() != 0
    assert "error: `accelerate launch` was asked for several processes and started one" in launched.stderr
    assert f"torchrun --standalone --nproc_per_node N train.py {path}" in launched.stderr
    assert not (tmp_path / "runs").exists()


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with (
        run_lock(config.folder),
        pytest.raises(UserError, match=r"another process is training in .*choose another run.name"),
    ):
        train(config)
    assert train(config) == 0


def test_checkpoints_that_cannot_be_written_are_seen_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path)
    folder, real = config.folder / "checkpoints", tempfile.TemporaryFile
    folder.mkdir(parents=True)

    def denied(dir: Path) -> object:  # permissions do not bind root, as whom tests may run
        if Path(dir) == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(dir))
        return real(dir=dir)

    monkeypatch.setattr("ldm_dcn.places.tempfile.TemporaryFile", denied)
    with pytest.raises(
        UserError, match=r"checkpoints cannot be written: .*Permission denied; mend its permissions"
    ):
        train(config)
    assert not (config.folder / "metrics.jsonl").exists()
    monkeypatch.undo()
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
    (tmp_path / "export").mkdir()
    assert "is not a whole export: it has no model_index.json" in refusal(tmp_path)


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


@pytest.mark.parametrize("card", [None, "# Edited on the hub\n"])
def test_an_export_from_the_hub_is_loaded_without_its_card_or_with_another(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: str | None
) -> None:
    import huggingface_hub

    def download(hub_id: str, allow_patterns: list[str], local_files_only: bool) -> str:
        wanted = [p for p in export.rglob("*") if any(p.match(pattern) for pattern in allow_patterns)]
        for path in wanted:
            copy = tmp_path / "snapshot" / path.relative_to(export)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        if card is not None:
            (tmp_path / "snapshot" / "README.md").write_text(card)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(hub, "ask", lambda _: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_model("somebody/model").step == 1


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
    if file.startswith("unet/"):
        with pytest.raises(UserError, match=expected + ".*copy or download it again"):
            load_unet(copy, subfolder="unet")
    elif "manifest" not in file:
        load_unet(copy, subfolder="unet")  # of the U-Net nothing was changed


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


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("damage", [flip, cut])
def test_damage_in_every_file_of_a_run_is_named_with_its_mend(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Checkpoint, export and the snapshots of the averages: each file in turn."""
    config = tiny_config(tmp_path, "train.ema=power", "train.ema_snapshot_every=4")
    assert train(config) == 0
    seen = set()
    for place in ("checkpoints/step-8", "export", "averages/step-4"):
        folder = config.folder / place
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            whole = file.read_bytes()
            damage(file)
            named = folder if file.name == "manifest.json" else file
            if file.name == CARD:
                assert load_model(config.folder).step == 8  # people may edit it
                file.write_bytes(whole)
                continue
            if place == "export":
                with pytest.raises(UserError) as caught:
                    load_model(config.folder)
                text, mend = str(caught.value), "start its run again, which makes it anew"
            elif place == "averages/step-4":
                command = [str(config.folder), "--width", "0.07", "--out", str(tmp_path / "out")]
                with pytest.raises(UserError) as caught:
                    posthoc_ema.main(command)
                text, mend = str(caught.value), f"delete {folder}"
            else:
                told: list[str] = []
                assert checkpoint.newest(folder.parent, told.append) == folder.parent / "step-6"
                (text,), mend = told, "training goes on from"
                (folder.parent / "damaged-step-8").rename(folder)
            assert str(named) in text and mend in text and "\n" not in text, text
            file.write_bytes(whole)
            seen.add(file.name)
    assert seen >= {
        "optimizer.safetensors",
        "ema.safetensors",
        "ema_2.safetensors",
        "state.json",
    }
    assert seen >= {"config.json", "scheduler_config.json", "autoencoder.json", "run.json", "manifest.json"}
    assert load_model(config.folder).step == 8 and train(config) == 0


def test_an_average_made_afterwards_replaces_no_folder_of_other_things(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "train.ema=power", "train.ema_snapshot_every=4")
    assert train(config) == 0
    command = [str(config.folder), "--width", "0.07", "--out"]
    for place in (config.folder, tmp_path):
        with pytest.raises(UserError, match=r"is no export and holds other things .*give another --out"):
            posthoc_ema.main([*command, str(place)])
    assert saved_step(config) == 8
    for _ in range(2):  # an older export may be replaced
        assert posthoc_ema.main([*command, str(tmp_path / "out")]) == 0
    shutil.rmtree(tmp_path / "out")
