"""The training loop, and the run it works on."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from . import checkpoint, diffusion, ema, export, pictures, randomness
from .autoencoder import Autoencoder, load_autoencoder
from .config import Config, TrainConfig, check_same_run, config_hash, provenance
from .data import Latents, encode_dataset, open_dataset
from .denoiser import Denoiser
from .errors import UserError
from .launch import StopSignals, run_lock, start_accelerator
from .metrics import MetricsLog
from .sampling import generate
from .swap import swapped_sites
from .unet import build_unet

NON_FINITE = 3  # exit code of a run whose loss became NaN or infinite
GRID_ROWS = 10  # classes at most in the grids drawn on the way


class NonFinite(UserError):
    """The loss or the gradient became NaN or infinite; the weights were not touched."""


@dataclass
class State:
    """Where a run stands. Stored with each checkpoint; all else is a function of the config and `step`."""

    step: int = 0
    loss_sum: float = 0.0  # since the last line of metrics.jsonl
    loss_count: int = 0


@dataclass(frozen=True)
class Batch:
    """One process's share of one (micro-)step, on its device."""

    latents: torch.Tensor  # (n, C, h, w)
    noise: torch.Tensor  # (n, C, h, w)
    times: torch.Tensor  # (n,) int64
    labels: torch.Tensor  # (n,) int64, the null label where dropped


# --------------------------------------------------------------------------------------------------- the loop


def train(config: Config, allow_change: Sequence[str] = ()) -> int:
    """Train, or go on with, the run of `config`; returns the exit code: 0, or 128 + the signal that stopped it.

    `allow_change` are dotted keys that may differ from those of the run's last checkpoint.
    """
    with open_run(config, allow_change) as run, StopSignals() as stop:
        while run.state.step < config.train.steps and not run.stopped_by:
            loss = training_step(run, stop)
            run.record(loss)
            if run.due(config.train.log_every):
                run.log()
            if run.due(config.train.sample_every):
                run.draw_grid()
            if run.due(config.train.save_every) or run.stopped_by or run.finished:
                run.save()
        return 128 + run.stopped_by if run.stopped_by else 0


def training_step(run: Run, stop: StopSignals) -> float:
    """One optimiser step on one global batch; returns the batch's mean loss over all processes.

    Raises `NonFinite`, before the weights change, where the loss or a gradient is NaN or infinite.
    """
    settings = run.config.train
    step = run.state.step
    randomness.fix_global(
        settings.seed, "dropout", step * run.accelerator.num_processes + run.accelerator.process_index
    )
    total = torch.zeros(2, device=run.accelerator.device)  # loss, stop signal
    for micro in range(settings.gradient_accumulation):
        batch = run.batch(step, micro)
        last = micro == settings.gradient_accumulation - 1
        with nullcontext() if last else run.accelerator.no_sync(run.model):
            alpha, sigma = diffusion.coefficients(run.alpha_bars[batch.times])
            noised = diffusion.add_noise(batch.latents, batch.noise, alpha, sigma)
            loss = diffusion.noise_loss(run.model(noised, batch.times, batch.labels), batch.noise)
            loss = loss / settings.gradient_accumulation
            run.accelerator.backward(loss)
        total[0] += loss.detach()
    total[1] = stop.received
    loss, stopped_by = run.mean_loss_and_signal(total)
    run.gradient_norm = _gradient_norm(run.parameters, settings.gradient_clip)
    if not (math.isfinite(loss) and math.isfinite(run.gradient_norm)):
        run.report_non_finite(loss)
    run.stopped_by = stopped_by
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(step, settings)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.ema.update(ema.decay_at(step + 1, settings.ema_decay))
    return loss


def learning_rate(step: int, settings: TrainConfig) -> float:
    """The rate of optimiser step `step` (from 0): a linear warm-up, then constant, or down to 0 at the end."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    if settings.lr_schedule == "constant":
        return settings.lr * warm
    done = max(0, step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    left = 0.5 * (1 + math.cos(math.pi * done)) if settings.lr_schedule == "cosine" else 1 - done
    return settings.lr * warm * left


@torch.no_grad()
def _gradient_norm(parameters: Sequence[torch.Tensor], clip: float | None) -> float:
    """The Euclidean norm of the whole gradient, which is then scaled down to `clip` where it is larger."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
    if clip is not None and norm > clip:
        torch._foreach_mul_(gradients, clip / norm)
    return norm


