"""Surgery on a diffusers U-Net: find the places where DCNv4 can go, and put it there.

Data first. `plan_swap(unet, ...)` reads the network and returns a list of `Site`, which can be printed,
filtered, stored as JSON and compared; `apply_swap(unet, plan)` does what the plan says and nothing else.

    plan = plan_swap(unet, sites=("resnet", "self_attention"), group_channels=32)
    unet = apply_swap(unet, plan)
    print(swap_table(unet))

What can be replaced, by kind:

    resnet          the two 3x3 convolutions of every ResNet block; DCNv4 works at the input width, and its
                    output projection maps to the output width
    self_attention  `attn1` of every spatial transformer block, and the attentions in `UNet2DModel`'s blocks
    resample        the convolutions that down- and upsample, stride 2 down

All else stays and keeps its weights: the first and last convolution, shortcuts, cross-attention,
feed-forwards and norms.

A swapped network carries its plan in its config, and is of a class of its own that is still an instance of
diffusers': `DCNUNet2DConditionModel` or `DCNUNet2DModel`. So `unet.save_pretrained(folder)` writes a folder
that describes itself, and diffusers' own classes refuse that folder, where else they would fill the gaps in
it with random numbers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from numbers import Real
from types import NoneType
from typing import Any, TypeAlias

import torch
from diffusers import ModelMixin, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import KAttentionBlock
from diffusers.models.upsampling import Upsample2D
from torch import nn

from dcnv4_ext import DCNv4Conv
from dcnv4_ext.geometry import flag, is_whole, number, whole
from ldm_dcn.errors import UserError
from ldm_dcn.layers import DCNv4Mixer, announce_shape, drop_shape

CONFIG_KEY = "dcn_swap"
PLAN_VERSION = 1

# How the mask, DCNv4's weights of its taps, starts where `mask_init` does not say otherwise.
# A convolution lies on the main path of its block: an all-zero mask, the official start, would pass no
# gradient to anything before it, so it starts as the mean over its taps. A self-attention is a residual
# branch: with an all-zero mask it starts as the identity, and the gradient goes past it.
DEFAULT_MASK_INIT = {"resnet": "uniform", "resample": "uniform", "self_attention": "zero"}

Places: TypeAlias = list[tuple[str, nn.Module]]  # (name in the network, module)


# By the annotation of a site's field: what makes a value one of that type, or raises.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "int": whole,
    "int | None": whole,
    "float": number,
    "bool": flag,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """One module of a U-Net, and the DCNv4 that shall stand there. `to_json` and `from_json` round-trip.

    Numbers of numpy become Python's, which JSON can hold; TypeError or ValueError for what is none, or no kind of site.
    """

    name: str  # of the module replaced, as in `unet.get_submodule(name)`
    kind: str  # "resnet", "self_attention" or "resample"
    channels: int  # C in
    out_channels: int  # C out
    groups: int  # G; each has channels // groups channels
    kernel_size: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    offset_scale: float = 1.0
    dw_kernel_size: int | None = None  # a depthwise convolution before the offsets are predicted
    softmax: bool = False
    remove_center: bool = False
    mask_init: str = "uniform"  # "uniform", "zero" or "center"
    parameters_before: int = 0
    parameters_after: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in _CHECKS and not (value is None and field.default is None):
                object.__setattr__(self, field.name, _CHECKS[field.type](field.name, value))
        if self.kind not in FINDERS:
            raise ValueError(f"kind must be one of {', '.join(FINDERS)}, got {self.kind!r}")

    def to_json(self) -> dict[str, Any]:
        """A JSON object without the fields that have their default."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Site:
        """Read what `to_json` wrote. Raises `UserError` on a field that is unknown or missing."""
        try:
            return cls(**fields)
        except (TypeError, ValueError) as error:
            raise UserError(f"not a swap site: {fields} ({error})") from None

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.kind}, {self.channels} -> {self.out_channels} channels, "
            f"{self.groups} group{'s' * (self.groups > 1)} of {self.channels // self.groups}, "
            f"{self.parameters_before:,} -> {self.parameters_after:,} parameters"
        )


