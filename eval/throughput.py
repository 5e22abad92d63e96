"""Speed, size and memory of a model beside its baseline, measured in turns in one run: `python -m eval.throughput`.

    python -m eval.throughput configs/digits_dcn.yaml --baseline configs/digits_unet.yaml
    python -m eval.throughput runs/digits_dcn --baseline runs/digits_unet --batch-size 64 --json speed.json
    python -m eval.throughput configs/digits_dcn.yaml --train          what the training loop costs beside the network
    python -m eval.throughput configs/digits_dcn.yaml --profile        where the time goes, by kind of module

Forward and training step run on random latents: no data loading, no autoencoder. A training step is noising, forward, backward,
AdamW and the moving average. Sampling counts both halves of guidance. Each round times every model once, so that whatever else
the machine does hits all alike; the table gives the median over rounds, half the interquartile range, and the median ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm_dcn.arithmetic import ARITHMETIC, computing_in
from ldm_dcn.compiling import add_compile_option, compile_unet
from ldm_dcn.config import load_config
from ldm_dcn.denoiser import Denoiser
from ldm_dcn.diffusion import Schedule, add_noise, at, levels, loss, target
from ldm_dcn.ema import EMA, Constant
from ldm_dcn.errors import Parser, UserError, exit_on_user_error
from ldm_dcn.export import load_model
from ldm_dcn.model import Model
from ldm_dcn.places import check_file_place
from ldm_dcn.sampling import SAMPLERS, generate, guided, sample_latents
from ldm_dcn.unet import build_unet

from . import profile
from .columns import in_columns
from .environment import environment
from .flops import flop_counter
from .plan import CLIP_TOKENS
from .results import write
from .sources import classes_of
from .stopwatch import Rounds

DEFAULT_CONFIG = "configs/digits_dcn.yaml"
DEFAULT_BASELINE = "configs/digits_unet.yaml"
LARGEST_DEFAULT_BATCH = 64
LOOP_STEPS = 60  # timed by --train
WARM_UP = 3  # untimed calls before the first round: allocator, kernel selection
PIXELS_PER_LATENT = 8  # assumed where the autoencoder is not at hand: Stable Diffusion's


@dataclass(frozen=True)
class Settings:
    batch_size: int
    precision: str  # fp32 | bf16 | fp16, by autocast
    device: str
    rounds: int
    sampler: str
    sampler_steps: int
    guidance: float
    compile: str | None = None  # torch.compile's mode
    tf32: bool = True  # on NVIDIA GPUs, for what is computed in fp32

    def autocast(self) -> AbstractContextManager[None]:
        return computing_in(self.precision, torch.device(self.device))


@dataclass(frozen=True)
class Subject:
    """A network to be measured, in `precision` where that is another than the settings'; `autoencoder` is None in `model` where it is not
    at hand."""

    name: str
    model: Model
    precision: str | None = None

    def settings(self, common: Settings) -> Settings:
        return replace(common, precision=self.precision or common.precision)


@dataclass
class Timing(Rounds):
    """Seconds of one activity of one network."""

    def ratio(self, baseline: Timing) -> float:
        """Median over rounds of this time over the baseline's in the same round."""
        return statistics.median(a / b for a, b in zip(self.seconds, baseline.seconds, strict=True))


@dataclass(frozen=True)
class Figures:
    """What was measured of one subject. Memory in bytes; MACs of one forward of one image."""

    name: str
    parameters: int
    macs: int
    state_bytes: int  # weights, gradients, two moments of AdamW, moving average
    activation_bytes: int  # kept by autograd for backward, at the batch size
    peak_bytes: int | None  # of a training step, from CUDA's allocator; None on the CPU
    timings: dict[str, Timing]


# activity -> (title, whether it is counted in images)
ACTIVITIES = {
    "forward": "forward",
    "training": "training step",
    "sampling": "sampling, latents only",
    "drawing": "sampling with autoencoder",
}


