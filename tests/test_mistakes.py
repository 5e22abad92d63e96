"""What a user gets wrong, and what a machine does: one line, exit code 2, and nothing is lost."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import save_file

import sample
import train as train_program
from ldm_dcn import (
    checkpoint,
    encode,
    errors,
    files,
    hub,
    metrics,
    opening,
    run_folder,
    sampling,
    trainer,
)
from ldm_dcn import run as run_module
from ldm_dcn.config import Config
from ldm_dcn.device import choose_device
from ldm_dcn.errors import Parser, UserError, exit_on_user_error
from ldm_dcn.export import load_model
from ldm_dcn.launch import start_accelerator
from ldm_dcn.opening import open_run
from ldm_dcn.signals import StopSignals
from ldm_dcn.trainer import train
from tiny import ROOT, WHOLE, setting, tiny_config, write_config

Line = Callable[[Callable[[], object]], str]


pytestmark = pytest.mark.usefixtures("one_thread_and_a_fresh_accelerator")


@pytest.fixture
def line(capsys: pytest.CaptureFixture[str]) -> Line:
    """Runs a program that must leave with exit code 2; returns its one line."""

    def told(program: Callable[[], object]) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught, exit_on_user_error():
            program()
        text = capsys.readouterr().err
        lines = [one for one in text.replace("\r", "\n").splitlines() if "error" in one]  # bars come before
        assert caught.value.code == 2 and "Traceback" not in text
        assert len(lines) == 1 and lines[0].startswith("error: "), text
        assert text.endswith(lines[0] + "\n")
        return lines[0]

    return told


@pytest.fixture
def launch_train(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], int]]:
    """The program train.py with these arguments."""

    def program(*arguments: object) -> Callable[[], int]:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        return train_program.main

    return program


def test_what_is_missing_is_said_before_models_are_fetched(
    tmp_path: Path,
    line: Line,
    launch_train: Callable[..., Callable[[], int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The autoencoder may be a download, and encoding hours."""

    def no_model(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded first")

    for module in (encode, opening):
        monkeypatch.setattr(module, "load_autoencoder", no_model)
    monkeypatch.setattr("ldm_dcn.export.load_model", no_model)
    nowhere = tmp_path / "nowhere"
    assert f"IMAGES '{nowhere}' is neither" in line(
        lambda: encode.main([str(nowhere), str(tmp_path / "out")])
    )
    here = f"run.dir={tmp_path}"
    config = ROOT / "configs" / "digits_unet.yaml"
    assert "python -m ldm_dcn.encode" in line(launch_train(config, f"data.source={nowhere}", here))
    monkeypatch.setattr("accelerate.utils.is_tensorboard_available", lambda: False)
    assert "`pip install -c constraints.txt tensorboard`" in line(
        launch_train(config, "train.trackers=[tensorboard]", here)
    )
    assert "write train.steps=5; see" in line(launch_train(config, "--train.steps=5"))
    assert "use one of dpm++, ddim, euler" in line(lambda: sample.main([str(tmp_path), "--sampler", "dpmpp"]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = tiny_config(tmp_path_factory.mktemp("finished"), "train.steps=2", "train.save_every=1")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(config) == 0
    return config


@pytest.fixture
def copy(finished: Config, tmp_path: Path) -> Config:
    """A copy of the finished run, to be mistreated."""
    config = tiny_config(tmp_path, "train.steps=2", "train.save_every=1")
    shutil.copytree(finished.folder, config.folder)
    (config.folder / "config.yaml").write_text(config.to_yaml())
    return config


def no_room(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file")


def leave_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))


# ------------------------------------------------------------------------------------------- the entry points


@pytest.mark.parametrize(
    ("number", "filename", "expected"),
    [
        (errno.ENOSPC, "a/b", "error: a/b: No space left on device; free some space"),
        (errno.EROFS, b"a/b", "error: a/b: Read-only file system; choose a place"),
        (errno.ENOTDIR, "f/x", "error: f/x: Not a directory; a file stands where a folder should be"),
        (errno.EIO, None, "error: Input/output error; the disk"),
    ],
)
def test_what_the_machine_refuses_is_one_line(
    line: Line, number: int, filename: object, expected: str
) -> None:
    def program() -> None:
        raise OSError(number, os.strerror(number), filename)

    assert line(program).startswith(expected)


@pytest.mark.parametrize("error", [KeyError("x"), OSError("a library's own"), OSError(errno.EBADF, "bad")])
def test_our_own_mistakes_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), exit_on_user_error():
        raise error


def test_ctrl_c_at_the_start_leaves_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, exit_on_user_error():
        raise KeyboardInterrupt
    assert caught.value.code == 130 and capsys.readouterr().err == ""


def test_the_other_processes_let_the_main_one_speak(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    for rank, times in (("0", 0), ("1", 1)):
        monkeypatch.setenv("RANK", rank)
        line(lambda: Parser().error("a typo"))
        assert waited == [errors.PATIENCE] * times


@pytest.mark.parametrize(
    ("program", "arguments", "expected"),
    [
        (sample.main, [], "the following arguments are required: RUN"),
        (sample.main, ["run", "--n", "abc"], "argument --n/--count: invalid int value: 'abc'"),
        (sample.main, ["run", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_a_wrong_command_is_one_line(
    line: Line, program: Callable[[Sequence[str]], int], arguments: list[str], expected: str
) -> None:
    assert expected in line(lambda: program(arguments))


def test_train_asks_for_a_config_alone(line: Line, launch_train: Callable, tmp_path: Path) -> None:
    text = line(launch_train())
    assert "give a config" in text and "section" not in text
    assert "--allow-change 'train.lrr': unknown setting; did you mean train.lr?" in line(
        launch_train(write_config(tmp_path), "--allow-change", "train.lrr")
    )
    with pytest.raises(UserError, match=r"--allow-change data is a section; .* such as data.source"):
        train(tiny_config(tmp_path), ["data"])
    with pytest.raises(UserError, match=r"--allow-change 'foo': unknown setting; write section.key"):
        train(tiny_config(tmp_path), ["foo"])
    assert not (tmp_path / "runs").exists()


def test_half_a_launch_is_refused_before_it_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"started 2 processes and they did not join.*torchrun --standalone"):
        start_accelerator()


# ------------------------------------------------------------------------------------------- sample.py


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--npz", "{}/folder"], "folder is a folder; give another --npz"),
        (["--npz", "{}/file/a.npz"], "file/a.npz: Not a directory; give another --npz"),
        (["--npz", "{}/new/" + 300 * "x"], "File name too long; give another --npz"),
        (["--npz", "/dev/null"], "/dev/null is no ordinary file; give another --npz"),
        (["--grid", "{}/folder"], "folder is a folder; give another --grid"),
        (["--grid", "{}/a.gif"], "grids are PNG files; give "),
        (["--grid", "."], "--grid . is a folder; give another --grid"),
        (["--npz", "/"], "--npz / is a folder; give another --npz"),
        (["--grid", "{}/a", "--npz", "{}/folder/../a"], "--grid and --npz are both "),
        (["--npz", "{}/a", "--png-dir", "{}/a"], "--npz and --png-dir are both "),
        (["--text-encoder", "clip"], "takes no text, so --text-encoder means nothing"),
        (["--grid", "/proc/nowhere/a.png"], "cannot be written: "),
        (["--png-dir", "{}/file"], "file is a file, not a folder; give another --png-dir"),
        (["--png-dir", "/proc/nowhere"], "cannot be written: "),
        (["--labels", "0-99999999999"], "label range '0-99999999999' makes more than 10,000,000 numbers"),
        (["--labels", "9" * 5000], "is too large; use at most 9223372036854775807"),
        (["--seeds", "99999999999999999999"], "seed '99999999999999999999' is too large"),
        (["--seeds", "9223372036854775807", "--n", "2"], "seeds end at 9223372036854775807"),
        (["--seeds", "0-9999999"], "draw at most 10,000,000 images"),
        (["--n", "99999999999"], "and at most 10,000,000 at a time"),
        (["--batch-size", "0"], "--batch-size 0: draw at least one image at once"),
        (["--batch-size", "-1"], "--batch-size -1: draw at least one image at once"),
        (["--guidance", "nan"], "guidance must be finite and not negative"),
        (["--guidance", "inf"], "guidance must be finite and not negative"),
        (["--guidance", "-1"], "guidance must be finite and not negative"),
        (["--guidance-interval", "0.6", "0.2"], "guidance interval 0.6 to 0.2"),
        (["--device", "foo"], "device 'foo' cannot be used"),
        (["--device", "meta"], "device 'meta' cannot be used"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used"),
    ],
)
def test_sample_refuses_before_it_draws(
    finished: Config,
    tmp_path: Path,
    line: Line,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: str,
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(sampling, "sample_latents", lambda *_, **__: pytest.fail("it drew"))
    arguments = [argument.replace("{}", str(tmp_path)) for argument in arguments]
    assert expected in line(lambda: sample.main([str(finished.folder), *arguments]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_disk_too_small_for_the_npz_is_seen_first(
    finished: Config, tmp_path: Path, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_free(monkeypatch, 10**6)
    command = [str(finished.folder), "--n", "10000", "--npz", str(tmp_path / "a.npz")]
    assert f"10000 images take 3 MB in {tmp_path} and 1 MB are free" in line(lambda: sample.main(command))
    leave_free(monkeypatch, 0)
    command[2] = "300"
    assert f"300 images take 77 kB in {tmp_path} and 0 kB are free" in line(lambda: sample.main(command))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(path)
    with files.replacing(link) as file:
        file.write(b"old")
    with pytest.raises(KeyError), files.replacing(link) as file:
        file.write(b"new")
        raise KeyError
    assert path.read_bytes() == b"old" and link.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("run.json", {"latent_shape": [4, 8, 8]}),
        ("run.json", {"latent_shape": [8, 8]}),
        ("run.json", {"latent_shape": None}),
        ("run.json", {"config": None}),
        ("run.json", {"schedule": {"num_steps": "x"}}),
        ("run.json", {"tags": 3}),
        ("autoencoder.json", {"fingerprint": None}),
        ("autoencoder.json", {"spec": None}),
    ],
)
def test_an_export_edited_by_hand_is_refused(
    finished: Config, tmp_path: Path, file: str, changes: dict[str, object]
) -> None:
    folder = stripped(finished, tmp_path)
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match="is not a whole export"):
        load_model(folder)


@pytest.mark.parametrize("shape", [(11, 5), (0, 8), (8,)])
def test_an_embedding_of_another_shape_is_refused(
    finished: Config, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    folder = stripped(finished, tmp_path)
    save_file({"weight": torch.zeros(shape)}, folder / "class_embedding" / "model.safetensors")
    with pytest.raises(UserError, match="is not a whole export: its class embedding is"):
        load_model(folder)


def stripped(config: Config, place: Path) -> Path:
    """A copy of the export without its manifest."""
    folder = place / "copy"
    shutil.copytree(config.folder / "export", folder)
    (folder / "manifest.json").unlink()
    return folder


def test_in_a_run_folder_an_export_has_its_manifest(copy: Config) -> None:
    (copy.folder / "export" / "manifest.json").unlink()
    for path in (copy.folder, copy.folder / "export"):
        with pytest.raises(UserError, match=r"is not a whole export: it has no manifest.json"):
            load_model(path)


# ------------------------------------------------------------------------------------------- while it trains


def test_the_save_comes_before_the_grid_and_the_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where both fail there are two warnings, whatever the number of grids, and the run ends well."""
    config = tiny_config(
        tmp_path, "train.steps=4", "train.save_every=2", "train.sample_every=2", "train.score_every=2"
    )
    saved: list[bool] = []

    def fail(*_: object, **__: object) -> None:
        saved.append((config.folder / "checkpoints").exists())
        raise UserError("it cannot be drawn")

    monkeypatch.setattr(run_module, "generate", fail)
    assert train(config, score=fail) == 0
    assert saved == [True] * 4
    warnings = [text for text in capsys.readouterr().err.splitlines() if "warning" in text]
    assert warnings == [
        f"warning: step 2: the {what} failed (it cannot be drawn); training goes on"
        for what in ("grid of samples", "score")
    ]


def test_lines_of_metrics_wait_for_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path)
    with open_run(config) as run:
        real = run.metrics._file
        run.metrics._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
        for step in range(1, 6):
            if step == 4:
                run.metrics._file.close()
                run.metrics._file = real
            run.record(1.0)
            run.log()
    assert [entry["step"] for entry in metrics.read(config.folder / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    warnings = [text for text in capsys.readouterr().err.splitlines() if "warning" in text]
    assert len(warnings) == 1 and "the line of metrics.jsonl failed (" in warnings[0]
    assert "/dev/full: No space left on device; free some space" in warnings[0]


def test_a_tracker_that_fails_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Tracker:
        name = "elsewhere"

        def log(self, *_: object, **__: object) -> None:
            raise RuntimeError("no network")

        def finish(self) -> None:
            no_room()

    config = tiny_config(tmp_path)
    with open_run(config) as run:
        run.metrics._trackers.append(Tracker())
        run.record(1.0)
        run.log()
    assert [entry["step"] for entry in metrics.read(config.folder / "metrics.jsonl")] == [1]
    assert "elsewhere took no values: no network" in capsys.readouterr().err


def test_a_log_on_a_full_disk_does_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, _: str) -> int:
            no_room()

    config = tiny_config(tmp_path, "train.steps=2")
    with open_run(config) as run:
        monkeypatch.setattr(sys, "stderr", Full())
        run.say("hello")
        run.bar.update = no_room
        run.record(1.0)
        close, run.bar.close = run.bar.close, no_room
    run.bar.close = close
    assert run.state.step == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_save_that_fails_is_tried_again_and_the_last_one_must_succeed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: Line,
    number: int,
) -> None:
    config = tiny_config(tmp_path)
    with open_run(config) as run:
        run.record(1.0)
        run.save()
        real = checkpoint.save_file
        monkeypatch.setattr(
            checkpoint,
            "save_file",
            lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number), "x")),
        )
        run.record(1.0)
        run.save()
        assert "training goes on and tries again at the next save" in capsys.readouterr().err
        run.stopped_by = 15
        assert os.strerror(number) in line(run.save)
        monkeypatch.setattr(checkpoint, "save_file", real)
        run.save()
    assert (config.folder / "checkpoints" / "step-2" / "manifest.json").exists()
    assert not list(config.folder.rglob(".tmp-*"))


def test_resuming_on_a_full_disk_is_one_line(
    copy: Config, tmp_path: Path, line: Line, launch_train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (copy.folder / "config.yaml").read_text()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as writing to a descriptor has it

    monkeypatch.setattr(os, "fsync", full)
    command = launch_train(copy.folder / "config.yaml", "train.log_every=7")
    where = copy.folder / "config.yaml"
    assert line(command) == f"error: {where}: No space left on device; free some space"
    assert (copy.folder / "config.yaml").read_text() == before
    assert not list(copy.folder.glob(".tmp-*"))


def test_a_first_checkpoint_that_cannot_fit_is_seen_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path)
    leave_free(monkeypatch, 100_000)
    with pytest.raises(
        UserError,
        match=r"no room for the checkpoints of this run .* takes 0.2 MB .* 0.1 MB are free, 0.1 MB too few",
    ):
        train(config)
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------- run folders


def test_lost_checkpoints_do_not_start_a_run_again(copy: Config) -> None:
    shutil.rmtree(copy.folder / "checkpoints")
    kept = (copy.folder / "metrics.jsonl").read_text()
    with pytest.raises(
        UserError, match=r"an export of step 2 and no checkpoint .*; bring .* back, choose another"
    ):
        train(copy)
    assert load_model(copy.folder).step == 2
    shutil.rmtree(copy.folder / "export")
    with pytest.raises(UserError, match=r"2 steps in metrics.jsonl and no checkpoint"):
        train(copy)
    assert (copy.folder / "metrics.jsonl").read_text() == kept


def test_a_run_that_ended_before_its_first_save_starts_again(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with open_run(config) as run:
        for _ in range(2):
            run.record(trainer.training_step(run, StopSignals()))
            run.log()
    with open_run(config) as run:
        assert run.state.step == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("metrics.jsonl", "a folder"),
        ("config.yaml", "a folder"),
        ("provenance.jsonl", "a folder"),
        ("checkpoints", "a file"),
        ("export", "a file"),
        ("samples", "a file"),
        ("checkpoints/step-6", "a file"),
    ],
)
def test_a_run_folder_with_something_else_in_it_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    config = tiny_config(tmp_path)
    path = config.folder / name
    path.parent.mkdir(parents=True)
    path.mkdir() if kind == "a folder" else path.write_text("mine")
    with pytest.raises(
        UserError, match=rf"{name} is {kind}, and a run keeps .*; move it away, or choose another"
    ):
        train(config)
    assert path.exists()


@pytest.mark.parametrize("place", ["file", "/proc/nowhere"])
def test_a_place_that_takes_no_run_is_refused(
    tmp_path: Path, line: Line, launch_train: Callable, place: str
) -> None:
    (tmp_path / "file").write_text("mine")
    text = line(launch_train(write_config(tmp_path), f"run.dir={tmp_path / place}"))
    assert "cannot train in" in text and "run.dir or run.name" in text


@pytest.mark.parametrize(
    "override",
    ["data.source=nowhere", "autoencoder=nowhere", "model.unet.in_channels=3", "data.num_classes=3"],
)
def test_a_refused_start_leaves_nothing_behind(tmp_path: Path, override: str) -> None:
    config = tiny_config(tmp_path, override, f"run.dir={tmp_path}/new/runs")
    with pytest.raises(UserError):
        train(config)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
    (tmp_path / "new").mkdir()
    with pytest.raises(UserError):
        train(config)
    assert list((tmp_path / "new").iterdir()) == []  # what was there before stays


def test_a_lock_that_was_taken_away_is_not_held(tmp_path: Path) -> None:
    """Between opening and locking, a refused start removed the file: another one is locked."""
    fcntl = pytest.importorskip("fcntl")
    real, path, calls = fcntl.flock, tmp_path / ".lock", []

    def flock(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            path.unlink()
        real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        with run_folder._locked(path) as file:
            assert os.path.samestat(os.fstat(file.fileno()), path.stat())
    assert len(calls) == 2


def test_a_file_system_without_locks_trains_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with run_folder.run_lock(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").touch()
    assert f"warning: the file system of {tmp_path / 'run'} has no locks" in capsys.readouterr().err


def test_lines_that_are_no_metrics_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    wrong = [
        b"\xff\xfe\x00",
        b'{"step":"x"}',
        b'{"step":null}',
        b"[" * 100_000,
        b'{"step":true}',
        b"3",
        b'{"a":1}',
    ]
    path.write_bytes(b"\n".join([*wrong, b'{"step": 4, "loss": 1.5}', b'{"step": 5, "lo']))
    assert metrics.read(path) == [{"step": 4, "loss": 1.5}]
    metrics.MetricsLog(tmp_path, 9).close()
    assert path.read_text() == '{"step": 4, "loss": 1.5}\n'


# ------------------------------------------------------------------------------------------- data and networks


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of four grey pictures."""
    folder = tmp_path / "pictures"
    for number in range(8):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 30 * number).save(path)
    return folder


def run_on(pictures: Path, place: Path, *overrides: str) -> Config:
    return tiny_config(place, f"data.source={pictures}", "train.steps=1", *overrides)


def test_a_flat_folder_has_no_classes(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no classes and data.num_classes=2; sort its images"):
        train(run_on(pictures / "a", tmp_path, "data.num_classes=2"))


@pytest.mark.parametrize(
    "overrides", [("data.split=held-out",), ("data.split=train", "train.validate_every=1")]
)
def test_a_split_without_images_is_called_so(
    pictures: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """Of three pictures a class none is held out; that they cannot be read would be another mistake."""
    for number in (0, 1):
        (pictures / "ab"[number] / f"{number}.png").unlink()
    with pytest.raises(
        UserError, match=r"has no images in data\.split=held-out, as every fourth of a class is"
    ):
        train(run_on(pictures, tmp_path, *overrides))


def test_moved_data_may_be_allowed_and_replaced_data_may_not(pictures: Path, tmp_path: Path) -> None:
    assert train(run_on(pictures, tmp_path)) == 0
    moved = pictures.rename(tmp_path / "moved")
    later = run_on(moved, tmp_path, "train.steps=2", "train.lr_schedule=constant")
    with pytest.raises(
        UserError,
        match=r"go on with --allow-change data.source, and --other-data where data.source holds other images$",
    ):
        train(later)
    assert train(later, ["data.source"]) == 0
    picture = moved / "a" / "2.png"
    before = picture.stat()
    Image.new("L", (8, 8), 37).save(picture)  # as large as the one before, and as old
    os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert picture.stat().st_size == before.st_size
    with pytest.raises(UserError, match=r"was trained on another state of .*; bring the data back"):
        train(later)


def test_other_data_of_as_many_classes_are_gone_on_with_where_that_is_asked_for(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(run_on(pictures, tmp_path)) == 0
    grown = tmp_path / "grown"
    shutil.copytree(pictures, grown)
    for number in range(20):
        Image.new("L", (8, 8), number).save(grown / "ab"[number % 2] / f"new{number}.png")
    later = run_on(grown, tmp_path, "train.steps=2", "train.lr_schedule=constant")
    with pytest.raises(
        UserError,
        match=r"go on with these by --other-data, or choose another run.name.*model.unet=null has it",
    ):
        train(later, ["data.source"])
    capsys.readouterr()
    assert train(later, other_data=True) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"changed since the last checkpoint: data.source: '{pictures}' -> '{grown}'" in said
    assert re.search(rf"changed since the last checkpoint: the images of {grown}: \d+ -> \d+, ", said)
    assert "held" not in said and "going on from" in said
    further = run_on(grown, tmp_path, "train.steps=3", "train.lr_schedule=constant")
    assert train(further) == 0  # these are the run's data now
    (grown / "c").mkdir()
    Image.new("L", (8, 8), 99).save(grown / "c" / "one.png")
    with pytest.raises(
        UserError, match=r"images of 2 classes, .* now holds \d+ of 3; bring the data back, or choose"
    ):
        train(run_on(grown, tmp_path, "train.steps=4", "train.lr_schedule=constant"), other_data=True)


def test_other_data_may_rename_classes_and_not_renumber_them(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(run_on(pictures, tmp_path)) == 0
    later = ("train.steps=2", "train.lr_schedule=constant")
    (pictures / "a").rename(pictures / "c")  # b is the first now, whose number was another's
    with pytest.raises(
        UserError,
        match=r"class 'b' of .*pictures has number 0, and the run learned it as number 1; name class folders",
    ):
        train(run_on(pictures, tmp_path, *later), other_data=True)
    (pictures / "c").rename(pictures / "aa")
    Image.new("L", (8, 8), 77).save(pictures / "b" / "new.png")
    capsys.readouterr()
    assert train(run_on(pictures, tmp_path, *later), other_data=True) == 0
    assert "changed since the last checkpoint: class 0: 'a' -> 'aa'" in " ".join(
        capsys.readouterr().err.split()
    )


def test_two_classes_of_one_name_keep_their_numbers() -> None:
    twice = ["missile", "wolf", "missile"]
    assert run_module._renamed(twice, twice, "photos") == []
    assert run_module._renamed(twice, ["missile", "fox", "missile"], "photos") == ["class 1: 'wolf' -> 'fox'"]
    with pytest.raises(
        UserError, match="class 'wolf' of photos has number 0, and the run learned it as number 1"
    ):
        run_module._renamed(twice, ["wolf", "missile", "missile"], "photos")


def test_of_other_data_it_is_said_what_validation_no_longer_means(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = (
        "data.split=train",
        "train.validate_every=1",
        "train.lr_schedule=constant",
        "train.batch_size=64",
    )
    assert train(run_on(pictures, tmp_path, *split)) == 0
    Image.new("L", (8, 8), 77).save(pictures / "a" / "0-first.png")
    assert train(run_on(pictures, tmp_path, *split, "train.steps=2"), other_data=True) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "those that data.split=train holds out may have been trained on" in said


def test_a_moved_autoencoder_may_be_allowed_and_another_may_not(tmp_path: Path) -> None:
    from ldm_dcn.autoencoder import DIGITS_FOLDER

    shutil.copytree(DIGITS_FOLDER, tmp_path / "mine")
    network = ("data.image_size=32", "model.unet.in_channels=4", "model.unet.out_channels=4", "train.steps=1")
    with open_run(tiny_config(tmp_path, *network, "autoencoder=digits", "data.split=held-out")) as run:
        channels = run.latents.latent_shape[0]
        run.record(1.0)
        run.save()
    moved = tiny_config(tmp_path, *network, f"autoencoder={tmp_path / 'mine'}", "data.split=held-out")
    assert channels == 4
    with pytest.raises(UserError, match=r"go on with --allow-change autoencoder.spec$"):
        train(moved)
    with open_run(moved, ["autoencoder.spec"]) as run:
        assert run.state.step == 1
    other = tiny_config(tmp_path, *network, "autoencoder=identity", "data.split=held-out")
    with pytest.raises(UserError, match="is not the one these latents were made with"):
        train(other, ["autoencoder.spec"])


def test_an_image_size_that_the_autoencoder_cannot_halve_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "autoencoder=digits", "data.image_size=33")
    with pytest.raises(
        UserError, match=r"data.image_size=33 is no multiple of (\d+), .*; set data.image_size=32"
    ):
        train(config)


@pytest.mark.parametrize("small", [0, opening.SMALL_NETWORK], ids=["meta", "cpu"])
@pytest.mark.parametrize(
    "wrong", ["layers_per_block=0", "encoder_hid_dim=12", "class_embed_type=timestep", "sample_size=32"]
)
def test_a_network_that_fails_at_its_first_step_is_refused_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, small: int
) -> None:
    monkeypatch.setattr(opening, "SMALL_NETWORK", small)
    config = tiny_config(tmp_path, setting("model.unet", WHOLE), f"model.unet.{wrong}")
    if wrong == "sample_size=32":  # nothing is wrong with that one, but that it is not what is drawn
        with open_run(config) as run:
            assert run.denoiser.unet.config.sample_size == 8
        return
    further = r"it wants a condition beside classes or captions \(class_embed_type=timestep\)"
    mend = further if wrong.startswith("class_embed_type") else "mend model.unet"
    with pytest.raises(UserError, match=rf"cannot take latents of shape \(1, 8, 8\): .*; {mend}"):
        train(config)


# ------------------------------------------------------------------------------------------- the hub, devices


def test_a_device_is_found_for_those_who_name_none() -> None:
    assert choose_device(None).type in ("cuda", "cpu") and choose_device("cpu") == torch.device("cpu")


def test_the_hubs_answer_is_asked_for_once_and_told_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    tried: list[bool] = []

    def load(local_only: bool) -> str:
        tried.append(local_only)
        if local_only:
            raise OSError("not downloaded")
        return "loaded"

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known\nand a long story")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    with pytest.raises(
        hub.Unavailable, match=r"^offline: the hub does not answer, Name or service not known$"
    ):
        hub.from_hub_or_cache("some/model", load)
    assert hub.from_hub_or_cache("some/model", lambda local_only: local_only) is True
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    assert hub.from_hub_or_cache("some/model", load) == "loaded"
    assert tried == [True, False]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(hub.Unavailable, match="HF_HUB_OFFLINE is set"):
        hub.ask("some/model")


def test_a_repository_that_is_not_there_is_told_from_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import RepositoryNotFoundError

    def missing(*_: object, **__: object) -> None:
        error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)  # its constructor wants an answer
        raise error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", missing)
    with pytest.raises(hub.Unavailable, match="no such repository"):
        hub.ask("some/model")
    from ldm_dcn.autoencoder import load_autoencoder

    with pytest.raises(UserError, match=r"a hub id\) cannot be had \(the hub has no such repository"):
        load_autoencoder("some/model")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ("train.compile=true", "train.compile_mode=reduce-overhead", "train.gradient_accumulation=2"),
            r"replays CUDA graphs, .*set train.compile_mode=default, or train.gradient_accumulation=1",
        ),
        (("train.ema_snapshot_every=2",), r"and train.ema=constant has none; set train.ema=power"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    tmp_path: Path, settings: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        tiny_config(tmp_path, *settings)


def test_what_a_run_will_not_do_is_said_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"train.score_every is on and nobody said how to score"):
        train(tiny_config(tmp_path, "train.score_every=1"))
    assert train(tiny_config(tmp_path, "train.steps=1", "train.ema=power")) == 0
    assert "averages of other widths than its two cannot be made afterwards" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_run_leaves_torchs_settings_as_they_were(tmp_path: Path) -> None:
    places = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [place.allow_tf32 for place in places]
    for wanted in ("true", "false"):
        with open_run(tiny_config(tmp_path, f"train.tf32={wanted}", f"run.name=tf32-{wanted}")):
            assert [place.allow_tf32 for place in places] == 2 * [wanted == "true"]
        assert [place.allow_tf32 for place in places] == before