# --------------------------------------------------------------------------------------------------- the run


@dataclass
class Run:
    """Everything a training run holds; `open_run` makes it."""

    config: Config
    accelerator: Accelerator
    autoencoder: Autoencoder
    latents: Latents
    denoiser: Denoiser
    model: torch.nn.Module  # the denoiser as accelerate prepared it
    parameters: list[torch.nn.Parameter]  # the denoiser's
    optimizer: torch.optim.Optimizer
    ema: ema.EMA
    order: randomness.Order
    alpha_bars: torch.Tensor  # (num_steps,), on the device
    latent_shape: tuple[int, int, int]
    state: State
    metrics: MetricsLog | None = None  # on the main process
    bar: tqdm | None = None  # on the main process
    stopped_by: int = 0  # the signal that asked us to stop
    gradient_norm: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    window_began: float = field(default_factory=time.perf_counter)
    window_pause: float = 0.0  # seconds since then that went into saving and sampling
    window_steps: int = 0

    @property
    def finished(self) -> bool:
        return self.state.step >= self.config.train.steps

    def due(self, every: int) -> bool:
        return every > 0 and self.state.step % every == 0

    # ---------------------------------------------------------------------- data

    def positions(self, step: int, micro: int) -> range:
        """The global sample positions of this process in micro-step `micro` of `step`."""
        settings = self.config.train
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        share = settings.batch_size // (processes * settings.gradient_accumulation)
        first = step * settings.batch_size + (rank * settings.gradient_accumulation + micro) * share
        return range(first, first + share)

    def batch(self, step: int, micro: int) -> Batch:
        """What is learnt from at those positions: a function of (seed, position)."""
        settings, device = self.config.train, self.accelerator.device
        positions = self.positions(step, micro)
        ids = self.order[positions]
        noise = randomness.normal((2, *self.latent_shape), settings.seed, "noise", positions)
        noise, posterior_noise = noise[:, 0], noise[:, 1]
        labels = (
            self.latents.labels[ids]
            if self.denoiser.num_classes
            else torch.zeros(len(ids), dtype=torch.int64)
        )
        dropped = torch.from_numpy(
            randomness.uniform(settings.seed, "label", positions) < settings.label_dropout
        )
        labels = torch.where(dropped, self.denoiser.null_label, labels)
        moments = self.latents.moments[ids].to(device=device, dtype=torch.float32)
        latents = self.autoencoder.latents(moments, posterior_noise.to(device))
        return Batch(
            latents=latents.to(memory_format=torch.channels_last),
            noise=noise.to(device, memory_format=torch.channels_last),
            times=self.times(positions).to(device),
            labels=labels.to(device),
        )

    def times(self, positions: range) -> torch.Tensor:
        """(n,) int64, uniform over the schedule's times."""
        share = randomness.uniform(self.config.train.seed, "time", positions)
        return torch.from_numpy((share * self.config.diffusion.num_steps).astype("int64"))

    # ---------------------------------------------------------------------- watching

    def mean_loss_and_signal(self, total: torch.Tensor) -> tuple[float, int]:
        """One exchange between the processes: the mean of total[0], and the largest of total[1]."""
        rows = self.accelerator.gather(total[None]) if self.accelerator.num_processes > 1 else total[None]
        rows = rows.double().cpu()
        return float(rows[:, 0].mean()), int(rows[:, 1].max())

    def record(self, loss: float) -> None:
        self.state.step += 1
        self.state.loss_sum += loss
        self.state.loss_count += 1
        self.window_steps += 1
        self.recent.append(loss)
        if self.bar is not None:
            self.bar.update()

    def log(self) -> None:
        """One line in metrics.jsonl: the mean loss since the last, and what the last step was made with."""
        settings, state = self.config.train, self.state
        seconds = time.perf_counter() - self.window_began - self.window_pause
        mean = state.loss_sum / state.loss_count
        speed = self.window_steps * settings.batch_size / seconds
        if self.metrics is not None:
            self.metrics.write(
                state.step,
                loss=mean,
                lr=learning_rate(state.step - 1, settings),
                ema_decay=ema.decay_at(state.step, settings.ema_decay),
                gradient_norm=self.gradient_norm,
                samples=state.step * settings.batch_size,
                images_per_second=round(speed, 2),
            )
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{mean:.4f}", **{"images/s": f"{speed:.1f}"}, refresh=False)
        state.loss_sum, state.loss_count = 0.0, 0
        self.window_began, self.window_pause, self.window_steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that does not count as training."""
        began = time.perf_counter()
        yield
        self.window_pause += time.perf_counter() - began

    def say(self, text: str) -> None:
        """One line for the user, from the main process, around the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stderr)

    def report_non_finite(self, loss: float) -> None:
        """Write down what was in the batch, and stop."""
        step, settings = self.state.step, self.config.train
        everyone = range(step * settings.batch_size, (step + 1) * settings.batch_size)
        where = self.config.folder / f"nonfinite-step-{step + 1}.json"
        if self.accelerator.is_main_process:
            facts = {
                "step": step + 1,
                "loss": repr(loss),
                "gradient_norm": repr(self.gradient_norm),
                "samples": self.order[everyone].tolist(),
                "times": self.times(everyone).tolist(),
                "recent_losses": list(self.recent),
            }
            checkpoint.write_json(where, facts)
        raise NonFinite(
            f"step {step + 1}: the loss is {loss} and the gradient's norm {self.gradient_norm}; "
            "the weights were not "
            f"touched and the last checkpoint is good; the batch is written to {where}; lower train.lr, set "
            "train.gradient_clip=1.0, or look at those samples"
        )

    # ---------------------------------------------------------------------- leaving things behind

    def averaged_model(self) -> export.Model:
        """The model for use; only inside `self.ema.in_place()` does it have the averaged weights."""
        config = self.config
        settings = config.resolved()
        tags = {
            "run": config.run.name,
            "step": self.state.step,
            "weights": f"EMA {config.train.ema_decay}",
            "parameters": sum(p.numel() for p in self.denoiser.parameters()),
            "data": config.data.source,
            "autoencoder": config.autoencoder.spec,
            "config": config_hash(settings),
        }
        return export.Model(
            self.denoiser,
            self.autoencoder,
            diffusion.Schedule(**config.diffusion.model_dump()),
            self.latent_shape,
            str(config.run.name),
            self.state.step,
            settings,
            tags,
        )

    def draw_grid(self) -> None:
        """samples/step-N.png: one row a class, one column a seed, the same seeds every time."""
        if not self.accelerator.is_main_process:
            return
        settings = self.config.sample
        rows, columns = min(self.denoiser.num_classes, GRID_ROWS) or 1, settings.images_per_class
        seeds = list(range(columns)) * rows
        labels = [row for row in range(rows) for _ in range(columns)] if self.denoiser.num_classes else None
        with self.pause(), self.ema.in_place():
            images = generate(
                self.averaged_model(),
                labels,
                seeds,
                sampler=settings.sampler,
                steps=settings.steps,
                guidance=settings.guidance,
                batch_size=settings.batch_size,
            )
            pictures.save_grid(
                images, columns, self.config.folder / "samples" / f"step-{self.state.step}.png"
            )

    def save(self) -> None:
        """A checkpoint to go on from, and the export for use. A full disk can wait for the next save."""
        if not self.accelerator.is_main_process:
            return
        root = self.config.folder / "checkpoints"
        last = self.finished or bool(self.stopped_by)
        with self.pause():
            try:
                checkpoint.save(
                    root, self.state.step, self._tensors(), self._facts(), self.config.train.keep_checkpoints
                )
                self.export()
            except checkpoint.DiskFull as error:
                if last or not any(root.glob("step-*")):
                    raise
                self.say(f"warning: {error}; training goes on and tries again at the next save")

    def export(self) -> None:
        with self.ema.in_place():
            export.save_export(self.config.folder / export.EXPORT, self.averaged_model())

    def _tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        optimizer = {}
        for name, p in self.denoiser.named_parameters():
            for key, value in self.optimizer.state.get(p, {}).items():
                optimizer[f"{key}/{name}"] = value
        return {"model": self.denoiser.state_dict(), "ema": self.ema.shadow, "optimizer": optimizer}

    def _facts(self) -> dict[str, Any]:
        return {
            "state": asdict(self.state),
            "config": self.config.resolved(),
            "autoencoder": self.autoencoder.fingerprint(),
            "images": len(self.latents),
            "num_classes": self.denoiser.num_classes,
            "processes": self.accelerator.num_processes,
        }