def open_subject(path: str, overrides: Sequence[str] = (), device: str = "cpu") -> Subject:
    """A network from a config file (fresh weights) or from a run, export or hub id."""
    if not path.endswith((".yaml", ".yml")):
        return _as_trained(Subject(Path(path).name, load_model(path, device=device)))
    config = load_config(path, overrides)
    autoencoder = _autoencoder_if_at_hand(config)
    torch.manual_seed(0)
    unet = build_unet(config.model.preset or config.model.unet, swap=config.model.swap)
    classes, tokens = config.data.num_classes, None
    if config.data.condition == "text":
        classes, tokens = 0, torch.zeros(CLIP_TOKENS, unet.config.cross_attention_dim)
    elif classes is None:
        classes, _ = classes_of(config)
    denoiser = Denoiser(unet, classes, tokens).to(device=device, memory_format=torch.channels_last)
    side = config.data.image_size // (autoencoder.factor if autoencoder else PIXELS_PER_LATENT)
    model = Model(denoiser, autoencoder, Schedule(**config.diffusion.model_dump()), (unet.config.in_channels, side, side),
                  Path(path).stem, 0, config.resolved())  # fmt: skip
    return _as_trained(Subject(Path(path).stem, model))


def _as_trained(subject: Subject) -> Subject:
    """With what the run's config says of a step beside its precision. Raises `UserError` for what is not measured here."""
    train = subject.model.config.get("train", {})
    if (attention := train.get("attention", "sdpa")) != "sdpa":
        raise UserError(
            f"{subject.name} trains with train.attention={attention}, and sdpa is what is timed here; --train times one config's own "
            "steps, or give --set train.attention=sdpa"
        )
    if train.get("gradient_checkpointing"):
        subject.model.unet.enable_gradient_checkpointing()
    return subject


