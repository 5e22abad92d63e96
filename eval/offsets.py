"""Where DCNv4 looks: the sampling points that its layers use while a model draws an image, read out by hooks.

A point of tap k in group g at the output position (ho, wo) lies, in pixels of the layer's input map whose first pixel has its
centre at (0, 0), at

    x = wo * stride_w - pad_w + cx + (i * dil_w - cx + dx) * offset_scale          and y alike

(`dcnv4_ext.dcnv4`). The length of its offset is |(dx, dy)| * offset_scale: how far it stands from a convolution's tap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dcnv4_ext import DCNv4
from ldm_dcn.autoencoder import to_uint8
from ldm_dcn.diffusion import denoised, levels
from ldm_dcn.model import Model
from ldm_dcn.sampling import guided, sample_latents
from ldm_dcn.swap import swapped_sites

Position = tuple[float, float]  # shares of the width and the height, in [0, 1)


@dataclass(frozen=True)
class SamplingPoints:
    """All points of one call of one layer; x, y and weight are (N, Ho, Wo, G, K).

    length  of the offsets, in pixels of the input map
    center  (Ho, Wo, 2): x and y of the pixel that the kernel stands on
    size    (H, W) of the input map
    """

    x: Tensor
    y: Tensor
    weight: Tensor
    length: Tensor
    center: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class Spot:
    """The points (G, K) of one output position, and the pixel (x, y) that the kernel stands on."""

    center: tuple[float, float]
    x: Tensor
    y: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Look:
    """One layer at one step: what is drawn, and what is told of all positions, groups and taps together.

    mean_length      of the offsets, in pixels of the map
    weighted_length  the same, a point counting as much as its |weight|; None where all weights are zero
    outside          share of the points that lie off the map and contribute nothing
    """

    size: tuple[int, int]
    mean_length: float
    weighted_length: float | None
    outside: float
    spots: tuple[Spot, ...]


@dataclass(frozen=True)
class Moment:
    """One step of sampling: step `number` of those asked for, at time t, with the x_0 estimate as uint8 (c, H, W)."""

    number: int
    time: int
    estimate: Tensor
    looks: dict[str, Look]


@dataclass(frozen=True)
class Layer:
    """A DCNv4 in a network, under the name of what it replaced."""

    name: str
    kind: str
    module: DCNv4 = field(repr=False)


def find_layers(unet: nn.Module) -> list[Layer]:
    """All of them, in the order in which they run; those of a part in the order of its modules."""
    kinds = {site.name: site.kind for site in swapped_sites(unet)} if hasattr(unet, "config") else {}
    layers = []
    for path, module in unet.named_modules():
        if isinstance(module, DCNv4):
            name = path.removesuffix(".dcn")  # inside its dress, DCNv4Conv or DCNv4Mixer
            layers.append(Layer(name, kinds.get(name, "dcnv4"), module))
    # diffusers registers the middle last
    parts = ("down_blocks", "mid_block", "up_blocks")
    return sorted(
        layers, key=lambda layer: next((i for i, part in enumerate(parts) if layer.name.startswith(part)), -1)
    )


def sampling_points(module: DCNv4, offset_mask: Tensor, size: tuple[int, int]) -> SamplingPoints:
    """The points that `module` makes of its `offset_mask` (N, Ho, Wo, P) on an input map of `size` (H, W)."""
    n, ho, wo, _ = offset_mask.shape
    g, k = module.groups, module.taps
    (kernel_h, kernel_w), (dilation_h, dilation_w) = module.kernel_size, module.dilation
    center_x, center_y = dilation_w * (kernel_w - 1) // 2, dilation_h * (kernel_h - 1) // 2
    columns = offset_mask.detach().float()[..., : 3 * g * k].reshape(n, ho, wo, g, 3 * k)
    offsets, weight = columns[..., : 2 * k].unflatten(-1, (k, 2)), columns[..., 2 * k :]
    taps = [
        (i * dilation_w - center_x, j * dilation_h - center_y)
        for i in range(kernel_w)
        for j in range(kernel_h)
        if not (module.remove_center and (i, j) == (kernel_w // 2, kernel_h // 2))
    ]
    grid = offsets.new_tensor(taps)
    base_x = torch.arange(wo, device=offsets.device) * module.stride[1] - module.padding[1] + center_x
    base_y = torch.arange(ho, device=offsets.device) * module.stride[0] - module.padding[0] + center_y
    return SamplingPoints(
        x=base_x[None, None, :, None, None] + (grid[:, 0] + offsets[..., 0]) * module.offset_scale,
        y=base_y[None, :, None, None, None] + (grid[:, 1] + offsets[..., 1]) * module.offset_scale,
        weight=weight.softmax(-1) if module.softmax else weight,
        length=offsets.norm(dim=-1) * abs(module.offset_scale),
        center=torch.stack(torch.broadcast_tensors(base_x[None, :], base_y[:, None]), -1),
        size=size,
    )


def look(points: SamplingPoints, positions: Sequence[Position]) -> Look:
    """What the points of the first image tell: at `positions`, and in the mean."""
    _, ho, wo = points.x.shape[:3]
    h, w = points.size
    x, y, weight, length = (each[0] for each in (points.x, points.y, points.weight, points.length))
    # False for NaN, which contributes nothing either
    inside = (x > -1) & (y > -1) & (x < w) & (y < h)
    strength = weight.abs()
    total = float(strength.sum())
    spots = []
    for across, down in positions:
        i, j = min(int(across * wo), wo - 1), min(int(down * ho), ho - 1)
        center = points.center[j, i].tolist()
        spots.append(Spot((center[0], center[1]), x[j, i].cpu(), y[j, i].cpu(), weight[j, i].cpu()))
    return Look(
        size=points.size,
        mean_length=float(length.mean()),
        weighted_length=float((length * strength).sum()) / total if total > 0 else None,
        outside=1 - float(inside.float().mean()),
        spots=tuple(spots),
    )


@contextmanager
def recorded(layers: Sequence[Layer], count: int, positions: Sequence[Position]) -> Iterator[dict[str, Look]]:
    """Inside, every call of a layer leaves its look at the first of the last `count` images of the batch.

    The last, because guidance puts the unconditional half before them (`ldm_dcn.sampling.guided`).
    """
    looks: dict[str, Look] = {}
    sizes: dict[DCNv4, tuple[int, int]] = {}
    handles = []

    def remember_size(module: DCNv4, args: tuple, kwargs: dict[str, Any]) -> None:
        x, shape = args[0], args[1] if len(args) > 1 else kwargs.get("shape")
        sizes[module] = tuple(x.shape[1:3]) if x.ndim == 4 else (int(shape[0]), int(shape[1]))

    for layer in layers:

        def read(_: nn.Module, __: tuple, offset_mask: Tensor, layer: Layer = layer) -> None:
            size = sizes[layer.module]
            looks[layer.name] = look(
                sampling_points(layer.module, offset_mask[len(offset_mask) - count :], size), positions
            )

        handles.append(layer.module.register_forward_pre_hook(remember_size, with_kwargs=True))
        # What the projection puts out is what the operator gets, offsets and weights both.
        handles.append(layer.module.offset_mask.register_forward_hook(read))
    try:
        yield looks
    finally:
        for handle in handles:
            handle.remove()


def watch(
    model: Model,
    condition: Tensor,
    seed: int,
    *,
    numbers: Sequence[int],
    positions: Sequence[Position],
    sampler: str = "dpm++",
    steps: int = 50,
    guidance: float = 1.5,
) -> tuple[Tensor, list[Moment]]:
    """Draw one image as `ldm_dcn.sampling.generate` does, and look at all its DCNv4 layers in the steps `numbers` (from 1).

    `condition` is one label (1,) or one prompt's tokens (1, T, D). Returns the image, uint8 (c, H, W), and the moments.
    """
    denoiser = model.denoiser
    layers = find_layers(model.unet)
    predict = guided(denoiser, condition.to(denoiser.device), guidance, num_steps=model.schedule.num_steps)
    table = levels(model.schedule)
    moments: list[Moment] = []
    number, last = 0, None

    def picture(latents: Tensor) -> Tensor:
        return to_uint8(model.autoencoder.decode(latents)).cpu()[0]

    def watched(x: Tensor, t: Tensor) -> Tensor:
        nonlocal number, last
        time = int(t[0])
        again, last = time == last, time  # Heun's method first asks at where the step before guesses to end
        number += not again
        if number not in numbers:
            return predict(x, t)
        with recorded(layers, len(x), positions) as looks:
            output = predict(x, t)
        if again:
            moments.pop()
        alpha, sigma = (level[time].to(x.device) for level in table)
        estimate = denoised(model.schedule.prediction, output, x, alpha, sigma)
        moments.append(Moment(number, time, picture(estimate), looks))
        return output

    was_training = denoiser.training
    denoiser.eval()
    try:
        latents = sample_latents(
            watched,
            model.latent_shape,
            [seed],
            schedule=model.schedule,
            sampler=sampler,
            steps=steps,
            device=denoiser.device,
        )
    finally:
        denoiser.train(was_training)
    return picture(latents), moments


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of 1, ..., count: the first, the last, and between them as evenly as may be."""
    if count <= most:
        return list(range(1, count + 1))
    if most == 1:
        return [count]
    return sorted({1 + round(i * (count - 1) / (most - 1)) for i in range(most)})


def choose_layers(layers: Sequence[Layer], most: int) -> list[Layer]:
    """About `most` layers, at least one of each kind, spread over the depth of the network."""
    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    chosen = []
    for place, kind in enumerate(kinds):
        own = [layer for layer in layers if layer.kind == kind]
        share = max(1, (most + len(kinds) - 1 - place) // len(kinds))
        chosen += [own[number - 1] for number in evenly(len(own), share)]
    return [layer for layer in layers if layer in chosen]