# ------------------------------------------------------------------------------------------------- setting up


@contextmanager
def open_run(config: Config, allow_change: Sequence[str] = ()) -> Iterator[Run]:
    """The run of `config`: new, or as its newest good checkpoint left it."""
    accelerator = start_accelerator(config.train.precision)
    _check_batch(config.train, accelerator.num_processes)
    main = accelerator.is_main_process
    with run_lock(config.folder) if main else nullcontext():
        last = _find_checkpoint(config, accelerator)
        tensors, facts = checkpoint.load(last) if last else ({}, {})
        changes = check_same_run(facts["config"], config, str(config.folder), allow_change) if facts else []
        run = _build(config, accelerator, facts)
        if facts:
            _restore(run, tensors, facts)
        del tensors
        if main:
            _write_down(run)
            run.metrics = MetricsLog(config.folder, run.state.step, config.train.tensorboard)
        _greet(run, last, changes)
        if main and not run.finished:
            run.bar = _progress_bar(run)
        try:
            yield run
        finally:
            if run.bar is not None:
                run.bar.close()
            if run.metrics is not None:
                run.metrics.close()
            if accelerator.num_processes > 1 and not sys.exc_info()[0]:
                accelerator.wait_for_everyone()  # nobody leaves while the main process still saves
                accelerator.end_training()


