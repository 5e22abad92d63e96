"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch

from . import compiling, diffusion, randomness
from .batches import Batch
from .config import Config, TrainConfig
from .errors import UserError
from .opening import open_run
from .parallel import gradient_norms, gradients, gradients_exchanged
from .run import GRID, SCORE, VALIDATION, NonFinite, Run, Score, phase_at
from .signals import REQUEUE, StopSignals, leaving_on_requeue

NON_FINITE = 3  # exit code of a run whose loss became NaN or infinite
# Times that one step is taken again at half the loss scale: where a 4096th of it does not help, the gradient is broken.
OVERFLOWS_IN_A_ROW = 12
GROWTH_STEPS = 2000  # steps without an overflow after which fp16's loss scale is doubled


def train(
    config: Config, allow_change: Sequence[str] = (), score: Score | None = None, other_data: bool = False
) -> int:
    """Train, or go on with, the run of `config`; returns the exit code: 0, or 128 + the signal that stopped it.

    allow_change   dotted keys that may differ from those of the run's last checkpoint
    score          what `train.score_every` calls: a model and a number of images -> names and values for the log
    other_data     whether the images may be others than those of the run's last checkpoint, of as many classes

    SIGUSR1 saves and returns 0: schedulers that send it start the same command again.
    """
    if config.train.score_every and score is None:
        raise UserError(
            "train.score_every is on and nobody said how to score: give score=eval.on_the_way.OnTheWay(config), as train.py does, or set "
            "train.score_every=0"
        )
    with (
        leaving_on_requeue(),
        open_run(config, allow_change, score, other_data) as run,
        StopSignals() as stop,
    ):
        run.stop = stop
        if config.train.compile and not run.finished:
            run.say("compiling the network and comparing its gradients, which may take minutes")
            check_compiled(run)
        if run.state.step:
            watch(run, run.left_behind())
        while not run.finished and not run.stopped_by:
            run.enter_phase()
            loss = training_step(run, stop)
            if loss is None and not run.stopped_by:
                continue
            if loss is not None:
                run.record(loss)
                if run.due(config.train.log_every):
                    run.log()
                if run.due(config.train.ema_snapshot_every):
                    run.snapshot()
                if run.due(config.train.export_every):
                    run.export_step()
            if run.due(config.train.save_every) or run.stopped_by or run.finished:
                run.save()
            if run.stopped_by:
                break
            watch(run)
            if run.stopped_by and not run.due(config.train.save_every) and not run.finished:
                run.save()
        if run.stopped_by:
            run.say_stopped()
        elif run.finished:
            run.say(f"trained to step {run.state.step}; python sample.py {config.folder} draws from it")
        return 128 + run.stopped_by if run.stopped_by not in (0, REQUEUE) else 0


def watch(run: Run, made: Collection[str] = ()) -> None:
    """Draw, score and validate, as far as that is due at this step and not `made` already (`Run.left_behind`).

    Where a signal cut it short `run.stopped_by` is that signal: what is missing is made when the run goes on.
    """
    settings = run.config.train
    periods = {GRID: settings.sample_every, SCORE: settings.score_every, VALIDATION: settings.validate_every}
    due = [what for what, every in periods.items() if run.due(every) and what not in made]
    for what in due:
        {GRID: run.draw_grid, SCORE: run.score, VALIDATION: lambda: validate(run)}[what]()
    if due:
        run.stopped_by = run.cut_short()


def training_step(run: Run, stop: StopSignals) -> float | None:
    """One optimiser step on one global batch; returns the batch's mean loss over all processes.

    Where the loss or the gradient is NaN or infinite the weights do not change. Returns None where the gradient may have
    left fp16's range: the loss scale is halved, and the same step comes again. Else NaN, for a batch that
    `train.skip_non_finite` leaves out; or raises `NonFinite`.
    """
    settings, state = run.config.train, run.state
    step = state.step
    randomness.fix_global(
        settings.seed, "dropout", step * run.accelerator.num_processes + run.accelerator.process_index
    )
    total = torch.zeros(2, device=run.accelerator.device)  # loss, stop signal
    for micro in range(settings.gradient_accumulation):
        batch = run.batches.at(step, micro)
        last = micro == settings.gradient_accumulation - 1
        with gradients_exchanged(run.model, settings.parallel, last):
            total[0] += backpropagate(run, batch)
    total[1] = stop.received
    own, norm = gradients(run.parameters)  # asked for before the loss is waited for: a GPU is waited for once
    loss, run.stopped_by = run.mean_loss_and_signal(total)
    if not _scale_gradients(run, own, float(norm)) or not math.isfinite(loss):
        return _not_taken(run, loss)
    run.learning_rate = learning_rate(step, settings)
    for group in run.optimizer.param_groups:
        group["lr"] = run.learning_rate * group["lr_factor"]
    run.optimizer.step()
    run.optimizer.zero_grad()
    for average in run.averages:
        average.update(step + 1)
    state.overflows_in_a_row = 0
    if settings.precision == "fp16" and (step + 1 - state.overflow_step) % GROWTH_STEPS == 0:
        state.loss_scale *= 2
    return loss


