"""A training run: what it holds, what it learns from, and what it leaves behind."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from . import checkpoint, diffusion, ema, export, pictures, randomness
from .autoencoder import Autoencoder, load_autoencoder
from .cache import LatentCache
from .cache_layout import is_cache
from .changes import check_same_run
from .config import Config, TrainConfig, check_keys, config_hash, load_config
from .data import Latents, check_source, encode_dataset, open_dataset
from .denoiser import Denoiser
from .errors import UserError, explain
from .files import naming, replace_file, write_json
from .folders import DiskFull, recover
from .images import Images
from .launch import StopSignals, run_lock, start_accelerator
from .matching import Matching, new_parameters
from .metrics import MetricsLog, check_trackers, read
from .parallel import Optimizer, check_sharding, collected, in_shares_of, replicate, reshard, shard, state_of
from .pretrained import Pretrained, check_pretrained, check_text, load_pretrained, read_class_embedding
from .provenance import provenance
from .sampling import generate
from .swap import apply_swap, plan_swap, swapped_sites
from .unet import (
    any_attention,
    build_unet,
    empty_twin,
    set_attention,
    swap_options,
)
from .zero import Zero, import_deepspeed

GRID_ROWS = 10  # classes at most in the grids drawn on the way
FIRST_LOSS_SCALE = 2.0**16  # of fp16, as torch.amp's GradScaler
EMA_GROUPS = ("ema", "ema_2")  # names in a checkpoint
# What may go wrong beside the training without being its end: a disk, a picture of NaN, a sampler's batch too large.
SPARED = (OSError, ValueError, UserError, torch.OutOfMemoryError)
SMALL_NETWORK = 10**7  # parameters, of which one forward pass takes less than a second on a CPU
FILES = ("config.yaml", "provenance.jsonl", "metrics.jsonl")  # of a run folder
FOLDERS = ("checkpoints", "averages", "samples", export.EXPORT)
ARITHMETIC = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

Score = Callable[[export.Model, int], dict[str, Any]]  # a model, a number of images -> names and values


class Interrupted(Exception):
    """A signal came while drawing: the grid or score can wait, the checkpoint cannot."""


@dataclass
class State:
    """Where a run stands. Stored with each checkpoint; all else is a function of the config and `step`."""

    step: int = 0
    loss_sum: float = 0.0  # since the last line of metrics.jsonl
    loss_count: int = 0
    loss_scale: float = 1.0  # of fp16's gradients
    overflows: int = 0  # steps that fp16 took again
    overflow_step: int = 0  # the last of them
    overflows_in_a_row: int = 0  # of the step that comes next
    left_out: int = 0  # batches left out for NaN or infinity


@dataclass(frozen=True)
class Batch:
    """One process's share of one (micro-)step."""

    latents: torch.Tensor  # (n, C, h, w)
    noise: torch.Tensor  # (n, C, h, w)
    times: torch.Tensor  # (n,) int64
    condition: torch.Tensor  # labels (n,) int64, or tokens (n, T, D); the null ones where dropped