def compare(
    subjects: Sequence[Subject],
    settings: Settings,
    progress: bool = True,
    wanted: Sequence[str] = tuple(ACTIVITIES),
) -> list[Figures]:
    """Measure all subjects, in turns; of the activities, those `wanted`."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.tf32
    activities = [
        {name: activity for name, activity in _activities(subject, settings).items() if name in wanted}
        for subject in subjects
    ]
    counted = [_count(subject, settings) for subject in subjects]
    if settings.compile:
        for subject in subjects:
            compile_unet(subject.model.denoiser.unet, settings.compile)  # as train.compile does
    peaks = [_peak(subject, settings) for subject in subjects]
    timings = [{name: Timing() for name in own} for own in activities]
    names = list(dict.fromkeys(name for own in activities for name in own))
    with tqdm(
        total=len(names) * (settings.rounds + 1), desc="measuring", disable=not progress, leave=False
    ) as bar:
        for name in names:
            turns = [
                (own[name], timing[name])
                for own, timing in zip(activities, timings, strict=True)
                if name in own
            ]
            slow = name in ("sampling", "drawing")
            for activity, _ in turns:
                for _ in range(1 if slow else WARM_UP):
                    activity()
            bar.update()
            for turn in range(settings.rounds):
                for activity, timing in turns if turn % 2 == 0 else turns[::-1]:  # nobody always comes first
                    timing.seconds.append(_time(activity, settings.device))
                bar.update()
    return [Figures(subject.name, **count, peak_bytes=peak, timings=timing)
            for subject, count, peak, timing in zip(subjects, counted, peaks, timings, strict=True)]  # fmt: skip


def table(figures: Sequence[Figures], baseline: int | None, settings: Settings) -> str:
    """All figures as one table; with a baseline, times are also given as multiples of its."""
    base = figures[baseline] if baseline is not None else None
    header = ["", *(f.name for f in figures)]
    rows = [["parameters", *(f"{f.parameters:,}" for f in figures)],
            ["MACs of a forward, one image", *(f"{f.macs / 1e6:,.2f} M" for f in figures)]]  # fmt: skip
    for name, title in ACTIVITIES.items():
        if not any(name in f.timings for f in figures):
            continue
        with_ratio = base is not None and name in base.timings and len(figures) > 1
        cells = [
            _timing_cells(f.timings.get(name), base.timings[name] if with_ratio else None, settings)
            for f in figures
        ]
        rows += [
            [f"{title}, ms", *(cell[0] for cell in cells)],
            [f"{title}, images/s", *(cell[1] for cell in cells)],
        ]
        if with_ratio:
            rows.append([f"{title}, time / {base.name}'s", *(cell[2] for cell in cells)])
    rows.append(["weights, gradients, AdamW, EMA", *(_size(f.state_bytes) for f in figures)])
    rows.append(["activations kept for backward", *(_size(f.activation_bytes) for f in figures)])
    if any(f.peak_bytes is not None for f in figures):
        rows.append(["peak memory of a training step", *(_size(f.peak_bytes or 0) for f in figures)])
    lines = in_columns([header, *rows])
    lines.insert(1, "-" * len(lines[0]))
    how = f"{settings.precision}, compiled ({settings.compile})" if settings.compile else settings.precision
    lines += ["", f"batch {settings.batch_size}, {how}, {settings.rounds} rounds in turns, median and half the "
              f"interquartile range; {settings.sampler} {settings.sampler_steps} steps at guidance {settings.guidance:g}",
              _machine(settings)]  # fmt: skip
    return "\n".join(lines)


def _machine(settings: Settings) -> str:
    made_with = environment()
    cuda = settings.device.startswith("cuda")
    where = made_with["gpu"] if cuda else f"{made_with['cpu']}, {made_with['threads']} threads"
    return f"{where}, torch {torch.__version__}"


def _timing_cells(timing: Timing | None, base: Timing | None, settings: Settings) -> tuple[str, str, str]:
    if timing is None:
        return "-", "-", "-"
    ratio = f"{timing.ratio(base):.2f}" if base is not None else "-"
    return (
        f"{1e3 * timing.median:,.1f} ± {1e3 * timing.spread:,.1f}",
        f"{settings.batch_size / timing.median:,.1f}",
        ratio,
    )


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _activities(subject: Subject, settings: Settings) -> dict[str, Callable[[], object]]:
    """What is timed, by name; inputs are made once, weights change as in training."""
    model, denoiser, settings = subject.model, subject.model.denoiser, subject.settings(settings)
    x, _, times, condition = _inputs(model, settings)
    seeds = range(settings.batch_size)

    def forward() -> None:
        denoiser.eval()
        with torch.no_grad(), settings.autocast():
            denoiser(x, times, condition)

    def sampling() -> None:
        denoiser.eval()
        with settings.autocast():
            sample_latents(guided(denoiser, condition, settings.guidance), model.latent_shape, seeds, schedule=model.schedule,
                           sampler=settings.sampler, steps=settings.sampler_steps, device=settings.device)  # fmt: skip

    def drawing() -> None:
        with settings.autocast():
            generate(model, condition.cpu() if denoiser.is_conditional else None, seeds, sampler=settings.sampler,
                     steps=settings.sampler_steps, guidance=settings.guidance, batch_size=settings.batch_size)  # fmt: skip

    activities = {"forward": forward, "training": _training(subject, settings), "sampling": sampling}
    if model.autoencoder is not None:
        activities["drawing"] = drawing
    return activities


def _training(subject: Subject, settings: Settings) -> Callable[[], None]:
    """One optimiser step as `ldm_dcn.trainer` takes it."""
    denoiser = subject.model.denoiser
    training_loss = _training_loss(subject, settings)
    optimiser = torch.optim.AdamW(denoiser.parameters(), lr=1e-5, weight_decay=0.03, fused=True)
    averages, steps = [EMA(denoiser, Constant(0.999)) for _ in range(_averages(subject))], count(1)

    def step() -> None:
        training_loss().backward()
        optimiser.step()
        optimiser.zero_grad()
        number = next(steps)
        for average in averages:
            average.update(number)

    return step


def _averages(subject: Subject) -> int:
    """How many moving averages its training keeps."""
    train = subject.model.config.get("train", {})
    return len(train["ema_widths"]) if train.get("ema") == "power" else 1


def _training_loss(subject: Subject, settings: Settings) -> Callable[[], Tensor]:
    """The forward pass of such a step."""
    model, denoiser, settings = subject.model, subject.model.denoiser, subject.settings(settings)
    x, noise, times, condition = _inputs(model, settings)
    table = tuple(level.to(settings.device) for level in levels(model.schedule))
    prediction = model.schedule.prediction
    denoiser.requires_grad_(True)

    def forward() -> Tensor:
        denoiser.train()
        alpha, sigma = at(table, times)
        with settings.autocast():
            output = denoiser(add_noise(x, noise, alpha, sigma), times, condition)
        return loss(output, target(prediction, x, noise, alpha, sigma))

    return forward


def _inputs(model: Model, settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents and noise (N, C, h, w), times (N,), labels (N,) or tokens (N, T, D)."""
    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch_size, *model.latent_shape)
    x, noise = (
        torch.randn(shape, generator=generator).to(settings.device, memory_format=torch.channels_last)
        for _ in range(2)
    )
    times = torch.randint(model.schedule.num_steps, shape[:1], generator=generator).to(settings.device)
    if model.denoiser.takes_text:
        condition = torch.randn(*shape[:1], *model.denoiser.empty_tokens.shape, generator=generator)
    else:
        condition = torch.randint(max(1, model.num_classes), shape[:1], generator=generator)
    return x, noise, times, condition.to(settings.device)