def check_compiled(run: Run) -> None:
    """Raise `UserError` where the compiled network has other gradients than the one that was written, on the batch to come.

    In all processes together, without dropout. Nothing of the run changes.
    """
    names = {p: name for name, p in run.denoiser.named_parameters()}
    batch, scale = run.batches.at(run.state.step, 0), run.state.loss_scale

    def norms() -> torch.Tensor:
        with gradients_exchanged(run.model, run.config.train.parallel, True):
            backpropagate(run, batch)
        found = gradient_norms(run.parameters)
        run.optimizer.zero_grad()
        return found

    with compiling.without_dropout(run.denoiser.unet):
        with compiling.uncompiled(run.denoiser.unet):
            plain = norms()
            if not bool(torch.isfinite(plain).all()):
                # The scale at which fp16 begins may be far too large.
                run.state.loss_scale = 1.0
                plain = norms()
        compiled = norms()
    run.state.loss_scale = scale
    if wrong := compiling.wrong_gradients(plain, compiled):
        worst = wrong[0]
        raise UserError(
            f"torch.compile of torch {torch.__version__} gives this network other gradients, most of all of "
            f"{names[run.parameters[worst]]} (norm {float(compiled[worst]):.4g}, without it {float(plain[worst]):.4g}); set "
            "train.compile=false, or take another version of torch"
        )


def backpropagate(run: Run, batch: Batch) -> torch.Tensor:
    """Add one process's share of a (micro-)step to the gradients; returns its part of the loss, without the graph."""
    loss = batch_loss(run, batch) / run.config.train.gradient_accumulation
    (loss * run.state.loss_scale).backward()
    return loss.detach()


def batch_loss(run: Run, batch: Batch) -> torch.Tensor:
    """The mean loss of one process's share of a (micro-)step, with its graph."""
    prediction, gamma = run.config.diffusion.prediction, run.config.train.min_snr_gamma
    alpha, sigma = diffusion.at(run.levels, batch.times)
    noised = diffusion.add_noise(batch.latents, batch.noise, alpha, sigma)
    if run.matching is not None:
        with run.matching.attached(), run.arithmetic():
            run.model(noised, batch.times, batch.condition)
            return run.matching.error
    wanted = diffusion.target(prediction, batch.latents, batch.noise, alpha, sigma)
    weight = 1.0 if gamma is None else diffusion.min_snr_weight(prediction, gamma, alpha, sigma)
    with run.arithmetic():
        output = run.model(noised, batch.times, batch.condition)
    return diffusion.loss(output, wanted, weight)


@torch.no_grad()
def validate(run: Run) -> None:
    """The averaged model's mean loss on images that are not trained on, in metrics.jsonl. All processes share the work.

    Images, times and noise are the same each time and for any number of processes, and no condition is left out. While new
    blocks match old ones there is no such loss.
    """
    if run.matching is not None:
        return
    parts = run.held_out.parts
    total = torch.zeros(2, device=run.accelerator.device)
    with run.pause(), run.averaged():
        run.denoiser.eval()
        for micro in range(parts):
            total[0] += batch_loss(run, run.held_out.at(0, micro)) / parts
        run.denoiser.train()
        loss, _ = run.mean_loss_and_signal(total)
    run.record_validation(loss)


def learning_rate(step: int, settings: TrainConfig) -> float:
    """The rate of optimiser step `step` (from 0): a linear warm-up, then constant, or down to 0 at the end.

    The warm-up comes again where others begin to learn: of what was frozen AdamW knows nothing, and its first step
    would move every weight of a pretrained network by the whole rate.
    """
    began, _ = phase_at(step, settings)
    warm = min(1.0, (step - began + 1) / max(1, settings.warmup_steps))
    if settings.lr_schedule == "constant":
        return settings.lr * warm
    done = max(0, step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    left = 0.5 * (1 + math.cos(math.pi * done)) if settings.lr_schedule == "cosine" else 1 - done
    return settings.lr * warm * left


@torch.no_grad()
def _scale_gradients(run: Run, own: list[torch.Tensor], norm: float) -> bool:
    """Undo the loss scale and clip, in one pass; False, with nothing changed, where the gradient is not finite."""
    norm /= run.state.loss_scale
    run.gradient_norm = norm
    if not math.isfinite(norm):
        return False
    clip = run.config.train.gradient_clip
    factor = (1.0 if clip is None or norm <= clip else clip / norm) / run.state.loss_scale
    if factor != 1:
        torch._foreach_mul_(own, factor)
    return True


def _not_taken(run: Run, loss: float) -> float | None:
    """What becomes of a step whose loss or gradient is not finite. Decided alike in every process."""
    state, settings = run.state, run.config.train
    run.optimizer.zero_grad()
    scaled = math.isfinite(loss) and state.loss_scale > 1  # no scale mends a loss that is none
    if scaled and state.overflows_in_a_row < OVERFLOWS_IN_A_ROW:
        state.loss_scale /= 2
        state.overflows += 1
        state.overflows_in_a_row += 1
        state.overflow_step = state.step
        return None
    tried = ""
    if state.overflows_in_a_row:
        tried = (
            f" after {state.overflows_in_a_row} halvings of fp16's loss scale, down to {state.loss_scale:g}"
        )
        state.loss_scale *= 2.0**state.overflows_in_a_row  # it was not the scale's fault
        state.overflows_in_a_row = 0
    where = run.describe_batch(loss)
    if state.left_out < settings.skip_non_finite:
        state.left_out += 1
        run.say(
            f"step {state.step + 1}: the loss is {loss} and the gradient's norm {run.gradient_norm}{tried}; left out "
            f"({state.left_out} of at most {settings.skip_non_finite}), the batch is written to {where}"
        )
        return math.nan
    mends = [*run.mends(), *(["set train.precision=bf16"] if tried else []), "look at those samples"]
    raise NonFinite(
        f"step {state.step + 1}: the loss is {loss} and the gradient's norm {run.gradient_norm}{tried}; the weights "
        f"were not touched by it, and {run.last_checkpoint()}; the batch is written to {where}; {', '.join(mends)}, or leave a "
        "few such batches out with train.skip_non_finite"
    )
