"""Memory and time of a training run before it is paid for: `python -m eval.plan CONFIG [CONFIG ...]`.

Nothing is computed: the network runs on tensors without data, and what it would keep and multiply is counted. What a step costs is
taken from measurements (`--measured`), or, where there is none of a network, from an assumed speed (`--tflops`).

    memory a GPU   (weights 4 + gradients 4 + AdamW 8 + 4 for each average, of which train.ema=power has two) bytes x parameters P,
                   whole (ddp) or shared by n (with the weights of one block gathered under fsdp, and all under zero),
                   + bytes kept by autograd: once (16-bit copies of weights), and for each image of a micro-step. What is shared out
                   has whole gradients between the parts of an accumulated batch
    s a step       measured: images a GPU x s an image (forward, backward, waiting for data) + s a step (optimiser and average; the
                   optimiser's shared by n with fsdp and zero) + exchange
                   assumed: FLOPs a step / (n x FLOP/s) + exchange, where a step takes 3 x the FLOPs of a forward x batch (forward 1,
                   backward 2; 4 x with gradient checkpointing)
    exchange       bytes that a GPU sends a step / bandwidth, where --bandwidth is given, as if nothing of it were hidden behind the
                   backward pass. With r = (n - 1) / n, m parts of the batch, and parameters gathered in w bytes:
                   ddp 2 r 4 P; fsdp r (2 m w P + 4 P); zero r (w P + 4 P)
    time           s a step x steps

    python -m eval.throughput CONFIG --train --set data.source=CACHE --json FILE      measures on the device at hand

Activations are those kept at the end of the forward pass; with checkpointing, one block is recomputed on top of them. Workspace
of kernels and the allocator's slack are not in the figures: leave a tenth.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from ldm_dcn.arithmetic import ARITHMETIC
from ldm_dcn.changes import LATER
from ldm_dcn.config import Config, load_config
from ldm_dcn.denoiser import Denoiser
from ldm_dcn.errors import Parser, UserError, exit_on_user_error, explain
from ldm_dcn.places import check_file_place
from ldm_dcn.unet import build_unet

from .environment import environment
from .flops import flop_counter
from .results import write

FP32 = 4  # bytes
BACKWARD = 2  # times a forward's FLOPs
PROBES = 2, 4  # images the network is counted with: what is kept once falls out of the difference
LATENT_FACTOR = 8  # pixels per latent, where a config does not say it: Stable Diffusion's
CLIP_TOKENS = 77  # of a caption
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
class Measured:
    """What one step of a network cost on one device, as `eval.throughput --train` measured it. Seconds."""

    file: str
    config: dict[str, Any]
    device: str
    images: int  # a micro-step
    an_image: float  # forward, backward and waiting for data
    optimizer: float  # a step
    rest: float  # a step: average, logging
    peak_bytes: int | None  # of GPU memory

    def differences(self, config: Config) -> list[str]:
        """The settings that a step's cost depends on, and that are others in `config`."""
        own, other = self.config, config.resolved()
        keys = [("model", key) for key in ("preset", "unet", "swap", "pretrained")]
        keys += [
            ("train", key)
            for key in (
                "precision",
                "tf32",
                "compile",
                "compile_mode",
                "attention",
                "gradient_checkpointing",
                "ema",
            )
        ]
        keys += [("data", "image_size"), ("data", "condition")]
        pairs = {
            f"{section}.{key}": (
                own[section].get(key, LATER.get(f"{section}.{key}")),
                other[section].get(key),
            )
            for section, key in keys
        }
        return [f"{key}: {before} -> {after}" for key, (before, after) in pairs.items() if before != after]


@dataclass(frozen=True)
class Plan:
    """One network on `gpus` GPUs. Bytes a GPU; seconds and days are None where nothing is known of its speed."""

    name: str
    gpus: int
    parallel: str
    images: int  # a GPU and micro-step
    accumulation: int
    state_bytes: int
    activation_bytes: int
    checkpointing: bool
    flops_a_step: float
    sent_bytes: float  # by a GPU in a step
    exchange_seconds: float  # 0 where no bandwidth was given
    basis: str  # where the seconds come from: "measured", "assumed" or "unknown"
    seconds_a_step: float | None
    days: float | None


