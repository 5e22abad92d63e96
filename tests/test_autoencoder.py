"""The autoencoder room: every door it loads through, one scale, one uint8 formula, and clear refusals."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from ldm_dcn import autoencoder as room
from ldm_dcn.autoencoder import load_autoencoder, to_uint8
from ldm_dcn.errors import UserError

SMALL = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
    "scaling_factor": 0.5,
}


@pytest.fixture(scope="module")
def small() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**SMALL).eval()


@pytest.fixture(scope="module")
def folder(small: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("autoencoder")
    small.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def ldm_layout(model: AutoencoderKL) -> dict[str, torch.Tensor]:
    """The state dict of the original latent-diffusion code with the same weights."""
    levels = len(model.config.block_out_channels)
    renamed = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in (("down_blocks.", "down."), (".resnets.", ".block."), (".downsamplers.0.", ".downsample."),
                             (".upsamplers.0.", ".upsample."), ("mid_block.block.0", "mid.block_1"),
                             ("mid_block.block.1", "mid.block_2"), ("mid_block.attentions.0", "mid.attn_1"),
                             ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"), ("group_norm", "norm"),
                             ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):  # fmt: skip
            name = name.replace(ours, theirs)
        if ".up_blocks." in name:
            level, rest = name.split(".up_blocks.")[1].split(".", 1)
            name = f"decoder.up.{levels - 1 - int(level)}.{rest}"
        attention = ".attn_1." in name and name.endswith("weight") and ".norm." not in name
        renamed[name] = tensor[:, :, None, None] if attention else tensor  # 1x1 convolutions there
    return renamed


# --------------------------------------------------------------------------------------------------- uint8


def test_uint8_undoes_the_float_scale_for_every_level_and_clamps():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)
    assert to_uint8(torch.tensor([1.2, -1.2, 0.0, 0.9999])).tolist() == [
        255,
        0,
        128,
        255,
    ]  # no wrapping, no truncation
    assert to_uint8(torch.tensor([0.5], dtype=torch.bfloat16)).tolist() == [191]


def test_uint8_refuses_nan_and_names_the_image():
    batch = torch.zeros(3, 1, 2, 2)
    batch[2, 0, 1, 1] = float("nan")
    with pytest.raises(ValueError, match=r"images \[2\]"):
        to_uint8(batch)


# --------------------------------------------------------------------------------------------------- doors


def layouts(small: AutoencoderKL, folder: Path, place: Path) -> dict[str, Path]:
    """The same weights in every layout that is taken."""
    pipeline = place / "pipeline"
    shutil.copytree(folder, pipeline / "vae")
    single = place / "single"
    single.mkdir()
    shutil.copy(folder / "config.json", single)
    weights, original = small.state_dict(), {k: v.contiguous() for k, v in ldm_layout(small).items()}
    save_file(weights, single / "diffusers.safetensors")
    torch.save(weights, single / "diffusers.bin")
    torch.save(original, single / "raw.pth")
    torch.save({"state_dict": original, "global_step": 7}, single / "lightning.ckpt")
    save_file(original, single / "raw.safetensors")
    save_file({f"first_stage_model.{k}": v for k, v in original.items()} | {"model.diffusion_model.x": torch.zeros(1)},
              single / "whole_model.safetensors")  # fmt: skip
    names = ("diffusers.safetensors", "diffusers.bin", "raw.pth", "lightning.ckpt", "raw.safetensors",
             "whole_model.safetensors")  # fmt: skip
    return {"folder": folder, "pipeline": pipeline, **{name: single / name for name in names}}


def test_every_layout_is_the_same_autoencoder(small, folder, images, tmp_path):
    with torch.no_grad():
        expected = small.encode(images).latent_dist.parameters
    hashes = set()
    for name, path in layouts(small, folder, tmp_path).items():
        loaded = load_autoencoder(path)
        moments = loaded.encode(images)
        assert moments.shape == (2, 8, 8, 12) and moments.dtype == torch.float32
        torch.testing.assert_close(
            moments, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
        hashes.add(loaded.fingerprint()["sha256"])
    assert len(hashes) == 1


def test_a_lone_file_is_read_with_stable_diffusions_config(monkeypatch, small, folder, tmp_path):
    """The shipped config is Stable Diffusion's; here a small one takes its place, so that the weights stay small."""
    config = json.loads((room.SD_CONFIG_FOLDER / "config.json").read_text())
    assert config["scaling_factor"] == 0.18215 and config["block_out_channels"] == [128, 256, 512, 512]
    with torch.device("meta"):
        sd = AutoencoderKL.from_config(config)
    assert sum(p.numel() for p in sd.parameters()) == 83_653_863
    monkeypatch.setattr(room, "SD_CONFIG_FOLDER", folder)
    torch.save(ldm_layout(small), tmp_path / "autoencoder_kl.pth")
    assert load_autoencoder(tmp_path / "autoencoder_kl.pth").fingerprint()["scaling_factor"] == 0.5