@dataclass
class Run:
    """Everything a training run holds; `open_run` makes it."""

    config: Config
    accelerator: Accelerator
    autoencoder: Autoencoder
    latents: Latents | LatentCache
    denoiser: Denoiser
    averages: list[ema.EMA]  # the first is used for samples and the export
    optimizer: Optimizer
    order: randomness.Order
    levels: tuple[torch.Tensor, torch.Tensor]  # alpha and sigma at each time, on the device
    latent_shape: tuple[int, int, int]
    state: State
    identity: str | None = None  # of the data: another one is refused at a resume
    originals: dict[str, torch.nn.Module] = field(default_factory=dict)  # the blocks that were swapped out
    embedding_is_new: bool = True  # that of the classes: not read from a pretrained network
    notes: list[str] = field(default_factory=list)  # what a pretrained network brings along, and has to learn
    model: torch.nn.Module = None  # the denoiser as the processes share it
    parameters: list[torch.nn.Parameter] = field(default_factory=list)  # those that learn now
    matching: Matching | None = None  # while new blocks learn the old ones' outputs
    phase: str = ""
    metrics: MetricsLog | None = None  # on the main process
    bar: tqdm | None = None  # on the main process
    scorer: Score | None = None
    stop: StopSignals | None = None
    stopped_by: int = 0  # the signal that asked us to stop
    gradient_norm: float = 0.0  # of the last step, as the next
    learning_rate: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    window_began: float = field(default_factory=time.perf_counter)
    window_pause: float = 0.0  # seconds since then that went into saving and sampling
    window_steps: int = 0
    _failing: set[str] = field(default_factory=set)  # what the user was warned of
    _loader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "loader"))
    _ahead: dict[tuple[int, int], Future[Batch]] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.state.step >= self.config.train.steps

    def due(self, every: int) -> bool:
        return every > 0 and self.state.step % every == 0

    def arithmetic(self) -> AbstractContextManager[None]:
        """The number format that the network computes in."""
        dtype = ARITHMETIC[self.config.train.precision]
        return nullcontext() if dtype is None else torch.autocast(self.accelerator.device.type, dtype)

    # ---------------------------------------------------------------------- what learns

    def enter_phase(self) -> None:
        """Let those parameters learn whose turn it is at this step: match -> new -> all."""
        settings, step = self.config.train, self.state.step
        phase = "match" if step < settings.match_steps else "new" if step < settings.new_only_steps else "all"
        if phase == self.phase:
            return
        self.phase = phase
        sites = [site.name for site in swapped_sites(self.denoiser.unet)]
        new = new_parameters(self.denoiser.unet, sites)
        for name, p in self.denoiser.unet.named_parameters():
            p.requires_grad_(phase == "all" or name in new)
        if self.denoiser.class_embedding is not None:
            own_turn = phase == "all" or (phase == "new" and self.embedding_is_new)
            self.denoiser.class_embedding.requires_grad_(own_turn)
        self.matching = Matching(self.denoiser.unet, self.originals) if phase == "match" else None
        if phase != "match":
            self.originals = {}
        checkpointed = (
            settings.gradient_checkpointing and phase != "match"
        )  # there, gradients stay within blocks
        (
            self.denoiser.unet.enable_gradient_checkpointing
            if checkpointed
            else self.denoiser.unet.disable_gradient_checkpointing
        )()
        self.parameters = [p for p in self.denoiser.parameters() if p.requires_grad]
        self.model = self.denoiser
        if self._shares("ddp"):
            self.model = replicate(self.denoiser, self.accelerator.device)
        if self._shares("zero"):
            self.optimizer = Zero(self.denoiser, self.optimizer, self.accelerator.device)
        if phase != "all":
            count = sum(p.numel() for p in self.parameters)
            what = "match the blocks they replace" if phase == "match" else "learn alone"
            self.say(f"from step {step}: {count / 1e6:.3f} M new parameters {what}")

    # ---------------------------------------------------------------------- data

    def positions(self, step: int, micro: int) -> range:
        """The global sample positions of this process in micro-step `micro` of `step`."""
        settings = self.config.train
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        share = settings.batch_size // (processes * settings.gradient_accumulation)
        first = step * settings.batch_size + (rank * settings.gradient_accumulation + micro) * share
        return range(first, first + share)

    def batch(self, step: int, micro: int) -> Batch:
        """What is learnt from at those positions, on the device; a GPU's next one is made ready meanwhile.

        Not a CPU's: a second thread that computes makes OpenMP's wait on each other, and halves the speed of a step to hide
        less than a hundredth of it.
        """
        ready = self._ahead.pop((step, micro), None)
        host = ready.result() if ready is not None else self.host_batch(step, micro)
        micro += 1
        following = (step, micro) if micro < self.config.train.gradient_accumulation else (step + 1, 0)
        if self.accelerator.device.type != "cpu":
            self._ahead = {following: self._loader.submit(self.host_batch, *following)}
        device = self.accelerator.device
        moments, noise, posterior_noise, times, condition = (t.to(device, non_blocking=True) for t in host)
        latents = self.autoencoder.latents(moments, posterior_noise)
        return Batch(
            latents.to(memory_format=torch.channels_last),
            noise.to(memory_format=torch.channels_last),
            times,
            condition,
        )

    def host_batch(self, step: int, micro: int) -> tuple[torch.Tensor, ...]:
        """Moments, noise, posterior noise, times and condition on the CPU: a function of (seed, position)."""
        settings = self.config.train
        positions = self.positions(step, micro)
        ids = self.order[positions]
        flipped = None
        if self._flips:
            flipped = torch.from_numpy(randomness.uniform(settings.seed, "flip", positions) < 0.5)
        noise = randomness.normal((2, *self.latent_shape), settings.seed, "noise", positions)
        dropped = torch.from_numpy(
            randomness.uniform(settings.seed, "label", positions) < settings.label_dropout
        )
        tensors = (
            self.latents.read(ids, flipped),
            noise[:, 0],
            noise[:, 1],
            self.times(positions),
            self._condition(ids, positions, dropped),
        )
        return tuple(t.pin_memory() for t in tensors) if self.accelerator.device.type == "cuda" else tensors

    def _condition(self, ids: torch.Tensor, positions: range, dropped: torch.Tensor) -> torch.Tensor:
        null = self.denoiser.num_classes
        if self.denoiser.takes_text:
            counts = self.latents.text.captions[ids]
            share = torch.from_numpy(randomness.uniform(self.config.train.seed, "caption", positions))
            tokens = self.latents.read_tokens(ids, (share * counts).long())
            tokens[dropped] = self.latents.empty_tokens
            return tokens
        labels = self.latents.labels[ids] if null else torch.zeros(len(ids), dtype=torch.int64)
        return torch.where(dropped, null, labels)

    @property
    def _flips(self) -> bool:
        return self.latents.has_flips and self.config.data.flip is not False

    def times(self, positions: range) -> torch.Tensor:
        """(n,) int64: the diffusion times at those positions."""
        settings = self.config.train
        share = randomness.uniform(settings.seed, "time", positions)
        if (
            settings.stratified_times
        ):  # Kingma et al. (2021), appendix I, with a draw of its own in every share
            place = torch.arange(positions.start, positions.stop) % settings.batch_size
            share = (place.numpy() + share) / settings.batch_size
        share = torch.from_numpy(share)
        if settings.times == "uniform":
            return diffusion.uniform_times(share, self.config.diffusion.num_steps)
        return diffusion.lognormal_times(
            share, self._lognormal_edges, settings.times_mean, settings.times_std
        )

    @cached_property
    def _lognormal_edges(self) -> torch.Tensor:
        return diffusion.lognormal_edges(diffusion.levels(self.schedule))

    @cached_property
    def schedule(self) -> diffusion.Schedule:
        return diffusion.Schedule(**self.config.diffusion.model_dump())

    # ---------------------------------------------------------------------- watching

    def mean_loss_and_signal(self, total: torch.Tensor) -> tuple[float, int]:
        """One exchange between the processes: the mean of total[0], and the largest of total[1]."""
        if self.accelerator.num_processes == 1:
            loss, signal = total.tolist()
            return loss, int(signal)
        rows = self.accelerator.gather(total[None]).double().cpu()
        return float(rows[:, 0].mean()), int(rows[:, 1].max())

    def record(self, loss: float) -> None:
        """One step is done; a NaN is a batch that was left out."""
        self.state.step += 1
        if math.isfinite(loss):
            self.state.loss_sum += loss
            self.state.loss_count += 1
        self.window_steps += 1
        self.recent.append(loss)
        if self.bar is not None:
            with suppress(OSError):  # standard error may be a file on a full disk
                self.bar.update()

    def log(self) -> None:
        """One line in metrics.jsonl: the mean loss since the last, and what the last step was made with."""
        settings, state = self.config.train, self.state
        seconds = time.perf_counter() - self.window_began - self.window_pause
        mean = state.loss_sum / state.loss_count if state.loss_count else math.nan
        speed = self.window_steps * settings.batch_size / seconds
        if self.metrics is not None:
            extra = (
                {"loss_scale": state.loss_scale, "overflows": state.overflows}
                if settings.precision == "fp16"
                else {}
            )
            with self.spared("the line of metrics.jsonl"):
                self.metrics.write(
                    state.step,
                    loss=mean,
                    lr=self.learning_rate,
                    ema_decay=self.averages[0].rule.at(state.step),
                    gradient_norm=self.gradient_norm,
                    samples=state.step * settings.batch_size,
                    images_per_second=round(speed, 2),
                    **extra,
                    **({"left_out": state.left_out} if state.left_out else {}),
                    **({"phase": self.phase} if self.phase != "all" else {}),
                )
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{mean:.4f}", **{"images/s": f"{speed:.1f}"}, refresh=False)
        state.loss_sum, state.loss_count = 0.0, 0
        self.window_began, self.window_pause, self.window_steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that does not count as training."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.window_pause += time.perf_counter() - began

    @contextmanager
    def spared(self, what: str) -> Iterator[None]:
        """What training can do without: where it fails there is one warning, until it succeeds again."""
        try:
            yield
        except Interrupted:
            self.say(f"step {self.state.step}: asked to stop, {what} is left out")
        except SPARED as error:
            if what not in self._failing:
                reason = explain(error) if isinstance(error, OSError) else str(error)
                self.say(f"warning: step {self.state.step}: {what} failed ({reason}); training goes on")
            self._failing.add(what)
        else:
            self._failing.discard(what)

    def say(self, text: str) -> None:
        """One line for the user, from the main process, around the progress bar."""
        if self.accelerator.is_main_process:
            with suppress(OSError):  # standard error may be a file on a full disk
                tqdm.write(" ".join(text.split()), file=sys.stderr)

    def say_stopped(self) -> None:
        """After the save that a signal asked for."""
        name = signal.Signals(self.stopped_by).name
        self.say(f"{name}: step {self.state.step} is saved; the same command goes on from there")

    def describe_batch(self, loss: float) -> Path:
        """Write down what was in this step's batch, for whoever looks for the cause of a NaN."""
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
            with self.spared(f"to write {where}"):
                write_json(where, facts)
        return where

    # ---------------------------------------------------------------------- drawing

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The denoiser has the averaged weights inside, and draws with any attention there is."""
        reshard(self.model)
        with self.averages[0].in_place(), any_attention(self.config.train.attention):
            yield
            reshard(self.model)

    def averaged_model(self, denoiser: Denoiser | None = None) -> export.Model:
        """The model for use; only inside `self.averaged()` does it have the averaged weights."""
        config = self.config
        settings = config.resolved()
        tags = {
            "run": config.run.name,
            "step": self.state.step,
            "weights": str(self.averages[0].rule),
            "parameters": sum(p.numel() for p in self.denoiser.parameters()),
            "data": config.data.source,
            "autoencoder": config.autoencoder.spec,
            "config": config_hash(settings),
        }
        return export.Model(
            denoiser or self.denoiser,
            self.autoencoder,
            self.schedule,
            self.latent_shape,
            str(config.run.name),
            self.state.step,
            settings,
            tags,
            text_encoder=self.latents.text.encoder if self.latents.text else None,
            between_batches=self._look_up,
        )

    def _look_up(self) -> None:
        """Between two batches of images. With FSDP all processes must draw to the end together."""
        if self.stop is not None and self.stop.received and not self._is_sharded:
            raise Interrupted

    @property
    def _draws(self) -> bool:
        """Whether this process takes part in drawing: with FSDP no process has the whole network."""
        return self.accelerator.is_main_process or self._is_sharded

    @property
    def _is_sharded(self) -> bool:
        return self._shares("fsdp")

    def _shares(self, parallel: str) -> bool:
        return self.config.train.parallel == parallel and self.accelerator.num_processes > 1

    def draw_grid(self) -> None:
        """samples/step-N.png: one row a class or prompt, one column a seed, the same seeds every time."""
        if not self._draws:
            return
        settings, columns = self.config.sample, self.config.sample.images_per_class
        with self.spared("the grid of samples"), self.pause(), self.averaged():
            if self.denoiser.takes_text:
                rows = self._grid_tokens()
            else:
                rows = torch.arange(min(self.denoiser.num_classes, GRID_ROWS) or 1)
            seeds = list(range(columns)) * len(rows)
            images = generate(
                self.averaged_model(),
                rows.repeat_interleave(columns, 0) if self.denoiser.is_conditional else None,
                seeds,
                sampler=settings.sampler,
                steps=settings.steps,
                guidance=settings.guidance,
                guidance_interval=settings.guidance_interval,
                batch_size=settings.batch_size,
            )
            if self.accelerator.is_main_process:
                pictures.save_grid(
                    images, columns, self.config.folder / "samples" / f"step-{self.state.step}.png"
                )

    def _grid_tokens(self) -> torch.Tensor:
        """(rows, T, D): the prompts asked for, or the captions of the first samples of the data."""
        prompts = self.config.sample.prompts
        if prompts:
            return self.averaged_model().encode_prompts(prompts)
        ids = torch.arange(min(len(self.latents), GRID_ROWS))
        return self.latents.read_tokens(ids, torch.zeros_like(ids))

    def score(self) -> None:
        """A small Frechet distance of the averaged model, in metrics.jsonl, with what it was measured with."""
        if self.scorer is None or not self._draws:
            return
        with self.spared("the score"):
            if self.bar is not None:
                self.bar.set_postfix_str(f"drawing {self.config.sample.score_images} images to score")
            with self.pause(), self.averaged():
                values = self.scorer(self.averaged_model(), self.config.sample.score_images)
            if self.metrics is not None:
                self.metrics.write(self.state.step, **values)

    # ---------------------------------------------------------------------- leaving things behind

    def save(self) -> None:
        """A checkpoint to go on from, and the export for use. A full disk can wait for the next save."""
        if not (self._draws or self._shares("zero")):
            return
        with self.pause():
            tensors = self._tensors()
            if not self.accelerator.is_main_process:
                return
            root = self.config.folder / "checkpoints"
            try:
                checkpoint.save(
                    root, self.state.step, tensors, self._facts(), self.config.train.keep_checkpoints
                )
                self.export(tensors["ema"])
            except (DiskFull, OSError) as error:
                if self.finished or self.stopped_by or not any(root.glob("step-*")):
                    raise
                reason = explain(error) if isinstance(error, OSError) else str(error)
                self.say(f"warning: {reason}; training goes on and tries again at the next save")

    def export(self, averaged: dict[str, torch.Tensor]) -> None:
        folder = self.config.folder / export.EXPORT
        if not self._is_sharded:
            with self.averaged():
                export.save_export(folder, self.averaged_model())
            return
        denoiser = Denoiser(
            empty_twin(self.denoiser.unet), self.denoiser.num_classes, self.denoiser.empty_tokens
        )
        denoiser.load_state_dict(averaged, assign=True)
        export.save_export(folder, self.averaged_model(denoiser))

    def snapshot(self) -> None:
        """The power averages of this step in half precision, from which others are made afterwards."""
        if not self._draws or len(self.averages) < 2:
            return
        main = self.accelerator.is_main_process
        with self.spared("the snapshot of the averages"), self.pause():
            averages = [
                collected(((name, t.half()) for name, t in average.shadow.items()), main)
                for average in self.averages
            ]
            if main:
                checkpoint.save_tensors(
                    self.config.folder / "averages" / f"step-{self.state.step}",
                    {
                        f"width-{average.rule.width}": t
                        for average, t in zip(self.averages, averages, strict=True)
                    },
                )

    def _tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """All that a resumed run needs, whole, by group and name; empty groups but on the main process."""
        reshard(self.model)
        optimizer = (
            (f"{key}/{name}", value)
            for name, p in self.denoiser.named_parameters()
            for key, value in state_of(self.optimizer, p).items()
        )
        groups = {"model": self.denoiser.state_dict().items(), "optimizer": optimizer}
        for name, average in zip(EMA_GROUPS, self.averages, strict=False):
            groups[name] = average.shadow.items()
        return {
            group: collected(tensors, self.accelerator.is_main_process) for group, tensors in groups.items()
        }

    def _facts(self) -> dict[str, Any]:
        return {
            "state": asdict(self.state),
            "config": self.config.resolved(),
            "autoencoder": self.autoencoder.fingerprint(),
            "images": len(self.latents),
            "num_classes": self.denoiser.num_classes,
            "data": self.identity,
            "processes": self.accelerator.num_processes,
        }


# ------------------------------------------------------------------------------------------------- setting up


@contextmanager
def open_run(config: Config, allow_change: Sequence[str] = (), scorer: Score | None = None) -> Iterator[Run]:
    """The run of `config`: new, or as its newest good checkpoint left it."""
    check_keys("--allow-change", allow_change)
    accelerator = start_accelerator()
    _check_settings(config.train, accelerator)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.train.tf32
    main = accelerator.is_main_process
    with run_lock(config.folder) if main else nullcontext():
        last = _find_checkpoint(config, accelerator)
        tensors, facts = checkpoint.load(last) if last else ({}, {})
        changes = check_same_run(facts["config"], config, str(config.folder), allow_change) if facts else []
        run = _build(config, accelerator, facts)
        run.scorer = scorer
        if facts:
            _restore(run, tensors, facts)
        elif main:
            checkpoint.check_room(config.folder / "checkpoints", _bytes_to_save(run))
        if config.train.compile:
            run.denoiser.unet.compile()
        if main:
            _write_down(run, tensors.get("ema"))
            run.metrics = MetricsLog(config.folder, run.state.step, config.train.trackers, config.resolved())
        del tensors
        _greet(run, last, changes)
        run.enter_phase()
        if main and not run.finished:
            run.bar = _progress_bar(run)
        try:
            with set_attention(run.denoiser.unet, config.train.attention):
                yield run
        finally:
            run._loader.shutdown(cancel_futures=True)
            if run.bar is not None:
                with suppress(OSError):
                    run.bar.close()
            if run.metrics is not None:
                run.metrics.close()
            if accelerator.num_processes > 1 and not sys.exc_info()[0]:
                accelerator.wait_for_everyone()  # nobody leaves while the main process still saves
                accelerator.end_training()


def _check_settings(settings: TrainConfig, accelerator: Accelerator) -> None:
    processes = accelerator.num_processes
    parts = processes * settings.gradient_accumulation
    if settings.batch_size % parts:
        below, above = settings.batch_size // parts * parts, -(-settings.batch_size // parts) * parts
        raise UserError(
            f"train.batch_size={settings.batch_size} cannot be shared by {processes} processes in "
            f"{settings.gradient_accumulation} accumulation steps; use {below or above} or {above}"
        )
    if settings.attention != "sdpa" and accelerator.device.type != "cuda":
        raise UserError(
            f"train.attention={settings.attention} needs a CUDA GPU, and there is none; use train.attention=sdpa"
        )
    if settings.attention == "flash" and settings.precision == "fp32":
        raise UserError(
            "train.attention=flash computes in 16 bits, and train.precision=fp32; set train.precision=bf16, or "
            "train.attention=sdpa"
        )
    if settings.parallel != "ddp" and (settings.match_steps or settings.new_only_steps):
        raise UserError(
            f"train.parallel={settings.parallel} cannot change what learns during a run (train.match_steps, "
            "train.new_only_steps); do those steps with train.parallel=ddp: a run may go on under the other"
        )
    if settings.parallel == "fsdp":
        check_sharding()
    if settings.parallel == "zero":
        import_deepspeed(accelerator.device)


def _find_checkpoint(config: Config, accelerator: Accelerator) -> Path | None:
    """The main process clears up, checks and chooses; the others take its word."""
    answer: list[str | None] = [None]
    if accelerator.is_main_process:
        _check_folder(config.folder)
        root = config.folder / "checkpoints"
        checkpoint.sweep(root)
        recover(config.folder / export.EXPORT)
        found = checkpoint.newest(root, lambda line: tqdm.write(line, file=sys.stderr))
        if found is None:
            _check_past(config.folder)
        answer = [str(found) if found else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    return Path(answer[0]) if answer[0] else None


def _check_folder(folder: Path) -> None:
    """Refuse a run folder in which something else has the name of what a run writes, before days of training."""
    mend = "move it away, or choose another run.name"
    for name in FILES:
        if (folder / name).exists() and not (folder / name).is_file():
            raise UserError(f"{folder / name} is a folder, and a run keeps a file there; {mend}")
    for name in FOLDERS:
        place = folder / name
        if place.exists() and not place.is_dir():
            raise UserError(f"{place} is a file, and a run keeps a folder there; {mend}")
    for place in (folder / "checkpoints", folder / "averages"):
        for path in place.glob("step-*"):
            if not path.is_dir():
                raise UserError(f"{path} is a file, and a run keeps a folder there; {mend}")


def _check_past(folder: Path) -> None:
    """Refuse to start at step 0 where a run has been: it would drop the metrics and replace the export.

    A run that ended before its first save has lost nothing that the same command does not make again.
    """
    has = None
    if (folder / export.EXPORT).exists():
        has = f"an export of step {export.exported_step(folder)}"
    elif (folder / "metrics.jsonl").exists():
        step = max((line["step"] for line in read(folder / "metrics.jsonl")), default=0)
        has = f"{step} steps in metrics.jsonl" if step > _first_save(folder) else None
    if has is not None:
        raise UserError(
            f"{folder} has {has} and no checkpoint to go on from; bring {folder / 'checkpoints'} back, choose another "
            f"run.name, or delete {folder} to start again from step 0"
        )


def _first_save(folder: Path) -> int:
    """The step of a run's first checkpoint; 0 where its config does not tell."""
    try:
        settings = load_config(folder / "config.yaml").train
    except UserError:
        return 0
    return settings.save_every or settings.steps


