"""Checkpoints through kills, damage, full disks and pickles."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from ldm_dcn import checkpoint
from ldm_dcn.checkpoint import newest, save, sweep
from ldm_dcn.errors import UserError
from ldm_dcn.files import replace_file
from ldm_dcn.folders import Damaged, DiskFull, committed_folder, recover, verify
from programs import server


def groups(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"a.weight": torch.full((4, 3, 3, 3), value), "b": torch.tensor(value)},
        "optimizer": {"step/a.weight": torch.tensor(value)},
    }


def write(root: Path, *steps: int, keep: int = 9) -> None:
    for step in steps:
        save(root, step, groups(step), {"note": f"step {step}"}, keep)


def complain(text: str) -> None:
    raise AssertionError(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------- good weather


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    layout = torch.arange(72.0).reshape(2, 4, 3, 3).to(memory_format=torch.channels_last)
    save(tmp_path, 7, {"model": {"w": layout}, "optimizer": {}}, {"config": {"x": [1, None]}}, keep=1)
    found = newest(tmp_path, complain)
    assert found == tmp_path / "step-7"
    tensors, state = checkpoint.load(found)
    assert torch.equal(tensors["model"]["w"], layout)
    assert tensors["optimizer"] == {}
    assert state == {"step": 7, "config": {"x": [1, None]}}


def test_nothing_saved_is_no_checkpoint(tmp_path: Path) -> None:
    assert newest(tmp_path, complain) is None
    assert newest(tmp_path / "none", complain) is None


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 5, 9, 10, 100, keep=2)
    assert names(tmp_path) == ["step-10", "step-100"]
    assert newest(tmp_path, complain) == tmp_path / "step-100"


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, 5)
    save(tmp_path, 5, groups(50), {}, 2)
    assert checkpoint.load(tmp_path / "step-5")[0]["model"]["b"] == 50
    assert names(tmp_path) == ["step-5"]


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    write(tmp_path, 1)
    assert names(tmp_path / "step-1") == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


# ------------------------------------------------------------------------------------------- kill -9


def killed_at(call: int, name: str, work: Callable[..., object], *arguments: object) -> int:
    """Run `work(*arguments)` in a child that kills itself with SIGKILL at its `call`-th use of os.`name`; returns the
    exit code."""
    process = server.Process(target=kill_itself, args=(call, name, work, arguments), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def kill_itself(call: int, name: str, work: Callable[..., object], arguments: tuple[object, ...]) -> None:
    real, count = getattr(os, name), 0

    def counted(*arguments: object, **options: object) -> object:
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(os, name, counted)
    work(*arguments)
    os._exit(0)


@pytest.mark.parametrize("steps", [(20,), (10,)], ids=["a new step", "the same step again"])
@pytest.mark.parametrize("name", ["fsync", "rename", "open", "mkdir", "rmdir", "unlink"])
def test_a_kill_anywhere_in_a_save_leaves_a_good_checkpoint(
    tmp_path: Path, name: str, steps: tuple[int, ...]
) -> None:
    """Killed at every system call of a kind, in turn: the next start finds the old or the new checkpoint,
    whole."""
    for call in range(1, 60):
        root = tmp_path / f"{call}"
        write(root, 5, 10)
        exitcode = killed_at(call, name, partial(write, keep=2), root, *steps)
        sweep(root)
        found = newest(root, complain)
        assert found is not None
        tensors, state = checkpoint.load(found)
        assert tensors["model"]["b"] == state["step"] and state["step"] in (10, steps[0])
        assert all(not n.startswith(".") for n in names(root))
        if exitcode == 0:
            assert state["step"] == steps[0]
            break
        assert exitcode == -signal.SIGKILL
    else:
        pytest.fail(f"the save never ended within 59 calls of os.{name}")


# ------------------------------------------------------------------------------------------- damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


DAMAGE = {
    "a flipped byte": ("model.safetensors", flip, "model.safetensors was changed after it was written"),
    "a flipped byte in the state": ("state.json", flip, "state.json was changed after it was written"),
    "a truncated file": ("optimizer.safetensors", truncate, "optimizer.safetensors has .* bytes instead of"),
    "a missing file": ("model.safetensors", Path.unlink, "model.safetensors is missing"),
    "no manifest": ("manifest.json", Path.unlink, "it has no manifest.json"),
    "half a manifest": ("manifest.json", truncate, "manifest.json cannot be read"),
    "an empty manifest": (
        "manifest.json",
        lambda path: path.write_text("[]"),
        "manifest.json cannot be read",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, kind: str) -> None:
    file, damage, expected = DAMAGE[kind]
    write(tmp_path, 10, 20)
    damage(tmp_path / "step-20" / file)
    with pytest.raises(Damaged, match=expected):
        verify(tmp_path / "step-20")
    lines: list[str] = []
    assert newest(tmp_path, lines.append) == tmp_path / "step-10"
    assert len(lines) == 1 and "step-20" in lines[0] and "goes on from" in lines[0]
    assert names(tmp_path) == ["damaged-step-20", "step-10"]
    write(tmp_path, 15, keep=1)  # the damaged one does not count among those kept
    assert names(tmp_path) == ["damaged-step-20", "step-15"]


def test_all_damaged_is_an_error_and_nothing_is_touched(tmp_path: Path) -> None:
    write(tmp_path, 10, 20)
    for step in (10, 20):
        flip(tmp_path / f"step-{step}" / "model.safetensors")
    with pytest.raises(
        UserError, match=r"every checkpoint in .* is damaged .*; bring one back from a backup, or delete"
    ):
        newest(tmp_path, complain)
    assert names(tmp_path) == ["step-10", "step-20"]


def test_pickles_are_never_read(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    write(tmp_path / "root", 10, 20)
    for name in ("optimizer.bin", "model.pt", "custom_checkpoint_0.pkl"):
        (tmp_path / "root" / "step-20" / name).write_bytes(pickle.dumps(Evil()))
    (tmp_path / "root" / "step-20" / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    lines: list[str] = []
    found = newest(tmp_path / "root", lines.append)
    assert found is not None and found.name == "step-10" and lines
    checkpoint.load(found)
    assert not (tmp_path / "executed").exists()


# ----------------------------------------------------------------------------------------- full disks, errors


def save_with_files_of_at_most_20_kb(root: Path, told: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        save(root, 20, {"model": {"w": torch.zeros(100_000)}}, {}, 1)
    except DiskFull as error:
        told.send(str(error))


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    write(tmp_path, 10)
    here, there = server.Pipe()
    process = server.Process(target=save_with_files_of_at_most_20_kb, args=(tmp_path, there), daemon=True)
    process.start()
    assert here.poll(60)
    assert "no room to write" in here.recv()
    process.join(60)
    assert process.exitcode == 0
    assert names(tmp_path) == ["step-10"]


def leave_free(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)


@pytest.mark.parametrize(
    ("steps", "keep", "helps"),
    [((10,), 1, False), ((10,), 2, False), ((5, 10), 2, True), ((5, 10), 1, False)],
)
def test_too_little_room_is_seen_before_writing_with_the_mend_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...], keep: int, helps: bool
) -> None:
    write(tmp_path, *steps)
    leave_free(100, monkeypatch)
    with pytest.raises(DiskFull, match=r"0.0 MB are free, 0.4 MB too few; .*free some space") as caught:
        save(tmp_path, 20, {"model": {"w": torch.zeros(100_000)}}, {}, keep)
    assert "train.keep_checkpoints" not in str(caught.value)  # the room that it gives is not enough
    with pytest.raises(DiskFull) as caught:
        save(tmp_path, 20, groups(20), {}, keep)
    assert ("train.keep_checkpoints=1, which gives 0.0 MB back" in str(caught.value)) is helps
    assert names(tmp_path) == sorted(f"step-{step}" for step in (steps[-1:] if keep == 1 else steps))


def test_fewer_checkpoints_are_kept_before_the_next_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `train.keep_checkpoints=1` is advised for: the older ones make room for the one to come."""
    write(tmp_path, 5, 10)
    seen: list[list[str]] = []
    monkeypatch.setattr(checkpoint, "_write_groups", lambda *_: seen.append(names(tmp_path)))
    save(tmp_path, 20, groups(20), {}, 1)
    assert seen == [[".tmp-step-20", "step-10"]]
    assert names(tmp_path) == ["step-20"]


