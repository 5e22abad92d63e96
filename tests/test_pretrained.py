"""What a run reads of the network it begins from, what it must agree with, and what it says of the rest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

from ldm_dcn import hub
from ldm_dcn.autoencoder import load_autoencoder
from ldm_dcn.config import Config
from ldm_dcn.denoiser import Denoiser
from ldm_dcn.diffusion import Schedule
from ldm_dcn.errors import UserError
from ldm_dcn.opening import open_run
from ldm_dcn.pretrained import Pretrained, check_pretrained, check_text, load_pretrained, read_class_embedding
from ldm_dcn.trainer import train
from ldm_dcn.unet import build_unet
from tiny import UNET, tiny_config

SWAP = "model.swap={sites: [resnet], group_channels: 4}"
SCHEDULE = vars(Schedule())


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on ten classes, with flow matching."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = tiny_config(tmp_path_factory.mktemp("run"), "train.steps=2", "diffusion.prediction=flow")
    assert train(config) == 0
    return config.folder


def begun(folder: Path, source: Path | str, *overrides: str) -> Config:
    settings = ("model.unet=null", f"model.pretrained={source}", "diffusion.prediction=flow", "train.steps=1")
    return tiny_config(folder, *settings, "train.lr=1e-12", *overrides)


def embedding(folder: Path) -> torch.Tensor:
    return load_file(folder / "export" / "class_embedding" / "model.safetensors")["weight"]


def told(capsys: pytest.CaptureFixture[str], what: str = "class embedding") -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if what in line and "\r" not in line]


# ------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize("part", ["", "export"])
def test_an_export_is_read_with_its_class_embedding(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    """By the run's name, or the folder's; and a step at a rate of nothing draws what the first run draws."""
    config = begun(tmp_path, run / part)
    assert train(config) == 0
    assert told(capsys) == [f"the class embedding is that of {run / part}: 10 classes"]
    torch.testing.assert_close(embedding(config.folder), embedding(run), rtol=0, atol=1e-9)
    assert train(begun(tmp_path, run / part, "train.steps=2")) == 0  # the resume does not begin there again
    assert told(capsys) == []


def test_a_swapped_export_is_read_with_its_class_embedding(run: Path, tmp_path: Path) -> None:
    first = begun(tmp_path, run, SWAP, "run.name=first")
    assert train(first) == 0
    second = begun(tmp_path, first.folder, "model.swap=null", "run.name=second")
    assert train(second) == 0
    torch.testing.assert_close(embedding(second.folder), embedding(run), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("classes", "knows"), [(12, "12 classes"), (0, "no classes")])
def test_of_other_classes_the_row_that_means_none_is_kept(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], classes: int, knows: str
) -> None:
    config = begun(tmp_path, run, f"data.num_classes={classes}")
    assert train(config) == 0
    (line,) = told(capsys)
    assert line.startswith(
        "the class embedding is new" + (", but for its row that means none" if classes else "")
    )
    assert line.endswith(f": {run} knows 10 classes, the run {knows}")
    new, old = embedding(config.folder), embedding(run)
    assert new.shape == (classes + 1, 8)
    torch.testing.assert_close(new[-1], old[-1], rtol=0, atol=1e-9)
    assert not (new[:-1, None] == old[None]).all(-1).any()


def test_a_pipeline_has_no_class_embedding_and_the_run_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_unet(UNET).save_pretrained(tmp_path / "sd" / "unet")
    assert train(begun(tmp_path, tmp_path / "sd")) == 0
    assert told(capsys) == [f"the class embedding is new: {tmp_path / 'sd'} has none"]


def test_after_text_the_class_embedding_is_new() -> None:
    unet = build_unet(UNET)
    pretrained = Pretrained("mine", unet, text_encoder={"spec": "clip"})
    assert read_class_embedding(Denoiser(unet, 3), pretrained) == (
        True,
        "the class embedding is new: mine knows text",
    )


def test_a_class_embedding_that_was_read_waits_while_the_new_blocks_learn_alone(
    run: Path, tmp_path: Path
) -> None:
    for classes, learns in ((10, False), (12, True)):
        settings = (f"data.num_classes={classes}", f"run.name=of{classes}", "train.new_only_steps=1")
        with open_run(begun(tmp_path, run, SWAP, *settings)) as opened:
            assert opened.phase == "new" and opened.embedding_is_new is learns
            assert opened.denoiser.class_embedding.weight.requires_grad is learns


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.match_steps=1", "train.match_steps=1 and model.swap=null: no block is swapped"),
        ("train.new_only_steps=1", "train.new_only_steps=1 and nothing of .* is new; set model.swap"),
    ],
)
def test_phases_without_new_blocks_are_refused(
    run: Path, tmp_path: Path, override: str, expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        train(begun(tmp_path, run, override))


def test_a_new_class_embedding_alone_may_learn_first(run: Path, tmp_path: Path) -> None:
    config = begun(tmp_path, run, "data.num_classes=12", "train.new_only_steps=1", "train.lr=1e-2")
    assert train(config) == 0
    for name, tensor in load_file(run / "export" / "unet" / "diffusion_pytorch_model.safetensors").items():
        new = load_file(config.folder / "export" / "unet" / "diffusion_pytorch_model.safetensors")[name]
        assert torch.equal(new, tensor)


# ------------------------------------------------------------------------------------------- what must agree


def test_a_flow_export_is_not_taken_for_another_prediction(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"predicts flow, and .*=noise; set diffusion.prediction=flow, or"):
        train(begun(tmp_path, run, "diffusion.prediction=noise"))
    alone = begun(tmp_path, run / "export" / "unet", "diffusion.prediction=noise")
    assert train(alone) == 0


def test_other_noise_levels_are_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(begun(tmp_path, run, "diffusion.num_steps=500")) == 0
    assert told(capsys, "warning") == [
        f"warning: {run} was trained under other noise levels (num_steps 1000, here 500), and has to learn these"
    ]


def test_what_a_pipelines_folder_says_is_compared(tmp_path: Path) -> None:
    build_unet(UNET).save_pretrained(tmp_path / "unet")
    DDPMScheduler(beta_end=0.03).save_pretrained(tmp_path / "scheduler")
    AutoencoderKL(latent_channels=4, block_out_channels=(32,), scaling_factor=0.5).save_pretrained(
        tmp_path / "vae"
    )
    pretrained = load_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=r"latents of its own autoencoder.*\(scaling_factor 0.5, here "):
        check_pretrained(pretrained, SCHEDULE, load_autoencoder("digits"))
    own = load_autoencoder(str(tmp_path))
    (line,) = check_pretrained(pretrained, SCHEDULE, own)
    assert (
        "(beta_schedule linear, here scaled_linear, beta_start 0.0001, here 0.00085, beta_end 0.03, " in line
    )
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(UserError, match="predicts flow"):
        check_pretrained(load_pretrained(str(tmp_path)), SCHEDULE, own)
    assert check_pretrained(load_pretrained(str(tmp_path / "unet")), SCHEDULE, own) == []


def test_stable_diffusions_own_settings_are_those_of_the_base_config(tmp_path: Path) -> None:
    """Its scheduler_config.json and vae/config.json, as published, raise no warning."""
    build_unet(UNET).save_pretrained(tmp_path / "unet")
    published = {"_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    published |= {
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    }
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(published))
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(32,), scaling_factor=0.18215)
    vae.save_pretrained(tmp_path / "vae")
    assert check_pretrained(load_pretrained(str(tmp_path)), SCHEDULE, load_autoencoder(str(tmp_path))) == []


def test_another_autoencoder_is_refused_by_scale_and_said_by_weights() -> None:
    digits, identity = load_autoencoder("digits"), load_autoencoder("identity")
    of_digits = Pretrained("mine", build_unet(UNET), autoencoder=digits.fingerprint())
    assert check_pretrained(of_digits, SCHEDULE, digits) == []
    with pytest.raises(
        UserError, match=r"latents of autoencoder digits, and autoencoder=identity makes others \(class "
    ):
        check_pretrained(of_digits, SCHEDULE, identity)
    retrained = Pretrained("mine", build_unet(UNET), autoencoder={**digits.fingerprint(), "sha256": "0"})
    (line,) = check_pretrained(retrained, SCHEDULE, digits)
    assert line.startswith("warning: mine was trained on the latents of other weights than")


def test_another_text_encoder_is_said() -> None:
    clip = {"spec": "clip", "length": 77, "sha256": "0", "dtype": "float32"}
    mine = Pretrained("mine", build_unet(UNET), text_encoder=clip)
    assert check_text(mine, {**clip, "spec": "moved", "dtype": "float16"}) == []
    (line,) = check_text(mine, {**clip, "spec": "other", "sha256": "1"})
    assert (
        line
        == "warning: mine was trained with the text encoder clip, and has to learn the tokens of other, another one"
    )
    of_classes = Pretrained("mine", build_unet(UNET), embedding=torch.zeros(11, 8))
    assert check_text(of_classes, clip) == ["warning: mine knows 10 classes, and has to learn text"]


# ------------------------------------------------------------------------------------------- what is none


def test_a_damaged_export_is_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run / "export", copy)
    weights = copy / "class_embedding" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model.safetensors has \d+ bytes instead of"):
        train(begun(tmp_path, copy))


def test_a_network_without_a_condition_is_refused(tmp_path: Path) -> None:
    channels = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    UNet2DModel(in_channels=1, out_channels=1, sample_size=8, **channels, **blocks).save_pretrained(
        tmp_path / "ddpm"
    )
    with pytest.raises(UserError, match="ddpm is a UNet2DModel, which takes no condition; give a UNet2DCond"):
        train(begun(tmp_path, tmp_path / "ddpm"))


def test_an_export_on_the_hub_is_read_as_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def one_file(hub_id: str, name: str, local_files_only: bool) -> str:
        if not (run / "export" / name).exists():
            raise OSError("404")
        return str(run / "export" / name)

    monkeypatch.setattr(hub, "ask", lambda _: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one_file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(run / "export"))
    pretrained = load_pretrained("somebody/model")
    assert torch.equal(pretrained.embedding, embedding(run)) and pretrained.schedule["prediction"] == "flow"


def test_two_classes_of_one_image_each_are_enough(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 100, np.uint8)).save(tmp_path / "pictures" / name / "0.png")
    assert train(begun(tmp_path, run, f"data.source={tmp_path / 'pictures'}")) == 0
    assert told(capsys)[0].endswith("knows 10 classes, the run 2 classes")
