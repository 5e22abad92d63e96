"""From noise to images: samplers over diffusers' schedulers, one noise an image.

Schedulers are built from settings of ours, never from a file: a misspelt setting is refused, and nothing is
ever clipped, because latents are not confined to [-1, 1] (diffusers' own DDIM defaults clip, and end beside
the data).
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from numbers import Real
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    SchedulerMixin,
)

from dcnv4_ext.geometry import is_whole

from . import randomness
from .arithmetic import check_precision, computing_in
from .autoencoder import to_uint8
from .denoiser import Denoiser
from .diffusion import Schedule, alpha_bars, denoised, guide, levels
from .errors import UserError
from .model import Model

# What images are drawn with where neither the caller nor the run says otherwise (`resolved`).
DEFAULTS: dict[str, Any] = {
    "sampler": "dpm++",
    "steps": 50,
    "guidance": 1.5,
    "guidance_interval": (0.0, 1.0),
    "guidance_rescale": 0.0,
}

# noised latents (N, C, h, w), times (N,) -> what `Schedule.prediction` says, (N, C, h, w)
Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# All end at sigma = 0 exactly. DPM-Solver++ takes its last step at first order, because the second order's
# difference quotient in log(alpha / sigma) is infinite there. DDIM is DPM-Solver++ of order 1 (Lu et al.
# 2022, section 4.2); diffusers' DDIMScheduler steps by num_steps // steps whatever its times are, and so
# misses them and the data where steps does not divide num_steps. DDPM, a draw from q(x_s | x_t, x_0) (Ho et al.
# 2020, eq. 6-7, for any s < t), is SDE-DPM-Solver++ of order 1, which takes noise from us where diffusers'
# DDPMScheduler draws its own. Heun's method evaluates the network twice a step, but for the last, which goes to
# sigma = 0 (Karras et al. 2022, algorithm 1).
_DPM = {
    "algorithm_type": "dpmsolver++",
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "thresholding": False,
}
SAMPLERS: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
    "dpm++": (DPMSolverMultistepScheduler, {**_DPM, "solver_order": 2}),
    "ddim": (DPMSolverMultistepScheduler, {**_DPM, "solver_order": 1}),
    "euler": (EulerDiscreteScheduler, {"final_sigmas_type": "zero"}),
    "ddpm": (
        DPMSolverMultistepScheduler,
        {**_DPM, "algorithm_type": "sde-dpmsolver++", "solver_order": 1},
    ),
    "heun": (HeunDiscreteScheduler, {}),
}


# What diffusers calls the predictions on a schedule of betas.
PREDICTION_TYPES = {"noise": "epsilon", "v": "v_prediction", "x0": "sample"}


def check_sampler(name: str) -> None:
    """Raise `UserError` for an unknown sampler."""
    if not isinstance(name, str) or name not in SAMPLERS:
        raise UserError(f"sampler '{name}' is unknown; use one of {', '.join(SAMPLERS)}")


def build_scheduler(sampler: str, schedule: Schedule, **options: Any) -> SchedulerMixin:
    """The diffusers scheduler of `sampler` on our noise levels, fed with x_0; `options` are settings of its own.

    Raises `UserError` for an unknown sampler or setting, naming the nearest, and for thresholding, which
    would cut off latents.
    """
    check_sampler(sampler)
    scheduler, defaults = SAMPLERS[sampler]
    known = [name for name in inspect.signature(scheduler.__init__).parameters if name != "self"]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; it knows {', '.join(known)}"
            raise UserError(f"sampler '{sampler}' has no setting '{name}'{hint}")
    for name in ("thresholding", "clip_sample"):
        if options.get(name):
            raise UserError(
                f"sampler '{sampler}': {name} would cut off latents, which have no fixed range; leave it out"
            )
    built = scheduler(
        num_train_timesteps=schedule.num_steps,
        prediction_type="sample",
        timestep_spacing="trailing",
        **{**defaults, **options},
    )
    built.alphas_cumprod = alpha_bars(schedule)  # in fp64, and for paths that have no betas
    if _goes_straight(built):
        alpha, sigma = (level.double() for level in levels(schedule))
        built.alphas_cumprod = 1 / (1 + (sigma / (alpha + sigma)).square())
    return built


def _goes_straight(scheduler: SchedulerMixin) -> bool:
    """Whether `scheduler` is to follow x / (alpha + sigma), which goes straight from data to noise, in place of x / alpha.

    With s the noise level, du / ds = (u - x_0) / s for either u, and at first order both make the same step. Heun's mean of two
    slopes does not bear the long first step of s = sigma / alpha: from 1,999 to 19 in 20 steps of `flow`, or from 4,096 without
    terminal signal.
    """
    return isinstance(scheduler, HeunDiscreteScheduler)


def published_scheduler(schedule: Schedule) -> SchedulerMixin:
    """The diffusers scheduler that tells others the noise levels and what is predicted there."""
    if schedule.prediction == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=schedule.num_steps, shift=1.0)
    return DPMSolverMultistepScheduler(
        num_train_timesteps=schedule.num_steps,
        beta_schedule=schedule.beta_schedule,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        prediction_type=PREDICTION_TYPES[schedule.prediction],
        rescale_betas_zero_snr=schedule.zero_terminal_snr,
        timestep_spacing="trailing",
        **SAMPLERS["dpm++"][1],
    )


def sampling_times(num_steps: int, steps: int) -> list[int]:
    """`steps` times from num_steps - 1 down, evenly spaced and rounded ("trailing", Lin et al. 2024).

    Begins where training ends, unlike "leading". In whole numbers, because diffusers' own floating-point
    version gives one time too many, -1, for 62 of the 1,000 step counts (61 is the first).
    """
    return [(2 * num_steps * (steps - i) + steps) // (2 * steps) - 1 for i in range(steps)]


@torch.no_grad()
def sample_latents(
    predict: Predict,
    shape: Sequence[int],
    seeds: Sequence[int] | torch.Tensor,
    *,
    schedule: Schedule,
    sampler: str = DEFAULTS["sampler"],
    steps: int = DEFAULTS["steps"],
    device: torch.device | str = "cpu",
    **options: Any,
) -> torch.Tensor:
    """(len(seeds), *shape) latents: latent i comes from the noise of seeds[i] alone, at the start and, of samplers that add some,
    at each time.

    `predict(x, t)` gives what `schedule.prediction` says, for x = alpha x_0 + sigma eps at the times t; it already
    contains the guidance.
    """
    scheduler = build_scheduler(sampler, schedule, **options)
    check_steps(steps, schedule)
    scheduler.set_timesteps(timesteps=sampling_times(schedule.num_steps, steps))
    table = levels(schedule)
    straight = _goes_straight(scheduler)
    adds_noise = scheduler.config.get("algorithm_type", "").startswith("sde-")
    x = randomness.normal(shape, 0, "image", seeds).to(device) * scheduler.init_noise_sigma
    # Levels stay on the CPU, as numbers, and the times go over at once: a copy in each step would have the program that launches
    # a GPU's kernels wait until all of them are done. Some schedulers give floats, which FSDP would round to its 16 bits.
    for t, there in zip(scheduler.timesteps, scheduler.timesteps.long().to(device), strict=True):
        alpha, sigma = (level[t.long()] for level in table)
        # the schedulers know variance-preserving paths; every other is one of those, scaled
        scale = torch.hypot(alpha + sigma if straight else alpha, sigma)
        noised = scheduler.scale_model_input(x, t) * scale
        output = predict(noised, there.expand(len(x)))
        x0 = denoised(schedule.prediction, output, noised, alpha, sigma)
        noise = {}
        if adds_noise:  # else diffusers would draw it from torch's global generator
            noise["variance_noise"] = randomness.normal(shape, int(t), "step of an image", seeds)
        x = scheduler.step(x0, t, x, return_dict=False, **noise)[0]
    return x


def guided(
    denoiser: Denoiser,
    condition: torch.Tensor,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    num_steps: int = 1000,
    rescale: float = 0.0,
) -> Predict:
    """The `predict` of one batch of conditions, on their device; guidance runs both halves at once.

    condition   labels (N,) or text tokens (N, T, D)
    interval    guidance works at times t with low <= t / (num_steps - 1) <= high, 0 being the data's end (Kynkaanniemi
                et al. 2024); outside, the condition alone decides
    rescale     of `rescaled`
    """
    null = denoiser.null_condition(len(condition)).to(condition)
    dtype = next(denoiser.parameters()).dtype
    low, high = interval
    always = low == 0 and high == 1

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = x.to(dtype=dtype, memory_format=torch.channels_last)
        unguided = scale == 1 or not denoiser.is_conditional
        # `float` waits for a GPU
        if unguided or not (always or low <= float(t[0]) / max(1, num_steps - 1) <= high):
            return denoiser(x, t, condition).to(
                torch.float32, copy=True
            )  # a CUDA graph's next call overwrites it
        both = denoiser(torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, condition])).float()
        unconditional, conditional = both.chunk(2)
        output = guide(unconditional, conditional, scale)
        return rescaled(output, conditional, rescale) if rescale else output

    return predict


def rescaled(output: torch.Tensor, conditional: torch.Tensor, share: float) -> torch.Tensor:
    """The guided `output` (N, C, h, w), `share` of the way to the standard deviation of `conditional`, image by image.

    Takes back the contrast that guidance adds with its scale (Lin et al. 2024, eq. 15-16, where `share` is phi = 0.7); as
    there, in what the network predicts.
    """
    wanted, given = (x.flatten(1).std(1, correction=0).view(-1, 1, 1, 1) for x in (conditional, output))
    factor = wanted / given.clamp(min=torch.finfo(given.dtype).tiny)  # nothing but zeros stays that
    return share * factor * output + (1 - share) * output


def resolved(model: Model, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` settings of `generate`, and those of `DEFAULTS` that it lacks: as the run's `sample` section has them, which an export
    of somebody else's may not have. Raises `UserError` for values that mean nothing."""
    section = model.config.get("sample")
    section = section if isinstance(section, Mapping) else {}
    own = {name: section[name] for name in DEFAULTS if section.get(name) is not None}
    settings = {**DEFAULTS, **own, **given}
    check_guidance(settings["guidance"], settings["guidance_interval"], settings["guidance_rescale"])
    check_sampler(settings["sampler"])
    check_steps(settings["steps"], model.schedule)
    return settings