def _count(subject: Subject, settings: Settings) -> dict[str, int]:
    """Everything that is counted, not timed; of the network as it is written, before it is compiled."""
    model, denoiser, settings = subject.model, subject.model.denoiser, subject.settings(settings)
    x, _, times, condition = _inputs(model, settings)
    parameters = list(denoiser.parameters())
    kept: dict[int, int] = {}  # storage address -> bytes: a tensor saved twice counts once
    own = {p.untyped_storage().data_ptr() for p in parameters}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    denoiser.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), settings.autocast():
        prediction = denoiser(x, times, condition)
    del prediction
    return {
        "parameters": sum(p.numel() for p in parameters),
        "macs": count_macs(denoiser, x[:1], times[:1], condition[:1]),
        "state_bytes": sum((4 + _averages(subject)) * 4 * p.numel() for p in parameters),
        "activation_bytes": sum(kept.values()),
    }


def _peak(subject: Subject, settings: Settings) -> int | None:
    """The most memory that a training step takes, this network's weights included and the other networks left out; None on the
    CPU, whose allocator does not tell."""
    if not settings.device.startswith("cuda"):
        return None
    denoiser = subject.model.denoiser
    own = sum(tensor.nbytes for tensor in (*denoiser.parameters(), *denoiser.buffers()))
    others = torch.cuda.memory_allocated() - own
    step = _training(subject, settings)
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - others
    del step
    denoiser.zero_grad(set_to_none=True)
    return peak


def count_macs(denoiser: torch.nn.Module, *inputs: Tensor) -> int:
    """Multiply-accumulates of one forward: half of the FLOPs of matrix products, convolutions, attention and DCNv4.

    Raises `UserError` where DCNv4 runs and has no formula, rather than leaving it out.
    """
    from torch.utils.flop_counter import flop_registry

    from dcnv4_ext import DCNv4

    swapped = any(isinstance(module, DCNv4) for module in denoiser.modules())
    if swapped and torch.ops.dcnv4_ext.forward not in flop_registry:
        raise UserError(
            "DCNv4 has no formula in torch.utils.flop_counter, its MACs would be left out; update dcnv4_ext"
        )
    with torch.no_grad(), flop_counter() as counter:
        denoiser(*inputs)
    return counter.get_total_flops() // 2


def _time(activity: Callable[[], object], device: str) -> float:
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    activity()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _autoencoder_if_at_hand(config: Any) -> Any:
    from ldm_dcn.autoencoder import load_autoencoder

    try:
        return load_autoencoder(config.autoencoder.spec, dtype=config.autoencoder.dtype,
                                image_channels=config.data.image_channels)  # fmt: skip
    except (
        UserError
    ):  # a config's autoencoder may lie on another machine; then sampling is measured without it
        return None


def main(arguments: Iterable[str] | None = None) -> None:
    parser = Parser(prog="python -m eval.throughput", description=__doc__.splitlines()[0])
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help=f"config, run, export or hub id (default: {DEFAULT_CONFIG})",
    )
    parser.add_argument(
        "--baseline",
        help=f"what to compare with, likewise (default: {DEFAULT_BASELINE} for the default model)",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings to change in all configs"
    )
    parser.add_argument(
        "--batch-size", type=int, help=f"default: the first model's, at most {LARGEST_DEFAULT_BATCH}"
    )
    parser.add_argument("--precision", choices=tuple(ARITHMETIC), help="default: the models'")
    add_compile_option(parser, "measure")
    parser.add_argument(
        "--only", nargs="+", choices=tuple(ACTIVITIES), default=list(ACTIVITIES), help="default: all of these"
    )
    parser.add_argument("--rounds", type=int, default=9, help="timed turns (default: %(default)s)")
    parser.add_argument("--sampler", default="dpm++", help=f"{', '.join(SAMPLERS)} (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=1.5, help="default: %(default)s")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="such as cuda:1 (default: %(default)s)",
    )
    parser.add_argument(
        "--train", action="store_true", help="time the parts of the training loop of one config"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="time forward and backward by kind of module, and nothing else: DCNv4, convolutions, attention, ...",
    )
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args(None if arguments is None else list(arguments))
    with exit_on_user_error():
        run(options)


