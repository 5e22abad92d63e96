"""The batches of a run: functions of (seed, step, place in the global batch), so that any number of processes learns from the same."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from accelerate import Accelerator

from . import diffusion, randomness
from .autoencoder import Autoencoder
from .cache import LatentCache
from .config import Config
from .denoiser import Denoiser
from .latents import Latents


@dataclass(frozen=True)
class Batch:
    """One process's share of one (micro-)step."""

    latents: torch.Tensor  # (n, C, h, w)
    noise: torch.Tensor  # (n, C, h, w)
    times: torch.Tensor  # (n,) int64
    condition: torch.Tensor  # labels (n,) int64, or tokens (n, T, D); the null ones where dropped


class Batches:
    """This process's shares. `order` says which image stands at which of the global positions."""

    def __init__(
        self,
        config: Config,
        schedule: diffusion.Schedule,
        latents: Latents | LatentCache,
        autoencoder: Autoencoder,
        denoiser: Denoiser,
        accelerator: Accelerator,
    ) -> None:
        self.order = randomness.Order(len(latents), config.train.seed)
        self.began = (0, 0)  # the step from which on batches have this size, and the samples before it
        self._settings = config.train
        self.size, self.parts = config.train.batch_size, config.train.gradient_accumulation
        self._schedule = schedule
        self._latents = latents
        self._flips = latents.has_flips and config.data.flip is not False
        self._autoencoder = autoencoder
        self._null_label = denoiser.num_classes
        self._takes_text = denoiser.takes_text
        self._device = accelerator.device
        self._processes, self._rank = accelerator.num_processes, accelerator.process_index
        # A thread begins on the first GPU, on which pinning memory may then leave each process's context.
        begin = (
            partial(torch.cuda.set_device, self._device.index or 0) if self._device.type == "cuda" else None
        )
        self._loader = ThreadPoolExecutor(1, "loader", begin)
        self._ahead: dict[tuple[int, int], Future[tuple[torch.Tensor, ...]]] = {}

    def close(self) -> None:
        self._loader.shutdown(cancel_futures=True)

    def first_of(self, step: int) -> int:
        """The global sample position at which `step` begins."""
        began, before = self.began
        return before + (step - began) * self.size

    def positions(self, step: int, micro: int) -> range:
        """The global sample positions of this process in micro-step `micro` of `step`."""
        share = self.size // (self._processes * self.parts)
        first = self.first_of(step) + (self._rank * self.parts + micro) * share
        return range(first, first + share)

    def at(self, step: int, micro: int) -> Batch:
        """What is learnt from at those positions, on the device; a GPU's next one is made ready meanwhile.

        Not a CPU's: a second thread that computes makes OpenMP's wait on each other, and halves the speed of a step to hide
        less than a hundredth of it.
        """
        ready = self._ahead.pop((step, micro), None)
        host = ready.result() if ready is not None else self.on_host(step, micro)
        micro += 1
        following = (step, micro) if micro < self.parts else (step + 1, 0)
        if self._device.type != "cpu":
            self._ahead = {following: self._loader.submit(self.on_host, *following)}
        moments, noise, posterior_noise, times, condition = (
            t.to(self._device, non_blocking=True) for t in host
        )
        latents = self._autoencoder.latents(moments, posterior_noise)
        return Batch(
            latents.to(memory_format=torch.channels_last),
            noise.to(memory_format=torch.channels_last),
            times,
            condition,
        )

    def on_host(self, step: int, micro: int) -> tuple[torch.Tensor, ...]:
        """Moments, noise, posterior noise, times and condition on the CPU."""
        seed, positions = self._settings.seed, self.positions(step, micro)
        ids = self.order[positions]
        flipped = None
        if self._flips:
            flipped = torch.from_numpy(randomness.uniform(seed, "flip", positions) < 0.5)
        noise = randomness.normal((2, *self._latents.latent_shape), seed, "noise", positions)
        dropped = torch.from_numpy(
            randomness.uniform(seed, "label", positions) < self._settings.label_dropout
        )
        tensors = (
            self._latents.read(ids, flipped),
            noise[:, 0],
            noise[:, 1],
            self.times(positions),
            self._condition(ids, positions, dropped),
        )
        if self._device.type != "cuda":
            return tensors
        # Views with gaps would be copied once more, to memory that is not pinned, and waited for.
        return tuple(t.contiguous().pin_memory() for t in tensors)

    def _condition(self, ids: torch.Tensor, positions: range, dropped: torch.Tensor) -> torch.Tensor:
        if self._takes_text:
            counts = self._latents.text.captions[ids]
            share = torch.from_numpy(randomness.uniform(self._settings.seed, "caption", positions))
            tokens = self._latents.read_tokens(ids, (share * counts).long())
            tokens[dropped] = self._latents.empty_tokens
            return tokens
        null = self._null_label
        labels = self._latents.labels[ids] if null else torch.zeros(len(ids), dtype=torch.int64)
        return torch.where(dropped, null, labels)

    def times(self, positions: range) -> torch.Tensor:
        """(n,) int64: the diffusion times at those positions."""
        settings = self._settings
        share = randomness.uniform(settings.seed, "time", positions)
        if settings.stratified_times:
            # Kingma et al. (2021), appendix I, with a draw of its own in every share
            place = (torch.arange(positions.start, positions.stop) - self.began[1]) % self.size
            share = (place.numpy() + share) / self.size
        share = torch.from_numpy(share)
        if settings.times == "uniform":
            return diffusion.uniform_times(share, self._schedule.num_steps)
        return diffusion.lognormal_times(
            share, self._lognormal_edges, settings.times_mean, settings.times_std
        )

    @cached_property
    def _lognormal_edges(self) -> torch.Tensor:
        return diffusion.lognormal_edges(diffusion.levels(self._schedule))

    def of_everyone(self, step: int) -> tuple[list[int], list[int]]:
        """The images and the times of the whole of a step, all processes' shares."""
        positions = range(self.first_of(step), self.first_of(step + 1))
        return self.order[positions].tolist(), self.times(positions).tolist()
