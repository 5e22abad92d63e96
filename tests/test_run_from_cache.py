"""From images to a cache to a run: labels, flips, captions, and a pretrained text-to-image network that is swapped."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import sample
from eval import throughput
from ldm_dcn import encode, metrics, randomness
from ldm_dcn.cache import LatentCache
from ldm_dcn.config import Config
from ldm_dcn.data import open_dataset
from ldm_dcn.errors import UserError
from ldm_dcn.export import load_model
from ldm_dcn.opening import open_run
from ldm_dcn.sampling import generate
from ldm_dcn.trainer import train
from ldm_dcn.unet import build_unet, load_unet
from programs import ROOT, environment, run
from tiny import UNET, tiny_config, write_config

pytestmark = pytest.mark.usefixtures("one_thread_and_a_fresh_accelerator")


def losses(config: Config) -> list[float]:
    return [line["loss"] for line in metrics.read(config.folder / "metrics.jsonl")]


def encoded(source: str | Path, out: Path, *options: str) -> Path:
    command = [str(source), str(out), "--autoencoder", "identity", "--image-size", "8", "--shard-size", "500"]
    assert encode.main([*command, *options]) == 0
    return out


@pytest.fixture(scope="module")
def digits_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoded("digits", tmp_path_factory.mktemp("cache") / "digits", "--image-channels", "1", "--flip")


@pytest.mark.parametrize("split", ["all", "train", "held-out"])
def test_a_cache_trains_what_the_images_train(digits_cache: Path, tmp_path: Path, split: str) -> None:
    settings = ("train.steps=3", f"data.split={split}")
    direct = tiny_config(tmp_path, *settings, name="direct")
    cached = tiny_config(tmp_path, *settings, f"data.source={digits_cache}", "data.flip=false", name="cached")
    assert [train(direct), train(cached)] == [0, 0]
    assert losses(cached) == pytest.approx(losses(direct), rel=1e-3)  # the cache is fp16


def test_every_other_image_is_mirrored_as_a_function_of_its_position(
    digits_cache: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, f"data.source={digits_cache}", "train.batch_size=200")
    digits = open_dataset("digits", image_size=8, image_channels=1)
    with open_run(config) as run:
        ids = run.batches.order[run.batches.positions(3, 0)]
        latents, images = run.batches.at(3, 0).latents, digits.images(ids)
        straight = (latents - images).abs().amax((1, 2, 3)) < 0.01
        mirrored = (latents - images.flip(-1)).abs().amax((1, 2, 3)) < 0.01
        assert bool((straight | mirrored).all())
        assert 0.4 < float((mirrored & ~straight).float().mean()) < 0.6
        assert torch.equal(run.batches.at(3, 0).latents, latents)


def test_a_run_does_not_go_on_with_another_cache(digits_cache: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    encoded("digits", cache, "--image-channels", "1", "--flip")
    config = tiny_config(tmp_path, "train.steps=2", f"data.source={cache}")
    assert train(config) == 0
    subprocess.run(["rm", "-r", str(cache)], check=True)
    encoded("digits", cache, "--image-channels", "1", "--no-flip")
    with pytest.raises(UserError, match=r"was trained on another state of .*bring the data back"):
        train(config)


def test_another_autoencoder_than_the_caches_is_refused(digits_cache: Path, tmp_path: Path) -> None:
    overrides = ("autoencoder=digits", f"data.source={digits_cache}", "data.image_size=32")
    with pytest.raises(UserError, match="is not the one these latents were made with"):
        train(tiny_config(tmp_path, *overrides))


def test_pixels_of_another_number_of_channels_name_the_setting(digits_cache: Path, tmp_path: Path) -> None:
    overrides = (f"data.source={digits_cache}", "data.image_channels=3")
    with pytest.raises(UserError, match=r"its latent_channels is 3, theirs 1; set data.image_channels=1"):
        train(tiny_config(tmp_path, *overrides))


def test_the_network_of_a_cache_can_be_timed(digits_cache: Path, tmp_path: Path) -> None:
    """As a study does after its runs: the cache says how many classes there are."""
    subject = throughput.open_subject(str(write_config(tmp_path)), [f"data.source={digits_cache}"])
    assert subject.model.num_classes == 10


# ------------------------------------------------------------------------------------------------ text


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion's layout, small: unet/, text_encoder/, tokenizer/."""
    pytest.importorskip("transformers")
    from test_text import tiny_clip, write_tokenizer

    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(3)
    build_unet(UNET).save_pretrained(folder / "unet")
    tiny_clip().save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def captioned(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark and bright squares, two captions each, in a cache."""
    source = tmp_path_factory.mktemp("captioned") / "images"
    source.mkdir()
    rng = np.random.default_rng(0)
    for i in range(24):
        bright = i % 2
        pixels = rng.integers(0, 60, (8, 8), dtype=np.uint8) + np.uint8(180 * bright)
        Image.fromarray(pixels).save(source / f"{i:02}.png")
        (source / f"{i:02}.txt").write_text("day\nsun" if bright else "night\nmoon")
    return encoded(source, source.parent / "cache", "--image-channels", "1", "--text-encoder", str(pipeline))


def test_a_batch_holds_one_of_each_images_captions(captioned: Path, tmp_path: Path) -> None:
    config = text_config(captioned, tmp_path, "train.batch_size=400", "train.label_dropout=0.25")
    cache = LatentCache.open(captioned)
    with open_run(config) as run:
        ids, tokens = run.batches.order[run.batches.positions(2, 0)], run.batches.at(2, 0).condition
        assert tokens.shape == (400, 6, 8)
        empty = (tokens == cache.empty_tokens).flatten(1).all(1)
        assert float(empty.float().mean()) == pytest.approx(0.25, abs=0.07)
        both = [cache.read_tokens(ids, torch.full_like(ids, which)) for which in (0, 1)]
        first, second = ((tokens == own).flatten(1).all(1) for own in both)
        assert bool((first | second | empty).all())
        assert 0.3 < float(first[~empty].float().mean()) < 0.7


def text_config(cache: Path, folder: Path, *overrides: str, name: str = "tiny") -> Config:
    settings = (f"data.source={cache}", "data.condition=text", "train.label_dropout=0.1")
    return tiny_config(folder, *settings, *overrides, name=name)


@pytest.fixture(scope="module")
def trained(pipeline: Path, captioned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The same pipeline with a U-Net that has learnt its captions, and the loss that it came to."""
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = ("model.unet=null", f"model.pretrained={pipeline}", "train.lr=4e-3", "train.steps=150")
    config = text_config(
        captioned, tmp_path_factory.mktemp("trained"), *settings, "train.ema_decay=0.9", "train.save_every=0"
    )
    assert train(config) == 0
    shutil.copytree(config.folder / "export" / "unet", config.folder / "pipeline" / "unet")
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(pipeline / part, config.folder / "pipeline" / part)
    return config.folder / "pipeline", float(np.mean(losses(config)[-50:]))


def test_a_swapped_text_to_image_network_fine_tunes_exports_and_draws_elsewhere(
    trained: tuple[Path, float], captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrained, its_loss = trained
    config = text_config(
        captioned,
        tmp_path,
        "model.unet=null",
        f"model.pretrained={pretrained}",
        "model.swap={sites: [resnet], group_channels: 4}",
        "train.match_steps=20",
        "train.new_only_steps=30",
        "train.steps=60",
        "train.lr=4e-3",
        "train.save_every=25",
        "train.sample_every=60",
        "sample.prompts=[day, night]",
        "data.split=train",
        "train.validate_every=20",
        "train.validation_images=8",
    )
    assert train(config) == 0
    lines = metrics.read(config.folder / "metrics.jsonl")
    validated = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    assert list(validated) == [40, 60] and validated[60] < validated[40]  # none while blocks match
    by_phase = {
        phase: [line["loss"] for line in lines if "loss" in line and line.get("phase") == phase]
        for phase in ("match", "new", None)
    }
    assert by_phase["match"][-1] < 0.6 * by_phase["match"][0]
    assert np.mean(by_phase["new"]) < 3 * its_loss  # an untrained one starts at 10 times
    assert np.mean(by_phase[None][-20:]) < 1.5 * its_loss
    grid = Image.open(config.folder / "samples" / "step-60.png")
    assert grid.size == (2 * 64, 2 * 64)

    model = load_model(config.folder)
    assert model.num_classes == 0 and model.text_encoder is not None
    prompts = ["day", "night", ""]
    expected = generate(model, model.encode_prompts(prompts), [0, 1, 2], steps=4, guidance=2.0)
    program = (
        "import sys, numpy as np\n"
        "from ldm_dcn import LatentDiffusion\n"
        "pipe = LatentDiffusion.from_pretrained(sys.argv[1])\n"
        "pictures = pipe(prompts=['day', 'night', ''], steps=4, guidance=2.0)\n"
        "np.save(sys.argv[2], np.stack([np.array(p) for p in pictures]))\n"
    )
    out = tmp_path / "pictures.npy"
    (tmp_path / "draw.py").write_text(program)
    drawn = run("draw.py", str(config.folder / "export"), str(out), folder=tmp_path)
    assert drawn.poll() == 0, drawn.stderr
    assert np.array_equal(np.load(out), expected[:, 0].numpy())

    # and in diffusers' own pipeline, from the same noise
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    theirs = StableDiffusionPipeline(
        vae=AutoencoderKL(
            in_channels=1, out_channels=1, latent_channels=1, block_out_channels=(4,), norm_num_groups=2
        ),
        text_encoder=CLIPTextModel.from_pretrained(pretrained / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(pretrained / "tokenizer"),
        unet=load_unet(config.folder / "export", subfolder="unet"),
        scheduler=DPMSolverMultistepScheduler.from_pretrained(config.folder / "export" / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    latents = theirs(
        prompts,
        height=8,
        width=8,
        num_inference_steps=4,
        guidance_scale=2.0,
        latents=randomness.normal((1, 8, 8), 0, "image", [0, 1, 2]),
        output_type="latent",
    ).images
    levels = (expected.float() - (latents.clamp(-1, 1) + 1) * 127.5).abs()
    assert float(levels.median()) < 1

    grid = tmp_path / "grid.png"
    options = ["--prompts", "day", "night", "--seeds", "0-2", "--steps", "2", "--grid", str(grid)]
    assert sample.main([str(config.folder), *options]) == 0
    assert Image.open(grid).size == (3 * 64, 2 * 64)
    (tmp_path / "prompts.txt").write_text("day\nnight\n")
    options[:3] = ["--prompts-file", str(tmp_path / "prompts.txt")]
    options[-1] = str(tmp_path / "again.png")
    assert sample.main([str(config.folder), *options]) == 0
    assert (tmp_path / "again.png").read_bytes() == grid.read_bytes()
    with pytest.raises(UserError, match="takes prompts, not labels"):
        sample.main([str(config.folder), "--labels", "3"])
    capsys.readouterr()


def test_prompts_do_not_go_to_a_model_of_classes(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "train.steps=1")
    assert train(config) == 0
    with pytest.raises(UserError, match="takes no prompts; it knows 10 classes"):
        sample.main([str(config.folder), "--prompts", "day"])


def test_a_text_encoder_of_another_width_is_refused(pipeline: Path, captioned: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokens have 8 channels.*set model.unet.cross_attention_dim=8"):
        train(text_config(captioned, tmp_path, "model.unet.cross_attention_dim=16"))


# ------------------------------------------------------------------------------------------- Stable Diffusion itself


def memory_available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


def program(*arguments: object) -> None:
    """A program of ours in a process of its own; its output is told where it fails."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow(why="needs 17 GiB of memory, 20 GB of disk and some minutes")
@pytest.mark.timeout(3000)
def test_stable_diffusions_own_network_is_swapped_fine_tuned_exported_and_drawn_with(tmp_path: Path) -> None:
    """configs/sd15_dcn_finetune.yaml through all its phases, by the commands of docs/training.md: a pipeline's folder with
    the U-Net of the real config and random weights, 860 M parameters of which 566 M are left; on 64x64 images."""
    if memory_available() < 17 * 2**30:
        pytest.skip("less than 17 GiB of memory available")
    pytest.importorskip("transformers")
    from diffusers import AutoencoderKL

    from test_text import tiny_clip, write_tokenizer

    pipeline, cache, pictures = (tmp_path / name for name in ("pipeline", "cache", "pictures"))
    torch.manual_seed(0)
    tiny_clip(hidden_size=768, num_attention_heads=12).save_pretrained(pipeline / "text_encoder")
    write_tokenizer(pipeline / "tokenizer")
    AutoencoderKL(
        block_out_channels=(16,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
    ).save_pretrained(pipeline / "vae")
    build_unet("sd_unet").save_pretrained(pipeline / "unet")
    pictures.mkdir()
    for i, caption in enumerate(("day", "night") * 4):
        pixels = np.random.default_rng(i).integers(180 * (1 - i % 2), 60 + 180 * (1 - i % 2), (64, 64, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(caption)

    models = ("--autoencoder", pipeline, "--text-encoder", pipeline)
    program("-m", "ldm_dcn.encode", pictures, cache, "--image-size", 64, *models)
    program(
        "train.py",
        "configs/sd15_dcn_finetune.yaml",
        f"model.pretrained={pipeline}",
        f"autoencoder={pipeline}",
        f"data.source={cache}",
        "data.image_size=64",
        f"run.dir={tmp_path}",
        "train.batch_size=4",
        "train.warmup_steps=1",
        "train.match_steps=6",
        "train.new_only_steps=9",
        "train.steps=12",
        "train.log_every=1",
        "train.sample_every=12",
        "sample.prompts=[day, night]",
        "sample.images_per_class=1",
        "sample.steps=2",
        "sample.batch_size=2",
    )
    run = tmp_path / "sd15_dcn_finetune"
    lines = metrics.read(run / "metrics.jsonl")
    assert [line.get("phase") for line in lines] == ["match"] * 6 + ["new"] * 3 + [None] * 3
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert lines[5]["loss"] < lines[0]["loss"]  # what the new blocks miss the old ones' outputs by
    card = (run / "export" / "README.md").read_text()
    assert "44" in card and "565" in card

    grid = tmp_path / "grid.png"
    options = ["--steps", 2, "--guidance", 7.5, "--batch-size", 2, "--seeds", 0, "--grid", grid]
    program("sample.py", run / "export", "--prompts", "day", "night", *options)
    drawn = np.asarray(Image.open(run / "samples" / "step-12.png")).astype(int)
    assert drawn.std() > 1
    assert np.array_equal(np.asarray(Image.open(grid)), drawn)
