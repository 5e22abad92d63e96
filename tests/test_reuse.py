"""Latents taken over from earlier caches: which pictures are found again, and what becomes of the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ldm_dcn import cache, cache_writer, encode
from ldm_dcn.autoencoder import IdentityAutoencoder
from ldm_dcn.cache import LatentCache
from ldm_dcn.data import open_dataset
from ldm_dcn.encoding import Encoding, encode_shards, finish, make_plan
from ldm_dcn.errors import UserError
from ldm_dcn.images import Images
from ldm_dcn.reuse import EarlierCaches
from ldm_dcn.signals import StopSignals


class CountingAutoencoder(IdentityAutoencoder):
    """Counts the pictures that it is given."""

    encoded = 0

    def encode(self, images: Tensor) -> Tensor:
        self.encoded += len(images)
        return super().encode(images)


class Letters:
    """A text encoder: the first letters of each prompt, and how many prompts it was given."""

    length, width, spec = 5, 2, "letters"
    encoded = 0

    def __init__(self, name: str = "letters") -> None:
        self.name = name

    def fingerprint(self) -> dict[str, str]:
        return {"spec": self.name, "sha256": self.name}

    def encode(self, prompts: list[str]) -> Tensor:
        self.encoded += len(prompts)
        numbers = torch.tensor([[ord(letter) for letter in prompt.ljust(5)[:5]] for prompt in prompts])
        return numbers[:, :, None].expand(-1, -1, 2).float()


def draw(folder: Path, numbers: range, classes: str = "ab") -> Path:
    """One picture a number, always the same; the number decides the class."""
    for i in numbers:
        place = folder / classes[i % len(classes)]
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i:02d}.png")
    return folder


def fill(
    source: Path | str,
    out: Path,
    *reused: Path,
    text: Letters | None = None,
    flips: bool = True,
    dtype: str = "float16",
    image_size: int = 8,
    max_bad: float = 0,
) -> tuple[str, int]:
    """Encode in this process: the cache's identity, and how many pictures went through the autoencoder."""
    dataset = open_dataset(source, image_size=image_size)
    dataset.workers = 1
    if text:
        dataset.use_captions(None)
    autoencoder = CountingAutoencoder(3)
    plan = make_plan(dataset, autoencoder, text, flips=flips, dtype=dtype, shard_size=7)
    earlier = EarlierCaches(reused, plan) if reused else None
    cache_writer.create(out)
    cache_writer.begin(out, plan)
    encoding = Encoding(out, dataset, autoencoder, text, plan, max_bad, 4, earlier=earlier)
    encode_shards(encoding, StopSignals())
    manifest = finish(encoding)
    assert cache.verify(out) == manifest
    return manifest["identity"], autoencoder.encoded // (1 + flips)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return draw(tmp_path / "images", range(30))


# ------------------------------------------------------------------------------------------- good weather


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_data_set_that_grew_and_shrank_is_encoded_where_it_is_new(
    images: Path, tmp_path: Path, dtype: str
) -> None:
    assert fill(images, tmp_path / "old", dtype=dtype)[1] == 30
    for name in ("a/00.png", "b/07.png", "a/28.png"):
        (images / name).unlink()
    draw(images, range(30, 40))
    identity, encoded = fill(images, tmp_path / "new", tmp_path / "old", dtype=dtype)
    assert encoded == 10
    assert (identity, 37) == fill(images, tmp_path / "anew", dtype=dtype)  # the same bits, without --reuse


def test_names_classes_and_order_may_be_others(images: Path, tmp_path: Path) -> None:
    fill(images, tmp_path / "old")
    sorted_anew = tmp_path / "sorted"
    for number, file in enumerate(sorted(images.rglob("*.png"), key=lambda file: file.read_bytes()[-30:])):
        (sorted_anew / "xyz"[number % 3]).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, sorted_anew / "xyz"[number % 3] / f"picture{number}.png")
    identity, encoded = fill(sorted_anew, tmp_path / "new", tmp_path / "old")
    assert encoded == 0
    assert (identity, 30) == fill(sorted_anew, tmp_path / "anew")
    assert LatentCache.open(tmp_path / "new").class_names == ("x", "y", "z")


def test_several_caches_are_merged_and_what_is_in_both_is_taken_once(tmp_path: Path) -> None:
    parts = [draw(tmp_path / "first", range(0, 20)), draw(tmp_path / "second", range(10, 25))]
    for part in parts:
        fill(part, tmp_path / f"{part.name}-cache")
    both = draw(tmp_path / "both", range(26))
    identity, encoded = fill(
        both, tmp_path / "new", tmp_path / "first-cache", tmp_path / "second-cache", flips=True
    )
    assert encoded == 1 and (identity, 26) == fill(both, tmp_path / "anew")
    manifest = cache.verify(tmp_path / "new")
    assert manifest["reused"] == 25 and cache.verify(tmp_path / "anew")["reused"] == 0