# --------------------------------------------------------------------------------------------------- scale


def test_latents_and_decode_follow_the_config(small, folder, images, tmp_path):
    torch.manual_seed(0)
    noise = torch.randn(2, 4, 8, 12)
    plain = load_autoencoder(folder)
    moments = plain.encode(images)
    mean, logvar = moments.chunk(2, 1)
    torch.testing.assert_close(plain.latents(moments, noise), 0.5 * (mean + torch.exp(0.5 * logvar) * noise))

    def variant(**entries):
        path = tmp_path / "_".join(entries)
        shutil.copytree(folder, path)
        config = json.loads((path / "config.json").read_text()) | entries
        (path / "config.json").write_text(json.dumps(config))
        return load_autoencoder(path)

    shifted = variant(shift_factor=0.25)
    torch.testing.assert_close(shifted.latents(moments, noise * 0), 0.5 * (mean - 0.25))
    means, stds = [0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 4.0, 8.0]
    channelwise = variant(latents_mean=means, latents_std=stds)
    by_hand = torch.stack([(mean[:, i] - means[i]) * 0.5 / stds[i] for i in range(4)], 1)
    torch.testing.assert_close(channelwise.latents(moments, noise * 0), by_hand)
    with torch.no_grad():
        expected = small.decode(mean).sample.clamp(-1, 1)
    for autoencoder in (plain, shifted, channelwise):  # whatever the scale, decode undoes it
        decoded = autoencoder.decode(autoencoder.latents(moments, noise * 0))
        torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("entries", "wanted"),
    [
        ({"scaling_factor": None}, "scaling_factor None; it takes a number above 0"),
        ({"scaling_factor": "abc"}, "scaling_factor 'abc'; it takes a number above 0"),
        ({"scaling_factor": 0}, "scaling_factor 0; it takes a number above 0"),
        ({"scaling_factor": [1]}, r"scaling_factor \[1\]; it takes a number above 0"),
        ({"shift_factor": "abc"}, "shift_factor 'abc'; it takes a number"),
        ({"latents_mean": [1.0, 2.0, 3.0]}, "latents_mean .*; it takes 4 numbers"),
        ({"latents_mean": [1.0, 2.0, 3.0, "x"]}, "latents_mean .*; it takes 4 numbers"),
        ({"latents_std": [1.0, 2.0, 3.0, 0.0]}, "latents_std .*; it takes 4 numbers above 0"),
        ({"latents_std": 3.0}, "latents_std 3.0; it takes 4 numbers above 0"),
    ],
)
def test_a_scale_that_is_none_is_refused_by_name(folder, tmp_path, entries, wanted):
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text()) | entries
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"its config.json has {wanted}"):
        load_autoencoder(tmp_path / "copy")