# ---- where DCNv4 can go ------------------------------------------------------------------------------------


def _children(unet: nn.Module, parents: tuple[type, ...], attributes: tuple[str, ...]) -> Iterator[tuple]:
    """(name, module) of these attributes of every module of these classes; each once, by its last name."""
    for name, parent in unet.named_modules():
        if isinstance(parent, parents):
            children = {getattr(parent, key, None): key for key in attributes}
            for child, key in children.items():
                if child is not None:
                    yield f"{name}.{key}", child


def _is_replaceable(conv: nn.Module) -> bool:
    """A convolution with dense channels, square numbers and zero padding: DCNv4 can give the same sizes."""
    return (
        isinstance(conv, nn.Conv2d)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and all(len(set(pair)) == 1 for pair in (conv.kernel_size, conv.stride, conv.padding, conv.dilation))
    )


def _is_self_attention(module: nn.Module | None) -> bool:
    return (
        isinstance(module, Attention)
        and not module.is_cross_attention
        and module.added_kv_proj_dim is None
        and module.spatial_norm is None
    )


def _resnet(unet: nn.Module) -> Places:
    found = _children(unet, (ResnetBlock2D, ResnetBlockCondNorm2D), ("conv1", "conv2"))
    return [(name, conv) for name, conv in found if _is_replaceable(conv)]


def _resample(unet: nn.Module) -> Places:
    found = _children(unet, (Downsample2D, Upsample2D), ("Conv2d_0", "conv"))
    return [(name, conv) for name, conv in found if _is_replaceable(conv)]


def _self_attention(unet: nn.Module) -> Places:
    places = []
    for name, module in unet.named_modules():
        # On tokens, below a module that knows the map: diffusers' two spatial transformers.
        if isinstance(module, Transformer2DModel) and module.is_input_continuous:
            found = _children(module, (BasicTransformerBlock,), ("attn1",))
            places += [(f"{name}.{place}", attention) for place, attention in found]
        elif isinstance(module, KAttentionBlock):
            places.append((f"{name}.attn1", getattr(module, "attn1", None)))
        # On maps: AttnDownBlock2D, AttnUpBlock2D, UNetMidBlock2D and their like.
        elif isinstance(attentions := getattr(module, "attentions", None), nn.ModuleList):
            places += [(f"{name}.attentions.{index}", child) for index, child in enumerate(attentions)]
    return [place for place in places if _is_self_attention(place[1])]


FINDERS: dict[str, Callable[[nn.Module], Places]] = {
    "resnet": _resnet,
    "self_attention": _self_attention,
    "resample": _resample,
}


# ---- the plan ----------------------------------------------------------------------------------------------


