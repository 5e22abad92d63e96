"""The swap: what is found, what is replaced, and that the swapped network works as the plain one did."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.downsampling import Downsample2D
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dcnv4_ext import DCNv4, DCNv4Conv
from ldm_dcn import (
    DCNUNet2DConditionModel,
    DCNUNet2DModel,
    Site,
    apply_swap,
    build_unet,
    load_unet,
    plan_swap,
    swap_table,
)
from ldm_dcn.errors import UserError
from ldm_dcn.layers import DCNv4Mixer, to_nchw, to_nhwc
from ldm_dcn.swap import swapped_sites

ALL = ("resnet", "self_attention", "resample")


def conditional(**changes) -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**config, **changes})


def unconditional(**changes) -> UNet2DModel:
    torch.manual_seed(0)
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DModel(**{**config, **changes})


def swapped(unet: nn.Module, sites=ALL, group_channels: int = 8, **options) -> nn.Module:
    torch.manual_seed(1)
    return apply_swap(unet, plan_swap(unet, sites, group_channels, **options))


def wake(unet: nn.Module) -> nn.Module:
    """Give every offset and mask predictor weights, so that the deformation itself is under test."""
    generator = torch.Generator().manual_seed(2)
    for module in unet.modules():
        if isinstance(module, DCNv4):
            weight, bias = module.offset_mask.weight, module.offset_mask.bias
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
                bias.add_(torch.randn(bias.shape, generator=generator) * 0.2)
    return unet


def inputs(unet: nn.Module, height: int = 8, width: int = 8, batch: int = 2) -> dict:
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(batch, 4, height, width, generator=generator)
    given = {"sample": sample, "timestep": torch.arange(batch) * 100}
    if isinstance(unet, UNet2DConditionModel):
        given["encoder_hidden_states"] = torch.randn(batch, 1, 12, generator=generator)
    return given


def run(unet: nn.Module, **given) -> torch.Tensor:
    return unet(**given, return_dict=False)[0]


# ---- what is found -----------------------------------------------------------------------------------------


def test_the_sites_of_stable_diffusion():
    unet = build_unet("sd_unet", device="meta")
    counts = {kind: len(plan_swap(unet, kind)) for kind in ALL}
    assert counts == {"resnet": 44, "self_attention": 16, "resample": 6}
    first = plan_swap(unet)[0]
    assert first == Site(
        name="down_blocks.0.resnets.0.conv1",
        kind="resnet",
        channels=320,
        out_channels=320,
        groups=10,
        parameters_before=9 * 320 * 320 + 320,
        parameters_after=2 * (320 * 320 + 320)
        + 272 * 321,  # value and output projection; 27 * 10 rounded up to 272 rows
    )
    strides = {site.name: site.stride for site in plan_swap(unet, "resample")}
    assert all(stride == (2 if "downsamplers" in name else 1) for name, stride in strides.items())


def test_a_plan_changes_nothing():
    unet = conditional()
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    plan_swap(unet, ALL)
    assert type(unet) is UNet2DConditionModel and "dcn_swap" not in unet.config
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


def test_sites_are_json():
    plan = plan_swap(
        conditional(),
        ALL,
        8,
        kernel_size=5,
        mask_init="center",
        offset_scale=2.0,
        dw_kernel_size=3,
        softmax=True,
    )
    assert [
        Site.from_json(fields) for fields in json.loads(json.dumps([site.to_json() for site in plan]))
    ] == plan
    with pytest.raises(UserError, match="offset_scal"):
        Site.from_json({**plan[0].to_json(), "offset_scal": 1.0})
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan[0].kind = "resample"


def test_the_group_width_gives_way_where_it_does_not_divide():
    groups = {
        (site.channels, site.channels // site.groups) for site in plan_swap(conditional(), "resnet", 24)
    }
    assert groups == {(16, 16), (32, 16), (48, 24), (64, 16)}


def test_include_and_exclude():
    unet = conditional()
    down = plan_swap(unet, ("resnet", "self_attention"), include=r"^down_blocks", exclude=[r"conv2$"])
    assert [site.name for site in down] == [
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.1.resnets.0.conv1",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
    ]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            {"sites": "resample"},
            ["'resample' matches nothing", "10 of resnet (down_blocks.0.resnets.0.conv1"],
        ),
        ({"sites": "resnets"}, ["'resnets'", "did you mean 'resnet'", "self_attention"]),
        ({"sites": ()}, ["sites is empty"]),
        (
            {"include": "down_block.0"},
            ["include='down_block.0' matches none", "down_blocks.0.resnets.0.conv1"],
        ),
        ({"include": ["conv1", "conv9"]}, ["include='conv9' matches none"]),
        ({"exclude": "conv3"}, ["exclude='conv3' matches none"]),
        ({"exclude": "conv"}, ["leave nothing of sites='resnet'"]),
        ({"include": "("}, ["not a regular expression"]),
        ({"kernel_size": 4}, ["kernel_size=4", "odd"]),
        ({"group_channels": 0}, ["group_channels=0"]),
        ({"mask_init": "ones"}, ["'ones'", "down_blocks.0.resnets.0.conv1"]),
        ({"mask_init": {"resnt": "zero"}}, ["'resnt'", "did you mean 'resnet'"]),
        ({"dw_kernel_size": 2}, ["dw_kernel_size", "odd"]),
        ({"dw_kernel_size": "3"}, ["dw_kernel_size='3'", "odd"]),
        ({"sites": 3}, ["sites=3", "give a list of some of resnet"]),
        ({"sites": None}, ["sites=None", "give a list of some of resnet"]),
        ({"sites": [["resnet"]]}, ["sites=[['resnet']]", "give a list of some of resnet"]),
        ({"mask_init": 3}, ["mask_init=3", "uniform, zero or center"]),
        ({"mask_init": ["zero"]}, ["mask_init=['zero']", "uniform, zero or center"]),
        ({"softmax": "maybe"}, ["softmax='maybe'", "true or false"]),
        ({"remove_center": "no"}, ["remove_center='no'", "true or false"]),
        ({"offset_scale": float("nan")}, ["offset_scale=nan", "finite"]),
        ({"offset_scale": True}, ["offset_scale=True", "finite"]),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused_in_one_line(options, parts):
    unet = conditional(
        block_out_channels=(16,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    with pytest.raises(UserError) as caught:
        plan_swap(unet, **options)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_networks_are_refused():
    with pytest.raises(UserError, match="Linear"):
        plan_swap(nn.Linear(2, 2))


# ---- what is replaced --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "cls"), [(conditional, DCNUNet2DConditionModel), (unconditional, DCNUNet2DModel)]
)
def test_apply_replaces_the_sites_and_keeps_all_other_weights(make, cls):
    unet = make()
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    plan = plan_swap(unet, ALL, 8)
    assert apply_swap(unet, plan) is unet and isinstance(unet, cls)
    for site in plan:
        layer = unet.get_submodule(site.name)
        assert isinstance(layer, DCNv4Mixer if site.kind == "self_attention" else DCNv4Conv)
        assert sum(parameter.numel() for parameter in layer.parameters()) == site.parameters_after
    places = tuple(f"{site.name}." for site in plan)
    after = unet.state_dict()
    kept = [key for key in before if not key.startswith(places)]
    assert kept and all(torch.equal(after[key], before[key]) for key in kept)
    assert set(after) - set(kept) == {key for key in after if key.startswith(places)}
    # The attentions on maps bring a norm, which stays: same name, same weights.
    norms = [key for key in before if key.startswith(places) and "group_norm" in key]
    assert len(norms) == (0 if make is conditional else 8)
    assert all(torch.equal(after[key], before[key]) for key in norms)
    assert swapped_sites(unet) == plan


def test_new_layers_take_dtype_device_and_mode_of_the_old():
    unet = swapped(conditional().to(torch.bfloat16).eval())
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in unet.modules())
    with torch.device("meta"):
        empty = conditional()
    assert {parameter.device.type for parameter in swapped(empty).parameters()} == {"meta"}


def test_a_plan_that_does_not_fit_leaves_the_network_alone():
    plan = plan_swap(conditional(), ALL)
    wider = conditional(block_out_channels=(16, 64))
    keys = set(wider.state_dict())
    with pytest.raises(
        UserError, match=r"does not fit.*down_blocks.1.resnets.0.conv1 maps 16 to 64 channels"
    ):
        apply_swap(wider, plan)
    shallow = conditional(
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    with pytest.raises(UserError, match=r"it has no down_blocks\.1"):
        apply_swap(shallow, plan)
    assert set(wider.state_dict()) == keys and type(wider) is UNet2DConditionModel


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path):
    """What JSON cannot hold would stop diffusers in the middle of config.json, over a good one."""
    plan = plan_swap(
        conditional(),
        "resnet",
        np.int64(8),
        kernel_size=np.int64(3),
        dw_kernel_size=np.int64(3),
        offset_scale=np.float32(2),
    )
    assert plan == plan_swap(conditional(), "resnet", 8, dw_kernel_size=3, offset_scale=2.0)
    other = dataclasses.replace(plan[0], groups=np.int64(2), offset_scale=np.float32(0.5))
    assert type(other.groups) is int and type(other.offset_scale) is float
    unet = apply_swap(conditional(), [other, *plan[1:]])
    unet.save_pretrained(tmp_path)
    assert swapped_sites(load_unet(tmp_path)) == [other, *plan[1:]]
    for wrong in (dict(groups=2.0), dict(softmax=1), dict(kind="zzz"), dict(parameters_before="many")):
        with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
            dataclasses.replace(plan[0], **wrong)
        with pytest.raises(UserError, match=r"not a swap site.*" + next(iter(wrong))):
            Site.from_json({**plan[0].to_json(), **wrong})


def test_a_plan_is_a_list_of_sites_each_once_that_keep_the_maps():
    plan = plan_swap(conditional(), ALL)
    wrong = {
        "give the list of sites that plan_swap returns": (None, "resnet", [site.to_json() for site in plan]),
        f"names {plan[0].name} twice": ([*plan, plan[0]],),
        "would change the size of its map": (
            [dataclasses.replace(plan[0], stride=2)],
            [dataclasses.replace(plan[0], padding=0)],
            [dataclasses.replace(next(site for site in plan if site.kind == "self_attention"), dilation=2)],
            [dataclasses.replace(next(site for site in plan if "downsamplers" in site.name), stride=1)],
        ),
    }
    unet = conditional()
    keys = set(unet.state_dict())
    for text, plans in wrong.items():
        for given in plans:
            with pytest.raises(UserError, match=text):
                apply_swap(unet, given)
    assert set(unet.state_dict()) == keys and type(unet) is UNet2DConditionModel
    # A wider reach that keeps the size is a choice.
    apply_swap(unet, [dataclasses.replace(plan[0], dilation=2, padding=2)])


def test_swaps_add_up_and_none_is_done_twice():
    unet = conditional()
    first = plan_swap(unet, "resnet", 8)
    apply_swap(unet, first)
    with pytest.raises(UserError, match="sites='resnet' matches nothing"):
        plan_swap(unet, "resnet", 8)
    with pytest.raises(UserError, match="swapped already"):
        apply_swap(unet, first)
    second = plan_swap(unet, "self_attention", 8)
    apply_swap(unet, second)
    assert swapped_sites(unet) == [*first, *second]
    assert run(unet, **inputs(unet)).isfinite().all()


def test_the_table_tells_what_changed():
    unet = conditional()
    plan = plan_swap(unet, ("resnet", "self_attention"), 8)
    before = sum(parameter.numel() for parameter in unet.parameters())
    planned = swap_table(unet, plan)
    apply_swap(unet, plan)
    after = sum(parameter.numel() for parameter in unet.parameters())
    table = swap_table(unet)
    assert table == planned
    assert f"{before:,}" in table.splitlines()[-1] and f"{after:,}" in table.splitlines()[-1]
    assert all(site.name in table and f"{site.parameters_after:,}" in table for site in plan)
    with pytest.raises(UserError, match="nothing was swapped"):
        swap_table(conditional())


# ---- the swapped network works -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [conditional, unconditional])
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("padding", [0, 1])
def test_every_kind_on_a_map_that_is_not_square(make, kind, padding):
    unet = make(downsample_padding=padding)
    given = inputs(unet, 6, 10)
    shape = run(unet, **given).shape
    wake(swapped(unet, kind))
    output = run(unet, **given)
    assert output.shape == shape and output.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 5},
        {"kernel_size": 1},
        {"dw_kernel_size": 3},
        {"softmax": True},
        {"remove_center": True},
    ],
)
def test_options_reach_the_operator_and_keep_the_sizes(options):
    unet = conditional()
    given = inputs(unet, 7, 6)  # odd: the upsampling convolutions see sizes that are no multiple of two
    shape = run(unet, **given).shape
    sites = ("resnet", "self_attention") if options.get("kernel_size") == 1 else ALL
    wake(swapped(unet, sites, **options))
    assert run(unet, **given).shape == shape


def test_resnet_downsamplers_and_skip_blocks_are_swapped_too():
    unet = unconditional(
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
    )
    assert "down_blocks.0.downsamplers.0.conv1" in [site.name for site in plan_swap(unet)]
    assert run(wake(swapped(unet, ("resnet", "self_attention"))), **inputs(unet)).isfinite().all()
    skip = unconditional(
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        block_out_channels=(32, 64),
        in_channels=3,
        out_channels=3,
    )
    swapped(skip, ("resnet", "self_attention"))
    assert run(skip, sample=torch.randn(1, 3, 8, 8), timestep=3).isfinite().all()


def test_a_convolution_with_two_names_is_one_site():
    unet = unconditional()
    unet.down_blocks[0].downsamplers[0] = Downsample2D(16, use_conv=True, name="conv")  # also its Conv2d_0
    names = [site.name for site in swapped_sites(swapped(unet, "resample"))]
    assert names == ["down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv"]
    downsampler = unet.down_blocks[0].downsamplers[0]
    assert isinstance(downsampler.conv, DCNv4Conv) and downsampler.conv is downsampler.Conv2d_0


def test_the_attentions_of_k_blocks_are_swapped_too():
    unet = conditional(  # the shape of Stable Diffusion's latent upscaler
        block_out_channels=(32, 32, 64, 64),
        down_block_types=(
            "KDownBlock2D",
            "KCrossAttnDownBlock2D",
            "KCrossAttnDownBlock2D",
            "KCrossAttnDownBlock2D",
        ),
        up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        mid_block_type=None,
        norm_num_groups=None,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        attention_head_dim=8,
    )
    names = [site.name for site in plan_swap(unet, "self_attention")]
    assert names and all(name.endswith("attn1") for name in names)
    given = inputs(unet, 16, 32)
    shape = run(unet, **given).shape
    assert run(wake(swapped(unet, ("resnet", "self_attention"))), **given).shape == shape


def test_everything_before_a_swapped_convolution_trains_from_the_first_step():
    unet = swapped(unconditional(), ALL)
    run(unet, **inputs(unet)).square().mean().backward()
    asleep = {
        name
        for name, parameter in unet.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    }
    # Asleep for one step are the residual branches that start at zero: in a mixer, all but its mask.
    inside = {f"{site.name}." for site in swapped_sites(unet) if site.kind == "self_attention"}
    assert {name for name in asleep if not name.startswith(tuple(inside))} == set()
    mixer = "mid_block.attentions.0."
    assert f"{mixer}dcn.value_proj.weight" in asleep and f"{mixer}dcn.offset_mask.weight" not in asleep

    uniform = swapped(unconditional(), ALL, mask_init="uniform")
    run(uniform, **inputs(uniform)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in uniform.parameters())

    official = swapped(unconditional(), "resnet", mask_init="zero")
    run(official, **inputs(official)).square().mean().backward()
    assert not official.down_blocks[0].resnets[0].norm1.weight.grad.any()


def test_a_few_steps_learn():
    unet = swapped(conditional(), ("resnet", "self_attention"))
    given = inputs(unet)
    target = torch.randn(given["sample"].shape, generator=torch.Generator().manual_seed(4))
    optimiser = torch.optim.AdamW(unet.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = (run(unet, **given) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


# ---- the mixer knows its map -------------------------------------------------------------------------------


def test_a_mixer_on_tokens_is_dcnv4_on_the_map():
    mixer = wake(DCNv4Mixer(16, 16, groups=2, mask_init="uniform"))
    x = torch.randn(2, 6, 10, 16)
    expected = mixer.dcn(x).flatten(1, 2)
    torch.testing.assert_close(mixer(x.flatten(1, 2), spatial_shape=(6, 10)), expected, rtol=0, atol=0)
    torch.testing.assert_close(mixer(to_nchw(x)), to_nchw(mixer.dcn(x)), rtol=0, atol=0)
    other = mixer(x.flatten(1, 2), spatial_shape=(10, 6))  # as many tokens, another map
    assert not torch.allclose(other, expected)


def test_transformers_tell_the_mixers_their_map():
    unet = swapped(conditional(), "self_attention")
    seen: list[tuple[int, int]] = []
    for module in unet.modules():
        if isinstance(module, DCNv4):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    run(unet, **inputs(unet, 6, 12))
    assert seen == [(6, 12), (3, 6), (6, 12), (6, 12)]  # down, middle, two going up


def test_checkpointed_blocks_see_the_map_of_their_own_forward_pass():
    """Two maps with as many tokens go through before the first gradient: a shape kept on a module is old."""
    plain = wake(swapped(conditional(), mask_init="uniform")).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.enable_gradient_checkpointing()
    gradients = []
    for unet in (plain, checkpointed):
        wide, tall = run(unet, **inputs(unet, 4, 16)), run(unet, **inputs(unet, 16, 4))
        (wide.square().sum() + tall.sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in unet.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_a_mixer_refuses_what_it_cannot_do():
    mixer = DCNv4Mixer(16, 16, groups=2)
    tokens = torch.randn(1, 16, 16)
    with pytest.raises(ValueError, match="spatial_shape"):
        mixer(tokens)
    with pytest.raises(ValueError, match="attention mask"):
        mixer(tokens, attention_mask=torch.ones(1, 16), spatial_shape=(4, 4))
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        mixer(tokens, encoder_hidden_states=tokens, spatial_shape=(4, 4))


def test_the_remaining_attentions_keep_their_switches(caplog):
    unet = wake(
        swapped(conditional(), "self_attention", include="down_blocks|mid_block", mask_init="uniform")
    ).eval()
    given = inputs(unet, 6, 4)
    with torch.no_grad():
        expected = run(unet, **given)
        # The mixers count as no attention: four cross-attentions, and the two self-attentions that stayed.
        assert (
            len(unet.attn_processors) == sum(isinstance(module, Attention) for module in unet.modules()) == 6
        )
        with caplog.at_level(logging.WARNING, logger="diffusers"):
            logging.getLogger("diffusers").addHandler(caplog.handler)
            try:
                run(unet, **given, cross_attention_kwargs={})
            finally:
                logging.getLogger("diffusers").removeHandler(caplog.handler)
        assert "spatial_shape" not in caplog.text
        for switch in (
            lambda: unet.set_attn_processor(AttnProcessor()),
            lambda: unet.set_attention_slice("max"),
            lambda: unet.set_default_attn_processor(),
            lambda: unet.fuse_qkv_projections(),
        ):
            switch()
            torch.testing.assert_close(run(unet, **given), expected, rtol=1e-4, atol=1e-5)


# ---- memory layout, precision, compilation -----------------------------------------------------------------


class CopyCounter(TorchDispatchMode):
    """Counts the operators that write a copy of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in (
            "clone",
            "copy_",
            "_to_copy",
            "contiguous",
            "_reshape_copy",
            "_unsafe_view",
        ):
            self.copies.append(str(func))
        return func(*args, **(kwargs or {}))