def test_without_mirrored_images_those_of_the_earlier_one_are_left_behind(
    images: Path, tmp_path: Path
) -> None:
    fill(images, tmp_path / "old")
    identity, encoded = fill(images, tmp_path / "new", tmp_path / "old", flips=False)
    assert encoded == 0 and (identity, 30) == fill(images, tmp_path / "anew", flips=False)


def test_broken_pictures_that_were_taken_away_cost_nothing_else(images: Path, tmp_path: Path) -> None:
    """As `finish` says: it refuses a cache with too many of them, and what it has is kept."""
    for name in ("a/broken.png", "b/zero.png"):
        (images / name).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"cannot be read.*repair them under the same names"):
        fill(images, tmp_path / "old")
    identity = fill(images, tmp_path / "patient", tmp_path / "old", max_bad=2)[0]
    assert identity == fill(images, tmp_path / "anew", max_bad=2)[0]
    for name in ("a/broken.png", "b/zero.png"):
        (images / name).unlink()
    assert fill(images, tmp_path / "new", tmp_path / "patient")[1] == 0


def test_captions_are_encoded_where_they_changed_and_where_there_were_none(
    images: Path, tmp_path: Path
) -> None:
    for file in images.rglob("*.png"):
        file.with_suffix(".txt").write_text(f"{file.stem} is a picture")
    fill(images, tmp_path / "mute")
    first = Letters()
    said, encoded = fill(images, tmp_path / "old", tmp_path / "mute", text=first)
    assert encoded == 0 and first.encoded == 30 + 1  # the empty prompt
    assert said == fill(images, tmp_path / "anew", text=Letters())[0]
    (images / "a" / "04.txt").write_text("another one")
    (images / "b" / "05.txt").unlink()  # the empty prompt's turn
    again = Letters()
    said, encoded = fill(images, tmp_path / "new", tmp_path / "old", text=again)
    assert encoded == 0 and again.encoded == 2 + 1
    assert said == fill(images, tmp_path / "anew2", text=Letters())[0]
    other = Letters("others")
    assert fill(images, tmp_path / "other", tmp_path / "old", text=other)[1] == 0 and other.encoded == 30 + 1


# ------------------------------------------------------------------------------------------- bad weather


def test_an_unfinished_cache_gives_what_it_has(images: Path, tmp_path: Path) -> None:
    fill(images, tmp_path / "old")
    (tmp_path / "old" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "old" / "shards" / "000000007-000000013")
    (tmp_path / "old" / "shards" / "000000014-000000020" / "latents.safetensors").write_bytes(b"cut off")
    identity, encoded = fill(images, tmp_path / "new", tmp_path / "old")
    assert encoded == 14 and (identity, 30) == fill(images, tmp_path / "anew")
    (tmp_path / "new" / "plan.json").unlink()  # of a copy that lacks it
    assert fill(images, tmp_path / "copy", tmp_path / "new") == (identity, 0)


@pytest.mark.parametrize("file", ["latents.safetensors", "sources.safetensors"])
def test_damage_is_not_taken_over(images: Path, tmp_path: Path, file: str) -> None:
    fill(images, tmp_path / "old")
    shard = tmp_path / "old" / "shards" / "000000007-000000013"
    content = bytearray((shard / file).read_bytes())
    content[-50 if file.startswith("latents") else -1] ^= 1
    (shard / file).write_bytes(content)
    said = {
        "latents.safetensors": rf"does not hold what its hashes say: .*after {shard} was deleted in the second case",
        "sources.safetensors": rf"was changed after it was written.*delete {shard}, and run",
    }
    with pytest.raises(UserError, match=rf"{file} {said[file]}"):
        fill(images, tmp_path / "new", tmp_path / "old")
    shutil.rmtree(shard)
    assert fill(images, tmp_path / "new", tmp_path / "old")[1] == 7