def _bytes_to_save(run: Run) -> int:
    """Of one checkpoint and the export: weights, AdamW's two moments, the averages, and the first of them again."""
    size = sum(p.numel() * p.element_size() for p in run.denoiser.parameters())
    return size * (1 + 2 + len(run.averages) + 1)


def _build(config: Config, accelerator: Accelerator, facts: dict[str, Any]) -> Run:
    data, settings, device = config.data, config.train, accelerator.device
    check_source(data.source)
    check_trackers(settings.trackers)
    autoencoder = load_autoencoder(
        config.autoencoder.spec,
        dtype=config.autoencoder.dtype,
        device=device,
        image_channels=data.image_channels,
    )
    if facts:
        autoencoder.check(facts["autoencoder"])
    randomness.fix_global(settings.seed, "weights", 0)
    pretrained, notes = None, []
    if config.model.pretrained is not None:
        pretrained = load_pretrained(config.model.pretrained)
        notes = check_pretrained(pretrained, config.diffusion.model_dump(), autoencoder)
    unet, originals = _build_unet(config, pretrained)
    latents, identity = _open_latents(config, autoencoder, accelerator.is_main_process)
    denoiser = Denoiser(unet, *_condition(config, latents))
    embedding_is_new, further = _read_condition(denoiser, pretrained, latents)
    notes += further
    if settings.new_only_steps and not embedding_is_new and not swapped_sites(unet):
        raise UserError(
            f"train.new_only_steps={settings.new_only_steps} and nothing of {pretrained.source} is new; set model.swap, or "
            "train.new_only_steps=0"
        )
    _check_fit(denoiser, autoencoder, latents)
    if not facts:
        _check_forward(denoiser, latents.latent_shape)
    denoiser.train().to(device=device)
    for old in originals.values():
        old.to(device=device, memory_format=torch.channels_last)
    if settings.parallel == "fsdp" and accelerator.num_processes > 1:
        shard(denoiser, device, ARITHMETIC[settings.precision])  # it takes contiguous parameters only
    elif settings.parallel == "ddp" or accelerator.num_processes == 1:  # and ZeRO makes them so
        denoiser.to(memory_format=torch.channels_last)
    if settings.ema == "constant":
        rules = [ema.Constant(settings.ema_decay)]
    else:
        rules = [ema.Power(width) for width in settings.ema_widths]
    optimizer = torch.optim.AdamW(
        denoiser.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    return Run(
        config=config,
        accelerator=accelerator,
        autoencoder=autoencoder,
        latents=latents,
        denoiser=denoiser,
        averages=[ema.EMA(denoiser, rule) for rule in rules],
        optimizer=optimizer,
        order=randomness.Order(len(latents), settings.seed),
        levels=tuple(
            level.to(device)
            for level in diffusion.levels(diffusion.Schedule(**config.diffusion.model_dump()))
        ),
        latent_shape=tuple(latents.latent_shape),
        state=State(loss_scale=FIRST_LOSS_SCALE if settings.precision == "fp16" else 1.0),
        originals=originals,
        identity=identity,
        embedding_is_new=embedding_is_new,
        notes=notes,
    )


def _build_unet(
    config: Config, pretrained: Pretrained | None
) -> tuple[torch.nn.Module, dict[str, torch.nn.Module]]:
    """The U-Net, and the blocks that were swapped out of a pretrained one."""
    model, settings = config.model, config.train
    if pretrained is None:
        if settings.match_steps or settings.new_only_steps:
            raise UserError(
                "train.match_steps and train.new_only_steps are for a swapped pretrained U-Net; "
                "set model.pretrained, or both to 0"
            )
        return build_unet(model.preset or model.unet, swap=model.swap), {}
    unet = pretrained.unet
    if model.swap is None:
        if settings.match_steps:
            raise UserError(
                f"train.match_steps={settings.match_steps} and model.swap=null: no block is swapped that could match its old "
                "one; set model.swap, or train.match_steps=0"
            )
        return unet, {}
    if already := swapped_sites(unet):
        raise UserError(f"{model.pretrained} has {len(already)} DCNv4 sites already; set model.swap=null")
    plan = plan_swap(unet, **swap_options(model.swap))
    originals = {site.name: unet.get_submodule(site.name) for site in plan}
    return apply_swap(unet, plan), originals if settings.match_steps else {}


def _read_condition(
    denoiser: Denoiser, pretrained: Pretrained | None, latents: Latents | LatentCache
) -> tuple[bool, list[str]]:
    """Whether the class embedding is a new one, and what is to be said of the condition of a pretrained network."""
    if pretrained is None:
        return denoiser.class_embedding is not None, []
    if denoiser.class_embedding is None:
        return False, check_text(pretrained, latents.text.encoder)
    is_new, line = read_class_embedding(denoiser, pretrained)
    return is_new, [line]


def _open_latents(
    config: Config, autoencoder: Autoencoder, main: bool
) -> tuple[Latents | LatentCache, str | None]:
    """What the run learns from, and its identity; a latent cache where `data.source` is one, else encoded now, in memory."""
    data = config.data
    if is_cache(data.source):
        cache = LatentCache.open(data.source)
        autoencoder.check(cache.fingerprint)
        return _checked(config, cache, autoencoder), cache.identity
    if data.image_size % autoencoder.factor:
        below = data.image_size // autoencoder.factor * autoencoder.factor
        raise UserError(
            f"data.image_size={data.image_size} is no multiple of {autoencoder.factor}, the pixels that autoencoder "
            f"'{autoencoder.spec}' makes one latent of; set data.image_size={below or autoencoder.factor}"
        )
    images = open_dataset(
        data.source,
        image_size=data.image_size,
        image_channels=autoencoder.image_channels,
        split=data.split,
        max_bad=data.max_bad,
    )
    with tqdm(total=len(images), desc="encoding", unit="image", disable=not main, leave=False) as bar:
        latents = encode_dataset(images, autoencoder, data.encode_batch_size, bar.update)
    return _checked(config, latents, autoencoder), _identity(images)


def _identity(images: Images) -> str:
    """12 hex digits: the same files, by name and content, with the same labels, in the same order, have the same."""
    digest = hashlib.sha256()
    contents = images.contents(range(len(images)))
    for index, (label, content) in enumerate(zip(images.labels.tolist(), contents, strict=True)):
        digest.update(f"{images.name(index)}\0{content.hex()}\0{label}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:12]


def _checked(
    config: Config, latents: Latents | LatentCache, autoencoder: Autoencoder
) -> Latents | LatentCache:
    data = config.data
    if data.flip and not latents.has_flips:
        raise UserError(
            f"data.flip=true and {data.source} holds no mirrored latents; encode it with --flip, or set data.flip=false"
        )
    if data.condition == "text" and latents.text is None:
        raise UserError(
            f"data.condition=text and {data.source} holds no text; encode it with --text-encoder, or set data.condition=labels"
        )
    side = latents.latent_shape[1] * autoencoder.factor
    if side != data.image_size:
        raise UserError(
            f"{data.source} holds images of {side} pixels and data.image_size={data.image_size}; set data.image_size={side}"
        )
    return latents


def _condition(config: Config, latents: Latents | LatentCache) -> tuple[int, torch.Tensor | None]:
    """The number of classes, or the empty prompt's tokens."""
    if config.data.condition == "text":
        return 0, latents.empty_tokens
    wanted = config.data.num_classes
    if wanted is None or wanted == 0:
        return latents.num_classes if wanted is None else 0, None
    if not latents.num_classes:
        raise UserError(
            f"{config.data.source} has no classes and data.num_classes={wanted}; sort its images into a subfolder a class, "
            "or set data.num_classes=0"
        )
    if latents.num_classes > wanted:
        raise UserError(
            f"{config.data.source} has {latents.num_classes} classes and data.num_classes={wanted}; "
            f"use {latents.num_classes}, or null to take what there is"
        )
    return wanted, None


def _check_fit(denoiser: Denoiser, autoencoder: Autoencoder, latents: Latents | LatentCache) -> None:
    unet, channels = denoiser.unet.config, autoencoder.latent_channels
    if (unet.in_channels, unet.out_channels) != (channels, channels):
        raise UserError(
            f"the U-Net takes {unet.in_channels} and gives {unet.out_channels} channels, "
            f"the latents of autoencoder '{autoencoder.spec}' have {channels}; set model.unet.in_channels={channels} "
            f"model.unet.out_channels={channels}"
        )
    if isinstance(latents, Latents) and not torch.isfinite(latents.moments).all():
        raise UserError(
            f"the latents of autoencoder '{autoencoder.spec}' hold NaN or infinity; "
            "use autoencoder.dtype=float32"
        )


def _check_forward(denoiser: Denoiser, latent_shape: tuple[int, int, int]) -> None:
    """One forward pass before the first step: diffusers checks a config where it is used.

    A large network takes it on the meta device, without numbers and without time.
    """
    size = sum(p.numel() for p in denoiser.parameters())
    device = "cpu" if size < SMALL_NETWORK else "meta"
    shape = (2, *latent_shape)
    x, times = torch.zeros(shape, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    try:
        network = denoiser if device == "cpu" else _empty_denoiser(denoiser)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            given = tuple(network(x, times, network.null_condition(2)).shape)
    except Exception as error:  # a bad value may surface as any kind of error
        raise UserError(
            f"the U-Net of this config cannot take latents of shape {shape[1:]}: {type(error).__name__}: {error}; mend "
            "model.unet"
        ) from error
    if given != shape:
        raise UserError(
            f"the U-Net of this config makes {given[1:]} of latents of shape {shape[1:]}; use a data.image_size that "
            "halves as often as model.unet does"
        )


def _empty_denoiser(denoiser: Denoiser) -> Denoiser:
    tokens = None if denoiser.empty_tokens is None else denoiser.empty_tokens.to("meta")
    unet = empty_twin(denoiser.unet)
    with torch.device("meta"):
        return Denoiser(unet, denoiser.num_classes, tokens)


def _restore(run: Run, tensors: dict[str, dict[str, torch.Tensor]], facts: dict[str, Any]) -> None:
    source = run.config.data.source
    if (facts["images"], facts["num_classes"]) != (len(run.latents), run.denoiser.num_classes):
        raise UserError(
            f"{run.config.folder} was trained on {facts['images']} images of {facts['num_classes']} classes, "
            f"{source} now holds {len(run.latents)} of {run.denoiser.num_classes}; bring the data "
            "back, or choose another run.name"
        )
    known = facts.get("data")
    # runs on images in memory did not always note it
    if known != run.identity and (known is not None or isinstance(run.latents, LatentCache)):
        raise UserError(
            f"{run.config.folder} was trained on another state of {source} (it was {known}, now it is {run.identity}); "
            "bring the data back, or choose another run.name"
        )
    _load(run.denoiser.state_dict(), tensors["model"])
    if len(run.averages) > sum(name in tensors for name in EMA_GROUPS):
        raise UserError(
            f"{run.config.folder} keeps one average of its weights and train.ema=power takes two; set train.ema=constant, or "
            "choose another run.name"
        )
    for name, average in zip(EMA_GROUPS, run.averages, strict=False):
        _load(average.shadow, tensors[name])
    parameters = dict(run.denoiser.named_parameters())
    for key, value in tensors["optimizer"].items():
        kind, name = key.split("/", 1)
        p = parameters[name]
        # zeros_like keeps the parameter's memory layout
        same = value.shape == p.shape
        run.optimizer.state[p][kind] = (
            torch.zeros_like(p).copy_(in_shares_of(value, p)) if same else value.to(run.accelerator.device)
        )
    run.state = State(**facts["state"])


@torch.no_grad()
def _load(own: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    """Copy whole `tensors` into those of the same names, which may be shares."""
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise UserError(
            f"checkpoint and model differ in {len(odd)} names, first '{odd[0]}'; choose another run.name"
        )
    for name, tensor in own.items():
        tensor.copy_(in_shares_of(tensors[name], tensor))


def _write_down(run: Run, averaged: dict[str, torch.Tensor] | None) -> None:
    """config.yaml, a line in provenance.jsonl for every start, and the export where a crash left it out."""
    folder = run.config.folder
    text, path = run.config.to_yaml(), folder / "config.yaml"
    if not path.exists() or path.read_bytes() != text.encode():
        replace_file(path, text)
    path = folder / "provenance.jsonl"
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": run.state.step, **provenance()}) + "\n")
    if run.state.step and export.exported_step(folder) != run.state.step:
        run.export(averaged)


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
    what = "captioned images" if run.denoiser.takes_text else f"images of {run.denoiser.num_classes} classes"
    run.say(
        f"{config.folder}: {parameters / 1e6:.3f} M parameters{f', {sites} DCNv4 sites' if sites else ''}; "
        f"{len(run.latents)} {what}; "
        f"batch {config.train.batch_size} on {processes} x {run.accelerator.device.type}"
    )
    if last is None:
        for note in run.notes:
            run.say(note)
    for change in changes:
        run.say(f"changed since the last checkpoint: {change}")
    if last:
        done = "; nothing left to do" if run.finished else ""
        run.say(f"going on from {last}{done}")