def test_channels_last_maps_go_in_and_out_without_a_copy():
    x = torch.randn(2, 16, 6, 10).to(memory_format=torch.channels_last)
    assert to_nhwc(x).is_contiguous() and to_nhwc(x).data_ptr() == x.data_ptr()
    for layer in (DCNv4Conv(16, 16, groups=2), DCNv4Mixer(16, 16, groups=2)):
        layer.dcn = nn.Identity()
        with CopyCounter() as counter:
            y = layer(x)
        assert counter.copies == []
        assert y.data_ptr() == x.data_ptr() and y.shape == x.shape
        assert y.is_contiguous(memory_format=torch.channels_last)
        contiguous = x.contiguous()
        with CopyCounter() as counter:
            layer(contiguous)
        assert len(counter.copies) == 1


@pytest.mark.parametrize("make", [conditional, unconditional])
def test_channels_last_and_contiguous_give_the_same(make):
    unet = wake(swapped(make())).double().eval()  # offsets amplify the rounding of the layers before them
    given = {
        key: value.double() if value.is_floating_point() else value
        for key, value in inputs(unet, 6, 10).items()
    }
    with torch.no_grad():
        expected = run(unet, **given)
        unet.to(memory_format=torch.channels_last)
        last = run(unet, **{**given, "sample": given["sample"].to(memory_format=torch.channels_last)})
    torch.testing.assert_close(last, expected)