def count(config: Config) -> Counted:
    """Count the network of `config` without computing anything."""
    side = config.data.image_size // (1 if config.autoencoder.spec == "identity" else LATENT_FACTOR)
    if config.model.pretrained is not None:
        raise UserError(
            f"{config.run.name}: a pretrained network is not looked into; give what it is, such as --set "
            "model.pretrained=null model.preset=sd_dcn_convs model.swap=null for Stable Diffusion 1.x with DCNv4"
        )
    with torch.device("meta"):
        unet = build_unet(config.model.preset or config.model.unet, swap=config.model.swap)
        tokens = None
        if config.data.condition == "text":
            tokens = torch.empty(CLIP_TOKENS, unet.config.cross_attention_dim)
        denoiser = Denoiser(unet, config.data.num_classes or 0, tokens).train()
    if config.autoencoder.spec == "digits":
        side = unet.config.sample_size
    with FakeTensorMode():
        own = {name: torch.empty(p.shape) for name, p in denoiser.named_parameters()}
        own = {name: p.requires_grad_() for name, p in own.items()}
        own |= {name: torch.empty(b.shape, dtype=b.dtype) for name, b in denoiser.named_buffers()}
        shape = (unet.config.in_channels, side, side)
        counter = flop_counter()
        kept = _kept(denoiser, own, config, shape, counter)
        unet.enable_gradient_checkpointing()
        kept_checkpointed = _kept(denoiser, own, config, shape)
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
        counter.get_total_flops() // PROBES[0],
        kept,
        kept_checkpointed,
    )


def _inputs(images: int, shape: tuple[int, int, int], denoiser: Denoiser) -> tuple[torch.Tensor, ...]:
    x = torch.empty(images, *shape).to(memory_format=torch.channels_last)
    times = torch.zeros(images, dtype=torch.int64)
    if denoiser.takes_text:
        return x, times, torch.empty(images, *denoiser.empty_tokens.shape)
    return x, times, torch.zeros_like(times)


def _kept(
    denoiser: Denoiser,
    own: dict[str, torch.Tensor],
    config: Config,
    shape: tuple[int, int, int],
    counter: FlopCounterMode | None = None,
) -> tuple[int, int]:
    """Bytes that autograd keeps of one forward for each image, and once, without the parameters; the first probe is counted."""
    with counter or nullcontext():  # counting takes twice as long as what it counts
        few = _kept_by(denoiser, own, config, _inputs(PROBES[0], shape, denoiser))
    many = _kept_by(denoiser, own, config, _inputs(PROBES[1], shape, denoiser))
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