def test_quantised_weights_are_refused(folder, small, tmp_path):
    weights = small.state_dict()
    name = "decoder.conv_in.weight"
    shutil.copytree(folder, tmp_path / "copy")
    for path in (tmp_path / "copy" / "diffusion_pytorch_model.safetensors", tmp_path / "file.safetensors"):
        save_file({**weights, name: weights[name].to(torch.int8)}, path)
        with pytest.raises(UserError, match=rf"holds quantised weights \({name} is \w+8\)"):
            load_autoencoder(path.parent if path.parent.name == "copy" else path)


def test_identity_gives_pixels_back_exactly(images):
    identity = load_autoencoder("identity", image_channels=3)
    moments = identity.encode(images)
    assert torch.equal(identity.decode(identity.latents(moments, torch.randn(images.shape))), images)
    assert (identity.factor, identity.latent_channels) == (1, 3)


def test_dtype_comes_from_the_config_and_overflow_is_refused(folder, images, tmp_path):
    assert load_autoencoder(folder).dtype == torch.float32
    assert load_autoencoder(folder, dtype="bfloat16").encode(images).dtype == torch.float32
    with pytest.raises(UserError, match="force_upcast"):
        load_autoencoder(folder, dtype="float16")
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    config = json.loads((own / "config.json").read_text()) | {
        "force_upcast": False,
        "torch_dtype": "bfloat16",
    }
    (own / "config.json").write_text(json.dumps(config))
    assert load_autoencoder(own).dtype == torch.bfloat16
    assert load_autoencoder(own).fingerprint()["dtype"] == "bfloat16"
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "diffusion_pytorch_model.safetensors")
    weights["encoder.conv_in.bias"][0] = float("inf")
    save_file(weights, broken / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="NaN or infinity"):
        load_autoencoder(broken).encode(images)


def test_a_mismatch_is_refused_by_name(folder, tmp_path):
    own = load_autoencoder(folder)
    remembered = json.loads(json.dumps(own.fingerprint()))  # as a run stores it
    own.check(remembered)
    own.check(remembered | {"spec": "somewhere/else"})
    for key, value in (
        ("scaling_factor", 0.18215),
        ("shift_factor", 0.1),
        ("dtype", "bfloat16"),
        ("sha256", "0" * 64),
    ):
        with pytest.raises(UserError, match=key):
            own.check(remembered | {key: value})
    with pytest.raises(UserError, match="autoencoder=digits"):
        own.check(load_autoencoder("digits").fingerprint())


# --------------------------------------------------------------------------------------------------- refusals


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL_FOLDER"],)