def generate(
    model: Model,
    conditions: Sequence[int] | torch.Tensor | None,
    seeds: Sequence[int] | torch.Tensor,
    *,
    sampler: str = DEFAULTS["sampler"],
    steps: int = DEFAULTS["steps"],
    guidance: float = DEFAULTS["guidance"],
    guidance_interval: tuple[float, float] = DEFAULTS["guidance_interval"],
    guidance_rescale: float = DEFAULTS["guidance_rescale"],
    size: tuple[int, int] | None = None,
    precision: str | None = None,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> torch.Tensor:
    """Draw uint8 images (N, c, H, W) on the CPU; image i depends on seeds[i], conditions[i] and settings only.

    conditions         (N,) classes, whole numbers, or (N, T, D) text tokens (`Model.encode_prompts`); None draws without a condition
    guidance           s in u + s (c - u); 1 is no guidance
    guidance_interval  shares of the times, 0 being the data's end, between which it works (`guided`)
    guidance_rescale   0 to 1: how much of the contrast that guidance adds is taken back (`rescaled`)
    size               (height, width) in pixels, if not the one the model was trained at (`Model.latent_shape_at`)
    precision          what the network computes in, by autocast: "fp32", "bf16" or "fp16"; None leaves that to the caller, whose
                       own autocast stays, and is fp32 without one. The autoencoder has a number format of its own
    batch_size         images at once: changes memory and speed, not the images
    progress           called after each batch with the number of images it made

    Raises `UserError` for a label the model does not know, for settings that mean nothing, and where there is nothing to draw.
    """
    check_guidance(guidance, guidance_interval, guidance_rescale)
    check_sampler(sampler)
    check_steps(steps, model.schedule)
    if precision is not None:
        check_precision(precision)
    latent_shape = model.latent_shape_at(size)
    if not is_whole(batch_size) or batch_size < 1:
        raise UserError(f"batch size {batch_size!r}: draw at least one image at once, a whole number")
    batch_size = int(batch_size)
    if progress is not None and not callable(progress):
        raise UserError(
            f"progress {progress!r} cannot be called; give a function of the number of images made"
        )
    seeds = whole_numbers(seeds, "seed")
    if not len(seeds):
        raise UserError("there is nothing to draw; ask for at least one image")
    if int(seeds.min()) < 0:
        raise UserError(f"seed {int(seeds.min())} is negative; use 0 or more")
    conditions = _checked_conditions(model, conditions, len(seeds))
    denoiser = model.denoiser
    was_training = denoiser.training
    denoiser.eval()
    images = []
    try:
        with computing_in(precision, denoiser.device):
            for some, some_seeds in zip(conditions.split(batch_size), seeds.split(batch_size), strict=True):
                latents = sample_latents(
                    guided(
                        denoiser,
                        some.to(denoiser.device),
                        guidance,
                        guidance_interval,
                        model.schedule.num_steps,
                        guidance_rescale,
                    ),
                    latent_shape,
                    some_seeds,
                    schedule=model.schedule,
                    sampler=sampler,
                    steps=steps,
                    device=denoiser.device,
                )
                if not bool(torch.isfinite(latents).all()):
                    where, mend = (
                        ("", "") if precision in (None, "fp32") else (f" in {precision}", ", or fp32")
                    )
                    raise UserError(
                        f"{model.name} draws NaN or infinity at guidance {guidance}{where}; use a smaller one{mend}, or look whether its "
                        "training diverged"
                    )
                images.append(to_uint8(model.autoencoder.decode(latents)).cpu())
                if progress is not None:
                    progress(len(some_seeds))
                if model.between_batches is not None:
                    model.between_batches()
    finally:
        denoiser.train(was_training)
    return torch.cat(images)


def check_guidance(scale: float, interval: tuple[float, float], rescale: float = 0.0) -> None:
    """Raise `UserError` for a guidance, an interval of times for it, or a share of rescaling, that means nothing."""
    if not _is_number(scale):
        raise UserError(f"guidance {scale!r} is no number; give such as 1.5; 1 is none")
    if not (math.isfinite(scale) and scale >= 0):
        raise UserError(f"guidance {scale}: guidance must be finite and not negative; 1 is none")
    mend = "give two shares of the times, 0 to 1, the smaller first"
    if not isinstance(interval, Sequence) or len(interval) != 2 or not all(map(_is_number, interval)):
        raise UserError(f"guidance interval {interval!r}: {mend}")
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise UserError(f"guidance interval {low} to {high}: {mend}")
    if not _is_number(rescale) or not 0 <= rescale <= 1:
        raise UserError(f"guidance rescale {rescale!r}: give a share, 0 to 1; 0 is none")


def check_steps(steps: int, schedule: Schedule) -> None:
    """Raise `UserError` for a number of sampling steps that the schedule has no times for."""
    if not is_whole(steps) or not 1 <= steps <= schedule.num_steps:
        raise UserError(
            f"{steps!r} sampling steps were asked for; use 1 to {schedule.num_steps}, a whole number"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def whole_numbers(values: Iterable[int] | torch.Tensor, what: str) -> torch.Tensor:
    """`values`, or the one there is, as (N,) int64 on the CPU. Raises `UserError`, naming the first that is no whole number; `what` one of
    them is."""
    if hasattr(values, "tolist"):  # tensors and arrays
        values = values.tolist()
    values = [values] if is_whole(values) else values
    if isinstance(values, (str, bytes, Mapping, Set)) or not isinstance(values, Iterable):
        raise UserError(f"{what}s are {values!r}; give whole numbers in a list, such as [3, 7]")
    values = list(values)
    if wrong := [value for value in values if not is_whole(value)]:
        raise UserError(f"{what} {wrong[0]!r} is no whole number; give such as [3, 7]")
    try:
        return torch.tensor([int(value) for value in values], dtype=torch.int64)
    except (OverflowError, ValueError, RuntimeError):  # which of them depends on torch's version
        raise UserError(f"every {what} must be a whole number of at most {2**63 - 1}") from None


def _checked_conditions(
    model: Model, conditions: Sequence[int] | torch.Tensor | None, count: int
) -> torch.Tensor:
    denoiser = model.denoiser
    if conditions is None:
        return denoiser.null_condition(count).cpu()
    if denoiser.takes_text:
        return _checked_tokens(model, conditions, count)
    labels = check_labels(model, conditions)
    if len(labels) != count:
        raise ValueError(f"{len(labels)} labels came with {count} seeds; give one label a seed")
    return labels


def check_labels(model: Model, values: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """The labels as a tensor. Raises `UserError` where the model does not know one of them."""
    classes, labels = model.num_classes, whole_numbers(values, "label")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        number = str(int(wrong[0]))
        known = f"{classes} classes, 0 to {classes - 1}" if classes else "no classes (leave the labels out)"
        if number in model.class_names:
            known += f"; the class called {number} has number {model.class_names.index(number)}"
        raise UserError(f"label {number} does not exist: {model.name} knows {known}")
    return labels


def _checked_tokens(model: Model, tokens: object, count: int) -> torch.Tensor:
    wanted = (count, *model.denoiser.empty_tokens.shape)
    shape = tuple(tokens.shape) if isinstance(tokens, torch.Tensor) else None
    if shape != wanted:
        got = f"have shape {shape}" if shape is not None else f"are a {type(tokens).__name__}"
        raise UserError(
            f"{model.name} takes text: conditions {got}, tokens of shape {wanted} were expected; make them with "
            "model.encode_prompts"
        )
    return tokens.float()
