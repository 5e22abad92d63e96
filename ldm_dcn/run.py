"""A training run: all that it holds, on its way from step to step."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from . import checkpoint, diffusion, ema, export, pictures
from .arithmetic import ARITHMETIC
from .autoencoder import Autoencoder
from .batches import Batches
from .cache import LatentCache
from .config import Config, TrainConfig, config_hash
from .denoiser import Denoiser
from .errors import UserError, explain, shown
from .files import write_json
from .folders import DiskFull
from .latents import Latents
from .matching import Matching, new_parameters
from .metrics import MetricsLog
from .metrics import read as read_metrics
from .model import Model
from .parallel import collected, in_shares_of, replicate, reshard
from .processes import Processes
from .sampling import generate, resolved
from .signals import StopSignals
from .swap import swapped_sites
from .unet import (
    any_attention,
    empty_twin,
)

# What is looked at on the way, after the save of its step.
GRID, SCORE, VALIDATION = "grid", "score", "validation"
GRID_ROWS = 10  # classes at most in the grids drawn on the way
EMA_GROUPS = ("ema", "ema_2")  # names in a checkpoint
# What may go wrong beside the training without being its end: a disk, a picture of NaN, a sampler's batch too large.
SPARED = (OSError, ValueError, UserError, torch.OutOfMemoryError)

# a model, a number of images, the processes that share the drawing -> names and values, on the first of them
Score = Callable[[Model, int, Processes], dict[str, Any]]


class NonFinite(UserError):
    """The loss, the gradient or the weights became NaN or infinite; no checkpoint was touched."""


class Interrupted(Exception):
    """A signal came while drawing: the grid or score can wait until the run goes on, the checkpoint cannot."""


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
    batch_since: int = 0  # the step from which on batches have the size that they have
    samples_before: int = 0  # taken until then


def phases(settings: TrainConfig) -> dict[int, str]:
    """What learns from which step on, in order: match -> new -> all. A phase without steps gives way to the next."""
    ends = {"match": settings.match_steps, "new": max(settings.match_steps, settings.new_only_steps)}
    return {0: "match", ends["match"]: "new", ends["new"]: "all"}


def phase_at(step: int, settings: TrainConfig) -> tuple[int, str]:
    """The step at which the phase of `step` began, and its name."""
    return max((first, name) for first, name in phases(settings).items() if first <= step)


@dataclass
class Run:
    """Everything a training run holds; `opening.open_run` makes it."""

    config: Config
    accelerator: Accelerator
    autoencoder: Autoencoder
    latents: Latents | LatentCache
    denoiser: Denoiser
    averages: list[ema.EMA]  # the first is used for samples and the export
    optimizer: torch.optim.Optimizer
    batches: Batches
    schedule: diffusion.Schedule
    levels: tuple[torch.Tensor, torch.Tensor]  # alpha and sigma at each time, on the device
    state: State
    held_out: Batches | None = None  # where `train.validate_every` is on
    identity: str | None = None  # of the data: another one is refused at a resume
    originals: dict[str, torch.nn.Module] = field(default_factory=dict)  # the blocks that were swapped out
    embedding_is_new: bool = True  # that of the classes: not read from a pretrained network
    condition_is_read: bool = True  # a U-Net without cross-attention has no use for one
    notes: list[str] = field(default_factory=list)  # what a pretrained network brings along, and has to learn
    model: torch.nn.Module = None  # the denoiser as the processes share it
    parameters: list[torch.nn.Parameter] = field(default_factory=list)  # those that learn now
    matching: Matching | None = None  # while new blocks learn the old ones' outputs
    phase: str = ""
    metrics: MetricsLog | None = None  # on the main process
    bar: tqdm | None = None  # on the main process
    scorer: Score | None = None
    peers: Processes = field(default_factory=Processes)  # that share the drawing
    stop: StopSignals | None = None
    stopped_by: int = 0  # the signal that asked us to stop
    interrupted: bool = False  # whether a signal cut the drawing at this step short, here
    gradient_norm: float = 0.0  # of the last step, as the next
    learning_rate: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    window_began: float = field(default_factory=time.perf_counter)
    window_pause: float = 0.0  # seconds since then that went into saving and sampling
    window_steps: int = 0
    _proven: bool = False  # whether a step was taken from the newest checkpoint
    _failing: set[str] = field(default_factory=set)  # what the user was warned of

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
        _, phase = phase_at(step, settings)
        if phase == self.phase:
            return
        self.phase = phase
        sites = [site.name for site in swapped_sites(self.denoiser.unet)]
        new = new_parameters(self.denoiser.unet, sites)
        for name, p in self.denoiser.unet.named_parameters():
            p.requires_grad_(phase == "all" or name in new)
        if self.denoiser.class_embedding is not None:
            own_turn = phase == "all" or (phase == "new" and self.embedding_is_new)
            # DDP would wait for a gradient that never comes
            self.denoiser.class_embedding.requires_grad_(own_turn and self.condition_is_read)
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
        if self.accelerator.num_processes > 1 and not self._is_sharded:
            self.model = replicate(self.denoiser, self.accelerator.device)
        if phase != "all":
            count = sum(p.numel() for p in self.parameters)
            what = "match the blocks they replace" if phase == "match" else "learn alone"
            self.say(f"from step {step}: {count / 1e6:.3f} M new parameters {what}")

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
            self._drop_older()
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
                    samples=self.batches.first_of(state.step),
                    images_per_second=round(speed, 2),
                    **extra,
                    **({"left_out": state.left_out} if state.left_out else {}),
                    **({"phase": self.phase} if self.phase != "all" else {}),
                )
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{mean:.4f}", **{"images/s": f"{speed:.1f}"}, refresh=False)
        state.loss_sum, state.loss_count = 0.0, 0
        self.window_began, self.window_pause, self.window_steps = time.perf_counter(), 0.0, 0

    def cut_short(self) -> int:
        """The signal that cut drawing short in any of the processes, or 0."""
        total = torch.zeros(2, device=self.accelerator.device)
        total[1] = self.stop.received if self.interrupted else 0
        return self.mean_loss_and_signal(total)[1]

    def left_behind(self) -> list[str]:
        """What was looked at, at the step that the run goes on from: a save comes first, and a kill may lie between the two."""
        found: list[str] = []
        if self.accelerator.is_main_process:
            if self._grid_file.exists():
                found.append(GRID)
            for line in read_metrics(self.config.folder / "metrics.jsonl"):
                if line["step"] == self.state.step:
                    found += [VALIDATION] if "validation_loss" in line else [] if "loss" in line else [SCORE]
        if self.accelerator.num_processes > 1:
            answer = [found]
            broadcast_object_list(answer)
            (found,) = answer
        return found

    def record_validation(self, loss: float) -> None:
        if self.metrics is not None:
            with self.spared("the line of metrics.jsonl"):
                self.metrics.write(
                    self.state.step, validation_loss=loss, validation_images=self.held_out.size
                )

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
            self.interrupted = True
            self.say(f"step {self.state.step}: asked to stop, {what} waits until the run goes on")
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
        step = self.state.step
        where = self.config.folder / f"nonfinite-step-{step + 1}.json"
        if self.accelerator.is_main_process:
            samples, times = self.batches.of_everyone(step)
            facts = {
                "step": step + 1,
                "loss": repr(loss),
                "gradient_norm": repr(self.gradient_norm),
                "samples": samples,
                "times": times,
                "recent_losses": list(self.recent),
            }
            with self.spared(f"to write {where}"):
                write_json(where, facts)
        return where

    # ---------------------------------------------------------------------- drawing

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The denoiser has the averaged weights inside, computes as in training, and draws with any attention there is."""
        reshard(self.denoiser)
        with self.averages[0].in_place(), any_attention(self.config.train.attention), self.arithmetic():
            try:
                yield
            finally:  # a failure is spared, and the next step would compute with what is gathered
                reshard(self.denoiser)

    def averaged_model(self, denoiser: Denoiser | None = None) -> Model:
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
        return Model(
            denoiser or self.denoiser,
            self.autoencoder,
            self.schedule,
            tuple(self.latents.latent_shape),
            str(config.run.name),
            self.state.step,
            settings,
            tags,
            text_encoder=self.latents.text.encoder if self.latents.text else None,
            class_names=tuple(self._class_names()),
            between_batches=self._look_up,
        )

    def _look_up(self) -> None:
        """Between two batches of images. Those with shares of one network must draw to the end together."""
        if self.stop is not None and self.stop.received and not self._is_sharded:
            raise Interrupted

    @property
    def _draws(self) -> bool:
        """Whether this process takes part in drawing: where the network is shared out, none has the whole of it."""
        return self.accelerator.is_main_process or self._is_sharded

    @property
    def _is_sharded(self) -> bool:
        return self.config.train.parallel != "ddp" and self.accelerator.num_processes > 1

    def draw_grid(self) -> None:
        """samples/step-N.png: one row a class or prompt, one column a seed, the same seeds every time."""
        settings, columns = self.config.sample, self.config.sample.images_per_class
        with self.spared("the grid of samples"), self.pause(), ExitStack() as inside:

            def begin() -> torch.Tensor:
                inside.enter_context(self.averaged())
                return self._grid_rows()

            rows = self.peers.together(begin)  # what fails in one process alone, others would wait for
            seeds = torch.arange(columns).repeat(len(rows)).split(settings.batch_size)
            conditions = rows.repeat_interleave(columns, 0).split(settings.batch_size)
            model = self.averaged_model()

            def draw(batch: int) -> torch.Tensor:
                return generate(
                    model,
                    conditions[batch] if self.denoiser.is_conditional else None,
                    seeds[batch],
                    batch_size=settings.batch_size,
                    **resolved(model, {}),
                )

            images = list(self.peers.in_order(draw, len(seeds)))
            if self.accelerator.is_main_process:
                pictures.save_grid(torch.cat(images), columns, self._grid_file)
                self.metrics.show(self.state.step, "samples", self._grid_file)

    @property
    def _grid_file(self) -> Path:
        return self.config.folder / "samples" / f"step-{self.state.step}.png"

    def _grid_rows(self) -> torch.Tensor:
        """Classes (rows,), or tokens (rows, T, D) of the prompts asked for or of captions of the first samples of the data."""
        if not self.denoiser.takes_text:
            return torch.arange(min(self.denoiser.num_classes, GRID_ROWS) or 1)
        prompts = self.config.sample.prompts
        if prompts:
            return self.averaged_model().encode_prompts(prompts)
        ids = torch.arange(min(len(self.latents), GRID_ROWS))
        return self.latents.read_tokens(ids, torch.zeros_like(ids))

    def score(self) -> None:
        """A small Frechet distance of the averaged model, in metrics.jsonl, with what it was measured with."""
        if self.scorer is None:
            return
        with self.spared("the score"):
            if self.bar is not None:
                with suppress(OSError):
                    self.bar.set_postfix_str(f"drawing {self.config.sample.score_images} images to score")
            with self.pause(), ExitStack() as inside:
                self.peers.together(lambda: inside.enter_context(self.averaged()))
                values = self.scorer(self.averaged_model(), self.config.sample.score_images, self.peers)
            if self.metrics is not None:
                self.metrics.write(self.state.step, **values)

    # ---------------------------------------------------------------------- leaving things behind

    @property
    def _checkpoints(self) -> Path:
        return self.config.folder / "checkpoints"

    def save(self) -> None:
        """A checkpoint to go on from, and the export for use. A full disk can wait for the next save.

        One more than `train.keep_checkpoints` are kept until a step was taken from the new one: the last step may have been one
        too many. Raises `NonFinite`, and saves nothing, where the state holds NaN or infinity.
        """
        if not self._draws:
            return
        with self.pause():
            tensors = self._tensors()
            if not self.accelerator.is_main_process:
                return
            root = self._checkpoints
            if (where := checkpoint.non_finite(tensors)) is not None:
                raise NonFinite(
                    f"step {self.state.step}: {where} holds NaN or infinity and is not saved; {self.last_checkpoint()}; "
                    f"{' or '.join(self.mends())}"
                )
            keep = self.config.train.keep_checkpoints + (not self.finished)
            try:
                checkpoint.save(root, self.state.step, tensors, self._facts(), keep)
                self._proven = self.finished
                self.export(tensors["ema"])
            except (DiskFull, OSError) as error:
                if self.finished or self.stopped_by or not any(root.glob("step-*")):
                    raise
                reason = explain(error) if isinstance(error, OSError) else str(error)
                self.say(f"warning: {reason}; training goes on and tries again at the next save")

    def _drop_older(self) -> None:
        if not self._proven and self.accelerator.is_main_process:
            with self.spared("to remove older checkpoints"):
                checkpoint.keep_newest(self._checkpoints, self.config.train.keep_checkpoints)
        self._proven = True

    def last_checkpoint(self) -> str:
        """Where the same command goes on, and what to do should that have gone wrong already."""
        steps = checkpoint.saved_steps(self._checkpoints)
        if not steps:
            return "there is no checkpoint to go on from yet"
        if len(steps) == 1:
            return f"the last checkpoint is step-{steps[0]}, the only one"
        return (
            f"the last checkpoint is step-{steps[0]} (should it come to the same from there, move "
            f"{self._checkpoints / f'step-{steps[0]}'} away: then the same command goes on from step-{steps[1]})"
        )

    def mends(self) -> list[str]:
        """What keeps weights from running away."""
        mends = ["lower train.lr"]
        if self.config.train.gradient_clip is None:
            mends.append("set train.gradient_clip=1.0")
        if isinstance(self.latents, LatentCache):
            mends.append(f"run python -m ldm_dcn.encode --verify {self.latents.folder}")
        return mends

    def export_step(self) -> None:
        """exports/step-N: what export/ will have of this step, to stay."""
        if not self._draws:
            return
        with self.spared("the export of this step"), self.pause():
            averaged = collected(self.averages[0].shadow.items(), self.accelerator.is_main_process)
            if self.accelerator.is_main_process:
                self.export(averaged, self.config.folder / export.EXPORTS / f"step-{self.state.step}")

    def export(self, averaged: dict[str, torch.Tensor], folder: Path | None = None) -> None:
        """The model of the `averaged` weights, whole, in `folder`; null is the run's export/."""
        folder = folder or self.config.folder / export.EXPORT
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
        reshard(self.denoiser)
        optimizer = (
            (f"{key}/{name}", value)
            for name, p in self.denoiser.named_parameters()
            for key, value in self.optimizer.state.get(p, {}).items()
        )
        groups = {"model": self.denoiser.state_dict().items(), "optimizer": optimizer}
        for name, average in zip(EMA_GROUPS, self.averages, strict=False):
            groups[name] = average.shadow.items()
        return {
            group: collected(tensors, self.accelerator.is_main_process) for group, tensors in groups.items()
        }

    def _class_names(self) -> list[str]:
        return list(self.latents.class_names[: self.denoiser.num_classes])

    def _check_data(self, facts: dict[str, Any], other_data: bool) -> list[str]:
        source, model = self.config.data.source, self.config.model
        others = [
            f" model.{key}=null" for key in ("preset", "unet", "swap") if getattr(model, key) is not None
        ]
        begin_anew = (
            "or choose another run.name for a new run; "
            f"model.pretrained={self.config.folder}{''.join(others)} has it begin with the weights of this one"
        )
        if facts["num_classes"] != self.denoiser.num_classes:
            raise UserError(
                f"{self.config.folder} was trained on {facts['images']} images of {facts['num_classes']} classes, "
                f"{source} now holds {len(self.latents)} of {self.denoiser.num_classes}; bring the data back, {begin_anew}"
            )
        known = facts.get("data")
        # runs on images in memory did not always note it
        noted = known is not None or isinstance(self.latents, LatentCache)
        if facts["images"] == len(self.latents) and (known == self.identity or not noted):
            return []
        if other_data:
            renamed = _renamed(facts.get("class_names", []), self._class_names(), source)
            unseen = "; those that data.split=train holds out may have been trained on" * bool(self.held_out)
            return [
                f"the images of {source}: {facts['images']} -> {len(self.latents)}, {known} -> {self.identity}{unseen}",
                *renamed,
            ]
        raise UserError(
            f"{self.config.folder} was trained on another state of {source} ({facts['images']} images, {known}; now it is "
            f"{len(self.latents)}, {self.identity}); bring the data back, go on with these by --other-data, {begin_anew}"
        )

    def _facts(self) -> dict[str, Any]:
        return {
            "state": asdict(self.state),
            "config": self.config.resolved(),
            "autoencoder": self.autoencoder.fingerprint(),
            "images": len(self.latents),
            "num_classes": self.denoiser.num_classes,
            "class_names": self._class_names(),
            "data": self.identity,
            "processes": self.accelerator.num_processes,
        }

    def restore(
        self, tensors: dict[str, dict[str, torch.Tensor]], facts: dict[str, Any], other_data: bool = False
    ) -> list[str]:
        """Take up what `_tensors` and `_facts` gave; returns in words what has changed. Raises `UserError` where the model is another,
        or the data are and may not be."""
        changes = self._check_data(facts, other_data)
        _load(self.denoiser.state_dict(), tensors["model"])
        if len(self.averages) > sum(name in tensors for name in EMA_GROUPS):
            raise UserError(
                f"{self.config.folder} keeps one average of its weights and train.ema=power takes two; set train.ema=constant, or "
                "choose another run.name"
            )
        for name, average in zip(EMA_GROUPS, self.averages, strict=False):
            _load(average.shadow, tensors[name])
        parameters = dict(self.denoiser.named_parameters())
        for key, value in tensors["optimizer"].items():
            kind, name = key.split("/", 1)
            p = parameters[name]
            # zeros_like keeps the parameter's memory layout
            same = value.shape == p.shape
            self.optimizer.state[p][kind] = (
                torch.zeros_like(p).copy_(in_shares_of(value, p))
                if same
                else value.to(self.accelerator.device)
            )
        fresh, self.state = self.state, State(**facts["state"])
        before = facts["config"]["train"]
        if before["precision"] != self.config.train.precision:  # a scale is of its number format
            self.state.loss_scale, self.state.overflows_in_a_row = fresh.loss_scale, 0
            self.state.overflow_step = self.state.step
        if before["batch_size"] != self.config.train.batch_size:  # no sample comes twice, none is left out
            taken = (self.state.step - self.state.batch_since) * before["batch_size"]
            self.state.samples_before += taken
            self.state.batch_since = self.state.step
        self.batches.began = (self.state.batch_since, self.state.samples_before)
        return changes


def _renamed(before: Sequence[str], now: Sequence[str], source: str) -> list[str]:
    """The classes that have other names than those learned, in words. Raises `UserError` where one that was learned has another number."""
    known: dict[str, list[int]] = {}  # lists of ImageNet's names have some twice
    for number, name in enumerate(before):
        known.setdefault(name, []).append(number)
    for number, name in enumerate(now):
        if name in known and number not in known[name]:
            raise UserError(
                f"class {shown(name)} of {source} has number {number}, and the run learned it as number {known[name][0]}; name "
                "class folders (or lines of classnames.txt) so that each keeps its number, or choose another run.name for a new run"
            )
    pairs = enumerate(zip(before, now, strict=False))
    return [f"class {number}: {shown(a)} -> {shown(b)}" for number, (a, b) in pairs if a != b]


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