def plan_swap(
    unet: nn.Module,
    sites: Sequence[str] | str = ("resnet",),
    group_channels: int = 32,
    *,
    kernel_size: int = 3,
    mask_init: str | Mapping[str, str] | None = None,
    dw_kernel_size: int | None = None,
    softmax: bool = False,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
) -> list[Site]:
    """Say where DCNv4 shall go in `unet`, without touching it.

    Args:
        unet: a diffusers `UNet2DConditionModel` or `UNet2DModel`, of any size and on any device, pretrained
            or not.
        sites: which kinds to replace, of "resnet", "self_attention", "resample".
        group_channels: D, the channels a group. Where it does not divide a site's channels, the largest width
            below it that does.
        kernel_size: odd. The padding follows, so that sizes do not change.
        mask_init: how the weights of the taps start: "uniform" (1/K each: trains from the first step), "zero"
            (the official start: the layer puts out zeros, and passes no gradient to what lies before it),
            "center" (1 at the centre tap). One for all, or a mapping from kind to start. Default:
            `DEFAULT_MASK_INIT`, uniform for convolutions and zero for self-attention.
        dw_kernel_size, softmax, offset_scale, remove_center: options of `dcnv4_ext.DCNv4`.
        include: regular expressions; a site stays when one of them is found in its name.
        exclude: regular expressions; a site goes when one of them is found in its name.

    Returns:
        the sites, kind by kind in the order of `sites`, within a kind in the order of the network's modules.

    Raises:
        UserError: a rule that matches nothing (it says what there is), or an option that DCNv4 refuses.
    """
    if not isinstance(unet, (UNet2DConditionModel, UNet2DModel)):
        raise UserError(
            f"cannot swap in a {type(unet).__name__}; give the UNet2DConditionModel or UNet2DModel itself, "
            "before it is compiled or wrapped"
        )
    if not is_whole(group_channels) or group_channels < 1:
        raise UserError(f"group_channels={group_channels!r}; give the number of channels a group, such as 32")
    if not is_whole(kernel_size) or kernel_size < 1 or kernel_size % 2 == 0:
        raise UserError(f"kernel_size={kernel_size!r}; give an odd number, so that the map keeps its size")
    for option, value in (("softmax", softmax), ("remove_center", remove_center)):
        if type(value) is not bool:
            raise UserError(f"{option}={value!r}; give true or false")
    if not isinstance(offset_scale, Real) or type(offset_scale) is bool or not math.isfinite(offset_scale):
        raise UserError(f"offset_scale={offset_scale!r}; give a finite number, such as 1.0")
    if dw_kernel_size is not None and not is_whole(dw_kernel_size):
        raise UserError(f"dw_kernel_size={dw_kernel_size!r}; give an odd number, or null for none")
    starts = _mask_starts(mask_init)
    found = {kind: finder(unet) for kind, finder in FINDERS.items()}
    kinds = _kinds(sites)
    for kind in kinds:
        if not found[kind]:
            what = f"sites={kind!r} matches nothing in this {type(unet).__name__}"
            raise UserError(f"{what}; it has {_inventory(found)}")
    chosen = _filter({kind: found[kind] for kind in kinds}, include, exclude)

    options = {
        "kernel_size": int(kernel_size),
        "dw_kernel_size": dw_kernel_size,
        "softmax": softmax,
        "offset_scale": float(offset_scale),
        "remove_center": remove_center,
    }
    return [
        _site(name, kind, module, int(group_channels), {**options, "mask_init": starts[kind]})
        for kind in kinds
        for name, module in chosen[kind]
    ]


def _kinds(sites: Sequence[str] | str) -> tuple[str, ...]:
    if isinstance(sites, str):
        sites = (sites,)
    if not isinstance(sites, (list, tuple)) or not all(isinstance(kind, str) for kind in sites):
        raise UserError(f"sites={sites!r}; give a list of some of {', '.join(FINDERS)}")
    kinds = tuple(dict.fromkeys(sites))
    if not kinds:
        raise UserError(f"sites is empty; name at least one of {', '.join(FINDERS)}")
    for kind in kinds:
        _check_kind("sites", kind)
    return kinds


def _mask_starts(mask_init: str | Mapping[str, str] | None) -> dict[str, str]:
    if isinstance(mask_init, str):
        return dict.fromkeys(FINDERS, mask_init)
    if not isinstance(mask_init, (Mapping, NoneType)):
        raise UserError(
            f"mask_init={mask_init!r}; give uniform, zero or center, or one of them a kind of site"
        )
    for kind in mask_init or {}:
        _check_kind("mask_init", kind)
    return {**DEFAULT_MASK_INIT, **(mask_init or {})}


def _check_kind(option: str, kind: str) -> None:
    if kind not in FINDERS:
        what = f"{option} names {kind!r}, an unknown kind of site{nearest(kind, FINDERS)}"
        raise UserError(f"{what}; there are {', '.join(FINDERS)}")


