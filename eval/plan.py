"""Memory and time of a training run before it is paid for: `python -m eval.plan CONFIG [CONFIG ...] --tflops F`.

Nothing is computed: the network runs on tensors without data, and what it would keep and multiply is counted.

    memory a GPU   (weights 4 + gradients 4 + AdamW 8 + average 4) bytes x parameters, whole (ddp) or shared by n (fsdp, with one
                   block gathered), + bytes kept by autograd: once (16-bit copies of weights), and for each image of a micro-step
    FLOPs a step   3 x FLOPs of a forward x batch (forward 1, backward 2; 4 x with gradient checkpointing)
    time           FLOPs a step x steps / (n x achieved FLOP/s), which `eval.throughput` measures on your GPU

Activations are those kept at the end of the forward pass; with checkpointing, one block is recomputed on top of them. Workspace
of kernels and the allocator's slack are not in the figures: leave a tenth.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from ldm_dcn.config import Config, load_config
from ldm_dcn.denoiser import Denoiser
from ldm_dcn.errors import Parser, UserError, exit_on_user_error
from ldm_dcn.run import ARITHMETIC
from ldm_dcn.unet import build_unet

STATE_BYTES = {"weights": 4, "gradients": 4, "AdamW": 8, "average": 4}  # a parameter; fp32 throughout
BACKWARD = 2  # times a forward's FLOPs
PROBES = 2, 4  # images the network is counted with: what is kept once falls out of the difference
LATENT_FACTOR = 8  # pixels per latent, where a config does not say it: Stable Diffusion's
GPUS = (1, 8, 64)


@dataclass(frozen=True)
class Counted:
    """What one network costs, whatever the machine."""

    name: str
    parameters: int
    largest_block: int  # parameters of the block that FSDP gathers at once
    forward_flops: int  # an image
    kept: tuple[int, int]  # bytes that autograd keeps: an image, and once
    kept_checkpointed: tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """One network on `gpus` GPUs. Bytes a GPU; days are None where no speed was given."""

    name: str
    gpus: int
    parallel: str
    images: int  # a GPU and micro-step
    accumulation: int
    state_bytes: int
    activation_bytes: int
    checkpointing: bool
    flops_a_step: float
    seconds_a_step: float | None
    days: float | None


def count(config: Config) -> Counted:
    """Count the network of `config` without computing anything."""
    side = config.data.image_size // (1 if config.autoencoder.spec == "identity" else LATENT_FACTOR)
    if config.model.pretrained is not None:
        raise UserError(
            f"{config.run.name}: a pretrained network is not planned for; give model.preset or model.unet"
        )
    with torch.device("meta"):
        unet = build_unet(config.model.preset or config.model.unet, swap=config.model.swap)
        denoiser = Denoiser(unet, config.data.num_classes or 0).train()
    if config.autoencoder.spec == "digits":
        side = unet.config.sample_size
    with FakeTensorMode():
        own = {name: torch.empty(p.shape) for name, p in denoiser.named_parameters()}
        own = {name: p.requires_grad_() for name, p in own.items()}
        own |= {name: torch.empty(b.shape, dtype=b.dtype) for name, b in denoiser.named_buffers()}
        shape = (unet.config.in_channels, side, side)
        kept = _kept(denoiser, own, config, shape)
        unet.enable_gradient_checkpointing()
        kept_checkpointed = _kept(denoiser, own, config, shape)
        unet.disable_gradient_checkpointing()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(denoiser, own, _inputs(1, shape))
    blocks = [
        sum(p.numel() for p in block.parameters())
        for name, modules in denoiser.named_modules()
        if isinstance(modules, torch.nn.ModuleList) and name.endswith((".resnets", ".attentions"))
        for block in modules
    ]
    return Counted(
        str(config.run.name),
        sum(p.numel() for p in denoiser.parameters()),
        max(blocks),
        counter.get_total_flops(),
        kept,
        kept_checkpointed,
    )


def _inputs(images: int, shape: tuple[int, int, int]) -> tuple[torch.Tensor, ...]:
    x = torch.empty(images, *shape).to(memory_format=torch.channels_last)
    return x, torch.zeros(images, dtype=torch.int64), torch.zeros(images, dtype=torch.int64)


def _kept(
    denoiser: Denoiser, own: dict[str, torch.Tensor], config: Config, shape: tuple[int, int, int]
) -> tuple[int, int]:
    """Bytes that autograd keeps of one forward for each image, and once, without the parameters."""
    few, many = (_kept_by(denoiser, own, config, _inputs(images, shape)) for images in PROBES)
    an_image = (many - few) // (PROBES[1] - PROBES[0])
    return an_image, few - PROBES[0] * an_image


def _kept_by(
    denoiser: Denoiser, own: dict[str, torch.Tensor], config: Config, inputs: tuple[torch.Tensor, ...]
) -> int:
    parameters = {StorageWeakRef(p.untyped_storage()) for p in own.values()}
    kept: dict[StorageWeakRef, int] = {}
    alive = []  # a storage that is freed may come back as another under the same name

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = StorageWeakRef(tensor.untyped_storage())
        if storage not in parameters:
            kept[storage] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    dtype = ARITHMETIC[config.train.precision]
    # fp16 and bf16 keep alike, and not every CPU operation knows fp16
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        output = functional_call(denoiser, own, inputs)
    del output
    return sum(kept.values())


def plan(counted: Counted, config: Config, gpus: int, tflops: float | None) -> Plan:
    """What the run of `config` takes on `gpus` GPUs that achieve `tflops` each."""
    settings = config.train
    parts = gpus * settings.gradient_accumulation
    if settings.batch_size % parts:
        raise UserError(
            f"{config.run.name}: train.batch_size={settings.batch_size} cannot be shared by {gpus} GPUs in "
            f"{settings.gradient_accumulation} accumulation steps"
        )
    images = settings.batch_size // parts
    state = sum(STATE_BYTES.values()) * counted.parameters
    if settings.parallel == "fsdp" and gpus > 1:
        state = state // gpus + STATE_BYTES["weights"] * counted.largest_block
    an_image, once = counted.kept_checkpointed if settings.gradient_checkpointing else counted.kept
    passes = 1 + BACKWARD + settings.gradient_checkpointing
    flops = float(passes * counted.forward_flops * settings.batch_size)
    seconds = flops / (gpus * tflops * 1e12) if tflops else None
    return Plan(
        counted.name,
        gpus,
        settings.parallel if gpus > 1 else "-",
        images,
        settings.gradient_accumulation,
        state,
        an_image * images + once,
        settings.gradient_checkpointing,
        flops,
        seconds,
        None if seconds is None else seconds * settings.steps / 86400,
    )


def table(
    counts: Sequence[Counted], plans: Sequence[Plan], configs: Sequence[Config], tflops: float | None
) -> str:
    """Both tables as text."""
    lines = [f"{'network':<24}{'parameters':>13}{'forward':>12}{'kept':>12}{'checkpointed':>14}", "-" * 75]
    lines += [
        f"{c.name:<24}{c.parameters / 1e6:>11.2f} M{c.forward_flops / 2e9:>7.1f} GMAC{c.kept[0] / 2**20:>8.0f} MiB"
        f"{c.kept_checkpointed[0] / 2**20:>10.0f} MiB"
        for c in counts
    ]
    lines += [
        "",
        f"{'network':<24}{'GPUs':>5}{'images':>8}{'x':>4}{'state':>11}{'activations':>13}{'s a step':>10}{'days':>8}",
        "-" * 83,
    ]
    for p in plans:
        seconds, days = (
            ("-", "-") if p.seconds_a_step is None else (f"{p.seconds_a_step:.2f}", f"{p.days:.1f}")
        )
        lines.append(
            f"{p.name:<24}{p.gpus:>5}{p.images:>8}{p.accumulation:>4}{p.state_bytes / 2**30:>7.1f} GiB"
            f"{p.activation_bytes / 2**30:>9.1f} GiB{seconds:>10}{days:>8}"
        )
    train = configs[0].train
    speed = f"{tflops:g} TFLOP/s a GPU" if tflops else "give --tflops F for times"
    checkpointing = "with" if train.gradient_checkpointing else "without"
    lines += [
        "",
        f"batch {train.batch_size}, {train.steps:,} steps, {train.precision}, {checkpointing} gradient checkpointing; {speed}",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m eval.plan", description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS), help="default: 1 8 64")
    parser.add_argument(
        "--tflops", type=float, help="what one GPU achieves in training (10^12 FLOP/s), as measured"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings to change in all configs"
    )
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args(arguments)
    with exit_on_user_error():
        if options.tflops is not None and not options.tflops > 0:
            raise UserError(f"--tflops {options.tflops}: give what a GPU achieves, such as 200")
        if min(options.gpus) < 1:
            raise UserError(f"--gpus {min(options.gpus)}: give 1 or more")
        configs = [load_config(path, options.set) for path in options.configs]
        counts = [count(config) for config in configs]
        plans = [
            plan(own, config, gpus, options.tflops)
            for own, config in zip(counts, configs, strict=True)
            for gpus in options.gpus
        ]
        print(table(counts, plans, configs, options.tflops))
        if options.json:
            content = {"counts": [asdict(c) for c in counts], "plans": [asdict(p) for p in plans]}
            options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
