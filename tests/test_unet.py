"""Building, saving and loading U-Nets, and what a broken folder gets."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel, DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file

from ldm_dcn import DCNUNet2DConditionModel, DCNUNet2DModel, apply_swap, build_unet, load_unet, plan_swap
from ldm_dcn.errors import UserError
from ldm_dcn.swap import swapped_sites
from ldm_dcn.unet import load_pretrained_unet
from programs import run as run_program

TINY = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
SWAP = {"sites": ("resnet", "self_attention", "resample"), "group_channels": 8, "mask_init": "uniform"}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_2d() -> UNet2DModel:
    return UNet2DModel(
        in_channels=4,
        out_channels=4,
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def random_weights(unet: torch.nn.Module, seed: int = 5) -> torch.nn.Module:
    """No parameter at its start: a weight that is not loaded shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return unet.eval()


@pytest.fixture(scope="module")
def given() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    return {
        "sample": torch.randn(2, 4, 6, 10, generator=generator),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 1, 12, generator=generator),
    }


def run(unet: torch.nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    if isinstance(unet, UNet2DModel):
        given = {key: value for key, value in given.items() if key != "encoder_hidden_states"}
    with torch.no_grad():
        return unet(**given, return_dict=False)[0]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    random_weights(build_unet(TINY, swap=SWAP)).save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


# ---- building ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("sd_unet", 859_520_964), ("sd_dcn_convs", 565_581_716), ("sd_dcn_full", 551_294_356)],
)
def test_the_papers_networks_have_the_papers_parameter_counts(preset, parameters):
    unet = build_unet(preset, device="meta")
    assert sum(parameter.numel() for parameter in unet.parameters()) == parameters
    assert {parameter.device.type for parameter in unet.parameters()} == {"meta"}
    assert (
        sum(site.parameters_before - site.parameters_after for site in swapped_sites(unet))
        == 859_520_964 - parameters
    )
    # No depthwise convolution, 32 channels a group everywhere.
    assert all(
        site.dw_kernel_size is None and site.channels == 32 * site.groups for site in swapped_sites(unet)
    )


def test_a_config_and_a_swap_build_a_network(given):
    assert type(build_unet(TINY)) is UNet2DConditionModel
    unet = build_unet(TINY, swap=SWAP)
    assert isinstance(unet, DCNUNet2DConditionModel) and len(swapped_sites(unet)) == 16 + 4 + 2
    assert run(unet, given).shape == given["sample"].shape
    assert unet.config.down_block_types == TINY["down_block_types"]