def _check_batch(settings: TrainConfig, processes: int) -> None:
    parts = processes * settings.gradient_accumulation
    if settings.batch_size % parts:
        below, above = settings.batch_size // parts * parts, -(-settings.batch_size // parts) * parts
        raise UserError(
            f"train.batch_size={settings.batch_size} cannot be shared by {processes} processes in "
            f"{settings.gradient_accumulation} accumulation steps; use {below or above} or {above}"
        )


def _find_checkpoint(config: Config, accelerator: Accelerator) -> Path | None:
    """The main process clears up, checks and chooses; the others take its word."""
    answer: list[str | None] = [None]
    if accelerator.is_main_process:
        root = config.folder / "checkpoints"
        checkpoint.sweep(root)
        checkpoint.recover(config.folder / export.EXPORT)
        found = checkpoint.newest(root, lambda line: tqdm.write(line, file=sys.stderr))
        answer = [str(found) if found else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    return Path(answer[0]) if answer[0] else None


def _build(config: Config, accelerator: Accelerator, facts: dict[str, Any]) -> Run:
    data, settings, device = config.data, config.train, accelerator.device
    autoencoder = load_autoencoder(
        config.autoencoder.spec,
        dtype=config.autoencoder.dtype,
        device=device,
        image_channels=data.image_channels,
    )
    if facts:
        autoencoder.check(facts["autoencoder"])
    randomness.fix_global(settings.seed, "weights", 0)
    unet = build_unet(config.model.preset or config.model.unet, swap=config.model.swap)
    latents = _encode(config, autoencoder, accelerator.is_main_process)
    denoiser = Denoiser(unet, _count_classes(config, latents))
    _check_fit(denoiser, autoencoder, latents)
    if settings.gradient_checkpointing:
        denoiser.unet.enable_gradient_checkpointing()
    denoiser.train().to(device=device, memory_format=torch.channels_last)
    averaged = ema.EMA(denoiser)
    optimizer = torch.optim.AdamW(
        denoiser.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    model = accelerator.prepare(denoiser)
    schedule = diffusion.Schedule(**config.diffusion.model_dump())
    return Run(
        config=config,
        accelerator=accelerator,
        autoencoder=autoencoder,
        latents=latents,
        denoiser=denoiser,
        model=model,
        parameters=list(denoiser.parameters()),
        optimizer=optimizer,
        ema=averaged,
        order=randomness.Order(len(latents), settings.seed),
        alpha_bars=diffusion.alpha_bars(schedule).to(device),
        latent_shape=(autoencoder.latent_channels, *latents.moments.shape[2:]),
        state=State(),
    )


def _encode(config: Config, autoencoder: Autoencoder, main: bool) -> Latents:
    data = config.data
    images = open_dataset(
        data.source,
        image_size=data.image_size,
        image_channels=autoencoder.image_channels,
        split=data.split,
        max_bad=data.max_bad,
    )
    with tqdm(total=len(images), desc="encoding", unit="image", disable=not main, leave=False) as bar:
        return encode_dataset(images, autoencoder, data.encode_batch_size, bar.update)


def _count_classes(config: Config, latents: Latents) -> int:
    wanted = config.data.num_classes
    if wanted is None or wanted == 0:
        return latents.num_classes if wanted is None else 0
    if latents.num_classes > wanted:
        raise UserError(
            f"{config.data.source} has {latents.num_classes} classes and data.num_classes={wanted}; "
            f"use {latents.num_classes}, or null to take what there is"
        )
    return wanted


def _check_fit(denoiser: Denoiser, autoencoder: Autoencoder, latents: Latents) -> None:
    unet, channels = denoiser.unet.config, autoencoder.latent_channels
    if (unet.in_channels, unet.out_channels) != (channels, channels):
        raise UserError(
            f"the U-Net takes {unet.in_channels} and gives {unet.out_channels} channels, "
            "the latents of autoencoder "
            f"'{autoencoder.spec}' have {channels}; set model.unet.in_channels={channels} "
            f"model.unet.out_channels={channels}"
        )
    if not torch.isfinite(latents.moments).all():
        raise UserError(
            f"the latents of autoencoder '{autoencoder.spec}' hold NaN or infinity; "
            "use autoencoder.dtype=float32"
        )


def _restore(run: Run, tensors: dict[str, dict[str, torch.Tensor]], facts: dict[str, Any]) -> None:
    if (facts["images"], facts["num_classes"]) != (len(run.latents), run.denoiser.num_classes):
        raise UserError(
            f"{run.config.folder} was trained on {facts['images']} images of {facts['num_classes']} classes, "
            f"{run.config.data.source} now holds {len(run.latents)} of {run.denoiser.num_classes}; "
            "bring the data "
            "back, or choose another run.name"
        )
    run.denoiser.load_state_dict(tensors["model"])
    run.ema.load(tensors["ema"])
    parameters = dict(run.denoiser.named_parameters())
    for key, value in tensors["optimizer"].items():
        kind, name = key.split("/", 1)
        p = parameters[name]
        # zeros_like keeps the parameter's memory layout
        run.optimizer.state[p][kind] = (
            torch.zeros_like(p).copy_(value) if value.shape == p.shape else value.to(p.device)
        )
    run.state = State(**facts["state"])


def _write_down(run: Run) -> None:
    """config.yaml, a line in provenance.jsonl for every start, and the export where a crash left it out."""
    folder = run.config.folder
    checkpoint.replace_file(folder / "config.yaml", run.config.to_yaml())
    with (folder / "provenance.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": run.state.step, **provenance()}) + "\n")
    if run.state.step and export.exported_step(folder) != run.state.step:
        run.export()


def _progress_bar(run: Run) -> tqdm:
    interval = 0.5 if sys.stderr.isatty() else 10.0  # seconds; a log file needs fewer lines
    name = str(run.config.run.name)
    return tqdm(
        total=run.config.train.steps, initial=run.state.step, desc=name, unit="step", mininterval=interval
    )


def _greet(run: Run, last: Path | None, changes: list[str]) -> None:
    config = run.config
    parameters = sum(p.numel() for p in run.denoiser.parameters())
    sites = len(swapped_sites(run.denoiser.unet))
    processes = run.accelerator.num_processes
    run.say(
        f"{config.folder}: {parameters / 1e6:.3f} M parameters{f', {sites} DCNv4 sites' if sites else ''}; "
        f"{len(run.latents)} images of {run.denoiser.num_classes} classes; "
        f"batch {config.train.batch_size} on {processes} x {run.accelerator.device.type}"
    )
    for change in changes:
        run.say(f"changed since the last checkpoint: {change}")
    if last:
        done = "; nothing left to do" if run.finished else ""
        run.say(f"going on from {last}{done}")