def test_bad_files_get_one_line_that_names_them(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL_FOLDER", str(tmp_path / "was_run"))
    good = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    cases: dict[str, tuple[Path, str]] = {}

    def case(name: str, content: bytes | None, mend: str) -> None:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        cases[name] = path, mend

    case("missing.safetensors", None, "does not exist")
    case("truncated.safetensors", good[: len(good) // 2], "again")
    case("empty.pth", b"", "again")
    case("junk.ckpt", b"<html>not found</html>", "again")
    case("pickle.pth", pickle.dumps(Evil()), "safetensors")
    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    cases["evil.ckpt"] = tmp_path / "evil.ckpt", "safetensors"
    torch.save([1, 2, 3], tmp_path / "list.pth")
    cases["list.pth"] = tmp_path / "list.pth", "state dict"
    save_file({"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "part.safetensors")
    cases["part.safetensors"] = tmp_path / "part.safetensors", "config.json"
    shutil.copytree(folder, tmp_path / "truncated_folder")
    (tmp_path / "truncated_folder" / "diffusion_pytorch_model.safetensors").write_bytes(good[:-100])
    cases["truncated_folder"] = tmp_path / "truncated_folder", "again"
    (tmp_path / "no_weights").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "no_weights")
    cases["no_weights"] = tmp_path / "no_weights", "safetensors"
    (tmp_path / "no_config").mkdir()
    cases["no_config"] = tmp_path / "no_config", "config.json"
    (tmp_path / "other_class").mkdir()
    (tmp_path / "other_class" / "config.json").write_text('{"_class_name": "VQModel"}')
    cases["other_class"] = tmp_path / "other_class", "AutoencoderKL"
    shutil.copytree(folder, tmp_path / "lacking")
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    del weights["decoder.conv_in.weight"]
    save_file(weights, tmp_path / "lacking" / "diffusion_pytorch_model.safetensors")
    cases["lacking"] = tmp_path / "lacking", "decoder.conv_in.weight"
    for name, (path, mend) in cases.items():
        with pytest.raises(UserError) as caught:
            load_autoencoder(path)
        text = str(caught.value)
        assert name in text and mend in text and "\n" not in text and len(text) < 600, text
    assert not (tmp_path / "was_run").exists()


def test_a_hub_id_without_a_network_says_so(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"nobody/no-such-autoencoder.*hub id"):
        load_autoencoder("nobody/no-such-autoencoder")


def test_wrong_images_are_refused(folder, images):
    autoencoder = load_autoencoder(folder)
    with pytest.raises(ValueError, match="takes 3"):
        autoencoder.encode(images[:, :1])
    with pytest.raises(ValueError, match="multiples of 2"):
        autoencoder.encode(images[:, :, :, :-1])
    with pytest.raises(ValueError, match="dtype"):
        load_autoencoder(folder, dtype="float8")


# --------------------------------------------------------------------------------------------------- the shipped one


def test_shipped_digits_autoencoder_keeps_the_digits():
    from eval.extractors import load_extractor
    from ldm_dcn.data import open_dataset

    digits = open_dataset("digits", image_size=32, image_channels=1, split="held-out")
    images = digits.images(range(len(digits)))
    autoencoder = load_autoencoder("digits")
    assert (autoencoder.image_channels, autoencoder.latent_channels, autoencoder.factor) == (1, 4, 4)
    moments = autoencoder.encode(images)
    latents = autoencoder.latents(
        moments, torch.randn(len(images), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    )
    assert latents.shape == (len(images), 4, 8, 8)
    assert abs(latents.std().item() - 1) < 0.05
    back = autoencoder.decode(latents)
    assert (back - images).square().mean().item() < 0.004  # 30 dB
    classifier = load_extractor("digits")
    with torch.no_grad():
        right = (
            (classifier.logits(classifier(to_uint8(back))).argmax(1) == digits.labels).float().mean().item()
        )
    assert right >= 0.96


def test_shipped_files_are_small():
    files = [*room.ASSETS.rglob("*"), *(room.ASSETS.parents[1] / "eval" / "assets").rglob("*")]
    assert sum(file.stat().st_size for file in files if file.is_file()) <= 2**20


def test_the_script_that_made_it_runs_again(tmp_path, capsys):
    from ldm_dcn import make_digits_autoencoder

    make_digits_autoencoder.main(["--out", str(tmp_path / "made"), "--steps", "4"])
    assert "dB" in capsys.readouterr().out
    made = load_autoencoder(tmp_path / "made")
    assert made.fingerprint()["sha256"] != load_autoencoder("digits").fingerprint()["sha256"]
    assert made.encode(torch.zeros(1, 1, 32, 32)).shape == (1, 8, 8, 8)


def test_half_precision_files_alone_will_do(tmp_path):
    """What a download of a pipeline's fp16 variant leaves."""
    AutoencoderKL(**SMALL).half().save_pretrained(tmp_path / "vae", variant="fp16")
    assert [path.name for path in (tmp_path / "vae").glob("*.safetensors")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    loaded = load_autoencoder(str(tmp_path))
    assert loaded.dtype == torch.float32 and loaded.factor == 2 ** (len(SMALL["block_out_channels"]) - 1)