def nearest(word: str, words: Iterable[str]) -> str:
    """The tail of an error: " (did you mean 'resnet'?)" where one of the words is near, else nothing."""
    near = get_close_matches(str(word), list(words), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _inventory(found: Mapping[str, Places]) -> str:
    """What a network offers, in one line, for an error."""
    parts = [f"{len(places)} of {kind} ({places[0][0]}, ...)" for kind, places in found.items() if places]
    return ", ".join(parts) if parts else "no site left to swap"


def _filter(
    found: dict[str, Places], include: Sequence[str] | str | None, exclude: Sequence[str] | str | None
) -> dict[str, Places]:
    """Apply the name rules. Each pattern must match and each kind keep a site: a typo is not a choice."""
    wanted, unwanted = _patterns("include", include), _patterns("exclude", exclude)
    names = [name for places in found.values() for name, _ in places]
    for option, patterns in (("include", wanted), ("exclude", unwanted)):
        for pattern in patterns:
            if not any(pattern.search(name) for name in names):
                what = f"{option}={pattern.pattern!r} matches none of the site names"
                raise UserError(f"{what}; there are {_inventory(found)}")

    def stays(name: str) -> bool:
        if wanted and not any(pattern.search(name) for pattern in wanted):
            return False
        return not any(pattern.search(name) for pattern in unwanted)

    kept = {kind: [place for place in places if stays(place[0])] for kind, places in found.items()}
    for kind in kept:
        if not kept[kind]:
            what = f"include and exclude leave nothing of sites={kind!r}"
            raise UserError(f"{what}; without them there are {_inventory({kind: found[kind]})}")
    return kept


def _patterns(option: str, given: Sequence[str] | str | None) -> list[re.Pattern[str]]:
    try:
        return [re.compile(pattern) for pattern in ([given] if isinstance(given, str) else given or ())]
    except (re.error, TypeError) as error:
        raise UserError(f"{option}={given!r} is not a regular expression: {error}") from None


def _site(name: str, kind: str, module: nn.Module, group_channels: int, options: dict[str, Any]) -> Site:
    """The site of one module. Its parameters are counted on the layer itself, built on the meta device."""
    kernel_size = options["kernel_size"]
    if isinstance(module, Attention):
        channels, out_channels = module.query_dim, module.out_dim
        geometry = {"padding": (kernel_size - 1) // 2}
    else:
        channels, out_channels = module.in_channels, module.out_channels
        # A wider kernel takes that much more padding on each side, so that the output keeps its size.
        wider = module.dilation[0] * (kernel_size - module.kernel_size[0])
        padding = module.padding[0] + wider // 2
        if wider % 2 or padding < 0:
            own = module.kernel_size[0]
            raise UserError(
                f"kernel_size={kernel_size} at {name}, which has {own}, would change the map size"
            )
        geometry = {"stride": module.stride[0], "padding": padding, "dilation": module.dilation[0]}
    width = next(width for width in range(min(group_channels, channels), 0, -1) if channels % width == 0)
    site = Site(
        name=name,
        kind=kind,
        channels=channels,
        out_channels=out_channels,
        groups=channels // width,
        **geometry,
        **options,
    )
    with torch.device("meta"):
        layer = _layer(site, module)
    return dataclasses.replace(site, parameters_before=_count(module), parameters_after=_count(layer))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---- the surgery -------------------------------------------------------------------------------------------


def apply_swap(unet: nn.Module, plan: Sequence[Site]) -> nn.Module:
    """Put the planned DCNv4 layers into `unet`: the same object comes back, all other weights untouched.

    New layers stand on the device and in the dtype of what they replace, and start from torch's random
    generator. The plan joins `unet.config`, and `unet` becomes a `DCNUNet2DConditionModel` or
    `DCNUNet2DModel`. A plan that does not fit raises `UserError` before anything is changed.
    """
    if not isinstance(plan, (list, tuple)) or not all(isinstance(site, Site) for site in plan):
        raise UserError(f"plan={plan!r:.60}; give the list of sites that plan_swap returns")
    names = [site.name for site in plan]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"the plan names {twice[0]} twice; leave one of the two out")
    layers = [_fitted_layer(unet, site) for site in plan]
    for site, layer in zip(plan, layers, strict=True):
        old = unet.get_submodule(site.name)
        parent = unet.get_submodule(site.name.rpartition(".")[0])
        # Downsample2D may hold its convolution under two names.
        for key in [key for key, child in parent._modules.items() if child is old]:
            setattr(parent, key, layer)
    for module in unet.modules():
        if isinstance(module, (Transformer2DModel, KAttentionBlock)):
            _tell_shape(module)

    sites = [site.to_json() for site in (*swapped_sites(unet), *plan)]
    unet.register_to_config(**{CONFIG_KEY: {"version": PLAN_VERSION, "sites": sites}})
    unet.__class__ = SWAPPED_CLASS.get(type(unet), type(unet))
    return unet


def _fitted_layer(unet: nn.Module, site: Site) -> nn.Module:
    """The layer for a site, on the device and in the dtype of the module that it replaces."""
    misfit = f"the plan does not fit this {type(unet).__name__}"
    try:
        old = unet.get_submodule(site.name)
    except AttributeError:
        raise UserError(f"{misfit}: it has no {site.name}; plan the swap on this network") from None
    if isinstance(old, Attention):
        widths, stride, margin = (old.query_dim, old.out_dim), 1, 0
    elif isinstance(old, nn.Conv2d):
        widths, stride = (old.in_channels, old.out_channels), old.stride[0]
        margin = _margin(old.kernel_size[0], old.padding[0], old.dilation[0])
    else:
        what = f"{site.name} is a {type(old).__name__}, neither convolution nor attention"
        raise UserError(f"{misfit}: {what}; it may be swapped already")
    if widths != (site.channels, site.out_channels):
        what = f"{site.name} maps {widths[0]} to {widths[1]} channels"
        planned = f"not {site.channels} to {site.out_channels}"
        raise UserError(f"{misfit}: {what}, {planned}; plan the swap on this network")
    if (site.stride, _margin(site.kernel_size, site.padding, site.dilation)) != (stride, margin):
        what = f"stride, padding and dilation of {site.name} would change the size of its map"
        raise UserError(f"{misfit}: {what}; plan the swap on this network")
    like = next(old.parameters())
    with torch.device(like.device):
        layer = _layer(site, old)
    return layer.to(like.dtype).train(old.training)


def _margin(kernel_size: int, padding: int, dilation: int) -> int:
    """Pixels that a map loses with such a kernel, stride aside."""
    return dilation * (kernel_size - 1) - 2 * padding


_OPTIONS = (
    "groups",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "offset_scale",
    "dw_kernel_size",
    "softmax",
    "remove_center",
    "mask_init",
)  # fields of a site that are arguments of `dcnv4_ext.DCNv4`


def _layer(site: Site, old: nn.Module) -> nn.Module:
    options = {name: getattr(site, name) for name in _OPTIONS}
    try:
        if isinstance(old, Attention):
            return DCNv4Mixer(
                site.channels,
                site.out_channels,
                group_norm=old.group_norm,
                residual_connection=old.residual_connection,
                rescale_output_factor=old.rescale_output_factor,
                dropout=old.dropout,
                **options,
            )
        return DCNv4Conv(site.channels, site.out_channels, **options)
    except (TypeError, ValueError, RuntimeError) as error:  # the last from sizes that no memory holds
        raise UserError(f"DCNv4 cannot stand at {site.name}: {error}") from None


def _tell_shape(transformer: nn.Module) -> None:
    """Let a transformer tell its DCNv4 mixers height and width, and keep that from its attentions."""
    if not any(isinstance(module, DCNv4Mixer) for module in transformer.modules()):
        return
    if announce_shape not in transformer._forward_pre_hooks.values():
        transformer.register_forward_pre_hook(announce_shape, with_kwargs=True)
    for module in transformer.modules():
        if isinstance(module, Attention) and drop_shape not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(drop_shape, with_kwargs=True)


# ---- swapped networks, which know their plan ---------------------------------------------------------------

# Appended to the block types in a saved config.json, and nowhere else. Diffusers' own classes stop at it
# ("... does not exist") where else they would build convolutions, find no weights for them, log a warning,
# and go on.
_MARK = " with DCNv4: load it with ldm_dcn.load_unet"


class _Swapped:
    """What a swapped U-Net adds to its diffusers class: the plan is applied before weights are loaded."""

    _plain: type[ModelMixin]

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | str | os.PathLike[str],
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As `diffusers.ConfigMixin.from_config`: build the plain network of `config`, apply its plan. `config` may be the folder of
        a saved network, as diffusers' EMAModel passes it."""
        config = dict(config if isinstance(config, Mapping) else cls.load_config(config))
        plan = sites_from_config(config)
        config.pop(CONFIG_KEY, None)
        config["down_block_types"] = [kind.removesuffix(_MARK) for kind in config["down_block_types"]]
        config["_class_name"] = cls._plain.__name__
        unet, unused = cls._plain.from_config(config, return_unused_kwargs=True, **kwargs)
        apply_swap(unet, plan)
        return (unet, unused) if return_unused_kwargs else unet

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `diffusers.ModelMixin.from_pretrained`, but never from a pickle unless asked."""
        kwargs.setdefault("use_safetensors", True)
        return super().from_pretrained(*args, **kwargs)

    def to_json_string(self) -> str:
        """The text of config.json."""
        config = json.loads(super().to_json_string())
        config["down_block_types"] = [kind + _MARK for kind in config["down_block_types"]]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


class DCNUNet2DConditionModel(_Swapped, UNet2DConditionModel):
    """A `UNet2DConditionModel` with DCNv4 in it. Made by `apply_swap`, loaded by `ldm_dcn.load_unet`."""

    _plain = UNet2DConditionModel


class DCNUNet2DModel(_Swapped, UNet2DModel):
    """A `UNet2DModel` with DCNv4 in it. Made by `apply_swap`, loaded by `ldm_dcn.load_unet`."""

    _plain = UNet2DModel


SWAPPED_CLASS = {UNet2DConditionModel: DCNUNet2DConditionModel, UNet2DModel: DCNUNet2DModel}


def swapped_sites(unet: nn.Module) -> list[Site]:
    """The sites that were swapped in this network; empty for a plain one."""
    return sites_from_config(unet.config)


def sites_from_config(config: Mapping[str, Any]) -> list[Site]:
    """The plan stored in a config; empty where there is none. Raises `UserError` where it cannot be read."""
    stored = config.get(CONFIG_KEY)
    if stored is None:
        return []
    if (
        not isinstance(stored, Mapping)
        or stored.get("version") != PLAN_VERSION
        or not isinstance(stored.get("sites"), list)
        or not all(isinstance(fields, Mapping) for fields in stored["sites"])
    ):
        what = f"the config's {CONFIG_KEY} is not a swap plan of version {PLAN_VERSION}"
        raise UserError(f"{what}; the file is damaged, or from another version of ldm_dcn")
    return [Site.from_json(fields) for fields in stored["sites"]]


# ---- the table ---------------------------------------------------------------------------------------------


def swap_table(unet: nn.Module, plan: Sequence[Site] | None = None) -> str:
    """A table of what a swap changed, or what `plan`, not yet applied, would change, with parameters.

    Raises `UserError` where `unet` is not swapped and no plan is given.
    """
    done = swapped_sites(unet)
    plan = done if plan is None else list(plan)
    if not plan:
        raise UserError(f"nothing was swapped in this {type(unet).__name__}; give a plan, or apply one first")
    change = sum(site.parameters_after - site.parameters_before for site in plan)
    total = _count(unet)
    before, after = (total - change, total) if all(site in done for site in plan) else (total, total + change)

    rows = [
        (
            site.name,
            site.kind,
            f"{site.channels} -> {site.out_channels}",
            f"{site.groups} x {site.channels // site.groups}",
            f"{site.parameters_before:,}",
            f"{site.parameters_after:,}",
        )
        for site in plan
    ]
    sums = []
    for kind in dict.fromkeys(site.kind for site in plan):
        of_kind = [site for site in plan if site.kind == kind]
        was = sum(site.parameters_before for site in of_kind)
        now = sum(site.parameters_after for site in of_kind)
        sums.append((f"all {len(of_kind)} {kind}", "", "", "", f"{was:,}", f"{now:,}"))
    sums.append(("the whole network", "", "", "", f"{before:,}", f"{after:,}"))
    head = ("site", "kind", "channels", "groups", "parameters before", "after")

    widths = [max(map(len, column)) for column in zip(head, *rows, *sums, strict=True)]

    def line(row: tuple[str, ...]) -> str:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        return "  ".join(left + right)

    rule = "-" * len(line(head))
    return "\n".join([line(head), rule, *map(line, rows), rule, *map(line, sums)])
