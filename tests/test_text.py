"""The text encoder, with a CLIP of a few thousand weights, and captions through the cache."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldm_dcn import cache, encode
from ldm_dcn.cache import LatentCache
from ldm_dcn.errors import UserError
from ldm_dcn.text import load_text_encoder

transformers = pytest.importorskip("transformers")


def tiny_clip(seed: int = 0, hidden_size: int = 8, num_attention_heads: int = 2) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=60,
        hidden_size=hidden_size,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=num_attention_heads,
        max_position_embeddings=6,
        bos_token_id=58,
        eos_token_id=59,
        pad_token_id=59,
    )
    torch.manual_seed(seed)
    return transformers.CLIPTextModel(config)


def write_tokenizer(folder: Path) -> None:
    """Letters, alone and at a word's end: the byte-pair vocabulary at its smallest."""
    letters = "abcdefghijklmnopqrstuvwxyz,."
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {token: i for i, token in enumerate(tokens)} | {"<|startoftext|>": 58, "<|endoftext|>": 59}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 6,
        "pad_token": "<|endoftext|>",
        **names,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's layout: text_encoder/ and tokenizer/."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_clip().save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    return folder


def test_prompts_are_the_same_in_whoevers_autocast(clip: Path) -> None:
    encoder = load_text_encoder(clip)
    plain = encoder.encode(["a red fox"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder.encode(["a red fox"]), plain)


def test_prompts_become_the_last_hidden_state(clip: Path) -> None:
    encoder = load_text_encoder(clip)
    assert (encoder.length, encoder.width) == (6, 8)
    tokens = encoder.encode(["cab", "", "a much too long prompt"])
    assert tokens.shape == (3, 6, 8) and tokens.dtype == torch.float32
    ids = torch.tensor([[58, 2, 0, 29, 59, 59], [58, 59, 59, 59, 59, 59]])
    with torch.no_grad():
        expected = tiny_clip().eval()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(tokens[:2], expected)
    torch.testing.assert_close(encoder.encode(["", "cab"]), tokens[[1, 0]])
    assert encoder.encode([]).shape == (0, 6, 8)
    assert json.loads(json.dumps(encoder.fingerprint())) == encoder.fingerprint()


def test_both_layouts_of_a_folder_are_the_same_encoder(clip: Path, tmp_path: Path) -> None:
    tiny_clip().save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    flat, pipeline = load_text_encoder(tmp_path), load_text_encoder(clip)
    flat.check(pipeline.fingerprint())
    assert torch.equal(flat.encode(["a cab"]), pipeline.encode(["a cab"]))
    tiny_clip(seed=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"its sha256 is .*; use .*pipeline.*, or encode again"):
        load_text_encoder(tmp_path).check(pipeline.fingerprint())


def test_encoders_that_cannot_be_had_are_named(clip: Path, tmp_path: Path) -> None:
    import shutil

    def refused(change: Callable[[Path], object]) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(clip, folder)
        change(folder)
        with pytest.raises(UserError) as caught:
            load_text_encoder(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    weights = Path("text_encoder", "model.safetensors")
    config = Path("text_encoder", "config.json")

    def pickled(folder: Path) -> None:
        (folder / weights).unlink()
        (folder / "text_encoder" / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))

    assert "model.safetensors (never .bin)" in refused(pickled)
    assert not (tmp_path / "executed").exists()
    assert "copy it again" in refused(lambda f: (f / weights).write_bytes((f / weights).read_bytes()[:-100]))
    assert "has no tokenizer.json" in refused(lambda f: shutil.rmtree(f / "tokenizer"))
    assert "copy it again" in refused(lambda f: (f / "tokenizer" / "merges.txt").unlink())
    small = '{"<|startoftext|>": 0, "<|endoftext|>": 1}'
    assert "knows 2 tokens and its model 60" in refused(
        lambda f: (f / "tokenizer" / "vocab.json").write_text(small)
    )
    assert "copy it again" in refused(lambda f: (f / config).write_text('{"architectures"'))
    assert "is a T5EncoderModel; give one of CLIPTextModel" in refused(
        lambda f: (f / config).write_text('{"architectures": ["T5EncoderModel"], "model_type": "t5"}')
    )

    def wider(folder: Path) -> None:
        settings = json.loads((folder / config).read_text())
        (folder / config).write_text(json.dumps({**settings, "num_hidden_layers": 3}))

    assert "do not fit, first at" in refused(wider)
    with pytest.raises(UserError, match="does not exist; give a folder or a hub id"):
        load_text_encoder(tmp_path / "none")


def test_without_the_package_the_mend_is_named(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"`pip install -c constraints\.txt transformers`"):
        load_text_encoder(clip)


def test_captions_are_cached_with_the_latents(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "images", tmp_path / "cache"
    source.mkdir()
    texts = [["a cat", "the cat"], ["dog"], [], ["a cab", "a", "b", "c", "d"]]
    for i, captions in enumerate(texts):
        Image.new("RGB", (8, 8), (50 * i,) * 3).save(source / f"{i}.png")
        (source / f"{i}.txt").write_text("\n".join(captions))
    (source / "1b.png").write_bytes(b"")  # a broken one takes its captions with it
    (source / "1b.txt").write_text("nothing")
    command = [str(source), str(out), "--autoencoder", "identity", "--image-size", "8", "--max-bad", "1"]
    command += ["--text-encoder", str(clip)]
    assert encode.main(command) == 0
    latents, encoder = LatentCache.open(out), load_text_encoder(clip)
    assert latents.text is not None and latents.text.captions.tolist() == [2, 1, 1, 5]
    encoder.check(latents.text.encoder)
    for i, captions in enumerate(texts):
        expected = encoder.encode(captions or [""]).half().float()
        ids = torch.full((len(expected),), i)
        torch.testing.assert_close(
            latents.read_tokens(ids, torch.arange(len(expected))), expected, rtol=2e-3, atol=2e-3
        )
    torch.testing.assert_close(latents.empty_tokens, encoder.encode([""])[0], rtol=2e-3, atol=2e-3)
    cache.verify(out)
    before = latents.identity
    (source / "0.txt").write_text("a rat")
    assert encode.main(command) == 0
    latents = LatentCache.open(out)
    assert latents.text is not None and latents.text.captions.tolist() == [1, 1, 1, 5]
    assert latents.identity != before
    capsys.readouterr()
    with pytest.raises(SystemExit):
        encode.main(command[:-2])
    assert "text" in capsys.readouterr().err


def test_captions_of_ms_coco(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its images in one folder, its captions in one file, as they are downloaded."""
    source, file = tmp_path / "train2014", tmp_path / "annotations" / "captions_train2014.json"
    source.mkdir()
    file.parent.mkdir()
    texts = {391895: ["a cat", "the cat"], 522418: [], 184613: ["a dog"]}
    names = {number: f"COCO_train2014_{number:012}.jpg" for number in texts}
    for number, name in names.items():
        Image.new("RGB", (8, 8), (number % 256,) * 3).save(source / name)
    content = {
        "info": {},
        "images": [{"id": number, "file_name": name} for number, name in names.items()],
        "annotations": [
            {"image_id": number, "id": 1, "caption": text}
            for number, several in texts.items()
            for text in several
        ],
    }
    file.write_text(json.dumps(content))
    options = ["--autoencoder", "identity", "--image-size", "8", "--text-encoder", str(clip)]
    assert encode.main([str(source), str(tmp_path / "cache"), *options, "--captions", str(file)]) == 0
    latents = LatentCache.open(tmp_path / "cache")
    order = [number for number, _ in sorted(names.items(), key=lambda pair: pair[1])]
    assert latents.text is not None
    assert latents.text.captions.tolist() == [max(1, len(texts[number])) for number in order]
    encoder = load_text_encoder(clip)
    which = order.index(391895)
    found = latents.read_tokens(torch.tensor([which, which]), torch.tensor([0, 1]))
    torch.testing.assert_close(found, encoder.encode(["a cat", "the cat"]), rtol=2e-3, atol=2e-3)
    for broken, told in (
        ("{}", "cannot be read as MS-COCO's captions"),
        (
            json.dumps({**content, "images": [{"id": n, "file_name": "other.jpg"} for n in texts]}),
            "names none of",
        ),
    ):
        file.write_text(broken)
        with pytest.raises(SystemExit):
            encode.main([str(source), str(tmp_path / "other"), *options, "--captions", str(file)])
        assert told in capsys.readouterr().err


def test_half_precision_files_alone_will_do(clip: Path, tmp_path: Path) -> None:
    """What a download of a model's fp16 variant leaves."""
    half = tmp_path / "half"
    shutil.copytree(clip, half)
    (weights,) = half.rglob("model.safetensors")
    weights.rename(weights.with_name("model.fp16.safetensors"))
    assert load_text_encoder(half).fingerprint()["sha256"] == load_text_encoder(clip).fingerprint()["sha256"]