@pytest.mark.parametrize("make", [conditional, unconditional])
def test_bfloat16_by_weights_and_by_autocast(make):
    unet = swapped(make(), mask_init="uniform")
    given = inputs(unet)
    expected = run(unet, **given).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run(unet, **given)
    mixed.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in unet.parameters())
    torch.testing.assert_close(mixed.detach().float(), expected, rtol=0.1, atol=0.1)
    low = {key: value.bfloat16() if value.is_floating_point() else value for key, value in given.items()}
    with torch.no_grad():
        output = run(unet.to(torch.bfloat16), **low)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)


def test_copies_are_independent():
    unet = wake(swapped(conditional())).eval()
    twin = copy.deepcopy(unet)
    given = inputs(unet, 6, 4)
    with torch.no_grad():
        expected = run(unet, **given)
        torch.testing.assert_close(run(twin, **given), expected, rtol=0, atol=0)
        for parameter in twin.parameters():
            parameter.zero_()
        torch.testing.assert_close(run(unet, **given), expected, rtol=0, atol=0)
    assert type(twin) is type(unet) and swapped_sites(twin) == swapped_sites(unet)


@pytest.mark.parametrize(
    ("backend", "dynamic", "sizes"),
    [("eager", True, [(4, 8), (8, 4), (6, 6)]), ("aot_eager", False, [(4, 8)])],
)
def test_a_spatial_transformer_with_a_mixer_compiles_whole(backend, dynamic, sizes):
    unet = wake(swapped(conditional(), "self_attention", mask_init="uniform"))
    transformer = unet.down_blocks[0].attentions[0]
    compiled = torch.compile(transformer, fullgraph=True, backend=backend, dynamic=dynamic)
    text = torch.randn(2, 1, 12)
    for height, width in sizes:
        x = torch.randn(2, 16, height, width, requires_grad=True)
        expected = transformer(x, encoder_hidden_states=text, return_dict=False)[0]
        output = compiled(x, encoder_hidden_states=text, return_dict=False)[0]
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        (gradient,) = torch.autograd.grad(output.sum(), x)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), x)[0], rtol=1e-4, atol=1e-4)


def test_a_swapped_unet_compiles_whole():
    unet = wake(swapped(unconditional())).eval()
    given = inputs(unet, 4, 8)
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(run(compiled, **given), run(unet, **given))
