"""DeepSpeed's ZeRO stage 2: gradients and AdamW's state shared out between all processes, parameters whole in each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .errors import UserError

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,  # has to be given; only DeepSpeed's own statistics use it
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 50_000_000},  # elements, 4 bytes each
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,  # left out, it is 1.0
    "timers": {"throughput": {"enabled": False}},  # they wait for the GPU at every forward pass
}
MOMENTS = ("exp_avg", "exp_avg_sq")


def import_deepspeed(device: torch.device) -> ModuleType:
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # it would search, and warn on a CPU
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"train.parallel=zero needs DeepSpeed ({error}); run `pip install -c constraints.txt deepspeed`, or set "
            "train.parallel=fsdp"
        ) from None
    return deepspeed


class Zero:
    """Stands for `adamw`, whose state it takes over, in the training loop.

    DeepSpeed lays all parameters end to end in a flat tensor. Of it each process keeps one part's gradient and moments, steps that part
    and sends it to the others. Nothing else of its engine is used: loss scale, clipping and checkpoints are the run's own, and
    the engine's forward pass would turn off the autocast around it.
    """

    def __init__(self, denoiser: nn.Module, adamw: torch.optim.AdamW, device: torch.device) -> None:
        loaded, settings = dict(adamw.state), adamw.param_groups[0]
        by_step: dict[float, list[nn.Parameter]] = {}  # a flat tensor has one count of steps
        for p in settings["params"]:
            by_step.setdefault(float(loaded[p]["step"]) if p in loaded else 0.0, []).append(p)
        adamw.state.clear()
        adamw.param_groups[:] = [{**settings, "params": parameters} for parameters in by_step.values()]
        self._engine, self._optimizer, _, _ = import_deepspeed(device).initialize(
            model=denoiser, optimizer=adamw, config=CONFIG
        )
        self._flat: dict[nn.Parameter, torch.Tensor] = {}
        for (step, parameters), group in zip(by_step.items(), self.param_groups, strict=True):
            (flat,) = group["params"]
            self._flat |= dict.fromkeys(parameters, flat)
            adamw.state[flat] = {
                "step": torch.tensor(step, device=device),
                **{name: torch.zeros_like(flat) for name in MOMENTS},
            }
        self._optimizer._lazy_init_hp_params_optimizer_state()  # else only the first step makes them known
        from deepspeed.utils import safe_set_full_optimizer_state

        for p, state in loaded.items():
            for name in MOMENTS:
                safe_set_full_optimizer_state(p, state[name], name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    @contextmanager
    def exchanged(self, last: bool) -> Iterator[None]:
        """The backward pass inside adds to this process's part of the gradients; `last` of a step makes them ready."""
        self._engine.set_gradient_accumulation_boundary(last)
        yield
        self._engine.allreduce_gradients()

    def gradients(self) -> list[torch.Tensor]:
        """This process's part, in pieces; all processes' together are the gradient, once."""
        return [piece for pieces in self._optimizer.averaged_gradients.values() for piece in pieces]

    def step(self) -> None:
        self._optimizer.step()

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def state_of(self, p: nn.Parameter) -> dict[str, torch.Tensor]:
        """AdamW's state of `p`, whole. All processes must call it together."""
        from deepspeed.utils import safe_get_full_optimizer_state

        moments = {name: safe_get_full_optimizer_state(p, name) for name in MOMENTS}
        return {"step": self._optimizer.state[self._flat[p]]["step"].clone(), **moments}