def read_measured(path: Path) -> Measured:
    """The JSON of `python -m eval.throughput --train`. Raises `UserError` for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config, seconds, made_with = content["config"], content["seconds"], content["environment"]
        parts = config["train"]["gradient_accumulation"]
        images = config["train"]["batch_size"] // (parts * content["processes"])
        passes = seconds["waiting for the batch"] + seconds["forward"] + seconds["backward"]
        return Measured(
            str(path),
            config,
            made_with["gpu"] or f"{made_with['cpu']}, {made_with['threads']} threads",
            images,
            passes / (images * parts),
            seconds["optimiser"],
            seconds["average"] + seconds["rest"],
            content["peak_bytes"],
        )
    except OSError as error:
        raise UserError(explain(error)) from None
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"{path} is no measurement of a training loop ({type(error).__name__}: {error}); make one with "
            "`python -m eval.throughput CONFIG --train --json FILE`"
        ) from None


def matched(configs: Sequence[Config], measurements: Sequence[Measured]) -> list[Measured | None]:
    """The measurement of each config, None where there is none. Raises `UserError` for one that is of none of them."""
    for one in measurements:
        others = [(config.run.name, one.differences(config)) for config in configs]
        if all(differences for _, differences in others):
            name, nearest = min(others, key=lambda other: len(other[1]))
            raise UserError(
                f"{one.file} was measured with other settings than {name} has ({'; '.join(nearest)}); measure again, or set "
                "the same with --set"
            )
    return [next((one for one in measurements if not one.differences(config)), None) for config in configs]


def sent_bytes(parameters: int, config: Config, gpus: int) -> float:
    """What a GPU sends in a step for the others to have the same weights (a ring, or reduce-scatter and all-gather)."""
    train = config.train
    others = (gpus - 1) / gpus
    gathered = FP32 if ARITHMETIC[train.precision] is None else ARITHMETIC[train.precision].itemsize
    bytes_a_parameter = {
        "ddp": 2 * FP32,
        "fsdp": 2 * train.gradient_accumulation * gathered + FP32,  # for forward and backward; the gradients
        "zero": gathered + FP32,
    }
    return others * bytes_a_parameter[train.parallel] * parameters


def plan(
    counted: Counted,
    config: Config,
    gpus: int,
    tflops: float | None = None,
    measured: Measured | None = None,
    bandwidth: float | None = None,
) -> Plan:
    """What the run of `config` takes on `gpus` GPUs, of the speed that was `measured`, or that achieve `tflops` each.

    bandwidth   GB/s at which a GPU sends to the others
    """
    settings = config.train
    parts = gpus * settings.gradient_accumulation
    if settings.batch_size % parts:
        raise UserError(
            f"{config.run.name}: train.batch_size={settings.batch_size} cannot be shared by {gpus} GPUs in "
            f"{settings.gradient_accumulation} accumulation steps"
        )
    images = settings.batch_size // parts
    an_image, once = counted.kept_checkpointed if settings.gradient_checkpointing else counted.kept
    passes = 1 + BACKWARD + settings.gradient_checkpointing
    flops = float(passes * counted.forward_flops * settings.batch_size)
    sent = sent_bytes(counted.parameters, config, gpus)
    exchange = sent / (bandwidth * 1e9) if bandwidth else 0.0
    seconds = None
    if measured is not None:
        shares = gpus if settings.parallel != "ddp" else 1
        passes_take = settings.gradient_accumulation * images * measured.an_image
        seconds = passes_take + measured.optimizer / shares + measured.rest + exchange
    elif tflops:
        seconds = flops / (gpus * tflops * 1e12) + exchange
    return Plan(
        counted.name,
        gpus,
        settings.parallel if gpus > 1 else "-",
        images,
        settings.gradient_accumulation,
        _state_bytes(counted, config, gpus, once),
        an_image * images + once,
        settings.gradient_checkpointing,
        flops,
        sent,
        exchange,
        "measured" if measured is not None else "assumed" if tflops else "unknown",
        seconds,
        None if seconds is None else seconds * settings.steps / 86400,
    )


def _bytes_a_parameter(config: Config) -> dict[str, int]:
    """What is kept of each parameter, fp32 throughout."""
    averages = len(config.train.ema_widths) if config.train.ema == "power" else 1
    return {"weights": FP32, "gradients": FP32, "AdamW": 2 * FP32, "averages": averages * FP32}


def _state_bytes(counted: Counted, config: Config, gpus: int, once: int) -> int:
    """`once` is what autograd keeps whatever the images, copies of the weights in 16 bits among it."""
    own = _bytes_a_parameter(config)
    whole = sum(own.values()) * counted.parameters
    if gpus == 1 or config.train.parallel == "ddp":
        return whole
    dtype = ARITHMETIC[config.train.precision]
    gathered = FP32 * counted.largest_block
    if config.train.parallel == "zero":
        gathered = counted.parameters * FP32
        if dtype is not None:  # then autograd keeps the same, unless it computes blocks again
            gathered = max(0, counted.parameters * dtype.itemsize - once)
    gradients = counted.parameters if config.train.gradient_accumulation > 1 else 0
    return whole // gpus + gathered + own["gradients"] * gradients


def table(
    counts: Sequence[Counted],
    plans: Sequence[Plan],
    configs: Sequence[Config],
    tflops: float | None,
    measurements: Sequence[Measured | None] = (),
    bandwidth: float | None = None,
) -> str:
    """Both tables as text, and where the times come from."""
    lines = [f"{'network':<24}{'parameters':>13}{'forward':>12}{'kept':>12}{'checkpointed':>14}", "-" * 75]
    lines += [
        f"{c.name:<24}{c.parameters / 1e6:>11.2f} M{_giga(c.forward_flops / 2):>7} GMAC{c.kept[0] / 2**20:>8.0f} MiB"
        f"{c.kept_checkpointed[0] / 2**20:>10.0f} MiB"
        for c in counts
    ]
    lines += [
        "",
        f"{'network':<24}{'GPUs':>5}{'images':>8}{'parts':>6}{'state':>11}{'activations':>13}{'sent a step':>13}{'s a step':>10}"
        f"{'days':>10}",
        "-" * 100,
    ]
    for p in plans:
        seconds, days = (
            ("-", "-") if p.seconds_a_step is None else (f"{p.seconds_a_step:.3g}", f"{p.days:.3g}")
        )
        lines.append(
            f"{p.name:<24}{p.gpus:>5}{p.images:>8}{p.accumulation:>6}{p.state_bytes / 2**30:>7.1f} GiB"
            f"{p.activation_bytes / 2**30:>9.1f} GiB{p.sent_bytes / 1e9:>10.2f} GB{seconds:>10}{days:>10}"
        )
    train = configs[0].train
    checkpointing = "with" if train.gradient_checkpointing else "without"
    lines += [
        "",
        f"batch {train.batch_size}, {train.steps:,} steps, {train.precision}, {checkpointing} gradient checkpointing, "
        f"{train.parallel}",
    ]
    for one, config, measured in zip(counts, configs, measurements or [None] * len(counts), strict=True):
        lines.append(f"{one.name}: {_basis(one, config, measured, tflops)}")
    lines.append(
        f"exchange: at {bandwidth:g} GB/s a GPU, nothing of it hidden"
        if bandwidth
        else "exchange: left out of the times; give --bandwidth GB/s to have it in them"
    )
    return "\n".join(lines)


def _giga(count: float) -> str:
    return f"{count / 1e9:.1f}" if count >= 1e9 else f"{count / 1e9:.2g}"


def _basis(counted: Counted, config: Config, measured: Measured | None, tflops: float | None) -> str:
    """In words, where a network's times come from."""
    if measured is None:
        return (
            f"ASSUMED {tflops:g} TFLOP/s a GPU" if tflops else "no times; give --measured FILE or --tflops F"
        )
    checkpointing = config.train.gradient_checkpointing
    achieved = (1 + BACKWARD + checkpointing) * counted.forward_flops / measured.an_image / 1e12
    text = (
        f"MEASURED {1e3 * measured.an_image:.3g} ms an image and {1e3 * (measured.optimizer + measured.rest):.3g} ms a step on "
        f"{measured.device} with {measured.images} images at once ({achieved:.3g} TFLOP/s; {measured.file})"
    )
    if measured.peak_bytes is not None:
        an_image, once = counted.kept_checkpointed if checkpointing else counted.kept
        foreseen = _state_bytes(counted, config, 1, once) + an_image * measured.images + once
        text += f"; {measured.peak_bytes / 2**30:.1f} GiB of memory there, {foreseen / 2**30:.1f} GiB by the formula"
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m eval.plan", description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS), help="default: 1 8 64")
    parser.add_argument(
        "--measured",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="JSON of `eval.throughput --train` of one of the configs on such a GPU, for each",
    )
    parser.add_argument(
        "--tflops",
        type=float,
        metavar="F",
        help="what one GPU is assumed to achieve in training (10^12 FLOP/s), for configs without a measurement",
    )
    parser.add_argument(
        "--bandwidth", type=float, metavar="GB/S", help="at which a GPU sends to the others (10^9 bytes/s)"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings to change in all configs"
    )
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args(arguments)
    with exit_on_user_error():
        if options.tflops is not None and not options.tflops > 0:
            raise UserError(f"--tflops {options.tflops}: give what a GPU achieves, such as 200")
        if options.bandwidth is not None and not options.bandwidth > 0:
            raise UserError(f"--bandwidth {options.bandwidth}: give what a GPU can send, such as 50")
        if min(options.gpus) < 1:
            raise UserError(f"--gpus {min(options.gpus)}: give 1 or more")
        if options.json:
            check_file_place(options.json, "give another --json")
        configs = [load_config(path, options.set) for path in options.configs]
        counts = [count(config) for config in configs]
        measurements = matched(configs, [read_measured(path) for path in options.measured])
        plans = [
            plan(own, config, gpus, options.tflops, measured, options.bandwidth)
            for own, config, measured in zip(counts, configs, measurements, strict=True)
            for gpus in options.gpus
        ]
        print(table(counts, plans, configs, options.tflops, measurements, options.bandwidth))
        if options.json:
            content = {
                "counts": [asdict(c) for c in counts],
                "measured": [None if one is None else asdict(one) for one in measurements],
                "plans": [asdict(p) for p in plans],
                "environment": environment(),
            }
            write(content, options.json)


if __name__ == "__main__":
    main()
