"""Filling the latent cache: kills, signals, several processes, broken images, other settings; and the command itself."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm_dcn import cache, cache_writer, encode, files
from ldm_dcn import encoding as encoding_module
from ldm_dcn.autoencoder import IdentityAutoencoder, load_autoencoder
from ldm_dcn.cache import LatentCache
from ldm_dcn.data import open_dataset
from ldm_dcn.encode import parse
from ldm_dcn.encoding import Encoding, encode_shards, finish, make_plan, wait_for_others
from ldm_dcn.errors import UserError
from ldm_dcn.images import Images
from ldm_dcn.latents import encode_dataset
from ldm_dcn.presence import Presence
from ldm_dcn.signals import StopSignals
from programs import Program, run, run_together, server

DIGITS = ("--autoencoder", "identity", "--image-size", "8", "--image-channels", "1", "--shard-size", "100")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures in two classes."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(60):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "ab"[i % 2] / f"{i:02d}.png")
    return folder


def make_encoding(
    source: Path | str, out: Path, rank: int = 0, processes: int = 1, max_bad: float = 0
) -> Encoding:
    autoencoder = IdentityAutoencoder(3)
    dataset = open_dataset(source, image_size=8)
    dataset.workers = 1
    plan = make_plan(dataset, autoencoder, None, flips=True, dtype="float16", shard_size=7)
    cache_writer.create(out)
    cache_writer.begin(out, plan)
    return Encoding(out, dataset, autoencoder, None, plan, max_bad, 4, rank, processes)


def fill(source: Path | str, out: Path, max_bad: float = 0) -> str:
    """Encode in this process; returns the identity."""
    encoding = make_encoding(source, out, max_bad=max_bad)
    encode_shards(encoding, StopSignals())
    return finish(encoding)["identity"]


def hashes(out: Path) -> list[str]:
    manifest = cache.verify(out)
    return [shard["files"]["latents.safetensors"]["sha256"] for shard in manifest["shards"]]


# ------------------------------------------------------------------------------------------- good weather


def test_moments_are_those_of_the_pictures_and_of_their_mirror_images(images: Path, tmp_path: Path) -> None:
    fill(images, tmp_path / "c")
    latents = LatentCache.open(tmp_path / "c")
    source = open_dataset(images, image_size=8)
    pixels = source.images(range(60))
    assert torch.equal(latents.labels, source.labels) and latents.class_names == ("a", "b")
    assert latents.image_size == 8 and latents.latent_shape == (3, 8, 8)
    expected = IdentityAutoencoder(3).encode(pixels).half().float()
    assert torch.equal(latents.read(torch.arange(60)), expected)
    every = torch.ones(60, dtype=torch.bool)
    assert torch.equal(latents.read(torch.arange(60), every), expected.flip(-1))


def test_a_cache_equals_encoding_in_memory(images: Path, tmp_path: Path) -> None:
    autoencoder = load_autoencoder("digits")
    grey = open_dataset(images, image_size=16, image_channels=1)
    plan = make_plan(grey, autoencoder, None, flips=True, dtype="float32", shard_size=25)
    cache_writer.create(tmp_path)
    cache_writer.begin(tmp_path, plan)
    encoding = Encoding(tmp_path, grey, autoencoder, None, plan, 0, 15)
    encode_shards(encoding, StopSignals())
    finish(encoding)
    latents, ids = LatentCache.open(tmp_path), torch.tensor([0, 17, 44])
    autoencoder.check(latents.fingerprint)
    whole = encode_dataset(grey, autoencoder)
    torch.testing.assert_close(latents.read(ids), whole.read(ids), rtol=1e-4, atol=1e-5)
    mirrored = autoencoder.encode(grey.images(ids).flip(-1))
    torch.testing.assert_close(
        latents.read(ids, torch.ones(3, dtype=torch.bool)), mirrored, rtol=1e-4, atol=1e-5
    )


def test_what_does_not_fit_together_is_refused(images: Path) -> None:
    grey, digits = open_dataset(images, image_size=30, image_channels=1), load_autoencoder("digits")
    with pytest.raises(UserError, match=r"--image-size 30 is no multiple of 4.*use 28"):
        make_plan(grey, digits, None, flips=True, dtype="float16", shard_size=None)
    with pytest.raises(UserError, match="--image-channels 1"):
        make_plan(open_dataset(images), digits, None, flips=True, dtype="float16", shard_size=None)


def test_what_does_not_fit_into_half_precision_is_refused(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding = make_encoding(images, tmp_path)
    monkeypatch.setattr(encoding.autoencoder, "encode", lambda x: torch.full((len(x), 6, 8, 8), 1e5))
    with pytest.raises(UserError, match=r"does not fit into float16 .*--dtype float32"):
        encode_shards(encoding, StopSignals())


# ------------------------------------------------------------------------------------------- kills and signals


def work(source: Path, out: Path, rank: int, processes: int, delay: float) -> None:
    """One process of an encoding, slowed down so that a signal meets it anywhere; ends with the command's exit code."""
    torch.set_num_threads(1)
    encoding = make_encoding(source, out, rank, processes)
    slow = encoding.autoencoder.encode

    def encode_slowly(pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(delay)
        return slow(pixels)

    encoding.autoencoder.encode = encode_slowly  # type: ignore[method-assign]
    with StopSignals() as stop:
        (out / f".started-{rank}").touch()
        stopped_by = encode_shards(encoding, stop)
        if rank == 0 and not stopped_by:
            presence = Presence(out, rank)
            wait_for_others(encoding, presence, stop)
            finish(encoding)
    os._exit(128 + stopped_by if stopped_by else 0)


def launch(source: Path, out: Path, rank: int = 0, processes: int = 1, delay: float = 0.02) -> BaseProcess:
    (out / f".started-{rank}").unlink(missing_ok=True)
    process = server.Process(target=work, args=(source, out, rank, processes, delay), daemon=True)
    process.start()
    deadline = time.monotonic() + 60
    while not (out / f".started-{rank}").exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    return process


def written_shards(out: Path) -> set[str]:
    folder = out / "shards"
    return (
        {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        if folder.exists()
        else set()
    )


def test_five_kills_lose_nothing(images: Path, tmp_path: Path) -> None:
    expected = fill(images, tmp_path / "undisturbed")
    out, dice, done = tmp_path / "killed", random.Random(0), []
    for _ in range(5):
        process = launch(images, out)
        until = time.monotonic() + dice.uniform(0.05, 0.3)
        # Not by the clock alone: where other programs hold this one up, the work would be done before the last kill.
        while time.monotonic() < until and len(written_shards(out)) < 6:
            time.sleep(0.002)
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert written_shards(out) >= set(done)
        done = sorted(written_shards(out))
    assert done  # it did get somewhere in between
    times = {name: (out / "shards" / name / "latents.safetensors").stat().st_mtime_ns for name in done}
    process = launch(images, out, delay=0)
    process.join(60)
    assert process.exitcode == 0
    assert hashes(out) == hashes(tmp_path / "undisturbed")
    assert LatentCache.open(out).identity == expected
    for name, written_at in times.items():  # and was not done twice
        assert (out / "shards" / name / "latents.safetensors").stat().st_mtime_ns == written_at
    assert not [path for path in (out / "shards").iterdir() if path.name.startswith(".")]


def test_two_processes_a_kill_and_another_number_of_processes(images: Path, tmp_path: Path) -> None:
    expected = fill(images, tmp_path / "one")
    out = tmp_path / "two"
    pair = [launch(images, out, rank, 2) for rank in (0, 1)]
    time.sleep(0.1)
    pair[1].kill()
    pair[1].join(60)
    pair[0].join(0.3)
    pair[0].kill()  # as torchrun does when a process died
    pair[0].join(60)
    assert not (out / "manifest.json").exists()
    pair = [launch(images, out, rank, 2, 0) for rank in (1, 0)]
    for process in pair:
        process.join(60)
        assert process.exitcode == 0
    assert LatentCache.open(out).identity == expected and hashes(out) == hashes(tmp_path / "one")
    three = tmp_path / "three"
    for rank in (2, 1, 0):
        launch(images, three, rank, 3, 0).join(60)
    assert hashes(three) == hashes(tmp_path / "one")


def test_a_process_that_is_gone_is_not_waited_for(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "UNSEEN", 0.5)
    encoding = make_encoding(images, tmp_path, 0, 2)
    presence, other = Presence(tmp_path, 0), Presence(tmp_path, 1)
    with pytest.raises(UserError, match="another process is encoding into"):
        Presence(tmp_path, 1)
    presence.leave()
    with pytest.raises(UserError, match="another process is encoding into"):
        Presence(tmp_path, 0, 1)  # a start with one, while the second of two lives on
    presence = Presence(tmp_path, 0, 2)
    encode_shards(encoding, StopSignals())
    stop = StopSignals()
    stop.received = signal.SIGTERM
    wait_for_others(encoding, presence, stop)  # a signal ends the waiting
    other.leave()
    with pytest.raises(
        UserError, match=r"process 1 ended before its shards were written.*same command again"
    ):
        wait_for_others(encoding, presence, StopSignals())
    encode_shards(make_encoding(images, tmp_path, 1, 2), StopSignals())
    unseen = time.monotonic() + 0.3  # as NFS shows what another machine has just written
    really = encoding_module._is_done
    monkeypatch.setattr(encoding_module, "_is_done", lambda *a: time.monotonic() > unseen and really(*a))
    wait_for_others(encoding, presence, StopSignals())
    presence.leave()
    finish(encoding)
    cache.verify(tmp_path)


def test_a_process_that_is_gone_is_seen_on_a_network_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux's NFS client makes fcntl locks of flock's: an exclusive one takes a file that is open for writing."""
    fcntl = pytest.importorskip("fcntl")
    flock = fcntl.flock

    def over_nfs(file: IO[str], operation: int) -> None:
        if operation & fcntl.LOCK_EX and fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", over_nfs)
    presence, other = Presence(tmp_path, 0, 2), Presence(tmp_path, 1)
    assert presence.is_there(1)
    other.leave()
    assert not presence.is_there(1)
    presence.leave()
    other = Presence(tmp_path, 1)
    with pytest.raises(UserError, match="another process is encoding into"):
        Presence(tmp_path, 0, 1)
    other.leave()


def test_replaced_images_are_encoded_anew_and_only_their_shards(images: Path, tmp_path: Path) -> None:
    import shutil

    copy, out = tmp_path / "images", tmp_path / "c"
    shutil.copytree(images, copy)
    before = fill(copy, out)
    old = hashes(out)
    assert fill(copy, out) == before
    Image.new("RGB", (9, 9), "red").save(copy / "a" / "00.png")
    assert fill(copy, out) != before
    changed = [a != b for a, b in zip(old, hashes(out), strict=True)]
    assert changed == [True] + [False] * 8

    picture, old = copy / "a" / "02.png", hashes(out)
    changed_bytes = bytearray(picture.read_bytes())
    changed_bytes[-20] ^= 1  # as large as before: a broken picture, here
    picture.write_bytes(changed_bytes)
    with pytest.raises(UserError, match=r"02.png \("):
        fill(copy, out)
    Image.new("RGB", Image.open(images / "a" / "02.png").size, "blue").save(copy / "blue.png")
    picture.write_bytes((copy / "blue.png").read_bytes().ljust(len(changed_bytes), b"\0"))
    (copy / "blue.png").unlink()
    assert picture.stat().st_size == len(changed_bytes)
    fill(copy, out)
    changed = [a != b for a, b in zip(old, hashes(out), strict=True)]
    assert changed == [True] + [False] * 8
    (copy / "a" / "02.png").unlink()
    with pytest.raises(UserError, match=r"was encoded otherwise \(image_list_sha256: .*; images: 60 -> 59\)"):
        fill(copy, out)


def test_a_copy_of_the_images_is_read_but_not_encoded_anew(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    out = tmp_path / "c"
    before = fill(images, out)
    copy = tmp_path / "copy"
    shutil.copytree(images, copy, copy_function=shutil.copy)  # of other times
    monkeypatch.setattr(encoding_module, "_encode_shard", lambda *_: pytest.fail("it encodes"))
    read = []
    monkeypatch.setattr(
        Images, "content", lambda self, index, real=Images.content: read.append(index) or real(self, index)
    )
    assert fill(images, out) == before and not read  # the same times: nothing is read
    assert fill(copy, out) == before and sorted(read) == list(range(60))


# ------------------------------------------------------------------------------------------- broken images


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Eight odd files among ten good ones: three of them can be read."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for i in range(10):
        Image.new("RGB", (12, 12), (10 * i,) * 3).save(folder / f"good{i}.png")
    png, jpeg, huge = io.BytesIO(), io.BytesIO(), io.BytesIO()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(png, format="PNG")
    noise.save(jpeg, format="JPEG")
    Image.new("1", (20_000, 20_000)).save(huge, format="PNG")
    crc = bytearray(png.getvalue())
    crc[len(crc) // 2] ^= 0xFF
    for name, content in {
        "zero.png": b"",
        "page.jpg": b"<html>404</html>",
        "cut.jpg": jpeg.getvalue()[:700],
        "crc.png": bytes(crc),
        "huge.png": huge.getvalue(),
    }.items():
        (folder / name).write_bytes(content)
    Image.fromarray(np.full((9, 9), 257 * 100, dtype=np.uint16)).save(folder / "sixteen.png")
    Image.new("CMYK", (9, 9), (0, 0, 0, 155)).save(folder / "cmyk.jpg", quality=95)
    Image.new("P", (9, 9), 0).save(
        folder / "moving.gif", save_all=True, append_images=[Image.new("P", (9, 9))]
    )
    return folder


@pytest.mark.filterwarnings("ignore:.*decompression bomb")
def test_broken_images_are_named_and_left_out_up_to_a_limit(broken: Path, tmp_path: Path) -> None:
    bad = {"zero.png", "page.jpg", "cut.jpg", "crc.png", "huge.png"}
    with pytest.raises(UserError) as caught:
        fill(broken, tmp_path / "none")
    text = str(caught.value)
    assert "5 of 18 images" in text and "--max-bad 5" in text and "and 2 more" in text and "cut.jpg" in text
    with pytest.raises(UserError, match="5 of 18"):
        fill(broken, tmp_path / "c", max_bad=4)
    identity = fill(broken, tmp_path / "c", max_bad=5)
    assert fill(broken, tmp_path / "share", max_bad=0.3) == identity
    lines = [json.loads(line) for line in (tmp_path / "c" / "bad.jsonl").read_text().splitlines()]
    assert {line["path"] for line in lines} == bad and all(line["reason"] for line in lines)
    reasons = {line["path"]: line["reason"] for line in lines}
    assert reasons["zero.png"] == "empty file"
    assert reasons["page.jpg"] == "not an image, or of a format that Pillow does not know"
    latents = LatentCache.open(tmp_path / "c")
    assert len(latents) == 13 and cache.verify(tmp_path / "c")["bad"] == 5
    shards = sorted((tmp_path / "c" / "shards").glob("*/latents.safetensors"))
    names = [open_dataset(broken).name(i) for shard in shards for i in load_file(shard)["indices"].tolist()]
    assert {"sixteen.png", "cmyk.jpg", "moving.gif"} < set(names) and not bad & set(names)
    levels = latents.read(torch.arange(13))[:, 0, 4, 4] * 127.5 + 127.5
    assert abs(levels[names.index("sixteen.png")] - 100) < 1
    assert abs(levels[names.index("good7.png")] - 70) < 1


def test_the_command_and_sigterm_in_it(tmp_path: Path) -> None:
    out = tmp_path / "c"
    command = ("digits", str(out), *DIGITS)
    process = Program("-m", "ldm_dcn.encode", *command, "--batch-size", "1")
    deadline = time.monotonic() + 60
    while not list(out.glob("shards/0*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143, process.stderr
    assert "Traceback" not in process.stderr and 1 <= len(list(out.glob("shards/0*"))) < 18
    finished = run("-m", "ldm_dcn.encode", *command)
    assert finished.poll() == 0, finished.stderr
    assert "1797 images of 10 classes, and their mirror images, as 1x8x8 latents" in finished.stdout
    cache.verify(out)


def test_two_processes_write_the_cache_of_one(tmp_path: Path) -> None:
    texts = [
        done.stdout for done in run_together("-m", "ldm_dcn.encode", "digits", str(tmp_path / "two"), *DIGITS)
    ]
    assert "".join(texts).count("1797 images") == 1
    assert encode.main(["digits", str(tmp_path / "one"), *DIGITS]) == 0
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_the_command_in_this_process(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "c")
    settings = ("--autoencoder", "identity", "--image-size", "8", "--no-flip")
    assert encode.main([str(images), out, *settings]) == 0
    assert encode.main([str(images), out, *settings]) == 0  # nothing to do
    assert encode.main(["--verify", out]) == 0
    assert encode.main(["--measure", out]) == 0
    assert "latents/s (6x8x8 float16" in capsys.readouterr().out
    for arguments, expected in [
        (
            [str(images), out, "--autoencoder", "identity", "--image-size", "8"],
            "preprocessing.flips: false -> true",
        ),
        ([str(images), out, *settings, "--image-size", "16"], "preprocessing.image_size: 8 -> 16"),
        ([str(images), str(images / "a" / "cache"), *settings], "would lie in the images' own folder"),
        ([str(images), str(tmp_path / "new"), *settings, "--captions", "text"], "--text-encoder"),
        (
            [str(tmp_path / "none"), str(tmp_path / "new"), *settings],
            f"IMAGES '{tmp_path / 'none'}' is neither a folder",
        ),
        ([str(images), str(tmp_path / "new"), *settings, "--device", "gpu"], "device 'gpu' cannot be used"),
        (["--verify", str(images)], "no latent cache"),
    ]:
        with pytest.raises(SystemExit) as left:
            encode.main(arguments)
        text = capsys.readouterr().err
        assert left.value.code == 2 and expected in text and text.count("error:") == 1, text
    assert not (tmp_path / "new").exists()


def test_a_changed_autoencoder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import AutoencoderKL

    from ldm_dcn.autoencoder import DIGITS_FOLDER

    changed = AutoencoderKL.from_pretrained(DIGITS_FOLDER)
    torch.nn.init.zeros_(changed.quant_conv.weight)
    changed.save_pretrained(tmp_path / "vae")
    settings = ("--image-size", "32", "--no-flip", "--batch-size", "600")
    out = str(tmp_path / "c")
    small = tmp_path / "images"
    small.mkdir()
    Image.new("L", (32, 32), 99).save(small / "one.png")
    assert encode.main([str(small), out, "--autoencoder", "digits", *settings]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        encode.main([str(small), out, "--autoencoder", str(tmp_path / "vae"), *settings])
    assert "autoencoder.sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("images",), "IMAGES and OUT are needed"),
        (("images", "out", "--max-bad", "-1"), "--max-bad: '-1' is no number from 0 on"),
        (("images", "out", "--shard-size", "0"), "--shard-size: '0' is no whole number above 0"),
        (("a", "b", "--flop"), "--flop"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parse(arguments)
    assert left.value.code == 2 and told in capsys.readouterr().err


def test_the_defaults_are_those_of_the_recipe() -> None:
    options = parse(["a", "b"])
    assert isinstance(options, argparse.Namespace)
    assert (options.image_size, options.flip, options.dtype, options.max_bad) == (256, True, "float16", 0)