@pytest.mark.parametrize(
    ("config", "swap", "parts"),
    [
        ("sd_dcn_conv", None, ["'sd_dcn_conv'", "did you mean 'sd_dcn_convs'"]),
        ("sd_dcn_convs", SWAP, ["brings its own swap", "sd_unet"]),
        (
            {**TINY, "block_out_chanels": (16, 32)},
            None,
            ["'block_out_chanels'", "did you mean 'block_out_channels'"],
        ),
        ({**TINY, "self": 1}, None, ["'self'"]),
        ({**TINY, "block_out_channels": (16, 32, 64)}, None, ["no U-Net can be built"]),
        (
            {**TINY, "down_block_types": ("NoBlock", "DownBlock2D")},
            None,
            ["no U-Net can be built", "NoBlock"],
        ),
        ({**TINY, "norm_num_groups": 7}, None, ["no U-Net can be built"]),
        (TINY, {"site": "resnet"}, ["unknown swap key 'site'", "did you mean 'sites'"]),
        (TINY, {"unet": None}, ["unknown swap key 'unet'"]),
        (TINY, {"sites": "resnet", "include": "nowhere"}, ["include='nowhere' matches none"]),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused_in_one_line(config, swap, parts):
    with pytest.raises(UserError) as caught:
        build_unet(config, swap=swap, device="meta")
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- save and load -----------------------------------------------------------------------------------------

FRESH_PROCESS = """
import sys
from pathlib import Path
import torch
from ldm_dcn import load_unet
folder = Path(sys.argv[1])
given = torch.load(folder / "given.pt", weights_only=True)
outputs = {}
for name in ("conditional", "unconditional", "plain"):
    unet = load_unet(folder / name)
    inputs = dict(given)
    if name == "unconditional":
        del inputs["encoder_hidden_states"]
    with torch.no_grad():
        outputs[name] = unet(**inputs, return_dict=False)[0]
from diffusers import DDPMPipeline
pipeline = DDPMPipeline.from_pretrained(folder / "pipeline", use_safetensors=True)
pipeline.set_progress_bar_config(disable=True)
with torch.no_grad():
    outputs["pipeline"] = pipeline.unet(given["sample"], given["timestep"], return_dict=False)[0]
torch.save(outputs, folder / "outputs.pt")
"""


def test_a_saved_network_is_the_same_in_a_fresh_process(tmp_path, given):
    torch.manual_seed(0)
    conditional = random_weights(build_unet(TINY, swap=SWAP))
    unconditional = random_weights(apply_swap(tiny := tiny_2d(), plan_swap(tiny, **SWAP)))
    plain = random_weights(build_unet(TINY))
    for name, unet in (("conditional", conditional), ("unconditional", unconditional), ("plain", plain)):
        unet.save_pretrained(tmp_path / name)
        assert sorted(os.listdir(tmp_path / name)) == ["config.json", WEIGHTS]
    DDPMPipeline(unconditional, DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    torch.save(given, tmp_path / "given.pt")
    (tmp_path / "load.py").write_text(FRESH_PROCESS)
    fresh = run_program("load.py", str(tmp_path), folder=tmp_path)
    assert fresh.poll() == 0, fresh.stderr
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    print(
        {
            n: (outputs[n] - run(m, given)).abs().max().item()
            for n, m in (
                ("conditional", conditional),
                ("unconditional", unconditional),
                ("plain", plain),
                ("pipeline", unconditional),
            )
        },
        torch.get_num_threads(),
    )
    assert torch.equal(outputs["conditional"], run(conditional, given))
    assert torch.equal(outputs["unconditional"], run(unconditional, given))
    assert torch.equal(outputs["pipeline"], run(unconditional, given))
    assert torch.equal(outputs["plain"], run(plain, given))


def test_a_loaded_network_knows_its_plan_and_can_be_saved_again(saved, tmp_path, given):
    unet = load_unet(saved)
    original = random_weights(build_unet(TINY, swap=SWAP))
    assert isinstance(unet, DCNUNet2DConditionModel) and not unet.training
    assert swapped_sites(unet) == swapped_sites(original)
    assert unet.config.down_block_types == list(TINY["down_block_types"])
    unet.save_pretrained(tmp_path / "again")
    assert (
        json.loads((tmp_path / "again" / "config.json").read_text())["dcn_swap"]
        == json.loads((saved / "config.json").read_text())["dcn_swap"]
    )
    assert torch.equal(run(load_unet(tmp_path / "again"), given), run(original, given))


def test_channels_last_weights_are_saved_as_any_others(saved, tmp_path):
    unet = load_unet(saved).to(memory_format=torch.channels_last)
    unet.save_pretrained(tmp_path / "last")
    loaded = load_unet(tmp_path / "last").state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in unet.state_dict().items())


def test_from_config_makes_a_twin(given):
    unet = build_unet(TINY, swap=SWAP)
    twin = type(unet).from_config(unet.config)
    assert swapped_sites(twin) == swapped_sites(unet)
    twin.load_state_dict(unet.state_dict())
    assert torch.equal(run(twin.eval(), given), run(unet.eval(), given))


def test_subfolder_dtype_and_shards(tmp_path, given):
    unet = random_weights(build_unet(TINY, swap=SWAP))
    unet.save_pretrained(tmp_path / "pipeline" / "unet", max_shard_size="50kB")
    assert len(list((tmp_path / "pipeline" / "unet").glob("*.safetensors"))) > 1
    loaded = load_unet(tmp_path / "pipeline", subfolder="unet")
    assert torch.equal(run(loaded, given), run(unet, given))
    low = load_unet(tmp_path / "pipeline", subfolder="unet", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}


def test_diffusers_own_loading_works_through_the_swapped_class(saved, given):
    expected = run(random_weights(build_unet(TINY, swap=SWAP)), given)
    for options in ({}, {"low_cpu_mem_usage": False}):
        assert torch.equal(run(DCNUNet2DConditionModel.from_pretrained(saved, **options), given), expected)


def test_plain_diffusers_refuses_a_swapped_folder(saved):
    """Else it would warn of missing convolutions, fill them with random numbers or nothing, and go on."""
    for options in (
        {},
        {"low_cpu_mem_usage": False},
        {"low_cpu_mem_usage": False, "ignore_mismatched_sizes": True},
    ):
        with pytest.raises(ValueError, match=r"ldm_dcn\.load_unet"):
            UNet2DConditionModel.from_pretrained(saved, **options)
    with pytest.raises(ValueError, match="DCNUNet2DConditionModel"):
        AutoModel.from_pretrained(saved)


# ---- broken folders ----------------------------------------------------------------------------------------


def refused(*parts: str, folder: Path, **options) -> None:
    with pytest.raises(UserError) as caught:
        load_unet(folder, **options)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_missing_things_are_named(saved, tmp_path):
    refused("no such folder", "nowhere", folder=tmp_path / "nowhere")
    refused("no such folder", "vae", folder=tmp_path, subfolder="vae")
    refused("no config.json", folder=tmp_path)
    (saved / WEIGHTS).unlink()
    refused(f"no {WEIGHTS}", "never a pickle", folder=saved)


def test_a_pickle_is_never_opened(saved):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (saved / "exploded",))

    (saved / WEIGHTS).unlink()
    (saved / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused("only safetensors", folder=saved)
    with pytest.raises(OSError):
        DCNUNet2DConditionModel.from_pretrained(saved)
    assert not (saved / "exploded").exists()


@pytest.mark.parametrize("keep", [0, 4, 1000, -10])
def test_truncated_weights_are_refused(saved, keep):
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[:keep])
    refused("cannot load", str(saved), folder=saved)


def test_a_damaged_config_is_refused(saved):
    text = (saved / "config.json").read_text()
    (saved / "config.json").write_text(text[: len(text) // 2])
    refused("config.json is damaged", folder=saved)
    (saved / "config.json").write_text("[]")
    refused("config.json is damaged", folder=saved)
    for changes, part in (
        ({"_class_name": "AutoencoderKL"}, "AutoencoderKL"),
        ({"dcn_swap": {"version": 99, "sites": []}}, "version 1"),
        ({"dcn_swap": {"version": 1, "sites": [{"name": "conv_in"}]}}, "not a swap site"),
        ({"down_block_types": ["NoBlock", "DownBlock2D"]}, "NoBlock"),
    ):
        (saved / "config.json").write_text(text)
        edit_config(saved, **changes)
        refused(part, folder=saved)


def test_weights_of_another_network_are_refused(saved):
    tensors = load_file(saved / WEIGHTS)
    name = "down_blocks.0.resnets.0.conv1.dcn.value_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, saved / WEIGHTS)
    refused("do not fit", "1 missing keys", name, folder=saved)
    save_file({**tensors, "more": torch.zeros(1)}, saved / WEIGHTS)
    refused("do not fit", "1 unexpected keys", "more", folder=saved)
    save_file({**tensors, name: torch.zeros(3, 3)}, saved / WEIGHTS)
    refused(name, folder=saved)


def test_a_hub_id_that_cannot_be_had_is_named(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", offline)
    monkeypatch.chdir(tmp_path)
    refused("somebody/some-unet", "no such folder here", folder="somebody/some-unet")


def test_the_swapped_classes_are_still_diffusers_own():
    assert issubclass(DCNUNet2DConditionModel, UNet2DConditionModel) and issubclass(
        DCNUNet2DModel, UNet2DModel
    )


def test_half_precision_files_alone_will_do(tmp_path: Path) -> None:
    """What a download of a pipeline's fp16 variant leaves; training wants its weights in fp32."""
    unet = build_unet(TINY)
    unet.half().save_pretrained(tmp_path / "unet", variant="fp16")
    loaded = load_pretrained_unet(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for p, own in zip(loaded.parameters(), unet.parameters(), strict=True):
        assert torch.equal(p, own.float())


def test_a_single_file_is_told_how_to_become_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "v1-5-pruned.safetensors"
    file.touch()
    with pytest.raises(UserError, match=r"is a single file; give a folder.*from_single_file\('v1-5-pruned"):
        load_pretrained_unet(file)


def test_what_is_no_place_or_type_is_refused(tmp_path):
    for place, text in (
        (None, "is no folder or hub id"),
        (3, "is no folder or hub id"),
        ("x" * 300, "too long"),
    ):
        with pytest.raises(UserError, match=text):
            load_unet(place)
    with pytest.raises(UserError, match=r"give a torch\.dtype, such as torch\.float16"):
        load_unet(tmp_path, dtype="float16")
    build_unet(TINY).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for damaged, text in (
        ("[" * 100_000, "config.json is damaged"),
        (json.dumps({**config, "down_block_types": [1, 2]}), "cannot load a U-Net from"),
    ):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(UserError, match=text):
            load_unet(tmp_path)


def test_diffusers_ema_model_saves_and_loads(tmp_path: Path) -> None:
    """As diffusers' own training scripts keep their averages."""
    from diffusers.training_utils import EMAModel

    unet = random_weights(build_unet(TINY, swap=SWAP))
    average = EMAModel(unet.parameters(), model_cls=type(unet), model_config=unet.config)
    average.save_pretrained(str(tmp_path / "ema"))
    again = EMAModel.from_pretrained(str(tmp_path / "ema"), type(unet))
    assert again.decay == average.decay and len(again.shadow_params) == len(list(unet.parameters()))
    for ours, theirs in zip(again.shadow_params, unet.parameters(), strict=True):
        assert torch.equal(ours, theirs)