def test_a_folder_of_another_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    write(tmp_path, 10, 20)
    path = tmp_path / "step-20" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(
        UserError, match=r"has format 99, this program reads 1; use the version that wrote it"
    ):
        newest(tmp_path, complain)
    assert names(tmp_path) == ["step-10", "step-20"]


def test_an_error_while_writing_keeps_the_old_folder(tmp_path: Path) -> None:
    final = tmp_path / "export"
    with committed_folder(final) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("old")
    with pytest.raises(KeyError), committed_folder(final) as folder:
        (folder / "file").write_text("new")
        raise KeyError
    verify(final)
    assert (final / "sub" / "file").read_text() == "old"
    assert names(tmp_path) == ["export"]
    assert list(json.loads((final / "manifest.json").read_text())["files"]) == ["sub/file"]


def test_a_replacement_cut_in_the_middle_is_taken_back(tmp_path: Path) -> None:
    final = tmp_path / "export"
    for text in ("old", "new"):
        with committed_folder(final) as folder:
            (folder / "file").write_text(text)
    (tmp_path / ".tmp-export").mkdir()
    final.rename(tmp_path / ".old-export")
    recover(final)
    assert (final / "file").read_text() == "new"
    assert names(tmp_path) == ["export"]


def test_a_small_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    replace_file(path, "old")
    assert killed_at(1, "fsync", replace_file, path, "new") == -signal.SIGKILL
    assert path.read_text() == "old"
    replace_file(path, "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["config.yaml"]