def test_a_cache_that_is_encoded_again_meanwhile_is_not_taken_for_what_it_was(
    images: Path, tmp_path: Path
) -> None:
    fill(images, tmp_path / "old")
    dataset = open_dataset(images, image_size=8)
    plan = make_plan(dataset, CountingAutoencoder(3), None, flips=True, dtype="float16", shard_size=7)
    earlier = EarlierCaches([tmp_path / "old"], plan)
    place = earlier.find(dataset.content(0))
    assert place is not None
    Image.new("RGB", (20, 16), "red").save(images / "a" / "00.png")
    fill(images, tmp_path / "old")
    with pytest.raises(UserError, match="does not hold what its hashes say: it was encoded again meanwhile"):
        earlier.moments(place)
    assert earlier.find(b"") is None and earlier.find(bytes(32)) is None


def test_a_shard_of_broken_pictures_alone_is_passed_over(images: Path, tmp_path: Path) -> None:
    for file in images.rglob("*.png"):
        file.with_suffix(".txt").write_text(file.stem)
    for number in range(0, 14, 2):  # the first shard
        (images / "a" / f"{number:02d}.png").write_bytes(b"no picture")
    said = fill(images, tmp_path / "old", text=Letters(), max_bad=7)[0]
    assert (said, 0) == fill(images, tmp_path / "new", tmp_path / "old", text=Letters(), max_bad=7)


def test_each_picture_is_read_once(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is hashed is what is encoded, whatever becomes of the file meanwhile."""
    read = []
    monkeypatch.setattr(
        Images, "_bytes", lambda self, index, real=Images._bytes: read.append(index) or real(self, index)
    )
    monkeypatch.setattr(Images, "_read", lambda *_: pytest.fail("it is read again"))
    fill(images, tmp_path / "old")
    assert sorted(read) == list(range(30))


def _forget(old: Path) -> None:
    """As earlier versions wrote caches."""
    for shard in (old / "shards").iterdir():
        (shard / "sources.safetensors").unlink()
        manifest = json.loads((shard / "manifest.json").read_text())
        del manifest["files"]["sources.safetensors"]
        (shard / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("prepare", "settings", "expected"),
    [
        (None, {"dtype": "float32"}, r"made otherwise than is asked for \(dtype: .float16. -> .float32.\)"),
        (None, {"image_size": 16}, r"preprocessing.image_size: 8 -> 16"),
        (_forget, {}, "does not say which pictures"),
        (shutil.rmtree, {}, "is no latent cache; name the OUT of an earlier encoding"),
    ],
)
def test_what_cannot_be_taken_over_is_refused(
    images: Path,
    tmp_path: Path,
    prepare: Callable[[Path], object] | None,
    settings: dict[str, object],
    expected: str,
) -> None:
    old = tmp_path / "old"
    fill(images, old)
    if prepare:
        prepare(old)
    with pytest.raises(UserError, match=rf"^--reuse {old}: .*{expected}".replace('"', ".")):
        fill(images, tmp_path / "new", old, **settings)
    assert not (tmp_path / "new").exists()


def test_mirrored_images_that_are_not_there_are_not_made_up(images: Path, tmp_path: Path) -> None:
    fill(images, tmp_path / "old", flips=False)
    with pytest.raises(UserError, match="holds no mirrored images; encode with --no-flip"):
        fill(images, tmp_path / "new", tmp_path / "old")


def test_a_source_without_files_has_nothing_to_find(tmp_path: Path) -> None:
    settings = ("--autoencoder", "identity", "--image-size", "8", "--image-channels", "1")
    assert encode.main(["digits", str(tmp_path / "c"), *settings]) == 0
    shard = next((tmp_path / "c" / "shards").iterdir())
    assert not (shard / "sources.safetensors").exists()


def test_the_command_says_how_to_take_over_and_what_it_took(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    settings = ("--autoencoder", "identity", "--image-size", "8")
    assert encode.main([str(images), old, *settings]) == 0
    draw(images, range(30, 33))
    with pytest.raises(SystemExit):
        encode.main([str(images), old, *settings])
    assert f"name another folder, and give --reuse {old} to take over" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        encode.main([str(images), old, *settings, "--no-flip", "--dtype", "float32"])
    assert "--reuse" not in capsys.readouterr().err  # nothing there is made alike
    with pytest.raises(SystemExit):
        encode.main([str(images), old, *settings, "--reuse", old])
    assert "is OUT itself" in capsys.readouterr().err
    assert encode.main([str(images), new, *settings, "--reuse", old]) == 0
    assert "33 images of 2 classes, and their mirror images, as" in (said := capsys.readouterr().out)
    assert "taken over from earlier caches: 30" in said
    assert encode.main([str(images), new, *settings]) == 0  # --reuse is no part of what a cache is
    sources = load_file(next((tmp_path / "new" / "shards").iterdir()) / "sources.safetensors")
    assert sources["content"].shape == (33, 32) and "captions" not in sources
