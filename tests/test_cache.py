"""The latent cache: what is written is read, damage is named with its mend, and memory stays bounded."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm_dcn import cache, cache_layout, cache_writer, folders
from ldm_dcn.cache import LatentCache
from ldm_dcn.cache_layout import is_cache, shard_ranges
from ldm_dcn.errors import UserError
from ldm_dcn.folders import Damaged, DiskFull
from ldm_dcn.latents import Latents
from programs import server


def make_plan(images: int = 10, **changes: Any) -> dict[str, Any]:
    plan = {
        "format": 1,
        "source": "/somewhere",
        "images": images,
        "image_list_sha256": "ab12",
        "class_names": ["cat", "dog"],
        "preprocessing": {"pixels": "v1", "image_size": 12, "image_channels": 3, "flips": True},
        "autoencoder": {"spec": "some/where", "sha256": "0123", "factor": 4},
        "latent_shape": [2, 3, 5],
        "dtype": "float32",
        "text": None,
        "shard_size": 4,
    }
    return {**plan, **changes}


TEXT = {"length": 3, "width": 2, "encoder": {"spec": "clip", "sha256": "77"}}


def moments_of(indices: Tensor, flipped: bool = False) -> Tensor:
    """What image i of the source has in these tests: recognisable and exact in every type."""
    grid = torch.arange(4 * 3 * 5).reshape(4, 3, 5) % 8
    return grid + 8.0 * (indices % 16)[:, None, None, None] + 0.5 * flipped


def write(out: Path, plan: dict[str, Any], broken: tuple[int, ...] = (), only: slice = slice(None)) -> None:
    """Every shard of `plan` that is not there; image i has label i % 2 and, where there is text, 1 + i % 3 captions."""
    cache_writer.create(out)
    cache_writer.begin(out, plan)
    dtype = cache_layout.DTYPES[plan["dtype"]]
    for shard in shard_ranges(plan["images"], plan["shard_size"])[only]:
        cache_writer.clear_up(out, shard)
        if cache_writer.is_written(out, shard, plan, "stamp".__eq__):
            continue
        indices = torch.tensor([i for i in range(shard.first, shard.last + 1) if i not in broken])
        indices = indices.to(torch.int64)
        tensors = {
            "moments": moments_of(indices).to(dtype),
            "moments_flipped": moments_of(indices, flipped=True).to(dtype),
            "labels": indices % 2,
            "indices": indices,
        }
        if not plan["preprocessing"]["flips"]:
            del tensors["moments_flipped"]
        if plan["text"]:
            counts = 1 + indices % 3
            tensors["token_starts"] = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
            owner = indices.repeat_interleave(counts)
            which = torch.arange(len(owner)) - tensors["token_starts"][:-1].repeat_interleave(counts)
            tensors["tokens"] = (10.0 * owner + which)[:, None, None].expand(-1, 3, 2).to(dtype)
        bad = [
            {"index": i, "path": f"{i}.png", "reason": "torn"}
            for i in broken
            if shard.first <= i <= shard.last
        ]
        cache_writer.write_shard(out, shard, plan, "stamp", tensors, bad)


def complete(out: Path, plan: dict[str, Any], broken: tuple[int, ...] = ()) -> dict[str, Any]:
    write(out, plan, broken)
    empty = torch.full((3, 2), -1.0).to(cache_layout.DTYPES[plan["dtype"]]) if plan["text"] else None
    return cache_writer.finish(out, plan, empty, len(broken), "9")


# ------------------------------------------------------------------------------------------- good weather


@pytest.mark.parametrize("serial", [cache.SERIAL, 7])  # several rows at a time, and rows in parts
@pytest.mark.parametrize("dtype", cache_layout.DTYPES)
def test_what_is_written_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, serial: int
) -> None:
    monkeypatch.setattr(cache, "SERIAL", serial)
    plan = make_plan(dtype=dtype, text=TEXT)
    complete(tmp_path / "c", plan)
    latents = LatentCache.open(tmp_path / "c")
    assert is_cache(tmp_path / "c") and not is_cache(tmp_path)
    assert len(latents) == 10 and latents.latent_shape == (2, 3, 5)
    assert latents.labels.tolist() == [0, 1] * 5 and latents.labels.dtype == torch.int64
    assert (latents.num_classes, latents.class_names) == (2, ("cat", "dog"))
    assert latents.fingerprint == plan["autoencoder"] and latents.has_flips
    ids = torch.tensor([9, 0, 5, 5, 4])
    assert latents.read(ids).dtype == torch.float32
    assert torch.equal(latents.read(ids), moments_of(ids))
    flipped = torch.tensor([True, False, False, True, True])
    expected = torch.where(flipped[:, None, None, None], moments_of(ids, True), moments_of(ids))
    assert torch.equal(latents.read(ids, flipped), expected)
    assert latents.read(ids[:0]).shape == (0, 4, 3, 5)
    assert latents.text is not None and (latents.text.length, latents.text.width) == (3, 2)
    assert latents.text.captions.tolist() == [1 + i % 3 for i in range(10)]
    assert latents.text.encoder == TEXT["encoder"]
    tokens = latents.read_tokens(ids, torch.tensor([0, 0, 2, 1, 1]))
    assert tokens.shape == (5, 3, 2) and tokens[:, 2, 1].tolist() == [90, 0, 52, 51, 41]
    assert latents.empty_tokens is not None and latents.empty_tokens.tolist() == [[-1, -1]] * 3
    cache.verify(tmp_path / "c")


def test_broken_images_leave_no_gap_in_the_ids(tmp_path: Path) -> None:
    complete(tmp_path, make_plan(), broken=(0, 4, 5, 6, 7))  # the second shard is empty
    latents = LatentCache.open(tmp_path)
    good = torch.tensor([1, 2, 3, 8, 9])
    shards = sorted((tmp_path / "shards").glob("*/latents.safetensors"))
    assert torch.equal(torch.cat([load_file(shard)["indices"] for shard in shards]), good)
    assert torch.equal(latents.read(torch.arange(5)), moments_of(good))
    assert latents.labels.tolist() == [1, 0, 1, 0, 1]
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 4, 5, 6, 7]
    assert lines[1] == {"index": 4, "path": "4.png", "reason": "torn"}
    assert cache.verify(tmp_path)["bad"] == 5


def test_a_part_of_a_cache_reads_like_a_whole_one(tmp_path: Path) -> None:
    complete(tmp_path, make_plan(text=TEXT), broken=(0,))
    whole = LatentCache.open(tmp_path)
    chosen = torch.tensor([1, 4, 5, 8])
    part = LatentCache.open(tmp_path, lambda labels: chosen[: len(labels)])
    ids = torch.tensor([3, 0, 2])
    assert len(part) == 4 and part.identity == whole.identity
    assert torch.equal(part.labels, whole.labels[chosen])
    assert torch.equal(part.read(ids), whole.read(chosen[ids]))
    flipped = torch.tensor([True, False, True])
    assert torch.equal(part.read(ids, flipped), whole.read(chosen[ids], flipped))
    assert torch.equal(part.text.captions, whole.text.captions[chosen])
    last = part.text.captions[ids] - 1
    assert torch.equal(part.read_tokens(ids, last), whole.read_tokens(chosen[ids], last))
    with pytest.raises(IndexError, match=r"has 4"):
        part.read(torch.tensor([4]))


def test_latents_in_memory_read_alike() -> None:
    ids = torch.arange(6)
    latents = Latents(moments_of(ids), ids % 2, 2, {})
    assert latents.latent_shape == (2, 3, 5) and not latents.has_flips and latents.text is None
    assert torch.equal(latents.read(torch.tensor([3, 1])), moments_of(torch.tensor([3, 1])))
    latents.read(ids, torch.zeros(6, dtype=torch.bool))
    with pytest.raises(ValueError, match="--flip"):
        latents.read(ids, torch.ones(6, dtype=torch.bool))


def test_wrong_questions_are_errors(tmp_path: Path) -> None:
    plan = make_plan(preprocessing={"pixels": "v1", "image_size": 12, "image_channels": 3, "flips": False})
    complete(tmp_path, plan)
    latents = LatentCache.open(tmp_path)
    assert not latents.has_flips and latents.text is None
    with pytest.raises(IndexError, match=r"10"):
        latents.read(torch.tensor([10]))
    with pytest.raises(IndexError):
        latents.read(torch.tensor([-1]))
    with pytest.raises(ValueError, match="no mirrored images"):
        latents.read(torch.tensor([0]), torch.tensor([True]))
    with pytest.raises(ValueError, match="--text-encoder"):
        latents.read_tokens(torch.tensor([0]), torch.tensor([0]))
    complete(tmp_path / "text", make_plan(text=TEXT))
    with pytest.raises(IndexError, match="captions"):
        LatentCache.open(tmp_path / "text").read_tokens(torch.tensor([0]), torch.tensor([1]))


def test_identity_is_of_what_is_in_it_not_of_where_it_lies(tmp_path: Path) -> None:
    plan = make_plan()
    first = complete(tmp_path / "a", plan)["identity"]
    moved = {**plan, "source": "/elsewhere", "autoencoder": {**plan["autoencoder"], "spec": "/a/copy"}}
    assert complete(tmp_path / "b", moved)["identity"] == first == LatentCache.open(tmp_path / "a").identity
    assert complete(tmp_path / "c", plan, broken=(3,))["identity"] != first
    assert complete(tmp_path / "d", make_plan(class_names=["dog", "cat"]))["identity"] != first


# ------------------------------------------------------------------------------------------- other settings


def test_another_plan_is_refused_and_what_differs_is_named(tmp_path: Path) -> None:
    complete(tmp_path, make_plan())
    changed = make_plan(autoencoder={"spec": "x", "sha256": "9999", "factor": 4})
    with pytest.raises(UserError, match=r'autoencoder\.sha256: "0123" -> "9999".*name another folder'):
        cache_writer.begin(tmp_path, changed)
    (tmp_path / "manifest.json").unlink()  # unfinished ones as well
    with pytest.raises(UserError, match=r"preprocessing\.flips: true -> false"):
        cache_writer.begin(
            tmp_path, make_plan(preprocessing={**make_plan()["preprocessing"], "flips": False})
        )
    with pytest.raises(UserError, match=r"images: 10 -> 11"):
        cache_writer.begin(tmp_path, make_plan(11))
    cache_writer.begin(tmp_path, make_plan())


def test_folders_of_other_things_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds other things \(thesis\.tex"):
        cache_writer.begin(tmp_path, make_plan())
    with pytest.raises(UserError, match="is a file"):
        cache_writer.create(tmp_path / "thesis.tex")
    with pytest.raises(UserError, match="no latent cache; make one with"):
        LatentCache.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unfinished_cache_is_no_cache_to_train_on(tmp_path: Path) -> None:
    write(tmp_path, make_plan(), only=slice(1, 3))
    assert is_cache(tmp_path)
    with pytest.raises(UserError, match=r"unfinished \(2 of 3 shards\); run the same"):
        LatentCache.open(tmp_path)
    with pytest.raises(Damaged, match="000000000-000000003"):
        cache_writer.finish(tmp_path, make_plan(), None, 0, "0")
    assert not (tmp_path / "manifest.json").exists()


def test_too_many_broken_images_are_not_finished(tmp_path: Path) -> None:
    write(tmp_path, make_plan(), broken=(1, 2, 8, 9))
    with pytest.raises(UserError, match=r"4 of 10 .*1\.png \(torn\).*and 1 more.*--max-bad 4 \(now 3\)"):
        cache_writer.finish(tmp_path, make_plan(), None, 3, "3")
    assert not (tmp_path / "manifest.json").exists()
    cache_writer.finish(tmp_path, make_plan(), None, 4, "4")


# ------------------------------------------------------------------------------------------- damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def flip_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    place = data.index(b'"data_offsets":[') + 16
    data[place] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


FILES = ["manifest.json", "plan.json", "bad.jsonl", "text/empty.safetensors", "text/manifest.json"] + [
    f"shards/000000004-000000007/{name}" for name in ("latents.safetensors", "shard.json", "manifest.json")
]


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("file", FILES)
def test_damage_in_every_file_is_named_and_the_same_command_mends_it(
    tmp_path: Path, file: str, damage: Callable[[Path], object]
) -> None:
    plan = make_plan(text=TEXT)
    identity = complete(tmp_path, plan, broken=(5,))["identity"]
    damage(tmp_path / file)
    with pytest.raises(UserError) as caught:
        cache.verify(tmp_path)
    text = str(caught.value)
    part = Path(file).parent if file.endswith(("shard.json", "/manifest.json")) else Path(file)
    assert "\n" not in text
    if (file, damage) == ("manifest.json", Path.unlink):
        assert "unfinished (3 of 3 shards)" in text
    else:
        assert str(tmp_path / part) in text
    assert "run the same `python -m ldm_dcn.encode` command again" in text
    if mend := re.search(r"delete (\S+),", text):  # done to the letter
        doomed = Path(mend[1] if mend[1] != "it" else text.split()[0])
        shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()
    written = sum(
        cache_writer.is_written(tmp_path, shard, plan, "stamp".__eq__) for shard in shard_ranges(10, 4)
    )
    assert written == (2 if "shards/" in file else 3)
    complete(tmp_path, plan, broken=(5,))
    cache.verify(tmp_path)
    assert LatentCache.open(tmp_path).identity == identity


def test_labels_that_no_class_has_are_damage(tmp_path: Path) -> None:
    complete(tmp_path, make_plan())
    path = tmp_path / "shards" / "000000000-000000003" / "latents.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    content, label = path.read_bytes(), tensors["labels"].numpy().tobytes()
    assert content.count(label) == 1
    path.write_bytes(content.replace(label, b"\xff\x7f" + label[2:]))
    with pytest.raises(
        UserError, match=rf"holds labels from 0 to 32767, and has 2 classes.*--verify {tmp_path}"
    ):
        LatentCache.open(tmp_path)


@pytest.mark.parametrize("damage", [truncate, flip_header, Path.unlink])
def test_opening_sees_what_costs_nothing_to_see(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    complete(tmp_path, make_plan())
    damage(tmp_path / "shards" / "000000008-000000009" / "latents.safetensors")
    with pytest.raises(Damaged, match=r"000000008-000000009.*run the same"):
        LatentCache.open(tmp_path)


def test_a_damaged_shard_is_made_again_without_being_asked(tmp_path: Path) -> None:
    plan = make_plan()
    complete(tmp_path, plan)
    shard = shard_ranges(10, 4)[1]
    assert cache_writer.is_written(tmp_path, shard, plan, "stamp".__eq__)
    assert not cache_writer.is_written(tmp_path, shard, plan, "other images".__eq__)
    assert not cache_writer.is_written(tmp_path, shard, make_plan(dtype="float16"), "stamp".__eq__)
    truncate(tmp_path / "shards" / shard.name / "latents.safetensors")
    assert not cache_writer.is_written(tmp_path, shard, plan, "stamp".__eq__)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    complete(tmp_path / "c", make_plan(text=TEXT))
    evil = pickle.dumps(Evil())
    for file in FILES:
        before = (tmp_path / "c" / file).read_bytes()
        (tmp_path / "c" / file).write_bytes(evil.ljust(len(before), b"\0"))
        with pytest.raises(UserError):
            cache.verify(tmp_path / "c")
        if "latents" in file or file == "manifest.json":
            with pytest.raises(UserError):
                LatentCache.open(tmp_path / "c")
        (tmp_path / "c" / file).write_bytes(before)
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------------------------------------- kills and full disks


def die_at(call: int, name: str, out: Path) -> None:
    """Write a whole cache, and die by SIGKILL at the `call`-th use of os.`name`."""
    real, count = getattr(os, name), 0

    def counted(*arguments: object, **options: object) -> object:
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(os, name, counted)
    complete(out, make_plan(text=TEXT))
    os._exit(0)


@pytest.mark.parametrize("name", ["fsync", "rename", "replace"])
def test_a_kill_anywhere_leaves_no_file_half_written(tmp_path: Path, name: str) -> None:
    """Killed at every fifth call in turn: what is there is whole, and the rest is written by the next start."""
    plan = make_plan(text=TEXT)
    for call in range(1, 60, 5):
        out = tmp_path / str(call)
        process = server.Process(target=die_at, args=(call, name, out), daemon=True)
        process.start()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        if (out / "manifest.json").exists():
            cache.verify(out)
        for shard in shard_ranges(10, 4):
            if (out / "shards" / shard.name).exists():
                folders.verify(out / "shards" / shard.name)
            cache_writer.clear_up(out, shard)
        complete(out, plan)
        cache.verify(out)
        if process.exitcode == 0:
            break
    else:
        pytest.fail(f"the writing never ended within 59 calls of os.{name}")


def write_in_files_of_at_most_20_kb(out: Path, told: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        complete(out, make_plan(1000, shard_size=500))
    except DiskFull as error:
        told.send(str(error))


def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    here, there = server.Pipe()
    process = server.Process(
        target=write_in_files_of_at_most_20_kb, args=(tmp_path / "c", there), daemon=True
    )
    process.start()
    assert here.poll(60)
    text = here.recv()
    process.join(60)
    assert (
        "no room to write in" in text
        and "run the same command again" in text
        and "keep_checkpoints" not in text
    )
    assert [path.name for path in (tmp_path / "c" / "shards").iterdir()] == []
    complete(tmp_path / "c", make_plan(1000, shard_size=500))


def test_too_little_room_is_seen_before_hours_of_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10**9})
    monkeypatch.setattr(cache_writer.shutil, "disk_usage", lambda _: usage)
    cache_writer.check_room(tmp_path, 10**9)
    with pytest.raises(DiskFull, match=r"takes 42\.00 GB more and 1\.00 GB are free.*--no-flip"):
        cache_writer.check_room(tmp_path, 42 * 10**9)


# ------------------------------------------------------------------------------------------- larger than memory


def mapped() -> int:
    """Bytes of files in this process's memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssFile:")[1].split()[0]) << 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_stays_bounded_whatever_the_size_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of 420 MB is read in random order, and little of it stays mapped."""
    plan = make_plan(1600, latent_shape=[4, 64, 64], shard_size=200)
    cache_writer.create(tmp_path)
    cache_writer.begin(tmp_path, plan)
    for shard in shard_ranges(1600, 200):
        zeros = torch.zeros(1, 8, 64, 64).expand(200, -1, -1, -1)
        numbers = torch.arange(shard.first, shard.last + 1)
        tensors = {"moments": zeros, "moments_flipped": zeros, "labels": numbers % 2, "indices": numbers}
        cache_writer.write_shard(tmp_path, shard, plan, "", tensors, [])
    cache_writer.finish(tmp_path, plan, None, 0, "0")
    grown = {}
    for limit in (8 << 20, 1 << 40):
        monkeypatch.setattr(cache, "MAPPED_BYTES", limit)
        latents = LatentCache.open(tmp_path)
        before, most = mapped(), 0
        for ids in torch.randperm(1600, generator=torch.Generator().manual_seed(0)).split(16):
            for flipped in (False, True):
                latents.read(ids, torch.full((len(ids),), flipped))
            most = max(most, mapped())
        grown[limit] = most - before
        del latents
    assert grown[8 << 20] < grown[1 << 40] / 2, grown
    assert grown[8 << 20] < 200 << 20, grown


def test_more_shards_than_open_files(tmp_path: Path) -> None:
    """Every shard keeps a file open; the soft limit is raised as far as the system allows, and then it is named."""
    complete(tmp_path, make_plan(40, shard_size=1))
    here, there = server.Pipe()
    process = server.Process(target=open_with_few_files, args=(tmp_path, there), daemon=True)
    process.start()
    assert here.poll(60)
    assert here.recv() == 40
    text = here.recv()
    assert "the limit is 60" in text and "--shard-size" in text
    process.join(60)


def open_with_few_files(folder: Path, told: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (30, 700))
    told.send(len(LatentCache.open(folder)))
    resource.setrlimit(resource.RLIMIT_NOFILE, (30, 60))
    try:
        LatentCache.open(folder)
    except UserError as error:
        told.send(str(error))


def test_reading_speed_is_measured(tmp_path: Path) -> None:
    complete(tmp_path, make_plan())
    assert cache.reading_speed(LatentCache.open(tmp_path), batch_size=4, seconds=0.01) > 0
