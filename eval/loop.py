"""What a training loop costs beside forward, backward and optimiser: `python -m eval.throughput --train`.

The loop that is timed is the trainer's own, on the config's own data, in a temporary run folder.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from ldm_dcn import trainer
from ldm_dcn.config import Config
from ldm_dcn.opening import open_run
from ldm_dcn.signals import StopSignals

WARM_UP = 10  # untimed steps
LOADED = 20  # batches that the loader is timed with alone

NETWORK = ("forward", "backward", "optimiser")  # all else is the loop's


@dataclass
class LoopCost:
    """Seconds a step of every part of the loop, one entry a step."""

    step: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    loader: float = 0.0  # of one batch made in the foreground, where it is made ready beside the step before
    peak_bytes: int | None = None  # of GPU memory, in the timed steps
    processes: int = 1

    def median(self, part: str) -> float:
        return statistics.median(self.parts[part])

    @property
    def overhead(self) -> float:
        """The median share of a step that is not forward, backward or optimiser."""
        network = zip(*(self.parts[name] for name in NETWORK), strict=True)
        return statistics.median(1 - sum(own) / whole for own, whole in zip(network, self.step, strict=True))


def measure_loop(config: Config, steps: int, progress: bool = True) -> LoopCost:
    """Train `steps` steps of `config` after a warm-up, without saving or drawing, and time their parts."""
    cost = LoopCost()
    with tempfile.TemporaryDirectory() as folder:
        never = ("save_every", "sample_every", "score_every", "validate_every", "export_every")
        train = config.train.model_copy(
            update={"steps": WARM_UP + steps + 1, **dict.fromkeys(never, 0)},
        )
        run_config = config.run.model_copy(update={"dir": folder, "name": "loop"})
        config = config.model_copy(update={"train": train, "run": run_config})
        with open_run(config) as run, StopSignals() as stop:
            cost.processes = run.accelerator.num_processes
            run.enter_phase()
            if run.bar is not None:
                run.bar.disable = True
            for number in tqdm(range(WARM_UP + steps), desc="training", disable=not progress, leave=False):
                times: dict[str, float] = {}
                if number == WARM_UP and run.accelerator.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                with _parts_timed(run, times):
                    began = _now(run)
                    loss = trainer.training_step(run, stop)
                    if loss is not None:
                        run.record(loss)
                        if run.due(config.train.log_every):
                            run.log()
                    whole = _now(run) - began
                if number >= WARM_UP:
                    cost.step.append(whole)
                    times["backward"] -= times["forward"]  # both are in it, and the end of the graph
                    times["rest"] = whole - sum(times.values())
                    for name, seconds in times.items():
                        cost.parts.setdefault(name, []).append(seconds)
            if run.accelerator.device.type == "cuda":
                cost.peak_bytes = torch.cuda.max_memory_allocated()
            loads = []
            for number in range(LOADED):
                began = time.perf_counter()
                run.batches.on_host(number, 0)
                loads.append(time.perf_counter() - began)
            cost.loader = statistics.median(loads)
    return cost


def table(cost: LoopCost, config: Config) -> str:
    whole = statistics.median(cost.step)
    rows = [(name, cost.median(name)) for name in cost.parts]
    lines = [f"{'part of a training step':<28}{'ms':>10}{'share':>9}", "-" * 47]
    lines += [f"{name:<28}{1e3 * seconds:>10.2f}{seconds / whole:>9.1%}" for name, seconds in rows]
    lines += [
        f"{'whole step':<28}{1e3 * whole:>10.2f}",
        "",
        f"outside forward, backward and optimiser: {cost.overhead:.2%}",
    ]
    lines += [
        f"a batch made in the foreground would cost {1e3 * cost.loader:.2f} ms",
        f"{config.run.name}: batch {config.train.batch_size}, {config.train.precision}, {len(cost.step)} steps, medians; "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}",
    ]
    return "\n".join(lines)


@contextmanager
def _parts_timed(run: Any, times: dict[str, float]) -> Iterator[None]:
    """Inside, every call of a part of the step adds its seconds to `times`."""

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            began = _now(run)
            result = call(*args, **kwargs)
            times[name] = times.get(name, 0.0) + _now(run) - began
            return result

        return wrapped

    times |= dict.fromkeys(("waiting for the batch", *NETWORK, "average"), 0.0)
    averages = [
        mock.patch.object(average, "update", timed("average", average.update)) for average in run.averages
    ]
    patches = [
        mock.patch.object(run.batches, "at", timed("waiting for the batch", run.batches.at)),
        mock.patch.object(trainer, "batch_loss", timed("forward", trainer.batch_loss)),
        mock.patch.object(trainer, "backpropagate", timed("backward", trainer.backpropagate)),
        mock.patch.object(trainer, "_scale_gradients", timed("optimiser", trainer._scale_gradients)),
        mock.patch.object(run.optimizer, "step", timed("optimiser", run.optimizer.step)),
        mock.patch.object(run.optimizer, "zero_grad", timed("optimiser", run.optimizer.zero_grad)),
        *averages,
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()


def _now(run: Any) -> float:
    if run.accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