def run(options: argparse.Namespace) -> None:
    """Measure what the command line asks for, print it, write it."""
    paths = options.models or [DEFAULT_CONFIG]
    baseline = options.baseline or (None if options.models else DEFAULT_BASELINE)
    if baseline:
        paths = [*paths, baseline]
    missing = [path for path in paths if path.endswith((".yaml", ".yml")) and not os.path.exists(path)]
    if missing:
        raise UserError(f"{missing[0]} does not exist; give a config, a run or an export")
    if options.compile and (options.train or options.profile):
        raise UserError("--compile goes with neither --train (there: --set train.compile=true) nor --profile")
    if options.train and options.profile:
        raise UserError("--train and --profile measure different things; give one of them")
    if options.rounds < 1 or (options.batch_size is not None and options.batch_size < 1):
        raise UserError("--rounds and --batch-size must be at least 1")
    if options.json:
        check_file_place(options.json, "give another --json")
    if options.train:
        time_the_loop(paths[0], options)
        return
    subjects = [open_subject(path, options.set, options.device) for path in paths]
    train, *others = (subject.model.config.get("train", {}) for subject in subjects)
    precisions = list(dict.fromkeys(own.get("precision", "fp32") for own in (train, *others)))
    if len(precisions) > 1 and options.precision is None:
        raise UserError(
            f"the models train in {' and '.join(precisions)}, and one table compares one; give --precision"
        )
    settings = Settings(
        batch_size=options.batch_size
        or min(train.get("batch_size", LARGEST_DEFAULT_BATCH), LARGEST_DEFAULT_BATCH),
        precision=options.precision or precisions[0],
        device=options.device,
        rounds=options.rounds,
        sampler=options.sampler,
        sampler_steps=options.steps,
        guidance=options.guidance,
        compile=options.compile,
        tf32=train.get("tf32", True),
    )
    if options.profile:
        profiles = profile_modules(subjects, settings)
        print(profile.table(profiles))
        print(
            f"\nbatch {settings.batch_size}, {settings.precision}, medians of {settings.rounds} passes as in training"
        )
        print(_machine(settings))
        if options.json:
            write_json([], settings, options.json, profiles)
        return
    figures = compare(subjects, settings, wanted=options.only)
    print(table(figures, len(figures) - 1 if baseline else None, settings))
    if options.json:
        write_json(figures, settings, options.json)


def profile_modules(
    subjects: Sequence[Subject], settings: Settings, progress: bool = True
) -> list[profile.Profile]:
    """Where forward and backward of a training step go, by kind of module (eval/profile.py), one subject after another."""
    return [
        profile.profile(
            subject.name,
            subject.model.denoiser,
            _training_loss(subject, settings),
            rounds=settings.rounds,
            device=settings.device,
            progress=progress,
        )
        for subject in subjects
    ]


def time_the_loop(path: str, options: argparse.Namespace) -> None:
    from . import loop

    if not path.endswith((".yaml", ".yml")):
        raise UserError(f"{path} is no config; --train takes the YAML file of one")
    config = load_config(path, options.set)
    cost = loop.measure_loop(config, LOOP_STEPS)
    print(loop.table(cost, config))
    if options.json:
        medians = {name: cost.median(name) for name in cost.parts}
        content = {"config": config.resolved(), "seconds": medians, "step": statistics.median(cost.step),
                   "overhead": cost.overhead, "loader": cost.loader, "steps": len(cost.step), "processes": cost.processes,
                   "peak_bytes": cost.peak_bytes, "environment": environment()}  # fmt: skip
        write(content, options.json)


def write_json(
    figures: Sequence[Figures], settings: Settings, path: Path, profiles: Sequence[profile.Profile] = ()
) -> None:
    content = {
        "settings": asdict(settings),
        "figures": [asdict(f) for f in figures],
        "profiles": [asdict(p) for p in profiles],
        "environment": environment(),
    }
    write(content, path)


if __name__ == "__main__":
    main()
